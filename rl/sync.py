"""Publishing weights: learner -> engines, versioned and verified at every update.

The check compares a checksum of every tensor the engines now run with the learner's own. A silent mismatch between the
two is the most expensive bug an RL run can have, so a difference stops the run with the tensor's name.

An engine that died comes back in the same way (:class:`Publisher`), and an update is over when every engine that lived
through it is on the new version.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from model.transport import abandon
from rl.choices import EngineKind, Placement
from rl.config import Recipe
from rl.errors import RunStopped, UserError, first_line
from rl.timeline import Timeline
from rollout.engine import EngineDied
from rollout.pool import EnginePool, Start
from trainer.learner import Learner
from trainer.sender import Sent

STANDSTILL_S = 300.0
"""How long a sender or receiver waits for the next bucket to move before it gives up."""
SETTLE_S = 15.0
"""How long everybody may take to say what happened, once one of them has failed."""
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


EngineSums = dict[int, dict[str, int]]
"""Checksums of all live tensors, by the engine's number."""


class Transport(Protocol):
    """The way that weights take from the learner into engines."""

    @property
    def learner(self) -> Learner: ...

    @property
    def pool(self) -> EnginePool: ...

    async def update(self, version: int, engines: Sequence[int]) -> tuple[Sent, EngineSums]:
        """Puts the learner's current weights into effect, as ``version``, in the engines of these numbers.

        Returns what was sent, and what engines hold now. One that dies of it is not among them: it is the pool's to
        start again, and holds up nobody.
        """
        ...

    async def memory_gb(self) -> dict[str, float]:
        """The most that learner ranks and engines have reserved on a GPU; empty without GPUs."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Through Ray's object store, for engines that need not be on a GPU; they take buckets in while they generate."""

    learner: Learner
    pool: EnginePool

    async def update(self, version: int, engines: Sequence[int]) -> tuple[Sent, EngineSums]:
        buckets = await self.learner.weight_buckets()
        await self.pool.stage(buckets.refs, engines)
        return buckets.sent, await self.pool.commit(version, engines)

    async def memory_gb(self) -> dict[str, float]:
        return {}


class Broadcast:
    """From learner rank 0 to all workers of engines at once, GPU to GPU, in a group made anew for other engines.

    Of engines that are to join a group one may die: the others, who have not been written yet, make one without it.
    A broadcast that an engine does not live through leaves others half written, and vLLM cannot begin again there:
    they are started again too, and get the weights when they are back.
    """

    def __init__(self, learner: Learner, pool: EnginePool) -> None:
        self.learner = learner
        self.pool = pool
        self._members: tuple[Any, ...] = ()
        self._address: tuple[str, int] = "", 0

    async def update(self, version: int, engines: Sequence[int]) -> tuple[Sent, EngineSums]:
        engines, sums = await self._connected(engines), {}

        async def take(engine: int) -> None:
            self._check_members([engine])
            sums[engine] = await self.pool.take_broadcast(version, engine)

        try:
            if engines:
                # The first buckets are made ready while engines are.
                sent, *_ = await self._together(self.learner.send_weights(), *map(take, engines))
                return sent, sums
        except EngineDied as death:
            members, self._members = set(self._members), ()
            half = [engine for engine in engines if engine not in sums]
            left = [engine for engine in half if members.issuperset(self.pool.membership([engine]))]
            self.pool.restart(left, f"its update broke off when {death}")
        except BaseException:
            self._members = ()  # of no use any more, whatever broke it
            raise
        return Sent(num_bytes=0, checksums=await self.learner.checksums()), sums

    async def _connected(self, engines: Sequence[int]) -> Sequence[int]:
        """Those of ``engines`` that are in a group with the learner now; others died meanwhile."""
        while engines:
            try:
                await self._connect(engines)
                return engines
            except EngineDied:  # nothing is half written yet: the others meet again
                self._members = ()
                engines = [engine for engine in engines if engine in self.pool.present]
        return engines

    async def _connect(self, engines: Sequence[int]) -> None:
        """Makes the group of the learner and the processes that ``engines`` have now, if it is not there."""
        members = self.pool.membership(engines)
        if members == self._members:
            return
        self._members = ()  # the learner leaves the last group when it opens another
        self._address = await self.learner.open_transfer()
        host, port = self._address
        size, timeout_s = 1 + self.pool.num_workers(engines), STANDSTILL_S
        joining = (
            self.pool.join_transfer(
                engine,
                host=host,
                port=port,
                first_rank=1 + self.pool.num_workers(engines[:place]),
                size=size,
                timeout_s=timeout_s,
            )
            for place, engine in enumerate(engines)
        )
        await self._together(self.learner.join_transfer(host, size=size, timeout_s=timeout_s), *joining)
        self._members = members
        self._check_members(engines)

    def _check_members(self, engines: Sequence[int]) -> None:
        """Raises EngineDied when a process of the group is not there any more: the others would wait for it."""
        if not set(self.pool.membership(engines)).issubset(self._members):
            raise EngineDied("an engine of the group died")

    async def _together(self, *parts: Coroutine[Any, Any, Any]) -> list[Any]:
        """What the parties of the group return. When one fails, the others are told to wait no longer.

        Raises what failed first, or the death of an engine, which is the cause of what else fails then.
        """
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            errors = _errors(done)
            if errors:
                await asyncio.to_thread(abandon, *self._address)
                done, _ = await asyncio.wait(tasks, timeout=SETTLE_S)
                errors += _errors(done)
            for error in sorted(errors, key=lambda error: not isinstance(error, EngineDied)):
                raise error
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def memory_gb(self) -> dict[str, float]:
        return await memory_of(self.learner, self.pool)


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Every rank offers its weights, or bucket after bucket of them, to the engine worker on the same GPU.

    So an engine that dies of it does the others no harm.
    """

    learner: Learner
    pool: EnginePool

    async def update(self, version: int, engines: Sequence[int]) -> tuple[Sent, EngineSums]:
        try:
            offer, _ = await together(self.learner.offer_weights(first=True), self.pool.begin_update(engines))
            while not isinstance(offer, Sent):
                # What comes next, a bucket or the sums, is put together while engines load this.
                offer, _ = await together(
                    self.learner.offer_weights(first=False), self.pool.receive(asdict(offer), engines)
                )
        except Exception:
            with contextlib.suppress(Exception):  # what went wrong first says more
                await self.learner.drop_offer()
            raise
        return offer, await self.pool.commit(version, engines)

    async def memory_gb(self) -> dict[str, float]:
        return await memory_of(self.learner, self.pool)


def transport_for(recipe: Recipe, learner: Learner, pool: EnginePool) -> Transport:
    """The one that fits the recipe's engines and placement."""
    if recipe.rollout.engine != EngineKind.vllm:
        return ObjectStore(learner, pool)
    if recipe.placement == Placement.shared:
        return SharedMemory(learner, pool)
    return Broadcast(learner, pool)


