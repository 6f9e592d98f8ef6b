"""The forward pass of packed attention on an H100 or H200, with its warps' roles written out (Gluon).

A program takes 128 queries of one sequence and one head, and walks over tiles of 128 keys. Four warps copy keys and
values to shared memory by descriptors. Two groups of four warps own 64 queries each; they wait for tiles and not for
each other, so that one group's softmax runs beside the other's products.

Shape letters as in `kernels.masked_mha`.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

FIRST, REST, VALUE = 128, 64, 128
QUERIES, KEYS, STAGES = 128, 128, 2
# A program looks for its block one sequence after another: with hundreds that would take longer than the block.
MOST_SEQUENCES = 64

_FIRST, _REST, _VALUE = gl.constexpr(FIRST), gl.constexpr(REST), gl.constexpr(VALUE)
_HALF, _KEYS, _STAGES = gl.constexpr(QUERIES // 2), gl.constexpr(KEYS), gl.constexpr(STAGES)
_SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
# _SCORES with its 128 columns c = 8 i + 2 q + b as [i, q, b]: a thread has all i and b of one q.
_BITS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [8, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0], [0, 8, 0, 0]],
        lane_bases=[[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        warp_bases=[[16, 0, 0, 0], [32, 0, 0, 0]],
        block_bases=[],
        shape=[64, 16, 4, 2],
    )
)


@gluon.jit
def copy_rows(source, smem, first, length, stride, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Rows [first, first + ROWS) of a sequence by pointers, zeros beyond its length, where the next one's rows may
    hold NaN.
    """
    lanes: gl.constexpr = WIDTH // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    rows = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    for chunk in gl.static_range(ROWS // 16):
        place = first + chunk * 16 + rows
        pointers = source + place.to(gl.int64)[:, None] * stride + columns[None, :]
        smem.slice(chunk * 16, 16, dim=0).store(gl.load(pointers, mask=(place < length)[:, None], other=0.0))


