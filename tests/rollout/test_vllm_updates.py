"""In which order a vLLM engine is asked for an update, with something that answers in vLLM's place."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from model import checksums
from rollout.held_weights import HeldWeights
from rollout.vllm_engine import VllmEngineActor

WEIGHTS = {"model.norm.weight": torch.randn(8), "model.embed_tokens.weight": torch.randn(6, 8)}
DEATHS, TRANSFER = "vllm.v1.engine.exceptions", "vllm.distributed.weight_transfer.base"
DESCRIBED = {name: (tuple(tensor.shape), "float32") for name, tensor in WEIGHTS.items()}


class StandIn:
    """vLLM, of one worker that holds ``WEIGHTS``; ``fails`` names a method of workers that raises."""

    errored = False

    def __init__(self, fails: str = "") -> None:
        self.asked: list[str] = []
        self._fails = fails
        self.engine_core = SimpleNamespace(pause_scheduler_async=self._pause)

    async def _pause(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", True)
        self.asked.append("pause")

    async def collective_rpc(self, method: str, args: Sequence[Any] = ()) -> list[Any]:
        self.asked.append(method)
        if method == self._fails:
            raise RuntimeError("the group broke")
        (known,) = args
        return [HeldWeights(WEIGHTS, DESCRIBED, rank=0, size=1).answer(known).plain()]

    async def start_weight_update(self) -> None:
        self.asked.append("start")

    async def update_weights(self, request: Any) -> None:
        self.asked.append("update")
        await asyncio.sleep(0)  # what is asked meanwhile comes next
        if self._fails == "update_weights":
            raise RuntimeError("no learner rank offers weights")

    async def update_weight_version(self, version: str) -> None:
        self.asked.append(f"version {version}")

    async def resume_generation(self) -> None:
        self.asked.append("resume")


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = "vllm.distributed.weight_transfer.base"
    for name in (
        "vllm",
        "vllm.v1",
        "vllm.v1.engine",
        DEATHS,
        "vllm.distributed",
        transfer.rpartition(".")[0],
        transfer,
    ):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[DEATHS].EngineDeadError = ConnectionError  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules[transfer].WeightTransferUpdateRequest = SimpleNamespace  # pyright: ignore[reportAttributeAccessIssue]


def actor_of(stand_in: StandIn) -> VllmEngineActor:
    actor = VllmEngineActor()
    actor._engine = stand_in
    return actor


def test_a_broadcast_is_one_question_of_the_workers_and_is_verified():
    actor = actor_of(vllm := StandIn())
    for version in (3, 4):
        assert asyncio.run(actor.take_broadcast(version)) == checksums(WEIGHTS.items())
    assert vllm.asked == [
        *("pause", "take_broadcast", "version 3", "resume"),
        *("pause", "take_broadcast", "version 4", "resume"),
    ]
    assert actor._version == 4 and not actor._standing


def test_nothing_is_generated_with_half_of_a_broadcast():
    actor = actor_of(vllm := StandIn(fails="take_broadcast"))
    with pytest.raises(RuntimeError, match="the group broke"):
        asyncio.run(actor.take_broadcast(1))
    assert vllm.asked == ["pause", "take_broadcast"]
    assert actor._version == 0 and actor._standing


def test_a_commit_needs_an_update_and_goes_on_at_once():
    actor = actor_of(vllm := StandIn())
    with pytest.raises(ValueError, match="nothing was received"):
        asyncio.run(actor.commit(1))
    asyncio.run(actor.begin_update())
    assert asyncio.run(actor.commit(1)) == checksums(WEIGHTS.items())
    assert vllm.asked == ["pause", "start", "finish_update", "version 1", "resume"]


BUCKET, ALL = {"parts": {"gpu": []}, "stays": False}, {"parts": {"gpu": []}, "stays": True}


def test_buckets_are_finished_with_the_commit():
    actor = actor_of(vllm := StandIn())

    async def run() -> dict[str, int]:
        await actor.begin_update()
        await actor.receive(BUCKET)
        await actor.receive(BUCKET)
        return await actor.commit(1)

    assert asyncio.run(run()) == checksums(WEIGHTS.items())
    assert vllm.asked == ["pause", "start", "update", "update", "finish_update", "version 1", "resume"]


def test_what_comes_at_once_is_finished_before_the_commit():
    actor = actor_of(vllm := StandIn())

    async def run() -> None:
        for version in (1, 2):
            await actor.begin_update()
            await actor.receive(ALL)
            assert vllm.asked == ["pause", "start", "update", "finish_update"]
            assert actor._version == version - 1 and actor._standing  # nothing is generated before the commit
            assert await actor.commit(version) == checksums(WEIGHTS.items())
            assert vllm.asked[4:] == [f"version {version}", "resume"]
            vllm.asked.clear()

    asyncio.run(run())


@pytest.mark.parametrize("fails", ["update_weights", "finish_update"])
def test_an_update_that_fails_or_breaks_off_leaves_nothing_to_the_next(fails: str, caplog: pytest.LogCaptureFixture):
    actor = actor_of(vllm := StandIn(fails))

    async def run() -> None:
        await actor.begin_update()
        if fails == "update_weights":
            with pytest.raises(RuntimeError, match="no learner rank"):
                await actor.receive(ALL)
        else:
            await actor.receive(ALL)  # the commit would say it, but the learner's end breaks off first
            await asyncio.sleep(0.01)
        vllm._fails = ""
        vllm.asked.clear()
        await actor.begin_update()
        await actor.receive(BUCKET)
        assert await actor.commit(1) == checksums(WEIGHTS.items())

    asyncio.run(run())
    gc.collect()  # asyncio tells of failures that nobody asked for when they are thrown away
    assert vllm.asked == ["pause", "start", "update", "finish_update", "version 1", "resume"]
    assert not caplog.records


def test_a_commit_says_what_failed_before_it_and_nothing_goes_on():
    actor = actor_of(vllm := StandIn("finish_update"))

    async def run() -> None:
        await actor.begin_update()
        await actor.receive(ALL)
        with pytest.raises(RuntimeError, match="the group broke"):
            await actor.commit(1)

    asyncio.run(run())
    assert vllm.asked == ["pause", "start", "update", "finish_update"]
    assert actor._version == 0 and actor._standing
