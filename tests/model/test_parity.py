"""The model against transformers' DeepseekV32ForCausalLM."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ModelConfig
from tests.model.shapes import (
    SHAPES,
    VOCAB,
    YARN,
    gradients,
    indexer_loss,
    make_config,
    make_model,
    make_twin,
    relative_error,
    router,
    tokens,
)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_transformers(shape: str) -> None:
    module = make_model(make_config(**SHAPES[shape]))
    twin = make_twin(module)
    ids = tokens(2, 33)

    logits, wanted = module(ids), twin(ids).logits
    assert (logits - wanted).abs().max() < 1e-4

    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * direction).sum().backward()
    (wanted * direction).sum().backward()
    found, wanted_gradients = gradients(module), gradients(twin)
    assert found.keys() == wanted_gradients.keys()
    errors = {name: relative_error(found[name], gradient) for name, gradient in wanted_gradients.items()}
    assert max(errors.values()) < 1e-4, errors


def lowest_index_topk(scores: torch.Tensor, k: int, dim: int = -1, **_: object) -> torch.return_types.topk:
    """torch.topk with ties to the lowest index, which its own kernels leave open."""
    values, indices = scores.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


@st.composite
def architectures(draw: st.DrawFn) -> ModelConfig:
    """Any small shape, also with so few indexer heads that many index scores are exactly 0 and tie."""
    groups = draw(st.sampled_from([1, 2, 4]))
    kept_groups, group_size = draw(st.integers(1, groups)), draw(st.sampled_from([2, 4]))
    top_k = draw(st.integers(1, min(4, kept_groups * group_size)))
    layers = draw(st.integers(1, 3))
    return make_config(
        hidden_size=draw(st.sampled_from([32, 48])),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        n_routed_experts=groups * group_size,
        num_experts_per_tok=top_k,
        # A single normalised weight is 1 whatever the router says: its gradient is rounding noise on both sides.
        norm_topk_prob=top_k > 1 and draw(st.booleans()),
        n_group=groups,
        topk_group=kept_groups,
        kv_lora_rank=draw(st.sampled_from([8, 16, 32])),
        qk_rope_head_dim=draw(st.sampled_from([4, 8, 16])),
        v_head_dim=draw(st.sampled_from([8, 12])),
        index_n_heads=draw(st.sampled_from([1, 2, 4])),
        index_topk=draw(st.sampled_from([4, 9])),
        rope_scaling=draw(st.sampled_from([None, YARN])),
    )


@given(config=architectures(), seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_any_shape_is_transformers_when_its_ties_go_to_the_lowest_index(config: ModelConfig, seed: int) -> None:
    module = make_model(config)
    twin = make_twin(module)
    ids = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "topk", lowest_index_topk)
        patch.setattr(torch.Tensor, "topk", lowest_index_topk)
        wanted = twin(ids).logits
    logits = module(ids)
    assert (logits - wanted).abs().max() < 1e-4
    logits.square().sum().backward()
    wanted.square().sum().backward()
    found = gradients(module)
    errors = {name: relative_error(found[name], gradient) for name, gradient in gradients(twin).items()}
    assert max(errors.values()) < 1e-4, errors


def test_sparse_attention_is_tested_where_it_differs_from_dense() -> None:
    """Guards the tests above: with these weights the selection changes the logits."""
    module = make_model(make_config())
    dense = make_model(make_config(index_topk=4096))
    ids = tokens(2, 33)
    with torch.no_grad():  # where rows have the same bits in any company
        difference = (module(ids) - dense(ids)).abs()
    assert difference[:, :6].max() == 0
    assert difference[:, 12:].max() > 0.1


def test_configuration_round_trips_through_transformers() -> None:
    for overrides in SHAPES.values():
        config = make_config(**overrides)
        assert ModelConfig.from_dict(config.to_dict()) == config
        assert ModelConfig.from_dict(make_twin(make_model(config)).config.to_dict()) == config


def test_bfloat16_follows_fp32_and_keeps_the_correction_bias() -> None:
    module = make_model(make_config(index_topk=64))
    ids = tokens(2, 20)
    wanted = module(ids)
    bias = module.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"].clone()
    half = module.bfloat16()
    gate = router(half, 1)
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, bias)
    logits = half(ids)
    assert logits.dtype == torch.bfloat16
    agreement = torch.nn.functional.cosine_similarity(logits.float(), wanted, dim=-1)
    assert agreement.median() > 0.99
    (half(ids).float().sum() + indexer_loss(half, ids, "dense")).backward()
    found = gradients(half)
    assert found.keys() == dict(half.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
