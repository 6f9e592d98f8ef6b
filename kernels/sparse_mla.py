"""Absorbed MLA over selected keys on the GPU: forward, backward, and split decode (TR Eq. 2).

A query's heads share every key (MQA), so a program takes one query, up to 64 of its heads, and walks over the selected
keys tile by tile. The latent part of a tile is read once and serves as key and as value.

Shape letters: N queries, H heads, M keys, K selected keys a query, D = L + R columns (latent and rope).
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels import sparse_mla_hopper as hopper
from kernels.sparse_mla_backward import backward
from kernels.sparse_tiles import LOG2_E, Tiles, count_selected, head_columns, selected_keys, tile_constants

_LOG2_E, _LN_2 = tl.constexpr(LOG2_E), tl.constexpr(1 / LOG2_E)

# With more queries a sequence than this there is parallelism enough without splitting their keys.
_DECODE_QUERIES = 8


def _forward_tiles(num_heads: int, element_size: int) -> Tiles:
    # wgmma multiplies at least 64 rows; fp32 is for checks and takes small tiles.
    if element_size > 2:
        return Tiles(heads=16, keys=16, warps=4, stages=1)
    if num_heads > 32:
        return Tiles(heads=64, keys=64, warps=8, stages=3)
    return Tiles(heads=16 if num_heads <= 16 else 32, keys=64, warps=4, stages=3)


@triton.jit
def _forward_kernel(
    queries, keys, indices, out, lse, scale, num_heads, num_selected, split, stride_query, stride_head, stride_key,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_ALL: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (N * head blocks, splits). out [N, splits, H, L], lse fp32 [N, splits, H], -inf for no keys."""
    num_blocks = tl.cdiv(num_heads, BLOCK_H)
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    heads = (tl.program_id(0) % num_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(1) * split
    stop = tl.minimum(count_selected(indices, token, num_selected, BLOCK_ALL), first + split)
    query = queries + token * stride_query
    q_latent = head_columns(query, heads, stride_head, num_heads, 0, LATENT, BLOCK_L)
    q_rope = head_columns(query, heads, stride_head, num_heads, LATENT, ROPE, BLOCK_R)
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
        k_latent = selected_keys(keys, rows, stride_key, exists, 0, LATENT, BLOCK_L)
        k_rope = selected_keys(keys, rows, stride_key, exists, LATENT, ROPE, BLOCK_R)
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
    logarithm = tl.where(total > 0, (highest + tl.log2(total)) * _LN_2, float("-inf"))
    tl.store(lse + place, logarithm, mask=heads < num_heads)


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
    weights = tl.exp2((parts - highest) * _LOG2_E)
    total = tl.sum(weights, axis=0)
    there = (splits < num_splits)[:, None] & (columns < LATENT)[None, :]
    values = tl.load(partial + place[:, None] * LATENT + columns[None, :], mask=there, other=0.0)
    mixed = tl.sum(values * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    row = token * num_heads + head
    tl.store(out + row * LATENT + columns, mixed.to(out.dtype.element_ty), mask=columns < LATENT)
    tl.store(lse + row, tl.where(total > 0, highest + tl.log2(total) * _LN_2, float("-inf")))


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
        ctx.save_for_backward(queries, keys, indices, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        queries, keys, indices, out, lse = ctx.saved_tensors
        grad_queries, grad_keys = backward(queries, keys, indices, out, lse, grad_outputs[0].contiguous(), ctx.scale)
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
        return _forward(queries, _rows(cache), indices.int().contiguous(), scale, value_dim, split)


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


def _rows(keys: torch.Tensor) -> torch.Tensor:
    return keys if keys.stride(-1) == 1 else keys.contiguous()


def _forward(
    queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int, split: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [N, H, value_dim] and lse fp32 [N, H]; pieces of `split` keys are programs of their own, then combined."""
    num_queries, num_heads, _ = queries.shape
    out = torch.empty(num_queries, num_heads, value_dim, dtype=queries.dtype, device=keys.device)
    lse = torch.empty(num_queries, num_heads, dtype=torch.float32, device=keys.device)
    if not out.numel():
        return out, lse
    splits = max(1, -(-indices.shape[1] // split))
    parts, part_lse = out.unsqueeze(1), lse.unsqueeze(1)
    if splits > 1:
        parts = torch.empty(num_queries, splits, num_heads, value_dim, dtype=torch.float32, device=keys.device)
        part_lse = torch.empty(num_queries, splits, num_heads, dtype=torch.float32, device=keys.device)
    attend = hopper.forward if hopper.fits(queries, keys, value_dim) else _attend
    attend(queries, keys, indices, scale, split, parts, part_lse)
    if splits > 1:
        _combine_kernel[(num_queries * num_heads,)](
            parts, part_lse, out, lse, num_heads, splits,
            LATENT=value_dim, BLOCK_L=triton.next_power_of_2(value_dim), BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4,
        )  # fmt: skip
    return out, lse


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    split: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """As `kernels.sparse_mla_hopper.forward`, for any sizes."""
    (num_queries, splits, num_heads, value_dim), num_selected = out.shape, indices.shape[1]
    tiles = _forward_tiles(num_heads, keys.element_size())
    _forward_kernel[(num_queries * triton.cdiv(num_heads, tiles.heads), splits)](
        queries, keys, indices, out, lse, scale * LOG2_E, num_heads, num_selected, split,
        queries.stride(0), queries.stride(1), keys.stride(0),
        **tile_constants(value_dim, queries.shape[2], num_selected, tiles, keys), num_warps=tiles.warps,
    )  # fmt: skip
