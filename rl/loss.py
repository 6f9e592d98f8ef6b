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
    episodes: Tensor | None = None,
    episode_tokens: Tensor | None = None,
    episode_drifts: Tensor | None = None,
) -> tuple[Tensor, dict[str, Mean]]:
    """The loss to minimise over one packed micro-batch of S whole sequences, and what was measured on the way.

    Per token t that the policy sampled in episode i, with o_i the sampled tokens of all of its sequences::

        r    = exp(learner - rollout)                                       with gradient, in the KL too
        M_i  = 0 if A_i < 0 and mean_t(rollout - learner) > off_policy_delta, else 1        (Eq. 9, no gradient)
        KL   = r * (exp(ref - learner) - (ref - learner) - 1)                     (Eq. 7, not clipped, no mask)
        loss = -sum_t w_t * (min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) * M_i - kl_beta * KL)     (Eq. 8)

    ``w_t`` is ``1 / (num_samples * |o_i|)`` for ``sequence_mean`` and ``1 / num_tokens`` for ``token_mean``. Both
    counts are those of the whole optimizer step, so the losses of its micro-batches add up to the same number however
    the step was split over micro-batches and ranks. A sequence without sampled tokens contributes 0, and of an episode
    that lies in several micro-batches each one counts its share in the metrics.

    Args:
        learner_logprobs: float [N], the only input that gets a gradient.
        rollout_logprobs: float [N], from the engine that sampled the tokens, after temperature and truncation.
        advantages: float [N], one value for all sampled tokens of an episode.
        sampled: bool [N]. Where it is False the other streams are never read; they may hold anything, NaN included.
        cu_seqlens: int [S + 1]; sequence i is ``cu_seqlens[i]:cu_seqlens[i + 1]``. Unsampled padding may follow.
        ref_logprobs: float [N], from the reference model; read only where ``kl_beta`` is not 0.
        kl_beta: strength of the KL, one number or float [N] (domains differ).
        off_policy_delta: nats per token; None masks nothing.
        num_samples: samples in the optimizer step.
        num_tokens: sampled tokens in the optimizer step; only ``token_mean`` needs it.
        episodes: int [S], equal for the sequences of one episode; None where every sequence is an episode.
        episode_tokens: int [S], |o_i| of each sequence's episode; None where no other micro-batch has tokens of it.
        episode_drifts: float [S], mean_t(rollout - learner) over each sequence's whole episode, for the mask; None
            where no other micro-batch has tokens of an episode with a negative advantage.

    Raises:
        ValueError: a stream of another length, a KL without reference, an unknown aggregation, a missing count.
    """
    streams = {"rollout_logprobs": rollout_logprobs, "advantages": advantages, "sampled": sampled}
    _check_shapes("learner_logprobs", learner_logprobs.shape, {**streams, "ref_logprobs": ref_logprobs})
    denominator = _denominator(aggregation, num_samples, num_tokens)
    dtype = torch.promote_types(learner_logprobs.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=learner_logprobs.device)

    def on_sampled(stream: Tensor) -> Tensor:
        # Before the arithmetic: a NaN that is multiplied by 0 afterwards is still NaN, in the gradient too.
        return torch.where(sampled, stream.to(dtype), zero)

    learner = on_sampled(learner_logprobs)
    advantage = on_sampled(advantages.detach())
    beta = on_sampled(torch.as_tensor(kl_beta, device=zero.device))
    _check_reference(ref_logprobs, beta if isinstance(kl_beta, Tensor) else kl_beta)
    rows = _Episodes(cu_seqlens, sampled, episodes, episode_tokens, episode_drifts, dtype)
    policy = _Ratio(learner - on_sampled(rollout_logprobs.detach()), clip_low, clip_high)
    masked = rows.off_policy(advantage, policy.log.detach(), off_policy_delta)
    surrogate = torch.where(masked[rows.index], zero, policy.surrogate(advantage))
    kl = _unbiased_kl(policy.ratio, learner, ref_logprobs, beta)
    weight, count = rows.weights(aggregation)
    policy_sum, kl_sum = -(weight * surrogate).sum(), (weight * beta * kl).sum()
    sums = {
        "loss/policy": (policy_sum, count),
        "loss/kl": (kl_sum, count),
        "kl/reference": (kl.sum(), (beta != 0).sum()),
        "mask/off_policy": ((rows.shares * masked).sum(), rows.shares.sum()),
    }
    return (policy_sum + kl_sum) / denominator, _means(sums | policy.sums(advantage, sampled))


