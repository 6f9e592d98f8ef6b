"""Outlines against the modules themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeConfig, Qwen3Config, Qwen3MoeConfig

from model import DeepseekV32, outline, save_model
from tests.model.shapes import make_config

SHARED: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
MOE: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MLA: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
GROUPS: dict[str, Any] = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
HEADS: dict[str, Any] = {"head_dim": 8}  # of transformers' configs, but not of their signatures
CONFIGS = {
    "qwen3": (Qwen3Config(**SHARED, head_dim=8, tie_word_embeddings=True), ()),
    "qwen3_moe": (Qwen3MoeConfig(**SHARED, **MOE, **HEADS, num_experts=8, mlp_only_layers=[1]), (0, 2)),
    "deepseek_v3": (DeepseekV3Config(**SHARED | {"num_key_value_heads": 4}, **MOE, **MLA, **GROUPS), (1, 2)),
    "glm4_moe": (Glm4MoeConfig(**SHARED, **MOE, **GROUPS | {"n_group": 1, "topk_group": 1}, **HEADS), (1, 2)),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_outline_of_a_transformers_model(tmp_path: Path, family: str):
    config, moe_layers = CONFIGS[family]
    module = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(module).__name__]
    config.save_pretrained(tmp_path)
    found = outline(tmp_path)
    assert found.architecture == type(module).__name__
    assert (found.vocab_size, found.hidden_size, found.num_layers, found.max_context) == (264, 32, 3, 96)
    assert found.moe_layers == moe_layers
    assert (found.num_experts, found.experts_per_token) == ((8, 2) if moe_layers else (0, 0))
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert {name: spec.shape for name, spec in found.tensors.items()} == wanted
    parameters = dict(module.named_parameters())
    assert {name for name, spec in found.tensors.items() if spec.trained} == parameters.keys()
    assert found.num_parameters == sum(parameter.numel() for parameter in parameters.values())


@pytest.mark.parametrize("tied", [False, True])
def test_the_outline_of_our_own_architecture(tmp_path: Path, tied: bool):
    module = DeepseekV32(make_config(tie_word_embeddings=tied))
    save_model(module, tmp_path)
    found = outline(tmp_path)
    assert found.architecture == "DeepseekV32ForCausalLM"
    assert found.moe_layers == tuple(module.config.moe_layers)
    assert list(found.tensors) == [n for n in module.state_dict() if not (tied and n == "lm_head.weight")]
    trained = {name for name, spec in found.tensors.items() if spec.trained}
    assert trained == set(dict(module.named_parameters()))
    assert found.num_parameters == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "does not exist"),
        ({"hidden_size": 32}, "names no model_type"),
        ({"model_type": "nobody_knows"}, "nobody_knows"),
        ({"model_type": "vit"}, "no causal language model for model_type 'vit'"),
        ({"model_type": "deepseek_v32", "hidden_size": 8}, "missing from config.json"),
    ],
)
def test_what_has_no_outline_is_said_in_one_sentence(tmp_path: Path, config: dict | None, sentence: str):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence) as caught:
        outline(tmp_path)
    assert "\n" not in str(caught.value)
