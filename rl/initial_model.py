"""A model with random weights and a byte tokenizer, for runs that start from nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model import DeepseekV32, ModelConfig, save_model
from model.hf import DEEPSEEK_V32
from model.tokenizer import BYTE_VOCAB_SIZE, build_byte_tokenizer
from rl.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def initial_config(
    init: Mapping[str, Any], max_context: int, *, place: str = "model.init"
) -> ModelConfig | PretrainedConfig:
    """Reads ``init``: config.json's keys, of deepseek_v32 unless ``model_type`` names another architecture.

    ``place`` is where the recipe has them.
    The vocabulary is the byte tokenizer's. Raises RecipeError naming the key at fault.
    """
    tokenizer = build_byte_tokenizer()
    values = {
        "vocab_size": BYTE_VOCAB_SIZE,
        "max_position_embeddings": max_context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **init,
    }
    try:
        config = _read(values, place) if init.get("model_type", DEEPSEEK_V32) == DEEPSEEK_V32 else _read_foreign(values)
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{place}: {error}") from error
    vocab_size: int = config.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    if vocab_size < BYTE_VOCAB_SIZE:
        raise RecipeError(
            f"{place}: vocab_size ({vocab_size}) is too small for the byte tokenizer, "
            f"which has {BYTE_VOCAB_SIZE} tokens; leave it out"
        )
    return config


def create_initial_model(config: ModelConfig | PretrainedConfig, path: Path, *, seed: int) -> None:
    """Writes a model directory in Hugging Face layout; the weights are a function of ``config`` and ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(config, ModelConfig):
            model = DeepseekV32(config)
        else:
            from model.transformers_model import random_model

            model = random_model(config)
    save_model(model, path)
    build_byte_tokenizer().save_pretrained(path)


def _read(values: Mapping[str, Any], place: str) -> ModelConfig:
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in values:
        if key not in (*known, "model_type"):
            raise RecipeError(f"{place} has no key '{key}'; {did_you_mean(key, known)}")
    return ModelConfig.from_dict(values, defaults={})  # sizes of a small model where none are given


def _read_foreign(values: Mapping[str, Any]) -> PretrainedConfig:
    # transformers takes seconds to import, which runs of our own architecture need not wait for.
    from model.transformers_model import TransformersModel, config_of

    config = config_of(values)
    TransformersModel.empty(config)
    return config
