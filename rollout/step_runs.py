"""Steps of the same requests that follow each other, turned round: what one request got lies together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rl.sample import NDArray
from rollout.engine_step import Step

_TURNED_AT_ONCE = 32
"""Steps."""


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
        self.first = step
        self.names = step.names.split("\n")
        self._place = {name: at for at, name in enumerate(self.names)}
        self._first_row = (np.cumsum(step.counts) - step.counts).tolist()
        self._counts = step.counts.tolist()
        self._got = step.sampled.tolist()  # 1 for a request that gets a token at every step, else 0
        self._token = (np.cumsum(step.sampled, dtype=np.int64) - step.sampled).tolist()
        self._next = step.starts + step.counts
        self._num_steps, self._num_turned = 1, 0
        self._loose = [step]
        # Of all steps that were turned, with room for more: [N, steps] and [R, steps, W].
        self._token_ids = np.empty((len(step.token_ids), 0), np.int32)
        self._logprobs = np.empty((len(step.token_ids), 0), np.float32)
        self._kept_sizes = np.empty((len(step.token_ids), 0), np.int32)
        self._rows = np.empty((len(step.rows), 0, step.rows.shape[1]), np.uint8)
        self._kept: list[tuple[NDArray, list[int]]] = []  # ids, those of a token together, and where each one's begin

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
            self._turn()
        return True

    def num_tokens(self, name: str) -> int:
        return self._num_steps * self._got[self._place[name]]

    def start(self, name: str) -> int:
        return int(self.first.starts[self._place[name]])

    def end(self, name: str) -> int:
        return int(self._next[self._place[name]])

    def rows(self, name: str) -> NDArray:
        """uint8 [steps * count, W] of the tokens from :meth:`start` on; may be a view of all that the run holds."""
        self._turn()
        at = self._place[name]
        first, count, width = self._first_row[at], self._counts[at], self._rows.shape[2]
        rows = self._rows[first : first + count, : self._num_steps]
        return rows.transpose(1, 0, 2).reshape(self._num_steps * count, width)

    def column(self, name: str) -> Column | None:
        """Views of all that the run holds; None for a request that gets no tokens."""
        self._turn()
        at, steps = self._place[name], self._num_steps
        if not self._got[at]:
            return None
        token = self._token[at]
        return Column(
            self._token_ids[token, :steps],
            self._logprobs[token, :steps],
            None if self.first.kept_sizes is None else self._kept_sizes[token, :steps],
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
