"""Causal language models of any other architecture: transformers' own modules, built and read without network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from model.outline import ModelOutline, tensor_specs


def outline_transformers(path: Path) -> ModelOutline:
    """As `model.outline.outline`, for an architecture of transformers."""
    config = read_config(path)
    return outline_of(config, empty_module(config))


def read_config(path: Path) -> PretrainedConfig:
    """transformers' config object. Raises ValueError when the directory needs code of its own or makes no sense."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'}: {_first_sentence(error)}") from error


def empty_module(config: PretrainedConfig) -> nn.Module:
    """The module of a config on the meta device, without a byte of weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"transformers has no causal language model for model_type {config.model_type!r}: {_first_sentence(error)}"
        ) from error


def outline_of(config: PretrainedConfig, module: nn.Module) -> ModelOutline:
    """The outline of a module, which may live on any device."""
    text: Any = config.get_text_config()
    experts = {int(name.split(".layers.")[1].split(".")[0]): part for name, part in _experts(module)}
    routers: list[Any] = [part for part in module.modules() if hasattr(part, "top_k") and hasattr(part, "num_experts")]
    architectures = config.architectures or [type(module).__name__]
    return ModelOutline(
        architecture=architectures[0],
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        moe_layers=tuple(sorted(experts)),
        num_experts=max((int(part.num_experts) for part in experts.values()), default=0),
        experts_per_token=max((int(part.top_k) for part in routers), default=0) if experts else 0,
        tensors=tensor_specs(module),
        max_context=getattr(text, "max_position_embeddings", None),
    )


def _experts(module: nn.Module) -> list[tuple[str, Any]]:
    """The modules that hold a layer's stacked experts, by name."""
    return [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(getattr(part, "down_proj", None), nn.Parameter)
    ]


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
