"""`kernels.checksum.HashTable` for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

_BLOCK = 512
_TILE = 64 * _BLOCK
"""Words of one program, of one tensor."""
_LONGEST = 1 << 30
"""Words of a row; with those of a tile, they fit into 32 bits."""
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)

_FIELDS = tl.constexpr(9)
"""Of a row of the table: address, bytes of a word, rows, columns, words from a row in memory to the next, place of the
first word, places from a row to the next, first tile, and which sum the hashes go into."""


@triton.jit
def _load_words(address, offsets, inside, width):
    """int64 [BLOCK] of unsigned words."""
    if width == 8:
        words = tl.load(address.to(tl.pointer_type(tl.int64)) + offsets, mask=inside, other=0)
    elif width == 4:
        words = tl.load(address.to(tl.pointer_type(tl.int32)) + offsets, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    elif width == 2:
        words = tl.load(address.to(tl.pointer_type(tl.int16)) + offsets, mask=inside, other=0).to(tl.int64) & 0xFFFF
    else:
        words = tl.load(address.to(tl.pointer_type(tl.int8)) + offsets, mask=inside, other=0).to(tl.int64) & 0xFF
    return words


@triton.jit
def _mix(x):
    """splitmix64's finaliser, of uint64."""
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return (x ^ (x >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def _side_by_side(address, first, start, count, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the hashes of words of 8 bytes, from ``start`` to the tile's or the tensor's end. No place is divided."""
    across = tl.arange(0, BLOCK)
    words = address.to(tl.pointer_type(tl.int64)) + start
    steps = across.to(tl.uint64) * _GAMMA  # from a block's first place
    left = tl.minimum(count - start, TILE).to(tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for offset in range(0, left, BLOCK):
        inside = across < left - offset
        word = tl.load(words + offset + across, mask=inside, other=0)
        place = (first + start + offset).to(tl.uint64, bitcast=True) * _GAMMA + steps
        total += tl.where(inside, _mix(word.to(tl.uint64, bitcast=True) * _MIX_1 + place), 0)
    return tl.sum(total, axis=0)


@triton.jit
def _in_rows(address, width, rows, columns, row_stride, first, stride, start, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """As :func:`_side_by_side`, of words of any width in rows that lie apart, or whose places do."""
    row = start // columns  # of the tile's first word
    column = (start % columns).to(tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for offset in range(0, TILE, BLOCK):
        across = column + offset + tl.arange(0, BLOCK)  # [BLOCK], words from the beginning of the tile's first row
        down = across // columns
        across = (across - down * columns).to(tl.int64)
        at = row + down.to(tl.int64)
        inside = at < rows
        word = _load_words(address, at * row_stride + across, inside, width)
        place = (first + at * stride + across).to(tl.uint64, bitcast=True) * _GAMMA
        total += tl.where(inside, _mix(word.to(tl.uint64, bitcast=True) * _MIX_1 + place), 0)
    return tl.sum(total, axis=0)


@triton.jit
def _word_hashes_kernel(octets, owners_at, sums_at, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """``octets``: the table, from ``owners_at`` on the row of the table that each program is for, then the sums."""
    program = tl.program_id(0)
    owner = tl.load((octets + owners_at).to(tl.pointer_type(tl.int32)) + program)
    entry = octets.to(tl.pointer_type(tl.int64)) + owner.to(tl.int64) * _FIELDS
    address, width = tl.load(entry), tl.load(entry + 1)
    rows, columns = tl.load(entry + 2), tl.load(entry + 3).to(tl.int32)
    row_stride, first, stride = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    start = (program - tl.load(entry + 7)) * TILE
    if (rows == 1) & (width == 8):
        total = _side_by_side(address, first, start, columns, TILE, BLOCK)
    else:
        total = _in_rows(address, width, rows, columns, row_stride, first, stride, start, TILE, BLOCK)
    tl.atomic_add((octets + sums_at).to(tl.pointer_type(tl.int64)) + tl.load(entry + 8), total)


class DeviceTable:
    """Where the words of many tensors are, for one launch.

    It waits in host memory and travels with every launch: what a GPU's memory holds may be lost between two.
    """

    def __init__(self, parts: Sequence[tuple[torch.Tensor, int, int]]) -> None:
        """Raises ValueError where the words of a row do not lie side by side."""
        self._device = parts[0][0].device
        rows, tiles = [], []
        for number, part in enumerate(parts):
            for row in _rows_of(*part):
                rows.append((*row, rows[-1][7] + tiles[-1] if rows else 0, number))
                tiles.append(-(-row[2] * row[3] // _TILE))
        self._num_tiles = sum(tiles)
        self._compiled: Any = None
        table = np.asarray(rows, dtype=np.int64).tobytes()
        owners = np.repeat(np.arange(len(rows), dtype=np.int32), tiles).tobytes()
        self._owners_at = _aligned(len(table))
        self._sums_at = self._owners_at + _aligned(len(owners))
        octets = bytearray(self._sums_at + 8 * len(parts))
        octets[: len(table)] = table
        octets[self._owners_at : self._owners_at + len(owners)] = owners
        self._octets = torch.frombuffer(octets, dtype=torch.uint8)
        if self._device.type == "cuda":
            self._octets = self._octets.pin_memory()

    def sums(self) -> torch.Tensor:
        """int64 [parts]."""
        # The zeros that sums begin with travel along: a small update waits for every operation that begins on the CPU.
        octets = self._octets.to(self._device, non_blocking=True, copy=True)
        if self._num_tiles:
            self._launch(octets)
        return octets[self._sums_at :].view(torch.int64)

    def _launch(self, octets: torch.Tensor) -> None:
        grid, arguments = (self._num_tiles, 1, 1), (octets, self._owners_at, self._sums_at, _TILE, _BLOCK)
        if self._compiled is None:
            self._compiled = _word_hashes_kernel[grid](*arguments, num_warps=8)  # pyright: ignore[reportCallIssue]
        else:  # for numbers that stay the same, Triton need not find it again
            self._compiled[grid](*arguments)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def _rows_of(words: torch.Tensor, first: int, stride: int) -> Iterator[tuple[int, ...]]:
    """The first seven fields of a tensor's rows in the table: one where nothing is too long."""
    rows, columns = words.shape
    if words.numel() == 0:
        return
    if columns > 1 and words.stride(1) != 1:
        raise ValueError("the words of a row do not lie side by side in memory")
    width, row_stride = words.element_size(), words.stride(0)
    if rows == 1 or row_stride == columns == stride:
        rows, columns = 1, rows * columns
    for begin in range(0, columns, _LONGEST):
        length = min(_LONGEST, columns - begin)
        yield words.data_ptr() + begin * width, width, rows, length, row_stride, first + begin, stride
