"""Runs that are killed, interrupted, or lose their learner, and go on as if nothing had happened."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import threading
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ray._private.state import actors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rl.train
from model import load_model
from rl.checkpoint import Saved, newest
from rl.doctor import LEARNERS_OWN
from rl.resume import Resumption
from rl.saver import Saver
from rl.timeline import Timeline
from rl.utilization import Utilization
from tests.rl.killed_runs import after, assert_same_run, half_saved, learned, logged, run_until, saving
from tests.rl.tiny_runs import REWARDS, Run, assert_one_sentence, read_lines, run_here
from tests.small_disk import full_disk
from trainer.learner import Learner

STEPS, COLD_STEPS = 9, 60
LOCKSTEP = (
    f"steps={STEPS}",
    "learner.minibatches=2",
    "checkpoint={every: 1, keep: 3, cold_start_every: 7}",
    "evaluation.num_prompts=2",
    f"supervised={{steps: {COLD_STEPS}, dense_warmup_steps: 20, batch_size: 7, lr: 1.0e-3, lr_decay: true}}",
    f"supervised.demonstrations.function={REWARDS}:says_the_prompt",
    f"domains.sums.rewards=[{{use: '{REWARDS}:evenness'}}, {{use: '{REWARDS}:draws', weight: 0.1}}]",
)


@pytest.fixture(scope="module")
def straight(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happens to."""
    code, run = run_here(tmp_path_factory.mktemp("straight"), *LOCKSTEP)
    assert code == 0
    return run


def test_a_run_that_is_killed_at_any_moment_and_resumed_is_the_same_run(
    straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
):
    """By a signal in its cold start, at a moment of which nothing is known, and while it saves."""
    seed = secrets.randbits(32)
    rng, run = random.Random(seed), Run(tmp_path / "runs" / "tiny")
    code, said = run_until(learned(3), tmp_path, *LOCKSTEP, sign=signal.SIGTERM, delay_s=rng.uniform(0, 0.1))
    assert code == 130, said
    cold = saved_last(run)
    assert cold.cold_start and f"interrupted; cold start step {cold.step} is saved" in said

    took = datetime.fromisoformat(straight.status["ended"]) - datetime.fromisoformat(straight.status["started"])
    seconds = rng.uniform(0, took.total_seconds())
    killed, late = after(seconds), logged(STEPS - 2)  # the next one is killed while it saves what is left
    code, said = run_until(lambda run: killed(run) or late(run), tmp_path, *LOCKSTEP)
    assert code == -signal.SIGKILL, said
    left = saved_last(run)
    moments = f"seed {seed}: killed after {seconds:.2f} s, or at step {STEPS - 2}, with {left.moment} saved\n"
    request.node.add_report_section("call", "moments", moments)

    code, said = run_until(saving(4), tmp_path, *LOCKSTEP, amid=True)
    assert code == -signal.SIGKILL, said
    assert f"tiny: goes on after {place(left)}" in said
    left = saved_last(run)
    (half,) = half_saved(run)
    assert not left.cold_start and half == left.step + 1 and 4 <= half <= STEPS

    capsys.readouterr()
    assert run_here(tmp_path, *LOCKSTEP)[0] == 0
    assert f"tiny: goes on after {place(left)}" in capsys.readouterr().out
    assert_same_run(straight, run, steps=STEPS)
    supervised = [read_lines(one.path / "supervised.jsonl") for one in (run, straight)]
    assert [row["step"] for row in supervised[0]] == list(range(1, COLD_STEPS + 1))
    assert supervised[0] == supervised[1]
    for model in ("indexer_warmup", "cold_start", "model"):
        ours, theirs = load_model(run.path / model).state_dict(), load_model(straight.path / model).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), model
    shown = EventAccumulator(str(run.path)).Reload()
    assert [event.step for event in shown.Scalars("reward/mean")] == list(range(1, STEPS + 1))
    assert [event.step for event in shown.Scalars("supervised/lr")] == list(range(1, COLD_STEPS + 1))
    assert run.status["status"] == "finished"
    assert {path.name for path in (run.path / "checkpoints" / "step_9").iterdir()} == {
        *("manifest.json", "run.json", "groups.safetensors", "rank_00000.safetensors")
    }
    assert {path.name for path in (run.path / "checkpoints").iterdir()} == {f"step_{step}" for step in (7, 8, 9)}


