"""Publishing weights: learner -> engines, versioned and verified at every update.

The check compares a checksum of every tensor the engines now run with the learner's own. A silent mismatch between the
two is the most expensive bug an RL run can have, so a difference stops the run with the tensor's name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from rl.config import EngineKind, Placement, Recipe
from rl.errors import RunStopped, UserError
from rollout.pool import EnginePool
from trainer.learner import Learner
from trainer.sender import Sent

STANDSTILL_S = 300.0
"""How long a sender or receiver waits for the next bucket to move before it gives up."""
UPDATE_S = 1800.0
"""How long an update may take altogether."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """What one update moved."""

    version: int
    num_bytes: int
    seconds: float
    checksums: Mapping[str, int]  # of every tensor, alike on both sides
    memory_gb: dict[str, float] = field(default_factory=dict)  # most reserved on a GPU, by who reserved it

    @property
    def num_tensors(self) -> int:
        return len(self.checksums)

    def metrics(self) -> dict[str, float]:
        memory = {f"memory/{who}_gb": size for who, size in self.memory_gb.items()}
        return {"sync/version": self.version, "sync/bytes": self.num_bytes, "sync/verified": 1.0, **memory}


class Transport(Protocol):
    """The way that weights take from the learner into every engine, where they wait for a commit."""

    @property
    def pool(self) -> EnginePool: ...

    async def send(self) -> Sent:
        """Sends the learner's current weights; returns what was sent."""
        ...

    async def memory_gb(self) -> dict[str, float]:
        """The most that learner ranks and engines have reserved on a GPU; empty without GPUs."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Through Ray's object store, for engines that need not be on a GPU; they take buckets in while they generate."""

    learner: Learner
    pool: EnginePool

    async def send(self) -> Sent:
        buckets = await self.learner.weight_buckets()
        await self.pool.stage(buckets.refs)
        return buckets.sent

    async def memory_gb(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True, slots=True)
class Broadcast:
    """From learner rank 0 to all workers of all engines at once, GPU to GPU. :meth:`connect` makes one."""

    learner: Learner
    pool: EnginePool

    @classmethod
    async def connect(cls, learner: Learner, pool: EnginePool) -> Broadcast:
        host, port = await learner.open_transfer()
        size = 1 + pool.num_workers
        await together(
            learner.join_transfer(host, size=size, timeout_s=STANDSTILL_S),
            pool.join_transfer(host, port, size=size, timeout_s=STANDSTILL_S),
        )
        return cls(learner, pool)

    async def send(self) -> Sent:
        await self.pool.begin_update()
        sent, _ = await together(self.learner.send_weights(), self.pool.receive())
        return sent

    async def memory_gb(self) -> dict[str, float]:
        return await memory_of(self.learner, self.pool)


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Every rank offers its buckets to the engine worker on the same GPU, which reads them there."""

    learner: Learner
    pool: EnginePool

    async def send(self) -> Sent:
        await self.pool.begin_update()
        offer = await self.learner.offer_weights(first=True)
        while not isinstance(offer, Sent):
            # The next bucket is put together while engines load this one.
            offer, _ = await together(self.learner.offer_weights(first=False), self.pool.receive(asdict(offer)))
        return offer

    async def memory_gb(self) -> dict[str, float]:
        return await memory_of(self.learner, self.pool)


async def connect(recipe: Recipe, learner: Learner, pool: EnginePool) -> Transport:
    """The transport that fits the recipe's engines and placement."""
    if recipe.rollout.engine != EngineKind.vllm:
        return ObjectStore(learner, pool)
    if recipe.placement == Placement.shared:
        return SharedMemory(learner, pool)
    return await Broadcast.connect(learner, pool)


async def publish(transport: Transport, version: int) -> Sync:
    """Moves the learner's weights into every engine as ``version`` and proves that they arrived.

    Raises:
        RunStopped: an engine's live tensor differs from the learner's, which it names with the engine; or the weights
            did not come through at all.
    """
    began = time.perf_counter()
    try:
        async with asyncio.timeout(UPDATE_S):
            sent = await transport.send()
            engine_sums = await transport.pool.commit(version)
    except UserError:
        raise
    except TimeoutError as error:
        raise RunStopped(f"weights of version {version} did not reach the engines within {UPDATE_S:.0f} s") from error
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunStopped(f"weights of version {version} did not reach the engines: {reason}") from error
    for engine, sums in enumerate(engine_sums):
        verify(sent.checksums, sums, place=f"engine {engine}", version=version)
    return Sync(
        version=version,
        num_bytes=sent.num_bytes,
        seconds=time.perf_counter() - began,
        checksums=sent.checksums,
        memory_gb=await transport.memory_gb(),
    )


def verify(expected: Mapping[str, int], actual: Mapping[str, int], *, place: str, version: int) -> None:
    """Compares two sets of checksums and names the first tensor that differs or is missing."""
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            what = "differs" if name in expected and name in actual else "is on one side only"
            raise RunStopped(f"weights of version {version} did not arrive intact: {name} {what} in {place}")


async def memory_of(learner: Learner, pool: EnginePool) -> dict[str, float]:
    of_learner, of_engine = await together(learner.peak_memory_gb(), pool.peak_memory_gb())
    return {"learner": of_learner, "engine": of_engine}


async def together(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Both results. When one side fails, its exception at once: the other may be waiting for it for ever."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
