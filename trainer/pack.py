"""From scored groups to the micro-batches each learner rank runs.

A rollout batch becomes one or more optimizer steps (:class:`Minibatch`); a step is spread over the ranks, and each
rank's samples are packed end to end into rows of bounded length (:class:`Microbatch`). Samples are never split, and
attention never crosses from one to the next (``cu_seqlens``). The loss divides by ``num_samples`` and ``num_tokens`` of
the whole optimizer step, so nothing that happens here changes a gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rl.config import Aggregation
from rl.sample import Group, Kept, NDArray, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Samples laid end to end: N tokens of S sequences, every stream aligned with ``token_ids``.

    Sequence s is ``[cu_seqlens[s], cu_seqlens[s + 1])``. A sampled token whose kept set is empty, or any token when
    ``kept`` is None, could have been every token of the vocabulary; a token that is not ``routed`` routes live. So
    samples with and without recordings share a micro-batch, and the step counts the fallbacks token by token.
    """

    sample_ids: tuple[str, ...]  # [S]
    token_ids: NDArray  # int32 [N]
    positions: NDArray  # int32 [N], from 0 in every sequence
    cu_seqlens: NDArray  # int32 [S + 1]
    sampled: NDArray  # bool [N], the tokens that are trained
    rollout_logprobs: NDArray  # float32 [N], 0 where not sampled
    advantages: NDArray  # float32 [N], constant within a sequence
    kl_beta: NDArray  # float32 [N], constant within a sequence
    routes: NDArray | None = None  # uint8 (uint16 above 256 experts) [N, moe_layers, top_k]
    routed: NDArray | None = None  # bool [N]; given exactly when routes is
    kept: Kept | None = None  # N rows

    def __post_init__(self) -> None:
        streams = ("positions", "sampled", "rollout_logprobs", "advantages", "kl_beta", "routes", "routed", "kept")
        for name in streams:
            stream = getattr(self, name)
            if stream is not None and len(stream) != len(self.token_ids):
                raise ValueError(
                    f"micro-batch of {self.sample_ids[0]}: {name} has {len(stream)} entries "
                    f"for {len(self.token_ids)} tokens"
                )
        if len(self.cu_seqlens) != len(self.sample_ids) + 1 or self.cu_seqlens[-1] != len(self.token_ids):
            raise ValueError(f"micro-batch of {self.sample_ids[0]}: cu_seqlens does not cover its tokens")
        if (self.routes is None) != (self.routed is None):
            raise ValueError(f"micro-batch of {self.sample_ids[0]}: routes and routed must be given together")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def context(self) -> NDArray:
        """bool [N]: tokens that some sampled token of their sequence looks back on, whose routes therefore matter."""
        return np.concatenate(
            [
                np.arange(end - start) < np.flatnonzero(self.sampled[start:end]).max(initial=0)
                for start, end in zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], strict=True)
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """One optimizer step. Every rank holds equally many micro-batches, as the ranks' collectives must match."""

    num_samples: int  # episodes over all ranks
    num_tokens: int  # sampled tokens over all ranks
    num_positions: int  # tokens of all samples over all ranks, prompts included
    ranks: tuple[tuple[Microbatch, ...], ...]

    @property
    def sample_ids(self) -> list[str]:
        """The samples of this step, without the padding of :func:`idle`."""
        return [name for rank in self.ranks for micro in rank if micro.sampled.any() for name in micro.sample_ids]

    def share(self, rank: int) -> Minibatch:
        """What one rank needs: the counts of the whole step and its own micro-batches, as the only entry."""
        return dataclasses.replace(self, ranks=(self.ranks[rank],))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedSample:
    """A sequence with what the objective attaches to all of its tokens."""

    sample: Sample
    advantage: float = 0.0
    kl_beta: float = 0.0
    share: float = 1.0  # of its episode's sampled tokens; the shares of an episode add up to 1


def pack(
    groups: Sequence[Group],
    advantages: Sequence[NDArray],
    *,
    kl_betas: Mapping[str, float],
    ranks: int,
    minibatches: int,
    micro_tokens: int,
    rng: np.random.Generator,
    aggregation: Aggregation = Aggregation.sequence_mean,
) -> list[Minibatch]:
    """Cuts a rollout batch into optimizer steps and packs each of them.

    ``advantages[g]`` is [G] for the samples of ``groups[g]``; ``kl_betas`` is per domain. Whole groups are shuffled
    into the steps, so the advantages of a step sum to zero like those of its groups. Samples without a sampled token
    have nothing to train and are left out. Fewer groups than ``minibatches`` give fewer steps.

    The sequences of one episode are packed each for itself. With ``sequence_mean`` their advantages and ``kl_beta`` are
    scaled by their shares, so that 1/|o_i| runs over the whole episode: the surrogate is homogeneous in the advantage.

    Raises:
        ValueError: a group whose advantages do not match its samples, or whose domain has no ``kl_beta``.
    """
    if len(groups) != len(advantages):
        raise ValueError(f"pack: {len(advantages)} advantage arrays for {len(groups)} groups")
    steps = []
    for part in np.array_split(rng.permutation(len(groups)), max(1, min(minibatches, len(groups)))):
        samples = [s for g in part for s in _weighted(groups[g], advantages[g], kl_betas, aggregation)]
        if samples:
            steps.append(pack_step(samples, ranks=ranks, micro_tokens=micro_tokens))
    return steps


