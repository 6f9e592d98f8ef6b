"""Sparse MLA's kernels against a loop over queries in fp64, at sizes that divide nothing."""

# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference, sparse_mla, sparse_mla_backward
from kernels.reference import attention

SCALE = 0.3


def exact(
    queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    outs, lses = [], []
    for query, row in zip(queries, indices.tolist(), strict=True):
        chosen = keys[[index for index in row if index >= 0]]
        scores = query @ chosen.T * SCALE
        outs.append(scores.softmax(dim=-1) @ chosen[:, :value_dim])
        lses.append(scores.detach().logsumexp(dim=-1))
    return torch.stack(outs), torch.stack(lses)


def make(
    num_queries: int,
    heads: int,
    num_keys: int,
    selected: int,
    value_dim: int,
    rope: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random inputs; rows select 0 to `selected` keys, in random order with -1 among and after them."""
    generator = torch.Generator().manual_seed(seed)
    dim = value_dim + rope
    queries = torch.randn(num_queries, heads, dim, generator=generator).to(dtype)
    keys = torch.randn(num_keys, dim, generator=generator).to(dtype)
    indices = torch.stack([torch.randperm(num_keys, generator=generator)[:selected] for _ in range(num_queries)])
    absent = torch.rand(indices.shape, generator=generator) < torch.rand(num_queries, 1, generator=generator)
    indices = indices.masked_fill(absent, -1)
    indices[0] = -1
    if num_queries > 1:
        indices[1, selected // 2 :] = -1
    return queries.requires_grad_(), keys.requires_grad_(), indices.int()


SHAPES = [
    {"num_queries": 5, "heads": 3, "num_keys": 19, "selected": 11, "value_dim": 20, "rope": 7},
    {"num_queries": 3, "heads": 17, "num_keys": 70, "selected": 37, "value_dim": 32, "rope": 16},
    {"num_queries": 2, "heads": 1, "num_keys": 4, "selected": 1, "value_dim": 16, "rope": 0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_forward_and_gradients(shape: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of two queries, so that the keys' gradient is summed over several."""
    value_dim = shape["value_dim"]
    queries, keys, indices = make(**shape)
    monkeypatch.setattr(sparse_mla_backward, "_PARTIALS_LIMIT", 2 * shape["selected"] * keys.shape[1] * 4)
    out, lse = sparse_mla.packed_sparse_attention(queries, keys, indices, SCALE, value_dim)
    inputs64 = [tensor.detach().double().requires_grad_() for tensor in (queries, keys)]
    wanted, wanted_lse = exact(inputs64[0], inputs64[1], indices, value_dim)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)
    assert not lse.requires_grad and (out[0] == 0).all() and (lse[0] == -math.inf).all()

    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, (queries, keys), upstream)
    for got, want in zip(found, torch.autograd.grad(wanted, inputs64, upstream.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    again = torch.autograd.grad(
        sparse_mla.packed_sparse_attention(queries, keys, indices, SCALE, value_dim)[0], (queries, keys), upstream
    )
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))


def test_the_reference_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, indices = make(**SHAPES[0])
    whole = reference.packed_sparse_attention(queries, keys, indices, SCALE, 20)
    monkeypatch.setattr(attention, "_GATHER_LIMIT", 11 * 27 * 2)
    blocks = reference.packed_sparse_attention(queries, keys, indices, SCALE, 20)
    for one, two in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one, two)
    for one, two in zip(
        *(torch.autograd.grad(o[0].square().sum(), (queries, keys)) for o in (whole, blocks)), strict=True
    ):
        torch.testing.assert_close(one, two)
    wanted, wanted_lse = exact(queries.double(), keys.double(), indices, 20)
    torch.testing.assert_close(whole[0].double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[1].double(), wanted_lse, rtol=1e-5, atol=1e-5)


def test_half_precision() -> None:
    """16-bit inputs take other tiles. float16, because the interpreter cannot multiply bfloat16.

    As exact as the reference, whose matrix products round the same operands.
    """
    for heads in (5, 40):
        queries, keys, indices = make(3, heads, 90, 70, 32, 16, dtype=torch.float16)
        wanted, _ = exact(queries.double(), keys.double(), indices, 32)
        upstream = torch.randn(wanted.shape, dtype=torch.float16)
        found = sparse_mla.packed_sparse_attention(queries, keys, indices, SCALE, 32)[0]
        plain = reference.packed_sparse_attention(queries, keys, indices, SCALE, 32)[0]
        want = torch.autograd.grad(wanted, (queries, keys), upstream.double())
        pairs = [(found, plain, wanted)]
        grads = [torch.autograd.grad(o, (queries, keys), upstream) for o in (found, plain)]
        pairs += list(zip(*grads, want, strict=True))
        for got, torch_s, exactly in pairs:
            assert error(got, exactly) <= max(2 * error(torch_s, exactly), 1e-3)


