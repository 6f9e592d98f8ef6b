"""Adding up the hashes of a tensor's words: what `model.checksum` is made of.

The hash of a word and its place is splitmix64's finaliser (Steele, Lea and Flood, 2014) of
``word * MIX_1 + place * GAMMA`` modulo 2**64: for a fixed place a bijection of the word, as MIX_1 is odd. Hashes are
added modulo 2**64, hence in any order, and the sums of a tensor's parts add up to the sum of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Odd multipliers of splitmix64, as signed 64-bit integers.
GAMMA = -7046029254386353131
MIX_1 = -4658895280553007687
MIX_2 = -7723592293110705685

# Words hashed at a time by the torch version, which bounds its temporaries.
_BLOCK = 1 << 22


Words = tuple[torch.Tensor, int, int]
"""``words`` [A, B], ``first`` and ``stride`` of :func:`word_hash_sum`; on a GPU the words of a row lie side by side."""


class HashTable:
    """:func:`word_hash_sum` of many tensors, again and again: it keeps the views, not what they read."""

    def __init__(self, parts: Sequence[Words], *, keeps: bool = True) -> None:
        """``parts``: all of one device. Without ``keeps``, on a GPU, who uses it keeps them where they are."""
        self.parts = list(parts)
        self._on_gpu = None
        if self.parts and self.parts[0][0].is_cuda:
            from kernels.checksum_triton import DeviceTable

            self._on_gpu = DeviceTable(self.parts)
            if not keeps:
                self.parts = []

    def sums(self) -> torch.Tensor:
        """int64 [parts] of what the tensors hold now. On a GPU it is one kernel for all of them."""
        if self._on_gpu is not None:
            return self._on_gpu.sums()
        if not self.parts:
            return torch.zeros(0, dtype=torch.int64)
        return torch.stack([word_hash_sum(*part) for part in self.parts])


def word_hash_sum(words: torch.Tensor, first: int, stride: int) -> torch.Tensor:
    """int64 scalar: the sum of the hashes of ``words`` [A, B] (uint8 or int16, int32, int64; unsigned bits).

    ``words[a, b]`` has the place ``first + a * stride + b``. On a GPU it is one kernel, which reads every word once.
    """
    if words.is_cuda:
        side_by_side = words if words.shape[1] < 2 or words.stride(1) == 1 else words.contiguous()
        return HashTable([(side_by_side, first, stride)]).sums()[0]
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    rows, columns = words.shape
    width = min(max(columns, 1), _BLOCK)
    height = max(1, _BLOCK // width)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            block = words[row : row + height, column : column + width]
            total += _block_sum(block, first + row * stride + column, stride)
    return total


def _block_sum(words: torch.Tensor, first: int, stride: int) -> torch.Tensor:
    rows, columns = (torch.arange(size, device=words.device) for size in words.shape)
    places = first + rows[:, None] * stride + columns
    return _mix(_unsigned(words) * MIX_1 + places * GAMMA).sum()


def _unsigned(words: torch.Tensor) -> torch.Tensor:
    """int64 with the same bits, and zeros above them."""
    bits = 8 * words.element_size()
    return words.to(torch.int64) if bits == 64 else words.to(torch.int64) & ((1 << bits) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser. Shifts are logical: the sign's copies are masked away."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))
