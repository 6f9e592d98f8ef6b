"""Causal attention with per-head keys and values over packed sequences on the GPU, dense or under a token bitmask.

DSA's MHA form. No atomics: one pass is stationary in the queries (forward, their gradient), one in the keys, so every
sum has one order. A program serves one block of rows of one sequence and one head.

Shape letters: N rows, H heads, d columns of queries and keys, v of values, S sequences, W mask words a row.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.delta import row_delta

LOG2_E = 1.4426950408889634
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
            grad_queries=Tiles(own=128, other=64, warps=8, stages=2),
            grad_keys=Tiles(own=128, other=32, warps=8, stages=2),
        )
    return Launches(
        forward=Tiles(own=128, other=64, warps=8, stages=2),
        grad_queries=Tiles(own=64, other=32, warps=8, stages=2),
        grad_keys=Tiles(own=64, other=32, warps=8, stages=2),
    )


@triton.jit
def _rows_of(program, cu_seqlens, num_sequences, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr):
    """Which block of which sequence a program serves: (first row of the sequence, its length, first row of the block).

    The last block of a sequence comes first, because under causality it has the most work. Length 0: nothing to do.
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
    return start, length, (last - program) * BLOCK


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
def _words(bitmask, rows, there, num_words, first, ORDER: tl.constexpr):
    """Mask word first + ORDER of each row; 0 where the row has no such word."""
    place = bitmask + rows.to(tl.int64) * num_words + first + ORDER
    return tl.load(place, mask=there & (first + ORDER < num_words), other=0)


@triton.jit
def _bits(word_0, word_1, word_2, word_3, lane):
    """Bit `lane` (0 to 127) of four words, each broadcast against lane."""
    word = tl.where(lane < 64, tl.where(lane < 32, word_0, word_1), tl.where(lane < 96, word_2, word_3))
    return ((word >> (lane & 31)) & 1) != 0


