"""The learner on one GPU, and on two over nccl: ZeRO, memory, flash attention, speed.

What is measured goes to KEEL_FIGURES when that names a file; RESULTS.md holds the figures of the last run.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kernels
from kernels import reference
from model import DeepseekV32, ModelConfig, save_model
from model.costs import model_costs
from rl.choices import Offload
from rl.config import Domain, Learner, Model, Objective, Recipe
from rl.durable import FileRecord
from rl.hardware import peak_flops
from rl.sample import Prompt, Sample
from tests.gpu.figures_file import record
from trainer.pack import Minibatch, WeightedSample, pack_step
from trainer.phase import Phase
from trainer.rank import LOOPBACK, LearnerRank
from trainer.weights import weight_checksums

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=768,
    intermediate_size=2048,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=2048,
    n_routed_experts=32,
    num_experts_per_tok=4,
    max_position_embeddings=4096,
    initializer_range=0.02,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    save_model(DeepseekV32(CONFIG).to(torch.bfloat16), path)
    return path


def recipe_of(*, ranks: int = 1, objective: Objective | None = None, **learner: Any) -> Recipe:
    settings: dict[str, Any] = {"lr": 1e-4, "micro_tokens": 16384, "zero_stage": 2, "ranks": ranks} | learner
    return Recipe(
        name="test",
        model=Model(path="unused", dtype="bfloat16"),
        domains={"a": Domain(prompts="unused")},
        objective=objective or Objective(),
        learner=Learner(**settings),
    )


def smooth_recipe(**learner: Any) -> Recipe:
    """With `smooth_minibatch`: three steps in which roundings are not amplified.

    Adam's first updates are lr times a sign: a rounding of a gradient near zero turns whole updates, and the ratio's
    clip then drops tokens. Here the gradient's elements (norm 0.79 at advantages of 1, 196M of them: 6e-5) are of the
    size of Adam's eps, so that updates are nearly proportional to them, nothing is clipped or masked, and weight decay
    is so large that it would be missed. A fault that only scales gradients after their norm is taken is not seen.

    Equal bits are not asked for: torch's flash attention sums the gradient of the queries by atomics
    (`kernels/varlen.py`); by the code, our own kernels sum in a fixed order.
    """
    objective = Objective(clip_low=1.0, off_policy_delta=None)
    settings: dict[str, Any] = {"lr": 6e-5, "weight_decay": 30.0} | learner
    return recipe_of(objective=objective, **settings)


def smooth_minibatch(ranks: int = 1) -> Minibatch:
    """All advantages are negative: then a ``clip_low`` of 1 never clips, and ratios fall instead of running away."""
    return minibatch(ranks, advantages=(-4e-4, -4e-4))


def minibatch(
    ranks: int = 1,
    *,
    lengths: tuple[int, ...] = (1500, 1200, 900, 1024, 700, 600),
    advantages: tuple[float, float] = (-1.0, 1.0),
) -> Minibatch:
    """Random tokens with advantages by turns, all but the first 32 of a sequence trained."""
    rng = np.random.default_rng(0)
    samples = []
    for number, length in enumerate(lengths):
        sampled = np.arange(length) >= 32
        sample = Sample(
            prompt=Prompt(id=str(number), domain="a", token_ids=np.zeros(1, np.int32)),
            token_ids=rng.integers(0, CONFIG.vocab_size, length).astype(np.int32),
            sampled=sampled,
            rollout_logprobs=np.where(sampled, -np.log(CONFIG.vocab_size), 0).astype(np.float32),
            versions=np.where(sampled, 0, -1).astype(np.int32),
        )
        samples.append(WeightedSample(sample=sample, advantage=advantages[number % 2]))
    return pack_step(samples, ranks=ranks, micro_tokens=4096)


@pytest.fixture(scope="module")
def alone() -> Iterator[Any]:
    """Makes the only rank of a learner, on the first GPU."""
    joined: list[torch.device] = []

    def make(recipe: Recipe, model_dir: Path) -> LearnerRank:
        rank = LearnerRank(recipe, rank=0, world_size=1)
        if joined:
            rank.device = joined[0]
        else:
            rank.join(LOOPBACK, rank.open_store(LOOPBACK), 120.0)
            joined.append(rank.device)
        rank.begin(Phase.REINFORCEMENT, model_dir)
        return rank

    yield make
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()


def finish(rank: LearnerRank) -> None:
    rank.engine.close()
    torch.cuda.empty_cache()


def test_zero_stages_agree(alone: Any, model_dir: Path):
    """In a first step, in a second, which follows an update of each stage's own, and in a third."""
    norms = {}
    for stage in (1, 2, 3):
        rank = alone(smooth_recipe(zero_stage=stage), model_dir)
        norms[stage] = [rank.step([smooth_minibatch().share(0)])[0].outcome.grad_norm for _ in range(3)]
        finish(rank)
    record(grad_norms=norms)
    for stage in (2, 3):
        assert norms[stage][0] == pytest.approx(norms[1][0], rel=2e-3)
        assert norms[stage] == pytest.approx(norms[1], rel=0.01)


