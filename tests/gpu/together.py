"""All tests and measurements that need a GPU, side by side on the GPUs of one machine.

    python -m tests.gpu.together --out runs/gpu                        # what RESULTS.md has figures of
    python -m tests.gpu.together --out runs/gpu throughput killed      # some of it; with what they need first
    python -m tests.gpu.together --list

Each job gets the GPUs that it needs: measurements have theirs to themselves, up to three tests share one. In ``--out``
lie NAME.log, NAME.json (its figures) and status.json, which says at any time what runs, what ended how and what waits;
runs of recipes are in ``--out``/runs. What ended well there before is not run again for those that come after it, only
when it is named. Ends with 1 if a job failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]
WHOLE = 3
"""Tests that share a GPU."""
SHARED_CACHE = {"KEEL_GPU_CACHE_GB": "6"}
"""Lets an engine start where others take and leave memory meanwhile."""
LOOK_S = 0.5

MEASURE = "{python} -m tests.gpu.measure"
TEST = "{python} -m pytest -s -p no:cacheprovider tests/gpu"
ONE_GPU = "recipes/gpu/dsv32_shared_1gpu.yaml"
COLD = "model.init=null model.path={runs}/dsv32_shared_1gpu/cold_start supervised.steps=0 evaluation.every=0"
TRAINED = "model.init=null model.path={runs}/dsv32_shared_1gpu/model"
LARGE = (
    "rollout.gpu_memory=0.5 model.init.hidden_size=2048 model.init.moe_intermediate_size=768 "
    "model.init.n_routed_experts=64 domains.spell_backward.kl_beta=0 learner.micro_tokens=4096"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``command`` is filled in with python, runs (a folder) and figures (a file)."""

    name: str
    command: str
    gpus: int = 1
    alone: bool = False  # whether it has its GPUs to itself
    after: tuple[str, ...] = ()  # jobs whose runs it uses
    limit_s: float = 600.0
    environment: Mapping[str, str] = field(default_factory=dict)


def _loop(name: str, gpus: int, recipe: str, overrides: str = "", **others: Any) -> Job:
    command = f"{MEASURE} loop {recipe} runs={{runs}} {overrides} --out {{figures}}"
    return Job(name=name, command=command, gpus=gpus, alone=True, **others)


def _figures(name: str, arguments: str, gpus: int = 1, *, passes: int = 7, **others: Any) -> Job:
    command = f"{MEASURE} {arguments} --passes {passes} --out {{figures}}"
    return Job(name=name, command=command, gpus=gpus, alone=True, **others)


def _test(name: str, file: str, gpus: int = 1, *, select: str = "", **others: Any) -> Job:
    command = f"{TEST}/{file}" + (f" -k {shlex.quote(select)}" if select else "")
    return Job(name=name, command=command, gpus=gpus, environment={"KEEL_FIGURES": "{figures}"}, **others)


