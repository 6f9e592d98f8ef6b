"""Ranks that share out the experts, against one rank that has them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import DeepseekV32, load_model, save_model
from model.moe import Experts
from rl.config import Recipe
from rl.errors import DataError, RecipeError
from rl.sample import Group
from tests.trainer.conftest import MakeRank
from tests.trainer.processes import Ranks
from tests.trainer.samples import advantages_of, groups_of, tiny_config, tiny_recipe
from tests.trainer.test_ranks import Weights, assert_same, in_dtype, interrupted, read_weights, reloaded, train
from trainer.deepspeed_engine import full_shape
from trainer.pack import Minibatch, pack
from trainer.phase import Phase


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def with_experts(groups: list[Group], choose: Any) -> list[Group]:
    """Sample number i routes all of its tokens, in all layers, to the two experts of choose(i)."""
    changed, number = [], 0
    for group in groups:
        scored = []
        for one in group.scored:
            assert one.sample.routes is not None
            routes = np.broadcast_to(np.array(choose(number), np.uint8), one.sample.routes.shape).copy()
            sample = dataclasses.replace(one.sample, routes=routes, routed=np.ones(len(one.sample), bool))
            scored.append(dataclasses.replace(one, sample=sample))
            number += 1
        changed.append(dataclasses.replace(group, scored=tuple(scored)))
    return changed


def steps_of(model_dir: Path, *, ranks: int, choose: Any = None, kl_beta: float = 0.0) -> list[Minibatch]:
    """Three steps over rows of unequal length and number, so that ranks idle."""
    groups = groups_of(load_model(model_dir), lengths=((40, 29, 28), (27, 5)))
    if choose is not None:
        groups = with_experts(groups, choose)
    arguments: dict[str, Any] = {"kl_betas": {"math": kl_beta}, "minibatches": 1, "micro_tokens": 30}
    rng = np.random.default_rng(0)
    return [
        minibatch
        for _ in range(3)
        for minibatch in pack(groups, advantages_of(groups), ranks=ranks, rng=rng, **arguments)
    ]


def own_experts(make: MakeRank, recipe: Recipe, model_dir: Path) -> int:
    """How many experts of a layer this rank keeps, at stage 3 together with the ranks that keep the same."""
    rank = make(recipe)
    rank.begin(Phase.REINFORCEMENT, model_dir)
    held = {full_shape(module.down_proj)[0] for module in rank.policy.modules() if isinstance(module, Experts)}
    (num_experts,) = held
    return num_experts


CASES = {
    "stage 1, shared by 4": (1, 4, None, {}),
    "stage 2, shared by 2": (2, 2, None, {"indexer": "kl"}),
    "stage 3, shared by 4": (3, 4, None, {}),
    "stage 3, shared by 2, recomputed": (3, 2, None, {"indexer": "kl", "activation_checkpointing": True}),
    "stage 3, not shared, every sample its own experts": (3, 1, lambda i: (i, (i + 1) % 8), {}),
    "stage 2, not shared, every sample its own experts": (2, 1, lambda i: (i, (i + 1) % 8), {}),
    "stage 1, shared by 2, every sample its own experts": (1, 2, lambda i: (i, (i + 1) % 8), {}),
    "stage 2, shared by 4, three ranks without a row": (2, 4, lambda i: (0, 1), {}),
    "stage 3, shared by 2, one of them without a row": (3, 2, lambda i: (6, 7), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_four_ranks_give_the_loss_the_norm_and_the_weights_of_one(
    four: Ranks, sole_rank: MakeRank, model_dir: Path, case: str
):
    stage, experts, choose, settings = CASES[case]
    # The norm is far above the bound, so the weights would show a wrong one.
    shared: dict[str, Any] = {"kl_beta": 0.2, "grad_clip": 0.5, "lr": 3e-4} | settings
    recipe = tiny_recipe(zero_stage=stage, expert_parallel=experts, ranks=4, **shared)
    steps = steps_of(model_dir, ranks=4, choose=choose, kl_beta=0.2)
    assert any(micro.sample_ids == ("idle",) for rank in steps[0].ranks for micro in rank)
    ran = four(train, recipe, model_dir, steps)
    alone = steps_of(model_dir, ranks=1, choose=choose, kl_beta=0.2)
    expected, weights = train(sole_rank, tiny_recipe(zero_stage=0, **shared), model_dir, alone)
    for number, one in enumerate(expected):
        shares = [outcome[number] for outcome, _ in ran]
        assert sum(share.loss for share in shares) == pytest.approx(one.loss, rel=1e-4, abs=1e-6)
        assert {share.outcome for share in shares} == {shares[0].outcome}
        assert shares[0].outcome.grad_norm == pytest.approx(one.outcome.grad_norm, rel=1e-4)
    for _, other in ran[1:]:
        assert_same(ran[0][1], other)
    start: Weights = dict(load_model(model_dir).state_dict())
    for name, tensor in weights.items():
        assert float((ran[0][1][name] - tensor).abs().max()) <= 1e-5, name
    moved = float(
        (weights["model.layers.1.mlp.experts.down_proj"] - start["model.layers.1.mlp.experts.down_proj"]).norm()
    )
    assert moved > 1e-2
    assert four(own_experts, recipe, model_dir) == [8 // experts] * 4


@pytest.mark.parametrize(("stage", "dtype"), [(1, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_a_resumed_run_takes_bitwise_the_same_steps(
    four: Ranks, sole_rank: MakeRank, model_dir: Path, tmp_path: Path, stage: int, dtype: str
):
    recipe = in_dtype(tiny_recipe(zero_stage=stage, expert_parallel=2, ranks=4, warmup_steps=4, kl_beta=0.1), dtype)
    weights = []
    for (straight, _), (resumed, _) in four(interrupted, recipe, model_dir, tmp_path):
        assert_same(straight, resumed)
        weights.append(resumed)
    assert_same(weights[0], weights[3])
    # One rank with all experts reads what four wrote, and writes what they read with half as many experts each.
    alone = in_dtype(tiny_recipe(zero_stage=2), dtype)
    whole, _ = reloaded(sole_rank, alone, model_dir, tmp_path, tmp_path / "one")
    fewer = in_dtype(tiny_recipe(zero_stage=2, expert_parallel=4, ranks=4), dtype)
    for shared, _ in four(reloaded, fewer, model_dir, tmp_path / "one", tmp_path / "four"):
        assert_same(shared, whole)
    assert not torch.equal(whole["lm_head.weight"], load_model(model_dir, dtype=getattr(torch, dtype)).lm_head.weight)


@pytest.mark.parametrize("stage", [2, 3])
def test_all_experts_are_saved_and_sent(four: Ranks, model_dir: Path, tmp_path: Path, stage: int):
    recipe = in_dtype(tiny_recipe(zero_stage=stage, expert_parallel=4, ranks=4), "bfloat16")
    results = four(read_weights, recipe, model_dir, tmp_path / "model")
    assert all(sums == results[0][0] for sums, _ in results)
    for _, buckets in results:
        sent = {name: tensor for bucket in buckets for name, tensor in bucket.items()}
        assert_same(sent, dict(load_model(tmp_path / "model", dtype=torch.bfloat16).state_dict()))
        assert all(sum(t.nbytes for t in bucket.values()) <= 4096 or len(bucket) == 1 for bucket in buckets)


def begin(make: MakeRank, recipe: Recipe, model_dir: Path) -> str:
    try:
        make(recipe).begin(Phase.REINFORCEMENT, model_dir)
    except (RecipeError, DataError) as error:
        return str(error)
    return ""


def test_experts_that_cannot_be_shared_equally_are_refused(four: Ranks, tmp_path: Path):
    config = dataclasses.replace(tiny_config(), n_routed_experts=6)
    save_model(DeepseekV32(config), tmp_path / "six")
    said = four(begin, tiny_recipe(zero_stage=2, expert_parallel=4, ranks=4), tmp_path / "six")
    assert said == ["learner.expert_parallel is 4, but 6 experts cannot be shared equally by 4 ranks"] * 4
