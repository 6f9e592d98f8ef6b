"""The indexer's own loss in Triton (TR Eq. 3 and 4): forward and gradient in one walk over chunks of queries.

A chunk holds its queries' scores and the attention they should imitate, two fp32 matrices of at most CHUNK_LIMIT
elements, and no more exists at a time. The loss is a sum over queries, so its gradient is known up to one factor as
soon as its value is, and the backward pass only multiplies. No atomics: a query's gradients belong to one program, a
key's are summed over fixed parts of a chunk, and chunk after chunk.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.indexer import scores_into
from kernels.products import product

__all__ = ["packed_indexer_loss"]

# Scores of one chunk, in elements: 256 MiB, and as much again for the target.
CHUNK_LIMIT = 1 << 26

# Parts that a chunk's queries are summed in for the keys' gradient; fixed, as the order of a sum depends on it.
_KEY_PARTS = 4


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


@triton.jit
def _normaliser_kernel(
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


@triton.jit
def _target_kernel(
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
def _divergence_kernel(
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
def _queries_kernel(
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


@triton.jit
def _keys_kernel(
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
    part_rows,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of keys' gradients from one part of the queries: sum of slope * w * 1[q . k > 0] * q."""
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
    stop = tl.minimum(part * part_rows + part_rows, num_rows)
    low, high = stop, part * part_rows
    for first in range(part * part_rows, stop, 1024):
        row = first + tl.arange(0, 1024)
        start = tl.load(starts + row, mask=row < stop, other=num_keys)
        end = tl.load(ends + row, mask=row < stop, other=0)
        sees = (start < first_key + BLOCK) & (end > first_key)
        low = tl.minimum(low, tl.min(tl.where(sees, row, stop)))
        high = tl.maximum(high, tl.max(tl.where(sees, row + 1, 0)))
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


