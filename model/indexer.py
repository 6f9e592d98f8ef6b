"""The lightning indexer of DeepSeek Sparse Attention: small heads that score every key for every query."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.rope import RotaryAngles


class IndexerHeads(NamedTuple):
    """What `kernels.indexer_scores` takes, one row a token; a tuple, because ZeRO-3's hooks read no other class."""

    queries: torch.Tensor  # [B, T, index_n_heads, index_head_dim]
    keys: torch.Tensor  # [B, T, index_head_dim], shared by the heads
    weights: torch.Tensor  # fp32 [B, T, index_n_heads], both constant scales included


class Indexer(nn.Module):
    """Projects tokens to index queries, keys and head weights (TR sec. 2.1; RoPE half-split, on the first dims)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.weight_scale = config.index_n_heads**-0.5 * config.index_head_dim**-0.5
        self.wq_b = nn.Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)

    def forward(self, hidden: torch.Tensor, query_latent: torch.Tensor, angles: RotaryAngles) -> IndexerHeads:
        """hidden [B, T, hidden_size] after the layer's norm, query_latent [B, T, q_lora_rank] after MLA's."""
        queries = self.wq_b(query_latent).unflatten(-1, (self.num_heads, self.head_dim))
        keys = self.k_norm(self.wk(hidden)).unsqueeze(2)
        weights = F.linear(hidden.float(), self.weights_proj.weight.float()) * self.weight_scale
        return IndexerHeads(
            queries=self._rotate(queries, angles), keys=self._rotate(keys, angles).squeeze(2), weights=weights
        )

    def _rotate(self, heads: torch.Tensor, angles: RotaryAngles) -> torch.Tensor:
        rotated = angles.rotate_half_split(heads[..., : self.rope_dim])
        return torch.cat([rotated, heads[..., self.rope_dim :]], dim=-1)
