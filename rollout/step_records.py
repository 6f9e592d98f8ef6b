"""What an engine recorded, taken in a step at a time and given out a request at a time.

vLLM would hand out everything it records of a token as objects of that token's own: log-probability, kept set, experts.
With hundreds of requests at once they cost more than generating does. Here a step stays whole (`rollout.engine_step`:
a handful of arrays), steps of the same requests are put together as they come (`rollout.step_runs`), and nothing is
done for every token in Python. Knows vLLM by its names only; `rollout.vllm_recording` makes the steps.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rl.sample import Kept, NDArray
from rollout.engine_step import Step
from rollout.prefix_rows import PrefixRows
from rollout.step_runs import Column, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was recorded of one request: C tokens after a prompt of P."""

    token_ids: NDArray  # int32 [C]
    logprobs: NDArray  # float32 [C]
    kept: Kept | None
    rows: NDArray  # uint8 [P + C, W], zeros where nothing was recorded
    recorded: NDArray  # bool [P + C]


@dataclass(slots=True)
class _Open:
    """A request that may still get tokens."""

    prompt: NDArray
    runs: list[Run] = field(default_factory=list)
    cached: list[tuple[int, NDArray]] = field(default_factory=list)  # rows of its tokens that others computed
    num_fed: int = 0  # of its first tokens that went through the model for it, or were looked for among others'


class StepRecords:
    """All steps of which somebody has yet to read something."""

    def __init__(self, cache_tokens: int) -> None:
        """``cache_tokens``: how many the engine's prefix cache can hold."""
        self._open: dict[str, _Open] = {}
        self._last: Run | None = None
        self._thin: dict[Run, None] = {}  # runs of which few requests are still open
        self._generation = 0
        self._prefixes = PrefixRows(cache_tokens)
        self._news = asyncio.Event()

    def open(self, name: str, prompt: NDArray) -> None:
        """Before the request ``name`` is given to the engine; a name is never used twice."""
        self._open[name] = _Open(np.ascontiguousarray(prompt, np.int32))

    def close(self, name: str) -> None:
        if opened := self._open.pop(name, None):
            self._leave(opened)

    def add(self, step: Step) -> None:
        if step.generation > self._generation:
            self._begin(step.generation)
        if self._last is None or not self._last.take(step):
            self._last = run = Run(step)
            for name in run.names:
                if opened := self._open.get(name):
                    opened.runs.append(run)
                    run.num_open += 1
            # When all of them have it: a request may begin behind what another one computes in this very step.
            for name in run.names:
                self._find_cached(name, step.block)
            self._cut()
        self._news.set()

    def _leave(self, opened: _Open) -> None:
        for run in opened.runs:
            run.num_open -= 1
            if run.is_thin:
                self._thin[run] = None
        opened.runs = []

    def _cut(self) -> None:
        """A request that goes on for long would keep what all others got that ran beside it.

        Not before a step of other requests comes, as those that end together are all read then.
        """
        for run in self._thin:
            if run.is_thin:
                run.keep(self._open)
        self._thin.clear()

    def _begin(self, generation: int) -> None:
        """What is computed from now on may be of other weights: prompts of which nothing was sampled yet anew."""
        self._generation = generation
        self._prefixes.clear()
        for name, opened in self._open.items():
            if not self._num_tokens(name):
                self._leave(opened)
                opened.cached, opened.num_fed = [], 0

    async def take(self, name: str, num_tokens: int, *, width: int, timeout_s: float = 60.0) -> Record:
        """All of a request that has got its last token, and forgets it.

        Raises TimeoutError when its tokens are not recorded within ``timeout_s``.
        """
        if self._num_tokens(name) < num_tokens:
            try:
                async with asyncio.timeout(timeout_s):
                    while self._num_tokens(name) < num_tokens:
                        self._news.clear()
                        await self._news.wait()
            except TimeoutError:
                raise TimeoutError(
                    f"request {name}: its tokens came, but not what they recorded ({timeout_s:g} s)"
                ) from None
        return self.read(name, num_tokens, width=width)

    def _num_tokens(self, name: str) -> int:
        return sum(run.num_tokens(name) for run in self._open[name].runs)

    def read(self, name: str, num_tokens: int, *, width: int) -> Record:
        """What there is of the request and its first ``num_tokens`` tokens; forgets it."""
        opened = self._open[name]
        columns = _columns(name, opened.runs)
        drawn = _joined([column.token_ids for column in columns], np.int32)
        token_ids = drawn[:num_tokens]
        logprobs = _joined([column.logprobs for column in columns], np.float32)[:num_tokens]
        records_kept = all(run.records_kept for run in opened.runs)
        pieces = list(_pieces(name, opened.runs))
        fed = [*opened.cached, *((start, piece) for _, start, piece in pieces)]
        rows, recorded = _rows(fed, len(opened.prompt) + len(token_ids), width)
        block = max((run.block for run in opened.runs), default=0)
        # What was computed beyond these tokens is in the engine's cache as well.
        current = all(generation == self._generation for generation, _, _ in pieces)
        if len(token_ids) == len(drawn) and current and _follow_each_other(fed):
            cached_now = [(0, rows[: np.count_nonzero(recorded)])]  # all of it, put together already
        else:
            cached_now = [(start, piece.copy()) for start, piece in self._cached_now(pieces)]
        self._prefixes.add(np.concatenate([opened.prompt, drawn]), block, cached_now)
        self.close(name)
        return Record(
            token_ids=token_ids,
            logprobs=logprobs,
            kept=_kept(columns, num_tokens) if records_kept else None,
            rows=rows,
            recorded=recorded,
        )

    def _cached_now(self, pieces: Iterable[tuple[int, int, NDArray]]) -> Iterator[tuple[int, NDArray]]:
        """What lies in the engine's cache of a request, the newest last."""
        return ((start, piece) for generation, start, piece in pieces if generation == self._generation)

    def _find_cached(self, name: str, block: int) -> None:
        """When a request begins behind the tokens that it was fed, what others computed of those between is in the
        cache: of its prompt, or after a preemption."""
        opened = self._open.get(name)
        if opened is None:
            return
        if len(opened.runs) > 1:
            opened.num_fed = max(opened.num_fed, opened.runs[-2].end(name))
        begin, end = opened.num_fed, opened.runs[-1].start(name)
        if end <= begin:
            return
        opened.num_fed = end
        prefix = (opened.prompt if end <= len(opened.prompt) else _sequence(name, opened))[:end]
        others = [(of, other) for of, other in self._open.items() if other is not opened]
        prompts = ((other.prompt, self._cached_now(_pieces(of, other.runs))) for of, other in others)
        # Seldom is it somebody's reply: the likeliest tokens, or equal seeds.
        replies = ((_sequence(of, other), self._cached_now(_pieces(of, other.runs))) for of, other in others)
        for at, rows in self._prefixes.find(prefix, block, itertools.chain(prompts, replies)):
            if at + len(rows) > begin:
                opened.cached.append((max(at, begin), rows[max(0, begin - at) :]))


