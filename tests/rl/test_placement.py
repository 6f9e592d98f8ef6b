"""Which GPUs a recipe asks for, and the sentence when they are not there."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from rl.choices import EngineKind, Placement
from rl.config import Learner, Recipe, Rollout
from rl.errors import RecipeError
from rl.placement import Bundle, GpuShares, Seats, gpu_shares, seats, shared_gpus
from rl.system import reserve
from tests.rl.tiny_runs import tiny_recipe


def recipe(engine: EngineKind = EngineKind.vllm, *, ranks: int = 1, placement: Placement = Placement.split, **rollout):
    settings = Rollout(**{"engine": engine, **rollout})
    return replace(Recipe(name="r"), rollout=settings, learner=Learner(ranks=ranks), placement=placement)


@pytest.mark.parametrize(
    ("asked", "num_gpus", "shares"),
    [
        (recipe(EngineKind.torch), 0, GpuShares(rank=0, engine=0)),
        (recipe(EngineKind.torch, ranks=2), 2, GpuShares(rank=1, engine=0)),
        (recipe(), 2, GpuShares(rank=1, engine=1)),
        (recipe(ranks=2, engines=2, tensor_parallel=3), 8, GpuShares(rank=1, engine=3)),
        (recipe(placement=Placement.shared), 1, GpuShares(rank=1, engine=0)),
        (recipe(ranks=4, engines=2, tensor_parallel=2, placement=Placement.shared), 4, GpuShares(rank=1, engine=0)),
    ],
)
def test_shares(asked: Recipe, num_gpus: int, shares: GpuShares):
    assert gpu_shares(asked, num_gpus) == shares


@pytest.mark.parametrize(
    ("asked", "num_gpus", "sentence"),
    [
        (recipe(), 0, "rollout.engine: vllm needs a GPU, but the Ray cluster has none"),
        (
            recipe(),
            1,
            "learner.ranks 1 and rollout.engines 1 x tensor_parallel 1 need 2 GPUs, but .* has 1; placement=shared",
        ),
        (recipe(EngineKind.torch, ranks=4), 2, "learner.ranks 4 need a GPU each, but the Ray cluster has 2$"),
        (recipe(engines=2, tensor_parallel=4), 8, "need 9 GPUs, but the Ray cluster has 8"),
    ],
)
def test_what_does_not_fit_is_said(asked: Recipe, num_gpus: int, sentence: str):
    with pytest.raises(RecipeError, match=sentence):
        gpu_shares(asked, num_gpus)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.tensor_parallel=2", r"learner.ranks 1, but rollout.engines 1 x rollout.tensor_parallel 2 are 2 GPUs"),
        ("model.dtype=float32", "vLLM's sparse attention runs in bfloat16 only"),
        ("sampling.temperature=2.5", "vLLM samples at 0.01 to 2 only"),
        ("learner.ranks=2", "placement is shared with learner.ranks 2, but rollout.engines 1 x .* are 1 GPUs"),
        ("rollout.gpu_memory=1.5", "rollout.gpu_memory is 1.5; it must be above 0 and at most 1"),
    ],
)
def test_recipes_that_vllm_cannot_run(tmp_path: Path, override: str, sentence: str):
    fine = ("rollout.engine=vllm", "placement=shared", "model.dtype=bfloat16")
    assert tiny_recipe(tmp_path, *fine).rollout.engine == EngineKind.vllm
    with pytest.raises(RecipeError, match=sentence):
        tiny_recipe(tmp_path, *fine, override)


def test_shared_gpus_have_as_many_ranks_as_their_engine_has_gpus():
    asked = recipe(ranks=4, engines=2, tensor_parallel=2, placement=Placement.shared)
    bundle = Bundle(gpus=2, cpus=3)
    assert seats(asked, [4]) == Seats(bundles=(bundle, bundle), rank_seats=(0, 0, 1, 1), engine_seats=(0, 1))
    assert shared_gpus(["2", "3", "0", "1"], 2) == ["2,3", "0,1"]


def test_split_gives_everyone_a_seat():
    asked = recipe(ranks=2, engines=1, tensor_parallel=2)
    engine, rank = Bundle(gpus=2, cpus=1), Bundle(gpus=1, cpus=1)
    assert seats(asked, [4]) == Seats(bundles=(engine, rank, rank), rank_seats=(1, 2), engine_seats=(0,))


def test_an_engine_that_no_node_can_hold_is_refused():
    with pytest.raises(RecipeError, match=r"the nodes' 2, 2 GPUs hold fewer than rollout.engines 1"):
        seats(recipe(ranks=1, engines=1, tensor_parallel=3), [2, 2])


@pytest.fixture(scope="module")
def cluster_with_gpus() -> Iterator[None]:
    """Ray believes what it is told; nothing here touches a GPU."""
    ray.init(address="local", num_cpus=8, num_gpus=6, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def gpus_given(options: Sequence[Mapping[str, Any]], num_gpus: int) -> list[list[str]]:
    """The GPUs of actors that ask for so many, seated where ``options`` say."""

    class Seated:  # here, so that it travels by value
        def gpus(self) -> list[str]:
            return ray.get_runtime_context().get_accelerator_ids()["GPU"]

    actor = ray.remote(Seated)
    seated = [actor.options(num_cpus=1, num_gpus=num_gpus, **each).remote() for each in options]
    return ray.get([actor.gpus.remote() for actor in seated], timeout=60)


def test_ray_gives_what_was_reserved(cluster_with_gpus: None):
    async def test() -> None:
        asked = recipe(ranks=4, engines=2, tensor_parallel=2, placement=Placement.shared)
        reservation = await reserve(asked)
        first, second, third, fourth = gpus_given(reservation.ranks, 1)
        assert len({*first, *second, *third, *fourth}) == 4
        assert gpus_given(reservation.engines, 0) == [[], []]
        with pytest.raises(RecipeError, match="need 8 GPUs, but the Ray cluster has 6"):
            await reserve(recipe(ranks=4, engines=2, tensor_parallel=2))
        reservation.release()

    asyncio.run(test())


def test_gpus_that_others_hold_are_waited_for_and_then_refused(
    cluster_with_gpus: None, monkeypatch: pytest.MonkeyPatch
):
    async def test() -> None:
        holding = await reserve(recipe(ranks=2, engines=2, tensor_parallel=2))
        with monkeypatch.context() as impatient:
            impatient.setattr("rl.system.RESERVATION_S", 2)
            with pytest.raises(RecipeError, match="2 GPUs and 2 CPUs did not become free within 2 s"):
                await reserve(recipe(ranks=1, engines=1))
        holding.release()
        free = await reserve(recipe(ranks=1, engines=1))
        assert gpus_given(free.engines, 1) != gpus_given(free.ranks, 1)
        free.release()

    asyncio.run(test())
