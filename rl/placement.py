"""Which GPUs each actor of a run gets, and whether the cluster has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl.choices import EngineKind, Placement
from rl.config import Recipe
from rl.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShares:
    """GPUs that one actor of each kind asks Ray for. An engine that shares asks for none: its ranks hold them."""

    rank: float
    engine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Resources that have to be on one node."""

    gpus: float
    cpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """Where the actors of a run on GPUs go: indices of ``bundles``, by rank and by engine."""

    bundles: tuple[Bundle, ...]
    rank_seats: tuple[int, ...]
    engine_seats: tuple[int, ...]


def threads_needed(recipe: Recipe) -> int:
    """CPU threads that the actors of a run ask Ray for: learner ranks, engines, and the judge's engines, if any."""
    learner, rollout, judge = recipe.learner, recipe.rollout, recipe.judge
    judging = judge.engines * judge.threads if serves_judge(recipe) else 0
    return learner.ranks * learner.threads + rollout.engines * rollout.threads + judging


def serves_judge(recipe: Recipe) -> bool:
    """Whether the run has a judge of its own, on engines of its own."""
    return recipe.judge.path is not None or recipe.judge.init is not None


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
    shares = GpuShares(rank=1, engine=rollout.tensor_parallel if vllm and not shared else 0)
    needed = ranks * shares.rank + rollout.engines * shares.engine
    if needed > num_gpus and (shared or not vllm):
        raise RecipeError(f"learner.ranks {ranks} need a GPU each, but the Ray cluster has {num_gpus:g}")
    if needed > num_gpus:
        raise RecipeError(
            f"placement: learner.ranks {ranks} and rollout.engines {rollout.engines} x tensor_parallel "
            f"{rollout.tensor_parallel} need {needed:g} GPUs, but the Ray cluster has {num_gpus:g}; placement=shared "
            "lets ranks and engines share them"
        )
    return shares


def engines_sleep(recipe: Recipe) -> bool:
    """Whether engines give their memory, of GPUs or of the host, to the learner while it steps."""
    return recipe.placement == Placement.shared and recipe.rollout.sleep


def seats(recipe: Recipe, node_gpus: Sequence[float]) -> Seats | None:
    """Where ranks and vLLM engines go on nodes that have so many GPUs each; None when Ray may choose freely.

    An engine's GPUs are on one node. Where GPUs are shared, engine e has those of ranks e * tensor_parallel to
    (e + 1) * tensor_parallel - 1.

    Raises:
        RecipeError: the GPUs are not there, or no node has enough of them for an engine.
    """
    shares = gpu_shares(recipe, sum(node_gpus))
    rollout, learner = recipe.rollout, recipe.learner
    if rollout.engine != EngineKind.vllm:
        return None
    width = rollout.tensor_parallel
    if sum(gpus // width for gpus in node_gpus) < rollout.engines:
        raise RecipeError(
            f"rollout.tensor_parallel {width}: an engine's GPUs must be on one node, and the nodes' "
            f"{', '.join(f'{gpus:g}' for gpus in node_gpus)} GPUs hold fewer than rollout.engines {rollout.engines}"
        )
    if recipe.placement == Placement.shared:
        bundle = Bundle(gpus=width * shares.rank, cpus=width * learner.threads + rollout.threads)
        return Seats(
            bundles=(bundle,) * rollout.engines,
            rank_seats=tuple(rank // width for rank in range(learner.ranks)),
            engine_seats=tuple(range(rollout.engines)),
        )
    # Engines first: they are the larger pieces.
    engines = (Bundle(gpus=shares.engine, cpus=rollout.threads),) * rollout.engines
    ranks = (Bundle(gpus=shares.rank, cpus=learner.threads),) * learner.ranks
    return Seats(
        bundles=engines + ranks,
        rank_seats=tuple(range(rollout.engines, rollout.engines + learner.ranks)),
        engine_seats=tuple(range(rollout.engines)),
    )


def shared_gpus(rank_gpus: Sequence[str], width: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of every engine, of ``width`` GPUs each, from those of the ranks that it shares with."""
    return [",".join(rank_gpus[first : first + width]) for first in range(0, len(rank_gpus), width)]
