"""vLLM's side of `rollout.step_records`: what a step recorded leaves vLLM's processes as a few arrays.

Two of vLLM's own parts are replaced. Its scheduler takes log-probabilities, kept sets and rows off what the workers
return, before they would be cut up by request, and sends them with the step's statistics. Its worker's connector for
routed experts sends the step's rows as they lie on the GPU and keeps none: `rollout.prefix_rows` finds those of tokens
that come out of the prefix cache.

Importing this module needs vLLM.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from rl.sample import NDArray
from rollout.step_records import Step

_NONE = np.zeros(0, np.int32)


@lru_cache(maxsize=1 << 14)
def key_of(request_id: str) -> str:
    """Of a request in `rollout.step_records`; the id that vLLM was given begins with it, the rest is for logs."""
    return request_id.partition(".")[0]


@lru_cache(maxsize=4)
def keys_of(request_ids: tuple[str, ...]) -> tuple[list[str], str]:
    """And all of them as `rollout.step_records.Step` has them; most steps are of the requests of the one before."""
    keys = list(map(key_of, request_ids))
    return keys, "\n".join(keys)


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step's B requests, uint8 [R, W], from ``edges[i]`` to ``edges[i + 1]`` those of the tokens of
    request i from ``starts[i]`` on."""

    starts: NDArray
    edges: NDArray
    rows: NDArray


class RecordingScheduler(AsyncScheduler):
    """``scheduler_cls`` of our engines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aux_output_connector = None  # rows are not cut up here
        self._generation = 0

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        with only_cached_blocks(self.kv_cache_manager.block_pool):
            cleared = super().reset_prefix_cache(*args, **kwargs)
        self._generation += int(cleared)
        return cleared

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        planned = super().schedule(*args, **kwargs)
        planned.keel_generation = self._generation
        return planned

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        seen = Seen.taken_from(model_runner_output) if model_runner_output.req_ids else None
        by_client = super().update_from_output(scheduler_output, model_runner_output)
        outputs = by_client.get(0)
        if seen is not None and outputs is not None and outputs.scheduler_stats is not None:
            generation = scheduler_output.keel_generation
            stale = generation != self._generation
            if step := seen.step(outputs.outputs, stale=stale, block=self.hash_block_size, generation=generation):
                # A field for others' statistics, which leaves a dictionary as it is; nobody else uses it here.
                outputs.scheduler_stats.kv_connector_stats = step.to_plain()
        return by_client


@contextmanager
def only_cached_blocks(pool: Any) -> Iterator[None]:
    """vLLM clears its prefix cache by going through all its blocks, a hundred thousand where a GPU is large. Those that
    cache nothing have nothing to clear."""
    every, pool.blocks = pool.blocks, _cached_blocks(pool.cached_block_hash_to_block)
    try:
        yield
    finally:
        pool.blocks = every


def _cached_blocks(by_hash: Any) -> Iterator[Any]:
    """When they are asked for: what is preempted first may be cached yet."""
    for held in by_hash._cache.values():
        yield from held.values() if isinstance(held, dict) else [held]


@dataclass(frozen=True, slots=True)
class Seen:
    """What workers return of a step of B requests, in their order."""

    names: list[str]
    joined: str
    sampled: NDArray  # bool [B]
    logprobs: Any  # vLLM's LogprobsLists
    masks: Any  # vLLM's SamplingMaskLists
    rows: StepRows | None

    @classmethod
    def taken_from(cls, output: Any) -> Self:
        names, joined = keys_of(tuple(output.req_ids))
        seen = cls(
            names=names,
            joined=joined,
            sampled=np.fromiter(map(len, output.sampled_token_ids), np.int64, count=len(output.req_ids)) > 0,
            logprobs=output.logprobs,
            masks=output.sampling_masks,
            rows=output.aux_output_connector_output,
        )
        output.logprobs = output.sampling_masks = output.aux_output_connector_output = None
        return seen

    def step(self, outputs: Sequence[Any], *, stale: bool, **of_cache: int) -> Step | None:
        """Without the requests whose token vLLM threw away: they were aborted, or will compute it again. So will those
        amid their prompt when the cache was cleared meanwhile, which makes the step ``stale``."""
        goes = self._emitted(outputs) | (~self.sampled & (not stale))
        got = np.flatnonzero(goes & self.sampled)
        if not goes.any():
            return None
        starts = counts = np.zeros(len(goes), np.int64)
        rows = np.zeros((0, 0), np.uint8)
        if self.rows is not None:
            starts, counts, rows = self.rows.starts, np.diff(self.rows.edges), self.rows.rows
            rows = rows if goes.all() else rows[np.repeat(goes, counts)]
        sizes, ids = (None, _NONE) if self.masks is None else _of_rows(self.masks.token_ids, self.masks.offsets, got)
        return Step(
            names=self.joined if goes.all() else "\n".join(itertools.compress(self.names, goes.tolist())),
            starts=starts[goes],
            counts=counts[goes],
            sampled=self.sampled[goes],
            token_ids=_NONE if self.logprobs is None else self.logprobs.logprob_token_ids[got, 0],
            logprobs=_NONE if self.logprobs is None else self.logprobs.logprobs[got, 0],
            kept_sizes=sizes,
            kept_ids=ids,
            rows=rows,
            **of_cache,
        )

    def _emitted(self, outputs: Sequence[Any]) -> NDArray:
        """bool [B]: the requests whose token leaves vLLM."""
        if len(outputs) == self.sampled.sum() and all(output.new_token_ids for output in outputs):
            return self.sampled  # tokens come from nowhere else
        emitted = {key_of(output.request_id) for output in outputs if output.new_token_ids}
        return np.fromiter(map(emitted.__contains__, self.names), bool, count=len(self.names))


def _of_rows(ids: NDArray, offsets: NDArray, rows: NDArray) -> tuple[NDArray, NDArray]:
    """Sizes and ids of some rows of a ragged table."""
    sizes = np.diff(offsets)
    if len(rows) == len(sizes):
        return sizes, ids
    taken = np.zeros(len(sizes), bool)
    taken[rows] = True
    return sizes[rows], ids[np.repeat(taken, sizes)]


def compact_masks(masks: Any, num_sampled_tokens: Any = None) -> Any:
    """As vLLM's ``SamplingMaskTensors.tolists`` where every request gets a token at most, without a loop over them."""
    from vllm.v1.outputs import SamplingMaskLists

    counts, ids = masks.counts.cpu().numpy(), masks.token_ids.cpu().numpy()
    if masks.rows_per_request != 1 or (counts > ids.shape[1]).any():
        return _THEIRS(masks, num_sampled_tokens)
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    widest = ids[:, : counts.max(initial=0)]
    return SamplingMaskLists(widest[np.arange(widest.shape[1]) < counts[:, None]], offsets)


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

    def enqueue_cpu_copy(self, num_sampled: NDArray, num_rejected: NDArray) -> None:
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
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.sample.output import SamplingMaskTensors

    global _THEIRS
    model_runner.get_aux_output_connector = RowRecorder
    if SamplingMaskTensors.tolists is not compact_masks:
        _THEIRS, SamplingMaskTensors.tolists = SamplingMaskTensors.tolists, compact_masks


_THEIRS: Any = None
