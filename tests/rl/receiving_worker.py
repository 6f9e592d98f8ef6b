"""A process that receives weights as a worker of vLLM does, without vLLM around the receiver."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

import model.transport
from model import split_experts
from rollout.held_weights import HeldWeights
from rollout.weight_receiver import WeightReceiver
from tests.rollout.vllm_shards import Shapes, as_vllm

EXPERTS = 8


class Worker:
    """One of ``size`` processes of an engine."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.receiver = WeightReceiver(torch.device("cpu"))
        self.tensors: dict[str, torch.Tensor] = {}

    def join(self, trouble: str = "", **group: Any) -> None:
        """``trouble``: dies ``before`` it is there, or ``amid`` its connecting to others who are there too."""
        if trouble == "before":
            os._exit(1)
        if trouble == "amid":
            model.transport._backend = lambda *_: os._exit(1)
        self.receiver.join(**group)

    def receive(self, trouble: str = "") -> int:
        """The largest number of bytes in a bucket; ``trouble`` happens after the first one."""
        self.receiver.begin()
        largest = 0
        for tensors in self.receiver.receive():
            self.tensors |= tensors
            largest = max(largest, sum(tensor.nbytes for tensor in tensors.values()))
            if trouble == "dies":
                os._exit(1)
            if trouble == "fails":
                raise ValueError("the loader broke\nin several lines")
            if trouble == "hangs":
                time.sleep(600)
        return largest

    def held(self, known: list[str], flip: str = "") -> tuple[Any, ...]:
        shapes = Shapes(kv_heads=1)
        weights = self.tensors
        shapes.vocab, shapes.hidden = weights["lm_head.weight"].shape
        shapes.experts = EXPERTS
        live = as_vllm(weights, shapes, self.rank, self.size, by_expert=False)
        if flip:
            live[flip].view(-1)[0] += 1
        tensors = self.receiver.tensors
        return HeldWeights(live, tensors, rank=self.rank, size=self.size).answer(known).plain()

    def received(self) -> dict[str, torch.Tensor]:
        return {name: part for stack in self.tensors.items() for name, part in split_experts(*stack)}