@gluon.jit
def _produce(descriptors, shared, walk):
    """The copying warps."""
    query_first, query_rest, key_first, key_rest, value = descriptors
    q_first, q_rest, k_first, k_rest, v, ready, free = shared
    start, length, block, query_column, key_column, value_column, values, stride_value = walk
    mbarrier.expect(ready.index(2 * _STAGES), 2 * _HALF * (_FIRST + _REST) * 2)
    for side in gl.static_range(2):
        row = start + block + side * _HALF
        tma.async_copy_global_to_shared(query_first, [row, query_column], ready.index(2 * _STAGES), q_first.index(side))
        tma.async_copy_global_to_shared(
            query_rest, [row, query_column + _FIRST], ready.index(2 * _STAGES), q_rest.index(side)
        )
    for tile in range(block // _KEYS + 1):
        stage = tile % _STAGES
        parity = (tile // _STAGES & 1) ^ 1
        first = tile * _KEYS
        mbarrier.wait(free.index(2 * stage), parity)
        mbarrier.expect(ready.index(2 * stage), _KEYS * (_FIRST + _REST) * 2)
        tma.async_copy_global_to_shared(
            key_first, [start + first, key_column], ready.index(2 * stage), k_first.index(stage)
        )
        tma.async_copy_global_to_shared(
            key_rest, [start + first, key_column + _FIRST], ready.index(2 * stage), k_rest.index(stage)
        )
        mbarrier.wait(free.index(2 * stage + 1), parity)
        if first + _KEYS <= length:
            mbarrier.expect(ready.index(2 * stage + 1), _KEYS * _VALUE * 2)
            tma.async_copy_global_to_shared(
                value, [start + first, value_column], ready.index(2 * stage + 1), v.index(stage)
            )
        else:
            copy_rows(values, v.index(stage), first, length, stride_value, _KEYS, _VALUE)
            fence_async_shared()
            mbarrier.arrive(ready.index(2 * stage + 1), count=1)


@gluon.jit
def _start_scores(q_first, q_rest, k_first, k_rest, ready, tile, SIDE: gl.constexpr):
    stage = tile % _STAGES
    mbarrier.wait(ready.index(2 * stage), tile // _STAGES & 1)
    scores = gl.zeros([_HALF, _KEYS], gl.float32, layout=_SCORES)
    scores = warpgroup_mma(
        q_first.index(SIDE), k_first.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True
    )
    return warpgroup_mma(q_rest.index(SIDE), k_rest.index(stage).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _words(words, tile, num_words, there, MASKED: gl.constexpr):
    """Each row's four words of a tile, of which a thread holds one a row; 0 where there are none."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, _BITS))
    if MASKED:
        return gl.load(words + tile * 4, mask=there[:, None] & (tile * 4 < num_words), other=0)
    else:
        return gl.zeros([_HALF, 4], gl.int32, layout=layout)


@gluon.jit
def _softmax(scores, words, rows, tile, highest, total, scale, MASKED: gl.constexpr, DIAGONAL: gl.constexpr):
    """The probabilities of a tile, the running maximum, its shrinkage and the running sum."""
    if MASKED:
        i = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, _BITS))))
        b = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, _BITS))))
        i = gl.expand_dims(gl.expand_dims(gl.expand_dims(i, 0), 2), 3)
        b = gl.expand_dims(gl.expand_dims(gl.expand_dims(b, 0), 1), 2)
        word = gl.expand_dims(gl.expand_dims(words, 1), 3)
        bits = gl.reshape((word & (gl.full_like(i + b, 1) << (2 * i + b))) != 0, [_HALF, _KEYS])
        scores = gl.where(gl.convert_layout(bits, _SCORES), scores, float("-inf"))
    if DIAGONAL:
        places = tile * _KEYS + gl.arange(0, _KEYS, layout=gl.SliceLayout(0, _SCORES))
        scores = gl.where(rows[:, None] >= places[None, :], scores, float("-inf"))
    higher = gl.maximum(highest, gl.max(scores, axis=1))
    shrink = gl.exp2((highest - higher) * scale)
    shift = higher * scale
    probs = gl.exp2(scores * scale - shift[:, None])
    return probs, higher, shrink, total * shrink + gl.sum(probs, axis=1)


@gluon.jit
def _step(
    shared, words, there, num_words, rows, scale, tile, operand_probs, acc, highest, total,
    SIDE: gl.constexpr, MASKED: gl.constexpr, DIAGONAL: gl.constexpr,
):  # fmt: skip
    """The scores and probabilities of a tile, beside the product with the values of the tile before."""
    q_first, q_rest, k_first, k_rest, v, ready, free = shared
    stage = (tile - 1) % _STAGES
    found = _words(words, tile, num_words, there, MASKED)
    scores = _start_scores(q_first, q_rest, k_first, k_rest, ready, tile, SIDE)
    mbarrier.wait(ready.index(2 * stage + 1), (tile - 1) // _STAGES & 1)
    acc = warpgroup_mma(operand_probs, v.index(stage), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(free.index(2 * (tile % _STAGES)), count=1)
    probs, highest, shrink, total = _softmax(scores, found, rows, tile, highest, total, scale, MASKED, DIAGONAL)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index(2 * stage + 1), count=1)
    acc = acc * shrink[:, None]
    return gl.convert_layout(probs.to(gl.bfloat16), gl.DotOperandLayout(0, _SCORES, 2)), acc, highest, total


@gluon.jit
def _attend(shared, walk, SIDE: gl.constexpr, MASKED: gl.constexpr):
    """One group's work: 64 queries over all tiles; a tile's scores come beside the products of the one before."""
    q_first, q_rest, k_first, k_rest, v, ready, free = shared
    start, length, block, bitmask, out, lse, num_words, num_heads, scale = walk
    layout: gl.constexpr = gl.SliceLayout(1, _SCORES)
    operand: gl.constexpr = gl.DotOperandLayout(0, _SCORES, 2)
    word_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, _BITS))
    rows = block + SIDE * _HALF + gl.arange(0, _HALF, layout=layout)
    word_rows = block + SIDE * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(1, word_layout))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, word_layout))
    words = bitmask + (start + word_rows).to(gl.int64)[:, None] * num_words + lane[None, :]
    there = word_rows < length
    last = block // _KEYS
    highest = gl.full([_HALF], -1.0e30, gl.float32, layout=layout)
    total = gl.zeros([_HALF], gl.float32, layout=layout)
    acc = gl.zeros([_HALF, _VALUE], gl.float32, layout=_SCORES)

    mbarrier.wait(ready.index(2 * _STAGES), 0)
    found = _words(words, 0, num_words, there, MASKED)
    scores = _start_scores(q_first, q_rest, k_first, k_rest, ready, 0, SIDE)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(free.index(0), count=1)
    probs, highest, _, total = _softmax(scores, found, rows, 0, highest, total, scale, MASKED, True)
    operand_probs = gl.convert_layout(probs.to(gl.bfloat16), operand)
    for tile in range(1, last):
        operand_probs, acc, highest, total = _step(
            shared, words, there, num_words, rows, scale, tile, operand_probs, acc, highest, total, SIDE, MASKED, False
        )
    if last > 0:
        operand_probs, acc, highest, total = _step(
            shared, words, there, num_words, rows, scale, last, operand_probs, acc, highest, total, SIDE, MASKED, True
        )
    stage = last % _STAGES
    mbarrier.wait(ready.index(2 * stage + 1), last // _STAGES & 1)
    acc = warpgroup_mma(operand_probs, v.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    acc = acc / gl.where(total > 0, total, 1.0)[:, None]
    row_there = rows < length
    place = lse + (start + rows).to(gl.int64) * num_heads
    gl.store(place, gl.where(total > 0, highest * scale + gl.log2(total), float("-inf")), mask=row_there)
    # No scores are computed any more: the queries' memory serves to write whole rows.
    staged = q_first.index(SIDE)
    staged.store(acc.to(gl.bfloat16))
    gl.barrier()
    target = out + start.to(gl.int64) * (num_heads * _VALUE)
    write_rows(target, staged, block + SIDE * _HALF, length, num_heads * _VALUE, _HALF, _VALUE)


@gluon.jit
def write_rows(target, smem, first, length, stride, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """The inverse of `copy_rows`; rows beyond the length are left out."""
    lanes: gl.constexpr = WIDTH // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    rows = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    for chunk in gl.static_range(ROWS // 16):
        place = first + chunk * 16 + rows
        pointers = target + place.to(gl.int64)[:, None] * stride + columns[None, :]
        gl.store(pointers, smem.slice(chunk * 16, 16, dim=0).load(layout), mask=(place < length)[:, None])


@gluon.jit
def block_of(program, cu_seqlens, num_sequences):
    """As `_rows_of` of `kernels.masked_mha`, for blocks of QUERIES rows."""
    start = 0
    length = 0
    block = 0
    tiles = 0
    before = 0
    tiles_before = 0
    for sequence in range(num_sequences):
        first = gl.load(cu_seqlens + sequence)
        size = gl.load(cu_seqlens + sequence + 1) - first
        blocks = gl.cdiv(size, _KEYS)
        after = before + blocks
        mine = (before <= program) & (program < after)
        start = gl.where(mine, first, start)
        length = gl.where(mine, size, length)
        block = gl.where(mine, (after - 1 - program) * _KEYS, block)
        tiles = gl.where(mine, tiles_before, tiles)
        before = after
        tiles_before += blocks * (blocks + 1) // 2
    return start, length, block, tiles


@gluon.jit(do_not_specialize=["num_sequences"])
def forward_kernel(
    query_first, query_rest, key_first, key_rest, value, values, bitmask, cu_seqlens, out, lse, scale, num_heads,
    num_sequences, num_words, stride_query_head, stride_key_head, stride_value, stride_value_head,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, H). out [N, H, v], lse fp32 [N, H] (base 2, -inf for no keys)."""
    start, length, block, _ = block_of(gl.program_id(0), cu_seqlens, num_sequences)
    if length == 0:
        return
    head = gl.program_id(1)
    q_first = gl.allocate_shared_memory(gl.bfloat16, [2, _HALF, _FIRST], SWIZZLED)
    q_rest = gl.allocate_shared_memory(gl.bfloat16, [2, _HALF, _REST], SWIZZLED)
    k_first = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _KEYS, _FIRST], SWIZZLED)
    k_rest = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _KEYS, _REST], SWIZZLED)
    v = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _KEYS, _VALUE], SWIZZLED)
    # Of stage s: 2 s its keys, 2 s + 1 its values; the last is of the queries.
    ready = mbarrier.allocate_mbarrier(batch=2 * _STAGES + 1)
    free = mbarrier.allocate_mbarrier(batch=2 * _STAGES)
    for i in gl.static_range(2 * _STAGES + 1):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(2 * _STAGES):
        mbarrier.init(free.index(i), count=2)
    shared = (q_first, q_rest, k_first, k_rest, v, ready, free)
    values += start.to(gl.int64) * stride_value + head.to(gl.int64) * stride_value_head
    source = (
        start, length, block, head * stride_query_head, head * stride_key_head, head * stride_value_head, values,
        stride_value,
    )  # fmt: skip
    walk = (start, length, block, bitmask, out + head * _VALUE, lse + head, num_words, num_heads, scale)
    gl.warp_specialize(
        [
            (_attend, (shared, walk, 0, MASKED)),
            (_attend, (shared, walk, 1, MASKED)),
            (_produce, ((query_first, query_rest, key_first, key_rest, value), shared, source)),
        ],
        [4, 4],
        [240, 32],
    )


