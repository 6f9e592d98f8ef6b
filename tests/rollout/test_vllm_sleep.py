"""What a sleeping vLLM worker keeps, on host memory that is lost and handed back as vLLM's allocator does it."""

import asyncio
import ctypes
import itertools
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.vllm_engine import VllmEngineActor
from rollout.vllm_layout import held_parts
from rollout.vllm_sleep import SleepingMemory, gaps
from tests.rollout.test_vllm_layout import MODELS
from tests.rollout.vllm_shards import Shapes, as_vllm

DEFERRABLE = ("weights", "kv_cache")  # vllm.device_allocator.DEFERRABLE_TAGS
OTHERS_WROTE = 0xFF  # NaN in bfloat16, float32 and e4m3


@dataclass(eq=False)
class Allocation:
    handle: tuple[int, int, int, int]
    tag: str
    cpu_backup_tensor: torch.Tensor | None = None
    is_asleep: bool = False


class HostCudart:
    def cudaMemcpy(self, dst: int, src: int, count: int) -> None:
        ctypes.memmove(dst, src, count)

    def cudaMemset(self, devPtr: int, value: int, count: int) -> None:
        ctypes.memset(devPtr, value, count)


class Worker:
    """Memory by tag, and vLLM's sleep of level 2 and partial wakes (`CuMemAllocator.sleep` and ``wake_up``)."""

    def __init__(self, **num_bytes: int) -> None:
        self.arenas = {tag: torch.zeros(size, dtype=torch.uint8) for tag, size in num_bytes.items()}
        self.allocations = {
            arena.data_ptr(): Allocation((0, len(arena), arena.data_ptr(), 0), tag)
            for tag, arena in self.arenas.items()
        }
        self.memory = SleepingMemory(self.allocations, HostCudart())

    def tensor(self, tag: str, offset: int, values: torch.Tensor) -> torch.Tensor:
        """One with a storage of its own inside an allocation, as torch's memory pools make them."""
        base = self.arenas[tag].data_ptr() + offset
        made = torch.frombuffer((ctypes.c_uint8 * values.nbytes).from_address(base), dtype=values.dtype)
        made.copy_(values.flatten())
        return made.view(values.shape)

    def sleep(self) -> None:
        for data in self.allocations.values():
            if data.tag in ("runtime", "cudagraph"):
                data.cpu_backup_tensor = self.arenas[data.tag].clone()
            self.arenas[data.tag].fill_(OTHERS_WROTE)
            data.is_asleep = True

    def resume(self, tags: list[str]) -> None:
        for data in self.allocations.values():
            if data.is_asleep and (data.tag in tags or data.tag not in DEFERRABLE):
                data.is_asleep = False
                if data.cpu_backup_tensor is not None:
                    self.arenas[data.tag].copy_(data.cpu_backup_tensor)
                    data.cpu_backup_tensor = None


def test_what_no_update_brings_is_there_again_after_a_sleep():
    worker = Worker(weights=1 << 12, kv_cache=1 << 10, workspace=256, runtime=256)
    weight = worker.tensor("weights", 512, torch.randn(16, 32))
    bounds = worker.tensor("weights", 512 + weight.nbytes, torch.arange(65, dtype=torch.int32))
    first = worker.tensor("weights", 0, torch.randn(100))
    state = worker.tensor("runtime", 64, torch.arange(10))
    for _ in range(2):  # a second sleep keeps anew
        constants = [tensor.clone() for tensor in (bounds, first, state)]
        assert worker.memory.keep([weight]) == (1 << 12) - weight.nbytes
        worker.sleep()
        assert not torch.equal(bounds, constants[0])
        worker.memory.wake(lambda: worker.resume(["weights"]))
        assert all(torch.equal(*pair) for pair in zip((bounds, first, state), constants, strict=True))
        assert worker.arenas["workspace"].count_nonzero() == 0
        assert (worker.arenas["kv_cache"] == OTHERS_WROTE).all()  # still another's
        weight.fill_(1.5)  # the update
        worker.memory.wake(lambda: worker.resume(["kv_cache"]))
        assert worker.arenas["kv_cache"].count_nonzero() == 0
        assert torch.equal(bounds, constants[0]) and (weight == 1.5).all()
        bounds.add_(1)


