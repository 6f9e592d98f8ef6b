"""64-bit checksums of tensors, for telling whether two processes hold the same weights, whole or cut into shards."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.checksum import HashTable, Words

_MOST_TABLES = 32
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """A 64-bit checksum of each tensor, by name: equal bits in equal order on any device give equal numbers.

    Each word is hashed together with its index, and the hashes are added modulo 2**64 (`kernels.checksum`). A change
    in one word always shows, because the hash is a bijection of the word; so does an exchange of two, up to a chance
    of 2**-64. Shape and dtype count too.

    As the sum is additive, the sums of shards add up to the checksum of the whole: see :class:`Piece`.
    """
    sums = Checksums()
    for name, tensor in named_tensors:
        sums.add({name: tensor})
    return sums.result()


class Checksums:
    """:func:`checksums` of tensors that come one after another; nothing waits for the device before the end."""

    def __init__(self, tables: SumTables | None = None) -> None:
        """``tables``: those of earlier ones, where tensors often lie where others lay."""
        self._tables = tables or SumTables()
        self._descriptions: dict[str, int] = {}
        self._sums: list[torch.Tensor] = []

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Of one device; on a GPU at one launch."""
        descriptions, sums = self._tables.sums(list(tensors.values()))
        self._descriptions |= zip(tensors, descriptions, strict=True)
        self._sums.append(sums)

    def result(self) -> dict[str, int]:
        totals = torch.cat(self._sums).tolist() if self._sums else []
        return {
            name: (description + total) % (1 << 64)
            for (name, description), total in zip(self._descriptions.items(), totals, strict=True)
        }


class SumTables:
    """:func:`word_sums` of whole tensors; what a launch on a GPU needs is kept for tensors that lie where these do."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[Any, ...], tuple[list[int], HashTable]] = OrderedDict()

    def sums(self, tensors: Sequence[torch.Tensor]) -> tuple[list[int], torch.Tensor]:
        """What each's :func:`hash_description` is, and their sums, int64 [tensors]."""
        if not tensors or not tensors[0].is_cuda:
            return _descriptions(tensors), word_sums((tensor, None) for tensor in tensors)
        places = tuple([(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors])
        found = self._tables.pop(places, None)
        if found is None:
            words = [_words(tensor, None) for tensor in tensors]
            if any(of.data_ptr() != tensor.data_ptr() for (of, _, _), tensor in zip(words, tensors, strict=True)):
                return _descriptions(tensors), HashTable(words).sums()  # of copies, which will be gone
            found = _descriptions(tensors), HashTable(words, keeps=False)
        self._tables[places] = found
        if len(self._tables) > _MOST_TABLES:
            self._tables.popitem(last=False)
        descriptions, table = found
        return descriptions, table.sums()


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Where a shard lies in its tensor: ``length`` of ``shape[axis]``, from ``start`` on. A scalar has shape (1,)."""

    shape: tuple[int, ...]  # of the whole tensor
    axis: int = 0
    start: int = 0
    length: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Piece:
        shape = tuple(shape) or (1,)
        return cls(shape=shape, length=shape[0])

    @property
    def shard_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.axis], self.length, *self.shape[self.axis + 1 :])


def word_sum(tensor: torch.Tensor, piece: Piece | None = None) -> torch.Tensor:
    """:func:`word_sums` of one tensor, an int64 scalar."""
    return word_sums([(tensor, piece)])[0]


def word_sums(parts: Iterable[tuple[torch.Tensor, Piece | None]]) -> torch.Tensor:
    """int64 [parts] on the tensors' device: of each the hashes of its words, at the places that they have in the whole.

    A word is as many bytes, 8 at most, as divide a row of the whole. Raises ValueError for a shard whose columns are
    cut inside one.
    """
    return HashTable([_words(tensor, piece) for tensor, piece in parts]).sums()


class LiveSums:
    """:func:`word_sums` of tensors that others write, again and again."""

    def __init__(self, parts: Iterable[tuple[torch.Tensor, Piece, torch.dtype]]) -> None:
        """``parts``: each with its dtype in the whole; from a wider one that a tensor may have, it is converted."""
        words, self._copies, self._copied = [], [], []
        for tensor, piece, dtype in parts:
            found = _words(tensor, piece) if tensor.dtype == dtype else None
            if found is None or found[0].data_ptr() != tensor.data_ptr():
                copy = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
                self._copies.append(copy)
                self._copied.append(tensor)
                found = _words(copy, piece)
            words.append(found)
        self._table = HashTable(words)

    def sums(self) -> torch.Tensor:
        """int64 [parts], of what the tensors hold now."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._copied)  # pyright: ignore[reportPrivateImportUsage]
        return self._table.sums()


def _words(tensor: torch.Tensor, piece: Piece | None) -> Words:
    """As :class:`kernels.checksum.HashTable` takes them; views, where layout and alignment allow it."""
    piece = piece or Piece.whole(tensor.shape)
    tensor = tensor.detach().reshape(piece.shard_shape)
    size = tensor.element_size()
    width = math.gcd(piece.shape[-1] * size, 8)
    if piece.axis == len(piece.shape) - 1 and (piece.start * size % width or piece.length * size % width):
        raise ValueError(f"columns {piece.start} to {piece.start + piece.length} are not whole words of {width} bytes")
    if tensor.numel() == 0:
        return torch.zeros(0, 1, dtype=torch.int64, device=tensor.device), 0, 0
    words = _as_words(tensor, width)
    rows = math.prod(piece.shape[: piece.axis])
    inner = math.prod(piece.shape[piece.axis + 1 :])  # elements of the whole to one step along the axis
    columns = piece.length * inner * size // width
    first, stride = (steps * inner * size // width for steps in (piece.start, piece.shape[piece.axis]))
    return words.reshape(rows, columns), first, stride


@functools.lru_cache(maxsize=1 << 16)
def hash_description(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """What a tensor's shape and dtype contribute to its checksum."""
    return int.from_bytes(f"{dtype}{shape}".encode(), "little") % ((1 << 64) - 59)


def _descriptions(tensors: Iterable[torch.Tensor]) -> list[int]:
    return [hash_description(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def _as_words(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """The tensor's bits as integers of ``width`` bytes; a copy where its layout or alignment does not allow a view."""
    # Rows of a row-major tensor stay in place; only then can the kernel read them without a copy.
    if not tensor.is_contiguous() and (tensor.dim() < 2 or tensor.stride(-1) != 1):
        tensor = tensor.contiguous()
    if tensor.data_ptr() % width or any(stride * tensor.element_size() % width for stride in tensor.stride()[:-1]):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(_WORDS[width])