AFTER_LOOP = ("loop",)
"""Which leaves its cold start and its trained model."""
JOBS = (
    _loop("loop", 1, ONE_GPU),
    _figures("throughput", "throughput", passes=15),  # of which single ones differ by a quarter
    _figures("throughput_trained", f"throughput {TRAINED}", passes=15, after=AFTER_LOOP),
    # More requests than an engine holds at once, which come and go one by one, as in a run.
    _figures("throughput_varied", "throughput --requests 1024 --tokens 200 --spread 0.9", passes=5),
    _figures("throughput_large", "throughput model.init.num_hidden_layers=24"),
    _figures("mismatch", f"mismatch {TRAINED}", after=AFTER_LOOP),
    _loop(
        "shared_two", 2, ONE_GPU, f"name=shared_two learner.ranks=2 rollout.engines=2 {COLD} steps=14", after=AFTER_LOOP
    ),
    _loop(
        "shared_two_parallel",
        2,
        ONE_GPU,
        "name=shared_two_parallel learner.ranks=2 rollout.tensor_parallel=2 rollout.expert_parallel=true "
        f"{COLD} steps=10",
        after=AFTER_LOOP,
    ),
    _loop("split_two", 2, "recipes/gpu/dsv32_split_2gpu.yaml", f"{COLD} steps=14", after=AFTER_LOOP),
    _loop("split_four", 4, "recipes/gpu/dsv32_4gpu.yaml", f"{COLD} steps=14", after=AFTER_LOOP),
    _loop(
        "shared_four",
        4,
        ONE_GPU,
        f"name=shared_four learner.ranks=4 rollout.engines=4 prompts_per_step=64 {COLD} steps=14",
        after=AFTER_LOOP,
    ),
    _figures("sync", f"sync placement=split {TRAINED}", 2, after=AFTER_LOOP),
    _figures("sync_4gb", f"sync placement=split {LARGE} model.init.num_hidden_layers=8", 2),
    _figures("sync_10gb", f"sync placement=split {LARGE} model.init.num_hidden_layers=18", 2),
    _test("verification", "test_verification.py", select="shared", alone=True),
    _test("verification_two", "test_verification.py", 2, select="split", alone=True),
    _test("killed", "test_killed_engine.py", select="shared"),
    _test("killed_broadcast", "test_killed_engine.py", 2, select="not shared"),
    _test("engine", "test_vllm_engine.py"),
    _test("draws", "test_draw_kernels.py"),
    _test("dsa", "test_vllm_dsa.py"),
    _test("updates", "test_weight_sync.py", alone=True),
    _test("updates_two", "test_weight_sync.py", 2, select="beside or share"),
    _test("updates_three", "test_weight_sync.py", 3, select="two_workers_holds or at_once"),
    _test("hugging_face", "test_hf_models.py"),
    _test("learner", "test_learner_on_gpu.py", 2),
    _test("sleeping", "test_sleeping_memory.py"),
)


class Machine:
    """How much of each GPU is taken, in thirds."""

    def __init__(self, num_gpus: int) -> None:
        self._taken = [0] * num_gpus

    @property
    def num_gpus(self) -> int:
        return len(self._taken)

    def take(self, job: Job) -> list[int] | None:
        """GPUs for the job, the emptiest first; None when there are not enough now."""
        share = WHOLE if job.alone else 1
        fitting = [gpu for gpu, taken in enumerate(self._taken) if taken + share <= WHOLE]
        gpus = sorted(sorted(fitting, key=self._taken.__getitem__)[: job.gpus])
        if len(gpus) < job.gpus:
            return None
        self._add(gpus, share)
        return gpus

    def give_back(self, job: Job, gpus: Iterable[int]) -> None:
        self._add(gpus, -WHOLE if job.alone else -1)

    def _add(self, gpus: Iterable[int], share: int) -> None:
        for gpu in gpus:
            self._taken[gpu] += share


@dataclass(slots=True)
class Running:
    job: Job
    gpus: list[int]
    process: subprocess.Popen[bytes]
    log: TextIO
    began: float

    def result(self) -> int | None:
        """Its exit code; it is killed, with all that it started, when its time is over."""
        if self.process.poll() is None and time.monotonic() - self.began > self.job.limit_s:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return self.process.poll()


