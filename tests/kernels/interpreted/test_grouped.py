"""Grouped products against one matrix product a group in fp64."""

# pyright: reportCallIssue=false

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import grouped, reference


def by_hand(rows: torch.Tensor, weights: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.cat([F.linear(part, weight) for part, weight in zip(rows.split(sizes), weights, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "dim", "width"),
    [([3, 0, 40, 1, 0], 24, 40), ([0, 0, 7], 100, 130), ([130, 0, 5, 200], 72, 24), ([0, 0], 16, 16)],
    ids=str,
)
def test_products_and_gradients(sizes: list[int], dim: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ends = torch.tensor(sizes).cumsum(0).int()
    rows, weights = torch.randn(sum(sizes), dim).to(dtype), torch.randn(len(sizes), width, dim).to(dtype)
    upstream = torch.randn(sum(sizes), width).to(dtype)
    exact = [tensor.double().requires_grad_() for tensor in (rows, weights)]
    output = by_hand(exact[0], exact[1], sizes)
    wanted = [output.detach(), *torch.autograd.grad(output, exact, upstream.double())]
    for implementation in (grouped.triton_grouped_linear, reference.grouped_linear):
        inputs = [tensor.clone().requires_grad_() for tensor in (rows, weights)]
        output = implementation(*inputs, ends)
        found = [output.detach(), *torch.autograd.grad(output, inputs, upstream)]
        for tensor, exactly in zip(found, wanted, strict=True):
            assert tensor.dtype == dtype and tensor.shape == exactly.shape
            assert float((tensor.double() - exactly).norm()) <= (1e-6 if dtype == torch.float32 else 1e-2) * float(
                exactly.norm()
            )


def test_a_group_without_rows_has_a_gradient_of_zero() -> None:
    rows, weights = torch.randn(4, 16), torch.randn(3, 8, 16, requires_grad=True)
    grouped.triton_grouped_linear(rows, weights, torch.tensor([4, 4, 4]).int()).sum().backward()
    assert weights.grad is not None
    assert float(weights.grad[1:].abs().max()) == 0 and float(weights.grad[0].abs().max()) > 0


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(50, 24), torch.randn(2, 40, 24)
    together = grouped.triton_grouped_linear(rows, weights, torch.tensor([20, 50]).int())
    alone = grouped.triton_grouped_linear(rows[30:31], weights, torch.tensor([0, 1]).int())
    torch.testing.assert_close(together[30:31], alone, rtol=1e-6, atol=1e-6)
