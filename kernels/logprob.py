"""Log-probabilities of tokens over the vocabulary or over kept sets on the GPU, with their gradients.

Over the vocabulary: cuBLAS makes a block of fp32 logits, [tokens, ids] of bounded size, and one kernel folds it into
every row's running maximum, sum and mean. The backward pass turns blocks into gradients and multiplies twice; it makes
them again, but for those that the forward pass kept (KEEP_LIMIT). Over kept sets only the kept rows of the weight are
read: far less work than the whole vocabulary as long as sets are small. Every sum has a fixed order.

Shape letters: N tokens, D hidden size, V vocabulary, M kept ids of all tokens together.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from kernels import reference
from kernels.reference.logprob import check_arguments

# A block of logits: at most 256 MiB.
_BLOCK_TOKENS, _BLOCK_IDS = 8192, 8192
# Logits of the forward pass, in bytes, that are kept for the backward pass, which makes the others again. 2 GiB are all
# of 4096 tokens and 129,280 ids, and spare one product of four. No bit depends on it.
KEEP_LIMIT = 0
# Where sets hold more than this share of the vocabulary, reading rows of the weight costs more than all logits.
_GATHER_SHARE = 1 / 256


def kept_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    kept_ids: torch.Tensor | None = None,
    kept_offsets: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.reference.kept_logprobs`. `chunk` only bounds the rows of sets too large to gather."""
    targets, kept_offsets = check_arguments(hidden, weight, targets, kept_ids, kept_offsets)
    if kept_ids is None or kept_offsets is None:
        return _vocabulary_logprobs(hidden, weight, targets, temperature)
    sizes = kept_offsets.diff()
    rows, others = (sizes > 0).nonzero().squeeze(1), (sizes == 0).nonzero().squeeze(1)
    if kept_ids.shape[0] > rows.shape[0] * weight.shape[0] * _GATHER_SHARE:
        return reference.kept_logprobs(
            hidden, weight, targets, kept_ids, kept_offsets, temperature=temperature, chunk=chunk
        )
    if not others.numel():
        return _SetLogprobs.apply(hidden, weight, targets, kept_ids, kept_offsets, temperature)
    offsets = torch.cat([kept_offsets[rows], kept_offsets[-1:]])
    parts = [
        (rows, _SetLogprobs.apply(hidden[rows], weight, targets[rows], kept_ids, offsets, temperature)),
        (others, _vocabulary_logprobs(hidden[others], weight, targets[others], temperature)),
    ]
    blank = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    logprobs = entropy = blank
    for places, (part_logprobs, part_entropy) in parts:
        logprobs = logprobs.index_copy(0, places, part_logprobs)
        entropy = entropy.index_copy(0, places, part_entropy)
    return logprobs, entropy


# Over the vocabulary


