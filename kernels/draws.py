"""A decode step's draws in one launch: `kernels.reference.draws` on the GPU."""

# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.reference.draws import DRAW_FIELDS

_BLOCK = 4096
_FIELDS = tl.constexpr(DRAW_FIELDS)


@triton.jit
def _record_kernel(
    logits,
    token_ids,
    num_sampled,
    table,
    row_stride,
    num_ids,
    width,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    values, entry = logits + row * row_stride, table + 1 + row * _FIELDS
    counts = tl.load(num_sampled + row)
    tl.store(entry + 1, counts)
    start = -1
    if counts > 0:
        token = tl.load(token_ids + row)
        peak = float("-inf")
        num_kept = 0
        for first in range(0, num_ids, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            block = tl.load(values + ids, mask=ids < num_ids, other=float("-inf")).to(tl.float32)
            peak = tl.maximum(peak, tl.max(block, axis=0))
            kept = (block > float("-inf")) & (block < float("inf"))
            num_kept += tl.sum(kept.to(tl.int32), axis=0)
        if (num_kept <= width) & (num_kept < num_ids):
            start = tl.atomic_add(table, num_kept)
        places = table + 1 + tl.num_programs(0).to(tl.int64) * _FIELDS + start
        total = 0.0
        num_before = 0
        for first in range(0, num_ids, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            block = tl.load(values + ids, mask=ids < num_ids, other=float("-inf")).to(tl.float32)
            total += tl.sum(tl.exp(block - peak), axis=0)
            if KEPT:
                kept = (block > float("-inf")) & (block < float("inf"))
                ranks = num_before + tl.cumsum(kept.to(tl.int32), axis=0) - 1
                tl.store(places + ranks, ids, mask=kept & (start >= 0))
                num_before += tl.sum(kept.to(tl.int32), axis=0)
        logprob = tl.load(values + token).to(tl.float32) - peak - tl.log(total)
        tl.store(entry, token.to(tl.int32))
        tl.store(entry + 2, logprob.to(tl.int32, bitcast=True))
        tl.store(entry + 3, num_kept)
    tl.store(entry + 4, start)


def record_draws(
    logits: torch.Tensor, token_ids: torch.Tensor, num_sampled: torch.Tensor, width: int = 0
) -> torch.Tensor:
    """See `kernels.reference.record_draws`."""
    num_rows, num_ids = logits.shape
    table = torch.zeros(1 + num_rows * (DRAW_FIELDS + width), dtype=torch.int32, device=logits.device)
    _record_kernel[(num_rows,)](
        logits, token_ids, num_sampled, table, logits.stride(0), num_ids, width, KEPT=width > 0, BLOCK=_BLOCK
    )
    return table
