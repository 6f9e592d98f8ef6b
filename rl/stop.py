"""Ctrl-C and SIGTERM, which ``ray job stop`` sends: a run ends after its step, or at once when it is asked twice.

groups = await stop.unless(buffer.take(n))    # None: asked to stop, and nothing was taken
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupted(Exception):
    """The run was asked to stop, and did so between two steps."""


class Stop:
    """Whether the run was asked to stop. Signals cancel the task that made this, at once or after a grace."""

    def __init__(self, grace_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.grace_s = grace_s
        self._task = task
        self._asked = asyncio.Event()
        self._orderly = False

    def listen(self) -> None:
        """From now on signals come here. Comes after ``ray.init``, which sets handlers of its own."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.ask)

    @property
    def asked(self) -> bool:
        """Whether the run is to end in good order."""
        return self._asked.is_set()

    def ask(self) -> None:
        """What a signal does."""
        if not self._orderly or self._asked.is_set():
            self._task.cancel()
            return
        self._asked.set()
        asyncio.get_running_loop().call_later(self.grace_s, self._task.cancel)

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """Within the block the run looks after itself when it is asked to stop, for as long as the grace allows."""
        self._orderly = True
        try:
            yield
        finally:
            self._orderly = False

    async def unless(self, waiting: Coroutine[Any, Any, T]) -> T | None:
        """The result of ``waiting``; None when the run is asked to stop first, which cancels it."""
        if self._asked.is_set():
            waiting.close()
            return None
        task = asyncio.ensure_future(waiting)
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait((task, asked), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for one in (task, asked):
                one.cancel()
            await asyncio.gather(task, asked, return_exceptions=True)
