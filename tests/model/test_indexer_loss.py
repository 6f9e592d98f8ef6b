"""The indexer's own training: KL to the main attention (TR Eq. 3 and 4), and nothing but."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from model import CacheView, DeepseekV32, LatentCache
from model.attention import IndexerLoss
from tests.model.shapes import (
    attention,
    gradients,
    indexer_loss,
    make_config,
    make_model,
    make_twin,
    relative_error,
    tokens,
)

LOSSES: list[IndexerLoss] = ["dense", "sparse"]
TOPK = 6


def attention_by_hand(module: DeepseekV32, ids: torch.Tensor, loss: IndexerLoss) -> tuple[torch.Tensor, ...]:
    """transformers' attention probabilities, one [B, H, T, T] a layer; over all keys for the warm-up."""
    twin = make_twin(module, index_topk=4096 if loss == "dense" else TOPK)
    return twin(ids, output_attentions=True).attentions


def rotate_by_hand(vector: torch.Tensor, position: int, rope_dim: int, theta: float) -> torch.Tensor:
    """Half-split RoPE on the first `rope_dim` dims of one vector, pair by pair."""
    rotated = list(vector.unbind())
    half = rope_dim // 2
    for pair in range(half):
        angle = position * theta ** (-2 * pair / rope_dim)
        first, second = vector[pair], vector[pair + half]
        rotated[pair] = first * math.cos(angle) - second * math.sin(angle)
        rotated[pair + half] = second * math.cos(angle) + first * math.sin(angle)
    return torch.stack(rotated)


