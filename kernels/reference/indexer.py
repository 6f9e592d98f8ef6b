"""The lightning indexer in plain torch: preparation, scores and selection.

Shape letters: B sequences, Q queries, T keys, J indexer heads, k selected keys, d index_head_dim; in packed rows N
queries and M keys of all sequences. "TR" is the DeepSeek-V3.2 technical report (arXiv 2512.02556).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

NEG_INF = float("-inf")

# Scores of single heads that exist at a time where no gradient is wanted, in elements.
SCORES_LIMIT = 1 << 27

# Attention probabilities of all heads that `packed_indexer_loss` holds at a time, in elements.
_LOSS_LIMIT = 1 << 26


def quantise_index_heads(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    hadamard: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index queries or keys as `packed_index_scores` takes them in fp8: rotated, spread out and block-quantised.

    heads [N, J, d] (keys: J = 1), cos and sin fp32 [N, r / 2] for the first r dims of a head, whose pairs are
    (x[i], x[i + r / 2]), or (x[2i], x[2i + 1]) where `interleaved`, rotated in place. With `hadamard` (d a power of
    two) every head is then multiplied by the normalised Sylvester-Hadamard matrix, which spreads outliers over the
    block and leaves products of queries and keys as they are. Both steps round to the dtype of the heads, as the
    public inference code does. A head is one block: its scale is the least power of two that brings its largest
    magnitude (at least 1e-4) to 448 or less.

    Returns (codes float8_e4m3fn [N, J, d], scales fp32 [N, J]); with weights [N, J] the second is weights * scales,
    what a query's scores are weighed with.
    """
    rope = 2 * cos.shape[-1]
    turned = heads[..., :rope].float()
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    c, s = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
    pair = first * c - second * s, second * c + first * s
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    x = torch.cat([turned.to(heads.dtype), heads[..., rope:]], dim=-1).float()
    if hadamard:
        x = (x @ _hadamard(x.shape[-1], x.device) * x.shape[-1] ** -0.5).to(heads.dtype).float()
    amax = x.abs().amax(dim=-1).clamp(min=1e-4)
    # amax = mantissa * 2 ** exponent and 448 = 0.875 * 2 ** 9. A logarithm need not be exact, and on a boundary between
    # two scales, where bfloat16 often lies, it would have to be.
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent.int() - 9 + (mantissa > 0.875).int()
    scales = ((exponent + 127) << 23).view(torch.float32)
    codes = (x / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return codes, scales if weights is None else weights.float() * scales


def _hadamard(dim: int, device: torch.device) -> torch.Tensor:
    if dim & (dim - 1):
        raise ValueError(f"the Hadamard rotation needs an index_head_dim that is a power of two, not {dim}")
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def indexer_scores(
    queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Index scores I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s]) (TR Eq. 1), computed in fp32.

    queries [B, Q, J, d], keys [B, T, d], weights [B, Q, J] (all constant scales already in the weights);
    visible bool, broadcastable to [B, Q, T]: keys outside it score -inf. Returns fp32 [B, Q, T].
    """
    num_sequences, num_queries, heads, _ = queries.shape
    block = max(1, SCORES_LIMIT // max(1, num_sequences * heads * keys.shape[1]))
    if num_queries <= block:
        scores = _scores_block(queries, keys, weights)
    else:
        parts = zip(queries.split(block, dim=1), weights.split(block, dim=1), strict=True)
        scores = torch.cat([_scores_block(q, keys, w) for q, w in parts], dim=1)
    return scores if visible is None else scores.masked_fill(~visible, NEG_INF)


def _scores_block(queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    num_sequences, num_queries, heads, dim = queries.shape
    rows = queries.float().reshape(num_sequences, num_queries * heads, dim)
    dots = torch.matmul(rows, keys.float().transpose(-1, -2)).view(num_sequences, num_queries, heads, -1)
    return (F.relu(dots, inplace=True) * weights.float().unsqueeze(-1)).sum(dim=2)


def packed_index_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    key_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Index scores of packed sequences (TR Eq. 1): query n sees keys[starts[n]:ends[n]], all others score -inf.

    queries [N, J, d], keys [M, d], weights [N, J], starts and ends int32 [N]. In fp8 (`quantise_index_heads`) the
    queries' scales are in the weights and key_scales fp32 [M] multiplies a key's score. Returns fp32 [N, M].
    """
    scores = indexer_scores(queries.unsqueeze(0), keys.unsqueeze(0), weights.unsqueeze(0)).squeeze(0)
    if key_scales is not None:
        scores = scores * key_scales
    column = torch.arange(keys.shape[0], device=keys.device)
    return scores.masked_fill((column < starts.unsqueeze(1)) | (column >= ends.unsqueeze(1)), NEG_INF)


