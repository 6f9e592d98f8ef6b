"""Accuracy on prompts that are never trained on, with engines and rewards whose answers the test decides."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.pool import Failure
from rl.config import Recipe
from rl.evaluate import Attempts, Course, accuracy, evaluate, is_accurate, main
from rl.sample import Prompt, Sample, Scored, Status, Turn
from rl.system import System
from tests.rl.tiny_runs import assert_one_sentence, make_prompt, make_sample, tiny_recipe, write_recipe

Capture = pytest.CaptureFixture[str]


class Graded:
    """Sample n of prompt p is right when n < int(p), and cannot be scored when the prompt is ``broken``."""

    def __init__(self) -> None:
        self.rewards = self
        self.asked: dict[str, list[int]] = {}

    async def generate(self, prompt: Prompt, seeds: Sequence[int]) -> list[Sample]:
        self.asked[prompt.id] = list(seeds)
        return [make_sample(prompt, index) for index in range(len(seeds))]

    async def score_group(self, samples: Sequence[Sample]) -> list[Scored | Failure]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Scored | Failure:
        name = sample.prompt.id.split("/")[1]
        if name == "broken":
            return Failure(sample=sample, reward="evenness", reason="raised KeyError")
        right = float(sample.index < int(name))
        return Scored(sample=sample, reward=right - 0.1, parts={"evenness": right, "format": 1.0})


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe(
        tmp_path,
        "evaluation={num_prompts: 3, samples_per_prompt: 4}",
        "domains.other={thinking: false, group_size: 2, rewards: [{use: format}, {use: 'x:y', name: evenness}]}",
        "domains.other.prompts=${domains.sums.prompts}",
    )


def test_what_cannot_be_scored_counts_as_wrong(recipe: Recipe):
    prompts = [make_prompt("4"), make_prompt("1"), make_prompt("broken"), make_prompt("0", domain="other")]
    system = Graded()
    evaluation = asyncio.run(evaluate(recipe, prompts, cast(System, system)))
    # "other" is judged by its own first reward, which is 1 for every sample.
    assert evaluation.accuracy == {"sums": (4 + 1 + 0) / 12, "other": 1.0}
    assert evaluation.metrics() == {"eval/sums": 5 / 12, "eval/other": 1.0}
    assert evaluation.num_failed == 4
    assert len(evaluation.scored) == 12


def test_two_evaluations_of_a_run_draw_with_the_same_seeds(recipe: Recipe):
    prompts = [make_prompt("1"), make_prompt("2")]
    first, second = Graded(), Graded()
    for system in (first, second):
        asyncio.run(evaluate(recipe, prompts, cast(System, system)))
    assert first.asked == second.asked
    seeds = [seed for seeds in first.asked.values() for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 8


def test_a_domain_without_evaluation_prompts_has_no_accuracy(recipe: Recipe):
    evaluation = asyncio.run(evaluate(recipe, [make_prompt("4")], cast(System, Graded())))
    assert evaluation.accuracy == {"sums": 1.0}


@pytest.mark.parametrize(("value", "right"), [(1.0, True), (1.5, True), (0.999, False), (0.0, False)])
def test_a_sample_is_right_when_its_first_reward_reaches_1(recipe: Recipe, value: float, right: bool):
    scored = Scored(sample=make_sample(make_prompt("1")), reward=7.0, parts={"evenness": value, "format": 0.0})
    assert is_accurate(recipe, scored) is right


def test_accuracy_is_per_domain(recipe: Recipe):
    def scored(domain: str, value: float) -> Scored:
        sample = make_sample(make_prompt("1", domain=domain))
        return Scored(sample=sample, reward=0.0, parts={"evenness": value, "format": value})

    outcomes = [scored("sums", 1.0), scored("sums", 0.0), scored("sums", 0.5), scored("other", 1.0)]
    assert accuracy(recipe, outcomes) == {"sums": pytest.approx(1 / 3), "other": 1.0}
    assert accuracy(recipe, []) == {}


def attempts(*outcomes: tuple[bool, int, Status], asked: int | None = None) -> Attempts:
    """One prompt's attempts, each right or not, of so many steps."""
    scored = tuple(
        Scored(
            sample=make_sample(make_prompt("1"), index, turns=(Turn(reply=""),) * steps, status=status),
            reward=0.0,
            parts={},
        )
        for index, (_, steps, status) in enumerate(outcomes)
    )
    right = tuple(right for right, _, _ in outcomes)
    return Attempts(prompt=make_prompt("1"), asked=asked or len(outcomes), scored=scored, right=right)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_attempt(right: list[bool], data: st.DataObject):
    k = data.draw(st.integers(1, len(right)))
    draws = list(itertools.combinations(right, k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    members = attempts(*[(one, 1, Status.FINISHED) for one in right])
    assert members.pass_at(k) == pytest.approx(expected)
    failed = attempts(*[(one, 1, Status.FINISHED) for one in right if one], asked=len(right))
    assert failed.pass_at(k) == pytest.approx(expected)  # what could not be scored is wrong


def test_fewest_steps_takes_the_shortest_attempt_that_finished():
    done, cut = Status.FINISHED, Status.TRUNCATED
    assert attempts((False, 4, done), (True, 2, done), (False, 3, done)).fewest_steps
    assert not attempts((True, 4, done), (False, 2, done)).fewest_steps
    assert attempts((False, 1, cut), (True, 5, done)).fewest_steps
    assert attempts((True, 2, cut), (False, 3, cut)).fewest_steps
    assert not attempts(asked=2).fewest_steps


def test_the_summary_reports_what_attempts_cost(recipe: Recipe):
    evaluation = asyncio.run(evaluate(recipe, [make_prompt("4"), make_prompt("1")], cast(System, Graded())))
    figures = evaluation.summary([1, 2])["sums"]
    assert figures == pytest.approx(
        {
            "prompts": 2, "accuracy": 5 / 8, "pass@1": 5 / 8, "pass@2": (1 + 1 / 2) / 2, "fewest_steps": 1.0,
            "steps": 1.0, "tokens": 3.0, "truncated": 0.0, "failed": 0.0,
        }
    )  # fmt: skip


def test_how_far_an_evaluation_has_come(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    monkeypatch.setattr("rl.evaluate.LINE_EVERY_S", 0.0)
    prompts = [make_prompt("4"), make_prompt("broken"), make_prompt("1")]
    asyncio.run(evaluate(recipe, prompts, cast(System, Graded()), done=Course(len(prompts)).tell))
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 1 of 3 prompts, 100.0% right",
        "evaluating: 2 of 3 prompts, 50.0% right",
        "evaluating: 3 of 3 prompts, 41.7% right",
    ]


def test_mistakes_in_the_command_are_found_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("an actor was about to start"))
    recipe, lost = str(write_recipe(tmp_path)), tmp_path / "none" / "figures.json"
    assert main([recipe, "--model", str(tmp_path), "--prompts", "2", "--out", str(lost)]) == 1
    assert_one_sentence(capsys.readouterr().err, f"--out: there is no folder {lost.parent}")
    assert main([recipe, "--model", str(tmp_path), "--prompts", "2", "--trajectories", str(lost)]) == 1
    assert_one_sentence(capsys.readouterr().err, f"--trajectories: there is no folder {lost.parent}")
    with pytest.raises(SystemExit):
        main([recipe, "--pass-at", "1;4"])
    assert "'1;4' is no list of whole numbers, such as 1,4" in capsys.readouterr().err
