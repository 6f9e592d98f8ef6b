"""Loading a checkpoint into a module of which this process holds only a part.

A part is a stretch of each flattened tensor (:class:`Stretch`): ZeRO-3 cuts every parameter so, and the experts that
expert parallelism leaves to one rank lie one after another in their stack. No more than one tensor of the checkpoint
is in memory at a time, and tensors without a part here are not read at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from model.hf import CheckpointReader
from model.layout import split_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Where some consecutive elements of a tensor go."""

    name: str  # in-memory name of the tensor
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # place of the first element of `target` in the flattened whole tensor
    target: torch.Tensor  # one-dimensional, possibly empty


@torch.no_grad()
def load_stretches(directory: Path, stretches: Iterable[Stretch], *, num_layers: int, tied: Iterable[str] = ()) -> None:
    """Fills every target from the checkpoint; together the stretches must name each tensor of the model.

    `num_layers`: layers from there on (multi-token prediction) are skipped. `tied` names tensors that are another's
    copy. Raises ValueError as `load_model` does.
    """
    with CheckpointReader(directory) as checkpoint:
        for name in tied:
            checkpoint.ignore(name)
        for stretch in stretches:
            whole = torch.empty(stretch.shape, device="meta")
            sources = [(stretch.name, whole)] if stretch.name in checkpoint else split_experts(stretch.name, whole)
            for source, view in sources:
                _copy_overlap(checkpoint, source, view, stretch)
        checkpoint.refuse_leftovers(num_layers)


def _copy_overlap(checkpoint: CheckpointReader, source: str, view: torch.Tensor, stretch: Stretch) -> None:
    """Copies what the tensor `source` of the checkpoint, at the place of `view` in the whole one, has for a stretch."""
    first = view.storage_offset()
    begin = max(first, stretch.start)
    end = min(first + view.numel(), stretch.start + stretch.target.numel())
    if begin >= end:
        checkpoint.check(source, view.shape)
        return
    values = checkpoint.read(source, view.shape).flatten()
    stretch.target[begin - stretch.start : end - stretch.start].copy_(values[begin - first : end - first])
