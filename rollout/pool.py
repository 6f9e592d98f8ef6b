"""The driver's side of generation: engines as Ray actors, and groups of samples out of prompts.

An engine whose process dies is started again, and what it was generating is issued again, with the same seeds, to
whichever engine is up. It generates from when it holds the weights it should: ``EnginePool.welcome`` brings them.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray

from model.tokenizer import load_tokenizer
from rl.choices import DoctorAct, EngineKind
from rl.config import Recipe, Sampling
from rl.errors import RunStopped
from rl.fault_log import FaultLog
from rl.placement import engines_sleep
from rl.sample import NDArray, Prompt, Sample
from rl.timeline import Timeline
from rl.whereabouts import Whereabouts
from rollout.conversation import Conversation
from rollout.engine import Completion, EngineDied, EngineStats, Request, check_window
from rollout.engine_actors import engine_makers
from rollout.engine_handle import EngineHandle, State, names
from rollout.samples import to_sample

_SHUTDOWN_S = {EngineKind.torch: 5.0, EngineKind.vllm: 20.0}

Start = Callable[[], Awaitable[None]]
Welcome = Callable[[int, Start], Awaitable[None]]
"""(index of an engine that died, what starts it again): returns when it takes part in updates, with the weights that
all others have. Raises EngineDied when it died meanwhile."""


class EnginePool:
    """N engines behind one async interface; :meth:`start` makes one, :meth:`close` ends its actors.

    Methods that speak to all engines pass over those that are down, and over those that die of it. Raises RunStopped,
    with the last engine's end, where there is no engine left.
    """

    def __init__(
        self,
        engines: Sequence[EngineHandle],
        *,
        directory: str,
        version: int,
        conversation: Conversation,
        max_context: int,
        workers_per_engine: int = 1,
        sleeps: bool = False,
        shutdown_s: float = 0.0,
        restart_s: float = 0.0,
        faults: FaultLog | None = None,
        settled: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """``shutdown_s``: seconds that :meth:`close` gives engines to come to rest and end what they started;
        ``settled``: awaited before an engine is started again, until Ray knows which nodes there are.

        Engines start from the model in ``directory``, which is ``version`` of the weights.
        """
        self.max_context = max_context
        self.faults = faults or FaultLog()
        self.welcome: Welcome = self._welcome_as_started
        """How an engine that died comes back; by itself it has the weights of the model's directory."""
        self._workers_per_engine = workers_per_engine
        self._sleeps = sleeps
        self._shutdown_s = shutdown_s
        self._restart_s = restart_s
        self._settled = settled
        self._conversation = conversation
        self._directory = directory
        self._version = version
        self._engines = list(engines)
        self._returning: dict[int, asyncio.Task[None]] = {}  # engines that are started again, by index
        self._failure: RunStopped | None = None
        self._changed = asyncio.Event()
        self._numbers = itertools.count()

    @classmethod
    async def start(
        cls,
        recipe: Recipe,
        model_path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        version: int = 0,
        actor_options: Sequence[Mapping[str, Any]] = (),
        gpus: Sequence[str | None] = (),
        timeline: Timeline | None = None,
        faults: FaultLog | None = None,
        settled: Callable[[], Awaitable[None]] | None = None,
        called: str = "engine",
        structured: bool = False,
    ) -> EnginePool:
        """Starts `rollout.engines` engines that generate with the weights and the tokenizer in `model_path`.

        `device` is the torch engine's. Of a vLLM engine, `actor_options` say where Ray puts it, and `gpus` which GPUs
        it takes where Ray does not assign them (`rl.placement`); both have one entry an engine or none. `called` is
        what sentences about an engine call it; `structured`: whether requests may have a schema.

        Raises EngineDied for an engine that does not come up within `doctor.first_s`, unless the doctor only looks on.
        """
        conversation = Conversation(load_tokenizer(model_path))
        makers = engine_makers(recipe, device, actor_options, gpus, structured=structured)
        timeline = timeline or Timeline()
        engines = [
            EngineHandle(
                index, f"{called} {index} of {len(makers)}", make, arguments, limits=recipe.faults, timeline=timeline
            )
            for index, (make, arguments) in enumerate(makers)
        ]
        pool = cls(
            engines,
            directory=str(Path(model_path).absolute()),
            version=version,
            conversation=conversation,
            max_context=recipe.model.max_context,
            workers_per_engine=recipe.rollout.tensor_parallel,
            sleeps=engines_sleep(recipe),
            shutdown_s=_SHUTDOWN_S[recipe.rollout.engine],
            restart_s=recipe.faults.restart_s,
            faults=faults,
            settled=settled,
        )
        try:
            limit = recipe.doctor.first_s if recipe.doctor.act in (DoctorAct.recover, DoctorAct.stop) else None
            starting = (
                engine.start(pool._directory, version, timeout_s=limit, key="doctor.first_s") for engine in engines
            )
            await asyncio.gather(*starting)
        except BaseException:
            pool.close()
            raise
        for engine in engines:
            engine.admit(version)
        return pool

    async def generate_group(
        self,
        prompt: Prompt,
        token_ids: NDArray,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        urgent: bool = False,
    ) -> list[Sample]:
        """One sample per seed, in order, continuing `token_ids` (int32 [P]); all from the least loaded engine.

        `urgent` ones do not queue behind what waits there.

        Raises DataError naming the prompt when it does not fit the context window. When the caller is cancelled, its
        sequences are aborted.
        """
        check_window(f"prompt {prompt.id}", len(token_ids), self.max_context)
        number = next(self._numbers)
        requests = [
            Request(
                id=f"{prompt.id}#{index} (call {number})",
                token_ids=token_ids.astype(np.int32, copy=False),
                sampling=sampling,
                seed=seed,
                stop_token_ids=self._conversation.stop_token_ids,
                urgent=urgent,
            )
            for index, seed in enumerate(seeds)
        ]
        with self._seated(len(requests)) as seat:
            completions = await self._complete(seat, requests)
        return [
            to_sample(prompt, index, request, completion, self._conversation.decode(completion.token_ids))
            for index, (request, completion) in enumerate(zip(requests, completions, strict=True))
        ]

    @contextmanager
    def seat(self, num_sequences: int) -> Iterator[Callable[[Request], Awaitable[Completion]]]:
        """A function that completes requests on one engine, the least loaded one when it is first called.

        For episodes: their next request begins with the tokens of the last one, which that engine may have cached. The
        engine counts as loaded with `num_sequences` until the block is left; if it dies, another one takes its place.
        A request that is cancelled is aborted.
        """
        with self._seated(num_sequences) as seat:

            async def complete(request: Request) -> Completion:
                (completion,) = await self._complete(seat, [request])
                return completion

            yield complete

    async def stage(self, buckets: Sequence[Any], engines: Sequence[int] | None = None) -> None:
        """Sends buckets of the next weights ({name: CPU tensor}, or references to such) to ``engines``, or to all.

        A bucket is put into the object store once, however many engines there are.
        """
        references = [bucket if isinstance(bucket, ray.ObjectRef) else ray.put(bucket) for bucket in buckets]

        async def one(engine: EngineHandle) -> None:
            with engine.lane.calling("stage"):  # one span for all buckets, which ends when this engine has them
                calls = (self._call_all("stage", reference, engines=[engine.index]) for reference in references)
                await asyncio.gather(*calls)

        await asyncio.gather(*map(one, self._among(engines)))

    async def commit(self, version: int, engines: Sequence[int] | None = None) -> dict[int, dict[str, int]]:
        """Puts the staged weights into effect in ``engines``, or in all, which generate with them from then on.

        Returns each engine's checksums of its live tensors.
        """
        sums = await self._call_all("commit", version, engines=engines)
        self._admit(version, sums)
        return sums

    @property
    def present(self) -> list[int]:
        """Engines that take part in updates. Raises RunStopped when none is left, and none comes back."""
        self._check()
        return [engine.index for engine in self._engines if engine.is_present]

    def is_up(self, index: int) -> bool:
        """Whether an engine generates."""
        return self._engines[index].state == State.UP

    def num_workers(self, engines: Sequence[int]) -> int:
        """Processes that hold a part of an engine's weights, over ``engines``."""
        return len(engines) * self._workers_per_engine

    def membership(self, engines: Sequence[int]) -> tuple[Any, ...]:
        """What changes whenever one of ``engines`` has another process."""
        return tuple((index, self._engines[index].actor) for index in engines)

    async def join_transfer(
        self, engine: int, *, host: str, port: int, first_rank: int, size: int, timeout_s: float
    ) -> None:
        """Brings an engine's workers into the learner's group, whose rank 0 is the sender. Raises EngineDied."""
        where = {"host": host, "port": port, "first_rank": first_rank, "size": size, "timeout_s": timeout_s}
        await self._call(self._engines[engine], "join_transfer", **where)

    async def begin_update(self, engines: Sequence[int] | None = None) -> None:
        """Makes engines ready for :meth:`receive`; generation stands still until the commit."""
        await self._call_all("begin_update", engines=engines)

    async def receive(self, offer: Mapping[str, Any], engines: Sequence[int] | None = None) -> None:
        """Lets engines load what the learner offers: a bucket, or all weights where they lie."""
        await self._call_all("receive", offer, engines=engines)

    async def take_broadcast(self, version: int, engine: int) -> dict[str, int]:
        """Lets an engine load all that the learner broadcasts, and generate with it from then on; as :meth:`commit`.

        Raises EngineDied where the engine does not live through it: others are waiting for it.
        """
        sums = await self._call(self._engines[engine], "take_broadcast", version)
        self._admit(version, [engine])
        return sums

    async def sleep(self, *, keep_weights: bool = False) -> None:
        """Lets the engines give up their memory where they share it with the learner; elsewhere does nothing.

        They wake with the next update, or with :meth:`wake` if weights were kept, in host memory.
        """
        if self._sleeps:
            await self._call_all("sleep", keep_weights=keep_weights)

    async def wake(self) -> None:
        """Undoes a sleep that kept the weights."""
        if self._sleeps:
            await self._call_all("wake")

    async def peak_memory_gb(self) -> float:
        """The most that an engine has had reserved on one GPU, in units of 1e9 bytes."""
        return max((await self._call_all("peak_memory_gb")).values(), default=0.0)

    async def abort(self) -> int:
        """Ends everything in flight as aborted samples; returns how many there were."""
        return sum((await self._call_all("abort")).values())

    async def stats(self) -> list[EngineStats]:
        """Of every engine, since it was started for the first time; of one that is down as it was last."""

        async def one(engine: EngineHandle) -> EngineStats:
            with self._burying(engine, tolerant=True):
                await engine.count()
            return engine.stats

        return list(await asyncio.gather(*map(one, self._engines)))

    async def stats_of(self, index: int) -> EngineStats:
        """Of one engine; raises EngineDied."""
        engine = self._engines[index]
        with self._burying(engine, tolerant=False):
            await engine.count()
        return engine.stats

    def process_of(self, index: int) -> Whereabouts | None:
        """The process of an engine's actor, if it has one."""
        return self._engines[index].process

    def restart(self, indices: Iterable[int], reason: str) -> None:
        """Ends the processes of engines that can be used no more, and starts them again."""
        for index in indices:
            engine = self._engines[index]
            self._bury(engine, EngineDied(f"{engine.name} was ended: {reason}"))

    def close(self) -> None:
        """Ends the engines' processes.

        They come to rest first: killed between two calls, Ray's async actors may crash and print a page about it.
        """
        for returning in self._returning.values():
            returning.cancel()
        if self._shutdown_s:
            ending = [engine.actor.shutdown.remote() for engine in self._engines if engine.is_present]
            if ending:
                ray.wait(ending, num_returns=len(ending), timeout=self._shutdown_s)
        for engine in self._engines:
            engine.kill()

    @contextmanager
    def _seated(self, num_sequences: int) -> Iterator[_Seat]:
        seat = _Seat(num_sequences)
        try:
            yield seat
        finally:
            seat.move(None)

    async def _complete(self, seat: _Seat, requests: Sequence[Request]) -> list[Completion]:
        """Requests on the seat's engine; on another one, from their beginning, when it dies."""
        while True:
            if seat.engine is None or seat.engine.state != State.UP:
                seat.move(await self._available())
            assert seat.engine is not None
            with self._burying(seat.engine, tolerant=True):
                return await seat.engine.generate(requests)
            await asyncio.sleep(0)  # its end is told first
            self.faults.record("reissued", f"issued again: {names(requests)}", count=len(requests))

    def _admit(self, version: int, engines: Iterable[int]) -> None:
        for index in engines:
            if self._engines[index].is_present:
                self._engines[index].admit(version)
        self._notify()

    async def _available(self) -> EngineHandle:
        """The least loaded engine of those that are up, as soon as one is."""
        while True:
            up = [engine for engine in self._engines if engine.state == State.UP]
            if up:
                return min(up, key=lambda engine: engine.num_seated)
            self._check()
            await self._changed.wait()

    async def _call_all(
        self, method: str, *args: Any, engines: Sequence[int] | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """What the engines answer that are present and do not die of it, by index."""

        async def one(engine: EngineHandle) -> tuple[int, Any] | None:
            with self._burying(engine, tolerant=True):
                return engine.index, await engine.call(method, *args, **kwargs)
            return None

        answers = await asyncio.gather(*map(one, self._among(engines)))
        return dict(answer for answer in answers if answer is not None)

    async def _call(self, engine: EngineHandle, method: str, *args: Any, **kwargs: Any) -> Any:
        """One call of one engine. Raises EngineDied."""
        with self._burying(engine, tolerant=False):
            return await engine.call(method, *args, **kwargs)

    def _among(self, engines: Sequence[int] | None) -> list[EngineHandle]:
        """Those of ``engines``, or of all, that are present."""
        indices = range(len(self._engines)) if engines is None else engines
        return [self._engines[index] for index in indices if self._engines[index].is_present]

    @contextmanager
    def _burying(self, engine: EngineHandle, *, tolerant: bool) -> Iterator[None]:
        """What follows when the engine dies in the block; a ``tolerant`` block then just ends."""
        actor = engine.actor
        try:
            yield
        except EngineDied as death:
            if engine.actor is actor and engine.actor is not None:
                self._bury(engine, death)
            if not tolerant:
                raise

    def _bury(self, engine: EngineHandle, death: EngineDied) -> None:
        """Ends what is left of an engine and lets another process take its place."""
        engine.kill()
        if engine.index not in self._returning:
            self._returning[engine.index] = asyncio.create_task(self._bring_back(engine, death))

    async def _bring_back(self, engine: EngineHandle, death: EngineDied) -> None:
        """Starts an engine until it stays up or has no restart left."""
        try:
            while not engine.is_present and engine.may_restart():
                began = time.monotonic()
                self.faults.record("engine_restarts", f"{death}; it is started again", each=True)
                if self._settled is not None:
                    await self._settled()
                try:
                    await self.welcome(engine.index, lambda: self._start(engine))
                except EngineDied as again:
                    engine.kill()
                    death = again
                if engine.is_present:
                    self.faults.say(f"{engine.name} is back after {time.monotonic() - began:.1f} s")
        except Exception as error:  # what it is now it would be again
            engine.kill()
            death = EngineDied(f"{engine.name} cannot be started again: {' '.join(str(error).split())}")
            self._failure = error if isinstance(error, RunStopped) else None
        finally:
            del self._returning[engine.index]
        if not engine.is_present:
            self._give_up(engine, death)

    def _give_up(self, engine: EngineHandle, death: EngineDied) -> None:
        engine.state = State.LOST
        left = [other for other in self._engines if other.state != State.LOST]
        if not left:
            self._failure = self._failure or RunStopped(f"no engine is left: {death}")
        then = f"the run goes on with {len(left)} of its engines" if left else "none is left"
        self.faults.record("engines_lost", f"{death}; {then}", each=True)
        self._notify()

    async def _start(self, engine: EngineHandle) -> None:
        await engine.start(self._directory, self._version, timeout_s=self._restart_s, key="faults.restart_s")

    async def _welcome_as_started(self, index: int, start: Start) -> None:
        await start()
        self._engines[index].admit(self._version)
        self._notify()

    def _check(self) -> None:
        """Raises what the run cannot go on from."""
        if self._failure is not None:
            raise self._failure

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _Seat:
    """Where sequences that belong together are generated: nowhere yet, or on an engine that counts them."""

    def __init__(self, num_sequences: int) -> None:
        self.engine: EngineHandle | None = None
        self._num_sequences = num_sequences

    def move(self, engine: EngineHandle | None) -> None:
        if self.engine is not None:
            self.engine.num_seated -= self._num_sequences
        self.engine = engine
        if engine is not None:
            engine.num_seated += self._num_sequences
