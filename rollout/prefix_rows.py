"""What was recorded of tokens that an engine finds in its prefix cache, and so does not compute again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

import numpy as np

from rl.sample import NDArray

Pieces = Iterable[tuple[int, NDArray]]
"""Positions, and the rows from there on."""


class PrefixRows:
    """Rows of whole blocks of tokens, by all tokens up to a block's end.

    Of more than ``room`` tokens (what an engine's cache holds) the least recently used blocks go first.
    """

    def __init__(self, room: int) -> None:
        self._blocks: OrderedDict[bytes, NDArray] = OrderedDict()
        self._room = room
        self._unsorted: deque[tuple[NDArray, int, Pieces]] = deque()
        self._num_unsorted = 0  # tokens

    def clear(self) -> None:
        self._blocks.clear()
        self._unsorted.clear()
        self._num_unsorted = 0

    def add(self, tokens: NDArray, block: int, pieces: Pieces) -> None:
        """All whole blocks of a sequence of which every token has a row; of two rows of a token the later one.

        The newest ``pieces`` are kept as they are until somebody looks for any: most are never looked for.
        """
        self._unsorted.append((tokens, block, pieces))
        self._num_unsorted += len(tokens)
        self._sort(self._room // 8)

    def _sort(self, most: int = 0) -> None:
        """All but the newest ``most`` tokens."""
        while self._num_unsorted > most:
            tokens, block, pieces = self._unsorted.popleft()
            self._num_unsorted -= len(tokens)
            self._add(tokens, block, pieces)

    def _add(self, tokens: NDArray, block: int, pieces: Pieces) -> None:
        blocks = _whole_blocks(len(tokens), block, pieces)
        if not blocks:
            return
        for number, digest in enumerate(_digests(tokens, block)):
            if number in blocks:
                self._blocks[digest] = blocks[number]
                self._blocks.move_to_end(digest)
        while len(self._blocks) * block > self._room:
            self._blocks.popitem(last=False)

    def find(self, prefix: NDArray, block: int, others: Iterable[tuple[NDArray, Pieces]]) -> list[tuple[int, NDArray]]:
        """The rows of a cached ``prefix``, from what was added, or else from the tokens and rows of ``others``, which
        are still under way. Those of a block that nobody has any more are left out."""
        self._sort()
        digests = list(_digests(prefix, block))
        found = {number: self._blocks[digest] for number, digest in enumerate(digests) if digest in self._blocks}
        for number in found:
            self._blocks.move_to_end(digests[number])
        missing = set(range(len(digests))) - found.keys()
        for tokens, pieces in others if missing else ():
            shared = _shared(prefix, tokens)
            if any((number + 1) * block <= shared for number in missing):
                theirs = _whole_blocks(shared, block, pieces)
                found |= {number: theirs[number] for number in missing & theirs.keys()}
                missing -= theirs.keys()
            if not missing:
                break
        return [(number * block, found[number]) for number in sorted(found)]


def _digests(tokens: NDArray, block: int) -> Iterator[bytes]:
    """Of the tokens up to the end of each whole block."""
    if not block:
        return
    digest, data = b"", np.ascontiguousarray(tokens, np.int32).tobytes()
    for start in range(0, 4 * (len(tokens) // block * block), 4 * block):
        digest = hashlib.blake2b(digest + data[start : start + 4 * block], digest_size=16).digest()
        yield digest


def _shared(prefix: NDArray, tokens: NDArray) -> int:
    """How many tokens they begin with in common."""
    length = min(len(prefix), len(tokens))
    differ = np.flatnonzero(prefix[:length] != tokens[:length])
    return int(differ[0]) if len(differ) else length


def _whole_blocks(length: int, block: int, pieces: Pieces) -> dict[int, NDArray]:
    """The rows of the whole blocks within the first ``length`` tokens, of those whose every token has one."""
    rows: NDArray | None = None
    have = np.zeros(length, bool)
    for start, piece in pieces:
        piece = piece[: max(0, length - start)]
        rows = np.zeros((length, piece.shape[1]), piece.dtype) if rows is None else rows
        rows[start : start + len(piece)] = piece
        have[start : start + len(piece)] = True
    whole = have[: length // block * block].reshape(-1, block).all(axis=1) if rows is not None and block else ()
    return {} if rows is None else {int(n): rows[n * block : (n + 1) * block].copy() for n in np.flatnonzero(whole)}
