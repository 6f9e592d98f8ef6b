"""Loading a checkpoint into a model of which this process holds only a part.

A part is a stretch of each flattened tensor (:class:`Stretch`): ZeRO-3 cuts every parameter so, and the experts that
expert parallelism leaves to one rank lie one after another in their stack. No more than one tensor of the checkpoint
is in memory at a time, and tensors without a part here are not read at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from model.hf import CheckpointReader
from model.language_model import LanguageModel
from model.layout import split_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Where some consecutive elements of a tensor go."""

    name: str  # in-memory name of the tensor
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # place of the first element of `target` in the flattened whole tensor
    target: torch.Tensor  # one-dimensional, possibly empty


@torch.no_grad()
def load_stretches(model: LanguageModel, path: str | os.PathLike[str], stretches: Iterable[Stretch]) -> None:
    """Fills every target from the checkpoint; together the stretches must name each of `model.outline.tensors`.

    Raises ValueError as `load_model` does.
    """
    directory = Path(path)
    with CheckpointReader(directory) as checkpoint:
        for name in model.state_dict(keep_vars=True).keys() - model.outline.tensors.keys():
            checkpoint.ignore(name)  # tied to another one
        for stretch in stretches:
            for source, view in _sources(checkpoint, stretch.name, torch.empty(stretch.shape, device="meta")):
                _copy_overlap(checkpoint, source, view, stretch)
        checkpoint.refuse_leftovers(model.outline.num_layers)


def can_load_stretches(model: LanguageModel, path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint stores every tensor as it is in memory, or a stack of experts by DeepSeek's names."""
    with CheckpointReader(Path(path)) as checkpoint:
        return all(
            any(
                source in checkpoint for source, _ in _sources(checkpoint, name, torch.empty(spec.shape, device="meta"))
            )
            for name, spec in model.outline.tensors.items()
        )


def _sources(checkpoint: CheckpointReader, name: str, whole: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors of the checkpoint that make up `whole`, each with the view of it that it fills."""
    return [(name, whole)] if name in checkpoint else split_experts(name, whole)


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
