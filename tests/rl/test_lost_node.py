"""A node of the cluster goes away with an engine on it: the run goes on without, and with it again on another node."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from rewards.pool import RewardPool
from rl.cluster import settled
from rl.config import Domain, RewardUse
from rl.sample import Scored
from tests.rewards.conftest import make
from tests.rl.saboteur import Saboteur, arm, closed
from tests.rl.test_faults import promises
from tests.rl.tiny_runs import run_here

MEMORY = {"object_store_memory": 80 << 20}
HEAD = {"num_cpus": 2, "include_dashboard": False, **MEMORY}
FURTHER: dict[str, Any] = {"num_cpus": 1, **MEMORY}


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """Two nodes: the first one has room for the learner and one engine, the second one for another engine."""
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    cluster.add_node(**FURTHER)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def crowded_nodes() -> Iterator[Cluster]:
    """The first node has no room at all, and the other two for an actor each."""
    cluster = Cluster(initialize_head=True, head_node_args=HEAD | {"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(**FURTHER)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_lost_node_costs_its_engine_for_as_long_as_there_is_no_room(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    gate = tmp_path / "gate"

    async def plan(saboteur: Saboteur) -> None:
        pool = saboteur.system.pool
        head, second = nodes.head_node, next(iter(nodes.worker_nodes))
        homes = {index: await saboteur.home(index) for index in (0, 1)}
        (lost,) = (index for index, home in homes.items() if home == second.node_id)
        assert head is not None and homes[1 - lost] == head.node_id
        await saboteur.busy(f"engine {lost}", "generate")
        began = time.monotonic()
        nodes.remove_node(second, allow_graceful=False)
        await saboteur.gone(lost)
        noticed = time.monotonic() - began
        await saboteur.step_over()
        assert not pool.is_up(lost) and pool.is_up(1 - lost)
        with closed(gate):
            third = nodes.add_node(**FURTHER)
            began = time.monotonic()
            await saboteur.until_up(lost)
        assert await saboteur.home(lost) == third.node_id
        print(
            f"a lost node is noticed after {noticed:.1f} s; seconds from room to recovery: "
            f"{time.monotonic() - began:.1f}"
        )

    arm(monkeypatch, plan)
    code, run = run_here(
        tmp_path,
        "steps=4",
        "log_samples=100",
        "rollout={engines: 2, max_staleness: 1}",
        f"domains.sums.rewards=[{{use: 'tests.rl.fragile:gated', args: {{gate: '{gate}'}}}}]",
    )
    print(capsys.readouterr().out)
    assert code == 0
    promises(run, steps=4, staleness=1)
    assert sum(row["faults/engine_restarts"] for row in run.steps) == 1
    assert sum(row["faults/engines_lost"] for row in run.steps) == 0


def test_reward_workers_start_again_elsewhere(nodes: Cluster, tmp_path: Path):
    """Ray goes on placing actors on the lost node for seconds; they die as they start."""
    gate = tmp_path / "gate"
    use = RewardUse(use="tests.rl.fragile:gated", args={"gate": str(gate)})

    async def score() -> list[Any]:
        pool = await RewardPool.start({"math": Domain(prompts="-", rewards=[use])}, num_workers=2, settled=settled)
        try:
            with closed(gate):  # both are at work, one of them on each node
                scoring = asyncio.gather(*(pool.score_group([make(index=index)]) for index in range(2)))
                while len(pool.working(2)) < 2:
                    await asyncio.sleep(0.01)
                nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
                await asyncio.sleep(3.0)
            return await scoring
        finally:
            await pool.close()

    outcomes = asyncio.run(score())
    assert all(isinstance(outcome, Scored) for (outcome,) in outcomes), outcomes


def test_a_lost_node_with_the_learner_costs_the_steps_since_the_checkpoint(
    crowded_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lost: list[str] = []

    async def plan(saboteur: Saboteur) -> None:
        if lost:
            return  # this is the run after it was restored
        await saboteur.published(2)
        lost.append(await saboteur.learners_home())
        (node,) = (node for node in crowded_nodes.worker_nodes if node.node_id == lost[0])
        await saboteur.busy("learner", "step")
        crowded_nodes.remove_node(node, allow_graceful=False)
        crowded_nodes.add_node(**FURTHER)

    arm(monkeypatch, plan)
    code, run = run_here(tmp_path, "steps=4", "checkpoint.every=1")
    print(*capsys.readouterr())
    assert code == 0
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4]
    assert run.rows[-1]["faults/learner_restores"] == 1
