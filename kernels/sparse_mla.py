"""Absorbed MLA over selected keys on the GPU: forward, backward, and split decode (TR Eq. 2).

A query's heads share every key (MQA), so a program takes one query, up to 64 of its heads, and walks over the selected
keys tile by tile. The latent part of a tile is read once and serves as key and as value.

Shape letters: N queries, H heads, M keys, K selected keys a query, D = L + R columns (latent and rope).
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

# Bytes of pair gradients that exist at a time. Fixed: the order of the sums over pairs depends on it.
_PARTIALS_LIMIT = 5 << 28
# Blocks of queries are whole waves of programs on an H100 or H200, and the same on any other GPU for the same bits.
_SMS = 132
# With more queries a sequence than this there is parallelism enough without splitting their keys.
_DECODE_QUERIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a launch is cut. On H100/H200 a tile's operands must fit in 227 KB of shared memory.

    Of three stages the first loads a tile's indices, the second its keys: two tiles of keys exist at a time.
    """

    heads: int
    keys: int
    warps: int
    stages: int


def _forward_tiles(num_heads: int, element_size: int) -> Tiles:
    # wgmma multiplies at least 64 rows; fp32 is for checks and takes small tiles.
    if element_size > 2:
        return Tiles(heads=16, keys=16, warps=4, stages=1)
    if num_heads > 32:
        return Tiles(heads=64, keys=64, warps=8, stages=3)
    return Tiles(heads=16 if num_heads <= 16 else 32, keys=64, warps=4, stages=3)


def _backward_tiles(num_heads: int, element_size: int) -> Tiles:
    if element_size > 2:
        return Tiles(heads=16, keys=16, warps=4, stages=1)
    if num_heads > 32:
        return Tiles(heads=64, keys=32, warps=8, stages=3)
    return Tiles(heads=16 if num_heads <= 16 else 32, keys=32, warps=8, stages=3)


@triton.jit
def _count(indices, token, num_selected, BLOCK_ALL: tl.constexpr):
    """One past the last column of a token's row of indices that is not -1."""
    columns = tl.arange(0, BLOCK_ALL)
    row = tl.load(indices + token * num_selected + columns, mask=columns < num_selected, other=-1)
    return tl.max(tl.where(row >= 0, columns + 1, 0), axis=0)


