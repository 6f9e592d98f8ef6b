"""Whole sequences as one packed row, in each form of attention, against padded groups."""

from __future__ import annotations

import pytest
import torch

from kernels import crossover
from kernels.crossover import AttentionForm, attention_form
from model import packing
from model.attention import IndexerLoss
from tests.model.shapes import SHAPES, make_config, make_model, tokens

LENGTHS = [3, 17, 1, 29, 8]


def outcome(
    module, ids: torch.Tensor, cu_seqlens: torch.Tensor | None, indexer_loss: IndexerLoss | None
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    module.zero_grad()
    output = module.backbone(ids, cu_seqlens=cu_seqlens, indexer_loss=indexer_loss)
    objective = output.hidden.square().sum()
    if output.indexer_loss is not None:
        objective = objective + output.indexer_loss
    objective.backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return output.hidden.detach(), output.indexer_loss, grads


@pytest.mark.parametrize("indexer_loss", [None, "sparse", "dense"])
@pytest.mark.parametrize("form", [AttentionForm.MASKED, AttentionForm.SPARSE])
@pytest.mark.parametrize("shape", ["base", "odd sizes"])
def test_a_packed_row_is_its_padded_groups(
    shape: str, form: AttentionForm, indexer_loss: IndexerLoss | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_model(make_config(**SHAPES[shape]))
    ids, cu_seqlens = tokens(1, sum(LENGTHS)), torch.tensor([0, *LENGTHS]).cumsum(0)
    wanted, wanted_loss, wanted_grads = outcome(module, ids, cu_seqlens, indexer_loss)
    chosen = []
    monkeypatch.setattr(packing, "_MAX_GROUPED", 0)
    monkeypatch.setattr("model.attention.attention_form", lambda *args, **kwargs: chosen.append(1) or form)
    hidden, loss, grads = outcome(module, ids, cu_seqlens, indexer_loss)
    assert bool(chosen) == (indexer_loss != "dense")
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-5)
    if wanted_loss is not None:
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=1e-5)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, wanted_grads[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_rows_of_one_length_and_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cu_seqlens; and sequences that leave nothing out."""
    module = make_model(make_config())
    for ids in (tokens(3, 20), tokens(2, 5)):
        wanted, _, wanted_grads = outcome(module, ids, None, None)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_MAX_GROUPED", 0)
            hidden, _, grads = outcome(module, ids, None, None)
        torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted_grads[name], rtol=1e-3, atol=1e-4)


def test_forms_by_length() -> None:
    dims = {"expanded_dim": 320, "latent_dim": 576, "value_latent_dim": 512}
    assert attention_form(2048, 2048, **dims, training=True) is AttentionForm.DENSE
    assert attention_form(2049, 2048, **dims, training=True) is AttentionForm.MASKED
    assert attention_form(1 << 20, 2048, **dims, training=True) is AttentionForm.SPARSE
    # At equal rates: 2048 * 1088 flops of selected pairs against 320 / 2 a token of the triangle.
    equal = crossover.Rates(masked=1.0, sparse=1.0)
    assert crossover.crossover(2048, **dims, rates=equal) == 2048 * 1088 // 160
    slower = crossover.Rates(masked=1.0, sparse=0.5)
    assert crossover.crossover(2048, **dims, rates=slower) == 2 * crossover.crossover(2048, **dims, rates=equal)