def paged_index_scores(
    queries: torch.Tensor,
    key_pages: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    key_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Index scores against a paged cache: query r sees the first lengths[r] keys of its sequence.

    queries [R, J, d], key_pages [pages, page, d], weights [R, J], block_table int32 [B, W]: the pages of B sequences,
    each with R / B queries one after another; lengths int32 [R]; key_scales fp32 [pages, page] as in
    `packed_index_scores`. Returns fp32 [R, W * page], -inf beyond a query's length.
    """
    table = block_table.long().clamp(min=0).repeat_interleave(queries.shape[0] // block_table.shape[0], dim=0)
    keys = key_pages[table].flatten(1, 2)
    scores = indexer_scores(queries.unsqueeze(1), keys, weights.unsqueeze(1)).squeeze(1)
    if key_scales is not None:
        scores = scores * key_scales[table].flatten(1)
    column = torch.arange(scores.shape[1], device=scores.device)
    return scores.masked_fill(column >= lengths.unsqueeze(1), NEG_INF)


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
    """The k keys of each query that score highest, without a gradient and without all scores at once.

    Arguments as in `packed_index_scores`; `longest` bounds ends - starts, where the caller knows it. Returns int32
    [N, k]: rows of `keys`, ascending, then -1 (`topk_indices`).
    """
    del longest
    with torch.no_grad():
        rows = max(1, SCORES_LIMIT // max(1, keys.shape[0] * queries.shape[1]))
        out = torch.full((queries.shape[0], k), -1, dtype=torch.int32, device=queries.device)
        for first in range(0, queries.shape[0], rows):
            block = slice(first, first + rows)
            scores = packed_index_scores(queries[block], keys, weights[block], starts[block], ends[block], key_scales)
            out[block, : min(k, keys.shape[0])] = topk_indices(scores, k).int()
    return out


def topk_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Marks the k highest scores of each row; among equal scores the lowest index wins. Deterministic.

    scores [..., T], -inf where a key may not be chosen. Returns bool [..., T] with min(k, number above -inf) marks;
    a row with a NaN has none, so that what is computed from it says so.
    """
    if k >= scores.shape[-1]:
        return (scores > NEG_INF) & ~scores.isnan().any(dim=-1, keepdim=True)
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
    """The indexer's loss over packed sequences, a sum over queries: sum_t KL(p[t, S] || softmax(I[t, S])), fp32 [].

    index_queries [N, J, d], index_keys [M, d], index_weights [N, J] make the scores I (`packed_index_scores`); queries
    [N, H, D], keys [M, H, D] (a stride of 0 where heads share keys) and scale make p, the heads' mean attention over
    S. S is every key in [starts[t], ends[t]) (TR Eq. 3), or with indices int [N, k], -1 for "none", the selected ones
    (Eq. 4); a query that sees nothing adds 0. Gradient flows to the index tensors only. Queries are taken in chunks,
    so that no [N, M] matrix exists where it would be large. `longest` says that query t sees none but the last
    `longest` keys up to key t, its own, which spares an implementation the others.
    """
    del longest
    rows = max(1, _LOSS_LIMIT // max(1, keys.shape[0] * queries.shape[1]))
    tensors = (index_queries, index_keys, index_weights)
    return _IndexerLoss.apply(*tensors, queries.detach(), keys.detach(), starts, ends, scale, indices, rows)


def _loss_of_chunk(
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    queries: torch.Tensor,
    keys: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    indices: torch.Tensor | None,
) -> torch.Tensor:
    column = torch.arange(keys.shape[0], device=keys.device)
    mask = (column >= bounds[0].unsqueeze(1)) & (column < bounds[1].unsqueeze(1))
    if indices is not None:
        chosen = mask.new_zeros(mask.shape[0], mask.shape[1] + 1)
        chosen.scatter_(1, indices.long().masked_fill(indices < 0, mask.shape[1]), True)
        mask = mask & chosen[:, :-1]
    some = mask.any(dim=1)
    mask = mask[some]
    logits = torch.einsum("nhd,mhd->hnm", queries[some].float() * scale, keys.float())
    target = logits.masked_fill(~mask, NEG_INF).softmax(dim=-1).mean(dim=0)
    scores = indexer_scores(index[0][some].unsqueeze(0), index[1].unsqueeze(0), index[2][some].unsqueeze(0))
    return indexer_kl(scores, target.unsqueeze(0), mask).sum()


class _IndexerLoss(torch.autograd.Function):
    """Works out the gradient beside the value: it is linear in the factor that the backward pass brings."""

    @staticmethod
    def forward(ctx: Any, iq, ik, iw, queries, keys, starts, ends, scale, indices, rows):
        wanted = any(ctx.needs_input_grad[:3])
        total = torch.zeros((), device=iq.device)
        grads = [torch.zeros_like(part, dtype=torch.float32) for part in (iq, ik, iw) if wanted]
        for first in range(0, iq.shape[0], rows):
            block = slice(first, first + rows)
            with torch.set_grad_enabled(wanted):
                index = tuple(part.detach().float().requires_grad_(wanted) for part in (iq[block], ik, iw[block]))
                chosen = None if indices is None else indices[block]
                loss = _loss_of_chunk(index, queries[block], keys, (starts[block], ends[block]), scale, chosen)
            total += loss.detach()
            if wanted:
                for grad, part in zip(
                    (grads[0][block], grads[1], grads[2][block]), torch.autograd.grad(loss, index), strict=True
                ):
                    grad += part
        ctx.save_for_backward(*(grad.to(part.dtype) for grad, part in zip(grads, (iq, ik, iw), strict=False)))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        return *(grad * grad_outputs[0].to(grad.dtype) for grad in ctx.saved_tensors), *[None] * 7


def indexer_kl(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The indexer's loss KL(p[t, S] || softmax(I[t, S])) of every query (TR Eq. 3 and 4), fp32 [B, T].

    scores fp32 [B, T, T], target [B, T, T] (a distribution over the marked keys, 0 elsewhere), mask bool broadcastable
    to [B, T, T]: the set S, every visible key for Eq. 3 and the selected ones for Eq. 4. Gradient flows to scores only.
    """
    target = target.detach().float()
    log_probs = torch.log_softmax(scores.masked_fill(~mask, NEG_INF), dim=-1).masked_fill(~mask, 0.0)
    return (torch.xlogy(target, target) - target * log_probs).sum(dim=-1)
