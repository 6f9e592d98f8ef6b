"""Models of transformers under ZeRO: two ranks against one, and against unpacked forwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model import checksums, load_model, save_model
from rl.config import Recipe
from tests.model import families
from tests.trainer.conftest import MakeRank
from tests.trainer.processes import Ranks
from tests.trainer.samples import VOCAB, advantages_of, groups_of, live_weights, tiny_recipe
from trainer.pack import Minibatch, pack
from trainer.phase import Phase
from trainer.step import RankStep

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3_moe")
    # Normalised gate weights have no gradient in the logits of experts that were not chosen, and Adam would turn the
    # rounding errors in place of it into steps.
    save_model(families.make("qwen3_moe", vocab_size=VOCAB, norm_topk_prob=False), path)
    return path


def steps_of(model_dir: Path, *, ranks: int) -> list[Minibatch]:
    groups = groups_of(load_model(model_dir), lengths=((40, 13, 5), (12, 4, 9)))
    rng = np.random.default_rng(0)
    return [
        minibatch
        for _ in range(2)
        for minibatch in pack(
            groups,
            advantages_of(groups),
            kl_betas={"math": 0.2},
            ranks=ranks,
            minibatches=1,
            micro_tokens=30,
            rng=rng,
        )
    ]


def train(
    make: MakeRank, recipe: Recipe, model_dir: Path, steps: list[Minibatch], saved: Path | None
) -> tuple[list[RankStep], Weights, dict[str, int]]:
    rank = make(recipe)
    rank.begin(Phase.REINFORCEMENT, model_dir)
    outcome = rank.step([minibatch.share(rank.rank) for minibatch in steps])
    if saved is not None:
        rank.save_model(saved)
    return outcome, live_weights(rank), checksums(live_weights(rank).items())


@pytest.mark.parametrize(("stage", "recompute"), [(2, False), (3, False), (3, True)])
def test_two_ranks_give_the_loss_and_the_weights_of_one(
    pair: Ranks, sole_rank: MakeRank, qwen3_moe: Path, tmp_path: Path, stage: int, recompute: bool
):
    recipe = tiny_recipe(zero_stage=stage, kl_beta=0.2, activation_checkpointing=recompute)
    results = pair(train, recipe, qwen3_moe, steps_of(qwen3_moe, ranks=2), tmp_path / "saved")
    plain = tiny_recipe(kl_beta=0.2)
    expected, weights, _ = train(sole_rank, plain, qwen3_moe, steps_of(qwen3_moe, ranks=1), None)
    for number, one in enumerate(expected):
        shares = [outcome[number] for outcome, _, _ in results]
        assert sum(share.loss for share in shares) == pytest.approx(one.loss, rel=1e-4, abs=1e-6)
        assert shares[0].outcome.grad_norm == pytest.approx(one.outcome.grad_norm, rel=1e-4)
        logprobs = shares[0].learner_logprobs | shares[1].learner_logprobs
        for name, stream in one.learner_logprobs.items():
            np.testing.assert_allclose(logprobs[name], stream, atol=1e-4)
    start = dict(load_model(qwen3_moe).named_weights())
    for name, tensor in weights.items():
        assert float((results[0][1][name] - tensor).abs().max()) <= 3e-5, name
        assert not torch.equal(tensor, start[name]), name
    assert results[0][2] == results[1][2] == checksums(load_model(tmp_path / "saved").named_weights())
