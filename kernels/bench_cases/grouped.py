"""Experts' projections: tokens spread over experts unevenly, forward and both gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels import grouped
from kernels.bench import Call, Case, Setup

GroupedLinear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _setup(num_rows: int, experts: int, dim: int, width: int, *, backward: bool) -> Setup:
    share = torch.rand(experts, device="cuda").add_(0.2)
    ends = (share.cumsum(0) / share.sum() * num_rows).round().int()
    ends[-1] = num_rows
    rows = torch.randn(num_rows, dim, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(experts, width, dim, device="cuda", dtype=torch.bfloat16) * dim**-0.5
    upstream = torch.randn(num_rows, width, device="cuda", dtype=torch.bfloat16)
    inputs = [part.requires_grad_(backward) for part in (rows, weights)]

    def call(function: GroupedLinear) -> Call:
        def run() -> list[torch.Tensor]:
            output = function(rows, weights, ends)
            return [output, *torch.autograd.grad(output, inputs, upstream)] if backward else [output]

        return run

    peers = {"an expert at a time": call(_one_by_one)}
    if hasattr(torch, "_grouped_mm"):
        grouped_mm = getattr(torch, "_grouped_mm")  # noqa: B009
        peers["torch._grouped_mm"] = call(lambda x, w, e: grouped_mm(x, w.transpose(1, 2), offs=e))
    return Setup(
        ours=call(grouped.triton_grouped_linear),
        peers=peers,
        flops=2.0 * num_rows * dim * width * (3 if backward else 1),
    )


def _one_by_one(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = zip(rows.split(sizes), weights.unbind(), strict=True)
    return torch.cat([torch.nn.functional.linear(part, weight) for part, weight in parts])


def cases() -> list[Case]:
    """Grouped expert products: N tokens in E groups, in to out features, bf16."""
    shapes = [(32768, 64, 2048, 2816), (65536, 32, 7168, 4096), (512, 64, 2048, 2816)]
    return [
        Case(
            name=f"grouped.{'train' if backward else 'forward'}",
            shape=f"N={n} E={e} {d} to {o}",
            build=lambda n=n, e=e, d=d, o=o, backward=backward: _setup(n, e, d, o, backward=backward),
        )
        for n, e, d, o in shapes
        for backward in (False, True)
    ]
