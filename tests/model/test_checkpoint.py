"""Reading and writing checkpoints, and transformers on the other side of the door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model import (
    DeepseekV32,
    LanguageModel,
    checkpoint_tensors,
    join_experts,
    load_model,
    save_model,
    split_experts,
    write_checkpoint,
)
from tests.model.shapes import SHAPES, make_config, make_model, make_twin, tokens

KINDS = ["base", "yarn and groups", "odd sizes", "interleaved layers", "biases and another epsilon", "tied head"]
Tensors = dict[str, torch.Tensor]


def assert_same_weights(found: LanguageModel, wanted: DeepseekV32) -> None:
    found_state, wanted_state = found.state_dict(), wanted.state_dict()
    assert found_state.keys() == wanted_state.keys()
    for name, tensor in wanted_state.items():
        assert found_state[name].dtype == tensor.dtype, name
        assert torch.equal(found_state[name], tensor), name


def edit(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(make_model(make_config()), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_is_bit_exact(kind: str, tmp_path: Path) -> None:
    module = make_model(make_config(**SHAPES[kind]))
    save_model(module, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == module.config
    assert_same_weights(loaded, module)
    ids = tokens(1, 20)
    assert torch.equal(loaded(ids), module(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(kind: str, tmp_path: Path) -> None:
    module = make_model(make_config(**SHAPES[kind]))
    save_model(module, tmp_path / "ours", max_shard_bytes=20_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", experts_implementation="eager")
    assert type(theirs).__name__ == "DeepseekV32ForCausalLM"
    assert theirs.dtype == torch.float32
    assert theirs.state_dict().keys() == module.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name
    ids = tokens(2, 20)
    assert (theirs.eval()(ids).logits - module(ids)).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_weights(load_model(tmp_path / "theirs"), module)


def test_shards_are_bounded_and_complete(tmp_path: Path) -> None:
    module = make_model(make_config())
    save_model(module, tmp_path / "model", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3 and shards == sorted(set(index["weight_map"].values()))
    total = 0
    for shard in shards:
        tensors = load_file(tmp_path / "model" / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == tensors.keys()
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    assert_same_weights(load_model(tmp_path / "model"), module)


def test_bfloat16_round_trip_keeps_the_correction_bias_in_fp32(tmp_path: Path) -> None:
    module = make_model(make_config()).bfloat16()
    save_model(module, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same_weights(load_model(tmp_path / "model", dtype=torch.bfloat16), module)
    assert load_model(tmp_path / "model").lm_head.weight.dtype == torch.float32


def test_stacked_experts_load(saved: Path) -> None:
    module = make_model(make_config())
    stacked = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert "model.layers.1.mlp.experts.gate_up_proj" in stacked
    save_file(stacked, saved / "model.safetensors")
    assert_same_weights(load_model(saved), module)


def test_multi_token_prediction_and_old_frequencies_are_skipped(saved: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.3.mlp.experts.0.gate_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edit(saved, add)
    assert_same_weights(load_model(saved), make_model(make_config()))


def test_overwriting_keeps_what_is_not_ours_and_leaves_no_debris(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    (saved / "extra").mkdir()
    (saved / "extra" / "note").write_text("kept")
    other = make_model(make_config(), seed=4)
    save_model(other, saved, max_shard_bytes=20_000)
    assert not (saved / "model.safetensors").exists()
    assert (saved / "tokenizer.json").exists() and (saved / "extra" / "note").read_text() == "kept"
    save_model(other, saved)
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "extra"}
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert_same_weights(load_model(saved), other)


def test_a_failed_write_leaves_the_old_checkpoint(saved: Path) -> None:
    module = make_model(make_config())

    def tensors_until_the_power_fails():
        yield from list(checkpoint_tensors(module))[:10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(module.config.to_dict(), tensors_until_the_power_fails(), saved, dtype=torch.float32)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert_same_weights(load_model(saved), module)


GATE = "model.layers.1.mlp.experts.5.gate_proj.weight"
NORM = "model.layers.2.self_attn.kv_a_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t: t.pop(GATE), f"tensor {GATE} is missing"),
        (lambda t: t.update({NORM: torch.ones(17)}), rf"tensor {NORM} has shape \(17,\).*asks for \(16,\)"),
        (lambda t: t.update({GATE: torch.ones(24, 31)}), rf"tensor {GATE} has shape \(24, 31\).*asks for \(24, 32\)"),
        (lambda t: t.update(stray=torch.ones(1)), "tensor stray is not part of the model"),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.8.up_proj.weight": torch.ones(1), "x": torch.ones(1)}),
            r"experts.8.up_proj.weight \(and 1 more\) is not part",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "tensor lm_head.weight_scale_inv is missing",
        ),
        (
            lambda t: t.update(
                {"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)},
                **{"lm_head.weight_scale_inv": torch.ones(2, 1)},
            ),
            r"lm_head.weight: scales have shape \(2, 1\) where the weight needs \(1, 1\)",
        ),
    ],
)
def test_a_wrong_tensor_is_named(saved: Path, change: Callable[[Tensors], object], message: str) -> None:
    edit(saved, change)
    with pytest.raises(ValueError, match=message) as error:
        load_model(saved)
    assert "\n" not in str(error.value) and str(saved) in str(error.value)


def test_files_that_cannot_be_read_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/config.json does not exist"):
        load_model(tmp_path / "nowhere")
    (saved / "model.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_model(saved)
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"gone\.safetensors: cannot be read"):
        load_model(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        load_model(saved)


def test_split_and_join_are_inverses() -> None:
    module = make_model(make_config())
    state = module.state_dict()
    split = [pair for name, tensor in state.items() for pair in split_experts(name, tensor)]
    shuffled = [split[i] for i in torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).tolist()]
    joined = dict(join_experts(shuffled, 8))
    assert joined.keys() == state.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in state.items())
    gap = [pair for pair in shuffled if pair[0] != GATE]
    with pytest.raises(ValueError, match=GATE):
        dict(join_experts(gap, 8))


def test_checkpoint_tensors_are_live_views_under_transformers_names(tmp_path: Path) -> None:
    module = make_model(make_config())
    make_twin(module).save_pretrained(tmp_path)
    names = dict(checkpoint_tensors(module))
    assert names.keys() == load_file(tmp_path / "model.safetensors").keys()
    with torch.no_grad():
        module.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[5, 0, 0] = 7.0
    assert names[GATE][0, 0] == 7.0
