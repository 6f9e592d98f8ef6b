"""What attention's backward passes begin with: each row's sum of out * grad_out."""

# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(out, grad_out, delta, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    place = rows[:, None] * WIDTH + columns[None, :]
    a = tl.load(out + place, mask=there, other=0.0).to(tl.float32)
    b = tl.load(grad_out + place, mask=there, other=0.0).to(tl.float32)
    tl.store(delta + rows, tl.sum(a * b, axis=1), mask=rows < num_rows)


def row_delta(out: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
    """The sum of out * grad_out over the last dimension, fp32 [...]; both [..., v] and contiguous."""
    delta = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device)
    if delta.numel():
        width = out.shape[-1]
        block = triton.next_power_of_2(width)
        rows = max(1, 4096 // block)
        grid = (-(-delta.numel() // rows),)
        _delta_kernel[grid](out, grad_out, delta, delta.numel(), WIDTH=width, BLOCK=block, ROWS=rows, num_warps=4)
    return delta
