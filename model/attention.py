"""Multi-head latent attention (MLA) over the keys that the lightning indexer selects.

Two forms of one function. Training and whole sequences use the MHA form: per-head keys and values, attention masked to
the selected keys. Generation uses the absorbed MQA form: queries are carried into the latent space, and all heads share
the cached latents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import nn

import kernels
from kernels.crossover import AttentionForm, attention_form
from model.cache import CacheStep
from model.config import ModelConfig
from model.indexer import IndexArithmetic, Indexer, IndexerHeads
from model.key_selection import KeySelection
from model.norm import RMSNorm
from model.packing import Batch
from model.rope import RotaryAngles, softmax_scale

IndexerLoss = Literal["dense", "sparse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeSequences:
    """How one forward over whole sequences attends; the same for every layer."""

    angles: RotaryAngles
    batch: Batch
    indexer_loss: IndexerLoss | None
    always_index: bool
    index_arithmetic: IndexArithmetic = "plain"  # of what is selected; the indexer is trained in the plain one
    selection: KeySelection = field(default_factory=KeySelection)

    def selects(self, index_topk: int) -> bool:
        """Whether attention leaves out keys."""
        return self.batch.longest > index_topk and self.indexer_loss != "dense"

    def chooses(self, index_topk: int) -> bool:
        """Whether the indexer says which: not where all keys are given, unless its own loss looks at the scores."""
        return self.selects(index_topk) and not (self.selection.spares_choice and self.indexer_loss is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedTokens:
    """How one forward against a cache attends; the same for every layer."""

    angles: RotaryAngles
    step: CacheStep
    selection: KeySelection


class _Streams(NamedTuple):
    """One layer's tokens on their way into attention, each [B, T, ...]; rope parts already rotated."""

    hidden: torch.Tensor  # [.., hidden_size], normed
    query_latent: torch.Tensor  # [.., q_lora_rank], normed
    query_nope: torch.Tensor  # [.., H, qk_nope_head_dim]
    query_rope: torch.Tensor  # [.., H, qk_rope_head_dim]
    latent: torch.Tensor  # [.., kv_lora_rank], normed
    rope_key: torch.Tensor  # [.., qk_rope_head_dim], shared by the heads


