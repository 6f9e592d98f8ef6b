"""What a worker's end of vLLM's weight transfer does with an offer, on its way through vLLM's own messages.

vLLM's class is real; the GPU, its memory and the way into the parameters are not.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from model.transport import Bucket
from rollout import weight_receiver
from rollout.vllm_transfer import KeelTransfer
from rollout.vllm_transfer import Offer as Received
from rollout.weight_receiver import WeightReceiver
from trainer.sender import Offer

WEIGHTS = {"a": torch.randn(3, 4), "b": torch.arange(5)}


class Updates:
    """In the place of `DirectUpdates`; ``through_loader`` as there."""

    def __init__(self, through_loader: str = "") -> None:
        self.through_loader = through_loader
        self.written: list[tuple[dict[str, torch.Tensor], dict[str, bool]]] = []

    def write(self, tensors: dict[str, torch.Tensor], **how: bool) -> None:
        self.written.append((tensors, how))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Updates, torch.Tensor]:
    """Of the GPU "here", on which the buffer lies that handle 7 opens."""
    bucket = Bucket.of(WEIGHTS)
    buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    bucket.pack(WEIGHTS, buffer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="here"))
    monkeypatch.setattr(weight_receiver, "open_buffer", lambda handle, device: {"7": buffer}[handle])
    transfer: Any = object.__new__(KeelTransfer)
    transfer.device, transfer.receiver = torch.device("cpu"), WeightReceiver(torch.device("cpu"))
    transfer.updates = updates = Updates()
    return transfer, updates, buffer


def offer(*, stays: bool, uuid: str = "here") -> Received:
    """As it arrives."""
    described = [Bucket.of({"other": torch.zeros(2)}).to_json(), Bucket.of(WEIGHTS).to_json()]
    sent = Offer(buckets=described, parts={"there": [(0, "6")], uuid: [(1, "7")]}, stays=stays)
    return Received(**MsgpackDecoder(dict).decode(MsgpackEncoder().encode(asdict(sent))))


def assert_weights(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensors[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("stays", [True, False])
def test_a_worker_takes_what_lies_on_its_own_gpu(worker: Any, stays: bool):
    transfer, updates, buffer = worker
    for _ in range(2):
        transfer.receive_weights(offer(stays=stays))
    for tensors, how in updates.written:
        assert_weights(tensors)
        assert how == {"stays": stays}
        assert tensors["a"].untyped_storage().data_ptr() == buffer.data_ptr()  # no copy of it
    assert (updates.written[0][0] is updates.written[1][0]) == stays


@pytest.mark.parametrize("stays", [True, False])
def test_vllms_loader_is_given_copies_of_what_is_used_again(worker: Any, stays: bool, monkeypatch: pytest.MonkeyPatch):
    transfer, _, buffer = worker
    transfer.updates, loaded = Updates("no update has shown yet"), []
    monkeypatch.setattr(KeelTransfer, "_load", lambda self, tensors: loaded.append(tensors))
    transfer.receive_weights(offer(stays=stays))
    (tensors,) = loaded
    assert_weights(tensors)
    assert (tensors["a"].untyped_storage().data_ptr() == buffer.data_ptr()) == stays


def test_a_worker_says_that_nothing_is_offered_on_its_gpu(worker: Any):
    transfer, updates, _ = worker
    with pytest.raises(ValueError, match="no learner rank offers weights on this worker's GPU, here"):
        transfer.receive_weights(offer(stays=True, uuid="elsewhere"))
    assert not updates.written
