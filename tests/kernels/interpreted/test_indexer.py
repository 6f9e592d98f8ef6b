"""The indexer's kernels against their definitions in fp64, at sizes that divide nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import indexer, reference

FP8 = torch.float8_e4m3fn


def turned_by_hand(heads: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Pairs as complex numbers, fp64."""
    rope = 2 * angles.shape[1]
    out = heads.double().clone()
    pairs = out[..., :rope].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    turn = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double()).unsqueeze(1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    out[..., :rope] = (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
    return out


def hadamard_by_hand(dim: int) -> torch.Tensor:
    signs = [[(-1) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(dim)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half split", "interleaved"])
@pytest.mark.parametrize("hadamard", [False, True], ids=["plain", "hadamard"])
@pytest.mark.parametrize(("heads", "dim", "rope"), [(5, 32, 8), (1, 128, 64), (3, 24, 24)], ids=str)
def test_what_the_codes_stand_for(heads: int, dim: int, rope: int, hadamard: bool, interleaved: bool) -> None:
    torch.manual_seed(0)
    tokens = 9
    x = torch.randn(tokens, heads, dim) * torch.exp(4 * torch.randn(tokens, heads, 1))
    x[0] = 0
    angles = 3 * torch.randn(tokens, rope // 2)
    weights = torch.randn(tokens, heads)
    inputs = (x, angles.cos(), angles.sin(), weights)
    if hadamard and dim == 24:
        for implementation in (indexer, reference):
            with pytest.raises(ValueError, match="power of two, not 24"):
                implementation.quantise_index_heads(*inputs)
        return
    wanted = turned_by_hand(x, angles, interleaved)
    wanted = wanted @ hadamard_by_hand(dim) if hadamard else wanted
    for implementation in (indexer, reference):
        codes, folded = implementation.quantise_index_heads(*inputs, interleaved=interleaved, hadamard=hadamard)
        assert codes.dtype == FP8
        _, scales = implementation.quantise_index_heads(*inputs[:3], interleaved=interleaved, hadamard=hadamard)
        assert torch.equal(folded, weights * scales)
        amax = wanted.abs().amax(dim=-1).clamp(min=1e-4)
        assert torch.equal(scales.log2(), scales.log2().round())
        assert bool((amax <= 448.001 * scales).all()) and bool((amax > 223.999 * scales).all())
        # Half a unit in the last place: 1/16 of the value, 2 ** -10 of the scale below the normal numbers.
        error = (codes.double() * scales.unsqueeze(-1) - wanted).abs()
        bound = torch.maximum(wanted.abs() / 16, scales.unsqueeze(-1) * 2**-10)
        assert bool((error <= bound * 1.001).all())


def test_bfloat16() -> None:
    """The interpreter cuts off bits where a GPU rounds to bfloat16; tests/gpu compares the codes themselves."""
    torch.manual_seed(0)
    heads, angles = torch.randn(20, 4, 128).bfloat16(), torch.randn(20, 32)
    for hadamard in (False, True):
        codes, scales = indexer.quantise_index_heads(heads, angles.cos(), angles.sin(), hadamard=hadamard)
        wanted = turned_by_hand(heads, angles, False)
        wanted = wanted @ hadamard_by_hand(128) if hadamard else wanted
        error = codes.double() * scales.unsqueeze(-1) - wanted
        assert float(error.norm() / wanted.norm()) < 0.03


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(-448, 448, width=32), min_size=16, max_size=16))
def test_rounding_is_torch_s(values: list[float]) -> None:
    """A first entry of 448 makes the scale 1, so that the codes are the entries themselves."""
    heads = torch.tensor([448.0, *values[1:]]).view(1, 1, 16)
    flat = torch.zeros(1, 4)
    codes, scale = indexer.quantise_index_heads(heads, flat + 1, flat, hadamard=False)
    assert float(scale) == 1.0
    assert torch.equal(codes.float(), heads.to(FP8).float())


def test_every_code_and_every_midpoint() -> None:
    codes = torch.arange(256).byte().view(FP8).float()
    codes = codes[~codes.isnan()].sort().values.unique()
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1])])
    rows = torch.nn.functional.pad(values, (0, -len(values) % 15)).view(-1, 15)
    heads = torch.nn.functional.pad(rows, (1, 0), value=448.0).unsqueeze(1)
    flat = torch.zeros(len(heads), 4)
    found, _ = indexer.quantise_index_heads(heads, flat + 1, flat, hadamard=False)
    assert torch.equal(found.float(), heads.to(FP8).float())


@pytest.mark.parametrize("implementation", [indexer, reference], ids=["triton", "reference"])
def test_a_magnitude_on_the_boundary_of_two_scales(implementation) -> None:
    """448 * 2 ** e takes 2 ** e, the next larger number 2 ** (e + 1): for bfloat16, whose numbers are few, too."""
    exponents = torch.arange(-20, 20)
    for dtype in (torch.float32, torch.bfloat16):
        on = torch.ldexp(torch.tensor(448.0), exponents)
        above = on.to(dtype).nextafter(torch.tensor(math.inf, dtype=dtype))
        for magnitudes, wanted in ((on.to(dtype), exponents), (above, exponents + 1)):
            heads, flat = torch.zeros(len(magnitudes), 1, 16, dtype=dtype), torch.zeros(len(magnitudes), 4)
            heads[:, 0, 11] = magnitudes
            _, scales = implementation.quantise_index_heads(heads, flat + 1, flat, hadamard=False)
            assert scales.log2().flatten().tolist() == wanted.tolist()


