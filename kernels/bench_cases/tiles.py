"""The attention kernels' tiles against their neighbours, which stand as peers: a ratio above 1 confirms ours.

Only measured when named: `python -m kernels.bench tiles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

import kernels
from kernels import masked_mha, sparse_mla, sparse_mla_backward, sparse_tiles
from kernels.bench import Call, Case, Setup
from kernels.bench_cases.sparse_mla import DIM, LATENT, SCALE, causal_selection


def _replaced(module: ModuleType, name: str, value: Any, call: Call) -> Call:
    def run():
        kept = getattr(module, name)
        setattr(module, name, value)
        try:
            return call()
        finally:
            setattr(module, name, kept)

    return run


def _sparse(heads: int, which: str, choices: Sequence[sparse_tiles.Tiles]) -> Setup:
    n = 4096
    queries = torch.randn(n, heads, DIM, device="cuda", dtype=torch.bfloat16).requires_grad_()
    keys = torch.randn(8192, DIM, device="cuda", dtype=torch.bfloat16).requires_grad_()
    indices = causal_selection(n, 8192, 2048)
    backward = which == "_backward_tiles"
    out, _ = kernels.packed_sparse_attention(queries, keys, indices, SCALE, LATENT)
    upstream = torch.randn_like(out)

    def ours():
        if backward:
            return torch.autograd.grad(out, (queries, keys), upstream, retain_graph=True)
        with torch.no_grad():
            return kernels.packed_sparse_attention(queries, keys, indices, SCALE, LATENT)[0]

    peers = {
        f"{t.heads}x{t.keys} w{t.warps} s{t.stages}": _replaced(
            sparse_mla_backward if backward else sparse_mla, which, lambda *_, t=t: t, ours
        )
        for t in choices
    }
    flops = 2.0 * n * heads * 2048 * (3 * DIM + 2 * LATENT if backward else DIM + LATENT)
    return Setup(ours=ours, peers=peers, flops=flops)


def _masked(which: str, choices: Sequence[masked_mha.Tiles]) -> Setup:
    length, heads = 8192, 32
    shapes = [(length, heads, width) for width in (192, 192, 128)]
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    cu_seqlens = torch.tensor([0, length], device="cuda", dtype=torch.int32)
    bitmask = kernels.selection_bitmask(causal_selection(length, length, 2048), length)
    q, k, v = leaves
    out, _ = kernels.packed_attention(q, k, v, cu_seqlens, SCALE, bitmask)
    upstream = torch.randn_like(out)
    default = masked_mha._launches(192, 128, 2)

    def ours():
        if which != "forward":
            return torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        with torch.no_grad():
            return kernels.packed_attention(q, k, v, cu_seqlens, SCALE, bitmask)[0]

    def launches(tiles: masked_mha.Tiles) -> masked_mha.Launches:
        names = ("forward", "grad_queries", "grad_keys")
        return masked_mha.Launches(**{name: tiles if name == which else getattr(default, name) for name in names})

    peers = {
        f"{t.own}x{t.other} w{t.warps} s{t.stages}": _replaced(
            masked_mha, "_launches", lambda *_, t=t: launches(t), ours
        )
        for t in choices
    }
    flops = length * (length + 1.0) * heads * 320 * (1 if which == "forward" else 2.6)
    return Setup(ours=ours, peers=peers, flops=flops)


def cases() -> list[Case]:
    """Other tile sizes of the attention kernels, each beside the one that ships."""

    def sparse(*sizes: tuple[int, int, int, int]) -> list[sparse_tiles.Tiles]:
        return [sparse_tiles.Tiles(heads=h, keys=k, warps=w, stages=s) for h, k, w, s in sizes]

    def masked(*sizes: tuple[int, int, int, int]) -> list[masked_mha.Tiles]:
        return [masked_mha.Tiles(own=o, other=n, warps=w, stages=s) for o, n, w, s in sizes]

    found = [
        ("sparse_forward", lambda: _sparse(8, "_forward_tiles", sparse((16, 32, 4, 3), (16, 128, 4, 3)))),
        ("sparse_backward", lambda: _sparse(8, "_backward_tiles", sparse((16, 32, 4, 2), (16, 64, 4, 2)))),
        ("masked_forward", lambda: _masked("forward", masked((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)))),
        ("masked_grad_queries", lambda: _masked("grad_queries", masked((128, 32, 8, 3), (128, 64, 8, 3)))),
        ("masked_grad_keys", lambda: _masked("grad_keys", masked((128, 32, 8, 4), (128, 64, 8, 2)))),
    ]
    shapes = {"sparse": "M=8192 K=2048", "masked": "N=8192 H=32"}
    return [Case(name=f"tiles.{name}", shape=shapes[name[:6]], build=build, on_request=True) for name, build in found]
