"""The attention functions against loops over their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import (
    grouped_linear,
    indexer_kl,
    indexer_scores,
    latent_attention,
    masked_attention,
    mean_attention,
    sparse_attention,
)

SEQUENCES, LENGTH, HEADS, DIM, VALUE_DIM = 2, 7, 3, 5, 4


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def random_mask() -> torch.Tensor:
    chosen = torch.rand(SEQUENCES, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.4
    return (chosen | torch.eye(LENGTH, dtype=torch.bool)).tril()


def weights_by_hand(query: torch.Tensor, keys: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    exponentials = [torch.exp(query @ key * scale) for key in keys]
    return [value / torch.stack(exponentials).sum() for value in exponentials]


def assert_same(found: torch.Tensor, wanted: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    direction = make(*found.shape, seed=9).detach()
    for got, expected in zip(
        torch.autograd.grad((found * direction).sum(), inputs, retain_graph=True),
        torch.autograd.grad((wanted * direction).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_indexer_scores() -> None:
    inputs = make(SEQUENCES, 4, HEADS, DIM), make(SEQUENCES, LENGTH, DIM, seed=1), make(SEQUENCES, 4, HEADS, seed=2)
    queries, keys, weights = inputs
    found = indexer_scores(queries, keys, weights)
    wanted = torch.zeros(SEQUENCES, 4, LENGTH)
    rows = []
    for b in range(SEQUENCES):
        for t in range(4):
            for s in range(LENGTH):
                heads = [weights[b, t, j] * (queries[b, t, j] @ keys[b, s]).clamp(min=0) for j in range(HEADS)]
                rows.append(torch.stack(heads).sum())
    wanted = torch.stack(rows).view(SEQUENCES, 4, LENGTH)
    assert_same(found, wanted, inputs)
    visible = torch.rand(4, LENGTH) < 0.5
    masked = indexer_scores(queries, keys, weights, visible)
    assert torch.equal(masked, found.masked_fill(~visible, -math.inf))
    half = indexer_scores(queries.bfloat16(), keys.bfloat16(), weights)
    assert half.dtype == torch.float32


def test_masked_mha_and_its_mean() -> None:
    inputs = (
        make(SEQUENCES, LENGTH, HEADS, DIM),
        make(SEQUENCES, LENGTH, HEADS, DIM, seed=1),
        make(SEQUENCES, LENGTH, HEADS, VALUE_DIM, seed=2),
    )
    queries, keys, values = inputs
    mask = random_mask()
    outputs, probs = [], torch.zeros(SEQUENCES, HEADS, LENGTH, LENGTH)
    for b in range(SEQUENCES):
        for t in range(LENGTH):
            chosen = mask[b, t].nonzero().flatten().tolist()
            for h in range(HEADS):
                weights = weights_by_hand(queries[b, t, h], [keys[b, s, h] for s in chosen], 0.6)
                outputs.append(sum(w * values[b, s, h] for w, s in zip(weights, chosen, strict=True)))
                probs[b, h, t, chosen] = torch.stack(weights).detach()
    wanted = torch.stack(outputs).view(SEQUENCES, LENGTH, HEADS, VALUE_DIM)
    assert_same(masked_attention(queries, keys, values, mask, 0.6), wanted, inputs)

    target = mean_attention(queries, keys, mask, 0.6)
    assert not target.requires_grad
    summed = probs.sum(dim=1)
    torch.testing.assert_close(target, summed / summed.sum(dim=-1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gather_limit", [1 << 25, 40])
def test_sparse_attention(gather_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second limit makes it work in blocks of a single query."""
    monkeypatch.setattr("kernels.reference.attention._GATHER_LIMIT", gather_limit)
    inputs = make(SEQUENCES, 4, HEADS, DIM), make(SEQUENCES, LENGTH, DIM, seed=1)
    queries, keys = inputs
    indices = torch.tensor(
        [[[0, 2, 5], [6, -1, -1], [1, 3, -1], [-1, -1, -1]], [[4, 5, 6], [0, 1, 2], [3, -1, -1], [2, 6, -1]]]
    )
    rows = []
    for b in range(SEQUENCES):
        for t in range(4):
            chosen = [s for s in indices[b, t].tolist() if s >= 0]
            for h in range(HEADS):
                weights = weights_by_hand(queries[b, t, h], [keys[b, s] for s in chosen], 0.6) if chosen else []
                terms = [w * keys[b, s, :VALUE_DIM] for w, s in zip(weights, chosen, strict=True)]
                rows.append(sum(terms, torch.zeros(VALUE_DIM)))
    wanted = torch.stack(rows).view(SEQUENCES, 4, HEADS, VALUE_DIM)
    assert_same(sparse_attention(queries, keys, indices, 0.6, VALUE_DIM), wanted, inputs)
    assert_same(sparse_attention(queries, keys, indices.int(), 0.6, VALUE_DIM), wanted, inputs)


def test_latent_attention_is_sparse_attention_over_everything_visible() -> None:
    inputs = make(SEQUENCES, LENGTH, HEADS, DIM), make(SEQUENCES, LENGTH, DIM, seed=1)
    mask = random_mask()
    indices = torch.where(mask, torch.arange(LENGTH), -1)
    found = latent_attention(*inputs, mask, 0.6, VALUE_DIM)
    assert_same(found, sparse_attention(*inputs, indices, 0.6, VALUE_DIM), inputs)


def test_indexer_kl() -> None:
    scores = make(SEQUENCES, LENGTH, LENGTH)
    mask = random_mask()
    target = torch.rand(SEQUENCES, LENGTH, LENGTH).masked_fill(~mask, 0.0)
    target[:, 3, 0] = 0.0  # attention may underflow to 0 inside the set
    target = (target / target.sum(dim=-1, keepdim=True)).requires_grad_()
    found = indexer_kl(scores, target, mask)
    rows = []
    for b in range(SEQUENCES):
        for t in range(LENGTH):
            chosen = mask[b, t].nonzero().flatten()
            log_q = scores[b, t, chosen].log_softmax(dim=0)
            terms = [p * (math.log(p) - q) for p, q in zip(target[b, t, chosen].tolist(), log_q, strict=True) if p > 0]
            rows.append(torch.stack(terms).sum())
    assert_same(found, torch.stack(rows).view(SEQUENCES, LENGTH), (scores,))
    assert torch.autograd.grad(found.sum(), target, allow_unused=True) == (None,)


@pytest.mark.parametrize("dims", [(16, 8), (5, 7)], ids=["aligned", "odd"])
def test_grouped_linear(dims: tuple[int, int]) -> None:
    """Empty groups included, at both ends and between."""
    sizes = [0, 3, 0, 1, 6, 0]
    inputs = make(sum(sizes), dims[0]), make(len(sizes), dims[1], dims[0], seed=1)
    rows, weights = inputs
    found = grouped_linear(rows, weights, torch.tensor(sizes).cumsum(0).int())
    group = [g for g, size in enumerate(sizes) for _ in range(size)]
    wanted = torch.stack([weights[g] @ row for g, row in zip(group, rows, strict=True)])
    assert_same(found, wanted, inputs)
