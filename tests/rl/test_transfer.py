"""Weights from a learner of two ZeRO-3 ranks, by broadcast, into other processes that hold them as vLLM's workers do.

Everything is what runs on GPUs but for three things: gloo is in NCCL's place, the receiving processes have no vLLM
around the receiver, and what vLLM's loader does is done by an independent hand (`tests.rollout.vllm_shards`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from safetensors.torch import load_file

from rl.errors import RunStopped
from rl.initial_model import create_initial_model, initial_config
from rl.sync import Broadcast, publish
from rollout.engine import EngineDied
from rollout.held_weights import Answer, Verifier
from rollout.pool import EnginePool
from tests.rl.receiving_worker import Worker
from tests.rl.tiny_runs import tiny_recipe
from trainer.learner import Learner

TWO_PARTITIONED = ("learner.ranks=2", "learner.zero_stage=3")


class WorkersOnly:
    """As much of an EnginePool as a transport needs: engines of two workers each."""

    def __init__(self, num_engines: int) -> None:
        self.engines = [self._new() for _ in range(num_engines)]
        self.down: set[int] = set()
        self.trouble = self.join_trouble = self.flip = ""
        self.largest = 0
        self.sums: dict[int, dict[str, int]] = {}  # of the last update, by engine
        self.verifier = Verifier()

    @staticmethod
    def _new() -> list[Any]:
        worker = ray.remote(Worker).options(num_cpus=0)
        return [worker.remote(rank, 2) for rank in range(2)]

    @property
    def present(self) -> list[int]:
        return [index for index in range(len(self.engines)) if index not in self.down]

    def restart(self, engines: Sequence[int], reason: str) -> None:
        for index in engines:
            for worker in self.engines[index]:
                ray.kill(worker)
            self.engines[index] = self._new()
        self.down |= set(engines)

    def membership(self, engines: Sequence[int]) -> tuple[Any, ...]:
        return tuple(worker for index in engines for worker in self.engines[index])

    def num_workers(self, engines: Sequence[int]) -> int:
        return 2 * len(engines)

    async def join_transfer(self, engine: int, *, first_rank: int, **group: Any) -> None:
        troubles = [self.join_trouble if engine == 0 else "", ""]
        joining = [
            asyncio.wrap_future(worker.join.remote(trouble, rank=first_rank + place, **group).future())
            for place, (worker, trouble) in enumerate(zip(self.engines[engine], troubles, strict=True))
        ]
        try:
            await asyncio.gather(*joining)
        except RayActorError as error:
            self.down.add(engine)
            raise EngineDied(f"engine {engine} died during join_transfer") from error
        except RayTaskError as error:
            raise error.cause from error

    async def take_broadcast(self, version: int, engine: int) -> dict[str, int]:
        workers = self.membership([engine])
        self.sums.pop(engine, None)
        troubles = [self.trouble if engine == 0 else ""] + [""] * (len(workers) - 1)
        calls = [
            asyncio.wrap_future(worker.receive.remote(trouble).future())
            for worker, trouble in zip(workers, troubles, strict=True)
        ]
        waiting = set(calls)
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=20, return_when=asyncio.FIRST_EXCEPTION)
            for error in [call.exception() for call in done]:
                if isinstance(error, RayActorError):  # a worker takes its engine along
                    raise EngineDied(f"engine {engine} died during take_broadcast") from error
            if not done:
                break
        try:
            self.largest = max([await call for call in calls])
        except RayTaskError as error:
            raise error.cause from error  # as EnginePool does
        flips = ["", self.flip if engine == len(self.engines) - 1 else ""]
        known = self.verifier.known
        answers = await asyncio.gather(*(w.held.remote(known, f) for w, f in zip(workers, flips, strict=True)))
        while self.trouble == "dies at the end" and engine == 0:
            if 1 in self.sums:
                self.down.add(engine)
                raise EngineDied("engine 0 died during take_broadcast")
            await asyncio.sleep(0.01)
        self.sums[engine] = self.verifier.checksums([Answer(*fields) for fields in answers])
        return self.sums[engine]

    async def peak_memory_gb(self) -> float:
        return 0.0

    def close(self) -> None:
        for worker in (worker for engine in self.engines for worker in engine):
            ray.kill(worker)  # pyright: ignore[reportArgumentType]


@asynccontextmanager
async def connected(
    folder: Path, num_engines: int, *overrides: str
) -> AsyncIterator[tuple[Broadcast, Learner, WorkersOnly]]:
    recipe = tiny_recipe(folder, "model.dtype=bfloat16", *overrides)
    assert recipe.model.init is not None
    create_initial_model(initial_config(recipe.model.init, recipe.model.max_context), folder / "model", seed=3)
    pool = WorkersOnly(num_engines)
    learner = await Learner.start(recipe, folder / "model")
    try:
        yield Broadcast(learner, cast(EnginePool, pool)), learner, pool
    finally:
        learner.close()
        pool.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 200))


def test_two_engines_of_two_workers_hold_what_the_learner_sent(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    intact = Learner.send_weights
    monkeypatch.setattr(Learner, "send_weights", lambda learner: intact(learner, max_bytes=8192))

    async def test() -> None:
        async with connected(tmp_path, 2, *TWO_PARTITIONED) as (transport, learner, pool):
            for version in (0, 1):
                sync = await publish(transport, version)
            await learner.save_model(tmp_path / "saved")
            saved = load_file(tmp_path / "saved" / "model.safetensors")
            assert sync.num_bytes == sum(tensor.nbytes for tensor in saved.values())
            assert pool.largest < sync.num_bytes / 4  # bounded, although no rank holds the whole model
            for engine in pool.engines:
                for received in await asyncio.gather(*(worker.received.remote() for worker in engine)):
                    assert received.keys() == saved.keys()
                    assert all(torch.equal(received[name], saved[name]) for name in saved)

            pool.flip = "model.layers.1.mlp.experts.routed_experts.w2_weight"
            with pytest.raises(
                RunStopped, match=r"of version 2 .*: model\.layers\.1\.mlp\.experts\.down_proj .* engine 1"
            ):
                await publish(transport, 2)

    run(test)


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        ("fails", "weights of version 1 did not reach the engines: .*the loader broke$"),
        ("hangs", "weights of version 1 did not reach the engines within 3 s"),
    ],
)
def test_trouble_on_the_way_ends_in_one_sentence_and_not_in_waiting(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, sentence: str
):
    async def test() -> None:
        async with connected(tmp_path, 1) as (transport, _, pool):
            await publish(transport, 0)
            pool.trouble = trouble
            monkeypatch.setattr("rl.sync.UPDATE_S", 3.0 if trouble == "hangs" else 120.0)
            began = time.monotonic()
            with pytest.raises(RunStopped, match=sentence) as stopped:
                await publish(transport, 1)
            assert "\n" not in str(stopped.value)
            assert time.monotonic() - began < 60
            assert transport._members == ()  # nobody sends anything to that group again

    run(test)


def test_an_engine_that_dies_amid_a_broadcast_holds_nobody_up(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The others, half written, are started again too; the next update finds them in a group of its own."""
    intact = Learner.send_weights
    monkeypatch.setattr(Learner, "send_weights", lambda learner: intact(learner, max_bytes=8192))

    async def test() -> None:
        async with connected(tmp_path, 2, *TWO_PARTITIONED) as (transport, learner, pool):
            await publish(transport, 0)
            pool.trouble = "dies"
            began = time.monotonic()
            sync = await publish(transport, 1)
            assert pool.down == {0, 1} and sync.checksums == await learner.checksums()
            # A broadcast that nobody takes is not left to stand until another group is opened.
            assert await learner._one(0, "__ray_call__", lambda rank: rank.sender._group is None)
            print(f"seconds until the learner is free again: {time.monotonic() - began:.1f}")
            assert time.monotonic() - began < 60
            pool.down, pool.trouble = set(), ""
            assert (await publish(transport, 2)).checksums == sync.checksums
            # One engine alone, as when it comes back between two updates; then both again.
            sent, sums = await transport.update(2, [1])
            assert sums == {1: sent.checksums}
            await publish(transport, 3)

    run(test)


