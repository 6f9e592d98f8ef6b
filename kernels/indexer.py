"""The lightning indexer in Triton: preparation, scores of packed and of paged keys, selection in chunks of rows.

A program scores a block of keys against a few queries at a time: one matrix product [keys, queries x heads], then relu,
head weights and the sum over heads in registers. The product has its keys in the rows, so that the sum over heads runs
along a thread's own columns. A score depends on its query and its key alone: not on the block it is computed in, on
its neighbours or on how the keys are split over programs.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels import reference
from kernels.products import product
from kernels.topk import bounded_topk

__all__ = ["indexer_scores", "packed_index_scores", "paged_index_scores", "quantise_index_heads", "select_keys"]

# Scores that `select_keys` holds at a time, in elements: 512 MiB.
SCORES_LIMIT = 1 << 27

# Heads that a program prepares; each makes the Hadamard matrix for itself.
HEADS_A_PROGRAM = 32

_E4M3_LOWEST_AMAX = tl.constexpr(1e-4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How one program of the scores kernel works; a score's bits may depend on it, so it follows from shapes alone."""

    keys: int
    columns: int
    num_warps: int
    num_stages: int
    registers: int | None = None  # at most, a thread


# By bytes per element of queries and keys. 128 columns are two queries of 64 heads; in fp8 four programs share a
# multiprocessor, so that the products of one hide the sums of the others.
TILINGS = {
    1: Tiling(keys=64, columns=128, num_warps=4, num_stages=3),
    2: Tiling(keys=128, columns=128, num_warps=8, num_stages=3),
    4: Tiling(keys=32, columns=64, num_warps=4, num_stages=2),
}


