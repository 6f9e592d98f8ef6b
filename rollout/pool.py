"""The driver's side of generation: engines as Ray actors, and groups of samples out of prompts."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from model.tokenizer import load_tokenizer
from rl.config import Dsa, EngineKind, Recipe, Sampling
from rl.errors import RecipeError, RunStopped
from rl.placement import engines_sleep, gpu_shares, threads_needed
from rl.sample import NDArray, Prompt, Sample
from rl.timeline import Timeline
from rollout.actor import EngineActor
from rollout.conversation import Conversation
from rollout.engine import Completion, EngineStats, Request, check_window, truncates
from rollout.engine_lane import EngineLane
from rollout.samples import to_sample
from rollout.vllm_engine import EngineSettings, VllmEngineActor

_MAX_CONCURRENT_CALLS = 100_000  # a call waits for its whole generation, and weight updates must not queue behind
_SHUTDOWN_S = {EngineKind.torch: 5.0, EngineKind.vllm: 20.0}


class EnginePool:
    """N engines behind one async interface; :meth:`start` makes one, :meth:`close` ends its actors.

    Every method raises RunStopped, naming the engine, when an engine's process has died.
    """

    def __init__(
        self,
        engines: Sequence[Any],
        *,
        conversation: Conversation,
        max_context: int,
        workers_per_engine: int = 1,
        sleeps: bool = False,
        shutdown_s: float = 0.0,
        timeline: Timeline | None = None,
    ) -> None:
        """``shutdown_s``: seconds that :meth:`close` gives engines to come to rest and end what they started."""
        self.max_context = max_context
        self._workers_per_engine = workers_per_engine
        self._sleeps = sleeps
        self._shutdown_s = shutdown_s
        self._conversation = conversation
        self._engines = list(engines)
        timeline = timeline or Timeline()
        self._lanes = [EngineLane(f"engine {index}", timeline) for index in range(len(engines))]
        self._load = [0] * len(engines)  # sequences dispatched and not yet returned, and episodes that are seated
        self._numbers = itertools.count()

    @classmethod
    async def start(
        cls,
        recipe: Recipe,
        model_path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        version: int = 0,
        actor_options: Sequence[Mapping[str, Any]] = (),
        gpus: Sequence[str | None] = (),
        timeline: Timeline | None = None,
    ) -> EnginePool:
        """Starts `rollout.engines` engines that generate with the weights and the tokenizer in `model_path`.

        `device` is the torch engine's. Of a vLLM engine, `actor_options` say where Ray puts it, and `gpus` which GPUs
        it takes where Ray does not assign them (`rl.placement`); both have one entry an engine or none.
        """
        conversation = Conversation(load_tokenizer(model_path))
        vllm = recipe.rollout.engine == EngineKind.vllm
        _check_room(recipe)
        engines = _vllm_engines(recipe, actor_options, gpus) if vllm else _torch_engines(recipe, device)
        pool = cls(
            [engine for engine, _ in engines],
            conversation=conversation,
            max_context=recipe.model.max_context,
            workers_per_engine=recipe.rollout.tensor_parallel,
            sleeps=engines_sleep(recipe),
            shutdown_s=_SHUTDOWN_S[recipe.rollout.engine],
            timeline=timeline,
        )
        directory = str(Path(model_path).absolute())
        try:
            await asyncio.gather(
                *(
                    pool._call(index, "load", directory, **arguments, version=version)
                    for index, (_, arguments) in enumerate(engines)
                )
            )
        except BaseException:
            pool.close()
            raise
        return pool

    async def generate_group(
        self,
        prompt: Prompt,
        token_ids: NDArray,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        urgent: bool = False,
    ) -> list[Sample]:
        """One sample per seed, in order, continuing `token_ids` (int32 [P]); all from the least loaded engine.

        `urgent` ones do not queue behind what waits there.

        Raises DataError naming the prompt when it does not fit the context window. When the caller is cancelled, its
        sequences are aborted.
        """
        check_window(f"prompt {prompt.id}", len(token_ids), self.max_context)
        number = next(self._numbers)
        requests = [
            Request(
                id=f"{prompt.id}#{index} (call {number})",
                token_ids=token_ids.astype(np.int32, copy=False),
                sampling=sampling,
                seed=seed,
                stop_token_ids=self._conversation.stop_token_ids,
                urgent=urgent,
            )
            for index, seed in enumerate(seeds)
        ]
        completions = await self._dispatch(requests)
        return [
            to_sample(prompt, index, request, completion, self._conversation.decode(completion.token_ids))
            for index, (request, completion) in enumerate(zip(requests, completions, strict=True))
        ]

    @contextmanager
    def seat(self, num_sequences: int) -> Iterator[Callable[[Request], Awaitable[Completion]]]:
        """A function that completes requests on one engine, the least loaded one when the block is entered.

        For episodes: their next request begins with the tokens of the last one, which that engine may have cached. The
        engine counts as loaded with `num_sequences` until the block is left. A request that is cancelled is aborted.
        """
        index = self._least_loaded()
        self._load[index] += num_sequences

        async def complete(request: Request) -> Completion:
            (completion,) = await self._generate(index, [request])
            return completion

        try:
            yield complete
        finally:
            self._load[index] -= num_sequences

    async def stage(self, buckets: Sequence[Any]) -> None:
        """Sends buckets of the next weights ({name: CPU tensor}, or references to such) to every engine.

        A bucket is put into the object store once, however many engines there are.
        """
        references = [bucket if isinstance(bucket, ray.ObjectRef) else ray.put(bucket) for bucket in buckets]
        with ExitStack() as spans:
            for lane in self._lanes:
                spans.enter_context(lane.calling("stage"))
            await asyncio.gather(*(self._call_all("stage", reference) for reference in references))

    async def commit(self, version: int) -> list[dict[str, int]]:
        """Puts the staged weights into effect in every engine; returns each engine's checksums of its live tensors."""
        sums = await self._call_all("commit", version)
        for lane in self._lanes:
            lane.serves(version)
        return sums

    @property
    def num_workers(self) -> int:
        """Processes that hold a part of an engine's weights, over all engines."""
        return len(self._engines) * self._workers_per_engine

    async def join_transfer(self, host: str, port: int, *, size: int, timeout_s: float) -> None:
        """Brings all workers into the learner's group, whose rank 0 is the sender."""
        joining = (
            self._call(
                index,
                "join_transfer",
                host=host,
                port=port,
                first_rank=1 + index * self._workers_per_engine,
                size=size,
                timeout_s=timeout_s,
            )
            for index in range(len(self._engines))
        )
        await asyncio.gather(*joining)

    async def begin_update(self) -> None:
        """Makes every engine ready for :meth:`receive`; generation stands still until the commit."""
        await self._call_all("begin_update")

    async def receive(self, offer: Mapping[str, Any] | None = None) -> None:
        """Lets every engine load a bucket that the learner offers, or all that the learner broadcasts."""
        await self._call_all("receive", offer)

    async def sleep(self, *, keep_weights: bool = False) -> None:
        """Lets the engines give up their memory where they share it with the learner; elsewhere does nothing.

        They wake with the next update, or with :meth:`wake` if weights were kept, in host memory.
        """
        if self._sleeps:
            await self._call_all("sleep", keep_weights=keep_weights)

    async def wake(self) -> None:
        """Undoes a sleep that kept the weights."""
        if self._sleeps:
            await self._call_all("wake")

    async def peak_memory_gb(self) -> float:
        """The most that an engine has had reserved on one GPU, in units of 1e9 bytes."""
        return max(await self._call_all("peak_memory_gb"))

    async def abort(self) -> int:
        """Ends everything in flight as aborted samples; returns how many there were."""
        return sum(await self._call_all("abort"))

    async def stats(self) -> list[EngineStats]:
        return await self._call_all("stats")

    def close(self) -> None:
        """Ends the engines' processes.

        They come to rest first: killed between two calls, Ray's async actors may crash and print a page about it.
        """
        if self._shutdown_s:
            ending = [engine.shutdown.remote() for engine in self._engines]
            ray.wait(ending, num_returns=len(ending), timeout=self._shutdown_s)
        for engine, lane in zip(self._engines, self._lanes, strict=True):
            ray.kill(engine)
            lane.close()

    async def _dispatch(self, requests: Sequence[Request]) -> list[Completion]:
        index = self._least_loaded()
        self._load[index] += len(requests)
        try:
            return await self._generate(index, requests)
        finally:
            self._load[index] -= len(requests)

    def _least_loaded(self) -> int:
        return min(range(len(self._engines)), key=self._load.__getitem__)

    async def _generate(self, index: int, requests: Sequence[Request]) -> list[Completion]:
        try:
            with self._lanes[index].generating():
                return await self._call(index, "generate", requests)
        except asyncio.CancelledError:
            self._engines[index].abort.remote([request.id for request in requests])
            raise

    async def _call_all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        calls = (self._call(index, method, *args, **kwargs) for index in range(len(self._engines)))
        return list(await asyncio.gather(*calls))

    async def _call(self, index: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """One call of one engine, with Ray's exceptions turned back into what they stand for."""
        name = f"engine {index} of {len(self._engines)}"
        try:
            with nullcontext() if method == "stage" else self._lanes[index].calling(method):
                return await getattr(self._engines[index], method).remote(*args, **kwargs)
        except RayActorError as error:
            reason = str(error).partition("\n")[0]
            raise RunStopped(f"{name} died during {method}: {reason}") from error
        except RayTaskError as error:
            if isinstance(error.cause, FloatingPointError):
                raise RunStopped(f"{name} cannot generate: {error.cause}") from error
            raise error.cause from error


def _torch_engines(recipe: Recipe, device: str) -> list[tuple[Any, dict[str, Any]]]:
    """One embedded engine an actor, with what its ``load`` takes."""
    rollout, model = recipe.rollout, recipe.model
    actor = ray.remote(EngineActor).options(
        max_concurrency=_MAX_CONCURRENT_CALLS, num_cpus=rollout.threads, num_gpus=0 if device == "cpu" else 1
    )
    arguments = {
        "dtype": model.dtype,
        "device": device,
        "max_num_seqs": rollout.max_num_seqs,
        "max_context": model.max_context,
        "threads": rollout.threads,
    }
    return [(actor.remote(), arguments) for _ in range(rollout.engines)]


def _vllm_engines(
    recipe: Recipe, actor_options: Sequence[Mapping[str, Any]], gpus: Sequence[str | None]
) -> list[tuple[Any, dict[str, Any]]]:
    """One vLLM engine an actor, with what its ``load`` takes."""
    rollout, model = recipe.rollout, recipe.model
    shares = gpu_shares(recipe, ray.cluster_resources().get("GPU", 0))
    actor = ray.remote(VllmEngineActor)

    def settings(index: int) -> EngineSettings:
        return EngineSettings(
            dtype=model.dtype,
            max_num_seqs=rollout.max_num_seqs,
            max_context=model.max_context,
            tensor_parallel=rollout.tensor_parallel,
            expert_parallel=rollout.expert_parallel,
            gpu_memory=rollout.gpu_memory,
            cuda_graphs=rollout.cuda_graphs,
            keel_dsa=rollout.dsa == Dsa.keel,
            batch_invariant=rollout.batch_invariant,
            kept=recipe.objective.keep_sampling_mask and truncates(recipe.sampling),
            sleeps=engines_sleep(recipe),
            seed=recipe.seed + index,  # engines of one seed would draw the same for requests without one
            gpus=gpus[index] if gpus else None,
        )

    return [
        (
            actor.options(
                max_concurrency=_MAX_CONCURRENT_CALLS,
                num_cpus=rollout.threads,
                num_gpus=shares.engine,
                **(actor_options[index] if actor_options else {}),
            ).remote(),
            {"settings": settings(index)},
        )
        for index in range(rollout.engines)
    ]


def _check_room(recipe: Recipe) -> None:
    """Raises RecipeError where engines and learner together need more CPUs than there are: Ray would wait for ever."""
    rollout, learner = recipe.rollout, recipe.learner
    needed = threads_needed(recipe)
    room = ray.cluster_resources().get("CPU", 0)
    if needed > room:
        judge = recipe.judge
        judging = "" if judge.path is None else f", judge.engines {judge.engines} with judge.threads {judge.threads}"
        raise RecipeError(
            f"rollout.engines {rollout.engines} with rollout.threads {rollout.threads} and learner.ranks "
            f"{learner.ranks} with learner.threads {learner.threads}{judging} need {needed} CPUs, but the Ray cluster "
            f"has {room:.0f}"
        )
