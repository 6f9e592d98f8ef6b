"""The forward pass of sparse MLA on an H100 or H200, with its warps' roles written out (Gluon).

A program takes one query and 64 heads, and walks over pairs of tiles of 64 keys. Four warps gather keys into two
buffers of shared memory. Two groups of four warps each own every other tile and half of the output's columns: the owner
of a tile computes its scores and probabilities and hands them over, and both multiply them with their half of the
tile's values. So Q K^T is computed once, and one group's softmax runs beside the other's products.

Shape letters as in `kernels.sparse_mla`.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.sparse_tiles import LOG2_E

HEADS = 64
LATENT, ROPE = 512, 64

_LOG2_E = gl.constexpr(LOG2_E)
_HEADS, _KEYS = gl.constexpr(HEADS), gl.constexpr(64)
_LATENT, _HALF, _ROPE = gl.constexpr(LATENT), gl.constexpr(LATENT // 2), gl.constexpr(ROPE)
_GATHER = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
_OUTPUT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
_SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


def fits(queries: torch.Tensor, keys: torch.Tensor, value_dim: int) -> bool:
    """Whether this kernel takes these inputs: DeepSeek-V3.2's dimensions, 16 heads or more, 16-byte rows."""
    rows = (queries.stride(0), queries.stride(1), keys.stride(0))
    return (
        keys.is_cuda
        and torch.cuda.get_device_capability(keys.device)[0] == 9
        and keys.dtype == queries.dtype == torch.bfloat16
        and queries.shape[1] >= 16
        and (value_dim, queries.shape[2]) == (LATENT, LATENT + ROPE)
        and all(stride % 16 == 0 for stride in rows)
        and queries.data_ptr() % 16 == keys.data_ptr() % 16 == 0
    )


def head_blocks(queries: torch.Tensor) -> int:
    """How many programs share the heads of a query."""
    return -(-queries.shape[1] // HEADS)


@gluon.jit
def _count(row, first, last):
    """One past the last of a row's columns [first, last) that is not -1, at least `first`; and how many are not."""
    BLOCK: gl.constexpr = 2048
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    highest, number = first, 0
    for start in range(first, last, BLOCK):
        columns = start + gl.arange(0, BLOCK, layout=layout)
        exists = gl.load(row + columns, mask=columns < last, other=-1) >= 0
        highest = gl.maximum(highest, gl.max(gl.where(exists, columns + 1, first), axis=0))
        number += gl.sum(exists.to(gl.int32), axis=0)
    return highest, number


@gluon.jit
def _pairs(first, stop):
    """How many pairs of tiles are walked over: at least one, even where there is no key."""
    return gl.maximum(gl.cdiv(stop - first, 2 * _KEYS), 1)


@gluon.jit
def _copy(smem, rows, there, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """Starts copying columns [FIRST, FIRST + WIDTH) of the rows at these addresses, zeros where there are none."""
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, _GATHER))
    async_copy.async_copy_global_to_shared(smem, rows[:, None] + FIRST + columns[None, :], mask=there[:, None])


@gluon.jit
def _gather(operands, ready, free, source):
    """The gathering warps: all queries, then a tile of keys whenever the halves of a buffer are free."""
    q_left, q_right, q_rope, k_left, k_right, k_rope = operands
    queries, keys, row, first, last, heads_left, stride_head, stride_key = source
    place = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, _GATHER))
    head_rows = queries + place * stride_head
    _copy(q_left.index(0), head_rows, place < heads_left, 0, _HALF)
    _copy(q_right.index(0), head_rows, place < heads_left, _HALF, _HALF)
    _copy(q_rope.index(0), head_rows, place < heads_left, _LATENT, _ROPE)
    column = first + place
    index = gl.load(row + column, mask=column < last, other=-1)
    # Counted in every group of warps, here behind the queries' loads: before the groups part it would cost 2 %.
    stop, _ = _count(row, first, last)
    for pair in range(_pairs(first, stop)):
        parity = (pair & 1) ^ 1
        for side in gl.static_range(2):
            exists = index >= 0
            key_rows = keys + gl.where(exists, index, 0).to(gl.int64) * stride_key
            column = column + _KEYS
            index = gl.load(row + column, mask=column < last, other=-1)
            # The owner is done with its half first. Rope columns wait for both: probabilities were in their place.
            mbarrier.wait(free.index(3 * side), parity)
            _copy((k_left if side == 0 else k_right).index(side), key_rows, exists, side * _HALF, _HALF)
            async_copy.mbarrier_arrive(ready.index(2 * side), increment_count=False)
            mbarrier.wait(free.index(1 + side), parity)
            _copy((k_right if side == 0 else k_left).index(side), key_rows, exists, (1 - side) * _HALF, _HALF)
            _copy(k_rope.index(side), key_rows, exists, _LATENT, _ROPE)
            async_copy.mbarrier_arrive(ready.index(2 * side + 1), increment_count=False)


