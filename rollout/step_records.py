"""What an engine recorded, taken in a step at a time and given out a request at a time.

vLLM would hand out everything it records of a token as objects of that token's own: log-probability, kept set, experts.
With hundreds of requests at once they cost more than generating does. Here a step stays whole (:class:`Step`: a handful
of arrays), steps of the same requests are put together when one of those requests ends, and nothing is done for every
token in Python. Knows vLLM by its names only; `rollout.vllm_recording` makes the steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
        plain = {name: stream.astype(_DTYPES[name]).tobytes() for name, stream in streams.items() if stream is not None}
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


class Run:
    """Steps of the same requests that follow each other, as one."""

    def __init__(self, step: Step) -> None:
        self.steps = [step]
        self.names = step.names.split("\n")
        self.place = {name: at for at, name in enumerate(self.names)}
        self._first_row = np.cumsum(step.counts) - step.counts
        self._first_token = np.cumsum(step.sampled, dtype=np.int64) - step.sampled
        self._next = step.starts + step.counts

    def take(self, step: Step) -> bool:
        """Whether the step goes on with this run; it is part of it then."""
        first = self.steps[0]
        if (step.names, step.generation) != (first.names, first.generation) or not (
            np.array_equal(step.counts, first.counts)
            and np.array_equal(step.sampled, first.sampled)
            and np.array_equal(step.starts, self._next)
        ):
            return False
        self.steps.append(step)
        self._next = step.starts + step.counts
        for name in ("_tokens", "_logprobs", "_kept", "_rows"):
            self.__dict__.pop(name, None)
        return True

    def num_tokens(self, name: str) -> int:
        return len(self.steps) * int(self.steps[0].sampled[self.place[name]])

    def start(self, name: str) -> int:
        return int(self.steps[0].starts[self.place[name]])

    def rows(self, name: str) -> NDArray:
        """uint8 [steps * count, W] of the tokens from :meth:`start` on."""
        at = self.place[name]
        first, count = self._first_row[at], self.steps[0].counts[at]
        return self._rows[:, first : first + count].reshape(len(self.steps) * count, self._rows.shape[2])

    def tokens(self, name: str) -> tuple[NDArray, NDArray]:
        """Ids and log-probabilities of the tokens that the request got."""
        at = self.place[name]
        if not self.steps[0].sampled[at]:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        return self._tokens[:, self._first_token[at]], self._logprobs[:, self._first_token[at]]

    def kept(self, name: str) -> tuple[NDArray, NDArray]:
        """Sizes of these tokens' kept sets, and all their ids."""
        at = self.place[name]
        if not self.steps[0].sampled[at] or self.steps[0].kept_sizes is None:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        sizes, offsets, ids = self._kept
        of_name = sizes[:, self._first_token[at]]
        return of_name, ids[_spans(offsets[:, self._first_token[at]], of_name)]

    @cached_property
    def _tokens(self) -> NDArray:
        return np.stack([step.token_ids for step in self.steps])

    @cached_property
    def _logprobs(self) -> NDArray:
        return np.stack([step.logprobs for step in self.steps])

    @cached_property
    def _rows(self) -> NDArray:
        return np.stack([step.rows for step in self.steps])

    @cached_property
    def _kept(self) -> tuple[NDArray, NDArray, NDArray]:
        sizes = np.stack([step.kept_sizes for step in self.steps if step.kept_sizes is not None])
        ends = np.cumsum(sizes.reshape(-1), dtype=np.int64).reshape(sizes.shape)
        return sizes, ends - sizes, np.concatenate([step.kept_ids for step in self.steps])


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
            if not any(run.num_tokens(name) for run in opened.runs):
                opened.runs, opened.cached = [], []

    async def take(self, name: str, num_tokens: int, *, width: int, timeout_s: float = 60.0) -> Record:
        """All of a request that has got its last token, and forgets it.

        Raises TimeoutError when its tokens are not recorded within ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while sum(run.num_tokens(name) for run in self._open[name].runs) < num_tokens:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise TimeoutError(
                f"request {name}: its tokens came, but not what they recorded ({timeout_s:g} s)"
            ) from None
        return self.read(name, num_tokens, width=width)

    def read(self, name: str, num_tokens: int, *, width: int) -> Record:
        """What there is of the request and its first ``num_tokens`` tokens; forgets it."""
        opened = self._open[name]
        tokens = [run.tokens(name) for run in opened.runs]
        token_ids = _joined([ids for ids, _ in tokens], np.int32)[:num_tokens]
        sequence = np.concatenate([opened.prompt, token_ids])
        rows, recorded = self._rows(name, opened, len(sequence), width)
        self._keep_for_others(name, opened, sequence)
        self.close(name)
        return Record(
            token_ids=token_ids,
            logprobs=_joined([logprobs for _, logprobs in tokens], np.float32)[:num_tokens],
            kept=_kept(name, opened.runs, num_tokens),
            rows=rows,
            recorded=recorded,
        )

    def _rows(self, name: str, opened: _Open, length: int, width: int) -> tuple[NDArray, NDArray]:
        """Of a position that was fed more than once (after a preemption), what it was first; none of the last token."""
        rows, recorded = np.zeros((length, width), np.uint8), np.zeros(length, bool)
        pieces = [*opened.cached, *((run.start(name), run.rows(name)) for run in opened.runs)]
        for start, piece in pieces:
            _fill(rows, recorded, start, piece[: max(0, length - 1 - start)])
        return rows, recorded

    def _shared_rows(self, name: str, opened: _Open) -> Iterator[tuple[int, NDArray]]:
        """What lies in the engine's cache of the request, the newest last."""
        for run in opened.runs:
            if run.steps[0].generation == self._generation:
                yield run.start(name), run.rows(name)

    def _keep_for_others(self, name: str, opened: _Open, sequence: NDArray) -> None:
        block = max((run.steps[0].block for run in opened.runs), default=0)
        self._prefixes.add(sequence, block, self._shared_rows(name, opened))

    def _find_cached(self, name: str, block: int) -> None:
        """When a request begins behind its first token, what others computed of its prompt is in the cache."""
        opened = self._open.get(name)
        if opened is None or len(opened.runs) > 1 or not (until := opened.runs[0].start(name)):
            return
        others = (
            (other.prompt, self._shared_rows(of, other)) for of, other in self._open.items() if other is not opened
        )
        opened.cached = self._prefixes.find(opened.prompt[:until], block, others)


def _fill(rows: NDArray, recorded: NDArray, start: int, piece: NDArray) -> None:
    """Puts the rows of a piece where none are yet."""
    span = slice(start, start + len(piece))
    if recorded[span].any():
        empty = ~recorded[span]
        rows[span][empty] = piece[empty]
    else:
        rows[span] = piece
    recorded[span] = True


def _kept(name: str, runs: Sequence[Run], num_tokens: int) -> Kept | None:
    if any(run.steps[0].kept_sizes is None for run in runs):
        return None
    found = [run.kept(name) for run in runs]
    sizes = _joined([sizes for sizes, _ in found], np.int32)[:num_tokens]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Kept(ids=_joined([ids for _, ids in found], np.int32)[: offsets[-1]], offsets=offsets)


def _joined(parts: Sequence[NDArray], dtype: Any) -> NDArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _spans(starts: NDArray, sizes: NDArray) -> NDArray:
    """start, start + 1, ... of each span, one after another."""
    before = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)
