"""The indexer's kernels on a GPU: against fp64, bitwise from run to run and for any batch. Prints what it measures."""

# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import grouped, indexer, indexer_loss, reference, topk

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def cuda(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size, device="cuda").to(dtype)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("interleaved", [False, True], ids=["half split", "interleaved"])
@pytest.mark.parametrize("hadamard", [False, True], ids=["plain", "hadamard"])
@pytest.mark.parametrize(("tokens", "heads"), [(1001, 64), (3000, 1)], ids=str)
def test_prepared_heads(tokens: int, heads: int, hadamard: bool, interleaved: bool) -> None:
    """Differences to plain torch: only where a fused or reordered sum crosses a rounding boundary."""
    x = cuda(tokens, heads, 128, dtype=torch.bfloat16) * torch.exp(cuda(tokens, heads, 1)).bfloat16()
    angles, weights = cuda(tokens, 32), cuda(tokens, heads)
    how = {"interleaved": interleaved, "hadamard": hadamard}
    codes, folded = indexer.quantise_index_heads(x, angles.cos(), angles.sin(), weights, **how)
    wanted, wanted_folded = reference.quantise_index_heads(x, angles.cos(), angles.sin(), weights, **how)
    differing = (codes.view(torch.uint8) != wanted.view(torch.uint8)).float().mean()
    print(f"codes that differ: {float(differing):.1e}")
    assert float(differing) < 1e-3
    assert float((folded != wanted_folded).float().mean()) < 1e-3
    _, scales = indexer.quantise_index_heads(x, angles.cos(), angles.sin(), **how)
    _, wanted_scales = reference.quantise_index_heads(x, angles.cos(), angles.sin(), **how)
    assert error(codes.float() * scales[..., None], wanted.float() * wanted_scales[..., None]) < 1e-2


