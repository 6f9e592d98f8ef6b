from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load_model, save_model
from model.fp8 import dequantise
from tests.model.shapes import make_config, make_model


@pytest.mark.parametrize(("rows", "columns", "block"), [(300, 129, (128, 128)), (5, 7, (2, 3)), (4, 6, (2, 3))])
def test_dequantise_is_the_double_loop(rows: int, columns: int, block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.5
    found = dequantise(weight, scale, block)
    wanted = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            wanted[i, j] = weight[i, j].float() * scale[i // block[0], j // block[1]]
    assert torch.equal(found, wanted)
    stacked = dequantise(torch.stack([weight, weight]), torch.stack([scale, 2 * scale]), block)
    assert torch.equal(stacked, torch.stack([wanted, 2 * wanted]))


def quantise(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block), -(-columns // block))
    quantised = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            window = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = weight[window].abs().max() / 448
            quantised[window] = (weight[window] / scale[i, j]).to(torch.float8_e4m3fn)
    return quantised, scale


@pytest.mark.parametrize("block", [128, 16])
def test_a_quantised_checkpoint_loads(block: int, tmp_path: Path) -> None:
    """As the public checkpoint: projections in FP8 with scales; norms, embeddings, router and head as they were."""
    module = make_model(make_config(hidden_size=48))
    save_model(module, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    projections = [name for name in tensors if "proj" in name and "weights_proj" not in name]
    assert len(projections) > 60
    for name in projections:
        tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensors[name], block)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))

    loaded = load_model(tmp_path / "model")
    for name, wanted in module.state_dict().items():
        found = loaded.state_dict()[name]
        # e4m3 keeps three bits behind the leading one, and subnormals are relative to the block's largest entry.
        tolerance = wanted.abs() / 16 + wanted.abs().max() / 448 if "proj" in name else torch.zeros(())
        assert ((found - wanted).abs() <= tolerance).all(), name

    config["quantization_config"]["quant_method"] = "awq"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'awq' is not supported"):
        load_model(tmp_path / "model")
