"""Attention in the MHA form at DeepSeek-V3.2's head dimensions (192 and 128), one sequence, against SDPA.

Dense causal attention counts the pairs of the causal triangle; under a bitmask it is the same work, because what is
not selected is computed and dropped. SDPA's dense causal attention over the same pairs is the peer of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels import reference
from kernels.bench import Call, Case, Setup
from kernels.bench_cases.sparse_mla import SCALE, causal_selection

DIM, VALUE_DIM = 192, 128
_BACKENDS = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash, padded": SDPBackend.FLASH_ATTENTION}


def _sdpa(leaves: list[torch.Tensor], backend: SDPBackend) -> torch.Tensor:
    q, k, v = (leaf.transpose(0, 1).unsqueeze(0) for leaf in leaves)
    if backend is SDPBackend.FLASH_ATTENTION:  # which wants values as wide as keys
        v = F.pad(v, (0, DIM - VALUE_DIM))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
    return out[0].transpose(0, 1)[..., :VALUE_DIM]


def _flash_attention_3() -> Callable[..., torch.Tensor] | None:
    """Its forward pass; the wheel has no backward pass."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return flash_attn_varlen_func


def _setup(length: int, heads: int, *, masked: bool, backward: bool) -> Setup:
    shapes = [(length, heads, width) for width in (DIM, DIM, VALUE_DIM)]
    leaves = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_(backward) for s in shapes]
    cu_seqlens = torch.tensor([0, length], device="cuda", dtype=torch.int32)
    upstream = torch.randn(length, heads, VALUE_DIM, device="cuda", dtype=torch.bfloat16)
    bitmask = kernels.selection_bitmask(causal_selection(length, length, 2048), length) if masked else None

    def ours() -> torch.Tensor:
        return kernels.packed_attention(*leaves, cu_seqlens, SCALE, bitmask)[0]  # type: ignore[reportCallIssue]

    def gradient_of(attend) -> Call:
        """The backward pass alone, over a forward pass that is done once, when it is first asked for."""
        kept: list[torch.Tensor] = []

        def run():
            if not kept:
                kept.append(attend())
            return torch.autograd.grad(kept[0], leaves, upstream, retain_graph=True)

        return run

    def exact():
        exact_leaves = [leaf.detach().float().requires_grad_(backward) for leaf in leaves]
        attend = reference.packed_attention
        out = attend(*exact_leaves, cu_seqlens, SCALE, bitmask)[0]  # type: ignore[reportCallIssue]
        return torch.autograd.grad(out, exact_leaves, upstream.float()) if backward else out

    wrap = gradient_of if backward else (lambda attend: attend)
    peers: dict[str, Call] = {
        name: wrap(lambda backend=backend: _sdpa(leaves, backend)) for name, backend in _BACKENDS.items()
    }
    if not backward and (flash := _flash_attention_3()) is not None:
        bounds: dict[str, Any] = {f"cu_seqlens_{side}": cu_seqlens for side in "qk"}
        bounds |= {f"max_seqlen_{side}": length for side in "qk"}
        peers["FlashAttention-3 in vLLM"] = lambda: flash(
            *leaves, **bounds, causal=True, softmax_scale=SCALE, fa_version=3
        )
    return Setup(
        ours=wrap(ours),
        peers=peers,
        exact=exact if length <= 8192 else None,
        flops=length * (length + 1.0) * heads * (DIM + VALUE_DIM) * (2.6 if backward else 1),
    )


def cases() -> list[Case]:
    """Packed attention of N tokens and H heads, dense and under a token bitmask."""
    found = []
    for length, heads, masked in [(8192, 32, False), (8192, 32, True), (16384, 32, True)]:
        for backward in (False, True):
            form = "masked" if masked else "dense"
            name = f"masked_mha.{'backward' if backward else 'forward'}"
            build = lambda n=length, h=heads, m=masked, b=backward: _setup(n, h, masked=m, backward=b)  # noqa: E731
            found.append(Case(name=name, shape=f"{form} N={length} H={heads}", build=build))
    return found
