"""Gradients of sparse MLA on an H100 or H200: of pairs of query and selected key (Gluon), and of queries (Triton).

`pairs_kernel` makes what each pair adds to its key's gradient. A program takes one query and 64 heads. Four warps
gather keys in groups of columns; two groups of four warps take every other tile of 64 keys each and never wait for
each other: probabilities and the scores' gradients, keys by heads, stay in registers, where they are the left operand
of the products that make the pairs' gradients. The scores' gradients are also written, and `queries_kernel` multiplies
them with the keys.

Shape letters as in `kernels.sparse_mla`; B blocks of 64 heads.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.sparse_mla_hopper import HEADS, LATENT, ROPE, _copy, _count, head_blocks
from kernels.sparse_tiles import LOG2_E

_LOG2_E = gl.constexpr(LOG2_E)
_HEADS, _KEYS = gl.constexpr(HEADS), gl.constexpr(64)
_LATENT, _ROPE, _DIM = gl.constexpr(LATENT), gl.constexpr(ROPE), gl.constexpr(LATENT + ROPE)
# Keys come in groups of columns: four of the latent part and, last in memory and first in use, the rope part.
_GROUP, _GROUPS = gl.constexpr(128), gl.constexpr(5)
_CHUNK, _CHUNKS = gl.constexpr(64), gl.constexpr(9)
_GATHER = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_TILE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
_SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def _gather(operands, ready, free, source):
    """The gathering warps: queries and upstream gradients, then a group of a tile's columns whenever it is free."""
    q_latent, q_rope, d_out, k_latent, k_rope = operands
    queries, upstream, keys, row, stop, heads_left, stride_head, stride_key = source
    place = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, _GATHER))
    head_there = place < heads_left
    for group in gl.static_range(4):
        _copy(q_latent.index(group), queries + place * stride_head, head_there, group * _GROUP, _GROUP)
        _copy(d_out.index(group), upstream + place * _LATENT, head_there, group * _GROUP, _GROUP)
    _copy(q_rope.index(0), queries + place * stride_head, head_there, _LATENT, _ROPE)
    index = gl.load(row + place, mask=place < stop, other=-1)
    last, _ = _count(row, 0, stop)
    for tile in range(gl.cdiv(last, _KEYS)):
        exists = index >= 0
        key_rows = keys + gl.where(exists, index, 0).to(gl.int64) * stride_key
        column = (tile + 1) * _KEYS + place
        index = gl.load(row + column, mask=column < stop, other=-1)
        side = tile & 1
        # The tile before, which was the other side's, must have been read; at first nothing was there.
        parity = ((tile - 1) >> 1) & 1
        mbarrier.wait(free.index((1 - side) * _GROUPS + 4), parity)
        _copy(k_rope.index(0), key_rows, exists, _LATENT, _ROPE)
        async_copy.mbarrier_arrive(ready.index(side * _GROUPS + 4), increment_count=False)
        for group in gl.static_range(4):
            mbarrier.wait(free.index((1 - side) * _GROUPS + group), parity)
            _copy(k_latent.index(group), key_rows, exists, group * _GROUP, _GROUP)
            async_copy.mbarrier_arrive(ready.index(side * _GROUPS + group), increment_count=False)


