"""The step on one rank, against unpacked forwards and the objective's formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import LanguageModel, load_model
from model.moe import Experts
from rl.choices import IndexerTraining
from rl.config import Objective, Sampling
from rl.metrics import values
from rl.sample import Group, Prompt, Sample
from rollout.engine import Request
from rollout.samples import to_sample
from rollout.torch_engine import TorchEngine
from tests.trainer.conftest import MakeRank
from tests.trainer.samples import (
    EPISODE_ADVANTAGES,
    MASKED_EPISODES,
    TEMPERATURE,
    advantages_of,
    brute_logprobs,
    brute_loss,
    episodes_of,
    groups_of,
    live_weights,
    tiny_recipe,
    with_logprobs,
)
from trainer.deepspeed_engine import StepOutcome
from trainer.pack import Minibatch, WeightedSample, pack, pack_step
from trainer.phase import Phase
from trainer.policy import PackedTokens, Policy
from trainer.step import RankStep, Reference, grpo_step

CPU = torch.device("cpu")
ON_POLICY = Objective(off_policy_delta=None)


class GradientOnly:
    """Stands where the DeepSpeed engine stands, and leaves the gradient in ``.grad``."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.num_runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.policy(*args, **kwargs)

    @torch.no_grad()
    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.num_runs += 1
        return self.policy(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> bool:
        loss.backward()
        return bool(loss.isfinite())

    def step(self) -> StepOutcome:
        return StepOutcome(applied=True, grad_norm=0.0, lr=0.0)

    def seconds(self) -> dict[str, float]:
        return {}


@pytest.fixture
def model(model_dir: Path) -> LanguageModel:
    return load_model(model_dir)


def pack_all(groups: Sequence[Group], *, micro_tokens: int = 64, kl_beta: float = 0.0) -> Minibatch:
    (step,) = pack(
        groups,
        advantages_of(groups),
        kl_betas={"math": kl_beta},
        ranks=1,
        minibatches=1,
        micro_tokens=micro_tokens,
        rng=np.random.default_rng(0),
    )
    return step


def run(
    model: LanguageModel, minibatch: Minibatch, objective: Objective = ON_POLICY, **keywords: Any
) -> tuple[RankStep, dict[str, torch.Tensor]]:
    model.zero_grad()
    engine: Any = GradientOnly(Policy(model, temperature=TEMPERATURE))
    step = grpo_step(engine, minibatch, objective, device=CPU, **keywords)
    return step, gradients(model)


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if ".indexer." not in name
    }


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    """Each tensor to ``relative`` of its own largest entry, and the rounding of sums in fp32."""
    assert actual.keys() == expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    assert scale > 1e-3, "a gradient of zero proves nothing"
    for name, tensor in expected.items():
        own = float(tensor.abs().max())
        difference = float((actual[name] - tensor).abs().max())
        assert difference <= relative * own + 1e-7 * scale, f"{name}: {difference} of {own}"


def perturb(model: LanguageModel, size: float) -> LanguageModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def samples_of(groups: Sequence[Group]) -> list[Sample]:
    return [scored.sample for group in groups for scored in group.scored]


