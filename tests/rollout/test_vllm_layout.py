"""Weights laid out as vLLM lays them out over its workers, by an independent hand, and what is made of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import checksums
from rollout.held_weights import HeldWeights, Verifier
from rollout.vllm_layout import Coverage, LayoutError, absorbed_parts, held_parts
from tests.rollout.vllm_shards import Shapes, Weights, as_vllm


def normal(shapes: dict[str, tuple[int, ...]]) -> Weights:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def grouped_attention(s: Shapes, path: str) -> dict[str, tuple[int, ...]]:
    rows = {"q_proj": s.heads, "k_proj": s.kv_heads, "v_proj": s.kv_heads}
    weights = {f"{path}.{name}.weight": (count * s.head_dim, s.hidden) for name, count in rows.items()}
    biases = {f"{path}.{name}.bias": (count * s.head_dim,) for name, count in rows.items()}
    norms = {f"{path}.{name}_norm.weight": (s.head_dim,) for name in "qk"}
    return weights | biases | norms | {f"{path}.o_proj.weight": (s.hidden, s.heads * s.head_dim)}


def latent_attention(s: Shapes, path: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{path}.q_a_proj.weight": (20, s.hidden),
        f"{path}.q_a_layernorm.weight": (20,),
        f"{path}.kv_a_proj_with_mqa.weight": (12, s.hidden),
        f"{path}.q_b_proj.weight": (s.heads * s.head_dim, 20),
        f"{path}.kv_b_proj.weight": (s.heads * 12, 8),
        f"{path}.o_proj.weight": (s.hidden, s.heads * s.head_dim),
        f"{path}.indexer.wk.weight": (8, s.hidden),
        f"{path}.indexer.weights_proj.weight": (4, s.hidden),
        f"{path}.indexer.wq_b.weight": (32, 20),
    }


def mlp(s: Shapes, path: str, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{path}.gate_proj.weight": (inner, s.hidden),
        f"{path}.up_proj.weight": (inner, s.hidden),
        f"{path}.down_proj.weight": (s.hidden, inner),
    }


def moe(s: Shapes, path: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{path}.gate.weight": (s.experts, s.hidden),
        f"{path}.gate.e_score_correction_bias": (s.experts,),
        f"{path}.experts.gate_up_proj": (s.experts, 2 * s.expert_inner, s.hidden),
        f"{path}.experts.down_proj": (s.experts, s.hidden, s.expert_inner),
    } | mlp(s, f"{path}.shared_experts", s.expert_inner)


def ends(s: Shapes) -> dict[str, tuple[int, ...]]:
    table = (s.vocab, s.hidden)
    return {"model.embed_tokens.weight": table, "model.norm.weight": (s.hidden,), "lm_head.weight": table}


def dense_model(s: Shapes) -> Weights:
    """Qwen3, with Qwen2's biases."""
    layer = "model.layers.0"
    return normal(ends(s) | grouped_attention(s, f"{layer}.self_attn") | mlp(s, f"{layer}.mlp", s.inner))


def moe_model(s: Shapes) -> Weights:
    """Qwen3-MoE and GLM-4 MoE: grouped attention, a dense layer, a layer of experts."""
    return dense_model(s) | normal(grouped_attention(s, "model.layers.1.self_attn") | moe(s, "model.layers.1.mlp"))


def deepseek_model(s: Shapes) -> Weights:
    """DeepSeek-V3 and V3.2."""
    layers = {}
    for layer in (0, 1):
        layers |= latent_attention(s, f"model.layers.{layer}.self_attn")
    return normal(ends(s) | layers | mlp(s, "model.layers.0.mlp", s.inner) | moe(s, "model.layers.1.mlp"))


MODELS = {"dense": dense_model, "moe": moe_model, "deepseek": deepseek_model}


def described(weights: Weights) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in weights.items()}


def holders(workers: list[Weights], weights: Weights) -> list[HeldWeights]:
    tensors, size = described(weights), len(workers)
    return [HeldWeights(live, tensors, rank=rank, size=size) for rank, live in enumerate(workers)]


def read_back(workers: list[Weights], weights: Weights) -> dict[str, int]:
    return Verifier().checksums([held.answer(()) for held in holders(workers, weights)])


def engine_of(weights: Weights, s: Shapes, size: int, by_expert: bool = False) -> list[Weights]:
    return [as_vllm(weights, s, rank, size, by_expert=by_expert) for rank in range(size)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("size", "by_expert"), [(1, False), (2, False), (2, True), (4, False), (4, True), (8, False)])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_every_tensor_is_found_whole(kind: str, size: int, by_expert: bool, kv_heads: int):
    s = Shapes(kv_heads)
    weights = MODELS[kind](s)
    assert read_back(engine_of(weights, s, size, by_expert), weights) == checksums(weights.items())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(MODELS)), size=st.sampled_from([1, 2, 4]), by_expert=st.booleans())
