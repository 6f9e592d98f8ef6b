"""Weights of two learner ranks, out of their memory, into processes that hold them as vLLM's workers do.

Everything is what runs on GPUs but for three things: a rank's GPU is a name, its memory is shared by the operating
system instead of CUDA, and what vLLM does with it is done by an independent hand (`tests.rollout.vllm_shards`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import ray
import torch
from safetensors.torch import load_file

from rl.errors import RunStopped
from rl.initial_model import create_initial_model, initial_config
from rl.sync import SharedMemory, publish
from rollout.held_weights import Answer, Verifier
from rollout.pool import EnginePool
from tests.rl.sharing_worker import TakingWorker, put_on_a_gpu, train
from tests.rl.tiny_runs import tiny_recipe
from trainer.learner import Learner


class OneEngine:
    """As much of an EnginePool as the transport needs: an engine of two workers."""

    def __init__(self) -> None:
        kind = ray.remote(TakingWorker).options(num_cpus=0)
        self.workers: list[Any] = [kind.remote(rank, 2) for rank in range(2)]
        self.offers: list[Mapping[str, Any]] = []
        self.num_opened: list[int] = []
        self.flip = ""
        self._verifier = Verifier()

    present = (0,)

    async def begin_update(self, engines: Sequence[int]) -> None:
        self.offers = []
        await asyncio.gather(*(worker.begin.remote() for worker in self.workers))

    async def receive(self, offer: Mapping[str, Any], engines: Sequence[int]) -> None:
        self.offers.append(offer)
        self.num_opened = await asyncio.gather(*(worker.take.remote(offer) for worker in self.workers))

    async def commit(self, version: int, engines: Sequence[int]) -> dict[int, dict[str, int]]:
        known, flips = self._verifier.known, ["", self.flip]
        answers = await asyncio.gather(*(w.held.remote(known, f) for w, f in zip(self.workers, flips, strict=True)))
        return {0: self._verifier.checksums([Answer(*fields) for fields in answers])}

    async def peak_memory_gb(self) -> float:
        return 0.0


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_workers_hold_what_lies_in_the_memory_of_their_gpus_ranks(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int
):
    """Where ranks have weights whole, all at once and where they lie; at stage 3 one packed bucket after another."""
    intact = Learner.offer_weights
    monkeypatch.setattr(
        Learner, "offer_weights", lambda learner, *, first: intact(learner, first=first, max_bytes=8192)
    )
    recipe = tiny_recipe(
        tmp_path, "model.dtype=bfloat16", "learner.ranks=2", f"learner.zero_stage={zero_stage}", "placement=shared"
    )
    assert recipe.model.init is not None
    create_initial_model(initial_config(recipe.model.init, recipe.model.max_context), tmp_path / "model", seed=3)

    async def test() -> None:
        learner, pool = await Learner.start(recipe, tmp_path / "model"), OneEngine()
        try:
            await learner._all("__ray_call__", put_on_a_gpu)
            transport = SharedMemory(learner, cast(EnginePool, pool))
            await publish(transport, 0)
            opened = pool.num_opened
            if zero_stage < 3:
                await learner._all("__ray_call__", train)
            sync = await publish(transport, 1)
            await learner.save_model(tmp_path / "saved")
            saved = load_file(tmp_path / "saved" / "model.safetensors")
            assert sync.num_bytes == sum(tensor.nbytes for tensor in saved.values())
            for received in await asyncio.gather(*(worker.received.remote() for worker in pool.workers)):
                assert received.keys() == saved.keys()
                assert all(torch.equal(received[name], saved[name]) for name in saved)
            if zero_stage < 3:
                (offer,) = pool.offers
                assert offer["stays"] and all(len(of) == len(offer["buckets"]) for of in offer["parts"].values())
                assert pool.num_opened == opened  # what was opened serves as long as weights stay where they are
            else:
                assert len(pool.offers) > 4 and not any(offer["stays"] for offer in pool.offers)
            assert all(offer["parts"].keys() == {"gpu 0", "gpu 1"} for offer in pool.offers)

            pool.flip = "model.layers.1.mlp.experts.routed_experts.w2_weight"
            with pytest.raises(RunStopped, match=r"of version 2 .*: model\.layers\.1\.mlp\.experts\.down_proj differs"):
                await publish(transport, 2)
        finally:
            learner.close()
            for worker in pool.workers:
                ray.kill(worker)

    asyncio.run(asyncio.wait_for(test(), 200))