def test_an_engine_that_dies_when_another_has_it_all_takes_nobody_along(cluster: None, tmp_path: Path):
    async def test() -> None:
        async with connected(tmp_path, 2) as (transport, learner, pool):
            await publish(transport, 0)
            pool.trouble = "dies at the end"
            sent, sums = await transport.update(1, [0, 1])
            assert pool.down == {0} and sums == {1: sent.checksums} and sent.checksums == await learner.checksums()
            pool.trouble = ""
            await publish(transport, 2)
            assert pool.sums.keys() == {1}

    run(test)


def test_an_engine_that_dies_while_it_joins_holds_nobody_up(cluster: None, tmp_path: Path):
    """Before it is there, or when all are and connect; the other engine is as it was, and gets the weights."""

    async def test() -> None:
        async with connected(tmp_path, 2) as (transport, learner, pool):
            for version, moment in enumerate(("before", "amid")):
                pool.join_trouble = moment
                began = time.monotonic()
                sync = await publish(transport, version)
                print(f"seconds until the weights were there ({moment}): {time.monotonic() - began:.1f}")
                assert time.monotonic() - began < 60
                assert pool.present == [1] and sync.checksums == await learner.checksums()
                assert pool.sums == {1: sync.checksums}
                pool.restart([0], "it died")
                pool.down = set()

    run(test)


def test_a_learner_rank_that_dies_is_named(cluster: None, tmp_path: Path):
    async def test() -> None:
        async with connected(tmp_path, 1, *TWO_PARTITIONED) as (transport, learner, _):
            await publish(transport, 0)
            ray.kill(learner._actors[1])
            with pytest.raises(RunStopped, match="learner rank 1 died during"):
                await publish(transport, 1)

    run(test)