@gluon.jit
def _products(operands, ready, free, tile, SIDE: gl.constexpr):
    """K Q^T and K dO^T of a tile, fp32 [keys, heads] each."""
    q_latent, q_rope, d_out, k_latent, k_rope = operands
    parity = (tile >> 1) & 1
    # A zero the compiler does not see: descriptors of operands are made here, not kept (and spilled) over the loop.
    zero = tile >> 30
    scores = gl.zeros([_KEYS, _HEADS], gl.float32, layout=_TILE)
    d_probs = gl.zeros([_KEYS, _HEADS], gl.float32, layout=_TILE)
    mbarrier.wait(ready.index(SIDE * _GROUPS + 4), parity)
    fence_async_shared()
    scores = warpgroup_mma(k_rope.index(zero), q_rope.index(zero).permute((1, 0)), scores, use_acc=False, is_async=True)
    for group in gl.static_range(4):
        mbarrier.wait(ready.index(SIDE * _GROUPS + group), parity)
        fence_async_shared()
        key = k_latent.index(group + zero)
        scores = warpgroup_mma(key, q_latent.index(group + zero).permute((1, 0)), scores, is_async=True)
        d_probs = warpgroup_mma(
            key, d_out.index(group + zero).permute((1, 0)), d_probs, use_acc=group > 0, is_async=True
        )
        scores, d_probs = warpgroup_mma_wait(2, deps=[scores, d_probs])
        mbarrier.arrive(free.index(SIDE * _GROUPS + (group + 4) % 5), count=1)
    scores, d_probs = warpgroup_mma_wait(0, deps=[scores, d_probs])
    mbarrier.arrive(free.index(SIDE * _GROUPS + 3), count=1)
    return scores, d_probs


@gluon.jit
def _pair_chunk(operands, probs, d_scores, zero, CHUNK: gl.constexpr):
    """Starts 64 columns of a tile's pairs: two products under way, one for the rope columns."""
    q_latent, q_rope, d_out, _, _ = operands
    acc = gl.zeros([_KEYS, _CHUNK], gl.float32, layout=_TILE)
    if CHUNK == 8:
        return warpgroup_mma(d_scores, q_rope.index(zero), acc, use_acc=False, is_async=True)
    else:
        q = q_latent.index(CHUNK // 2 + zero).slice((CHUNK % 2) * _CHUNK, _CHUNK, dim=1)
        d = d_out.index(CHUNK // 2 + zero).slice((CHUNK % 2) * _CHUNK, _CHUNK, dim=1)
        acc = warpgroup_mma(d_scores, q, acc, use_acc=False, is_async=True)
        return warpgroup_mma(probs, d, acc, is_async=True)


@gluon.jit
def _write(staged, values, places, there):
    """Stores a tile's 64 columns by whole rows, through shared memory."""
    staged.store(values)
    gl.store(places, staged.load(_GATHER), mask=there, cache_modifier=".cs")


@gluon.jit
def _differentiate(operands, staging, ready, free, walk, SIDE: gl.constexpr):
    """One group's work: every other tile."""
    row, stop, scale, lse, delta, heads_left, pairs_out, pair_stride, d_scores_out = walk
    operand: gl.constexpr = gl.DotOperandLayout(0, _TILE, 2)
    staged = staging.index(SIDE)
    heads = gl.arange(0, _HEADS, layout=gl.SliceLayout(0, _TILE))
    row_lse = gl.load(lse + heads, mask=heads < heads_left, other=0.0) * _LOG2_E
    row_delta = gl.load(delta + heads, mask=heads < heads_left, other=0.0)
    place = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, _TILE))
    written = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, _GATHER))
    columns = gl.arange(0, _CHUNK, layout=gl.SliceLayout(0, _GATHER))
    last, _ = _count(row, 0, stop)
    for tile in range(SIDE, gl.cdiv(last, _KEYS), 2):
        column = tile * _KEYS + place
        exists = gl.load(row + column, mask=column < stop, other=-1) >= 0
        pair = tile * _KEYS + written
        there = (gl.load(row + pair, mask=pair < stop, other=-1) >= 0)[:, None]
        scores, d_probs = _products(operands, ready, free, tile, SIDE)
        probs = gl.exp2(scores * (scale * _LOG2_E) - row_lse[None, :])
        probs = gl.where(exists[:, None], probs, 0.0)
        d_scores = (probs * (d_probs - row_delta[None, :]) * scale).to(gl.bfloat16)
        left = gl.convert_layout(probs.to(gl.bfloat16), operand)
        d_left = gl.convert_layout(d_scores, operand)
        zero = tile >> 30
        following = _pair_chunk(operands, left, d_left, zero, 0)
        # Beyond a row's keys the gradients are written too, as zeros: whole tiles are read.
        _write(staged, d_scores, d_scores_out + pair[:, None] * _HEADS + columns[None, :], (pair >= 0)[:, None])
        for chunk in gl.static_range(_CHUNKS):
            acc = following
            if chunk < 7:
                following = _pair_chunk(operands, left, d_left, zero, chunk + 1)
                acc = warpgroup_mma_wait(2, deps=[acc])
            elif chunk == 7:
                following = _pair_chunk(operands, left, d_left, zero, chunk + 1)
                acc = warpgroup_mma_wait(1, deps=[acc])
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
            places = pairs_out + pair.to(gl.int64)[:, None] * pair_stride + (chunk * _CHUNK + columns)[None, :]
            _write(staged, acc.to(gl.bfloat16), places, there)


