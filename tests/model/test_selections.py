"""What packed sequences attend to: kept, replayed, and chosen as vLLM would choose it."""

from __future__ import annotations

import pytest
import torch

from model import DeepseekV32, GivenKeys, KeySelection, packing
from model.deepseek_v32 import Layer
from tests.model.shapes import SHAPES, make_config, make_model, tokens

LENGTHS = [23, 5, 17]
Own = dict[int, torch.Tensor]


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; sequences this short are otherwise padded groups."""
    monkeypatch.setattr(packing, "_MAX_GROUPED", 0)


def forward(module: DeepseekV32, given: GivenKeys | None = None, own: Own | None = None) -> torch.Tensor:
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    with torch.no_grad():
        selection = KeySelection(given=given, own=own)
        return module.backbone(tokens(1, sum(LENGTHS)), cu_seqlens=cu_seqlens, selection=selection).hidden


def all_of(own: Own) -> GivenKeys:
    keys = torch.stack([own[layer] for layer in sorted(own)], dim=1)
    return GivenKeys(queries=torch.arange(len(keys)), keys=keys, complete=True)


def test_what_was_kept_can_be_replayed() -> None:
    module, other = make_model(make_config(), seed=0), make_model(make_config(), seed=1)
    kept, others, again = Own(), Own(), Own()
    wanted = forward(module, own=kept)
    forward(other, own=others)
    assert torch.equal(forward(module, all_of(kept)), wanted)
    assert not torch.allclose(forward(module, all_of(others), again), wanted, atol=1e-3)
    assert set(again) == set(kept) == set(range(module.config.num_hidden_layers))
    # The first layer's input does not depend on what is attended to.
    assert torch.equal(again[0], kept[0]) and not torch.equal(again[0], others[0])


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 values of the last axis, as fp32, and their power-of-two scales."""
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)))
    return (x / scale).to(torch.float8_e4m3fn).float(), scale


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Half-split pairs of the first dims, [T, ..., d] by angles [T, r / 2]; tables of cosines in bfloat16."""
    half = angles.shape[-1]
    shape = (len(x), *[1] * (x.dim() - 2), half)
    cos, sin = (table(angles).bfloat16().float().view(shape) for table in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], dim=-1)


def test_the_imitated_arithmetic_by_hand() -> None:
    """One layer, one sequence, in bfloat16: fp8 without a rotation, head weights rounded to bfloat16."""
    config = make_config(num_hidden_layers=1, mlp_layer_types=None, first_k_dense_replace=1)
    module = make_model(config).to(torch.bfloat16)
    ids, own = tokens(1, 40), Own()
    module.index_arithmetic = "vllm"
    with torch.no_grad():
        module.backbone(ids, selection=KeySelection(own=own))
        layer = module.model.layers[0]
        assert isinstance(layer, Layer)
        attention, index = layer.self_attn, layer.self_attn.indexer
        hidden = layer.input_layernorm(module.model.embed_tokens(ids))[0]
        latent = attention.q_a_layernorm(attention.q_a_proj(hidden))
        frequencies = config.rope_theta ** -(torch.arange(0, config.qk_rope_head_dim, 2) / config.qk_rope_head_dim)
        angles = torch.arange(40.0)[:, None] * frequencies
        queries = index.wq_b(latent).view(40, config.index_n_heads, config.index_head_dim).float()
        keys = index.wk(hidden).float()
        keys = (keys - keys.mean(-1, keepdim=True)) / (keys.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        keys = keys * index.k_norm.weight.float() + index.k_norm.bias.float()
        (q, q_scale), (k, k_scale) = quantised(turned(queries, angles)), quantised(turned(keys, angles))
        weights = (hidden @ index.weights_proj.weight.T).float() * q_scale[..., 0]
        scores = (torch.einsum("tjd,sd->tjs", q, k).relu() * weights[..., None]).sum(1) * k_scale[:, 0]
    scores.masked_fill_(torch.ones(40, 40).triu(1).bool(), float("-inf"))
    same = 0
    for row, places in enumerate(own[0]):
        wanted = set(scores[row].topk(min(config.index_topk, row + 1)).indices.tolist())
        same += wanted == {int(place) for place in places if place >= 0}
    assert same >= 39  # scores here and there round differently
    module.index_arithmetic, plain = "plain", Own()
    with torch.no_grad():
        module.backbone(ids, selection=KeySelection(own=plain))
    assert not torch.equal(plain[0], own[0])


@pytest.mark.parametrize("shape", ["base", "yarn and groups", "odd sizes"])
def test_every_shape_can_be_imitated_and_its_loss_is_the_plain_one(shape: str) -> None:
    module = make_model(make_config(**SHAPES[shape]))
    ids = tokens(1, 31)
    plain = module.backbone(ids, indexer_loss="dense").indexer_loss
    module.index_arithmetic = "vllm"
    imitated = module.backbone(ids, indexer_loss="dense").indexer_loss
    sparse = module.backbone(ids, indexer_loss="sparse").indexer_loss
    assert plain is not None and imitated is not None and sparse is not None
    assert torch.equal(plain, imitated)
    sparse.backward()
    found = [p.grad for name, p in module.named_parameters() if ".indexer." in name]
    assert found and all(grad is not None and bool(grad.isfinite().all()) for grad in found)
