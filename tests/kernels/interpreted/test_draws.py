"""The kernel that records a decode step's draws, against its meaning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import draws, reference
from tests.kernels.draw_tables import check_draws


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_BLOCK", 16)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    num_ids=st.integers(1, 70),
    width=st.integers(0, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_is_what_was_drawn_and_of_what(seed: int, num_ids: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_rows = 4
    # Rows of a wider tensor, as vocabularies are padded.
    logits = torch.randn(num_rows, num_ids + 3, generator=generator).mul(3).to(dtype)[:, :num_ids]
    token_ids = torch.randint(num_ids, (num_rows,), generator=generator)
    left_out = torch.rand(num_rows, num_ids, generator=generator) < 0.6
    left_out[torch.arange(num_rows), token_ids] = False
    logits.masked_fill_(left_out, float("-inf"))
    assert logits.stride(0) == num_ids + 3
    num_sampled = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
    found, meant = (of.record_draws(logits, token_ids, num_sampled, width) for of in (draws, reference))
    check_draws(found, meant, num_sampled)
