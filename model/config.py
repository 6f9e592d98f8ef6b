"""The architecture's numbers, under the names of a Hugging Face `config.json` of model type `deepseek_v32`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_JSON_DEFAULTS: Mapping[str, Any] = {
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163840,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""What transformers' DeepseekV32Config takes for a key that config.json leaves out: the published model's values, where
`ModelConfig` by itself begins with those of a small one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN's context extension (arXiv 2309.00071), as `rope_scaling` of config.json spells it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def magnitude(self, mscale: float = 1.0) -> float:
        """YaRN's temperature correction 0.1 * mscale * ln(factor) + 1, or 1 when nothing is stretched."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A deepseek_v32 model's shape. Field names and meanings are config.json's; sizes have no defaults.

    `rope_scaling` is None for plain RoPE. `mlp_layer_types` ("dense" or "sparse", one a layer) follows from
    `first_k_dense_replace` unless given. The constructor raises ValueError for numbers that no model can have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 3
    mlp_layer_types: tuple[str, ...] | None = None
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: int = 4096
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "first_k_dense_replace" else 1
            if value is None and "None" not in str(field.type):
                raise ValueError(f"model config: {field.name} must not be null")
            if field.type == "int" and (type(value) is not int or value < least):
                raise ValueError(f"model config: {field.name} must be a whole number from {least} on, not {value!r}")
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > self.index_head_dim:
            raise ValueError(
                f"model config: qk_rope_head_dim ({self.qk_rope_head_dim}) must be even and at most "
                f"index_head_dim ({self.index_head_dim})"
            )
        if self.n_routed_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"model config: n_group ({self.n_group}) must divide n_routed_experts ({self.n_routed_experts}) "
                f"and be at least topk_group ({self.topk_group})"
            )
        if self.num_experts_per_tok > self.topk_group * (self.n_routed_experts // self.n_group):
            raise ValueError(
                f"model config: num_experts_per_tok ({self.num_experts_per_tok}) exceeds the experts that "
                f"topk_group ({self.topk_group}) groups hold"
            )
        kinds = self.mlp_layer_types
        if kinds is not None and (len(kinds) != self.num_hidden_layers or not set(kinds) <= {"dense", "sparse"}):
            raise ValueError(
                f"model config: mlp_layer_types must name 'dense' or 'sparse' for each of the "
                f"{self.num_hidden_layers} layers"
            )

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers that hold routed experts, ascending."""
        if self.mlp_layer_types is not None:
            return [layer for layer, kind in enumerate(self.mlp_layer_types) if kind == "sparse"]
        return list(range(min(self.first_k_dense_replace, self.num_hidden_layers), self.num_hidden_layers))

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, defaults: Mapping[str, Any] = CONFIG_JSON_DEFAULTS) -> ModelConfig:
        """Reads the contents of a config.json; keys that do not shape the model are passed over.

        `defaults` stand for keys that are absent, before the constructor's own. RoPE may stand under `rope_scaling` and
        `rope_theta` or under `rope_parameters`. Raises ValueError naming the key that is missing or that asks for
        something this architecture does not have.
        """
        _refuse_foreign(values)
        values = {**defaults, **values}
        known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        absent = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and known.get(field.name) is None
        ]
        if absent:
            raise ValueError(f"model config: {', '.join(absent)} missing from config.json")
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        known["rope_theta"] = float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0)
        known.pop("rope_scaling", None)
        kinds = known["mlp_layer_types"] = tuple(known.get("mlp_layer_types") or ()) or None
        if kinds is not None and len(kinds) == known["num_hidden_layers"]:
            num_dense = known["first_k_dense_replace"] = kinds.count("dense")
            if kinds == ("dense",) * num_dense + ("sparse",) * (len(kinds) - num_dense):
                known["mlp_layer_types"] = None
        config = cls(**known)
        return dataclasses.replace(config, rope_scaling=_yarn(rope, config.max_position_embeddings))

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers and vLLM read; `from_dict` gives back an equal ModelConfig."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.rope_scaling is not None:
            scaling = dataclasses.asdict(self.rope_scaling)
            values["rope_scaling"] = {"type": "yarn"} | {k: v for k, v in scaling.items() if v is not None}
        if self.mlp_layer_types is None:
            del values["mlp_layer_types"]
        else:
            values["mlp_layer_types"] = list(self.mlp_layer_types)
        return {
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "hidden_act": "silu",
            "moe_layer_freq": 1,
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": 0,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "attention_dropout": 0.0,
            **values,
        }


def _refuse_foreign(values: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting whose every value but one would mean another architecture."""
    only = {
        "model_type": "deepseek_v32",
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "partial_rotary_factor": 1.0,
        "num_key_value_heads": values.get("num_attention_heads"),
    }
    for key, wanted in only.items():
        if values.get(key) is not None and values[key] != wanted:
            raise ValueError(f"model config: {key} is {values[key]!r}, but only {wanted!r} is supported")
    if values.get("attention_dropout"):
        raise ValueError("model config: attention_dropout must be 0")


def _yarn(rope: Mapping[str, Any], max_position_embeddings: int) -> YarnScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"model config: RoPE type {kind!r} is not supported; use 'default' or 'yarn'")
    known = {
        field.name: rope[field.name] for field in dataclasses.fields(YarnScaling) if rope.get(field.name) is not None
    }
    original = known.setdefault("original_max_position_embeddings", max_position_embeddings)
    known.setdefault("factor", max_position_embeddings / original)
    return YarnScaling(**known)
