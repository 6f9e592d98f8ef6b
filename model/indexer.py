"""The lightning indexer of DeepSeek Sparse Attention: small heads that score every key for every query."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from model.config import ModelConfig
from model.rope import RotaryAngles


class IndexerHeads(NamedTuple):
    """What `kernels.indexer_scores` takes, one row a token; a tuple, because ZeRO-3's hooks read no other class."""

    queries: torch.Tensor  # [B, T, index_n_heads, index_head_dim]
    keys: torch.Tensor  # [B, T, index_head_dim], shared by the heads
    weights: torch.Tensor  # fp32 [B, T, index_n_heads], both constant scales included

    key_scales: torch.Tensor | None = None  # fp32 [B, T] where queries and keys are fp8


IndexArithmetic = Literal["plain", "vllm"]
"""How indices are selected: "plain" in the dtype of the weights, with fp32 head weights; "vllm" as vLLM 0.32.0 selects,
with queries and keys in fp8 (scaled by powers of two, no Hadamard rotation) and head weights of the weights' dtype."""


class Indexer(nn.Module):
    """Projects tokens to index queries, keys and head weights (TR sec. 2.1; RoPE half-split, on the first dims)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.plain_rope = config.rope_scaling is None
        self.weight_scale = config.index_n_heads**-0.5 * config.index_head_dim**-0.5
        self.wq_b = nn.Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        query_latent: torch.Tensor,
        angles: RotaryAngles,
        arithmetic: IndexArithmetic = "plain",
    ) -> IndexerHeads:
        """hidden [B, T, hidden_size] after the layer's norm, query_latent [B, T, q_lora_rank] after MLA's."""
        queries = self.wq_b(query_latent).unflatten(-1, (self.num_heads, self.head_dim))
        if arithmetic == "vllm":
            return self._as_vllm(hidden, queries, angles)
        keys = self.k_norm(self.wk(hidden)).unsqueeze(2)
        weights = F.linear(hidden.float(), self.weights_proj.weight.float()) * self.weight_scale
        return IndexerHeads(
            queries=self._rotate(queries, angles), keys=self._rotate(keys, angles).squeeze(2), weights=weights
        )

    def _as_vllm(self, hidden: torch.Tensor, queries: torch.Tensor, angles: RotaryAngles) -> IndexerHeads:
        """Without a gradient. Between the projections and fp8 nothing is rounded."""
        cos, sin = (angle.flatten(0, -2) for angle in angles.of_tokens(hidden.shape[:2]))
        if self.plain_rope:  # vLLM keeps a table of these angles in the model's dtype; stretched ones are fp32 there
            cos, sin = cos.to(hidden.dtype).float(), sin.to(hidden.dtype).float()
        norm = self.k_norm
        keys = F.layer_norm(self.wk(hidden).float(), (self.head_dim,), norm.weight.float(), norm.bias.float(), norm.eps)
        weights = self.weights_proj(hidden).float().flatten(0, 1)
        shape = hidden.shape[:2]
        codes, folded = kernels.quantise_index_heads(
            queries.float().flatten(0, 1), cos, sin, weights * self.weight_scale, hadamard=False
        )
        key_codes, key_scales = kernels.quantise_index_heads(keys.flatten(0, 1).unsqueeze(1), cos, sin, hadamard=False)
        return IndexerHeads(
            queries=codes.unflatten(0, shape),
            keys=key_codes.squeeze(1).unflatten(0, shape),
            weights=folded.unflatten(0, shape),
            key_scales=key_scales.squeeze(1).unflatten(0, shape),
        )

    def _rotate(self, heads: torch.Tensor, angles: RotaryAngles) -> torch.Tensor:
        rotated = angles.rotate_half_split(heads[..., : self.rope_dim])
        return torch.cat([rotated, heads[..., self.rope_dim :]], dim=-1)
