"""Models of transformers, dense and with routed experts: what vLLM samples against what the learner makes of it.

Measures, per model, the mean |log-probability difference| and k3 with and without replayed routes, the share of the
engine's experts that the learner's own router chooses too, and the learner's flash attention for packed rows against
sequences of their own. Figures go to KEEL_FIGURES when that names a file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import LanguageModel, Routing, load_model, save_model
from model.transformers_model import config_of, random_model
from rl.config import Sampling
from rollout.engine import Completion, Request
from rollout.vllm_engine import EngineSettings, VllmEngineActor
from tests.gpu.figures_file import record
from tests.gpu.replay import figures, log_ratios

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": SIZES | {"tie_word_embeddings": True},
    "qwen3_moe": SIZES | {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256},
}
FIGURES: dict[str, Any] = {}


@dataclass
class Observed:
    """What one engine sampled, and the learner's model of the same weights."""

    name: str
    learner: LanguageModel
    requests: list[Request] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)


def requests_of(count: int, length: int) -> list[Request]:
    generator = np.random.default_rng(length)
    return [
        Request(
            id=f"{length}/{number}",
            token_ids=generator.integers(3, SIZES["vocab_size"], length).astype(np.int32),
            sampling=Sampling(top_p=0.95, max_tokens=128),
            seed=int(generator.integers(2**32)),
            stop_token_ids=(1,),
        )
        for number in range(count)
    ]


async def sample(path: Path, requests: list[Request]) -> list[Completion]:
    actor = VllmEngineActor()
    settings = EngineSettings(
        dtype="bfloat16", max_num_seqs=64, max_context=SIZES["max_position_embeddings"], gpu_memory=0.3
    )
    await actor.load(str(path), settings)
    try:
        return await actor.generate(requests)
    finally:
        await actor.shutdown()


@pytest.fixture(scope="module", params=MODELS)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    name = str(request.param)
    path = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    save_model(random_model(config_of(MODELS[name] | {"model_type": name})).bfloat16(), path)
    asked = [*requests_of(32, 40), *requests_of(8, 900)]
    completions = asyncio.run(sample(path, asked))
    learner = load_model(path, dtype=torch.bfloat16, device="cuda").eval()
    yield Observed(name=name, learner=learner, requests=asked, completions=completions)
    record(**FIGURES)


def test_engine_and_learner_agree(seen: Observed):
    pair = seen.requests, seen.completions
    found = {"replayed": figures(log_ratios(seen.learner, *pair))}
    if seen.name == "qwen3_moe":
        found["live"] = figures(log_ratios(seen.learner, *pair, routes=False))
    FIGURES[seen.name] = found
    assert found["replayed"]["mean_abs"] < 0.05
    if "live" in found:
        assert found["replayed"]["k3"] < found["live"]["k3"]


def test_the_learners_router_mostly_chooses_as_the_engines(seen: Observed):
    if seen.name == "qwen3":
        assert all(completion.routes is None for completion in seen.completions)
        return
    shares = []
    for request, completion in list(zip(seen.requests, seen.completions, strict=True))[:8]:
        ids = np.concatenate([request.token_ids, completion.token_ids])
        with torch.no_grad():
            live = seen.learner.backbone(torch.tensor(ids, device="cuda").long()[None], record_routes=True).routes
        assert live is not None and completion.routes is not None and completion.routed is not None
        ours, theirs = live[0].cpu().numpy()[completion.routed], completion.routes[completion.routed].astype(int)
        shares.append((ours[..., :, None] == theirs[..., None, :]).any(axis=-2).mean())
    FIGURES[f"{seen.name}/routes_agree"] = float(np.mean(shares))
    assert np.mean(shares) > 0.9


def pieces(experts: torch.Tensor | None, lengths: list[int]) -> list[Routing | None]:
    """The routes of a packed row, cut into those of its sequences."""
    if experts is None:
        return [None] * len(lengths)
    parts = experts.split(lengths, dim=1)
    return [Routing(experts=part, recorded=torch.ones_like(part[:, :, 0, 0]).bool()) for part in parts]


def test_packed_rows_are_what_each_sequence_is_alone(seen: Observed):
    """One flash kernel over the row against scaled_dot_product_attention of each sequence; gradients too."""
    model = seen.learner
    lengths = [1, 700, 33, 257]
    row = torch.randint(3, SIZES["vocab_size"], (1, sum(lengths)), device="cuda")
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    with torch.no_grad():  # both take the same experts: roundings would decide between those that nearly tie
        experts = model.backbone(row, cu_seqlens=bounds, record_routes=True).routes
    packed = model(row, cu_seqlens=bounds, routes=pieces(experts, [sum(lengths)])[0])[0].float()
    parts = zip(row.split(lengths, dim=1), pieces(experts, lengths), strict=True)
    alone = torch.cat([model(ids, routes=routes)[0] for ids, routes in parts]).float()
    error = ((packed - alone).norm() / alone.norm()).item()
    gradients = []
    for logits in (packed, alone):
        model.zero_grad()
        logits.log_softmax(-1)[:, 7].sum().backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None]))
    gradient_error = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    FIGURES[f"{seen.name}/packed"] = {"logits": error, "gradients": gradient_error}
    assert error < 0.03 and gradient_error < 0.1