class Attention(nn.Module):
    """MLA with its indexer; one layer's."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads = config.num_attention_heads
        self.layer = layer
        self.num_heads = heads
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim, self.latent_dim = config.v_head_dim, config.kv_lora_rank
        self.index_topk = config.index_topk
        self.scale = softmax_scale(config)
        bias = config.attention_bias
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.latent_dim + self.rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent_dim)
        self.kv_b_proj = nn.Linear(self.latent_dim, heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.value_dim, config.hidden_size, bias=bias)
        self.indexer = Indexer(config)

    def forward(
        self, hidden: torch.Tensor, how: WholeSequences | CachedTokens
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden [B, T, hidden_size], normed. Returns the same shape, and the indexer's loss where it was asked for."""
        streams = self._project(hidden, how.angles)
        if isinstance(how, CachedTokens):
            heads, loss = self._cached(streams, how), None
        elif how.batch.packed:
            heads, loss = self._packed(streams, how)
        else:
            heads, loss = self._grouped(streams, how)
        return self.o_proj(heads.flatten(-2)), loss

    def _project(self, hidden: torch.Tensor, angles: RotaryAngles) -> _Streams:
        query_latent = self.q_a_layernorm(self.q_a_proj(hidden))
        queries = self.q_b_proj(query_latent).unflatten(-1, (self.num_heads, -1))
        query_nope, query_rope = queries.split([self.nope_dim, self.rope_dim], dim=-1)
        latent, rope_key = self.kv_a_proj_with_mqa(hidden).split([self.latent_dim, self.rope_dim], dim=-1)
        return _Streams(
            hidden=hidden,
            query_latent=query_latent,
            query_nope=query_nope,
            query_rope=angles.rotate_interleaved(query_rope),
            latent=self.kv_a_layernorm(latent),
            rope_key=angles.rotate_interleaved(rope_key.unsqueeze(2)).squeeze(2),
        )

    def _expand(self, streams: _Streams) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of every head, [B, T, H, ...]."""
        keys_values = self.kv_b_proj(streams.latent).unflatten(-1, (self.num_heads, -1))
        key_nope, values = keys_values.split([self.nope_dim, self.value_dim], dim=-1)
        shared = streams.rope_key.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        queries = torch.cat([streams.query_nope, streams.query_rope], dim=-1)
        return queries, torch.cat([key_nope, shared], dim=-1), values

    def _absorb(self, streams: _Streams, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, T, H, D] and keys [B, T, D] in the latent space, and what takes values there to heads [H, v, R].

        weight is kv_b_proj's.
        """
        to_key, to_value = weight.unflatten(0, (self.num_heads, -1)).split([self.nope_dim, self.value_dim], dim=1)
        carried = torch.einsum("bqhn,hnr->bqhr", streams.query_nope, to_key)
        queries = torch.cat([carried, streams.query_rope], dim=-1)
        return queries, torch.cat([streams.latent, streams.rope_key], dim=-1), to_value

    def _index(
        self, streams: _Streams, how: WholeSequences, arithmetic: IndexArithmetic = "plain"
    ) -> IndexerHeads | None:
        """The indexer's heads, None where neither a selection nor its loss needs them."""
        if how.indexer_loss is None and not how.chooses(self.index_topk) and not how.always_index:
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and how.indexer_loss is not None and arithmetic == "plain"):
            return self.indexer(streams.hidden.detach(), streams.query_latent.detach(), how.angles, arithmetic)

    def _packed(self, streams: _Streams, how: WholeSequences) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All sequences as one row, in the form that is fastest for the longest: what `_grouped` returns."""
        batch = how.batch
        selects = how.selects(self.index_topk)
        form = self._form(batch) if selects else AttentionForm.DENSE
        if form is AttentionForm.SPARSE:
            # The projection of every unit vector is its weight; called as a module, so that ZeRO-3 gathers it as ever.
            units = torch.eye(self.latent_dim, dtype=streams.latent.dtype, device=streams.latent.device)
            queries, keys, to_value = self._absorb(streams, self.kv_b_proj(units).t())
            queries, keys = queries.flatten(0, 1), keys.flatten(0, 1)
        else:
            queries, keys, values = (stream.flatten(0, 1) for stream in self._expand(streams))
        chooses = _flat(self._index(streams, how, how.index_arithmetic))
        learns = how.indexer_loss is not None and how.index_arithmetic != "plain"
        index = _flat(self._index(streams, how)) if learns else chooses
        selected = self._selected(chooses, how) if selects else None
        if form is AttentionForm.SPARSE:
            assert selected is not None
            latents, _ = kernels.packed_sparse_attention(queries, keys, selected, self.scale, self.latent_dim)
            heads = torch.einsum("nhr,hvr->nhv", latents, to_value)
            keys = keys.unsqueeze(1).expand(-1, self.num_heads, -1)
        elif selected is None:
            heads = kernels.dense_attention(queries, keys, values, batch.cu_seqlens, self.scale, batch.longest)
        else:
            places = torch.where(selected >= 0, selected - batch.starts.unsqueeze(1), -1)
            bitmask = kernels.selection_bitmask(places, batch.longest)
            heads, _ = kernels.packed_attention(queries, keys, values, batch.cu_seqlens, self.scale, bitmask)
        loss = None
        if how.indexer_loss is not None and index is not None:
            scored, spans = (index.queries, index.keys, index.weights), (batch.starts, batch.ends)
            loss = kernels.packed_indexer_loss(
                *scored, queries, keys, *spans, self.scale, selected, longest=batch.longest
            )
        return heads.unflatten(0, streams.latent.shape[:2]), loss

    def _selected(self, index: IndexerHeads | None, how: WholeSequences) -> torch.Tensor:
        """Which keys of the packed row each query attends to, int32 [N, index_topk] padded with -1."""
        batch, chosen = how.batch, None
        if index is not None and how.chooses(self.index_topk):
            detached = index.queries.detach(), index.keys.detach(), index.weights.detach()
            spans = batch.starts, batch.ends
            chosen = kernels.select_keys(*detached, *spans, self.index_topk, index.key_scales, longest=batch.longest)
        return how.selection.settle(self.layer, chosen, batch, self.index_topk)

    def _form(self, batch: Batch) -> AttentionForm:
        return attention_form(
            batch.longest,
            self.index_topk,
            expanded_dim=self.nope_dim + self.rope_dim + self.value_dim,
            latent_dim=self.latent_dim + self.rope_dim,
            value_latent_dim=self.latent_dim,
            training=torch.is_grad_enabled(),
        )

    def _grouped(self, streams: _Streams, how: WholeSequences) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Padded groups under boolean masks: attention heads [B, T, H, value_dim] and the indexer's loss."""
        queries, keys, values = self._expand(streams)
        index = self._index(streams, how)
        heads, losses = [], []
        for number, group in enumerate(how.batch.groups):
            q, k, v = group.take(queries), group.take(keys), group.take(values)
            mask, loss = self._select(index, q, k, how, number)
            heads.append(kernels.masked_attention(q, k, v, mask, self.scale))
            losses.append(loss)
        return how.batch.join(heads), None if how.indexer_loss is None else how.batch.join(losses).sum()

    def _select(
        self, index: IndexerHeads | None, queries: torch.Tensor, keys: torch.Tensor, how: WholeSequences, number: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which keys each query of group `number` attends to, bool [S or 1, T, T], and the indexer's loss, [S, T]."""
        group, learns = how.batch.groups[number], how.indexer_loss is not None
        mask, scores, chosen = group.causal, None, None
        outgrown = group.num_tokens > self.index_topk and how.selects(self.index_topk)
        if index is not None and (learns or (outgrown and how.chooses(self.index_topk))):
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                scores = kernels.indexer_scores(*(group.take(stream) for stream in index[:3]), visible=mask)
        if outgrown:
            if scores is not None:
                chosen = kernels.topk_mask(scores.detach(), self.index_topk)
            mask = how.selection.settle_mask(self.layer, chosen, group, how.batch, number)
        if scores is None or not learns:
            return mask, None
        target = kernels.mean_attention(queries.detach(), keys.detach(), mask, self.scale)
        return mask, kernels.indexer_kl(scores, target, mask)

    def _cached(self, streams: _Streams, how: CachedTokens) -> torch.Tensor:
        """MQA form against the cache: attention heads [B, Q, H, value_dim]."""
        step = how.step
        queries, keys, to_value = self._absorb(streams, self.kv_b_proj.weight)
        entries = step.extend_latents(self.layer, keys)
        selected = self._select_cached(streams, how)
        if selected is None:
            heads = kernels.latent_attention(queries, entries, step.visible, self.scale, self.latent_dim)
        else:
            heads = kernels.sparse_attention(queries, entries, selected, self.scale, self.latent_dim)
        return torch.einsum("bqhr,hvr->bqhv", heads, to_value)

    def _select_cached(self, streams: _Streams, how: CachedTokens) -> torch.Tensor | None:
        """Which cached keys each query attends to, int64 [B, Q, index_topk] padded with -1; None for all it can see."""
        step = how.step
        if not step.keeps_index_keys:
            return None
        index = self.indexer(streams.hidden, streams.query_latent, how.angles)
        index_keys = step.extend_index_keys(self.layer, index.keys)
        if step.window <= self.index_topk:
            return None
        scores = kernels.indexer_scores(index.queries, index_keys, index.weights, step.visible)
        selected = kernels.topk_indices(scores, self.index_topk)
        how.selection.keep(self.layer, selected)
        return selected


def _flat(index: IndexerHeads | None) -> IndexerHeads | None:
    """The heads of all sequences as one row, [N, ...]."""
    if index is None:
        return None
    scales = index.key_scales
    return IndexerHeads(
        queries=index.queries.flatten(0, 1),
        keys=index.keys.flatten(0, 1),
        weights=index.weights.flatten(0, 1),
        key_scales=None if scales is None else scales.flatten(0, 1),
    )
