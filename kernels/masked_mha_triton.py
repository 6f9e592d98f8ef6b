"""Packed attention's kernels in Triton, for what `kernels.masked_mha` launches: see there.

Blocks of rows come by descriptors under TMA, which has to be possible (`takes_descriptors`), and by pointers at a
sequence's end and elsewhere.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


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


@triton.jit(do_not_specialize=["num_sequences"])
def forward_kernel(
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


@triton.jit(do_not_specialize=["first_head", "num_tiles", "num_sequences"])
def grad_queries_kernel(
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


@triton.jit(do_not_specialize=["first_head", "num_tiles", "num_sequences"])
def grad_keys_kernel(
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
