"""Room in vLLM's cache for the next tokens of sequences, most of which have it in their last block.

vLLM goes through five methods of its cache's parts for every token, to find that nothing is to be allocated, freed or
cached: a third of the time that a step of hundreds of sequences takes its scheduler, which a small model waits for.

Importing this module needs vLLM.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import RequestStatus


class QuickSlots:
    """In the place of two methods of a KVCacheManager, which it asks wherever there is something to do."""

    def __init__(self, manager: Any) -> None:
        self._empty = manager.empty_kv_cache_blocks
        self._parts = manager.coordinator.single_type_managers
        self._block = self._parts[0].block_size
        self._allocate, self._cache = manager.allocate_slots, manager.cache_blocks
        self.num_spared = 0
        """Allocations that did not have to be asked for."""

    @classmethod
    def installed(cls, manager: Any) -> QuickSlots | None:
        """None where a cache has more to do than to keep all tokens of a sequence, in blocks of one size."""
        coordinator = manager.coordinator
        parts, block = coordinator.single_type_managers, manager.block_pool.hash_block_size
        plain = all(type(part) is FullAttentionManager and part.block_size == block for part in parts)
        if not (parts and plain and manager.enable_caching and coordinator.num_reprefillable_tokens == 0):
            return None
        quick = cls(manager)
        manager.allocate_slots, manager.cache_blocks = quick.allocate_slots, quick.cache_blocks
        return quick

    def allocate_slots(
        self, request: Any, num_new_tokens: int, *others: Any, num_lookahead_tokens: int = 0, **more: Any
    ) -> Any:
        """Asks vLLM unless, in every part of its cache, each of its steps has nothing to do.

        remove_skipped_blocks: all tokens are attended to. get_num_blocks_to_allocate and allocate_new_blocks: there is
        room (vLLM never asks for more than max_model_len, so it may find some where this does not), and no block that
        is shared in part has to be replaced by a copy. cache_blocks: no block became whole.
        """
        if others or more or num_lookahead_tokens or num_new_tokens < 1 or request.status is not RequestStatus.RUNNING:
            return self._allocate(request, num_new_tokens, *others, num_lookahead_tokens=num_lookahead_tokens, **more)
        name, end = request.request_id, request.num_computed_tokens + num_new_tokens
        num_whole = min(end, request.num_tokens) // self._block
        for part in self._parts:
            has_room = len(part.req_to_blocks.get(name, ())) * self._block >= end
            is_cached = part.num_cached_block.get(name, 0) >= num_whole
            if not (has_room and is_cached and name not in part._partial_hit_reqs):
                return self._allocate(request, num_new_tokens)
        self.num_spared += 1
        return self._empty

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        num_whole = num_computed_tokens // self._block
        for part in self._parts:
            if part.num_cached_block.get(request.request_id, 0) < num_whole:
                return self._cache(request, num_computed_tokens)
        return None
