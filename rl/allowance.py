"""How often a fault is mended before it counts as one that comes again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable


class Allowance:
    """At most ``most`` mendings within ``window_s`` seconds, and at most as many without progress, however slow.

    A fault that always comes at the same place never leaves that place, though hours may lie between two of its times.
    """

    def __init__(self, most: int, window_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.window_s = window_s
        self._clock = clock
        self._mended: list[tuple[float, Hashable]] = []  # when, and how far things had come then

    def take(self, reached: Hashable) -> bool:
        """Whether there is a mending left, which this takes. ``reached`` differs when there was progress in between."""
        now = self._clock()
        self._mended = [(at, where) for at, where in self._mended if now - at < self.window_s or where == reached]
        if len(self._mended) >= self.most:
            return False
        self._mended.append((now, reached))
        return True

    def num_taken(self, reached: Hashable) -> int:
        """Mendings without progress since ``reached``."""
        return sum(where == reached for _, where in self._mended)
