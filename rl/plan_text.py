"""A plan as text: aligned columns, GiB of memory, and a verdict on the last line."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence

from rl.choices import Placement
from rl.config import Recipe
from rl.fit import check_plan, problems
from rl.hardware import GIB
from rl.learner_memory import Item
from rl.placement import engines_sleep
from rl.plan import (
    Plan,
    Seat,
    assumed_hardware,
    make_plan,
    recipe_costs,
)

_NAME, _NUMBER = 24, 10


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """``--plan`` and the machines it is about."""
    parser.add_argument("--plan", action="store_true", help="print what the run needs of which machine and stop")
    parser.add_argument("--gpus", type=_count, metavar="N", help="GPUs there are in all (default: as many as it needs)")
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="memory of a GPU (default: 80)")
    parser.add_argument("--host-memory", type=float, metavar="GIB", help="memory of a machine (default: not known)")
    parser.add_argument("--nodes", type=_count, metavar="N", help="machines they are in (default: one for every 8)")


def show_plan(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Prints the plan; the exit status: 0. Raises RecipeError, after printing, for a plan that does not fit."""
    costs = recipe_costs(recipe)
    hardware = assumed_hardware(
        recipe,
        num_gpus=arguments.gpus,
        num_nodes=arguments.nodes,
        gpu_bytes=round(arguments.gpu_memory * GIB),
        host_bytes=None if arguments.host_memory is None else round(arguments.host_memory * GIB),
    )
    print(render(make_plan(recipe, costs, hardware)), end="", flush=True)
    check_plan(recipe, costs, hardware)
    return 0


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def render(plan: Plan) -> str:
    """Everything a plan says, ending in a newline."""
    sections = [_head(plan), _rank(plan), _worker(plan), _host(plan), _sync(plan), _seats(plan), _verdict(plan)]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _head(plan: Plan) -> list[str]:
    spec, recipe, hardware = plan.costs.outline, plan.recipe, plan.hardware
    active = f", {_billions(plan.costs.active_parameters)} active a token" if spec.moe_layers else ""
    lines = [
        f"{recipe.name}: {spec.architecture}, {_billions(spec.num_parameters)} parameters{active}, {recipe.model.dtype}"
    ]
    if plan.num_gpus == 0:
        return [*lines, "on CPUs"]
    name = f" ({hardware.gpu_name})" if hardware.gpu_name else ""
    rollout = recipe.rollout
    engines = f"{rollout.engines} x {rollout.tensor_parallel} for engines, " if plan.worker else ""
    return [
        *lines,
        f"needs {_many(plan.num_gpus, 'GPU')}: {engines}{recipe.learner.ranks} for learner ranks"
        + (", shared" if plan.shared else ""),
        f"has {_many(hardware.num_gpus, 'GPU')} of {hardware.gpu_bytes / GIB:.0f} GiB{name} on "
        + _many(hardware.num_nodes, "node"),
    ]


def _rank(plan: Plan) -> list[str]:
    rank, learner = plan.rank, plan.recipe.learner
    lines = [_title(_each(learner.ranks, "learner rank")), *_items(rank.resident)]
    lines.append(_row("between steps", rank.resident_bytes, ""))
    lines += _items(rank.step)
    lines.append(_row("peak of a step", rank.step_bytes, _of_gpu(plan)))
    if rank.update:
        lines += _items(rank.update)
        lines.append(_row("weight update", rank.update_bytes, _of_gpu(plan)))
    if rank.slept:
        lines.append(_row("asleep", rank.resident_bytes - rank.slept, "while engines generate (learner.sleep)"))
    if plan.shared:
        asleep = "asleep" if engines_sleep(plan.recipe) else "that stays awake"
        lines.append(
            _row("with an engine", plan.learning_bytes, f"{asleep}, at the peak of {rank.peak}{_of_gpu(plan, ', ')}")
        )
    return lines


