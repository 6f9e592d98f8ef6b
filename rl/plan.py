"""The plan of a run: which actor sits on which GPU, what each of them needs of it, and whether it fits.

Built without GPUs and without Ray, from the recipe, the model's config.json and the machines that are given or assumed.
``python -m rl.train RECIPE --plan`` prints it (`rl.plan_text`); a run makes the same plan of the cluster it finds, and
`rl.fit.check_plan` ends it with a sentence where that cannot hold it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from model.costs import ModelCosts, model_costs
from rl.choices import EngineKind, Placement
from rl.config import Recipe
from rl.engine_memory import ASLEEP_BYTES, WorkerMemory, worker_memory
from rl.errors import RecipeError
from rl.hardware import GIB, LOCAL_BYTES_PER_S, Hardware
from rl.initial_model import initial_config
from rl.learner_memory import Item, RankMemory, element_bytes, rank_memory
from rl.placement import engines_sleep, serves_judge
from rl.selections import bytes_per_token, carried_bytes_per_token

GPUS_PER_NODE = 8
"""Of a node that nobody has described."""
HOST_PROCESS_BYTES = 2 * GIB
"""Python, torch and their libraries in one actor's process."""
SAMPLE_BYTES_PER_TOKEN = 14
"""Ids, log-probabilities, versions and flags of a sample's token; routes and kept sets come on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One GPU and who works on it."""

    node: int
    gpu: int  # within its node
    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPlan:
    """One weight update."""

    num_bytes: float
    gather_s: float  # putting partitioned weights together (stage 3)
    send_s: float

    @property
    def seconds(self) -> float:
        return self.gather_s + self.send_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about a run's machines."""

    recipe: Recipe
    costs: ModelCosts
    hardware: Hardware
    num_gpus: int  # that the run needs; 0 where it runs on CPUs
    rank: RankMemory
    worker: WorkerMemory | None  # None with the torch engine
    seats: tuple[Seat, ...]
    sync: SyncPlan
    host: tuple[Item, ...]  # memory of the fullest node

    @property
    def shared(self) -> bool:
        return self.worker is not None and self.recipe.placement == Placement.shared

    @property
    def learning_bytes(self) -> float:
        """What a GPU with a rank holds while the rank steps."""
        if not self.shared or self.worker is None:
            return self.rank.peak_bytes
        engine = min(ASLEEP_BYTES, self.worker.share_bytes) if engines_sleep(self.recipe) else self.worker.share_bytes
        return self.rank.peak_bytes + engine

    @property
    def generating_bytes(self) -> float:
        """What a GPU with an engine's worker holds while it generates."""
        if self.worker is None:
            return 0.0
        beside = self.rank.resident_bytes - self.rank.slept if self.shared else 0.0
        return self.worker.share_bytes + beside


def gpus_needed(recipe: Recipe, *, on_gpus: bool = True) -> int:
    """GPUs of a run: one a rank, ``tensor_parallel`` an engine (the same ones where they are shared), the judge's."""
    rollout, ranks, judges = recipe.rollout, recipe.learner.ranks, judge_gpus(recipe)
    if rollout.engine != EngineKind.vllm:
        return (ranks if on_gpus or judges else 0) + judges
    workers = rollout.engines * rollout.tensor_parallel
    return (max(ranks, workers) if recipe.placement == Placement.shared else ranks + workers) + judges


def judge_gpus(recipe: Recipe) -> int:
    """GPUs of the engines that serve the run's own judge."""
    judge = recipe.judge
    served = judge.url is None and serves_judge(recipe) and judge.engine == EngineKind.vllm
    return judge.engines * judge.tensor_parallel if served else 0


def make_plan(recipe: Recipe, costs: ModelCosts, hardware: Hardware) -> Plan:
    """The plan of a recipe on ``hardware``; it may not fit (see `rl.fit`). No GPUs at all mean CPUs."""
    vllm = recipe.rollout.engine == EngineKind.vllm
    worker = worker_memory(recipe, costs, hardware.gpu_bytes) if vllm else None
    rank = rank_memory(recipe, costs, on_gpu=hardware.num_gpus > 0)
    seats = tuple(_seats(recipe, hardware)) if vllm or hardware.num_gpus else ()
    return Plan(
        recipe=recipe,
        costs=costs,
        hardware=hardware,
        num_gpus=gpus_needed(recipe, on_gpus=hardware.num_gpus > 0),
        rank=rank,
        worker=worker,
        seats=seats,
        sync=_sync(recipe, costs, hardware),
        host=tuple(_host(recipe, costs, rank, worker, seats)),
    )


