"""vLLM as an async actor behind `rollout.engine.Engine`.

vLLM is imported when the actor loads, never with this module: the driver imports the class to make the actor, on
machines without vLLM too. Weights come straight into vLLM's workers (`rollout.vllm_transfer`), and are read back out of
the live parameters afterwards (`rollout.vllm_worker`).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from model import ModelOutline, outline
from rl.errors import DataError, RecipeError
from rollout.engine import Completion, EngineDied, EngineStats, Request
from rollout.held_weights import Answer, Verifier
from rollout.reaper import end_with_this_process
from rollout.vllm_requests import Recording, check_request, sampling_arguments, to_completion

if TYPE_CHECKING:
    from rollout.vllm_counters import StepCounters

T = TypeVar("T")

_ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",  # routes and kept sets exist there only; unset, vLLM may fall back silently
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for what workers answer, on its way out of vLLM's own processes
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has a CUDA context, which does not survive a fork
    "VLLM_NO_USAGE_STATS": "1",
}
_WITHOUT_MULTICAST = {
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",  # for layers that vLLM fuses with their sum
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
"""Left to itself, a vLLM engine of several GPUs adds up through NVLink multicast, whatever NCCL is told."""
_ROUTER = {"moe_router_dtype": "float32", "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_CONFIGURED_ROUTERS = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM")
"""Architectures that route in one way only in the learner, but in vLLM as config.json says, which may say nothing."""

_DEAD = "a vLLM engine's own process died; its log above says why"
_LOOK_S = 0.5
"""How often whoever waits for vLLM's own processes looks whether they live."""

