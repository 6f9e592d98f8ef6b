"""Grouped matrix products in Triton: the experts' projections, forward and backward, without atomics.

Where a group's rows lie is read on the device, so nothing waits for the host. A row's product does not depend on the
rows around it, and a weight's gradient is one program's sum over its group's rows in order.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.products import product

__all__ = ["grouped_linear", "triton_grouped_linear"]


@triton.jit
def _rows_kernel(
    rows,  # [N, K]
    weights,  # [E, ...]: a group's matrix takes K to O, by strides
    ends,
    out,  # [N, O]
    num_groups,
    O,  # noqa: E741
    K,
    stride_group,
    stride_o,
    stride_k,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_tiles = tl.cdiv(O, BLOCK_O)
    tile = tl.program_id(0) // o_tiles
    # A group has as many tiles of rows as it fills; this program's group is the one that `tile` falls into.
    g = tl.arange(0, GROUPS)
    end = tl.load(ends + g, mask=g < num_groups, other=0)
    begin = tl.load(ends + g - 1, mask=(g > 0) & (g < num_groups), other=0)
    tiles = tl.where(g < num_groups, (end - begin + BLOCK_N - 1) // BLOCK_N, 0)
    stop = tl.cumsum(tiles, axis=0)
    group = tl.sum((stop <= tile).to(tl.int32))
    if group < num_groups:
        mine = g == group
        row = tl.sum(tl.where(mine, begin + (tile - stop + tiles) * BLOCK_N, 0)) + tl.arange(0, BLOCK_N)
        inside = row < tl.sum(tl.where(mine, end, 0))
        o = (tl.program_id(0) % o_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
        k = tl.arange(0, BLOCK_K)
        x_at = rows + row.to(tl.int64)[:, None] * K + k[None, :]
        w_at = weights + group.to(tl.int64) * stride_group + o.to(tl.int64)[None, :] * stride_o
        w_at += k[:, None] * stride_k
        total = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
        for first in range(0, K, BLOCK_K):
            left = K - first
            x = tl.load(x_at, mask=inside[:, None] & (k < left)[None, :], other=0.0)
            w = tl.load(w_at, mask=(k < left)[:, None] & (o < O)[None, :], other=0.0)
            total += product(x, w)
            x_at += BLOCK_K
            w_at += BLOCK_K * stride_k
        target = out + row.to(tl.int64)[:, None] * O + o[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=inside[:, None] & (o < O)[None, :])


@triton.jit
def _weights_kernel(
    grads,  # [N, O]
    rows,  # [N, K]
    ends,
    out,  # [E, O, K]
    O,  # noqa: E741
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k_tiles = tl.cdiv(K, BLOCK_K)
    group = tl.program_id(1)
    o = (tl.program_id(0) // k_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = (tl.program_id(0) % k_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    total = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    for first in range(begin, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        there = (row < end)[:, None]
        at = row.to(tl.int64)[:, None]
        grad = tl.load(grads + at * O + o[None, :], mask=there & (o < O)[None, :], other=0.0)
        x = tl.load(rows + at * K + k[None, :], mask=there & (k < K)[None, :], other=0.0)
        total += product(tl.trans(grad), x)
    target = out + group.to(tl.int64) * O * K + o.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(o < O)[:, None] & (k < K)[None, :])


def _tiles(element_size: int) -> dict[str, int]:
    """Fixed for a dtype: a row's bits must not depend on how many rows there are."""
    if element_size > 2:
        return {"BLOCK_N": 32, "BLOCK_O": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 128, "BLOCK_O": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}


def _rows_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [N, K] times weights [E, O, K] of each row's group, the weights by their strides."""
    num_rows, dim = rows.shape
    num_groups, width, _ = weights.shape
    out = torch.empty(num_rows, width, dtype=rows.dtype, device=rows.device)
    tiles = _tiles(rows.element_size())
    # Every group may leave one tile partly filled.
    row_tiles = triton.cdiv(num_rows, tiles["BLOCK_N"]) + min(num_groups, num_rows)
    if out.numel():
        _rows_kernel[(row_tiles * triton.cdiv(width, tiles["BLOCK_O"]),)](
            rows,
            weights,
            ends,
            out,
            num_groups,
            width,
            dim,
            *weights.stride(),
            GROUPS=triton.next_power_of_2(num_groups),
            **tiles,
        )
    return out


def _weights_product(grads: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[E, O, K]: grads [N, O] transposed times rows [N, K], group by group; 0 for a group without rows."""
    width, dim = grads.shape[1], rows.shape[1]
    out = torch.empty(ends.shape[0], width, dim, dtype=rows.dtype, device=rows.device)
    tiles = _tiles(rows.element_size())
    block_n, block_k = tiles.pop("BLOCK_K"), tiles.pop("BLOCK_N")
    grid = (triton.cdiv(width, tiles["BLOCK_O"]) * triton.cdiv(dim, block_k), ends.shape[0])
    _weights_kernel[grid](grads, rows, ends, out, width, dim, BLOCK_N=block_n, BLOCK_K=block_k, **tiles)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows, weights, ends):
        rows, ends = rows.contiguous(), ends.int().contiguous()
        ctx.save_for_backward(rows, weights, ends)
        return _rows_product(rows, weights, ends)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        rows, weights, ends = ctx.saved_tensors
        grads = grad_outputs[0].contiguous()
        grad_rows = _rows_product(grads, weights.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        grad_weights = _weights_product(grads, rows, ends) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weights, None


def grouped_linear(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """As `kernels.reference.grouped_linear`; the last entry of `ends` must be the number of rows.

    torch's own product, where it serves and is faster (kernels/BENCHMARKS.md).
    """
    if rows.dtype == torch.bfloat16 and all(dim % 8 == 0 for dim in weights.shape[1:]):
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    return triton_grouped_linear(rows, weights, ends)


def triton_grouped_linear(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`grouped_linear` by the kernels of this module, for any dtype and any sizes."""
    return _GroupedLinear.apply(rows, weights, ends)
