"""What vLLM's workers can do beyond vLLM: say which weights they hold. Mixed into its worker class by name.

Importing this module needs vLLM; it also makes our transfer known to the worker's process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch

from rollout import vllm_recording
from rollout.vllm_layout import Shapes, absorbed, held_parts, held_sums
from rollout.vllm_sleep import SleepingMemory
from rollout.vllm_transfer import KeelTransfer

_GB = 1e9

vllm_recording.install()


class WeightReader:
    """``worker_extension_cls`` of the engines; its methods are called with ``collective_rpc`` and return plain data."""

    model_runner: Any
    weight_transfer_engine: KeelTransfer
    parallel_config: Any
    rank: int
    wake_up: Callable[[list[str]], None]  # this and the next are those of vLLM's worker
    sleep_mode_backend: Any

    @torch.inference_mode()
    def held_weights(self) -> tuple[dict[str, tuple[tuple[int, ...], str]], list[list[Any]]]:
        """The tensors that the last update brought, {name: (shape, dtype)}, and what this worker now runs of them, as
        `Held.plain` puts it.

        Of kv_b_proj nothing is held when the matrices that decoding uses in its place were not made of it.
        """
        tensors = self.weight_transfer_engine.receiver.tensors
        held = held_sums(self._live_tensors(), tensors, rank=self.rank, size=self.parallel_config.world_size)
        broken = {
            f"{name}.kv_b_proj.weight"
            for name, module in self.model_runner.get_model().named_modules()
            if isinstance(getattr(module, "W_UK_T", None), torch.Tensor)
            and not absorbed(module.kv_b_proj.weight, module.W_UK_T, module.W_UV)
        }
        return tensors, [part.plain() for part in held if part.name not in broken]

    def keep_beside_update(self, shapes: Shapes) -> int:
        """Before a sleep that keeps no weights: what lies in their memory and is not of an update of tensors of these
        ``shapes`` goes to host memory; its bytes."""
        torch.cuda.synchronize()
        parts = held_parts(self._live_tensors(), shapes, rank=self.rank, size=self.parallel_config.world_size)
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

    def _live_tensors(self) -> dict[str, torch.Tensor]:
        model = self.model_runner.get_model()
        # With duplicates: a module that two others hold has a name in each.
        return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())

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
