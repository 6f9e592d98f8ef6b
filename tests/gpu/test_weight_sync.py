"""Weight updates on GPUs: how fast they are beside a plain copy, and what sleep frees.

Measures, and writes to KEEL_FIGURES when that names a file:

* one GPU: bytes, seconds and GB/s of an update through GPU memory that two processes share, the seconds of its parts
  and the way that it took (the first through vLLM's loader, others straight), and of a plain device-to-device copy of
  the same bytes; memory of the GPU before, in and after sleep;
* two GPUs: an update by broadcast through a real learner rank, a plain NCCL broadcast of the same bytes, and an engine
  of two workers, tensor parallel and expert parallel;
* three GPUs: two engines at once.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import DeepseekV32, checksums, save_model
from model.tokenizer import save_byte_tokenizer
from rl.choices import Placement
from rl.config import Learner as LearnerSettings
from rl.config import Model, Recipe, Rollout, Sampling
from rl.sync import publish, transport_for
from rl.system import reserve
from rollout.engine import Completion, Finish, Request
from rollout.pool import EnginePool
from rollout.vllm_engine import EngineSettings, VllmEngineActor
from tests.gpu.figures_file import record
from tests.gpu.plain_copy import copy_speed
from tests.gpu.replay import figures, log_ratios
from tests.gpu.soil import soil_free_memory
from tests.gpu.test_vllm_engine import CONFIG, endless, make_module, make_requests
from trainer.learner import Learner
from trainer.sender import Offer, Sent, WeightSender

BUCKET_BYTES = 64 << 20
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
needs_three = pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs")


@dataclass
class Seen:
    """What the scenario with one engine in this process saw."""

    figures: dict[str, Any] = field(default_factory=dict)
    sums: list[dict[str, int]] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    flight: list[Any] = field(default_factory=list)
    woken: dict[str, tuple[list[Request], list[Completion]]] = field(default_factory=dict)  # by what woke the engine
    used_gb: dict[str, float] = field(default_factory=dict)


def used_gb() -> float:
    """Of the whole GPU, all processes together."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


def buckets(module: DeepseekV32, num_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, torch.Tensor]]:
    """As `trainer.weights.whole_weights` cuts them."""
    bucket, room = {}, num_bytes
    for name, tensor in module.state_dict().items():
        if bucket and tensor.nbytes > room:
            yield bucket
            bucket, room = {}, num_bytes
        bucket[name] = tensor
        room -= tensor.nbytes
    yield bucket


