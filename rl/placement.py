"""How many GPUs each actor of a run asks Ray for, and whether the cluster has them."""

from __future__ import annotations

from dataclasses import dataclass

from rl.config import EngineKind, Placement, Recipe
from rl.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShares:
    """GPUs of one actor of each kind; a fraction where two share one."""

    rank: float
    engine: float


def gpu_shares(recipe: Recipe, num_gpus: float) -> GpuShares:
    """The GPUs of a learner rank and of an engine, on a cluster that has ``num_gpus``.

    A cluster without GPUs trains and generates on CPUs; so does the torch engine wherever it runs.

    Raises:
        RecipeError: the recipe needs GPUs that are not there; says how many, and why.
    """
    rollout, ranks = recipe.rollout, recipe.learner.ranks
    vllm = rollout.engine == EngineKind.vllm
    if num_gpus == 0:
        if vllm:
            raise RecipeError(
                "rollout.engine: vllm needs a GPU, but the Ray cluster has none; use rollout.engine=torch on CPUs"
            )
        return GpuShares(rank=0, engine=0)
    shared = vllm and recipe.placement == Placement.shared
    shares = GpuShares(rank=0.5, engine=0.5) if shared else GpuShares(rank=1, engine=rollout.tensor_parallel * vllm)
    needed = ranks * shares.rank + rollout.engines * shares.engine
    if needed > num_gpus and not vllm:
        raise RecipeError(f"learner.ranks {ranks} need a GPU each, but the Ray cluster has {num_gpus:g}")
    if needed > num_gpus:
        hint = "" if shared else "; placement=shared puts a rank and an engine on one GPU"
        raise RecipeError(
            f"placement: learner.ranks {ranks} and rollout.engines {rollout.engines} x tensor_parallel "
            f"{rollout.tensor_parallel} need {needed:g} GPUs, but the Ray cluster has {num_gpus:g}{hint}"
        )
    return shares