class Publisher:
    """Keeps engines on the learner's weights: all of them at every step, and one when it comes back.

    The learner takes turns: from :meth:`hold` until its weights are published it is the run's, and its weights are no
    version that engines know. An engine that is started meanwhile waits, and gets them in that update, or else in one
    of its own. Where it shares the learner's GPUs it is also started only then, while the learner sleeps.
    """

    def __init__(self, transport: Transport, *, shared: bool = False, timeline: Timeline | None = None) -> None:
        self.transport = transport
        self.version: int | None = None  # of the learner's weights, unless they are held; None before the first
        self._shared = shared
        self._timeline = timeline or Timeline()
        self._turn = asyncio.Lock()
        self._held = False
        transport.pool.welcome = self.welcome

    async def hold(self) -> None:
        """Begins the learner's turn, if it has not begun."""
        if not self._held:
            await self._turn.acquire()
            self._held = True

    def release(self) -> None:
        """Ends the learner's turn, with weights that engines know."""
        if self._held:
            self._held = False
            self._turn.release()

    async def publish(self, version: int) -> Sync:
        """As :func:`publish`; ends the learner's turn."""
        await self.hold()
        try:
            sync = await publish(self.transport, version)
            self.version = version
            return sync
        finally:
            self.release()

    async def welcome(self, engine: int, start: Start) -> None:
        """As :data:`rollout.pool.Welcome`. Raises RunStopped when the weights do not arrive intact."""
        if not self._shared:
            await start()
        async with self._turn:
            if self._shared:
                await start()
            if self.version is not None and not self.transport.pool.is_up(engine):
                await self._catch_up(engine, self.version)

    async def _catch_up(self, engine: int, version: int) -> None:
        try:
            with self._timeline.span("learner", "sync", detail=f"engine {engine}", written=False):
                sent, engine_sums = await self.transport.update(version, [engine])
        except EngineDied:
            raise
        except Exception as error:
            if await self._learner_failed():
                return  # which it says when it is asked next; an update brings the weights then
            raise EngineDied(f"engine {engine} did not take weights in: {first_line(error)}") from error
        for index, sums in engine_sums.items():
            verify(sent.checksums, sums, place=f"engine {index}", version=version)

    async def _learner_failed(self) -> bool:
        try:
            await self.transport.learner.checksums()
        except Exception:
            return True
        return False


async def publish(transport: Transport, version: int) -> Sync:
    """Moves the learner's weights into every engine that is there, as ``version``, and proves that they arrived.

    Raises:
        RunStopped: an engine's live tensor differs from the learner's, which it names with the engine; or the weights
            did not come through at all.
    """
    began, limit = time.perf_counter(), asyncio.timeout(UPDATE_S)
    try:
        async with limit:
            engines = transport.pool.present
            sent, engine_sums = await transport.update(version, engines)
    except UserError:
        raise
    except Exception as error:
        if limit.expired():
            raise RunStopped(
                f"weights of version {version} did not reach the engines within {UPDATE_S:.0f} s"
            ) from None
        await transport.learner.checksums()  # one that died on the way says so, and takes its buckets along
        raise RunStopped(f"weights of version {version} did not reach the engines: {first_line(error)}") from error
    for engine, sums in engine_sums.items():
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


def _errors(tasks: Iterable[asyncio.Future[Any]]) -> list[BaseException]:
    return [error for task in tasks if (error := task.exception()) is not None]


async def memory_of(learner: Learner, pool: EnginePool) -> dict[str, float]:
    """The most that learner ranks and engines have reserved on a GPU, in GB."""
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
