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

# Parts that a chunk's queries are summed in for the keys' gradient; fixed, as the order of a sum depends on it.
_KEY_PARTS = 4


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
        divergence_kernel[(len(queries),)](
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
        normaliser_kernel[(blocks, num_heads)](
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
        target_kernel[(blocks, triton.cdiv(self.num_keys, shape["BLOCK_K"]))](
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
        queries_kernel[(num_rows,)](
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
        keys_kernel[(triton.cdiv(self.num_keys, per_program), _KEY_PARTS)](
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