def test_the_first_step_on_policy_has_ratio_one_and_the_gradient_of_reinforce(model: LanguageModel):
    groups = groups_of(model)
    step, gradient = run(model, pack_all(groups, micro_tokens=40))
    metrics = values(step.metrics)
    assert abs(metrics["ratio/mean"] - 1) <= 1e-5
    assert metrics["mismatch/logprob_abs"] <= 1e-5
    for sample in samples_of(groups):
        ratio = np.exp(step.learner_logprobs[sample.id] - sample.rollout_logprobs)
        assert np.abs(ratio - 1).max() <= 1e-3

    model.zero_grad()
    num_samples = sum(len(group.scored) for group in groups)
    for group, advantages in zip(groups, advantages_of(groups), strict=True):
        for scored, advantage in zip(group.scored, advantages, strict=True):
            logprobs = brute_logprobs(model, scored.sample)
            (-advantage * logprobs.sum() / scored.sample.num_sampled / num_samples).backward()
    assert_close(gradient, gradients(model), 1e-4)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_micro_batch_size_does_not_change_the_gradient(model: LanguageModel, aggregation: str):
    groups = groups_of(model)
    perturb(model, 0.01)
    objective = Objective(aggregation=aggregation, off_policy_delta=0.05)  # pyright: ignore[reportArgumentType]
    whole, expected = run(model, pack_all(groups, micro_tokens=1000), objective)
    for micro_tokens in (1, 35, 50):
        step, gradient = run(model, pack_all(groups, micro_tokens=micro_tokens), objective)
        assert_close(gradient, expected, 1e-4)
        assert step.loss == pytest.approx(whole.loss, rel=1e-4)
        for name, value in values(whole.metrics).items():
            assert values(step.metrics)[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_packed_log_probabilities_equal_unpacked_ones_over_kept_sets(model: LanguageModel):
    groups = groups_of(model)
    perturb(model, 0.02)
    step, _ = run(model, pack_all(groups, micro_tokens=1000))
    for sample in samples_of(groups):
        expected = brute_logprobs(model, sample).detach().numpy()
        np.testing.assert_allclose(step.learner_logprobs[sample.id], expected, atol=2e-5)


def test_samples_with_and_without_recordings_share_a_micro_batch(model: LanguageModel):
    with_both, bare = samples_of(groups_of(model, lengths=((12, 20),)))
    bare = dataclasses.replace(bare, routes=None, routed=None, kept=None)
    perturb(model, 0.02)
    samples = [WeightedSample(sample=sample, advantage=1.0) for sample in (with_both, bare)]
    step, _ = run(model, pack_step(samples, ranks=1, micro_tokens=64))
    for sample in (with_both, bare):
        expected = brute_logprobs(model, sample).detach().numpy()
        np.testing.assert_allclose(step.learner_logprobs[sample.id], expected, atol=2e-5)
    assert with_both.kept is not None
    metrics = values(step.metrics)
    last = [int(np.flatnonzero(sample.sampled).max()) for sample in (with_both, bare)]
    assert metrics["routes/replayed"] == pytest.approx(last[0] / sum(last))
    assert metrics["kept/share"] == pytest.approx(with_both.num_sampled / (with_both.num_sampled + bare.num_sampled))
    assert metrics["kept/mean_size"] == pytest.approx(with_both.kept.sizes[with_both.sampled].mean())


def test_keep_sampling_mask_and_keep_routing_can_be_turned_off(model: LanguageModel):
    groups = groups_of(model)
    perturb(model, 0.1)
    for kept, replay in ((False, True), (True, False)):
        objective = Objective(keep_sampling_mask=kept, keep_routing=replay, off_policy_delta=None)
        step, _ = run(model, pack_all(groups), objective)
        for sample in samples_of(groups):
            expected = brute_logprobs(model, sample, kept=kept, replay=replay).detach().numpy()
            np.testing.assert_allclose(step.learner_logprobs[sample.id], expected, atol=5e-5)
        metrics = values(step.metrics)
        assert metrics["kept/share"] == float(kept)
        assert metrics["routes/replayed"] == float(replay)


def test_replayed_routes_are_the_experts_used_and_live_ones_differ_after_the_weights_moved(model: LanguageModel):
    groups = groups_of(model)
    perturb(model, 0.1)
    (micro,) = pack_all(groups, micro_tokens=1000).ranks[0]
    assert micro.routes is not None and micro.routed is not None
    tokens = PackedTokens.of(micro, CPU)
    used: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(lambda _, inputs: used.append(inputs[1].clone()))
    policy = Policy(model)
    with torch.no_grad():
        policy(tokens)
        policy(tokens, replay_routes=False)
    replayed, live = torch.stack(used[:2], dim=1).numpy(), torch.stack(used[2:], dim=1).numpy()
    recorded = np.sort(micro.routes[micro.routed], axis=-1)
    np.testing.assert_array_equal(np.sort(replayed[micro.routed], axis=-1), recorded)
    assert (np.sort(live[micro.routed], axis=-1) != recorded).mean() > 0.05


def experts_used(model: LanguageModel) -> list[list[torch.Tensor]]:
    """What each layer's experts are given from now on, [layers][calls] of int64 [tokens, top_k]."""
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    used: list[list[torch.Tensor]] = [[] for _ in layers]

    def record(calls: list[torch.Tensor]) -> Callable[..., None]:
        return lambda _, inputs: calls.append(inputs[1].clone())

    for module, calls in zip(layers, used, strict=True):
        module.register_forward_pre_hook(record(calls))
    return used


def test_the_learner_uses_the_experts_that_the_engine_used(model: LanguageModel, model_dir: Path):
    """From what the engine's experts were really given, by its recording, Sample and pack, to the learner's experts."""
    engine = TorchEngine(load_model(model_dir), max_num_seqs=1, max_context=64)
    sampling, rng = Sampling(temperature=TEMPERATURE, top_p=0.9, max_tokens=18), np.random.default_rng(0)
    in_engine = experts_used(engine.module)
    samples, chosen = [], {}
    for index, length in enumerate((5, 12, 9)):
        token_ids = rng.integers(0, 48, length).astype(np.int32)
        prompt = Prompt(id="math/0", domain="math", token_ids=token_ids)
        request = Request(id=str(index), token_ids=token_ids, sampling=sampling, seed=index)
        (completion,) = engine.generate([request])
        sample = to_sample(prompt, index, request, completion, "")
        # The prompt's forward, and then one for each token but the last; the engine fills its rows up.
        rows = [torch.cat([first[:length], *(call[:1] for call in later)]) for first, *later in in_engine]
        chosen[sample.id] = torch.stack(rows, dim=1)
        assert len(chosen[sample.id]) == len(sample) - 1
        samples.append(sample)
        for calls in in_engine:
            calls.clear()

    perturb(model, 0.1)
    (micro,) = pack_step([WeightedSample(sample=sample) for sample in samples], ranks=1, micro_tokens=1000).ranks[0]
    in_learner = experts_used(model)
    policy, tokens = Policy(model, temperature=TEMPERATURE), PackedTokens.of(micro, CPU)
    with torch.no_grad():
        policy(tokens)
        policy(tokens, replay_routes=False)
    replayed, live = (torch.stack([calls[run] for calls in in_learner], dim=1).sort(-1)[0] for run in (0, 1))
    changed = 0
    for name, start, end in zip(micro.sample_ids, micro.cu_seqlens[:-1], micro.cu_seqlens[1:], strict=True):
        wanted = chosen[name].sort(-1)[0]
        assert torch.equal(replayed[start : end - 1], wanted)
        changed += int((live[start : end - 1] != wanted).any(-1).sum())
    assert changed > 10


def test_the_gate_keeps_its_gradient_under_replay(model: LanguageModel):
    _, gradient = run(model, pack_all(groups_of(model)))
    gates = [tensor for name, tensor in gradient.items() if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    assert all(float(gate.abs().max()) > 1e-6 for gate in gates)


def test_off_policy_sequences_with_negative_advantage_leave_the_loss(model: LanguageModel):
    far, near, good = samples_of(groups_of(model, lengths=((14, 19, 23),)))
    drifted = [with_logprobs(s, np.where(s.sampled, s.rollout_logprobs + 0.5, 0)) for s in (far, good)]
    samples = [
        WeightedSample(sample=drifted[0], advantage=-1.0),
        WeightedSample(sample=near, advantage=-1.0),
        WeightedSample(sample=drifted[1], advantage=1.0),
    ]
    masked, gradient = run(model, pack_step(samples, ranks=1, micro_tokens=64), Objective(off_policy_delta=0.1))
    assert values(masked.metrics)["mask/off_policy"] == pytest.approx(1 / 3)
    without = [WeightedSample(sample=drifted[0], advantage=0.0), *samples[1:]]
    _, expected = run(model, pack_step(without, ranks=1, micro_tokens=64))
    assert_close(gradient, expected, 1e-5)


@pytest.mark.parametrize(("micro_tokens", "num_open"), [(1000, 0), (30, 2), (20, 7)])
def test_an_episode_is_masked_as_a_whole_wherever_its_sequences_lie(
    sole_rank: MakeRank, model: LanguageModel, micro_tokens: int, num_open: int
):
    sole_rank(tiny_recipe())  # a process group, over which episodes are summed
    episodes = episodes_of(model)
    (minibatch,) = pack(
        [episodes],
        [EPISODE_ADVANTAGES],
        kl_betas={"math": 0.0},
        ranks=1,
        minibatches=1,
        micro_tokens=micro_tokens,
        rng=np.random.default_rng(0),
    )
    engine: Any = GradientOnly(Policy(model, temperature=TEMPERATURE))
    model.zero_grad()
    step = grpo_step(engine, minibatch, Objective(off_policy_delta=0.2, clip_low=0.99), device=CPU)
    gradient = gradients(model)
    assert engine.num_runs == len(minibatch.open_rounds) == num_open <= len(minibatch.ranks[0])
    assert values(step.metrics)["mask/off_policy"] == pytest.approx(sum(MASKED_EPISODES) / len(MASKED_EPISODES))

    model.zero_grad()
    total = torch.zeros(())
    members = zip(samples_of([episodes]), EPISODE_ADVANTAGES, MASKED_EPISODES, strict=True)
    for sample, advantage, masked in members:
        learner = torch.cat([brute_logprobs(model, part)[part.sampled] for part in sample.sequences])
        rollout = torch.tensor(np.concatenate([part.rollout_logprobs[part.sampled] for part in sample.sequences]))
        assert masked == (advantage < 0 and float((rollout - learner).detach().mean()) > 0.2)
        ratio = (learner - rollout).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.01, 1.2) * advantage)
        total = total - surrogate.mean() / len(MASKED_EPISODES) * (not masked)
    total.backward()
    assert step.loss == pytest.approx(total.item(), rel=1e-4)
    assert values(step.metrics)["loss/policy"] == pytest.approx(total.item(), rel=1e-4)
    assert_close(gradient, gradients(model), 1e-4)


