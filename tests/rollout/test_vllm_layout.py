"""Reading our tensors back out of parameters laid out as vLLM lays them out."""

import pytest
import torch

from model import checksums
from rollout.vllm_layout import absorbed, read_back


@pytest.fixture
def weights(make_model) -> dict[str, torch.Tensor]:
    return dict(make_model(3).state_dict())


def as_vllm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under vLLM's names, put together by hand."""
    live = {}
    for layer in range(3):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        take = weights.pop
        live[f"{attention}.fused_qkv_a_proj.weight"] = torch.cat(
            [take(f"{attention}.q_a_proj.weight"), take(f"{attention}.kv_a_proj_with_mqa.weight")]
        )
        live[f"{attention}.indexer.wk_weights_proj.weight"] = torch.cat(
            [take(f"{attention}.indexer.wk.weight"), take(f"{attention}.indexer.weights_proj.weight")]
        )
        dense = mlp if layer == 0 else f"{mlp}.shared_experts"
        live[f"{dense}.gate_up_proj.weight"] = torch.cat(
            [take(f"{dense}.gate_proj.weight"), take(f"{dense}.up_proj.weight")]
        )
        if layer:
            live[f"{mlp}.experts.routed_experts.w13_weight"] = take(f"{mlp}.experts.gate_up_proj")
            live[f"{mlp}.experts.routed_experts.w2_weight"] = take(f"{mlp}.experts.down_proj")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        live[name] = torch.nn.functional.pad(take(name), (0, 0, 0, 56))
    return {name: tensor.clone() for name, tensor in (live | weights).items()}


def test_every_tensor_is_found_whole(weights):
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = checksums(weights.items())
    assert checksums(read_back(as_vllm(dict(weights)), shapes)) == expected


def test_one_wrong_element_anywhere_shows_in_its_own_tensor(weights):
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = checksums(weights.items())
    live = as_vllm(dict(weights))
    found = dict(read_back(live, shapes))
    for name, tensor in found.items():
        before = tensor.view(-1)[-1].clone()
        tensor.view(-1)[-1] += 1
        actual = checksums(read_back(live, shapes))
        assert [other for other in expected if actual[other] != expected[other]] == [name]
        tensor.view(-1)[-1] = before


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("model.norm.weight", "no tensor that holds model.norm.weight"),
        ("model.layers.1.self_attn.fused_qkv_a_proj.weight", "no tensor that holds model.layers.1.self_attn.q_a_proj"),
        (
            "model.layers.2.mlp.experts.routed_experts.w2_weight",
            "no tensor that holds model.layers.2.mlp.experts.down_proj",
        ),
    ],
)
def test_what_the_engine_lacks_is_named(weights, gone: str, sentence: str):
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    live = as_vllm(dict(weights))
    del live[gone]
    with pytest.raises(ValueError, match=sentence):
        dict(read_back(live, shapes))


def test_a_shard_is_not_taken_for_the_whole(weights):
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    live = as_vllm(dict(weights))
    live["model.layers.1.self_attn.o_proj.weight"] = live["model.layers.1.self_attn.o_proj.weight"][:, :8]
    with pytest.raises(ValueError, match=r"o_proj.weight has shape \(32, 16\), but the engine holds \(32, 8\)"):
        dict(read_back(live, shapes))


def test_absorbed_matrices_are_those_of_the_projection():
    heads, nope, value, latent = 3, 4, 5, 6
    kv_b = torch.randn(heads * (nope + value), latent)
    rows = kv_b.view(heads, nope + value, latent)
    w_uk_t, w_uv = rows[:, :nope].clone(), rows[:, nope:].transpose(1, 2).clone()
    # They are what decoding multiplies with: q -> latent space, latent space -> values.
    torch.testing.assert_close(torch.einsum("hl,hlv->hv", kv_b.new_ones(heads, latent), w_uv), rows[:, nope:].sum(-1))
    assert absorbed(kv_b, w_uk_t, w_uv)
    assert not absorbed(kv_b, w_uk_t + 1e-3, w_uv)
    assert not absorbed(kv_b, w_uk_t, w_uv.flip(0))
