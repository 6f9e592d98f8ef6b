"""Between the names of a live module and those of a checkpoint or of vLLM, where experts are tensors of their own.

In memory a layer's experts are `mlp.experts.gate_up_proj` [E, 2 * inner, hidden] and `mlp.experts.down_proj`; outside
they are `mlp.experts.{e}.gate_proj.weight`, `.up_proj.weight` and `.down_proj.weight`. All other names are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

_GATE_UP = ".mlp.experts.gate_up_proj"
_DOWN = ".mlp.experts.down_proj"


def split_experts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor in memory as (checkpoint name, view of it) pairs; one pair, itself, unless it is a stack of experts."""
    if name.endswith(_GATE_UP):
        prefix = name.removesuffix("gate_up_proj")
        for expert, weights in enumerate(tensor.unbind()):
            gate, up = weights.chunk(2)
            yield f"{prefix}{expert}.gate_proj.weight", gate
            yield f"{prefix}{expert}.up_proj.weight", up
    elif name.endswith(_DOWN):
        prefix = name.removesuffix("down_proj")
        for expert, weights in enumerate(tensor.unbind()):
            yield f"{prefix}{expert}.down_proj.weight", weights
    else:
        yield name, tensor


def join_experts(
    named_tensors: Iterable[tuple[str, torch.Tensor]], num_experts: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse of `split_experts` over a stream of tensors in any order; a stack follows its last expert.

    Raises ValueError, naming one tensor, when the stream ends with a stack of `num_experts` incomplete.
    """
    pending: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in named_tensors:
        prefix, is_expert, rest = name.partition(".mlp.experts.")
        parts = rest.split(".")
        if not is_expert or len(parts) != 3:
            yield name, tensor
            continue
        stack = prefix + (_DOWN if parts[1] == "down_proj" else _GATE_UP)
        pieces = pending.setdefault(stack, {})
        pieces[name] = tensor
        if len(pieces) == num_experts * (1 if parts[1] == "down_proj" else 2):
            yield stack, _stack(stack, pieces, num_experts)
            del pending[stack]
    for stack, pieces in pending.items():
        _stack(stack, pieces, num_experts)


def _pieces(stack: str, num_experts: int) -> list[tuple[str, ...]]:
    """The checkpoint names that make up a stack, one tuple an expert."""
    prefix, _, kind = stack.rpartition(".")
    projections = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
    return [tuple(f"{prefix}.{e}.{projection}.weight" for projection in projections) for e in range(num_experts)]


def _stack(stack: str, pieces: dict[str, torch.Tensor], num_experts: int) -> torch.Tensor:
    wanted = _pieces(stack, num_experts)
    for name in (name for names in wanted for name in names if name not in pieces):
        raise ValueError(f"tensor {name} is missing, so {stack} cannot be put together")
    return torch.stack([torch.cat([pieces[name] for name in names]) for names in wanted])
