"""Runs as processes of their own on the tests' cluster, ended from outside at chosen moments."""

from __future__ import annotations

import os
import random
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
    moment: Callable[[Run], bool], folder: Path, *overrides: str, sign: int = signal.SIGKILL, delay_s: float = 0.0
) -> tuple[int, str]:
    """Starts the tiny recipe and sends the signal ``delay_s`` after ``moment``; its exit code and what it printed."""
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
            while not moment(run):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < ends, log.read_text()
                time.sleep(POLL_S)
            time.sleep(delay_s)
            process.send_signal(sign)
            return process.wait(PATIENCE_S), log.read_text()
        finally:
            process.kill()
            process.wait()


def logged(step: int) -> Callable[[Run], bool]:
    """The moment when the metrics of a step are there."""
    return lambda run: any(f'"step": {step},' in line for line in _lines(run.path / "metrics.jsonl"))


def learned(step: int) -> Callable[[Run], bool]:
    """The moment when the metrics of a step of the cold start are there."""
    return lambda run: any(f'"step": {step},' in line for line in _lines(run.path / "supervised.jsonl"))


def saving(step: int, stage: str = ".") -> Callable[[Run], bool]:
    """The moment when the checkpoint of a step, or a later one, is being written; in ``cold_start`` one of its own."""

    def begun(run: Run) -> bool:
        partials = _partials(run.path / "checkpoints" / stage)
        return any(int(name.split("_")[1].split(".")[0]) >= step for name in partials)

    return begun


def _partials(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".partial")] if folder.exists() else []


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def some_seconds(rng: random.Random, most: float) -> float:
    return rng.random() * most


def assert_same_run(one: Run, other: Run, *, steps: int) -> None:
    """The same metrics to the last bit, but for times, and the same trajectories."""
    assert [row["step"] for row in one.rows] == [row["step"] for row in other.rows]
    for row, same in zip(one.rows, other.rows, strict=True):
        for name in (name for name in row.keys() | same.keys() if not name.startswith(TIMED)):
            assert row.get(name) == same.get(name), f"step {row['step']}: {name}"
    for step in range(1, steps + 1):
        assert read_lines(one.path / "samples" / f"step_{step}.jsonl") == other.trajectories(step), f"step {step}"
