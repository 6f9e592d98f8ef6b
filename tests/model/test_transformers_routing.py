"""Keep Routing for the routers of transformers, one mechanism for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import Routing
from model.transformers_model import TransformersModel
from tests.model import families
from tests.model.families import MOE_LAYERS, tokens

FAMILIES = list(MOE_LAYERS)


def everywhere(experts: torch.Tensor) -> Routing:
    return Routing(experts=experts, recorded=torch.ones(experts.shape[:2], dtype=torch.bool))


def record(model: TransformersModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        routes = model.backbone(ids, record_routes=True).routes
    assert routes is not None
    return routes


def other_routes(shape: torch.Size, seed: int = 3) -> torch.Tensor:
    """Random experts, no expert twice for a token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape[:-1], 8, generator=generator).argsort(dim=-1)[..., : shape[-1]]


def weigh(family: str, scores: torch.Tensor, experts: torch.Tensor, config: Any) -> torch.Tensor:
    """Gate weights [N, k] by each family's published formula, from router logits fp32 [N, E]."""
    if family in ("deepseek_v3", "glm4_moe"):
        chosen = scores.sigmoid().gather(1, experts)
        if config.norm_topk_prob:
            chosen = chosen / (chosen.sum(dim=1, keepdim=True) + 1e-20)
        return chosen * config.routed_scaling_factor
    chosen = scores.softmax(dim=-1).gather(1, experts)
    normalised = family == "mixtral" or config.norm_topk_prob
    return chosen / chosen.sum(dim=1, keepdim=True) if normalised else chosen


def experts_by_hand(block: Any, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Token by token and expert by expert."""
    rows = []
    for token, chosen, gate in zip(x, experts, weights, strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(chosen.tolist(), gate, strict=True):
            halves = block.experts.gate_up_proj[expert] @ token
            inner = F.silu(halves[: len(halves) // 2]) * halves[len(halves) // 2 :]
            total = total + weight * (block.experts.down_proj[expert] @ inner)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_a_models_own_routes_changes_no_bit(family: str):
    model = families.make(family)
    ids = tokens(2, 20)
    routes = record(model, ids)
    assert routes.shape == (2, 20, len(MOE_LAYERS[family]), 2)
    assert (routes.diff(dim=-1) > 0).all(), "ascending, no expert twice"
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids, routes=everywhere(routes)))
        assert not torch.equal(model(ids), model(ids, routes=everywhere(other_routes(routes.shape))))


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_routes_run_the_experts_they_name_with_live_weights(family: str):
    model = families.make(family)
    ids = tokens(2, 12)
    replayed = other_routes(record(model, ids).shape)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(layer: int) -> Any:
        return lambda _, inputs, output: seen.update({layer: (inputs[0].flatten(0, -2), output.flatten(0, 1))})

    blocks = [model.get_submodule(tap.spec.name.rpartition(".")[0]) for tap in model._taps]
    for layer, block in enumerate(blocks):
        block.register_forward_hook(watch(layer))
    with torch.no_grad():
        model(ids, routes=everywhere(replayed))
        for layer, block in enumerate(blocks):
            x, found = seen[layer]
            experts = replayed[:, :, layer].flatten(0, 1)
            scores = x @ block.get_parameter("gate.weight").T
            wanted = experts_by_hand(block, x, experts, weigh(family, scores, experts, model.config))
            shared = getattr(block, "shared_experts", None)
            if isinstance(shared, nn.Module):
                wanted = wanted + shared(x)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_a_record_route_live(family: str):
    model = families.make(family)
    ids = tokens(2, 20)
    live = record(model, ids)
    replayed = other_routes(live.shape)
    recorded = torch.rand(2, 20, generator=torch.Generator().manual_seed(5)) < 0.5
    recorded[:, :4] = False
    with torch.no_grad():
        mixed = model.backbone(ids, routes=Routing(experts=replayed, recorded=recorded), record_routes=True).routes
        assert mixed is not None
        assert torch.equal(mixed[recorded], replayed[recorded])
        assert torch.equal(mixed[:, :4], live[:, :4])
        # In the first routed layer nothing that differs has happened yet.
        assert torch.equal(mixed[:, :, 0][~recorded], live[:, :, 0][~recorded])
        nothing = Routing(experts=replayed, recorded=torch.zeros_like(recorded))
        assert torch.equal(model(ids, routes=nothing), model(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_reaches_the_router_through_replayed_weights(family: str):
    """Against finite differences along it: with the indices fixed the output is smooth in the router's weight."""
    model = families.make(family)
    ids = tokens(1, 10)
    routing = everywhere(other_routes(record(model, ids).shape))
    weights = torch.randn(10, 264, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value() -> torch.Tensor:
        return (model(ids, routes=routing)[0].double().log_softmax(-1) * weights).sum()

    value().backward()
    for tap in model._taps:
        router = model.get_submodule(tap.spec.name).weight
        assert isinstance(router, nn.Parameter) and router.grad is not None
        slope = float(router.grad.norm())
        step = 0.02 * router.grad / slope
        with torch.no_grad():
            router += step
            ahead = float(value())
            router -= 2 * step
            behind = float(value())
            router += step
        assert (ahead - behind) / 0.04 == pytest.approx(slope, rel=0.02)
        assert slope > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_ties_go_to_the_lowest_expert(family: str):
    model = families.make(family)
    with torch.no_grad():
        for tap in model._taps:
            router = model.get_submodule(tap.spec.name)
            router.weight.zero_()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            if hasattr(router, "e_score_correction_bias"):
                router.e_score_correction_bias.zero_()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert torch.equal(record(model, tokens(1, 6)), torch.tensor([0, 1]).expand(1, 6, len(model._taps), 2))


def test_routes_of_another_model_are_refused():
    model = families.make("qwen3_moe")
    with pytest.raises(ValueError, match=r"routes of 3 layers, but Qwen3MoeForCausalLM has 2 with routed experts"):
        model(tokens(1, 5), routes=everywhere(torch.zeros(1, 5, 3, 2, dtype=torch.long)))