@gluon.jit
def pairs_kernel(
    queries, keys, indices, grad_out, lse, delta, pairs, d_scores, scale, num_heads, num_selected, padded,
    stride_query, stride_head, stride_key,
):  # fmt: skip
    """Grid (N * B). pairs [N, K, B, D], where there is a key; d_scores [N, B, padded, 64], 0 where there is none."""
    num_blocks = gl.cdiv(num_heads, _HEADS)
    token = (gl.program_id(0) // num_blocks).to(gl.int64)
    block = gl.program_id(0) % num_blocks
    head = block * _HEADS
    heads_left = num_heads - head
    row = indices + token * num_selected
    query = queries + token * stride_query + head.to(gl.int64) * stride_head
    place = token * num_heads + head
    upstream = grad_out + place * _LATENT

    q_latent = gl.allocate_shared_memory(gl.bfloat16, [4, _HEADS, _GROUP], _SWIZZLED)
    d_out = gl.allocate_shared_memory(gl.bfloat16, [4, _HEADS, _GROUP], _SWIZZLED)
    k_latent = gl.allocate_shared_memory(gl.bfloat16, [4, _KEYS, _GROUP], _SWIZZLED)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, _ROPE], _SWIZZLED)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [1, _KEYS, _ROPE], _SWIZZLED)
    staging = gl.allocate_shared_memory(gl.bfloat16, [2, _KEYS, _CHUNK], _SWIZZLED)
    # Of side s and group g: s * 5 + g.
    ready = mbarrier.allocate_mbarrier(batch=10)
    free = mbarrier.allocate_mbarrier(batch=10)
    for i in gl.static_range(10):
        mbarrier.init(ready.index(i), count=128)
        mbarrier.init(free.index(i), count=1)

    operands = (q_latent, q_rope, d_out, k_latent, k_rope)
    pairs_out = pairs + (token * num_selected * num_blocks + block) * _DIM
    d_scores_out = d_scores + (token * num_blocks + block) * padded * _HEADS
    pair_stride = num_blocks * _DIM
    walk = (
        row, num_selected, scale, lse + place, delta + place, heads_left, pairs_out, pair_stride, d_scores_out
    )  # fmt: skip
    source = (query, upstream, keys, row, num_selected, heads_left, stride_head, stride_key)
    gl.warp_specialize(
        [
            (_differentiate, (operands, staging, ready, free, walk, 0)),
            (_differentiate, (operands, staging, ready, free, walk, 1)),
            (_gather, (operands, ready, free, source)),
        ],
        [4, 4],
        [208, 80],
    )


