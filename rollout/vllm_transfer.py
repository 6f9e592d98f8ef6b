"""Our end of vLLM's weight-transfer interface, inside its workers. Importing this module needs vLLM.

vLLM's own backends leave two things open: an NCCL group that engines of their own can join side by side, and waits that
end. This one brings both, and its sender needs no vLLM; loading, fusing and sharding stay vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # pyright: ignore[reportMissingImports]

from rollout.weight_receiver import Named, WeightReceiver

BACKEND = "keel"


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
    """A packed bucket and one handle a GPU, by the GPU's UUID; without a bucket, everything comes over the group."""

    bucket: str | None = None
    handles: dict[str, str] | None = None


class KeelTransfer(WeightTransferEngine):
    """Loads what :class:`WeightReceiver` receives, through vLLM's layerwise reloading."""

    init_info_cls = JoinInfo
    update_info_cls = Offer

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.receiver = WeightReceiver(device)

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
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Offer) -> None:
        if update_info.bucket is None:
            for named in self.receiver.receive():
                self._load(named)
        else:
            uuid = str(torch.cuda.get_device_properties(self.device).uuid)
            handle = (update_info.handles or {}).get(uuid)
            if handle is None:
                raise ValueError(f"no learner rank offers weights on this worker's GPU, {uuid}")
            self._load(self.receiver.take(update_info.bucket, handle))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import (  # pyright: ignore[reportMissingImports]
            finalize_layerwise_reload,
        )

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self.receiver.close()

    def _load(self, named: Named) -> None:
        from vllm.model_executor.model_loader.mtp_validation import (  # pyright: ignore[reportMissingImports]
            disable_mtp_completeness_check,
        )

        with disable_mtp_completeness_check():
            self.model.load_weights(named)


WeightTransferEngineFactory.register_engine(BACKEND, KeelTransfer)
