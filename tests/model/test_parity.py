"""The model against transformers' DeepseekV32ForCausalLM."""

from __future__ import annotations

import pytest
import torch

from model import ModelConfig
from tests.model.shapes import (
    SHAPES,
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


def test_sparse_attention_is_tested_where_it_differs_from_dense() -> None:
    """Guards the tests above: with these weights the selection changes the logits."""
    module = make_model(make_config())
    dense = make_model(make_config(index_topk=4096))
    ids = tokens(2, 33)
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
