"""Runs whose processes are killed under them, and what is left of their promises then."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.rl.metric_page import unexplained
from tests.rl.saboteur import Saboteur, arm, closed, kill
from tests.rl.tiny_runs import Run, read_lines, run_here

pytestmark = pytest.mark.usefixtures("cluster")

FRAGILE = "tests.rl.fragile"
TOOL_S = 12
"""Seconds that an environment has to start, its process included, and after which one that hangs is given up."""


def promises(run: Run, *, steps: int, staleness: int) -> None:
    """What holds of every run, whatever happened to it."""
    assert run.status["status"] == "finished"
    assert [row["step"] for row in run.steps] == list(range(1, steps + 1))
    assert [row["sync/version"] for row in run.steps] == list(range(1, steps + 1))
    assert all(row["sync/verified"] == 1.0 for row in run.steps)
    trained = []
    for step in range(1, steps + 1):
        for row in run.trajectories(step):
            trained.append(row["id"])
            versions = np.array(row["versions"])[np.array(row["sampled"], bool)]
            assert step - 1 - staleness <= versions.min() and versions.max() <= step - 1
            assert (np.diff(versions) >= 0).all()
    assert len(trained) == len(set(trained)), "something was trained twice"


@pytest.mark.timeout(600)
def test_a_run_survives_its_processes(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    gate, flag = tmp_path / "gate", tmp_path / "flag"

    async def plan(saboteur: Saboteur) -> None:
        with closed(gate):
            await saboteur.stop_engine_while(1, "generate")
            await saboteur.lose_engine(1, "engine killed while generating")

        await saboteur.busy("learner", "step")
        await saboteur.stop_engine_while(0, "sync")
        async with asyncio.timeout(20):  # the other one has its weights, and is not late for the doctor
            await saboteur.over("engine 1", "sync")
        with closed(gate):
            await saboteur.lose_engine(0, "engine killed while receiving weights")

        await saboteur.busy("learner", "step")
        with closed(gate):
            await saboteur.lose_engine(1, "engine killed while the learner steps")
            await saboteur.busy("rewards", "score")
            worker = saboteur.system.rewards._serial[0].process
            assert worker is not None
            kill(worker)
        print("seconds to recover:", {what: round(took, 1) for what, took in saboteur.recovery_s.items()})

    arm(monkeypatch, plan)
    code, run = run_here(
        tmp_path,
        "steps=6",
        "log_samples=100",
        "rollout={engines: 2, max_staleness: 1}",
        "faults={engine_restarts: 1, window_s: 1.0e-9}",  # each again, once it has finished something
        f"domains.sums.rewards=[{{use: '{FRAGILE}:gated', args: {{gate: '{gate}'}}, timeout_s: 300}}]",
        f"domains.sums.environment={{use: '{FRAGILE}:Fragile', concurrency: 3, args: {{flag: '{flag}'}}}}",
        f"domains.sums.environment.tool_timeout_s={TOOL_S}",
    )
    printed = capsys.readouterr().out
    print(printed)
    assert code == 0
    promises(run, steps=6, staleness=1)
    faults = {name: sum(row[name] for row in run.steps) for name in run.steps[0] if name.startswith("faults/")}
    assert faults["faults/engine_restarts"] == 3 and faults["faults/engines_lost"] == 0
    assert faults["faults/reissued"] >= 1
    assert faults["faults/reward_workers"] == 1 and faults["faults/tools"] == 2
    assert unexplained(faults) == []
    # Two samples lost their tools and were left out; all others were trained: 6 steps of 4 groups of 4.
    assert sum(row["samples/failed"] for row in run.steps) == 2
    assert sum(len(run.trajectories(step)) for step in range(1, 7)) == 6 * 4 * 4 - 2
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    for words in (
        "died during generate",
        "engine 1 of 2 is back",
        "a reward worker",
        "broke: its process died",
        f"generation no answer within {TOOL_S} s",
    ):
        assert any(words in line for line in warnings), words
    assert any(re.search("died during (stage|commit)", line) for line in warnings)  # where the signal found it
    loads = [row["actor"] for row in read_lines(run.path / "timeline.jsonl") if row["phase"] == "load"]
    assert sorted(loads) == ["engine 0", "engine 0", "engine 1", "engine 1", "engine 1"]


def test_equal_seeds_and_weights_give_equal_tokens_whoever_dies(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Lock-step, with one engine that sleeps while the learner steps, against a run left alone that never sleeps."""
    overrides = ("steps=3", "placement=shared", "evaluation.num_prompts=3", "log_samples=100")
    code, alone = run_here(tmp_path, *overrides, "rollout.sleep=false", name="alone")
    assert code == 0
    held: list[int] = []

    async def plan(saboteur: Saboteur) -> None:
        held.append(await saboteur.held_bytes(0))
        await saboteur.stop_engine_while(0, "generate")
        await saboteur.lose_engine(0, "generating")
        learner = await saboteur.stop_learner_while("step")
        held.append(await saboteur.held_bytes(0))
        assert saboteur.is_busy("engine 0", "sleep")
        kill(saboteur.engine(0))  # found out when it is to wake
        began = time.monotonic()
        os.kill(learner, signal.SIGCONT)
        await saboteur.step_over()
        await saboteur.until_up(0)
        held.append(await saboteur.held_bytes(0))
        print(f"seconds until an engine killed in its sleep was replaced: {time.monotonic() - began:.1f}")

    arm(monkeypatch, plan)
    code, harmed = run_here(tmp_path, *overrides, name="harmed")
    assert code == 0
    awake, asleep, replaced = held
    assert awake == replaced > 0 and asleep == 0
    promises(harmed, steps=3, staleness=0)
    for one, other in zip(alone.rows, harmed.rows, strict=True):
        for name, value in one.items():
            if not name.startswith(("time/", "speed/", "faults/", "checkpoint/")) and name != "tokens_per_s":
                assert other[name] == value, f"step {one['step']}: {name}"
    assert sum(row["faults/engine_restarts"] for row in harmed.steps) == 2
    for step in range(1, 4):
        tokens = [[row["token_ids"] for row in run.trajectories(step)] for run in (alone, harmed)]
        assert tokens[0] == tokens[1]
