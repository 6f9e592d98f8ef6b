"""What a learner rank exports of its GPU memory, with the export itself and the GPU's name replaced."""

import ctypes
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer import sender as module
from trainer.sender import Offer, WeightSender

ROOM = (ctypes.c_uint8 * (1 << 14))()


def in_one_place(size: int, **options: Any) -> torch.Tensor:
    """`torch.empty`, but all buffers have the same address: as when one is freed before the next is made."""
    return torch.frombuffer(ROOM, dtype=torch.uint8, count=size) if size else torch.tensor([], dtype=torch.uint8)


def test_an_address_that_comes_back_is_exported_anew(monkeypatch: pytest.MonkeyPatch):
    """A handle opens the memory it was made for, which is gone when a buffer has been outgrown."""
    exports = itertools.count()
    monkeypatch.setattr(module, "reduce_tensor", lambda whole: (None, next(exports)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="gpu"))
    monkeypatch.setattr("model.transport.torch.empty", in_one_place)
    sender = WeightSender(rank=0, device=torch.device("cpu"))

    def handles(*sizes: int) -> list[str]:
        found = []
        offer = sender.offer(iter([{f"weight {n}": torch.zeros(s, dtype=torch.uint8)} for n, s in enumerate(sizes)]))
        while isinstance(offer, Offer):
            found.append(offer.handles["gpu"])
            offer = sender.offer(None)
        return found

    first = handles(5000, 3000, 9000)  # the third outgrows the buffer of the first
    assert len(set(first)) == 3
    second = handles(5000, 5000, 5000)  # the first outgrows the buffer of 3000, and is as large as the very first
    assert second[0] not in first and second == [second[0], first[2], second[0]]
    assert handles(5000, 5000) == [first[2], second[0]]
    assert next(exports) == 4
