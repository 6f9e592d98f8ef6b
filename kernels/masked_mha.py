"""Causal attention with per-head keys and values over packed sequences on the GPU, dense or under a token bitmask.

DSA's MHA form. A program serves one block of rows of one sequence and one head. No atomics: the forward pass and the
gradient of the queries are stationary in the queries, and the latter writes the probabilities and their gradients, of
as many heads at a time as PAIRS_LIMIT admits; products of these, stationary in the keys, are the gradients of keys and
values. Every sum has one order.

Shape letters: N rows, H heads, d columns of queries and keys, v of values, S sequences, W mask words a row.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import masked_mha_hopper
from kernels import masked_mha_hopper_backward as hopper_backward
from kernels.delta import row_delta
from kernels.masked_mha_triton import forward_kernel, grad_keys_kernel, grad_queries_kernel

LOG2_E = 1.4426950408889634
# What the backward pass keeps of pairs of queries and keys at a time, in bytes: at least one head's.
PAIRS_LIMIT = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a launch is cut: rows that a program owns, rows that it walks over at a time."""

    own: int
    other: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """The tiles of the three passes."""

    forward: Tiles
    grad_queries: Tiles
    grad_keys: Tiles


_CHECK = Tiles(own=32, other=32, warps=4, stages=1)


def _launches(dim: int, value_dim: int, element_size: int) -> Launches:
    """H100/H200: what fits in 255 registers a thread and 227 KB of shared memory. fp32 is for checks."""
    if element_size > 2:
        return Launches(forward=_CHECK, grad_queries=_CHECK, grad_keys=_CHECK)
    if dim + value_dim <= 320:
        return Launches(
            forward=Tiles(own=128, other=128, warps=8, stages=2),
            grad_queries=Tiles(own=128, other=64, warps=8, stages=3),
            grad_keys=Tiles(own=128, other=64, warps=8, stages=3),
        )
    return Launches(
        forward=Tiles(own=128, other=64, warps=8, stages=2),
        grad_queries=Tiles(own=64, other=32, warps=8, stages=2),
        grad_keys=Tiles(own=64, other=64, warps=8, stages=2),
    )


@triton.jit(do_not_specialize=["num_words"])
def _bitmask_kernel(indices, words, num_selected, num_words, BLOCK: tl.constexpr):
    """Grid (N, blocks of indices). Sets the bit of every index; order does not matter to an "or"."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + row * num_selected + columns, mask=columns < num_selected, other=-1)
    there = index >= 0
    bit = tl.full([BLOCK], 1, dtype=tl.int32) << (index & 31)
    tl.atomic_or(words + row * num_words + tl.where(there, index >> 5, 0), bit, mask=there, sem="relaxed")


def selection_bitmask(indices: torch.Tensor, num_keys: int) -> torch.Tensor:
    """See `kernels.reference.selection_bitmask`."""
    indices = indices.int().contiguous()
    num_rows, num_selected = indices.shape
    words = torch.zeros(num_rows, (num_keys + 31) // 32, dtype=torch.int32, device=indices.device)
    if indices.numel() and words.numel():
        block = min(1024, triton.next_power_of_2(num_selected))
        grid = (num_rows, (num_selected + block - 1) // block)
        _bitmask_kernel[grid](indices, words, num_selected, words.shape[1], BLOCK=block, num_warps=4)
    return words


@triton.jit(do_not_specialize=["num_words", "num_rows"])
def _order_kernel(words, ordered, num_words, num_ordered, num_rows, BLOCK: tl.constexpr):
    """Grid (blocks of ordered words). See `ordered_bitmask`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = place // num_ordered, place % num_ordered
    there = row < num_rows
    group, pair = column // 4, column % 4
    found = tl.zeros([BLOCK], tl.int32)
    for part in tl.static_range(4):
        source = group * 4 + part
        word = tl.load(words + row * num_words + source, mask=there & (source < num_words), other=0)
        for step in tl.static_range(4):
            bits = (word >> (8 * step + 2 * pair).to(tl.int32)) & 3
            found |= bits << (8 * part + 2 * step)
    tl.store(ordered + place, found, mask=there)


