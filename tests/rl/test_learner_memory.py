"""A rank's memory: against the tensors that real DeepSpeed engines hold, and against DeepSpeed's own estimates."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch import nn

from model import transport
from model.costs import ModelCosts, costs_of
from model.outline import ModelOutline, TensorSpec
from rl import learner_memory
from rl.choices import EngineKind, Offload, Placement
from rl.config import Domain, Learner, Model, Recipe, Rollout
from rl.learner_memory import rank_memory
from tests.trainer.conftest import MakeRank
from tests.trainer.processes import Ranks
from trainer import learner, sender
from trainer.deepspeed_engine import DeepSpeedEngine, Optimization, Sharding

WIDTH, DEPTH, BUCKET = 128, 24, 20_000


def stack(num_experts: int = 0) -> ModelCosts:
    """A model that is nothing but square matrices, or stacks of them."""
    tensors = {
        f"model.layers.{layer}.mlp.up_proj.weight": TensorSpec(shape=(WIDTH, WIDTH), trained=True)
        for layer in range(DEPTH)
    }
    if num_experts:
        tensors["model.layers.0.mlp.experts.down_proj"] = TensorSpec(shape=(num_experts, WIDTH, WIDTH), trained=True)
    spec = ModelOutline(
        architecture="Stack",
        vocab_size=64,
        hidden_size=WIDTH,
        num_layers=DEPTH,
        moe_layers=(),
        num_experts=num_experts,
        experts_per_token=0,
        tensors=tensors,
        max_context=None,
    )
    return costs_of(spec, index_topk=None, kv_heads=1)


def recipe(stage: int, ranks: int, dtype: str = "bfloat16", **learner: object) -> Recipe:
    return Recipe(
        name="memory",
        model=Model(dtype=dtype),
        learner=Learner(zero_stage=stage, ranks=ranks, **learner),  # pyright: ignore[reportArgumentType]
    )


def states(asked: Recipe, costs: ModelCosts) -> float:
    return rank_memory(asked, costs, on_gpu=False).resident_bytes


def held_bytes(make: MakeRank, stage: int, dtype: str) -> tuple[int, int]:
    """Bytes of all tensors of a training engine between the backward pass and the step, and of a checkpoint's copy."""
    del make
    gc.collect()
    gc.freeze()  # what is there already is not looked at again
    kind = getattr(torch, dtype)
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))).to(kind)
    sharding = Sharding(zero_stage=stage, dtype=kind, bucket_elements=BUCKET, persistence_elements=0)
    engine = DeepSpeedEngine(module, Optimization(lr=1e-3), sharding)
    rows = torch.randn(2, WIDTH, dtype=kind)
    engine.backward(engine(rows).float().square().mean())
    engine.step()  # the moments are made here
    engine.backward(engine(rows).float().square().mean())
    held = sum(storages().values())
    copied, _ = engine.copy_state()
    engine.close()
    return held, sum(tensor.nbytes for tensor in copied.values())


