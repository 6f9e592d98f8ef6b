"""Builds a program and runs it once for each input of the job on standard input; prints what came out, as JSON."""

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys

OUTPUT_BYTES = 1 << 20


def main() -> None:
    """Builds the program, runs it on every input, and prints what each run gave."""
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: the program cannot read what else it will be given
    job = json.load(sys.stdin)
    with open(os.devnull, "w+b") as null:
        if job["build"] and subprocess.run(job["build"], stdin=null, stdout=null, stderr=null).returncode:
            print(json.dumps({"build_failed": True, "runs": []}))
            return
        prlimit = shutil.which("prlimit")
        limit = [prlimit, f"--cpu={int(job['case_s']) + 1}"] if prlimit else []
        runs = [run([*limit, *job["run"]], given, job["case_s"], null) for given in job["stdin"]]
    print(json.dumps({"build_failed": False, "runs": runs}))


def run(command, given, case_s, null):
    """[exit code, whether it took too long, what it printed]."""
    with open("stdout.txt", "w+b") as stdout:
        cpu_s = used_s()
        try:
            ended = subprocess.run(command, input=given.encode(), stdout=stdout, stderr=null, timeout=5 * case_s)
        except subprocess.TimeoutExpired:
            return [-9, True, ""]
        except OSError:
            return [127, False, ""]
        stdout.seek(0)
        said = stdout.read(OUTPUT_BYTES).decode(errors="replace")
    return [ended.returncode, used_s() - cpu_s > case_s, said]


def used_s():
    """CPU seconds of everything that has ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


main()
