"""What a token leaves behind for later queries, in fixed slots of fixed length, one row a position and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.config import ModelConfig


class SlotCache:
    """`num_slots` sequences of at most `max_len` tokens each.

    stores: tensors [layers, num_slots, max_len + 1, ...]. The last row of every slot takes the writes of padding and is
    never read. A slot needs no clearing before reuse: only positions that the new sequence has written are visible to
    it.
    """

    def __init__(self, num_slots: int, max_len: int, stores: Sequence[torch.Tensor]) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self.stores = tuple(stores)

    def copy(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        """Gives the slots `targets` what slot `source` holds of its first `num_tokens` positions."""
        slots = list(targets)
        for store in self.stores:
            store[:, slots, :num_tokens] = store[:, source, :num_tokens].unsqueeze(1)


class LatentCache(SlotCache):
    """MLA's rows, [normed latent | rotated rope key], and the indexer's keys where sequences can outgrow index_topk.

    latents: [layers, num_slots, max_len + 1, kv_lora_rank + qk_rope_head_dim]; index_keys likewise with
    index_head_dim, or None when max_len <= index_topk, so that nothing is ever selected.
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
        self.latents = torch.zeros(*rows, config.kv_lora_rank + config.qk_rope_head_dim, dtype=dtype, device=device)
        self.index_keys = None
        if max_len > config.index_topk:
            self.index_keys = torch.zeros(*rows, config.index_head_dim, dtype=dtype, device=device)
        stores = [self.latents] if self.index_keys is None else [self.latents, self.index_keys]
        super().__init__(num_slots, max_len, stores)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheView:
    """The sequences of a batch within a cache, for one call of `LanguageModel.backbone`."""

    cache: SlotCache
    slots: torch.Tensor  # int64 [B], distinct
    lengths: torch.Tensor  # int64 [B], tokens each slot holds once this call has written its own


class CacheStep:
    """One call's writes and reads, worked out once and used by every layer.

    positions: int [B, Q], -1 for padding. Query positions see the entries at positions up to their own.
    Raises ValueError for positions beyond `view.lengths` or lengths beyond the cache.
    """

    __slots__ = ("_positions", "_rows", "_slots", "cache", "visible", "window")

    def __init__(self, view: CacheView, positions: torch.Tensor) -> None:
        cache, slots = view.cache, view.slots
        self.window = int(view.lengths.max())
        if self.window > cache.max_len:
            raise ValueError(f"a sequence of {self.window} tokens does not fit a cache of {cache.max_len} a slot")
        if bool((positions >= view.lengths.unsqueeze(1)).any()):
            raise ValueError("cache lengths must count the tokens that this call writes")
        self.cache = cache
        stored = torch.where(positions < 0, cache.max_len, positions)
        self._rows = (slots.unsqueeze(1) * (cache.max_len + 1) + stored).flatten()
        whole = slots.shape[0] == cache.num_slots and torch.equal(slots, torch.arange(len(slots), device=slots.device))
        self._slots = None if whole else slots
        # A padding query sees entry 0, which keeps its (ignored) output finite.
        columns = torch.arange(self.window, device=positions.device)
        self._positions = positions.clamp(min=0).unsqueeze(-1)
        self.visible = columns <= self._positions  # bool [B, Q, window]

    def beyond(self, width: int) -> torch.Tensor:
        """bool [B, Q, window]: the entries `width` or more positions before the query."""
        columns = torch.arange(self.window, device=self._positions.device)
        return columns <= self._positions - width

    def extend_latents(self, layer: int, entries: torch.Tensor) -> torch.Tensor:
        """Writes entries [B, Q, dim] and returns all of the window, [B, window, dim]."""
        assert isinstance(self.cache, LatentCache)
        return self.extend(self.cache.latents[layer], entries)

    def extend_index_keys(self, layer: int, entries: torch.Tensor) -> torch.Tensor:
        """As `extend_latents`, for the indexer's keys."""
        assert isinstance(self.cache, LatentCache) and self.cache.index_keys is not None
        return self.extend(self.cache.index_keys[layer], entries)

    @property
    def keeps_index_keys(self) -> bool:
        return isinstance(self.cache, LatentCache) and self.cache.index_keys is not None

    def extend(self, store: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Writes entries [B, Q, ...] into a layer's store, [num_slots, max_len + 1, ...]; returns [B, window, ...]."""
        store.flatten(0, 1).index_copy_(0, self._rows, entries.flatten(0, 1).to(store.dtype))
        return store[:, : self.window] if self._slots is None else store[self._slots, : self.window]
