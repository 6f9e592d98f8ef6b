"""What saves memory must not change a step: two ranks with and without it, bitwise."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.choices import Offload
from rl.config import Recipe
from tests.trainer.conftest import MakeRank
from tests.trainer.processes import Ranks
from tests.trainer.samples import live_weights, tiny_recipe
from tests.trainer.test_ranks import Weights, assert_same, in_dtype, steps_of
from trainer.pack import Minibatch
from trainer.phase import Phase


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def train(make: MakeRank, recipe: Recipe, model_dir: Path, steps: list[Minibatch]) -> tuple[list[float], Weights]:
    """The gradient norms of the steps, and the weights after them; the learner sleeps before and between."""
    rank = make(recipe)
    rank.begin(Phase.REINFORCEMENT, model_dir)
    norms = []
    for minibatch in steps:
        rank.sleep()
        asleep = live_weights(rank)
        rank.wake()
        norms.append(rank.step([minibatch.share(rank.rank)])[0].outcome.grad_norm)
        assert not torch.equal(asleep["lm_head.weight"], live_weights(rank)["lm_head.weight"])
    return norms, live_weights(rank)


SAVINGS = {
    "recomputed, stage 1": (1, "bfloat16", {"activation_checkpointing": True}),
    "recomputed, stage 3": (3, "float32", {"activation_checkpointing": True}),
    "asleep, stage 1": (1, "float32", {"sleep": True}),
    "asleep, stage 2": (2, "bfloat16", {"sleep": True}),
    "asleep, stage 3": (3, "bfloat16", {"sleep": True}),
    "offloaded, stage 1": (1, "float32", {"offload_optimizer": Offload.cpu}),
    "offloaded, stage 2": (2, "bfloat16", {"offload_optimizer": Offload.cpu}),
    "all offloaded": (3, "bfloat16", {"offload_optimizer": Offload.cpu, "offload_parameters": Offload.cpu}),
}


@pytest.mark.parametrize("saving", SAVINGS)
def test_saving_memory_changes_no_weight(pair: Ranks, model_dir: Path, saving: str):
    stage, dtype, settings = SAVINGS[saving]
    shared: dict[str, Any] = {"zero_stage": stage, "kl_beta": 0.2, "indexer": "kl"}
    steps = steps_of(model_dir, ranks=2, kl_beta=0.2)
    plain = pair(train, in_dtype(tiny_recipe(**shared), dtype), model_dir, steps)
    saved = pair(train, in_dtype(tiny_recipe(**shared, **settings), dtype), model_dir, steps)
    for (norms, weights), (norms_saved, weights_saved) in zip(plain, saved, strict=True):
        if "offload_optimizer" in settings:
            # The optimizer is another implementation of AdamW there.
            assert norms_saved == pytest.approx(norms, rel=1e-6)
            for name, tensor in weights.items():
                torch.testing.assert_close(weights_saved[name], tensor, atol=1e-6, rtol=1e-2, msg=name)
        else:
            assert norms_saved == norms
            assert_same(weights, weights_saved)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_of_a_phase_outlives_it(sole_rank: MakeRank, model_dir: Path, stage: int):
    """Its weights and moments would lie beside those of the next one."""
    rank = sole_rank(tiny_recipe(zero_stage=stage, kl_beta=0.2))
    rank.begin(Phase.REINFORCEMENT, model_dir)
    (minibatch,) = steps_of(model_dir, ranks=1, kl_beta=0.2)[:1]
    rank.step([minibatch.share(0)])
    assert rank.reference is not None
    before = [weakref.ref(rank.engine), weakref.ref(rank.engine._engine), weakref.ref(rank.engine._engine.optimizer)]
    before += [weakref.ref(rank.engine.module), weakref.ref(rank.reference.policy)]
    rank.begin(Phase.REINFORCEMENT, model_dir)
    gc.collect()
    assert [ref() for ref in before] == [None] * 5
