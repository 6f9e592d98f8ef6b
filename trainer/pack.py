"""From scored groups to the micro-batches each learner rank runs.

A rollout batch becomes one or more optimizer steps (:class:`Minibatch`); a step is spread over the ranks, and each
rank's samples are packed end to end into rows of bounded length (:class:`Microbatch`). Sequences are never cut, and
attention never crosses from one to the next (``cu_seqlens``). The loss divides by ``num_samples`` and ``num_tokens`` of
the whole optimizer step, so nothing that happens here changes a gradient.

An episode of several sequences (``Sample.earlier``) shares a row where it fits into one. Where it does not, what the
objective says of the episode as a whole is told with every sequence: |o_i| in ``episode_tokens``, and for the
off-policy mask the rounds that must be looked at before (``Minibatch.open_rounds``).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

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
    episodes: NDArray  # int32 [S], which of the optimizer step's ``num_samples`` episodes each sequence belongs to
    episode_tokens: NDArray  # int32 [S], |o_i|: sampled tokens of that episode, over all of its sequences
    token_ids: NDArray  # int32 [N]
    positions: NDArray  # int32 [N], from 0 in every sequence
    cu_seqlens: NDArray  # int32 [S + 1]
    sampled: NDArray  # bool [N], the tokens that are trained
    rollout_logprobs: NDArray  # float32 [N], 0 where not sampled
    advantages: NDArray  # float32 [N], constant within an episode
    kl_beta: NDArray  # float32 [N], constant within an episode
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
        for name in ("domains", "episodes", "episode_tokens"):
            if len(getattr(self, name)) != len(self.sample_ids):
                raise ValueError(f"micro-batch of {self.sample_ids[0]}: {name} and sample_ids are not equally many")
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
    open_rounds: tuple[int, ...] = ()
    """Places, of every rank's micro-batches, where some rank holds a part of an episode with a negative advantage and
    not the whole: whether it is masked as off-policy must be known before any of its parts is trained."""

    @property
    def sample_ids(self) -> list[str]:
        """The sequences of this step, without the padding of :func:`idle`."""
        return [name for rank in self.ranks for micro in rank if micro.sampled.any() for name in micro.sample_ids]

    def share(self, rank: int) -> Minibatch:
        """What one rank needs: the counts of the whole step and its own micro-batches, as the only entry."""
        return dataclasses.replace(self, ranks=(self.ranks[rank],))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedSample:
    """An episode, all of its sequences, with what the objective attaches to each of its tokens."""

    sample: Sample
    advantage: float = 0.0
    kl_beta: float = 0.0


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
    attention_span: float = ATTENTION_SPAN,
) -> list[Minibatch]:
    """Cuts a rollout batch into optimizer steps and packs each of them.

    ``advantages[g]`` is [G] for the samples of ``groups[g]``; ``kl_betas`` is per domain. Whole groups are shuffled
    into the steps, so the advantages of a step sum to zero like those of its groups. Samples without a sampled token
    have nothing to train and are left out. Fewer groups than ``minibatches`` give fewer steps. ``attention_span``
    is the model's (:func:`span_of`), and decides how the ranks' shares are balanced.

    Raises:
        ValueError: a group whose advantages do not match its samples, or whose domain has no ``kl_beta``.
    """
    if len(groups) != len(advantages):
        raise ValueError(f"pack: {len(advantages)} advantage arrays for {len(groups)} groups")
    steps = []
    for part in np.array_split(rng.permutation(len(groups)), max(1, min(minibatches, len(groups)))):
        samples = [s for g in part for s in _weighted(groups[g], advantages[g], kl_betas)]
        if samples:
            steps.append(pack_step(samples, ranks=ranks, micro_tokens=micro_tokens, attention_span=attention_span))
    return steps


def _weighted(group: Group, advantages: NDArray, kl_betas: Mapping[str, float]) -> list[WeightedSample]:
    if len(advantages) != len(group.scored):
        raise ValueError(
            f"pack: prompt {group.prompt.id} has {len(advantages)} advantages for {len(group.scored)} samples"
        )
    if group.prompt.domain not in kl_betas:
        raise ValueError(f"pack: no kl_beta is given for domain {group.prompt.domain} of prompt {group.prompt.id}")
    kl_beta = kl_betas[group.prompt.domain]
    return [
        WeightedSample(sample=scored.sample, advantage=float(advantage), kl_beta=kl_beta)
        for scored, advantage in zip(group.scored, advantages, strict=True)
        if scored.sample.num_generated
    ]


def pack_step(
    samples: Sequence[WeightedSample], *, ranks: int, micro_tokens: int, attention_span: float = ATTENTION_SPAN
) -> Minibatch:
    """Packs the samples of one optimizer step so that all ranks have about as much to compute, in every round.

    Sequences without a sampled token are left out; every sample has one with some.
    """
    units = [unit for number, weighted in enumerate(samples) for unit in _units(number, weighted, micro_tokens)]
    rounds = _deal(_rows(units, ranks, micro_tokens, attention_span), ranks)
    return Minibatch(
        num_samples=len(samples),
        num_tokens=sum(weighted.sample.num_generated for weighted in samples),
        num_positions=sum(unit.tokens for unit in units),
        ranks=tuple(
            tuple(_concatenate(row.parts) if row.parts else idle() for row in rank)
            for rank in zip(*rounds, strict=True)
        ),
        open_rounds=tuple(
            number for number, rows in enumerate(rounds) if any(part.undecided for row in rows for part in row.parts)
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One sequence, and the episode it is of."""

    sample: Sample
    episode: int
    weighted: WeightedSample
    undecided: bool = False  # whether its row alone cannot tell if its episode is masked as off-policy


