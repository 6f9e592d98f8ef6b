"""What a learner rank exports of its GPU memory, with the export itself and the GPU's name replaced."""

import base64
import ctypes
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model import checksums
from model.checksum import Checksums
from rollout import weight_receiver
from rollout.weight_receiver import WeightReceiver
from trainer import sender as module
from trainer.sender import Exports, Offer, WeightSender

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
            ((_, handle),) = offer.parts["gpu"]
            found.append(handle)
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
        num_offers = 0
        while isinstance(offer, Offer):
            num_offers += 1
            assert offer.stays == lie_whole
            offer = sender.offer(None)
        assert num_offers == (1 if lie_whole else len(weights))
        assert offer.checksums == (checksums(weights.items()) if rank == 0 else {})
        assert offer.num_bytes == sum(tensor.nbytes for tensor in weights.values())


@pytest.mark.parametrize("lie_whole", [True, False])
def test_sums_of_weights_that_lie_whole_begin_before_engines_read_them(
    monkeypatch: pytest.MonkeyPatch, lie_whole: bool
):
    monkeypatch.setattr(module, "reduce_tensor", lambda whole: (None, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="gpu"))
    begun, add = [], Checksums.add
    monkeypatch.setattr(Checksums, "add", lambda self, tensors: (begun.extend(tensors), add(self, tensors))[1])
    weights = {name: torch.randn(8) for name in "ab"}
    sender = WeightSender(rank=0, device=torch.device("cpu"))
    offer = sender.offer(({name: tensor} for name, tensor in weights.items()), lambda: weights if lie_whole else None)
    assert isinstance(offer, Offer)
    assert begun == (["a", "b"] if lie_whole else [])
    while isinstance(offer, Offer):
        offer = sender.offer(None)
    assert begun == ["a", "b"] and offer.checksums == checksums(weights.items())


