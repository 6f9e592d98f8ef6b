"""Who did what when: spans of the run's actors, open ones in memory and closed ones in ``runs/<name>/timeline.jsonl``.

    with timeline.span("learner", "step", step=3):
        result = await learner.step(minibatches)

A line of the file is ``{"actor", "phase", "begin", "end", "step", "detail"}``, in seconds of the run's own clock, in
the order in which spans ended. Spans of one actor may lie over each other (``rewards`` scores several groups at once).
What no span covers was idle.

    actor     phases
    driver    start, rollout (waiting for the groups of a step), evaluate, canary
    learner   step, canary, sync, checkpoint, cold start, save; whatever else it is asked for, while it is under way
    engine N  load, generate (it held requests; one span for each weight version), sync, sleep, wake
    rewards   score (one span a group)
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rl.secrets import redact

MAX_SPANS = 100_000
"""Lines of the file. When it has grown to them, the older half is dropped."""


@dataclass(slots=True)
class Span:
    """Something that an actor began to do and has not ended yet; ``detail`` may change until then."""

    number: int
    actor: str
    phase: str
    begin: float  # seconds of the timeline's clock
    step: int | None
    detail: str
    written: bool  # to the file, when it ends
    counts: bool = True  # among what others of its kind are held to; one that was found late does not

    @property
    def kind(self) -> tuple[str, str]:
        """The phase, and its actor without a number: those of one kind take about as long."""
        return self.actor.partition(" ")[0], self.phase


class Timeline:
    """Spans of one run; without ``path`` nothing is written. Of a file that is there, the clock goes on from its end.

    A span costs about 20 microseconds: meant for phases and groups, not for tokens.
    """

    def __init__(
        self, path: Path | None = None, *, max_spans: int = MAX_SPANS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._max_spans = max_spans
        self._clock = clock
        self._open: dict[int, Span] = {}
        self._longest: dict[tuple[str, str], float] = {}
        self._numbers = itertools.count()
        self._lines, last = (0, 0.0) if path is None else _resume(path)
        self._origin = clock() - last

    @property
    def now(self) -> float:
        """Seconds since the run began, those of earlier sittings included, but not those between them."""
        return self._clock() - self._origin

    @property
    def open(self) -> list[Span]:
        """What is under way, the longest first."""
        return sorted(self._open.values(), key=lambda span: span.begin)

    def longest(self, kind: tuple[str, str]) -> float | None:
        """The most seconds that an ended span of a kind took, of those that count and did not end in an exception."""
        return self._longest.get(kind)

    def is_open(self, span: Span) -> bool:
        """Whether it is under way still."""
        return span.number in self._open

    @contextmanager
    def span(
        self, actor: str, phase: str, *, step: int | None = None, detail: str = "", written: bool = True
    ) -> Iterator[Span]:
        """``actor`` is in ``phase`` for as long as the block runs, however it ends."""
        number = self.begin(actor, phase, step=step, detail=detail, written=written)
        try:
            yield self._open[number]
        except BaseException:
            self.end(number, failed=True)
            raise
        self.end(number)

    def begin(self, actor: str, phase: str, *, step: int | None = None, detail: str = "", written: bool = True) -> int:
        """For spans that are no block: the number to :meth:`end` it with."""
        number = next(self._numbers)
        self._open[number] = Span(number, actor, phase, self.now, step, detail, written)
        return number

    def end(self, number: int, *, failed: bool = False) -> None:
        """Closes a span; one that is closed already stays as it is."""
        span = self._open.pop(number, None)
        if span is None:
            return
        now = self.now
        if span.counts and not failed:
            self._longest[span.kind] = max(self._longest.get(span.kind, 0.0), now - span.begin)
        if span.written and self._path is not None:
            self._write(self._path, span, now)

    def _write(self, path: Path, span: Span, end: float) -> None:
        row = {
            "actor": span.actor,
            "phase": span.phase,
            "begin": round(span.begin, 4),
            "end": round(end, 4),
            "step": span.step,
            "detail": span.detail,
        }
        with open(path, "ab", buffering=0) as file:
            file.write(redact(json.dumps(row, ensure_ascii=False)).encode() + b"\n")
        self._lines += 1
        if self._lines >= self._max_spans:
            self._forget(path)

    def _forget(self, path: Path) -> None:
        """Drops the older half, so that a reader sees the whole file or what is left of it."""
        kept = path.read_bytes().splitlines(keepends=True)[-(self._max_spans // 2) :]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)
        self._lines = len(kept)


def _resume(path: Path) -> tuple[int, float]:
    """Lines of a timeline's file, none if it is not there, and the latest end; a line that was cut off is passed over.

    What is written next begins on a line of its own.
    """
    if not path.exists():
        return 0, 0.0
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")
    ends = [0.0]
    for line in content.splitlines():
        try:
            ends.append(float(json.loads(line)["end"]))
        except (ValueError, KeyError, TypeError):
            continue
    return len(content.splitlines()), max(ends)
