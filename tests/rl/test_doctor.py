"""The hang doctor beside a real run whose processes hang, one kind after the other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from rl.config import Doctor as Settings
from rl.config import DoctorAct
from rl.doctor import Doctor
from rl.errors import RunStopped
from rl.fault_log import FaultLog
from rl.system import System
from rl.timeline import Timeline
from rl.whereabouts import Whereabouts, end, innermost, stack_of, state_of
from tests.rl.saboteur import Saboteur, arm, closed
from tests.rl.tiny_runs import REPOSITORY, assert_one_sentence, run_here

HANGING = """
import sys, time
from rl.whereabouts import announce

def waits():
    {how}

where = announce()
print(where.host, where.pid, where.descriptor, flush=True)
waits()
"""


def hanging(how: str) -> tuple[subprocess.Popen[str], Whereabouts]:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING.format(how=how)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    host, pid, descriptor = process.stdout.readline().split()
    return process, Whereabouts(host, int(pid), int(descriptor))


def test_a_process_is_looked_at_from_outside():
    sleeping, one = hanging("time.sleep(600)")
    # One long call into C, which never lets go of the interpreter's lock.
    computing, other = hanging("sum(range(10**13))")
    try:
        assert "sleeps, in waits (<string>:6), called by <module>" in innermost(stack_of(one))
        assert "runs, in waits" in innermost(stack_of(other))
        assert "waits" in innermost(stack_of(one))  # again
        os.kill(one.pid, signal.SIGSTOP)
        while state_of(one) != "is stopped by a signal":
            time.sleep(0.01)
        assert stack_of(one) == "is stopped by a signal"
        end(one)
        assert sleeping.wait(10) == -signal.SIGKILL
        assert state_of(one) == stack_of(one) == "is gone"
        # Whoever has the process's id now is not the one that announced itself.
        end(Whereabouts(other.host, other.pid, (other.descriptor or 0) + 50))
        assert "runs" in stack_of(other)
    finally:
        for process in (sleeping, computing):
            process.kill()
            process.wait()


def test_deadlines_come_from_what_phases_took_before():
    now = [0.0]
    timeline, said = Timeline(clock=lambda: now[0]), list[str]()
    system = SimpleNamespace(
        timeline=timeline, faults=FaultLog(said.append), rewards=SimpleNamespace(working=lambda most: [])
    )

    def doctor(act: DoctorAct) -> Doctor:
        return Doctor(Settings(act=act, factor=3, floor_s=10, first_s=100), cast(System, system))

    def looked(doctor: Doctor, seconds: float) -> list[str]:
        now[0] += seconds
        asyncio.run(doctor.look())
        told = said.copy()
        said.clear()
        return told

    warning = doctor(DoctorAct.warn)
    with pytest.raises(ValueError), timeline.span("rewards", "score"):
        now[0] += 1000  # no measure for others, as it failed
        raise ValueError
    with timeline.span("rewards", "score", detail="sums/1"), timeline.span("engine 0", "generate"):
        assert looked(warning, 99) == []
        assert looked(warning, 2) == ["rewards is late: score of sums/1 has taken 101.0 s, for the first time"]
        assert looked(warning, 50) == []  # said once
        with timeline.span("rewards", "score", detail="sums/3"):
            assert len(looked(warning, 60)) == 1  # and once more after twice the time
    with timeline.span("rewards", "score", detail="sums/2"), timeline.span("driver", "rollout", step=4):
        assert looked(warning, 600) == [
            "driver is late: rollout in step 4 has taken 600.0 s, for the first time; under way: score of sums/2 by "
            "rewards for 600.0 s"
        ]
        with pytest.raises(
            RunStopped, match=r"waits \(rollout of step 4\); rewards is late: .* 211\.0 s at most before"
        ):
            looked(doctor(DoctorAct.stop), 40)
    timeline.begin("engine 1", "sync")
    timeline.end(timeline.begin("engine 0", "sync"))
    assert looked(doctor(DoctorAct.warn), 9) == []  # however short it was before


def test_a_driver_that_stood_still_blames_nobody_else():
    timeline, said = Timeline(), list[str]()
    system = SimpleNamespace(timeline=timeline, faults=FaultLog(said.append))
    doctor = Doctor(Settings(act=DoctorAct.warn, floor_s=0.8, first_s=0.8), cast(System, system))

    async def run() -> None:
        watching = asyncio.create_task(doctor.watch())
        with timeline.span("learner", "sync"):
            await asyncio.sleep(0.1)
            time.sleep(2)
            while len(said) < 2:
                await asyncio.sleep(0.05)
            assert not watching.done()
        watching.cancel()

    system.learner = SimpleNamespace(processes=[])
    asyncio.run(asyncio.wait_for(run(), 30))
    stalled, late = said
    assert stalled.startswith(f"the driver (process {os.getpid()}) stood still for ")
    assert 0.8 <= float(late.split(" has taken ")[1].split()[0]) < 2, late


def test_what_hangs_is_named_and_ended(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    gate = tmp_path / "gate"

    async def plan(saboteur: Saboteur) -> None:
        faults = saboteur.system.faults
        await saboteur.published(1)
        with closed(gate):
            while len(working := saboteur.system.rewards.working(2)) < 2:
                await asyncio.sleep(0.01)
            os.kill(working[1][1].pid, signal.SIGSTOP)  # beside another one, which goes round and round
            while faults.totals["late"] < 1:
                await asyncio.sleep(0.1)
            os.kill(saboteur.engine(0).pid, signal.SIGSTOP)  # it has nothing to do, and is next told to sleep
        await saboteur.gone(0)
        await saboteur.until_up(0)
        await saboteur.stop_engine_while(0, "request")
        await saboteur.gone(0)
        await saboteur.until_up(0)
        await saboteur.busy("learner", "step")
        os.kill(saboteur.system.learner.processes[1].pid, signal.SIGSTOP)
        await asyncio.Event().wait()

    arm(monkeypatch, plan)
    began = time.monotonic()
    code, run = run_here(
        tmp_path,
        "steps=20",
        "learner.ranks=2",
        "reward_workers=2",
        "placement=shared",
        "faults.learner_restores=0",
        "doctor={floor_s: 6, factor: 3, first_s: 120}",
        f"domains.sums.rewards=[{{use: 'tests.rl.saboteur:gated', args: {{gate: '{gate}'}}, timeout_s: 300}}]",
    )
    output = capsys.readouterr()
    print(output.out)
    assert code == 1 and time.monotonic() - began < 300
    assert_one_sentence(output.err, "learner rank 1 died during step")
    assert run.status["status"] == "stopped"
    late = [line for line in output.out.splitlines() if line.startswith("warning: ") and " is late: " in line]
    # On a slow machine the driver, or a start that takes long, may be told as well.
    scoring, falling_asleep, generating, learning = (
        next(line for line in late if what in line)
        for what in (
            "rewards is late: ",
            "engine 0 is late: sleep()",
            "engine 0 is late: request",
            "learner is late: step",
        )
    )
    assert (
        "the driver waits (rollout of step 2); rewards is late: score of sums/" in scoring
        and "s at most before" in scoring
    )
    assert "(and 3 others): the reward worker at gated of sums/" in scoring and "in gated (saboteur.py:" in scoring
    assert "is stopped by a signal; it is killed" in scoring
    assert sum(row["faults/reward_workers"] for row in run.steps) == 1
    assert "is stopped by a signal" in falling_asleep
    assert "engine 0 is late: request of sums/" in generating and "is stopped by a signal" in generating
    assert "learner is late: step in step" in learning
    assert "learner rank 1 (process" in learning and "is stopped by a signal; it is killed" in learning
    assert "learner rank 0 (process" in learning
    notes = (run.path / "doctor.txt").read_text()
    assert "--- learner rank 0" in notes and 'File "' in notes
    assert sum(row["faults/late"] for row in run.steps) >= 2
