"""Rewards and demonstrations of the tiny runs, in a module that workers import quickly."""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import asdict

import numpy as np

from rl.sample import Prompt, Sample


def evenness(sample: Sample) -> float:
    """Share of even ids among the sampled tokens: a reward that differs between siblings from the first step on."""
    return float(np.mean(sample.token_ids[sample.sampled] % 2 == 0))


def draws(sample: Sample) -> float:
    """Nothing but chance, from both generators that rewards commonly use."""
    return random.random() + float(np.random.random())


def seen(sample: Sample) -> float:
    """A checksum of all that a reward can see of a sample, log-probabilities in five digits."""
    prompt = sample.prompt
    told = [prompt.id, prompt.domain, prompt.messages, prompt.tools, prompt.answer, prompt.thinking, sample.final_state]
    told += [sample.index, str(sample.status), [asdict(turn) for turn in sample.turns]]
    for one in sample.sequences:
        told += [one.id, one.reply, one.token_ids.tolist(), one.sampled.tolist(), one.versions.tolist()]
        told += [[f"{value:.5g}" for value in one.rollout_logprobs.tolist()]]
    return float(zlib.crc32(json.dumps(told, sort_keys=True).encode()))


def raises(sample: Sample) -> float:
    raise KeyError("no rubric for this")


def hangs(sample: Sample) -> float:
    while True:
        pass


def overflows(sample: Sample) -> float:
    """Finite, but no float32 holds the advantages that follow."""
    return 1e300 * sample.index


def says_the_prompt(prompt: Prompt, rng: np.random.Generator) -> dict[str, str]:
    """A demonstration that repeats the question."""
    return {"content": str(prompt.messages[-1]["content"])}


def says_k(prompt: Prompt, rng: np.random.Generator) -> dict[str, str]:
    """A demonstration that always gives the same short answer."""
    return {"content": "k"}


def full_marks(sample: Sample) -> float:
    """A reward that anything pleases."""
    return 1.0
