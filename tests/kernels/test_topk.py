from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import topk_indices, topk_mask

NEG_INF = float("-inf")

# Few distinct values, so that ties, at the boundary too, are the rule; both zeros are the same score.
SCORE = st.sampled_from([NEG_INF, -3.4028234663852886e38, -1.0, -0.0, 0.0, 1.0, 2.5])


@st.composite
def score_rows(draw: st.DrawFn) -> list[list[float]]:
    num_keys = draw(st.integers(1, 12))
    row = st.lists(SCORE, min_size=num_keys, max_size=num_keys)
    return draw(st.lists(row, min_size=1, max_size=4))


def topk_by_hand(row: list[float], k: int) -> list[int]:
    candidates = [index for index, score in enumerate(row) if score != NEG_INF]
    return sorted(sorted(candidates, key=lambda index: (-row[index], index))[:k])


@settings(max_examples=300, deadline=None)
@given(rows=score_rows(), k=st.integers(1, 14))
def test_ties_go_to_the_lowest_index_and_the_rest_is_padding(rows: list[list[float]], k: int) -> None:
    scores = torch.tensor(rows)
    wanted = [topk_by_hand(row, k) for row in rows]
    width = min(k, scores.shape[1])
    indices = topk_indices(scores, k)
    assert indices.dtype == torch.long
    assert indices.tolist() == [row + [-1] * (width - len(row)) for row in wanted]
    assert [mask.nonzero().flatten().tolist() for mask in topk_mask(scores, k)] == wanted


def test_leading_dimensions_are_kept() -> None:
    scores = torch.randn(2, 3, 4, 9)
    assert topk_indices(scores, 4).shape == (2, 3, 4, 4)
    assert torch.equal(topk_mask(scores, 4)[1, 2], topk_mask(scores[1, 2], 4))
    without_ties = scores.topk(4, dim=-1).indices.sort(dim=-1).values
    assert torch.equal(topk_indices(scores, 4), without_ties)


def test_a_nan_is_not_hidden() -> None:
    """A row with NaN selects nothing, so that attention over it is NaN and the loss says so."""
    scores = torch.tensor([[1.0, float("nan"), 2.0, 3.0], [1.0, 4.0, 2.0, 3.0]])
    assert topk_mask(scores, 2).tolist() == [[False] * 4, [False, True, False, True]]
