"""`kernels.checksum.word_hash_sum` for NVIDIA GPUs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAX_BLOCK = 2048
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _word_hash_kernel(
    words, total, columns, num_blocks, row_stride, first, stride, MASK: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    column = (program % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    word = tl.load(words + row * row_stride + column, mask=inside, other=0).to(tl.int64)  # [BLOCK]
    word = word & MASK  # unsigned
    place = first + row * stride + column
    x = word.to(tl.uint64, bitcast=True) * _MIX_1 + place.to(tl.uint64, bitcast=True) * _GAMMA
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    x = x ^ (x >> 31)
    hashes = tl.where(inside, x.to(tl.int64, bitcast=True), 0)
    tl.atomic_add(total, tl.sum(hashes, axis=0))


def word_hash_sum(words: torch.Tensor, first: int, stride: int) -> torch.Tensor:
    """As `kernels.checksum.word_hash_sum`: an int64 sum, whose order does not matter; words are [rows, columns]."""
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    rows, columns = words.shape
    if words.numel() == 0:
        return total
    if words.stride(1) != 1 and columns > 1:
        words = words.contiguous()
    block = min(_MAX_BLOCK, triton.next_power_of_2(columns))
    num_blocks = triton.cdiv(columns, block)
    bits = 8 * words.element_size()
    _word_hash_kernel[(rows * num_blocks,)](
        words,
        total,
        columns,
        num_blocks,
        words.stride(0),
        first,
        stride,
        MASK=(1 << bits) - 1 if bits < 64 else -1,  # pyright: ignore[reportArgumentType]
        BLOCK=block,  # pyright: ignore[reportArgumentType]
    )
    return total
