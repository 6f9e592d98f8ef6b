"""What a step of an engine drew, on its way from a worker (`rollout.vllm_step`) to the scheduler (`vllm_recording`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from kernels.reference.draws import DRAW_FIELDS
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
    kept_ids: NDArray  # int32 [sum of kept_sizes]
    rows: StepRows | None = None

    @classmethod
    def of_table(
        cls, table: NDArray, num_ids: int, rows: StepRows | None, whole: Callable[[int], NDArray] | None
    ) -> Self:
        """``table``: of `kernels.record_draws`, of a vocabulary of ``num_ids``. ``whole``: all ids of a row that kept
        more than fit there; None where kept sets are not recorded."""
        sampled = table[:, 1] > 0
        ids = np.zeros(0, np.int32)
        sizes = None
        if whole is not None:
            sizes = np.where(sampled & (table[:, 3] < num_ids), table[:, 3], 0).astype(np.int32)
            ids = _kept_ids(table[:, DRAW_FIELDS:], sizes, whole)
        return cls(sampled, table[:, 0].copy(), table[:, 2].copy().view(np.float32), sizes, ids, rows)


def _kept_ids(table: NDArray, sizes: NDArray, whole: Callable[[int], NDArray]) -> NDArray:
    widest = sizes.max(initial=0)
    if widest > table.shape[1]:
        parts = [whole(row) if size > table.shape[1] else table[row, :size] for row, size in enumerate(sizes.tolist())]
        return np.concatenate(parts).astype(np.int32)
    return table[:, :widest][np.arange(widest) < sizes[:, None]]
