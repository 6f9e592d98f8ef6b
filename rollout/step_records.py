"""What an engine recorded, taken in a step at a time and given out a request at a time.

vLLM would hand out everything it records of a token as objects of that token's own: log-probability, kept set, experts.
With hundreds of requests at once they cost more than generating does. Here a step stays whole (`rollout.engine_step`:
a handful of arrays), some steps at a time are turned round as they come (`rollout.turned_steps`), and nothing is done
for every token in Python. Knows vLLM by its names only; `rollout.vllm_recording` makes the steps.
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
from rollout.fed_tokens import FedTokens
from rollout.prefix_rows import PrefixRows
from rollout.turned_steps import LooseStep, Share, TurnedSteps

_TURNED_AT_ONCE = 32
"""Steps."""
_MOST_READ = 16
"""Requests that read loose steps; for more it takes less to turn them."""


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
    turned: list[TurnedSteps] = field(default_factory=list)
    num_turned: int = 0  # tokens
    cached: list[tuple[int, NDArray]] = field(default_factory=list)  # rows of its tokens that others computed


class StepRecords:
    """All steps of which somebody has yet to read something."""

    def __init__(self, cache_tokens: int) -> None:
        """``cache_tokens``: how many the engine's prefix cache can hold."""
        self._open: dict[str, _Open] = {}
        self._loose: list[LooseStep] = []
        self._num_read = 0  # requests, since steps were turned last
        self._thin: dict[TurnedSteps, None] = {}  # steps of which few requests are still open
        self._fed = FedTokens()
        self._block = 0
        self._generation = 0
        self._prefixes = PrefixRows(cache_tokens)
        self._news = asyncio.Event()

    def open(self, name: str, prompt: NDArray) -> None:
        """Before the request ``name`` is given to the engine; a name is never used twice."""
        self._open[name] = _Open(np.ascontiguousarray(prompt, np.int32))
        self._fed.open(name)

    def close(self, name: str) -> None:
        if opened := self._open.pop(name, None):
            self._fed.close(name)
            self._leave(opened)

    def add(self, step: Step) -> None:
        loose = LooseStep(step)
        if self._loose and self._loose[-1].kind != loose.kind:
            self._turn()
        if step.generation > self._generation:
            self._begin(step.generation)
        self._block = step.block
        self._loose.append(loose)
        # Once all have what the step brings: a request may go on behind what another one computes in this very step.
        for name, begin, end in self._fed.take(step.names, step.starts, step.counts):
            self._find_cached(name, begin, end)
        if len(self._loose) == _TURNED_AT_ONCE:
            self._turn()
        self._news.set()

    def _turn(self) -> None:
        """Some steps at a time: all at once would keep those who wait for requests that end together."""
        if not self._loose:
            return
        turned = TurnedSteps(self._loose)
        for name, num_tokens in turned.num_tokens.items():
            opened = self._open.get(name)
            if opened is not None:
                opened.turned.append(turned)
                opened.num_turned += num_tokens
                turned.num_open += 1
        self._loose, self._num_read = [], 0
        self._thin[turned] = None
        self._cut()

    def _cut(self) -> None:
        """A request that goes on for long would keep what all others got that ran beside it."""
        for turned in self._thin:
            if turned.is_thin:
                turned.keep(self._open)
        self._thin.clear()

    def _leave(self, opened: _Open) -> None:
        for turned in opened.turned:
            turned.num_open -= 1
            if turned.is_thin:
                self._thin[turned] = None
        opened.turned, opened.num_turned = [], 0

    def _begin(self, generation: int) -> None:
        """What is computed from now on may be of other weights: prompts of which nothing was sampled yet anew."""
        self._generation = generation
        self._prefixes.clear()
        for name, opened in self._open.items():
            if not self._num_tokens(name):
                self._leave(opened)
                self._fed.forget(name)
                opened.cached = []

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
        return self._open[name].num_turned + sum(loose.num_tokens(name) for loose in self._loose)

    def read(self, name: str, num_tokens: int, *, width: int) -> Record:
        """What there is of the request and its first ``num_tokens`` tokens; forgets it."""
        self._num_read += 1
        if self._num_read >= _MOST_READ:
            self._turn()
        opened = self._open[name]
        shares = list(self._shares(name, opened))
        drawn = _joined([share.token_ids for share in shares], np.int32)
        token_ids = drawn[:num_tokens]
        logprobs = _joined([share.logprobs for share in shares], np.float32)[:num_tokens]
        fed = [*opened.cached, *(piece for share in shares for piece in share.fed)]
        rows, recorded = _rows(fed, len(opened.prompt) + len(token_ids), width)
        # What was computed beyond these tokens is in the engine's cache as well.
        current = all(share.generation == self._generation for share in shares)
        if len(token_ids) == len(drawn) and current and _follow_each_other(fed):
            cached_now = [(0, rows[: np.count_nonzero(recorded)])]  # all of it, put together already
        else:
            cached_now = [(start, piece.copy()) for start, piece in self._cached_now(shares)]
        self._prefixes.add(np.concatenate([opened.prompt, drawn]), self._block, cached_now)
        self.close(name)
        return Record(
            token_ids=token_ids, logprobs=logprobs, kept=_kept(shares, num_tokens), rows=rows, recorded=recorded
        )

    def _shares(self, name: str, opened: _Open) -> Iterator[Share]:
        """Of all steps that the request was in."""
        for turned in opened.turned:
            yield turned.share(name)
        for loose in self._loose:
            if share := loose.share(name):
                yield share

    def _cached_now(self, shares: Iterable[Share]) -> Iterator[tuple[int, NDArray]]:
        """What lies in the engine's cache of a request, the newest last."""
        for share in shares:
            if share.generation == self._generation:
                yield from share.fed

    def _find_cached(self, name: str, begin: int, end: int) -> None:
        """What others computed of a request's tokens from ``begin`` to ``end`` is in the cache: of its prompt, or after
        a preemption."""
        opened = self._open[name]
        prefix = (opened.prompt if end <= len(opened.prompt) else self._sequence(name, opened))[:end]
        others = [(of, other) for of, other in self._open.items() if other is not opened]
        prompts = ((other.prompt, self._cached_now(self._shares(of, other))) for of, other in others)
        # Seldom is it somebody's reply: the likeliest tokens, or equal seeds.
        replies = ((self._sequence(of, other), self._cached_now(self._shares(of, other))) for of, other in others)
        for at, rows in self._prefixes.find(prefix, self._block, itertools.chain(prompts, replies)):
            if at + len(rows) > begin:
                opened.cached.append((max(at, begin), rows[max(0, begin - at) :]))

    def _sequence(self, name: str, opened: _Open) -> NDArray:
        """The prompt and the tokens so far."""
        return np.concatenate([opened.prompt, *(share.token_ids for share in self._shares(name, opened))])


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


def _kept(shares: Sequence[Share], num_tokens: int) -> Kept | None:
    """None where they were not recorded."""
    of_shares = [share.kept_sizes for share in shares if share.kept_sizes is not None]
    if len(of_shares) < len(shares):
        return None
    sizes = _joined(of_shares, np.int32)[:num_tokens]
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return Kept(ids=_joined([share.kept_ids for share in shares], np.int32)[: offsets[-1]], offsets=offsets)


def _joined(parts: Sequence[NDArray], dtype: Any) -> NDArray:
    """A copy: a part would keep what others got."""
    if len(parts) == 1:
        return parts[0].copy()
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