@gluon.jit
def _own_scores(operands, ready, pair, SIDE: gl.constexpr):
    """Starts Q K^T of this side's tile of a pair, over its own half of the columns: fp32 [heads, keys]."""
    q_left, q_right, _, k_left, k_right, _ = operands
    # A zero the compiler does not see: descriptors of operands are made here, not kept (and spilled) over the loop.
    zero = pair >> 30
    query, key = (q_left, k_left) if SIDE == 0 else (q_right, k_right)
    scores = gl.zeros([_HEADS, _KEYS], gl.float32, layout=_SCORES)
    mbarrier.wait(ready.index(2 * SIDE), pair & 1)
    fence_async_shared()
    return warpgroup_mma(
        query.index(zero), key.index(SIDE + zero).permute((1, 0)), scores, use_acc=False, is_async=True
    )


@gluon.jit
def _other_scores(scores, operands, ready, pair, SIDE: gl.constexpr):
    """Starts the rest of Q K^T: two products under way."""
    q_left, q_right, q_rope, k_left, k_right, k_rope = operands
    zero = pair >> 30
    query, key = (q_right, k_right) if SIDE == 0 else (q_left, k_left)
    mbarrier.wait(ready.index(2 * SIDE + 1), pair & 1)
    fence_async_shared()
    scores = warpgroup_mma(query.index(zero), key.index(SIDE + zero).permute((1, 0)), scores, is_async=True)
    return warpgroup_mma(q_rope.index(zero), k_rope.index(SIDE + zero).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _without_absent(scores, row, column, stop, whole):
    """Scores of keys that do not exist become -inf; nothing is read where all of a row's keys up to `stop` exist."""
    if not whole or column + _KEYS > stop:
        place = column + gl.arange(0, _KEYS, layout=gl.SliceLayout(0, _SCORES))
        index = gl.load(row + place, mask=place < stop, other=-1)
        scores = gl.where((index >= 0)[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def _softmax(scores, highest, total, scale):
    """The probabilities of a tile, and the running maximum, its shrinkage and the sum with them."""
    higher = gl.maximum(highest, gl.max(scores, axis=1) * scale)
    shrink = gl.exp2(highest - higher)
    probs = gl.exp2(scores * scale - higher[:, None])
    return probs, higher, shrink, total * shrink + gl.sum(probs, axis=1)


@gluon.jit
def _scaled(acc, shrink):
    factor = gl.convert_layout(shrink, gl.SliceLayout(1, _OUTPUT))
    return acc * factor[:, None]


@gluon.jit
def _hand_over(probs_smem, shared_highest, shared_shrink, done, probs, higher, shrink, SIDE: gl.constexpr):
    """Probabilities go where the rope columns of their tile were, which are of no more use."""
    probs_smem.index(SIDE).store(probs)
    shared_highest.index(SIDE).store(higher)
    shared_shrink.index(SIDE).store(shrink)
    fence_async_shared()
    mbarrier.arrive(done.index(SIDE), count=1)


@gluon.jit
def _attend(operands, shared, walk, SIDE: gl.constexpr):
    """One group's work: the scores of every other tile, and half of the output's columns."""
    _, _, _, k_left, k_right, probs_smem = operands
    shared_highest, shared_shrink, _, ready, free, done, _ = shared
    row, first, last, scale, _, _, _ = walk
    stop, number = _count(row, first, last)
    whole = number == stop - first
    num_pairs = _pairs(first, stop)
    OTHER: gl.constexpr = 1 - SIDE
    head_layout: gl.constexpr = gl.SliceLayout(1, _SCORES)
    operand: gl.constexpr = gl.DotOperandLayout(0, _OUTPUT, 2)
    values = k_left if SIDE == 0 else k_right
    highest = gl.full([_HEADS], -1.0e30, gl.float32, layout=head_layout)
    total = gl.zeros([_HEADS], gl.float32, layout=head_layout)
    acc = gl.zeros([_HEADS, _HALF], gl.float32, layout=_OUTPUT)
    if SIDE == 0:
        scores = _other_scores(_own_scores(operands, ready, 0, SIDE), operands, ready, 0, SIDE)
        scores = _without_absent(warpgroup_mma_wait(0, deps=[scores]), row, first, stop, whole)
        probs, highest, shrink, total = _softmax(scores, highest, total, scale)
        rounded = probs.to(gl.bfloat16)
        _hand_over(probs_smem, shared_highest, shared_shrink, done, rounded, highest, shrink, SIDE)
        acc = warpgroup_mma(gl.convert_layout(rounded, operand), values.index(SIDE), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(2 * SIDE + SIDE), count=1)
    for pair in range(1 - SIDE, num_pairs):
        scores = _own_scores(operands, ready, pair, SIDE)
        # The other side's tile comes before ours: of this pair for side 1, of the pair before for side 0. Its product
        # stands amid our scores: before them it would hold up them, behind them the memory that the next keys need.
        mbarrier.wait(done.index(OTHER), (pair - 1 + SIDE) & 1)
        highest = shared_highest.index(OTHER).load(head_layout)
        shrink = shared_shrink.index(OTHER).load(head_layout)
        acc = _scaled(acc, shrink)
        acc = warpgroup_mma(probs_smem.index(OTHER), values.index(OTHER), acc, is_async=True)
        scores = _other_scores(scores, operands, ready, pair, SIDE)
        acc = warpgroup_mma_wait(2, deps=[acc])
        mbarrier.arrive(free.index(2 * OTHER + SIDE), count=1)
        column = first + (2 * pair + SIDE) * _KEYS
        scores = _without_absent(warpgroup_mma_wait(0, deps=[scores]), row, column, stop, whole)
        probs, highest, shrink, total = _softmax(scores, highest, total * shrink, scale)
        rounded = probs.to(gl.bfloat16)
        _hand_over(probs_smem, shared_highest, shared_shrink, done, rounded, highest, shrink, SIDE)
        acc = _scaled(acc, shrink)
        acc = warpgroup_mma(gl.convert_layout(rounded, operand), values.index(SIDE), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(2 * SIDE + SIDE), count=1)
    if SIDE == 0:
        mbarrier.wait(done.index(OTHER), (num_pairs - 1) & 1)
        highest = shared_highest.index(OTHER).load(head_layout)
        shrink = shared_shrink.index(OTHER).load(head_layout)
        total = total * shrink
        acc = _scaled(acc, shrink)
        acc = warpgroup_mma(probs_smem.index(OTHER), values.index(OTHER), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    _finish(acc, highest, total, operands, shared, walk, SIDE)


@gluon.jit
def _finish(acc, highest, total, operands, shared, walk, SIDE: gl.constexpr):
    """Divides by the sum over both sides' tiles, and writes."""
    q_left, q_right, _, _, _, _ = operands
    _, _, shared_total, _, _, _, summed = shared
    _, _, _, _, out, lse, heads_left = walk
    OTHER: gl.constexpr = 1 - SIDE
    head_layout: gl.constexpr = gl.SliceLayout(1, _SCORES)
    shared_total.index(SIDE).store(total)
    mbarrier.arrive(summed.index(SIDE), count=1)
    mbarrier.wait(summed.index(OTHER), 0)
    other_total = shared_total.index(OTHER).load(head_layout)
    total = total + other_total
    heads = gl.arange(0, _HEADS, layout=head_layout)
    logarithm = gl.where(total > 0, (highest + gl.log2(total)) / _LOG2_E, float("-inf"))
    acc = _scaled(acc, 1.0 / gl.where(total > 0, total, 1.0))
    if SIDE == 0:
        gl.store(lse + heads, logarithm, mask=heads < heads_left)
    if out.dtype.element_ty == gl.float32:
        rows = gl.arange(0, _HEADS, layout=gl.SliceLayout(1, _OUTPUT))
        columns = SIDE * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(0, _OUTPUT))
        gl.store(out + rows[:, None] * _LATENT + columns[None, :], acc, mask=(rows < heads_left)[:, None])
    else:
        # No scores are computed any more: the queries' memory serves to write whole rows.
        staged = (q_left if SIDE == 0 else q_right).index(0)
        staged.store(acc.to(out.dtype.element_ty))
        gl.barrier()
        rows = gl.arange(0, _HEADS, layout=gl.SliceLayout(1, _ROWS))
        columns = SIDE * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(0, _ROWS))
        places = out + rows[:, None] * _LATENT + columns[None, :]
        gl.store(places, staged.load(_ROWS), mask=(rows < heads_left)[:, None])


@gluon.jit
def forward_kernel(
    queries, keys, indices, out, lse, scale, num_heads, num_selected, split, stride_query, stride_head, stride_key,
):  # fmt: skip
    """Grid (N * B, splits). out [N, splits, H, L], lse fp32 [N, splits, H], -inf for no keys."""
    num_blocks = gl.cdiv(num_heads, _HEADS)
    token = (gl.program_id(0) // num_blocks).to(gl.int64)
    head = (gl.program_id(0) % num_blocks) * _HEADS
    heads_left = num_heads - head
    first = gl.program_id(1) * split
    row = indices + token * num_selected
    stop = gl.minimum(first + split, num_selected)
    query = queries + token * stride_query + head.to(gl.int64) * stride_head
    place = (token * gl.num_programs(1) + gl.program_id(1)) * num_heads + head

    q_left = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, _HALF], _SWIZZLED)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, _HALF], _SWIZZLED)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, _ROPE], _SWIZZLED)
    k_left = gl.allocate_shared_memory(gl.bfloat16, [2, _KEYS, _HALF], _SWIZZLED)
    k_right = gl.allocate_shared_memory(gl.bfloat16, [2, _KEYS, _HALF], _SWIZZLED)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, _KEYS, _ROPE], _SWIZZLED)
    shared_highest = gl.allocate_shared_memory(gl.float32, [2, _HEADS], _PLAIN)
    shared_shrink = gl.allocate_shared_memory(gl.float32, [2, _HEADS], _PLAIN)
    shared_total = gl.allocate_shared_memory(gl.float32, [2, _HEADS], _PLAIN)
    # Of side s: ready 2 s its own half, 2 s + 1 the other and rope; free 2 s its tile's left half, 2 s + 1 the right.
    ready = mbarrier.allocate_mbarrier(batch=4)
    free = mbarrier.allocate_mbarrier(batch=4)
    done = mbarrier.allocate_mbarrier(batch=2)
    summed = mbarrier.allocate_mbarrier(batch=2)
    for i in gl.static_range(4):
        mbarrier.init(ready.index(i), count=128)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(done.index(i), count=1)
        mbarrier.init(summed.index(i), count=1)

    operands = (q_left, q_right, q_rope, k_left, k_right, k_rope)
    shared = (shared_highest, shared_shrink, shared_total, ready, free, done, summed)
    walk = (row, first, stop, scale, out + place * _LATENT, lse + place, heads_left)
    source = (query, keys, row, first, stop, heads_left, stride_head, stride_key)
    gl.warp_specialize(
        [
            (_attend, (operands, shared, walk, 0)),
            (_attend, (operands, shared, walk, 1)),
            (_gather, (operands, ready, free, source)),
        ],
        [4, 4],
        [224, 56],
    )


def forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    split: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes out [N, splits, H, L], fp32 or of the queries' dtype, and lse fp32 [N, splits, H]."""
    num_queries, splits, num_heads, _ = out.shape
    forward_kernel[(num_queries * head_blocks(queries), splits)](
        queries, keys, indices, out, lse, scale * LOG2_E, num_heads, indices.shape[1], split,
        queries.stride(0), queries.stride(1), keys.stride(0), num_warps=4,
    )  # fmt: skip
