"""Small models of several families of transformers, as ours and as theirs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from model.transformers_model import TransformersModel, config_of, random_model

_SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
_MOE: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_GROUPED: dict[str, Any] = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 4,
}
VALUES: dict[str, dict[str, Any]] = {
    "qwen3": _SIZES | {"tie_word_embeddings": True},
    "llama": _SIZES,
    "mistral": _SIZES | {"sliding_window": 5},
    "qwen3_moe": _SIZES | _MOE | {"num_experts": 8, "mlp_only_layers": [1], "norm_topk_prob": True},
    "deepseek_v3": _SIZES | _MOE | _GROUPED | _MLA | {"head_dim": 8},
    "glm4_moe": _SIZES | _MOE | _GROUPED,
    "olmoe": _SIZES | {"num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": _SIZES | {"num_local_experts": 8, "num_experts_per_tok": 2},
}
MOE_LAYERS = {"qwen3_moe": (0, 2), "deepseek_v3": (1, 2), "glm4_moe": (1, 2), "olmoe": (0, 1, 2), "mixtral": (0, 1, 2)}


def config(family: str, **changes: Any) -> PretrainedConfig:
    return config_of(VALUES[family] | {"model_type": family} | changes)


def make(family: str, seed: int = 0, **changes: Any) -> TransformersModel:
    """Random weights, correction biases and norms included; a function of the arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = random_model(config(family, **changes)).eval()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith("e_score_correction_bias"):
                    tensor.normal_(std=0.1)
                elif tensor.dim() == 1:
                    tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def twin(model: TransformersModel) -> PreTrainedModel:
    """The same weights in a module that runs transformers' own attention and experts, plainly written."""
    module = AutoModelForCausalLM.from_config(
        type(model.config)(**model.config.to_dict()), attn_implementation="eager", experts_implementation="eager"
    )
    module.load_state_dict(model.state_dict())
    return module.eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 264, shape, generator=torch.Generator().manual_seed(seed))