def saved_last(run: Run) -> Saved:
    found = newest(run.path / "checkpoints").found
    assert found is not None
    return found


def place(saved: Saved) -> str:
    """As the run that goes on there says it."""
    return f"{saved.moment} of {COLD_STEPS if saved.cold_start else STEPS}"


def test_with_generation_ahead_every_prompt_is_trained_once(cluster: None, tmp_path: Path):
    # Six steps of four prompts are the 24 prompts of the recipe, each once.
    settings = ("steps=6", "rollout={max_staleness: 2, engines: 2, max_num_seqs: 4}", "log_samples=1000")
    code, said = run_until(logged(2), tmp_path, *settings, sign=signal.SIGTERM)
    assert code == 130, said
    run = Run(tmp_path / "runs" / "tiny")
    assert run.status["reason"] == "interrupted"
    assert saved_last(run).step == run.rows[-1]["step"]
    assert f"step {run.rows[-1]['step']} is saved, and the same command goes on" in said

    code, _ = run_until(logged(4), tmp_path, *settings, "checkpoint.every=1", delay_s=0.1)
    assert code == -signal.SIGKILL
    code, run = run_here(tmp_path, *settings)
    assert code == 0
    trained = [sorted({row["prompt"] for row in run.trajectories(step)}) for step in range(1, 7)]
    assert [len(prompts) for prompts in trained] == [4] * 6
    assert len({prompt for prompts in trained for prompt in prompts}) == 24
    assert [row["step"] for row in run.rows] == list(range(1, 7))
    assert max(row["staleness/max"] for row in run.rows) <= 2


def test_a_finished_run_goes_on_with_more_steps_on_other_ranks(
    straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """And where an alarm has stopped it, another run begins."""
    shutil.copytree(straight.path, tmp_path / "runs" / "tiny")
    assert run_here(tmp_path, *LOCKSTEP)[0] == 1
    assert (
        f"already holds a finished run; choose another name=..., raise steps above {STEPS}" in capsys.readouterr().err
    )
    more = (*LOCKSTEP, f"steps={STEPS + 2}", "checkpoint.every=9", "learner.ranks=2", "learner.zero_stage=3")
    code, run = run_here(tmp_path, *more, "alarms={window: 1, truncated: 0, stop: [truncated]}")
    said = capsys.readouterr()
    assert code == 1
    assert "tiny: from here on with " in said.out and "learner.ranks 1 -> 2, learner.zero_stage 2 -> 3" in said.out
    assert_one_sentence(said.err, "alarm truncated: ", f"; step {STEPS + 1} is saved, and the same command goes on")
    assert run.status["reason"] in said.err
    assert saved_last(run).step == STEPS + 1
    assert run.trajectories(STEPS + 1) and (run.path / "report.html").exists()

    calm = ("alarms={window: 1, truncated: 0}", f"resume={run.path}")
    code, branch = run_here(tmp_path, *more, *calm, name="branch")
    assert code == 0
    said = capsys.readouterr().out
    assert f"branch: starts after step {STEPS + 1} of {saved_last(run).path}" in said
    assert "alarms.stop ['truncated'] -> []" in said
    assert [row["step"] for row in [*run.rows, *branch.rows]] == list(range(STEPS + 3))
    assert run.rows[: STEPS + 1] == straight.rows
    assert all(row["sync/verified"] == 1 and row["ratio/clipped"] < 0.5 for row in [*run.steps, *branch.steps])
    saved = sorted(path.name for path in (branch.path / "checkpoints").iterdir())
    assert saved == [f"step_{STEPS + 1}", f"step_{STEPS + 2}"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("prompts_per_step=8", "cannot go on with another prompts_per_step: it was 4 and is 8 now"),
        ("domains.sums.group_size=2", "cannot go on with another domains.sums.group_size"),
        (
            "domains.more={prompts: '${domains.sums.prompts}', thinking: false, rewards: [{use: format}]}",
            "another domains.more",
        ),
        ("steps=3", "steps is 3, but"),
    ],
)
def test_a_recipe_that_the_checkpoint_does_not_fit_is_refused(
    straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, sentence: str
):
    shutil.copytree(straight.path, tmp_path / "runs" / "tiny")
    (tmp_path / "runs" / "tiny" / "status.json").write_text('{"status": "running", "started": "2026-01-01"}')
    before = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    assert run_here(tmp_path, *LOCKSTEP, override)[0] == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_bytes() == before