class Machine:
    """Exports and openings of memory within this process; ``opened`` counts them, ``alive`` says what is still held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.exported: list[torch.UntypedStorage] = []
        self.opened: list[int] = []
        self.taken: list[int] = []
        self.stays: list[bool] = []
        self.views: list[weakref.ref[torch.Tensor]] = []
        monkeypatch.setattr(module, "reduce_tensor", self._export)
        monkeypatch.setattr(weight_receiver, "open_buffer", self._open)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="gpu"))

    def _export(self, whole: torch.Tensor) -> tuple[None, int]:
        self.exported.append(whole.untyped_storage())
        return None, len(self.exported) - 1

    def _open(self, handle: str, device: torch.device) -> torch.Tensor:
        number = pickle.loads(base64.b64decode(handle))
        self.opened.append(number)
        view = torch.empty(0, dtype=torch.uint8).set_(self.exported[number])
        self.views.append(weakref.ref(view))
        return view

    @property
    def held(self) -> list[int]:
        return [number for number, view in zip(self.opened, self.views, strict=True) if view() is not None]


def flat_weights() -> dict[str, torch.Tensor]:
    """As DeepSpeed has them: parameters side by side in one piece of memory, buffers in others."""
    flat = torch.randn(4096).to(torch.bfloat16)
    parameters = {"a": flat[8:32].view(4, 6), "b": flat[64:80].view(16), "c": flat[4000:].view(2, 48)}
    return {**parameters, "bias": torch.randn(5), "count": torch.arange(3)}


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> tuple[Machine, Callable[..., dict[str, torch.Tensor]]]:
    machine = Machine(monkeypatch)
    sender, receiver = (kind(device=torch.device("cpu"), **rank) for kind, rank in WAYS)

    def update(weights: Mapping[str, torch.Tensor], *, lie_whole: bool = True) -> dict[str, torch.Tensor]:
        buckets = ({name: tensor} for name, tensor in weights.items())
        received: dict[str, torch.Tensor] = {}
        receiver.begin()
        offer = sender.offer(buckets, lambda: weights if lie_whole else None)
        while isinstance(offer, Offer):
            parts = [(offer.buckets[number], handle) for number, handle in offer.parts["gpu"]]
            taken = receiver.take(parts, stays=offer.stays, copied=False)
            machine.stays.append(offer.stays)
            machine.taken.append(id(taken))
            received |= {name: tensor.clone() for name, tensor in taken.items()}
            offer = sender.offer(None)
        assert offer.checksums == checksums(weights.items())
        assert offer.num_bytes == sum(tensor.nbytes for tensor in weights.values())
        return received

    return machine, update


WAYS: list[tuple[Any, dict[str, int]]] = [(WeightSender, {"rank": 0}), (WeightReceiver, {})]


def assert_same(received: Mapping[str, torch.Tensor], sent: Mapping[str, torch.Tensor]) -> None:
    assert received.keys() == sent.keys()
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype and torch.equal(received[name], tensor)


def test_weights_that_lie_whole_are_read_where_they_lie(transfer: Any):
    """Exported and opened once, however often they change; what they lie in later is another piece of memory."""
    machine, update = transfer
    weights = flat_weights()
    for _ in range(3):
        for tensor in weights.values():
            tensor.mul_(3)
        assert_same(update(weights), weights)
    assert len(machine.exported) == 3 and machine.opened == [0, 1, 2]
    assert len(set(machine.taken)) == 1  # the same tensors, whose copies an engine keeps ready

    moved = {name: tensor.clone() if name == "bias" else tensor for name, tensor in weights.items()}
    assert_same(update(moved), moved)
    assert machine.opened == [0, 1, 2, 3] and machine.held == [0, 2, 3]


def test_weights_may_come_to_lie_whole_and_apart_again(transfer: Any):
    machine, update = transfer
    weights = flat_weights()
    for lie_whole in (False, True, False, True):
        assert_same(update(weights, lie_whole=lie_whole), weights)
    assert sorted(machine.opened) == list(range(len(machine.exported)))  # each once
    assert len(machine.held) == 3


@pytest.mark.parametrize(
    "weights",
    [
        {f"weight {n}": torch.rand(3) for n in range(513)},
        {"transposed": torch.rand(3, 4).t(), "other": torch.rand(2)},
        {"nothing": torch.rand(0), "other": torch.rand(2)},
    ],
    ids=["many pieces", "gaps", "nothing"],
)
def test_other_weights_are_packed(transfer: Any, weights: dict[str, torch.Tensor]):
    machine, update = transfer
    assert_same(update(weights), weights)
    assert len(machine.exported) <= 2 and not any(machine.stays)


def test_memory_that_takes_the_place_of_other_memory_is_exported_anew(monkeypatch: pytest.MonkeyPatch):
    exports = itertools.count()
    monkeypatch.setattr(module, "reduce_tensor", lambda whole: (None, next(exports)))
    kept = Exports()
    stays, first = torch.zeros(8).untyped_storage(), in_one_place(64).untyped_storage()
    handles = kept.of([stays, first])
    gc.collect()
    assert kept.of([stays, first]) == handles
    address = first.data_ptr()
    del first
    second = in_one_place(64).untyped_storage()
    assert second.data_ptr() == address
    again = kept.of([stays, second])
    assert again[0] == handles[0] and again[1] != handles[1]


def test_memory_that_only_a_parameter_holds_is_exported_once(monkeypatch: pytest.MonkeyPatch):
    """Whoever asks for a tensor's storage may get another Python object for it each time."""
    exports = itertools.count()
    monkeypatch.setattr(module, "reduce_tensor", lambda whole: (None, next(exports)))
    kept, weight = Exports(), torch.nn.Parameter(torch.zeros(8))
    handles = [kept.of([weight.detach().untyped_storage()])[0] for _ in range(3) if gc.collect() >= 0]
    assert len(set(handles)) == 1


def offer_of(gpu: str, *buckets: str, stays: bool = True) -> Offer:
    parts = {gpu: [(number, f"{gpu}, {bucket}") for number, bucket in enumerate(buckets)]}
    return Offer(buckets=list(buckets), parts=parts, stays=stays)


def test_what_ranks_have_alike_is_described_once():
    joined = Offer.joined([offer_of("gpu 0", "a", "b"), offer_of("gpu 1", "b", "c"), offer_of("gpu 2", "a", "b")])
    assert joined.buckets == ["a", "b", "c"] and joined.stays
    assert joined.parts == {
        "gpu 0": [(0, "gpu 0, a"), (1, "gpu 0, b")],
        "gpu 1": [(1, "gpu 1, b"), (2, "gpu 1, c")],
        "gpu 2": [(0, "gpu 2, a"), (1, "gpu 2, b")],
    }


def test_ranks_offer_all_in_one_way():
    with pytest.raises(ValueError, match="some ranks have all weights whole and others do not"):
        Offer.joined([offer_of("gpu 0", "a"), offer_of("gpu 1", "a", stays=False)])
