"""Checksums of a model's weights, as a weight update takes them on either side: against a copy of the same bytes."""

from __future__ import annotations

import torch

from kernels.bench import Case, Setup
from kernels.checksum import HashTable


def _setup(layers: int, hidden: int, rows: int, *, cut: bool) -> Setup:
    """``cut``: every matrix is the first columns of one, whose rows do not lie side by side."""
    width = 2 * hidden if cut else hidden
    shapes = [(hidden,), (rows, width), (hidden, rows)] * layers
    whole = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    weights = [tensor[:, :hidden] if cut and tensor.dim() == 2 else tensor for tensor in whole]
    words = [weight.view(torch.int64).reshape(-1, weight.shape[-1] // 4) for weight in weights]
    sums = HashTable([(of, 0, tensor.shape[-1] // 4) for of, tensor in zip(words, whole, strict=True)])
    copies = [torch.empty_like(weight) for weight in weights]

    def copy() -> list[torch.Tensor]:
        torch._foreach_copy_(copies, weights)  # pyright: ignore[reportPrivateImportUsage]
        return copies

    return Setup(
        ours=sums.sums,
        peers={"copy": copy},
        bytes=sum(weight.nbytes for weight in weights),
    )


def cases() -> list[Case]:
    """L layers with two matrices of R rows of H."""
    shapes = [(24, 1024, 2048, False), (24, 4096, 16384, False), (24, 4096, 16384, True)]
    return [
        Case(
            name="checksum.cut" if cut else "checksum.whole",
            shape=f"L={layers} H={hidden} R={rows}",
            build=lambda layers=layers, hidden=hidden, rows=rows, cut=cut: _setup(layers, hidden, rows, cut=cut),
        )
        for layers, hidden, rows, cut in shapes
    ]
