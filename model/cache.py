"""The latent cache: what a token leaves behind for later queries, in fixed slots of fixed length.

A layer keeps one row a position, [normed latent | rotated rope key], and, where sequences can outgrow index_topk, the
indexer's key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.config import ModelConfig


class LatentCache:
    """`num_slots` sequences of at most `max_len` tokens each.

    latents: [layers, num_slots, max_len + 1, kv_lora_rank + qk_rope_head_dim]; index_keys likewise with
    index_head_dim, or None when max_len <= index_topk, so that nothing is ever selected. The last row of every slot
    takes the writes of padding and is never read. A slot needs no clearing before reuse: only positions that
    the new sequence has written are visible to it.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        rows = (config.num_hidden_layers, num_slots, max_len + 1)
        self.num_slots = num_slots
        self.max_len = max_len
        self.latents = torch.zeros(*rows, config.kv_lora_rank + config.qk_rope_head_dim, dtype=dtype, device=device)
        self.index_keys = None
        if max_len > config.index_topk:
            self.index_keys = torch.zeros(*rows, config.index_head_dim, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheView:
    """The sequences of a batch within a cache, for one call of `DeepseekV32.backbone`."""

    cache: LatentCache
    slots: torch.Tensor  # int64 [B], distinct
    lengths: torch.Tensor  # int64 [B], tokens each slot holds once this call has written its own


class CacheStep:
    """One call's writes and reads, worked out once and used by every layer.

    positions: int [B, Q], -1 for padding. Query positions see the entries at positions up to their own.
    Raises ValueError for positions beyond `view.lengths` or lengths beyond the cache.
    """

    __slots__ = ("_cache", "_rows", "_slots", "visible", "window")

    def __init__(self, view: CacheView, positions: torch.Tensor) -> None:
        cache, slots = view.cache, view.slots
        self.window = int(view.lengths.max())
        if self.window > cache.max_len:
            raise ValueError(f"a sequence of {self.window} tokens does not fit a cache of {cache.max_len} a slot")
        if bool((positions >= view.lengths.unsqueeze(1)).any()):
            raise ValueError("cache lengths must count the tokens that this call writes")
        self._cache = cache
        stored = torch.where(positions < 0, cache.max_len, positions)
        self._rows = (slots.unsqueeze(1) * (cache.max_len + 1) + stored).flatten()
        whole = slots.shape[0] == cache.num_slots and torch.equal(slots, torch.arange(len(slots), device=slots.device))
        self._slots = None if whole else slots
        # A padding query sees entry 0, which keeps its (ignored) output finite.
        columns = torch.arange(self.window, device=positions.device)
        self.visible = columns <= positions.clamp(min=0).unsqueeze(-1)

    def extend_latents(self, layer: int, entries: torch.Tensor) -> torch.Tensor:
        """Writes entries [B, Q, dim] and returns all of the window, [B, window, dim]."""
        return self._extend(self._cache.latents[layer], entries)

    def extend_index_keys(self, layer: int, entries: torch.Tensor) -> torch.Tensor:
        """As `extend_latents`, for the indexer's keys."""
        assert self._cache.index_keys is not None
        return self._extend(self._cache.index_keys[layer], entries)

    @property
    def keeps_index_keys(self) -> bool:
        return self._cache.index_keys is not None

    def _extend(self, store: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        store.view(-1, store.shape[-1]).index_copy_(0, self._rows, entries.flatten(0, 1).to(store.dtype))
        return store[:, : self.window] if self._slots is None else store[self._slots, : self.window]
