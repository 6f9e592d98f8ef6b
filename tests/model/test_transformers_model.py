"""Models of transformers behind `LanguageModel`, against transformers' own code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model import CacheView, checksums, load_model, outline, save_model
from model.transformers_model import TransformersModel
from tests.model import families
from tests.model.families import VALUES, tokens

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


def packed(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sequences int64 [T] as the arguments of a forward over one row."""
    bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return {"input_ids": torch.cat(rows)[None], "cu_seqlens": bounds}


@pytest.mark.parametrize("family", VALUES)
def test_logits_are_transformers_own(family: str):
    model = families.make(family)
    ids = tokens(3, 24)
    with torch.no_grad():
        wanted = families.twin(model)(ids).logits
        assert wanted.abs().max() > 1
        torch.testing.assert_close(model(ids), wanted, **CLOSE)


@pytest.mark.parametrize("family", VALUES)
def test_packed_sequences_are_what_each_is_alone(family: str):
    model = families.make(family)
    theirs = families.twin(model)
    rows = [tokens(length, seed=length) for length in (13, 1, 24, 7, 12)]
    with torch.no_grad():
        wanted = torch.cat([theirs(row[None]).logits[0] for row in rows])
        torch.testing.assert_close(model(**packed(rows))[0], wanted, **CLOSE)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "qwen3_moe"])
def test_gradients_of_packed_sequences_are_transformers_own(family: str):
    model = families.make(family).train()
    theirs = families.twin(model).train()
    rows = [tokens(length, seed=length) for length in (13, 24, 7)]
    weights = torch.randn(44, 264, generator=torch.Generator().manual_seed(0))
    (model(**packed(rows))[0] * weights).sum().backward()
    (torch.cat([theirs(row[None]).logits[0] for row in rows]) * weights).sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=2e-3, rtol=2e-3, msg=name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_own_attention_keeps_packed_sequences_apart_too(tmp_path: Path, implementation: str):
    model = families.make("qwen3")
    save_model(model, tmp_path)
    theirs = load_model(tmp_path, attn_implementation=implementation)
    row = packed([tokens(length, seed=length) for length in (13, 24, 7)])
    with torch.no_grad():
        torch.testing.assert_close(theirs(**row), model(**row), **CLOSE)
    with pytest.raises(ValueError, match="attn_implementation of transformers cannot generate"):
        theirs.new_cache(1, 8)


@given(data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True)
@pytest.mark.parametrize("family", ["mistral", "deepseek_v3", "qwen3_moe"])
def test_a_cache_that_is_filled_piece_by_piece_gives_the_whole_forward(family: str, data: st.DataObject):
    model = families.make(family)
    ids = tokens(2, 30)
    with torch.no_grad():
        wanted = model.backbone(ids, record_routes=True)
    cuts = sorted(data.draw(st.sets(st.integers(1, 29), max_size=6)))
    slots = torch.tensor(data.draw(st.permutations(range(4)))[:2])
    cache = model.new_cache(4, 32)
    for store in cache.stores:
        store.normal_()  # whatever a slot held before must not show
    hidden, routes = [], []
    for begin, end in zip([0, *cuts], [*cuts, 30], strict=True):
        positions = torch.arange(begin, end).expand(2, -1)
        view = CacheView(cache=cache, slots=slots, lengths=torch.tensor([end, end]))
        output = model.backbone(ids[:, begin:end], positions=positions, cache=view, record_routes=True)
        hidden.append(output.hidden)
        routes += [] if output.routes is None else [output.routes]
    torch.testing.assert_close(torch.cat(hidden, dim=1), wanted.hidden, **CLOSE)
    expected_routes = wanted.routes
    if expected_routes is not None:
        assert torch.equal(torch.cat(routes, dim=1), expected_routes)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3", "glm4_moe", "mixtral"])
def test_checkpoints_are_as_transformers_writes_them(tmp_path: Path, family: str):
    model = families.make(family)
    save_model(model, tmp_path / "ours")
    families.twin(model).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (family in families.MOE_LAYERS) == any(".experts.0." in name for name in ours)
    for name in ("ours", "theirs"):
        loaded = load_model(tmp_path / name)
        assert checksums(loaded.named_weights()) == checksums(model.named_weights())
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()(tokens(1, 9)).logits
        torch.testing.assert_close(logits, model(tokens(1, 9)), **CLOSE)
    assert outline(tmp_path / "ours") == model.outline


def test_what_stays_fp32_in_a_bfloat16_model(tmp_path: Path):
    save_model(families.make("deepseek_v3"), tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    for conversion in (lambda m: m, lambda m: m.bfloat16(), lambda m: copy.deepcopy(m).to(torch.bfloat16)):
        converted = conversion(model)
        assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in converted.buffers()} == {torch.float32}
        original = families.make("deepseek_v3")
        for name, buffer in converted.named_buffers():
            assert torch.equal(buffer, original.get_buffer(name)), name


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_recomputed_activations_give_the_same_gradients(family: str):
    plain, frugal = families.make(family).train(), families.make(family).train()
    frugal.recompute_activations()
    row = packed([tokens(length, seed=length) for length in (13, 24)])
    for model in (plain, frugal):
        model(**row).square().sum().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in frugal.named_parameters():
        expected = wanted[name].grad
        assert parameter.grad is not None and expected is not None, name
        assert torch.equal(parameter.grad, expected), name


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt_oss", "its attention asks for s_aux"),
        ("gemma2", "its attention asks for softcap"),
        ("granite", r"it does more than its head on the way to logits \(div\)"),
        ("qwen3_next", "not all of its layers attend to the keys and values of all tokens"),
        ("llama4_text", "chunked_attention is not supported"),
    ],
)
def test_what_keel_cannot_run_is_refused_in_one_sentence(model_type: str, reason: str):
    from model.transformers_model import config_of

    sizes = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=rf"cannot be run: .*{reason}") as caught:
        TransformersModel.empty(config_of(sizes | {"num_key_value_heads": 2, "model_type": model_type}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight is missing"),
        (lambda weights: weights.update(stray=torch.zeros(3)), "tensor stray is not part of the model"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}),
            r"model.norm.weight has shape \(3,\), but config.json asks for \(32,\)",
        ),
    ],
    ids=["missing", "stray", "shape"],
)
def test_damaged_checkpoints_are_refused_by_name(tmp_path: Path, damage: Any, sentence: str):
    save_model(families.make("llama"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