_OURS = {"DeepseekV32ForCausalLM": "rollout.vllm_dsa:KeelV32ForCausalLM"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How one vLLM engine is built."""

    dtype: str
    max_num_seqs: int
    max_context: int
    tensor_parallel: int = 1  # GPUs, all of this node
    expert_parallel: bool = False  # whether they divide a layer's experts among them instead of each expert
    gpu_memory: float = 0.85  # share of each GPU, weights and cache together
    cuda_graphs: bool = True
    keel_dsa: bool = False  # whether a deepseek_v32 model attends with our kernels (rollout.vllm_dsa) or vLLM's
    batch_invariant: bool = False  # whether a reply's bits are the same in any company; sparse models need keel_dsa
    selections: bool = False  # whether requests get what sparse attention selected; needs keel_dsa
    kept: bool = True  # whether requests get their kept sets
    sleeps: bool = False  # whether its memory can be given up between updates
    structured: bool = False  # whether requests may have a schema, for which vLLM needs the model's tokenizer
    seed: int = 0  # a different one for every engine
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES where Ray did not assign them; those of the ranks it shares with


class VllmEngineActor:
    """Made a Ray actor by `rollout.pool`; call :meth:`load` before anything else."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}  # of what an update brings
        self._has_workers = False  # whether GPUs have processes of their own, below vLLM's
        self._verifier = Verifier()
        self._version = 0
        self._updating = False
        self._finishing: asyncio.Future[list[Answer]] | None = None  # of an update of which everything was received
        self._asleep = False
        self._in_flight: dict[str, str] = {}  # ids of requests, and what vLLM calls them
        self._numbers = itertools.count()
        self._num_prompt = 0
        self._standing = False  # whether nothing is generated: from a sleep or an update's begin until it goes on
        self._busy_s = 0.0
        self._busy_since: float | None = None

    async def load(self, model_path: str, settings: EngineSettings, *, version: int = 0) -> None:
        """Starts vLLM with the weights in a Hugging Face directory.

        Raises RecipeError when vLLM is not installed or there is no GPU, DataError for a directory without a model.
        """
        try:
            model = outline(model_path)
        except ValueError as error:
            raise DataError(f"the model in {model_path} cannot be loaded: {error}") from error
        index_topk = _returned_topk(model, settings)
        if index_topk is not None and not model.moe_layers:
            raise RecipeError(
                "objective.keep_selection needs a model with experts under vLLM, which returns what attention selected "
                "along with them; set it to false"
            )
        self._recording = Recording.of(
            model, kept=settings.kept, max_context=settings.max_context, index_topk=index_topk
        )
        self._shapes = {name: spec.shape for name, spec in model.tensors.items()}
        self._has_workers = settings.tensor_parallel > 1
        self._counters, self._engine = _start(model_path, model, settings)
        await self._ask(self._engine.collective_rpc("expect_updates", args=(self._shapes,)))
        await self._relabel(version)
        # What is there now stays: a pass of the collector over it takes a tenth of a second, amid everybody's replies.
        gc.collect()
        gc.freeze()

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        for request in requests:
            check_request(request, self._recording)
            if request.id in self._in_flight:
                raise ValueError(f"request {request.id}: the id is in use")
        self._num_prompt += sum(len(request.token_ids) for request in requests)
        return list(await asyncio.gather(*map(self._generate, requests)))

    async def abort(self, request_ids: Sequence[str] | None = None) -> int:
        named = [theirs for ours, theirs in self._in_flight.items() if request_ids is None or ours in request_ids]
        await self._engine.abort(named)
        return len(named)

    async def join_transfer(self, *, host: str, port: int, first_rank: int, size: int, timeout_s: float):
        """Enters the learner's group, of ``size`` processes, with this engine's workers from ``first_rank`` on."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest  # pyright: ignore[reportMissingImports]

        info = {
            "host": host,
            "port": port,
            "first_rank": first_rank,
            "size": size,
            "timeout_s": timeout_s,
        }
        await self._ask(self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info)))

    async def take_broadcast(self, version: int) -> dict[str, int]:
        """Everything from :meth:`begin_update` to :meth:`commit`, with all that comes over the group."""
        await self._make_way()
        # Nothing may be generated with half of it: what follows waits until it is known to be whole.
        answers = await self._of_workers("take_broadcast")
        await asyncio.gather(*self._going_on(version))
        return await self._put_into_effect(answers)

    async def begin_update(self) -> None:
        """Stops between two decode steps, or takes back memory for weights; what is being generated goes on later."""
        self._forget_finishing()
        await self._make_way()
        await self._ask(self._engine.start_weight_update())
        self._updating = True

    async def receive(self, offer: Mapping[str, Any]) -> None:
        """Loads the weights that ``offer`` describes (`trainer.sender`)."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest  # pyright: ignore[reportMissingImports]

        request = WeightTransferUpdateRequest(update_info=dict(offer))
        loading = asyncio.ensure_future(self._ask(self._engine.update_weights(request)))
        if offer.get("stays"):
            # It is all: vLLM goes on to what a commit asks for, and adds up while the driver hears of this.
            self._finishing = asyncio.ensure_future(self._of_workers("finish_update"))
        try:
            await loading
        except BaseException:
            self._forget_finishing()
            raise

    async def commit(self, version: int) -> dict[str, int]:
        """As `Engine.commit`, with two differences that are vLLM's.

        An update is the whole model: vLLM rewrites a layer from what it is sent, so a tensor that is left out would
        not keep its value. And sequences in flight are prefilled again with the new weights, prompt and reply.
        """
        if not self._updating:
            raise ValueError("weight update: nothing was received")
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            answers = await finishing  # most likely there already; without it nothing goes on
            await asyncio.gather(*self._going_on(version))
        else:
            # vLLM does them in this order, one after the other.
            answers, *_ = await asyncio.gather(self._of_workers("finish_update"), *self._going_on(version))
        self._updating = False
        return await self._put_into_effect(answers)

    async def checksums(self) -> dict[str, int]:
        """`model.checksums` of what the last update brought, from the live parameters of all workers.

        A tensor that the workers do not hold completely and consistently is left out.
        """
        return self._verifier.checksums(await self._of_workers("held_weights"))

    async def update_way(self) -> str:
        """Why the last update went through vLLM's loader; empty when it was written straight into the parameters."""
        return next(filter(None, await self._ask(self._engine.collective_rpc("update_way"))), "")

    async def sleep(self, *, keep_weights: bool = False) -> None:
        """Gives up the memory of cache and weights; sequences in flight wait, and are prefilled again afterwards.

        Weights come back with :meth:`wake` only where they were kept, in host memory; else with the next update.
        """
        if not self._asleep:
            if not keep_weights:
                await self._ask(self._engine.collective_rpc("keep_beside_update", args=(self._shapes,)))
            await self._ask(self._engine.sleep(level=1 if keep_weights else 2, mode="keep"))
            self._asleep = True
            self._stand(True)

    async def wake(self) -> None:
        """Undoes a sleep that kept the weights."""
        if self._asleep:
            await self._rise(["weights", "kv_cache"])
            self._asleep = False
            self._stand(False)

    async def peak_memory_gb(self) -> float:
        """The most that any of the engine's GPUs has had reserved, in units of 1e9 bytes."""
        return max(await self._ask(self._engine.collective_rpc("peak_memory_gb")))

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
            if self._asleep and not self._has_workers:
                # Asked to end, it would release again what it gave up when it fell asleep, and log an error of CUDA.
                # Workers would end by themselves where vLLM's process is killed, and log it all the same.
                for process in self._engine.engine_core.resources.engine_manager.processes:
                    process.kill()
            self._engine.shutdown()
            self._engine = None
            gc.unfreeze()

    async def _generate(self, request: Request) -> Completion:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # pyright: ignore[reportMissingImports]

        sampling = SamplingParams(
            **sampling_arguments(request, self._recording),
            structured_outputs=None if request.schema is None else StructuredOutputsParams(json=request.schema),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": request.token_ids.tolist()}
        key, records = str(next(self._numbers)), self._counters.records
        records.open(key, request.token_ids)
        self._enter(request.id, name := f"{key}.{request.id}")
        try:
            # Lower numbers go first.
            asked = self._engine.generate(prompt, sampling, name, priority=-1 if request.urgent else 0)
            output = (await self._ask(_all(asked)))[-1].outputs[0]
            record = await records.take(key, len(output.token_ids), width=self._recording.row_bytes)
        finally:
            self._leave(request.id)
            records.close(key)
        return to_completion(output, record, request, self._recording)

    def _forget_finishing(self) -> None:
        """Of an update that broke off before its commit."""
        if self._finishing is not None:
            self._finishing.cancel()  # asyncio tells of a failure that nobody asked for otherwise
            self._finishing = None

    async def _of_workers(self, method: str) -> list[Answer]:
        answers = await self._ask(self._engine.collective_rpc(method, args=(self._verifier.known,)))
        return [Answer(*fields) for fields in answers]

    async def _ask(self, answer: Awaitable[T]) -> T:
        """What vLLM's own processes answer. Raises EngineDied when they are dead."""
        from vllm.v1.engine.exceptions import EngineDeadError  # pyright: ignore[reportMissingImports]

        try:
            return await answered(answer, lambda: self._engine.errored)
        except EngineDeadError as error:
            raise EngineDied(_DEAD) from error

    def _enter(self, request_id: str, name: str) -> None:
        self._in_flight[request_id] = name
        self._settle_clock()

    def _leave(self, request_id: str) -> None:
        del self._in_flight[request_id]
        self._settle_clock()

    def _stand(self, standing: bool) -> None:
        self._standing = standing
        self._settle_clock()

    def _settle_clock(self) -> None:
        """Runs it while there are requests that are worked on."""
        if self._in_flight and not self._standing:
            self._busy_since = self._busy_since or time.perf_counter()
        elif self._busy_since is not None:
            self._busy_s += time.perf_counter() - self._busy_since
            self._busy_since = None

    async def _make_way(self) -> None:
        """For new weights."""
        if self._asleep:
            await self._rise(["weights"])
        else:
            # Not by pause_generation, which waits 20 ms more, only for outputs that are on their way to this process.
            await self._ask(self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True))
            self._stand(True)

    def _going_on(self, version: int) -> list[Awaitable[Any]]:
        """What vLLM is asked for when the weights of this version are there."""
        resumed = [] if self._asleep else [self._ask(self._engine.resume_generation())]
        return [self._relabel(version), *resumed]

    async def _put_into_effect(self, answers: Sequence[Answer]) -> dict[str, int]:
        """The rest, and the checksums of what workers answered."""
        sums = self._verifier.checksums(answers)
        if self._asleep:
            await self._rise(["kv_cache"])
            self._asleep = False
        self._stand(False)
        return sums

    async def _rise(self, tags: list[str]) -> None:
        """Takes back memory that was given up; vLLM goes on by itself when nothing is missing any more."""
        # So workers wake before it, while nothing writes into the caches.
        await self._ask(self._engine.collective_rpc("wake_with_clean_memory", args=(tags,)))
        await self._ask(self._engine.wake_up(tags))

    async def _relabel(self, version: int) -> None:
        """Tokens sampled from now on carry this version."""
        await self._ask(self._engine.update_weight_version(str(version)))
        self._version = version


async def answered(answer: Awaitable[T], died: Callable[[], bool]) -> T:
    """The answer of processes that may die. Raises EngineDied soon after they ``died`` without one.

    A process that is about to die takes what it is asked and never answers, and vLLM does not tell who waits.
    """
    asked = asyncio.ensure_future(answer)
    try:
        while not asked.done():
            if died():
                raise EngineDied(_DEAD)
            await asyncio.wait([asked], timeout=_LOOK_S)
        return asked.result()
    finally:
        asked.cancel()


async def _all(outputs: Any) -> list[Any]:
    return [output async for output in outputs]


def _start(model_path: str, model: ModelOutline, settings: EngineSettings) -> tuple[StepCounters, Any]:
    """vLLM's AsyncLLM, and the counters it feeds."""
    os.environ.update(_ENVIRONMENT | multicast_settings(os.environ))
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(settings.batch_invariant))
    # vLLM looks at a model class of ours in processes that only know of paths from here.
    root = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at every update of parts that have no weights
    os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds; its bars come as lines of their own through Ray
    if settings.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = settings.gpus
    if not torch.cuda.is_available():
        raise RecipeError("rollout.engine: vllm needs a GPU, but its process sees none; use rollout.engine=torch")
    end_with_this_process()
    try:
        from vllm import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

        from rollout.vllm_counters import StepCounters
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"rollout.engine: vllm needs the gpu extra (module {error.name} is missing): pip install -e '.[gpu]'"
        ) from error
    arguments = AsyncEngineArgs(**engine_arguments(model_path, model, settings))
    engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[StepCounters])
    (counters,) = engine.logger_manager.stat_loggers
    return counters, engine


