"""Activation checkpointing: the same bits from less memory."""

from __future__ import annotations

import pytest
import torch

from model import DeepseekV32, Routing
from tests.model.shapes import gradients, make_config, make_model, record, tokens
from tests.resident import ResidentBytes


def packed(module: DeepseekV32) -> dict[str, object]:
    """Rows on both sides of index_topk, half of whose routes were recorded, by another model."""
    ids = tokens(1, 40)
    routes = record(make_model(module.config, seed=3), ids)
    recorded = torch.arange(40).unsqueeze(0) % 2 == 0
    return {
        "input_ids": ids,
        "cu_seqlens": torch.tensor([0, 5, 22, 40]),
        "routes": Routing(experts=routes, recorded=recorded),
        "indexer_loss": "sparse",
    }


@pytest.mark.parametrize(("tied", "blocks"), [(False, False), (True, False), (False, True)])
def test_gradients_are_bitwise_those_of_kept_activations(tied: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch):
    if blocks:  # attention that computes its own blocks again, within the layer that is computed again
        monkeypatch.setattr("model.packing._MAX_GROUPED", 0)
        monkeypatch.setattr("kernels.reference.attention._SCORES_LIMIT", 4 * 7 * 18)
    module = make_model(make_config(tie_word_embeddings=tied))
    arguments = packed(module)
    found = []
    for recompute in (False, True):
        if recompute:
            module.recompute_activations()
        module.zero_grad()
        output = module.backbone(**arguments)  # pyright: ignore[reportArgumentType]
        assert output.indexer_loss is not None
        logits = module.lm_head(output.hidden)
        (logits.square().sum() + output.indexer_loss).backward()
        found.append({"logits": logits.detach(), "loss": output.indexer_loss.detach()} | gradients(module))
    kept, recomputed = found
    assert kept.keys() == recomputed.keys()
    assert any(".indexer." in name for name in kept) and any("gate.weight" in name for name in kept)
    for name, tensor in kept.items():
        assert torch.equal(tensor, recomputed[name]), name


def test_the_warm_up_trains_the_indexer_alone_from_recomputed_layers():
    module = make_model(make_config())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".indexer." in name)
    found = []
    for recompute in (False, True):
        if recompute:
            module.recompute_activations()
        module.zero_grad()
        output = module.backbone(tokens(2, 17), indexer_loss="dense")
        assert output.indexer_loss is not None and not output.hidden.requires_grad
        output.indexer_loss.backward()
        found.append(gradients(module))
    assert found[0].keys() == found[1].keys() != set()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_only_one_layer_is_kept_at_a_time():
    peaks = {}
    for layers in (2, 8):
        module = make_model(make_config(num_hidden_layers=layers, first_k_dense_replace=0, index_topk=512))
        ids = tokens(2, 96)
        for recompute in (False, True):
            if recompute:
                module.recompute_activations()
            with ResidentBytes() as resident:
                module.backbone(ids).hidden.sum()
                assert resident.alive < resident.peak  # the first graph is gone, so this counts what is freed too
                loss = module.backbone(ids).hidden.sum()
                before_backward = resident.alive
                loss.backward()
            peaks[layers, recompute] = before_backward
    hidden_bytes = 2 * 96 * 32 * 4
    # Every further layer costs one hidden state when its activations are recomputed.
    assert peaks[8, True] - peaks[2, True] < 6 * 1.5 * hidden_bytes
    assert peaks[8, False] - peaks[2, False] > 6 * 15 * hidden_bytes
