"""The packed attention kernels against fp64 attention with a dense mask, at sizes that divide nothing."""

# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import masked_mha, reference
from kernels.reference import attention

SCALE = 0.3


def exact(
    inputs: list[torch.Tensor], lengths: list[int], chosen: list[torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence by sequence; chosen bool [T, T] each."""
    outs, lses, start = [], [], 0
    for index, length in enumerate(lengths):
        q, k, v = (tensor[start : start + length].transpose(0, 1) for tensor in inputs)
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        if chosen is not None:
            allowed &= chosen[index]
        scores = (q @ k.transpose(1, 2) * SCALE).masked_fill(~allowed, -math.inf)
        outs.append((scores.softmax(dim=-1).nan_to_num(0.0) @ v).transpose(0, 1))
        lses.append(scores.detach().logsumexp(dim=-1).transpose(0, 1))
        start += length
    return torch.cat(outs), torch.cat(lses)


def make(lengths: list[int], heads: int, dim: int, value_dim: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    return [torch.randn(rows, heads, width, generator=generator) for width in (dim, dim, value_dim)]


def choose(lengths: list[int], share: float, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Random causal choices of every sequence, and their bitmask; the first row of each sequence sees nothing."""
    generator = torch.Generator().manual_seed(seed)
    chosen, words = [], []
    longest = max(lengths)
    for length in lengths:
        mask = (torch.rand(length, length, generator=generator) < share).tril()
        mask[:1] = False
        chosen.append(mask)
        indices = torch.where(mask, torch.arange(length), -1)
        words.append(reference.selection_bitmask(indices, longest))
    return chosen, torch.cat(words)


SHAPES = [([37, 1, 70], 2, 20, 12), ([33], 3, 16, 16), ([0, 5, 0, 40], 1, 7, 24)]


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[list[int], int, int, int], masked: bool) -> None:
    assert_exact(shape, masked, masked_mha.packed_attention, reference.packed_attention)


def assert_exact(shape: tuple[list[int], int, int, int], masked: bool, *attends: Callable[..., Any]) -> None:
    lengths, heads, dim, value_dim = shape
    inputs = [tensor.requires_grad_() for tensor in make(lengths, heads, dim, value_dim)]
    chosen, bitmask = choose(lengths, 0.4) if masked else (None, None)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted, wanted_lse = exact(exact_inputs, lengths, chosen)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    wanted_grads = torch.autograd.grad(wanted, exact_inputs, upstream.double())
    for attend in attends:
        out, lse = attend(*inputs, cu_seqlens, SCALE, bitmask)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)
        assert not lse.requires_grad
        for got, want in zip(torch.autograd.grad(out, inputs, upstream), wanted_grads, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_the_reference_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SCORES_LIMIT", 100)
    assert_exact(SHAPES[0], True, reference.packed_attention)


@pytest.mark.parametrize("dims", [(24, 16), (48, 32)], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_half_precision(masked: bool, dims: tuple[int, int]) -> None:
    """16-bit inputs take the large tiles: sequences of more than one of them, in columns of two blocks."""
    lengths, heads = [150, 3], 1
    inputs = [tensor.half().requires_grad_() for tensor in make(lengths, heads, *dims)]
    assert masked_mha.takes_descriptors(*inputs) == (dims[0] == 48)
    chosen, bitmask = choose(lengths, 0.3) if masked else (None, None)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted, _ = exact(exact_inputs, lengths, chosen)
    upstream = torch.randn(wanted.shape).half()
    wanted_grads = torch.autograd.grad(wanted, exact_inputs, upstream.double())
    out, _ = masked_mha.packed_attention(*inputs, torch.tensor([0, 150, 153]), SCALE, bitmask)
    found = [out, *torch.autograd.grad(out, inputs, upstream)]
    for got, want in zip(found, [wanted, *wanted_grads], strict=True):
        assert float((got.double() - want).detach().norm() / want.detach().norm()) < 2e-3


def test_nothing_beyond_a_sequence_is_read() -> None:
    """NaN in another sequence, in later rows and in the columns beyond strided inputs reaches nothing."""
    lengths = [9, 40, 21]
    inputs = make(lengths, 2, 20, 12)
    _, bitmask = choose(lengths, 0.5)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        out, _ = masked_mha.packed_attention(*leaves, cu_seqlens, SCALE, bitmask)
        middle = out[9:49]
        return [middle.detach(), *(grad[9:49] for grad in torch.autograd.grad(middle.square().sum(), leaves))]

    poisoned = []
    for tensor in inputs:
        wide = torch.full((tensor.shape[0], 3, tensor.shape[2] + 5), math.nan)
        wide[9:49, :2, : tensor.shape[2]] = tensor[9:49]
        poisoned.append(wide[:, :2, : tensor.shape[2]])
    for one, two in zip(run([tensor.clone() for tensor in inputs]), run(poisoned), strict=True):
        assert torch.equal(one, two)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), num_keys=st.integers(1, 100))
def test_bitmasks_hold_the_selection(data: st.DataObject, num_keys: int) -> None:
    rows = data.draw(st.lists(st.sets(st.integers(0, num_keys - 1), max_size=20), min_size=1, max_size=4))
    width = max(1, *(len(row) for row in rows)) + 1
    indices = torch.tensor([data.draw(st.permutations([*row] + [-1] * (width - len(row)))) for row in rows])
    found = masked_mha.selection_bitmask(indices, num_keys)
    assert torch.equal(found, reference.selection_bitmask(indices, num_keys))
    assert found.shape == (len(rows), math.ceil(num_keys / 32)) and found.dtype == torch.int32
    bits = [{s for s in range(num_keys) if (row[s // 32] >> (s % 32)) & 1} for row in found.tolist()]
    assert bits == rows


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), num_words=st.integers(1, 9))
def test_ordered_words_hold_the_bits_of_a_thread(seed: int, num_words: int) -> None:
    """A bit for every column, at the place that its thread and its turn in the thread say."""
    bits = torch.rand(3, num_words * 32, generator=torch.Generator().manual_seed(seed)) < 0.5
    column = torch.arange(num_words * 32)
    bitmask = reference.selection_bitmask(torch.where(bits, column, -1), num_words * 32)
    ordered = masked_mha.ordered_bitmask(bitmask)
    word, bit = column // 128 * 4 + column % 8 // 2, column % 128 // 8 * 2 + column % 2
    assert torch.equal((ordered[:, word] >> bit & 1).bool(), bits)
    assert [sum(int(word).bit_count() for word in (row & 0xFFFFFFFF)) for row in ordered.long()] == bits.sum(1).tolist()