@triton.jit
def _selected(keys, rows, stride_key, exists, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of the selected keys, zeros beyond: [K, BLOCK].

    A key that does not exist is never read, so that nothing outside a query's selection can reach its result.
    """
    columns = tl.arange(0, BLOCK)
    there = exists[:, None]
    if BLOCK != WIDTH:
        there = there & (columns < WIDTH)[None, :]
    return tl.load(keys + (rows * stride_key)[:, None] + FIRST + columns[None, :], mask=there, other=0.0)


@triton.jit
def _columns(base, heads, stride_head, num_heads, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of a block of heads, zeros beyond the last head or column: [heads, BLOCK]."""
    columns = tl.arange(0, BLOCK)
    there = (heads < num_heads)[:, None]
    if BLOCK != WIDTH:
        there = there & (columns < WIDTH)[None, :]
    return tl.load(base + heads[:, None] * stride_head + FIRST + columns[None, :], mask=there, other=0.0)


@triton.jit
def _store_columns(rows, row_there, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    there = row_there[:, None] & (columns < WIDTH)[None, :]
    tl.store(rows[:, None] + FIRST + columns[None, :], values.to(rows.dtype.element_ty), mask=there)


@triton.jit
def _forward_kernel(
    queries, keys, indices, out, lse, scale, num_heads, num_selected, split, stride_query, stride_head, stride_key,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_ALL: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (N * head blocks, splits). out [N, splits, H, L], lse fp32 [N, splits, H] (base 2, -inf for no keys)."""
    num_blocks = tl.cdiv(num_heads, BLOCK_H)
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    heads = (tl.program_id(0) % num_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(1) * split
    stop = tl.minimum(_count(indices, token, num_selected, BLOCK_ALL), first + split)
    query = queries + token * stride_query
    q_latent = _columns(query, heads, stride_head, num_heads, 0, LATENT, BLOCK_L)
    q_rope = _columns(query, heads, stride_head, num_heads, LATENT, ROPE, BLOCK_R)
    row = indices + token * num_selected

    # A finite start keeps exp2(highest - higher) defined for heads that have seen no key yet.
    highest = tl.full([BLOCK_H], -1.0e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_L], dtype=tl.float32)
    for start in tl.range(first, stop, BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        index = tl.load(row + columns, mask=columns < stop, other=-1)
        exists = index >= 0
        rows = tl.where(exists, index, 0).to(tl.int64)
        k_latent = _selected(keys, rows, stride_key, exists, 0, LATENT, BLOCK_L)
        k_rope = _selected(keys, rows, stride_key, exists, LATENT, ROPE, BLOCK_R)
        scores = tl.dot(q_latent, tl.trans(k_latent), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision=PRECISION)
        scores = tl.where(exists[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - higher)
        probs = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(probs, axis=1)
        acc = tl.dot(probs.to(k_latent.dtype), k_latent, acc * shrink[:, None], input_precision=PRECISION)
        highest = higher

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = (token * tl.num_programs(1) + tl.program_id(1)) * num_heads + heads
    columns = tl.arange(0, BLOCK_L)
    there = (heads < num_heads)[:, None] & (columns < LATENT)[None, :]
    tl.store(out + place[:, None] * LATENT + columns[None, :], acc.to(out.dtype.element_ty), mask=there)
    tl.store(lse + place, tl.where(total > 0, highest + tl.log2(total), float("-inf")), mask=heads < num_heads)


@triton.jit
def _combine_kernel(
    partial, partial_lse, out, lse, num_heads, num_splits,
    LATENT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (N * H): the parts of one query and head, weighted by exp(lse), in the order of the splits."""
    token = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    splits = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_L)
    place = (token * num_splits + splits) * num_heads + head
    parts = tl.load(partial_lse + place, mask=splits < num_splits, other=float("-inf"))
    highest = tl.maximum(tl.max(parts, axis=0), -1.0e30)
    weights = tl.exp2(parts - highest)
    total = tl.sum(weights, axis=0)
    there = (splits < num_splits)[:, None] & (columns < LATENT)[None, :]
    values = tl.load(partial + place[:, None] * LATENT + columns[None, :], mask=there, other=0.0)
    mixed = tl.sum(values * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    row = token * num_heads + head
    tl.store(out + row * LATENT + columns, mixed.to(out.dtype.element_ty), mask=columns < LATENT)
    tl.store(lse + row, tl.where(total > 0, highest + tl.log2(total), float("-inf")))


@triton.jit
def _grad_queries_kernel(
    queries, keys, indices, grad_out, lse, delta, grad_queries, probs_out, d_scores_out, scale, num_heads, num_selected,
    stride_query, stride_head, stride_key,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_ALL: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (N * head blocks). Also writes probabilities and the scores' gradients, [N, H, K], for the keys."""
    num_blocks = tl.cdiv(num_heads, BLOCK_H)
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    heads = (tl.program_id(0) % num_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_there = heads < num_heads
    stop = _count(indices, token, num_selected, BLOCK_ALL)
    row = indices + token * num_selected
    query = queries + token * stride_query
    q_latent = _columns(query, heads, stride_head, num_heads, 0, LATENT, BLOCK_L)
    q_rope = _columns(query, heads, stride_head, num_heads, LATENT, ROPE, BLOCK_R)
    here = token * num_heads
    d_out = _columns(grad_out + here * LATENT, heads, LATENT, num_heads, 0, LATENT, BLOCK_L)
    row_lse = tl.load(lse + here + heads, mask=head_there, other=0.0)
    row_delta = tl.load(delta + here + heads, mask=head_there, other=0.0)
    written = (here + heads)[:, None] * num_selected

    dq_latent = tl.zeros([BLOCK_H, BLOCK_L], dtype=tl.float32)
    dq_rope = tl.zeros([BLOCK_H, BLOCK_R], dtype=tl.float32)
    for start in tl.range(0, stop, BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        index = tl.load(row + columns, mask=columns < stop, other=-1)
        exists = index >= 0
        rows = tl.where(exists, index, 0).to(tl.int64)
        k_latent = _selected(keys, rows, stride_key, exists, 0, LATENT, BLOCK_L)
        k_rope = _selected(keys, rows, stride_key, exists, LATENT, ROPE, BLOCK_R)
        scores = tl.dot(q_latent, tl.trans(k_latent), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision=PRECISION)
        d_probs = tl.dot(d_out, tl.trans(k_latent), input_precision=PRECISION)
        probs = tl.where(exists[None, :], tl.exp2(scores * (scale * _LOG2_E) - row_lse[:, None]), 0.0)
        d_scores = (probs * (d_probs - row_delta[:, None]) * scale).to(k_latent.dtype)
        there = head_there[:, None] & (columns < num_selected)[None, :]
        tl.store(probs_out + written + columns[None, :], probs.to(k_latent.dtype), mask=there)
        tl.store(d_scores_out + written + columns[None, :], d_scores, mask=there)
        dq_latent = tl.dot(d_scores, k_latent, dq_latent, input_precision=PRECISION)
        dq_rope = tl.dot(d_scores, k_rope, dq_rope, input_precision=PRECISION)

    place = grad_queries + (here + heads) * (LATENT + ROPE)
    _store_columns(place, head_there, dq_latent, 0, LATENT, BLOCK_L)
    _store_columns(place, head_there, dq_rope, LATENT, ROPE, BLOCK_R)


@triton.jit
def _grad_pairs_kernel(
    queries, indices, grad_out, probs, d_scores, grad_pairs, num_heads, num_selected, stride_query, stride_head,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_ALL: tl.constexpr, ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, N). What each (query, key) pair adds to the key's gradient, [N, K, D].

    The sum over all heads of d_score * query, and in the latent columns of prob * grad_out: a matrix product a query.
    ONE_BLOCK: one block holds all heads, so that queries and upstream gradients are read once for all pairs. Weights
    are read up to num_selected, beyond what was written: a bound that divides by 16 lets loads be wide, and the rows
    that it brings are not stored.
    """
    token = tl.program_id(1).to(tl.int64)
    stop = _count(indices, token, num_selected, BLOCK_ALL)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    query = queries + token * stride_query
    upstream = grad_out + token * num_heads * LATENT
    weights = token * num_heads * num_selected
    out = grad_pairs + token * num_selected * (LATENT + ROPE)
    if ONE_BLOCK:
        heads = tl.arange(0, BLOCK_H)
        q, d = _pair_factors(query, upstream, heads, columns, num_heads, stride_head, LATENT, ROPE)
        for first in tl.range(0, stop, BLOCK_K, num_stages=STAGES):
            pairs = first + tl.arange(0, BLOCK_K)
            there = (heads < num_heads)[:, None] & (pairs < num_selected)[None, :]
            place = weights + heads[:, None] * num_selected + pairs[None, :]
            d_score = tl.load(d_scores + place, mask=there, other=0.0)
            prob = tl.load(probs + place, mask=there, other=0.0)
            acc = tl.dot(tl.trans(d_score), q, input_precision=PRECISION)
            acc = tl.dot(tl.trans(prob), d, acc, input_precision=PRECISION)
            _store_pairs(out, pairs, stop, columns, acc, LATENT + ROPE)
    else:
        for first in tl.range(0, stop, BLOCK_K):
            pairs = first + tl.arange(0, BLOCK_K)
            acc = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
            for start in tl.range(0, num_heads, BLOCK_H, num_stages=STAGES):
                heads = start + tl.arange(0, BLOCK_H)
                q, d = _pair_factors(query, upstream, heads, columns, num_heads, stride_head, LATENT, ROPE)
                there = (heads < num_heads)[:, None] & (pairs < num_selected)[None, :]
                place = weights + heads[:, None] * num_selected + pairs[None, :]
                d_score = tl.load(d_scores + place, mask=there, other=0.0)
                prob = tl.load(probs + place, mask=there, other=0.0)
                acc = tl.dot(tl.trans(d_score), q, acc, input_precision=PRECISION)
                acc = tl.dot(tl.trans(prob), d, acc, input_precision=PRECISION)
            _store_pairs(out, pairs, stop, columns, acc, LATENT + ROPE)


@triton.jit
def _pair_factors(query, upstream, heads, columns, num_heads, stride_head, LATENT: tl.constexpr, ROPE: tl.constexpr):
    """A column block of the queries and of the upstream gradient (0 in the rope columns), [heads, columns] each."""
    there = (heads < num_heads)[:, None]
    q_place = heads[:, None] * stride_head + columns[None, :]
    q = tl.load(query + q_place, mask=there & (columns < LATENT + ROPE)[None, :], other=0.0)
    d_place = heads[:, None] * LATENT + columns[None, :]
    d = tl.load(upstream + d_place, mask=there & (columns < LATENT)[None, :], other=0.0)
    return q, d


@triton.jit
def _store_pairs(out, pairs, stop, columns, acc, DIM: tl.constexpr):
    there = (pairs < stop)[:, None] & (columns < DIM)[None, :]
    tl.store(out + pairs[:, None] * DIM + columns[None, :], acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def _sum_pairs_kernel(
    grad_pairs, order, bounds, grad_keys,
    DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (M). Adds to grad_keys fp32 [M, D] the pairs order[bounds[key]:bounds[key + 1]], in order, PARTS each."""
    key = tl.program_id(0).to(tl.int64)
    first = tl.load(bounds + key)
    stop = tl.load(bounds + key + 1)
    if first == stop:
        return
    columns = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    for start in tl.range(first, stop, BLOCK_P, num_stages=STAGES):
        places = start + tl.arange(0, BLOCK_P)
        pairs = tl.load(order + places, mask=places < stop, other=0)
        there = (places < stop)[:, None] & (columns < DIM)[None, :]
        for part in tl.static_range(PARTS):
            values = grad_pairs + (pairs * PARTS + part)[:, None] * DIM + columns[None, :]
            acc += tl.load(values, mask=there, other=0.0).to(tl.float32)
    target = grad_keys + key * DIM + columns
    total = tl.load(target, mask=columns < DIM, other=0.0) + tl.sum(acc, axis=0)
    tl.store(target, total, mask=columns < DIM)


def packed_sparse_attention(
    queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.reference.packed_sparse_attention`. The keys' gradient is summed in a fixed order, without atomics.

    The backward pass writes each pair's share of a key's gradient in the dtype of the keys, [n, K, D] for blocks of n
    queries within 1.25 GiB, sorts the block's indices and sums in fp32: about 2 K D * 2 bytes of traffic a query.
    """
    return _SparseMLA.apply(queries, keys, indices, scale, value_dim)


class _SparseMLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries, keys, indices, scale, value_dim):
        keys, indices = _rows(keys), indices.int().contiguous()
        queries = queries if queries.stride(-1) == 1 else queries.contiguous()
        out, lse = _forward(queries, keys, indices, scale, value_dim, split=max(1, indices.shape[1]))
        out, lse = out.squeeze(1), lse.squeeze(1)
        ctx.save_for_backward(queries, keys, indices, out, lse)
        ctx.scale = scale
        natural = lse / LOG2_E
        ctx.mark_non_differentiable(natural)
        return out, natural

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        queries, keys, indices, out, lse = ctx.saved_tensors
        grad_queries, grad_keys = _backward(queries, keys, indices, out, lse, grad_outputs[0].contiguous(), ctx.scale)
        return grad_queries, grad_keys, None, None, None


def decode_sparse_attention(
    queries: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    value_dim: int,
    *,
    split: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.reference.decode_sparse_attention`. The pieces of `split` keys are programs of their own.

    The pieces do not depend on the batch or the GPU, so neither do the bits of a query's result.
    """
    with torch.no_grad():
        queries = queries if queries.stride(-1) == 1 else queries.contiguous()
        out, lse = _forward(queries, _rows(cache), indices.int().contiguous(), scale, value_dim, split)
        if out.shape[1] == 1:
            return out.squeeze(1), lse.squeeze(1) / LOG2_E
        num_queries, num_splits, num_heads, _ = out.shape
        mixed = torch.empty(num_queries, num_heads, value_dim, dtype=queries.dtype, device=queries.device)
        mixed_lse = torch.empty(num_queries, num_heads, dtype=torch.float32, device=queries.device)
        block = triton.next_power_of_2(value_dim)
        if mixed.numel():
            _combine_kernel[(num_queries * num_heads,)](
                out, lse, mixed, mixed_lse, num_heads, num_splits,
                LATENT=value_dim, BLOCK_L=block, BLOCK_S=triton.next_power_of_2(num_splits), num_warps=4,
            )  # fmt: skip
        return mixed, mixed_lse / LOG2_E


def sparse_attention(
    queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int
) -> torch.Tensor:
    """See `kernels.reference.sparse_attention`. A decode step's few queries are split over their keys."""
    num_sequences, num_queries, num_heads, dim = queries.shape
    flat, rows_apart = _flat_keys(keys)
    offsets = torch.arange(num_sequences, device=indices.device, dtype=torch.int32) * rows_apart
    rows = torch.where(indices >= 0, indices.int() + offsets.view(-1, 1, 1), -1).flatten(0, 1)
    trained = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    attend = packed_sparse_attention if trained or num_queries > _DECODE_QUERIES else decode_sparse_attention
    out, _ = attend(queries.reshape(-1, num_heads, dim), flat, rows, scale, value_dim)
    return out.view(num_sequences, num_queries, num_heads, value_dim)


def latent_attention(
    queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, scale: float, value_dim: int
) -> torch.Tensor:
    """See `kernels.reference.latent_attention`: the visible keys are the selected ones."""
    columns = torch.arange(keys.shape[1], device=keys.device, dtype=torch.int32)
    return sparse_attention(queries, keys, torch.where(visible, columns, -1), scale, value_dim)


def _flat_keys(keys: torch.Tensor) -> tuple[torch.Tensor, int]:
    """keys [B, T, D] as rows [M, D], and how many rows lie between two sequences. A view wherever that can be."""
    num_sequences, num_keys, dim = keys.shape
    between, row, column = keys.stride()
    evenly_apart = num_sequences > 1 and column == 1 and row > 0 and between % row == 0 and between >= num_keys * row
    if evenly_apart and not (torch.is_grad_enabled() and keys.requires_grad):
        apart = between // row
        return keys.as_strided(((num_sequences - 1) * apart + num_keys, dim), (row, 1)), apart
    return keys.reshape(-1, dim), num_keys


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def _rows(keys: torch.Tensor) -> torch.Tensor:
    return keys if keys.stride(-1) == 1 else keys.contiguous()


def _forward(
    queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int, split: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [N, splits, H, value_dim], fp32 where there are several splits; lse fp32 [N, splits, H], base 2."""
    num_queries, num_heads, dim = queries.shape
    num_selected = indices.shape[1]
    num_splits = max(1, _ceil_div(num_selected, split))
    shape = (num_queries, num_splits, num_heads)
    out = torch.empty(*shape, value_dim, dtype=queries.dtype if num_splits == 1 else torch.float32, device=keys.device)
    lse = torch.empty(shape, dtype=torch.float32, device=keys.device)
    tiles = _forward_tiles(num_heads, keys.element_size())
    if out.numel():
        grid = (num_queries * _ceil_div(num_heads, tiles.heads), num_splits)
        _forward_kernel[grid](
            queries, keys, indices, out, lse, scale * LOG2_E, num_heads, num_selected, split,
            queries.stride(0), queries.stride(1), keys.stride(0),
            **_blocks(value_dim, dim, num_selected, tiles, keys), num_warps=tiles.warps,
        )  # fmt: skip
    return out, lse


def _blocks(value_dim: int, dim: int, num_selected: int, tiles: Tiles, keys: torch.Tensor) -> dict[str, Any]:
    """The constants that the kernels over keys share."""
    return {
        "LATENT": value_dim,
        "ROPE": dim - value_dim,
        "BLOCK_L": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_R": max(16, triton.next_power_of_2(dim - value_dim)),
        "BLOCK_H": tiles.heads,
        "BLOCK_K": tiles.keys,
        "BLOCK_ALL": triton.next_power_of_2(max(1, num_selected)),
        "STAGES": tiles.stages,
        "PRECISION": precision(keys.dtype),
    }


def _pair_blocks(num_heads: int, element_size: int) -> dict[str, Any]:
    """The constants of `_grad_pairs_kernel`: up to 128 heads are one block, of 224 KB in shared memory."""
    if element_size > 2:
        return {"BLOCK_D": 32, "BLOCK_K": 32, "BLOCK_H": 16, "ONE_BLOCK": num_heads <= 16, "STAGES": 1}
    heads = max(16, triton.next_power_of_2(num_heads))
    whole = heads <= 128
    return {"BLOCK_D": 128, "BLOCK_K": 128, "BLOCK_H": heads if whole else 64, "ONE_BLOCK": whole, "STAGES": 2}


def precision(dtype: torch.dtype) -> str:
    """Triton's name for how `tl.dot` treats its inputs; it only matters for fp32, which must not become TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _backward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_queries, _, dim = queries.shape
    num_selected = indices.shape[1]
    grad_queries = torch.zeros(queries.shape, dtype=queries.dtype, device=queries.device)
    grad_keys = torch.zeros(keys.shape, dtype=torch.float32, device=keys.device)
    block = max(1, _PARTIALS_LIMIT // max(1, num_selected * dim * keys.element_size()))
    block = block // _SMS * _SMS or block
    starts = range(0, num_queries, block) if num_selected and out.numel() else ()
    for part in (slice(start, start + block) for start in starts):
        _backward_block(
            queries[part], keys, indices[part], out[part], lse[part], grad_out[part], scale,
            grad_queries[part], grad_keys,
        )  # fmt: skip
    return grad_queries, grad_keys.to(keys.dtype)


def _backward_block(queries, keys, indices, out, lse, grad_out, scale, grad_queries, grad_keys) -> None:
    """Writes grad_queries and adds to grad_keys (fp32) what one block of queries contributes."""
    grad_pairs = _pair_gradients(queries, keys, indices, grad_out, lse, row_delta(out, grad_out), scale, grad_queries)
    # -1 sorts before every key, so the pairs of key s are order[bounds[s]:bounds[s + 1]], ascending for being stable.
    ordered, order = torch.sort(indices.flatten(), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(keys.shape[0] + 1, dtype=ordered.dtype, device=keys.device))
    _sum_pairs_kernel[(keys.shape[0],)](
        grad_pairs, order, bounds, grad_keys, DIM=keys.shape[1], PARTS=grad_pairs.shape[2],
        BLOCK_D=triton.next_power_of_2(keys.shape[1]), BLOCK_P=4, STAGES=3, num_warps=4,
    )  # fmt: skip


def _pair_gradients(queries, keys, indices, grad_out, lse, delta, scale, grad_queries) -> torch.Tensor:
    """What each pair adds to its key's gradient, [n, K, 1, D], undefined where there is none; writes grad_queries."""
    num_queries, num_heads, dim = queries.shape
    num_selected, value_dim = indices.shape[1], grad_out.shape[2]
    tiles = _backward_tiles(num_heads, keys.element_size())
    blocks = _blocks(value_dim, dim, num_selected, tiles, keys)
    strides = queries.stride(0), queries.stride(1)
    probs = torch.empty(num_queries, num_heads, num_selected, dtype=keys.dtype, device=keys.device)
    d_scores = torch.empty_like(probs)
    _grad_queries_kernel[(num_queries * _ceil_div(num_heads, tiles.heads),)](
        queries, keys, indices, grad_out, lse, delta, grad_queries, probs, d_scores, scale, num_heads, num_selected,
        *strides, keys.stride(0), **blocks, num_warps=tiles.warps,
    )  # fmt: skip
    grad_pairs = torch.empty(num_queries, num_selected, 1, dim, dtype=keys.dtype, device=keys.device)
    pairs = _pair_blocks(num_heads, keys.element_size())
    _grad_pairs_kernel[(_ceil_div(dim, pairs["BLOCK_D"]), num_queries)](
        queries, indices, grad_out, probs, d_scores, grad_pairs, num_heads, num_selected, *strides,
        LATENT=value_dim, ROPE=dim - value_dim, BLOCK_ALL=blocks["BLOCK_ALL"], PRECISION=blocks["PRECISION"], **pairs,
        num_warps=8,
    )  # fmt: skip
    return grad_pairs
