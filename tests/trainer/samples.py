"""A tiny model, and rollouts from it that are computed one whole sequence at a time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from model import CacheView, KeySelection, LanguageModel, ModelConfig, Routing
from rl.config import Domain, Learner, Model, Objective, Recipe, Sampling, Supervised
from rl.sample import Group, Kept, NDArray, Prompt, Sample, Scored
from rl.selections import Selections
from trainer.deepspeed_engine import Sharding
from trainer.rank import LearnerRank, sharding_of
from trainer.weights import whole_weights

VOCAB = 48
TEMPERATURE = 0.7


def tiny_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=8,
        initializer_range=0.15,
    )


def tiny_recipe(*, kl_beta: float = 0.0, objective: Objective | None = None, **learner: Any) -> Recipe:
    settings: dict[str, Any] = {"lr": 1e-3, "grad_clip": 0.0, "micro_tokens": 64, "zero_stage": 0} | learner
    return Recipe(
        name="test",
        model=Model(path="unused"),
        domains={"math": Domain(prompts="unused", kl_beta=kl_beta)},
        sampling=Sampling(temperature=TEMPERATURE),
        objective=objective or Objective(off_policy_delta=None),
        learner=Learner(**settings),
        supervised=Supervised(lr=3e-3, warmup_steps=0),
    )


def fully_sharded(recipe: Recipe) -> Sharding:
    """At stage 3 even the smallest parameter is partitioned, as the large ones of a real model are."""
    return dataclasses.replace(sharding_of(recipe), persistence_elements=0)


def live_weights(rank: LearnerRank) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone() for bucket in whole_weights(rank.policy.model, 4096) for name, tensor in bucket.items()
    }


def kept_rows(rng: np.random.Generator, token_ids: NDArray, sampled: NDArray) -> Kept:
    """Random sets that hold the token, empty where nothing was sampled."""
    rows = []
    for token, chosen in zip(token_ids, sampled, strict=True):
        others = rng.choice(VOCAB, size=rng.integers(3, 20), replace=False)
        rows.append(np.union1d(others, [token]).astype(np.int32) if chosen else np.zeros(0, np.int32))
    return Kept.from_rows(rows)


def brute_logprobs(
    model: LanguageModel,
    sample: Sample,
    *,
    temperature: float = TEMPERATURE,
    kept: bool = True,
    replay: bool = True,
) -> torch.Tensor:
    """float32 [T], with gradient: one sequence, whole logits, a full-vocabulary mask; 0 where not sampled."""
    routes = None
    if replay and sample.routes is not None:
        experts = torch.tensor(sample.routes.astype(np.int64)).unsqueeze(0)
        recorded = torch.ones(experts.shape[:2], dtype=torch.bool)
        if sample.routed is not None:
            recorded = torch.tensor(sample.routed).unsqueeze(0)
        routes = Routing(experts=experts, recorded=recorded)
    token_ids = torch.tensor(sample.token_ids, dtype=torch.long)
    logits = model(token_ids.unsqueeze(0), routes=routes)[0] / temperature
    logprobs = torch.zeros(len(sample))
    for t in np.flatnonzero(sample.sampled):
        row = logits[t - 1]
        if kept and sample.kept is not None and sample.kept.sizes[t]:
            allowed = sample.kept.ids[sample.kept.offsets[t] : sample.kept.offsets[t + 1]]
            row = torch.full_like(row, float("-inf")).index_copy(0, torch.tensor(allowed).long(), row[allowed])
        logprobs[t] = row.log_softmax(0)[token_ids[t]]
    return logprobs


def brute_loss(
    model: LanguageModel, reference: LanguageModel, sample: Sample, advantage: float, kl_beta: float
) -> torch.Tensor:
    """Eq. 8 of one sample by itself, clipped at 0.2 on both sides, without a mask; the reference has its own routes."""
    learner = brute_logprobs(model, sample)[sample.sampled]
    with torch.no_grad():
        ref = brute_logprobs(reference, sample, replay=False)[sample.sampled]
    ratio = (learner - torch.tensor(sample.rollout_logprobs[sample.sampled])).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    kl = ratio * ((ref - learner).exp() - (ref - learner) - 1)
    return -(surrogate - kl_beta * kl).mean()


def roll_out(
    model: LanguageModel, rng: np.random.Generator, *, prompt: Prompt, index: int, length: int, recorded: bool = True
) -> Sample:
    """A sequence of random tokens with what an engine running ``model`` would have recorded for it."""
    token_ids = rng.integers(0, VOCAB, size=length).astype(np.int32)
    sampled = np.arange(length) >= rng.integers(1, max(2, length // 2))
    # A tool's answer in the middle of the reply.
    sampled[length // 2 : length // 2 + 2] = False
    sampled[-1] = True
    with torch.no_grad():
        ids = torch.tensor(token_ids, dtype=torch.long).unsqueeze(0)
        routes = model.backbone(ids, record_routes=True).routes
    assert routes is not None
    blank = Sample(
        prompt=prompt,
        index=index,
        token_ids=token_ids,
        sampled=sampled,
        rollout_logprobs=np.zeros(length, np.float32),
        versions=np.where(sampled, 0, -1).astype(np.int32),
        routes=routes[0].numpy().astype(np.uint8) if recorded else None,
        routed=np.arange(length) < length - 1 if recorded else None,
        kept=kept_rows(rng, token_ids, sampled) if recorded else None,
    )
    with torch.no_grad():
        return with_logprobs(blank, brute_logprobs(model, blank).numpy())


def with_another_indexer(model: LanguageModel) -> LanguageModel:
    """A copy that attends to other keys, and is otherwise the same."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".indexer." in name:
                parameter += torch.randn(parameter.shape, generator=generator)
    return other


