"""Dense attention over long sequences: transformers' numbers, from memory that does not grow with their square."""

from __future__ import annotations

import pytest
import torch

from tests.model.shapes import gradients, make_config, make_model, make_twin, relative_error, tokens
from tests.resident import ResidentBytes


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_of_queries_give_transformers_logits_and_gradients(packed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model.packing._MAX_GROUPED", 0)
    monkeypatch.setattr("kernels.reference.attention._SCORES_LIMIT", 4 * 7 * 50)
    config = make_config(index_topk=512)
    module = make_model(config)
    twin = make_twin(module)
    ids = tokens(2, 50)
    if packed:
        logits = module(ids.view(1, 100), cu_seqlens=torch.tensor([0, 50, 50, 100])).view(2, 50, -1)
    else:
        logits = module(ids)
    expected = twin(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = gradients(twin)
    for name, gradient in gradients(module).items():
        assert relative_error(gradient, theirs[name]) < 1e-4, name


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model.packing._MAX_GROUPED", 0)
    monkeypatch.setattr("kernels.reference.attention._SCORES_LIMIT", 1 << 14)
    module = make_model(make_config(index_topk=4096, num_hidden_layers=1, first_k_dense_replace=1))
    peaks = {}
    for length in (256, 1024):
        with ResidentBytes() as resident:
            module(tokens(1, length)).sum().backward()
        peaks[length] = resident.peak
    # Scores of all pairs alone would be 4 heads * 1024 ** 2 * 4 bytes.
    assert peaks[1024] < 16e6
    assert peaks[1024] < 5 * peaks[256]
