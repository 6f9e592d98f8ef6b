"""vLLM as an async actor behind `rollout.engine.Engine`.

vLLM is imported when the actor loads, never with this module: the driver imports the class to make the actor, on
machines without vLLM too. Weights travel through vLLM's own transfer API (CUDA IPC inside one GPU) in checkpoint
names, and are read back out of the live parameters afterwards by `rollout.vllm_worker`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from model import DeepseekV32, load_config
from rl.errors import RecipeError, RunStopped
from rollout.engine import Completion, EngineStats, Request
from rollout.vllm_requests import Recording, check_request, sampling_arguments, to_completion
from rollout.vllm_transfer import transfer_info

if TYPE_CHECKING:
    from rollout.vllm_counters import StepCounters

_ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",  # routes and kept sets exist there only; unset, vLLM may fall back silently
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for CUDA IPC handles, on their way into the engine's own process
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has a CUDA context, which does not survive a fork
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How one vLLM engine is built."""

    dtype: str
    max_num_seqs: int
    max_context: int
    tensor_parallel: int = 1
    gpu_memory: float = 0.85  # share of each GPU, weights and cache together
    cuda_graphs: bool = True
    kept: bool = True  # whether requests get their kept sets
    seed: int = 0  # a different one for every engine


class VllmEngineActor:
    """Made a Ray actor by `rollout.pool`; call :meth:`load` before anything else."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._version = 0
        self._staged: list[Mapping[str, torch.Tensor]] = []
        self._in_flight: set[str] = set()
        self._num_prompt = 0
        self._busy_s = 0.0
        self._busy_since: float | None = None

    async def load(self, model_path: str, settings: EngineSettings, *, version: int = 0) -> None:
        """Starts vLLM with the weights in a Hugging Face directory.

        Raises RecipeError when vLLM is not installed or there is no GPU.
        """
        self._counters, self._engine = _start(model_path, settings)
        config = load_config(model_path)
        self._recording = Recording.of(config, kept=settings.kept, max_context=settings.max_context)
        with torch.device("meta"):
            names = DeepseekV32(config).state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in names.items()}
        from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
            WeightTransferInitRequest,
        )

        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={"packed": False}))
        await self._relabel(version)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        for request in requests:
            check_request(request, self._recording)
            if request.id in self._in_flight:
                raise ValueError(f"request {request.id}: the id is in use")
        self._num_prompt += sum(len(request.token_ids) for request in requests)
        return list(await asyncio.gather(*map(self._generate, requests)))

    async def abort(self, request_ids: Sequence[str] | None = None) -> int:
        named = self._in_flight.copy() if request_ids is None else self._in_flight.intersection(request_ids)
        await self._engine.abort(sorted(named))
        return len(named)

    async def stage(self, bucket: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in bucket.items():
            expected = self._shapes.get(name)
            if expected is None:
                raise ValueError(f"weight update: the engine's model has no parameter or buffer {name}")
            if expected != tuple(tensor.shape):
                raise ValueError(f"weight update: {name} has shape {tuple(tensor.shape)}, the engine's is {expected}")
        self._staged.append(bucket)

    async def commit(self, version: int) -> dict[str, int]:
        """As `Engine.commit`, with two differences that are vLLM's.

        An update is the whole model: vLLM rewrites a layer from what it is sent, so a tensor that is left out would
        not keep its value. And sequences in flight are prefilled again with the new weights, prompt and reply.
        """
        staged = {name: tensor for bucket in self._staged for name, tensor in bucket.items()}
        missing = sorted(self._shapes.keys() - staged.keys())
        if missing:
            raise ValueError(f"weight update: {missing[0]} and {len(missing) - 1} more were not staged")
        await self._engine.pause_generation(mode="keep", clear_cache=True)
        await self._engine.start_weight_update()
        for bucket in self._staged:
            await self._send(bucket)
        await self._engine.finish_weight_update()
        await self._relabel(version)
        tensors = {name: (list(tensor.shape), str(tensor.dtype).split(".")[1]) for name, tensor in staged.items()}
        self._staged = []
        (sums,) = await self._engine.collective_rpc("live_checksums", args=(tensors,))
        await self._engine.resume_generation()
        return sums

    async def stats(self) -> EngineStats:
        counters = self._counters
        since = 0.0 if self._busy_since is None else time.perf_counter() - self._busy_since
        return EngineStats(
            num_generated_tokens=counters.num_generated_tokens,
            num_prompt_tokens=self._num_prompt,
            num_prefilled_tokens=counters.num_prefilled_tokens,
            num_decode_steps=counters.num_steps,
            busy_s=self._busy_s + since,
            num_active=counters.num_active,
            num_waiting=counters.num_waiting,
            version=self._version,
        )

    async def shutdown(self) -> None:
        """Ends vLLM's own processes, which would outlive this one."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    async def _generate(self, request: Request) -> Completion:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.exceptions import EngineDeadError  # pyright: ignore[reportMissingImports]

        sampling = SamplingParams(
            **sampling_arguments(request, self._recording), output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = {"prompt_token_ids": request.token_ids.tolist()}
        self._enter(request.id)
        try:
            outputs = [output async for output in self._engine.generate(prompt, sampling, request.id)]
        except EngineDeadError as error:
            raise RunStopped("a vLLM engine's own process died; its log above says why") from error
        finally:
            self._leave(request.id)
        return to_completion(outputs[-1].outputs[0], request, self._recording)

    def _enter(self, name: str) -> None:
        if not self._in_flight:
            self._busy_since = time.perf_counter()
        self._in_flight.add(name)

    def _leave(self, name: str) -> None:
        self._in_flight.discard(name)
        if not self._in_flight and self._busy_since is not None:
            self._busy_s += time.perf_counter() - self._busy_since
            self._busy_since = None

    async def _send(self, bucket: Mapping[str, torch.Tensor]) -> None:
        """One bucket into the worker that shares this process's GPU."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest  # pyright: ignore[reportMissingImports]

        on_gpu = {name: tensor.to("cuda") for name, tensor in bucket.items()}
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=transfer_info(on_gpu)))

    async def _relabel(self, version: int) -> None:
        """Tokens sampled from now on carry this version."""
        await self._engine.update_weight_version(str(version))
        self._version = version


def _start(model_path: str, settings: EngineSettings) -> tuple[StepCounters, Any]:
    """vLLM's AsyncLLM, and the counters it feeds."""
    os.environ.update(_ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at every update of parts that have no weights
    if not torch.cuda.is_available():
        raise RecipeError("rollout.engine: vllm needs a GPU, but its process sees none; use rollout.engine=torch")
    try:
        from vllm import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

        from rollout.vllm_counters import StepCounters
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"rollout.engine: vllm needs the gpu extra (module {error.name} is missing): pip install -e '.[gpu]'"
        ) from error
    arguments = AsyncEngineArgs(
        model=model_path,
        skip_tokenizer_init=True,
        generation_config="vllm",  # the directory's own would add stop tokens
        dtype=settings.dtype,
        hf_overrides={"moe_router_dtype": "float32"},  # as the learner routes; else in bfloat16
        seed=settings.seed,
        max_model_len=settings.max_context,
        max_num_seqs=settings.max_num_seqs,
        tensor_parallel_size=settings.tensor_parallel,
        gpu_memory_utilization=settings.gpu_memory,
        enforce_eager=not settings.cuda_graphs,
        enable_return_routed_experts=True,
        return_sampling_mask=settings.kept,
        logprobs_mode="processed_logprobs",
        weight_transfer_config={"backend": "ipc"},
        worker_extension_cls="rollout.vllm_worker.WeightReader",
        disable_log_stats=True,  # the default loggers, not ours
    )
    counters: list[StepCounters] = []

    def count(config: Any, engine_index: int = 0) -> StepCounters:
        counters.append(StepCounters(config, engine_index))
        return counters[-1]

    engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[count])
    return counters[0], engine
