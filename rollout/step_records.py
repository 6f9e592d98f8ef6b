"""What an engine recorded, taken in a step at a time and given out a request at a time.

vLLM would hand out everything it records of a token as objects of that token's own: log-probability, kept set, experts.
With hundreds of requests at once they cost more than generating does. Here a step stays whole (:class:`Step`: a handful
of arrays), steps of the same requests are put together as they come, and nothing is done for every token in Python.
Knows vLLM by its names only; `rollout.vllm_recording` makes the steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from rl.sample import Kept, NDArray
from rollout.prefix_rows import PrefixRows

_DTYPES = {
    "starts": np.int64,
    "counts": np.int64,
    "sampled": np.uint8,
    "token_ids": np.int32,
    "logprobs": np.float32,
    "kept_sizes": np.int32,
    "kept_ids": np.int32,
    "rows": np.uint8,
}

_TURNED_AT_ONCE = 32
"""Steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of an engine: B requests, of which R tokens were fed and N were given a next token.

    A row is what a token's forward pass recorded, W bytes; a request's rows are of the tokens from ``starts`` on.
    """

    names: str  # of the B requests, divided by "\n"
    starts: NDArray  # int64 [B], the position of a request's first fed token
    counts: NDArray  # int64 [B], how many of it were fed; none where no rows are recorded
    sampled: NDArray  # uint8 [B], 1 for the requests that got a token
    token_ids: NDArray  # int32 [N]
    logprobs: NDArray  # float32 [N]
    kept_sizes: NDArray | None  # int32 [N]; None where kept sets are not recorded
    kept_ids: NDArray  # int32 [sum of kept_sizes]
    rows: NDArray  # uint8 [R, W]
    block: int = 0  # tokens of a block of the engine's prefix cache
    generation: int = 0  # how often that cache was cleared before

    def to_plain(self) -> dict[str, Any]:
        """As text, bytes and integers, for whatever can carry these."""
        streams = {name: getattr(self, name) for name in _DTYPES}
        plain = {
            name: np.asarray(stream, _DTYPES[name]).tobytes() for name, stream in streams.items() if stream is not None
        }
        return {
            "names": self.names,
            "block": self.block,
            "generation": self.generation,
            "width": self.rows.shape[1],
            **plain,
        }

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Self:
        streams = {n: np.frombuffer(plain[n], dtype) for n, dtype in _DTYPES.items() if n in plain}
        streams["rows"] = streams["rows"].reshape(int(streams["counts"].sum()), plain["width"])
        others = {name: plain[name] for name in ("names", "block", "generation")}
        return cls(**others, **{"kept_sizes": None, **streams})


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was recorded of one request: C tokens after a prompt of P."""

    token_ids: NDArray  # int32 [C]
    logprobs: NDArray  # float32 [C]
    kept: Kept | None
    rows: NDArray  # uint8 [P + C, W], zeros where nothing was recorded
    recorded: NDArray  # bool [P + C]


class Chunk:
    """Steps of the same requests, S of them, turned round: what a request got of them lies together."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.token_ids = np.stack([step.token_ids for step in steps])  # [S, N]
        self.logprobs = np.stack([step.logprobs for step in steps])
        self.rows = np.stack([step.rows for step in steps])  # [S, R, W]
        sizes = [step.kept_sizes for step in steps if step.kept_sizes is not None]
        self.kept_sizes = np.stack(sizes) if sizes else np.zeros_like(self.token_ids)
        ends = np.cumsum(self.kept_sizes.reshape(-1), dtype=np.int64).reshape(self.kept_sizes.shape)
        spans = _spans((ends - self.kept_sizes).T.reshape(-1), self.kept_sizes.T.reshape(-1))
        self._kept_ids = np.concatenate([step.kept_ids for step in steps])[spans]
        self._edges = np.concatenate([[0], np.cumsum(self.kept_sizes.sum(axis=0, dtype=np.int64))])

    def kept_ids(self, token: int) -> NDArray:
        """Of the steps' token number ``token``, 0 to N - 1, one step after another."""
        return self._kept_ids[self._edges[token] : self._edges[token + 1]]


class Run:
    """Steps of the same requests that follow each other, as one.

    They are turned round as they come, some at a time: all at once would keep those who wait for requests that end
    together.
    """

    def __init__(self, step: Step) -> None:
        self.first = step
        self.names = step.names.split("\n")
        self._place = {name: at for at, name in enumerate(self.names)}
        self._first_row = np.cumsum(step.counts) - step.counts
        self._first_token = np.cumsum(step.sampled, dtype=np.int64) - step.sampled
        self._next = step.starts + step.counts
        self._num_steps = 1
        self._loose, self._turned = [step], []

    def take(self, step: Step) -> bool:
        """Whether the step goes on with this run; it is part of it then."""
        first = self.first
        if (step.names, step.generation) != (first.names, first.generation) or not (
            np.array_equal(step.counts, first.counts)
            and np.array_equal(step.sampled, first.sampled)
            and np.array_equal(step.starts, self._next)
        ):
            return False
        self._next = step.starts + step.counts
        self._num_steps += 1
        self._loose.append(step)
        if len(self._loose) == _TURNED_AT_ONCE:
            self._chunks()
        return True

    def num_tokens(self, name: str) -> int:
        return self._num_steps * self._got(name)

    def start(self, name: str) -> int:
        return int(self.first.starts[self._place[name]])

    def rows(self, name: str) -> NDArray:
        """uint8 [steps * count, W] of the tokens from :meth:`start` on."""
        at = self._place[name]
        first, width = self._first_row[at], self.first.rows.shape[1]
        parts = [chunk.rows[:, first : first + self.first.counts[at]] for chunk in self._chunks()]
        return _joined(parts, np.uint8).reshape(-1, width) if width else np.zeros((0, 0), np.uint8)

    def columns(self, name: str) -> Iterator[tuple[Chunk, int]]:
        """The chunks one after another, and which of a step's tokens is the request's; none where it gets no tokens."""
        if self._got(name):
            token = int(self._first_token[self._place[name]])
            yield from ((chunk, token) for chunk in self._chunks())

    def _got(self, name: str) -> int:
        """1 for a request that gets a token at every step, else 0."""
        return int(self.first.sampled[self._place[name]])

    def _chunks(self) -> list[Chunk]:
        if self._loose:
            self._turned.append(Chunk(self._loose))
            self._loose = []
        return self._turned


