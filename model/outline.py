"""What a model's config.json says about it, without loading a weight."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from model.config import ModelConfig
from model.deepseek_v32 import DeepseekV32
from model.hf import model_type_of, read_json


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

    @property
    def num_parameters(self) -> int:
        """Elements of all trained tensors."""
        return sum(torch.Size(spec.shape).numel() for spec in self.tensors.values() if spec.trained)


def outline(path: str | os.PathLike[str]) -> ModelOutline:
    """The outline of a checkpoint directory, from its config.json alone.

    Raises ValueError, in one sentence, when there is no config.json, when a key is missing or wrong, or when the
    architecture is not one that Keel can run.
    """
    directory = Path(path)
    if model_type_of(directory) == "deepseek_v32":
        return outline_deepseek_v32(ModelConfig.from_dict(read_json(directory / "config.json")))
    # transformers takes seconds to import, which models of our own architecture need not wait for.
    from model.transformers_model import outline_transformers

    return outline_transformers(directory)


def outline_deepseek_v32(config: ModelConfig) -> ModelOutline:
    """The outline of our own architecture."""
    with torch.device("meta"):
        module = DeepseekV32(config)
    moe_layers = tuple(config.moe_layers)
    return ModelOutline(
        architecture="DeepseekV32ForCausalLM",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        moe_layers=moe_layers,
        num_experts=config.n_routed_experts if moe_layers else 0,
        experts_per_token=config.num_experts_per_tok if moe_layers else 0,
        tensors=tensor_specs(module),
        max_context=config.max_position_embeddings,
    )


def tensor_specs(module: nn.Module) -> dict[str, TensorSpec]:
    """Every tensor of a module's state_dict, tied ones under their first name."""
    specs: dict[str, TensorSpec] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            specs[name] = TensorSpec(shape=tuple(tensor.shape), trained=isinstance(tensor, nn.Parameter))
    return specs
