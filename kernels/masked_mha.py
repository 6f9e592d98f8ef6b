"""Causal attention with per-head keys and values over packed sequences on the GPU, dense or under a token bitmask.

DSA's MHA form. A program serves one block of rows of one sequence and one head. No atomics: the forward pass and the
gradient of the queries are stationary in the queries, and the latter writes the probabilities and their gradients, of
as many heads at a time as PAIRS_LIMIT admits; products of these, stationary in the keys, are the gradients of keys and
values. Every sum has one order.

Shape letters: N rows, H heads, d columns of queries and keys, v of values, S sequences, W mask words a row.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.delta import row_delta

LOG2_E = 1.4426950408889634
# What the backward pass keeps of pairs of queries and keys at a time, in bytes: at least one head's.
PAIRS_LIMIT = 2 << 30
_LOG2_E = tl.constexpr(LOG2_E)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a launch is cut: rows that a program owns, rows that it walks over at a time."""

    own: int
    other: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """The tiles of the three passes."""

    forward: Tiles
    grad_queries: Tiles
    grad_keys: Tiles


_CHECK = Tiles(own=32, other=32, warps=4, stages=1)


def _launches(dim: int, value_dim: int, element_size: int) -> Launches:
    """H100/H200: what fits in 255 registers a thread and 227 KB of shared memory. fp32 is for checks."""
    if element_size > 2:
        return Launches(forward=_CHECK, grad_queries=_CHECK, grad_keys=_CHECK)
    if dim + value_dim <= 320:
        return Launches(
            forward=Tiles(own=128, other=128, warps=8, stages=2),
            grad_queries=Tiles(own=128, other=64, warps=8, stages=3),
            grad_keys=Tiles(own=128, other=64, warps=8, stages=3),
        )
    return Launches(
        forward=Tiles(own=128, other=64, warps=8, stages=2),
        grad_queries=Tiles(own=64, other=32, warps=8, stages=2),
        grad_keys=Tiles(own=64, other=64, warps=8, stages=2),
    )


@triton.jit
def _rows_of(program, cu_seqlens, num_sequences, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr):
    """Which block of which sequence a program serves: (first row of the sequence, its length, first row of the block,
    tiles of the sequences before).

    The last block of a sequence comes first, because under causality it has the most work. Length 0: nothing to do.
    A sequence of n blocks has a tile for each of its n (n + 1) / 2 pairs of a block and an earlier or the same one.
    """
    sequences = tl.arange(0, BLOCK_S)
    inside = sequences < num_sequences
    starts = tl.load(cu_seqlens + sequences, mask=inside, other=0)
    lengths = tl.load(cu_seqlens + sequences + 1, mask=inside, other=0) - starts
    blocks = (lengths + BLOCK - 1) // BLOCK
    ends = tl.cumsum(blocks, axis=0)
    mine = (ends > program) & (ends - blocks <= program)
    start = tl.sum(tl.where(mine, starts, 0), axis=0)
    length = tl.sum(tl.where(mine, lengths, 0), axis=0)
    last = tl.sum(tl.where(mine, ends, 0), axis=0) - 1
    tiles = blocks * (blocks + 1) // 2
    before = tl.sum(tl.where(mine, tl.cumsum(tiles, axis=0) - tiles, 0), axis=0)
    return start, length, (last - program) * BLOCK, before