def fits(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, num_sequences: int) -> bool:
    """Whether these kernels serve such inputs: DeepSeek-V3.2's dimensions in bfloat16, rows of whole 16 bytes."""
    return (
        num_sequences <= MOST_SEQUENCES
        and queries.is_cuda
        and torch.cuda.get_device_capability(queries.device)[0] == 9
        and queries.dtype == keys.dtype == values.dtype == torch.bfloat16
        and (queries.shape[-1], values.shape[-1]) == (FIRST + REST, VALUE)
        and all(part.stride(0) % 8 == part.data_ptr() % 16 == 0 for part in (queries, keys, values))
    )


def descriptor(tensor: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """Of blocks of `rows` rows and `width` columns of a head."""
    span = (tensor.shape[1] - 1) * tensor.stride(1) + tensor.shape[2]
    shape, strides = [tensor.shape[0], span], [tensor.stride(0), 1]
    return TensorDescriptor(tensor, shape, strides, [rows, width], SWIZZLED.value)


def forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ordered: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    """Writes out [N, H, v] and lse fp32 [N, H] (base 2); `scale` is of scores in base 2."""
    num_rows, num_heads, _ = queries.shape
    num_sequences = cu_seqlens.shape[0] - 1
    forward_kernel[(num_rows // QUERIES + num_sequences, num_heads)](
        descriptor(queries, QUERIES // 2, FIRST), descriptor(queries, QUERIES // 2, REST),
        descriptor(keys, KEYS, FIRST), descriptor(keys, KEYS, REST), descriptor(values, KEYS, VALUE), values,
        cu_seqlens if ordered is None else ordered, cu_seqlens, out, lse, scale, num_heads, num_sequences,
        0 if ordered is None else ordered.shape[1], queries.stride(1), keys.stride(1), values.stride(0),
        values.stride(1), MASKED=ordered is not None, num_warps=4,
    )  # fmt: skip
