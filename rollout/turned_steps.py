"""Steps of an engine, turned round some at a time: what one request got lies together, whoever else was in a step."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple, Self

import numpy as np

from rl.sample import NDArray
from rollout.engine_step import Step

_THIN = 8
"""Steps that were turned are cut when this part of their requests, or less, may still be read."""


class Share(NamedTuple):
    """What a request got of steps that follow each other; may be views of what all got."""

    generation: int
    token_ids: NDArray  # int32 [S]
    logprobs: NDArray  # float32 [S]
    kept_sizes: NDArray | None  # int32 [S]
    kept_ids: NDArray  # int32, of these sets one behind another
    fed: list[tuple[int, NDArray]]  # positions, and uint8 [count, W] of the tokens from there on

    def copied(self) -> Share:
        sizes = None if self.kept_sizes is None else self.kept_sizes.copy()
        fed = [(start, rows.copy()) for start, rows in self.fed]
        streams = self.token_ids.copy(), self.logprobs.copy(), sizes, self.kept_ids.copy()
        return Share(self.generation, *streams, fed)


@lru_cache(maxsize=64)
def places_of(names: str) -> dict[str, int]:
    """Of each request in a step's `Step.names`; steps that follow each other often have the same ones."""
    return {name: place for place, name in enumerate(names.split("\n"))}


class LooseStep:
    """One step as it came."""

    def __init__(self, step: Step) -> None:
        self.step = step

    @property
    def kind(self) -> tuple[int, bool, int]:
        """Steps of one kind may be turned together."""
        return self.step.generation, self.step.kept_sizes is None, self.step.rows.shape[1]

    def num_tokens(self, name: str) -> int:
        place = places_of(self.step.names).get(name)
        return 0 if place is None else int(self.step.sampled[place])

    def share(self, name: str) -> Share | None:
        place = places_of(self.step.names).get(name)
        if place is None:
            return None
        step = self.step
        end, token = int(self._row_ends[place]), int(self._token_ends[place])
        rows = step.rows[end - int(step.counts[place]) : end]
        fed = [(int(step.starts[place]), rows)] if len(rows) else []
        got = slice(token - int(step.sampled[place]), token)
        sizes, ids = None, step.kept_ids[:0]
        if step.kept_sizes is not None:
            sizes = step.kept_sizes[got]
            for first, size in zip(step.kept_starts[got].tolist(), sizes.tolist(), strict=True):
                ids = step.kept_ids[first : first + size]
        return Share(step.generation, step.token_ids[got], step.logprobs[got], sizes, ids, fed)

    @cached_property
    def _row_ends(self) -> NDArray:
        return np.cumsum(self.step.counts)

    @cached_property
    def _token_ends(self) -> NDArray:
        return np.cumsum(self.step.sampled, dtype=np.int64)


class TurnedSteps:
    """Steps of one kind that follow each other."""

    def __init__(self, loose: Sequence[LooseStep]) -> None:
        steps = [each.step for each in loose]
        self.generation = steps[0].generation
        self.num_open = 0
        """Requests that may still be read, as whoever has the steps counts them."""
        who, self.places = _numbered([step.names for step in steps])
        sampled = np.concatenate([step.sampled for step in steps]).astype(bool)
        counts, starts = (np.concatenate([getattr(step, name) for step in steps]) for name in ("counts", "starts"))
        self.num_tokens = dict(zip(self.places, np.bincount(who[sampled], minlength=len(self)).tolist(), strict=True))
        """That each request got."""
        tokens = _Tokens.of(steps, who[sampled], len(self))
        self._held = tokens, _Rows.of(steps, np.repeat(who, counts), starts, counts, len(self))
        self._cut: dict[str, Share] = {}

    def __len__(self) -> int:
        """Requests that it has something of."""
        return len(self.places)

    @property
    def is_thin(self) -> bool:
        """Whether few of its requests may still be read."""
        return 0 < self.num_open * _THIN < len(self)

    def keep(self, names: Container[str]) -> None:
        """Lets go of what other requests got."""
        self._cut = {name: self.share(name).copied() for name in self.places if name in names}
        self.places = {name: place for place, name in enumerate(self._cut)}
        self._held = None

    def share(self, name: str) -> Share:
        if self._held is None:
            return self._cut[name]
        number, (tokens, rows) = self.places[name], self._held
        got = slice(*tokens.edges[number : number + 2].tolist())
        sizes = None if tokens.kept_sizes is None else tokens.kept_sizes[got]
        ids = tokens.kept_ids[slice(*tokens.kept_edges[number : number + 2].tolist())]
        return Share(self.generation, tokens.token_ids[got], tokens.logprobs[got], sizes, ids, rows.of_request(number))


