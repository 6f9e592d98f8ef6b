"""Kept-set log-probabilities against a softmax over a masked vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kept_logprobs

VOCAB, DIM = 13, 5

Rows = list[list[int]]


@st.composite
def kept_rows(draw: st.DrawFn) -> tuple[list[int], Rows]:
    """Targets, and a kept set around each; an empty one leaves the token unrestricted."""
    targets = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9))
    sets = [draw(st.sets(st.integers(0, VOCAB - 1), max_size=6)) for _ in targets]
    return targets, [sorted(s | {target}) if s else [] for s, target in zip(sets, targets, strict=True)]


def csr(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return ids, torch.tensor([0] + [len(row) for row in rows]).cumsum(0)


def by_hand(
    hidden: torch.Tensor, weight: torch.Tensor, targets: list[int], rows: Rows, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, entropies = [], []
    for state, target, row in zip(hidden, targets, rows, strict=True):
        support = row or list(range(VOCAB))
        log_probs = ((weight[support] @ state) / temperature).log_softmax(dim=0)
        logprobs.append(log_probs[support.index(target)])
        entropies.append(-(log_probs.exp() * log_probs).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def make_inputs(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, DIM, generator=generator).requires_grad_()
    return hidden, torch.randn(VOCAB, DIM, generator=generator).requires_grad_()


@settings(max_examples=100, deadline=None)
@given(
    case=kept_rows(),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    chunk=st.integers(1, 10),
    upstream=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)]),
)
def test_values_and_gradients_are_the_masked_softmax_s(
    case: tuple[list[int], Rows], temperature: float, chunk: int, upstream: tuple[float, float]
) -> None:
    targets, rows = case
    hidden, weight = make_inputs(len(targets))
    found = kept_logprobs(hidden, weight, torch.tensor(targets), *csr(rows), temperature=temperature, chunk=chunk)
    wanted = by_hand(hidden, weight, targets, rows, temperature)
    per_token = torch.linspace(-1, 2, len(targets))
    losses = []
    for logprobs, entropy in (found, wanted):
        losses.append((per_token * (upstream[0] * logprobs + upstream[1] * entropy)).sum())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_without_kept_sets_it_is_log_softmax() -> None:
    hidden, weight = make_inputs(20)
    targets = torch.arange(20) % VOCAB
    logprobs, entropy = kept_logprobs(hidden, weight, targets, chunk=7)
    log_probs = (hidden @ weight.T).log_softmax(dim=-1)
    torch.testing.assert_close(logprobs, log_probs.gather(1, targets.unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=log_probs).entropy())


def test_a_lone_kept_token_is_certain() -> None:
    hidden, weight = make_inputs(3)
    targets = torch.tensor([4, 0, 12])
    logprobs, entropy = kept_logprobs(hidden, weight, targets, targets.int(), torch.arange(4))
    assert logprobs.tolist() == entropy.tolist() == [0.0, 0.0, 0.0]
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_bfloat16_returns_fp32_and_gradients_in_kind() -> None:
    hidden, weight = make_inputs(8)
    targets, rows = [1] * 8, [[0, 1, 5]] * 8
    half = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    logprobs, entropy = kept_logprobs(*half, torch.tensor(targets), *csr(rows))
    assert logprobs.dtype == entropy.dtype == torch.float32
    wanted = by_hand(half[0].float(), half[1].float(), targets, rows, 1.0)
    torch.testing.assert_close((logprobs, entropy), wanted, rtol=0.05, atol=0.05)
    logprobs.sum().backward()
    assert half[0].grad is not None and half[0].grad.dtype == torch.bfloat16
    assert half[1].grad is not None and half[1].grad.dtype == torch.bfloat16


def test_no_row_of_logits_outlives_its_chunk() -> None:
    """What autograd keeps for the backward pass does not grow with tokens times vocabulary."""
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    hidden, weight = make_inputs(1000)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept_logprobs(hidden, weight, torch.zeros(1000, dtype=torch.long), chunk=10)
    assert saved and max(tensor.numel() for tensor in saved) == hidden.numel() < 1000 * VOCAB


def test_a_target_outside_its_kept_set_is_an_error_with_its_row_and_count() -> None:
    hidden, weight = make_inputs(4)
    rows = [[1, 2], [], [3, 4, 5], [0]]
    with pytest.raises(ValueError, match=r"2 of 4 targets .* row 2 \(token 9 with 3 kept ids\)"):
        kept_logprobs(hidden, weight, torch.tensor([1, 9, 9, 1]), *csr(rows))


@pytest.mark.parametrize(
    ("targets", "ids", "offsets", "message"),
    [
        ([1, VOCAB], [], [0, 0, 0], "outside the vocabulary"),
        ([1, -1], [], [0, 0, 0], "outside the vocabulary"),
        ([1], [], [0, 0], "for 2 rows"),
        ([1, 1], [1], [0, 1], "3 entries from 0 to 1"),
        ([1, 1], [1, 1], [0, 1, 1], "3 entries from 0 to 2"),
        ([1, 1], [1, 1], [0, 3, 2], "must not fall"),
        ([1, 1], [1, VOCAB], [0, 1, 2], "kept_ids must lie"),
    ],
)
def test_malformed_input_is_named(targets: list[int], ids: list[int], offsets: list[int], message: str) -> None:
    hidden, weight = make_inputs(2)
    with pytest.raises(ValueError, match=message):
        kept_logprobs(
            hidden, weight, torch.tensor(targets), torch.tensor(ids, dtype=torch.int32), torch.tensor(offsets)
        )


def test_one_kept_array_alone_is_refused() -> None:
    hidden, weight = make_inputs(1)
    with pytest.raises(ValueError, match="together"):
        kept_logprobs(hidden, weight, torch.tensor([0]), torch.tensor([0], dtype=torch.int32))
