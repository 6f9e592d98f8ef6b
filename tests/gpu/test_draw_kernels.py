"""The table of a decode step's draws, at DeepSeek's vocabulary."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.draw_tables import check_draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 700, 100_000])
def test_draws_of_a_large_vocabulary(dtype: torch.dtype, top_k: int) -> None:
    torch.manual_seed(0)
    num_rows, num_ids, width = 64, 129_280, 2048
    logits = torch.randn(num_rows, num_ids, device="cuda").mul(3).to(dtype)
    logits.masked_fill_(logits < logits.topk(top_k, dim=1).values[:, -1:], float("-inf"))
    token_ids = logits.argmax(dim=1)
    num_sampled = (torch.arange(num_rows, device="cuda") % 5 > 0).int()
    found, meant = (of.record_draws(logits, token_ids, num_sampled, width) for of in (kernels, reference))
    check_draws(found, meant, num_sampled)
