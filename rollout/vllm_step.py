"""The worker's side of `rollout.vllm_recording`: what a step drew and recorded, from the GPU to the host at once.

vLLM makes log-probabilities, ranks and kept sets of a step with kernels and copies of their own, and cuts all of it up
by request. Here one kernel makes a table of it (`kernels.record_draws`), which takes the place of what vLLM copies
anyway, the tokens; and the step's rows go along as they lie on the GPU.

Importing this module needs vLLM.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.async_utils import stream
from vllm.v1.worker.gpu.sample import sampler as vllm_sampler
from vllm.v1.worker.gpu.sample.output import MAX_COMPACT_SUPPORT

from kernels import record_draws
from rl.sample import NDArray
from rollout.drawn import Drawn, StepRows

_THEIRS = model_runner.AsyncOutput


@dataclass(frozen=True, slots=True)
class Processed:
    """In the place of vLLM's log-probabilities and kept sets of a step: what both are made of, logits [B, V]."""

    logits: torch.Tensor
    width: int = 0  # ids of a kept set for which there is room

    @classmethod
    def from_scores(cls, logits: torch.Tensor, *args: Any, **others: Any) -> Self:
        """As ``compute_topk_scores``. Our requests ask for the log-probability of the sampled token, and no other."""
        return cls(logits)

    @classmethod
    def from_logits(cls, logits: torch.Tensor, cu_num_logits: Any, num_sampled: Any, max_num_kept: int) -> Self:
        """As ``SamplingMaskTensors.from_logits``, where nothing is drafted."""
        return cls(logits, min(max_num_kept, logits.shape[1], MAX_COMPACT_SUPPORT))


class StepOutput(AsyncModelRunnerOutput):
    """In the place of vLLM's AsyncOutput: a step on its way to the host."""

    def __init__(
        self,
        *,
        model_runner_output: Any,
        sampler_output: Any,
        num_sampled_tokens: torch.Tensor,
        main_stream: Any,
        copy_stream: Any,
        check_ep_fault: bool,
        pending_aux_output: PendingRows | None,
    ) -> None:
        del check_ep_fault  # of exchanges between nodes, which an engine here has none of
        self._output, self._rows = model_runner_output, pending_aux_output
        kept, tokens = sampler_output.sampling_mask_tensors, sampler_output.sampled_token_ids.squeeze(1)
        logits, width = (kept or sampler_output.logprobs_tensors).logits, 0 if kept is None else kept.width
        (self._num_rows, self._num_ids), self._records_kept = logits.shape, kept is not None
        self._on_gpu = record_draws(logits, tokens, num_sampled_tokens, width)
        # Of rows that keep more than there is room for; the logits themselves would be kept for two steps.
        self._is_kept = logits.isfinite() if 0 < width < self._num_ids else None
        self._done = torch.cuda.Event(blocking=True)
        with stream(copy_stream, main_stream):
            copy_stream.wait_stream(main_stream)
            self._table = self._on_gpu.to("cpu", non_blocking=True)
            if self._rows is not None:
                self._rows.enqueue_cpu_copy()
            self._done.record(copy_stream)

    def get_output(self) -> Any:
        self._done.synchronize()
        rows = None if self._rows is None else self._rows.process_output()
        whole = self._whole if self._records_kept else None
        drawn = Drawn.of_table(self._table.numpy(), self._num_rows, self._num_ids, rows, whole)
        tokens = drawn.token_ids[:, None].tolist()
        for row in np.flatnonzero(~drawn.sampled).tolist():
            tokens[row] = []
        self._output.sampled_token_ids = tokens
        self._output.aux_output_connector_output = drawn
        return self._output

    def _whole(self, row: int) -> NDArray:
        assert self._is_kept is not None
        return self._is_kept[row].nonzero().squeeze(1).cpu().numpy()


def step_output(**parts: Any) -> AsyncModelRunnerOutput:
    """Requests that vLLM makes up to warm itself up ask for no log-probability."""
    sampler_output = parts["sampler_output"]
    recorded = sampler_output.logprobs_tensors is not None or sampler_output.sampling_mask_tensors is not None
    return (StepOutput if recorded else _THEIRS)(**parts)


class RowRecorder:
    """In the place of vLLM's AuxOutputWorkerConnector: what every fed token's forward pass recorded."""

    def __init__(self, model: torch.nn.Module, vllm_config: Any, kv_cache_config: Any) -> None:
        del kv_cache_config
        from vllm.distributed.aux_output_connector import worker
        from vllm.distributed.parallel_state import get_tp_group
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

        room = vllm_config.scheduler_config.max_num_batched_tokens
        # By this name, which `rollout.vllm_dsa` may have put another class under.
        self._capturer = worker.RoutedExpertsCapturer(max_num_batched_tokens=room, vllm_config=vllm_config)
        bind_routed_experts_capturer(model, self._capturer)
        self._answers = get_tp_group().is_first_rank

    def begin_step(self, metadata: Any) -> None:
        pass

    def prepare_output(self, input_batch: Any) -> PendingRows | None:
        if not self._answers:
            return None
        edges = input_batch.query_start_loc_np[: len(input_batch.req_ids) + 1].astype(np.int64)
        starts = input_batch.num_computed_tokens_np[: len(input_batch.req_ids)].astype(np.int64)
        return PendingRows(starts, edges, self._capturer.snapshot_routing_data(int(edges[-1])))

    def close(self) -> None:
        pass


class PendingRows:
    """A step's rows on their way to the host, as vLLM's PendingAuxOutput."""

    def __init__(self, starts: NDArray, edges: NDArray, on_gpu: torch.Tensor) -> None:
        self._starts, self._edges, self._on_gpu = starts, edges, on_gpu
        self._rows: NDArray | None = None

    def enqueue_cpu_copy(self, num_sampled: Any = None, num_rejected: Any = None) -> None:
        """On the stream of the copies. Nothing is rejected where nothing is drafted."""
        del num_sampled, num_rejected
        self._rows = self._on_gpu.to("cpu", non_blocking=True).numpy()

    def process_output(self) -> StepRows:
        """When the copies are there."""
        assert self._rows is not None
        rows = self._rows.reshape(len(self._rows), -1)
        return StepRows(self._starts, self._edges, rows.view(np.uint8))


def install() -> None:
    """In a worker's process, before vLLM makes its model runner's parts."""
    model_runner.get_aux_output_connector = RowRecorder
    model_runner.AsyncOutput = step_output
    vllm_sampler.compute_topk_scores = Processed.from_scores
    vllm_sampler.SamplingMaskTensors = Processed
