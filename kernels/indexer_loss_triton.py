"""The indexer's loss on the device, for what `kernels.indexer_loss` launches: see there."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from kernels.products import product


@triton.jit
def _logits(
    queries,
    keys,
    query,
    key,
    head,
    known,
    there,
    stride_query,
    stride_key,
    stride_query_head,
    stride_key_head,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q . k for a block of queries and keys, one head: fp32 [BLOCK_Q, BLOCK_K]."""
    q_at = queries + query.to(tl.int64)[:, None] * stride_query + head * stride_query_head
    k_at = keys + key.to(tl.int64)[None, :] * stride_key + head * stride_key_head
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for first in tl.static_range(0, DIM, PIECE):
        dim = first + tl.arange(0, PIECE)
        q = tl.load(q_at + dim[None, :], mask=known[:, None] & (dim < DIM)[None, :], other=0.0)
        k = tl.load(k_at + dim[:, None], mask=there[None, :] & (dim < DIM)[:, None], other=0.0)
        total += product(q, k)
    return total


@triton.jit
def _seen(selected, row, key, start, end, num_keys, SPARSE: tl.constexpr):
    seen = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
    if SPARSE:
        at = selected + row.to(tl.int64)[:, None] * num_keys + key[None, :]
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
    return seen


@triton.jit(do_not_specialize=["num_rows"])
def normaliser_kernel(
    queries,
    keys,
    selected,
    starts,
    ends,
    normaliser,  # fp32 [num_heads, rows], log base 2
    num_rows,
    num_keys,
    scale,
    stride_query,
    stride_key,
    stride_query_head,
    stride_key_head,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """log2 of the sum over keys of 2 ** (scale * q . k), a head at a time; `scale` includes log2(e)."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    known = row < num_rows
    start = tl.load(starts + row, mask=known, other=num_keys)
    end = tl.load(ends + row, mask=known, other=0)
    peak = tl.full([BLOCK_Q], -1e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(tl.min(start), tl.max(end), BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        seen = _seen(selected, row, key, start, end, num_keys, SPARSE)
        logits = _logits(
            queries,
            keys,
            row,
            key,
            head,
            known,
            key < num_keys,
            stride_query,
            stride_key,
            stride_query_head,
            stride_key_head,
            DIM,
            PIECE,
            BLOCK_Q,
            BLOCK_K,
        )
        logits = tl.where(seen, logits * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), axis=1)
        peak = higher
    tl.store(normaliser + head * num_rows + row, peak + tl.log2(tl.where(total == 0, 1.0, total)), mask=known)


@triton.jit(do_not_specialize=["num_rows"])
def target_kernel(
    queries,
    keys,
    selected,
    starts,
    ends,
    normaliser,
    target,  # fp32 [rows, num_keys]
    num_rows,
    num_keys,
    num_heads,
    scale,
    stride_query,
    stride_key,
    stride_query_head,
    stride_key_head,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """The heads' mean attention; what a query does not see is left as it is."""
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    known = row < num_rows
    start = tl.load(starts + row, mask=known, other=num_keys)
    end = tl.load(ends + row, mask=known, other=0)
    if (tl.min(start) < tl.program_id(1) * BLOCK_K + BLOCK_K) & (tl.max(end) > tl.program_id(1) * BLOCK_K):
        total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for head in range(num_heads):
            logits = _logits(
                queries,
                keys,
                row,
                key,
                head,
                known,
                key < num_keys,
                stride_query,
                stride_key,
                stride_query_head,
                stride_key_head,
                DIM,
                PIECE,
                BLOCK_Q,
                BLOCK_K,
            )
            norm = tl.load(normaliser + head * num_rows + row, mask=known, other=0.0)
            # Nothing is masked yet: what is not seen may even overflow here.
            total += tl.exp2(logits * scale - norm[:, None])
        seen = _seen(selected, row, key, start, end, num_keys, SPARSE)
        within = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
        at = target + row.to(tl.int64)[:, None] * num_keys + key[None, :]
        tl.store(at, tl.where(seen, total / num_heads, 0.0), mask=within)


@triton.jit
def divergence_kernel(
    scores,  # fp32 [rows, num_keys]; becomes d loss / d scores
    target,
    selected,
    starts,
    ends,
    losses,  # fp32 [rows]
    num_keys,
    BLOCK: tl.constexpr,
    SPARSE: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """KL(target || softmax(scores)) of a row, from sum p log p - sum p I + log sum exp I."""
    row = tl.program_id(0)
    start, end = tl.load(starts + row), tl.load(ends + row)
    offset = row.to(tl.int64) * num_keys
    peak = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    divergence = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        key = first + tl.arange(0, BLOCK)
        seen = key < end
        if SPARSE:
            seen = seen & (tl.load(selected + offset + key, mask=seen, other=0) != 0)
        score = tl.load(scores + offset + key, mask=seen, other=float("-inf"))
        p = tl.load(target + offset + key, mask=seen, other=0.0)
        higher = tl.maximum(peak, score, propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp2((peak - higher) * 1.4426950408889634) + tl.exp2((score - higher) * 1.4426950408889634)
        peak = higher
        divergence += tl.where(p > 0, p * tl.log2(tl.maximum(p, 1e-37)) * 0.6931471805599453, 0.0)
        divergence -= tl.where(seen, p * score, 0.0)
        mass += p
    top = tl.max(peak, axis=0)
    whole = tl.sum(total * tl.exp2((peak - top) * 1.4426950408889634), axis=0)
    norm = tl.where(whole == 0, 0.0, top + tl.log2(tl.where(whole == 0, 1.0, whole)) * 0.6931471805599453)
    sum_p = tl.sum(mass, axis=0)
    tl.store(losses + row, tl.sum(divergence, axis=0) + sum_p * norm)
    if GRADIENT:
        for first in range(start, end, BLOCK):
            key = first + tl.arange(0, BLOCK)
            seen = key < end
            if SPARSE:
                seen = seen & (tl.load(selected + offset + key, mask=seen, other=0) != 0)
            score = tl.load(scores + offset + key, mask=seen, other=float("-inf"))
            p = tl.load(target + offset + key, mask=seen, other=0.0)
            slope = tl.exp2((score - norm) * 1.4426950408889634) * sum_p - p
            tl.store(scores + offset + key, tl.where(seen, slope, 0.0), mask=key < end)


@triton.jit
def queries_kernel(
    queries,
    keys,
    weights,
    slopes,
    starts,
    ends,
    grad_queries,
    grad_weights,
    num_keys,
    num_heads,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One query's gradients: sum over keys of slope * w * 1[q . k > 0] * k, and of slope * relu(q . k)."""
    row = tl.program_id(0)
    start, end = tl.load(starts + row), tl.load(ends + row)
    head, dim = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    at = (row.to(tl.int64) * num_heads + head)[:, None] * DIM + dim[None, :]
    real = (head < num_heads)[:, None] & (dim < DIM)[None, :]
    q = tl.load(queries + at, mask=real, other=0.0)
    w = tl.load(weights + row * num_heads + head, mask=head < num_heads, other=0.0).to(tl.float32)
    grad_q = tl.zeros([HEADS, WIDTH], tl.float32)
    grad_w = tl.zeros([HEADS], tl.float32)
    for first in range(start, end, BLOCK):
        key = first + tl.arange(0, BLOCK)
        there = key < end
        source = keys + key.to(tl.int64)[:, None] * DIM + dim[None, :]
        k = tl.load(source, mask=there[:, None] & (dim < DIM)[None, :], other=0.0)
        slope = tl.load(slopes + row.to(tl.int64) * num_keys + key, mask=there, other=0.0)
        dots = product(q, tl.trans(k))
        grad_w += tl.sum(tl.maximum(dots, 0.0) * slope[None, :], axis=1)
        pull = tl.where(dots > 0, slope[None, :] * w[:, None], 0.0)
        grad_q += product(pull.to(k.dtype), k)
    tl.store(grad_queries + at, grad_q, mask=real)
    tl.store(grad_weights + row * num_heads + head, grad_w, mask=head < num_heads)


@triton.jit(do_not_specialize=["num_rows"])
def keys_kernel(
    queries,
    keys,
    weights,
    slopes,
    starts,
    ends,
    grad_keys,  # fp32 [parts, num_keys, DIM]
    num_rows,
    num_keys,
    num_heads,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of keys' gradients from one part of their queries: sum of slope * w * 1[q . k > 0] * q."""
    first_key = tl.program_id(0) * BLOCK
    part = tl.program_id(1)
    key = first_key + tl.arange(0, BLOCK)
    head, dim = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    there = key < num_keys
    inner = (dim < DIM)[None, :]
    source = key.to(tl.int64)[:, None] * DIM + dim[None, :]
    k = tl.load(keys + source, mask=there[:, None] & inner, other=0.0)
    grad = tl.zeros([BLOCK, WIDTH], tl.float32)
    # The queries that see any of these keys lie between the first and the last that do.
    low, high = num_rows, 0
    for first in range(0, num_rows, 1024):
        row = first + tl.arange(0, 1024)
        start = tl.load(starts + row, mask=row < num_rows, other=num_keys)
        end = tl.load(ends + row, mask=row < num_rows, other=0)
        sees = (start < first_key + BLOCK) & (end > first_key)
        low = tl.minimum(low, tl.min(tl.where(sees, row, num_rows)))
        high = tl.maximum(high, tl.max(tl.where(sees, row + 1, 0)))
    each = tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(1))
    low = low + part * each
    high = tl.minimum(low + each, high)
    for step in range(low, high):
        row = (low * 0 + step).to(tl.int64)
        start, end = tl.load(starts + row), tl.load(ends + row)
        at = (row * num_heads + head)[:, None] * DIM + dim[None, :]
        q = tl.load(queries + at, mask=(head < num_heads)[:, None] & inner, other=0.0)
        w = tl.load(weights + row * num_heads + head, mask=head < num_heads, other=0.0).to(tl.float32)
        seen = (key >= start) & (key < end)
        slope = tl.load(slopes + row * num_keys + key, mask=seen, other=0.0)
        dots = product(k, tl.trans(q))
        pull = tl.where(dots > 0, slope[:, None] * w[None, :], 0.0)
        grad += product(pull.to(q.dtype), q)
    tl.store(grad_keys + part.to(tl.int64) * num_keys * DIM + source, grad, mask=there[:, None] & inner)
