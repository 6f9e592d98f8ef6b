"""Seconds of the parts of an optimizer step, measured where the work is done."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of named parts. On a GPU events mark them in its stream, and only :meth:`lap` waits for it."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measures the block as (more of) ``part``."""
        if torch.cuda.is_available():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((part, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """The seconds of every part since the last call."""
        for part, begin, end in self._events:
            end.synchronize()
            self._seconds[part] += begin.elapsed_time(end) / 1e3
        seconds = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return seconds
