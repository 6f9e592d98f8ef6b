"""One engine of the pool: its actor, which may die and be made again, and what is known of it on the driver's side."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rl.allowance import Allowance
from rl.config import Faults
from rl.errors import RunStopped
from rl.timeline import Timeline
from rl.whereabouts import Whereabouts, announce, end
from rollout.engine import EngineDied, EngineStats, Request
from rollout.engine_lane import EngineLane

_COUNTERS = ("num_generated_tokens", "num_prompt_tokens", "num_prefilled_tokens", "num_decode_steps", "busy_s")
_NOTHING = EngineStats(**dict.fromkeys(_COUNTERS, 0), num_active=0, num_waiting=0, version=0)  # pyright: ignore[reportArgumentType]


class State(Enum):
    """What an engine is good for."""

    DOWN = "down"
    """It has no process, or one that is not ready."""
    LOADED = "loaded"
    """It holds a model, but perhaps not the learner's: it takes part in updates and generates nothing."""
    UP = "up"
    LOST = "lost"
    """It has died too often and is not started again."""


class EngineHandle:
    """Calls go to the actor of the moment; ``make`` makes one, whose ``load`` takes ``arguments``."""

    def __init__(
        self,
        index: int,
        name: str,
        make: Callable[[], Any],
        arguments: Mapping[str, Any],
        *,
        limits: Faults,
        timeline: Timeline,
    ) -> None:
        self.index = index
        self.name = name
        self.state = State.DOWN
        self.actor: Any = None
        self.process: Whereabouts | None = None
        self.version = 0
        self.num_seated = 0  # sequences dispatched and not yet returned, and episodes that have their seat here
        self.lane = EngineLane(f"engine {index}", timeline)
        self._make = make
        self._arguments = arguments
        self._restarts = Allowance(limits.engine_restarts, limits.window_s)
        self._num_finished = 0  # calls that generated what they were to
        self._ended = _NOTHING  # counters of processes that are no more
        self.stats = _NOTHING
        """Of all of its processes so far, at the last :meth:`count`."""

    @property
    def is_present(self) -> bool:
        """Whether it takes part in updates."""
        return self.state in (State.LOADED, State.UP)

    async def start(self, directory: str, version: int, *, timeout_s: float | None, key: str) -> None:
        """Makes a process that holds the model in ``directory``.

        Raises EngineDied when it does not come up within ``timeout_s``, which is the recipe's ``key``.
        """
        self.actor = self._make()
        try:
            async with asyncio.timeout(timeout_s):
                self.process = await self.call("__ray_call__", announce)
                await self.call("load", directory, **self._arguments, version=version)
        except TimeoutError:
            self.kill()
            raise EngineDied(f"{self.name} did not start within {timeout_s:g} s ({key}): {self._room()}") from None
        except BaseException:
            self.kill()
            raise
        self.version = version
        self.state = State.LOADED

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One call, with Ray's exceptions turned back into what they stand for.

        Raises EngineDied, naming engine and method, when the process is gone, or the one behind it.
        """
        if self.actor is None:
            raise EngineDied(f"{self.name} is not running")
        try:
            with self.lane.calling(method):
                return await getattr(self.actor, method).remote(*args, **kwargs)
        except RayActorError as error:
            reason = str(error).partition("\n")[0]
            doing = "start" if method == "__ray_call__" else method
            raise EngineDied(f"{self.name} died during {doing}: {reason}") from error
        except RayTaskError as error:
            if isinstance(error.cause, EngineDied):
                raise EngineDied(f"{self.name} died during {method}: {error.cause}") from error
            if isinstance(error.cause, FloatingPointError):
                raise RunStopped(f"{self.name} cannot generate: {error.cause}") from error
            raise error.cause from error

    async def generate(self, requests: Sequence[Request]) -> list[Any]:
        """Completes requests; when the caller is cancelled, or the time of one of them is over, they are aborted."""
        actor = self.actor

        def abort() -> None:
            if actor is not None:
                actor.abort.remote([request.id for request in requests])

        seconds = min(request.ends_at for request in requests) - time.monotonic()
        timer = asyncio.get_running_loop().call_later(max(0.0, seconds), abort) if seconds < math.inf else None
        try:
            with self.lane.generating(names(requests)):
                completions = await self.call("generate", requests)
        except asyncio.CancelledError:
            abort()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        self._num_finished += 1
        return completions

    async def count(self) -> None:
        """Brings :attr:`stats` up to date, where the engine can be asked."""
        if self.is_present:
            now, ended = await self.call("stats"), self._ended
            self.stats = replace(now, **{name: getattr(now, name) + getattr(ended, name) for name in _COUNTERS})

    def admit(self, version: int) -> None:
        """It holds the weights that it should, and generates from now on."""
        self.version = version
        self.state = State.UP
        self.lane.serves(version)

    def kill(self) -> None:
        """Ends its process, even one that is stopped, if there is one."""
        if self.actor is not None:
            ray.kill(self.actor)
        if self.process is not None and self.process.is_here:
            end(self.process)
        self.actor = self.process = None
        self.lane.close()
        if self.state != State.LOST:
            self.state = State.DOWN
        self._ended = self.stats = replace(self.stats, num_active=0, num_waiting=0)

    def may_restart(self) -> bool:
        """Whether it has a restart left, which this takes; none if it finished nothing since it took as many."""
        return self._restarts.take(self._num_finished)

    def _room(self) -> str:
        """What may have kept it from starting."""
        free = ray.available_resources()
        return f"the Ray cluster has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free"


def names(requests: Sequence[Request]) -> str:
    """The first request, and how many others there are."""
    others = len(requests) - 1
    return requests[0].id + (f" and {others} more" if others else "")