class _Ratio:
    """The policy's ratio to what sampled, [N]; 1 where nothing was sampled."""

    def __init__(self, log_ratio: Tensor, clip_low: float, clip_high: float) -> None:
        self.log, self.ratio = log_ratio, log_ratio.exp()
        self._low, self._high = 1 - clip_low, 1 + clip_high

    def surrogate(self, advantage: Tensor) -> Tensor:
        """min(r A, clip(r) A), before the mask of Eq. 9."""
        return torch.minimum(self.ratio * advantage, self.ratio.clamp(self._low, self._high) * advantage)

    def sums(self, advantage: Tensor, sampled: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What is measured of it, as sums over the sampled tokens and their number."""
        clipped = ((advantage > 0) & (self.ratio > self._high)) | ((advantage < 0) & (self.ratio < self._low))
        sums = {
            "ratio/mean": torch.where(sampled, self.ratio, torch.zeros_like(self.ratio)).sum(),
            "ratio/clipped": clipped.sum(),
            "mismatch/logprob_abs": self.log.abs().sum(),
            "mismatch/kl": (self.log.expm1() - self.log).sum(),
        }
        return {name: (total, sampled.sum()) for name, total in sums.items()}


def _unbiased_kl(ratio: Tensor, learner: Tensor, ref_logprobs: Tensor | None, beta: Tensor) -> Tensor:
    """Eq. 7, [N]; 0 where no KL is asked for, whatever the ratio is."""
    if ref_logprobs is None:
        return torch.zeros_like(beta)
    log_ref_ratio = torch.where(beta != 0, ref_logprobs.detach().to(learner.dtype) - learner, torch.zeros_like(beta))
    return ratio * (log_ref_ratio.expm1() - log_ref_ratio)


class _Episodes:
    """Sums over the sampled tokens of each episode, whichever sequences they are in; padding is an empty one, S.

    There are at most as many episodes as sequences, so that S + 1 places are enough for both.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        sampled: Tensor,
        numbers: Tensor | None,
        lengths: Tensor | None,
        drifts: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        whole = {"episodes": numbers, "episode_tokens": lengths, "episode_drifts": drifts}
        _check_shapes("cu_seqlens[1:]", cu_seqlens[1:].shape, whole)
        ends = cu_seqlens[1:].contiguous()
        self.size = len(ends) + 1
        sequences = torch.bucketize(torch.arange(len(sampled), device=ends.device, dtype=ends.dtype), ends, right=True)
        self._of_sequences = torch.arange(len(ends), device=ends.device)  # [S]
        if numbers is not None:
            self._of_sequences = numbers.unique(return_inverse=True)[1]
        self.index = torch.cat([self._of_sequences, self._of_sequences.new_tensor([len(ends)])])[sequences]  # [N]
        self.here = self.sum(sampled.to(dtype))  # [S + 1]
        self.lengths = self.here if lengths is None else self.spread(lengths.to(dtype))  # [S + 1], |o_i|
        self.shares = self.here.double() / self.lengths.clamp(min=1)  # [S + 1], of an episode's tokens, those here
        self._drifts = drifts  # [S], where the tokens here are not all of an episode

    def sum(self, stream: Tensor) -> Tensor:
        return stream.new_zeros(self.size).index_add(0, self.index, stream)

    def mean(self, stream: Tensor) -> Tensor:
        return self.sum(stream) / self.lengths.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """[S + 1] over episodes, from one value for each sequence that is the same for those of an episode."""
        return values.new_zeros(self.size).index_copy(0, self._of_sequences, values)

    def off_policy(self, advantage: Tensor, log_ratio: Tensor, delta: float | None) -> Tensor:
        """Which episodes Eq. 9 leaves out, bool [S + 1]."""
        if delta is None:
            return torch.zeros_like(self.lengths, dtype=torch.bool)
        drift = self.mean(-log_ratio) if self._drifts is None else self.spread(self._drifts.to(log_ratio.dtype))
        return (self.sum(advantage) < 0) & (drift > delta)

    def weights(self, aggregation: str) -> tuple[Tensor, Tensor]:
        """What each token counts, [N], and how many episodes or tokens the sum is then over."""
        if aggregation == "sequence_mean":
            return 1 / self.lengths.clamp(min=1)[self.index], self.shares.sum()
        return torch.ones_like(self.lengths)[self.index], self.here.sum()


def _means(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Mean]:
    """Reads all numerators and denominators from the device at once."""
    numbers = torch.stack([number.detach().double() for pair in pairs.values() for number in pair])
    return {name: Mean(total, count) for name, (total, count) in zip(pairs, numbers.view(-1, 2).tolist(), strict=True)}


def _check_reference(ref_logprobs: Tensor | None, kl_beta: float | Tensor) -> None:
    if ref_logprobs is None and (kl_beta.any() if isinstance(kl_beta, Tensor) else kl_beta != 0):
        raise ValueError("grpo_loss: kl_beta is not 0, so ref_logprobs is needed")


def _check_shapes(of: str, expected: torch.Size, tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"grpo_loss: {name} has shape {list(tensor.shape)}, but {of} has {list(expected)}")


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
