"""Packed buckets, and a group that sends them from thread to thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.transport import BroadcastGroup, Bucket, StagingBuffers, open_store

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
        self.error: BaseException | None = None
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


def test_the_store_forgets_what_was_sent(pair: Pair):
    """Also what was asked for before it was there."""
    kept = []
    for _ in range(4):
        pair.transfer([{"weight": torch.rand(8)}] * 5)
        kept.append(pair.store.num_keys())
    assert kept[1:] == [kept[1]] * 3
