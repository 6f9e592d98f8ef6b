"""Small architectures, and their twins in transformers: the oracle of the model's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from model import DeepseekV32, ModelConfig, YarnScaling
from model.attention import Attention, IndexerLoss
from model.moe import Router

VOCAB = 61
YARN = YarnScaling(factor=40, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    # Many indexer heads: with few, ReLU makes scores of exactly 0, whose ties transformers breaks arbitrarily.
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 6,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 640,
}

SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    "groups": {"n_group": 4, "topk_group": 2},
    "groups of one": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    "yarn": {"rope_scaling": YARN, "rope_theta": 5e3},
    "yarn, own attention factor": {
        "rope_scaling": YarnScaling(
            factor=8, original_max_position_embeddings=32, attention_factor=0.8, beta_fast=20.0, truncate=False
        )
    },
    "yarn, two mscales": {
        "rope_scaling": YarnScaling(factor=4, original_max_position_embeddings=24, mscale=0.7, mscale_all_dim=1.2)
    },
    "yarn and groups": {"rope_scaling": YARN, "n_group": 2, "topk_group": 1},
    "no dense layer": {"first_k_dense_replace": 0, "num_hidden_layers": 2},
    "only dense layers": {"first_k_dense_replace": 3},
    "interleaved layers": {"mlp_layer_types": ("sparse", "dense", "sparse")},
    "odd sizes": {
        "hidden_size": 37,
        "moe_intermediate_size": 13,
        "num_attention_heads": 3,
        "n_routed_experts": 5,
        "num_experts_per_tok": 3,
        "q_lora_rank": 11,
        "kv_lora_rank": 9,
        "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 6,
        "v_head_dim": 5,
        "index_n_heads": 9,
        "index_head_dim": 11,
        "index_topk": 7,
    },
    "raw gate weights": {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_shared_experts": 2},
    "biases and another epsilon": {"attention_bias": True, "rms_norm_eps": 1e-3},
    "tied head": {"tie_word_embeddings": True},
    "nothing left out": {"index_topk": 4096},
}


def make_config(**overrides: Any) -> ModelConfig:
    return ModelConfig(**(BASE | overrides))


def make_model(config: ModelConfig, seed: int = 0) -> DeepseekV32:
    """A model whose every weight matters: nothing at its neutral value, experts and keys competing."""
    torch.manual_seed(seed)
    module = DeepseekV32(config)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            scale = 0.1 if "norm" in name or "correction_bias" in name or name.endswith(".bias") else 0.3
            tensor.normal_(std=scale).add_(1.0 if "norm.weight" in name else 0.0)
    return module


def make_twin(module: DeepseekV32, **overrides: Any) -> DeepseekV32ForCausalLM:
    """transformers' model with the same weights; `overrides` change its configuration only."""
    config = DeepseekV32Config.from_dict(module.config.to_dict() | {"attn_implementation": "eager"} | overrides)
    twin = DeepseekV32ForCausalLM(config).eval()
    twin.set_experts_implementation("eager")  # its default takes no sizes but multiples of 16 bytes
    twin.load_state_dict(module.state_dict())
    return twin


def attention(module: DeepseekV32, layer: int) -> Attention:
    found = module.get_submodule(f"model.layers.{layer}.self_attn")
    assert isinstance(found, Attention)
    return found


def router(module: DeepseekV32, layer: int) -> Router:
    found = module.get_submodule(f"model.layers.{layer}.mlp.gate")
    assert isinstance(found, Router)
    return found


def record(module: DeepseekV32, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """The routes of a forward, [B, T, moe_layers, top_k]."""
    routes = module.backbone(ids, record_routes=True, **arguments).routes
    assert routes is not None
    return routes


def indexer_loss(module: DeepseekV32, ids: torch.Tensor, loss: IndexerLoss) -> torch.Tensor:
    value = module.backbone(ids, indexer_loss=loss).indexer_loss
    assert value is not None
    return value


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