def _worker(plan: Plan) -> list[str]:
    worker, rollout = plan.worker, plan.recipe.rollout
    if worker is None:
        return []
    lines = [_title(_each(rollout.engines * rollout.tensor_parallel, "engine GPU")), *_items(worker.items)]
    lines.append(_row("left for the cache", worker.cache_bytes, f"of {rollout.gpu_memory:g} x {_gpu(plan)}"))
    lines.append(
        f"  {worker.cache_bytes_per_token:,.0f} B a token: {worker.cache_tokens:,} tokens an engine, "
        f"{worker.full_sequences:,.1f} sequences of {worker.max_context:,}"
    )
    if plan.shared:
        lines.append(_row("with a rank", plan.generating_bytes, f"while it generates{_of_gpu(plan, ', ')}"))
    return lines


def _host(plan: Plan) -> list[str]:
    total = sum(item.num_bytes for item in plan.host)
    there = plan.hardware.host_bytes
    lines = [_title("host memory of a node"), *_items(plan.host)]
    return [*lines, _row("sum", total, f"of {there / GIB:,.0f}" if there else "")]


def _sync(plan: Plan) -> list[str]:
    sync = plan.sync
    if plan.num_gpus == 0:
        return [f"weight sync: {sync.num_bytes / 1e6:,.1f} MB an update, through Ray's object store"]
    way = "within each GPU" if plan.recipe.placement == Placement.shared else "to all engines at once"
    gather = f"{sync.gather_s:.3g} s to put partitioned weights together, " if sync.gather_s else ""
    total = f"{sync.seconds:.3g} s = " if gather else ""
    return [
        f"weight sync: {sync.num_bytes / 1e9:,.2f} GB each, {total}{gather}{sync.send_s:.3g} s {way}",
        f"  at an assumed {plan.hardware.broadcast_bytes_per_s / 1e9:.0f} GB/s between GPUs; checks not included",
    ]


def _seats(plan: Plan) -> list[str]:
    return ["GPUs", *(f"  {line}" for line in _spans(plan.seats))] if plan.seats else []


def _spans(seats: Sequence[Seat]) -> Iterator[str]:
    """Neighbours that do the same kind of work on one line."""
    start = 0
    for end in range(1, len(seats) + 1):
        if end < len(seats) and _kind(seats[end]) == _kind(seats[start]):
            continue
        first, last = seats[start], seats[end - 1]
        place = f"node {first.node} GPU {first.gpu}"
        if end - 1 > start:
            place += f" to GPU {last.gpu}" if first.node == last.node else f" to node {last.node} GPU {last.gpu}"
        roles = [
            role if end - 1 == start or role == other else f"{role} to {other}"
            for role, other in zip(first.roles, last.roles, strict=True)
        ]
        yield f"{place:<36} {' + '.join(roles) or 'free'}"
        start = end


def _kind(seat: Seat) -> tuple[object, ...]:
    """Ranks run on over nodes; engines begin a line each."""
    return tuple("rank" if role.startswith("rank") else role.partition(" worker")[0] for role in seat.roles)


def _verdict(plan: Plan) -> list[str]:
    found = [sentence for _, sentence in problems(plan)]
    if found:
        return [f"does not fit: {'; '.join(found)}"]
    return ["fits" if plan.hardware.host_bytes else "fits, where a node has that much host memory (--host-memory GIB)"]


def _items(items: Iterable[Item]) -> list[str]:
    return [_row(item.name, item.num_bytes, item.how) for item in items]


def _row(name: str, num_bytes: float, note: str) -> str:
    gib = num_bytes / GIB
    digits = 0 if abs(gib) >= 100 else 2 if abs(gib) >= 0.1 else 4
    number = f"{gib:,.{digits}f}"
    return f"  {name:<{_NAME}}{number:>{_NUMBER}}  {note}".rstrip()


def _title(words: str) -> str:
    return f"{words:<{_NAME + 2}}{'GiB':>{_NUMBER}}"


def _each(count: int, noun: str) -> str:
    return f"one {noun}" if count == 1 else f"each of {count} {noun}s"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _of_gpu(plan: Plan, before: str = "") -> str:
    return f"{before}of {_gpu(plan)}" if plan.num_gpus else ""


def _gpu(plan: Plan) -> str:
    return f"{plan.hardware.gpu_bytes / GIB:.1f}"


def _billions(count: float) -> str:
    if count < 1e6:
        return f"{count / 1e3:.0f}K"
    return f"{count / 1e9:.1f}G" if count >= 1e9 else f"{count / 1e6:.1f}M"
