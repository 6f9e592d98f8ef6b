"""One GRPO optimizer step, as one learner rank runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rl.config import Objective
from rl.loss import grpo_loss
from rl.metrics import Mean, merge
from rl.sample import NDArray
from trainer.deepspeed_engine import DeepSpeedEngine, StepOutcome
from trainer.domain_gradients import DomainGradients
from trainer.pack import Microbatch, Minibatch
from trainer.policy import PackedTokens, PolicyOutput
from trainer.selections import measure_selections


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """What one rank saw of one optimizer step. The losses of the ranks add up to the step's loss."""

    outcome: StepOutcome
    loss: float
    metrics: dict[str, Mean]
    suspects: tuple[str, ...] = ()  # samples of the micro-batches whose loss was not finite
    learner_logprobs: dict[str, NDArray] = field(default_factory=dict)  # by sample: float32 [T], before the step
    seconds: dict[str, float] = field(default_factory=dict)  # of forward, backward and optimizer, on this rank


class Reference:
    """Log-probabilities of the frozen initial policy, over the same kept sets.

    It routes live. Replaying is for the policy that is trained, whose experts must be those that sampled the token;
    the reference is another distribution, the one that its own router defines. Selections it replays: they stand for
    all keys, which either policy would attend to, and a KL of near ties among keys would say nothing of the policies.
    """

    def __init__(self, policy: Callable[..., PolicyOutput], *, partitioned: bool = False) -> None:
        """``partitioned``: the ranks hold it together, so that they must run it together."""
        self.policy = policy
        self.partitioned = partitioned

    @torch.no_grad()
    def logprobs(self, tokens: PackedTokens, kl_beta: NDArray) -> Tensor | None:
        """fp32 [N], 0 where not sampled; None where no token has a KL (``kl_beta`` [N] is 0 everywhere)."""
        if not (self.partitioned or kl_beta.any()):
            return None
        return self.policy(tokens, replay_routes=False).logprobs


def grpo_step(
    engine: DeepSpeedEngine,
    minibatch: Minibatch,
    objective: Objective,
    *,
    device: torch.device,
    reference: Reference | None = None,
    indexer_weight: float | None = None,
    domain_gradients: DomainGradients | None = None,
    index_topk: int | None = None,
) -> RankStep:
    """Runs this rank's micro-batches (``minibatch.share(rank)``), then the optimizer step of all ranks.

    ``indexer_weight`` adds the indexer's KL (paper Eq. 4), averaged over tokens and summed over layers. It moves no
    other parameter, but it counts in the norm that ``grad_clip`` bounds: a small weight keeps the policy's share.
    ``index_topk`` is that of a model with an indexer, whose selections ``objective.keep_selection`` replays.
    """
    (microbatches,) = minibatch.ranks
    drifts = summed_drifts(engine, minibatch, objective, device=device, index_topk=index_topk)
    tallies, suspects, logprobs, total = [], [], {}, 0.0
    for number, micro in enumerate(microbatches):
        tokens = _replaying(micro, objective, device, index_topk)
        if domain_gradients is not None:
            domain_gradients.expect(micro)
        ref_logprobs = reference.logprobs(tokens, micro.kl_beta) if reference else None
        output = engine(tokens, indexer_loss=None if indexer_weight is None else "sparse")
        loss, tally = grpo_loss(
            output.logprobs,
            torch.tensor(micro.rollout_logprobs, device=device),
            torch.tensor(micro.advantages, device=device),
            tokens.sampled,
            tokens.cu_seqlens,
            ref_logprobs=ref_logprobs,
            kl_beta=torch.tensor(micro.kl_beta, device=device),
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            off_policy_delta=objective.off_policy_delta,
            num_samples=minibatch.num_samples,
            aggregation=str(objective.aggregation),
            num_tokens=minibatch.num_tokens,
            **whole_episodes(micro, drifts if number in minibatch.open_rounds else None, device),
        )
        if indexer_weight is not None:
            kl, indexer_tally = indexer_term(output, micro, minibatch)
            loss, tally = loss + indexer_weight * kl, tally | indexer_tally
        if not engine.backward(loss):
            suspects += micro.sample_ids
        total += float(loss.detach())
        tallies += [tally, measure(micro, tokens, output)]
        if tokens.selection is not None and index_topk is not None:
            tallies.append(measure_selections(micro, tokens.selection, index_topk))
        logprobs |= by_sample(micro, output.logprobs)
    if domain_gradients is not None:
        tallies.append(domain_gradients.shares())
    return RankStep(
        outcome=engine.step(),
        loss=total,
        metrics=merge(tallies),
        suspects=tuple(suspects),
        learner_logprobs=logprobs,
        seconds=engine.seconds(),
    )