def _sequence(name: str, opened: _Open) -> NDArray:
    """The prompt and the tokens so far."""
    return np.concatenate([opened.prompt, *(column.token_ids for column in _columns(name, opened.runs))])


def _columns(name: str, runs: Iterable[Run]) -> list[Column]:
    return [column for run in runs if (column := run.column(name))]


def _pieces(name: str, runs: Iterable[Run]) -> Iterator[tuple[int, int, NDArray]]:
    """(generation, position of the first row, rows) of what a request was fed."""
    return ((run.generation, run.start(name), run.rows(name)) for run in runs)


def _rows(pieces: Sequence[tuple[int, NDArray]], length: int, width: int) -> tuple[NDArray, NDArray]:
    """Of a position that was fed more than once (after a preemption), what it was first; none of the last token."""
    rows, recorded = np.zeros((length, width), np.uint8), np.zeros(length, bool)
    if _follow_each_other(pieces):
        pieces = [(0, np.concatenate([piece for _, piece in pieces]))]
    for start, piece in pieces:
        _fill(rows, recorded, start, piece[: max(0, length - 1 - start)])
    return rows, recorded


def _follow_each_other(pieces: Sequence[tuple[int, NDArray]]) -> bool:
    """From the first position on, as nearly always."""
    end = 0
    for start, piece in pieces:
        if start != end:
            return False
        end += len(piece)
    return end > 0


def _fill(rows: NDArray, recorded: NDArray, start: int, piece: NDArray) -> None:
    """Puts the rows of a piece where none are yet."""
    span = slice(start, start + len(piece))
    if recorded[span].any():
        empty = ~recorded[span]
        rows[span][empty] = piece[empty]
    else:
        rows[span] = piece
    recorded[span] = True


def _kept(columns: Sequence[Column], num_tokens: int) -> Kept:
    of_columns = [column.kept_sizes for column in columns if column.kept_sizes is not None]
    sizes = _joined(of_columns, np.int32)[:num_tokens]
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    ids = _joined([ids for column in columns for ids in column.kept_ids], np.int32)
    return Kept(ids=ids[: offsets[-1]], offsets=offsets)


def _joined(parts: Sequence[NDArray], dtype: Any) -> NDArray:
    """A copy: a part would keep all of its run."""
    if len(parts) == 1:
        return parts[0].copy()
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
