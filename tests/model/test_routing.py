"""Expert selection, and its replay (Keep Routing)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import DeepseekV32, Routing
from model.moe import Router
from tests.model.shapes import gradients, make_config, make_model, record, relative_error, router, tokens


def choose_by_hand(scores: list[float], bias: list[float], groups: int, topk_groups: int, top_k: int) -> list[int]:
    """noaux_tc as the reference implementation words it; ties to the lowest index."""
    choice = [score + correction for score, correction in zip(scores, bias, strict=True)]
    size = len(choice) // groups
    strength = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: (-strength[g], g))[:topk_groups]
    experts = [e for g in kept for e in range(g * size, (g + 1) * size)]
    return sorted(sorted(experts, key=lambda e: (-choice[e], e))[:top_k])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), groups=st.sampled_from([1, 2, 4]))
def test_selection_is_the_definition(data: st.DataObject, groups: int) -> None:
    topk_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, 8 // groups * topk_groups))
    # Multiples of 1/8 sum without rounding, and meet often.
    grid = st.integers(-8, 8).map(lambda n: n / 8)
    scores = data.draw(st.lists(grid, min_size=8, max_size=8))
    bias = data.draw(st.lists(grid, min_size=8, max_size=8))
    gate = Router(make_config(n_group=groups, topk_group=topk_groups, num_experts_per_tok=top_k))
    gate.e_score_correction_bias.copy_(torch.tensor(bias))
    found = gate.choose(torch.tensor([scores]))
    assert found.tolist() == [choose_by_hand(scores, bias, groups, topk_groups, top_k)]


def test_correction_bias_steers_selection_but_not_weights() -> None:
    config = make_config(norm_topk_prob=False, routed_scaling_factor=1.0)
    gate = router(make_model(config), 1)
    x = torch.randn(5, config.hidden_size)
    gate.e_score_correction_bias.zero_()
    gate.e_score_correction_bias[[3, 6]] = 100.0
    experts, weights = gate(x)
    assert experts.tolist() == [[3, 6]] * 5
    torch.testing.assert_close(weights, (x @ gate.weight.T).sigmoid()[:, [3, 6]])


def moved(module: DeepseekV32) -> DeepseekV32:
    """The same shape after a large update."""
    other = make_model(module.config, seed=9)
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    return other


def test_replay_repeats_the_recorded_choice_exactly() -> None:
    module = make_model(make_config())
    ids = tokens(2, 30)
    routes = record(module, ids)
    assert routes.shape == (2, 30, 2, 2)
    replay = Routing(experts=routes, recorded=torch.ones(2, 30, dtype=torch.bool))
    assert torch.equal(module(ids, routes=replay), module(ids))

    other = moved(module)
    assert (record(other, ids) != routes).any(), "the update must move some token to another expert"
    assert torch.equal(record(other, ids, routes=replay), routes)
    assert (other(ids, routes=replay) - other(ids)).abs().max() > 1e-3


def test_rows_without_a_record_route_live() -> None:
    module = make_model(make_config())
    ids = tokens(1, 30)
    live = record(module, ids)
    known = torch.rand(1, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    # Garbage where nothing was recorded must not be looked at; 0 is an expert id too.
    experts = torch.where(known[..., None, None], live, 0)
    assert torch.equal(record(module, ids, routes=Routing(experts=experts, recorded=known)), live)
    nothing = Routing(experts=torch.zeros_like(live), recorded=torch.zeros_like(known))
    assert torch.equal(record(module, ids, routes=nothing), live)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_gate_weights_stay_live_under_replay(dtype: torch.dtype) -> None:
    """Routes as engines store them give the router the gradient that it has when it chooses the same experts itself."""
    module = make_model(make_config())
    ids = tokens(2, 20)
    routes = record(module, ids)
    module.zero_grad()
    module(ids).logsumexp(dim=-1).sum().backward()
    wanted = gradients(module)
    module.zero_grad()
    replay = Routing(experts=routes.to(dtype), recorded=torch.ones(2, 20, dtype=torch.bool))
    module(ids, routes=replay).logsumexp(dim=-1).sum().backward()
    found = gradients(module)
    assert found.keys() == wanted.keys()
    assert found["model.layers.1.mlp.gate.weight"].norm() > 0
    assert max(relative_error(found[name], wanted[name]) for name in wanted) < 1e-6


def test_replay_of_packed_rows() -> None:
    module = make_model(make_config())
    ids = tokens(1, 30)
    cu_seqlens = torch.tensor([0, 12, 30])
    replay = Routing(experts=record(module, ids, cu_seqlens=cu_seqlens), recorded=torch.ones(1, 30, dtype=torch.bool))
    assert torch.equal(record(moved(module), ids, cu_seqlens=cu_seqlens, routes=replay), replay.experts)
