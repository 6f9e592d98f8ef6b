"""Two small skills, trained in one stage and one after the other: engine, advantages, packing and learner are real."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from model import DeepseekV32, load_model, save_model
from rl.advantage import group_advantages
from rl.config import Domain, Recipe, Sampling
from rl.prompts import PromptStream
from rl.sample import Group, Prompt, Scored
from rollout.engine import Request
from rollout.samples import to_sample
from rollout.torch_engine import TorchEngine
from tests.trainer.conftest import MakeRank
from tests.trainer.samples import live_weights, tiny_config, tiny_recipe
from trainer.pack import pack
from trainer.phase import Phase
from trainer.rank import LearnerRank

NUM_SYMBOLS = 4
SHIFTS = {"first": 1, "second": 3}
"""A skill answers symbol k with symbol k + shift: the same questions, and never the same answers."""
STEPS = 30
PROMPTS_PER_STEP = 2 * NUM_SYMBOLS
GROUP_SIZE = 32
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=1)


class School:
    """One policy and its training so far."""

    def __init__(self, make: MakeRank, recipe: Recipe, model_dir: Path) -> None:
        self.recipe = recipe
        self.rank: LearnerRank = make(recipe)
        self.rank.begin(Phase.REINFORCEMENT, model_dir)
        self.engine = TorchEngine(load_model(model_dir), max_num_seqs=128, max_context=8)
        self.steps = 0

    def train(self, weights: Mapping[str, float], steps: int) -> None:
        """GRPO in lock-step on a mixture of skills."""
        training = {skill: prompts(skill) for skill in weights}
        stream = PromptStream(training, dict(weights), seed=self.steps)
        rng = np.random.default_rng(self.steps)
        for _ in range(steps):
            groups = self._groups([stream.next() for _ in range(PROMPTS_PER_STEP)], GROUP_SIZE)
            (minibatch,) = pack(
                groups,
                [group_advantages(group.rewards, divide_by_std=True) for group in groups],
                kl_betas=dict.fromkeys(SHIFTS, 0.0),
                ranks=1,
                minibatches=1,
                micro_tokens=4096,
                rng=rng,
            )
            self.rank.step([minibatch.share(0)])
            self.steps += 1
            self.engine.stage(live_weights(self.rank))
            self.engine.commit(self.steps)

    def accuracy(self, skill: str) -> float:
        groups = self._groups(prompts(skill), 16)
        return float(np.mean([scored.reward for group in groups for scored in group.scored]))

    def _groups(self, asked: Sequence[Prompt], size: int) -> list[Group]:
        requests = [
            Request(
                id=f"{place}#{index}",
                token_ids=np.asarray(prompt.token_ids),
                sampling=SAMPLING,
                seed=hash((self.steps, place, index)),
            )
            for place, prompt in enumerate(asked)
            for index in range(size)
        ]
        completions = iter(zip(requests, self.engine.generate(requests), strict=True))
        groups = []
        for prompt in asked:
            samples = [to_sample(prompt, i, *next(completions), reply="") for i in range(size)]
            right = [float(sample.token_ids[-1] == prompt.answer) for sample in samples]
            scored = (Scored(sample=s, reward=r) for s, r in zip(samples, right, strict=True))
            groups.append(Group(prompt=prompt, scored=tuple(scored)))
        return groups


def prompts(skill: str) -> list[Prompt]:
    name = NUM_SYMBOLS + list(SHIFTS).index(skill)
    return [
        Prompt(
            id=f"{skill}/{k}",
            domain=skill,
            token_ids=np.array([name, k], np.int32),
            answer=(k + SHIFTS[skill]) % NUM_SYMBOLS,
        )
        for k in range(NUM_SYMBOLS)
    ]


@pytest.fixture(scope="module")
def novice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights over a vocabulary of symbols."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("novice")
    save_model(
        DeepseekV32(dataclasses.replace(tiny_config(), vocab_size=NUM_SYMBOLS + len(SHIFTS), initializer_range=0.05)),
        path,
    )
    return path


def test_one_stage_keeps_both_skills_and_one_after_the_other_loses_the_first(sole_rank: MakeRank, novice: Path):
    """Equal settings. The second stage is even longer than the other's share of it, and the first skill is gone."""
    recipe = dataclasses.replace(
        tiny_recipe(lr=3e-3, grad_clip=1.0),
        domains={skill: Domain(prompts="unused") for skill in SHIFTS},
        sampling=SAMPLING,
    )
    mixed = School(sole_rank, recipe, novice)
    mixed.train({"first": 1.0, "second": 1.0}, 2 * STEPS)
    kept = {skill: mixed.accuracy(skill) for skill in SHIFTS}
    assert min(kept.values()) > 0.9, kept

    pupil = School(sole_rank, recipe, novice)
    pupil.train({"first": 1.0}, STEPS)
    learned = pupil.accuracy("first")
    pupil.train({"second": 1.0}, STEPS + STEPS // 2)
    after = {skill: pupil.accuracy(skill) for skill in SHIFTS}
    assert learned > 0.9 and after["second"] > 0.9, (learned, after)
    assert after["first"] < 0.3, after
