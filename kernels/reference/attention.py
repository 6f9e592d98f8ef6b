"""Attention over the keys that the indexer selects, in plain torch.

Shape letters: B sequences, Q queries, T keys, H heads, J indexer heads, k selected keys.
"TR" is the DeepSeek-V3.2 technical report (arXiv 2512.02556).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.utils.checkpoint import checkpoint

NEG_INF = float("-inf")

# Gathered keys that one block of queries may hold in `sparse_attention`, in elements.
_GATHER_LIMIT = 1 << 25

# Scores that one block of queries may hold in `packed_attention`, over all heads.
_SCORES_LIMIT = 1 << 25


def masked_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention of every head over the keys that `mask` allows: DSA's MHA mode.

    queries and keys [B, T, H, d], values [B, T, H, v], mask bool broadcastable to [B, T, T] with at least one key a
    row. The softmax is in fp32. Returns [B, T, H, v] in the dtype of the values.
    """
    probs = _attention_probs(queries, keys, mask, scale).to(values.dtype)
    return torch.matmul(probs, values.transpose(1, 2)).transpose(1, 2)


def mean_attention(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """The indexer's target p[t, :] (TR Eq. 3): `masked_attention`'s probabilities summed over heads and L1-normalised.

    Arguments as in `masked_attention`. Every head's row sums to 1, so the normalised sum is the mean. No gradient.
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


def packed_sparse_attention(
    queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sparse_attention` over packed rows, with the log-sum-exp of every head's scores.

    queries [N, H, D], keys [M, D] laid out [latent | rope key], indices int [N, K] into the keys, -1 for "none" at any
    place (ascending and -1 last is fastest); the values are the first `value_dim` columns of the keys. Returns (out
    [N, H, value_dim] in the dtype of the queries, lse fp32 [N, H] to base e, without gradient). A query without any
    index gets zeros and -inf. Blocks of queries are computed again in the backward pass, so memory does not grow with
    N * K.
    """
    block = max(1, _GATHER_LIMIT // max(1, indices.shape[1] * keys.shape[1]))
    parts = list(zip(queries.split(block), indices.split(block), strict=True))
    if len(parts) == 1:
        return _packed_sparse_block(queries, keys, indices, scale, value_dim)
    outs = [checkpoint(_packed_sparse_block, q, keys, i, scale, value_dim, use_reentrant=False) for q, i in parts]
    return torch.cat([out for out, _ in outs]), torch.cat([lse for _, lse in outs])


def decode_sparse_attention(
    queries: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    value_dim: int,
    *,
    split: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`packed_sparse_attention` without gradient, for few queries: `split` selected keys are one unit of parallel work.

    cache [M, D] may be a paged one: row page * page_size + offset, which is what the indices then hold. Arguments and
    results otherwise as in `packed_sparse_attention`.
    """
    assert split > 0
    with torch.no_grad():
        return packed_sparse_attention(queries, cache, indices, scale, value_dim)


def _packed_sparse_block(
    queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor, scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    absent = (indices < 0).unsqueeze(1)
    selected = keys.index_select(0, indices.clamp(min=0).flatten()).view(*indices.shape, keys.shape[1])
    scores = torch.matmul(queries * scale, selected.transpose(1, 2)).float().masked_fill(absent, NEG_INF)
    probs = scores.softmax(dim=-1).masked_fill(absent, 0.0)
    return torch.matmul(probs.to(keys.dtype), selected[..., :value_dim]), scores.detach().logsumexp(dim=-1)


def selection_bitmask(indices: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Selected keys as one bit each: int32 [N, ceil(num_keys / 32)], key s in bit s % 32 of word s // 32.

    indices int [N, K] below num_keys, none twice in a row, -1 for "none".
    """
    num_words = (num_keys + 31) // 32
    # Every key has a bit of its own, so adding is setting (bit 31 wraps around to the sign). -1 goes to a spare word.
    words = torch.zeros(indices.shape[0], num_words + 1, dtype=torch.int32, device=indices.device)
    word = torch.where(indices >= 0, indices // 32, num_words).long()
    bits = torch.bitwise_left_shift(torch.ones_like(indices, dtype=torch.int32), (indices % 32).int())
    return words.scatter_add_(1, word, bits)[:, :num_words].contiguous()


def packed_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    bitmask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention of every head within each packed sequence, to the keys that `bitmask` allows.

    queries and keys [N, H, d], values [N, H, v], cu_seqlens int [S + 1] rising from 0 to N. bitmask int32 [N, W] as
    `selection_bitmask` makes it, over places in a row's own sequence (missing words are 0); None allows every earlier
    key and the row's own. Returns (out [N, H, v], lse fp32 [N, H] to base e, without gradient); a row that may see
    nothing gets zeros and -inf. Blocks of queries are computed again in the backward pass, so memory does not grow
    with the square of the length.
    """
    outs, lses = [], []
    for start, end in pairwise(cu_seqlens.tolist()):
        block = max(1, _SCORES_LIMIT // max(1, queries.shape[1] * (end - start)))
        for first in range(start, end, block):
            last = min(first + block, end)
            allowed = torch.ones(last - first, last - start, dtype=torch.bool, device=keys.device).tril_(first - start)
            if bitmask is not None:
                allowed &= _unpacked(bitmask[first:last], last - start)
            part = queries[first:last], keys[start:last], values[start:last], allowed, scale
            if last - first == end - start:
                out, lse = _attention_block(*part)
            else:
                out, lse = checkpoint(_attention_block, *part, use_reentrant=False)
            outs.append(out)
            lses.append(lse)
    if not outs:
        return values.new_zeros(*queries.shape[:2], values.shape[2]), queries.new_zeros(queries.shape[:2]).float()
    return torch.cat(outs), torch.cat(lses)


def dense_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    longest: int,
) -> torch.Tensor:
    """`packed_attention` to all earlier keys, without the log-sum-exp: [N, H, v]. `longest` bounds the sequences."""
    return packed_attention(queries, keys, values, cu_seqlens, scale)[0]


def _unpacked(bitmask: torch.Tensor, num_keys: int) -> torch.Tensor:
    """bool [N, num_keys]."""
    places = torch.arange(num_keys, device=bitmask.device)
    words = torch.nn.functional.pad(bitmask, (0, max(0, (num_keys + 31) // 32 - bitmask.shape[1])))
    return (words[:, places // 32] >> (places % 32).int()) & 1 != 0


def _attention_block(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(queries.transpose(0, 1) * scale, keys.permute(1, 2, 0)).float()
    scores = scores.masked_fill(~allowed, NEG_INF)
    probs = scores.softmax(dim=-1).masked_fill(~allowed, 0.0)
    out = torch.matmul(probs.to(values.dtype), values.transpose(0, 1)).transpose(0, 1)
    return out, scores.detach().logsumexp(dim=-1).transpose(0, 1)