def test_a_nan_is_not_hidden() -> None:
    heads, flat = torch.randn(3, 2, 32), torch.zeros(3, 4)
    heads[1, 1, 20] = math.nan
    for hadamard in (False, True):
        for implementation in (indexer, reference):
            codes, scales = implementation.quantise_index_heads(heads, flat + 1, flat, hadamard=hadamard)
            values = codes.float() * scales.unsqueeze(-1)
            assert values.isnan().any(dim=-1).tolist() == [[False, False], [False, True], [False, False]]


def scores_by_hand(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    dots = torch.einsum("njd,md->njm", q.double(), k.double()).relu()
    scores = (dots * w.double().unsqueeze(-1)).sum(dim=1)
    return scores if scales is None else scores * scales.double()


def assert_scores(found: torch.Tensor, wanted: torch.Tensor, seen: torch.Tensor) -> None:
    assert bool((found[~seen] == -math.inf).all())
    torch.testing.assert_close(found[seen].double(), wanted[seen], rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def make(
    rows: int, keys: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(rows)
    scales = torch.rand(keys) + 0.5 if dtype == FP8 else None
    return torch.randn(rows, heads, dim).to(dtype), torch.randn(keys, dim).to(dtype), torch.randn(rows, heads), scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(("heads", "dim"), [(3, 24), (64, 128)], ids=str)
def test_packed_and_paged_scores(heads: int, dim: int, dtype: torch.dtype) -> None:
    rows, num_keys, page = 11, 130, 13
    q, k, w, scales = make(rows, num_keys, heads, dim, dtype)
    starts = torch.tensor([0, 0, 0, 5, 5, 100, 130, 7, 60, 0, 0]).int()
    ends = torch.tensor([1, 0, 130, 6, 77, 129, 130, 3, 61, 64, 65]).int()
    column = torch.arange(num_keys)
    seen = (column >= starts[:, None]) & (column < ends[:, None])
    wanted = scores_by_hand(q, k, w, scales)
    for implementation in (indexer, reference):
        assert_scores(implementation.packed_index_scores(q, k, w, starts, ends, scales), wanted, seen)

    # The same keys on pages in another order; slots of a page lie further apart than a key is long.
    order = torch.randperm(num_keys // page)
    bits = torch.uint8 if dtype == FP8 else dtype
    pages = torch.zeros(num_keys // page, page, dim + 8).to(dtype)[..., :dim]
    pages.view(bits)[order] = k.view(bits).view(-1, page, dim)
    page_scales = None
    if scales is not None:
        page_scales = torch.zeros(num_keys // page, page)
        page_scales[order] = scales.view(-1, page)
    table = order.int().unsqueeze(0)
    for implementation in (indexer, reference):
        found = implementation.paged_index_scores(q, pages, w, table, ends, page_scales)
        assert_scores(found, wanted, column < ends[:, None])


def test_scores_of_several_sequences_behind_one_mask() -> None:
    torch.manual_seed(0)
    q, k, w = torch.randn(2, 5, 3, 16), torch.randn(2, 37, 16), torch.randn(2, 5, 3)
    visible = torch.rand(2, 5, 37) < 0.7
    found = indexer.indexer_scores(q, k, w, visible)
    for row in range(2):
        assert_scores(found[row], scores_by_hand(q[row], k[row], w[row], None), visible[row])
    assert indexer.indexer_scores(q.requires_grad_(), k, w).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
def test_selection_in_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three packed sequences; the chunks have four rows here, and a single one in the reference."""
    lengths, k = [13, 1, 30], 6
    rows = sum(lengths)
    q, keys, w, scales = make(rows, rows, 4, 32, dtype)
    starts = torch.repeat_interleave(torch.tensor([0, 13, 14]), torch.tensor(lengths)).int()
    ends = torch.arange(1, rows + 1).int()
    scores = scores_by_hand(q, keys, w, scales)
    wanted = []
    for row in range(rows):
        inside = range(int(starts[row]), int(ends[row]))
        best = sorted(sorted(inside, key=lambda key, row=row: (-float(scores[row, key]), key))[:k])
        wanted.append(best + [-1] * (k - len(best)))
    monkeypatch.setattr(indexer, "SCORES_LIMIT", 4 * rows)
    monkeypatch.setattr("kernels.reference.indexer.SCORES_LIMIT", 1)
    for implementation in (indexer, reference):
        found = implementation.select_keys(q, keys, w, starts, ends, k, scales, longest=30)
        assert found.dtype == torch.int32
        assert found.tolist() == wanted