def ordered_bitmask(bitmask: torch.Tensor) -> torch.Tensor:
    """The bits of `selection_bitmask` in the order in which a thread holds the columns of a product.

    int32 [N, W] to [N, 4 ceil(W / 4)]. Of every 128 bits, word q of four has those of columns 8 i + 2 q + b at 2 i + b.
    """
    num_rows, num_words = bitmask.shape
    ordered = torch.empty(num_rows, (num_words + 3) // 4 * 4, dtype=torch.int32, device=bitmask.device)
    if ordered.numel():
        grid = (triton.cdiv(ordered.numel(), 1024),)
        _order_kernel[grid](bitmask, ordered, num_words, ordered.shape[1], num_rows, BLOCK=1024, num_warps=4)
    return ordered


def packed_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    bitmask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.reference.packed_attention`. Bitwise the same from run to run, gradients included.

    The backward pass keeps PAIRS_LIMIT bytes, or what the pairs of one head need, and asks the GPU for their number.
    """
    if not scale > 0:
        raise ValueError(f"packed_attention: scale must be above 0, not {scale}")
    return _PackedAttention.apply(queries, keys, values, cu_seqlens.int(), scale, bitmask)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries, keys, values, cu_seqlens, scale, bitmask):
        queries, keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (queries, keys, values))
        ordered = None if bitmask is None else ordered_bitmask(bitmask.contiguous())
        num_rows, num_heads, _ = queries.shape
        out = torch.zeros(num_rows, num_heads, values.shape[-1], dtype=values.dtype, device=values.device)
        lse = torch.full((num_rows, num_heads), float("-inf"), dtype=torch.float32, device=values.device)
        if queries.numel() and values.numel():
            _forward(queries, keys, values, ordered, cu_seqlens, out, lse, scale * LOG2_E)
        ctx.save_for_backward(queries, keys, values, cu_seqlens, ordered, out, lse)
        ctx.scale = scale
        natural = lse / LOG2_E
        ctx.mark_non_differentiable(natural)
        return out, natural

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        queries, keys, values, cu_seqlens, ordered, out, lse = ctx.saved_tensors
        grad_out = grad_outputs[0].contiguous()
        grads = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (queries, keys, values)]
        if queries.numel() and values.numel():
            before = queries, keys, values, ordered, cu_seqlens, grad_out, lse, row_delta(out, grad_out)
            _backward(*before, ctx.scale, *grads)
        return *grads, None, None, None


def _forward(queries, keys, values, ordered, cu_seqlens, out, lse, scale) -> None:
    if masked_mha_hopper.fits(queries, keys, values, cu_seqlens.shape[0] - 1):
        masked_mha_hopper.forward(queries, keys, values, ordered, cu_seqlens, out, lse, scale)
        return
    tiles = _launches(queries.shape[-1], values.shape[-1], queries.element_size()).forward
    tma, num_sequences = takes_descriptors(queries, keys, values), cu_seqlens.shape[0] - 1
    forward_kernel[_grid(queries, num_sequences, tiles)](
        queries, keys, values, *_descriptors(tma, tiles.other, (keys, 0), (keys, 1), (values, 0)),
        *_mask(ordered, cu_seqlens), out, lse, scale, queries.shape[1], num_sequences, _num_words(ordered),
        *_strides(queries, keys, values), MASKED=ordered is not None, TMA=tma,
        **_blocks(queries, values, num_sequences, tiles),
    )  # fmt: skip


def _backward(
    queries, keys, values, ordered, cu_seqlens, grad_out, lse, delta, scale, grad_queries, grad_keys, grad_values
) -> None:
    own = _launches(queries.shape[-1], values.shape[-1], queries.element_size()).grad_queries.own
    num_blocks = (cu_seqlens.diff() + own - 1) // own
    num_tiles = int((num_blocks * (num_blocks + 1) // 2).sum())
    size, num_heads = num_tiles * own * own, queries.shape[1]
    most = min(num_heads, max(1, PAIRS_LIMIT // (2 * size * queries.element_size())))
    group = triton.cdiv(num_heads, triton.cdiv(num_heads, most))  # as even as can be
    probs, d_scores = torch.empty(2, group * size, dtype=queries.dtype, device=queries.device)
    for first in range(0, num_heads, group):
        heads = min(group, num_heads - first)
        pairs = probs, d_scores, heads, first, num_tiles
        _grad_queries(queries, keys, values, ordered, cu_seqlens, grad_out, lse, delta, scale, grad_queries, *pairs)
        _grad_keys(queries, cu_seqlens, grad_out, grad_keys, grad_values, *pairs)


def _grad_queries(
    queries, keys, values, ordered, cu_seqlens, grad_out, lse, delta, scale, grad_queries,
    probs, d_scores, heads, first, num_tiles,
) -> None:  # fmt: skip
    if masked_mha_hopper.fits(queries, keys, values, cu_seqlens.shape[0] - 1):
        hopper_backward.grad_queries(
            queries, keys, values, ordered, cu_seqlens, grad_out, lse, delta, probs, d_scores, grad_queries, scale,
            first, heads, num_tiles,
        )  # fmt: skip
        return
    tiles = _launches(queries.shape[-1], values.shape[-1], queries.element_size()).grad_queries
    tma, num_sequences = takes_descriptors(queries, keys, values), cu_seqlens.shape[0] - 1
    grad_queries_kernel[_grid(queries, num_sequences, tiles, heads)](
        queries, keys, values, *_descriptors(tma, tiles.other, (keys, 0), (keys, 1), (values, 0)),
        *_mask(ordered, cu_seqlens), grad_out, lse, delta, probs, d_scores, grad_queries, scale, first, num_tiles,
        queries.shape[1], num_sequences, _num_words(ordered), *_strides(queries, keys, values),
        MASKED=ordered is not None, TMA=tma, **_blocks(queries, values, num_sequences, tiles),
    )  # fmt: skip


def _grad_keys(queries, cu_seqlens, grad_out, grad_keys, grad_values, probs, d_scores, heads, first, num_tiles) -> None:
    tiles = _launches(queries.shape[-1], grad_out.shape[-1], queries.element_size()).grad_keys
    tma, num_sequences = takes_descriptors(queries, grad_out), cu_seqlens.shape[0] - 1
    pairs = [(part.view(-1, 1, tiles.own), 0) for part in (probs, d_scores)]
    grad_keys_kernel[_grid(queries, num_sequences, tiles, heads)](
        queries, cu_seqlens, grad_out, probs, d_scores,
        *_descriptors(tma, tiles.other, (queries, 0), (queries, 1), (grad_out, 0), *pairs), grad_keys, grad_values,
        first, num_tiles, queries.shape[1], num_sequences, *_strides(queries), TMA=tma,
        **_blocks(queries, grad_out, num_sequences, tiles),
    )  # fmt: skip


def _mask(ordered: torch.Tensor | None, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bitmask, or what stands in its place, and the bounds."""
    return cu_seqlens if ordered is None else ordered, cu_seqlens


def _num_words(ordered: torch.Tensor | None) -> int:
    return 0 if ordered is None else ordered.shape[1]


def takes_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether descriptors can copy blocks of these [N, H, d]: whole 16 bytes, in one or two pieces of columns."""
    return all(
        tensor.element_size() == 2
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0) % 8 == 0
        and all(width in (0, 16, 32, 64, 128, 256) for width in _pieces(tensor.shape[-1]))
        for tensor in tensors
    )


def _pieces(dim: int) -> tuple[int, int]:
    """The two blocks of columns, powers of two, that `dim` columns are: 192 are 128 and 64, 128 are 128 and 0."""
    first = 1 << (dim.bit_length() - 1)
    return first, dim - first


def _descriptors(tma: bool, rows: int, *parts: tuple[torch.Tensor, int]) -> list[Any]:
    """Of blocks of `rows` rows and one piece of a head's columns; without `tma`, what stands in their place."""
    found = []
    for tensor, piece in parts:
        width = _pieces(tensor.shape[-1])[piece]
        if not (tma and width):
            found.append(tensor)
            continue
        span = (tensor.shape[1] - 1) * tensor.stride(1) + tensor.shape[2]
        found.append(TensorDescriptor(tensor, [tensor.shape[0], span], [tensor.stride(0), 1], [rows, width]))
    return found


def _grid(queries: torch.Tensor, num_sequences: int, tiles: Tiles, heads: int | None = None) -> tuple[int, int]:
    # Every sequence wastes less than one block, so this many programs are enough without knowing the lengths.
    return queries.shape[0] // tiles.own + num_sequences, queries.shape[1] if heads is None else heads


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _blocks(queries: torch.Tensor, values: torch.Tensor, num_sequences: int, tiles: Tiles) -> dict[str, Any]:
    """The kernels' constants."""
    value_dim = values.shape[-1]
    first, rest = _pieces(queries.shape[-1])
    return {
        "FIRST": first,
        "REST": rest,
        "VALUE": value_dim,
        "BLOCK_FIRST": max(16, first),
        "BLOCK_REST": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_M": tiles.own,
        "BLOCK_N": tiles.other,
        "BLOCK_S": max(16, triton.next_power_of_2(num_sequences)),
        "STAGES": tiles.stages,
        "PRECISION": "ieee" if queries.dtype == torch.float32 else "tf32",
        "num_warps": tiles.warps,
    }
