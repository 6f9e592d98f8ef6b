"""A deepseek_v32 model with random weights and a byte tokenizer, for runs that start from nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model import DeepseekV32, ModelConfig, save_model
from model.tokenizer import BYTE_VOCAB_SIZE, build_byte_tokenizer
from rl.errors import RecipeError, did_you_mean


def initial_config(init: Mapping[str, Any], max_context: int) -> ModelConfig:
    """Reads ``model.init``; the vocabulary is the byte tokenizer's. Raises RecipeError naming the key at fault."""
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in init:
        if key not in known:
            raise RecipeError(f"model.init has no key '{key}'; {did_you_mean(key, known)}")
    tokenizer = build_byte_tokenizer()
    given = {
        "vocab_size": BYTE_VOCAB_SIZE,
        "max_position_embeddings": max_context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config = ModelConfig.from_dict({**given, **init})
    except (ValueError, TypeError) as error:
        raise RecipeError(f"model.init: {error}") from error
    if config.vocab_size < BYTE_VOCAB_SIZE:
        raise RecipeError(
            f"model.init: vocab_size ({config.vocab_size}) is too small for the byte tokenizer, "
            f"which has {BYTE_VOCAB_SIZE} tokens; leave it out"
        )
    return config


def create_initial_model(config: ModelConfig, path: Path, *, seed: int) -> None:
    """Writes a model directory in Hugging Face layout; the weights are a function of ``config`` and ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DeepseekV32(config)
    save_model(model, path)
    build_byte_tokenizer().save_pretrained(path)
