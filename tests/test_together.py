"""GPU jobs side by side, with programs that need no GPU."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import together
from tests.gpu.together import Job, Machine, Together, chosen, main

SAY = "{python} -c \"import os, time; print(time.monotonic(), os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.6)\""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "LOOK_S", 0.02)


def said(out: Path, name: str) -> tuple[float, str]:
    began, gpus = (out / f"{name}.log").read_text().split()
    return float(began), gpus


def test_jobs_get_the_gpus_that_they_need_and_wait_for_others(tmp_path: Path):
    jobs = [
        Job(name="first", command=SAY, alone=True),
        Job(name="both", command=SAY, gpus=2, alone=True),
        Job(name="a", command=SAY),
        Job(name="b", command=SAY),
        Job(name="next", command=SAY, alone=True, after=("first",)),
        Job(name="many", command=SAY, gpus=3),
    ]
    assert Together(jobs, Machine(2), tmp_path).run()
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["ended"].keys() == {"first", "both", "a", "b", "next"}
    assert status["more GPUs than there are"] == ["many"] and not status["waiting"] and not status["running"]
    assert said(tmp_path, "first")[1] == "0"
    assert {said(tmp_path, name)[1] for name in "ab"} == {"1"}  # together, beside the one that is alone
    assert said(tmp_path, "both")[1] == "0,1"
    began = {name: said(tmp_path, name)[0] for name in status["ended"]}
    assert began["both"] > max(began["first"], began["a"], began["b"]) + 0.5
    assert began["next"] > began["first"] + 0.5


def test_a_job_that_fails_or_takes_too_long_is_said(tmp_path: Path):
    jobs = [
        Job(name="fails", command="{python} -c 'raise SystemExit(3)'"),
        Job(name="hangs", command="{python} -c 'import time; time.sleep(60)'", limit_s=0.3),
        Job(name="fine", command='{python} -c \'open("{figures}", "w").write("1")\'', after=("fails",)),
    ]
    began = time.monotonic()
    assert not Together(jobs, Machine(1), tmp_path).run()
    assert time.monotonic() - began < 20
    ended = json.loads((tmp_path / "status.json").read_text())["ended"]
    assert {name: end["exit"] for name, end in ended.items()} == {"fails": 3, "hangs": -9, "fine": 0}
    assert (tmp_path / "fine.json").read_text() == "1"


def test_what_a_job_comes_after_is_run_too():
    assert [job.name for job in chosen(["sync", "engine"])] == ["loop", "sync", "engine"]
    assert [job.name for job in chosen(["sync"], done=["loop"])] == ["sync"]
    assert [job.name for job in chosen(["sync", "loop"], done=["loop"])] == ["loop", "sync"]
    assert chosen([]) == list(together.JOBS)
    with pytest.raises(SystemExit):
        main(["nonsense", "--out", "nowhere"])


def test_what_ended_before_stays_said(tmp_path: Path):
    Together(
        [Job(name="a", command=SAY), Job(name="b", command="{python} -c 'raise SystemExit(3)'")], Machine(1), tmp_path
    ).run()
    assert together.ended_in(tmp_path)["b"]["exit"] == 3
    again = [Job(name="b", command=SAY), Job(name="c", command=SAY, after=("a",))]
    assert Together(again, Machine(1), tmp_path).run()
    ended = together.ended_in(tmp_path)
    assert {name: end["exit"] for name, end in ended.items()} == {"a": 0, "b": 0, "c": 0}


def test_every_job_names_what_there_is(capsys: pytest.CaptureFixture[str]):
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [job.name for job in together.JOBS]
    files = {word for job in together.JOBS for word in job.command.split() if word.endswith((".yaml", ".py"))}
    assert files and all((together.ROOT / file).is_file() for file in files)


def test_what_a_job_selects_exists():
    """In one process, which imports what the tests import once."""
    selecting = [shlex.split(job.command)[3:] for job in together.JOBS if " -k " in job.command]
    program = f"import pytest; print([int(pytest.main([*a, '--collect-only', '-q'])) for a in {selecting!r}])"
    command = [sys.executable, "-c", program]
    asked = subprocess.run(command, cwd=together.ROOT, capture_output=True, text=True, check=True)
    assert selecting and asked.stdout.splitlines()[-1] == str([0] * len(selecting)), asked.stdout
