"""Which tokens sparse attention kept, as an engine recorded them (Keep Selection)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NDArray = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Selections:
    """Which tokens of a sequence of T each of its positions attended to, in every layer, where some were left out.

    Position t sees t + 1 tokens: below ``top_k`` it attends to all of them and has no row. Others may have none either:
    what was never fed, such as the last token, or what nobody recorded. Rows are bits where that takes less room
    (T < 16 * top_k, about) and positions otherwise: the lesser of T / 8 and 2 * top_k bytes a layer (4 * top_k beyond
    65,536 tokens), so that 61 layers of 2048 take 250 kB a token from 32K tokens on. The sample that holds them checks
    them (:meth:`fault`), as it can say whose they are.
    """

    top_k: int
    recorded: NDArray  # bool [T]: which positions have a row, R of them
    rows: NDArray  # uint8 [R, layers, ceil(T / 8)], lowest bit first; or uint16, uint32 [R, layers, top_k], ascending

    @classmethod
    def of(cls, keys: NDArray, recorded: NDArray) -> Selections:
        """From positions, integers [R, layers, top_k] that ascend, of those that are recorded, bool [T]."""
        num_tokens, top_k = len(recorded), keys.shape[2]
        width = -(-num_tokens // 8)
        dtype = np.uint16 if num_tokens <= 1 << 16 else np.uint32
        if width >= top_k * np.dtype(dtype).itemsize:
            return cls(top_k=top_k, recorded=recorded, rows=keys.astype(dtype))
        bits = np.zeros((*keys.shape[:2], 8 * width), bool)
        np.put_along_axis(bits, keys.astype(np.int64), True, axis=2)
        return cls(top_k=top_k, recorded=recorded, rows=np.packbits(bits, axis=2, bitorder="little"))

    @classmethod
    def of_bits(cls, bits: NDArray, recorded: NDArray, top_k: int) -> Selections:
        """From uint8 [R, layers, at least T / 8], lowest bit first, whichever form then takes less room."""
        found = cls(top_k=top_k, recorded=recorded, rows=np.ascontiguousarray(bits[:, :, : -(-len(recorded) // 8)]))
        return found if len(found) < 16 * top_k else cls.of(found.keys, recorded)

    def __len__(self) -> int:
        return len(self.recorded)

    @property
    def num_layers(self) -> int:
        return self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        return self.recorded.nbytes + self.rows.nbytes

    @property
    def keys(self) -> NDArray:
        """The rows as positions: unsigned integers [R, layers, top_k], ascending."""
        if self.rows.dtype != np.uint8:
            return self.rows
        bits = np.unpackbits(self.rows, axis=2, bitorder="little")
        places = np.flatnonzero(bits) % max(1, bits.shape[2])
        dtype = np.uint16 if len(self) <= 1 << 16 else np.uint32
        return places.astype(dtype).reshape(*self.rows.shape[:2], self.top_k)

    def extended(self, num_tokens: int) -> Selections:
        """The same of a longer sequence, whose further tokens have no row."""
        if num_tokens == len(self):
            return self
        recorded = np.concatenate([self.recorded, np.zeros(num_tokens - len(self), bool)])
        return Selections.of(self.keys, recorded)

    def filled(self, other: Selections) -> Selections:
        """With the rows of ``other``, of the same length, where there are none here."""
        added = other.recorded & ~self.recorded
        recorded = self.recorded | added
        mine, theirs = self.keys, other.keys
        keys = np.empty((np.count_nonzero(recorded), *mine.shape[1:]), mine.dtype)
        keys[self.recorded[recorded]] = mine
        keys[added[recorded]] = theirs[added[other.recorded]]
        return Selections.of(keys, recorded)

    def fault(self) -> str | None:
        """What is wrong with them, to be said after "selections"; None where nothing is."""
        at = np.flatnonzero(self.recorded)
        width = -(-len(self) // 8) if self.rows.dtype == np.uint8 else self.top_k
        if self.rows.ndim != 3 or (len(self.rows), self.rows.shape[2]) != (len(at), width):
            return f"has rows of shape {self.rows.shape} for {len(at)} recorded positions, each {width} wide"
        if len(at) and at[0] < self.top_k:
            return f"has a row for position {at[0]}, which sees {at[0] + 1} tokens and leaves none out of {self.top_k}"
        if self.rows.dtype == np.uint8:
            sizes = np.bitwise_count(self.rows).sum(axis=2, dtype=np.int64)
            if len(wrong := np.argwhere(sizes != self.top_k)):
                row, layer = wrong[0]
                return f"keeps {sizes[row, layer]} tokens for position {at[row]} in layer {layer}, not {self.top_k}"
        keys = self.keys
        for wrong, words in (
            ((keys[:, :, 1:] <= keys[:, :, :-1]).any(axis=(1, 2)), "does not ascend"),
            (keys[:, :, -1].max(axis=1, initial=0) > at, "keeps a later token"),
        ):
            if wrong.any():
                return f"{words} for position {at[wrong][0]}"
        return None


def bytes_per_token(num_layers: int, top_k: int, num_tokens: int) -> int:
    """The most that a token of a sequence of ``num_tokens`` takes, whose attention keeps ``top_k`` in every layer."""
    if num_tokens <= top_k:
        return 0
    return num_layers * min(-(-num_tokens // 8), top_k * (2 if num_tokens <= 1 << 16 else 4))


def carried_bytes_per_token(num_layers: int, max_context: int) -> int:
    """What a token takes within a vLLM engine: a bit for each of ``max_context`` tokens, in words of 32."""
    return num_layers * 4 * -(-max_context // 32)
