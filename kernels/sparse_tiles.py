"""What the sparse MLA kernels of every pass share: how a launch is cut, and how tiles are read.

Shape letters as in `kernels.sparse_mla`.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a launch is cut. On H100/H200 a tile's operands must fit in 227 KB of shared memory.

    Of three stages the first loads a tile's indices, the second its keys: two tiles of keys exist at a time.
    """

    heads: int
    keys: int
    warps: int
    stages: int


@triton.jit
def count_selected(indices, token, num_selected, BLOCK_ALL: tl.constexpr):
    """One past the last column of a token's row of indices that is not -1."""
    columns = tl.arange(0, BLOCK_ALL)
    row = tl.load(indices + token * num_selected + columns, mask=columns < num_selected, other=-1)
    return tl.max(tl.where(row >= 0, columns + 1, 0), axis=0)


@triton.jit
def selected_keys(keys, rows, stride_key, exists, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of the selected keys, zeros beyond: [K, BLOCK].

    A key that does not exist is never read, so that nothing outside a query's selection can reach its result.
    """
    columns = tl.arange(0, BLOCK)
    there = exists[:, None]
    if BLOCK != WIDTH:
        there = there & (columns < WIDTH)[None, :]
    return tl.load(keys + (rows * stride_key)[:, None] + FIRST + columns[None, :], mask=there, other=0.0)


@triton.jit
def head_columns(base, heads, stride_head, num_heads, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of a block of heads, zeros beyond the last head or column: [heads, BLOCK]."""
    columns = tl.arange(0, BLOCK)
    there = (heads < num_heads)[:, None]
    if BLOCK != WIDTH:
        there = there & (columns < WIDTH)[None, :]
    return tl.load(base + heads[:, None] * stride_head + FIRST + columns[None, :], mask=there, other=0.0)


def tile_constants(value_dim: int, dim: int, num_selected: int, tiles: Tiles, keys: torch.Tensor) -> dict[str, Any]:
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


def precision(dtype: torch.dtype) -> str:
    """Triton's name for how `tl.dot` treats its inputs; it only matters for fp32, which must not become TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"
