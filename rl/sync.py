"""Publishing weights: learner -> engines, versioned and verified at every update.

The check compares a checksum of every tensor the engines now run with the learner's own. A silent mismatch between the
two is the most expensive bug an RL run can have, so a difference stops the run with the tensor's name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rl.errors import RunStopped
from rollout.pool import EnginePool
from trainer.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """What one update moved."""

    version: int
    num_bytes: int
    seconds: float
    num_tensors: int

    def metrics(self) -> dict[str, float]:
        return {"sync/version": self.version, "sync/bytes": self.num_bytes, "sync/verified": 1.0}


async def publish(learner: Learner, pool: EnginePool, version: int) -> Sync:
    """Moves the learner's weights into every engine as ``version`` and proves that they arrived.

    Raises:
        RunStopped: an engine's live tensor differs from the learner's; names the engine and the tensor.
    """
    began = time.perf_counter()
    buckets = await learner.weight_buckets()
    _, expected = await asyncio.gather(pool.stage(buckets.refs), learner.checksums())
    engine_sums = await pool.commit(version)
    for engine, sums in enumerate(engine_sums):
        verify(expected, sums, place=f"engine {engine}", version=version)
    return Sync(
        version=version,
        num_bytes=buckets.num_bytes,
        seconds=time.perf_counter() - began,
        num_tensors=len(expected),
    )


def verify(expected: Mapping[str, int], actual: Mapping[str, int], *, place: str, version: int) -> None:
    """Compares two sets of checksums and names the first tensor that differs or is missing."""
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            what = "differs" if name in expected and name in actual else "is on one side only"
            raise RunStopped(f"weights of version {version} did not arrive intact: {name} {what} in {place}")
