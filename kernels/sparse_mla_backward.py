"""The backward pass of sparse MLA: what each pair of query and selected key adds to its key's gradient, and the sum.

No atomics: the pairs' shares are written, and summed by key in the order of a stable sort. On Hopper
`sparse_mla_hopper_backward` makes them and the queries' gradient; the kernels here serve other sizes and GPUs.

Shape letters as in `kernels.sparse_mla`.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels import sparse_mla_hopper_backward as hopper
from kernels.delta import row_delta
from kernels.sparse_mla_hopper import fits, head_blocks
from kernels.sparse_tiles import LOG2_E, Tiles, count_selected, head_columns, selected_keys, tile_constants

_LOG2_E = tl.constexpr(LOG2_E)

# Bytes of pair gradients that exist at a time. Fixed: the order of the sums over pairs depends on it.
_PARTIALS_LIMIT = 5 << 28
# Blocks of queries are whole waves of programs on an H100 or H200, and the same on any other GPU for the same bits.
_SMS = 132


def _backward_tiles(num_heads: int, element_size: int) -> Tiles:
    if element_size > 2:
        return Tiles(heads=16, keys=16, warps=4, stages=1)
    if num_heads > 32:
        return Tiles(heads=64, keys=32, warps=8, stages=3)
    return Tiles(heads=16 if num_heads <= 16 else 32, keys=32, warps=8, stages=3)


@triton.jit
def _store_columns(rows, row_there, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    there = row_there[:, None] & (columns < WIDTH)[None, :]
    tl.store(rows[:, None] + FIRST + columns[None, :], values.to(rows.dtype.element_ty), mask=there)


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
    stop = count_selected(indices, token, num_selected, BLOCK_ALL)
    row = indices + token * num_selected
    query = queries + token * stride_query
    q_latent = head_columns(query, heads, stride_head, num_heads, 0, LATENT, BLOCK_L)
    q_rope = head_columns(query, heads, stride_head, num_heads, LATENT, ROPE, BLOCK_R)
    here = token * num_heads
    d_out = head_columns(grad_out + here * LATENT, heads, LATENT, num_heads, 0, LATENT, BLOCK_L)
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
        k_latent = selected_keys(keys, rows, stride_key, exists, 0, LATENT, BLOCK_L)
        k_rope = selected_keys(keys, rows, stride_key, exists, LATENT, ROPE, BLOCK_R)
        scores = tl.dot(q_latent, tl.trans(k_latent), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision=PRECISION)
        d_probs = tl.dot(d_out, tl.trans(k_latent), input_precision=PRECISION)
        probs = tl.where(exists[None, :], tl.exp2((scores * scale - row_lse[:, None]) * _LOG2_E), 0.0)
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
    stop = count_selected(indices, token, num_selected, BLOCK_ALL)
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


def _pair_blocks(num_heads: int, element_size: int) -> dict[str, Any]:
    """The constants of `_grad_pairs_kernel`: up to 128 heads are one block, of 224 KB in shared memory."""
    if element_size > 2:
        return {"BLOCK_D": 32, "BLOCK_K": 32, "BLOCK_H": 16, "ONE_BLOCK": num_heads <= 16, "STAGES": 1}
    heads = max(16, triton.next_power_of_2(num_heads))
    whole = heads <= 128
    return {"BLOCK_D": 128, "BLOCK_K": 128, "BLOCK_H": heads if whole else 64, "ONE_BLOCK": whole, "STAGES": 2}


def backward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of queries [N, H, D] and keys [M, D] in their dtypes; keys are summed in fp32, in a fixed order.

    indices: int32 [N, K], -1 where there is none; out and grad_out: [N, H, V]; lse: fp32 [N, H].
    """
    num_queries, _, dim = queries.shape
    num_selected = indices.shape[1]
    grad_keys = torch.zeros(keys.shape, dtype=torch.float32, device=keys.device)
    parts = head_blocks(queries) if fits(queries, keys, out.shape[2]) else 1
    block = max(1, _PARTIALS_LIMIT // max(1, num_selected * parts * dim * keys.element_size()))
    block = block // _SMS * _SMS or block
    starts = range(0, num_queries, block) if num_selected and out.numel() else ()
    made = torch.empty if starts else torch.zeros
    grad_queries = made(queries.shape, dtype=queries.dtype, device=queries.device)
    for part in (slice(start, start + block) for start in starts):
        _backward_block(
            queries[part], keys, indices[part], out[part], lse[part], grad_out[part], scale,
            grad_queries[part], grad_keys,
        )  # fmt: skip
    return grad_queries, grad_keys.to(keys.dtype)


def _backward_block(queries, keys, indices, out, lse, grad_out, scale, grad_queries, grad_keys) -> None:
    """Writes grad_queries and adds to grad_keys (fp32) what one block of queries contributes."""
    pair_gradients = hopper.pair_gradients if fits(queries, keys, out.shape[2]) else _pair_gradients
    grad_pairs = pair_gradients(queries, keys, indices, grad_out, lse, row_delta(out, grad_out), scale, grad_queries)
    # -1 sorts before every key, so the pairs of key s are order[bounds[s]:bounds[s + 1]], ascending for being stable.
    # A radix sort passes over 16-bit keys half as often.
    narrow = torch.int16 if keys.shape[0] <= torch.iinfo(torch.int16).max else torch.int32
    ordered, order = torch.sort(indices.to(narrow).flatten(), stable=True)
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
    constants = tile_constants(value_dim, dim, num_selected, tiles, keys)
    strides = queries.stride(0), queries.stride(1)
    probs = torch.empty(num_queries, num_heads, num_selected, dtype=keys.dtype, device=keys.device)
    d_scores = torch.empty_like(probs)
    _grad_queries_kernel[(num_queries * triton.cdiv(num_heads, tiles.heads),)](
        queries, keys, indices, grad_out, lse, delta, grad_queries, probs, d_scores, scale, num_heads, num_selected,
        *strides, keys.stride(0), **constants, num_warps=tiles.warps,
    )  # fmt: skip
    grad_pairs = torch.empty(num_queries, num_selected, 1, dim, dtype=keys.dtype, device=keys.device)
    pairs = _pair_blocks(num_heads, keys.element_size())
    _grad_pairs_kernel[(triton.cdiv(dim, pairs["BLOCK_D"]), num_queries)](
        queries, indices, grad_out, probs, d_scores, grad_pairs, num_heads, num_selected, *strides,
        LATENT=value_dim, ROPE=dim - value_dim, BLOCK_ALL=constants["BLOCK_ALL"], PRECISION=constants["PRECISION"],
        **pairs, num_warps=8,
    )  # fmt: skip
    return grad_pairs
