"""Two ranks against one, at every ZeRO stage."""

from __future__ import annotations

import dataclasses
import errno
import pickle
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

from model import LanguageModel, checksums, load_model
from rl.choices import IndexerTraining
from rl.config import Model, Objective, Recipe
from rl.durable import FileRecord
from rl.errors import DataError, RecipeError
from rl.metrics import merge
from tests.small_disk import full_disk
from tests.trainer.conftest import MakeRank
from tests.trainer.processes import Ranks
from tests.trainer.samples import (
    EPISODE_ADVANTAGES,
    MASKED_EPISODES,
    advantages_of,
    episodes_of,
    groups_of,
    live_weights,
    tiny_recipe,
    with_another_indexer,
    with_selections,
)
from tests.trainer.test_domain_gradients import DOMAINS, minibatch_of, mixed_groups, recipe_of, shares_of
from trainer.pack import Minibatch, pack
from trainer.phase import Phase
from trainer.rank import LearnerRank
from trainer.sender import Offer
from trainer.step import RankStep
from trainer.supervised import EncodedDemonstration, pack_demonstrations
from trainer.weights import resident_weights, whole_weights

Weights = dict[str, torch.Tensor]
STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def steps_of(
    model_dir: Path, *, ranks: int, kl_beta: float = 0.0, num_steps: int = 2, selections: bool = False
) -> list[Minibatch]:
    """Lengths on both sides of index_topk, and an odd number of micro-batches, so that one rank idles once a step.

    With `selections` one sample brings those of another indexer, and the other long one has none.
    """
    groups = groups_of(load_model(model_dir), lengths=((40, 29, 5),))
    if selections:
        first, *others = groups[0].scored
        selected = with_selections(first.sample, with_another_indexer(load_model(model_dir)))
        groups = [dataclasses.replace(groups[0], scored=(dataclasses.replace(first, sample=selected), *others))]
    betas, rng = {"math": kl_beta}, np.random.default_rng(0)
    advantages = advantages_of(groups)
    return [
        minibatch
        for _ in range(num_steps)
        for minibatch in pack(groups, advantages, kl_betas=betas, ranks=ranks, minibatches=1, micro_tokens=30, rng=rng)
    ]


def train(make: MakeRank, recipe: Recipe, model_dir: Path, steps: list[Minibatch]) -> tuple[list[RankStep], Weights]:
    rank = make(recipe)
    rank.begin(Phase.REINFORCEMENT, model_dir)
    scored = rank.logprobs(steps[0].share(rank.rank))
    outcome = rank.step([minibatch.share(rank.rank) for minibatch in steps])
    # What a step finds can be asked for before; the tests below would see a trace of it in losses and weights.
    assert scored.keys() == outcome[0].learner_logprobs.keys()
    for name, stream in outcome[0].learner_logprobs.items():
        np.testing.assert_allclose(scored[name], stream, atol=1e-6, err_msg=name)
    return outcome, live_weights(rank)


