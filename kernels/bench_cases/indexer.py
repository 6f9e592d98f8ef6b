"""The lightning indexer at DeepSeek-V3.2's sizes (64 heads of 128, 2048 selected keys) and GLM-5's 32 heads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels import indexer, indexer_loss, reference, topk
from kernels.bench import Call, Case, Setup

DIM, TOPK = 128, 2048
FP8 = torch.float8_e4m3fn


def _bounds(num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last queries of one sequence."""
    ends = torch.arange(num_keys - num_queries + 1, num_keys + 1, dtype=torch.int32, device="cuda")
    return torch.zeros_like(ends), ends


def _pairs(num_queries: int, num_keys: int) -> float:
    return num_queries * (num_keys - (num_queries - 1) / 2)


def _prepare(num_tokens: int, heads: int) -> Setup:
    x = torch.randn(num_tokens, heads, DIM, device="cuda", dtype=torch.bfloat16)
    angles = torch.randn(num_tokens, 32, device="cuda")
    inputs = (x, angles.cos(), angles.sin(), torch.randn(num_tokens, heads, device="cuda"))

    def values(function: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Call:
        return lambda: function(*inputs)

    return Setup(
        ours=values(indexer.quantise_index_heads),
        peers={"reference": values(reference.quantise_index_heads)},
        bytes=num_tokens * heads * (DIM * 3.0 + 8) + num_tokens * 256.0,
    )


def _scores(num_queries: int, num_keys: int, heads: int, dtype: torch.dtype) -> Setup:
    q = torch.randn(num_queries, heads, DIM, device="cuda").to(dtype)
    k = torch.randn(num_keys, DIM, device="cuda").to(dtype)
    w = torch.randn(num_queries, heads, device="cuda")
    scales = torch.rand(num_keys, device="cuda") + 0.5
    starts, ends = _bounds(num_queries, num_keys)
    out = torch.zeros(num_queries, num_keys, device="cuda")

    def ours() -> torch.Tensor:
        indexer.scores_into(out[None], q[None], k[None], w, starts, ends, scales)
        return out

    def plain(dtype: torch.dtype, chunk: int) -> torch.Tensor:
        keys, columns = k.to(dtype).T, torch.arange(num_keys, device="cuda")
        parts = []
        for first in range(0, num_queries, chunk):
            block = slice(first, first + chunk)
            dots = (q[block].to(dtype).flatten(0, 1) @ keys).relu_().unflatten(0, (-1, heads))
            scores = torch.einsum("njm,nj->nm", dots.float(), w[block]) * scales
            parts.append(scores.masked_fill_(columns >= ends[block, None], 0.0))
        return torch.cat(parts)

    peers: dict[str, Call] = {}
    if num_queries * num_keys <= 1 << 25:
        peers["torch in bf16"] = lambda: plain(torch.bfloat16, 128)
    if dtype == FP8 and (deep_gemm := _deep_gemm()) is not None:
        peers["DeepGEMM in vLLM"] = lambda: deep_gemm((q, None), (k, scales), w, starts, ends, clean_logits=False)
    return Setup(
        ours=ours,
        peers=peers,
        exact=lambda: plain(torch.float32, 64),
        flops=2.0 * _pairs(num_queries, num_keys) * heads * DIM,
    )


def _deep_gemm() -> Callable[..., torch.Tensor] | None:
    try:
        from vllm.utils.deep_gemm import fp8_fp4_mqa_logits  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return fp8_fp4_mqa_logits


def _paged(num_sequences: int, length: int, heads: int) -> Setup:
    page = 64
    table = torch.randperm(num_sequences * length // page, device="cuda").int().view(num_sequences, -1)
    pages = torch.randn(table.numel(), page, DIM, device="cuda").to(FP8)
    scales = torch.rand(table.numel(), page, device="cuda") + 0.5
    q = torch.randn(num_sequences, heads, DIM, device="cuda").to(FP8)
    w = torch.randn(num_sequences, heads, device="cuda")
    lengths = torch.full((num_sequences,), length, dtype=torch.int32, device="cuda")
    inputs = (w, table, lengths, scales)
    return Setup(
        ours=lambda: indexer.paged_index_scores(q, pages, *inputs),
        peers={"reference": lambda: reference.paged_index_scores(q, pages, *inputs)},
        exact=lambda: reference.paged_index_scores(q.double(), pages, *inputs),
        bytes=num_sequences * length * (DIM + 4 + 4.0),
    )


def _topk(rows: int, width: int) -> Setup:
    """Scores as the indexer makes them: a weighed sum of relus, positive and negative."""
    scores = torch.zeros(rows, width, device="cuda")
    for _ in range(8):
        scores += torch.randn(rows, width, device="cuda").relu_() * torch.randn(1, device="cuda")
    ends = torch.full((rows,), width, dtype=torch.int32, device="cuda")
    starts = torch.zeros_like(ends)
    peers: dict[str, Call] = {
        "torch.topk": lambda: scores.topk(TOPK, sorted=False),
        "torch.topk and sort": lambda: scores.topk(TOPK, sorted=False).indices.sort().values,
    }

    peers |= _vllm_topk(scores, starts, ends)
    return Setup(ours=lambda: topk.bounded_topk(scores, TOPK, starts, ends), peers=peers, bytes=4.0 * rows * width)


def _vllm_topk(scores: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> dict[str, Call]:
    """What vLLM selects with: in prefill, in decode up to 64 rows, and in decode beyond."""
    try:
        import vllm._custom_ops  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    rows, width = scores.shape
    into = torch.empty(rows, TOPK, dtype=torch.int32, device="cuda")
    workspace = torch.zeros(16 << 20, dtype=torch.uint8, device="cuda")
    lengths = ends[:, None].contiguous()

    def prefill() -> torch.Tensor:
        torch.ops._C.top_k_per_row_prefill(scores, starts, ends, into, rows, width, 1, TOPK)
        return into

    def decode(operator: str) -> Call:
        def run() -> torch.Tensor:
            getattr(torch.ops._C, operator)(scores, lengths, into, workspace, TOPK, width)
            return into

        return run

    found: dict[str, Call] = {"vLLM per_row_prefill": prefill, "vLLM persistent": decode("persistent_topk")}
    return found | ({"vLLM cooperative": decode("cooperative_topk")} if rows <= 64 else {})


def _loss(num_tokens: int, heads: int, dim: int, sparse: bool) -> Setup:
    index = [
        torch.randn(num_tokens, 64, DIM, device="cuda").bfloat16(),
        torch.randn(num_tokens, DIM, device="cuda").bfloat16(),
        torch.randn(num_tokens, 64, device="cuda") / 64,
    ]
    q, k = (torch.randn(num_tokens, heads, dim, device="cuda").bfloat16() for _ in range(2))
    starts, ends = _bounds(num_tokens, num_tokens)
    indices = indexer.select_keys(index[0], index[1], index[2], starts, ends, TOPK) if sparse else None

    def call(function: Callable[..., torch.Tensor]) -> Call:
        def run() -> list[torch.Tensor]:
            inputs = [part.requires_grad_() for part in index]
            loss = function(*inputs, q, k, starts, ends, dim**-0.5, indices)
            return [loss.detach(), *torch.autograd.grad(loss, inputs)]

        return run

    pairs = _pairs(num_tokens, num_tokens)
    return Setup(
        ours=call(indexer_loss.packed_indexer_loss),
        peers={"reference": call(reference.packed_indexer_loss)},
        exact=call(reference.packed_indexer_loss),
        flops=2.0 * pairs * (heads * dim + 3 * 64 * DIM),
    )


def cases() -> list[Case]:
    """Preparation, scores and top-k of the lightning indexer: N queries, M keys, J heads."""
    found = [
        Case(name="indexer.prepare", shape=f"N=16384 J={heads}", build=lambda heads=heads: _prepare(16384, heads))
        for heads in (64, 1)
    ]
    scores = [(4096, 8192, 64), (4096, 32768, 64), (2048, 131072, 64), (4096, 32768, 32)]
    found += [
        Case(name="indexer.scores_fp8", shape=f"N={n} M={m} J={j}", build=lambda n=n, m=m, j=j: _scores(n, m, j, FP8))
        for n, m, j in scores
    ]
    found.append(
        Case(
            name="indexer.scores_bf16",
            shape="N=4096 M=8192 J=64",
            build=lambda: _scores(4096, 8192, 64, torch.bfloat16),
        )
    )
    found += [
        Case(name="indexer.paged", shape=f"B={b} L={length} J=64", build=lambda b=b, n=length: _paged(b, n, 64))
        for b, length in ((128, 8192), (16, 131072))
    ]
    found += [
        Case(name="topk", shape=f"{rows} x {width} k={TOPK}", build=lambda r=rows, w=width: _topk(r, w))
        for rows, width in ((4096, 8192), (4096, 32768), (2048, 131072), (64, 32768), (64, 131072))
    ]
    found += [
        Case(
            name=f"indexer_loss.{'sparse' if sparse else 'dense'}",
            shape=f"N={n} H={h} D=192 J=64",
            build=lambda n=n, h=h, sparse=sparse: _loss(n, h, 192, sparse),
        )
        for n, h in ((8192, 32), (4096, 128))
        for sparse in (False, True)
    ]
    return found