@pytest.mark.parametrize(("size", "by_expert"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", MODELS)
def test_a_parameter_that_the_learner_does_not_have_outlives_a_sleep(kind: str, size: int, by_expert: bool):
    """And of what an update brings nothing is kept: that is what a sleep without weights is for."""
    s = Shapes()
    weights = MODELS[kind](s)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    rank = size - 1
    held = as_vllm(weights, s, rank, size, by_expert=by_expert)
    held["model.layers.1.self_attn.sinks"] = torch.randn(48)
    rooms = [-(-tensor.nbytes // 512) * 512 for tensor in held.values()]
    worker = Worker(weights=sum(rooms), kv_cache=64)
    places = itertools.accumulate(rooms, initial=0)
    live = {name: worker.tensor("weights", at, held[name]) for name, at in zip(held, places, strict=False)}
    sinks = live.pop("model.layers.1.self_attn.sinks")
    kept = worker.memory.keep(part for _, _, part in held_parts(live, shapes, rank=rank, size=size))
    assert kept == sum(rooms) - sum(tensor.nbytes for tensor in live.values())
    worker.sleep()
    worker.memory.wake(lambda: worker.resume(["weights"]))
    assert torch.equal(sinks, held["model.layers.1.self_attn.sinks"])
    assert not any(tensor.any() for tensor in live.values())


def test_a_sleep_that_kept_the_weights_itself_gets_back_what_vllm_kept():
    worker = Worker(weights=1 << 10, kv_cache=1 << 8)
    weight = worker.tensor("weights", 0, torch.randn(64))
    before = worker.arenas["weights"].clone()
    worker.allocations[worker.arenas["weights"].data_ptr()].cpu_backup_tensor = before.clone()
    worker.sleep()
    worker.memory.wake(lambda: worker.resume(["weights", "kv_cache"]))
    assert torch.equal(worker.arenas["weights"], before) and weight.isfinite().all()
    assert worker.arenas["kv_cache"].count_nonzero() == 0


def test_memory_that_vllm_frees_meanwhile_is_not_written():
    worker = Worker(weights=256, kv_cache=64)
    worker.memory.keep([])
    worker.sleep()
    del worker.allocations[worker.arenas["weights"].data_ptr()]
    worker.memory.wake(lambda: worker.resume(["weights", "kv_cache"]))
    assert (worker.arenas["weights"] == OTHERS_WROTE).all()


spans = st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair)))


@given(spans, st.lists(spans, max_size=6))
def test_gaps_are_the_bytes_that_nothing_takes(whole: tuple[int, int], taken: list[tuple[int, int]]):
    found = gaps(whole, taken)
    free = set(range(*whole)).difference(*(range(*span) for span in taken))
    assert [at for span in found for at in range(*span)] == sorted(free)
    assert all(start < end for start, end in found)


class Calls:
    """Of `AsyncLLM`'s coroutines, in their order."""

    errored = False

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **settings: Any) -> None:
            self.seen.append((name, *args, *settings.values()))

        return call


@pytest.mark.parametrize("keep_weights", [False, True])
def test_workers_keep_before_a_sleep_without_weights(monkeypatch: pytest.MonkeyPatch, keep_weights: bool):
    errors: Any = ModuleType("vllm.v1.engine.exceptions")
    errors.EngineDeadError = type("EngineDeadError", (Exception,), {})
    monkeypatch.setitem(sys.modules, errors.__name__, errors)
    actor, calls = VllmEngineActor(), Calls()
    actor._engine, actor._shapes = calls, {"lm_head.weight": (5, 4)}
    asyncio.run(actor.sleep(keep_weights=keep_weights))
    asyncio.run(actor.sleep(keep_weights=keep_weights))  # it is asleep
    kept = [] if keep_weights else [("collective_rpc", "keep_beside_update", ({"lm_head.weight": (5, 4)},))]
    assert calls.seen == [*kept, ("sleep", 1 if keep_weights else 2, "keep")]


@pytest.mark.parametrize(
    ("asleep", "has_workers", "ended_by"),
    [(True, False, signal.SIGKILL), (True, True, signal.SIGTERM), (False, False, signal.SIGTERM)],
)
def test_vllms_process_is_not_asked_to_end_in_its_sleep(asleep: bool, has_workers: bool, ended_by: signal.Signals):
    """Asked, it would log an error of CUDA. One that is awake, or has workers to end, is asked as ever."""
    process = subprocess.Popen(["sleep", "60"])

    def shutdown() -> None:
        process.terminate()
        process.wait()

    manager = SimpleNamespace(processes=[process])
    core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
    actor = VllmEngineActor()
    actor._engine = SimpleNamespace(engine_core=core, shutdown=shutdown)
    actor._asleep, actor._has_workers = asleep, has_workers
    asyncio.run(actor.shutdown())
    assert process.returncode == -ended_by
