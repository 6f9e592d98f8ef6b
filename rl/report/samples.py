"""Chooses which trajectories a page of bounded size carries, and says what it leaves out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.report.block import to_block
from rl.report.entries import entry_of, summary_of
from rl.report.json_lines import read_rows

FEW_STEPS = 16  # below this many steps, rather show fewer trajectories of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Upper bounds on what a page embeds."""

    steps: int = 1500  # points of a curve
    sample_bytes: int = 24_000_000  # of trajectories, compressed as they stand in the page
    tokens: int = 16_384  # of one sequence, from its start
    characters: int = 20_000  # of one message, result, answer or comment
    spans: int = 60_000  # of the timeline, the latest


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Trajectories for the page."""

    index: list[dict[str, Any]]  # a summary each; ``block`` and ``place`` say where the whole one is
    blocks: dict[str, str] = field(default_factory=dict)  # by name, each the entries of one step
    notes: tuple[str, ...] = ()


class StepSamples:
    """The trajectories of a run's steps, read when they are first asked for."""

    def __init__(self, files: dict[int, Path], budget: Budget) -> None:
        self.files = files
        self.budget = budget
        self._blocks: dict[tuple[int, int], str] = {}
        self._summaries: dict[int, list[dict[str, Any]]] = {}
        self._skipped: dict[int, int] = {}
        self._cut: dict[int, int] = {}

    def entries(self, step: int) -> list[dict[str, Any]]:
        """All of a step, in the order of the file."""
        rows, bad = read_rows(self.files[step])
        read = (entry_of(row, self.budget.tokens, self.budget.characters) for row in rows)
        entries = [entry for entry in read if entry is not None]
        self._skipped[step] = bad + len(rows) - len(entries)
        self._cut[step] = sum(any(one["cut"] for one in entry["sequences"]) for entry in entries)
        self._summaries[step] = [summary_of(entry) | {"step": step} for entry in entries]
        return entries

    def summaries(self, step: int) -> list[dict[str, Any]]:
        if step not in self._summaries:
            self.entries(step)
        return self._summaries[step]

    def block(self, step: int, per_step: int) -> str:
        """The first ``per_step`` of a step, compressed."""
        if step in self._summaries:
            known = self._blocks.get((step, min(per_step, len(self._summaries[step]))))
            if known is not None:
                return known
        entries = self.entries(step)[:per_step]
        self._blocks[step, len(entries)] = to_block(entries)
        return self._blocks[step, len(entries)]

    def skipped(self) -> int:
        """Lines that held no trajectory, of the steps read so far."""
        return sum(self._skipped.values())

    def cut(self, steps: Sequence[int]) -> int:
        """Trajectories of these steps with tokens beyond the budget."""
        return sum(self._cut[step] for step in steps)

    def compression(self) -> float:
        """Bytes in the page for each byte on disk, measured on the last step."""
        last = max(self.files)
        return len(self.block(last, sys.maxsize)) / max(self.files[last].stat().st_size, 1)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    if count <= 1:
        return [items[-1]][:count]
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def choose_samples(files: dict[int, Path], budget: Budget) -> Chosen:
    """As many trajectories as the budget takes, of evenly chosen steps, the first and the last among them."""
    samples = StepSamples(files, budget)
    steps, per_step = _fitting(samples)
    index, blocks, left = [], {}, budget.sample_bytes
    for step in steps:
        block = samples.block(step, per_step)
        if len(block) > left:  # only where not even the smallest choice fits
            continue
        left -= len(block)
        blocks[str(step)] = block
        shown = samples.summaries(step)[:per_step]
        index += [one | {"block": str(step), "place": place} for place, one in enumerate(shown)]
    return Chosen(index=index, blocks=blocks, notes=tuple(_notes(samples, steps, len(index))))


def _fitting(samples: StepSamples) -> tuple[list[int], int]:
    """(steps, trajectories of each) with the most that fits. Does not read what will hardly fit."""
    every, budget = list(samples.files), samples.budget.sample_bytes
    if not every:
        return [], 0
    density = samples.compression()
    steps, per_step = [], 0
    for count, per_step in _plans(len(every)):
        steps = evenly(every, count)
        share = min(per_step / max(len(samples.summaries(every[-1])), 1), 1.0)
        if sum(samples.files[step].stat().st_size for step in steps) * density * share > 1.1 * budget:
            continue
        if sum(len(samples.block(step, per_step)) for step in steps) <= budget:
            break
    return steps, per_step


def _plans(num_steps: int) -> Iterator[tuple[int, int]]:
    """From the most to the fewest: rather many steps than every sibling."""
    steps = num_steps
    while steps > FEW_STEPS:
        yield steps, sys.maxsize
        steps = steps * 4 // 5
    yield from ((steps, per_step) for per_step in (sys.maxsize, 8, 4, 2))
    while steps > 2:
        steps = max(steps * 2 // 3, 2)
        yield steps, 2
    yield min(steps, 2), 1


def _notes(samples: StepSamples, steps: Sequence[int], shown: int) -> Iterator[str]:
    if skipped := samples.skipped():
        yield f"{counted(skipped, 'line')} of the trajectories could not be read and were skipped."
    if len(steps) < len(samples.files):
        yield f"Trajectories are those of {len(steps)} of {len(samples.files):,} recorded steps, evenly chosen."
    in_files = sum(len(samples.summaries(step)) for step in steps)
    if shown < in_files:
        yield f"Of {in_files:,} trajectories of these steps, the page holds {shown:,}."
    if cut := samples.cut(steps):
        yield f"{counted(cut, 'trajectory', 'trajectories')} cut after {samples.budget.tokens:,} tokens."


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 line`` or ``1,200 lines``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
