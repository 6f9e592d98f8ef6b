from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import checksums
from model.checksum import LiveSums, Piece, hash_description, word_sum, word_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn]
MASK = (1 << 64) - 1


def checksum(tensor: torch.Tensor) -> int:
    return checksums([("w", tensor)])["w"]


def words_by_hand(words: list[int]) -> int:
    """The sum over words of splitmix64's finaliser of (word * MIX_1 + place * GAMMA), in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    seeds = (word * 0xBF58476D1CE4E5B9 + place * 0x9E3779B97F4A7C15 for place, word in enumerate(words))
    return sum(mix(seed & MASK) for seed in seeds) & MASK


@settings(max_examples=100, deadline=None)
@given(octets=st.lists(st.integers(0, 255), max_size=40), rows=st.integers(1, 3))
def test_is_the_documented_hash(octets: list[int], rows: int) -> None:
    """A word is the greatest part of 8 bytes that divides a row."""
    width = math.gcd(len(octets), 8)
    words = [int.from_bytes(bytes(octets[i : i + width]), "little") for i in range(0, len(octets), width)] * rows
    description = int.from_bytes(f"torch.uint8({rows}, {len(octets)})".encode(), "little") % ((1 << 64) - 59)
    tensor = torch.tensor(octets, dtype=torch.uint8).repeat(rows, 1)
    assert checksum(tensor) == (words_by_hand(words) + description) & MASK


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int, list[int]]:
    """A tensor, one of its axes, and where it is cut along that axis (columns between words)."""
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.uint8, torch.float64]))
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    axis = draw(st.integers(0, len(shape) - 1))
    step = 1
    if axis == len(shape) - 1:
        step = max(1, math.gcd(shape[-1] * dtype.itemsize, 8) // dtype.itemsize)
    cuts = draw(st.sets(st.integers(0, shape[axis] // step)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    octets = torch.randint(256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return octets.view(dtype).view(shape), axis, sorted({0, shape[axis], *(cut * step for cut in cuts)})


@settings(max_examples=200, deadline=None)
@given(cut=cut_tensors(), copied=st.booleans())
def test_shards_add_up_to_the_whole(cut: tuple[torch.Tensor, int, list[int]], copied: bool) -> None:
    tensor, axis, edges = cut
    sums = []
    for start, end in itertools.pairwise(edges):
        shard = tensor.narrow(axis, start, end - start)
        piece = Piece(shape=tuple(tensor.shape), axis=axis, start=start, length=end - start)
        sums.append((shard.clone() if copied else shard, piece))
    total = sum(word_sums(sums).tolist()) + hash_description(tuple(tensor.shape), tensor.dtype)
    assert total % (1 << 64) == checksum(tensor)


def test_a_shard_in_another_place_has_another_sum() -> None:
    shard = torch.randn(4, 8)
    places = [Piece(shape=(4, 32), axis=1, start=start, length=8) for start in (0, 8, 16, 24)]
    places += [Piece(shape=(16, 8), start=start, length=4) for start in (4, 8, 12)]
    assert len({int(word_sum(shard, place)) for place in places}) == 7


def test_a_cut_inside_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="columns 1 to 4 are not whole words of 8 bytes"):
        word_sum(torch.zeros(2, 3), Piece(shape=(2, 4), axis=1, start=1, length=3))


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
    others = (tensor.view(4, 6), tensor.view(torch.int32), torch.zeros(6, 4), -torch.zeros(6, 4))
    different = {checksum(tensor), *map(checksum, others)}
    assert len(different) == 5


def test_large_tensors_are_hashed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    for shape in ((1000,), (250, 4), (4, 250)):
        whole = checksum(tensor.view(shape))
        monkeypatch.setattr("kernels.checksum._BLOCK", 7)
        assert checksum(tensor.view(shape)) == whole
        monkeypatch.undo()


def test_empty_and_scalar_tensors_have_checksums() -> None:
    assert checksum(torch.empty(0, 3)) != checksum(torch.empty(0, 4))
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor(2.0))


def test_live_sums_are_of_what_tensors_hold_when_they_are_taken() -> None:
    """In place, converted from a wider dtype, and where no view of whole words is to be had."""
    wide, odd = torch.randn(4, 8).bfloat16().float(), torch.arange(7, dtype=torch.uint8)[1:].view(2, 3)
    tensors = [torch.randn(6, 4), wide, torch.randn(8, 4).T, odd, torch.empty(0, 4), torch.randn(5, 16)[:, 4:12]]
    dtypes = [tensor.dtype for tensor in tensors]
    dtypes[1] = torch.bfloat16
    pieces = [Piece.whole(tensor.shape) for tensor in tensors]
    live = LiveSums(zip(tensors, pieces, dtypes, strict=True))
    for _ in range(3):
        converted = [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        expected = [int(word_sum(*part)) for part in zip(converted, pieces, strict=True)]
        assert live.sums().tolist() == expected
        for tensor in tensors:
            tensor.add_(1)
    assert LiveSums([]).sums().tolist() == []
