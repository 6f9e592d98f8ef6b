"""What every kernel computes, in plain torch: DeepSeek Sparse Attention and kept-set log-probabilities.

Shape letters: B sequences, Q queries, T keys, H heads, J indexer heads, k selected keys, V vocabulary, N tokens.
"TR" is the DeepSeek-V3.2 technical report (arXiv 2512.02556).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "grouped_linear",
    "indexer_kl",
    "indexer_scores",
    "kept_logprobs",
    "latent_attention",
    "masked_mha",
    "mean_attention",
    "sparse_attention",
    "topk_indices",
    "topk_mask",
]

NEG_INF = float("-inf")

# Gathered keys that one block of queries may hold in `sparse_attention`, in elements.
_GATHER_LIMIT = 1 << 25


def indexer_scores(
    queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Index scores I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s]) (TR Eq. 1), computed in fp32.

    queries [B, Q, J, d], keys [B, T, d], weights [B, Q, J] (all constant scales already in the weights);
    visible bool, broadcastable to [B, Q, T]: keys outside it score -inf. Returns fp32 [B, Q, T].
    """
    num_sequences, num_queries, heads, dim = queries.shape
    rows = queries.float().reshape(num_sequences, num_queries * heads, dim)
    dots = torch.matmul(rows, keys.float().transpose(-1, -2)).view(num_sequences, num_queries, heads, -1)
    scores = (F.relu(dots, inplace=True) * weights.float().unsqueeze(-1)).sum(dim=2)
    return scores if visible is None else scores.masked_fill(~visible, NEG_INF)


def topk_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Marks the k highest scores of each row; among equal scores the lowest index wins. Deterministic.

    scores [..., T], -inf where a key may not be chosen. Returns bool [..., T] with min(k, number above -inf) marks.
    """
    if k >= scores.shape[-1]:
        return scores > NEG_INF
    flat = scores.reshape(-1, scores.shape[-1])
    threshold = flat.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    # A row with fewer than k choosable scores has the threshold -inf.
    marks = flat >= threshold.clamp(min=torch.finfo(flat.dtype).min)
    tied = (marks.sum(dim=-1) > k).nonzero().squeeze(-1)
    if tied.numel():
        above = flat[tied] > threshold[tied]
        equal = flat[tied] == threshold[tied]
        room = k - above.sum(dim=-1, keepdim=True)
        marks[tied] = above | (equal & (equal.cumsum(dim=-1) <= room))
    return marks.view(scores.shape)


def topk_indices(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The keys that `topk_mask` marks, as int64 [..., min(k, T)]: ascending, then -1 where fewer could be chosen."""
    num_keys = scores.shape[-1]
    k = min(k, num_keys)
    mask = topk_mask(scores, k)
    # The n-th mark of a row goes to column n; everything unmarked lands in a spare column that is cut off.
    column = torch.where(mask, mask.cumsum(dim=-1) - 1, k)
    positions = torch.arange(num_keys, device=scores.device).expand_as(column)
    indices = torch.full((*scores.shape[:-1], k + 1), -1, dtype=torch.long, device=scores.device)
    return indices.scatter_(-1, column, positions)[..., :k]