@triton.jit
def _forward_tiles(
    acc, highest, total, q_first, q_rest, keys, values, bitmask, rows, row_there, start, length, low, high,
    stride_key, stride_value, num_words, scale,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DIAGONAL: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [low, high) of one sequence."""
    lane = tl.arange(0, BLOCK_N)
    for first in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        places = first + lane
        there = places < length
        if MASKED:
            words = first // 32
            word_0 = _words(bitmask, start + rows, row_there, num_words, words, 0)
            word_1 = _words(bitmask, start + rows, row_there, num_words, words, 1)
            word_2 = word_0
            word_3 = word_1
            if BLOCK_N > 64:
                word_2 = _words(bitmask, start + rows, row_there, num_words, words, 2)
                word_3 = _words(bitmask, start + rows, row_there, num_words, words, 3)
        k = _tile(keys, start + places, there, stride_key, 0, FIRST, BLOCK_FIRST)
        scores = tl.dot(q_first, tl.trans(k), input_precision=PRECISION)
        if REST > 0:
            k = _tile(keys, start + places, there, stride_key, FIRST, REST, BLOCK_REST)
            scores = tl.dot(q_rest, tl.trans(k), scores, input_precision=PRECISION)
        scores = scores * scale
        if MASKED:
            allowed = _bits(word_0[:, None], word_1[:, None], word_2[:, None], word_3[:, None], lane[None, :])
            scores = tl.where(allowed, scores, float("-inf"))
        if DIAGONAL:
            scores = tl.where(rows[:, None] >= places[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - higher)
        probs = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(probs, axis=1)
        v = _tile(values, start + places, there, stride_value, 0, VALUE, BLOCK_V)
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        highest = higher
    return acc, highest, total


@triton.jit
def _forward_kernel(
    queries, keys, values, bitmask, cu_seqlens, out, lse, scale, num_heads, num_sequences, num_words,
    stride_query, stride_query_head, stride_key, stride_key_head, stride_value, stride_value_head,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, H). out [N, H, v], lse fp32 [N, H] (base 2, -inf for no keys)."""
    start, length, block = _rows_of(tl.program_id(0), cu_seqlens, num_sequences, BLOCK_M, BLOCK_S)
    if length == 0:
        return
    head = tl.program_id(1).to(tl.int64)
    rows = block + tl.arange(0, BLOCK_M)
    row_there = rows < length
    query = queries + head * stride_query_head
    q_first = _tile(query, start + rows, row_there, stride_query, 0, FIRST, BLOCK_FIRST)
    q_rest = q_first
    if REST > 0:
        q_rest = _tile(query, start + rows, row_there, stride_query, FIRST, REST, BLOCK_REST)
    keys += head * stride_key_head
    values += head * stride_value_head
    # A finite start keeps exp2(highest - higher) defined for rows that have seen no key yet.
    highest = tl.full([BLOCK_M], -1.0e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    diagonal = block // BLOCK_N * BLOCK_N
    acc, highest, total = _forward_tiles(
        acc, highest, total, q_first, q_rest, keys, values, bitmask, rows, row_there, start, length, 0, diagonal,
        stride_key, stride_value, num_words, scale, FIRST, REST, VALUE, BLOCK_FIRST, BLOCK_REST, BLOCK_V, BLOCK_N,
        MASKED, False, STAGES, PRECISION,
    )  # fmt: skip
    acc, highest, total = _forward_tiles(
        acc, highest, total, q_first, q_rest, keys, values, bitmask, rows, row_there, start, length, diagonal,
        tl.minimum(block + BLOCK_M, length), stride_key, stride_value, num_words, scale, FIRST, REST, VALUE,
        BLOCK_FIRST, BLOCK_REST, BLOCK_V, BLOCK_N, MASKED, True, STAGES, PRECISION,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    _store(out + head * VALUE, start + rows, row_there, num_heads * VALUE, acc, 0, VALUE, BLOCK_V)
    place = lse + (start + rows).to(tl.int64) * num_heads + head
    tl.store(place, tl.where(total > 0, highest + tl.log2(total), float("-inf")), mask=row_there)


@triton.jit
def _grad_queries_kernel(
    queries, keys, values, bitmask, cu_seqlens, grad_out, lse, delta, grad_queries, scale, num_heads, num_sequences,
    num_words, stride_query, stride_query_head, stride_key, stride_key_head, stride_value, stride_value_head,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, H). grad_queries [N, H, d]."""
    start, length, block = _rows_of(tl.program_id(0), cu_seqlens, num_sequences, BLOCK_M, BLOCK_S)
    if length == 0:
        return
    head = tl.program_id(1).to(tl.int64)
    rows = block + tl.arange(0, BLOCK_M)
    row_there = rows < length
    query = queries + head * stride_query_head
    q_first = _tile(query, start + rows, row_there, stride_query, 0, FIRST, BLOCK_FIRST)
    if REST > 0:
        q_rest = _tile(query, start + rows, row_there, stride_query, FIRST, REST, BLOCK_REST)
        grad_rest = tl.zeros([BLOCK_M, BLOCK_REST], dtype=tl.float32)
    d_out = _tile(grad_out + head * VALUE, start + rows, row_there, num_heads * VALUE, 0, VALUE, BLOCK_V)
    place = (start + rows).to(tl.int64) * num_heads + head
    row_lse = tl.load(lse + place, mask=row_there, other=0.0)
    row_delta = tl.load(delta + place, mask=row_there, other=0.0)
    keys += head * stride_key_head
    values += head * stride_value_head
    grad_first = tl.zeros([BLOCK_M, BLOCK_FIRST], dtype=tl.float32)
    lane = tl.arange(0, BLOCK_N)
    for first in tl.range(0, tl.minimum(block + BLOCK_M, length), BLOCK_N, num_stages=STAGES):
        places = first + lane
        there = places < length
        if MASKED:
            words = first // 32
            word_0 = _words(bitmask, start + rows, row_there, num_words, words, 0)
            word_1 = _words(bitmask, start + rows, row_there, num_words, words, 1)
        k_first = _tile(keys, start + places, there, stride_key, 0, FIRST, BLOCK_FIRST)
        v = _tile(values, start + places, there, stride_value, 0, VALUE, BLOCK_V)
        scores = tl.dot(q_first, tl.trans(k_first), input_precision=PRECISION)
        if REST > 0:
            k_rest = _tile(keys, start + places, there, stride_key, FIRST, REST, BLOCK_REST)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
        d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        allowed = rows[:, None] >= places[None, :]
        if MASKED:
            bits = _bits(word_0[:, None], word_1[:, None], word_0[:, None], word_1[:, None], lane[None, :])
            allowed = allowed & bits
        probs = tl.where(allowed, tl.exp2(scores * (scale * _LOG2_E) - row_lse[:, None]), 0.0)
        d_scores = (probs * (d_probs - row_delta[:, None]) * scale).to(k_first.dtype)
        grad_first = tl.dot(d_scores, k_first, grad_first, input_precision=PRECISION)
        if REST > 0:
            grad_rest = tl.dot(d_scores, k_rest, grad_rest, input_precision=PRECISION)
    target = grad_queries + head * (FIRST + REST)
    stride = num_heads * (FIRST + REST)
    _store(target, start + rows, row_there, stride, grad_first, 0, FIRST, BLOCK_FIRST)
    if REST > 0:
        _store(target, start + rows, row_there, stride, grad_rest, FIRST, REST, BLOCK_REST)


@triton.jit
def _grad_keys_kernel(
    queries, keys, values, bitmask, cu_seqlens, grad_out, lse, delta, grad_keys, grad_values, scale, num_heads,
    num_sequences, num_words, stride_query, stride_query_head, stride_key, stride_key_head, stride_value,
    stride_value_head,
    FIRST: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_FIRST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of keys, H). BLOCK_M keys are owned, BLOCK_N queries come by at a time; both gradients are written.

    Scores stand here with keys as rows.
    """
    start, length, block = _rows_of(tl.program_id(0), cu_seqlens, num_sequences, BLOCK_M, BLOCK_S)
    if length == 0:
        return
    head = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    rows = block + lane
    row_there = rows < length
    key = keys + head * stride_key_head
    k_first = _tile(key, start + rows, row_there, stride_key, 0, FIRST, BLOCK_FIRST)
    if REST > 0:
        k_rest = _tile(key, start + rows, row_there, stride_key, FIRST, REST, BLOCK_REST)
        grad_rest = tl.zeros([BLOCK_M, BLOCK_REST], dtype=tl.float32)
    v = _tile(values + head * stride_value_head, start + rows, row_there, stride_value, 0, VALUE, BLOCK_V)
    grad_first = tl.zeros([BLOCK_M, BLOCK_FIRST], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    query = queries + head * stride_query_head
    upstream = grad_out + head * VALUE
    words = block // 32
    for first in tl.range(block // BLOCK_N * BLOCK_N, length, BLOCK_N, num_stages=STAGES):
        places = first + tl.arange(0, BLOCK_N)
        there = places < length
        if MASKED:
            word_0 = _words(bitmask, start + places, there, num_words, words, 0)
            word_1 = _words(bitmask, start + places, there, num_words, words, 1)
            word_2 = word_0
            word_3 = word_1
            if BLOCK_M > 64:
                word_2 = _words(bitmask, start + places, there, num_words, words, 2)
                word_3 = _words(bitmask, start + places, there, num_words, words, 3)
        place = (start + places).to(tl.int64) * num_heads + head
        row_lse = tl.load(lse + place, mask=there, other=0.0)
        row_delta = tl.load(delta + place, mask=there, other=0.0)
        q_first = _tile(query, start + places, there, stride_query, 0, FIRST, BLOCK_FIRST)
        d_out = _tile(upstream, start + places, there, num_heads * VALUE, 0, VALUE, BLOCK_V)
        scores = tl.dot(k_first, tl.trans(q_first), input_precision=PRECISION)
        if REST > 0:
            q_rest = _tile(query, start + places, there, stride_query, FIRST, REST, BLOCK_REST)
            scores = tl.dot(k_rest, tl.trans(q_rest), scores, input_precision=PRECISION)
        d_probs = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        allowed = (places[None, :] >= rows[:, None]) & there[None, :]
        if MASKED:
            bits = _bits(word_0[None, :], word_1[None, :], word_2[None, :], word_3[None, :], lane[:, None])
            allowed = allowed & bits
        probs = tl.where(allowed, tl.exp2(scores * (scale * _LOG2_E) - row_lse[None, :]), 0.0)
        d_scores = (probs * (d_probs - row_delta[None, :]) * scale).to(q_first.dtype)
        grad_v = tl.dot(probs.to(d_out.dtype), d_out, grad_v, input_precision=PRECISION)
        grad_first = tl.dot(d_scores, q_first, grad_first, input_precision=PRECISION)
        if REST > 0:
            grad_rest = tl.dot(d_scores, q_rest, grad_rest, input_precision=PRECISION)
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


def packed_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    bitmask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.reference.packed_attention`. Bitwise the same from run to run, gradients included."""
    return _PackedAttention.apply(queries, keys, values, cu_seqlens.int(), scale, bitmask)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries, keys, values, cu_seqlens, scale, bitmask):
        queries, keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (queries, keys, values))
        bitmask = None if bitmask is None else bitmask.contiguous()
        num_rows, num_heads, _ = queries.shape
        out = torch.zeros(num_rows, num_heads, values.shape[-1], dtype=values.dtype, device=values.device)
        lse = torch.full((num_rows, num_heads), float("-inf"), dtype=torch.float32, device=values.device)
        tiles = _launches(queries.shape[-1], values.shape[-1], queries.element_size())
        _launch(_forward_kernel, tiles.forward, queries, keys, values, cu_seqlens, bitmask, [out, lse, scale * LOG2_E])
        ctx.save_for_backward(queries, keys, values, cu_seqlens, bitmask, out, lse)
        ctx.scale = scale
        natural = lse / LOG2_E
        ctx.mark_non_differentiable(natural)
        return out, natural

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        queries, keys, values, cu_seqlens, bitmask, out, lse = ctx.saved_tensors
        grad_out = grad_outputs[0].contiguous()
        grads = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (queries, keys, values)]
        before = [grad_out, lse, row_delta(out, grad_out)]
        inputs = queries, keys, values, cu_seqlens, bitmask
        tiles = _launches(queries.shape[-1], values.shape[-1], queries.element_size())
        _launch(_grad_queries_kernel, tiles.grad_queries, *inputs, [*before, grads[0], ctx.scale])
        _launch(_grad_keys_kernel, tiles.grad_keys, *inputs, [*before, grads[1], grads[2], ctx.scale])
        return *grads, None, None, None


def _launch(
    kernel: Any,
    tiles: Tiles,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    bitmask: torch.Tensor | None,
    rest: list[Any],
) -> None:
    """Runs a kernel over all blocks of rows; `rest` is what stands between cu_seqlens and num_heads."""
    num_rows, num_heads, dim = queries.shape
    value_dim, num_sequences = values.shape[-1], cu_seqlens.shape[0] - 1
    if not (queries.numel() and values.numel()):
        return
    # Every sequence wastes less than one block, so this many programs are enough without knowing the lengths.
    grid = (num_rows // tiles.own + num_sequences, num_heads)
    kernel[grid](
        queries, keys, values, cu_seqlens if bitmask is None else bitmask, cu_seqlens, *rest, num_heads,
        num_sequences, 0 if bitmask is None else bitmask.shape[1], *queries.stride()[:2], *keys.stride()[:2],
        *values.stride()[:2],
        **_blocks(dim, value_dim, tiles, queries.dtype, num_sequences=num_sequences, masked=bitmask is not None),
        num_warps=tiles.warps,
    )  # fmt: skip


def _blocks(
    dim: int, value_dim: int, tiles: Tiles, dtype: torch.dtype, *, num_sequences: int, masked: bool
) -> dict[str, Any]:
    """The kernels' constants."""
    first = 1 << (dim.bit_length() - 1)  # 192 columns are 128 and 64
    rest = dim - first
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
        "MASKED": masked,
        "STAGES": tiles.stages,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
