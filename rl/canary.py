"""Canary prompts: engine and learner, both with the same weights, asked for the log-probabilities of the same tokens.

Training compares the two as well (``mismatch/*``), but there samples may be older than the learner's weights, and all
mini-batches but the first come after it has moved. Here nothing but the two implementations differs: what they compute,
what was recorded and replayed, and what the engine really runs.

The prompts and seeds are the same in every comparison of a run. The replies are the engine's, as they are in training,
so that routes, selections and kept sets are recorded; they are neither scored nor trained on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, zip_longest

import numpy as np

from rl.config import Recipe
from rl.sample import NDArray, Prompt, Sample
from rl.system import System, encode, seeds_of
from trainer.pack import WeightedSample, pack_step

CANARY_SEED = 0xCA9A
"""Separates these draws from those that the same run seed gives to rollouts and evaluations."""


class Canary:
    """The comparisons of one run. A step calls :meth:`generate`, then :meth:`compare`; most do nothing."""

    def __init__(self, recipe: Recipe, system: System, prompts: Sequence[Prompt]) -> None:
        """``prompts`` are the run's training prompts."""
        self.recipe = recipe
        self.system = system
        self.prompts = choose(prompts, recipe.canary.prompts, seed=recipe.seed)
        self.sampling = replace(recipe.sampling, max_tokens=min(recipe.canary.max_tokens, recipe.sampling.max_tokens))

    def is_due(self, step: int) -> bool:
        """Whether engine and learner are compared before ``step``, counted from 1, is trained."""
        every = self.recipe.canary.every
        return every > 0 and (step - 1) % every == 0

    async def generate(self, step: int) -> list[Sample]:
        """The engines' replies, ahead of what waits for them; none unless due. Comes before the learner's turn."""
        if not self.is_due(step):
            return []
        groups = (
            self.system.pool.generate_group(
                prompt,
                encode(self.system.conversation, prompt),
                self.sampling,
                seeds_of(self.recipe.seed ^ CANARY_SEED, number, 1),
                urgent=True,
            )
            for number, prompt in enumerate(self.prompts)
        )
        with self.system.timeline.span("driver", "canary", step=step):
            return [sample for group in await asyncio.gather(*groups) for sample in group]

    async def compare(self, samples: Sequence[Sample], version: int) -> dict[str, float]:
        """``canary/*`` over tokens that the engine sampled with the weights ``version``, which the learner has now."""
        said = [WeightedSample(sample=sample) for sample in samples if sample.num_sampled]
        if not said:
            return {}
        learner = self.recipe.learner
        batch = pack_step(
            said,
            ranks=learner.ranks,
            micro_tokens=learner.micro_tokens,
            attention_span=self.system.learner.attention_span,
        )
        with self.system.timeline.span("learner", "canary", step=version + 1):
            return differences(samples, await self.system.learner.logprobs(batch), version)


def choose(prompts: Sequence[Prompt], number: int, *, seed: int) -> tuple[Prompt, ...]:
    """The same ``number`` prompts for the same seed (all of them where there are fewer), of all domains in turn."""
    domains: dict[str, list[Prompt]] = {}
    for index in np.random.default_rng([seed, CANARY_SEED]).permutation(len(prompts)):
        domains.setdefault(prompts[index].domain, []).append(prompts[index])
    rounds = zip_longest(*(domains[name] for name in sorted(domains)))
    return tuple(islice((prompt for members in rounds for prompt in members if prompt is not None), number))


def differences(samples: Sequence[Sample], learned: Mapping[str, NDArray], version: int) -> dict[str, float]:
    """Learner less engine, over sampled tokens: mean and largest absolute value, and the k3 estimate of the KL.

    ``learned`` is float32 [T] by sample. Without a token that both sides know there is nothing to say.
    """
    log_ratios = [
        (learned[sample.id] - sample.rollout_logprobs)[sample.sampled & (sample.versions == version)]
        for sample in samples
        if sample.id in learned
    ]
    log_ratio = np.concatenate(log_ratios or [np.zeros(0)]).astype(np.float64)
    if not len(log_ratio):
        return {}
    return {
        "canary/logprob_abs": float(np.abs(log_ratio).mean()),
        "canary/max": float(np.abs(log_ratio).max()),
        "canary/kl": float((np.expm1(log_ratio) - log_ratio).mean()),
    }
