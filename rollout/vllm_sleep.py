"""What a sleep takes from a vLLM worker beside weights and caches, and how the worker gets it back.

A sleep that keeps no weights gives up all memory that was allocated while the model was loaded. An update brings its
own tensors again and vLLM the registered buffers, but nobody what lies there besides: in vLLM 0.32.0
`FlashAttnMLASparseImpl.cu_seqlens_q_buffer`, without which attention writes no row of its output, and the states of
sampling. So whatever no update writes waits in host memory, be it a parameter that vLLM has and the learner has not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch

_WEIGHTS = "weights"  # vLLM's tag of what is allocated while the model is loaded

Span = tuple[int, int]
"""Addresses from the first on, up to but without the second."""


class Allocation(Protocol):
    """`vllm.device_allocator.AllocationData`."""

    handle: tuple[int, int, int, Any]  # the second is its size in bytes
    tag: str
    cpu_backup_tensor: torch.Tensor | None  # what vLLM itself kept of it
    is_asleep: bool


class Cudart(Protocol):
    """What is used of `vllm.distributed.device_communicators.cuda_wrapper.CudaRTLibrary`."""

    def cudaMemcpy(self, dst: Any, src: Any, count: int) -> None: ...
    def cudaMemset(self, devPtr: Any, value: int, count: int) -> None: ...


class SleepingMemory:
    """Of a worker, whose ``allocations`` vLLM lists by address (`CuMemAllocator.pointer_to_data`)."""

    def __init__(self, allocations: Mapping[int, Allocation], cudart: Cudart) -> None:
        self._allocations = allocations
        self._cudart = cudart
        self._kept: list[tuple[int, int, torch.Tensor]] = []  # (address of the allocation, address, content)

    def keep(self, brought: Iterable[torch.Tensor]) -> int:
        """Before a sleep that keeps no weights: copies what lies among those that an update will bring, the storages of
        ``brought``, and is none; returns its bytes."""
        weights = {at: data for at, data in self._allocations.items() if data.tag == _WEIGHTS and not data.is_asleep}
        storages = [tensor.untyped_storage() for tensor in brought]
        taken = sorted({(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages})
        self._kept = []
        for base, data in sorted(weights.items()):
            for start, end in gaps((base, base + data.handle[1]), taken):
                content = torch.empty(end - start, dtype=torch.uint8)
                self._cudart.cudaMemcpy(content.data_ptr(), start, end - start)
                self._kept.append((base, start, content))
        return sum(content.numel() for _, _, content in self._kept)

    def wake(self, resume: Callable[[], None]) -> None:
        """Lets vLLM ``resume``, zeroes what it had given up for good, and puts back what was kept.

        Fresh memory holds what its last user wrote there, which may read as NaN, and some of it is read: pages that
        pad block tables, rows that pad a captured step. At a start the driver hands it out zeroed.
        """
        lost = [
            (at, data) for at, data in self._allocations.items() if data.is_asleep and data.cpu_backup_tensor is None
        ]
        resume()
        for at, data in lost:
            if self._allocations.get(at) is data and not data.is_asleep:
                self._cudart.cudaMemset(at, 0, data.handle[1])
        waiting = []
        for base, start, content in self._kept:
            data = self._allocations.get(base)
            if data is not None and data.is_asleep:
                waiting.append((base, start, content))
            elif data is not None:
                self._cudart.cudaMemcpy(start, content.data_ptr(), content.numel())
        self._kept = waiting


def gaps(whole: Span, taken: Iterable[Span]) -> list[Span]:
    """The parts of ``whole`` that are in none of ``taken``, in their order."""
    start, end = whole
    found = []
    for low, high in sorted(taken):
        if low >= end:
            break
        if low > start:
            found.append((start, low))
        start = max(start, high)
    if start < end:
        found.append((start, end))
    return found
