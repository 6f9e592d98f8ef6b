"""The deepseek_v32 language model: DeepSeek-V3's MLA and mixture of experts, with DeepSeek Sparse Attention.

Parameters and buffers bear the names that transformers' DeepseekV32ForCausalLM uses in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from model.attention import Attention, CachedTokens, IndexerLoss, WholeSequences
from model.cache import CacheStep, CacheView, LatentCache
from model.config import ModelConfig
from model.key_selection import KeySelection
from model.language_model import BackboneOutput, LanguageModel
from model.layout import split_experts
from model.moe import MLP, Experts, MoE, Router, Routing
from model.norm import RMSNorm
from model.outline import ModelOutline, tensor_specs
from model.packing import Batch
from model.recompute import LayerOutput, recomputed
from model.rope import Rope


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        sparse = layer in config.moe_layers
        self.mlp = MoE(config) if sparse else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        how: WholeSequences | CachedTokens,
        replay: torch.Tensor | None,
        recorded: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns (hidden, experts chosen or None for a dense layer, indexer loss or None)."""
        attended, loss = self.self_attn(self.input_layernorm(hidden), how)
        hidden = hidden + attended
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, MoE):
            output, experts = self.mlp(normed, replay, recorded)
            return hidden + output, experts, loss
        return hidden + self.mlp(normed), None, loss


class Embedding(nn.Embedding):
    """One that draws nothing on the meta device, where torch would import its compiler for that: seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Backbone(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute_layers = False

    def forward(
        self, input_ids: torch.Tensor, how: WholeSequences | CachedTokens, routes: Routing | None, record_routes: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        hidden = self.embed_tokens(input_ids)
        recorded = None if routes is None or bool(routes.recorded.all()) else routes.recorded
        replays = iter(()) if routes is None else iter(routes.experts.long().unbind(2))
        chosen, losses = [], []
        run = recomputed if self.recompute_layers and torch.is_grad_enabled() else _kept
        for layer in self.layers:
            assert isinstance(layer, Layer)
            replay = next(replays, None) if isinstance(layer.mlp, MoE) else None
            hidden, experts, loss = run(layer, hidden, how, replay, recorded)
            if experts is not None:
                chosen.append(experts)
            if loss is not None:
                losses.append(loss)
        indexer_loss = torch.stack(losses).sum() if losses else None
        return self.norm(hidden), torch.stack(chosen, dim=2) if record_routes and chosen else None, indexer_loss


def _kept(layer: Layer, *args: Any) -> LayerOutput:
    return layer(*args)


class DeepseekV32(LanguageModel):
    """Constructed with random weights of standard deviation `initializer_range`; on the meta device without any."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self._rope = Rope(config)
        self.outline = self._outline()
        if not self.lm_head.weight.is_meta:
            self.apply(self._initialise)

    def backbone(
        self,
        input_ids: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: CacheView | None = None,
        routes: Routing | None = None,
        record_routes: bool = False,
        indexer_loss: IndexerLoss | None = None,
        selection: KeySelection | None = None,
    ) -> BackboneOutput:
        """As `LanguageModel.backbone`."""
        selection = selection or KeySelection()
        given = None if selection.given is None else selection.given.keys.shape[1:]
        if given is not None and given != (self.config.num_hidden_layers, self.config.index_topk):
            raise ValueError(
                f"{given[1]} keys are given in {given[0]} layers, but the model attends to {self.config.index_topk} "
                f"in {self.config.num_hidden_layers}"
            )
        if cache is not None:
            if positions is None or cu_seqlens is not None or indexer_loss is not None or given is not None:
                raise ValueError(
                    "backbone with a cache takes positions, and neither cu_seqlens nor indexer_loss nor keys"
                )
            with torch.no_grad():
                step = CacheStep(cache, positions)
                cached = CachedTokens(angles=self._rope(positions), step=step, selection=selection)
                hidden, chosen, _ = self.model(input_ids, cached, routes, record_routes)
            return BackboneOutput(hidden=hidden, routes=chosen, indexer_loss=None)
        how = self._whole_sequences(input_ids, positions, cu_seqlens, indexer_loss, selection)
        hidden, chosen, loss = self.model(input_ids, how, routes, record_routes)
        return BackboneOutput(hidden=hidden, routes=chosen, indexer_loss=loss)

    @property
    def index_topk(self) -> int:
        return self.config.index_topk

    def new_cache(self, num_slots: int, max_len: int) -> LatentCache:
        weight = self.lm_head.weight
        return LatentCache(self.config, num_slots, max_len, dtype=weight.dtype, device=weight.device)

    def config_json(self) -> dict[str, Any]:
        return self.config.to_dict()

    def checkpoint_names(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        return split_experts(name, tensor)

    def recompute_activations(self) -> None:
        self.model.recompute_layers = True

    def tie_weights(self) -> None:
        """Makes the head share the embedding's parameter where the config says so; needed again after `to_empty`."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _whole_sequences(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        indexer_loss: IndexerLoss | None,
        selection: KeySelection,
    ) -> WholeSequences:
        batch = Batch(input_ids, cu_seqlens)
        return WholeSequences(
            angles=self._rope(batch.positions if positions is None else positions),
            batch=batch,
            indexer_loss=indexer_loss,
            always_index=self.always_index,
            index_arithmetic=self.index_arithmetic,
            selection=selection,
        )

    def _outline(self) -> ModelOutline:
        config = self.config
        moe_layers = tuple(config.moe_layers)
        return ModelOutline(
            architecture="DeepseekV32ForCausalLM",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            moe_layers=moe_layers,
            num_experts=config.n_routed_experts if moe_layers else 0,
            experts_per_token=config.num_experts_per_tok if moe_layers else 0,
            tensors=tensor_specs(self),
            max_context=config.max_position_embeddings,
            index_topk=config.index_topk,
        )

    def _initialise(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
