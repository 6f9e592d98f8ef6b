"""Publishing weights into real engine actors, intact and not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import ray
import torch

from model import LanguageModel, checksums, load_model
from rl.config import Sampling
from rl.errors import RunStopped
from rl.initial_model import create_initial_model, initial_config
from rl.sync import ObjectStore, Publisher, SharedMemory, Transport, publish, verify
from rollout.engine import EngineDied
from rollout.pool import EnginePool
from tests.rl.tiny_runs import assert_one_sentence, make_prompt, run_here, tiny_recipe
from trainer.learner import Learner, WeightBuckets
from trainer.sender import Offer, Sent

VICTIM = "model.layers.1.mlp.experts.down_proj"


def test_verify_accepts_equal_checksums():
    verify({"a": 1, "b": 2}, {"b": 2, "a": 1}, place="engine 0", version=3)


@pytest.mark.parametrize(
    ("actual", "sentence"),
    [
        ({"a": 1, "b": 5}, "weights of version 3 did not arrive intact: b differs in engine 1"),
        ({"a": 1}, "weights of version 3 did not arrive intact: b is on one side only in engine 1"),
        ({"a": 1, "b": 2, "c": 3}, "weights of version 3 did not arrive intact: c is on one side only in engine 1"),
    ],
)
def test_verify_names_the_tensor(actual: Mapping[str, int], sentence: str):
    with pytest.raises(RunStopped) as stopped:
        verify({"a": 1, "b": 2}, actual, place="engine 1", version=3)
    assert str(stopped.value) == sentence


class InProcessLearner:
    """Hands out a module's weights as the learner does; ``tamper`` changes what leaves, not what it believes."""

    def __init__(self, module: LanguageModel, tamper: Callable[[dict[str, torch.Tensor]], None] = lambda sent: None):
        self.module = module
        self.tamper = tamper

    async def weight_buckets(self) -> WeightBuckets:
        sent = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        self.tamper(sent)
        names = sorted(sent)
        halves = [{name: sent[name] for name in names[part::2]} for part in range(2)]
        num_bytes = sum(tensor.nbytes for tensor in sent.values())
        return WeightBuckets(
            refs=[ray.put(half) for half in halves], sent=Sent(num_bytes=num_bytes, checksums=self.checksums())
        )

    def checksums(self) -> dict[str, int]:
        return checksums(self.module.state_dict().items())


@asynccontextmanager
async def two_engines(folder: Path) -> AsyncIterator[tuple[EnginePool, LanguageModel]]:
    """Engines on version 0 of a model, and the model with every tensor moved on."""
    recipe = tiny_recipe(folder, "rollout.engines=2")
    assert recipe.model.init is not None
    create_initial_model(initial_config(recipe.model.init, recipe.model.max_context), folder / "model", seed=0)
    module = load_model(folder / "model")
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor += 0.01 * torch.randn_like(tensor)
    pool = await EnginePool.start(recipe, folder / "model")
    try:
        yield pool, module
    finally:
        pool.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


async def publish_from(learner: InProcessLearner, pool: EnginePool, version: int):
    return await publish(ObjectStore(cast(Learner, learner), pool), version)


def test_publishing_through_real_engines(cluster: None, tmp_path: Path):
    def perturb(sent: dict[str, torch.Tensor]) -> None:
        sent[VICTIM].view(-1)[17] += 1e-6

    def forget(sent: dict[str, torch.Tensor]) -> None:
        del sent[VICTIM]

    async def test() -> None:
        async with two_engines(tmp_path) as (pool, module):
            sync = await publish_from(InProcessLearner(module), pool, version=1)
            assert sync.num_tensors == len(module.state_dict())
            assert sync.num_bytes == sum(tensor.nbytes for tensor in module.state_dict().values())
            assert sync.metrics() == {"sync/version": 1, "sync/bytes": sync.num_bytes, "sync/verified": 1.0}

            sampling = Sampling(max_tokens=4)
            (sample,) = await pool.generate_group(make_prompt("1"), np.arange(4, dtype=np.int32), sampling, seeds=[0])
            assert set(sample.versions[sample.sampled]) == {1}

            with pytest.raises(RunStopped, match=f"of version 2 .*: {VICTIM} differs in engine 0"):
                await publish_from(InProcessLearner(module, perturb), pool, version=2)
            await publish_from(InProcessLearner(module), pool, version=3)

            # A tensor that is not sent leaves the engine on its old value, once the learner has moved on.
            with torch.no_grad():
                module.state_dict()[VICTIM] += 1
            with pytest.raises(RunStopped, match=f"of version 4 .*: {VICTIM} differs in engine 0"):
                await publish_from(InProcessLearner(module, forget), pool, version=4)
            await publish_from(InProcessLearner(module), pool, version=5)

            # Something that reaches one engine alone is found in that engine.
            await pool._engines[1].actor.stage.remote({VICTIM: torch.zeros_like(module.state_dict()[VICTIM])})
            expected = InProcessLearner(module).checksums()
            first, second = (await pool.commit(6)).values()
            verify(expected, first, place="engine 0", version=6)
            with pytest.raises(RunStopped, match=f"{VICTIM} differs in engine 1"):
                verify(expected, second, place="engine 1", version=6)

            with pytest.raises(ValueError, match=r"no parameter or buffer model\.extra"):
                await pool.stage([{"model.extra": torch.zeros(1)}])
            with pytest.raises(ValueError, match=rf"{VICTIM} has shape \(2,\)"):
                await pool.stage([{VICTIM: torch.zeros(2)}])

    run(test)