def assert_same(first: Weights, second: Weights) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("indexer", list(IndexerTraining))
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_give_the_loss_and_the_weights_of_one(
    pair: Ranks, sole_rank: MakeRank, model_dir: Path, stage: int, indexer: IndexerTraining
):
    objective = Objective(off_policy_delta=None, keep_selection=True)
    recipe = tiny_recipe(zero_stage=stage, kl_beta=0.2, indexer=indexer, objective=objective)
    steps = steps_of(model_dir, ranks=2, kl_beta=0.2, selections=True)
    assert any(micro.sample_ids == ("idle",) for step in steps for rank in step.ranks for micro in rank)
    results = pair(train, recipe, model_dir, steps)
    expected, weights = train(
        sole_rank,
        tiny_recipe(kl_beta=0.2, indexer=indexer, objective=objective),
        model_dir,
        steps_of(model_dir, ranks=1, kl_beta=0.2, selections=True),
    )
    for number, one in enumerate(expected):
        shares = [ran[number] for ran, _ in results]
        assert sum(share.loss for share in shares) == pytest.approx(one.loss, rel=1e-4, abs=1e-6)
        assert shares[0].outcome == shares[1].outcome
        assert shares[0].outcome.grad_norm == pytest.approx(one.outcome.grad_norm, rel=1e-4)
        logprobs = shares[0].learner_logprobs | shares[1].learner_logprobs
        assert logprobs.keys() == one.learner_logprobs.keys()
        for name, stream in one.learner_logprobs.items():
            np.testing.assert_allclose(logprobs[name], stream, atol=1e-4)
        tally = merge(share.metrics for share in shares)
        assert tally["selections/replayed"] == one.metrics["selections/replayed"]
        assert 0.3 < float(tally["selections/replayed"]) < 0.9  # one of two long samples
        assert tally.get("selections/identical") == one.metrics.get("selections/identical")
        assert ("selections/identical" in tally) == (indexer == IndexerTraining.kl)
    assert_same(results[0][1], results[1][1])
    start = load_model(model_dir).state_dict()
    for name, tensor in weights.items():
        assert float((results[0][1][name] - tensor).abs().max()) <= 3e-5, name
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, start[name])}
    frozen = {name for name in start if name.endswith("bias") and "gate" in name}
    if indexer == IndexerTraining.frozen:
        frozen |= {name for name in start if ".indexer." in name}
    assert moved == start.keys() - frozen


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_decide_together_about_an_episode_that_they_share(
    pair: Ranks, sole_rank: MakeRank, model_dir: Path, stage: int
):
    """Against one rank with room for whole episodes, which has nothing to look up before."""
    model = load_model(model_dir)

    def step_of(ranks: int, micro_tokens: int) -> Minibatch:
        (step,) = pack(
            [episodes_of(model)],
            [EPISODE_ADVANTAGES],
            kl_betas={"math": 0.0},
            ranks=ranks,
            minibatches=1,
            micro_tokens=micro_tokens,
            rng=np.random.default_rng(0),
        )
        return step

    apart, together = step_of(2, 20), step_of(1, 1000)
    holders = [{name.split(".")[0] for micro in rank for name in micro.sample_ids} for rank in apart.ranks]
    assert holders[0] & holders[1] and apart.open_rounds and not together.open_rounds
    objective = Objective(off_policy_delta=0.2, clip_low=0.99)
    results = pair(train, tiny_recipe(zero_stage=stage, objective=objective), model_dir, [apart])
    (expected,), weights = train(sole_rank, tiny_recipe(objective=objective), model_dir, [together])
    shares = [ran[0] for ran, _ in results]
    assert sum(share.loss for share in shares) == pytest.approx(expected.loss, rel=1e-4)
    assert shares[0].outcome.grad_norm == pytest.approx(expected.outcome.grad_norm, rel=1e-4)
    masked = merge(share.metrics for share in shares)["mask/off_policy"]
    assert float(masked) == pytest.approx(sum(MASKED_EPISODES) / len(MASKED_EPISODES))
    for name, tensor in weights.items():
        assert float((results[0][1][name] - tensor).abs().max()) <= 3e-5, name


@pytest.mark.parametrize(("stage", "what"), [(0, "loss"), (1, "gradient"), (2, "loss"), (3, "gradient")])
def test_what_is_not_finite_on_one_rank_is_skipped_on_both(pair: Ranks, model_dir: Path, stage: int, what: str):
    good, bad = steps_of(model_dir, ranks=2)
    micro = bad.ranks[1][0]
    if what == "loss":
        micro.advantages[:] = np.nan
    else:
        # The clipped surrogate is finite, but its gradient is infinity times zero.
        micro.advantages[:] = 1.0
        micro.rollout_logprobs[np.flatnonzero(micro.sampled)[0]] = -1e4
    recipe = tiny_recipe(zero_stage=stage)
    skipping = pair(train, recipe, model_dir, [good, bad, good])
    plain = pair(train, recipe, model_dir, [good, good])
    for rank, (steps, weights) in enumerate(skipping):
        assert [step.outcome.applied for step in steps] == [True, False, True]
        assert steps[1].suspects == (micro.sample_ids if rank == 1 and what == "loss" else ())
        assert_same(weights, plain[rank][1])


def read_weights(make: MakeRank, recipe: Recipe, model_dir: Path, saved: Path) -> tuple[dict[str, int], list[Weights]]:
    rank = make(recipe)
    rank.begin(Phase.REINFORCEMENT, model_dir)
    rank.step([minibatch.share(rank.rank) for minibatch in steps_of(model_dir, ranks=rank.world_size)])
    rank.save_model(saved)
    buckets = [{n: t.clone() for n, t in b.items()} for b in whole_weights(rank.policy.model, 4096)]
    assert not any(list(whole_weights(rank.policy.model, 4096)))  # what is held beyond its turn keeps nothing whole
    resident = resident_weights(rank.policy.model)
    if recipe.learner.zero_stage == 3 or recipe.learner.expert_parallel > 1:
        assert resident is None
    else:
        assert resident is not None and checksums(resident.items()) == rank.checksums()
    # Reading must not disturb training.
    rank.step([minibatch.share(rank.rank) for minibatch in steps_of(model_dir, ranks=rank.world_size)])
    sums = rank.checksums()
    assert sums != checksums((name, tensor) for bucket in buckets for name, tensor in bucket.items())
    return sums, buckets