def storages() -> dict[int, int]:
    """Bytes by storage, of every tensor that was made since ``gc.freeze``."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in (*tensors, *gradients)}


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")],
)
def test_states_are_those_of_a_real_engine(pair: Ranks, stage: int, dtype: str):
    expected = states(recipe(stage, 2, dtype), stack())
    bucket = 8 * BUCKET
    for held, copied in pair(held_bytes, stage, dtype):
        assert 0.99 * expected < held < 1.02 * expected + bucket
        assert copied == rank_memory(recipe(stage, 2, dtype), stack()).copied.num_bytes


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_states_agree_with_deepspeeds_own_estimates(ranks: int):
    """DeepSpeed counts bf16 gradients on top at stage 2, and an 18th byte pair for them at stage 3."""
    costs = stack()
    total = costs.outline.num_parameters
    _, gpu = estimate_zero2_model_states_mem_needs(total, num_gpus_per_node=ranks, cpu_offload=False)
    assert states(recipe(2, ranks), costs) + 2 * total / ranks == pytest.approx(gpu, abs=2)
    largest = WIDTH * WIDTH
    _, gpu, live = estimate_zero3_model_states_mem_needs(
        total, largest, num_gpus_per_node=ranks, cpu_offload=False, cpu_offload_params=False
    )
    assert states(recipe(3, ranks), costs) == pytest.approx(gpu - live, abs=2)


def test_what_the_host_takes_leaves_the_gpu():
    costs, total = stack(), stack().outline.num_parameters
    plain = rank_memory(recipe(3, 4), costs)
    offloaded = rank_memory(recipe(3, 4, offload_optimizer=Offload.cpu), costs)
    assert plain.resident_bytes - offloaded.resident_bytes == offloaded.host_bytes == 16 * total / 4
    everything = rank_memory(recipe(3, 4, offload_optimizer=Offload.cpu, offload_parameters=Offload.cpu), costs)
    assert everything.host_bytes == 18 * total / 4
    asleep = rank_memory(recipe(3, 4, sleep=True), costs)
    assert (asleep.slept, asleep.host_bytes) == (16 * total / 4, 16 * total / 4)
    assert asleep.resident_bytes == plain.resident_bytes


def test_a_reference_is_one_more_copy_of_the_parameters():
    costs, total = stack(), stack().outline.num_parameters
    domains = {"math": Domain(prompts="x.jsonl", kl_beta=0.1)}
    for stage, share in ((2, 1), (3, 4)):
        plain = recipe(stage, 4)
        extra = rank_memory(replace(plain, domains=domains), costs).resident_bytes
        assert extra - rank_memory(plain, costs).resident_bytes == 2 * total / share


def test_checkpointing_keeps_layer_inputs_and_one_layer():
    costs = stack()
    tokens, layer = 32768, costs.saved_bytes_per_token(0)
    sizes = {
        on: next(
            item.num_bytes
            for item in rank_memory(recipe(2, 1, activation_checkpointing=on, micro_tokens=tokens), costs).step
            if item.name == "activations"
        )
        for on in (False, True)
    }
    assert sizes[False] == tokens * DEPTH * layer
    assert sizes[True] == tokens * (DEPTH * 2 * WIDTH + layer)


def test_a_longer_sample_than_micro_tokens_counts():
    costs = stack()
    short = recipe(2, 1, micro_tokens=100)
    longer = replace(short, model=replace(short.model, max_context=40_000))
    assert (
        rank_memory(longer, costs).peak_bytes
        > 5 * rank_memory(short, costs).peak_bytes - 4 * rank_memory(short, costs).resident_bytes
    )


@pytest.mark.parametrize(
    ("placement", "kept", "added"),
    [("split", 0, 3 + 1), ("shared", 2, 1)],
)
def test_an_update_takes_buckets_as_large_as_the_largest_tensor(placement: str, kept: int, added: int):
    """600 MB of experts in one tensor, four ranks at stage 3: by hand."""
    experts = 600_000_000 // (2 * WIDTH * WIDTH)
    costs = stack(experts)
    asked = replace(
        recipe(3, 4), placement=Placement(placement), rollout=Rollout(engine=EngineKind.vllm, sleep=False, engines=1)
    )
    plan, without = rank_memory(asked, costs), rank_memory(recipe(3, 4), costs)
    bucket = 2 * experts * WIDTH * WIDTH
    assert plan.resident_bytes - without.resident_bytes == kept * bucket
    assert plan.update_bytes - plan.resident_bytes == added * bucket
    assert plan.peak_bytes == max(plan.step_bytes, plan.update_bytes)
    side_by_side = rank_memory(replace(asked, learner=replace(asked.learner, zero_stage=2)), costs)
    assert not any(item.name == "offered weights" for item in side_by_side.resident)
    alone = rank_memory(replace(asked, learner=replace(asked.learner, ranks=1)), costs)
    assert alone.update_bytes - alone.resident_bytes == added * bucket
    everywhere = rank_memory(replace(asked, learner=replace(asked.learner, zero_stage=2)), costs)
    assert everywhere.update_bytes - everywhere.resident_bytes == (added - 1) * bucket  # all of it is whole anyway


def test_a_model_smaller_than_a_bucket_takes_no_more_than_itself():
    asked = replace(recipe(1, 1), rollout=Rollout(engine=EngineKind.vllm))
    plan, costs = rank_memory(asked, stack()), stack()
    assert plan.update_bytes - plan.resident_bytes == 3 * 2 * costs.outline.num_parameters


def test_buckets_are_those_of_the_learner():
    sends, offers = (
        inspect.signature(way).parameters for way in (learner.Learner.send_weights, learner.Learner.offer_weights)
    )
    assert sends["max_bytes"].default == offers["max_bytes"].default == learner_memory.UPDATE_BYTES
    assert (learner_memory.STAGED, learner_memory.OFFERED) == (transport.NUM_STAGED, sender.NUM_OFFERED)
