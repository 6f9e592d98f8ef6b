"""The GRPO objective of DeepSeek-V3.2 (arXiv 2512.02556, Eq. 5 to 9) as one pure function of log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from rl.metrics import Mean


def grpo_loss(
    learner_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    sampled: Tensor,
    cu_seqlens: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    kl_beta: float | Tensor = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    off_policy_delta: float | None = None,
    num_samples: int,
    aggregation: str = "sequence_mean",
    num_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Mean]]:
    """The loss to minimise over one packed micro-batch of S whole sequences, and what was measured on the way.

    Per token t that the policy sampled in sequence i, with o_i the sampled tokens of that sequence::

        r    = exp(learner - rollout)                                       with gradient, in the KL too
        M_i  = 0 if A_i < 0 and mean_t(rollout - learner) > off_policy_delta, else 1        (Eq. 9, no gradient)
        KL   = r * (exp(ref - learner) - (ref - learner) - 1)                     (Eq. 7, not clipped, no mask)
        loss = -sum_t w_t * (min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) * M_i - kl_beta * KL)     (Eq. 8)

    ``w_t`` is ``1 / (num_samples * |o_i|)`` for ``sequence_mean`` and ``1 / num_tokens`` for ``token_mean``. Both
    counts are those of the whole optimizer step, so the losses of its micro-batches add up to the same number however
    the step was split over micro-batches and ranks. A sequence without sampled tokens contributes 0.

    Args:
        learner_logprobs: float [N], the only input that gets a gradient.
        rollout_logprobs: float [N], from the engine that sampled the tokens, after temperature and truncation.
        advantages: float [N], one value for all sampled tokens of a sequence.
        sampled: bool [N]. Where it is False the other streams are never read; they may hold anything, NaN included.
        cu_seqlens: int [S + 1]; sequence i is ``cu_seqlens[i]:cu_seqlens[i + 1]``. Unsampled padding may follow.
        ref_logprobs: float [N], from the reference model; read only where ``kl_beta`` is not 0.
        kl_beta: strength of the KL, one number or float [N] (domains differ).
        off_policy_delta: nats per token; None masks nothing.
        num_samples: samples in the optimizer step.
        num_tokens: sampled tokens in the optimizer step; only ``token_mean`` needs it.

    Raises:
        ValueError: a stream of another length, a KL without reference, an unknown aggregation, a missing count.
    """
    streams = {"rollout_logprobs": rollout_logprobs, "advantages": advantages, "sampled": sampled}
    _check_lengths(learner_logprobs, {**streams, "ref_logprobs": ref_logprobs})
    denominator = _denominator(aggregation, num_samples, num_tokens)
    dtype = torch.promote_types(learner_logprobs.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=learner_logprobs.device)

    def on_sampled(stream: Tensor) -> Tensor:
        # Before the arithmetic: a NaN that is multiplied by 0 afterwards is still NaN, in the gradient too.
        return torch.where(sampled, stream.to(dtype), zero)

    learner = on_sampled(learner_logprobs)
    rollout = on_sampled(rollout_logprobs.detach())
    advantage = on_sampled(advantages.detach())
    beta = on_sampled(torch.as_tensor(kl_beta, device=zero.device))
    sequences = _Sequences(cu_seqlens, sampled, dtype)

    log_ratio = learner - rollout
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)

    masked = torch.zeros_like(sequences.lengths, dtype=torch.bool)  # [S + 1], over sequences
    if off_policy_delta is not None:
        masked = (sequences.mean(advantage) < 0) & (sequences.mean(-log_ratio.detach()) > off_policy_delta)
    surrogate = torch.where(masked[sequences.index], zero, surrogate)

    if ref_logprobs is None and (beta.any() if isinstance(kl_beta, Tensor) else kl_beta != 0):
        raise ValueError("grpo_loss: kl_beta is not 0, so ref_logprobs is needed")
    kl = torch.zeros_like(beta)
    if ref_logprobs is not None:
        log_ref_ratio = torch.where(beta != 0, ref_logprobs.detach().to(dtype) - learner, zero)
        kl = ratio * (log_ref_ratio.expm1() - log_ref_ratio)

    weight, count = sequences.weights(aggregation)
    policy_sum, kl_sum = -(weight * surrogate).sum(), (weight * beta * kl).sum()

    tokens = sampled.sum()
    clipped = ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))
    metrics = _means(
        {
            "loss/policy": (policy_sum, count),
            "loss/kl": (kl_sum, count),
            "kl/reference": (kl.sum(), (beta != 0).sum()),
            "ratio/mean": (on_sampled(ratio).sum(), tokens),
            "ratio/clipped": (clipped.sum(), tokens),
            "mask/off_policy": (masked.sum(), sequences.count),
            "mismatch/logprob_abs": (log_ratio.abs().sum(), tokens),
            "mismatch/kl": ((log_ratio.expm1() - log_ratio).sum(), tokens),
        }
    )
    return (policy_sum + kl_sum) / denominator, metrics


class _Sequences:
    """Sums over the sampled tokens of each packed sequence; padding after the last one forms an empty sequence S."""

    def __init__(self, cu_seqlens: Tensor, sampled: Tensor, dtype: torch.dtype) -> None:
        ends = cu_seqlens[1:].contiguous()
        self.index = torch.bucketize(torch.arange(len(sampled), device=ends.device, dtype=ends.dtype), ends, right=True)
        self.size = len(ends) + 1
        self.lengths = self.sum(sampled.to(dtype))  # [S + 1], |o_i|
        self.count = (self.lengths > 0).sum()

    def sum(self, stream: Tensor) -> Tensor:
        return stream.new_zeros(self.size).index_add(0, self.index, stream)

    def mean(self, stream: Tensor) -> Tensor:
        return self.sum(stream) / self.lengths.clamp(min=1)

    def weights(self, aggregation: str) -> tuple[Tensor, Tensor]:
        """What each token counts, [N], and how many sequences or tokens the sum is then over."""
        if aggregation == "sequence_mean":
            return 1 / self.lengths.clamp(min=1)[self.index], self.count
        return torch.ones_like(self.lengths)[self.index], self.lengths.sum()


def _means(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Mean]:
    """Reads all numerators and denominators from the device at once."""
    numbers = torch.stack([number.detach().double() for pair in pairs.values() for number in pair])
    return {name: Mean(total, count) for name, (total, count) in zip(pairs, numbers.view(-1, 2).tolist(), strict=True)}


def _check_lengths(learner_logprobs: Tensor, streams: dict[str, Tensor | None]) -> None:
    for name, stream in streams.items():
        if stream is not None and stream.shape != learner_logprobs.shape:
            shape, expected = list(stream.shape), list(learner_logprobs.shape)
            raise ValueError(f"grpo_loss: {name} has shape {shape}, but learner_logprobs has {expected}")


def _denominator(aggregation: str, num_samples: int, num_tokens: int | None) -> int:
    match aggregation:
        case "sequence_mean":
            name, count = "num_samples", num_samples
        case "token_mean":
            name, count = "num_tokens", num_tokens
        case _:
            raise ValueError(f"grpo_loss: aggregation is {aggregation!r}; it must be sequence_mean or token_mean")
    if not count or count < 0:
        raise ValueError(f"grpo_loss: {aggregation} divides by {name} of the whole optimizer step, which is {count}")
    return count