def test_recomputed_layers_give_the_same_norm_from_less_memory(alone: Any, model_dir: Path):
    norms, peaks, seconds = {}, {}, {}
    for recompute in (False, True):
        rank = alone(recipe_of(activation_checkpointing=recompute), model_dir)
        rank.step([minibatch().share(0)])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = rank.step([minibatch().share(0)])[0]
        norms[recompute], seconds[recompute] = step.outcome.grad_norm, step.seconds
        peaks[recompute] = (torch.cuda.max_memory_allocated() - before) / 1e9
        finish(rank)
    record(recompute_peak_gb=peaks, recompute_seconds=seconds)
    assert norms[True] == pytest.approx(norms[False], rel=0.02)
    assert peaks[True] < 0.6 * peaks[False]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_sleeping_learner_leaves_the_gpu_and_goes_on(alone: Any, model_dir: Path, stage: int):
    rank = alone(recipe_of(zero_stage=stage, sleep=True), model_dir)
    rank.step([minibatch().share(0)])
    torch.cuda.empty_cache()
    awake, began = torch.cuda.memory_allocated(), time.perf_counter()
    rank.sleep()
    asleep, fell_asleep = torch.cuda.memory_allocated(), time.perf_counter()
    rank.wake()
    woke = time.perf_counter()
    figures = {"awake_gb": awake / 1e9, "asleep_gb": asleep / 1e9}
    figures |= {"sleep_s": fell_asleep - began, "wake_s": woke - fell_asleep}
    record(**{f"asleep at stage {stage}": figures})
    parameters = sum(tensor.numel() for _, tensor in rank.policy.model.named_weights())
    if stage == 2:
        assert awake - asleep > 11.5 * parameters  # fp32 weights and two moments
    assert asleep < 0.5 * awake
    assert rank.step([minibatch().share(0)])[0].outcome.applied
    finish(rank)


def test_the_optimizer_can_run_in_host_memory(alone: Any, model_dir: Path):
    norms = {}
    for offload in Offload:
        rank = alone(recipe_of(offload_optimizer=offload), model_dir)
        norms[offload] = [rank.step([minibatch().share(0)])[0].outcome.grad_norm for _ in range(2)]
        finish(rank)
    assert norms[Offload.cpu] == pytest.approx(norms[Offload.none], rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 1},
        {"zero_stage": 2, "sleep": True},
        {"zero_stage": 2, "offload_optimizer": Offload.cpu},
        {"zero_stage": 3, "sleep": True},
        {"zero_stage": 3, "offload_optimizer": Offload.cpu, "offload_parameters": Offload.cpu},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_a_checkpoint_brings_back_every_bit(alone: Any, model_dir: Path, tmp_path: Path, settings: dict[str, Any]):
    rank = alone(recipe_of(**settings), model_dir)
    for _ in range(2):
        rank.step([minibatch().share(0)])
    rank.sleep()
    rank.wake()
    torch.cuda.synchronize()
    began = time.perf_counter()
    num_bytes = rank.copy_checkpoint()
    copied = time.perf_counter()
    rank.write_checkpoint(tmp_path)
    while (outcome := rank.checkpoint_written()) is None:
        time.sleep(0.001)
    written = time.perf_counter()
    assert isinstance(outcome, FileRecord)
    state, progress = rank.engine.copy_state()
    weights, draw = weight_checksums(rank.policy.model, 1 << 30), float(torch.rand((), device="cuda"))
    after = rank.step([minibatch().share(0)])[0].outcome
    finish(rank)

    rank = alone(recipe_of(**settings), model_dir)
    loading = time.perf_counter()
    rank.load_checkpoint(tmp_path)
    loaded = time.perf_counter()
    again, same_progress = rank.engine.copy_state()
    assert same_progress == progress and progress["applied_steps"] == 2
    assert again.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())
    assert weight_checksums(rank.policy.model, 1 << 30) == weights
    assert float(torch.rand((), device="cuda")) == draw
    resumed = rank.step([minibatch().share(0)])[0].outcome
    assert resumed.grad_norm == pytest.approx(after.grad_norm, rel=1e-2)
    finish(rank)
    figures = {"bytes": num_bytes, "copy_s": copied - began, "write_s": written - copied, "load_s": loaded - loading}
    record(**{f"checkpoint of {settings}": figures | {"same_norm": resumed.grad_norm == after.grad_norm}})


