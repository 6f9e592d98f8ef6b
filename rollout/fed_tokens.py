"""How far requests have been fed to an engine's model, and which go on behind that, since others computed what lies
between."""

from __future__ import annotations

import numpy as np

from rl.sample import NDArray

_NOBODY = 0
"""The slot of names that are not open: they have been fed everything."""


class FedTokens:
    """Of each open request, the tokens from its first one on that went through the model for it, or were said to."""

    def __init__(self) -> None:
        self._ends = np.full(1, np.iinfo(np.int64).max)
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._last: tuple[str, NDArray] | None = None  # names of a step, and their slots

    def open(self, name: str) -> None:
        if not self._free:
            self._free = list(range(len(self._ends), 2 * len(self._ends)))
            self._ends = np.concatenate([self._ends, np.zeros_like(self._ends)])
        self._slots[name] = slot = self._free.pop()
        self._ends[slot], self._last = 0, None

    def close(self, name: str) -> None:
        self._free.append(self._slots.pop(name))
        self._last = None

    def forget(self, name: str) -> None:
        """It is fed again from its first token on."""
        self._ends[self._slots[name]] = 0

    def take(self, names: str, starts: NDArray, counts: NDArray) -> list[tuple[str, int, int]]:
        """Of a step's requests, divided by a new line, those that it fed tokens behind what they had been fed: from
        where to where others' tokens lie."""
        if self._last is None or self._last[0] != names:
            slots = [self._slots.get(name, _NOBODY) for name in names.split("\n")]
            self._last = names, np.array(slots)
        slots = self._last[1]
        ends = self._ends[slots]
        self._ends[slots] = np.maximum(ends, starts + counts)
        behind = np.flatnonzero(starts > ends)
        if not len(behind):
            return []
        every = names.split("\n")
        return [(every[at], int(ends[at]), int(starts[at])) for at in behind.tolist()]
