"""From scored groups to the micro-batches each learner rank runs.

A rollout batch becomes one or more optimizer steps (:class:`Minibatch`); a step is spread over the ranks, and each
rank's samples are packed end to end into rows of bounded length (:class:`Microbatch`). Samples are never split, and
attention never crosses from one to the next (``cu_seqlens``). The loss divides by ``num_samples`` and ``num_tokens`` of
the whole optimizer step, so nothing that happens here changes a gradient.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rl.config import Aggregation
from rl.sample import Group, Kept, NDArray, Sample
from rl.selections import Selections


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Samples laid end to end: N tokens of S sequences, every stream aligned with ``token_ids``.

    Sequence s is ``[cu_seqlens[s], cu_seqlens[s + 1])``. A sampled token whose kept set is empty, or any token when
    ``kept`` is None, could have been every token of the vocabulary; a token that is not ``routed`` routes live, and one
    without a row in its sequence's ``selections`` attends to what the indexer says now. So samples with and without
    recordings share a micro-batch, and the step counts the fallbacks token by token.
    """

    sample_ids: tuple[str, ...]  # [S]
    domains: tuple[str, ...]  # [S], for what is measured by domain; nothing is computed differently
    token_ids: NDArray  # int32 [N]
    positions: NDArray  # int32 [N], from 0 in every sequence
    cu_seqlens: NDArray  # int32 [S + 1]
    sampled: NDArray  # bool [N], the tokens that are trained
    rollout_logprobs: NDArray  # float32 [N], 0 where not sampled
    advantages: NDArray  # float32 [N], constant within a sequence
    kl_beta: NDArray  # float32 [N], constant within a sequence
    routes: NDArray | None = None  # uint8 (uint16 above 256 experts) [N, moe_layers, top_k]
    routed: NDArray | None = None  # bool [N]; given exactly when routes is
    selections: tuple[Selections | None, ...] = ()  # [S], of each sequence; empty where none has any
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
        if len(self.domains) != len(self.sample_ids):
            raise ValueError(f"micro-batch of {self.sample_ids[0]}: domains and sample_ids are not equally many")
        if (self.routes is None) != (self.routed is None):
            raise ValueError(f"micro-batch of {self.sample_ids[0]}: routes and routed must be given together")
        if self.selections and len(self.selections) != len(self.sample_ids):
            raise ValueError(f"micro-batch of {self.sample_ids[0]}: selections and sample_ids are not equally many")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def context(self) -> NDArray:
        """bool [N]: tokens that some sampled token of their sequence looks back on, whose routes therefore matter."""
        starts, lengths = self.cu_seqlens[:-1], np.diff(self.cu_seqlens)
        last = np.maximum.reduceat(np.where(self.sampled, self.positions, 0), starts)
        return self.positions < np.repeat(last, lengths)


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


def span_of(hidden_size: int) -> float:
    """The length, in tokens, of a sequence whose attention costs as much as all its other matrix products.

    A layer of a usual transformer has about 12 * hidden_size ** 2 active weights, one multiplication a token each; its
    attention takes hidden_size for a query-key product and as many for the value, with half the sequence on average.
    """
    return 12.0 * hidden_size


ATTENTION_SPAN = span_of(2048)


