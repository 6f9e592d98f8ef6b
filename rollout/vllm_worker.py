"""What vLLM's workers can do beyond vLLM: say which weights they hold. Mixed into its worker class by name.

Importing this module needs vLLM; it also makes our transfer known to the worker's process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import cached_property, partial
from typing import Any

import torch
from vllm.distributed.device_communicators import flashinfer_all_reduce as sums  # pyright: ignore[reportMissingImports]

from rollout import vllm_step
from rollout.held_weights import live_tensors
from rollout.vllm_layout import Shapes, held_parts
from rollout.vllm_sleep import SleepingMemory
from rollout.vllm_transfer import KeelTransfer

_GB = 1e9

vllm_step.install()
if os.environ.get("NCCL_NVLS_ENABLE") == "0":
    # FlashInfer's workspaces, for sums that are fused with norms, are multicast; the kind that is not takes minutes to
    # compile at an engine's first start. To vLLM it looks as if there could be none, and it sums up in the usual way.
    sums._fi_ar_workspace_failed = sums._fi_ar_quant_workspace_failed = True


class WeightReader:
    """``worker_extension_cls`` of the engines; its methods are called with ``collective_rpc`` and return plain data."""

    model_runner: Any
    weight_transfer_engine: KeelTransfer
    parallel_config: Any
    rank: int
    start_weight_update: Callable[[], None]  # this and the next ones are those of vLLM's worker
    update_weights: Callable[[dict[str, Any]], None]
    finish_weight_update: Callable[[], None]
    wake_up: Callable[[list[str]], None]
    sleep_mode_backend: Any

    def expect_updates(self, shapes: Shapes) -> None:
        """``shapes``: of what an update may bring."""
        self.weight_transfer_engine.shapes = shapes

    def take_broadcast(self, known: Collection[str]) -> Any:
        """A whole update, out of the group; as :meth:`finish_update`."""
        self.start_weight_update()
        self.update_weights({})
        return self.finish_update(known)

    def finish_update(self, known: Collection[str]) -> Any:
        """As vLLM's ``finish_weight_update``; returns what :meth:`held_weights` does."""
        self.finish_weight_update()
        return self.held_weights(known)

    def held_weights(self, known: Collection[str]) -> tuple[Any, ...]:
        """What this worker now runs of the last update's tensors: the fields of a `rollout.held_weights.Answer`."""
        transfer = self.weight_transfer_engine
        held, taken = transfer.updates.taken(transfer.receiver.tensors)
        return held.answer(known, taken).plain()

    def update_way(self) -> str:
        """Why the last update went through vLLM's loader; empty when it was written straight into the parameters."""
        return self.weight_transfer_engine.updates.through_loader

    def keep_beside_update(self, shapes: Shapes) -> int:
        """Before a sleep that keeps no weights: what lies in their memory and is not of an update of tensors of these
        ``shapes`` goes to host memory; its bytes."""
        torch.cuda.synchronize()
        parts = held_parts(
            live_tensors(self.model_runner.get_model()), shapes, rank=self.rank, size=self.parallel_config.world_size
        )
        return self.sleeping_memory.keep(part for _, _, part in parts)

    def wake_with_clean_memory(self, tags: list[str]) -> None:
        """As vLLM's ``wake_up``, but nothing is left in what it takes back that others wrote there."""
        self.sleeping_memory.wake(partial(self.sleep_mode_backend.resume, tags))
        torch.cuda.synchronize()
        self.wake_up(tags)

    @cached_property
    def sleeping_memory(self) -> SleepingMemory:
        from vllm.device_allocator import cumem  # pyright: ignore[reportMissingImports]

        return SleepingMemory(cumem.CuMemAllocator.get_instance().pointer_to_data, cumem.libcudart)

    def peak_memory_gb(self) -> float:
        """The most memory that torch, vLLM's own pools included, has had reserved on this worker's GPU so far."""
        return torch.cuda.max_memory_reserved() / _GB

    def record_selections(self, on: bool) -> None:
        """Begins to keep, or forgets, what every layer selects for the rows of prompts (``rollout.dsa: keel``)."""
        self.model_runner.get_model().step.recorded = {} if on else None

    def recorded_selections(self) -> dict[str, torch.Tensor]:
        """Of every layer, by its name in vLLM: which keys each row selected since recording began, in the order of the
        rows, int32 [R, index_topk]: places in the row's own sequence, ascending, then -1."""
        recorded = self.model_runner.get_model().step.recorded
        return {layer: torch.cat(parts) for layer, parts in recorded.items()}