def error(found: torch.Tensor, exactly: torch.Tensor) -> float:
    found, exactly = found.detach(), exactly.detach()
    return float((found.double() - exactly.double()).norm() / exactly.double().norm())


def test_nothing_outside_a_selection_is_read() -> None:
    """NaN in unselected keys, and in the columns beyond strided queries, reaches nothing."""
    queries, keys, indices = make(**SHAPES[0])
    wanted = sparse_mla.packed_sparse_attention(queries, keys, indices, SCALE, 20)[0]
    wanted_grads = torch.autograd.grad(wanted.square().sum(), (queries, keys))
    unread = torch.ones(keys.shape[0], dtype=torch.bool)
    unread[indices[indices >= 0].long()] = False
    assert unread.any()
    poisoned = torch.full((keys.shape[0], keys.shape[1] + 5), math.nan)
    poisoned[:, : keys.shape[1]] = keys.detach().masked_fill(unread.unsqueeze(1), math.nan)
    wide = torch.full((queries.shape[0], queries.shape[1] + 1, queries.shape[2] + 3), math.nan)
    wide[:, :-1, :-3] = queries.detach()
    inputs = wide[:, :-1, :-3].requires_grad_(), poisoned[:, : keys.shape[1]].requires_grad_()
    found = sparse_mla.packed_sparse_attention(*inputs, indices, SCALE, 20)[0]
    assert torch.equal(found, wanted)
    for got, want in zip(torch.autograd.grad(found.square().sum(), inputs), wanted_grads, strict=True):
        assert torch.equal(got, want)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), selected=st.integers(1, 40), split=st.integers(1, 45), heads=st.integers(1, 18))
def test_decode_is_the_same_function_however_it_is_split(seed: int, selected: int, split: int, heads: int) -> None:
    queries, keys, indices = make(3, heads, 40, selected, 24, 8, seed=seed)
    out, lse = sparse_mla.decode_sparse_attention(queries, keys, indices, SCALE, 24, split=split)
    wanted, wanted_lse = exact(queries.double(), keys.double(), indices, 24)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)
    alone = sparse_mla.decode_sparse_attention(queries[1:2], keys, indices[1:2], SCALE, 24, split=split)
    assert torch.equal(alone[0], out[1:2]) and torch.equal(alone[1], lse[1:2])


@pytest.mark.parametrize("num_queries", [2, 9])
def test_batches_over_a_window_of_a_cache(num_queries: int) -> None:
    """Keys are a view into longer slots, as the cache hands them out."""
    cache = torch.randn(3, 31, 24)
    window = cache[:, :17]
    queries = torch.randn(3, num_queries, 5, 24)
    indices = torch.randint(-1, 17, (3, num_queries, 8))
    found = sparse_mla.sparse_attention(queries, window, indices, SCALE, 16)
    torch.testing.assert_close(found, reference.sparse_attention(queries, window, indices, SCALE, 16))
    visible = torch.rand(3, num_queries, 17) < 0.5
    visible[..., 0] = True
    found = sparse_mla.latent_attention(queries, window, visible, SCALE, 16)
    torch.testing.assert_close(found, reference.latent_attention(queries, window, visible, SCALE, 16))
    picked = window[[2, 0, 1]]
    found = sparse_mla.sparse_attention(queries, picked, indices, SCALE, 16)
    torch.testing.assert_close(found, reference.sparse_attention(queries, picked, indices, SCALE, 16))


def test_gradients_flow_through_the_batched_form() -> None:
    inputs = torch.randn(2, 3, 2, 24).requires_grad_(), torch.randn(2, 9, 24).requires_grad_()
    indices = torch.tensor([[[0, 1, -1], [8, 2, 3], [-1, -1, -1]], [[4, 5, 6], [7, -1, 0], [1, 2, 3]]])
    results = [f(*inputs, indices, SCALE, 16) for f in (sparse_mla.sparse_attention, reference.sparse_attention)]
    for one, two in zip(*(torch.autograd.grad(r.square().sum(), inputs) for r in results), strict=True):
        torch.testing.assert_close(one, two)