@dataclass(slots=True)
class _Open:
    """A request that may still get tokens."""

    prompt: NDArray
    runs: list[Run] = field(default_factory=list)
    cached: list[tuple[int, NDArray]] = field(default_factory=list)  # rows of its prompt that others computed


class StepRecords:
    """All steps of which somebody has yet to read something."""

    def __init__(self, cache_tokens: int) -> None:
        """``cache_tokens``: how many the engine's prefix cache can hold."""
        self._open: dict[str, _Open] = {}
        self._last: Run | None = None
        self._generation = 0
        self._prefixes = PrefixRows(cache_tokens)
        self._news = asyncio.Event()

    def open(self, name: str, prompt: NDArray) -> None:
        """Before the request ``name`` is given to the engine; a name is never used twice."""
        self._open[name] = _Open(np.ascontiguousarray(prompt, np.int32))

    def close(self, name: str) -> None:
        self._open.pop(name, None)

    def add(self, step: Step) -> None:
        if step.generation > self._generation:
            self._begin(step.generation)
        if self._last is None or not self._last.take(step):
            self._last = Run(step)
            for name in self._last.names:
                if opened := self._open.get(name):
                    opened.runs.append(self._last)
            for name in self._last.names:
                self._find_cached(name, step.block)
        self._news.set()

    def _begin(self, generation: int) -> None:
        """What is computed from now on may be of other weights: prompts of which nothing was sampled yet anew."""
        self._generation = generation
        self._prefixes.clear()
        for name, opened in self._open.items():
            if not self._num_tokens(name):
                opened.runs, opened.cached = [], []

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
        columns = [column for run in opened.runs for column in run.columns(name)]
        token_ids = _joined([chunk.token_ids[:, token] for chunk, token in columns], np.int32)[:num_tokens]
        logprobs = _joined([chunk.logprobs[:, token] for chunk, token in columns], np.float32)[:num_tokens]
        records_kept = all(run.first.kept_sizes is not None for run in opened.runs)
        sequence = np.concatenate([opened.prompt, token_ids])
        pieces = list(_pieces(name, opened.runs))
        fed = [*opened.cached, *((start, piece) for _, start, piece in pieces)]
        rows, recorded = _rows(fed, len(sequence), width)
        block = max((run.first.block for run in opened.runs), default=0)
        cached_now = list(self._cached_now(pieces))
        if len(cached_now) == len(pieces) and _follow_each_other(fed):
            cached_now = [(0, rows[: np.count_nonzero(recorded)])]  # all of it, put together already
        self._prefixes.add(sequence, block, cached_now)
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
        """When a request begins behind its first token, what others computed of its prompt is in the cache."""
        opened = self._open.get(name)
        if opened is None or len(opened.runs) > 1 or not (until := opened.runs[0].start(name)):
            return
        others = (
            (other.prompt, self._cached_now(_pieces(of, other.runs)))
            for of, other in self._open.items()
            if other is not opened
        )
        opened.cached = self._prefixes.find(opened.prompt[:until], block, others)


def _pieces(name: str, runs: Iterable[Run]) -> Iterator[tuple[int, int, NDArray]]:
    """(generation, position of the first row, rows) of what a request was fed."""
    return ((run.first.generation, run.start(name), run.rows(name)) for run in runs)


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


def _kept(columns: Sequence[tuple[Chunk, int]], num_tokens: int) -> Kept:
    sizes = _joined([chunk.kept_sizes[:, token] for chunk, token in columns], np.int32)[:num_tokens]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ids = _joined([chunk.kept_ids(token) for chunk, token in columns], np.int32)
    return Kept(ids=ids[: offsets[-1]], offsets=offsets)


def _joined(parts: Sequence[NDArray], dtype: Any) -> NDArray:
    """A copy: a part would keep all of its chunk."""
    if len(parts) == 1:
        return parts[0].copy()
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _spans(starts: NDArray, sizes: NDArray) -> NDArray:
    """start, start + 1, ... of each span, one after another."""
    ends = np.cumsum(sizes, dtype=np.int64)
    dtype = np.int64 if len(ends) and ends[-1] > np.iinfo(np.int32).max else np.int32
    within = np.arange(ends[-1] if len(ends) else 0, dtype=dtype)
    return np.add(within, np.repeat((starts - ends + sizes).astype(dtype), sizes), out=within)
