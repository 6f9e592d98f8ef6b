"""Models that ranks load together, against the whole model in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from model import DeepseekV32, load_model, save_model
from rl.config import Recipe
from rl.errors import RecipeError
from tests.resident import ResidentBytes
from tests.trainer.conftest import MakeRank
from tests.trainer.processes import Ranks
from tests.trainer.samples import VOCAB, advantages_of, fully_sharded, groups_of, tiny_config, tiny_recipe
from tests.trainer.test_ranks import Weights, assert_same, train
from trainer.loading import load_sharded
from trainer.pack import Minibatch, pack
from trainer.phase import Phase
from trainer.weights import whole_weights

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of many layers, so that no tensor is a large part of them."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = dataclasses.replace(tiny_config(), num_hidden_layers=10, tie_word_embeddings=True)
    save_model(DeepseekV32(config), root / "deepseek_v32")
    for config in (
        Qwen3Config(**SIZES, num_hidden_layers=12, tie_word_embeddings=True),
        Qwen3MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=8),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(root / config.model_type)
    return {path.name: path for path in root.iterdir()}


def load(make: MakeRank, recipe: Recipe, directory: Path) -> tuple[int, int, Weights, Weights]:
    """Bytes held at most and in the end, all weights, and buffers that are in no checkpoint."""
    rank = make(recipe)
    with ResidentBytes() as resident:
        model = load_sharded(directory, fully_sharded(recipe), rank.device)
        held = resident.alive
    weights = {name: tensor.clone() for bucket in whole_weights(model, 4096) for name, tensor in bucket.items()}
    return resident.peak, held, weights, dict(model.named_buffers())


@pytest.mark.parametrize(
    ("family", "experts"), [("deepseek_v32", 1), ("deepseek_v32", 2), ("qwen3", 1), ("qwen3_moe", 2)]
)
def test_no_rank_holds_more_than_its_part_and_one_tensor(
    pair: Ranks, directories: dict[str, Path], family: str, experts: int
):
    directory = directories[family]
    whole = load_model(directory)
    expected = dict(whole.named_weights())
    total = sum(tensor.nbytes for tensor in expected.values())
    largest = max(tensor.nbytes for tensor in expected.values())
    buffers = dict(whole.named_buffers())
    constants = sum(buffer.nbytes for buffer in buffers.values())
    recipe = tiny_recipe(zero_stage=3, ranks=2, expert_parallel=experts)
    for peak, held, weights, loaded_buffers in pair(load, recipe, directory):
        # The room for a tensor before it is cut, and one tensor of the checkpoint.
        assert total / 2 <= held <= 0.55 * total + 2 * constants
        assert peak <= held + 2.1 * largest + constants
        assert peak < 0.75 * total
        assert_same(weights, {name: tensor.detach() for name, tensor in expected.items()})
        assert_same(loaded_buffers, buffers)


def steps_of(directory: Path, *, ranks: int) -> list[Minibatch]:
    groups = groups_of(load_model(directory), lengths=((30, 29, 5),))
    rng = np.random.default_rng(0)
    arguments: dict[str, Any] = {"kl_betas": {"math": 0.1}, "minibatches": 1, "micro_tokens": 30}
    return [
        minibatch
        for _ in range(2)
        for minibatch in pack(groups, advantages_of(groups), ranks=ranks, rng=rng, **arguments)
    ]


@pytest.mark.parametrize(("stage", "recompute"), [(1, False), (3, True)])
def test_experts_of_transformers_are_shared_as_well(
    pair: Ranks, sole_rank: MakeRank, directories: dict[str, Path], stage: int, recompute: bool
):
    directory = directories["qwen3_moe"]
    shared: dict[str, Any] = {"kl_beta": 0.1, "lr": 3e-4, "grad_clip": 0.5}
    recipe = tiny_recipe(zero_stage=stage, ranks=2, expert_parallel=2, activation_checkpointing=recompute, **shared)
    ran = pair(train, recipe, directory, steps_of(directory, ranks=2))
    expected, weights = train(sole_rank, tiny_recipe(zero_stage=0, **shared), directory, steps_of(directory, ranks=1))
    for number, one in enumerate(expected):
        shares = [outcome[number] for outcome, _ in ran]
        assert sum(share.loss for share in shares) == pytest.approx(one.loss, rel=1e-4, abs=1e-6)
        assert shares[0].outcome == shares[1].outcome
        assert shares[0].outcome.grad_norm == pytest.approx(one.outcome.grad_norm, rel=1e-4)
    assert_same(ran[0][1], ran[1][1])
    for name, tensor in weights.items():
        assert float((ran[0][1][name] - tensor).abs().max()) <= 1e-5, name


def begin(make: MakeRank, recipe: Recipe, directory: Path) -> str:
    try:
        make(recipe).begin(Phase.REINFORCEMENT, directory)
    except RecipeError as error:
        return str(error)
    return ""


def test_experts_under_other_names_cannot_be_shared(pair: Ranks, directories: dict[str, Path], tmp_path: Path):
    source, renamed = directories["qwen3_moe"], tmp_path / "renamed"
    renamed.mkdir()
    (renamed / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = load_file(source / "model.safetensors")
    save_file(
        {name.replace(".mlp.experts.", ".moe.experts."): tensor for name, tensor in weights.items()},
        renamed / "model.safetensors",
    )
    said = pair(begin, tiny_recipe(zero_stage=2, ranks=2, expert_parallel=2), renamed)
    assert all("stores its experts under names that cannot be loaded in parts" in sentence for sentence in said)