def test_one_wrong_element_anywhere_shows_in_its_own_tensor(data, kind: str, size: int, by_expert: bool):
    s = Shapes()
    weights = MODELS[kind](s)
    expected = checksums(weights.items())
    workers = engine_of(weights, s, size, by_expert)
    rank = data.draw(st.integers(0, size - 1))
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    parts = list(held_parts(workers[rank], shapes, rank=rank, size=size))
    name, _, part = parts[data.draw(st.integers(0, len(parts) - 1))]
    place = tuple(data.draw(st.integers(0, length - 1)) for length in part.shape)
    part[place] += 1  # a view of the worker's own tensor
    actual = read_back(workers, weights)
    assert [other for other in expected if actual.get(other) != expected[other]] == [name]


def test_parts_on_the_wrong_worker_do_not_pass():
    s = Shapes()
    weights = moe_model(s)
    expected = checksums(weights.items())
    actual = read_back(engine_of(weights, s, 2)[::-1], weights)
    differing = {name for name in expected if actual.get(name) != expected[name]}
    assert {
        "lm_head.weight",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.0.self_attn.k_proj.weight",
    } <= differing
    assert "model.norm.weight" not in differing


def test_a_part_that_is_missing_or_differs_between_copies_leaves_its_tensor_out():
    s = Shapes(kv_heads=1)
    weights = dense_model(s)
    both = holders(engine_of(weights, s, 2), weights)
    parts = [[(name, piece) for name, piece, _ in held.parts] for held in both]
    sums = [held.take()[0].tolist() for held in both]
    norm, keys, mlp_down, named = (
        "model.norm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "lm_head.weight",
    )
    for index, (name, _) in enumerate(parts[1]):
        sums[1][index] += name in (norm, keys)
    gone = next(index for index, (name, _) in enumerate(parts[1]) if name == mlp_down)
    del parts[1][gone], sums[1][gone]
    found = Coverage(parts, described(weights)).checksums(sums, [named])
    expected = checksums(weights.items())
    assert expected.keys() - found.keys() == {norm, keys, mlp_down, named}
    assert found.items() <= expected.items()


def test_a_description_travels_once():
    s = Shapes()
    weights = moe_model(s)
    both, verifier = holders(engine_of(weights, s, 2), weights), Verifier()
    for turn in range(3):
        answers = [held.answer(verifier.known) for held in both]
        assert all((answer.description is None) == (turn > 0) for answer in answers)
        assert verifier.checksums(answers) == checksums(weights.items())
        both[0].parts[0][2].add_(1)  # an update
        weights[both[0].parts[0][0]][: len(both[0].parts[0][2])].add_(1)
    fewer = {name: weights[name] for name in list(weights)[:-1]}
    answers = [held.answer(verifier.known) for held in holders(engine_of(weights, s, 2), fewer)]
    assert verifier.checksums(answers) == checksums(fewer.items())


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("model.norm.weight", "no tensor that holds model.norm.weight"),
        ("model.layers.1.self_attn.fused_qkv_a_proj.weight", "no tensor that holds model.layers.1.self_attn.q_a_proj"),
        (
            "model.layers.1.mlp.experts.routed_experts.w2_weight",
            "no tensor that holds model.layers.1.mlp.experts.down_proj",
        ),
    ],
)
def test_what_the_engine_lacks_is_named(gone: str, sentence: str):
    s = Shapes()
    weights = deepseek_model(s)
    workers = engine_of(weights, s, 1)
    del workers[0][gone]
    with pytest.raises(LayoutError, match=sentence):
        read_back(workers, weights)


def test_a_shape_that_no_cut_explains_is_refused():
    s = Shapes()
    weights = dense_model(s)
    workers = engine_of(weights, s, 2)
    name = "model.layers.0.self_attn.o_proj.weight"
    workers[1][name] = workers[1][name][:, :8]
    with pytest.raises(LayoutError, match=r"o_proj.weight has shape \(24, 64\), but the engine holds \(24, 8\)"):
        read_back(workers, weights)
    workers = engine_of(weights, s, 1)
    workers[0]["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(17, 24)
    with pytest.raises(LayoutError, match=r"qkv_proj.weight has 17 rows, which are no part of 96"):
        read_back(workers, weights)


def test_absorbed_matrices_are_those_of_the_projection():
    heads, nope, value, latent = 3, 4, 5, 6
    kv_b = torch.randn(heads * (nope + value), latent)
    w_uk_t, w_uv = torch.empty(heads, nope, latent), torch.empty(heads, latent, value)
    for made, of in absorbed_parts(kv_b, w_uk_t, w_uv):
        made.copy_(of)
    # They are what decoding multiplies with: q -> latent space, latent space -> values.
    queries, latents = torch.randn(heads, nope), torch.randn(heads, latent)
    keys, values = kv_b.view(heads, nope + value, latent).split([nope, value], dim=1)
    torch.testing.assert_close(
        torch.einsum("hn,hnl,hl->h", queries, w_uk_t, latents), torch.einsum("hn,hnl,hl->h", queries, keys, latents)
    )
    torch.testing.assert_close(torch.einsum("hl,hlv->hv", latents, w_uv), torch.einsum("hvl,hl->hv", values, latents))
