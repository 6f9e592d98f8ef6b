"""What is worth keeping of a decode step's draws."""

from __future__ import annotations

from typing import TypeVar

import torch

DRAW_FIELDS = 5
"""Of a row: token, whether it counts, bits of its fp32 log-probability, how many ids were kept, and where they begin
among those of all rows: -1 where they are not among them."""

T = TypeVar("T")


def record_draws(
    logits: torch.Tensor, token_ids: torch.Tensor, num_sampled: torch.Tensor, width: int = 0
) -> torch.Tensor:
    """int32 [1 + B * (DRAW_FIELDS + width)]: how many ids there are, the fields of every row, and then the ids.

    The ids that a row was drawn from lie together, ascending; rows follow each other in any order. Of a row that kept
    more than ``width`` of them, or all, none are there.

    ``logits`` [B, V] are -inf at ids that were not kept, and give log-probabilities as they are; ``token_ids`` int64
    [B]; ``num_sampled`` int32 [B] is 0 where the token does not count: of such a row only that is defined, and that it
    has no ids.
    """
    values, kept = logits.float(), logits.isfinite()
    sizes = kept.sum(dim=1)
    there = (num_sampled > 0) & (sizes <= width) & (sizes < logits.shape[1])
    ends = (sizes * there).cumsum(dim=0)
    table = torch.zeros(1 + len(values) * (DRAW_FIELDS + width), dtype=torch.int32, device=logits.device)
    rows, ids = draws_in(table, len(values))
    rows[:, 0], rows[:, 1], rows[:, 3] = token_ids, num_sampled, sizes
    rows[:, 2] = values.log_softmax(dim=1).gather(1, token_ids[:, None]).squeeze(1).contiguous().view(torch.int32)
    rows[:, 4] = torch.where(there, ends - sizes, -1)
    found = kept[there].nonzero()[:, 1]
    ids[: len(found)] = found
    table[:1] = len(found)
    return table


def draws_in(table: T, num_rows: int) -> tuple[T, T]:
    """The fields of the rows, [B, DRAW_FIELDS], and the room for ids: of a table, or an array of it."""
    end = 1 + num_rows * DRAW_FIELDS
    return table[1:end].reshape(num_rows, DRAW_FIELDS), table[end:]  # pyright: ignore
