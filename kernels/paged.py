"""DeepSeek Sparse Attention against a paged cache in Triton: what an engine's batch needs around scores and top-k.

Every launch has a shape that follows from the shapes of its arguments; lengths, owners and pages are read on the
device. So a decode step can be captured in a CUDA graph, and a row's result depends on its own sequence alone.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.indexer import SCORES_LIMIT, paged_scores_into
from kernels.products import product
from kernels.sparse_mla import decode_sparse_attention
from kernels.topk import bounded_topk

__all__ = ["cache_rows", "paged_sparse_attention", "project_in_fp32", "rotate_heads", "select_paged_keys", "store_rows"]

# Selected keys that one program of the attention kernel walks over; fixed, because the bits of a sum depend on it.
_SPLIT = 512
# Parts of the depth of a projection, summed one after another.
_PARTS = 8
# Bytes of partial results that exist at a time.
_PARTIALS_LIMIT = 1 << 28


@triton.jit
def _store_kernel(
    pages, slots, rows, stride_page, stride_slot, stride_row,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        column = tl.arange(0, BLOCK)
        values = tl.load(rows + row * stride_row + column, mask=column < DIM)
        target = pages + (slot // PAGE) * stride_page + (slot % PAGE) * stride_slot
        tl.store(target + column, values.to(pages.dtype.element_ty), mask=column < DIM)


@triton.jit
def _rows_kernel(
    places, table, owners, out, num_selected, stride_table, apart, PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < num_selected
    place = tl.load(places + row * num_selected + column, mask=there, other=-1)
    entry = table + tl.load(owners + row).to(tl.int64) * stride_table
    page = tl.load(entry + place // PAGE, mask=place >= 0, other=0)
    tl.store(out + row * num_selected + column, tl.where(place >= 0, page * apart + place % PAGE, -1), mask=there)


@triton.jit
def _rotate_kernel(
    heads, cos, sin, out, num_rows, num_heads, stride_token, stride_head, out_token, out_head,
    DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token, head = row // num_heads, row % num_heads
    column = tl.arange(0, WIDTH)
    there = (row < num_rows)[:, None] & (column < DIM)[None, :]
    turns, pair = column < 2 * HALF, column % HALF
    second = turns & (column >= HALF)
    if INTERLEAVED:
        own = 2 * pair + second.to(tl.int32)
        other = 2 * pair + 1 - second.to(tl.int32)
    else:
        own = column
        other = (column + HALF) % (2 * HALF)
    own, other = tl.where(turns, own, column), tl.where(turns, other, column)
    base = heads + (token * stride_token + head * stride_head)[:, None]
    x = tl.load(base + own[None, :], mask=there, other=0.0)
    y = tl.load(base + other[None, :], mask=there, other=0.0).to(tl.float32)
    angle = token[:, None] * HALF + pair[None, :]
    c = tl.load(cos + angle, mask=there & turns[None, :], other=1.0)
    s = tl.load(sin + angle, mask=there & turns[None, :], other=0.0)
    turned = x.to(tl.float32) * c + y * tl.where(second[None, :], s, -s)
    target = out + (token * out_token + head * out_head)[:, None] + column[None, :]
    tl.store(target, tl.where(turns[None, :], turned, x.to(tl.float32)).to(out.dtype.element_ty), mask=there)


def rotate_heads(
    out: torch.Tensor, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> None:
    """As `kernels.reference.rotate_heads`, bit by bit; heads and out may be strided views."""
    num_tokens, num_heads, dim = heads.shape
    if heads.stride(2) != 1 or out.stride(2) != 1:
        raise ValueError("rotate_heads: the dims of a head must be in one piece")
    block, rows = 8, num_tokens * num_heads
    if rows:
        _rotate_kernel[(triton.cdiv(rows, block),)](
            heads, cos.contiguous(), sin.contiguous(), out, rows, num_heads,
            heads.stride(0), heads.stride(1), out.stride(0), out.stride(1),
            DIM=dim, HALF=cos.shape[1], INTERLEAVED=interleaved, WIDTH=triton.next_power_of_2(dim), BLOCK=block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _project_kernel(
    rows, weight, partial, num_rows, num_columns, depth, span, stride_row, stride_weight,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, parts of the depth). partial fp32 [parts, R, J]."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    first = tl.program_id(1) * span
    total = tl.zeros([BLOCK, COLUMNS], dtype=tl.float32)
    for start in range(first, min(first + span, depth), DEPTH):
        inner = start + tl.arange(0, DEPTH)
        x = rows + row.to(tl.int64)[:, None] * stride_row + inner[None, :]
        x = tl.load(x, mask=(row < num_rows)[:, None] & (inner < depth)[None, :], other=0.0)
        w = weight + column[None, :] * stride_weight + inner[:, None]
        w = tl.load(w, mask=(column < num_columns)[None, :] & (inner < depth)[:, None], other=0.0)
        total += product(x, w)
    target = partial + (tl.program_id(1).to(tl.int64) * num_rows + row)[:, None] * num_columns + column[None, :]
    tl.store(target, total, mask=(row < num_rows)[:, None] & (column < num_columns)[None, :])


@triton.jit
def _sum_kernel(partial, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + part * size + place, mask=place < size, other=0.0)
    tl.store(out + place, total, mask=place < size)


def project_in_fp32(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `kernels.reference.project_in_fp32`. The depth is cut into the same parts for any number of rows."""
    (num_rows, depth), num_columns = rows.shape, weight.shape[0]
    if rows.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("project_in_fp32: a row must be in one piece")
    out = torch.empty(num_rows, num_columns, dtype=torch.float32, device=rows.device)
    if not out.numel():
        return out
    partial = torch.empty(_PARTS, num_rows, num_columns, dtype=torch.float32, device=rows.device)
    span = triton.cdiv(triton.cdiv(depth, _PARTS), 64) * 64
    _project_kernel[(triton.cdiv(num_rows, 16), _PARTS)](
        rows, weight, partial, num_rows, num_columns, depth, span, rows.stride(0), weight.stride(0),
        COLUMNS=max(16, triton.next_power_of_2(num_columns)), BLOCK=16, DEPTH=64, num_warps=4,
    )  # fmt: skip
    _sum_kernel[(triton.cdiv(out.numel(), 256),)](partial, out, out.numel(), PARTS=_PARTS, BLOCK=256)
    return out


