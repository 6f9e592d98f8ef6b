"""What makes the engines' actors, and what their ``load`` takes, for each kind of engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from rl.choices import Dsa, EngineKind
from rl.config import Recipe
from rl.errors import RecipeError
from rl.placement import engines_sleep, gpu_shares, serves_judge, threads_needed
from rollout.actor import EngineActor
from rollout.engine import truncates
from rollout.vllm_engine import EngineSettings, VllmEngineActor

_MAX_CONCURRENT_CALLS = 100_000  # a call waits for its whole generation, and weight updates must not queue behind

Maker = tuple[Callable[[], Any], dict[str, Any]]
"""What makes an actor, any number of times, and the keyword arguments of its ``load``."""


def engine_makers(
    recipe: Recipe,
    device: str,
    actor_options: Sequence[Mapping[str, Any]],
    gpus: Sequence[str | None],
    *,
    structured: bool = False,
) -> list[Maker]:
    """One an engine; see :meth:`rollout.pool.EnginePool.start`. Raises RecipeError where there is no room for them."""
    _check_room(recipe)
    if recipe.rollout.engine == EngineKind.vllm:
        return _vllm_engines(recipe, actor_options, gpus, structured=structured)
    return _torch_engines(recipe, device, structured=structured)


def _torch_engines(recipe: Recipe, device: str, *, structured: bool) -> list[Maker]:
    """Embedded engines."""
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
        "record_selections": recipe.objective.keep_selection,
        "structured": structured,
    }
    return [(actor.remote, arguments) for _ in range(rollout.engines)]


def _vllm_engines(
    recipe: Recipe, actor_options: Sequence[Mapping[str, Any]], gpus: Sequence[str | None], *, structured: bool
) -> list[Maker]:
    """vLLM engines."""
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
            selections=recipe.objective.keep_selection,
            kept=recipe.objective.keep_sampling_mask and truncates(recipe.sampling),
            sleeps=engines_sleep(recipe),
            structured=structured,
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
            ).remote,
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
        judging = (
            "" if not serves_judge(recipe) else f", judge.engines {judge.engines} with judge.threads {judge.threads}"
        )
        raise RecipeError(
            f"rollout.engines {rollout.engines} with rollout.threads {rollout.threads} and learner.ranks "
            f"{learner.ranks} with learner.threads {learner.threads}{judging} need {needed} CPUs, but the Ray cluster "
            f"has {room:.0f}"
        )
