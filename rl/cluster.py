"""What the Ray cluster that a run joined consists of: each node is asked about its own GPUs and memory."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl.hardware import Hardware, parse_nvidia_smi

UNKNOWN_BYTES = 1 << 50
"""Stands for the memory of GPUs whose driver says nothing: large enough that nothing is refused for it."""
_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]


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


async def _ask(task: Any, node_id: str) -> NodeAnswer:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return await task.options(scheduling_strategy=there).remote()


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