def assumed_hardware(
    recipe: Recipe, *, num_gpus: int | None, num_nodes: int | None, gpu_bytes: int, host_bytes: int | None = None
) -> Hardware:
    """The machines that were named, and for the rest those that the recipe needs, in nodes of ``GPUS_PER_NODE``."""
    on_gpus = recipe.rollout.engine == EngineKind.vllm or num_gpus is not None
    gpus = gpus_needed(recipe, on_gpus=on_gpus) if num_gpus is None else num_gpus
    nodes = num_nodes or max(1, -(-gpus // GPUS_PER_NODE))
    return Hardware(num_gpus=gpus, num_nodes=nodes, gpu_bytes=gpu_bytes, host_bytes=host_bytes)


@contextmanager
def config_directory(recipe: Recipe) -> Iterator[Path]:
    """A directory with the config.json of the recipe's model, whose weights need not exist. Raises RecipeError."""
    if recipe.model.init is None:
        yield Path(recipe.model.path or "")
        return
    config = initial_config(recipe.model.init, recipe.model.max_context)
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config.to_dict()))
        yield Path(directory)


def recipe_costs(recipe: Recipe) -> ModelCosts:
    """The costs of the recipe's model. Raises RecipeError where its config.json is missing or makes no sense."""
    with config_directory(recipe) as directory:
        try:
            return model_costs(directory)
        except (ValueError, OSError) as error:
            raise RecipeError(f"model.path: {error}") from error


