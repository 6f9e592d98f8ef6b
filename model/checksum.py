"""64-bit checksums of tensors, for telling whether two processes hold the same weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Elements hashed at a time, which bounds the temporaries.
_BLOCK = 1 << 22

# Odd multipliers of splitmix64 (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GAMMA = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def checksums(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """A 64-bit checksum of each tensor, by name: equal bits in equal order on any device give equal numbers.

    Each 8-byte word is hashed together with its index, and the hashes are added modulo 2**64. A change in one word
    always shows, because the hash is a bijection of the word; so does an exchange of two, up to a chance of 2**-64.
    The sum is of integers, hence the same in any order of evaluation. Shape and dtype count too.
    """
    return {name: _checksum(tensor) for name, tensor in named_tensors}


def _checksum(tensor: torch.Tensor) -> int:
    octets = tensor.detach().contiguous().flatten().view(torch.uint8)
    # Copied even when nothing is missing: only a fresh storage is sure to be aligned for 8-byte words.
    octets = torch.cat([octets, octets.new_zeros(-octets.numel() % 8)])
    total = _hash_description(tensor)
    for index, words in enumerate(octets.view(torch.int64).split(_BLOCK)):
        places = torch.arange(index * _BLOCK + 1, index * _BLOCK + 1 + words.numel(), device=words.device)
        total += int(_mix(words ^ _mix(places * _GAMMA)).sum())
    return total % (1 << 64)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser, a bijection of int64. Shifts are logical: the sign's copies are masked away."""
    words = (words ^ ((words >> 30) & ((1 << 34) - 1))) * _MIX_1
    words = (words ^ ((words >> 27) & ((1 << 37) - 1))) * _MIX_2
    return words ^ ((words >> 31) & ((1 << 33) - 1))


def _hash_description(tensor: torch.Tensor) -> int:
    description = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return int.from_bytes(description, "little") % ((1 << 64) - 59)
