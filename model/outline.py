"""What a model's config.json says about it, without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One parameter or persistent buffer."""

    shape: tuple[int, ...]
    trained: bool  # a parameter; buffers, such as a router's correction bias, are carried along but never trained


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """The shape of a causal language model."""

    architecture: str  # the class that config.json names, for example Qwen3MoeForCausalLM
    vocab_size: int
    hidden_size: int
    num_layers: int
    moe_layers: tuple[int, ...]  # layers with routed experts, ascending; () for a dense model
    num_experts: int  # routed experts of a layer; 0 for a dense model
    experts_per_token: int  # 0 for a dense model
    tensors: dict[str, TensorSpec]  # by in-memory name (experts stacked), in state_dict order; tied tensors once
    max_context: int | None  # positions that config.json allows; None where it says nothing
    index_topk: int | None = None  # keys that sparse attention keeps; None where attention is dense

    @property
    def num_parameters(self) -> int:
        """Elements of all trained tensors."""
        return sum(torch.Size(spec.shape).numel() for spec in self.tensors.values() if spec.trained)


def tensor_specs(module: nn.Module) -> dict[str, TensorSpec]:
    """Every tensor of a module's state_dict, tied ones under their first name."""
    specs: dict[str, TensorSpec] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            specs[name] = TensorSpec(shape=tuple(tensor.shape), trained=isinstance(tensor, nn.Parameter))
    return specs
