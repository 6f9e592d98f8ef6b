"""Top-k selection: exact, deterministic, ascending, ties to the lowest index.

A row that fits the registers of a program is searched there: the k-th score is found by counting the scores at or above
a pivot, with pivots between a lower and an upper bound. Of a longer row a sample tells a floor that a little more than
k scores should reach. One pass marks these survivors in a bitmap, their columns are listed in ascending order, and only
they are searched. Should too few or too many survive (many equal scores, above all), the floor is corrected once; then
the program counts over the whole row at every pivot. The sample decides how long it takes, never the answer: no buffer
of candidates can overflow, nothing is sorted, no atomics are used, and a row's program knows nothing of other rows.

Pivots are keys: scores as integers of the same order. A score of -inf is not selectable, and stands for what lies
outside the row's bounds. A NaN reaches every floor, and leaves its row empty.

Shape letters: G groups of 32 scores, whose flags make a word.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["bounded_topk", "topk_indices", "topk_mask"]

_LOWEST = tl.constexpr(-0x7F800000)  # the key of the lowest finite score

# What a program searches in registers.
MAX_TILE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a launch works; no answer depends on it."""

    tile: int  # scores searched in registers: a row, or a longer row's survivors
    wanted: int = 0  # survivors, at best; 0 where the whole row is walked for every pivot
    sample: int = 128  # scores of a longer row that tell the floor
    warps: int
    registers: int | None = None  # at most, a thread


@triton.jit
def _key_of(score):
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _pivot(low, high, num_low, num_high, k, step):
    """A key in (low, high]: by the slope of the counts, at every fourth step the middle, which bounds the search."""
    share = (num_low - k).to(tl.float32) / (num_low - num_high).to(tl.float32)
    share = tl.where(step % 4 == 3, 0.5, share)
    span = (high - low).to(tl.uint32, bitcast=True)  # up to 2 ** 32
    pivot = low + (span.to(tl.float32) * share).to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(pivot, low + 1), high)


@triton.jit
def _narrow(low, high, num_low, num_high, pivot, count, k, slack):
    """The bounds once `count` scores are known to reach `pivot`; equal bounds end the search, within `slack` of k."""
    enough = count >= k
    done = tl.abs(count - k) <= slack
    low = tl.where(enough | done, pivot, low)
    num_low = tl.where(enough, count, num_low)
    num_high = tl.where(enough, num_high, count)
    high = tl.where(done, pivot, tl.where(enough, high, pivot - 1))
    return low, high, num_low, num_high


@triton.jit
def _nan_or_higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _flat(x):
    return tl.ravel(x, can_reorder=True)


@triton.jit
def _usable(x):
    """How many of the scores are above -inf, and the key of the lowest of them."""
    finite = _flat(x > float("-inf"))
    lowest = tl.min(tl.where(finite, _flat(x), float("inf")), axis=0)
    return tl.sum(finite.to(tl.int32), axis=0), _key_of(lowest)


@triton.jit
def _kth_key(x, low, usable, top, k, slack):
    """A key that k of the scores x reach, at most `slack` more or less; more for slack 0 only where scores are equal.

    `usable` scores reach the key `low`, and `top` is the highest score; `low` where no more than k are usable.
    """
    high = tl.where(usable > k, _key_of(top), low)
    num_low, num_high, step = usable, usable * 0, usable * 0
    while low < high:
        pivot = _pivot(low, high, num_low, num_high, k, step)
        count = tl.sum(_flat(x >= _score_of(pivot)).to(tl.int32), axis=0)
        low, high, num_low, num_high = _narrow(low, high, num_low, num_high, pivot, count, k, slack)
        step += 1
    return low


@triton.jit
def _popcount(words):
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _words_of(flags):
    """Flags [G, 32] as bits of words [G]."""
    lane = tl.arange(0, 32)
    return tl.reduce(tl.where(flags, (tl.full([32], 1, tl.int32) << lane)[None, :], 0), 1, _either)


@triton.jit
def _lowest_bits(words, count):
    """The lowest `count` bits that are set in each word."""
    kept = words ^ words
    for _ in range(32):
        bit = words & -words
        kept |= tl.where(count > 0, bit, 0)
        words ^= bit
        count -= 1
    return kept


@triton.jit
def _ones_below(place):
    """A word whose bits below `place` are set, of all 32 at most."""
    return tl.where(place >= 32, -1, (1 << tl.minimum(tl.maximum(place, 0), 31)) - 1)