class _Tokens(NamedTuple):
    """N tokens, those of a request together."""

    token_ids: NDArray  # int32 [N]
    logprobs: NDArray  # float32 [N]
    kept_sizes: NDArray | None  # int32 [N]
    kept_ids: NDArray  # int32
    edges: NDArray  # [requests + 1], of each one's tokens
    kept_edges: NDArray  # [requests + 1], of each one's ids

    @classmethod
    def of(cls, steps: Sequence[Step], owners: NDArray, num_requests: int) -> Self:
        """``owners`` [N]: the number of the request that each token is of."""
        order = np.argsort(owners, kind="stable")
        token_ids = np.concatenate([step.token_ids for step in steps])[order]
        logprobs = np.concatenate([step.logprobs for step in steps])[order]
        edges = _edges(np.bincount(owners, minlength=num_requests))
        of_steps = [step.kept_sizes for step in steps if step.kept_sizes is not None]
        if not of_steps:
            return cls(token_ids, logprobs, None, np.zeros(0, np.int32), edges, np.zeros_like(edges))
        sizes, joined = np.concatenate(of_steps)[order], np.concatenate([step.kept_ids for step in steps])
        index = np.int32 if len(joined) <= np.iinfo(np.int32).max else np.int64
        begins = np.cumsum([0, *(len(step.kept_ids) for step in steps[:-1])], dtype=index)
        starts = np.concatenate([step.kept_starts + at for step, at in zip(steps, begins, strict=True)])[order]
        return cls(token_ids, logprobs, sizes, joined[_spans(starts, sizes)], edges, _edges(sizes)[edges])


class _Rows(NamedTuple):
    """R rows, those of a request together, in P pieces of positions that follow each other."""

    rows: NDArray  # uint8 [R, W]
    begins: NDArray  # [P + 1], of each piece among the rows
    positions: NDArray  # [P], of each piece's first row in its sequence
    edges: NDArray  # [requests + 1], of each one's pieces

    @classmethod
    def of(cls, steps: Sequence[Step], owners: NDArray, starts: NDArray, counts: NDArray, num_requests: int) -> Self:
        """``owners`` [R]: the number of the request that each row is of; ``starts`` and ``counts`` as in the steps."""
        order = np.argsort(owners, kind="stable")
        owners = owners[order]
        positions = (np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(len(order)))[order]
        rows = np.empty((len(order), steps[0].rows.shape[1]), np.uint8)
        goes_to, begin = np.empty_like(order), 0
        goes_to[order] = np.arange(len(order))
        for step in steps:  # rows may be large: each is moved once
            rows[goes_to[begin : begin + len(step.rows)]] = step.rows
            begin += len(step.rows)
        follows = (np.diff(positions) == 1) & (owners[1:] == owners[:-1])
        firsts = np.concatenate([np.zeros(min(1, len(order)), np.int64), 1 + np.flatnonzero(~follows)])
        edges = np.searchsorted(owners[firsts], np.arange(num_requests + 1))
        return cls(rows, np.append(firsts, len(order)), positions[firsts], edges)

    def of_request(self, number: int) -> list[tuple[int, NDArray]]:
        """Positions, and the rows from there on."""
        first, last = self.edges[number : number + 2].tolist()
        begins, positions = self.begins[first : last + 1].tolist(), self.positions[first:last].tolist()
        return [(at, self.rows[begins[n] : begins[n + 1]]) for n, at in enumerate(positions)]


def _numbered(of_steps: Iterable[str]) -> tuple[NDArray, dict[str, int]]:
    """Numbers of the requests of all steps, one behind another, and the number of each name."""
    numbers: dict[str, int] = {}
    last, found = None, []
    for names in of_steps:
        if names != last:
            found.append(np.array([numbers.setdefault(name, len(numbers)) for name in names.split("\n")], np.int32))
        else:
            found.append(found[-1])
        last = names
    who = np.concatenate(found)
    return who.astype(np.uint16) if len(numbers) < 1 << 16 else who, numbers  # numpy sorts small ones faster


def _edges(sizes: NDArray) -> NDArray:
    edges = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=edges[1:])
    return edges


def _spans(starts: NDArray, sizes: NDArray) -> NDArray:
    """start, start + 1, ... of each span, one after another."""
    ends = np.cumsum(sizes, dtype=starts.dtype)
    within = np.arange(ends[-1] if len(ends) else 0, dtype=starts.dtype)
    return np.add(within, np.repeat(starts - ends + sizes, sizes), out=within)
