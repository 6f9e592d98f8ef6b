"""Sparse attention against a paged cache: plain torch over each sequence alone is the oracle."""

from __future__ import annotations

import pytest
import torch

from kernels import indexer, paged, reference
from model.rope import RotaryAngles

PAGE, APART = 5, 8
LENGTHS, ROWS = [17, 3, 30, 9], [4, 3, 1, 2]
"""Tokens of each sequence, and how many of the last ones are in the batch: a chunk, a whole prompt, decodes."""
HEADS, DIM, LATENT, INDEX_HEADS, INDEX_DIM, TOP_K = 3, 24, 16, 4, 16, 6


class Batch:
    """Four sequences on scattered pages, and two rows of padding behind them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.latents = [torch.randn(length, DIM) for length in LENGTHS]
        self.keys = [torch.randn(length, INDEX_DIM) for length in LENGTHS]
        pages = [-(-length // PAGE) for length in LENGTHS]
        order = torch.randperm(2 * sum(pages)).int()
        self.table = torch.full((len(LENGTHS), 8), 10**6, dtype=torch.int32)
        for row, count in enumerate(pages):
            self.table[row, :count], order = order[:count], order[count:]
        self.starts = torch.tensor([0, *torch.tensor(ROWS).cumsum(0).tolist()]).int()
        self.num_rows = sum(ROWS) + 2
        self.owner = [owner for owner, rows in enumerate(ROWS) for _ in range(rows)]
        self.seen = [LENGTHS[owner] - ROWS[owner] + 1 + place for owner in range(4) for place in range(ROWS[owner])]
        self.queries = torch.randn(self.num_rows, HEADS, DIM)
        self.index_queries = torch.randn(self.num_rows, INDEX_HEADS, INDEX_DIM)
        self.weights = torch.randn(self.num_rows, INDEX_HEADS)
        size = 2 * sum(pages)
        # As vLLM lays pages of several layers behind one another: what lies between is never to be read.
        self.cache = torch.full((size, APART, DIM), torch.nan)[:, :PAGE]
        self.key_pages = torch.full((size, PAGE, INDEX_DIM + 8), torch.nan)[..., :INDEX_DIM]

    def fill(self, implementation: object) -> None:
        for row, (latents, keys) in enumerate(zip(self.latents, self.keys, strict=True)):
            place = torch.arange(len(latents))
            slots = self.table[row].long()[place // PAGE] * PAGE + place % PAGE
            slots = torch.cat([slots, torch.tensor([-1])])
            for pages, entries in ((self.cache, latents), (self.key_pages, keys)):
                entries = torch.cat([entries, torch.full((1, entries.shape[1]), torch.nan)])
                implementation.store_rows(pages, slots, entries)  # type: ignore[attr-defined]

    def selected_by_hand(self, row: int) -> list[int]:
        keys = self.keys[self.owner[row]][: self.seen[row]].double()
        dots = (self.index_queries[row].double() @ keys.T).relu()
        scores = (self.weights[row].double()[:, None] * dots).sum(dim=0)
        return sorted(scores.topk(min(TOP_K, len(scores))).indices.tolist())

    def attended_by_hand(self, row: int, scale: float) -> torch.Tensor:
        entries = self.latents[self.owner[row]][self.selected_by_hand(row)].double()
        probs = (self.queries[row].double() @ entries.T * scale).softmax(dim=-1)
        return probs @ entries[:, :LATENT]


def test_where_rows_are() -> None:
    batch = Batch()
    owners, seen = reference.locate_rows(batch.starts, torch.tensor(LENGTHS).int(), batch.num_rows)
    assert owners.dtype == seen.dtype == torch.int32
    assert owners[:-2].tolist() == batch.owner and seen.tolist() == [*batch.seen, 0, 0]
    # As a CUDA graph pads: sequences without rows, of length 0.
    starts = torch.cat([batch.starts, batch.starts[-1:], batch.starts[-1:]])
    padded = reference.locate_rows(starts, torch.tensor([*LENGTHS, 0, 0]).int(), batch.num_rows)
    assert padded[0][:-2].tolist() == batch.owner and padded[1].tolist() == [*batch.seen, 0, 0]
    assert int(padded[0].max()) < 6


@pytest.mark.parametrize("longest", [None, max(LENGTHS)], ids=["captured", "known"])
@pytest.mark.parametrize("implementation", [paged, reference], ids=["triton", "torch"])
def test_a_batch_of_chunks_prompts_and_decodes(
    implementation: object, longest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch()
    batch.fill(implementation)
    if implementation is reference:  # it reads what it then leaves out
        batch.table.clamp_(max=len(batch.cache) - 1)
        batch.key_pages.nan_to_num_()
    owners, seen = reference.locate_rows(batch.starts, torch.tensor(LENGTHS).int(), batch.num_rows)
    monkeypatch.setattr(paged, "SCORES_LIMIT", 3 * 8 * PAGE)  # three rows at a time
    monkeypatch.setattr(paged, "_PARTIALS_LIMIT", 5 * 2 * HEADS * (LATENT + 1) * 4)
    monkeypatch.setattr(paged, "_SPLIT", 4)
    places = implementation.select_paged_keys(  # type: ignore[attr-defined]
        batch.index_queries, batch.key_pages, batch.weights, batch.table, owners, seen, TOP_K, longest
    )
    for row in range(len(batch.owner)):
        wanted = batch.selected_by_hand(row)
        assert places[row].tolist() == wanted + [-1] * (TOP_K - len(wanted))
    assert bool((places[-2:] == -1).all())

    cache = batch.cache.as_strided(((len(batch.cache) - 1) * APART + PAGE, DIM), (DIM, 1))
    rows = implementation.cache_rows(places, batch.table, owners, PAGE, APART)  # type: ignore[attr-defined]
    assert torch.equal(rows < 0, places < 0) and rows.dtype == torch.int32
    found = implementation.paged_sparse_attention(  # type: ignore[attr-defined]
        batch.queries, cache, rows, 0.3, LATENT
    )
    for row in range(len(batch.owner)):
        torch.testing.assert_close(found[row].double(), batch.attended_by_hand(row, 0.3), rtol=1e-5, atol=1e-5)
    assert bool((found[-2:] == 0).all())


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    batch = Batch()
    batch.fill(paged)
    owners, seen = reference.locate_rows(batch.starts, torch.tensor(LENGTHS).int(), batch.num_rows)
    cache = batch.cache.as_strided(((len(batch.cache) - 1) * APART + PAGE, DIM), (DIM, 1))

    def run(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        index = batch.index_queries[part], batch.key_pages, batch.weights[part], batch.table
        places = paged.select_paged_keys(*index, owners[part], seen[part], TOP_K)
        rows = paged.cache_rows(places, batch.table, owners[part], PAGE, APART)
        return places, paged.paged_sparse_attention(batch.queries[part], cache, rows, 0.3, LATENT)

    whole = run(slice(None))
    for row in (0, 3, 4, 7, 9, batch.num_rows - 1):
        alone = run(slice(row, row + 1))
        assert torch.equal(alone[0][0], whole[0][row]) and torch.equal(alone[1][0], whole[1][row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half split", "interleaved"])
@pytest.mark.parametrize(("heads", "dim", "rope"), [(3, 24, 8), (1, 6, 6), (5, 16, 16)], ids=str)
def test_rotated_heads_are_the_models(heads: int, dim: int, rope: int, interleaved: bool, dtype: torch.dtype) -> None:
    """Bit by bit what `RotaryAngles` gives, out of and into strided views."""
    torch.manual_seed(0)
    x, angles = torch.randn(11, heads, dim + 3).to(dtype)[..., 3:], 5 * torch.randn(11, rope // 2)
    cos, sin = angles.cos(), angles.sin()
    turn = RotaryAngles(cos.unsqueeze(0), sin.unsqueeze(0))
    rotate = turn.rotate_interleaved if interleaved else turn.rotate_half_split
    wanted = torch.cat([rotate(x[None, ..., :rope])[0], x[..., rope:]], dim=-1)
    for implementation in (paged, reference):
        out = torch.zeros(11, heads, 2 * dim, dtype=dtype)
        implementation.rotate_heads(out[..., dim:], x, cos, sin, interleaved=interleaved)
        assert not bool(out[..., :dim].any())
        if implementation is paged and dtype == torch.bfloat16:  # the interpreter cuts bits off instead of rounding
            torch.testing.assert_close(out[..., dim:], wanted, rtol=2**-7, atol=0)
        else:
            assert torch.equal(out[..., dim:], wanted)


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 64, 3), (18, 300, 24)], ids=str)
def test_projections_in_fp32(rows: int, depth: int, columns: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, depth + 5).bfloat16()[:, 5:], torch.randn(columns + 2, depth).bfloat16()[2:]
    wanted = x.double() @ weight.double().T
    found = paged.project_in_fp32(x, weight)
    for implementation in (paged, reference):
        again = implementation.project_in_fp32(x, weight)
        assert again.dtype == torch.float32
        torch.testing.assert_close(again.double(), wanted, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(paged.project_in_fp32(x[row : row + 1], weight)[0], found[row]) for row in range(0, rows, 5))


def test_scores_refuse_keys_in_pieces() -> None:
    pages = torch.zeros(2, 8, 4).transpose(1, 2)
    with pytest.raises(ValueError, match="in one piece"):
        paged.store_rows(pages, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="in one piece"):
        indexer.paged_index_scores(
            torch.zeros(1, 1, 8), pages, torch.zeros(1, 1), torch.zeros(1, 1).int(), torch.ones(1).int()
        )