def test_dense_attention_is_that_of_double_precision():
    torch.manual_seed(0)
    bounds = torch.tensor([0, 700, 701, 1500, 1500, 2048], device="cuda")
    streams = [torch.randn(2048, 16, dim, device="cuda", dtype=torch.float64) for dim in (192, 192, 128)]
    grad = torch.randn(2048, 16, 128, device="cuda", dtype=torch.float64)

    def run(dtype: torch.dtype, function: Any) -> list[torch.Tensor]:
        leaves = [stream.to(dtype, copy=True).requires_grad_() for stream in streams]
        out = function(*leaves, bounds, 192**-0.5, 799)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact = run(torch.float64, reference.dense_attention)
    plain = run(torch.bfloat16, reference.dense_attention)
    flash = run(torch.bfloat16, kernels.dense_attention)
    errors = {}
    for name, want, ours, simple in zip(("out", "dq", "dk", "dv"), exact, flash, plain, strict=True):
        errors[name] = [float((found.double() - want).norm() / want.norm()) for found in (ours, simple)]
    record(dense_attention_errors=errors)
    for name, (ours, simple) in errors.items():
        assert ours <= max(2 * simple, 1e-2), name


def test_the_speed_of_a_step(alone: Any, model_dir: Path):
    lengths = (2048,) * 16
    costs = model_costs(model_dir)
    for recompute in (False, True):
        rank = alone(recipe_of(activation_checkpointing=recompute), model_dir)
        step = minibatch(lengths=lengths).share(0)
        rank.step([step])
        torch.cuda.synchronize()
        began = time.perf_counter()
        seconds = rank.step([step])[0].seconds
        torch.cuda.synchronize()
        spent = time.perf_counter() - began
        finish(rank)
        flops = sum(costs.training_flops(length) for length in lengths)
        peak = peak_flops(torch.cuda.get_device_name())
        figures = {"step_s": spent, "parts": seconds, "tokens_per_s": sum(lengths) / spent}
        figures |= {"tflops": flops / spent / 1e12, "mfu": flops / spent / peak if peak else None}
        record(**{f"recompute {recompute}": figures})
        assert seconds["forward"] < seconds["backward"] < spent


def start_one(rank: int, *arguments: Any) -> Any:
    """A process that sees its rank's GPU only, from its beginning on: what it imports may already look for GPUs."""
    context = multiprocessing.get_context("spawn")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", seen.split(",")[rank])
        process = context.Process(target=train_one, args=(rank, *arguments), daemon=True)
        process.start()
    return process


def answer(results: Any, processes: list[Any]) -> Any:
    """The next one; none is waited for when a process has failed, as its partner then waits for ever."""
    for _ in range(300):
        failed = any(process.exitcode for process in processes)
        with suppress(queue.Empty):
            return results.get(timeout=10 if failed else 1)
        assert not failed, "a rank failed; its traceback is above"
    raise TimeoutError("the ranks did not answer within 300 s")


def train_one(rank: int, port: int, model_dir: Path, settings: dict[str, Any], results: Any) -> None:
    learner = LearnerRank(smooth_recipe(ranks=2, **settings), rank=rank, world_size=2)
    if rank == 0:
        results.put(learner.open_store(LOOPBACK))
    learner.join(LOOPBACK, port or 0, 120.0)
    learner.begin(Phase.REINFORCEMENT, model_dir)
    norms = [learner.step([smooth_minibatch(2).share(rank)])[0].outcome.grad_norm for _ in range(3)]
    results.put((rank, norms, weight_checksums(learner.policy.model, 1 << 30)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 2},
        {"zero_stage": 3, "activation_checkpointing": True},
        {"zero_stage": 2, "expert_parallel": 2},
        {"zero_stage": 3, "expert_parallel": 2, "activation_checkpointing": True},
    ],
)
def test_two_ranks_over_nccl_step_like_one(alone: Any, model_dir: Path, settings: dict[str, Any]):
    results: Any = multiprocessing.get_context("spawn").Queue()
    processes = [start_one(0, 0, model_dir, settings, results)]
    try:
        port = answer(results, processes)
        processes.append(start_one(1, port, model_dir, settings, results))
        ranks = sorted(answer(results, processes) for _ in range(2))
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    assert ranks[0][1:] == ranks[1][1:]
    rank = alone(smooth_recipe(), model_dir)
    norms = [rank.step([smooth_minibatch().share(0)])[0].outcome.grad_norm for _ in range(3)]
    finish(rank)
    record(**{f"norms with {settings}": {"two_ranks": ranks[0][1], "one_rank": norms}})
    assert ranks[0][1] == pytest.approx(norms, rel=0.01)
