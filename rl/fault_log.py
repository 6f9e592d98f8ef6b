"""What went wrong and was mended: counted for the metrics, and said in one line.

log = FaultLog(progress.warn)
log.record("engine_restarts", "engine 1 of 2 died during generate: ...")
metrics |= log.take()          # {"faults/engine_restarts": 1.0, "faults/reissued": 0.0, ...}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

KINDS = {
    "engine_restarts": "restarts of an engine",
    "engines_lost": "engines given up",
    "reissued": "requests issued again",
    "reward_workers": "reward workers lost",
    "tools": "episodes lost to their environment",
    "late": "phases found late",
}
"""Every kind, and what one line calls several of them."""
_MANY = ("reward_workers", "tools")
"""Kinds of which a step may have a great many."""


class FaultLog:
    """Faults since the last :meth:`take`. Of each kind the first is said at once, the others only counted."""

    def __init__(self, say: Callable[[str], None] = lambda sentence: None) -> None:
        self._say = say
        self._counts: Counter[str] = Counter()
        self._carried: Counter[str] = Counter()  # from steps that were taken back
        self.totals: Counter[str] = Counter()
        """Since the beginning, by kind."""

    def record(self, kind: str, sentence: str, *, count: int = 1, each: bool = False) -> None:
        """``count`` faults of one kind, told by one ``sentence``, whether or not it is the first if ``each`` is."""
        if each or not self._counts[kind]:
            self._say(sentence)
        self._counts[kind] += count
        self.totals[kind] += count

    def say(self, sentence: str) -> None:
        """Something that belongs to a fault and is none: how it was mended."""
        self._say(sentence)

    def take(self) -> dict[str, float]:
        """The metrics of a step: how many faults of each kind since the last call, and those that were put back."""
        counts, self._counts = self._counts, Counter()
        for kind, count in counts.items():
            if count > 1 and kind in _MANY:
                self._say(f"{count} {KINDS[kind]} since the step before")
        counts, self._carried = counts + self._carried, Counter()
        return {f"faults/{kind}": float(counts[kind]) for kind in KINDS}

    def put_back(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The counts of rows of metrics that were taken back, as the run goes on from before them."""
        for row in rows:
            self._carried.update({kind: int(row.get(f"faults/{kind}", 0)) for kind in KINDS})