@triton.jit
def _tile(base, rows, there, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of the given rows, zeros where a row is not there or beyond: [rows, BLOCK]."""
    columns = tl.arange(0, BLOCK)
    mask = there[:, None]
    if BLOCK != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + FIRST + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, rows, there, stride, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    place = base + rows.to(tl.int64)[:, None] * stride + FIRST + columns[None, :]
    tl.store(place, values.to(base.dtype.element_ty), mask=there[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _allowed(ordered, rows, there, num_words, first, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Bits [first, first + BLOCK) of the given rows of `ordered_bitmask`: [BLOCK_M, BLOCK]; 0 where there are none."""
    group = first // 128 * 4
    place = ordered + rows.to(tl.int64)[:, None] * num_words + group + tl.arange(0, 4)[None, :]
    words = tl.load(place, mask=there[:, None] & (group < num_words), other=0) >> (first % 128 // 4)
    bit = tl.arange(0, BLOCK // 8)[:, None] * 2 + tl.arange(0, 2)[None, :]
    bits = words[:, None, :, None] & (tl.full([1, 1, 1, 1], 1, tl.int32) << bit[None, :, None, :])
    return tl.reshape(bits != 0, [BLOCK_M, BLOCK])


@triton.jit
def _forward_tiles(
    acc, highest, total, q_first, q_rest, keys, values, key_first, key_rest, value, bitmask, rows, row_there, start,
    length, low, high, head, stride_key, stride_key_head, stride_value, stride_value_head, num_words, scale,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DIAGONAL: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [low, high) of one sequence; under TMA whole blocks of them come by descriptors."""
    lane = tl.arange(0, BLOCK_N)
    for first in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        places = first + lane
        there = places < length
        allowed = there
        if MASKED:
            allowed = _allowed(bitmask, start + rows, row_there, num_words, first, BLOCK_M, BLOCK_N)
        if TMA:
            k = key_first.load([start + first, head * stride_key_head])
        else:
            k = _tile(keys, start + places, there, stride_key, 0, FIRST, BLOCK_FIRST)
        scores = tl.dot(q_first, tl.trans(k), input_precision=PRECISION)
        if REST > 0:
            if TMA:
                k = key_rest.load([start + first, head * stride_key_head + FIRST])
            else:
                k = _tile(keys, start + places, there, stride_key, FIRST, REST, BLOCK_REST)
            scores = tl.dot(q_rest, tl.trans(k), scores, input_precision=PRECISION)
        if MASKED:
            scores = tl.where(allowed, scores, float("-inf"))
        if DIAGONAL:
            scores = tl.where(rows[:, None] >= places[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shift = higher * scale
        shrink = tl.exp2((highest - higher) * scale)
        probs = tl.exp2(scores * scale - shift[:, None])
        total = total * shrink + tl.sum(probs, axis=1)
        if TMA:
            v = value.load([start + first, head * stride_value_head])
        else:
            v = _tile(values, start + places, there, stride_value, 0, VALUE, BLOCK_V)
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        highest = higher
    return acc, highest, total


@triton.jit
def _forward_kernel(
    queries, keys, values, key_first, key_rest, value, bitmask, cu_seqlens, out, lse, scale, num_heads, num_sequences,
    num_words, stride_query, stride_query_head, stride_key, stride_key_head, stride_value, stride_value_head,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, H). out [N, H, v], lse fp32 [N, H] (base 2, -inf for no keys)."""
    start, length, block, _ = _rows_of(tl.program_id(0), cu_seqlens, num_sequences, BLOCK_M, BLOCK_S)
    if length == 0:
        return
    head = tl.program_id(1)
    rows = block + tl.arange(0, BLOCK_M)
    row_there = rows < length
    query = queries + head.to(tl.int64) * stride_query_head
    q_first = _tile(query, start + rows, row_there, stride_query, 0, FIRST, BLOCK_FIRST)
    q_rest = q_first
    if REST > 0:
        q_rest = _tile(query, start + rows, row_there, stride_query, FIRST, REST, BLOCK_REST)
    keys += head.to(tl.int64) * stride_key_head
    values += head.to(tl.int64) * stride_value_head
    # A finite start keeps the differences defined for rows that have seen no key yet.
    highest = tl.full([BLOCK_M], -1.0e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    diagonal = block // BLOCK_N * BLOCK_N
    acc, highest, total = _forward_tiles(
        acc, highest, total, q_first, q_rest, keys, values, key_first, key_rest, value, bitmask, rows, row_there, start,
        length, 0, diagonal, head, stride_key, stride_key_head, stride_value, stride_value_head, num_words, scale,
        FIRST, REST, VALUE, BLOCK_FIRST, BLOCK_REST, BLOCK_V, BLOCK_M, BLOCK_N, MASKED, False, STAGES, PRECISION, TMA,
    )  # fmt: skip
    acc, highest, total = _forward_tiles(
        acc, highest, total, q_first, q_rest, keys, values, key_first, key_rest, value, bitmask, rows, row_there, start,
        length, diagonal, tl.minimum(block + BLOCK_M, length), head, stride_key, stride_key_head, stride_value,
        stride_value_head, num_words, scale, FIRST, REST, VALUE, BLOCK_FIRST, BLOCK_REST, BLOCK_V, BLOCK_M, BLOCK_N,
        MASKED, True, STAGES, PRECISION, False,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    _store(out + head * VALUE, start + rows, row_there, num_heads * VALUE, acc, 0, VALUE, BLOCK_V)
    place = lse + (start + rows).to(tl.int64) * num_heads + head
    tl.store(place, tl.where(total > 0, highest * scale + tl.log2(total), float("-inf")), mask=row_there)


@triton.jit
def _grad_queries_tiles(
    grad_first, grad_rest, q_first, q_rest, d_out, keys, values, key_first, key_rest, value, bitmask, probs_out,
    d_scores_out, rows, row_there, row_lse, row_delta, start, length, low, high, head, stride_key, stride_key_head,
    stride_value, stride_value_head, num_words, scale,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DIAGONAL: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The keys [low, high) of one sequence; probs_out and d_scores_out at the first tile of this block of queries."""
    lane = tl.arange(0, BLOCK_N)
    within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_M + lane[None, :]
    for first in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        places = first + lane
        there = places < length
        allowed = there
        if MASKED:
            allowed = _allowed(bitmask, start + rows, row_there, num_words, first, BLOCK_M, BLOCK_N)
        if TMA:
            k_first = key_first.load([start + first, head * stride_key_head])
            v = value.load([start + first, head * stride_value_head])
        else:
            k_first = _tile(keys, start + places, there, stride_key, 0, FIRST, BLOCK_FIRST)
            v = _tile(values, start + places, there, stride_value, 0, VALUE, BLOCK_V)
        scores = tl.dot(q_first, tl.trans(k_first), input_precision=PRECISION)
        if REST > 0:
            if TMA:
                k_rest = key_rest.load([start + first, head * stride_key_head + FIRST])
            else:
                k_rest = _tile(keys, start + places, there, stride_key, FIRST, REST, BLOCK_REST)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
        d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        probs = tl.exp2(scores * (scale * _LOG2_E) - row_lse[:, None])
        if MASKED:
            probs = tl.where(allowed, probs, 0.0)
        if DIAGONAL:
            probs = tl.where(rows[:, None] >= places[None, :], probs, 0.0)
        d_scores = (probs * (d_probs * scale - row_delta[:, None])).to(k_first.dtype)
        target = first // BLOCK_M * (BLOCK_M * BLOCK_M) + tl.multiple_of(first % BLOCK_M, BLOCK_N)
        tl.store(probs_out + target + within, probs.to(k_first.dtype))
        tl.store(d_scores_out + target + within, d_scores)
        grad_first = tl.dot(d_scores, k_first, grad_first, input_precision=PRECISION)
        if REST > 0:
            grad_rest = tl.dot(d_scores, k_rest, grad_rest, input_precision=PRECISION)
    return grad_first, grad_rest


@triton.jit
def _grad_queries_kernel(
    queries, keys, values, key_first, key_rest, value, bitmask, cu_seqlens, grad_out, lse, delta, probs_out,
    d_scores_out, grad_queries, scale,
    first_head, num_tiles, num_heads, num_sequences, num_words, stride_query, stride_query_head, stride_key,
    stride_key_head, stride_value, stride_value_head,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, heads of a group). grad_queries [N, H, d]; probs_out and d_scores_out in its dtype,
    [heads of the group, num_tiles, BLOCK_M queries, BLOCK_M keys].
    """
    start, length, block, before = _rows_of(tl.program_id(0), cu_seqlens, num_sequences, BLOCK_M, BLOCK_S)
    if length == 0:
        return
    head = first_head + tl.program_id(1)
    rows = block + tl.arange(0, BLOCK_M)
    row_there = rows < length
    query = queries + head.to(tl.int64) * stride_query_head
    q_first = _tile(query, start + rows, row_there, stride_query, 0, FIRST, BLOCK_FIRST)
    grad_first = tl.zeros([BLOCK_M, BLOCK_FIRST], dtype=tl.float32)
    q_rest = q_first
    grad_rest = grad_first
    if REST > 0:
        q_rest = _tile(query, start + rows, row_there, stride_query, FIRST, REST, BLOCK_REST)
        grad_rest = tl.zeros([BLOCK_M, BLOCK_REST], dtype=tl.float32)
    d_out = _tile(grad_out + head * VALUE, start + rows, row_there, num_heads * VALUE, 0, VALUE, BLOCK_V)
    place = (start + rows).to(tl.int64) * num_heads + head
    row_lse = tl.load(lse + place, mask=row_there, other=0.0)
    # The row of a query that sees nothing has -inf there, and no finite score may become infinite beside it.
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    row_delta = tl.load(delta + place, mask=row_there, other=0.0) * scale
    keys += head.to(tl.int64) * stride_key_head
    values += head.to(tl.int64) * stride_value_head
    order = block // BLOCK_M
    pairs = (tl.program_id(1).to(tl.int64) * num_tiles + before + order * (order + 1) // 2) * (BLOCK_M * BLOCK_M)
    grad_first, grad_rest = _grad_queries_tiles(
        grad_first, grad_rest, q_first, q_rest, d_out, keys, values, key_first, key_rest, value, bitmask,
        probs_out + pairs, d_scores_out + pairs, rows, row_there, row_lse, row_delta, start, length, 0, block, head,
        stride_key, stride_key_head, stride_value, stride_value_head, num_words, scale, FIRST, REST, VALUE, BLOCK_FIRST,
        BLOCK_REST, BLOCK_V, BLOCK_M, BLOCK_N, MASKED, False, STAGES, PRECISION, TMA,
    )  # fmt: skip
    grad_first, grad_rest = _grad_queries_tiles(
        grad_first, grad_rest, q_first, q_rest, d_out, keys, values, key_first, key_rest, value, bitmask,
        probs_out + pairs, d_scores_out + pairs, rows, row_there, row_lse, row_delta, start, length, block,
        tl.minimum(block + BLOCK_M, length), head, stride_key, stride_key_head, stride_value, stride_value_head,
        num_words, scale, FIRST, REST, VALUE, BLOCK_FIRST, BLOCK_REST, BLOCK_V, BLOCK_M, BLOCK_N, MASKED, True, STAGES,
        PRECISION, False,
    )  # fmt: skip
    target = grad_queries + head * (FIRST + REST)
    stride = num_heads * (FIRST + REST)
    _store(target, start + rows, row_there, stride, grad_first, 0, FIRST, BLOCK_FIRST)
    if REST > 0:
        _store(target, start + rows, row_there, stride, grad_rest, FIRST, REST, BLOCK_REST)


@triton.jit
def _grad_keys_tiles(
    grad_first, grad_rest, grad_v, queries, grad_out, probs, d_scores, query_first, query_rest, upstream, pairs,
    pair_scores, start, length, low, high, head, tile, num_heads, stride_query, stride_query_head,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The queries [low, high) of one sequence; `tile` is the first of the pairs with this block of keys."""
    within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    for first in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        places = first + tl.arange(0, BLOCK_N)
        there = places < length
        order = first // BLOCK_M
        row = (tile + order * (order + 1) // 2) * BLOCK_M + first % BLOCK_M
        if TMA:
            p = pairs.load([row, 0])
            d_s = pair_scores.load([row, 0])
            d_out = upstream.load([start + first, head * VALUE])
            q_first = query_first.load([start + first, head * stride_query_head])
        else:
            source = row.to(tl.int64) * BLOCK_M
            p = tl.load(probs + source + within)
            d_s = tl.load(d_scores + source + within)
            d_out = _tile(grad_out, start + places, there, num_heads * VALUE, 0, VALUE, BLOCK_V)
            q_first = _tile(queries, start + places, there, stride_query, 0, FIRST, BLOCK_FIRST)
        grad_v = tl.dot(tl.trans(p), d_out, grad_v, input_precision=PRECISION)
        grad_first = tl.dot(tl.trans(d_s), q_first, grad_first, input_precision=PRECISION)
        if REST > 0:
            if TMA:
                q_rest = query_rest.load([start + first, head * stride_query_head + FIRST])
            else:
                q_rest = _tile(queries, start + places, there, stride_query, FIRST, REST, BLOCK_REST)
            grad_rest = tl.dot(tl.trans(d_s), q_rest, grad_rest, input_precision=PRECISION)
    return grad_first, grad_rest, grad_v


@triton.jit
def _grad_keys_kernel(
    queries, cu_seqlens, grad_out, probs, d_scores, query_first, query_rest, upstream, pairs, pair_scores, grad_keys,
    grad_values, first_head, num_tiles, num_heads, num_sequences, stride_query, stride_query_head,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of keys, heads of a group). BLOCK_M keys are owned, BLOCK_N queries come by at a time."""
    start, length, last, before = _rows_of(tl.program_id(0), cu_seqlens, num_sequences, BLOCK_M, BLOCK_S)
    if length == 0:
        return
    # The first block of keys has the most work.
    block = (length - 1) // BLOCK_M * BLOCK_M - last
    head = first_head + tl.program_id(1)
    grad_first = tl.zeros([BLOCK_M, BLOCK_FIRST], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    grad_rest = grad_first
    if REST > 0:
        grad_rest = tl.zeros([BLOCK_M, BLOCK_REST], dtype=tl.float32)
    queries += head.to(tl.int64) * stride_query_head
    grad_out += head.to(tl.int64) * VALUE
    tile = tl.program_id(1) * num_tiles + before + block // BLOCK_M
    whole = tl.maximum(length // BLOCK_N * BLOCK_N, block) if TMA else length
    grad_first, grad_rest, grad_v = _grad_keys_tiles(
        grad_first, grad_rest, grad_v, queries, grad_out, probs, d_scores, query_first, query_rest, upstream, pairs,
        pair_scores, start, length, block, whole, head, tile, num_heads, stride_query, stride_query_head, FIRST, REST,
        VALUE, BLOCK_FIRST, BLOCK_REST, BLOCK_V, BLOCK_M, BLOCK_N, STAGES, PRECISION, TMA,
    )  # fmt: skip
    if TMA:
        # Beyond the sequence rows of the next one follow, which may hold NaN.
        grad_first, grad_rest, grad_v = _grad_keys_tiles(
            grad_first, grad_rest, grad_v, queries, grad_out, probs, d_scores, query_first, query_rest, upstream, pairs,
            pair_scores, start, length, whole, length, head, tile, num_heads, stride_query, stride_query_head, FIRST,
            REST, VALUE, BLOCK_FIRST, BLOCK_REST, BLOCK_V, BLOCK_M, BLOCK_N, 1, PRECISION, False,
        )  # fmt: skip
    rows = block + tl.arange(0, BLOCK_M)
    row_there = rows < length
    target = grad_keys + head * (FIRST + REST)
    stride = num_heads * (FIRST + REST)
    _store(target, start + rows, row_there, stride, grad_first, 0, FIRST, BLOCK_FIRST)
    if REST > 0:
        _store(target, start + rows, row_there, stride, grad_rest, FIRST, REST, BLOCK_REST)
    _store(grad_values + head * VALUE, start + rows, row_there, num_heads * VALUE, grad_v, 0, VALUE, BLOCK_V)


@triton.jit
def _bitmask_kernel(indices, words, num_selected, num_words, BLOCK: tl.constexpr):
    """Grid (N, blocks of indices). Sets the bit of every index; order does not matter to an "or"."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + row * num_selected + columns, mask=columns < num_selected, other=-1)
    there = index >= 0
    bit = tl.full([BLOCK], 1, dtype=tl.int32) << (index & 31)
    tl.atomic_or(words + row * num_words + tl.where(there, index >> 5, 0), bit, mask=there, sem="relaxed")


def selection_bitmask(indices: torch.Tensor, num_keys: int) -> torch.Tensor:
    """See `kernels.reference.selection_bitmask`."""
    indices = indices.int().contiguous()
    num_rows, num_selected = indices.shape
    words = torch.zeros(num_rows, (num_keys + 31) // 32, dtype=torch.int32, device=indices.device)
    if indices.numel() and words.numel():
        block = min(1024, triton.next_power_of_2(num_selected))
        grid = (num_rows, (num_selected + block - 1) // block)
        _bitmask_kernel[grid](indices, words, num_selected, words.shape[1], BLOCK=block, num_warps=4)
    return words


@triton.jit
def _order_kernel(words, ordered, num_words, num_ordered, num_rows, BLOCK: tl.constexpr):
    """Grid (blocks of ordered words). See `ordered_bitmask`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = place // num_ordered, place % num_ordered
    there = row < num_rows
    group, pair = column // 4, column % 4
    found = tl.zeros([BLOCK], tl.int32)
    for part in tl.static_range(4):
        source = group * 4 + part
        word = tl.load(words + row * num_words + source, mask=there & (source < num_words), other=0)
        for step in tl.static_range(4):
            bits = (word >> (8 * step + 2 * pair).to(tl.int32)) & 3
            found |= bits << (8 * part + 2 * step)
    tl.store(ordered + place, found, mask=there)


def ordered_bitmask(bitmask: torch.Tensor) -> torch.Tensor:
    """The bits of `selection_bitmask` in the order in which a thread holds the columns of a product.

    int32 [N, W] to [N, 4 ceil(W / 4)]. Of every 128 bits, word q of four has those of columns 8 i + 2 q + b at 2 i + b.
    """
    num_rows, num_words = bitmask.shape
    ordered = torch.empty(num_rows, (num_words + 3) // 4 * 4, dtype=torch.int32, device=bitmask.device)
    if ordered.numel():
        grid = (triton.cdiv(ordered.numel(), 1024),)
        _order_kernel[grid](bitmask, ordered, num_words, ordered.shape[1], num_rows, BLOCK=1024, num_warps=4)
    return ordered


def packed_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    bitmask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.reference.packed_attention`. Bitwise the same from run to run, gradients included.

    The backward pass keeps PAIRS_LIMIT bytes, or what the pairs of one head need, and asks the GPU for their number.
    """
    if not scale > 0:
        raise ValueError(f"packed_attention: scale must be above 0, not {scale}")
    return _PackedAttention.apply(queries, keys, values, cu_seqlens.int(), scale, bitmask)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries, keys, values, cu_seqlens, scale, bitmask):
        queries, keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (queries, keys, values))
        ordered = None if bitmask is None else ordered_bitmask(bitmask.contiguous())
        num_rows, num_heads, _ = queries.shape
        out = torch.zeros(num_rows, num_heads, values.shape[-1], dtype=values.dtype, device=values.device)
        lse = torch.full((num_rows, num_heads), float("-inf"), dtype=torch.float32, device=values.device)
        if queries.numel() and values.numel():
            tiles = _launches(queries.shape[-1], values.shape[-1], queries.element_size()).forward
            mask, num_words = (cu_seqlens, 0) if ordered is None else (ordered, ordered.shape[1])
            num_sequences = cu_seqlens.shape[0] - 1
            blocks = _blocks(queries, values, num_sequences, tiles)
            tma = takes_descriptors(queries, keys, values)
            _forward_kernel[_grid(queries, num_sequences, tiles)](
                queries, keys, values, *_descriptors(tma, tiles.other, (keys, 0), (keys, 1), (values, 0)), mask,
                cu_seqlens, out, lse, scale * LOG2_E, num_heads, num_sequences, num_words,
                *_strides(queries, keys, values), MASKED=ordered is not None, TMA=tma, **blocks,
            )  # fmt: skip
        ctx.save_for_backward(queries, keys, values, cu_seqlens, ordered, out, lse)
        ctx.scale = scale
        natural = lse / LOG2_E
        ctx.mark_non_differentiable(natural)
        return out, natural

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        queries, keys, values, cu_seqlens, ordered, out, lse = ctx.saved_tensors
        grad_out = grad_outputs[0].contiguous()
        grads = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (queries, keys, values)]
        if queries.numel() and values.numel():
            before = queries, keys, values, ordered, cu_seqlens, grad_out, lse, row_delta(out, grad_out)
            _backward(*before, ctx.scale, *grads)
        return *grads, None, None, None


def _backward(
    queries, keys, values, ordered, cu_seqlens, grad_out, lse, delta, scale, grad_queries, grad_keys, grad_values
) -> None:
    launches = _launches(queries.shape[-1], values.shape[-1], queries.element_size())
    own, num_heads, num_sequences = launches.grad_queries.own, queries.shape[1], cu_seqlens.shape[0] - 1
    num_blocks = (cu_seqlens.diff() + own - 1) // own
    num_tiles = int((num_blocks * (num_blocks + 1) // 2).sum())
    size = num_tiles * own * own
    group = min(num_heads, max(1, PAIRS_LIMIT // (2 * size * queries.element_size())))
    probs, d_scores = torch.empty(2, group * size, dtype=queries.dtype, device=queries.device)
    mask, num_words = (cu_seqlens, 0) if ordered is None else (ordered, ordered.shape[1])
    tma = takes_descriptors(queries, keys, values)
    for first in range(0, num_heads, group):
        heads = min(group, num_heads - first)
        tiles = launches.grad_queries
        _grad_queries_kernel[_grid(queries, num_sequences, tiles, heads)](
            queries, keys, values, *_descriptors(tma, tiles.other, (keys, 0), (keys, 1), (values, 0)), mask, cu_seqlens,
            grad_out, lse, delta, probs, d_scores, grad_queries, scale, first, num_tiles, num_heads, num_sequences,
            num_words, *_strides(queries, keys, values), MASKED=ordered is not None, TMA=tma,
            **_blocks(queries, values, num_sequences, tiles),
        )  # fmt: skip
        tiles = launches.grad_keys
        pairs = [(part.view(-1, 1, own), 0) for part in (probs, d_scores)]
        _grad_keys_kernel[_grid(queries, num_sequences, tiles, heads)](
            queries, cu_seqlens, grad_out, probs, d_scores,
            *_descriptors(tma, tiles.other, (queries, 0), (queries, 1), (grad_out, 0), *pairs), grad_keys, grad_values,
            first, num_tiles, num_heads, num_sequences, *_strides(queries), TMA=tma,
            **_blocks(queries, values, num_sequences, tiles),
        )  # fmt: skip


def takes_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether descriptors can copy blocks of these [N, H, d]: whole 16 bytes, in one or two pieces of columns."""
    return all(
        tensor.element_size() == 2
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0) % 8 == 0
        and all(width in (0, 16, 32, 64, 128, 256) for width in _pieces(tensor.shape[-1]))
        for tensor in tensors
    )


def _pieces(dim: int) -> tuple[int, int]:
    """The two blocks of columns, powers of two, that `dim` columns are: 192 are 128 and 64, 128 are 128 and 0."""
    first = 1 << (dim.bit_length() - 1)
    return first, dim - first


def _descriptors(tma: bool, rows: int, *parts: tuple[torch.Tensor, int]) -> list[Any]:
    """Of blocks of `rows` rows and one piece of a head's columns; without `tma`, what stands in their place."""
    found = []
    for tensor, piece in parts:
        width = _pieces(tensor.shape[-1])[piece]
        if not (tma and width):
            found.append(tensor)
            continue
        span = (tensor.shape[1] - 1) * tensor.stride(1) + tensor.shape[2]
        found.append(TensorDescriptor(tensor, [tensor.shape[0], span], [tensor.stride(0), 1], [rows, width]))
    return found


def _grid(queries: torch.Tensor, num_sequences: int, tiles: Tiles, heads: int | None = None) -> tuple[int, int]:
    # Every sequence wastes less than one block, so this many programs are enough without knowing the lengths.
    return queries.shape[0] // tiles.own + num_sequences, queries.shape[1] if heads is None else heads


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _blocks(queries: torch.Tensor, values: torch.Tensor, num_sequences: int, tiles: Tiles) -> dict[str, Any]:
    """The kernels' constants."""
    value_dim = values.shape[-1]
    first, rest = _pieces(queries.shape[-1])
    return {
        "FIRST": first,
        "REST": rest,
        "VALUE": value_dim,
        "BLOCK_FIRST": max(16, first),
        "BLOCK_REST": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_M": tiles.own,
        "BLOCK_N": tiles.other,
        "BLOCK_S": max(16, triton.next_power_of_2(num_sequences)),
        "STAGES": tiles.stages,
        "PRECISION": "ieee" if queries.dtype == torch.float32 else "tf32",
        "num_warps": tiles.warps,
    }
