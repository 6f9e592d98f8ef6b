"""The lightning indexer in plain torch: scores, selection and its loss.

Shape letters: B sequences, Q queries, T keys, H heads, J indexer heads, k selected keys.
"TR" is the DeepSeek-V3.2 technical report (arXiv 2512.02556).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

NEG_INF = float("-inf")


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


def indexer_kl(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The indexer's loss KL(p[t, S] || softmax(I[t, S])) of every query (TR Eq. 3 and 4), fp32 [B, T].

    scores fp32 [B, T, T], target [B, T, T] (a distribution over the marked keys, 0 elsewhere), mask bool broadcastable
    to [B, T, T]: the set S, every visible key for Eq. 3 and the selected ones for Eq. 4. Gradient flows to scores only.
    """
    target = target.detach().float()
    log_probs = torch.log_softmax(scores.masked_fill(~mask, NEG_INF), dim=-1).masked_fill(~mask, 0.0)
    return (torch.xlogy(target, target) - target * log_probs).sum(dim=-1)
