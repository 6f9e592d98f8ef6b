"""Top-k selection: exact, deterministic, ascending, ties to the lowest index.

A row is cut into tiles that fit a program's registers. Each tile keeps its own k winners, in ascending order, and the
winners of all tiles are rows for the next round until one tile is left. The order (score, then index) is strict, so a
row's winners are among the winners of its tiles, and how it was cut cannot change the answer. Within a tile the k-th
key is found by counting, with pivots between a lower and an upper bound: nothing is sorted, no buffer of candidates can
overflow, and no atomics are used. Where k is so large that rounds would not shrink a row, one program walks the whole
row at every pivot instead.

Keys are scores as integers of the same order. The lowest is _NONE, the key of -inf: not selectable, and what stands for
columns outside the row's bounds. Above every score is _NAN, which travels to the last round and leaves its row empty.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["bounded_topk", "topk_indices", "topk_mask"]

_NONE = tl.constexpr(-0x7F800001)
_NAN = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)

MAX_TILE = 8192


@triton.jit
def _keys_of(scores):
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return tl.where(scores != scores, _NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _pivot(low, high, num_low, num_high, k, step):
    """A key in (low, high]: by the slope of the counts, at every third step the middle, which bounds the search."""
    share = (num_low - k).to(tl.float32) / (num_low - num_high).to(tl.float32)
    share = tl.where(step % 3 == 2, 0.5, share)
    pivot = low + ((high - low).to(tl.float32) * share).to(tl.int64)
    return tl.minimum(tl.maximum(pivot, low + 1), high)


@triton.jit
def _narrow(low, high, num_low, num_high, pivot, count, k):
    """The bounds once `count` keys are known to reach `pivot`; equal bounds end the search."""
    enough = count >= k
    low = tl.where(enough, pivot, low)
    num_low = tl.where(enough, count, num_low)
    num_high = tl.where(enough, num_high, count)
    high = tl.where(count == k, pivot, tl.where(enough, high, pivot - 1))
    return low, high, num_low, num_high


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
def _tile_kernel(
    values,  # fp32 scores in the first round, int32 keys afterwards; [rows, stride]
    origin,  # int32 index of each value; unused in the first round
    starts,
    ends,
    out_keys,  # int32 [rows, tiles, k]; unused in the last round
    out_index,  # int32 [rows, tiles, k]
    stride,
    row_length,
    k,
    TILE: tl.constexpr,
    ROUND: tl.constexpr,
    LAST: tl.constexpr,
    BOUNDED: tl.constexpr,
    FILL: tl.constexpr,
):
    row, tile = tl.program_id(0), tl.program_id(1)
    begin, length = _row_bounds(starts, ends, row, row_length, BOUNDED)
    for _ in tl.static_range(ROUND):
        length = (length + TILE - 1) // TILE * k
    size = length - tile * TILE
    if (size > 0) | LAST:
        place = tl.arange(0, TILE)
        live = place < size
        source = row.to(tl.int64) * stride + tile * TILE
        if ROUND == 0:
            keys = _keys_of(tl.load(values + source + begin + place, mask=live, other=float("-inf")))
        else:
            keys = tl.load(values + source + place, mask=live, other=_NONE)
        usable = tl.sum((keys != _NONE).to(tl.int32))
        low = tl.min(tl.where(keys != _NONE, keys, _NAN)).to(tl.int64)
        top = tl.max(keys)
        high = tl.where(usable > k, top.to(tl.int64), low)
        num_low, num_high, step = usable, usable * 0, usable * 0
        while low < high:
            pivot = _pivot(low, high, num_low, num_high, k, step)
            count = tl.sum((keys >= pivot.to(tl.int32)).to(tl.int32))
            low, high, num_low, num_high = _narrow(low, high, num_low, num_high, pivot, count, k)
            step += 1

        threshold = low.to(tl.int32)
        above = keys > threshold
        equal = (keys == threshold) & (keys != _NONE)
        # One scan for both counts: TILE is at most 2 ** 14.
        both = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
        room = k - tl.sum(above.to(tl.int32))
        rank = both >> 16
        chosen = above | (equal & (rank <= room))
        column = (both & 0xFFFF) + tl.minimum(rank, room) - 1
        found = tl.sum(chosen.to(tl.int32))
        if LAST:
            chosen = chosen & (top <= _INFINITY)
            found = tl.where(top <= _INFINITY, found, 0)
        if ROUND == 0:
            index = begin + tile * TILE + place
        else:
            index = tl.load(origin + source + place, mask=chosen, other=0)
        target = (row.to(tl.int64) * tl.num_programs(1) + tile) * k
        tl.store(out_index + target + column, index, mask=chosen)
        if LAST:
            _fill(out_index + target, found, k, -1, FILL)
        else:
            tl.store(out_keys + target + column, keys, mask=chosen)
            _fill(out_keys + target, found, k, _NONE, FILL)


@triton.jit
def _walk_kernel(
    scores,
    starts,
    ends,
    out_index,
    stride,
    row_length,
    k,
    TILE: tl.constexpr,
    BOUNDED: tl.constexpr,
    FILL: tl.constexpr,
):
    row = tl.program_id(0)
    begin, length = _row_bounds(starts, ends, row, row_length, BOUNDED)
    source = scores + row.to(tl.int64) * stride + begin
    place = tl.arange(0, TILE)
    usable = begin * 0
    low_key = begin * 0 + _NAN
    top = begin * 0 + _NONE
    for first in range(0, length, TILE):
        live = first + place < length
        keys = _keys_of(tl.load(source + first + place, mask=live, other=float("-inf")))
        usable += tl.sum((keys != _NONE).to(tl.int32))
        low_key = tl.minimum(low_key, tl.min(tl.where(keys != _NONE, keys, _NAN)))
        top = tl.maximum(top, tl.max(keys))
    low = low_key.to(tl.int64)
    high = tl.where(usable > k, top.to(tl.int64), low)
    num_low, num_high, step = usable, usable * 0, usable * 0
    while low < high:
        pivot = _pivot(low, high, num_low, num_high, k, step)
        count = begin * 0
        for first in range(0, length, TILE):
            live = first + place < length
            keys = _keys_of(tl.load(source + first + place, mask=live, other=float("-inf")))
            count += tl.sum((keys >= pivot.to(tl.int32)).to(tl.int32))
        low, high, num_low, num_high = _narrow(low, high, num_low, num_high, pivot, count, k)
        step += 1

    threshold = low.to(tl.int32)
    num_above = begin * 0
    for first in range(0, length, TILE):
        live = first + place < length
        keys = _keys_of(tl.load(source + first + place, mask=live, other=float("-inf")))
        num_above += tl.sum((keys > threshold).to(tl.int32))
    room = tl.where(top <= _INFINITY, k - num_above, 0)
    target = out_index + row.to(tl.int64) * k
    written = begin * 0
    for first in range(0, tl.where(top <= _INFINITY, length, 0), TILE):
        live = first + place < length
        keys = _keys_of(tl.load(source + first + place, mask=live, other=float("-inf")))
        equal = (keys == threshold) & (keys != _NONE)
        rank = tl.cumsum(equal.to(tl.int32), axis=0)
        chosen = (keys > threshold) | (equal & (rank <= room))
        column = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(target + column, begin + first + place, mask=chosen)
        written += tl.sum(chosen.to(tl.int32))
        room -= tl.minimum(tl.sum(equal.to(tl.int32)), room)
    _fill(target, written, k, -1, FILL)


def bounded_topk(
    scores: torch.Tensor,
    k: int,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    longest: int | None = None,
) -> torch.Tensor:
    """The k highest scores of each row among its columns [start, end); columns outside are never read.

    scores fp32 [R, T] with rows in one piece; starts and ends int32 [R], all columns without them; `longest` bounds
    end - start, where the caller knows better than T. Returns int32 [R, k]: columns ascending, then -1. A row with a
    NaN inside its bounds selects nothing.
    """
    rows, width = scores.shape
    bounded = starts is not None
    length = max(1, min(width, width if longest is None else longest))
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    if not out.numel():
        return out
    fill = min(1024, triton.next_power_of_2(k))
    if k > MAX_TILE // 2 and length > MAX_TILE:
        _walk_kernel[(rows,)](
            scores, starts, ends, out, scores.stride(0), width, k, TILE=4096, BOUNDED=bounded, FILL=fill, num_warps=8
        )
        return out
    tile = min(MAX_TILE, max(128, triton.next_power_of_2(length)))
    values, origin, stride, round_ = scores, out, scores.stride(0), 0
    while True:
        tiles = -(-length // tile)
        last = tiles == 1
        keys = out if last else torch.empty(rows, tiles * k, dtype=torch.int32, device=scores.device)
        index = out if last else torch.empty_like(keys)
        _tile_kernel[(rows, tiles)](
            values,
            origin,
            starts,
            ends,
            keys,
            index,
            stride,
            width,
            k,
            TILE=tile,
            ROUND=round_,
            LAST=last,
            BOUNDED=bounded,
            FILL=fill,
            num_warps=max(1, tile // 1024),
            maxnreg=128,
        )
        if last:
            return out
        values, origin, length, stride, round_ = keys, index, tiles * k, tiles * k, round_ + 1


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
