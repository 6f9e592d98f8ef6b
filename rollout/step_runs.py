"""Steps of the same requests that follow each other, turned round: what one request got lies together."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np

from rl.sample import NDArray
from rollout.engine_step import Step

_TURNED_AT_ONCE = 32
"""Steps."""
_THIN = 8
"""A run with something of this many times as many requests as may still be read is cut."""


class Column(NamedTuple):
    """What a request was given by S steps."""

    token_ids: NDArray  # int32 [S]
    logprobs: NDArray  # float32 [S]
    kept_sizes: NDArray | None  # int32 [S]
    kept_ids: list[NDArray]  # int32, all of them in as many pieces as it took


class Run:
    """Steps of the same B requests, R fed tokens and N next tokens each, as one.

    They are turned round as they come, some at a time: all at once would keep those who wait for requests that end
    together.
    """

    def __init__(self, step: Step) -> None:
        self.generation, self.block = step.generation, step.block
        self.records_kept = step.kept_sizes is not None
        self.num_open = 0
        """Requests that may still be read, as whoever has the run counts them."""
        self._all, self._counts, self._sampled = step.names, step.counts, step.sampled
        self._starts, self._next = step.starts, step.starts + step.counts
        self._settle(step.names.split("\n"))
        self._num_steps, self._num_turned = 1, 0
        self._loose = [step]
        # Of all steps that were turned, with room for more: [N, steps] and [R, steps, W].
        self._token_ids = np.empty((len(step.token_ids), 0), np.int32)
        self._logprobs = np.empty((len(step.token_ids), 0), np.float32)
        self._kept_sizes = np.empty((len(step.token_ids), 0), np.int32)
        self._rows = np.empty((len(step.rows), 0, step.rows.shape[1]), np.uint8)
        self._kept: list[tuple[NDArray, list[int]]] = []  # ids, those of a token together, and where each one's begin

    def _settle(self, names: list[str]) -> None:
        """Where each of the requests lies."""
        self.names = names
        self._place = {name: at for at, name in enumerate(names)}
        self._first_row = (np.cumsum(self._counts) - self._counts).tolist()
        self._token = (np.cumsum(self._sampled, dtype=np.int64) - self._sampled).tolist()

    def take(self, step: Step) -> bool:
        """Whether the step goes on with this run; it is part of it then."""
        if (step.names, step.generation) != (self._all, self.generation) or not (
            np.array_equal(step.counts, self._counts)
            and np.array_equal(step.sampled, self._sampled)
            and np.array_equal(step.starts, self._next)
        ):
            return False
        self._next = step.starts + step.counts
        self._num_steps += 1
        self._loose.append(step)
        if len(self._loose) == _TURNED_AT_ONCE:
            self._turn()
        return True

    @property
    def is_thin(self) -> bool:
        """Whether few of the requests that it holds something of may still be read."""
        return 0 < self.num_open * _THIN < len(self.names)

    def keep(self, names: Container[str]) -> None:
        """Lets go of what other requests got. No step goes on with the run any more."""
        self._turn()
        at = [place for place, name in enumerate(self.names) if name in names]
        tokens = [self._token[place] for place in at if self._sampled[place]]
        rows = [self._first_row[place] + row for place in at for row in range(self._counts[place])]
        self._token_ids, self._logprobs, self._kept_sizes = (
            array[tokens, : self._num_steps] for array in (self._token_ids, self._logprobs, self._kept_sizes)
        )
        self._rows = self._rows[rows, : self._num_steps]
        self._kept = [_of_tokens(ids, edges, tokens) for ids, edges in self._kept]
        self._counts, self._sampled = self._counts[at], self._sampled[at]
        self._starts, self._next = self._starts[at], self._next[at]
        self._all = ""
        self._settle([self.names[place] for place in at])

    def num_tokens(self, name: str) -> int:
        return self._num_steps * int(self._sampled[self._place[name]])

    def start(self, name: str) -> int:
        return int(self._starts[self._place[name]])

    def end(self, name: str) -> int:
        return int(self._next[self._place[name]])

    def rows(self, name: str) -> NDArray:
        """uint8 [steps * count, W] of the tokens from :meth:`start` on; may be a view of all that the run holds."""
        self._turn()
        at = self._place[name]
        first, count, width = self._first_row[at], int(self._counts[at]), self._rows.shape[2]
        rows = self._rows[first : first + count, : self._num_steps]
        return rows.transpose(1, 0, 2).reshape(self._num_steps * count, width)

    def column(self, name: str) -> Column | None:
        """Views of all that the run holds; None for a request that gets no tokens."""
        self._turn()
        at, steps = self._place[name], self._num_steps
        if not self._sampled[at]:
            return None
        token = self._token[at]
        return Column(
            self._token_ids[token, :steps],
            self._logprobs[token, :steps],
            self._kept_sizes[token, :steps] if self.records_kept else None,
            [ids[edges[token] : edges[token + 1]] for ids, edges in self._kept],
        )

    def _turn(self) -> None:
        if not self._loose:
            return
        steps, self._loose = self._loose, []
        self._make_room()
        new = slice(self._num_turned, self._num_steps)
        np.stack([step.token_ids for step in steps], axis=1, out=self._token_ids[:, new])
        np.stack([step.logprobs for step in steps], axis=1, out=self._logprobs[:, new])
        np.stack([step.rows for step in steps], axis=1, out=self._rows[:, new])
        sizes = [step.kept_sizes for step in steps if step.kept_sizes is not None]
        if sizes:
            np.stack(sizes, axis=1, out=self._kept_sizes[:, new])
            starts = np.stack([step.kept_starts for step in steps])
            self._kept.append(_by_token(np.stack(sizes), starts, [step.kept_ids for step in steps]))
        self._num_turned = self._num_steps

    def _make_room(self) -> None:
        """For all steps that there are; for twice as many as there were, so that little is moved."""
        if self._num_steps > self._token_ids.shape[1]:
            room = max(self._num_steps, 2 * self._num_turned)
            self._token_ids = _wider(self._token_ids, room, self._num_turned)
            self._logprobs = _wider(self._logprobs, room, self._num_turned)
            self._kept_sizes = _wider(self._kept_sizes, room, self._num_turned)
            self._rows = _wider(self._rows, room, self._num_turned)


def _wider(array: NDArray, room: int, used: int) -> NDArray:
    wider = np.empty((len(array), room, *array.shape[2:]), array.dtype)
    wider[:, :used] = array[:, :used]
    return wider


def _of_tokens(ids: NDArray, edges: Sequence[int], tokens: Sequence[int]) -> tuple[NDArray, list[int]]:
    """What :func:`_by_token` returned, of some tokens."""
    parts = [ids[edges[token] : edges[token + 1]] for token in tokens]
    return np.concatenate([ids[:0], *parts]), [0, *itertools.accumulate(map(len, parts))]


def _by_token(sizes: NDArray, starts: NDArray, ids: Sequence[NDArray]) -> tuple[NDArray, list[int]]:
    """The ids of sets [steps, N], of which each step's lie together; instead token by token, and where each begins."""
    joined = np.concatenate(ids)
    firsts = np.cumsum([0, *map(len, ids[:-1])], dtype=np.int32 if len(joined) <= np.iinfo(np.int32).max else np.int64)
    spans = _spans((starts + firsts[:, None]).T.reshape(-1), sizes.T.reshape(-1))
    return joined[spans], [0, *np.cumsum(sizes.sum(axis=0, dtype=np.int64)).tolist()]


def _spans(starts: NDArray, sizes: NDArray) -> NDArray:
    """start, start + 1, ... of each span, one after another."""
    ends = np.cumsum(sizes, dtype=starts.dtype)
    within = np.arange(ends[-1] if len(ends) else 0, dtype=starts.dtype)
    return np.add(within, np.repeat(starts - ends + sizes, sizes), out=within)
