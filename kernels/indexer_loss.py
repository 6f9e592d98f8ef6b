"""The indexer's own loss in Triton (TR Eq. 3 and 4): forward and gradient in one walk over chunks of queries.

A chunk holds its queries' scores and the attention they should imitate, two fp32 matrices of at most CHUNK_LIMIT
elements, and no more exists at a time. The loss is a sum over queries, so its gradient is known up to one factor as
soon as its value is, and the backward pass only multiplies. No atomics: a query's gradients belong to one program, a
key's are summed over fixed parts of the queries that see it, and chunk after chunk.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kernels.indexer import scores_into
from kernels.indexer_loss_triton import (
    divergence_kernel,
    keys_kernel,
    normaliser_kernel,
    queries_kernel,
    target_kernel,
)

__all__ = ["packed_indexer_loss"]

# Scores of one chunk, in elements: 256 MiB, and as much again for the target.
CHUNK_LIMIT = 1 << 26

# Parts that the queries of a key are summed in for its gradient; fixed, as the order of a sum depends on it.
_KEY_PARTS = 4


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some queries, the keys that any of them may see, and room for two matrices between them."""

    rows: slice
    columns: slice
    scores: torch.Tensor  # fp32 [rows, columns]
    target: torch.Tensor
    selected: torch.Tensor | None  # uint8, a byte for each score and one that takes the padding of indices