def break_off(make: MakeRank, recipe: Recipe, model_dir: Path) -> list[dict[str, int]]:
    rank = make(recipe)
    rank.begin(Phase.REINFORCEMENT, model_dir)
    before = rank.checksums()
    with (
        patch("trainer.sender.reduce_tensor", lambda whole: (None, 0)),
        patch("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid="gpu")),
    ):
        assert isinstance(rank.offer_weights(4096, True), Offer)
    rank.drop_offer()
    return [before, rank.checksums()]


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_are_read_again_after_an_update_that_broke_off(pair: Ranks, model_dir: Path, stage: int):
    for before, after in pair(break_off, tiny_recipe(zero_stage=stage), model_dir):
        assert before == after


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (3, "bfloat16")])
def test_buckets_and_saved_models_hold_the_live_weights(
    pair: Ranks, model_dir: Path, tmp_path: Path, stage: int, dtype: str
):
    recipe = in_dtype(tiny_recipe(zero_stage=stage), dtype)
    results = pair(read_weights, recipe, model_dir, tmp_path / "model")
    assert results[0][0] == results[1][0]
    buckets = results[0][1]
    weights = {name: tensor for bucket in buckets for name, tensor in bucket.items()}
    assert sum(len(bucket) for bucket in buckets) == len(weights)
    assert all(sum(t.nbytes for t in b.values()) <= 4096 or len(b) == 1 for b in buckets)
    loaded = load_model(tmp_path / "model", dtype=getattr(torch, dtype))
    assert_same(weights, dict(loaded.state_dict()))
    assert weights["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert weights["lm_head.weight"].dtype == getattr(torch, dtype)
    assert not torch.equal(weights["lm_head.weight"], load_model(model_dir).lm_head.weight)


def in_dtype(recipe: Recipe, dtype: str) -> Recipe:
    return dataclasses.replace(recipe, model=Model(path="unused", dtype=dtype))


def test_bf16_needs_zero(sole_rank: MakeRank):
    with pytest.raises(RecipeError, match="zero_stage 0 trains float32 only"):
        sole_rank(in_dtype(tiny_recipe(zero_stage=0), "bfloat16"))


def save_checkpoint(rank: LearnerRank, directory: Path) -> None:
    """As the learner's handle does it, but waiting."""
    directory.mkdir(exist_ok=True)
    rank.copy_checkpoint()
    rank.write_checkpoint(directory)
    while rank.checkpoint_written() is None:
        time.sleep(0.01)
    assert isinstance(rank.checkpoint_written(), FileRecord)


def interrupted(make: MakeRank, recipe: Recipe, model_dir: Path, directory: Path) -> list[tuple[Weights, list[float]]]:
    rank = make(recipe)
    steps = [minibatch.share(rank.rank) for minibatch in steps_of(model_dir, ranks=rank.world_size, num_steps=3)]
    rank.begin(Phase.REINFORCEMENT, model_dir)
    rank.step(steps[:2])
    save_checkpoint(rank, directory)
    dist.barrier()
    runs = []
    for resumed in (False, True):
        if resumed:
            rank.begin(Phase.REINFORCEMENT, model_dir)
            rank.load_checkpoint(directory)
        draws = [float(torch.rand(())), float(np.random.rand())]
        rank.step(steps[2:])
        runs.append((live_weights(rank), draws))
    return runs


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")])
def test_a_resumed_run_takes_bitwise_the_same_steps(
    pair: Ranks, model_dir: Path, tmp_path: Path, stage: int, dtype: str
):
    recipe = in_dtype(tiny_recipe(zero_stage=stage, warmup_steps=4, kl_beta=0.1), dtype)
    for (straight, draws), (resumed, redrawn) in pair(interrupted, recipe, model_dir, tmp_path):
        assert_same(straight, resumed)
        assert draws == redrawn


def reloaded(make: MakeRank, recipe: Recipe, model_dir: Path, read: Path, written: Path) -> tuple[Weights, Weights]:
    """The weights that a checkpoint brings, written again, and those after one more step."""
    rank = make(recipe)
    rank.begin(Phase.REINFORCEMENT, model_dir)
    rank.load_checkpoint(read)
    before = live_weights(rank)
    save_checkpoint(rank, written)
    rank.step([minibatch.share(rank.rank) for minibatch in steps_of(model_dir, ranks=rank.world_size)])
    return before, live_weights(rank)


@pytest.mark.parametrize(("stage", "there"), [(0, 3), (1, 0), (2, 1), (3, 2)])
def test_a_checkpoint_goes_from_one_rank_to_two_and_back_at_any_stage(
    pair: Ranks, sole_rank: MakeRank, model_dir: Path, tmp_path: Path, stage: int, there: int
):
    recipe = tiny_recipe(zero_stage=stage, warmup_steps=4)
    rank = sole_rank(recipe)
    rank.begin(Phase.REINFORCEMENT, model_dir)
    rank.step([minibatch.share(0) for minibatch in steps_of(model_dir, ranks=1)])
    save_checkpoint(rank, tmp_path / "one")
    saved = live_weights(rank)
    rank.step([minibatch.share(0) for minibatch in steps_of(model_dir, ranks=1)])
    straight = live_weights(rank)

    elsewhere = tiny_recipe(zero_stage=there, warmup_steps=4)
    for before, after in pair(reloaded, elsewhere, model_dir, tmp_path / "one", tmp_path / "two"):
        assert_same(before, saved)
        for name, tensor in straight.items():
            # Moments and their count came along: a fresh optimizer would move every weight by lr.
            assert float((after[name] - tensor).abs().max()) <= 3e-5, name
    back, _ = reloaded(sole_rank, recipe, model_dir, tmp_path / "two", tmp_path / "three")
    assert_same(back, saved)
    assert state_of(tmp_path / "three") == state_of(tmp_path / "one")


def state_of(directory: Path) -> dict[str, list[float]]:
    """Every number of a checkpoint that one rank wrote, but for its generators."""
    arrays = load_file(directory / "rank_00000.safetensors")
    return {name: array.tolist() for name, array in arrays.items() if not name.startswith("generator/")}


def test_a_checkpoint_that_does_not_fit_is_refused(sole_rank: MakeRank, model_dir: Path, tmp_path: Path):
    rank = sole_rank(tiny_recipe(zero_stage=1))
    rank.begin(Phase.REINFORCEMENT, model_dir)
    save_checkpoint(rank, tmp_path / "saved")
    other = sole_rank(in_dtype(tiny_recipe(zero_stage=2), "bfloat16"))
    other.begin(Phase.REINFORCEMENT, model_dir)
    with pytest.raises(RecipeError, match=r"written with model\.dtype float32, but the recipe says bfloat16"):
        other.load_checkpoint(tmp_path / "saved")
    trained = sole_rank(tiny_recipe(zero_stage=2, indexer=IndexerTraining.kl))
    trained.begin(Phase.REINFORCEMENT, model_dir)
    with pytest.raises(RecipeError, match=r"was written when .*indexer.* was not trained"):
        trained.load_checkpoint(tmp_path / "saved")
    with pytest.raises(DataError, match="the files of 0 learner ranks, not of all"):
        other.load_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "saved" / "rank_00000.safetensors").write_bytes(pickle.dumps(print))
    with pytest.raises(DataError, match="a rank's file cannot be read"):
        other.load_checkpoint(tmp_path / "saved")