def _weighted(
    group: Group, advantages: NDArray, kl_betas: Mapping[str, float], aggregation: Aggregation
) -> list[WeightedSample]:
    if len(advantages) != len(group.scored):
        raise ValueError(
            f"pack: prompt {group.prompt.id} has {len(advantages)} advantages for {len(group.scored)} samples"
        )
    if group.prompt.domain not in kl_betas:
        raise ValueError(f"pack: no kl_beta is given for domain {group.prompt.domain} of prompt {group.prompt.id}")
    kl_beta = kl_betas[group.prompt.domain]
    weighted = []
    for scored, advantage in zip(group.scored, advantages, strict=True):
        for sequence in scored.sample.sequences:
            if sequence.num_sampled:
                share = sequence.num_sampled / scored.sample.num_generated
                scale = share if aggregation == Aggregation.sequence_mean else 1.0
                weighted.append(
                    WeightedSample(
                        sample=sequence, advantage=float(advantage) * scale, kl_beta=kl_beta * scale, share=share
                    )
                )
    return weighted


def pack_step(samples: Sequence[WeightedSample], *, ranks: int, micro_tokens: int) -> Minibatch:
    """Balances the samples of one optimizer step over the ranks by tokens and packs each rank's share."""
    shares = [_fill(share, micro_tokens) for share in _balance(samples, ranks)]
    rounds = max(len(share) for share in shares)
    return Minibatch(
        num_samples=round(sum(weighted.share for weighted in samples)),
        num_tokens=sum(weighted.sample.num_sampled for weighted in samples),
        num_positions=sum(len(weighted.sample) for weighted in samples),
        ranks=tuple(tuple(_concatenate(row) for row in share) + (idle(),) * (rounds - len(share)) for share in shares),
    )


def _balance(samples: Sequence[WeightedSample], ranks: int) -> list[list[WeightedSample]]:
    """Longest first, each to the rank with the fewest tokens so far; every share comes out longest first."""
    shares: list[list[WeightedSample]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for weighted in sorted(samples, key=lambda weighted: -len(weighted.sample)):
        rank = loads.index(min(loads))
        shares[rank].append(weighted)
        loads[rank] += len(weighted.sample)
    return shares


def _fill(share: list[WeightedSample], micro_tokens: int) -> list[list[WeightedSample]]:
    """Cuts a sorted share where the next sample would pass the bound.

    Neighbours in length stay together, as attention pads to the longest sequence of a micro-batch.
    """
    rows: list[list[WeightedSample]] = []
    room = 0
    for weighted in share:
        length = len(weighted.sample)
        if not rows or length > room:
            rows.append([])
            room = micro_tokens
        rows[-1].append(weighted)
        room -= length
    return rows


def idle() -> Microbatch:
    """Two tokens that train nothing: keeps a rank without work in step with the others' collectives."""
    zeros = np.zeros(2, np.float32)
    return Microbatch(
        sample_ids=("idle",),
        token_ids=np.zeros(2, np.int32),
        positions=np.arange(2, dtype=np.int32),
        cu_seqlens=np.array([0, 2], np.int32),
        sampled=np.zeros(2, bool),
        rollout_logprobs=zeros,
        advantages=zeros,
        kl_beta=zeros,
    )


def _concatenate(row: list[WeightedSample]) -> Microbatch:
    samples = [weighted.sample for weighted in row]
    lengths = [len(sample) for sample in samples]
    routes, routed = _join_routes(samples)
    return Microbatch(
        sample_ids=tuple(sample.id for sample in samples),
        token_ids=np.concatenate([sample.token_ids for sample in samples]).astype(np.int32, copy=False),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        sampled=np.concatenate([sample.sampled for sample in samples]).astype(bool, copy=False),
        rollout_logprobs=np.concatenate([sample.rollout_logprobs for sample in samples]).astype(np.float32, copy=False),
        advantages=np.repeat(np.array([weighted.advantage for weighted in row], np.float32), lengths),
        kl_beta=np.repeat(np.array([weighted.kl_beta for weighted in row], np.float32), lengths),
        routes=routes,
        routed=routed,
        kept=_join_kept(samples),
    )


def _join_routes(samples: list[Sample]) -> tuple[NDArray | None, NDArray | None]:
    recorded = [sample.routes for sample in samples if sample.routes is not None]
    if not recorded:
        return None, None
    dtype, shape = np.result_type(*recorded), recorded[0].shape[1:]
    routes = [
        np.zeros((len(sample), *shape), dtype) if sample.routes is None else sample.routes.astype(dtype, copy=False)
        for sample in samples
    ]
    routed = [
        np.full(len(sample), sample.routes is not None) if sample.routed is None else sample.routed
        for sample in samples
    ]
    return np.concatenate(routes), np.concatenate(routed)


def _join_kept(samples: list[Sample]) -> Kept | None:
    if all(sample.kept is None for sample in samples):
        return None
    sizes = [np.zeros(len(sample), np.int64) if sample.kept is None else sample.kept.sizes for sample in samples]
    ids = [sample.kept.ids for sample in samples if sample.kept is not None]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    return Kept(ids=np.concatenate(ids).astype(np.int32, copy=False), offsets=offsets)
