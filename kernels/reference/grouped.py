"""The experts' projections in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def grouped_linear(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each group of rows times its own matrix, as `F.linear` would: the experts' projections.

    rows [N, D] sorted by group, weights [E, O, D], ends int32 [E]: group e is rows[ends[e - 1]:ends[e]], possibly none.
    Returns [N, O]. Every entry of `weights` gets a gradient, zero for a group without rows.
    """
    # torch's grouped product wants row strides in multiples of 16 bytes, and bfloat16 on a GPU.
    aligned = all(dim * rows.element_size() % 16 == 0 for dim in weights.shape[1:])
    taken = rows.dtype == torch.bfloat16 or (rows.device.type == "cpu" and rows.dtype == torch.float32)
    if aligned and taken:
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(*pair) for pair in zip(rows.split(sizes), weights.unbind(), strict=True)])
