"""Keel's sparse attention inside a real vLLM engine, with CUDA graphs, sleep and vLLM's batch-invariant mode.

Prompts are several times as long as index_topk. One engine start takes a minute or two, so a single scenario runs
through it and the tests look at what it saw. What both choices are worth: `python -m tests.gpu.selection`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import DeepseekV32, checksums, load_deepseek_v32, save_model
from rollout.engine import Completion, Request
from rollout.vllm_engine import EngineSettings, VllmEngineActor
from tests.gpu.selection import (
    Selected,
    against_second_prefill,
    agreement,
    alone_and_together,
    carried,
    coverage,
    engine_selections,
    learner_selections,
    mismatches,
    whole,
)
from tests.gpu.soil import soil_free_memory
from tests.gpu.test_vllm_engine import CONFIG, MAX_CONTEXT, TOP_K_KEYS, make_module, make_requests, update
from trainer.sender import WeightSender

LONG = 1900
assert LONG > 3 * TOP_K_KEYS


@dataclass
class Observed:
    requests: dict[str, list[Request]] = field(default_factory=dict)
    completions: dict[str, list[Completion]] = field(default_factory=dict)
    selected: list[Selected] = field(default_factory=list)
    prefilled: list[Completion] = field(default_factory=list)
    company: dict[str, float] = field(default_factory=dict)
    sums: dict[str, dict[str, int]] = field(default_factory=dict)

    def pair(self, name: str) -> tuple[list[Request], list[Completion]]:
        return self.requests[name], self.completions[name]

    def sequences(self) -> list[np.ndarray]:
        return [whole(*both) for both in zip(*self.pair("long"), strict=True)]


async def generate(actor: VllmEngineActor, seen: Observed, name: str, length: int) -> None:
    seen.requests[name] = make_requests(name, 8, length)
    seen.completions[name] = await actor.generate(seen.requests[name])


async def scenario(path: Path) -> Observed:
    seen, actor = Observed(), VllmEngineActor()
    settings = EngineSettings(
        dtype="bfloat16",
        max_num_seqs=32,
        max_context=MAX_CONTEXT,
        gpu_memory=0.3,
        keel_dsa=True,
        batch_invariant=True,
        sleeps=True,
        selections=True,
    )
    await actor.load(str(path), settings)
    try:
        await generate(actor, seen, "short", 40)
        await generate(actor, seen, "long", LONG)
        seen.completions["cached"] = await actor.generate(
            [replace(request, id=f"{request.id} again") for request in seen.requests["long"]]
        )
        seen.selected, seen.prefilled = await engine_selections(actor, True, seen.sequences())
        seen.company = await alone_and_together(actor, top_p=1.0)
        sender = WeightSender(rank=0, device=torch.device("cuda", 0))
        seen.sums["awake"] = await update(actor, sender, make_module(1).to("cuda"), 1)
        await generate(actor, seen, "updated", LONG)
        await actor.sleep()
        soil_free_memory()
        seen.sums["asleep"] = await update(actor, sender, make_module(2).to("cuda"), 2)
        await generate(actor, seen, "woken", LONG)
    finally:
        await actor.shutdown()
    return seen


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(make_module(0), path)
    return path


@pytest.fixture(scope="module")
def seen(model_path: Path) -> Iterator[Observed]:
    yield asyncio.run(scenario(model_path))


@pytest.fixture(scope="module")
def learner(model_path: Path) -> DeepseekV32:
    return load_deepseek_v32(model_path, dtype=torch.bfloat16, device="cuda").eval()


def test_bits_do_not_depend_on_the_company(seen: Observed):
    """Of untruncated log-probabilities: vLLM's top-p splits its sums by the batch, in this mode too."""
    assert seen.company == {"equal_tokens": 1.0, "equal_bits": 1.0, "largest": 0.0}


def test_the_engine_says_what_it_selected(seen: Observed):
    for ids, selected in zip(seen.sequences(), seen.selected, strict=True):
        assert sorted(selected) == list(range(CONFIG.num_hidden_layers))
        for places in selected.values():
            assert places.shape == (len(ids), TOP_K_KEYS)
            rows = torch.arange(len(ids)).unsqueeze(1)
            assert bool((places <= rows).all()), "a key from the future"
            assert torch.equal((places >= 0).sum(dim=1), (rows[:, 0] + 1).clamp(max=TOP_K_KEYS))
            assert bool(((places.diff(dim=1) > 0) | (places[:, 1:] == -1)).all()), "not ascending"


