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
    logits, token_ids, num_sampled, table, row_stride, num_ids, width, KEPT: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    values, entry = logits + row * row_stride, table + row * (_FIELDS + width)
    counts = tl.load(num_sampled + row)
    tl.store(entry + 1, counts)
    if counts > 0:
        token = tl.load(token_ids + row)
        peak = float("-inf")
        for first in range(0, num_ids, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            block = tl.load(values + ids, mask=ids < num_ids, other=float("-inf")).to(tl.float32)
            peak = tl.maximum(peak, tl.max(block, axis=0))
        total = 0.0
        num_kept = 0
        for first in range(0, num_ids, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            block = tl.load(values + ids, mask=ids < num_ids, other=float("-inf")).to(tl.float32)
            total += tl.sum(tl.exp(block - peak), axis=0)
            kept = (block > float("-inf")) & (block < float("inf"))
            if KEPT:
                places = num_kept + tl.cumsum(kept.to(tl.int32), axis=0) - 1
                tl.store(entry + _FIELDS + places, ids, mask=kept & (places < width))
            num_kept += tl.sum(kept.to(tl.int32), axis=0)
        logprob = tl.load(values + token).to(tl.float32) - peak - tl.log(total)
        tl.store(entry, token.to(tl.int32))
        tl.store(entry + 2, logprob.to(tl.int32, bitcast=True))
        tl.store(entry + 3, num_kept)


def record_draws(
    logits: torch.Tensor, token_ids: torch.Tensor, num_sampled: torch.Tensor, width: int = 0
) -> torch.Tensor:
    """See `kernels.reference.record_draws`."""
    num_rows, num_ids = logits.shape
    table = torch.empty((num_rows, DRAW_FIELDS + width), dtype=torch.int32, device=logits.device)
    _record_kernel[(num_rows,)](
        logits, token_ids, num_sampled, table, logits.stride(0), num_ids, width, KEPT=width > 0, BLOCK=_BLOCK
    )
    return table
