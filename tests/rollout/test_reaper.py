"""Processes that an engine started do not outlive it, even when it is killed without a word."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the reaper needs /proc")

PARENT = """
import subprocess, sys, time
from rollout.reaper import end_with_this_process
end_with_this_process()
sleeping = "import time; time.sleep(300)"
grandchild = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleeping}']); {sleeping}"
child = subprocess.Popen([sys.executable, "-c", grandchild], start_new_session=True)
print(child.pid, flush=True)
time.sleep(300)
"""


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in (Path("/proc") / str(process) / "status").read_text()
    except OSError:
        return False


def children(process: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"\nPPid:\t{process}\n" in status.read_text():
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_descendants_end_with_the_process_that_started_them(end: signal.Signals):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert wait_for(lambda: len(children(child)) == 1)
        (grandchild,) = children(child)
        reapers = [process for process in children(parent.pid) if process != child]
        assert alive(child) and alive(grandchild) and len(reapers) == 1
        os.kill(parent.pid, end)
        parent.wait(30)
        assert wait_for(lambda: not alive(child) and not alive(grandchild)), "they outlived it"
        assert wait_for(lambda: not alive(reapers[0])), "the reaper stayed behind"
        assert bystander.poll() is None
    finally:
        parent.kill()
        bystander.kill()
        bystander.wait()