def without_deadline(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What the next run asks its ranks for, once they are up, in no phase that the hang doctor would end."""
    found, timelines = set[str](), list[Timeline]()
    open_run, gather = rl.train.open_run, Learner._gather

    def opened(*args: Any) -> Resumption:
        resumption = open_run(*args)
        timelines.append(resumption.run.timeline)
        return resumption

    async def gathered(learner: Learner, method: str, *args: Any) -> list[Any]:
        phases = {span.kind for span in timelines[-1].open}
        # Whether a checkpoint is written is asked beside other calls, which have deadlines.
        if not phases & {("driver", "start"), *(("learner", phase) for phase in LEARNERS_OWN)}:
            found.update({method} - {"checkpoint_written"})
        return await gather(learner, method, *args)

    monkeypatch.setattr(rl.train, "open_run", opened)
    monkeypatch.setattr(Learner, "_gather", gathered)
    return found


def counted_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When the next run copies checkpoints, and when it begins to count what engines do, in order."""
    events, copy, begin = list[str](), Saver.copy, Utilization.begin

    async def copied(saver: Saver, *args: Any) -> None:
        await copy(saver, *args)
        events.append("checkpoint")

    def begun(utilization: Utilization, stats: Any) -> None:
        events.append("begin")
        begin(utilization, stats)

    monkeypatch.setattr(Saver, "copy", copied)
    monkeypatch.setattr(Utilization, "begin", begun)
    return events


def test_a_learner_that_dies_costs_the_steps_since_it_was_saved(
    straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = Run(tmp_path / "runs" / "tiny")
    endless, events = without_deadline(monkeypatch), counted_again(monkeypatch)

    def kill() -> None:
        for moment in (learned(30), logged(4)):
            while not moment(run):
                time.sleep(0.01)
            kill_learner()

    killer = threading.Thread(target=kill)
    killer.start()
    code, _ = run_here(tmp_path, *LOCKSTEP, "checkpoint.every=3")
    killer.join()
    assert code == 0 and endless == set()
    # The seconds of a checkpoint are no part of the step's that engines are idle in, nor of the next one's.
    assert {after for before, after in pairwise(events) if before == "checkpoint"} == {"begin"}
    said = capsys.readouterr().out
    assert said.count("warning: learner rank 0 died during") == 2
    assert "the run goes on after cold start step 2" in said or "the run goes on after cold start step 3" in said
    assert "the run goes on after step 3" in said or "the run goes on after step 6" in said
    assert [row["faults/learner_restores"] for row in (run.steps[0], run.rows[-1])] == [1, 2]
    assert read_lines(run.path / "supervised.jsonl") == read_lines(straight.path / "supervised.jsonl")
    assert [row["reward/mean"] for row in run.steps] == [row["reward/mean"] for row in straight.steps]
    assert [row["loss/total"] for row in run.steps] == [row["loss/total"] for row in straight.steps]


def kill_learner() -> None:
    """Ends the rank's process from outside."""
    alive = [one for one in actors().values() if one["State"] == "ALIVE" and one["ActorClassName"] == "LearnerRank"]
    os.kill(alive[-1]["Pid"], signal.SIGKILL)


def test_a_disk_that_is_full_costs_checkpoints_and_nothing_else(
    straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with full_disk(tmp_path / "runs", num_bytes=7_200_000):
        code, run = run_here(tmp_path, *LOCKSTEP, "checkpoint.keep=9")
        assert code == 0
        said = capsys.readouterr().out
        assert "warning: the checkpoint of step" in said and "was not written: it needs" in said
        assert "stays the latest" in said
        assert run.rows[-1]["faults/checkpoints_failed"] > 0
        assert [row["loss/total"] for row in run.steps] == [row["loss/total"] for row in straight.steps]
        assert not list((run.path / "checkpoints").glob(".*"))
        assert newest(run.path / "checkpoints").found is not None