@triton.jit
def _fold_kernel(
    logits, targets, highest, total, weighted, chosen, first, num_ids, stride, inverse_temperature, BLOCK: tl.constexpr
):
    """Grid (rows). Folds the logits of ids [first, first + num_ids) into a row's running statistics.

    total is the sum of exp(z - highest) over the ids so far, weighted that of exp(z - highest) * z, chosen the
    target's z; z is the logit over the temperature.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < num_ids
    z = tl.load(logits + row * stride + columns, mask=there, other=float("-inf")) * inverse_temperature
    before = tl.load(highest + row)
    after = tl.maximum(before, tl.max(z, axis=0))
    shrink = tl.exp(before - after)
    terms = tl.exp(z - after)
    tl.store(highest + row, after)
    tl.store(total + row, tl.load(total + row) * shrink + tl.sum(terms, axis=0))
    products = tl.where(there, terms * tl.where(there, z, 0.0), 0.0)
    tl.store(weighted + row, tl.load(weighted + row) * shrink + tl.sum(products, axis=0))
    target = tl.load(targets + row) - first
    hit = tl.sum(tl.where(columns == target, z, 0.0), axis=0)
    tl.store(chosen + row, tl.load(chosen + row) + tl.where((target >= 0) & (target < num_ids), hit, 0.0))


@triton.jit
def _slope_kernel(
    logits, slopes, targets, lse, entropy, grad_logprobs, grad_entropy, first, num_ids, stride, inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows). d loss / d logit for ids [first, first + num_ids), in the dtype of `slopes`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < num_ids
    z = tl.load(logits + row * stride + columns, mask=there, other=float("-inf")) * inverse_temperature
    log_probs = z - tl.load(lse + row)
    probs = tl.exp(log_probs)
    hit = tl.where(columns == tl.load(targets + row) - first, 1.0, 0.0)
    # d logprob = onehot - p, d entropy = -p (log p + entropy); p log p is 0 where p is 0.
    surprise = tl.where(probs > 0, probs * log_probs, 0.0) + probs * tl.load(entropy + row)
    slope = tl.load(grad_logprobs + row) * (hit - probs) - tl.load(grad_entropy + row) * surprise
    slope = slope * inverse_temperature
    tl.store(slopes + row * num_ids + columns, slope.to(slopes.dtype.element_ty), mask=there)


def _vocabulary_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _VocabularyLogprobs.apply(hidden, weight, targets, temperature, trained)


class _VocabularyLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, temperature, trained):
        hidden, targets = hidden.contiguous(), targets.contiguous()
        highest = torch.full(targets.shape, float("-inf"), dtype=torch.float32, device=hidden.device)
        total, weighted, chosen = (torch.zeros_like(highest) for _ in range(3))
        room = KEEP_LIMIT if trained else 0
        ctx.kept = {}
        for ids in _blocks(weight.shape[0], _BLOCK_IDS):
            for rows in _blocks(hidden.shape[0], _BLOCK_TOKENS):
                logits = _product(hidden[rows], weight[ids].t())
                _fold_kernel[(logits.shape[0],)](
                    logits, targets[rows], highest[rows], total[rows], weighted[rows], chosen[rows], ids.start,
                    logits.shape[1], logits.stride(0), 1 / temperature,
                    BLOCK=triton.next_power_of_2(logits.shape[1]), num_warps=8,
                )  # fmt: skip
                if logits.nbytes <= room:
                    ctx.kept[ids.start, rows.start] = logits
                    room -= logits.nbytes
                del logits
        lse = highest + total.log()
        entropy = lse - weighted / total
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature = temperature
        return chosen - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = (grad.contiguous() for grad in grad_outputs)
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if to_hidden else None
        grad_weight = torch.zeros_like(weight) if to_weight else None
        for ids in _blocks(weight.shape[0], _BLOCK_IDS):
            grad_ids = None
            for rows in _blocks(hidden.shape[0], _BLOCK_TOKENS):
                logits = ctx.kept.pop((ids.start, rows.start), None)
                if logits is None:
                    logits = _product(hidden[rows], weight[ids].t())
                slopes = torch.empty(logits.shape, dtype=hidden.dtype, device=hidden.device)
                _slope_kernel[(logits.shape[0],)](
                    logits, slopes, targets[rows], lse[rows], entropy[rows], grad_logprobs[rows], grad_entropy[rows],
                    ids.start, logits.shape[1], logits.stride(0), 1 / ctx.temperature,
                    BLOCK=triton.next_power_of_2(logits.shape[1]), num_warps=8,
                )  # fmt: skip
                del logits
                if grad_hidden is not None:
                    grad_hidden[rows] += _product(slopes, weight[ids])
                if to_weight:
                    part = _product(slopes.t(), hidden[rows])
                    grad_ids = part if grad_ids is None else grad_ids.add_(part)
                del slopes
            if grad_weight is not None and grad_ids is not None:
                grad_weight[ids] = grad_ids
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32; 16-bit operands are multiplied as they are and only summed in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# Over kept sets


@triton.jit
def _set_logits_kernel(
    hidden, weight, ids, offsets, logits, inverse_temperature, dim, stride_hidden, stride_weight,
    BLOCK_IDS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks of ids). The logits, over the temperature, of a row's kept ids."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.load(offsets + row) + tl.program_id(1) * BLOCK_IDS + tl.arange(0, BLOCK_IDS)
    there = places < tl.load(offsets + row + 1)
    if tl.max(there.to(tl.int32), axis=0) == 0:
        return
    vectors = tl.load(ids + places, mask=there, other=0).to(tl.int64) * stride_weight
    acc = tl.zeros([BLOCK_IDS, BLOCK_D], dtype=tl.float32)
    for first in tl.range(0, dim, BLOCK_D, num_stages=3):
        columns = first + tl.arange(0, BLOCK_D)
        inside = columns < dim
        h = tl.load(hidden + row * stride_hidden + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + vectors[:, None] + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0).to(
            tl.float32
        )
        acc += w * h[None, :]
    tl.store(logits + places, tl.sum(acc, axis=1) * inverse_temperature, mask=there)


@triton.jit
def _set_softmax_kernel(logits, ids, offsets, targets, logprobs, entropy, lse_out, BLOCK: tl.constexpr):
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row)
    stop = tl.load(offsets + row + 1)
    target = tl.load(targets + row)
    highest = tl.full([BLOCK], -1.0e30, dtype=tl.float32)
    for first in tl.range(start, stop, BLOCK):
        places = first + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, tl.load(logits + places, mask=places < stop, other=-1.0e30))
    top = tl.max(highest, axis=0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    weighted = tl.zeros([BLOCK], dtype=tl.float32)
    chosen = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.range(start, stop, BLOCK):
        places = first + tl.arange(0, BLOCK)
        there = places < stop
        z = tl.load(logits + places, mask=there, other=0.0) - top
        terms = tl.where(there, tl.exp(z), 0.0)
        total += terms
        weighted += terms * z
        chosen += tl.where(there & (tl.load(ids + places, mask=there, other=-1) == target), z, 0.0)
    log_total = tl.log(tl.sum(total, axis=0))
    tl.store(logprobs + row, tl.sum(chosen, axis=0) - log_total)
    tl.store(entropy + row, log_total - tl.sum(weighted, axis=0) / tl.sum(total, axis=0))
    tl.store(lse_out + row, top + log_total)


@triton.jit(do_not_specialize=["count"])
def _set_slope_kernel(
    logits, slopes, ids, rows, targets, lse, entropy, grad_logprobs, grad_entropy, count, inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of entries). d loss / d logit of every kept id."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = places < count
    row = tl.load(rows + places, mask=there, other=0)
    log_probs = tl.load(logits + places, mask=there, other=0.0) - tl.load(lse + row, mask=there, other=0.0)
    probs = tl.exp(log_probs)
    target = tl.load(targets + row, mask=there, other=0)
    hit = tl.where(tl.load(ids + places, mask=there, other=-1) == target, 1.0, 0.0)
    surprise = tl.where(probs > 0, probs * log_probs, 0.0) + probs * tl.load(entropy + row, mask=there, other=0.0)
    slope = tl.load(grad_logprobs + row, mask=there, other=0.0) * (hit - probs)
    slope -= tl.load(grad_entropy + row, mask=there, other=0.0) * surprise
    tl.store(slopes + places, slope * inverse_temperature, mask=there)


@triton.jit
def _weighted_rows_kernel(
    vectors, slopes, entries, which, bounds, out, dim, stride, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Grid (groups, blocks of columns). out[g] = sum over e in entries[bounds[g]:bounds[g + 1]] of slopes[e] *
    vectors[which[e]], in that order; groups without entries are left alone.
    """
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(bounds + group)
    stop = tl.load(bounds + group + 1)
    if start == stop:
        return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_E, BLOCK_D], dtype=tl.float32)
    for first in tl.range(start, stop, BLOCK_E, num_stages=3):
        places = first + tl.arange(0, BLOCK_E)
        there = places < stop
        entry = tl.load(entries + places, mask=there, other=0)
        slope = tl.load(slopes + entry, mask=there, other=0.0)
        vector = tl.load(which + entry, mask=there, other=0).to(tl.int64) * stride
        mask = there[:, None] & (columns < dim)[None, :]
        acc += slope[:, None] * tl.load(vectors + vector[:, None] + columns[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    target = out + group * dim + columns
    tl.store(target, tl.sum(acc, axis=0).to(out.dtype.element_ty), mask=columns < dim)


class _SetLogprobs(torch.autograd.Function):
    """No set is empty."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, ids, offsets, temperature):
        hidden, weight = _unit_stride(hidden), _unit_stride(weight)
        num_tokens, dim = hidden.shape
        logits = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        logprobs = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        entropy, lse = torch.empty_like(logprobs), torch.empty_like(logprobs)
        if num_tokens:
            block = 16
            grid = (num_tokens, -(-int(offsets.diff().max()) // block))
            _set_logits_kernel[grid](
                hidden, weight, ids, offsets, logits, 1 / temperature, dim, hidden.stride(0), weight.stride(0),
                BLOCK_IDS=block, BLOCK_D=min(256, triton.next_power_of_2(dim)), num_warps=4,
            )  # fmt: skip
            _set_softmax_kernel[(num_tokens,)](
                logits, ids, offsets, targets, logprobs, entropy, lse, BLOCK=128, num_warps=1
            )
        ctx.save_for_backward(hidden, weight, targets, ids, offsets, logits, lse, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        hidden, weight, targets, ids, offsets, logits, lse, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = (grad.contiguous() for grad in grad_outputs)
        count = ids.shape[0]
        order = torch.arange(count, device=ids.device)
        rows = torch.searchsorted(offsets, order, right=True) - 1
        slopes = torch.empty_like(logits)
        if count:
            _set_slope_kernel[(-(-count // 1024),)](
                logits, slopes, ids, rows, targets, lse, entropy, grad_logprobs, grad_entropy, count,
                1 / ctx.temperature, BLOCK=1024, num_warps=4,
            )  # fmt: skip
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
            _weighted_rows(weight, slopes, order, ids, offsets, grad_hidden)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            by_id, entries = torch.sort(ids, stable=True)
            every = torch.arange(weight.shape[0] + 1, dtype=by_id.dtype, device=ids.device)
            _weighted_rows(hidden, slopes, entries, rows, torch.searchsorted(by_id, every), grad_weight)
        return grad_hidden, grad_weight, None, None, None, None


def _weighted_rows(
    vectors: torch.Tensor,
    slopes: torch.Tensor,
    entries: torch.Tensor,
    which: torch.Tensor,
    bounds: torch.Tensor,
    out: torch.Tensor,
) -> None:
    num_groups, dim = out.shape
    if not (num_groups and entries.numel()):
        return
    block = min(512, triton.next_power_of_2(dim))
    _weighted_rows_kernel[(num_groups, -(-dim // block))](
        vectors, slopes, entries, which, bounds, out, dim, vectors.stride(0), BLOCK_E=8, BLOCK_D=block, num_warps=4
    )


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
