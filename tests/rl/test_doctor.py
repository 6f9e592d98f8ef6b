"""The hang doctor beside a real run whose processes hang, one kind after the other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import ray
from ray.exceptions import RayActorError

from rl.choices import DoctorAct
from rl.config import Doctor as Settings
from rl.doctor import Doctor
from rl.errors import RunStopped
from rl.fault_log import FaultLog
from rl.system import System
from rl.timeline import Timeline
from rl.whereabouts import Whereabouts, end, innermost, stack_of, state_of
from tests.rl.saboteur import Saboteur, arm, closed, kill
from tests.rl.tiny_runs import REPOSITORY, assert_one_sentence, run_here, tiny_recipe
from trainer.learner import Learner

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
    with timeline.span("rewards", "score"):
        now[0] += 70
    with timeline.span("rewards", "score", detail="sums/2"), timeline.span("driver", "rollout", step=4):
        assert looked(warning, 200) == [
            "driver is late: rollout in step 4 has taken 200.0 s, for the first time; under way: score of sums/2 by "
            "rewards for 200.0 s"
        ]
        # What was late before is no measure, though it ended well.
        with pytest.raises(
            RunStopped, match=r"waits \(rollout of step 4\); rewards is late: .* 70\.0 s at most before"
        ):
            looked(doctor(DoctorAct.stop), 11)
    assert timeline.longest(("driver", "rollout")) is None
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
    assert timeline.longest(("learner", "sync")) is None
    assert stalled.startswith(f"the driver (process {os.getpid()}) stood still for ")
    assert 0.8 <= float(late.split(" has taken ")[1].split()[0]) < 2, late


@pytest.mark.parametrize("act", [DoctorAct.recover, DoctorAct.stop])
def test_what_ends_while_it_is_looked_at_is_left_alone(act: DoctorAct):
    timeline, said = Timeline(), list[str]()
    computing, where = hanging("sum(range(10**13))")
    system = SimpleNamespace(
        timeline=timeline, faults=FaultLog(said.append), learner=SimpleNamespace(processes=[where])
    )
    # A disk that is full takes no notes.
    doctor = Doctor(Settings(act=act, floor_s=0.01, first_s=0.01), cast(System, system), notes=Path("/dev/full"))

    async def look() -> None:
        syncing = timeline.begin("learner", "sync", step=3)
        await asyncio.sleep(0.02)
        looking = asyncio.create_task(doctor.look())
        await asyncio.sleep(0.02)  # a stack takes five times as long
        timeline.end(syncing)
        await looking

    try:
        asyncio.run(look())
        (sentence,) = said
        assert "learner is late: sync in step 3" in sentence and sentence.endswith("; it has ended meanwhile")
        assert computing.poll() is None and timeline.longest(("learner", "sync")) is None
    finally:
        computing.kill()
        computing.wait()


def test_a_rank_whose_host_does_not_answer_is_ended_by_ray(cluster: None, tmp_path: Path):
    class Stuck:
        def wait(self) -> None:
            time.sleep(600)

    timeline, said = Timeline(), list[str]()
    actor = ray.remote(Stuck).options(num_cpus=0).remote()
    waiting = actor.wait.remote()
    learner = Learner(tiny_recipe(tmp_path), [actor], timeout_s=60)
    learner.processes = [Whereabouts("gone", 1, None)]
    system = SimpleNamespace(timeline=timeline, faults=FaultLog(said.append), learner=learner)
    doctor = Doctor(Settings(floor_s=0.01, first_s=0.01), cast(System, system))
    with timeline.span("learner", "step", step=3):
        time.sleep(0.02)
        asyncio.run(doctor.look())
    with pytest.raises(RayActorError):
        ray.get(waiting, timeout=60)
    late, ended = said  # before and after it acts
    assert "step in step 3" in late and "learner rank 0 (process 1) cannot be looked at: LookupError on gone" in late
    assert ended == "learner rank 0 cannot be killed (LookupError on gone); Ray is told to end what is left"


def test_what_was_counted_is_in_some_row_whatever_becomes_of_the_first_one():
    faults = FaultLog()
    faults.record("late", "a step hung")
    row = faults.take()
    faults.record("tools", "a tool died")
    faults.put_back([{"step": 4, "reward/mean": 0.5}, row])
    assert {name: count for name, count in faults.take().items() if count} == {"faults/late": 1.0, "faults/tools": 1.0}
    assert set(faults.take().values()) == {0.0}


def told_of_four(printed: str) -> list[str]:
    """Each of what hung is named, and what was done about it; returns all lines about what is late."""
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    late = [line for line in warnings if " is late: " in line]

    def after(sentence: str) -> str:
        """The next lines: who loses the process may say so before the one who ended it."""
        return "\n".join(warnings[warnings.index(sentence) + 1 :][:3])

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
    assert "(and 3 others): the reward worker at gated of sums/" in scoring and "in gated (fragile.py:" in scoring
    assert "is stopped by a signal" in scoring and " is killed" in after(scoring)
    assert "cannot be looked at: LookupError on gone" in falling_asleep
    assert "engine 0 cannot be killed (LookupError on gone)" in after(falling_asleep)
    assert "engine 0 is late: request of sums/" in generating and "is stopped by a signal" in generating
    assert "engine 0 is killed" in after(generating)
    assert "learner is late: step in step 4" in learning
    assert "learner rank 1 (process" in learning and "is stopped by a signal" in learning
    assert "learner rank 0 (process" in learning
    assert "learner rank 1 is killed" in after(learning)
    return late


def test_what_hangs_is_named_and_ended(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    gate, sittings = tmp_path / "gate", list[Saboteur]()

    async def plan(saboteur: Saboteur) -> None:
        faults = saboteur.system.faults
        sittings.append(saboteur)
        if len(sittings) == 2:  # restored once, and not again
            await saboteur.published(3)
            await saboteur.busy("learner", "step")
            kill(saboteur.system.learner.processes[0])
            await asyncio.Event().wait()
        await saboteur.published(1)
        with closed(gate):
            while len(working := saboteur.system.rewards.working(2)) < 2:
                await asyncio.sleep(0.01)
            os.kill(working[1][1].pid, signal.SIGSTOP)  # beside another one, which goes round and round
            while faults.totals["late"] < 1:
                await asyncio.sleep(0.1)
            left = saboteur.engine(0)
            os.kill(left.pid, signal.SIGSTOP)  # it has nothing to do, and is next told to sleep,
            saboteur.system.pool._engines[0].process = replace(left, host="gone")  # where nobody answers for it
        await saboteur.gone(0)
        end(left)
        await saboteur.until_up(0)
        await saboteur.stop_engine_while(0, "request")
        await saboteur.gone(0)
        await saboteur.until_up(0)
        await saboteur.step_over()  # whose row is taken back
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
        "faults.learner_restores=1",
        "checkpoint.every=2",
        "doctor={floor_s: 6, factor: 3, first_s: 120}",
        f"domains.sums.rewards=[{{use: 'tests.rl.fragile:gated', args: {{gate: '{gate}'}}, timeout_s: 300}}]",
    )
    output = capsys.readouterr()
    print(output.out)
    assert code == 1 and time.monotonic() - began < 300
    assert_one_sentence(
        output.err,
        "learner rank 0 died during step",
        "; restores of the learner before that: 1 (faults.learner_restores)",
    )
    assert run.status["status"] == "stopped"
    late = told_of_four(output.out)
    assert sum(row["faults/reward_workers"] for row in run.steps) == 1
    assert (
        "learner rank 1 died during step: " in output.out and "the run goes on after step 2 (1. restore" in output.out
    )
    notes = (run.path / "doctor.txt").read_text()
    assert "--- learner rank 0" in notes and 'File "' in notes
    # Every one is in a row, those of the step that was taken back and of the learner's end as well.
    assert [row["step"] for row in run.steps] == [1, 2, 3]
    stood_still = [line for line in output.out.splitlines() if " stood still for " in line]
    assert sum(row["faults/late"] for row in run.steps) == len(late) + len(stood_still)
    assert sum(row["faults/engine_restarts"] for row in run.steps) == 2
