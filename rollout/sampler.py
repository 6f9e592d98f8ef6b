"""Sampling of next tokens for a batch of sequences, on the host, in numpy.

Everything is row by row: what is drawn for a sequence depends on its logits, its seed and its position, never on the
rows beside it. A stable order (probability descending, then token id ascending) makes temperature, min-p, top-k and
top-p all prefixes of one sorted row, so the kept set is the shortest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl.config import Sampling
from rl.sample import NDArray

NO_TOP_K = np.iinfo(np.int64).max

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """The sampling parameters of B sequences, one array each. Temperature 0 is held as top-k 1 at temperature 1."""

    temperature: NDArray  # float32 [B], above 0
    min_p: NDArray  # float32 [B]
    top_k: NDArray  # int64 [B], NO_TOP_K for none
    top_p: NDArray  # float64 [B]
    seed: NDArray  # uint64 [B]

    @classmethod
    def empty(cls, num_rows: int) -> SamplingRows:
        """Rows to be filled by :meth:`set`; they keep the whole vocabulary at temperature 1."""
        return cls(
            temperature=np.ones(num_rows, np.float32),
            min_p=np.zeros(num_rows, np.float32),
            top_k=np.full(num_rows, NO_TOP_K, np.int64),
            top_p=np.ones(num_rows, np.float64),
            seed=np.zeros(num_rows, np.uint64),
        )

    @classmethod
    def of(cls, samplings: Sequence[Sampling], seeds: Sequence[int]) -> SamplingRows:
        rows = cls.empty(len(samplings))
        for row, (sampling, seed) in enumerate(zip(samplings, seeds, strict=True)):
            rows.set(row, sampling, seed)
        return rows

    def set(self, row: int, sampling: Sampling, seed: int) -> None:
        greedy = sampling.temperature == 0
        self.temperature[row] = 1.0 if greedy else sampling.temperature
        self.min_p[row] = sampling.min_p
        self.top_k[row] = 1 if greedy else sampling.top_k or NO_TOP_K
        self.top_p[row] = sampling.top_p
        self.seed[row] = seed & 0xFFFFFFFFFFFFFFFF

    def take(self, rows: NDArray) -> SamplingRows:
        return SamplingRows(
            temperature=self.temperature[rows],
            min_p=self.min_p[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            seed=self.seed[rows],
        )

    @property
    def truncates(self) -> NDArray:
        """bool [B]: whether the row's kept set can be smaller than the vocabulary."""
        return (self.min_p > 0) | (self.top_k < NO_TOP_K) | (self.top_p < 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """One token per row. Row b's kept set is ``kept_ids[kept_offsets[b]:kept_offsets[b + 1]]``, ids ascending.

    Rows that do not truncate have no ids: their kept set is the whole vocabulary.
    """

    token_ids: NDArray  # int32 [B]
    logprobs: NDArray  # float32 [B], over the kept set
    kept_ids: NDArray  # int32 [M]
    kept_offsets: NDArray  # int64 [B + 1]


def sample(logits: NDArray, rows: SamplingRows, positions: NDArray) -> Draws:
    """Draws the token at ``positions[b]`` of every sequence b from its float32 logits [B, V].

    The distribution is softmax(logits / temperature) cut by min-p (at least min_p times the likeliest token), then
    top-k, then top-p over the survivors (the shortest prefix whose mass reaches top_p), and renormalised. Equal
    probabilities at a boundary go to the lowest ids. One uniform number per (seed, position) picks the token by
    inverting the cumulative distribution in order of ids.

    Raises FloatingPointError where a row's logits leave no distribution (NaN, +inf, or nothing finite).
    """
    num_rows, vocab_size = logits.shape
    scaled = logits / rows.temperature[:, None]
    scaled -= scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled)  # unnormalised probabilities; the likeliest token weighs 1
    sizes = np.zeros(num_rows, np.int64)
    kept_ids = np.zeros(0, np.int32)
    truncated = np.flatnonzero(rows.truncates)
    if len(truncated):
        keep = _kept(scaled[truncated], rows.take(truncated))
        sizes[truncated] = np.count_nonzero(keep, axis=1)
        kept_ids = (np.flatnonzero(keep) % vocab_size).astype(np.int32)
        weights[truncated] *= keep
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    total = cumulative[:, -1]
    if not np.all(np.isfinite(total)):
        row = int(np.flatnonzero(~np.isfinite(total))[0])
        raise FloatingPointError(f"the logits of row {row} hold NaN or infinity, so no token can be sampled")
    # uniform < 1 in 53 bits keeps the target strictly below the total, so the id found has weight above 0.
    target = uniform(rows.seed, positions) * total
    token_ids = (cumulative <= target[:, None]).sum(axis=1)
    chosen = scaled[np.arange(num_rows), token_ids].astype(np.float64)
    return Draws(
        token_ids=token_ids.astype(np.int32),
        logprobs=(chosen - np.log(total)).astype(np.float32),
        kept_ids=kept_ids,
        kept_offsets=np.concatenate([[0], np.cumsum(sizes)]),
    )


def _kept(scaled: NDArray, rows: SamplingRows) -> NDArray:
    """bool [B, V]: the tokens that survive min-p, top-k and top-p. Every row keeps at least one.

    `scaled` is at most 0, so the bits of its negation rise as probability falls. Value and id are packed into one
    integer: keys are unique, equal values order by id, and numpy sorts integers with vector instructions, about ten
    times faster than it (or torch) sorts pairs.
    """
    vocab_size = scaled.shape[1]
    keys = (np.float32(0) - scaled).view(np.int32).astype(np.int64)
    keys <<= 32
    keys |= np.arange(vocab_size)
    ranked = np.sort(keys, axis=1)
    weights = np.exp(-(ranked >> 32).astype(np.int32).view(np.float32))
    limit = np.minimum(rows.top_k, vocab_size)
    if np.any(rows.min_p > 0):
        limit = np.minimum(limit, (weights >= rows.min_p[:, None]).sum(axis=1))
    if np.any(rows.top_p < 1):
        mass = np.cumsum(weights, axis=1, dtype=np.float64)
        needed = rows.top_p * mass[np.arange(len(limit)), limit - 1]
        # A token stays while the mass before it has not reached what is needed.
        nucleus = 1 + (mass[:, :-1] < needed[:, None]).sum(axis=1)
        limit = np.where(rows.top_p < 1, np.minimum(limit, nucleus), limit)
    return keys <= ranked[np.arange(len(limit)), limit - 1][:, None]


def uniform(seeds: NDArray, positions: NDArray) -> NDArray:
    """float64 [B] in [0, 1): a counter-based random number, a pure function of (seed, position).

    Two rounds of the SplitMix64 finaliser (Steele, Lea, Flood 2014): one spreads the seed, one the position.
    """
    with np.errstate(over="ignore"):
        state = _mix(seeds.astype(np.uint64) + _GOLDEN)
        state = _mix(state + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray) -> NDArray:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