@triton.jit
def _row_bounds(starts, ends, row, row_length, BOUNDED: tl.constexpr):
    if BOUNDED:
        begin = tl.maximum(tl.load(starts + row), 0)
        end = tl.minimum(tl.load(ends + row), row_length)
    else:
        begin = row * 0
        end = begin + row_length
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def _fill(pointer, begin, k, value, WIDTH: tl.constexpr):
    """Writes `value` to pointer[begin:k]."""
    for first in range((begin // WIDTH) * WIDTH, k, WIDTH):
        column = first + tl.arange(0, WIDTH)
        tl.store(pointer + column, tl.zeros([WIDTH], tl.int32) + value, mask=(column >= begin) & (column < k))


@triton.jit
def _select(x, columns, begin, low, usable, target, k, LISTED: tl.constexpr, FILL: tl.constexpr):
    """Writes the columns of the k highest of the scores x, [G, 32] in ascending order, to target[:k], then -1.

    `usable` scores reach the key `low`. The columns are LISTED at the pointers `columns`, or count from `begin` on.
    """
    top = tl.reduce(_flat(x), 0, _nan_or_higher)
    threshold = _score_of(_kth_key(x, low, usable, top, k, 0))
    words = _words_of(x >= threshold)
    if tl.sum(_popcount(words), axis=0) > k:
        above = _words_of(x > threshold)
        equal = words ^ above
        ties = _popcount(equal)
        room = k - tl.sum(_popcount(above), axis=0)
        words = above | _lowest_bits(equal, room - (tl.cumsum(ties, axis=0) - ties))
    words = tl.where(top != top, 0, words)
    found = _popcount(words)
    place = tl.cumsum(found, axis=0) - found
    lane = tl.arange(0, 32)
    below = (tl.full([32], 1, tl.int32) << lane) - 1
    place = place[:, None] + _popcount(words[:, None] & below[None, :])
    chosen = ((words[:, None] >> lane[None, :]) & 1) != 0
    slot = tl.arange(0, words.shape[0])[:, None] * 32 + lane[None, :]
    if LISTED:
        # Read once more, so that they take no registers during the search.
        index = tl.load(columns + slot, mask=chosen, other=0)
    else:
        index = begin + slot
    tl.store(target + place, index, mask=chosen)
    _fill(target, tl.sum(found, axis=0), k, -1, FILL)


@triton.jit
def _floor_of(source, length, rank, SAMPLE: tl.constexpr, SHIFT: tl.constexpr):
    """The key of a score that `rank` of a sample of the row reach, more or less."""
    place = tl.arange(0, SAMPLE)
    # One from each of SAMPLE stretches, at a place that looks random.
    inside = ((place * 40503) & 0xFFFF) >> (16 - SHIFT)
    spot = ((place.to(tl.int64) << SHIFT) + inside) * length >> (2 * SHIFT)
    x = tl.load(source + spot)
    usable, low = _usable(x)
    key = _kth_key(x, low, usable, tl.max(x, axis=0), rank, rank >> 5)
    return tl.where(usable > rank, key, _LOWEST)


@triton.jit
def _mark(source, base, num_words, row_length, score, words, GROUPS: tl.constexpr):
    """The flags of scores not below `score` in the columns from `base` on, a multiple of 32."""
    group = tl.arange(0, GROUPS)
    for first in range(0, num_words, GROUPS):
        column = base + (first + group)[:, None] * 32 + tl.arange(0, 32)[None, :]
        x = tl.load(source + column, mask=column < row_length, other=float("-inf"))
        tl.store(words + first + group, _words_of(~(x < score)), mask=first + group < num_words)


@triton.jit
def _list(words, equal, room, base, begin, end, num_words, target, limit, TIES: tl.constexpr, WORDS: tl.constexpr):
    """Writes the columns in [begin, end) whose flags are set, ascending, to target[:limit]; returns how many there are.

    With TIES the flags of `equal` are set too, from the lowest column on until there are `room` of them.
    """
    total = base * 0
    for first in range(0, num_words, WORDS):
        slot = first + tl.arange(0, WORDS)
        column = base + slot * 32
        inside = _ones_below(end - column) & ~_ones_below(begin - column)
        found = tl.load(words + slot, mask=slot < num_words, other=0) & inside
        if TIES:
            tied = tl.load(equal + slot, mask=slot < num_words, other=0) & inside
            ties = _popcount(tied)
            found |= _lowest_bits(tied, room - (tl.cumsum(ties, axis=0) - ties))
            room -= tl.minimum(tl.sum(ties, axis=0), room)
        count = _popcount(found)
        place = total + tl.cumsum(count, axis=0) - count
        for _ in range(tl.max(count, axis=0)):
            bit = found & -found
            there = found != 0
            tl.store(target + place, column + _popcount(bit - 1), mask=there & (place < limit))
            found ^= bit
            place += there.to(tl.int32)
        total += tl.sum(count, axis=0)
    return total


@triton.jit
def _count(source, length, score, SCAN: tl.constexpr):
    """How many of the scores reach `score`."""
    found = length * 0
    for first in range(0, length, SCAN):
        place = first + tl.arange(0, SCAN)
        x = tl.load(source + place, mask=place < length, other=float("-inf"))
        found += tl.sum((x >= score).to(tl.int32), axis=0)
    return found


@triton.jit
def _walk(
    source, base, begin, end, num_words, row_length, words, equal, target, k, hint,
    SCAN: tl.constexpr, FILL: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """As `_select` for a whole row, with a pass over it for every pivot; `hint` is a key near the k-th."""
    length = end - begin
    usable = length * 0
    nans = length * 0
    lowest = float("inf")
    top = float("-inf")
    for first in range(0, length, SCAN):
        place = first + tl.arange(0, SCAN)
        x = tl.load(source + begin + place, mask=place < length, other=float("-inf"))
        finite = x > float("-inf")
        usable += tl.sum(finite.to(tl.int32), axis=0)
        nans += tl.sum((x != x).to(tl.int32), axis=0)
        lowest = tl.minimum(lowest, tl.min(tl.where(finite, x, float("inf")), axis=0))
        top = tl.maximum(top, tl.max(tl.where(finite, x, float("-inf")), axis=0))
    low = _key_of(lowest)
    high = tl.where((usable > k) & (nans == 0), _key_of(top), low)
    num_low, num_high, step = usable, usable * 0, usable * 0
    while low < high:
        pivot = _pivot(low, high, num_low, num_high, k, step)
        # Between the hint and the next key lies the boundary where many scores are equal.
        pivot = tl.where((step < 2) & (hint + step > low) & (hint + step <= high), hint + step, pivot)
        count = _count(source + begin, length, _score_of(pivot), SCAN)
        low, high, num_low, num_high = _narrow(low, high, num_low, num_high, pivot, count, k, 0)
        step += 1
    threshold = _score_of(low)
    group = tl.arange(0, SCAN // 32)
    num_above = length * 0
    for first in range(0, num_words, SCAN // 32):
        column = base + (first + group)[:, None] * 32 + tl.arange(0, 32)[None, :]
        x = tl.load(source + column, mask=(column >= begin) & (column < end), other=float("-inf"))
        above = _words_of(x > threshold)
        num_above += tl.sum(_popcount(above), axis=0)
        tl.store(words + first + group, above, mask=first + group < num_words)
        tl.store(equal + first + group, _words_of(x == threshold), mask=first + group < num_words)
    tl.debug_barrier()
    end = tl.where(nans == 0, end, begin)
    found = _list(words, equal, k - num_above, base, begin, end, num_words, target, k, True, WORDS)
    _fill(target, found, k, -1, FILL)


@triton.jit
def _topk_kernel(
    scores,  # fp32 [rows, stride]
    starts,
    ends,
    words,  # int32 [2, rows, max_words]; unused without LONG
    survivors,  # int32 [rows, TILE]; likewise
    out,  # int32 [rows, k]
    stride,
    row_length,
    max_words,
    k,
    wanted,  # survivors, at best; 0 walks at once
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCAN: tl.constexpr,
    LONG: tl.constexpr,
    BOUNDED: tl.constexpr,
    FILL: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Grid (rows)."""
    row = tl.program_id(0)
    begin, length = _row_bounds(starts, ends, row, row_length, BOUNDED)
    source = scores + row.to(tl.int64) * stride
    target = out + row.to(tl.int64) * k
    slot = tl.arange(0, TILE // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    if length <= TILE:
        x = tl.load(source + begin + slot, mask=slot < length, other=float("-inf"))
        usable, low = _usable(x)
        _select(x, target, begin, low, usable, target, k, False, FILL)
    elif LONG:
        words += row.to(tl.int64) * max_words
        survivors += row.to(tl.int64) * TILE
        base = begin // 32 * 32
        end = begin + length
        num_words = (end - base + 31) // 32
        hint = length * 0
        rank = wanted.to(tl.float32) * SAMPLE / length
        total = length * 0
        tries = tl.where(wanted > 0, 0, 2)
        fits = tries > 2
        while (tries < 2) & (fits == 0):
            hint = _floor_of(source + begin, length, tl.maximum(rank, 1.0).to(tl.int32), SAMPLE, SHIFT)
            _mark(source, base, num_words, row_length, _score_of(hint), words, SCAN // 32)
            tl.debug_barrier()
            total = _list(words, words, 0, base, begin, end, num_words, survivors, TILE, False, WORDS)
            tl.debug_barrier()
            fits = (total <= TILE) & ((total >= k) | (hint == _LOWEST))
            rank = rank * wanted / tl.maximum(total, 1)
            tries += 1
        if fits:
            columns = tl.load(survivors + slot, mask=slot < total, other=0)
            x = tl.load(source + columns, mask=slot < total, other=float("-inf"))
            _select(x, survivors, begin, hint, total, target, k, True, FILL)
        else:
            _walk(
                source, base, begin, end, num_words, row_length, words,
                words + tl.num_programs(0).to(tl.int64) * max_words, target, k, hint, SCAN // 4, FILL, WORDS,
            )  # fmt: skip


def _plan(k: int, length: int, rows: int) -> Plan:
    """For rows of up to `length` scores."""
    tile = max(1024, triton.next_power_of_2(int(1.4 * k)))
    if length >= 1 << 18:
        tile *= 2
    tile = min(tile, MAX_TILE)
    if length <= max(tile, MAX_TILE // 2) or (length <= MAX_TILE and 1.4 * k > tile):
        tile = max(128, triton.next_power_of_2(length))
        return Plan(tile=tile, warps=max(1, tile // 1024))
    wanted = int((k * tile) ** 0.5) if 1.4 * k <= tile else 0
    # As measured on an H200 for k = 2048. With 90 of the sample above the floor, k is three standard deviations away.
    per_sample, warps, registers = 32, tile // 1024, None
    if rows <= 132:  # which do not fill the GPU: a row's program is larger
        per_sample, warps = 16, min(16, tile // 256)
    elif length > 16 * tile:
        warps, registers = min(16, 4 * warps), 64
    elif length > 4 * tile:
        warps, registers = min(16, 2 * warps), 80
    sample = min(max(tile // 8, triton.next_power_of_2(length // per_sample)), 8192)
    return Plan(tile=tile, wanted=wanted, sample=sample, warps=max(1, warps), registers=registers)


def bounded_topk(
    scores: torch.Tensor,
    k: int,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    longest: int | None = None,
) -> torch.Tensor:
    """The k highest scores of each row among its columns [start, end); columns outside do not matter.

    scores fp32 [R, T] with rows in one piece; starts and ends int32 [R], all columns without them; `longest` bounds
    end - start, where the caller knows better than T. Returns int32 [R, k]: columns ascending, then -1. A row with a
    NaN inside its bounds selects nothing.
    """
    rows, width = scores.shape
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    if not out.numel():
        return out
    length = max(1, min(width, width if longest is None else longest))
    plan = _plan(k, length, rows)
    long = length > plan.tile
    # Odd, so that the compiler gives a thread one word and not two neighbours, between which it would shuffle.
    max_words = (-(-length // 32) + 1) | 1
    words = torch.empty((2, rows, max_words) if long else 1, dtype=torch.int32, device=scores.device)
    survivors = torch.empty((rows, plan.tile) if long else 1, dtype=torch.int32, device=scores.device)
    _topk_kernel[(rows,)](
        scores,
        starts,
        ends,
        words,
        survivors,
        out,
        scores.stride(0),
        width,
        max_words,
        k,
        plan.wanted,
        TILE=plan.tile,
        SAMPLE=plan.sample,
        SHIFT=plan.sample.bit_length() - 1,
        SCAN=1024 * plan.warps,
        LONG=long,
        BOUNDED=starts is not None,
        FILL=min(1024, triton.next_power_of_2(k)),
        WORDS=32 * plan.warps,
        num_warps=plan.warps,
        maxnreg=plan.registers,
    )
    return out


def topk_indices(scores: torch.Tensor, k: int) -> torch.Tensor:
    """As `kernels.reference.topk_indices`."""
    k = min(k, scores.shape[-1])
    flat = scores.detach().float().reshape(-1, scores.shape[-1])
    return bounded_topk(flat, k).long().view(*scores.shape[:-1], k)


def topk_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """As `kernels.reference.topk_mask`."""
    indices = topk_indices(scores, k)
    width = scores.shape[-1]
    mask = torch.zeros(*scores.shape[:-1], width + 1, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, torch.where(indices < 0, width, indices), True)[..., :width]
