"""What a learner rank exports of its GPU memory, with the export itself and the GPU's name replaced."""

import ctypes
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model import checksums
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


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("lie_whole", [True, False])
def test_what_was_offered_has_the_sums_of_all_tensors(monkeypatch: pytest.MonkeyPatch, rank: int, lie_whole: bool):
    monkeypatch.setattr(module, "reduce_tensor", lambda whole: (None, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="gpu"))
    weights = {f"weight {n}": torch.randn(8, n, generator=torch.Generator().manual_seed(n)) for n in range(1, 8)}
    sender = WeightSender(rank=rank, device=torch.device("cpu"))

    def buckets() -> Iterator[dict[str, torch.Tensor]]:
        for name, tensor in weights.items():
            whole = tensor.clone()
            yield {name: whole}
            whole.zero_()  # its turn is over

    for _ in range(2):  # another update begins anew
        offer = sender.offer(buckets(), lambda: weights if lie_whole else None)
        while isinstance(offer, Offer):
            offer = sender.offer(None, lambda: weights if lie_whole else None)
        assert offer.checksums == (checksums(weights.items()) if rank == 0 else {})
        assert offer.num_bytes == sum(tensor.nbytes for tensor in weights.values())
