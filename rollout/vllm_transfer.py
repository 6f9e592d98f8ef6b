"""Our end of vLLM's weight-transfer interface, inside its workers. Importing this module needs vLLM.

vLLM's own backends leave two things open: an NCCL group that engines of their own can join side by side, and waits that
end. This one brings both, and its sender needs no vLLM; loading, fusing and sharding stay vLLM's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # pyright: ignore[reportMissingImports]

from model import split_experts
from rollout.direct_update import DirectUpdates, obstacle
from rollout.vllm_layout import Shapes
from rollout.weight_receiver import Tensors, WeightReceiver

BACKEND = "keel"
_OURS = {"w13_weight": "gate_up_proj", "w2_weight": "down_proj"}
_SHARDS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
"""vLLM's names for the matrices that a stacked parameter of ours holds, row block by row block."""


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """Where the group is, and the rank in it of this engine's first worker."""

    host: str
    port: int
    first_rank: int
    size: int
    timeout_s: float


@dataclass
class Offer(WeightTransferUpdateInfo):
    """As `trainer.sender.Offer`; without parts, everything comes over the group."""

    buckets: list[str] = field(default_factory=list)
    parts: dict[str, list[tuple[int, str]]] | None = None
    stays: bool = False


class KeelTransfer(WeightTransferEngine):
    """Loads what :class:`WeightReceiver` receives: straight, or through vLLM's layerwise reloading; `DirectUpdates`
    decides."""

    init_info_cls = JoinInfo
    update_info_cls = Offer

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.receiver = WeightReceiver(device)
        self.shapes: Shapes = {}
        """Of the tensors that an update may bring."""

    @cached_property
    def updates(self) -> DirectUpdates:
        # Later than the model is there: layers get more on their way to the first token.
        barred = obstacle(self.model, self.vllm_config)
        return DirectUpdates(self.model, barred, rank=self.parallel_config.rank, size=self.parallel_config.world_size)

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        from vllm.utils.nccl import unpinned_nccl_env  # pyright: ignore[reportMissingImports]

        # vLLM sets NCCL variables for its own groups, which the learner does not have.
        with unpinned_nccl_env():
            self.receiver.join(
                host=init_info.host,
                port=init_info.port,
                rank=init_info.first_rank + self.parallel_config.rank,
                size=init_info.size,
                timeout_s=init_info.timeout_s,
            )

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import (  # pyright: ignore[reportMissingImports]
            initialize_layerwise_reload,
        )

        self.receiver.begin()
        if not self.updates.begin(self.shapes):
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Offer) -> None:
        if update_info.parts is None:
            for tensors in self.receiver.receive():
                self._take(tensors, flowing=True)
                del tensors  # memory for the bucket after the next one, which is asked for now
        else:
            uuid = str(torch.cuda.get_device_properties(self.device).uuid)
            parts = update_info.parts.get(uuid)
            if parts is None:
                raise ValueError(f"no learner rank offers weights on this worker's GPU, {uuid}")
            copied = bool(self.updates.through_loader)  # which keeps tensors until it has a layer's
            here = [(update_info.buckets[number], handle) for number, handle in parts]
            # vLLM waits for the GPU before it says that it has this one, and the next one is offered.
            tensors = self.receiver.take(here, stays=update_info.stays, copied=copied)
            self._take(tensors, stays=update_info.stays)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import (  # pyright: ignore[reportMissingImports]
            finalize_layerwise_reload,
        )

        if self.updates.through_loader:
            finalize_layerwise_reload(self.model, self.model_config)
        else:
            self.updates.finish()

    def shutdown(self) -> None:
        self.receiver.close()

    def _take(self, tensors: Tensors, **how: bool) -> None:
        """``how``: as `DirectUpdates.write` takes it."""
        if self.updates.through_loader:
            self._load(tensors)
        else:
            self.updates.write(tensors, **how)

    def _load(self, tensors: Tensors) -> None:
        from vllm.model_executor.model_loader.mtp_validation import (  # pyright: ignore[reportMissingImports]
            disable_mtp_completeness_check,
        )

        self.updates.note(tensors)
        stacked = {} if self.parallel_config.enable_expert_parallel else _stacked_loaders(self.model)
        for name in filter(stacked.__contains__, tensors):
            stacked[name](tensors[name])
        others = (split_experts(name, tensor) for name, tensor in tensors.items() if name not in stacked)
        with disable_mtp_completeness_check():
            self.model.load_weights(itertools.chain.from_iterable(others))


def _stacked_loaders(model: torch.nn.Module) -> dict[str, Callable[[torch.Tensor], None]]:
    """For our stacked experts: vLLM's loader of the parameter that holds them all, which takes them in one piece.

    Expert by expert it takes a millisecond for each of thousands of matrices, however small.
    """
    loaders = {}
    for place, parameter in model.named_parameters():
        path, inside, rest = place.partition(".experts.")
        ours = _OURS.get(rest.rpartition(".")[2])
        if inside and ours is not None:
            loaders[f"{path}.experts.{ours}"] = partial(_load_stacked, parameter, place, _SHARDS[ours])
    return loaders


def _load_stacked(parameter: torch.Tensor, place: str, shards: tuple[str, ...], tensor: torch.Tensor) -> None:
    """Experts [E, len(shards) * rows, columns]."""
    for shard, part in zip(shards, tensor.chunk(len(shards), dim=1), strict=True):
        # A loader of three dimensions looks at no expert's number but whether it is this worker's.
        loaded = parameter.weight_loader(parameter, part, place, shard_id=shard, expert_id=0, return_success=True)  # pyright: ignore[reportAttributeAccessIssue]
        if not loaded:
            raise ValueError(f"vLLM did not take the experts of {place}")


WeightTransferEngineFactory.register_engine(BACKEND, KeelTransfer)
