"""What harms a run from inside, for tests: signals to real processes, at moments that the run's timeline tells.

``arm(monkeypatch, plan)`` lets ``plan(saboteur)`` run beside the next run of this process, from when its actors are up.
Rewards and environments for such runs are in :mod:`tests.rl.fragile`, which workers import quickly.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

import rl.train
from rl.system import System
from rl.whereabouts import Whereabouts, state_of


class Saboteur:
    """Handles on the processes of a run, and the moments to touch them."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.recovery_s: dict[str, float] = {}
        """Seconds from a process's end to when another one did its work, by what was done to it."""

    def engine(self, index: int) -> Whereabouts:
        process = self.system.pool._engines[index].process
        assert process is not None
        return process

    async def home(self, index: int) -> str:
        """The id of the node that an engine's actor is on."""
        return await self.system.pool._engines[index].actor.__ray_call__.remote(_node_id)

    async def learners_home(self) -> str:
        """The id of the node that the learner's first rank is on."""
        return await self.system.learner._actors[0].__ray_call__.remote(_node_id)

    async def busy(self, actor: str, phase: str) -> None:
        """Returns in the middle of an actor's phase."""
        while not self.is_busy(actor, phase):
            await asyncio.sleep(0.001)

    async def over(self, actor: str, phase: str) -> None:
        """Returns when an actor is not in a phase, or no longer."""
        while self.is_busy(actor, phase):
            await asyncio.sleep(0.01)

    def is_busy(self, actor: str, phase: str) -> bool:
        return any((span.actor, span.phase) == (actor, phase) for span in self.system.timeline.open)

    async def stop_engine_while(self, index: int, phase: str) -> None:
        """Stops an engine, as SIGSTOP does, in the middle of something that it has not ended then."""
        await self._stop_while(lambda: self.engine(index).pid, f"engine {index}", phase)

    async def stop_learner_while(self, phase: str) -> int:
        """The same of the learner's first rank; its process, which only SIGCONT lets go on."""
        return await self._stop_while(lambda: self.system.learner.processes[0].pid, "learner", phase)

    async def _stop_while(self, pid: Callable[[], int], actor: str, phase: str) -> int:
        while True:
            await self.busy(actor, phase)
            stopped = pid()
            os.kill(stopped, signal.SIGSTOP)
            await asyncio.sleep(0.3)
            if self.is_busy(actor, phase):
                return stopped
            os.kill(stopped, signal.SIGCONT)

    async def held_bytes(self, index: int) -> int:
        """Of the weights and the cache that a torch engine holds now."""
        return await self.system.pool._engines[index].actor.__ray_call__.remote(_held_bytes)

    async def lose_engine(self, index: int, what: str) -> None:
        """Kills an engine and waits until another one is up in its place."""
        kill(self.engine(index))
        began = time.monotonic()
        await self.gone(index)
        await self.until_up(index)
        self.recovery_s[what] = time.monotonic() - began

    async def gone(self, index: int) -> None:
        """Returns when the pool knows that an engine died."""
        while self.system.pool.is_up(index):
            await asyncio.sleep(0.005)

    async def until_up(self, index: int) -> None:
        while not self.system.pool.is_up(index):
            await asyncio.sleep(0.01)

    async def published(self, version: int) -> None:
        """Returns when engines have weights of this version, or a later one."""
        while (self.system.publisher.version or 0) < version:
            await asyncio.sleep(0.01)

    async def step_over(self) -> None:
        """Returns when weights were published once more."""
        await self.published((self.system.publisher.version or 0) + 1)


def _node_id(_: Any) -> str:
    return ray.get_runtime_context().get_node_id()


def _held_bytes(actor: Any) -> int:
    return actor._engine.num_bytes


def kill(where: Whereabouts) -> None:
    os.kill(where.pid, signal.SIGKILL)
    while state_of(where) not in ("is gone", "has ended"):
        time.sleep(0.005)


@contextmanager
def closed(gate: Path) -> Iterator[None]:
    """Nothing is scored while the block runs."""
    gate.touch()
    try:
        yield
    finally:
        gate.unlink()


def arm(monkeypatch: pytest.MonkeyPatch, plan: Callable[[Saboteur], Awaitable[Any]]) -> None:
    """``plan`` runs beside the next run; the run does not end before it, unless it fails."""
    real = rl.train.start

    @asynccontextmanager
    async def start(*args: Any, **kwargs: Any) -> AsyncIterator[System]:
        async with real(*args, **kwargs) as system:
            harm = asyncio.ensure_future(plan(Saboteur(system)))
            try:
                yield system
                await harm
            finally:
                harm.cancel()

    monkeypatch.setattr(rl.train, "start", start)
