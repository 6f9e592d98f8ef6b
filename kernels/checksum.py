"""Adding up the hashes of a tensor's words: what `model.checksum` is made of.

The hash of a word and its place is splitmix64's finaliser (Steele, Lea and Flood, 2014) of
``word * MIX_1 + place * GAMMA`` modulo 2**64: for a fixed place a bijection of the word, as MIX_1 is odd. Hashes are
added modulo 2**64, hence in any order, and the sums of a tensor's parts add up to the sum of the whole.
"""

from __future__ import annotations

import torch

# Odd multipliers of splitmix64, as signed 64-bit integers.
GAMMA = -7046029254386353131
MIX_1 = -4658895280553007687
MIX_2 = -7723592293110705685

# Words hashed at a time by the torch version, which bounds its temporaries.
_BLOCK = 1 << 22


def word_hash_sum(words: torch.Tensor, first: int, stride: int) -> torch.Tensor:
    """int64 scalar: the sum of the hashes of ``words`` [A, B] (uint8 or int16, int32, int64; unsigned bits).

    ``words[a, b]`` has the place ``first + a * stride + b``. On a GPU it is one kernel, which reads every word once.
    """
    if words.is_cuda:
        from kernels.checksum_triton import word_hash_sum as on_gpu

        return on_gpu(words, first, stride)
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