def masked_mha(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention of every head over the keys that `mask` allows: DSA's MHA mode.

    queries and keys [B, T, H, d], values [B, T, H, v], mask bool broadcastable to [B, T, T] with at least one key a
    row. The softmax is in fp32. Returns [B, T, H, v] in the dtype of the values.
    """
    probs = _attention_probs(queries, keys, mask, scale).to(values.dtype)
    return torch.matmul(probs, values.transpose(1, 2)).transpose(1, 2)


def mean_attention(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """The indexer's target p[t, :] (TR Eq. 3): `masked_mha`'s probabilities summed over heads and L1-normalised.

    Arguments as in `masked_mha`. Every head's row sums to 1, so the normalised sum is the mean. No gradient.
    Returns fp32 [B, T, T], 0 outside the mask.
    """
    with torch.no_grad():
        return _attention_probs(queries, keys, mask, scale).mean(dim=1)


def _attention_probs(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    scores = torch.matmul(queries.transpose(1, 2) * scale, keys.permute(0, 2, 3, 1))
    scores += torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).masked_fill_(~mask, NEG_INF).unsqueeze(-3)
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def latent_attention(
    queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, scale: float, value_dim: int
) -> torch.Tensor:
    """Absorbed MLA over all visible latents: one key per position, shared by all heads (MQA).

    queries [B, Q, H, d], keys [B, T, d] laid out [latent | rope key], visible bool [B, Q, T] with at least one key a
    query; the values are the first `value_dim` columns of the keys. Returns [B, Q, H, value_dim].
    """
    scores = torch.einsum("bqhd,btd->bqht", queries * scale, keys)
    scores = scores.float().masked_fill(~visible.unsqueeze(2), NEG_INF)
    return torch.einsum("bqht,btd->bqhd", scores.softmax(dim=-1).to(keys.dtype), keys[..., :value_dim])


def sparse_attention(
    queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int
) -> torch.Tensor:
    """Absorbed MLA over selected latents (TR Eq. 2): query t attends to keys[indices[t]] only.

    queries [B, Q, H, d], keys [B, T, d] laid out [latent | rope key], indices int [B, Q, k] with -1 for "none"; the
    values are the first `value_dim` columns of the keys. A query without any index gets zeros.
    Returns [B, Q, H, value_dim].
    """
    num_sequences, num_queries, _, dim = queries.shape
    block = max(1, _GATHER_LIMIT // max(1, num_sequences * indices.shape[-1] * dim))
    if num_queries <= block:
        return _sparse_attention_block(queries, keys, indices, scale, value_dim)
    parts = zip(queries.split(block, dim=1), indices.split(block, dim=1), strict=True)
    return torch.cat([_sparse_attention_block(q, keys, i, scale, value_dim) for q, i in parts], dim=1)


def _sparse_attention_block(
    queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int
) -> torch.Tensor:
    num_sequences, num_keys, dim = keys.shape
    offsets = torch.arange(0, num_sequences * num_keys, num_keys, device=keys.device).view(-1, 1, 1)
    absent = (indices < 0).unsqueeze(2)
    rows = (indices.clamp(min=0) + offsets).flatten()
    selected = keys.reshape(-1, dim).index_select(0, rows).view(*indices.shape, dim)
    scores = torch.matmul(queries * scale, selected.transpose(-1, -2)).float().masked_fill(absent, NEG_INF)
    probs = scores.softmax(dim=-1).masked_fill(absent, 0.0)
    return torch.matmul(probs.to(keys.dtype), selected[..., :value_dim])


def indexer_kl(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The indexer's loss KL(p[t, S] || softmax(I[t, S])) of every query (TR Eq. 3 and 4), fp32 [B, T].

    scores fp32 [B, T, T], target [B, T, T] (a distribution over the marked keys, 0 elsewhere), mask bool broadcastable
    to [B, T, T]: the set S, every visible key for Eq. 3 and the selected ones for Eq. 4. Gradient flows to scores only.
    """
    target = target.detach().float()
    log_probs = torch.log_softmax(scores.masked_fill(~mask, NEG_INF), dim=-1).masked_fill(~mask, 0.0)
    return (torch.xlogy(target, target) - target * log_probs).sum(dim=-1)


def grouped_linear(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each group of rows times its own matrix, as `F.linear` would: the experts' projections.

    rows [N, D] sorted by group, weights [E, O, D], ends int32 [E]: group e is rows[ends[e - 1]:ends[e]], possibly none.
    Returns [N, O]. Every entry of `weights` gets a gradient, zero for a group without rows.
    """
    # torch's grouped product wants row strides in multiples of 16 bytes, and bfloat16 on a GPU.
    aligned = all(dim * rows.element_size() % 16 == 0 for dim in weights.shape[1:])
    if aligned and (rows.device.type == "cpu" or rows.dtype == torch.bfloat16):
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(*pair) for pair in zip(rows.split(sizes), weights.unbind(), strict=True)])


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
    if (kept_ids is None) != (kept_offsets is None):
        raise ValueError("kept_logprobs: kept_ids and kept_offsets must be given together")
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    if targets.shape != (num_tokens,):
        raise ValueError(f"kept_logprobs: targets have shape {tuple(targets.shape)} for {num_tokens} rows of hidden")
    targets = targets.long()
    if bool(((targets < 0) | (targets >= vocab_size)).any()):
        raise ValueError(f"kept_logprobs: a target lies outside the vocabulary of {vocab_size} tokens")
    if kept_ids is not None and kept_offsets is not None:
        kept_offsets = kept_offsets.long()
        _check_kept(targets, kept_ids, kept_offsets, vocab_size)
    return _KeptLogprobs.apply(hidden, weight, targets, kept_ids, kept_offsets, temperature, chunk)


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
