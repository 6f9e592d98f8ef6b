"""Block-scaled FP8 weights, as the public DeepSeek-V3 checkpoints store them."""

from __future__ import annotations

import torch


def dequantise(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int] = (128, 128)) -> torch.Tensor:
    """fp32 weight[..., i, j] * scale_inv[..., i // block[0], j // block[1]]; blocks at the edges may be partial.

    weight: float8 [..., rows, columns]; scale_inv: [..., ceil(rows / block[0]), ceil(columns / block[1])].
    Raises ValueError when the scales do not cover the weight.
    """
    rows, columns = weight.shape[-2:]
    wanted = (*weight.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if scale_inv.shape != wanted:
        raise ValueError(f"scales have shape {tuple(scale_inv.shape)} where the weight needs {wanted}")
    scale = scale_inv.float().repeat_interleave(block[0], dim=-2)[..., :rows, :]
    return weight.float() * scale.repeat_interleave(block[1], dim=-1)[..., :columns]