def store_rows(pages: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """As `kernels.reference.store_rows`; pages may be strided views of a larger buffer."""
    _, page, dim = pages.shape
    if pages.stride(2) != 1 or rows.stride(1) != 1:
        raise ValueError("store_rows: the columns of a row must be in one piece")
    if rows.shape[0]:
        _store_kernel[(rows.shape[0],)](
            pages, slots, rows, pages.stride(0), pages.stride(1), rows.stride(0),
            PAGE=page, DIM=dim, BLOCK=triton.next_power_of_2(dim), num_warps=2,
        )  # fmt: skip


def select_paged_keys(
    queries: torch.Tensor,
    key_pages: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    owners: torch.Tensor,
    seen: torch.Tensor,
    k: int,
    longest: int | None = None,
) -> torch.Tensor:
    """As `kernels.reference.select_paged_keys`; at most `kernels.indexer.SCORES_LIMIT` scores exist at a time."""
    num_rows, page = queries.shape[0], key_pages.shape[1]
    if longest is not None:
        block_table = block_table[:, : max(1, triton.cdiv(longest, page))]
    width = block_table.shape[1] * page
    block = max(1, min(num_rows, SCORES_LIMIT // width))
    out = torch.empty(num_rows, k, dtype=torch.int32, device=queries.device)
    scores = torch.empty(block, width, dtype=torch.float32, device=queries.device)
    starts = torch.zeros(block, dtype=torch.int32, device=queries.device)
    for first in range(0, num_rows, block):
        part = slice(first, first + block)
        table, ends = block_table.index_select(0, owners[part]), seen[part]
        into = scores[: ends.shape[0]]
        paged_scores_into(into, queries[part], key_pages, weights[part], table, ends, None)
        out[part] = bounded_topk(into, k, starts[: ends.shape[0]], ends, longest)
    return out


def cache_rows(
    places: torch.Tensor, block_table: torch.Tensor, owners: torch.Tensor, page: int, apart: int
) -> torch.Tensor:
    """As `kernels.reference.cache_rows`."""
    num_rows, num_selected = places.shape
    places = places.contiguous()
    out = torch.empty_like(places)
    if out.numel():
        block = min(1024, triton.next_power_of_2(num_selected))
        _rows_kernel[(num_rows, triton.cdiv(num_selected, block))](
            places, block_table, owners, out, num_selected, block_table.stride(0), apart, PAGE=page, BLOCK=block
        )
    return out


def paged_sparse_attention(
    queries: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor, scale: float, value_dim: int
) -> torch.Tensor:
    """As `kernels.reference.paged_sparse_attention`, in blocks of rows whose partial results fit 256 MiB."""
    num_rows, num_heads, _ = queries.shape
    splits = triton.cdiv(rows.shape[1], _SPLIT)
    block = max(1, _PARTIALS_LIMIT // max(1, splits * num_heads * (value_dim + 1) * 4))
    if num_rows <= block:
        return decode_sparse_attention(queries, cache, rows, scale, value_dim, split=_SPLIT)[0]
    out = torch.empty(num_rows, num_heads, value_dim, dtype=queries.dtype, device=queries.device)
    for first in range(0, num_rows, block):
        part = slice(first, first + block)
        out[part] = decode_sparse_attention(queries[part], cache, rows[part], scale, value_dim, split=_SPLIT)[0]
    return out