def multicast_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep vLLM from NVLink multicast where NCCL must do without it (``NCCL_NVLS_ENABLE=0``)."""
    return _WITHOUT_MULTICAST if environment.get("NCCL_NVLS_ENABLE") == "0" else {}


def _returned_topk(model: ModelOutline, settings: EngineSettings) -> int | None:
    """The model's index_topk, where requests are to get what it selects and a context has anything to leave out."""
    returns = settings.selections and model.index_topk is not None and settings.max_context > model.index_topk
    return model.index_topk if returns else None


def engine_arguments(model_path: str, model: ModelOutline, settings: EngineSettings) -> dict[str, Any]:
    """The keyword arguments of vLLM's AsyncEngineArgs."""
    parallel = settings.tensor_parallel > 1
    return {
        "model": model_path,
        "load_format": "safetensors",  # others are pickles
        "trust_remote_code": False,
        "skip_tokenizer_init": not settings.structured,
        "generation_config": "vllm",  # the directory's own would add stop tokens
        "dtype": settings.dtype,
        "hf_overrides": _ROUTER if model.architecture in _CONFIGURED_ROUTERS else {},
        "seed": settings.seed,
        "max_model_len": settings.max_context,
        "max_num_seqs": settings.max_num_seqs,
        "scheduler_cls": "rollout.vllm_recording.RecordingScheduler",
        "async_scheduling": True,  # which that one is for
        "scheduling_policy": "priority",  # requests of equal priority in the order of their arrival
        "tensor_parallel_size": settings.tensor_parallel,
        "enable_expert_parallel": settings.expert_parallel and parallel and bool(model.moe_layers),
        # Inside a placement group vLLM would choose Ray, and ask it for GPUs that this process already holds.
        "distributed_executor_backend": "mp" if parallel else "uni",
        "gpu_memory_utilization": settings.gpu_memory,
        "enforce_eager": not settings.cuda_graphs,
        "model_class_overrides": _OURS if settings.keel_dsa else {},
        "additional_config": {"keel_selections": True} if _returned_topk(model, settings) else {},  # as vllm_dsa asks
        "enable_sleep_mode": settings.sleeps,
        "enable_return_routed_experts": bool(model.moe_layers),
        "return_sampling_mask": settings.kept,
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": "keel"},  # rollout.vllm_transfer
        "worker_extension_cls": "rollout.vllm_worker.WeightReader",
        "disable_log_stats": True,  # the default loggers, not ours
    }