class Together:
    """Runs jobs in their order, and later ones that fit first where an earlier one has to wait for GPUs of its own."""

    def __init__(self, jobs: Sequence[Job], machine: Machine, out: Path) -> None:
        self._machine, self._out = machine, out
        self._waiting = [job for job in jobs if job.gpus <= machine.num_gpus]
        self.left_out = [job.name for job in jobs if job.gpus > machine.num_gpus]
        self._running: list[Running] = []
        out.mkdir(parents=True, exist_ok=True)
        names = {job.name for job in jobs}
        self.ended = {name: end for name, end in ended_in(out).items() if name not in names}

    def run(self) -> bool:
        """Whether all of them did."""
        try:
            while self._waiting or self._running:
                self._collect()
                self._start()
                self._say()
                time.sleep(LOOK_S)
        finally:
            for running in self._running:
                os.killpg(running.process.pid, signal.SIGKILL)
        self._say()
        return all(end["exit"] == 0 for end in self.ended.values())

    def _collect(self) -> None:
        for running in list(self._running):
            if (code := running.result()) is not None:
                self._running.remove(running)
                self._machine.give_back(running.job, running.gpus)
                running.log.close()
                self.ended[running.job.name] = {"exit": code, "s": round(time.monotonic() - running.began)}

    def _start(self) -> None:
        pending = {job.name for job in self._waiting} | {running.job.name for running in self._running}
        for job in list(self._waiting):
            if pending.isdisjoint(job.after) and (gpus := self._machine.take(job)) is not None:
                self._waiting.remove(job)
                self._running.append(self._launched(job, gpus))

    def _launched(self, job: Job, gpus: list[int]) -> Running:
        places = {
            "python": sys.executable,
            "runs": str(self._out / "runs"),
            "figures": str(self._out / f"{job.name}.json"),
        }
        environment = {name: value.format(**places) for name, value in job.environment.items()}
        environment |= {} if job.alone else SHARED_CACHE
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "OMP_NUM_THREADS": _threads(self._machine)}
        log = (self._out / f"{job.name}.log").open("w")
        process = subprocess.Popen(
            shlex.split(job.command.format(**places)),
            cwd=ROOT,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return Running(job, gpus, process, log, time.monotonic())

    def _say(self) -> None:
        status = {
            "running": {r.job.name: {"gpus": r.gpus, "s": round(time.monotonic() - r.began)} for r in self._running},
            "ended": self.ended,
            "waiting": [job.name for job in self._waiting],
            "more GPUs than there are": self.left_out,
        }
        scratch = self._out / "status.json.new"
        scratch.write_text(json.dumps(status, indent=2) + "\n")
        scratch.replace(self._out / "status.json")


def _threads(machine: Machine) -> str:
    """Left alone, each process would take all cores, and a start minutes."""
    return str(max(1, (os.cpu_count() or 1) // (4 * machine.num_gpus)))


def ended_in(out: Path) -> dict[str, dict[str, float]]:
    """What ended in that folder until now, and how."""
    status = out / "status.json"
    return json.loads(status.read_text())["ended"] if status.is_file() else {}


def chosen(names: Sequence[str], jobs: Sequence[Job] = JOBS, done: Iterable[str] = ()) -> list[Job]:
    """Those jobs and what they come after and is not ``done``, in the order of ``jobs``; all without names.

    Raises KeyError.
    """
    by_name = {job.name: job for job in jobs}
    wanted, open_ = set(), list(names or by_name)
    while open_:
        name = open_.pop()
        wanted.add(name)
        open_ += set(by_name[name].after) - wanted - set(done)
    return [job for job in jobs if job.name in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.together", description="GPU jobs side by side.")
    parser.add_argument("names", nargs="*", help="jobs; all without any")
    parser.add_argument("--out", type=Path, help="a folder for logs and figures")
    parser.add_argument("--gpus", type=int, help="how many there are; by default as many as torch sees")
    parser.add_argument("--list", action="store_true", help="say which jobs there are")
    options = parser.parse_args(argv)
    if options.list:
        for job in JOBS:
            print(f"{job.name:20} {job.gpus} GPU{'s' * (job.gpus > 1)}{', alone' * job.alone:8} {job.command}")
        return 0
    if options.out is None:
        parser.error("--out says where logs and figures go")
    try:
        done = [name for name, end in ended_in(options.out).items() if end["exit"] == 0]
        jobs = chosen(options.names, done=done)
    except KeyError as error:
        parser.error(f"there is no job {error}; --list names them")
    if options.gpus is None:
        import torch

        options.gpus = torch.cuda.device_count()
    together = Together(jobs, Machine(options.gpus), options.out.resolve())
    fine = together.run()
    print((options.out / "status.json").read_text(), end="")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
