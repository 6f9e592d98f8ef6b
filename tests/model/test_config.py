from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import DeepseekV32Config

from model import ModelConfig, YarnScaling
from model.rope import softmax_scale
from tests.model.shapes import BASE, SHAPES, make_config

# The rope and routing part of DeepSeek-V3.2's public config.json, as that file spells it.
PUBLIC: dict[str, Any] = {
    **BASE,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "ep_size": 1,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
}


def test_the_public_spelling_is_read() -> None:
    config = ModelConfig.from_dict(PUBLIC)
    assert config.rope_scaling == YarnScaling(
        factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )
    assert config.rope_theta == 10000.0
    assert config.moe_layers == [1, 2]


OPTIONAL = [field.name for field in dataclasses.fields(ModelConfig) if field.default is not dataclasses.MISSING]


@pytest.mark.parametrize("left_out", [*OPTIONAL, "all of them"])
def test_a_key_that_is_left_out_means_what_it_means_to_transformers(left_out: str) -> None:
    full = make_config(**SHAPES["yarn"], n_routed_experts=64, n_group=16, topk_group=8).to_dict()
    gone = OPTIONAL if left_out == "all of them" else [left_out]
    values = {key: value for key, value in full.items() if key not in gone}
    ours, theirs = ModelConfig.from_dict(values), DeepseekV32Config.from_dict(dict(values))
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("rope_theta", "rope_scaling", "mlp_layer_types"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    kinds = ["sparse" if layer in ours.moe_layers else "dense" for layer in range(ours.num_hidden_layers)]
    assert kinds == theirs.mlp_layer_types
    rope: Any = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    assert (ours.rope_scaling is None) == (rope["rope_type"] == "default")
    if ours.rope_scaling is not None:
        scaling = dataclasses.asdict(ours.rope_scaling)
        assert all(scaling[key] == value for key, value in rope.items() if key in scaling)


def test_scale_of_the_public_model() -> None:
    """192 ** -0.5 * 1.87385, the number of the reference implementation."""
    config = make_config(
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        index_head_dim=128,
        rope_scaling=YarnScaling(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
    )
    assert softmax_scale(config) == pytest.approx(192**-0.5 * 1.87385, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size missing"),
        ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "RoPE type 'linear' is not supported"),
        ({"q_lora_rank": None}, "q_lora_rank missing"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor must not be null"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be a whole number from 1 on, not 0"),
        ({"vocab_size": "64k"}, "vocab_size must be a whole number from 1 on, not '64k'"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number from 0 on"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ({"index_head_dim": 4}, "index_head_dim"),
        ({"n_group": 3}, "n_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
    ],
)
def test_what_no_model_can_have_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_dict(PUBLIC | change)
    assert "\n" not in str(error.value)
