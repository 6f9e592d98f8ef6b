"""Supervised steps on demonstrations: the cold start before RL, and the indexer's dense warm-up before that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from rl.errors import DataError
from rl.metrics import Mean, merge
from rl.sample import NDArray, Prompt, Sample
from trainer.deepspeed_engine import DeepSpeedEngine
from trainer.pack import ATTENTION_SPAN, Minibatch, WeightedSample, pack_step
from trainer.phase import Phase
from trainer.policy import PackedTokens
from trainer.step import RankStep, indexer_term


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedDemonstration:
    """A conversation to imitate, already encoded."""

    id: str
    token_ids: NDArray  # int32 [T]
    trained: NDArray  # bool [T], the assistant's tokens; never the first

    def __post_init__(self) -> None:
        if len(self.trained) != len(self.token_ids):
            raise DataError(
                f"demonstration {self.id}: trained has {len(self.trained)} entries for {len(self.token_ids)} tokens"
            )
        if not self.trained[1:].any() or self.trained[0]:
            raise DataError(f"demonstration {self.id} must have a trained token, and not as its first one")


def pack_demonstrations(
    demonstrations: Sequence[EncodedDemonstration],
    *,
    ranks: int,
    micro_tokens: int,
    attention_span: float = ATTENTION_SPAN,
) -> Minibatch:
    """One optimizer step over all of them."""
    samples = [WeightedSample(sample=_as_sample(one)) for one in demonstrations]
    return pack_step(samples, ranks=ranks, micro_tokens=micro_tokens, attention_span=attention_span)


def _as_sample(demonstration: EncodedDemonstration) -> Sample:
    """To the packer a demonstration is a sample that someone else wrote: no log-probabilities, no versions."""
    length = len(demonstration.token_ids)
    return Sample(
        prompt=Prompt(id=demonstration.id, domain="supervised", token_ids=demonstration.token_ids[:1]),
        token_ids=demonstration.token_ids,
        sampled=demonstration.trained,
        rollout_logprobs=np.zeros(length, np.float32),
        versions=np.full(length, -1, np.int32),
    )


def supervised_step(
    engine: DeepSpeedEngine, minibatch: Minibatch, phase: Phase, *, device: torch.device, with_indexer: bool
) -> RankStep:
    """Cross-entropy over all trained tokens of the step, each with the same weight, and the indexer's own loss.

    In ``Phase.INDEXER_WARMUP`` the indexer's loss is the only one.
    """
    warmup = phase == Phase.INDEXER_WARMUP
    mode: Literal["dense", "sparse"] | None = "dense" if warmup else "sparse" if with_indexer else None
    (microbatches,) = minibatch.ranks
    tallies, suspects, total = [], [], 0.0
    for micro in microbatches:
        tokens = PackedTokens.of(micro, device)
        output = engine(tokens, indexer_loss=mode)
        summed = -output.logprobs.sum()
        tally = {"loss/supervised": Mean(float(summed.detach()), int(micro.sampled.sum()))}
        loss = summed * 0 if warmup else summed / minibatch.num_tokens
        if mode is not None:
            kl, indexer_tally = indexer_term(output, micro, minibatch)
            loss, tally = loss + kl, tally | indexer_tally
        if not engine.backward(loss):
            suspects += micro.sample_ids
        total += float(loss.detach())
        tallies.append(tally)
    return RankStep(
        outcome=engine.step(),
        loss=total,
        metrics=merge(tallies),
        suspects=tuple(suspects),
        seconds=engine.seconds(),
    )