def test_the_kl_is_to_the_reference_with_its_own_routes_over_the_same_kept_sets(model: LanguageModel, model_dir: Path):
    frozen = load_model(model_dir)
    # The policy that sampled is neither the reference nor the learner, so replaying its routes would show in both.
    groups = groups_of(perturb(model, 0.1))
    perturb(model, 0.02)
    reference = Reference(Policy(frozen, temperature=TEMPERATURE))
    beta = 0.3
    step, gradient = run(model, pack_all(groups, kl_beta=beta), reference=reference)

    model.zero_grad()
    total = torch.zeros(())
    num_samples = sum(len(group.scored) for group in groups)
    for group, advantages in zip(groups, advantages_of(groups), strict=True):
        for scored, advantage in zip(group.scored, advantages, strict=True):
            total = total + brute_loss(model, frozen, scored.sample, advantage, beta) / num_samples
    total.backward()
    assert step.loss == pytest.approx(total.item(), rel=1e-4)
    assert_close(gradient, gradients(model), 1e-4)


@pytest.mark.parametrize("partitioned", [False, True])
def test_the_reference_is_spared_micro_batches_without_a_kl(model: LanguageModel, model_dir: Path, partitioned: bool):
    samples = samples_of(groups_of(model))
    weighted = [
        WeightedSample(sample=sample, advantage=1.0, kl_beta=0.2 * (number % 2))
        for number, sample in enumerate(samples)
    ]
    minibatch = pack_step(weighted, ranks=1, micro_tokens=1)
    asked: list[int] = []

    def policy(tokens: PackedTokens, **keywords: Any) -> Any:
        asked.append(len(tokens.token_ids))
        return frozen(tokens, **keywords)

    perturb(model, 0.05)
    frozen = Policy(load_model(model_dir), temperature=TEMPERATURE)
    step, gradient = run(model, minibatch, reference=Reference(policy, partitioned=partitioned))
    assert sorted(asked) == sorted(len(one.sample) for one in weighted if one.kl_beta or partitioned)
    whole, expected = run(model, pack_step(weighted, ranks=1, micro_tokens=1000), reference=Reference(frozen))
    assert values(whole.metrics)["loss/kl"] > 0
    assert values(step.metrics)["loss/kl"] == pytest.approx(values(whole.metrics)["loss/kl"], rel=1e-3)
    assert_close(gradient, expected, 1e-4)


