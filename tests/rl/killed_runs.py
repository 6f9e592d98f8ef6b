"""Runs as processes of their own on the tests' cluster, ended from outside at chosen moments."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import ray

from tests.rl.tiny_runs import REPOSITORY, Run, command, read_lines

PATIENCE_S = 120.0
POLL_S = 0.002
TIMED = ("time/", "speed/", "memory/", "checkpoint/", "tokens_per_s")
"""Beginnings of the names of metrics that no two runs share."""


def run_until(
    moment: Callable[[Run], bool],
    folder: Path,
    *overrides: str,
    sign: int = signal.SIGKILL,
    delay_s: float = 0.0,
    amid: bool = False,
) -> tuple[int, str]:
    """Starts the tiny recipe and sends the signal ``delay_s`` after ``moment``; its exit code and what it printed.

    ``amid`` a moment is where it has not passed when the signal comes.
    """
    run = Run(folder / "runs" / "tiny")
    log = folder / "log.txt"
    with open(log, "w") as output:
        process = subprocess.Popen(
            command(folder, *overrides),
            cwd=REPOSITORY,
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            ends = time.monotonic() + PATIENCE_S
            while not (moment(run) and (not amid or _is_held(process, lambda: moment(run)))):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < ends, log.read_text()
                time.sleep(POLL_S)
            time.sleep(delay_s)
            process.send_signal(sign)
            return process.wait(PATIENCE_S), log.read_text()
        finally:
            process.kill()
            process.wait()


def _is_held(process: subprocess.Popen[bytes], moment: Callable[[], bool]) -> bool:
    """Leaves the process stopped where that was in time, and lets it go on otherwise."""
    process.send_signal(signal.SIGSTOP)
    while any(_state(thread) not in "TZX" for thread in Path(f"/proc/{process.pid}/task").iterdir()):
        time.sleep(POLL_S)
    if moment():
        return True
    process.send_signal(signal.SIGCONT)
    return False


def _state(thread: Path) -> str:
    """``T`` is stopped, by proc(5)."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def after(seconds: float) -> Callable[[Run], bool]:
    """The moment so long after this call."""
    at = time.monotonic() + seconds
    return lambda run: time.monotonic() >= at


def logged(step: int) -> Callable[[Run], bool]:
    """The moment when the metrics of a step are there."""
    return lambda run: any(f'"step": {step},' in line for line in _lines(run.path / "metrics.jsonl"))


def learned(step: int) -> Callable[[Run], bool]:
    """The moment when the metrics of a step of the cold start are there."""
    return lambda run: any(f'"step": {step},' in line for line in _lines(run.path / "supervised.jsonl"))


def saving(step: int) -> Callable[[Run], bool]:
    """The moment when the checkpoint of a step, or a later one, is being written."""
    return lambda run: any(partial >= step for partial in half_saved(run))


def half_saved(run: Run) -> list[int]:
    """Steps with a checkpoint that is being written, or never was to its end."""
    return [int(path.name.split("_")[1].split(".")[0]) for path in (run.path / "checkpoints").glob(".step_*.partial")]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def assert_same_run(one: Run, other: Run, *, steps: int) -> None:
    """The same metrics to the last bit, but for times, and the same trajectories."""
    assert [row["step"] for row in one.rows] == [row["step"] for row in other.rows]
    for row, same in zip(one.rows, other.rows, strict=True):
        for name in (name for name in row.keys() | same.keys() if not name.startswith(TIMED)):
            assert row.get(name) == same.get(name), f"step {row['step']}: {name}"
    for step in range(1, steps + 1):
        assert read_lines(one.path / "samples" / f"step_{step}.jsonl") == other.trajectories(step), f"step {step}"