def cost(length: int, span: float) -> float:
    """What a sequence costs a rank, in tokens of a very short one."""
    return length * (1.0 + length / span)


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
    attention_span: float = ATTENTION_SPAN,
) -> list[Minibatch]:
    """Cuts a rollout batch into optimizer steps and packs each of them.

    ``advantages[g]`` is [G] for the samples of ``groups[g]``; ``kl_betas`` is per domain. Whole groups are shuffled
    into the steps, so the advantages of a step sum to zero like those of its groups. Samples without a sampled token
    have nothing to train and are left out. Fewer groups than ``minibatches`` give fewer steps. ``attention_span``
    is the model's (:func:`span_of`), and decides how the ranks' shares are balanced.

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
            steps.append(pack_step(samples, ranks=ranks, micro_tokens=micro_tokens, attention_span=attention_span))
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


def pack_step(
    samples: Sequence[WeightedSample], *, ranks: int, micro_tokens: int, attention_span: float = ATTENTION_SPAN
) -> Minibatch:
    """Packs the samples of one optimizer step so that all ranks have about as much to compute, in every round."""
    rounds = _deal(_rows(samples, ranks, micro_tokens, attention_span), ranks)
    return Minibatch(
        num_samples=round(sum(weighted.share for weighted in samples)),
        num_tokens=sum(weighted.sample.num_sampled for weighted in samples),
        num_positions=sum(len(weighted.sample) for weighted in samples),
        ranks=tuple(
            tuple(_concatenate(row.samples) if row.samples else idle() for row in rank)
            for rank in zip(*rounds, strict=True)
        ),
    )


@dataclass(slots=True)
class _Row:
    """A micro-batch while it is being filled, longest sample first."""

    samples: list[WeightedSample] = field(default_factory=list)
    tokens: int = 0
    cost: float = 0.0


def _rows(samples: Sequence[WeightedSample], ranks: int, micro_tokens: int, span: float) -> list[_Row]:
    """As few rows as the bound on tokens allows, a multiple of ``ranks``, of about equal cost."""
    longest_first = sorted(samples, key=lambda weighted: -len(weighted.sample))
    tokens = sum(min(len(weighted.sample), micro_tokens) for weighted in samples)
    num_rounds = max(1, math.ceil(tokens / (ranks * micro_tokens)))
    while (rows := _fill(longest_first, num_rounds * ranks, micro_tokens, span)) is None:
        num_rounds += 1
    return rows


def _fill(longest_first: Sequence[WeightedSample], num_rows: int, micro_tokens: int, span: float) -> list[_Row] | None:
    """Each sample into the cheapest row with room for it; None where a sample finds none.

    A sample longer than the bound has a row of its own.
    """
    rows = [_Row() for _ in range(num_rows)]
    by_cost = [(0.0, number) for number in range(num_rows)]
    for weighted in longest_first:
        length, full = len(weighted.sample), []
        while by_cost and rows[by_cost[0][1]].tokens and rows[by_cost[0][1]].tokens + length > micro_tokens:
            full.append(heapq.heappop(by_cost))
        if not by_cost:
            return None
        _, number = heapq.heappop(by_cost)
        row = rows[number]
        row.samples.append(weighted)
        row.tokens += length
        row.cost += cost(length, span)
        for entry in (*full, (row.cost, number)):
            heapq.heappush(by_cost, entry)
    return rows


def _deal(rows: Sequence[_Row], ranks: int) -> list[list[_Row]]:
    """Rounds of one row a rank, of similar cost, as ranks wait for each other; the totals of the ranks even out too."""
    ordered = sorted(rows, key=lambda row: -row.cost)
    totals = [0.0] * ranks
    rounds = []
    for start in range(0, len(ordered), ranks):
        least_first = sorted(range(ranks), key=lambda rank: totals[rank])
        dealt = dict(zip(least_first, ordered[start : start + ranks], strict=True))
        for rank, row in dealt.items():
            totals[rank] += row.cost
        rounds.append([dealt[rank] for rank in range(ranks)])
    return rounds


def idle() -> Microbatch:
    """Two tokens that train nothing: keeps a rank without work in step with the others' collectives."""
    zeros = np.zeros(2, np.float32)
    return Microbatch(
        sample_ids=("idle",),
        domains=("",),
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
    with np.errstate(over="ignore"):  # the step that it makes infinite is skipped, and reported
        advantages = np.array([weighted.advantage for weighted in row], np.float32)
    return Microbatch(
        sample_ids=tuple(sample.id for sample in samples),
        domains=tuple(sample.prompt.domain for sample in samples),
        token_ids=np.concatenate([sample.token_ids for sample in samples]).astype(np.int32, copy=False),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        sampled=np.concatenate([sample.sampled for sample in samples]).astype(bool, copy=False),
        rollout_logprobs=np.concatenate([sample.rollout_logprobs for sample in samples]).astype(np.float32, copy=False),
        advantages=np.repeat(advantages, lengths),
        kl_beta=np.repeat(np.array([weighted.kl_beta for weighted in row], np.float32), lengths),
        routes=routes,
        routed=routed,
        selections=() if all(s.selections is None for s in samples) else tuple(s.selections for s in samples),
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
