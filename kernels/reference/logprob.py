"""Log-probabilities over kept sets in plain torch. Shape letters: N tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

NEG_INF = float("-inf")


def kept_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    kept_ids: torch.Tensor | None = None,
    kept_offsets: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and the entropy, of softmax(hidden @ weight.T / temperature) over a kept set.

    hidden [N, D], weight [V, D], targets int [N]. Token n's kept set is kept_ids[kept_offsets[n]:kept_offsets[n + 1]]
    (int32 [M], no id twice for a token; int64 [N + 1]); an empty range, or no kept arrays at all, means the whole
    vocabulary. Returns (logprobs, entropy), both fp32 [N] and differentiable in hidden and weight. At most
    [chunk, V] logits exist at a time: the backward pass computes them again, chunk by chunk.

    Raises ValueError where a target is outside its own kept set or outside the vocabulary; the message gives the
    number of such rows and the first one.
    """
    targets, kept_offsets = check_arguments(hidden, weight, targets, kept_ids, kept_offsets)
    return _KeptLogprobs.apply(hidden, weight, targets, kept_ids, kept_offsets, temperature, chunk)


def check_arguments(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    kept_ids: torch.Tensor | None,
    kept_offsets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """targets and kept_offsets as int64, or the ValueError that `kept_logprobs` promises."""
    if (kept_ids is None) != (kept_offsets is None):
        raise ValueError("kept_logprobs: kept_ids and kept_offsets must be given together")
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    if targets.shape != (num_tokens,):
        raise ValueError(f"kept_logprobs: targets have shape {tuple(targets.shape)} for {num_tokens} rows of hidden")
    targets = targets.long()
    if bool(((targets < 0) | (targets >= vocab_size)).any()):
        raise ValueError(f"kept_logprobs: a target lies outside the vocabulary of {vocab_size} tokens")
    if kept_ids is None or kept_offsets is None:
        return targets, None
    kept_offsets = kept_offsets.long()
    _check_kept(targets, kept_ids, kept_offsets, vocab_size)
    return targets, kept_offsets


def _check_kept(targets: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, vocab_size: int) -> None:
    num_tokens = targets.shape[0]
    if offsets.shape != (num_tokens + 1,) or int(offsets[0]) != 0 or int(offsets[-1]) != ids.shape[0]:
        raise ValueError(f"kept_logprobs: kept_offsets must hold {num_tokens + 1} entries from 0 to {ids.shape[0]}")
    sizes = offsets.diff()
    if bool((sizes < 0).any()) or bool(((ids < 0) | (ids >= vocab_size)).any()):
        raise ValueError(f"kept_logprobs: kept_offsets must not fall and kept_ids must lie in [0, {vocab_size})")
    rows = torch.repeat_interleave(torch.arange(num_tokens, device=ids.device), sizes)
    hits = torch.zeros_like(sizes).index_add_(0, rows, (ids == targets[rows]).long())
    outside = ((hits == 0) & (sizes > 0)).nonzero().flatten()
    if outside.numel():
        row = int(outside[0])
        raise ValueError(
            f"kept_logprobs: {outside.numel()} of {num_tokens} targets lie outside their own kept set, first at "
            f"row {row} (token {int(targets[row])} with {int(sizes[row])} kept ids)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Rows whose distributions are computed together: all over the vocabulary, or all over kept sets."""

    rows: torch.Tensor  # int64 [R]
    target: torch.Tensor  # int64 [R, 1], the column of the target among the columns of `log_probs`
    ids: torch.Tensor | None  # int64 [R, widest set]; None when the columns are the vocabulary
    absent: torch.Tensor | None  # bool like ids, True past the end of a row's set

    def log_probs(self, hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
        logits = F.linear(hidden, weight).float()
        if self.ids is not None and self.absent is not None:
            logits = logits.gather(1, self.ids).masked_fill_(self.absent, NEG_INF)
        return (logits / temperature).log_softmax(dim=-1)

    def entropy(self, log_probs: torch.Tensor) -> torch.Tensor:
        return -torch.xlogy(log_probs.exp(), log_probs.exp()).sum(dim=-1)


def _blocks(
    targets: torch.Tensor, ids: torch.Tensor | None, offsets: torch.Tensor | None, chunk: int
) -> Iterator[_Block]:
    rows = torch.arange(targets.shape[0], device=targets.device)
    if ids is not None and offsets is not None:
        starts, sizes = offsets[:-1], offsets.diff()
        for block in _chunks(rows[sizes > 0], chunk):
            size = sizes[block].unsqueeze(1)
            column = torch.arange(int(size.max()), device=ids.device)
            absent = column >= size
            table = ids.long()[(starts[block].unsqueeze(1) + column).masked_fill_(absent, 0)]
            target = ((table == targets[block].unsqueeze(1)) & ~absent).byte().argmax(dim=1, keepdim=True)
            yield _Block(rows=block, target=target, ids=table, absent=absent)
        rows = rows[sizes == 0]
    for block in _chunks(rows, chunk):
        yield _Block(rows=block, target=targets[block].unsqueeze(1), ids=None, absent=None)


def _chunks(rows: torch.Tensor, chunk: int) -> tuple[torch.Tensor, ...]:
    return rows.split(chunk) if rows.numel() else ()


class _KeptLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, ids, offsets, temperature, chunk):
        logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for block in _blocks(targets, ids, offsets, chunk):
            log_probs = block.log_probs(hidden[block.rows], weight, temperature)
            logprobs[block.rows] = log_probs.gather(1, block.target).squeeze(1)
            entropy[block.rows] = block.entropy(log_probs)
        ctx.save_for_backward(hidden, weight, targets, ids, offsets, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        hidden, weight, targets, ids, offsets, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = grad_outputs
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for block in _blocks(targets, ids, offsets, ctx.chunk):
            rows = block.rows
            log_probs = block.log_probs(hidden[rows], weight, ctx.temperature)
            # d logprob = onehot - p and d entropy = -p (log p + entropy), per logit; p log p is 0 where p is 0.
            probs = log_probs.exp()
            grad = -probs * grad_logprobs[rows].unsqueeze(1)
            grad.scatter_add_(1, block.target, grad_logprobs[rows].unsqueeze(1))
            slope = torch.xlogy(probs, probs) + probs * entropy[rows].unsqueeze(1)
            grad = (grad - slope * grad_entropy[rows].unsqueeze(1)) / ctx.temperature
            if block.ids is not None:
                grad = grad.new_zeros(rows.shape[0], weight.shape[0]).scatter_add_(1, block.ids, grad)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += (grad.t() @ hidden[rows]).float()
        return grad_hidden, grad_weight.to(weight.dtype) if grad_weight is not None else None, *[None] * 5
