"""The deepseek_v32 architecture in plain PyTorch, its cache, its checkpoints and its checksums."""

from model.cache import CacheView, LatentCache
from model.checksum import checksums
from model.config import ModelConfig, YarnScaling
from model.deepseek_v32 import BackboneOutput, DeepseekV32
from model.hf import load_config, load_model, save_model, write_checkpoint
from model.layout import checkpoint_tensors, join_experts, split_experts
from model.moe import Routing
from model.outline import ModelOutline, TensorSpec, outline

__all__ = [
    "BackboneOutput",
    "CacheView",
    "DeepseekV32",
    "LatentCache",
    "ModelConfig",
    "ModelOutline",
    "Routing",
    "TensorSpec",
    "YarnScaling",
    "checkpoint_tensors",
    "checksums",
    "join_experts",
    "load_config",
    "load_model",
    "outline",
    "save_model",
    "split_experts",
    "write_checkpoint",
]