class _Chunks:
    """The inputs in one piece, and what is done to a chunk of queries."""

    def __init__(
        self,
        index: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        attention: tuple[torch.Tensor, torch.Tensor],
        bounds: tuple[torch.Tensor, torch.Tensor],
        indices: torch.Tensor | None,
        scale: float,
        longest: int | None,
    ) -> None:
        self.queries, self.keys, self.weights = (part.contiguous() for part in index)
        self.attention = [part if part.stride(2) == 1 else part.contiguous() for part in attention]
        self.starts, self.ends = (bound.int().contiguous() for bound in bounds)
        self.indices, self.scale = indices, scale * 1.4426950408889634
        self.longest = longest

    def __iter__(self) -> Iterator[_Chunk]:
        num_queries, num_keys, device = self.queries.shape[0], self.keys.shape[0], self.queries.device
        each = min(num_queries, _rows_of_chunk(num_keys, self.longest))
        reach = num_keys if self.longest is None else min(num_keys, each + self.longest)
        scores, target = (torch.empty(each * reach, device=device) for _ in range(2))
        selected = None if self.indices is None else torch.empty(each * reach + 1, dtype=torch.uint8, device=device)
        for first in range(0, num_queries, max(1, each)):
            rows = slice(first, min(first + each, num_queries))
            columns = slice(0, num_keys)
            if self.longest is not None:
                columns = slice(max(0, rows.start - self.longest + 1), min(rows.stop, num_keys))
            shape = rows.stop - rows.start, columns.stop - columns.start
            size = shape[0] * shape[1]
            flags = None if selected is None else selected[: size + 1]
            yield _Chunk(rows, columns, scores[:size].view(shape), target[:size].view(shape), flags)

    def bounds(self, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the chunk's columns its queries see."""
        return self.starts[chunk.rows] - chunk.columns.start, self.ends[chunk.rows] - chunk.columns.start

    def divergence(self, chunk: _Chunk, losses: torch.Tensor, gradient: bool) -> None:
        """Writes the losses of a chunk, and d loss / d scores to its scores."""
        queries, keys = self.queries[chunk.rows], self.keys[chunk.columns]
        starts, ends = self.bounds(chunk)
        self._select(chunk)
        scores_into(
            chunk.scores.unsqueeze(0),
            queries.unsqueeze(0),
            keys.unsqueeze(0),
            self.weights[chunk.rows],
            starts,
            ends,
            None,
        )
        self._imitated(chunk, starts, ends)
        divergence_kernel[(len(queries),)](
            chunk.scores,
            chunk.target,
            chunk.selected,
            starts,
            ends,
            losses[chunk.rows],
            len(keys),
            BLOCK=1024,
            SPARSE=chunk.selected is not None,
            GRADIENT=gradient,
            num_warps=4,
        )

    def _select(self, chunk: _Chunk) -> None:
        """Marks the keys of `indices` in the chunk's flags."""
        if self.indices is None or chunk.selected is None:
            return
        indices = self.indices[chunk.rows].long()
        row = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)
        column = row * chunk.scores.shape[1] + indices - chunk.columns.start
        flat = torch.where(indices < 0, chunk.selected.numel() - 1, column)
        chunk.selected.zero_().index_fill_(0, flat.flatten(), 1)

    def _imitated(self, chunk: _Chunk, starts: torch.Tensor, ends: torch.Tensor) -> None:
        """Writes the heads' mean attention over what each query sees to the chunk's target."""
        queries, keys = self.attention[0][chunk.rows], self.attention[1][chunk.columns]
        (num_rows, num_heads, dim), num_keys = queries.shape, keys.shape[0]
        normaliser = torch.empty(num_heads, num_rows, device=queries.device)
        shape = _attention_shape(dim, queries.element_size())
        shared = {"DIM": dim, "SPARSE": chunk.selected is not None, **shape}
        strides = (queries.stride(0), keys.stride(0), queries.stride(1), keys.stride(1))
        bounds = (chunk.selected, starts, ends)
        blocks = triton.cdiv(num_rows, shape["BLOCK_Q"])
        normaliser_kernel[(blocks, num_heads)](
            queries, keys, *bounds, normaliser, num_rows, num_keys, self.scale, *strides, **shared
        )
        target_kernel[(blocks, triton.cdiv(num_keys, shape["BLOCK_K"]))](
            queries,
            keys,
            *bounds,
            normaliser,
            chunk.target,
            num_rows,
            num_keys,
            num_heads,
            self.scale,
            *strides,
            **shared,
        )

    def gradients(self, chunk: _Chunk, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """Writes the chunk's rows of the gradients of queries and weights, and adds to that of the keys; all fp32."""
        queries, keys = self.queries[chunk.rows], self.keys[chunk.columns]
        (num_rows, num_heads, dim), num_keys = queries.shape, keys.shape[0]
        heads = max(16, triton.next_power_of_2(num_heads))
        small = queries.element_size() <= 2
        shape = {"DIM": dim, "WIDTH": max(16, triton.next_power_of_2(dim)), "HEADS": heads}
        inputs = (queries, keys, self.weights[chunk.rows], chunk.scores, *self.bounds(chunk))
        queries_kernel[(num_rows,)](
            *inputs,
            grads[0][chunk.rows],
            grads[2][chunk.rows],
            num_keys,
            num_heads,
            BLOCK=64 if small else 32,
            num_warps=4,
            num_stages=3 if small else 1,
            **shape,
        )
        parts = torch.empty(_KEY_PARTS, num_keys, dim, device=queries.device)
        per_program = 128 if small else 32
        keys_kernel[(triton.cdiv(num_keys, per_program), _KEY_PARTS)](
            *inputs,
            parts,
            num_rows,
            num_keys,
            num_heads,
            BLOCK=per_program,
            num_warps=8 if small else 4,
            num_stages=3 if small else 1,
            **shape,
        )
        grads[1][chunk.columns].add_(parts.sum(dim=0))


def _rows_of_chunk(num_keys: int, longest: int | None) -> int:
    """How many queries' scores fit CHUNK_LIMIT, at least one."""
    if longest is None:
        return max(1, CHUNK_LIMIT // max(1, num_keys))
    # Rows r with r * (r + longest) within the limit, of which no more than num_keys columns exist.
    bounded = int(math.sqrt(longest**2 / 4 + CHUNK_LIMIT) - longest / 2)
    rows = max(1, bounded, CHUNK_LIMIT // max(1, num_keys))
    return rows if rows < 16 else rows // 16 * 16  # slices of whole rows then begin where a kernel expects them to


def _attention_shape(dim: int, element_size: int) -> dict[str, int]:
    if element_size > 2:
        return {"PIECE": 32, "BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    if dim > 256:
        return {"PIECE": 64, "BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    return {"PIECE": 64, "BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2 if dim <= 192 else 1}


class _IndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries, keys, weights, attention, bounds, indices, scale, longest):
        chunks = _Chunks((queries, keys, weights), attention, bounds, indices, scale, longest)
        losses = torch.empty(queries.shape[0], device=queries.device)
        wanted = any(ctx.needs_input_grad[:3])
        grads = tuple(torch.zeros(part.shape, device=part.device) for part in (queries, keys, weights) if wanted)
        for chunk in chunks:
            chunks.divergence(chunk, losses, gradient=wanted)
            if wanted:
                chunks.gradients(chunk, grads)  # type: ignore[arg-type]
        ctx.save_for_backward(
            *(grad.to(part.dtype) for grad, part in zip(grads, (queries, keys, weights), strict=False))
        )
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        factor = grad_outputs[0]
        return *(grad * factor.to(grad.dtype) for grad in ctx.saved_tensors), *[None] * 5


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
    longest: int | None = None,
) -> torch.Tensor:
    """As `kernels.reference.packed_indexer_loss`; with `longest` a chunk has columns for the keys near it only."""
    attention, bounds = (queries.detach(), keys.detach()), (starts, ends)
    return _IndexerLoss.apply(index_queries, index_keys, index_weights, attention, bounds, indices, scale, longest)
