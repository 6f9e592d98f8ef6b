"""The log-probability kernels against a softmax in fp64, at sizes that divide nothing."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import logprob, reference

VOCAB, DIM = 45, 19
Rows = list[list[int]]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens and of ids, and sets of any size are gathered."""
    monkeypatch.setattr(logprob, "_BLOCK_TOKENS", 3)
    monkeypatch.setattr(logprob, "_BLOCK_IDS", 16)
    monkeypatch.setattr(logprob, "_GATHER_SHARE", 1.0)


def make(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, DIM, generator=generator).to(dtype)
    return hidden.requires_grad_(), torch.randn(VOCAB, DIM, generator=generator).to(dtype).requires_grad_()


def csr(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return ids, torch.tensor([0] + [len(row) for row in rows]).cumsum(0)


def exact(
    hidden: torch.Tensor, weight: torch.Tensor, targets: list[int], rows: Rows, temperature: float
) -> list[torch.Tensor]:
    logprobs, entropies = [], []
    for state, target, row in zip(hidden, targets, rows, strict=True):
        support = row or list(range(VOCAB))
        log_probs = (weight[support] @ state / temperature).log_softmax(dim=0)
        logprobs.append(log_probs[support.index(target)])
        entropies.append(-(log_probs.exp() * log_probs).sum())
    return [torch.stack(logprobs), torch.stack(entropies)]


def assert_exact(targets: list[int], rows: Rows, temperature: float, dtype: torch.dtype = torch.float32) -> None:
    """Values, and the gradients of an upstream that weighs both outputs."""
    hidden, weight = make(len(targets), dtype)
    kept = csr(rows) if any(rows) else (None, None)
    found = logprob.kept_logprobs(hidden, weight, torch.tensor(targets), *kept, temperature=temperature)
    inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    wanted = exact(*inputs, targets, rows, temperature)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-2, 1e-2)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
    upstream = [torch.randn(len(targets), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    grads = torch.autograd.grad(found, (hidden, weight), upstream)
    wanted_grads = torch.autograd.grad(wanted, inputs, [tensor.double() for tensor in upstream])
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], Rows]:
    targets = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=7))
    sets = [draw(st.sets(st.integers(0, VOCAB - 1), max_size=30)) for _ in targets]
    rows = [sorted(s | {target}) if s else [] for s, target in zip(sets, targets, strict=True)]
    return targets, rows


@settings(max_examples=12, deadline=None)
@given(case=cases(), temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_values_and_gradients(case: tuple[list[int], Rows], temperature: float) -> None:
    assert_exact(*case, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whole_vocabulary(dtype: torch.dtype) -> None:
    assert_exact([0, 44, 7, 7, 16], [[]] * 5, 0.8, dtype)


def test_half_precision_of_sets_and_rows_mixed() -> None:
    assert_exact([3, 40, 9], [[3], [], [*range(45)]], 1.0, torch.float16)


def test_large_sets_go_the_way_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "_GATHER_SHARE", 0.1)
    monkeypatch.setattr(logprob, "_SetLogprobs", None)
    assert_exact([3, 40], [[*range(30)], [40]], 1.0)


def test_no_tokens_still_give_the_weight_a_gradient() -> None:
    hidden, weight = make(0)
    for kept in ((None, None), csr([])):
        logprobs, entropy = logprob.kept_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), *kept)
        assert logprobs.shape == entropy.shape == (0,)
        (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), (weight,))
        assert torch.equal(grad, torch.zeros_like(weight))


def test_complaints_are_the_reference_s() -> None:
    hidden, weight = make(2)
    for arguments in (
        (torch.tensor([0, VOCAB]), None, None),
        (torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([0, 1, 2])),
        (torch.tensor([0, 1]), torch.tensor([0, 1]), None),
    ):
        with pytest.raises(ValueError) as ours:
            logprob.kept_logprobs(hidden, weight, *arguments)
        with pytest.raises(ValueError) as plain:
            reference.kept_logprobs(hidden, weight, *arguments)
        assert str(ours.value) == str(plain.value)


def test_unkept_rows_of_the_weight_are_not_read() -> None:
    hidden, weight = make(2)
    rows = [[1, 5, 9], [2, 5]]
    poisoned = torch.full_like(weight, math.nan)
    for row in {1, 2, 5, 9}:
        poisoned[row] = weight.detach()[row]
    poisoned = poisoned.detach().requires_grad_()
    logprobs, _ = logprob.kept_logprobs(hidden, poisoned, torch.tensor([5, 2]), *csr(rows))
    wanted = exact(hidden.double(), weight.double(), [5, 2], rows, 1.0)[0]
    torch.testing.assert_close(logprobs.double(), wanted, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(logprobs.sum(), (poisoned,))
    assert grad.isfinite().all() and not grad[0].any() and grad[5].any()


def test_kept_logits_change_no_bit_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some blocks are kept and some made again; a second pass makes all again."""
    monkeypatch.setattr(logprob, "KEEP_LIMIT", 3000)
    made = []
    product = logprob._product
    monkeypatch.setattr(logprob, "_product", lambda a, b: made.append((a.shape, b.shape)) or product(a, b))
    hidden, weight = make(60)
    with torch.no_grad():
        logprob.kept_logprobs(hidden, weight, torch.arange(60) % VOCAB)
    blocks = len(made)
    found = logprob.kept_logprobs(hidden, weight, torch.arange(60) % VOCAB)
    assert len(made) == 2 * blocks
    passes = []
    for _ in range(2):
        made.clear()
        passes.append(torch.autograd.grad(found, (hidden, weight), [torch.ones(60)] * 2, retain_graph=True))
        passes[-1] += (torch.tensor(len(made) - 2 * blocks),)
    again, from_scratch = passes[0][2], passes[1][2]
    assert 0 < again < from_scratch == blocks
    assert all(torch.equal(one, two) for one, two in zip(passes[0][:2], passes[1][:2], strict=True))