def test_the_indexer_loss_trains_the_indexer_alone(model: LanguageModel):
    minibatch = pack_all(groups_of(model))
    _, expected = run(model, minibatch)
    step, gradient = run(model, minibatch, indexer_weight=0.5)
    assert_close(gradient, expected, 1e-5)
    assert values(step.metrics)["loss/indexer"] > 0
    indexer = [p.grad for name, p in model.named_parameters() if ".indexer." in name]
    assert len(indexer) == 3 * 5
    assert all(g is not None and float(g.abs().max()) > 0 for g in indexer)


def test_the_reference_is_loaded_only_for_a_kl(sole_rank: MakeRank, model_dir: Path):
    rank = sole_rank(tiny_recipe(kl_beta=0.0))
    rank.begin(Phase.REINFORCEMENT, model_dir)
    assert rank.reference is None
    rank = sole_rank(tiny_recipe(kl_beta=0.1))
    rank.begin(Phase.REINFORCEMENT, model_dir)
    assert rank.reference is not None
    policies = [rank.policy, rank.reference.policy]
    first, second = (dict(policy.named_parameters()) for policy in policies)  # pyright: ignore[reportFunctionMemberAccess]
    assert all(torch.equal(first[name], second[name]) and first[name] is not second[name] for name in first)
    assert not any(parameter.requires_grad for parameter in second.values())
    rank.begin(Phase.SUPERVISED, model_dir)
    assert rank.reference is None


