"""Whether a plan fits its machines, and the smallest change to the recipe that would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from model.costs import ModelCosts
from rl.choices import EngineKind, Offload, Placement
from rl.config import Recipe
from rl.errors import RecipeError
from rl.hardware import GIB, Hardware
from rl.placement import engines_sleep
from rl.plan import Plan, gpus_needed, judge_gpus, make_plan
from rl.recipe_checks import violations

Changes = dict[str, Any]
"""``{"learner.zero_stage": 3}``"""


ESTIMATE_SLACK = 0.15
"""How far an estimate may lie above what there is before a run is refused for it."""


def check_plan(recipe: Recipe, costs: ModelCosts, hardware: Hardware, *, slack: float = 0.0) -> Plan:
    """The plan, if it fits into ``1 + slack`` times the memory that there is.

    Raises:
        RecipeError: it does not; names the key, what is needed, what there is, and the first change that would do.
    """
    plan = make_plan(recipe, costs, hardware)
    for key, sentence in problems(plan, slack=slack):
        raise RecipeError(f"{key}: {sentence}{_remedy(plan) if hardware.num_gpus or not plan.num_gpus else ''}")
    return plan


def problems(plan: Plan, *, slack: float = 0.0) -> Iterator[tuple[str, str]]:
    """Everything that does not fit, as the key at fault and a sentence."""
    recipe, hardware = plan.recipe, plan.hardware
    if plan.worker is not None and plan.costs.quantized:
        yield "model.path", "the weights are stored quantized, but engines are updated in bfloat16; convert them first"
    if plan.worker is not None and hardware.num_gpus == 0:
        yield "rollout.engine", "vllm needs a GPU, but there is none; use rollout.engine=torch on CPUs"
        return
    if plan.num_gpus > hardware.num_gpus:
        parts = _gpu_sum(recipe)
        yield "placement", f"the run needs {plan.num_gpus} GPUs ({parts}), but there are {hardware.num_gpus}"
    if plan.num_gpus == 0:
        yield from _host_problems(plan, 1 + slack)
        return
    per_node = hardware.gpus_per_node
    if plan.worker is not None and 0 < per_node < recipe.rollout.tensor_parallel:
        parallel = recipe.rollout.tensor_parallel
        yield "rollout.tensor_parallel", f"an engine spans {parallel} GPUs, but a node has {per_node}"
    yield from _gpu_problems(plan, 1 + slack)
    yield from _host_problems(plan, 1 + slack)


def _gpu_problems(plan: Plan, room: float) -> Iterator[tuple[str, str]]:
    capacity, worker = plan.hardware.gpu_bytes, plan.worker
    if worker is not None and worker.cache_bytes + (room - 1) * worker.fixed_bytes < worker.sequence_bytes:
        yield (
            "rollout.gpu_memory",
            f"an engine's share of a GPU is {worker.share_bytes / GIB:.1f} GiB, of which weights and workspace take "
            f"{worker.fixed_bytes / GIB:.1f}, too much to cache one sequence of model.max_context {worker.max_context}",
        )
    if plan.learning_bytes > room * capacity:
        beside = " beside an engine" if plan.shared else ""
        yield (
            "learner",
            f"a rank needs {plan.rank.peak_bytes / GIB:.1f} GiB at the peak of {plan.rank.peak}{beside}, and a GPU has "
            f"{capacity / GIB:.1f} GiB" + (f", of which an engine keeps {_kept(plan):.1f}" if plan.shared else ""),
        )
    elif plan.generating_bytes > room * capacity and plan.shared:
        rank = plan.rank.resident_bytes - plan.rank.slept
        yield (
            "rollout.gpu_memory",
            f"an engine takes {plan.recipe.rollout.gpu_memory:g} of a GPU beside a rank that keeps {rank / GIB:.1f} of "
            f"its {capacity / GIB:.1f} GiB while it generates",
        )


def _host_problems(plan: Plan, room: float) -> Iterator[tuple[str, str]]:
    needed, there = sum(item.num_bytes for item in plan.host), plan.hardware.host_bytes
    if there is not None and needed > room * there:
        largest = max(plan.host, key=lambda item: item.num_bytes)
        yield (
            "learner.ranks",
            f"a node needs {needed / GIB:,.0f} GiB of host memory, most of it for {largest.name} ({largest.how}), but "
            f"has {there / GIB:,.0f} GiB",
        )


def _kept(plan: Plan) -> float:
    return (plan.learning_bytes - plan.rank.peak_bytes) / GIB


def _gpu_sum(recipe: Recipe) -> str:
    rollout, ranks, judges = recipe.rollout, recipe.learner.ranks, judge_gpus(recipe)
    and_judge = f" + {judges} for the judge" if judges else ""
    if rollout.engine != EngineKind.vllm:
        return f"learner.ranks {ranks}{and_judge}"
    workers = f"rollout.engines {rollout.engines} x tensor_parallel {rollout.tensor_parallel}"
    if recipe.placement == Placement.shared:
        return f"the larger of learner.ranks {ranks} and {workers}{and_judge}"
    return f"learner.ranks {ranks} + {workers}{and_judge}"


def _remedy(plan: Plan) -> str:
    """ "; <changes> would fit", naming the first that do, with the GPUs they take; "" where none does."""
    engine, rank = list(_for_engines(plan)), list(_for_ranks(plan))
    pairs = [(one, other) for one in range(len(engine)) for other in range(len(rank))]
    for one, other in sorted(pairs, key=sum):
        changes = engine[one] | rank[other]
        candidate = with_keys(plan.recipe, changes)
        if not changes or any(violations(candidate)):
            continue
        hardware = _with_room(plan, gpus_needed(candidate, on_gpus=plan.num_gpus > 0))
        # Where GPUs are what is missing, the sentence has already said how many would do.
        if plan.num_gpus > plan.hardware.num_gpus < hardware.num_gpus:
            continue
        if not any(problems(make_plan(candidate, plan.costs, hardware))):
            words = " ".join(f"{name}={_spelt(value)}" for name, value in changes.items())
            more = f" on {hardware.num_gpus} GPUs" if hardware.num_gpus > plan.hardware.num_gpus else ""
            return f"; {words}{more} would fit"
    return ""


def with_keys(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with ``{"block.key": value}`` replaced."""
    for name, value in changes.items():
        block, _, key = name.rpartition(".")
        inner = dataclasses.replace(getattr(recipe, block), **{key: value}) if block else value
        recipe = dataclasses.replace(recipe, **{block or key: inner})
    return recipe


