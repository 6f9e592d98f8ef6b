"""Selection against sorting by hand: ties, bounds, padding, survivors of a floor and the walk for a large k."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import topk

# Few distinct values, so that ties are the rule; the two zeros are one score.
SCORE = st.sampled_from([-math.inf, -3.4028234663852886e38, -1e-40, -1.0, -0.0, 0.0, 1e-40, 1.0, 2.5, math.inf])


def by_hand(scores: torch.Tensor, k: int, starts: list[int], ends: list[int]) -> list[list[int]]:
    rows = []
    for row, start, end in zip(scores.tolist(), starts, ends, strict=True):
        inside = [index for index in range(start, end) if row[index] != -math.inf]
        if any(math.isnan(row[index]) for index in range(start, end)):
            inside = []
        best = sorted(sorted(inside, key=lambda index: (-row[index], index))[:k])
        rows.append(best + [-1] * (k - len(best)))
    return rows


@st.composite
def bounded_rows(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[int]]:
    width = draw(st.integers(1, 40))
    row = st.lists(SCORE, min_size=width, max_size=width)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    bounds = [sorted(draw(st.tuples(st.integers(0, width), st.integers(0, width)))) for _ in rows]
    return torch.tensor(rows), [start for start, _ in bounds], [end for _, end in bounds]


@settings(max_examples=15, deadline=None)
@given(case=bounded_rows(), k=st.integers(1, 12))
def test_any_row_and_bounds(case: tuple[torch.Tensor, list[int], list[int]], k: int) -> None:
    scores, starts, ends = case
    found = topk.bounded_topk(scores, k, torch.tensor(starts).int(), torch.tensor(ends).int())
    assert found.dtype == torch.int32
    assert found.tolist() == by_hand(scores, k, starts, ends)


def make_rows(kind: str, rows: int, width: int) -> torch.Tensor:
    random = np.random.default_rng(width)
    scores = {
        "gauss": lambda: random.normal(size=(rows, width)),
        "relu": lambda: np.maximum(random.normal(size=(rows, width, 8)) - 1, 0) @ random.normal(size=8),
        "ties": lambda: random.integers(-1, 2, size=(rows, width)),
        "equal": lambda: np.ones((rows, width)),
        "outlier": lambda: random.normal(size=(rows, width)) * np.where(np.arange(width) == 7, 1e30, 1e-30),
    }[kind]()
    return torch.from_numpy(np.asarray(scores, dtype=np.float32))


ONE_TILE, SURVIVORS, WALK = (130, 64), (900, 50), (1000, 500)


@pytest.mark.parametrize(
    ("size", "kind"),
    [(SURVIVORS, kind) for kind in ("gauss", "relu", "ties", "equal", "outlier")]
    + [(WALK, "ties"), (WALK, "outlier"), (ONE_TILE, "relu"), (ONE_TILE, "ties")],
    ids=str,
)
def test_rows_of_all_lengths(size: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of 256: one tile; survivors of a floor, too many of them among equal scores; a k beyond all tiles."""
    monkeypatch.setattr(topk, "MAX_TILE", 256)
    width, k = size
    scores = make_rows(kind, 3, width)
    starts, ends = [0, 5, 100], [width, width, 120]
    found = topk.bounded_topk(scores, k, torch.tensor(starts).int(), torch.tensor(ends).int())
    assert found.tolist() == by_hand(scores, k, starts, ends)


def test_a_floor_that_misses_is_corrected_or_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample decides how long it takes: one that is far off changes nothing."""
    monkeypatch.setattr(topk, "MAX_TILE", 256)
    scores = make_rows("gauss", 2, 700)
    wanted = topk.bounded_topk(scores, 100)
    for number in (20, 690):
        plan = topk.Plan(tile=256, wanted=number, sample=64, warps=1)
        monkeypatch.setattr(topk, "_plan", lambda *_, plan=plan: plan)
        assert torch.equal(topk.bounded_topk(scores, 100), wanted)


@pytest.mark.parametrize("width", [200, 900])
def test_a_nan_empties_its_row_from_inside_the_bounds_only(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "MAX_TILE", 256)
    scores = make_rows("gauss", 3, width)
    scores[0, 30] = math.nan
    scores[1, 30] = -torch.tensor(math.nan)
    starts, ends = [0, 31, 30], [width, width, 31]
    scores[2, 30] = -math.inf
    found = topk.bounded_topk(scores, 20, torch.tensor(starts).int(), torch.tensor(ends).int())
    assert found.tolist() == by_hand(scores, 20, starts, ends)
    assert found[0].tolist() == [-1] * 20 and found[2].tolist() == [-1] * 20 and int(found[1, 0]) > 30


def test_a_row_alone_and_how_long_the_caller_says_it_is_change_nothing() -> None:
    scores = make_rows("ties", 3, 300)
    starts, ends = torch.tensor([0, 10, 299]).int(), torch.tensor([90, 100, 300]).int()
    together = topk.bounded_topk(scores, 16, starts, ends)
    assert torch.equal(together, topk.bounded_topk(scores, 16, starts, ends, longest=90))
    alone = [topk.bounded_topk(scores[i : i + 1], 16, starts[i : i + 1], ends[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_indices_and_mask_have_the_shapes_of_the_reference() -> None:
    scores = make_rows("relu", 6, 33).view(2, 3, 33)
    for k in (5, 40):
        indices, mask = topk.topk_indices(scores, k), topk.topk_mask(scores, k)
        assert indices.dtype == torch.int64 and indices.shape == (2, 3, min(k, 33))
        rows = [index[index >= 0].tolist() for index in indices.flatten(0, 1)]
        assert [row.nonzero().flatten().tolist() for row in mask.flatten(0, 1)] == rows
    assert topk.topk_indices(scores[:0], 5).shape == (0, 3, 5)