def scores_by_hand(module: DeepseekV32, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """I[t, s] of one sequence, hidden [T, D] after the input norm, as the paper writes it; fp32 [T, T], -inf ahead."""
    config, main = module.config, attention(module, layer)
    indexer = main.indexer
    with torch.no_grad():
        query_latent = main.q_a_layernorm(main.q_a_proj(hidden))
    heads, dim, rope = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
    queries = (query_latent @ indexer.wq_b.weight.T).view(-1, heads, dim)
    raw = hidden @ indexer.wk.weight.T
    centred = raw - raw.mean(dim=-1, keepdim=True)
    keys = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    keys = keys * indexer.k_norm.weight + indexer.k_norm.bias
    weights = hidden @ indexer.weights_proj.weight.T * heads**-0.5
    rows = []
    for t in range(hidden.shape[0]):
        turned = [rotate_by_hand(queries[t, j], t, rope, config.rope_theta) for j in range(heads)]
        row = [torch.tensor(float("-inf"))] * hidden.shape[0]
        for s in range(t + 1):
            key = rotate_by_hand(keys[s], s, rope, config.rope_theta)
            row[s] = sum(
                (weights[t, j] * torch.relu(turned[j] @ key * dim**-0.5) for j in range(heads)), torch.tensor(0.0)
            )
        rows.append(torch.stack(row))
    return torch.stack(rows)


def loss_by_hand(module: DeepseekV32, ids: torch.Tensor, loss: IndexerLoss) -> torch.Tensor:
    captured: dict[int, torch.Tensor] = {}

    def capture(layer: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, args: captured.update({layer: args[0].detach()})

    layers = range(module.config.num_hidden_layers)
    hooks = [attention(module, layer).register_forward_pre_hook(capture(layer)) for layer in layers]
    with torch.no_grad():
        module.backbone(ids, indexer_loss=loss)
    for hook in hooks:
        hook.remove()
    total = torch.tensor(0.0)
    for layer, probs in enumerate(attention_by_hand(module, ids, loss)):
        for row in range(ids.shape[0]):
            scores = scores_by_hand(module, layer, captured[layer][row])
            target = probs[row].detach().sum(dim=0)
            target = target / target.sum(dim=-1, keepdim=True)
            for t in range(ids.shape[1]):
                chosen = torch.arange(t + 1)
                if loss == "sparse":
                    chosen = scores[t, : t + 1].topk(min(TOPK, t + 1)).indices
                p, log_q = target[t, chosen], scores[t, chosen].log_softmax(dim=-1)
                assert abs(float(p.sum()) - 1) < 1e-5
                total = total + (p * (p.log() - log_q)).sum()
    return total


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_the_formula_s(loss: IndexerLoss) -> None:
    module = make_model(make_config(num_hidden_layers=2, index_n_heads=8, index_topk=TOPK))
    ids = tokens(2, 11)
    found = indexer_loss(module, ids, loss)
    found.backward()
    found_gradients = gradients(module)
    module.zero_grad()
    wanted = loss_by_hand(module, ids, loss)
    wanted.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    wanted_gradients = gradients(module)
    assert found_gradients.keys() == wanted_gradients.keys()
    errors = {name: relative_error(found_gradients[name], wanted_gradients[name]) for name in wanted_gradients}
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_the_slope(loss: IndexerLoss) -> None:
    """Central differences along the gradient, in a layer whose inputs the step does not move."""
    module = make_model(make_config(num_hidden_layers=1, index_topk=TOPK))
    ids = tokens(2, 15)

    indexer_loss(module, ids, loss).backward()
    gradient = gradients(module)
    slope = sum(float(part.pow(2).sum()) for part in gradient.values())
    step = 1e-3 / math.sqrt(slope)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    values = []
    for sign in (1, -1):
        module.load_state_dict({name: w + sign * step * gradient.get(name, 0) for name, w in start.items()})
        with torch.no_grad():
            values.append(float(indexer_loss(module, ids, loss)))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-2)


def is_indexer(name: str) -> bool:
    return ".indexer." in name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("topk", [TOPK, 4096])
def test_nothing_leaks_either_way(loss: IndexerLoss, topk: int) -> None:
    module = make_model(make_config(index_topk=topk))
    ids = tokens(1, 24)
    cu_seqlens = torch.tensor([0, 9, 24])
    everything = {name for name, _ in module.named_parameters()}
    indexer = {name for name in everything if is_indexer(name)}

    output = module.backbone(ids, cu_seqlens=cu_seqlens, indexer_loss=loss)
    assert output.indexer_loss is not None
    main = module.lm_head(output.hidden).logsumexp(dim=-1).sum()
    main.backward(retain_graph=True)
    alone = gradients(module)
    assert alone.keys() == everything - indexer
    module.zero_grad()
    output.indexer_loss.backward(retain_graph=True)
    assert gradients(module).keys() == indexer
    assert all(gradient.norm() > 0 for gradient in gradients(module).values())
    module.zero_grad()
    (main + output.indexer_loss).backward()
    both = gradients(module)
    assert all(torch.equal(both[name], alone[name]) for name in alone)


def test_loss_leaves_the_forward_alone_unless_it_warms_up() -> None:
    module = make_model(make_config())
    dense = make_model(make_config(index_topk=4096))
    ids = tokens(2, 25)
    assert torch.equal(module.backbone(ids, indexer_loss="sparse").hidden, module.backbone(ids).hidden)
    assert torch.equal(module.backbone(ids, indexer_loss="dense").hidden, dense.backbone(ids).hidden)


def test_loss_comes_only_when_asked_for_and_not_against_a_cache() -> None:
    module = make_model(make_config())
    ids = tokens(1, 9)
    assert module.backbone(ids).indexer_loss is None
    view = CacheView(
        cache=LatentCache(module.config, num_slots=1, max_len=9), slots=torch.tensor([0]), lengths=torch.tensor([9])
    )
    with pytest.raises(ValueError, match="neither cu_seqlens nor indexer_loss"):
        module.backbone(ids, positions=torch.arange(9).unsqueeze(0), cache=view, indexer_loss="sparse")


def test_training_the_indexer_finds_what_attention_looks_at() -> None:
    """Warm-up lowers the loss, and the selected keys come to hold more of the attention."""
    module = make_model(make_config(num_hidden_layers=2))
    ids = tokens(8, 30)
    optimizer = torch.optim.Adam([p for n, p in module.named_parameters() if is_indexer(n)], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = indexer_loss(module, ids, "dense")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
