"""Sparse MLA at DeepSeek-V3.2's dimensions: against FlashMLA where vLLM brings it, and against torch.

The torch peer gathers the selected keys of 64 queries at a time and runs SDPA over them.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F

import kernels
from kernels.bench import Call, Case, Setup

LATENT, DIM = 512, 576
SCALE = 192**-0.5 * 1.87385  # with YaRN's correction


def causal_selection(num_queries: int, num_keys: int, selected: int) -> torch.Tensor:
    """Random ascending keys up to each query's place (queries are the last rows), int32 [num_queries, selected]."""
    parts = []
    for first in range(0, num_queries, 256):
        places = torch.arange(first, min(first + 256, num_queries), device="cuda") + num_keys - num_queries
        draw = torch.rand(places.shape[0], num_keys, device="cuda")
        draw.masked_fill_(torch.arange(num_keys, device="cuda") > places.unsqueeze(1), -1)
        values, keys = draw.topk(selected, dim=-1)
        keys = keys.masked_fill(values < 0, num_keys).sort(dim=-1).values
        parts.append(keys.masked_fill(keys == num_keys, -1).int())
    return torch.cat(parts)


def _gathered_sdpa(queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    outs = []
    for q, index in zip(queries.split(64), indices.split(64), strict=True):
        selected = keys[index.clamp(min=0).long()].unsqueeze(1)  # [64, 1, K, D]
        mask = (index >= 0)[:, None, None, :]
        values = selected[..., :LATENT]
        outs.append(F.scaled_dot_product_attention(q.unsqueeze(1), selected, values, attn_mask=mask, scale=SCALE))
    return torch.cat(outs).squeeze(1)


def _inputs(n: int, m: int, heads: int, selected: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    queries = torch.randn(n, heads, DIM, device="cuda", dtype=torch.bfloat16)
    keys = torch.randn(m, DIM, device="cuda", dtype=torch.bfloat16)
    return queries, keys, causal_selection(n, m, selected)


def _flash_mla(queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor, *, decode: bool) -> dict[str, Call]:
    """FlashMLA's kernels from vLLM, where it is installed: over bf16 keys, and in decode also over an fp8 cache."""
    if find_spec("vllm") is None:
        return {}
    from vllm.third_party.flashmla import flash_mla_interface as flash_mla  # type: ignore[import-not-found]

    heads = queries.shape[1]
    wide = -(-heads // 64) * 64  # FlashMLA takes 64 heads or a multiple
    padded = F.pad(queries, (0, 0, 0, wide - heads))
    slots = indices.unsqueeze(1)
    prefill = lambda: flash_mla.flash_mla_sparse_fwd(padded, keys.unsqueeze(1), slots, SCALE, LATENT)[0][:, :heads]  # noqa: E731
    if not decode:
        return {"FlashMLA": prefill}
    cache = _fp8_cache(keys)
    plan = flash_mla.get_mla_metadata()[0]

    def decoded() -> torch.Tensor:
        one_each = padded.unsqueeze(1)
        out = flash_mla.flash_mla_with_kvcache(
            one_each, cache, None, None, LATENT, plan, None, SCALE, is_fp8_kvcache=True, indices=slots
        )[0]
        return out[:, 0, :heads]

    return {"FlashMLA prefill": prefill, "FlashMLA decode, fp8 cache": decoded}


def _fp8_cache(keys: torch.Tensor) -> torch.Tensor:
    """Keys in FlashMLA's cache format, pages of 64: 512 e4m3 values, four fp32 scales (all 1), 64 bf16 values a key."""
    parts = [keys[:, :LATENT].to(torch.float8_e4m3fn), torch.ones(keys.shape[0], 4, device="cuda"), keys[:, LATENT:]]
    rows = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
    return rows.view(-1, 64, 1, rows.shape[1]).view(torch.float8_e4m3fn)


def _forward(n: int, m: int, heads: int, selected: int, *, decode: bool) -> Setup:
    queries, keys, indices = _inputs(n, m, heads, selected)
    peers: dict[str, Call] = {"gathered SDPA": lambda: _gathered_sdpa(queries, keys, indices)}
    attend = kernels.decode_sparse_attention if decode else kernels.packed_sparse_attention
    return Setup(
        ours=lambda: attend(queries, keys, indices, SCALE, LATENT)[0],
        peers=peers | _flash_mla(queries, keys, indices, decode=decode),
        exact=lambda: _gathered_sdpa(queries.float(), keys.float(), indices),
        flops=2.0 * n * heads * selected * (DIM + LATENT),
        bytes=2.0 * n * selected * DIM,
        graphed=decode,
    )


def _train(n: int, m: int, heads: int, selected: int) -> Setup:
    """The backward pass alone: forward's results are kept."""
    queries, keys, indices = _inputs(n, m, heads, selected)
    upstream = torch.randn(n, heads, LATENT, device="cuda", dtype=torch.bfloat16)
    leaves = [queries.requires_grad_(), keys.requires_grad_()]
    out, _ = kernels.packed_sparse_attention(queries, keys, indices, SCALE, LATENT)

    def torch_s(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        """Forward again and backward, in blocks, for want of memory."""
        q_grads, key_grad = [], torch.zeros(keys.shape, device="cuda")
        for q, index, up in zip(queries.split(256), indices.split(256), upstream.split(256), strict=True):
            inputs = q.detach().to(dtype).requires_grad_(), keys.detach().to(dtype).requires_grad_()
            part = torch.autograd.grad(_gathered_sdpa(*inputs, index), inputs, up.to(dtype))
            q_grads.append(part[0])
            key_grad += part[1]
        return [torch.cat(q_grads), key_grad]

    return Setup(
        ours=lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True),
        peers={"gathered SDPA, recomputed": torch_s},
        exact=lambda: torch_s(torch.float32),
        flops=2.0 * n * heads * selected * (3 * DIM + 2 * LATENT),
    )


def cases() -> list[Case]:
    """Sparse MLA of N queries and H heads over K of M keys: forward, decode, gradients."""
    found = []
    for n, m, heads in [(4096, 8192, 64), (4096, 8192, 128), (4096, 32768, 128), (4096, 8192, 16)]:
        shape = f"N={n} M={m} H={heads} K=2048"
        build = lambda n=n, m=m, heads=heads: _forward(n, m, heads, 2048, decode=False)  # noqa: E731
        found.append(Case(name="sparse_mla.forward", shape=shape, build=build))
    for n, heads in [(1, 128), (32, 128), (128, 128), (128, 16)]:
        build = lambda n=n, heads=heads: _forward(n, 131072, heads, 2048, decode=True)  # noqa: E731
        found.append(Case(name="sparse_mla.decode", shape=f"N={n} M=131072 H={heads} K=2048", build=build))
    for n, m, heads in [(4096, 8192, 64), (2048, 8192, 128)]:
        shape = f"N={n} M={m} H={heads} K=2048"
        build = lambda n=n, m=m, heads=heads: _train(n, m, heads, 2048)  # noqa: E731
        found.append(Case(name="sparse_mla.backward", shape=shape, build=build))
    return found