@triton.jit
def queries_kernel(
    keys, indices, d_scores, grad_queries, num_heads, num_selected, padded, stride_key,
    DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (D / (WIDE + NARROW), N * B). grad_queries [N, H, D]: the scores' gradients times the keys."""
    num_blocks = tl.cdiv(num_heads, BLOCK_H)
    token = (tl.program_id(1) // num_blocks).to(tl.int64)
    block = tl.program_id(1) % num_blocks
    row = indices + token * num_selected
    wide = tl.program_id(0) * (WIDE + NARROW) + tl.arange(0, WIDE)
    narrow = tl.program_id(0) * (WIDE + NARROW) + WIDE + tl.arange(0, NARROW)
    heads = tl.arange(0, BLOCK_H)
    slopes = d_scores + (token * num_blocks + block) * padded * BLOCK_H
    everything = tl.arange(0, 2048)
    stop = 0
    for start in range(0, num_selected, 2048):
        index = tl.load(row + start + everything, mask=start + everything < num_selected, other=-1)
        stop = tl.maximum(stop, tl.max(tl.where(index >= 0, start + everything + 1, 0), axis=0))
    wide_acc = tl.zeros([BLOCK_H, WIDE], dtype=tl.float32)
    narrow_acc = tl.zeros([BLOCK_H, NARROW], dtype=tl.float32)
    for start in tl.range(0, stop, BLOCK_K, num_stages=STAGES):
        pairs = start + tl.arange(0, BLOCK_K)
        index = tl.load(row + pairs, mask=pairs < stop, other=-1)
        exists = index >= 0
        rows = tl.where(exists, index, 0).to(tl.int64)
        key = keys + (rows * stride_key)[:, None]
        slope = tl.load(slopes + pairs[:, None] * BLOCK_H + heads[None, :], mask=exists[:, None], other=0.0)
        wide_key = tl.load(key + wide[None, :], mask=exists[:, None], other=0.0)
        narrow_key = tl.load(key + narrow[None, :], mask=exists[:, None], other=0.0)
        wide_acc = tl.dot(tl.trans(slope), wide_key, wide_acc)
        narrow_acc = tl.dot(tl.trans(slope), narrow_key, narrow_acc)
    head = block * BLOCK_H + heads
    out = grad_queries + (token * num_heads + head)[:, None] * DIM
    there = (head < num_heads)[:, None]
    tl.store(out + wide[None, :], wide_acc.to(grad_queries.dtype.element_ty), mask=there)
    tl.store(out + narrow[None, :], narrow_acc.to(grad_queries.dtype.element_ty), mask=there)


def pair_gradients(
    queries: torch.Tensor,
    keys: torch.Tensor,
    indices: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    grad_queries: torch.Tensor,
) -> torch.Tensor:
    """What each pair adds to its key's gradient, [N, K, B, D], undefined where there is none; writes grad_queries."""
    num_queries, num_heads, dim = queries.shape
    num_selected = indices.shape[1]
    num_blocks = head_blocks(queries)
    padded = triton.cdiv(num_selected, 64) * 64
    pairs = torch.empty(num_queries, num_selected, num_blocks, dim, dtype=keys.dtype, device=keys.device)
    d_scores = torch.empty(num_queries, num_blocks, padded, HEADS, dtype=keys.dtype, device=keys.device)
    pairs_kernel[(num_queries * num_blocks,)](
        queries, keys, indices, grad_out, lse, delta, pairs, d_scores, scale, num_heads, num_selected, padded,
        queries.stride(0), queries.stride(1), keys.stride(0), num_warps=4,
    )  # fmt: skip
    _grad_queries(keys, indices, d_scores, grad_queries)
    return pairs


def _grad_queries(
    keys: torch.Tensor, indices: torch.Tensor, d_scores: torch.Tensor, grad_queries: torch.Tensor
) -> None:
    num_queries, num_heads, dim = grad_queries.shape
    queries_kernel[(dim // (128 + 64), num_queries * d_scores.shape[1])](
        keys, indices, d_scores, grad_queries, num_heads, indices.shape[1], d_scores.shape[2], keys.stride(0),
        DIM=dim, BLOCK_H=HEADS, BLOCK_K=64, WIDE=128, NARROW=64, STAGES=3, num_warps=4,
    )  # fmt: skip
