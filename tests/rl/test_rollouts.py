"""The background half of the loop, with engines and rewards whose answers the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest

from rewards.pool import Failure
from rl.buffer import GroupBuffer
from rl.errors import RunStopped
from rl.prompts import PromptStream
from rl.rollouts import HOPELESS_STEPS, REPLACED_STEPS, Rollouts
from rl.sample import Group, Prompt, Sample, Scored
from rl.system import System, seeds_of
from rl.timeline import Timeline
from rl.train import first_error
from tests.rl.tiny_runs import make_prompt, make_sample, tiny_recipe

Judge = Callable[[Sample], float | str]
"""A sample's reward, or the reason why it has none."""

PROMPTS = [make_prompt(str(number)) for number in range(12)]


class Scripted:
    """Stands for engines and rewards: samples come at once, and ``judge`` decides what they earn."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.asked: list[tuple[str, list[int]]] = []
        self.rewards = self
        self.timeline = Timeline()

    async def generate(self, prompt: Prompt, seeds: Sequence[int]) -> list[Sample]:
        self.asked.append((prompt.id, list(seeds)))
        await asyncio.sleep(0)
        return [make_sample(prompt, index) for index in range(len(seeds))]

    async def score_group(self, samples: Sequence[Sample]) -> list[Scored | Failure]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Scored | Failure:
        verdict = self.judge(sample)
        if isinstance(verdict, str):
            return Failure(sample=sample, reward="judge", reason=verdict)
        return Scored(sample=sample, reward=verdict, parts={"judge": verdict})


class Rig:
    """Rollouts over scripted answers, and a consumer that takes steps from their buffer."""

    def __init__(self, folder: Path, judge: Judge, *overrides: str) -> None:
        recipe = tiny_recipe(folder, "prompts_per_step=2", "seed=7", *overrides)
        self.system = Scripted(judge)
        self.buffer = GroupBuffer(prompts_per_step=2, max_staleness=recipe.rollout.max_staleness, steps=recipe.steps)
        stream = PromptStream({"sums": PROMPTS}, {"sums": 1.0}, seed=recipe.seed)
        self.rollouts = Rollouts(recipe, cast(System, self.system), stream, self.buffer)

    def take(self, steps: int, *, first: int = 1) -> list[list[Group]]:
        """The batches of the steps from ``first`` to ``steps``."""

        async def consume() -> list[list[Group]]:
            producer = asyncio.create_task(self.rollouts.run())
            batches = []
            for step in range(first, steps + 1):
                taking = asyncio.create_task(self.buffer.take(2))
                await asyncio.wait({producer, taking}, return_when=asyncio.FIRST_COMPLETED)
                if producer.done():
                    taking.cancel()
                    await producer
                batches.append(await taking)
                self.buffer.advance(step)
            producer.cancel()
            return batches

        return asyncio.run(asyncio.wait_for(consume(), 10))


def by_index(sample: Sample) -> float:
    return float(sample.index)


def test_prompts_come_in_the_streams_order_with_seeds_of_their_place(tmp_path: Path):
    rig = Rig(tmp_path, by_index, "steps=10", "rollout.max_staleness=1")
    batches = rig.take(10)
    stream = PromptStream({"sums": PROMPTS}, {"sums": 1.0}, seed=7)
    expected = [stream.next().id for _ in range(20)]
    assert [group.prompt.id for batch in batches for group in batch] == expected
    assert [name for name, _ in rig.system.asked] == expected
    assert [seeds for _, seeds in rig.system.asked] == [seeds_of(7, draw, 4) for draw in range(20)]
    # A prompt that comes again in the next epoch is sampled anew.
    assert len({tuple(seeds) for _, seeds in rig.system.asked}) == 20


def test_seeds_differ_between_siblings_prompts_and_runs():
    seeds = [seed for run in (0, 1) for draw in range(50) for seed in seeds_of(run, draw, 8)]
    assert len(set(seeds)) > 0.999 * len(seeds)
    assert seeds_of(3, 5, 8)[:4] == seeds_of(3, 5, 4)


def test_a_sample_that_fails_is_left_out_and_counted(tmp_path: Path):
    rig = Rig(tmp_path, lambda sample: "raised ValueError" if sample.index == 2 else sample.index)
    (batch,) = rig.take(1)
    assert [[scored.sample.index for scored in group.scored] for group in batch] == [[0, 1, 3]] * 2
    assert [group.failed for group in batch] == [1, 1]
    tally = rig.rollouts.take_tally(batch)
    assert tally.failures == {"judge raised ValueError": 2}
    assert tally.failed_tokens == 2 * 3
    assert tally.failed_groups == 0
    assert float(tally.scoring) >= 0
    assert rig.rollouts.take_tally([]).failures == {}


def test_a_group_without_any_score_is_replaced_and_counted(tmp_path: Path):
    stream = PromptStream({"sums": PROMPTS}, {"sums": 1.0}, seed=7)
    drawn = [stream.next().id for _ in range(4)]
    rig = Rig(tmp_path, lambda sample: "is offline" if sample.prompt.id in drawn[:2] else sample.index)
    (batch,) = rig.take(1)
    assert [group.prompt.id for group in batch] == drawn[2:]
    tally = rig.rollouts.take_tally(batch)
    assert tally.failed_groups == 2
    assert tally.failures == {"judge is offline": 8}


def test_a_run_in_which_nothing_can_be_scored_stops_with_the_commonest_reason(tmp_path: Path):
    rig = Rig(tmp_path, lambda sample: "is rude" if sample.index == 0 else "is offline", "rollout.max_staleness=3")
    with pytest.raises(BaseExceptionGroup) as stopped:
        rig.take(1)
    assert (
        str(first_error(stopped.value))
        == f"no sample of the last {HOPELESS_STEPS * 2} groups could be scored: judge is offline"
    )


def test_a_group_that_works_starts_the_count_of_failures_again(tmp_path: Path):
    calls: list[str] = []

    def judge(sample: Sample) -> float | str:
        if sample.index == 0:
            calls.append(sample.prompt.id)
        return "is offline" if len(calls) % 5 else float(sample.index)

    rig = Rig(tmp_path, judge, "steps=8")
    rig.take(8)
    assert len(calls) == 5 * 16


def equal_on_odd_prompts(sample: Sample) -> float:
    return 1.0 if int(sample.prompt.id.split("/")[1]) % 2 else float(sample.index)


def test_groups_without_variance_are_kept_by_default(tmp_path: Path):
    rig = Rig(tmp_path, equal_on_odd_prompts, "steps=6")
    groups = [group for batch in rig.take(6) for group in batch]
    assert sum(group.zero_variance for group in groups) == 6
    assert rig.rollouts.take_tally(groups).replaced == []


def test_groups_without_variance_are_replaced_on_request(tmp_path: Path):
    rig = Rig(tmp_path, equal_on_odd_prompts, "steps=6", "objective.zero_variance=replace")
    batches = rig.take(6)
    groups = [group for batch in batches for group in batch]
    assert not any(group.zero_variance for group in groups)
    # Each batch has those that were replaced for it, whenever it is asked.
    replaced = [old for batch in batches for old in rig.rollouts.take_tally(batch).replaced]
    assert replaced
    assert all(group.zero_variance for group in replaced)
    assert len(rig.system.asked) == len(groups) + len(replaced)


def test_a_policy_that_has_mastered_every_prompt_still_ends_its_run(tmp_path: Path):
    rig = Rig(tmp_path, lambda sample: 1.0, "steps=3", "objective.zero_variance=replace")
    batches = rig.take(3)
    assert all(group.zero_variance for batch in batches for group in batch)
    replaced = [len(rig.rollouts.take_tally(batch).replaced) for batch in batches]
    assert sum(replaced) == 3 * REPLACED_STEPS * 2


def test_a_generation_that_raises_ends_the_rollouts(tmp_path: Path):
    class Dead(Scripted):
        async def generate(self, prompt: Prompt, seeds: Sequence[int]) -> list[Sample]:
            raise RunStopped("engine 0 of 1 died during generate")

    rig = Rig(tmp_path, by_index)
    rig.rollouts.system = cast(System, Dead(by_index))
    with pytest.raises(BaseExceptionGroup) as stopped:
        rig.take(1)
    assert str(first_error(stopped.value)) == "engine 0 of 1 died during generate"