def _seats(recipe: Recipe, hardware: Hardware) -> Iterator[Seat]:
    """Engines first, none across two nodes, then ranks; shared: rank i beside worker i.

    Which node is the first is Ray's choice.
    """
    rollout, ranks, per_node = recipe.rollout, recipe.learner.ranks, max(1, hardware.gpus_per_node)
    workers: list[str | None] = []
    if rollout.engine == EngineKind.vllm:
        for engine in range(rollout.engines):
            room = per_node - len(workers) % per_node
            if rollout.tensor_parallel > room and recipe.placement == Placement.split:
                workers += [None] * room
            for worker in range(rollout.tensor_parallel):
                of = f" worker {worker}" if rollout.tensor_parallel > 1 else ""
                workers.append(f"engine {engine}{of}")
    named = [f"rank {rank}" for rank in range(ranks)]
    if recipe.placement == Placement.shared and workers:
        rows = [tuple(role for role in pair if role) for pair in _zip_longest(named, workers)]
    else:
        free = iter(named)
        rows = [((worker,) if worker else tuple(filter(None, [next(free, None)]))) for worker in workers]
        rows += [(rank,) for rank in free]
    rows += [("judge",)] * judge_gpus(recipe)
    for place, roles in enumerate(rows):
        yield Seat(node=place // per_node, gpu=place % per_node, roles=roles)


def _on_cpus(recipe: Recipe, costs: ModelCosts, rank: RankMemory) -> Iterator[Item]:
    """The learner's and the engines' memory where it is all of one host."""
    rollout, ranks = recipe.rollout, recipe.learner.ranks
    cache = costs.cache_bytes_per_token(1, element_bytes(recipe.model.dtype)) * recipe.model.max_context
    weights = costs.outline.num_parameters * element_bytes(recipe.model.dtype)
    engines = rollout.engines * (2 * weights + rollout.max_num_seqs * cache)
    how = f"{rollout.engines} x weights, staged weights and cache"
    if not engines_sleep(recipe):
        yield Item(name="learner", num_bytes=ranks * rank.peak_bytes, how=f"{ranks} ranks at the peak of a step")
        yield Item(name="engines", num_bytes=engines, how=how)
        return
    yield Item(name="learner", num_bytes=ranks * rank.resident_bytes, how=f"{ranks} ranks between steps")
    stepping = ranks * (rank.peak_bytes - rank.resident_bytes)
    how = f"the larger of a step ({stepping / GIB:.2g}) and {how}"
    yield Item(name="step or engines", num_bytes=max(stepping, engines), how=how)


def _zip_longest(left: list[str], right: list[str | None]) -> Iterator[tuple[str | None, str | None]]:
    for place in range(max(len(left), len(right))):
        yield (left[place] if place < len(left) else None, right[place] if place < len(right) else None)


def _sync(recipe: Recipe, costs: ModelCosts, hardware: Hardware) -> SyncPlan:
    """Every tensor once, in the model's dtype. A broadcast to several engines takes as long as to one."""
    element = element_bytes(recipe.model.dtype)
    num_bytes = sum(
        math.prod(tensor.shape) * (element if tensor.trained else 4) for tensor in costs.outline.tensors.values()
    )
    partitioned = recipe.learner.zero_stage == 3 and recipe.learner.ranks > 1
    shared = recipe.placement == Placement.shared
    return SyncPlan(
        num_bytes=num_bytes,
        gather_s=num_bytes / hardware.broadcast_bytes_per_s if partitioned else 0.0,
        send_s=num_bytes / (LOCAL_BYTES_PER_S if shared else hardware.broadcast_bytes_per_s),
    )


def _carried(recipe: Recipe, costs: ModelCosts, worker: WorkerMemory, nodes: Iterable[Sequence[str]]) -> Item:
    """What vLLM keeps on the host for the cached tokens of every engine: an engine fills it with its cache."""
    engines = max(len({role.split(" worker")[0] for role in roles if role.startswith("engine")}) for roles in nodes)
    carried = carried_bytes_per_token(costs.outline.num_layers, recipe.model.max_context)
    how = f"{engines} x {worker.cache_tokens:,} cached tokens of {carried:,} B"
    return Item(name="cached selections", num_bytes=engines * worker.cache_tokens * carried, how=how)


def _host(
    recipe: Recipe, costs: ModelCosts, rank: RankMemory, worker: WorkerMemory | None, seats: tuple[Seat, ...]
) -> Iterator[Item]:
    """Memory of the node with most ranks, the driver's buffer included. Without GPUs the ranks' own state is there."""
    spec, rollout = costs.outline, recipe.rollout
    by_node: dict[int, list[str]] = {}
    for seat in seats:
        by_node.setdefault(seat.node, []).extend(seat.roles)
    ranks = max((sum(role.startswith("rank") for role in roles) for roles in by_node.values()), default=0)
    if not by_node:
        ranks = recipe.learner.ranks
        yield from _on_cpus(recipe, costs, rank)
    elif rank.host_bytes:
        names = " and ".join(item.name for item in rank.host)
        yield Item(name="learner", num_bytes=ranks * rank.host_bytes, how=f"{ranks} ranks' {names}")
    copied = ranks * rank.copied.num_bytes
    how = f"{ranks} {'rank' if ranks == 1 else 'ranks'}, {rank.copied.how}; a copy until it is written"
    yield Item(name=rank.copied.name, num_bytes=copied, how=how)
    actors = max((len(roles) for roles in by_node.values()), default=recipe.learner.ranks + rollout.engines)
    processes = actors + recipe.reward_workers + 1
    yield Item(name="processes", num_bytes=processes * HOST_PROCESS_BYTES, how=f"{processes} of 2 GiB")
    samples = recipe.prompts_per_step * max((d.group_size for d in recipe.domains.values()), default=1)
    width = 1 if spec.num_experts <= 256 else 2
    routes = len(spec.moe_layers) * spec.experts_per_token * width if recipe.objective.keep_routing else 0
    keeps = recipe.objective.keep_selection and costs.index_topk is not None
    selected = bytes_per_token(spec.num_layers, costs.index_topk or 0, recipe.model.max_context) if keeps else 0
    if selected and worker is not None:
        yield _carried(recipe, costs, worker, by_node.values())
    token = SAMPLE_BYTES_PER_TOKEN + routes + selected
    held = samples * (rollout.max_staleness + 1) * recipe.model.max_context * token
    yield Item(
        name="samples",
        num_bytes=held,
        how=f"{samples} a step x {rollout.max_staleness + 1} steps of {recipe.model.max_context} tokens, "
        f"{routes} B of routes{f' and {selected} B of selections' if selected else ''} a token; kept sets not counted",
    )