@dataclass(frozen=True, slots=True)
class _Unit:
    """Sequences that go into the same row."""

    parts: list[_Part]

    @property
    def tokens(self) -> int:
        return sum(len(part.sample) for part in self.parts)

    def cost(self, span: float) -> float:
        return sum(cost(len(part.sample), span) for part in self.parts)


def _units(number: int, weighted: WeightedSample, micro_tokens: int) -> list[_Unit]:
    """An episode as one unit where a row has room for it, and otherwise each of its sequences as one."""
    sequences = [sequence for sequence in weighted.sample.sequences if sequence.num_sampled]
    split = len(sequences) > 1 and sum(map(len, sequences)) > micro_tokens
    undecided = split and weighted.advantage < 0
    parts = [_Part(sample=sequence, episode=number, weighted=weighted, undecided=undecided) for sequence in sequences]
    return [_Unit([part]) for part in parts] if split else [_Unit(parts)]


@dataclass(slots=True)
class _Row:
    """A micro-batch while it is being filled, longest unit first."""

    parts: list[_Part] = field(default_factory=list)
    tokens: int = 0
    cost: float = 0.0


def _rows(units: Sequence[_Unit], ranks: int, micro_tokens: int, span: float) -> list[_Row]:
    """As few rows as the bound on tokens allows, a multiple of ``ranks``, of about equal cost."""
    longest_first = sorted(units, key=lambda unit: -unit.tokens)
    tokens = sum(min(unit.tokens, micro_tokens) for unit in units)
    num_rounds = max(1, math.ceil(tokens / (ranks * micro_tokens)))
    while (rows := _fill(longest_first, num_rounds * ranks, micro_tokens, span)) is None:
        num_rounds += 1
    return rows


def _fill(longest_first: Sequence[_Unit], num_rows: int, micro_tokens: int, span: float) -> list[_Row] | None:
    """Each unit into the cheapest row with room for it; None where one finds none.

    A sequence longer than the bound has a row of its own.
    """
    rows = [_Row() for _ in range(num_rows)]
    by_cost = [(0.0, number) for number in range(num_rows)]
    for unit in longest_first:
        full = []
        while by_cost and rows[by_cost[0][1]].tokens and rows[by_cost[0][1]].tokens + unit.tokens > micro_tokens:
            full.append(heapq.heappop(by_cost))
        if not by_cost:
            return None
        _, number = heapq.heappop(by_cost)
        row = rows[number]
        row.parts += unit.parts
        row.tokens += unit.tokens
        row.cost += unit.cost(span)
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
        episodes=np.zeros(1, np.int32),
        episode_tokens=np.zeros(1, np.int32),
        token_ids=np.zeros(2, np.int32),
        positions=np.arange(2, dtype=np.int32),
        cu_seqlens=np.array([0, 2], np.int32),
        sampled=np.zeros(2, bool),
        rollout_logprobs=zeros,
        advantages=zeros,
        kl_beta=zeros,
    )


def _concatenate(row: list[_Part]) -> Microbatch:
    row = sorted(row, key=lambda part: -len(part.sample))
    samples, weights = [part.sample for part in row], [part.weighted for part in row]
    lengths = [len(sample) for sample in samples]
    routes, routed = _join_routes(samples)
    with np.errstate(over="ignore"):  # the step that it makes infinite is skipped, and reported
        advantages = np.array([weighted.advantage for weighted in weights], np.float32)
    return Microbatch(
        sample_ids=tuple(sample.id for sample in samples),
        domains=tuple(sample.prompt.domain for sample in samples),
        episodes=np.array([part.episode for part in row], np.int32),
        episode_tokens=np.array([weighted.sample.num_generated for weighted in weights], np.int32),
        token_ids=np.concatenate([sample.token_ids for sample in samples]).astype(np.int32, copy=False),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        sampled=np.concatenate([sample.sampled for sample in samples]).astype(bool, copy=False),
        rollout_logprobs=np.concatenate([sample.rollout_logprobs for sample in samples]).astype(np.float32, copy=False),
        advantages=np.repeat(advantages, lengths),
        kl_beta=np.repeat(np.array([weighted.kl_beta for weighted in weights], np.float32), lengths),
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
