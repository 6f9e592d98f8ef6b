"""What one engine of the pool is doing, as spans of the run's timeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rl.timeline import Timeline

_PHASES = {"load": "load", "wake": "wake"} | dict.fromkeys(
    ("stage", "begin_update", "receive", "take_broadcast", "commit"), "sync"
)
"""Calls that are spans of the file."""
_LAUNCH = "__ray_call__"
"""Waits for a process to come up, and so for room."""
REQUEST = "request"
"""The phase of each call that generates, which is not written."""
_WAKING = ("stage", "begin_update", "take_broadcast", "wake")


class EngineLane:
    """Follows an engine's calls: when it loads, is sent weights, sleeps, and holds requests."""

    def __init__(self, actor: str, timeline: Timeline) -> None:
        self.actor = actor
        self._timeline = timeline
        self._calls = 0  # generating now
        self._version = 0
        self._generating: int | None = None  # the number of the open span, as below
        self._sleeping: int | None = None

    @contextmanager
    def generating(self, requests: str) -> Iterator[None]:
        """The engine holds ``requests`` while the block runs; blocks that overlap are one span of the file."""
        self._calls += 1
        if self._generating is None:
            self._begin_generating()
        try:
            with self._timeline.span(self.actor, REQUEST, detail=requests, written=False):
                yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._generating = self._ended(self._generating)

    @contextmanager
    def calling(self, method: str) -> Iterator[None]:
        """Any other call."""
        if method in _WAKING:
            self._sleeping = self._ended(self._sleeping)
        if method == "sleep" and self._sleeping is None:
            self._sleeping = self._timeline.begin(self.actor, "sleep")
        if method == "generate":  # has generating()
            yield
            return
        # Other calls are not written, but an engine that hangs may be waited for in any.
        phase = "start" if method == _LAUNCH else _PHASES.get(method, f"{method}()")
        detail = method if method in _PHASES else ""
        with self._timeline.span(self.actor, phase, detail=detail, written=method in _PHASES):
            yield

    def serves(self, version: int) -> None:
        """From now on it generates with other weights, which is another span."""
        self._version = version
        if self._generating is not None:
            self._ended(self._generating)
            self._begin_generating()

    def close(self) -> None:
        self._generating, self._sleeping = self._ended(self._generating), self._ended(self._sleeping)

    def _begin_generating(self) -> None:
        self._generating = self._timeline.begin(self.actor, "generate", detail=f"version {self._version}")

    def _ended(self, number: int | None) -> None:
        if number is not None:
            self._timeline.end(number)