@torch.no_grad()
def summed_drifts(
    engine: DeepSpeedEngine,
    minibatch: Minibatch,
    objective: Objective,
    *,
    device: torch.device,
    index_topk: int | None = None,
) -> Tensor | None:
    """float64 [num_samples]: sum_t(rollout - learner) of every episode in an open round, as the step will find it.

    What the off-policy mask asks of episodes that no row holds whole, known before one of their sequences is trained.
    It takes a forward pass of the open rounds, which all ranks run together; None where nothing is asked.
    """
    if objective.off_policy_delta is None or not minibatch.open_rounds:
        return None
    (microbatches,) = minibatch.ranks
    sums = torch.zeros(minibatch.num_samples, dtype=torch.float64, device=device)
    for micro in (microbatches[number] for number in minibatch.open_rounds):
        tokens = _replaying(micro, objective, device, index_topk)
        drifts = torch.tensor(micro.rollout_logprobs, device=device) - engine.run(tokens).logprobs
        episodes = torch.tensor(np.repeat(micro.episodes, np.diff(micro.cu_seqlens)), device=device)
        sums.index_add_(0, episodes[tokens.sampled], drifts[tokens.sampled].double())
    dist.all_reduce(sums)
    return sums


def whole_episodes(micro: Microbatch, drifts: Tensor | None, device: torch.device) -> dict[str, Tensor | None]:
    """What :func:`rl.loss.grpo_loss` is told of the episodes that a micro-batch holds sequences of.

    ``drifts`` is what :func:`summed_drifts` gave, in an open round; elsewhere what decides a mask is in the row itself.
    """
    episodes, lengths = (torch.tensor(counts, device=device) for counts in (micro.episodes, micro.episode_tokens))
    means = None if drifts is None else drifts[episodes] / lengths.clamp(min=1)
    return {"episodes": episodes, "episode_tokens": lengths, "episode_drifts": means}


def score(
    engine: DeepSpeedEngine,
    minibatch: Minibatch,
    objective: Objective,
    *,
    device: torch.device,
    index_topk: int | None = None,
) -> dict[str, NDArray]:
    """Log-probabilities of this rank's samples, fp32 [T] each, as a step would find them; trains nothing."""
    (microbatches,) = minibatch.ranks
    logprobs: dict[str, NDArray] = {}
    for micro in microbatches:
        tokens = _replaying(micro, objective, device, index_topk)
        logprobs |= by_sample(micro, engine.run(tokens).logprobs)
    return logprobs


def _replaying(micro: Microbatch, objective: Objective, device: torch.device, index_topk: int | None) -> PackedTokens:
    """A micro-batch with those of its recordings that the objective replays."""
    return PackedTokens.of(
        micro,
        device,
        keep_routing=objective.keep_routing,
        keep_sampling_mask=objective.keep_sampling_mask,
        index_topk=index_topk if objective.keep_selection else None,
    )


def indexer_term(output: PolicyOutput, micro: Microbatch, minibatch: Minibatch) -> tuple[Tensor, dict[str, Mean]]:
    """This micro-batch's part of the indexer's loss, and its mean per token; padding micro-batches count nothing."""
    assert output.indexer_loss is not None
    num_tokens = len(micro) if micro.sampled.any() else 0
    summed = output.indexer_loss * (num_tokens > 0)
    return summed / minibatch.num_positions, {"loss/indexer": Mean(float(summed.detach()), num_tokens)}


def measure(micro: Microbatch, tokens: PackedTokens, output: PolicyOutput) -> dict[str, Mean]:
    """Entropy, and how much of what the engine recorded was there to replay; the rest fell back."""
    num_sampled = int(micro.sampled.sum())
    context = micro.context
    replayed = 0 if tokens.routes is None or micro.routed is None else int(np.count_nonzero(micro.routed & context))
    sizes = np.zeros(0) if tokens.kept_offsets is None else tokens.kept_offsets.diff().cpu().numpy()
    num_kept = int(np.count_nonzero(sizes))
    return {
        "entropy": Mean(float(output.entropy.sum()), num_sampled),
        "routes/replayed": Mean(replayed, int(np.count_nonzero(context))),
        "kept/mean_size": Mean(float(sizes.sum()), num_kept),
        "kept/share": Mean(num_kept, num_sampled),
    }


def by_sample(micro: Microbatch, stream: Tensor) -> dict[str, NDArray]:
    """Cuts a per-token stream [N] back into samples; padding micro-batches have none."""
    return dict(_cut(micro, stream.detach().float().cpu().numpy())) if micro.sampled.any() else {}


def _cut(micro: Microbatch, stream: NDArray) -> Iterator[tuple[str, NDArray]]:
    for name, start, end in zip(micro.sample_ids, micro.cu_seqlens[:-1], micro.cu_seqlens[1:], strict=True):
        yield name, stream[start:end].copy()
