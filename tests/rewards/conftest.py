import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl.sample import Prompt, Sample, Status

MakeSample = Callable[..., Sample]


def make(
    reply: str = "4",
    *,
    answer: Any = "4",
    thinking: bool = False,
    status: Status = Status.FINISHED,
    index: int = 0,
    num_sampled: int = 3,
    domain: str = "math",
) -> Sample:
    sampled = np.array([False] * 2 + [True] * num_sampled)
    return Sample(
        prompt=Prompt(
            id=f"{domain}/1",
            domain=domain,
            messages=({"role": "user", "content": "2+2?"},),
            answer=answer,
            thinking=thinking,
        ),
        index=index,
        token_ids=np.arange(len(sampled), dtype=np.int32),
        sampled=sampled,
        rollout_logprobs=np.where(sampled, -0.5, 0).astype(np.float32),
        versions=np.where(sampled, 3, -1).astype(np.int32),
        status=status,
        reply=reply,
    )


@pytest.fixture(scope="session")
def make_sample() -> MakeSample:
    """Builds a sample from its reply and whatever else matters to the test."""
    return make


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    if started_here:
        ray.shutdown()


USER_REWARDS = """
import asyncio, ctypes, os, signal, threading, time
from rewards import Reward

def brevity(sample, *, target=10, weight=1.0):
    return weight * min(1.0, target / max(1, len(sample.reply)))

def length(sample):
    return len(sample.reply)

def with_parts(sample):
    return Reward(0.5, {"style": 0.25, "facts": 0.75}, comment="dull")

def raises(sample):
    raise KeyError("no such rubric")

def leaves(sample):
    raise SystemExit(3)

def returns_text(sample):
    return "good"

def returns_nan(sample):
    return float("nan")

def hangs_on_hang(sample):
    while sample.reply == "hang":
        time.sleep(0.01)
    return 1.0

def holds_the_interpreter(sample):
    if sample.reply == "hang":
        ctypes.PyDLL(None).sleep(3600)   # PyDLL does not release the interpreter's lock
    return 1.0

def dies_on_die(sample):
    if sample.reply == "die":
        os._exit(11)
    return 1.0

def crashes_on_crash(sample):
    if sample.reply == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0

async def slow_but_sure(sample):
    await asyncio.sleep(0.3)
    return 1.0

class OneAtATime:
    concurrency = 1
    def __init__(self):
        self.running = 0
    async def __call__(self, sample):
        self.running += 1
        most = self.running
        await asyncio.sleep(0.15)
        self.running -= 1
        return most

async def never_on_hang(sample):
    if sample.reply == "hang":
        await asyncio.Event().wait()
    return 1.0

async def blocks_on_hang(sample):
    while sample.reply == "hang":
        time.sleep(0.01)
    return 1.0

async def async_raises(sample):
    raise RuntimeError("judge is offline")

def ranks(samples):
    order = sorted(len(sample.reply) for sample in samples)
    return [order.index(len(sample.reply)) for sample in samples]

async def async_ranks(samples, *, best=1.0):
    return [best if len(sample.reply) == max(len(other.reply) for other in samples) else 0 for sample in samples]

def too_few(samples):
    return [1.0]

def sees(sample, *, name):
    return Reward(float(name in os.environ), {"path": float("PATH" in os.environ)})

def where(sample):
    return Reward(1.0, {"pid": os.getpid(), "main": threading.current_thread() is threading.main_thread()})

def flaky(sample, *, marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        raise OSError("first time")
    return 1.0

def dies_once(sample, *, marker):
    with open(marker, "a") as log:
        log.write(".")
    if len(open(marker).read()) <= 2:    # with the group, and the first time alone
        os._exit(1)
    return 1.0

class Counter:
    def __init__(self, *, start):
        if start < 0:
            raise ValueError(f"start must not be negative, not {start}")
        self.start = start
    def __call__(self, sample):
        self.start += 1
        return self.start

class NotCallable:
    pass

NUMBER = 7
"""


@pytest.fixture
def user_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a user's rewards in the current directory; its name differs so that no test sees another's."""
    name = f"user_rewards_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(USER_REWARDS)
    (tmp_path / f"{name}_broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / f"{name}_exits.py").write_text("raise SystemExit('not today')\n")
    monkeypatch.chdir(tmp_path)
    return name
