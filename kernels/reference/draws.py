"""What is worth keeping of a decode step's draws."""

from __future__ import annotations

import torch

DRAW_FIELDS = 4
"""Of a row of the table: token, whether it counts, bits of its fp32 log-probability, and how many ids were kept."""


def record_draws(
    logits: torch.Tensor, token_ids: torch.Tensor, num_sampled: torch.Tensor, width: int = 0
) -> torch.Tensor:
    """int32 [B, 4 + width]: of each row its DRAW_FIELDS, and the first ``width`` ids that it was drawn from, ascending.

    ``logits`` [B, V] are -inf at ids that were not kept, and give log-probabilities as they are; ``token_ids`` int64
    [B]; ``num_sampled`` int32 [B] is 0 where the token does not count: of such a row only that is defined, and of every
    row only as many ids as it kept.
    """
    values = logits.float()
    logprobs = values.log_softmax(dim=1).gather(1, token_ids[:, None])
    kept = values.isfinite()
    table = torch.zeros(len(values), DRAW_FIELDS + width, dtype=torch.int32, device=logits.device)
    table[:, 0], table[:, 1], table[:, 3] = token_ids, num_sampled, kept.sum(dim=1)
    table[:, 2:3] = logprobs.contiguous().view(torch.int32)
    rows, ids = kept.nonzero(as_tuple=True)
    places = kept.cumsum(dim=1)[rows, ids] - 1
    fits = places < width
    table[rows[fits], DRAW_FIELDS + places[fits]] = ids[fits].int()
    return table
