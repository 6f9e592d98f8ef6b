"""What learner ranks and an engine's workers do on the same GPUs, with memory that the operating system shares."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from rollout import weight_receiver
from tests.rl.receiving_worker import Worker
from trainer import sender


def export(memory: torch.UntypedStorage) -> str:
    return base64.b64encode(pickle.dumps(memory._share_filename_cpu_())).decode()


def open_exported(handle: str) -> torch.Tensor:
    storage = torch.UntypedStorage._new_shared_filename_cpu(*pickle.loads(base64.b64decode(handle)))
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportArgumentType, reportCallIssue]


def put_on_a_gpu(rank: Any) -> None:
    """Runs in a learner rank; the GPU is a name."""
    sender._exported = export
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(uuid=f"gpu {rank.rank}")


def train(rank: Any) -> None:
    """In place, as an optimizer step; runs in a learner rank that has its weights whole."""
    for parameter in rank.policy.model.parameters():
        parameter.data.add_(0.25)


class TakingWorker(Worker):
    """On the GPU of the learner's rank of the same number."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.num_opened = 0
        weight_receiver.open_buffer = self._open

    def begin(self) -> None:
        self.receiver.begin()
        self.tensors = {}

    def take(self, offer: Mapping[str, Any]) -> int:
        """How many handles it has opened since it was made."""
        parts = [(offer["buckets"][number], handle) for number, handle in offer["parts"][f"gpu {self.rank}"]]
        taken = self.receiver.take(parts, stays=offer["stays"])
        self.tensors |= {name: tensor.clone() for name, tensor in taken.items()}
        return self.num_opened

    def _open(self, handle: str, device: torch.device) -> torch.Tensor:
        self.num_opened += 1
        return open_exported(handle)