def test_a_full_disk_is_what_the_writer_says(sole_rank: MakeRank, model_dir: Path, tmp_path: Path):
    rank = sole_rank(tiny_recipe())
    rank.begin(Phase.REINFORCEMENT, model_dir)
    rank.copy_checkpoint()
    with full_disk(tmp_path / "disk", num_bytes=64 << 10) as directory:
        rank.write_checkpoint(directory)
        while (outcome := rank.checkpoint_written()) is None:
            time.sleep(0.01)
    assert isinstance(outcome, OSError)
    assert outcome.errno == errno.ENOSPC


def test_no_two_copies_are_in_memory(sole_rank: MakeRank, model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the first ones are never written, as the driver does not ask for that when the disk is full."""
    rank = sole_rank(tiny_recipe())
    rank.begin(Phase.REINFORCEMENT, model_dir)
    rank.copy_checkpoint()
    held = [weakref.ref(tensor) for tensor in rank._writer._tensors.values()]
    left: list[int] = []
    copy_state = rank.engine.copy_state

    def counting() -> object:
        left.append(sum(one() is not None for one in held))
        return copy_state()

    assert len(held) > 10 and all(one() is not None for one in held)
    monkeypatch.setattr(rank.engine, "copy_state", counting)
    rank.copy_checkpoint()
    assert left == [0]


def demonstrations(num: int) -> list[EncodedDemonstration]:
    """Sequences that count upwards, which a model can learn."""
    made = []
    for index in range(num):
        token_ids = (np.arange(10 + index) + 3 * index).astype(np.int32) % 48
        made.append(EncodedDemonstration(id=f"d{index}", token_ids=token_ids, trained=np.arange(10 + index) >= 4))
    return made


def test_supervised_training_weighs_every_trained_token_the_same(sole_rank: MakeRank, model_dir: Path):
    rank = sole_rank(tiny_recipe())
    rank.begin(Phase.SUPERVISED, model_dir)
    shown = demonstrations(5)
    step = rank.supervised_step(pack_demonstrations(shown, ranks=1, micro_tokens=25).share(0))
    model = load_model(model_dir)
    losses = torch.cat([token_losses(model, one) for one in shown])
    assert float(step.metrics["loss/supervised"]) == pytest.approx(losses.mean().item(), rel=1e-5)
    losses.mean().backward()
    for name, parameter in model.named_parameters():
        if ".indexer." not in name and parameter.grad is not None:
            # The first AdamW step moves every weight by lr against the sign of its gradient.
            clear = parameter.grad.abs() > 1e-5
            moved = live_weights(rank)[name] - parameter.detach()
            assert torch.equal(moved.sign()[clear], -parameter.grad.sign()[clear]), name


def token_losses(model: LanguageModel, one: EncodedDemonstration) -> torch.Tensor:
    token_ids = torch.tensor(one.token_ids).long()
    logits = model(token_ids.unsqueeze(0))[0, :-1]
    return torch.nn.functional.cross_entropy(logits, token_ids[1:], reduction="none")[torch.tensor(one.trained[1:])]


def cold_start(
    make: MakeRank, recipe: Recipe, model_dir: Path, out: Path
) -> tuple[list[RankStep], list[RankStep], Weights]:
    rank = make(recipe)
    share = pack_demonstrations(demonstrations(5), ranks=rank.world_size, micro_tokens=30).share(rank.rank)
    rank.begin(Phase.INDEXER_WARMUP, model_dir)
    warmup = [rank.supervised_step(share) for _ in range(5)]
    rank.save_model(out)
    rank.begin(Phase.SUPERVISED, out)
    warmed = live_weights(rank)
    return warmup, [rank.supervised_step(share) for _ in range(5)], warmed


@pytest.mark.parametrize("stage", [1, 3])
def test_the_warm_up_trains_the_indexer_and_the_cold_start_the_model(
    pair: Ranks, model_dir: Path, tmp_path: Path, stage: int
):
    results = pair(cold_start, tiny_recipe(zero_stage=stage), model_dir, tmp_path / "warm")
    warmup, supervised, warmed = zip(*results, strict=True)
    start = load_model(model_dir).state_dict()
    moved = {name for name, tensor in warmed[0].items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if ".indexer." in name}
    indexer = [sum(steps[i].loss for steps in warmup) for i in (0, -1)]
    assert indexer[1] < 0.95 * indexer[0]
    imitation = [float(merge(steps[i].metrics for steps in supervised)["loss/supervised"]) for i in (0, -1)]
    assert imitation[1] < 0.8 * imitation[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_domains_shares_of_the_gradient_are_those_of_one_rank(
    pair: Ranks, sole_rank: MakeRank, model_dir: Path, stage: int
):
    groups = mixed_groups(load_model(model_dir))
    alone, shared = (minibatch_of(groups, advantages_of(groups), micro_tokens=30, ranks=ranks) for ranks in (1, 2))
    expected = shares_of(sole_rank, recipe_of(), model_dir, alone)
    assert expected.keys() == set(DOMAINS)
    for shares in pair(shares_of, recipe_of(zero_stage=stage), model_dir, shared):
        assert shares == pytest.approx(expected, rel=1e-3)
