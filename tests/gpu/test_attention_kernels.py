"""Sparse MLA, packed attention and log-probabilities on the GPU, at DeepSeek-V3.2's dimensions in bfloat16.

Each test prints the relative error (Frobenius) of every output against fp32, and torch's own in bfloat16 beside it.
"""

# pyright: reportCallIssue=false

from __future__ import annotations

import math

import pytest
import torch

import kernels
from kernels import reference
from kernels.bench import relative_error

LATENT, DIM = 512, 576
SCALE = 192**-0.5 * 1.87385
BF16 = torch.bfloat16


def report(names: str, found: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Fails where ours is both above 1 % off and more than twice as far off as torch in bfloat16."""
    for name, ours, torch_s, wanted in zip(names.split(), found, plain, exact, strict=True):
        error, torch_error = relative_error([ours], [wanted]), relative_error([torch_s], [wanted])
        print(f"{name}: {error:.2e} (torch {torch_error:.2e})")
        assert error <= max(2 * torch_error, 2e-3), name


def selection(num_queries: int, num_keys: int, selected: int, *, local: bool) -> torch.Tensor:
    """Ascending, then -1: random ones, or a sink and a window shared with the neighbours; the first row is empty."""
    if local:
        sink = torch.arange(selected // 8, device="cuda").expand(num_queries, -1)
        start = torch.arange(num_queries, device="cuda").unsqueeze(1) % (num_keys - selected) + selected // 8
        rows = torch.cat([sink, start + torch.arange(selected - selected // 8, device="cuda")], dim=1)
    else:
        rows = torch.rand(num_queries, num_keys, device="cuda").topk(selected, dim=-1).indices.sort(dim=-1).values
    lengths = torch.randint(0, selected + 1, (num_queries, 1), device="cuda")
    lengths[0], lengths[1] = 0, selected
    return torch.where(torch.arange(selected, device="cuda") < lengths, rows, -1).int()


def gradients(attend, inputs: list[torch.Tensor], upstream: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]


@pytest.mark.parametrize(("heads", "local"), [(1, False), (24, True), (40, False), (64, False), (128, True)])
def test_sparse_mla(heads: int, local: bool) -> None:
    torch.manual_seed(heads)
    queries, keys = torch.randn(131, heads, DIM, device="cuda"), torch.randn(900, DIM, device="cuda")
    inputs = [queries.to(BF16), keys.to(BF16)]
    indices = selection(131, 900, 333, local=local)
    upstream = torch.randn(131, heads, LATENT, device="cuda", dtype=BF16)

    def attend(function):
        return lambda q, k: function(q, k, indices, SCALE, LATENT)[0]

    ours = gradients(attend(kernels.packed_sparse_attention), inputs, upstream, BF16)
    plain = gradients(attend(reference.packed_sparse_attention), inputs, upstream, BF16)
    exact = gradients(attend(reference.packed_sparse_attention), inputs, upstream, torch.float32)
    report("out d_queries d_keys", ours, plain, exact)
    lse = kernels.packed_sparse_attention(*inputs, indices, SCALE, LATENT)[1]
    wanted = reference.packed_sparse_attention(inputs[0].float(), inputs[1].float(), indices, SCALE, LATENT)[1]
    torch.testing.assert_close(lse, wanted, rtol=1e-4, atol=1e-3)


def test_sparse_mla_repeats_and_poison() -> None:
    """Bitwise the same 100 times, and with NaN in all that is not selected."""
    torch.manual_seed(0)
    queries = torch.randn(70, 64, DIM, device="cuda", dtype=BF16).requires_grad_()
    keys = torch.randn(4000, DIM, device="cuda", dtype=BF16)
    indices = selection(70, 2000, 512, local=False)
    keys[2000:] = math.nan
    keys.requires_grad_()
    upstream = torch.randn(70, 64, LATENT, device="cuda", dtype=BF16)

    def run() -> list[torch.Tensor]:
        out, _ = kernels.packed_sparse_attention(queries, keys, indices, SCALE, LATENT)
        return [out.detach(), *torch.autograd.grad(out, (queries, keys), upstream)]

    first = run()
    assert all(tensor.isfinite().all() for tensor in first) and not first[2][2000:].any()
    for _ in range(99):
        assert all(torch.equal(one, two) for one, two in zip(first, run(), strict=True))


@pytest.mark.parametrize("heads", [16, 128])
def test_decode(heads: int) -> None:
    torch.manual_seed(heads)
    queries = torch.randn(9, heads, DIM, device="cuda", dtype=BF16)
    cache = torch.randn(64 * 1024, DIM, device="cuda", dtype=BF16)
    indices = selection(9, 64 * 1024, 2048, local=False)
    exact = reference.decode_sparse_attention(queries.float(), cache.float(), indices, SCALE, LATENT)[0]
    plain = reference.decode_sparse_attention(queries, cache, indices, SCALE, LATENT)[0]
    whole = kernels.decode_sparse_attention(queries, cache, indices, SCALE, LATENT)[0]
    report("out", [whole], [plain], [exact])
    alone = kernels.decode_sparse_attention(queries[3:4], cache, indices[3:4], SCALE, LATENT)[0]
    assert torch.equal(alone, whole[3:4])

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = kernels.decode_sparse_attention(queries, cache, indices, SCALE, LATENT)[0]
    replayed.fill_(math.nan)
    graph.replay()
    assert torch.equal(replayed, whole)


@pytest.mark.parametrize(
    ("dims", "masked"), [((192, 128), False), ((192, 128), True), ((256, 256), True), ((128, 128), False)], ids=str
)
def test_packed_attention(dims: tuple[int, int], masked: bool) -> None:
    torch.manual_seed(0)
    lengths = [700, 1, 129, 270]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    inputs = [torch.randn(sum(lengths), 3, w, device="cuda").to(BF16) for w in (dims[0], *dims)]
    upstream = torch.randn(sum(lengths), 3, dims[1], device="cuda", dtype=BF16)
    bitmask = kernels.selection_bitmask(selection(sum(lengths), 700, 300, local=False), 700) if masked else None

    def attend(function):
        return lambda q, k, v: function(q, k, v, cu_seqlens, dims[0] ** -0.5, bitmask)[0]

    ours = gradients(attend(kernels.packed_attention), inputs, upstream, BF16)
    plain = gradients(attend(reference.packed_attention), inputs, upstream, BF16)
    exact = gradients(attend(reference.packed_attention), inputs, upstream, torch.float32)
    report("out d_queries d_keys d_values", ours, plain, exact)
    again = gradients(attend(kernels.packed_attention), inputs, upstream, BF16)
    assert all(torch.equal(one, two) for one, two in zip(ours, again, strict=True))


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_packed_attention_repeats_and_poison(masked: bool) -> None:
    """Bitwise the same 100 times, alone, and with NaN in the sequences before and after; values are a strided view."""
    torch.manual_seed(0)
    lengths = [100, 333, 90]
    bounds, own = torch.tensor([0, *lengths], device="cuda").cumsum(0), slice(100, 433)
    queries, keys = (torch.randn(523, 3, 192, device="cuda", dtype=BF16) for _ in range(2))
    wide = torch.randn(523, 3, 256, device="cuda", dtype=BF16)
    upstream = torch.randn(523, 3, 128, device="cuda", dtype=BF16)
    bitmask = kernels.selection_bitmask(selection(523, 333, 150, local=False), 333) if masked else None

    def run(rows: slice, bounds: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor[rows].detach().requires_grad_() for tensor in (queries, keys, wide)]
        mask = None if bitmask is None else bitmask[rows]
        out, _ = kernels.packed_attention(leaves[0], leaves[1], leaves[2][..., 128:], bounds, 192**-0.5, mask)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream[rows])]

    first = run(own, torch.tensor([0, 333], device="cuda"))
    assert all(tensor.isfinite().all() for tensor in first)
    for tensor in (queries, keys, wide, upstream):
        tensor[:100] = tensor[433:] = math.nan
    for _ in range(100):
        again = run(slice(None), bounds)
        assert all(torch.equal(one, two[own]) for one, two in zip(first, again, strict=True))


def test_bitmask() -> None:
    indices = selection(300, 5000, 700, local=False)
    assert torch.equal(kernels.selection_bitmask(indices, 5000), reference.selection_bitmask(indices, 5000))


@pytest.mark.parametrize("kept", ["none", "some", "all"])
def test_logprobs(kept: str) -> None:
    torch.manual_seed(0)
    num_tokens, dim, vocab_size = 500, 1024, 20_011
    hidden = torch.randn(num_tokens, dim, device="cuda", dtype=BF16)
    weight = torch.randn(vocab_size, dim, device="cuda", dtype=BF16) * 3 * dim**-0.5
    targets = torch.randint(vocab_size, (num_tokens,), device="cuda")
    ids = offsets = None
    if kept != "none":
        sizes = torch.randint(1, 60, (num_tokens,), device="cuda")
        if kept == "some":
            sizes[::3] = 0
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        place = torch.arange(int(offsets[-1]), device="cuda")
        row = torch.repeat_interleave(sizes)
        ids = ((targets[row] + 7 * (place - offsets[row])) % vocab_size).int()  # the target, and then every 7th id
    upstream = torch.randn(2, num_tokens, device="cuda")

    def run(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        outs = function(*leaves, targets, ids, offsets, temperature=0.7)
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, list(upstream))]

    names = "logprobs entropy d_hidden d_weight"
    ours = run(kernels.kept_logprobs, BF16)
    report(names, ours, run(reference.kept_logprobs, BF16), run(reference.kept_logprobs, torch.float32))
    again = run(kernels.kept_logprobs, BF16)
    assert all(torch.equal(one, two) for one, two in zip(ours, again, strict=True))
