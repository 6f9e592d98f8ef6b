"""The deepseek_v32 architecture in plain PyTorch, its cache, its checkpoints and its checksums."""

from model.cache import CacheView, LatentCache
from model.config import ModelConfig, YarnScaling
from model.deepseek_v32 import BackboneOutput, DeepseekV32
from model.moe import Routing

__all__ = [
    "BackboneOutput",
    "CacheView",
    "DeepseekV32",
    "LatentCache",
    "ModelConfig",
    "Routing",
    "YarnScaling",
]
