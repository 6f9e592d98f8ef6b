"""The group that weights are broadcast in, over NCCL between two processes that see a GPU each. No vLLM: in seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import pytest
import torch

from model import checksums
from model.transport import BroadcastGroup, abandon
from trainer.sender import WeightSender

HOST = "127.0.0.1"
BUCKET_BYTES = {"cuda": 200 << 20, "cpu": 16 << 20}
"""More than the channels between two processes take in by themselves."""


def buckets(device: torch.device, version: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(version)
    rows = BUCKET_BYTES[device.type] // 2048
    for number in range(4):
        wide = torch.randn(rows, 1024, generator=generator, device=device).to(torch.bfloat16)
        yield {f"{number}.wide": wide, f"{number}.bias": torch.full((), float(version), device=device)}


def receive(port: int, kind: str, answers: Any) -> None:
    """A partner that takes all that comes, and answers with the checksums of every update."""
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
    group = BroadcastGroup.join(HOST, port, rank=1, size=2, device=device, timeout_s=60.0)
    while True:
        answers.put({name: s for tensors in group.receive() for name, s in checksums(tensors.items()).items()})


class Pair:
    """A sender in this process, and its partner in another, which sees the second GPU as its first."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
        self.sender = WeightSender(rank=0, device=self.device)
        self.version = 0

    def connect(self) -> float:
        """Seconds until a new partner was there."""
        context = multiprocessing.get_context("spawn")
        self.port, self.answers = self.sender.open(HOST), context.Queue()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", seen.split(",")[-1])
            self.partner = context.Process(target=receive, args=(self.port, self.kind, self.answers), daemon=True)
            self.partner.start()
        began = time.monotonic()
        self.sender.join(HOST, size=2, timeout_s=60.0)
        return time.monotonic() - began

    def update(self) -> None:
        self.version += 1
        sent = self.sender.send(buckets(self.device, self.version))
        assert sent is not None
        assert self.answers.get(timeout=30) == sent.checksums
        assert sent.checksums == checksums((n, t) for b in buckets(self.device, self.version) for n, t in b.items())

    def lose(self) -> float:
        """Seconds from the death of a partner that took nothing any more until the sender has given up."""
        assert self.partner.pid is not None
        os.kill(self.partner.pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as threads:
            sending = threads.submit(self.sender.send, buckets(self.device, 0))
            with pytest.raises(FutureTimeout):
                sending.result(timeout=2)
            self.partner.kill()
            began = time.monotonic()
            abandon(HOST, self.port)
            # NCCL notices nothing; gloo, in a rehearsal, that a connection is closed.
            with pytest.raises((TimeoutError, RuntimeError)) as given_up:
                sending.result(timeout=30)
            print(f"given up: {type(given_up.value).__name__}: {given_up.value}")
        return time.monotonic() - began


def scenario(kind: str) -> None:
    pair = Pair(kind)
    print(f"seconds to connect: {pair.connect():.2f}")
    pair.update()
    began = time.monotonic()
    pair.update()
    print(f"seconds of an update with its checks: {time.monotonic() - began:.2f}")
    print(f"seconds to give up: {pair.lose():.2f}")
    if kind == "cuda":
        torch.cuda.synchronize()  # nothing of the broken broadcast holds the GPU up
    print(f"seconds to connect again: {pair.connect():.2f}")
    pair.update()
    pair.sender._leave()
    pair.partner.kill()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_updates_arrive_and_a_partner_that_dies_costs_its_own_group_only():
    scenario("cuda")
