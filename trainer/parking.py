"""Tensors that wait in host memory while somebody else needs the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Parking:
    """Takes tensors off their device and puts them back; the tensor objects stay the same, their storage changes.

    The host's buffers are pinned where there is a GPU, and kept for the next time.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}
        self._parked: list[tuple[Tensor, torch.device]] = []

    def park(self, tensors: Iterable[Tensor]) -> None:
        """Moves the tensors to host memory. Tensors that share a storage must not be among them."""
        assert not self._parked, "parked tensors must come back before others can be parked"
        pinned = torch.cuda.is_available()
        for place, tensor in enumerate(tensors):
            buffer = self._buffers.get(place)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._buffers[place] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
            buffer.copy_(tensor.detach(), non_blocking=True)
            self._parked.append((tensor, tensor.device))
        if pinned:
            torch.cuda.synchronize()
        for place, (tensor, _) in enumerate(self._parked):
            tensor.data = self._buffers[place]

    def unpark(self) -> None:
        """Moves everything back to where it was."""
        for tensor, device in self._parked:
            tensor.data = tensor.data.to(device, non_blocking=True, copy=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._parked = []
