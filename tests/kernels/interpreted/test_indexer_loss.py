"""The indexer's loss against TR Eq. 3 and 4 in fp64, query by query, and its gradients against autograd's."""

# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import pytest
import torch

from kernels import indexer_loss as triton_loss
from kernels import reference

LENGTHS = [5, 1, 30]
ROWS = sum(LENGTHS)
EMPTY = 3  # a query that sees nothing
IMPLEMENTATIONS = [triton_loss.packed_indexer_loss, reference.packed_indexer_loss]


def make(dtype: torch.dtype, heads: int, dim: int, main_heads: int, main_dim: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(heads)
    index = torch.randn(ROWS, heads, dim), torch.randn(ROWS, dim), torch.randn(ROWS, heads) * 0.3
    main = torch.randn(ROWS, main_heads, main_dim), torch.randn(ROWS, main_heads, main_dim)
    return *(part.to(dtype) for part in index[:2]), index[2], *(part.to(dtype) for part in main)


def bounds() -> tuple[torch.Tensor, torch.Tensor]:
    offsets = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
    starts = torch.repeat_interleave(offsets, torch.tensor(LENGTHS)).int()
    ends = torch.arange(1, ROWS + 1).int()
    ends[EMPTY] = starts[EMPTY]
    return starts, ends


def loss_by_hand(tensors: tuple[torch.Tensor, ...], scale: float, indices: torch.Tensor | None) -> torch.Tensor:
    iq, ik, iw, q, k = tensors
    starts, ends = bounds()
    total = torch.zeros((), dtype=torch.float64)
    for t in range(ROWS):
        seen = torch.arange(int(starts[t]), int(ends[t])) if indices is None else indices[t][indices[t] >= 0].long()
        if not len(seen):
            continue
        scores = ((ik[seen] @ iq[t].T).relu() * iw[t]).sum(dim=1)
        attention = torch.stack([(k[seen, h] @ q[t, h] * scale).softmax(dim=0) for h in range(q.shape[1])])
        p = attention.sum(dim=0) / attention.sum()
        total = total + (p * (p.log() - scores.log_softmax(dim=0))).sum()
    return total


def with_gradients(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 1.7, inputs)]


@pytest.mark.parametrize("longest", [None, max(LENGTHS)], ids=["all keys", "near keys"])
@pytest.mark.parametrize("chunk", [1 << 20, 10 * ROWS], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("dtype", "heads", "dim", "main_heads", "main_dim"),
    [(torch.float32, 3, 24, 2, 40), (torch.bfloat16, 20, 32, 3, 192)],
    ids=["fp32", "bf16"],
)
def test_value_and_gradients(
    dtype: torch.dtype,
    heads: int,
    dim: int,
    main_heads: int,
    main_dim: int,
    sparse: bool,
    chunk: int,
    longest: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_loss, "CHUNK_LIMIT", chunk)
    monkeypatch.setattr("kernels.reference.indexer._LOSS_LIMIT", chunk)
    tensors = make(dtype, heads, dim, main_heads, main_dim)
    starts, ends = bounds()
    indices = reference.select_keys(*tensors[:3], starts, ends, 7) if sparse else None
    scale = main_dim**-0.5
    exact = tuple(tensor.double().requires_grad_() for tensor in tensors)
    wanted = with_gradients(loss_by_hand(exact, scale, indices), list(exact[:3]))
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for implementation in IMPLEMENTATIONS:
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        loss = implementation(*inputs, starts, ends, scale, indices, longest)
        assert loss.dtype == torch.float32 and loss.shape == ()
        found = with_gradients(loss, inputs[:3])
        errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True)]
        assert max(errors) < limit, errors
        assert float(found[1][EMPTY].abs().max()) == 0 and float(found[3][EMPTY].abs().max()) == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["triton", "reference"])
def test_gradient_goes_to_the_indexer_alone(implementation) -> None:
    inputs = [tensor.requires_grad_() for tensor in make(torch.float32, 3, 24, 2, 40)]
    starts, ends = bounds()
    implementation(*inputs, starts, ends, 0.2).backward()
    assert [tensor.grad is not None for tensor in inputs] == [True, True, True, False, False]
    with torch.no_grad():
        assert not implementation(*inputs, starts, ends, 0.2).requires_grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["triton", "reference"])
def test_a_gradient_for_some_inputs_only(implementation) -> None:
    tensors = make(torch.float32, 3, 24, 2, 40)
    starts, ends = bounds()
    keys = tensors[1].clone().requires_grad_()
    implementation(tensors[0], keys, *tensors[2:], starts, ends, 0.2).backward()
    every = [tensor.clone().requires_grad_() for tensor in tensors]
    implementation(*every, starts, ends, 0.2).backward()
    assert keys.grad is not None and torch.equal(keys.grad, every[1].grad)


def test_heads_may_share_their_keys() -> None:
    """Absorbed attention: one key for all heads, given with a stride of 0."""
    iq, ik, iw, q, k = make(torch.float32, 3, 24, 2, 40)
    starts, ends = bounds()
    shared = k[:, :1].expand(-1, 2, -1)
    found = triton_loss.packed_indexer_loss(iq, ik, iw, q, shared, starts, ends, 0.2)
    wanted = loss_by_hand(tuple(part.double() for part in (iq, ik, iw, q, shared)), 0.2, None)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_rows_are_the_same_whatever_the_matrix_held_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspace full of NaN: nothing outside a query's bounds is read."""
    tensors = make(torch.float32, 3, 24, 2, 40)
    starts, ends = bounds()
    indices = reference.select_keys(*tensors[:3], starts, ends, 7)
    empty = torch.empty
    for chosen in (None, indices):
        clean = with_gradients(
            triton_loss.packed_indexer_loss(
                *(inputs := [t.clone().requires_grad_() for t in tensors]), starts, ends, 0.2, chosen
            ),
            inputs[:3],
        )
        monkeypatch.setattr(
            torch, "empty", lambda *size, **how: empty(*size, **how).fill_(255 if "dtype" in how else float("nan"))
        )
        poisoned = with_gradients(
            triton_loss.packed_indexer_loss(
                *(inputs := [t.clone().requires_grad_() for t in tensors]), starts, ends, 0.2, chosen
            ),
            inputs[:3],
        )
        monkeypatch.undo()
        assert all(torch.equal(x, y) for x, y in zip(clean, poisoned, strict=True))
