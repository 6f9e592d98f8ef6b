"""Attention for transformers' modules: whole sequences packed in a row, or queries against a cache of slots.

transformers lets an attention function be registered by name; a module of any family that looks its function up there
then calls ours with rotated queries and keys, and hands through what `backbone` was called with. Nothing else of a
family's code is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from model.cache import CacheStep, SlotCache
from model.packing import Batch, SequenceGroup

NAME = "keel"
"""Under which the function is registered with transformers."""

KEYWORD = "keel_attention"
"""The keyword argument in which a forward hands its `PackedRows`, `CachedRows` or `Trial` down to every layer."""

_HARMLESS = {"dropout", "position_ids", "use_cache", "output_attentions", "is_causal", "output_router_logits"}
"""Arguments of attention functions that change nothing here; dropout is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Whole sequences; the same for every layer of a forward."""

    batch: Batch
    cu_seqlens: torch.Tensor | None  # int32 [S + 1] where one kernel serves sequences of different lengths

    @classmethod
    def of(cls, batch: Batch, cu_seqlens: torch.Tensor | None, dtype: torch.dtype) -> PackedRows:
        """Of activations in `dtype`. The kernel exists for GPUs and half precision."""
        flash = cu_seqlens is not None and cu_seqlens.device.type == "cuda" and dtype != torch.float32
        return cls(batch=batch, cu_seqlens=cu_seqlens.to(torch.int32) if cu_seqlens is not None and flash else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedRows:
    """Queries against their slots; the same for every layer of a forward."""

    step: CacheStep
    cache: KeyValueCache


class KeyValueCache(SlotCache):
    """Rotated keys and values: stores [layers, num_slots, max_len + 1, heads, dim], in this order."""

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        *,
        num_layers: int,
        keys: tuple[int, int],
        values: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """keys and values: (heads, dim) of a layer."""
        rows = (num_layers, num_slots, max_len + 1)
        self.keys = torch.zeros(*rows, *keys, dtype=dtype, device=device)
        self.values = torch.zeros(*rows, *values, dtype=dtype, device=device)
        super().__init__(num_slots, max_len, (self.keys, self.values))


class Trial:
    """Stands where rows would, in a forward on the meta device: notes every layer's keys and values."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.windows: list[int | None] = []
        self.shapes: set[tuple[tuple[int, int], tuple[int, int]]] = set()

    def note(self, layer: int, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> None:
        self.layers.append(layer)
        self.windows.append(window)
        self.shapes.add(((keys.shape[2], keys.shape[3]), (values.shape[2], values.shape[3])))


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [B, H, T, d], key and value [B, K, T, d] with K dividing H.

    Causal; with `sliding_window` w a query sees itself and the w - 1 positions before it. Returns [B, T, H, v]. Raises
    ValueError for what an architecture asks beyond that.
    """
    rows = arguments.pop(KEYWORD, None)
    if rows is None:
        raise ValueError(f"attention {NAME!r} runs under LanguageModel.backbone only")
    _refuse(module, arguments, attention_mask)
    queries, keys, values = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(rows, Trial):
        rows.note(module.layer_idx, keys, values, sliding_window)
        return queries.new_empty(*queries.shape[:3], values.shape[-1]), None
    if isinstance(rows, CachedRows):
        return _cached(rows, module.layer_idx, queries, keys, values, scale, sliding_window), None
    if rows.cu_seqlens is not None:
        return _flash(rows, queries, keys, values, scale, sliding_window), None
    heads = [
        _padded(group, group.take(queries), group.take(keys), group.take(values), scale, sliding_window)
        for group in rows.batch.groups
    ]
    return rows.batch.join(heads), None


def _refuse(module: Any, arguments: dict[str, Any], attention_mask: torch.Tensor | None) -> None:
    asked = [name for name, value in arguments.items() if name not in _HARMLESS and value is not None]
    if attention_mask is not None:
        asked.append("attention_mask")
    if arguments.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        asked.append("later tokens")
    if asked:
        raise ValueError(f"its attention asks for {', '.join(sorted(asked))}, which Keel's does not have")


def _padded(
    group: SequenceGroup,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """[S, T, H, v] of sequences of similar length; torch picks the kernel."""
    mask = None
    if window is not None and window < group.num_tokens:
        mask = group.causal & ~group.causal.tril(-window)
    heads = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return heads.transpose(1, 2)


def _flash(
    rows: PackedRows,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """[1, N, H, v] of a packed row, by torch's flash attention for sequences of different lengths."""
    assert rows.cu_seqlens is not None
    missing = queries.shape[-1] - values.shape[-1]  # the kernel wants one head dimension; MLA's values have fewer
    heads = varlen_attn(
        queries[0],
        keys[0],
        F.pad(values[0], (0, missing)) if missing else values[0],
        rows.cu_seqlens,
        rows.cu_seqlens,
        rows.batch.longest,
        rows.batch.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    assert isinstance(heads, torch.Tensor)
    return heads[None, ..., : values.shape[-1]]


def _cached(
    rows: CachedRows,
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """[B, Q, H, v] against the slots, which get the new keys and values first."""
    step = rows.step
    keys = step.extend(rows.cache.keys[layer], keys)
    values = step.extend(rows.cache.values[layer], values)
    visible = step.visible if window is None else step.visible & ~step.beyond(window)
    # Query heads that share a key head are rows of one product: [B, K, G * Q, d] x [B, K, d, W].
    num_queries, num_keys = queries.shape[1], keys.shape[2]
    shared = queries.unflatten(2, (num_keys, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = torch.matmul(shared * scale, keys.permute(0, 2, 3, 1)).float().unflatten(2, (-1, num_queries))
    probs = scores.masked_fill(~visible[:, None, None], torch.finfo(torch.float32).min).softmax(dim=-1)
    heads = torch.matmul(probs.to(values.dtype).flatten(2, 3), values.transpose(1, 2))
    return heads.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def transformers_packing(batch: Batch, cu_seqlens: torch.Tensor | None) -> dict[str, Any]:
    """The keyword arguments by which transformers' own flash attention is told of packed sequences.

    Its other functions read them off positions that start again at 0.
    """
    if cu_seqlens is None:
        return {}
    bounds = cu_seqlens.to(torch.int32)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": batch.longest,
        "max_length_k": batch.longest,
    }


AttentionInterface.register(NAME, attend)