def packed(dtype: torch.dtype, heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Three sequences in one row: queries, keys, weights, starts, ends, scales."""
    lengths = torch.tensor([700, 1, 1300])
    rows = int(lengths.sum())
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).int().cuda()
    ends = torch.arange(1, rows + 1).int().cuda()
    return (
        cuda(rows, heads, dim, dtype=dtype),
        cuda(rows, dim, dtype=dtype),
        cuda(rows, heads),
        starts,
        ends,
        torch.rand(rows, device="cuda") + 0.5,
    )


def exact_scores(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    parts = zip(q.double().split(100), w.double().split(100), strict=True)
    dots = [torch.einsum("njm,nj->nm", torch.einsum("njd,md->njm", a, k.double()).relu(), b) for a, b in parts]
    return torch.cat(dots) * scales.double()


@pytest.mark.parametrize(
    ("dtype", "heads", "dim", "limit"),
    [(FP8, 64, 128, 1e-3), (FP8, 32, 128, 1e-3), (torch.bfloat16, 64, 128, 1e-5), (torch.float32, 3, 24, 1e-5)],
    ids=["fp8 64 heads", "fp8 32 heads", "bf16", "fp32"],
)
def test_packed_scores(dtype: torch.dtype, heads: int, dim: int, limit: float) -> None:
    q, k, w, starts, ends, scales = packed(dtype, heads, dim)
    found = indexer.packed_index_scores(q, k, w, starts, ends, scales)
    column = torch.arange(len(k), device="cuda")
    seen = (column >= starts[:, None]) & (column < ends[:, None])
    assert bool((found[~seen] == -math.inf).all())
    relative = error(found[seen], exact_scores(q, k, w, scales)[seen])
    print(f"relative error {relative:.1e}")
    assert relative < limit
    again = [indexer.packed_index_scores(q, k, w, starts, ends, scales) for _ in range(20)]
    assert all(torch.equal(found, other) for other in again)


@pytest.mark.parametrize(("dtype", "heads"), [(FP8, 64), (FP8, 32), (torch.bfloat16, 64)], ids=str)
def test_a_score_has_the_same_bits_in_any_batch_and_on_pages(dtype: torch.dtype, heads: int) -> None:
    q, k, w, starts, ends, scales = packed(dtype, heads, 128)
    starts = torch.zeros_like(starts)
    found = indexer.packed_index_scores(q, k, w, starts, ends, scales)
    for rows in (slice(1234, 1235), slice(301, 900)):
        part = indexer.packed_index_scores(q[rows], k, w[rows], starts[rows], ends[rows], scales)
        assert torch.equal(part, found[rows]), "packed, alone"
    shifted = starts[500:700] + 77
    part = indexer.packed_index_scores(q[500:700], k, w[500:700], shifted, ends[500:700], scales)
    assert torch.equal(part[:, 77:], found[500:700, 77:]), "packed, other bounds"

    page, bits = 64, torch.uint8 if dtype == FP8 else dtype
    count = -(-len(k) // page)
    order = torch.randperm(count, device="cuda")
    padded = F.pad(k.view(bits), (0, 0, 0, count * page - len(k))).view(count, page, 128)
    pages = torch.empty_like(padded)
    pages[order] = padded
    page_scales = torch.empty(count, page, device="cuda")
    page_scales[order] = F.pad(scales, (0, count * page - len(k))).view(count, page)
    rows = slice(1500, 1564)
    paged = indexer.paged_index_scores(q[rows], pages.view(dtype), w[rows], order.int()[None], ends[rows], page_scales)
    assert torch.equal(paged[:, : len(k)], found[rows]), "paged"


def rows_of(kind: str, rows: int, width: int) -> torch.Tensor:
    if kind == "gauss":
        return cuda(rows, width)
    if kind == "relu":
        scores = torch.zeros(rows, width, device="cuda")
        for _ in range(8):
            scores += cuda(rows, width).sub_(1).relu_() * cuda(1)
        return scores
    if kind == "plateau":
        # Fewer scores above zero than are selected: thousands are equal at the boundary.
        return cuda(rows, width).sub_(2.5).relu_()
    if kind == "denormal":
        return cuda(rows, width) * 1e-41
    return torch.randint(-2, 3, (rows, width), device="cuda").float()


def sorted_by_hand(scores: torch.Tensor, k: int) -> torch.Tensor:
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return best.sort(dim=1).values.int()


@pytest.mark.parametrize("kind", ["gauss", "relu", "ties", "plateau", "denormal"])
@pytest.mark.parametrize(
    ("rows", "width", "k"),
    [(300, 5003, 2048), (64, 131072, 2048), (3, 1_000_000, 2048), (5, 100_003, 20_000), (1000, 256, 8)],
    ids=str,
)
def test_selection(kind: str, rows: int, width: int, k: int) -> None:
    scores = rows_of(kind, rows, width)
    found = topk.bounded_topk(scores, k)
    assert torch.equal(found, sorted_by_hand(scores, k))
    assert all(torch.equal(found, topk.bounded_topk(scores, k)) for _ in range(100 if width < 10_000 else 10))


@pytest.mark.parametrize("k", [16, 2048])
def test_selection_within_bounds(k: int) -> None:
    """Rows from empty to whole, poisoned outside their bounds; -inf and NaN within."""
    rows, width = 400, 40_000
    scores = rows_of("ties", rows, width)
    starts = torch.randint(0, width, (rows,), device="cuda")
    ends = (
        starts + torch.randint(0, width, (rows,), device="cuda") // (1 + torch.arange(rows, device="cuda") % 50)
    ).clamp(max=width)
    column = torch.arange(width, device="cuda")
    outside = (column < starts[:, None]) | (column >= ends[:, None])
    scores[torch.rand_like(scores) < 0.3] = -math.inf
    wanted = reference.topk_indices(scores.masked_fill(outside, -math.inf), k).int()
    found = topk.bounded_topk(scores.masked_fill(outside, math.nan), k, starts.int(), ends.int())
    assert torch.equal(found, wanted)
    scores[7, int(starts[7])] = math.nan
    ends[7] = (starts[7] + 1).clamp(max=width)
    assert bool((topk.bounded_topk(scores, k, starts.int(), ends.int())[7] == -1).all())


def test_the_dispatch_point_selects_the_same_on_both_devices() -> None:
    scores = rows_of("ties", 6, 333).view(2, 3, 333)
    assert torch.equal(kernels.topk_indices(scores, 40).cpu(), kernels.topk_indices(scores.cpu(), 40))
    assert torch.equal(kernels.topk_mask(scores, 40).cpu(), kernels.topk_mask(scores.cpu(), 40))


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16], ids=["fp8", "bf16"])
def test_selection_does_not_depend_on_the_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, w, starts, ends, scales = packed(dtype, 64, 128)
    scores = indexer.packed_index_scores(q, k, w, starts, ends, scales)
    wanted = topk.bounded_topk(scores, 512)
    assert torch.equal(wanted, reference.topk_indices(scores, 512).int())
    for limit in (1 << 27, 100 * len(k)):
        monkeypatch.setattr(indexer, "SCORES_LIMIT", limit)
        assert torch.equal(indexer.select_keys(q, k, w, starts, ends, 512, scales, longest=1300), wanted)


def exact_loss(
    tensors: list[torch.Tensor], starts: torch.Tensor, ends: torch.Tensor, scale: float, indices: torch.Tensor | None
) -> torch.Tensor:
    """In the dtype of the tensors, all at once."""
    iq, ik, iw, q, k = tensors
    column = torch.arange(len(ik), device="cuda")
    mask = (column >= starts[:, None]) & (column < ends[:, None])
    if indices is not None:
        chosen = torch.zeros(len(iq), len(ik) + 1, dtype=torch.bool, device="cuda")
        mask &= chosen.scatter_(1, torch.where(indices < 0, len(ik), indices).long(), True)[:, :-1]
    logits = (torch.einsum("nhd,mhd->hnm", q, k) * scale).masked_fill(~mask, -math.inf)
    p = logits.softmax(dim=-1).mean(dim=0).detach()
    scores = torch.einsum("njm,nj->nm", torch.einsum("njd,md->njm", iq, ik).relu(), iw.to(iq.dtype))
    log_q = scores.masked_fill(~mask, -math.inf).log_softmax(dim=-1).masked_fill(~mask, 0.0)
    return (torch.xlogy(p, p) - p * log_q).sum()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("shape", [(64, 128, 8, 192), (32, 128, 16, 128), (4, 64, 2, 576)], ids=str)
def test_loss_of_the_indexer(shape: tuple[int, int, int, int], sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, dim, main_heads, main_dim = shape
    lengths = torch.tensor([150, 1, 333])
    rows = int(lengths.sum())
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).int().cuda()
    ends = torch.arange(1, rows + 1).int().cuda()
    tensors = [cuda(rows, heads, dim), cuda(rows, dim), cuda(rows, heads) * dim**-0.5 / 8]
    tensors = [
        part.bfloat16() for part in (*tensors, cuda(rows, main_heads, main_dim), cuda(rows, main_heads, main_dim))
    ]
    scale = main_dim**-0.5
    indices = indexer.select_keys(tensors[0], tensors[1], tensors[2], starts, ends, 64) if sparse else None

    def gradients(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    exact = [part.double().requires_grad_() for part in tensors]
    wanted = gradients(exact_loss(exact, starts, ends, scale, indices), exact[:3])
    plain = [part.clone().requires_grad_() for part in tensors]
    theirs = gradients(exact_loss(plain, starts, ends, scale, indices), plain[:3])
    for limit in (1 << 26, 200 * rows):
        monkeypatch.setattr(indexer_loss, "CHUNK_LIMIT", limit)
        inputs = [part.clone().requires_grad_() for part in tensors]
        ours = gradients(indexer_loss.packed_indexer_loss(*inputs, starts, ends, scale, indices), inputs[:3])
        errors = [error(x, y) for x, y in zip(ours, wanted, strict=True)]
        bf16 = [error(x, y) for x, y in zip(theirs, wanted, strict=True)]
        print("relative errors", *(f"{x:.1e} (torch in bf16 {y:.1e})" for x, y in zip(errors, bf16, strict=True)))
        assert errors[0] < 1e-3
        assert all(x < max(1e-2, 2 * y) for x, y in zip(errors[1:], bf16[1:], strict=True))
        for _ in range(10):
            again = [part.clone().requires_grad_() for part in tensors]
            loss = indexer_loss.packed_indexer_loss(*again, starts, ends, scale, indices)
            assert all(torch.equal(x, y) for x, y in zip(ours, gradients(loss, again[:3]), strict=True))


@pytest.mark.parametrize(
    ("sizes", "dim", "width"),
    [([300, 0, 1, 700, 130], 512, 384), ([5, 9, 0, 33], 1000, 136), ([64] * 32, 256, 512)],
    ids=["uneven", "odd", "even"],
)
def test_grouped_products(sizes: list[int], dim: int, width: int) -> None:
    ends = torch.tensor(sizes).cumsum(0).int().cuda()
    rows, weights = cuda(sum(sizes), dim, dtype=torch.bfloat16), cuda(len(sizes), width, dim, dtype=torch.bfloat16)
    upstream = cuda(sum(sizes), width, dtype=torch.bfloat16)

    def run(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
        inputs = tuple(part.detach().requires_grad_() for part in inputs)
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]

    def by_hand(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(part, weight) for part, weight in zip(x.split(sizes), w, strict=True)])

    ours = run(lambda x, w: grouped.triton_grouped_linear(x, w, ends), rows, weights)
    wanted = run(by_hand, rows.double(), weights.double())
    errors = [error(x, y) for x, y in zip(ours, wanted, strict=True)]
    print("relative errors", *(f"{x:.1e}" for x in errors))
    assert max(errors) < 1e-2
    for _ in range(20):
        again = run(lambda x, w: grouped.triton_grouped_linear(x, w, ends), rows, weights)
        assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    last = len(sizes) - 1
    alone_ends = torch.tensor([0] * last + [1]).int().cuda()
    alone = grouped.triton_grouped_linear(rows[-1:], weights, alone_ends)
    assert torch.equal(alone, ours[0][-1:]), "a row has the same bits in any batch"