@triton.jit
def _e4m3_bits(x):
    """fp32 in [-448, 448] to the bits of float8_e4m3fn, nearest with ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # 2 ** 14 has the unit 2 ** -9 in its last place, as the codes below 2 ** -6 have.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (sign | tl.where(size < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def _quantise_kernel(
    heads,
    cos,
    sin,
    weights,
    codes,
    scales,
    num_rows,
    num_heads,
    stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HADAMARD: tl.constexpr,
    WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = row // num_heads
    column = tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (column < DIM)[None, :]
    if INTERLEAVED:
        partner, angle, second = column ^ 1, column // 2, column % 2 == 1
    else:
        partner, angle, second = (column + HALF) % (2 * HALF), column % HALF, column >= HALF
    rotated = column < 2 * HALF
    partner = tl.where(rotated, partner, column)
    base = heads + (token * stride + (row % num_heads) * DIM)[:, None]
    x = tl.load(base + column[None, :], mask=inside, other=0.0)
    other = tl.load(base + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    turns = inside & rotated[None, :]
    at = token[:, None] * HALF + angle[None, :]
    c = tl.load(cos + at, mask=turns, other=1.0)
    s = tl.load(sin + at, mask=turns, other=0.0)
    s = tl.where(second[None, :], s, -s)
    x = (x.to(tl.float32) * c + other * s).to(x.dtype)
    if HADAMARD:
        i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
        parity = i & j
        parity ^= parity >> 8
        parity ^= parity >> 4
        parity ^= parity >> 2
        parity ^= parity >> 1
        matrix = (1 - 2 * (parity & 1)).to(tl.float32).to(x.dtype)
        spread = product(x, matrix) * (DIM**-0.5)
        x = tl.where((column < DIM)[None, :], spread, 0.0).to(x.dtype)
    y = x.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(y), axis=1), _E4M3_LOWEST_AMAX)
    # The least e with amax <= 448 * 2 ** e = 1.75 * 2 ** (e + 8), from the bits of amax.
    bits = amax.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    shrink = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    code = _e4m3_bits(y * shrink[:, None])
    # A NaN is not hidden: the scale of its head says so.
    scale = tl.where(tl.sum((y != y).to(tl.int32), axis=1) > 0, float("nan"), scale)
    tl.store(codes + (row * DIM)[:, None] + column[None, :], code, mask=inside)
    if WEIGHED:
        scale *= tl.load(weights + row, mask=row < num_rows, other=0.0).to(tl.float32)
    tl.store(scales + row, scale, mask=row < num_rows)


@triton.jit
def _head_sums(keys, queries, weights, BLOCK: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """keys [BLOCK, d], queries [d, QUERIES * HEADS], weights [QUERIES * HEADS] to scores [BLOCK, QUERIES]."""
    dots = product(keys, queries)
    dots = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * weights[None, :]
    return tl.sum(tl.reshape(dots, [BLOCK, QUERIES, HEADS]), axis=2)


@triton.jit
def _load_queries(
    queries,
    weights,
    first,
    num_queries,
    num_heads,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Queries [WIDTH, QUERIES * HEADS] and weights [QUERIES * HEADS] from query `first` on; what is not there is 0."""
    column = tl.arange(0, QUERIES * HEADS)
    query, head = first + column // HEADS, column % HEADS
    there = (query < num_queries) & (head < num_heads)
    row = query.to(tl.int64) * num_heads + head
    dim = tl.arange(0, WIDTH)
    q = tl.load(queries + row[:, None] * DIM + dim[None, :], mask=there[:, None] & (dim < DIM)[None, :], other=0.0)
    return tl.trans(q), tl.load(weights + row, mask=there, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_queries"])
def _packed_kernel(
    queries,
    keys,
    weights,
    key_scales,
    starts,
    ends,
    out,
    num_queries,
    num_keys,
    num_heads,
    span,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    # Late queries see the most keys, and start first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    batch = tl.program_id(2).to(tl.int64)
    query = first + tl.arange(0, QUERIES)
    known = query < num_queries
    start = tl.maximum(tl.load(starts + query, mask=known, other=num_keys), 0)
    end = tl.minimum(tl.load(ends + query, mask=known, other=0), num_keys)
    low = tl.maximum(tl.min(start), tl.program_id(1) * span)
    high = tl.minimum(tl.max(end), tl.program_id(1) * span + span)
    if low < high:
        target = out + (batch * num_queries + query.to(tl.int64)) * num_keys
        tokens = batch * num_queries * num_heads
        q, w = _load_queries(
            queries + tokens * DIM, weights + tokens, first, num_queries, num_heads, DIM, WIDTH, QUERIES, HEADS
        )
        dim = tl.arange(0, WIDTH)
        for block in range(low, high, BLOCK):
            key = block + tl.arange(0, BLOCK)
            there = key < high
            source = keys + (batch * num_keys + key)[:, None] * DIM + dim[None, :]
            k = tl.load(source, mask=there[:, None] & (dim < DIM)[None, :], other=0.0)
            scores = _head_sums(k, q, w, BLOCK, QUERIES, HEADS)
            if SCALED:
                scores *= tl.load(key_scales + key, mask=there, other=0.0)[:, None]
            seen = (key[:, None] >= start[None, :]) & (key[:, None] < tl.minimum(end, high)[None, :])
            tl.store(target[None, :] + key[:, None], scores, mask=seen)


@triton.jit
def _paged_kernel(
    queries,
    key_pages,
    weights,
    key_scales,
    block_table,
    lengths,
    out,
    num_queries,
    num_heads,
    queries_each,
    table_width,
    page_stride,
    slot_stride,
    scale_stride,
    span,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    row = tl.program_id(0)
    low = tl.program_id(1) * span
    high = tl.minimum(tl.minimum(tl.load(lengths + row), low + span), table_width * PAGE)
    if low < high:
        q, w = _load_queries(queries, weights, row, num_queries, num_heads, DIM, WIDTH, 1, HEADS)
        table = block_table + (row // queries_each).to(tl.int64) * table_width
        out += row.to(tl.int64) * table_width * PAGE
        dim = tl.arange(0, WIDTH)
        for block in range(low, high, BLOCK):
            key = block + tl.arange(0, BLOCK)
            there = key < high
            page = tl.load(table + key // PAGE, mask=there, other=0).to(tl.int64)
            source = key_pages + (page * page_stride + (key % PAGE) * slot_stride)[:, None] + dim[None, :]
            k = tl.load(source, mask=there[:, None] & (dim < DIM)[None, :], other=0.0)
            scores = _head_sums(k, q, w, BLOCK, 1, HEADS)
            if SCALED:
                scores *= tl.load(key_scales + page * scale_stride + key % PAGE, mask=there, other=0.0)[:, None]
            tl.store(out + key[:, None] + tl.arange(0, 1)[None, :], scores, mask=there[:, None])


def quantise_index_heads(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    hadamard: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.reference.quantise_index_heads`, in one pass over the heads."""
    num_tokens, num_heads, dim = heads.shape
    if hadamard and dim & (dim - 1):
        raise ValueError(f"the Hadamard rotation needs an index_head_dim that is a power of two, not {dim}")
    heads = heads if heads.stride()[1:] == (dim, 1) else heads.contiguous()
    codes = torch.empty(num_tokens, num_heads, dim, dtype=torch.uint8, device=heads.device)
    scales = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=heads.device)
    block, rows = HEADS_A_PROGRAM, num_tokens * num_heads
    if rows:
        _quantise_kernel[(triton.cdiv(rows, block),)](
            heads,
            cos.float().contiguous(),
            sin.float().contiguous(),
            None if weights is None else weights.contiguous(),
            codes,
            scales,
            rows,
            num_heads,
            heads.stride(0),
            DIM=dim,
            WIDTH=max(16, triton.next_power_of_2(dim)),
            HALF=cos.shape[-1],
            INTERLEAVED=interleaved,
            HADAMARD=hadamard,
            WEIGHED=weights is not None,
            BLOCK=block,
            num_warps=max(4, block // 16),
        )
    return codes.view(torch.float8_e4m3fn), scales


def _shape(num_heads: int, dim: int, tiling: Tiling) -> dict[str, Any]:
    heads = max(16, triton.next_power_of_2(num_heads))
    return {
        "DIM": dim,
        "WIDTH": max(32, triton.next_power_of_2(dim)),
        "HEADS": heads,
        "BLOCK": tiling.keys,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        "maxnreg": tiling.registers,
    }


def _span(programs: int, num_keys: int, block: int) -> int:
    """Keys a program walks: few enough for some 600 programs where there are that many blocks, at most 4096."""
    blocks = triton.cdiv(num_keys * max(1, programs), 600 * block)
    return block * min(max(1, blocks), 4096 // block)


def scores_into(
    out: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    key_scales: torch.Tensor | None,
) -> None:
    """Writes the scores that each query sees to out [B, N, M] and leaves the rest as it is; starts and ends [N]."""
    batch, num_queries, num_heads, dim = queries.shape
    num_keys = keys.shape[1]
    tiling = TILINGS[queries.element_size()]
    shape = _shape(num_heads, dim, tiling)
    per_program = max(1, tiling.columns // shape["HEADS"])
    programs = triton.cdiv(num_queries, per_program)
    span = _span(programs * batch, num_keys, tiling.keys)
    if out.numel():
        _packed_kernel[(programs, triton.cdiv(num_keys, span), batch)](
            queries.contiguous(),
            keys.contiguous(),
            weights.contiguous(),
            key_scales,
            starts.contiguous(),
            ends.contiguous(),
            out,
            num_queries,
            num_keys,
            num_heads,
            span,
            QUERIES=per_program,
            SCALED=key_scales is not None,
            **shape,
        )


def packed_index_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    key_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.reference.packed_index_scores`."""
    shape = (queries.shape[0], keys.shape[0])
    out = torch.full(shape, float("-inf"), dtype=torch.float32, device=queries.device)
    scores_into(out.unsqueeze(0), queries.unsqueeze(0), keys.unsqueeze(0), weights, starts, ends, key_scales)
    return out


def indexer_scores(
    queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """As `kernels.reference.indexer_scores`, which serves where a gradient is wanted."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (queries, keys, weights)):
        return reference.indexer_scores(queries, keys, weights, visible)
    batch, num_queries, num_keys = queries.shape[0], queries.shape[1], keys.shape[1]
    out = torch.empty(batch, num_queries, num_keys, dtype=torch.float32, device=queries.device)
    starts = torch.zeros(num_queries, dtype=torch.int32, device=queries.device)
    scores_into(out, queries, keys.to(queries.dtype), weights, starts, torch.full_like(starts, num_keys), None)
    return out if visible is None else out.masked_fill_(~visible, float("-inf"))


def paged_index_scores(
    queries: torch.Tensor,
    key_pages: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    key_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.reference.paged_index_scores`; pages and their scales may be strided views of one buffer."""
    num_keys = block_table.shape[1] * key_pages.shape[1]
    out = torch.full((queries.shape[0], num_keys), float("-inf"), dtype=torch.float32, device=queries.device)
    paged_scores_into(out, queries, key_pages, weights, block_table, lengths, key_scales)
    return out


def paged_scores_into(
    out: torch.Tensor,
    queries: torch.Tensor,
    key_pages: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    key_scales: torch.Tensor | None,
) -> None:
    """Writes the scores that each query sees to out [R, W * page] and leaves the rest as it is."""
    num_queries, num_heads, dim = queries.shape
    page = key_pages.shape[1]
    if not out.numel():
        return
    if key_pages.stride(2) != 1 or (key_scales is not None and key_scales.stride(1) != 1):
        raise ValueError("paged_index_scores: the dims of a key and the scales of a page must be in one piece")
    tiling = TILINGS[queries.element_size()]
    span = _span(num_queries, block_table.shape[1] * page, tiling.keys)
    _paged_kernel[(num_queries, triton.cdiv(block_table.shape[1] * page, span))](
        queries.contiguous(),
        key_pages,
        weights.contiguous(),
        key_scales,
        block_table.contiguous(),
        lengths.contiguous(),
        out,
        num_queries,
        num_heads,
        num_queries // block_table.shape[0],
        block_table.shape[1],
        key_pages.stride(0),
        key_pages.stride(1),
        0 if key_scales is None else key_scales.stride(0),
        span,
        PAGE=page,
        SCALED=key_scales is not None,
        **_shape(num_heads, dim, tiling),
    )


def select_keys(
    queries: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    k: int,
    key_scales: torch.Tensor | None = None,
    longest: int | None = None,
) -> torch.Tensor:
    """As `kernels.reference.select_keys`; at most SCORES_LIMIT scores exist at a time."""
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    rows = min(num_queries, max(1, SCORES_LIMIT // max(1, num_keys)))
    scores = torch.empty(rows, num_keys, dtype=torch.float32, device=queries.device)
    out = torch.empty(num_queries, k, dtype=torch.int32, device=queries.device)
    for first in range(0, num_queries, max(1, rows)):
        block = slice(first, first + rows)
        q, w, begin, end = (part[block].detach() for part in (queries, weights, starts, ends))
        into = scores[: q.shape[0]]
        scores_into(into.unsqueeze(0), q.unsqueeze(0), keys.detach().unsqueeze(0), w, begin, end, key_scales)
        out[block] = bounded_topk(into, k, begin, end, longest)
    return out
