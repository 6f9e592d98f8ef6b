"""The Ray cluster of a run: joining one or starting it here, and what it consists of."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray._private import ray_constants, ray_logging
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl.config import Recipe
from rl.environ import needed_environment
from rl.errors import RecipeError, RunStopped
from rl.hardware import Hardware, parse_nvidia_smi
from rl.placement import threads_needed

OBJECT_STORE_BYTES = 512 << 20
"""Of the cluster that a run starts for itself; weights and batches of small models are all that passes through it."""

UNKNOWN_BYTES = 1 << 50
"""Stands for the memory of GPUs whose driver says nothing: large enough that nothing is refused for it."""
SETTLE_S = 60.0
"""How long nodes may take to answer, or Ray to notice that they never will."""
_ANSWER_S = 10.0
SENT_FOLDERS = "working_dir_files"
"""Where Ray unpacks the working directories of jobs, within its own folder on each node."""
_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]

T = TypeVar("T")


def join_cluster(recipe: Recipe) -> None:
    """``RAY_ADDRESS`` names a cluster, as it does under ``ray job submit``; without it one starts here."""
    # A process that dies is reported by the run, in one line; Ray would add a paragraph each.
    ray_logging.stdout_deduplicator.skip_re = re.compile("A worker died or was killed while executing a task")
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU actors keep the GPUs they see
    # It says at every start that Ray's own authentication is on, which is as it should be.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Of lines that several processes print within seconds it shows one. Ray calls lines equal that differ in a number.
    ray_logging._canonicalise_log_line = str
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return
    _keep_token_private(Path.home() / ".ray" / "auth_token")
    ray_constants.ENABLE_RAY_CLUSTER = False  # no other node may join, so every server listens on loopback only
    with needed_environment():
        ray.init(
            address="local",  # a cluster that happens to run here is joined only when RAY_ADDRESS names it
            # Threads are what an actor is given on this machine; more actors than cores share them.
            num_cpus=max(threads_needed(recipe), os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
        )


def _keep_token_private(path: Path) -> None:
    """Whoever has the token of a cluster can run code as its user. Ray draws one if there is none, for all to read."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    with contextlib.suppress(OSError):  # Ray itself says what is wrong with a home that cannot be written
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as draft, contextlib.suppress(FileExistsError):
            draft.write(secrets.token_hex(32))
            draft.flush()
            os.link(draft.name, path)  # there or not, never half of it
        path.chmod(0o600)


def check_runs_last(recipe: Recipe) -> None:
    """Raises RecipeError when the run's directory would go with a job's working directory."""
    path = Path(recipe.runs).resolve()
    if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ and SENT_FOLDERS in path.parts:
        raise RecipeError(
            f"runs: {recipe.runs} is inside the working directory of this job, which Ray deletes when the job ends; "
            "give an absolute path on a disk that all nodes share, such as runs=/shared/runs"
        )


def address_for_workers() -> str:
    """Where a server of the driver's must listen for the workers to reach it: loopback where they are all here."""
    alone = sum(node["Alive"] for node in ray.nodes()) == 1
    return "127.0.0.1" if alone else ray.util.get_node_ip_address()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAnswer:
    """One node about itself."""

    gpus: list[tuple[str, int]]  # name and bytes
    host_bytes: int


async def cluster_hardware() -> Hardware:
    """The GPUs that Ray may give away. Without any, nobody is asked and the hardware is CPUs."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) > 0]
    if not nodes:
        return Hardware(num_gpus=0)
    ask = ray.remote(num_cpus=0, max_retries=0)(describe_node)
    answers = await asyncio.gather(*(_ask(ask, node["NodeID"]) for node in nodes))
    return summarize([int(node["Resources"]["GPU"]) for node in nodes], answers)


async def _ask(task: Any, node_id: str) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return await task.options(scheduling_strategy=there).remote()


async def on_host(host: str, function: Callable[..., T], *arguments: Any, timeout_s: float) -> T:
    """What ``function`` returns where ``host`` is the host's name: in a thread if that is here, else on a node there.

    Raises TimeoutError, and LookupError where no node of that name is alive.
    """
    async with asyncio.timeout(timeout_s):
        if host == socket.gethostname():
            return await asyncio.to_thread(function, *arguments)
        for node in ray.nodes():
            if node["Alive"] and node["NodeManagerHostname"] == host:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there)
                return await task.remote(*arguments)
    raise LookupError(f"no node of the Ray cluster is called {host}")


async def settled(*, timeout_s: float = SETTLE_S) -> None:
    """Returns when every node answers that Ray takes to be alive, or after ``timeout_s``.

    Ray notices only after seconds that a node was lost, and until then lets new actors die of it. Raises RunStopped
    when no node is left.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while not await _all_nodes_answer():
                await asyncio.sleep(0.5)


async def _all_nodes_answer() -> bool:
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if not nodes:
        raise RunStopped("no node of the Ray cluster is alive any more; its logs, in session_latest/logs, say why")
    if len(nodes) == 1:
        return True  # this one
    ask = ray.remote(num_cpus=0, max_retries=0)(lambda: None)
    asking = [asyncio.ensure_future(_ask(ask, node)) for node in nodes]
    _, silent = await asyncio.wait(asking, timeout=_ANSWER_S)
    for task in silent:
        task.cancel()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    return not any(isinstance(answer, BaseException) for answer in answers)


def describe_node() -> NodeAnswer:
    """Runs on the node itself."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=False)
        text = done.stdout
    except (OSError, subprocess.TimeoutExpired):
        text = ""
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return NodeAnswer(gpus=parse_nvidia_smi(text), host_bytes=host_bytes)


def summarize(num_gpus: Sequence[int], answers: Sequence[NodeAnswer]) -> Hardware:
    """One description of nodes that may differ: the smallest GPU and the smallest host memory."""
    smallest = min((gpu for answer in answers for gpu in answer.gpus), key=lambda gpu: gpu[1], default=None)
    name, gpu_bytes = smallest or ("", UNKNOWN_BYTES)
    return Hardware(
        num_gpus=sum(num_gpus),
        num_nodes=len(num_gpus),
        gpu_bytes=gpu_bytes,
        gpu_name=name,
        host_bytes=min(answer.host_bytes for answer in answers),
    )
