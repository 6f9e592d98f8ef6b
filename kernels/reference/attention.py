"""Attention over the keys that the indexer selects, in plain torch.

Shape letters: B sequences, Q queries, T keys, H heads, J indexer heads, k selected keys.
"TR" is the DeepSeek-V3.2 technical report (arXiv 2512.02556).
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

NEG_INF = float("-inf")

# Gathered keys that one block of queries may hold in `sparse_attention`, in elements.
_GATHER_LIMIT = 1 << 25


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
