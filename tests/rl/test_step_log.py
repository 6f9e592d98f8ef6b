"""What a step writes, from groups, learner results and clocks that the test makes up."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from model.tokenizer import build_byte_tokenizer
from rl.config import Recipe
from rl.evaluate import Evaluation
from rl.metrics import Mean
from rl.progress import Progress
from rl.rollouts import Tally
from rl.run_directory import RunDirectory
from rl.sample import Group, Scored, Status
from rl.step_log import StepClock, StepLog
from rl.sync import Sync
from rollout.conversation import Conversation
from tests.rl.tiny_runs import make_prompt, make_sample, read_lines, tiny_recipe
from trainer.learner import SkippedStep, StepResult


class Desk:
    """A step log over a fresh run directory, and what it printed."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.printed = io.StringIO()
        self.run = RunDirectory.create(folder / "run", recipe="name: tiny\n")
        progress = Progress("tiny", steps=3, console=Console(file=self.printed, width=200))
        self.log = StepLog(recipe, Conversation(build_byte_tokenizer()), self.run, progress)

    def step(
        self,
        groups: list[Group],
        *,
        step: int = 3,
        advantages: list[np.ndarray] | None = None,
        tally: Tally | None = None,
        logprobs: dict[str, np.ndarray] | None = None,
        skipped: tuple[SkippedStep, ...] = (),
        evaluation: Evaluation | None = None,
    ) -> dict[str, float]:
        clock = StepClock()
        for name in ("rollout", "learn", "sync"):
            clock.lap(name)
        self.log.step(
            step,
            groups,
            advantages or [np.zeros(len(group.scored)) for group in groups],
            tally or Tally(),
            StepResult(metrics={"loss/total": Mean(3.0, 2)}, skipped=skipped, learner_logprobs=logprobs or {}),
            Sync(version=step, num_bytes=12, seconds=0.1, checksums={}),
            clock,
            {"speed/learner_tflops": 7.0},
            evaluation,
        )
        return read_lines(self.run.metrics)[-1]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, tiny_recipe(tmp_path, "objective.off_policy_delta=0.25", "log_samples=3"))


def scored(name: str, index: int, reward: float, **changes) -> Scored:
    sample = make_sample(make_prompt(name), index, **changes)
    return Scored(sample=sample, reward=reward, parts={"evenness": reward})


def group(name: str, *rewards: float, **changes) -> Group:
    members = tuple(scored(name, index, reward, **changes) for index, reward in enumerate(rewards))
    return Group(prompt=members[0].sample.prompt, scored=members)


def test_numbers_of_a_step(desk: Desk):
    long = make_sample(make_prompt("2"), 1, num_sampled=5, status=Status.TRUNCATED)
    mixed = Group(
        prompt=long.prompt,
        scored=(scored("2", 0, 0.0), Scored(sample=long, reward=1.0, parts={"evenness": 1.0, "extra": 4.0})),
    )
    row = desk.step([group("1", 1.0, 1.0), mixed])
    assert row["step"] == 3
    assert row["reward/mean"] == row["reward/sums"] == row["reward/sums/evenness"] == 0.75
    assert row["reward/sums/extra"] == 4.0
    assert row["accuracy/sums"] == 0.75
    assert row["length/mean"] == (3 * 3 + 5) / 4
    assert row["length/truncated"] == 0.25
    assert row["groups/zero_variance"] == 0.5
    assert row["tokens/generated"] == 14
    assert row["loss/total"] == 1.5
    # Trained at version 2, sampled by version 0.
    assert row["staleness/mean"] == row["staleness/max"] == 2
    assert (row["sync/version"], row["sync/bytes"], row["sync/verified"]) == (3, 12, 1.0)


def test_what_was_generated_but_not_trained_is_counted(desk: Desk):
    tally = Tally(
        failed_tokens=7, replaced=[group("9", 0.0, 0.0)], failed_groups=2, failures=Counter({"judge is offline": 5})
    )
    tally.scoring += Mean(3.0, 2)
    row = desk.step([group("1", 1.0, 0.0)], tally=tally)
    assert row["tokens/generated"] == 7 + 6 + 6
    assert (row["groups/replaced"], row["groups/failed"], row["samples/failed"]) == (1, 2, 5)
    assert row["reward/mean"] == 0.25
    assert row["time/reward_s"] == 1.5
    assert "warning: step 3: 5 samples left out: judge is offline" in desk.printed.getvalue()


def test_skipped_optimizer_steps_are_told(desk: Desk):
    names = tuple(f"sums/1#{index}" for index in range(5))
    skipped = (
        SkippedStep(step=6, sample_ids=names[:2], num_samples=16),
        SkippedStep(step=7, sample_ids=names, num_samples=16),
        SkippedStep(step=8, sample_ids=(), num_samples=16),
    )
    desk.step([group("1", 1.0, 0.0)], skipped=skipped)
    printed = desk.printed.getvalue()
    assert "optimizer step 6 skipped: loss not finite; samples sums/1#0, sums/1#1\n" in printed
    assert "optimizer step 7 skipped: loss not finite; samples sums/1#0, sums/1#1, sums/1#2, sums/1#3, ...\n" in printed
    assert "optimizer step 8 skipped: gradient not finite; one of its 16 samples\n" in printed


