from __future__ import annotations

import math

import torch

from kernels import record_draws
from kernels.reference.draws import DRAW_FIELDS


def test_a_row_by_hand() -> None:
    none = float("-inf")
    logits = torch.tensor([[none, 1.0, none, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    table = record_draws(logits, torch.tensor([3, 1]), torch.tensor([1, 0], dtype=torch.int32), 2)
    assert table.dtype == torch.int32 and table.shape == (2, DRAW_FIELDS + 2)
    assert table[0, [0, 1, 3, 4, 5]].tolist() == [3, 1, 3, 1, 3]  # of ids 1, 3 and 4 two fit
    logprob = 2.0 - math.log(math.exp(1.0) + math.exp(2.0) + math.exp(0.5))
    torch.testing.assert_close(table[0, 2:3].view(torch.float32), torch.tensor([logprob]))
    assert table[1, 1] == 0
