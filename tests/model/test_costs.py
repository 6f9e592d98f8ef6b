"""Costs of a token, against counts by hand, torch's own flop counter and what autograd really keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from model import DeepseekV32, ModelConfig
from model.costs import ModelCosts, model_costs
from tests.model.published import DEEPSEEK_V32, QWEN3_8B, QWEN3_30B_A3B

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_attention_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
SMALL_QWEN: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
SMALL_QWEN_MOE: dict[str, Any] = SMALL_QWEN | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.fixture
def costs(tmp_path: Path) -> Callable[[dict[str, Any]], ModelCosts]:
    def read(config: dict[str, Any]) -> ModelCosts:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model_costs(tmp_path)

    return read


def small(**changes: Any) -> dict[str, Any]:
    return ModelConfig(**SMALL | changes).to_dict()


def test_deepseek_v32_by_hand(costs):
    """The numbers of the paper's model, from its config.json with a pocket calculator."""
    model = costs(DEEPSEEK_V32)
    assert model.outline.num_parameters == 671_877_929_216  # of transformers' module
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    indexer = 1536 * 64 * 128 + 7168 * 128 + 7168 * 64
    dense, expert = 3 * 7168 * 18432, 3 * 7168 * 2048
    layers = 61 * (attention + indexer) + 3 * dense + 58 * (9 * expert + 256 * 7168)
    assert model.active_parameters == layers + 129280 * 7168  # the head, and not the embedding
    assert 37e9 < model.active_parameters < 38e9  # "37B activated", and the indexer
    # 512 + 64 numbers of bf16, and 128 fp8 index keys with one fp32 scale, on every worker of an engine.
    assert model.cache_bytes_per_token() == model.cache_bytes_per_token(8) == 61 * (576 * 2 + 128 + 4) == 78_324
    assert model.cache_bytes_per_token(quantised_keys=False) == 61 * (576 * 2 + 128 * 2)
    assert model.attended(4096) == 2048 * 2049 // 2 + 2048 * 2048
    assert model.forward_flops(4096) == pytest.approx(
        2 * model.active_parameters * 4096
        + 61 * 2 * 128 * (192 + 128) * model.attended(4096)
        + 61 * 2 * 64 * 128 * (4096 * 4097 // 2)
    )


def test_qwen3_by_hand(costs):
    dense = costs(QWEN3_8B)
    attention, ffn = 4096 * 128 * (32 + 8 + 8 + 32), 3 * 4096 * 12288
    assert dense.active_parameters == 36 * (attention + ffn) + 151936 * 4096
    assert dense.cache_bytes_per_token() == 36 * 2 * 8 * 128 * 2
    assert dense.cache_bytes_per_token(4) == dense.cache_bytes_per_token() / 4
    assert dense.cache_bytes_per_token(16) == dense.cache_bytes_per_token() / 8  # a worker has one head at least
    assert dense.attended(1000) == 1000 * 1001 // 2
    moe = costs(QWEN3_30B_A3B)
    attention, ffn = 2048 * 128 * (32 + 4 + 4 + 32), 8 * 3 * 2048 * 768 + 128 * 2048
    assert moe.active_parameters == 48 * (attention + ffn) + 151936 * 2048
    assert 3.0e9 < moe.active_parameters < 3.4e9  # "A3B"


def test_training_is_three_forwards_but_for_the_indexers_scores(costs):
    model = costs(small(index_topk=16))
    assert model.training_flops(16) == 3 * model.forward_flops(16)
    scores = 2 * 2 * 2 * 32 * (40 * 41 // 2)
    assert model.training_flops(40) == pytest.approx(3 * (model.forward_flops(40) - scores) + scores)


@pytest.mark.parametrize("config", [SMALL_QWEN, SMALL_QWEN | {"tie_word_embeddings": True}])
def test_flops_are_those_that_torch_counts(costs, config: dict[str, Any], tmp_path: Path):
    """Eager attention computes every pair, seen or not, so the pairs of both sides are put in by hand."""
    model, length = costs(config), 48
    module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, length, dtype=torch.long))
    widths = sum(2 * (layer.query + layer.value) for layer in model.layers)
    expected = model.forward_flops(length) + widths * (length * length - model.attended(length))
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(
    "config", [small(), small(first_k_dense_replace=0), SMALL_QWEN, SMALL_QWEN_MOE], ids=["mla", "moe", "qwen", "q-moe"]
)
def test_saved_bytes_are_about_what_autograd_keeps(costs, config: dict[str, Any], tmp_path: Path):
    model = costs(config)
    if config["model_type"] == "deepseek_v32":
        ours = DeepseekV32(ModelConfig.from_dict(config)).bfloat16()

        def forward(num_tokens: int) -> torch.Tensor:
            ids = torch.zeros(1, num_tokens, dtype=torch.long)
            return ours.backbone(ids, cu_seqlens=torch.arange(0, num_tokens + 1, 4)).hidden
    else:
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).bfloat16()

        def forward(num_tokens: int) -> torch.Tensor:
            return theirs.model(torch.zeros(num_tokens // 4, 4, dtype=torch.long)).last_hidden_state

    a_token = (kept_bytes(forward, 128) - kept_bytes(forward, 64)) / 64
    estimate = sum(model.saved_bytes_per_token(layer) for layer in range(2)) + 10 * 256  # and the last norm
    assert 0.8 < estimate / a_token < 1.25


def kept_bytes(forward: Callable[[int], torch.Tensor], num_tokens: int) -> int:
    """Bytes of the storages that autograd holds after a forward pass, parameters aside."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(num_tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
