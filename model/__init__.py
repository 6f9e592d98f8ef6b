"""The deepseek_v32 architecture in plain PyTorch, transformers' for all others, caches, checkpoints and checksums."""

from model.cache import CacheView, LatentCache, SlotCache
from model.checksum import checksums
from model.config import ModelConfig, YarnScaling
from model.deepseek_v32 import DeepseekV32
from model.hf import (
    checkpoint_tensors,
    empty_model,
    load_config,
    load_deepseek_v32,
    load_model,
    outline,
    save_model,
    write_checkpoint,
)
from model.key_selection import GivenKeys, KeySelection
from model.language_model import BackboneOutput, LanguageModel
from model.layout import join_experts, split_experts
from model.moe import Routing
from model.outline import ModelOutline, TensorSpec

__all__ = [
    "BackboneOutput",
    "CacheView",
    "DeepseekV32",
    "GivenKeys",
    "KeySelection",
    "LanguageModel",
    "LatentCache",
    "ModelConfig",
    "ModelOutline",
    "Routing",
    "SlotCache",
    "TensorSpec",
    "YarnScaling",
    "checkpoint_tensors",
    "checksums",
    "empty_model",
    "join_experts",
    "load_config",
    "load_deepseek_v32",
    "load_model",
    "outline",
    "save_model",
    "split_experts",
    "write_checkpoint",
]