def _with_room(plan: Plan, num_gpus: int) -> Hardware:
    """The plan's machines, more of them where ``num_gpus`` are more than there are."""
    there = plan.hardware
    if num_gpus <= there.num_gpus:
        return there
    return dataclasses.replace(there, num_gpus=num_gpus, num_nodes=math.ceil(num_gpus / max(1, there.gpus_per_node)))


def _for_engines(plan: Plan) -> Iterator[Changes]:
    """What gives engines room or a place, the cheapest first."""
    recipe, worker, capacity = plan.recipe, plan.worker, plan.hardware.gpu_bytes
    yield {}
    if worker is None:
        return
    least = worker.fixed_bytes + 2 * worker.max_context * worker.cache_bytes_per_token
    least_share = math.ceil(100 * least / capacity) / 100
    if plan.shared:
        beside = plan.rank.resident_bytes - plan.rank.slept if engines_sleep(recipe) else plan.rank.peak_bytes
        if capacity > beside:
            yield {"rollout.gpu_memory": math.floor(100 * (capacity - beside) / capacity) / 100}
        yield {"rollout.gpu_memory": least_share}
    else:
        yield {"rollout.gpu_memory": 0.9}
        if plan.num_gpus > plan.hardware.num_gpus:
            yield {"placement": Placement.shared}
            yield {"placement": Placement.shared, "rollout.gpu_memory": least_share}
    parallel = 2 * recipe.rollout.tensor_parallel
    while parallel <= plan.hardware.gpus_per_node:
        yield {"rollout.tensor_parallel": parallel}
        parallel *= 2
    for gpus, placement in _gpus_of_a_side(plan).items():
        fewer = min(recipe.rollout.engines, gpus // recipe.rollout.tensor_parallel)
        share = least_share if placement == Placement.shared else 0.9
        if fewer:
            yield {"placement": placement, "rollout.engines": fewer, "rollout.gpu_memory": share}


def _for_ranks(plan: Plan) -> Iterator[Changes]:
    """What makes a rank smaller: alone, then together, then with more ranks."""
    recipe = plan.recipe
    learner = recipe.learner
    yield {}
    alone: list[Changes] = []
    if not learner.activation_checkpointing:
        alone.append({"learner.activation_checkpointing": True})
    if learner.micro_tokens > recipe.model.max_context:
        alone.append({"learner.micro_tokens": recipe.model.max_context})
    if learner.zero_stage < 3 and learner.ranks > 1:
        alone.append({"learner.zero_stage": 3})
    yield from alone
    if learner.offload_optimizer == Offload.none and learner.zero_stage:
        yield {"learner.offload_optimizer": Offload.cpu, "learner.sleep": False}
    together: Changes = {}
    for change in alone:
        together |= change
    yield together
    offloaded: Changes = {}
    if learner.offload_optimizer == Offload.none and learner.zero_stage:
        offloaded = {"learner.offload_optimizer": Offload.cpu, "learner.sleep": False}
        yield together | offloaded
    for gpus in _gpus_of_a_side(plan):
        if 0 < gpus < learner.ranks:
            yield {"learner.ranks": gpus}
            yield together | {"learner.ranks": gpus}
            yield together | offloaded | {"learner.ranks": gpus}
    for doubling in range(1, 11):
        yield together | {"learner.ranks": learner.ranks << doubling, "learner.zero_stage": 3}


def _gpus_of_a_side(plan: Plan) -> dict[int, Placement]:
    """Where there are fewer GPUs than the run asks for, those that engines, and likewise ranks, may have then."""
    there = plan.hardware.num_gpus - judge_gpus(plan.recipe)
    if plan.num_gpus <= plan.hardware.num_gpus or there < 1:
        return {}
    sides = {there: Placement.shared}
    return sides if plan.shared else {there // 2: Placement.split} | sides


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))
