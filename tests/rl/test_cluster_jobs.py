"""A run as people submit it: `ray job submit` to a cluster of two nodes, and `ray job stop`."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rl.tiny_runs import REPOSITORY, Run, write_recipe
from tests.rl.two_nodes import TwoNodes, two_nodes

pytestmark = pytest.mark.timeout(600)  # two nodes start, and a job on both

STEPS = 3
"""After which the job is stopped."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job that was stopped, and what there was to see."""

    run: Run
    printed: str
    status: int
    said: list[str]  # what rewards printed, from their own diaries
    stopped_at: float
    nodes: tuple[list[str], list[str]]  # commands of its processes on each node
    left_over: list[str]
    sent: set[str]  # files of the working directory on the second node


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("job")
    (folder / "diary").mkdir()
    recipe = write_recipe(folder)
    with two_nodes() as cluster:
        yield _run(cluster, folder, recipe)


def _run(cluster: TwoNodes, folder: Path, recipe: Path) -> Job:
    run = Run(folder / "runs" / "tiny")
    following = cluster.submit(
        _checkout(folder),
        *("python", "-m", "rl.train", str(recipe), f"runs={folder / 'runs'}", "steps=100000"),
        # As many as the nodes have CPUs, so that both are needed.
        *("rollout.engines=2", "learner.ranks=2", "reward_workers=2"),
        f"domains.sums.rewards=[{{use: 'tests.rl.talking:says', retries: 0, args: {{diary: {folder / 'diary'}}}}}]",
        name="tiny",
        log=folder / "log",
    )
    deadline = time.monotonic() + 400
    while not (run.path / "samples" / f"step_{STEPS}.jsonl").exists():
        assert following.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.2)
    time.sleep(2.0)  # so that what these steps printed was printed more than a second before the end
    nodes = cluster.processes(0), cluster.processes(1)
    sent = {
        str(path.relative_to(package))
        for package in (cluster.folders[1] / "session_latest/runtime_resources/working_dir_files").iterdir()
        for path in package.rglob("*")
    }
    stopped_at = time.time()
    stopping = cluster.stop("tiny")
    assert stopping.returncode == 0, stopping.stdout + stopping.stderr
    following.wait(timeout=60)
    deadline = time.monotonic() + 60
    while (left := [*cluster.processes(0), *cluster.processes(1)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return Job(
        run=run,
        printed=(folder / "log").read_text(),
        status=following.returncode,
        said=[line for path in (folder / "diary").iterdir() for line in path.read_text().splitlines()],
        stopped_at=stopped_at,
        nodes=nodes,
        left_over=left,
        sent=sent,
    )


def _checkout(folder: Path) -> Path:
    """A checkout in use: with a virtual environment, history, runs and models beside the code."""
    checkout = folder / "checkout"
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "models", "*.egg-info")
    shutil.copytree(REPOSITORY, checkout, ignore=ignore)
    for large in (".git/pack", ".venv/lib.so", "runs/old/metrics.jsonl", "models/m/model-1.safetensors", "mine/w.bin"):
        (checkout / large).parent.mkdir(parents=True)
        (checkout / large).write_bytes(b"0")
    return checkout


def test_what_travels_is_the_code(job: Job):
    assert {"rl/train.py", "recipes/quickstart.yaml", "pyproject.toml"} <= job.sent
    assert not {name.partition("/")[0] for name in job.sent} & {".git", ".venv", "runs", "models"}
    assert "mine/w.bin" not in job.sent


def test_actors_are_on_both_nodes_and_run_what_was_sent(job: Job):
    """A process counts by its working directory, which is the one sent to its node."""
    for commands in job.nodes:
        names = " ".join(commands)
        assert "ray::LearnerRank" in names or "ray::EngineActor" in names, job.nodes
    everywhere = Counter(command.partition(" ")[0].partition(".")[0] for node in job.nodes for command in node)
    assert everywhere["ray::LearnerRank"] == everywhere["ray::EngineActor"] == everywhere["ray::SerialWorker"] == 2


def test_what_actors_print_arrives_once(job: Job):
    """Whatever was printed before the job was asked to stop, though lines of several processes are much alike."""
    early = [line for line in job.said if float(line.split()[4]) < job.stopped_at - 1]
    assert len(early) >= 16
    assert Counter(job.printed.count(line) for line in early) == {1: len(early)}, job.printed
    assert all(job.printed.count(line) <= 1 for line in job.said)
    assert "repeated" not in job.printed


def test_a_failing_reward_is_a_warning_in_the_drivers_output(job: Job):
    warnings = [line for line in job.printed.splitlines() if "ValueError: the second one is never good" in line]
    assert len(warnings) == len(set(warnings)) >= STEPS
    assert all(line.startswith("warning: step ") for line in warnings)


def test_a_stopped_job_ends_cleanly(job: Job):
    assert (job.run.status["status"], job.run.status["reason"]) == ("stopped", "interrupted")
    assert (job.run.path / "report.html").exists()
    last = job.run.rows[-1]["step"]
    assert (job.run.path / "checkpoints" / f"step_{last:g}").is_dir()
    assert job.printed.count("keel: interrupted") == 1
    assert "Traceback" not in job.printed
    assert job.left_over == []
