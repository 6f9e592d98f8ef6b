"""What a step of an engine drew, on its way from a worker (`rollout.vllm_step`) to the scheduler (`vllm_recording`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from kernels.reference.draws import draws_in
from rl.sample import NDArray


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step's B requests, uint8 [R, W], from ``edges[i]`` to ``edges[i + 1]`` those of the tokens of
    request i from ``starts[i]`` on."""

    starts: NDArray
    edges: NDArray
    rows: NDArray


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew for B requests, and what went through the model for that."""

    sampled: NDArray  # bool [B], whether the request got a token
    token_ids: NDArray  # int32 [B], and the next one: of requests that got one
    logprobs: NDArray  # float32 [B]
    kept_sizes: NDArray | None  # int32 [B], 0 for the others, and where all was kept; None where it is not recorded
    kept_starts: NDArray  # int32 [B], where the ids of each lie among the next ones
    kept_ids: NDArray  # int32
    rows: StepRows | None = None

    @classmethod
    def of_table(
        cls,
        table: NDArray,
        num_rows: int,
        num_ids: int,
        rows: StepRows | None,
        whole: Callable[[int], NDArray] | None,
    ) -> Self:
        """``table``: of `kernels.record_draws`, of a vocabulary of ``num_ids``. ``whole``: all ids of a row that kept
        more than there is room for; None where kept sets are not recorded."""
        fields, ids = draws_in(table, num_rows)
        fields = np.ascontiguousarray(fields.T)
        sampled, starts, ids = fields[1] > 0, fields[4], ids[: table[0]]
        sizes = None
        if whole is not None:
            sizes = np.where(sampled & (fields[3] < num_ids), fields[3], 0).astype(np.int32)
            if (apart := np.flatnonzero((starts < 0) & (sizes > 0))).size:
                sets = [whole(row) for row in apart.tolist()]
                starts[apart] = len(ids) + np.cumsum(sizes[apart]) - sizes[apart]
                ids = np.concatenate([ids, *sets]).astype(np.int32)
        return cls(sampled, fields[0], fields[2].view(np.float32), sizes, starts, ids, rows)
