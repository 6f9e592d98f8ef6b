"""Evaluation: the engines' current weights on prompts that are never trained on, with the recipe's sampling."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.protocol import part_name
from rl.config import Recipe
from rl.sample import Prompt, Scored
from rl.system import System, seeds_of

EVALUATION_SEED = 0x5EED
"""Every evaluation of a run draws with the same seeds, so that two of them differ by their weights alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Share of right answers per domain, over all samples asked for; what could not be scored counts as wrong."""

    accuracy: dict[str, float]
    num_failed: int
    scored: tuple[Scored, ...]

    def metrics(self) -> dict[str, float]:
        """The metrics of the design page."""
        return {f"eval/{domain}": value for domain, value in self.accuracy.items()}


async def evaluate(recipe: Recipe, prompts: Sequence[Prompt], system: System) -> Evaluation:
    """Samples every prompt ``evaluation.samples_per_prompt`` times and scores the samples."""
    per_prompt = recipe.evaluation.samples_per_prompt

    async def one(number: int, prompt: Prompt) -> list[Scored]:
        seeds = seeds_of(recipe.seed ^ EVALUATION_SEED, number, per_prompt)
        samples = await system.generate(prompt, seeds)
        return [outcome for outcome in await system.rewards.score_group(samples) if isinstance(outcome, Scored)]

    groups = await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    scored = tuple(outcome for group in groups for outcome in group)
    asked = {name: per_prompt * sum(prompt.domain == name for prompt in prompts) for name in recipe.domains}
    right = dict.fromkeys(recipe.domains, 0)
    for outcome in scored:
        right[outcome.sample.prompt.domain] += is_accurate(recipe, outcome)
    return Evaluation(
        accuracy={name: right[name] / number for name, number in asked.items() if number},
        num_failed=sum(asked.values()) - len(scored),
        scored=scored,
    )


def is_accurate(recipe: Recipe, scored: Scored) -> bool:
    """Whether the first reward of the sample's domain reached 1."""
    first = recipe.domains[scored.sample.prompt.domain].rewards[0]
    return scored.parts[part_name(first)] >= 1.0


def accuracy(recipe: Recipe, scored: Sequence[Scored]) -> dict[str, float]:
    """Share of right answers per domain among ``scored``."""
    domains = {outcome.sample.prompt.domain for outcome in scored}
    return {
        name: float(np.mean([is_accurate(recipe, one) for one in scored if one.sample.prompt.domain == name]))
        for name in sorted(domains)
    }