def test_learner_and_engine_agree(seen: Observed, learner: DeepseekV32):
    """With what the engine selected, beyond index_topk as well as below it."""
    short = mismatches(learner, *seen.pair("short"), "plain")["mean_abs"]
    alone = mismatches(learner, *seen.pair("long"), "plain")["mean_abs"]
    replayed = mismatches(learner, *seen.pair("long"), "plain", seen.selected)["mean_abs"]
    print(f"short {short:.4f}, long {alone:.4f}, long with the engine's selection {replayed:.4f}")
    assert short < 0.05 and replayed < 0.05 and replayed < 1.5 * short
    assert replayed < alone < 0.15


@pytest.mark.parametrize("name", ["short", "long", "updated", "woken"])
def test_completions_carry_selections(seen: Observed, name: str):
    """Of every position that leaves keys out, but for the last token, which was never fed."""
    for request, completion in zip(*seen.pair(name), strict=True):
        order = np.arange(len(request.token_ids) + len(completion.token_ids))
        selections = completion.selections
        assert selections is not None and selections.fault() is None
        assert selections.num_layers == CONFIG.num_hidden_layers and selections.top_k == TOP_K_KEYS
        assert selections.recorded.tolist() == ((order >= TOP_K_KEYS) & (order < len(order) - 1)).tolist()
        assert completion.routed is not None and completion.routed[:-1].all()
    if name != "short":
        assert coverage(*seen.pair(name))["not_recorded"] == 0


def test_they_are_what_the_worker_says_of_the_same_prefill(seen: Observed):
    assert agreement(list(map(carried, seen.prefilled)), seen.selected)["identical"] == 1


def test_they_are_what_a_second_prefill_selects(seen: Observed):
    """Decoding and a prompt select the same, bit by bit: the engine is batch-invariant."""
    found = against_second_prefill(seen.completions["long"], seen.selected)
    print(found)
    assert found["identical"] == 1


def test_a_prompt_from_the_prefix_cache_has_the_selections_of_its_first_prefill(seen: Observed):
    for first, cached in zip(seen.completions["long"], seen.completions["cached"], strict=True):
        for layer, rows in carried(cached).items():
            assert torch.equal(rows[:LONG], carried(first)[layer][:LONG])


def test_replaying_them_makes_a_long_context_like_a_short_one(seen: Observed, learner: DeepseekV32):
    short = mismatches(learner, *seen.pair("short"), "plain")["mean_abs"]
    alone = mismatches(learner, *seen.pair("long"), "plain")["mean_abs"]
    replayed = mismatches(learner, *seen.pair("long"), "plain", own=True)["mean_abs"]
    print(f"short {short:.4f}, long {alone:.4f}, long with its own selections {replayed:.4f}")
    assert replayed < 0.05 and replayed < 1.5 * short and replayed < alone


def test_they_select_the_same_but_for_rounding(seen: Observed, learner: DeepseekV32):
    """Hidden states differ by roundings, so the sets do not agree entirely; wrong arithmetic would share far less."""
    own = [learner_selections(learner, ids) for ids in seen.sequences()]
    found: dict[str, Any] = agreement(seen.selected, own)
    print(found)
    assert found["common"] > 0.9 and found["common_by_layer"][0] > 0.98


@pytest.mark.parametrize(("name", "seed", "sums"), [("updated", 1, "awake"), ("woken", 2, "asleep")])
def test_updates_arrive_whole_and_take_effect(seen: Observed, name: str, seed: int, sums: str):
    module = make_module(seed)
    assert seen.sums[sums] == checksums(module.state_dict().items())
    updated = mismatches(module.to("cuda"), *seen.pair(name), "plain")["mean_abs"]
    stale = mismatches(make_module(0).to("cuda"), *seen.pair(name), "plain")["mean_abs"]
    assert updated < 0.15 < 5 * updated < stale