def side_by_side(module: DeepseekV32) -> DeepseekV32:
    """The module, with its parameters in one piece of memory, as DeepSpeed has them."""
    parameters = list(module.parameters())
    flat = torch.cat([parameter.detach().view(-1) for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    return module


async def update(
    actor: VllmEngineActor, sender: WeightSender, module: DeepseekV32, version: int, *, packed: bool
) -> dict[str, Any]:
    """One update as `rl.sync.SharedMemory` makes it, with the seconds of its parts."""
    torch.cuda.synchronize()
    resident = None if packed else dict(module.state_dict())
    began = time.perf_counter()
    offer, _ = await asyncio.gather(
        asyncio.to_thread(sender.offer, buckets(module), lambda: resident), actor.begin_update()
    )
    ready = time.perf_counter()
    while isinstance(offer, Offer):
        assert offer.stays != packed
        offer, _ = await asyncio.gather(asyncio.to_thread(sender.offer, None), actor.receive(asdict(offer)))
    loaded = time.perf_counter()
    sums = await actor.commit(version)
    done = time.perf_counter()
    return {
        "sums": sums,
        "sent": offer,
        "pause_s": ready - began,
        "load_s": loaded - ready,
        "finish_s": done - loaded,
        "total_s": done - began,
    }


async def way(actor: VllmEngineActor) -> dict[str, Any]:
    """Of the last update: what asking the engine again what it holds takes, and the way there and back."""
    began = time.perf_counter()
    await actor.checksums()
    verify_s = time.perf_counter() - began
    asked = time.perf_counter()
    through_loader = await actor.update_way()
    return {
        "asked_again_s": verify_s,
        "ask_s": time.perf_counter() - asked,
        "through_loader": through_loader,  # why; empty when the update was written straight
    }


async def generate_woken(actor: VllmEngineActor, name: str) -> tuple[list[Request], list[Completion]]:
    """More sequences at once than the 64 that vLLM's top-p has a path of its own for."""
    requests = make_requests(name, 96, 40)
    return requests, await actor.generate(requests)


async def scenario(path: Path) -> Seen:
    seen = Seen()
    actor, sender = VllmEngineActor(), WeightSender(rank=0, device=torch.device("cuda", 0))
    modules = [side_by_side(make_module(seed).to("cuda")) for seed in (1, 2)]
    settings = EngineSettings(
        dtype="bfloat16", max_num_seqs=128, max_context=2048, gpu_memory=0.4, sleeps=True, cuda_graphs=True
    )
    await actor.load(str(path), settings)
    try:
        # Read where they lie, by vLLM's loader; packed; and read where they lie, straight.
        for version, module in enumerate([*modules, modules[0]], start=1):
            outcome = await update(actor, sender, module, version, packed=version == 2)
            outcome |= await way(actor)
            seen.sums.append(outcome.pop("sums"))
            seen.sent.append(outcome.pop("sent"))
            num_bytes = seen.sent[-1].num_bytes
            seen.figures[f"update_{version}"] = outcome | {
                "packed": version == 2,
                "bytes": num_bytes,
                "gb_per_s": num_bytes / outcome["total_s"] / 1e9,
            }
        seen.figures["copy_s"] = copy_seconds(modules[0])
        await sleep_amid_generation(actor, sender, modules[1], seen)
        seen.figures["used_gb"] = seen.used_gb | {"engine_reserved": await actor.peak_memory_gb()}
    finally:
        await actor.shutdown()
    return seen


async def sleep_amid_generation(actor: VllmEngineActor, sender: WeightSender, module: DeepseekV32, seen: Seen) -> None:
    """Sequences in flight through a sleep without weights and the update that ends it, then one that keeps them."""
    requests = [endless(request) for request in make_requests("sleepy", 8, 40, max_tokens=800)]
    steps = (await actor.stats()).num_decode_steps
    flight = asyncio.ensure_future(actor.generate(requests))
    while (await actor.stats()).num_decode_steps < steps + 50:
        await asyncio.sleep(0.005)
    seen.used_gb["awake"] = used_gb()
    began = time.perf_counter()
    await actor.sleep()
    seen.figures["sleep_s"] = time.perf_counter() - began
    seen.used_gb["asleep"] = used_gb()
    asleep_at = (await actor.stats()).num_decode_steps
    await asyncio.sleep(0.5)
    assert (await actor.stats()).num_decode_steps == asleep_at
    soil_free_memory()
    began = time.perf_counter()
    outcome = await update(actor, sender, module, 4, packed=False)
    seen.figures["wake_with_update_s"] = time.perf_counter() - began
    outcome |= await way(actor)
    seen.figures["update_in_sleep"] = {name: outcome[name] for name in outcome.keys() - {"sums", "sent"}}
    seen.sums.append(outcome["sums"])
    seen.used_gb["awake_again"] = used_gb()
    seen.woken["update"] = await generate_woken(actor, "updated")
    await actor.sleep(keep_weights=True)
    seen.used_gb["asleep_keeping_weights"] = used_gb()
    soil_free_memory()
    await actor.wake()
    assert await actor.checksums() == outcome["sums"]
    seen.woken["weights kept"] = await generate_woken(actor, "kept")
    seen.flight = await flight


def copy_seconds(module: DeepseekV32) -> float:
    """The best of five copies of the same bytes within the GPU."""
    source = torch.empty(sum(t.nbytes for t in module.state_dict().values()), dtype=torch.uint8, device="cuda")
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(make_module(0), path)
    save_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def seen(model_path: Path) -> Seen:
    observed = asyncio.run(scenario(model_path))
    record(shared_memory=observed.figures)
    return observed


def test_every_update_through_shared_memory_arrives(seen: Seen):
    expected = [checksums(make_module(seed).state_dict().items()) for seed in (1, 2, 1, 2)]
    assert seen.sums == expected
    assert [sent.checksums for sent in seen.sent] == expected[:3]


def test_updates_after_the_first_are_written_straight(seen: Seen):
    ways = [seen.figures[name]["through_loader"] for name in ("update_1", "update_2", "update_3", "update_in_sleep")]
    assert ways[0].startswith("no update has shown yet")
    assert ways[1:] == ["", "", ""]


@pytest.mark.skipif("KEEL_GPU_CACHE_GB" in os.environ, reason="others use the GPU at the same time")
def test_sleep_frees_what_the_engine_had(seen: Seen):
    freed = seen.used_gb["awake"] - seen.used_gb["asleep"]
    assert freed > 0.8 * (seen.figures["used_gb"]["engine_reserved"])
    assert seen.used_gb["awake_again"] <= seen.used_gb["awake"] + 1
    assert seen.used_gb["asleep_keeping_weights"] < seen.used_gb["awake"] - 0.7 * freed


def test_sequences_go_on_after_the_sleep_with_the_next_weights(seen: Seen):
    for completion in seen.flight:
        assert completion.finish == Finish.LENGTH and len(completion.token_ids) == 800
        assert (completion.versions[0], completion.versions[-1]) == (3, 4)
        assert completion.routed is not None and completion.routed[:-1].all()
        assert np.isfinite(completion.logprobs).all()


@pytest.mark.parametrize("woken_by", ["update", "weights kept"])
def test_what_a_woken_engine_samples_is_what_its_weights_say(seen: Seen, woken_by: str):
    """Checksums see parameters only: caches, buffers and whatever else the sleep took are seen here."""
    pair = seen.woken[woken_by]
    assert all(np.isfinite(completion.logprobs).all() for completion in pair[1])
    ours = figures(log_ratios(make_module(2).to("cuda"), *pair))
    record(**{f"woken by {woken_by}": ours})
    assert ours["mean_abs"] < 0.05


def recipe_for(model_path: Path, **rollout: Any) -> Recipe:
    return Recipe(
        name="sync",
        model=Model(path=str(model_path), dtype="bfloat16", max_context=1024),
        sampling=Sampling(max_tokens=64),
        rollout=Rollout(engine="vllm", max_num_seqs=64, gpu_memory=0.4, cuda_graphs=False, **rollout),  # type: ignore
        learner=LearnerSettings(ranks=1, zero_stage=2),
        placement=Placement.split,
    )


def request_of(name: str) -> Request:
    return make_requests(name, 1, 40, max_tokens=32)[0]


async def publish_twice(recipe: Recipe, model_path: Path) -> dict[str, Any]:
    """Two verified updates by broadcast from a real learner rank; the second one is measured."""
    reservation = await reserve(recipe)
    learner = await Learner.start(recipe, model_path, actor_options=reservation.ranks)
    pool = await EnginePool.start(recipe, model_path, actor_options=reservation.engines)
    try:
        transport = transport_for(recipe, learner, pool)
        await publish(transport, 0)
        sync = await publish(transport, 1)
        request = request_of("probe")
        completions = [(await engine.actor.generate.remote([request]))[0] for engine in pool._engines]
        assert all(set(completion.versions.tolist()) == {1} for completion in completions)
        figures = {"bytes": sync.num_bytes, "seconds": sync.seconds, "gb_per_s": sync.num_bytes / sync.seconds / 1e9}
        figures["through_loader"] = [await engine.actor.update_way.remote() for engine in pool._engines]
        return figures | {"memory_gb": sync.memory_gb, "num_tensors": sync.num_tensors}
    finally:
        pool.close()
        learner.close()
        reservation.release()


@needs_two
def test_an_update_by_broadcast_beside_a_plain_one(cluster: None, model_path: Path):
    figures = asyncio.run(publish_twice(recipe_for(model_path), model_path))
    record(broadcast=figures | {"plain_gb_per_s": copy_speed(figures["bytes"], across=True, on_gpu=True)})
    assert figures["num_tensors"] == len(DeepseekV32(CONFIG).state_dict())


@needs_three
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_an_engine_of_two_workers_holds_what_was_sent(cluster: None, model_path: Path, expert_parallel: bool):
    recipe = recipe_for(model_path, tensor_parallel=2, expert_parallel=expert_parallel)
    figures = asyncio.run(publish_twice(recipe, model_path))
    assert figures["through_loader"] == [""]
    record(**{f"two_workers_{'experts' if expert_parallel else 'tensors'}": figures})


@needs_three
def test_two_engines_at_once(cluster: None, model_path: Path):
    record(two_engines=asyncio.run(publish_twice(recipe_for(model_path, engines=2), model_path)))


@needs_two
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_workers_share_their_gpus_with_two_ranks(cluster: None, model_path: Path, zero_stage: int):
    """Tensor parallel and sleep together, through the shared memory of both GPUs: at stage 3 what ranks pack."""
    from dataclasses import replace

    recipe = recipe_for(model_path, tensor_parallel=2)
    recipe = replace(recipe, placement=Placement.shared, learner=LearnerSettings(ranks=2, zero_stage=zero_stage))

    async def run() -> dict[str, Any]:
        from rl.placement import shared_gpus

        reservation = await reserve(recipe)
        learner = await Learner.start(recipe, model_path, actor_options=reservation.ranks)
        gpus = shared_gpus(await learner.gpus(), 2)
        pool = await EnginePool.start(recipe, model_path, actor_options=reservation.engines, gpus=gpus)
        try:
            transport = transport_for(recipe, learner, pool)
            await publish(transport, 0)
            offer = await learner.offer_weights(first=True)
            assert isinstance(offer, Offer) and offer.stays == (zero_stage == 2)
            await learner.drop_offer()
            await pool.sleep()
            sync = await publish(transport, 1)
            return {"bytes": sync.num_bytes, "seconds": sync.seconds, "memory_gb": sync.memory_gb}
        finally:
            pool.close()
            learner.close()
            reservation.release()

    record(**{f"two_workers_shared_{zero_stage}": asyncio.run(run())})