def test_trajectories_carry_log_ratios_and_the_mask(desk: Desk):
    """The mask is -mean(learner - rollout) > delta for a negative advantage, and only then."""
    members = group("1", 0.0, 0.0, 1.0)
    rollout = members.scored[0].sample.rollout_logprobs
    logprobs = {
        "sums/1#0": np.where(rollout != 0, rollout - [0, 0, 0.6, 0.3, 0.0], 0.0).astype(np.float32),  # 0.3 off: masked
        "sums/1#1": np.where(rollout != 0, rollout - [0, 0, 0.6, 0.0, 0.0], 0.0).astype(np.float32),  # 0.2 off
        "sums/1#2": np.where(rollout != 0, rollout - 5.0, 0.0).astype(np.float32),  # far off, but better than average
    }
    desk.step([members], advantages=[np.array([-1.0, -1.0, 2.0])], logprobs=logprobs)
    rows = read_lines(desk.run.samples / "step_3.jsonl")
    assert [row["masked"] for row in rows] == [True, False, False]
    assert rows[0]["log_ratios"] == pytest.approx([0, 0, -0.6, -0.3, 0], abs=1e-3)
    assert [row["advantage"] for row in rows] == [-1.0, -1.0, 2.0]
    assert rows[0]["kept_sizes"] == [0, 0, 1, 1, 1]
    assert rows[0]["routed"] == [1, 1, 1, 1, 0]
    assert len(rows[0]["tokens"]) == 5


def test_every_sequence_of_an_episode_has_its_own_streams_and_all_have_one_mask(desk: Desk):
    before = make_sample(make_prompt("1"), 0, num_sampled=2, part=0)
    last = make_sample(make_prompt("1"), 0, earlier=(before,))
    episode = Group(
        prompt=last.prompt, scored=(Scored(sample=last, reward=0.0, parts={"evenness": 0.0}), scored("1", 1, 1.0))
    )
    # By itself the earlier sequence would be masked; over all five tokens the mean is 0.24, below 0.25.
    shift = {"sums/1#0.0": 0.45, "sums/1#0": 0.1, "sums/1#1": 0.0}
    samples = {"sums/1#0.0": before, "sums/1#0": last, "sums/1#1": episode.scored[1].sample}
    logprobs = {name: np.where(s.sampled, s.rollout_logprobs - shift[name], 0) for name, s in samples.items()}
    desk.step([episode], advantages=[np.array([-1.0, 1.0])], logprobs=logprobs)
    row, _ = read_lines(desk.run.samples / "step_3.jsonl")
    (earlier,) = row["earlier"]
    assert (earlier["masked"], row["masked"]) == (False, False)
    assert earlier["log_ratios"] == pytest.approx([0, 0, -0.45, -0.45], abs=1e-3)
    assert len(earlier["tokens"]) == 4 and len(row["tokens"]) == 5

    logprobs["sums/1#0.0"] = np.where(before.sampled, before.rollout_logprobs - 0.55, 0)  # 0.28 over all
    desk.step([episode], step=4, advantages=[np.array([-1.0, 1.0])], logprobs=logprobs)
    row, sibling = read_lines(desk.run.samples / "step_4.jsonl")
    assert (row["earlier"][0]["masked"], row["masked"], sibling["masked"]) == (True, True, False)


def test_nothing_is_masked_when_the_mask_is_off(tmp_path: Path):
    desk = Desk(tmp_path, tiny_recipe(tmp_path, "objective.off_policy_delta=null"))
    members = group("1", 0.0, 1.0)
    far = {f"sums/1#{index}": members.scored[0].sample.rollout_logprobs * 9 for index in range(2)}
    desk.step([members], advantages=[np.array([-1.0, 1.0])], logprobs=far)
    assert not any(row["masked"] for row in read_lines(desk.run.samples / "step_3.jsonl"))


def test_samples_of_skipped_steps_have_no_log_ratios(desk: Desk):
    desk.step([group("1", 0.0, 1.0)])
    rows = read_lines(desk.run.samples / "step_3.jsonl")
    assert [row["log_ratios"] for row in rows] == [None, None]


def test_as_many_trajectories_as_the_recipe_asks_for_siblings_together(desk: Desk):
    desk.step([group("1", 0.0, 1.0), group("2", 0.0, 1.0)])
    assert [row["id"] for row in read_lines(desk.run.samples / "step_3.jsonl")] == ["sums/1#0", "sums/1#1", "sums/2#0"]


def test_step_0_is_the_evaluation_before_training(desk: Desk):
    evaluation = Evaluation(accuracy={"sums": 0.5}, num_failed=0, scored=(scored("1", 0, 1.0), scored("2", 0, 0.0)))
    desk.log.before(evaluation)
    row = desk.step([group("1", 1.0, 0.0)], step=1, evaluation=evaluation)
    assert json.loads(desk.run.metrics.read_text().splitlines()[0]) == {"step": 0, "eval/sums": 0.5}
    assert row["eval/sums"] == 0.5
    assert len(read_lines(desk.run.samples / "step_0.jsonl")) == 2


def test_samples_that_an_evaluation_could_not_score_are_told(desk: Desk):
    desk.log.before(Evaluation(accuracy={"sums": 0.5}, num_failed=0, scored=()))
    assert "evaluation" not in desk.printed.getvalue()
    evaluation = Evaluation(accuracy={"sums": 0.25}, num_failed=2, scored=())
    desk.step([group("1", 1.0, 0.0)], step=1, evaluation=evaluation)
    sentence = "warning: evaluation at step 1: 2 samples could not be scored and count as wrong"
    assert sentence in desk.printed.getvalue()


def test_a_clock_books_every_second_once(monkeypatch: pytest.MonkeyPatch):
    times = iter([10.0, 11.0, 13.5, 14.0])
    monkeypatch.setattr("rl.step_log.time.perf_counter", lambda: next(times))
    clock = StepClock()
    for name in ("rollout", "learn", "sync"):
        clock.lap(name)
    assert clock.seconds == {"rollout": 1.0, "learn": 2.5, "sync": 0.5}
    assert clock.total == 4.0