class Offering:
    """A learner that offers two buckets, and an engine that takes them in; ``told`` is what began and ended when."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._left = 2

    async def _does(self, what: str, steps: int) -> None:
        self.told.append(what)
        for _ in range(steps):
            await asyncio.sleep(0)
        self.told.append(f"{what} done")

    async def offer_weights(self, *, first: bool) -> Offer | Sent:
        self._left = 2 if first else self._left
        await self._does("offer", 2)
        self._left -= 1
        if self._left < 0:
            return Sent(num_bytes=7, checksums={"w": 1})
        return Offer(buckets=[str(self._left)], parts={"gpu": [(0, "")]})

    async def begin_update(self, engines: list[int]) -> None:
        await self._does("begin", 5)

    async def receive(self, offer: Mapping[str, Any], engines: list[int]) -> None:
        await self._does(f"receive {offer['buckets'][0]}", 5)

    async def commit(self, version: int, engines: list[int]) -> dict[int, dict[str, int]]:
        await self._does(f"commit {version}", 1)
        return {engine: {"w": 1} for engine in engines}


def test_through_shared_memory_the_next_bucket_is_made_while_engines_are_busy():
    both = Offering()
    transport = SharedMemory(cast(Learner, both), cast(EnginePool, both))
    sent, sums = asyncio.run(transport.update(3, [0, 1]))
    assert sent.num_bytes == 7 and sums == {0: {"w": 1}, 1: {"w": 1}}
    assert both.told == [
        *("offer", "begin", "offer done", "begin done"),
        *("offer", "receive 1", "offer done", "receive 1 done"),
        *("offer", "receive 0", "offer done", "receive 0 done"),
        *("commit 3", "commit 3 done"),
    ]


@pytest.mark.parametrize("learner_fails", [False, True])
def test_an_engine_that_does_not_take_weights_in_is_started_again_unless_the_learner_failed(learner_fails: bool):
    async def checksums() -> dict[str, int]:
        if learner_fails:
            raise RuntimeError("learner rank 0 died")
        return {}

    async def update(version: int, engines: list[int]) -> None:
        raise ValueError("out of memory\nin several lines")

    async def start() -> None:
        pass

    async def test() -> None:
        pool, learner = SimpleNamespace(is_up=lambda index: False), SimpleNamespace(checksums=checksums)
        publisher = Publisher(cast(Transport, SimpleNamespace(pool=pool, learner=learner, update=update)))
        publisher.version = 3
        if learner_fails:
            await publisher.welcome(1, start)
        else:
            with pytest.raises(EngineDied, match=r"^engine 1 did not take weights in: out of memory$"):
                await publisher.welcome(1, start)

    asyncio.run(test())


def test_a_run_whose_weights_do_not_arrive_stops_and_names_the_tensor(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Everything is real but one bit on the way from the learner to the engines, in the second update."""
    intact = Learner.weight_buckets
    calls = 0

    async def flip(learner: Learner, max_bytes: int = 256 << 20) -> WeightBuckets:
        nonlocal calls
        buckets = await intact(learner, max_bytes)
        calls += 1
        if calls < 3:  # version 0 and version 1
            return buckets
        refs = []
        for ref in buckets.refs:
            bucket = {name: tensor.clone() for name, tensor in (await ref).items()}
            if VICTIM in bucket:
                bucket[VICTIM].view(-1).view(torch.int32)[3] ^= 1
            refs.append(ray.put(bucket))
        return WeightBuckets(refs=refs, sent=buckets.sent)

    monkeypatch.setattr(Learner, "weight_buckets", flip)
    code, stopped = run_here(tmp_path, "steps=4")
    assert code == 1
    assert_one_sentence(capsys.readouterr().err, "weights of version 2 did not arrive intact", VICTIM, "engine 0")
    assert stopped.status["status"] == "stopped"
    assert VICTIM in stopped.status["reason"]
    assert [row["step"] for row in stopped.rows] == [1]
    assert not (stopped.path / "model").exists()
    assert (stopped.path / "report.html").exists()
