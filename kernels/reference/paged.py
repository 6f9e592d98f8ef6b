"""DeepSeek Sparse Attention against a paged cache, in plain torch: an engine's batch of rows from many sequences.

Shape letters: B sequences, R query rows in the order of the batch, W pages a sequence, J indexer heads, H heads, D
columns of a latent entry, k selected keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.reference.attention import decode_sparse_attention
from kernels.reference.indexer import paged_index_scores, topk_indices


def locate_rows(query_starts: torch.Tensor, lengths: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sequence each row of a batch belongs to, and how many of its keys the row sees.

    query_starts int32 [B + 1] rises from 0: rows query_starts[b] to query_starts[b + 1] are the last ones of sequence
    b, which has lengths[b] tokens with them; num_rows may be larger, and the rows beyond see nothing. Returns (owners
    int32 [num_rows], below B, seen int32 [num_rows], the row's own key included). Nothing waits for the device.
    """
    row = torch.arange(num_rows, dtype=query_starts.dtype, device=query_starts.device)
    owners = (torch.searchsorted(query_starts, row, right=True) - 1).clamp(0, lengths.shape[0] - 1)
    later = query_starts[owners + 1] - 1 - row
    seen = torch.where(row < query_starts[-1], lengths[owners] - later, 0).clamp(min=0)
    return owners.int(), seen.int()


def store_rows(pages: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes rows [R, D] into a cache [pages, page, D]: row r at offset slots[r] % page of page slots[r] // page.

    slots int64 [R]; a row with a negative one is not written. Slots that are written are all different.
    """
    kept = (slots >= 0).nonzero().squeeze(1)
    page = pages.shape[1]
    pages[slots[kept] // page, slots[kept] % page] = rows[kept].to(pages.dtype)


def select_paged_keys(
    queries: torch.Tensor,
    key_pages: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    owners: torch.Tensor,
    seen: torch.Tensor,
    k: int,
    longest: int | None = None,
) -> torch.Tensor:
    """The k keys of its own sequence that each row's index query scores highest.

    queries [R, J, d], key_pages [pages, page, d], weights [R, J], block_table int32 [B, W], owners and seen int32 [R]
    as `locate_rows` gives them; `longest` bounds seen, where the caller knows it. Returns int32 [R, k]: places in the
    row's sequence, ascending, then -1. A row's answer depends on its own keys alone, not on the batch.
    """
    del longest
    out = torch.full((queries.shape[0], k), -1, dtype=torch.int32, device=queries.device)
    scores = paged_index_scores(queries, key_pages, weights, block_table[owners.long()], seen)
    out[:, : min(k, scores.shape[1])] = topk_indices(scores, k).int()
    return out


def cache_rows(
    places: torch.Tensor, block_table: torch.Tensor, owners: torch.Tensor, page: int, apart: int
) -> torch.Tensor:
    """Where places in sequences lie in a paged cache: int32 [R, k] for places int32 [R, k], -1 for -1.

    Entries of a page lie one after another, and pages `apart` entries (at least `page`) from each other.
    """
    table = block_table[owners.long()].long()
    rows = table.gather(1, (places.clamp(min=0) // page).long()) * apart + places % page
    return torch.where(places >= 0, rows, -1).int()


def paged_sparse_attention(
    queries: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor, scale: float, value_dim: int
) -> torch.Tensor:
    """`decode_sparse_attention`'s output for any number of queries, in bounded memory: [R, H, value_dim].

    queries [R, H, D], cache [M, D], rows int32 [R, k] as `cache_rows` gives them. All rows go through the arithmetic of
    decoding, so that a row has the same bits in a prompt, in a chunk of one and in a decode step.
    """
    return decode_sparse_attention(queries, cache, rows, scale, value_dim)[0]


def rotate_heads(
    out: torch.Tensor, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> None:
    """Writes heads [R, H, D] to out of the same shape, their first r dims rotated by cos and sin fp32 [R, r / 2].

    The pairs are (x[i], x[i + r / 2]), or (x[2i], x[2i + 1]) where `interleaved`; the result lists all first members,
    then all second ones, as `model.rope.RotaryAngles` does.
    """
    half = cos.shape[1]
    turned, rest = heads[..., : 2 * half].float(), heads[..., 2 * half :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(heads.dtype)
    out.copy_(torch.cat([rotated, rest], dim=-1))


def project_in_fp32(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows [R, D] times weight [J, D] as `F.linear` does it, but in fp32: [R, J]. A row's bits do not depend on R."""
    return F.linear(rows.float(), weight.float())
