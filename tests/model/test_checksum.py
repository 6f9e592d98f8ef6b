from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import checksums

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn]
MASK = (1 << 64) - 1


def checksum(tensor: torch.Tensor) -> int:
    return checksums([("w", tensor)])["w"]


def words_by_hand(octets: list[int]) -> int:
    """The sum over words of splitmix64(word ^ splitmix64 of its place), in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    octets = octets + [0] * (-len(octets) % 8)
    words = [int.from_bytes(bytes(octets[i : i + 8]), "little") for i in range(0, len(octets), 8)]
    return sum(mix(word ^ mix((place * 0x9E3779B97F4A7C15) & MASK)) for place, word in enumerate(words, 1)) & MASK


@settings(max_examples=50, deadline=None)
@given(octets=st.lists(st.integers(0, 255), max_size=40))
def test_is_the_documented_hash(octets: list[int]) -> None:
    def description(length: int) -> int:
        return int.from_bytes(f"torch.uint8({length},)".encode(), "little") % ((1 << 64) - 59)

    wanted = (words_by_hand(octets) + description(len(octets))) & MASK
    assert checksum(torch.tensor(octets, dtype=torch.uint8)) == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_and_the_order_count(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    octets = torch.randint(256, (48,), dtype=torch.uint8, generator=generator)
    tensor = octets.view(dtype)
    seen = {checksum(tensor)}
    for place in range(48):
        for bit in range(8):
            changed = octets.clone()
            changed[place] ^= 1 << bit
            seen.add(checksum(changed.view(dtype)))
    assert len(seen) == 1 + 48 * 8
    swapped = octets.clone()
    swapped[:8], swapped[8:16] = octets[8:16], octets[:8]
    assert checksum(swapped.view(dtype)) not in seen


def test_shape_dtype_and_negative_zero_count_but_layout_does_not() -> None:
    tensor = torch.randn(6, 4)
    assert checksum(tensor) == checksum(tensor.T.contiguous().T) == checksum(torch.stack([tensor, tensor])[1])
    assert checksum(tensor) == checksum(torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(6, 4))
    different = {
        checksum(t)
        for t in (tensor, tensor.view(4, 6), tensor.view(torch.int32), torch.zeros(6, 4), -torch.zeros(6, 4))
    }
    assert len(different) == 5


def test_large_tensors_are_hashed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    whole = checksum(tensor)
    monkeypatch.setattr("model.checksum._BLOCK", 7)
    assert checksum(tensor) == whole


def test_empty_and_scalar_tensors_have_checksums() -> None:
    assert checksum(torch.empty(0, 3)) != checksum(torch.empty(0, 4))
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor(2.0))