def with_selections(sample: Sample, model: LanguageModel) -> Sample:
    """With what an engine running ``model`` would have selected."""
    top_k, length = model.index_topk, len(sample)
    assert top_k is not None
    own: dict[int, torch.Tensor] = {}
    view = CacheView(cache=model.new_cache(1, length), slots=torch.zeros(1).long(), lengths=torch.tensor([length]))
    ids, positions = torch.tensor(sample.token_ids).long()[None], torch.arange(length)[None]
    model.backbone(ids, positions=positions, cache=view, selection=KeySelection(own=own))
    order = np.arange(length)
    recorded = (order >= top_k) & (order < length - 1)
    if not recorded.any():
        return sample
    keys = torch.stack([own[layer][0] for layer in range(model.outline.num_layers)], dim=1).numpy()
    return dataclasses.replace(sample, selections=Selections.of(keys[recorded], recorded))


def with_logprobs(sample: Sample, logprobs: NDArray) -> Sample:
    return dataclasses.replace(sample, rollout_logprobs=logprobs.astype(np.float32))


def groups_of(
    model: LanguageModel, *, seed: int = 0, lengths: Sequence[Sequence[int]] = ((13, 22, 9), (17, 30, 11))
) -> list[Group]:
    """One group per entry, one sample per length; rewards are random."""
    rng = np.random.default_rng(seed)
    groups = []
    for g, siblings in enumerate(lengths):
        prompt = Prompt(id=f"math/{g}", domain="math", token_ids=np.zeros(1, np.int32))
        samples = [roll_out(model, rng, prompt=prompt, index=i, length=n) for i, n in enumerate(siblings)]
        groups.append(Group(prompt=prompt, scored=tuple(Scored(sample=s, reward=float(rng.normal())) for s in samples)))
    return groups


SHIFTS = ((0.5, 0.1), (0.4, 0.0, 0.0), (0.0,), (0.3, 0.3), (2.0, 2.0))
EPISODE_ADVANTAGES = np.array([-1.0, -0.5, 0.8, -0.4, 1.1])
MASKED_EPISODES = (True, False, False, True, False)
"""Of :func:`episodes_of`, at an ``off_policy_delta`` of 0.2."""


def episodes_of(model: LanguageModel) -> Group:
    """Siblings of one to three sequences, whose engine liked every token by ``SHIFTS`` more than ``model``.

    By themselves one sequence of the first episode would be trained, and one of the second masked.
    """
    rng, prompt = np.random.default_rng(5), Prompt(id="math/0", domain="math", token_ids=np.zeros(1, np.int32))
    scored = []
    for index, shifts in enumerate(SHIFTS):
        parts = [roll_out(model, rng, prompt=prompt, index=index, length=14) for _ in shifts]
        parts = [
            with_logprobs(part, part.rollout_logprobs + np.where(part.sampled, shift, 0))
            for part, shift in zip(parts, shifts, strict=True)
        ]
        earlier = tuple(dataclasses.replace(part, part=place) for place, part in enumerate(parts[:-1]))
        scored.append(Scored(sample=dataclasses.replace(parts[-1], earlier=earlier), reward=0.0))
    return Group(prompt=prompt, scored=tuple(scored))


def advantages_of(groups: Sequence[Group]) -> list[NDArray]:
    return [group.rewards - group.rewards.mean() for group in groups]
