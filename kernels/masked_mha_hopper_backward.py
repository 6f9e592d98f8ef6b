"""The gradient of packed attention's queries on an H100 or H200, with its warps' roles written out (Gluon).

A program takes 128 queries of one sequence and one head, and walks over tiles of 64 keys, which four warps copy to
shared memory. Two groups of four warps own 64 queries each: they make a tile's probabilities and their gradients, write
both out for the gradients of keys and values, and add the gradients' product with the keys to what they keep in
registers.

Shape letters as in `kernels.masked_mha`.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

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

from kernels.masked_mha_hopper import (
    FIRST,
    QUERIES,
    REST,
    SWIZZLED,
    VALUE,
    block_of,
    copy_rows,
    descriptor,
    write_rows,
)

KEYS, STAGES = 64, 2

_FIRST, _REST, _VALUE = gl.constexpr(FIRST), gl.constexpr(REST), gl.constexpr(VALUE)
_OWN, _HALF, _KEYS, _STAGES = (
    gl.constexpr(QUERIES),
    gl.constexpr(QUERIES // 2),
    gl.constexpr(KEYS),
    gl.constexpr(STAGES),
)
_LOG2_E = gl.constexpr(1.4426950408889634)
_NARROW = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
_WIDE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
# _NARROW with its 64 columns c = 8 i + 2 q + b as [i, q, b]: a thread has all i and b of one q.
_BITS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [8, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        lane_bases=[[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        warp_bases=[[16, 0, 0, 0], [32, 0, 0, 0]],
        block_bases=[],
        shape=[64, 8, 4, 2],
    )
)


@gluon.jit
def _copy_queries(descriptors, shared, walk):
    """Queries and upstream gradients of both groups."""
    query_first, query_rest, _, _, _, upstream = descriptors
    q_first, q_rest, d_out, _, _, _, _, _, ready, _ = shared
    start, length, block, columns, pointers, strides = walk
    query_column, _, _, upstream_column = columns
    queries, _, _, grad_out = pointers
    stride_query, _, _, stride_upstream = strides
    bar = ready.index(_STAGES)
    if block + _OWN <= length:
        mbarrier.expect(bar, _OWN * (_FIRST + _REST + _VALUE) * 2)
        for side in gl.static_range(2):
            row = start + block + side * _HALF
            tma.async_copy_global_to_shared(query_first, [row, query_column], bar, q_first.index(side))
            tma.async_copy_global_to_shared(query_rest, [row, query_column + _FIRST], bar, q_rest.index(side))
            tma.async_copy_global_to_shared(upstream, [row, upstream_column], bar, d_out.index(side))
    else:
        for side in gl.static_range(2):
            row = block + side * _HALF
            copy_rows(queries, q_first.index(side), row, length, stride_query, _HALF, _FIRST)
            copy_rows(queries + _FIRST, q_rest.index(side), row, length, stride_query, _HALF, _REST)
            copy_rows(grad_out, d_out.index(side), row, length, stride_upstream, _HALF, _VALUE)
        fence_async_shared()
        mbarrier.arrive(bar, count=1)


@gluon.jit
def _produce(descriptors, shared, walk):
    """The copying warps."""
    _, _, key_first, key_rest, value, _ = descriptors
    _, _, _, k_first, k_rest, v, _, _, ready, free = shared
    start, length, block, columns, pointers, strides = walk
    _, key_column, value_column, _ = columns
    _, keys, values, _ = pointers
    _, stride_key, stride_value, _ = strides
    _copy_queries(descriptors, shared, walk)
    for tile in range((block + _OWN) // _KEYS):
        stage = tile % _STAGES
        bar = ready.index(stage)
        first = tile * _KEYS
        mbarrier.wait(free.index(stage), (tile // _STAGES & 1) ^ 1)
        if first + _KEYS <= length:
            mbarrier.expect(bar, _KEYS * (_FIRST + _REST + _VALUE) * 2)
            tma.async_copy_global_to_shared(key_first, [start + first, key_column], bar, k_first.index(stage))
            tma.async_copy_global_to_shared(key_rest, [start + first, key_column + _FIRST], bar, k_rest.index(stage))
            tma.async_copy_global_to_shared(value, [start + first, value_column], bar, v.index(stage))
        else:
            copy_rows(keys, k_first.index(stage), first, length, stride_key, _KEYS, _FIRST)
            copy_rows(keys + _FIRST, k_rest.index(stage), first, length, stride_key, _KEYS, _REST)
            copy_rows(values, v.index(stage), first, length, stride_value, _KEYS, _VALUE)
            fence_async_shared()
            mbarrier.arrive(bar, count=1)


@gluon.jit
def _allowed(words, tile, num_words, there):
    """The flags of a tile's pairs, from each row's four words, of which a thread holds one a row."""
    group = tile // 2 * 4
    word = gl.load(words + group, mask=there[:, None] & (group < num_words), other=0) >> (tile % 2 * 16)
    i = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, _BITS))))
    b = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, _BITS))))
    i = gl.expand_dims(gl.expand_dims(gl.expand_dims(i, 0), 2), 3)
    b = gl.expand_dims(gl.expand_dims(gl.expand_dims(b, 0), 1), 2)
    word = gl.expand_dims(gl.expand_dims(word, 1), 3)
    bits = gl.reshape((word & (gl.full_like(i + b, 1) << (2 * i + b))) != 0, [_HALF, _KEYS])
    return gl.convert_layout(bits, _NARROW)


@gluon.jit
def _step(
    shared, pairs, words, there, num_words, rows, row_lse, row_delta, scale, tile, grad_first, grad_rest,
    SIDE: gl.constexpr, MASKED: gl.constexpr, DIAGONAL: gl.constexpr,
):  # fmt: skip
    """One tile. Its product with the keys is waited for at the end: were it under way over the loop's edge, ptxas would
    wait for every single one of all products.
    """
    q_first, q_rest, d_out, k_first, k_rest, v, staged_probs, staged_scores, ready, free = shared
    probs_out, scores_out, pair_row = pairs
    stage = tile % _STAGES
    mbarrier.wait(ready.index(stage), tile // _STAGES & 1)
    scores = gl.zeros([_HALF, _KEYS], gl.float32, layout=_NARROW)
    scores = warpgroup_mma(
        q_first.index(SIDE), k_first.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True
    )
    scores = warpgroup_mma(q_rest.index(SIDE), k_rest.index(stage).permute((1, 0)), scores, is_async=True)
    d_probs = gl.zeros([_HALF, _KEYS], gl.float32, layout=_NARROW)
    d_probs = warpgroup_mma(d_out.index(SIDE), v.index(stage).permute((1, 0)), d_probs, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    probs = gl.exp2(scores * (scale * _LOG2_E) - row_lse[:, None])
    if MASKED:
        probs = gl.where(_allowed(words, tile, num_words, there), probs, 0.0)
    if DIAGONAL:
        places = tile * _KEYS + gl.arange(0, _KEYS, layout=gl.SliceLayout(0, _NARROW))
        probs = gl.where(rows[:, None] >= places[None, :], probs, 0.0)
    # What the tile before wrote out has left its place.
    tma.store_wait(0)
    gl.barrier()
    staged_probs.index(SIDE).store(probs.to(gl.bfloat16))
    d_probs = warpgroup_mma_wait(0, deps=[d_probs])
    d_scores = (probs * (d_probs * scale - row_delta[:, None])).to(gl.bfloat16)
    staged_scores.index(SIDE).store(d_scores)
    fence_async_shared()
    gl.barrier()
    row = pair_row + tile // 2 * _OWN + SIDE * _HALF
    tma.async_copy_shared_to_global(probs_out, [row, tile % 2 * _KEYS], staged_probs.index(SIDE))
    tma.async_copy_shared_to_global(scores_out, [row, tile % 2 * _KEYS], staged_scores.index(SIDE))
    wide = gl.convert_layout(d_scores, gl.DotOperandLayout(0, _WIDE, 2))
    narrow = gl.convert_layout(d_scores, gl.DotOperandLayout(0, _NARROW, 2))
    grad_first = warpgroup_mma(wide, k_first.index(stage), grad_first, is_async=True)
    grad_rest = warpgroup_mma(narrow, k_rest.index(stage), grad_rest, is_async=True)
    grad_first, grad_rest = warpgroup_mma_wait(0, deps=[grad_first, grad_rest])
    mbarrier.arrive(free.index(stage), count=1)
    return grad_first, grad_rest


@gluon.jit
def _attend(shared, pairs, walk, SIDE: gl.constexpr, MASKED: gl.constexpr):
    """One group's work: 64 queries over all tiles."""
    q_first, q_rest, _, _, _, _, _, _, ready, _ = shared
    start, length, block, bitmask, lse, delta, grad_queries, num_words, num_heads, scale = walk
    layout: gl.constexpr = gl.SliceLayout(1, _NARROW)
    word_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, _BITS))
    first = block + SIDE * _HALF
    rows = first + gl.arange(0, _HALF, layout=layout)
    word_rows = first + gl.arange(0, _HALF, layout=gl.SliceLayout(1, word_layout))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, word_layout))
    words = bitmask + (start + word_rows).to(gl.int64)[:, None] * num_words + lane[None, :]
    there = word_rows < length
    place = (start + rows).to(gl.int64) * num_heads
    row_lse = gl.load(lse + place, mask=rows < length, other=0.0)
    row_lse = gl.where(row_lse == float("-inf"), 0.0, row_lse)
    row_delta = gl.load(delta + place, mask=rows < length, other=0.0) * scale
    grad_first = gl.zeros([_HALF, _FIRST], gl.float32, layout=_WIDE)
    grad_rest = gl.zeros([_HALF, _REST], gl.float32, layout=_NARROW)
    mbarrier.wait(ready.index(_STAGES), 0)
    whole = block // _KEYS
    for tile in range(whole):
        grad_first, grad_rest = _step(
            shared, pairs, words, there, num_words, rows, row_lse, row_delta, scale, tile, grad_first, grad_rest,
            SIDE, MASKED, False,
        )  # fmt: skip
    for tile in range(whole, whole + _OWN // _KEYS):
        grad_first, grad_rest = _step(
            shared, pairs, words, there, num_words, rows, row_lse, row_delta, scale, tile, grad_first, grad_rest,
            SIDE, MASKED, True,
        )  # fmt: skip
    tma.store_wait(0)
    # No scores are computed any more: the queries' memory serves to write whole rows.
    q_first.index(SIDE).store(grad_first.to(gl.bfloat16))
    q_rest.index(SIDE).store(grad_rest.to(gl.bfloat16))
    gl.barrier()
    stride = num_heads * (_FIRST + _REST)
    target = grad_queries + start.to(gl.int64) * stride
    write_rows(target, q_first.index(SIDE), first, length, stride, _HALF, _FIRST)
    write_rows(target + _FIRST, q_rest.index(SIDE), first, length, stride, _HALF, _REST)


@gluon.jit(do_not_specialize=["first_head", "num_tiles", "num_sequences"])
def grad_queries_kernel(
    query_first, query_rest, key_first, key_rest, value, upstream, probs_out, scores_out, queries, keys, values,
    grad_out, bitmask, cu_seqlens, lse, delta, grad_queries, scale, first_head, num_tiles, num_heads, num_sequences,
    num_words, stride_query, stride_query_head, stride_key, stride_key_head, stride_value, stride_value_head,
    MASKED: gl.constexpr,
):  # fmt: skip
    """As `_grad_queries_kernel` of `kernels.masked_mha`."""
    start, length, block, before = block_of(gl.program_id(0), cu_seqlens, num_sequences)
    if length == 0:
        return
    head = first_head + gl.program_id(1)
    q_first = gl.allocate_shared_memory(gl.bfloat16, [2, _HALF, _FIRST], SWIZZLED)
    q_rest = gl.allocate_shared_memory(gl.bfloat16, [2, _HALF, _REST], SWIZZLED)
    d_out = gl.allocate_shared_memory(gl.bfloat16, [2, _HALF, _VALUE], SWIZZLED)
    k_first = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _KEYS, _FIRST], SWIZZLED)
    k_rest = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _KEYS, _REST], SWIZZLED)
    v = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, _KEYS, _VALUE], SWIZZLED)
    staged_probs = gl.allocate_shared_memory(gl.bfloat16, [2, _HALF, _KEYS], SWIZZLED)
    staged_scores = gl.allocate_shared_memory(gl.bfloat16, [2, _HALF, _KEYS], SWIZZLED)
    # The last is of the queries.
    ready = mbarrier.allocate_mbarrier(batch=_STAGES + 1)
    free = mbarrier.allocate_mbarrier(batch=_STAGES)
    for i in gl.static_range(_STAGES + 1):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(_STAGES):
        mbarrier.init(free.index(i), count=2)
    shared = (q_first, q_rest, d_out, k_first, k_rest, v, staged_probs, staged_scores, ready, free)
    order = block // _OWN
    pair_row = (gl.program_id(1) * num_tiles + before + order * (order + 1) // 2) * _OWN
    row, wide = start.to(gl.int64), head.to(gl.int64)
    columns = (head * stride_query_head, head * stride_key_head, head * stride_value_head, head * _VALUE)
    pointers = (
        queries + row * stride_query + wide * stride_query_head,
        keys + row * stride_key + wide * stride_key_head,
        values + row * stride_value + wide * stride_value_head,
        grad_out + (row * num_heads + wide) * _VALUE,
    )
    strides = (stride_query, stride_key, stride_value, num_heads * _VALUE)
    source = (start, length, block, columns, pointers, strides)
    grad_queries += wide * (_FIRST + _REST)
    walk = (start, length, block, bitmask, lse + head, delta + head, grad_queries, num_words, num_heads, scale)
    pairs = (probs_out, scores_out, pair_row)
    gl.warp_specialize(
        [
            (_attend, (shared, pairs, walk, 0, MASKED)),
            (_attend, (shared, pairs, walk, 1, MASKED)),
            (_produce, ((query_first, query_rest, key_first, key_rest, value, upstream), shared, source)),
        ],
        [4, 4],
        [232, 40],
    )


def grad_queries(
    queries, keys, values, ordered, cu_seqlens, grad_out, lse, delta, probs, d_scores, out, scale, first, heads,
    num_tiles,
) -> None:  # fmt: skip
    """Writes the gradient of the queries of heads [first, first + heads) to out [N, H, d], and the probabilities and
    their gradients to probs and d_scores [heads, num_tiles, QUERIES, QUERIES].
    """
    num_rows, num_heads, _ = queries.shape
    num_sequences = cu_seqlens.shape[0] - 1
    shape = [heads * num_tiles * QUERIES, QUERIES]
    pairs = [
        TensorDescriptor(part, shape, [QUERIES, 1], [QUERIES // 2, KEYS], SWIZZLED.value) for part in (probs, d_scores)
    ]
    grad_queries_kernel[(num_rows // QUERIES + num_sequences, heads)](
        descriptor(queries, QUERIES // 2, FIRST), descriptor(queries, QUERIES // 2, REST),
        descriptor(keys, KEYS, FIRST), descriptor(keys, KEYS, REST), descriptor(values, KEYS, VALUE),
        descriptor(grad_out, QUERIES // 2, VALUE), *pairs, queries, keys, values, grad_out,
        cu_seqlens if ordered is None else ordered, cu_seqlens, lse, delta, out, scale, first,
        num_tiles, num_heads, num_sequences, 0 if ordered is None else ordered.shape[1], *queries.stride()[:2],
        *keys.stride()[:2], *values.stride()[:2], MASKED=ordered is not None, num_warps=4,
    )  # fmt: skip
