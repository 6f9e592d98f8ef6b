"""An engine worker's end of a weight transfer: tensors out of packed buckets.

Knows nothing of vLLM: `rollout.vllm_transfer` plugs it into a worker, and a test into a process of its own.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from model.transport import BroadcastGroup, Bucket

Tensors = Mapping[str, torch.Tensor]
"""By in-memory name: the experts of a layer stacked."""


class WeightReceiver:
    """Buckets arrive over a group (:meth:`receive`), or are read from another process's memory (:meth:`take`)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        """(shape, dtype) of what the update has brought so far, by in-memory name; dtypes by torch's names."""
        self._group: BroadcastGroup | None = None
        self._opened: dict[str, torch.Tensor] = {}  # buffers of other processes, by their handles
        self._standing: tuple[Sequence[Sequence[str]], Tensors] | None = None  # what stays, and the tensors in it

    def join(self, *, host: str, port: int, rank: int, size: int, timeout_s: float) -> None:
        """Enters the group of `model.transport` that rank 0 opened at ``host``, and leaves the one before."""
        if self._group is not None:
            self._group.close()
        self._group = BroadcastGroup.join(host, port, rank=rank, size=size, device=self.device, timeout_s=timeout_s)

    def begin(self) -> None:
        self.tensors = {}

    def receive(self) -> Iterator[Tensors]:
        """All buckets of an update, as the sender broadcasts them."""
        assert self._group is not None, "join() comes first"
        return map(self._noted, self._group.receive())  # which holds no bucket while the next ones come

    def take(self, parts: Sequence[Sequence[str]], *, stays: bool = False, copied: bool = True) -> Tensors:
        """What lies in buffers on this worker's own GPU, which another process offers: buckets with their handles.

        Returns copies, where ``copied``, for whoever keeps them beyond the update of their own bucket: such a buffer is
        used again, unless it ``stays`` until the update has ended; what stays is all that the other process offers, and
        the same tensors when it offers the same again.
        """
        if stays:
            if self._standing is None or self._standing[0] != parts:
                opened, self._standing = self._opened, None
                self._opened = {h: opened[h] if h in opened else open_buffer(h, self.device) for _, h in parts}
                self._standing = parts, self._unpacked(parts, copied=False)
            return self._noted(self._standing[1])
        self._standing = None
        return self._noted(self._unpacked(parts, copied=copied))

    def close(self) -> None:
        self._opened, self._standing = {}, None
        if self._group is not None:
            self._group.close()
            self._group = None

    def _unpacked(self, parts: Sequence[Sequence[str]], *, copied: bool) -> Tensors:
        tensors = {}
        for description, handle in parts:
            bucket = Bucket.from_json(description)
            octets = self._open(handle)[: bucket.num_bytes]
            tensors |= bucket.unpack(octets.clone() if copied else octets)
        return tensors

    def _open(self, handle: str) -> torch.Tensor:
        """The buffer behind a handle, opened once: torch counts one release for every export, not for every use."""
        buffer = self._opened.pop(handle, None)
        if buffer is None:
            # A sender that alternates between two buffers has outgrown the one that it did not offer last.
            while len(self._opened) > 1:
                del self._opened[next(iter(self._opened))]
            buffer = open_buffer(handle, self.device)
        self._opened[handle] = buffer  # in the order of their use
        return buffer

    def _noted(self, tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            self.tensors[name] = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return tensors


def open_buffer(handle: str, device: torch.device) -> torch.Tensor:
    """A buffer that `trainer.sender` exported, as this process sees it."""
    arguments: list[Any] = list(pickle.loads(base64.b64decode(handle)))
    arguments[6] = device.index  # the exporting process may have counted its GPUs differently
    return rebuild_cuda_tensor(*arguments)
