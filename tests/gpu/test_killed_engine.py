"""vLLM engines killed under a pool: they come back with the learner's weights, and what they generated is issued again.

Prints the seconds to recover, and writes them to KEEL_FIGURES when that names a file.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from model import save_model
from model.tokenizer import save_byte_tokenizer
from rl.choices import Placement
from rl.config import Learner as LearnerSettings
from rl.config import Model, Recipe, Rollout, Sampling
from rl.fault_log import FaultLog
from rl.placement import shared_gpus
from rl.sample import Prompt, Sample
from rl.sync import Publisher, transport_for
from rl.system import reserve
from rollout.pool import EnginePool
from tests.gpu.figures_file import record
from tests.gpu.test_vllm_engine import make_module
from trainer.learner import Learner
from trainer.sender import Offer, Sent

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SAMPLING = Sampling(top_p=0.95, max_tokens=400)
SEEDS = range(8)
LIMIT_S = 480.0
"""An engine starts three times."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "model"
    save_model(make_module(0), path)
    save_byte_tokenizer(path)
    return path


class Rig:
    """A learner rank, an engine, and the run's way of keeping the one on the other's weights."""

    def __init__(self, learner: Learner, pool: EnginePool, publisher: Publisher) -> None:
        self.learner, self.pool, self.publisher = learner, pool, publisher
        self.recovery_s: dict[str, float] = {}

    async def group(self) -> list[Sample]:
        prompt = Prompt(id="faults/0", domain="faults", token_ids=np.arange(100, 140, dtype=np.int32))
        assert prompt.token_ids is not None
        return await self.pool.generate_group(prompt, prompt.token_ids, SAMPLING, list(SEEDS))

    async def generating(self) -> None:
        while not sum(stats.num_generated_tokens for stats in await self.pool.stats()):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)

    async def back(self, what: str) -> None:
        began = time.monotonic()
        while self.pool.is_up(0):
            await asyncio.sleep(0.01)
        while not self.pool.is_up(0):
            await asyncio.sleep(0.05)
            self.pool._check()
        self.recovery_s[what] = time.monotonic() - began

    @property
    def pid(self) -> int:
        process = self.pool.process_of(0)
        assert process is not None
        return process.pid

    def report(self) -> None:
        print("faults:", dict(self.pool.faults.totals), "seconds to recover:")
        record(**self.recovery_s)


@asynccontextmanager
async def rig(model_path: Path, placement: Placement) -> AsyncIterator[Rig]:
    recipe = Recipe(
        name="faults",
        model=Model(path=str(model_path), dtype="bfloat16", max_context=1024),
        sampling=SAMPLING,
        rollout=Rollout(engine="vllm", max_num_seqs=16, gpu_memory=0.3, cuda_graphs=False),  # type: ignore
        learner=LearnerSettings(ranks=1, zero_stage=2),
        placement=placement,
    )
    shared = placement == Placement.shared
    reservation = await reserve(recipe)
    learner = await Learner.start(recipe, model_path, actor_options=reservation.ranks)
    gpus = shared_gpus(await learner.gpus(), 1) if shared else ()
    faults = FaultLog(lambda sentence: print("warning:", sentence))
    pool = await EnginePool.start(recipe, model_path, actor_options=reservation.engines, gpus=gpus, faults=faults)
    try:
        yield Rig(learner, pool, Publisher(transport_for(recipe, learner, pool), shared=shared))
    finally:
        pool.close()
        learner.close()
        reservation.release()


def vllms_own(pid: int) -> list[int]:
    """vLLM's processes below an engine's actor."""
    below = [
        int(name) for task in Path(f"/proc/{pid}/task").iterdir() for name in (task / "children").read_text().split()
    ]
    helpers = (b"reaper.py", b"resource_tracker")
    return [one for one in below if not any(name in Path(f"/proc/{one}/cmdline").read_bytes() for name in helpers)]


def test_an_engine_on_a_shared_gpu_is_killed_while_it_generates_and_while_it_sleeps(cluster: None, model_path: Path):
    async def run() -> None:
        async with rig(model_path, Placement.shared) as it:
            await it.publisher.publish(0)
            alone = await it.group()
            await it.publisher.publish(1)
            offer = await it.learner.offer_weights(first=True)
            assert isinstance(offer, Offer) and offer.stays  # so it is DeepSpeed's own memory that engines read here
            await it.learner.drop_offer()

            under_way = asyncio.create_task(it.group())
            await it.generating()
            os.kill(it.pid, signal.SIGKILL)
            await it.back("vllm killed while generating, shared GPU")
            samples = await under_way
            for one, other in zip(samples, alone, strict=True):
                assert set(one.versions[one.sampled].tolist()) == {1}
                assert one.token_ids[:60].tolist() == other.token_ids[:60].tolist()  # 20 of them sampled

            await it.publisher.hold()
            await it.pool.sleep()
            for process in vllms_own(it.pid):  # the actor itself lives on, and finds out when it is to wake
                os.kill(process, signal.SIGKILL)
            await it.learner.wake()
            await it.learner.sleep()
            returning = asyncio.create_task(it.back("vllm's own process killed while asleep"))
            await it.publisher.publish(2)
            await returning
            assert {version for one in await it.group() for version in one.versions[one.sampled]} == {2}
            assert it.pool.faults.totals["engine_restarts"] == 2
            it.report()

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


@needs_two
def test_an_engine_is_killed_while_weights_are_broadcast_to_it(cluster: None, model_path: Path):
    """NCCL waits for ever for a partner that died: the sender gives up, and the group is made anew."""

    async def run() -> None:
        async with rig(model_path, Placement.split) as it:
            await it.publisher.publish(0)
            killed, sending, intact = vllms_own(it.pid), asyncio.Event(), it.learner.send_weights

            async def send_to_a_stopped_engine() -> Sent:
                """The engine has made itself ready, and takes nothing of what is broadcast."""
                for process in killed:
                    os.kill(process, signal.SIGSTOP)
                sending.set()
                return await intact()

            it.learner.send_weights = send_to_a_stopped_engine  # pyright: ignore[reportAttributeAccessIssue]
            publishing = asyncio.create_task(it.publisher.publish(1))
            await sending.wait()
            await asyncio.sleep(3.0)
            assert not publishing.done()
            it.learner.send_weights = intact
            for process in (*killed, it.pid):
                os.kill(process, signal.SIGKILL)
            returning = asyncio.create_task(it.back("vllm killed while weights are broadcast"))
            began = time.monotonic()
            await publishing
            it.recovery_s["learner free again"] = time.monotonic() - began
            await returning
            await it.publisher.publish(2)
            assert {version for one in await it.group() for version in one.versions[one.sampled]} == {2}
            it.report()

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))
