"""Which GPUs a recipe asks for, and the sentence when they are not there."""

from dataclasses import replace
from pathlib import Path

import pytest

from rl.config import EngineKind, Learner, Placement, Recipe, Rollout
from rl.errors import RecipeError
from rl.placement import GpuShares, gpu_shares
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
        (recipe(placement=Placement.shared), 1, GpuShares(rank=0.5, engine=0.5)),
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
            "learner.ranks 1 and rollout.engines 1 x tensor_parallel 1 need 2 GPUs, but .* has 1; placement=",
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
        ("rollout.tensor_parallel=2", "weights of an engine that is spread over GPUs cannot be verified"),
        ("model.dtype=float32", "vLLM's sparse attention runs in bfloat16 only"),
        ("sampling.temperature=2.5", "vLLM samples at 0.01 to 2 only"),
        ("learner.ranks=2", "placement is shared with learner.ranks 2 and rollout.engines 1"),
        ("rollout.gpu_memory=1.5", "rollout.gpu_memory is 1.5; it must be above 0 and at most 1"),
    ],
)
def test_recipes_that_vllm_cannot_run(tmp_path: Path, override: str, sentence: str):
    fine = ("rollout.engine=vllm", "placement=shared", "model.dtype=bfloat16")
    assert tiny_recipe(tmp_path, *fine).rollout.engine == EngineKind.vllm
    with pytest.raises(RecipeError, match=sentence):
        tiny_recipe(tmp_path, *fine, override)
