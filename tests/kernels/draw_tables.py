"""Two tables of the same draws, one of which may have its rows' ids in any order."""

from __future__ import annotations

import torch

from kernels.reference.draws import draws_in


def check_draws(found: torch.Tensor, meant: torch.Tensor, num_sampled: torch.Tensor) -> None:
    assert found.shape == meant.shape and found[0] == meant[0]
    (rows, ids), (wanted, wanted_ids) = (draws_in(table.cpu(), len(num_sampled)) for table in (found, meant))
    counts = num_sampled.cpu() > 0
    assert torch.equal(rows[:, 1], wanted[:, 1]) and rows[~counts, 4].eq(-1).all()
    assert torch.equal(rows[counts][:, [0, 3]], wanted[counts][:, [0, 3]])
    logprobs, wanted_logprobs = (of[counts][:, 2].contiguous().view(torch.float32) for of in (rows, wanted))
    torch.testing.assert_close(logprobs, wanted_logprobs)
    taken = []
    for row, other in zip(rows[counts].tolist(), wanted[counts].tolist(), strict=True):
        assert (row[4] < 0) == (other[4] < 0)
        if row[4] >= 0:
            taken += range(row[4], row[4] + row[3])
            assert torch.equal(ids[row[4] : row[4] + row[3]], wanted_ids[other[4] : other[4] + other[3]])
    assert sorted(taken) == list(range(int(found[0])))
