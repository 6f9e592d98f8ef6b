"""Packed buckets, and a group that sends them from thread to thread."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.transport import BroadcastGroup, Bucket, StagingBuffers, open_store
from rollout.weight_receiver import WeightReceiver

DTYPES = [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64, torch.complex64]
HOST, WAIT_S = "127.0.0.1", 20.0


def filled(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    octets = torch.empty(shape, dtype=dtype).view(-1).view(torch.uint8).numel()
    return torch.randint(0, 256, (octets,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


tensors = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(DTYPES)), min_size=1, max_size=8
)


@given(tensors, st.integers(0, 3), st.integers(0, 1000))
def test_what_is_packed_comes_out_of_any_buffer_that_has_room(
    described: list[tuple[tuple[int, ...], torch.dtype]], before: int, room: int
):
    generator = torch.Generator().manual_seed(0)
    sent = {f"weight {n}": filled(shape, dtype, generator) for n, (shape, dtype) in enumerate(described)}
    bucket = Bucket.of(sent)
    memory = torch.zeros(256 * before + bucket.num_bytes + room, dtype=torch.uint8)
    bucket.pack(sent, memory[256 * before :])
    assert not memory[: 256 * before].any() and not memory[256 * before + bucket.num_bytes :].any()

    received = Bucket.from_json(bucket.to_json()).unpack(memory[256 * before :])
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].shape == tensor.shape and received[name].dtype == tensor.dtype
        assert received[name].is_contiguous() and torch.equal(octets(received[name]), octets(tensor))


def test_buckets_of_the_same_names_in_other_shapes_are_others():
    first, second = {"weight": torch.rand(3, 2)}, {"weight": torch.rand(2, 3)}
    staging = StagingBuffers(1, torch.device("cpu"))
    for tensors in (first, second, {"weight": second["weight"].double()}, first):
        bucket, buffer = staging.pack(tensors)
        assert torch.equal(bucket.unpack(buffer)["weight"], tensors["weight"])


class Pair:
    """A sender in this thread and a receiver in another."""

    def __init__(self) -> None:
        self.store = open_store(HOST)
        settings: dict[str, Any] = {"size": 2, "device": torch.device("cpu"), "timeout_s": WAIT_S}
        joined: list[BroadcastGroup] = []
        other = threading.Thread(
            target=lambda: joined.append(BroadcastGroup.join(HOST, self.store.port, rank=1, **settings))
        )
        other.start()
        self.sender = BroadcastGroup(HOST, self.store, rank=0, **settings)
        other.join()
        self.receiver = joined[0]

    def transfer(self, buckets: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        received: list[dict[str, torch.Tensor]] = []
        other = threading.Thread(target=lambda: received.extend(self.receiver.receive()))
        other.start()
        self.sender.send(buckets)
        other.join()
        return received


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=3), max_size=7))
def test_every_transfer_arrives_whatever_came_before(pair: Pair, sizes: list[list[int]]):
    generator = torch.Generator().manual_seed(1)
    sent = [{f"weight {n}": torch.rand(size, generator=generator) for n, size in enumerate(bucket)} for bucket in sizes]
    received = pair.transfer(sent)
    assert len(received) == len(sent)
    for ours, theirs in zip(sent, received, strict=True):
        assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_receiver_that_lets_go_of_buckets_has_two_at_a_time(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """One that it uses, and one on its way."""
    receiver, come, alive = WeightReceiver(torch.device("cpu")), list[weakref.ref[torch.UntypedStorage]](), []
    receiver._group = pair.receiver
    take, most = pair.receiver._take, [1, 2, 2, 2, 2, 2, 1]

    def num_alive() -> int:
        return sum(memory() is not None for memory in come)

    def take_and_note(number: int) -> Any:
        taken = take(number)
        if taken is not None:
            come.append(weakref.ref(taken[0]["weight"].untyped_storage()))
        until = time.monotonic() + 1
        while num_alive() > most[len(alive)] and time.monotonic() < until:
            time.sleep(0.001)  # gloo's own thread lets go of a tensor a moment after it has come
        alive.append(num_alive())
        return taken

    def receive() -> None:
        for bucket in receiver.receive():
            assert bucket["weight"].shape == (8,)
            del bucket

    monkeypatch.setattr(pair.receiver, "_take", take_and_note)
    other = threading.Thread(target=receive)
    other.start()
    pair.sender.send([{"weight": torch.rand(8)} for _ in range(6)])
    other.join()
    assert alive == most


def test_receivers_have_it_all_before_the_sender_does_anything_else(pair: Pair):
    """What it does meanwhile keeps nobody."""
    has_all, in_time = threading.Event(), []

    def receive() -> None:
        assert len(list(pair.receiver.receive())) == 2
        has_all.set()

    other = threading.Thread(target=receive)
    other.start()
    pair.sender.send([{"weight": torch.rand(8)}] * 2, meanwhile=lambda: in_time.append(has_all.wait(WAIT_S)))
    other.join()
    assert in_time == [True]


def test_a_buffer_that_could_not_grow_stays_where_it_was(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("meta")
    staging = StagingBuffers(1, device)
    with monkeypatch.context() as full:
        empty = torch.empty

        def no_memory(size: int, **options: Any) -> torch.Tensor:
            if size:
                raise torch.OutOfMemoryError("full")
            return empty(size, **options)

        full.setattr(torch, "empty", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            staging.pack({"weight": empty(8, device=device)})
    assert staging.pack({"weight": torch.empty(8, device=device)})[1].device == device


def test_a_buffer_that_is_too_short_is_refused():
    bucket, memory = Bucket.of({"weight": torch.rand(200)}), torch.empty(4096, dtype=torch.uint8)
    with pytest.raises(ValueError, match="does not lie in a buffer of 300"):
        bucket.unpack(memory[:300])


def test_the_store_forgets_what_was_sent(pair: Pair):
    kept = []
    for _ in range(4):
        pair.transfer([{"weight": torch.rand(8)}] * 5)
        kept.append(pair.store.num_keys())
    assert kept[1:] == [kept[1]] * 3