class _Chunks:
    """The inputs in one piece, and what is done to a chunk of queries."""

    def __init__(
        self,
        index: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        attention: tuple[torch.Tensor, torch.Tensor],
        bounds: tuple[torch.Tensor, torch.Tensor],
        indices: torch.Tensor | None,
        scale: float,
    ) -> None:
        self.queries, self.keys, self.weights = (part.contiguous() for part in index)
        self.attention = [part if part.stride(2) == 1 else part.contiguous() for part in attention]
        self.starts, self.ends = (bound.int().contiguous() for bound in bounds)
        self.indices, self.scale = indices, scale * 1.4426950408889634
        num_queries, self.num_keys = self.queries.shape[0], self.keys.shape[0]
        self.rows = min(num_queries, max(1, CHUNK_LIMIT // max(1, self.num_keys)))
        device = self.queries.device
        self.scores, self.target = (torch.empty(self.rows, self.num_keys, device=device) for _ in range(2))
        # One byte more than a chunk has: it takes the padding of `indices`.
        self.selected = (
            None if indices is None else torch.empty(self.scores.numel() + 1, dtype=torch.uint8, device=device)
        )

    def divergence(self, block: slice, losses: torch.Tensor, gradient: bool) -> None:
        """Writes the losses of a chunk, and d loss / d scores to `self.scores`."""
        queries, starts, ends = self.queries[block], self.starts[block], self.ends[block]
        selected = self._select(block)
        scores_into(
            self.scores[: len(queries)].unsqueeze(0),
            queries.unsqueeze(0),
            self.keys.unsqueeze(0),
            self.weights[block],
            starts,
            ends,
            None,
        )
        self._imitated(block, selected)
        _divergence_kernel[(len(queries),)](
            self.scores,
            self.target,
            selected,
            starts,
            ends,
            losses[block],
            self.num_keys,
            BLOCK=1024,
            SPARSE=selected is not None,
            GRADIENT=gradient,
            num_warps=4,
        )

    def _select(self, block: slice) -> torch.Tensor | None:
        if self.indices is None or self.selected is None:
            return None
        indices = self.indices[block].long()
        row = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)
        flat = torch.where(indices < 0, self.selected.numel() - 1, row * self.num_keys + indices)
        return self.selected.zero_().index_fill_(0, flat.flatten(), 1)

    def _imitated(self, block: slice, selected: torch.Tensor | None) -> None:
        """Writes the heads' mean attention over what each query sees to `self.target`."""
        queries, keys = self.attention[0][block], self.attention[1]
        num_rows, num_heads, dim = queries.shape
        normaliser = torch.empty(num_heads, num_rows, device=queries.device)
        shape = _attention_shape(dim, queries.element_size())
        shared = {"DIM": dim, "SPARSE": selected is not None, **shape}
        strides = (queries.stride(0), keys.stride(0), queries.stride(1), keys.stride(1))
        bounds = (selected, self.starts[block], self.ends[block])
        blocks = triton.cdiv(num_rows, shape["BLOCK_Q"])
        _normaliser_kernel[(blocks, num_heads)](
            queries,
            keys,
            *bounds,
            normaliser,
            num_rows,
            self.num_keys,
            self.scale,
            *strides,
            **shared,
        )
        _target_kernel[(blocks, triton.cdiv(self.num_keys, shape["BLOCK_K"]))](
            queries,
            keys,
            *bounds,
            normaliser,
            self.target,
            num_rows,
            self.num_keys,
            num_heads,
            self.scale,
            *strides,
            **shared,
        )

    def gradients(self, block: slice, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """Writes the chunk's rows of the gradients of queries and weights, and adds to that of the keys; all fp32."""
        num_rows, num_heads, dim = self.queries[block].shape
        heads = max(16, triton.next_power_of_2(num_heads))
        small = self.queries.element_size() <= 2
        shape = {"DIM": dim, "WIDTH": max(16, triton.next_power_of_2(dim)), "HEADS": heads}
        inputs = (
            self.queries[block],
            self.keys,
            self.weights[block],
            self.scores,
            self.starts[block],
            self.ends[block],
        )
        _queries_kernel[(num_rows,)](
            *inputs,
            grads[0][block],
            grads[2][block],
            self.num_keys,
            num_heads,
            BLOCK=64 if small else 32,
            num_warps=4,
            num_stages=3 if small else 1,
            **shape,
        )
        parts = torch.empty(_KEY_PARTS, self.num_keys, dim, device=self.queries.device)
        per_program = 128 if small else 32
        _keys_kernel[(triton.cdiv(self.num_keys, per_program), _KEY_PARTS)](
            *inputs,
            parts,
            num_rows,
            self.num_keys,
            num_heads,
            triton.cdiv(num_rows, _KEY_PARTS),
            BLOCK=per_program,
            num_warps=8 if small else 4,
            num_stages=3 if small else 1,
            **shape,
        )
        grads[1].add_(parts.sum(dim=0))


def _attention_shape(dim: int, element_size: int) -> dict[str, int]:
    if element_size > 2:
        return {"PIECE": 32, "BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    if dim > 256:
        return {"PIECE": 64, "BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    return {"PIECE": 64, "BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2 if dim <= 192 else 1}


class _IndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries, keys, weights, attention, bounds, indices, scale):
        chunks = _Chunks((queries, keys, weights), attention, bounds, indices, scale)
        losses = torch.empty(queries.shape[0], device=queries.device)
        wanted = any(ctx.needs_input_grad[:3])
        grads = tuple(torch.zeros(part.shape, device=part.device) for part in (queries, keys, weights) if wanted)
        for first in range(0, queries.shape[0], max(1, chunks.rows)):
            block = slice(first, first + chunks.rows)
            chunks.divergence(block, losses, gradient=wanted)
            if wanted:
                chunks.gradients(block, grads)  # type: ignore[arg-type]
        ctx.save_for_backward(
            *(grad.to(part.dtype) for grad, part in zip(grads, (queries, keys, weights), strict=False))
        )
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        factor = grad_outputs[0]
        return *(grad * factor.to(grad.dtype) for grad in ctx.saved_tensors), *[None] * 4


def packed_indexer_loss(
    index_queries: torch.Tensor,
    index_keys: torch.Tensor,
    index_weights: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    scale: float,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.reference.packed_indexer_loss`."""
    attention = (queries.detach(), keys.detach())
    return _IndexerLoss.apply(index_queries, index_keys, index_weights, attention, (starts, ends), indices, scale)