def test_the_indexer_is_frozen_unless_its_own_loss_trains_it(sole_rank: MakeRank, model_dir: Path):
    def trained(phase: Phase, **learner: Any) -> set[bool]:
        rank = sole_rank(tiny_recipe(**learner))
        rank.begin(phase, model_dir)
        parameters = rank.policy.model.named_parameters()
        return {(".indexer." in name) for name, parameter in parameters if parameter.requires_grad}

    assert trained(Phase.REINFORCEMENT) == {False}
    assert trained(Phase.REINFORCEMENT, indexer=IndexerTraining.kl) == {False, True}
    assert trained(Phase.INDEXER_WARMUP) == {True}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_steps_like_plain_adamw(sole_rank: MakeRank, model_dir: Path, stage: int):
    clip = 0.05
    rank = sole_rank(tiny_recipe(zero_stage=stage, warmup_steps=2, weight_decay=0.1, grad_clip=clip))
    rank.begin(Phase.REINFORCEMENT, model_dir)
    plain = load_model(model_dir)
    trained = [p for name, p in plain.named_parameters() if ".indexer." not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    groups = groups_of(load_model(model_dir))
    for lr in (5e-4, 1e-3, 1e-3):
        (step,) = rank.step([pack_all(groups, micro_tokens=40)])
        expected, _ = run(plain, pack_all(groups, micro_tokens=40))
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        assert step.outcome.applied
        assert step.outcome.lr == lr
        assert step.outcome.grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert step.outcome.grad_norm > clip
        assert step.loss == pytest.approx(expected.loss, rel=1e-4)
    live = live_weights(rank)
    for name, tensor in plain.state_dict().items():
        assert float((live[name] - tensor).detach().abs().max()) <= 3e-5, name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_is_as_if_it_had_not_been(
    sole_rank: MakeRank, model_dir: Path, stage: int
):
    good = pack_all(groups_of(load_model(model_dir)), micro_tokens=40)
    bad_groups = groups_of(load_model(model_dir))
    broken = bad_groups[1].scored[0].sample
    broken.rollout_logprobs[np.flatnonzero(broken.sampled)[0]] = -1e4  # the ratio overflows
    bad = pack_all(bad_groups, micro_tokens=1)

    def weights_after(minibatches: list[Minibatch]) -> tuple[list[RankStep], dict[str, torch.Tensor]]:
        rank = sole_rank(tiny_recipe(zero_stage=stage))
        rank.begin(Phase.REINFORCEMENT, model_dir)
        steps = rank.step(minibatches)
        return steps, live_weights(rank)

    (first, skipped, second), live = weights_after([good, bad, good])
    _, expected = weights_after([good, good])
    assert first.outcome.applied and second.outcome.applied and not skipped.outcome.applied
    assert broken.id in skipped.suspects and len(skipped.suspects) == 1
    assert all(torch.equal(live[name], tensor) for name, tensor in expected.items())
