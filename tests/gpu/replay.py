"""The learner's own log-probabilities of what an engine sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from model import KeySelection, LanguageModel
from rl.sample import NDArray, Prompt
from rollout.engine import Completion, Request
from rollout.samples import to_sample
from trainer.pack import Microbatch, WeightedSample, pack_step
from trainer.policy import PackedTokens, Policy

MICRO_TOKENS = 4096


def log_ratios(
    module: LanguageModel,
    requests: Sequence[Request],
    completions: Sequence[Completion],
    *,
    routes: bool = True,
    kept: bool = True,
    index_topk: int | None = None,
    selection: KeySelection | None = None,
    device: str = "cuda",
) -> NDArray:
    """float32 [sampled tokens]: learner minus engine, with what the engine recorded replayed or not.

    With `index_topk`, the model's, the completions' own selections are replayed. `selection` takes the place of those,
    in every micro-batch, so that it belongs to a single completion.
    """
    policy = Policy(module, temperature=requests[0].sampling.temperature or 1.0)
    ratios = []
    for micro in packed(requests, completions):
        settings = {"keep_routing": routes, "keep_sampling_mask": kept, "index_topk": index_topk}
        tokens = PackedTokens.of(micro, device, **settings)
        if selection is not None:
            tokens = replace(tokens, selection=selection)
        with torch.no_grad():
            learned = policy(tokens).logprobs.float().cpu().numpy()
        ratios.append((learned - micro.rollout_logprobs)[micro.sampled])
    return np.concatenate(ratios)


def packed(requests: Sequence[Request], completions: Sequence[Completion]) -> Sequence[Microbatch]:
    """As the learner gets them."""
    samples = [
        to_sample(Prompt(id=request.id, domain="gpu", token_ids=request.token_ids), 0, request, completion, "")
        for request, completion in zip(requests, completions, strict=True)
    ]
    weighted = [WeightedSample(sample=sample) for sample in samples]
    return pack_step(weighted, ranks=1, micro_tokens=MICRO_TOKENS).ranks[0]


def figures(ratios: NDArray) -> dict[str, float]:
    """Mean |difference|, its largest, and k3 = mean(exp(d) - d - 1), per token."""
    d = ratios.astype(np.float64)
    return {
        "mean_abs": float(np.abs(d).mean()),
        "max_abs": float(np.abs(d).max()),
        "k3": float((np.expm1(d) - d).mean()),
        "tokens": len(d),
    }
