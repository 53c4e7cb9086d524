"""The backward pass of attention for few keys, written in Gluon for GPUs of sm_90.

:mod:`jevt_kernels.attention_backward` says what it computes, and calls it.

A program takes (batch, head) after (batch, head), in steps of the number of programs. Of each it
takes *tiles* of 256 keys, and for each tile all *blocks* of 32 queries. Its warps have four tasks:

* two groups of four warps multiply, each its half of the keys. dK and dV of its 128 keys stay in
  its registers over all blocks. Of dQ group 0 gives its part to group 1, which adds its own, and
  that of the tiles before, and stores the sum;
* one warp asks for what the others need: K and V of the next tile during this one, and Q, dO, O
  and the logarithms of blocks as far ahead as there are buffers;
* one warp adds up dO∘O along the head dimension, block by block.

Scores and their gradient are [keys, queries] in registers, so that they are the left operands of
dV += P·dO and dK += dS·Q as they are; dQᵀ = Kᵀ·dS reads dS from shared memory.

=============  =====  ===========================  ================================================
barrier        slots  who arrives                  it is waited for
=============  =====  ===========================  ================================================
``kv_full``    2      the copy                     by both groups before a tile
``kv_free``    2      both groups                  by the loading warp: dK and dV of the tile
                                                   before, stored from its K's and V's place, have
                                                   left
``q_full``     4      the copies                   by both groups and the adding warp
``q_free``     4      both groups, the adding      by the loading warp
                      warp
``delta_full`` 4      the adding warp              by both groups
``sum_full``   2      group 0                      by group 1: group 0's part of dQ is there
``sum_free``   2      group 1                      by group 0: it has been read
=============  =====  ===========================  ================================================

The sums of dO∘O need no barrier of their own to be overwritten: ``q_full`` of the slot's next block
says that both groups were done with this one.

Shared memory, in KiB: K and V 128, Q, dO and O of four blocks 48, dS 16, group 0's dQ 16, dQ on its
way out 4, vectors and barriers 1: 213 of 227.
"""

# Triton compiles these functions: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

KEYS = gl.constexpr(256)  # of a tile
HALF = gl.constexpr(128)  # keys of a group of warps
QUERIES = gl.constexpr(32)  # of a block
WIDTH = gl.constexpr(64)  # of a head
STAGES = gl.constexpr(4)  # blocks whose operands are in shared memory
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _advance(slot, phase, slots: gl.constexpr):
    """The next slot of a ring, and the phase of its barriers."""
    slot += 1
    phase = tl.where(slot == slots, phase ^ 1, phase)
    slot = tl.where(slot == slots, 0, slot)
    return slot, phase


@gluon.jit
def _load_tile(k_desc, v_desc, k_tile, v_tile, barrier, head, part, heads: gl.constexpr):
    """Asks for K and V of a tile."""
    batch = head // heads
    column = head % heads * WIDTH
    mbarrier.expect(barrier, 2 * 2 * KEYS * WIDTH)
    start = part * KEYS
    tma.async_copy_global_to_shared(k_desc, [batch, start, column], barrier, k_tile)
    tma.async_copy_global_to_shared(v_desc, [batch, start, column], barrier, v_tile)


@gluon.jit
def _load(
    operands,
    buffers,
    barriers,
    heads: gl.constexpr,
    total: gl.constexpr,
    blocks: gl.constexpr,
    parts: gl.constexpr,
    programs: gl.constexpr,
):
    """The loading warp."""
    q_desc, k_desc, v_desc, o_desc, do_desc, lse_desc = operands
    ks, vs, qs, dos, os, lses = buffers
    kv_full, kv_free, q_full, q_free = barriers
    # The block with which the next tile is asked for: the groups give its buffers free by then.
    asked: gl.constexpr = 2 if blocks > 2 else blocks - 1
    slot = 0
    phase = 1
    kv = 0
    kv_phase = 1
    first = tl.program_id(0)
    _load_tile(k_desc, v_desc, ks.index(0), vs.index(0), kv_full.index(0), first, 0, heads)
    for head in range(first, total, programs):
        batch = head // heads
        column = head % heads * WIDTH
        for part in range(parts):
            for block in range(blocks):
                start = block * QUERIES
                mbarrier.wait(q_free.index(slot), phase)
                full = q_full.index(slot)
                mbarrier.expect(full, 3 * 2 * QUERIES * WIDTH + 4 * QUERIES)
                at = head * (blocks * QUERIES) + start
                tma.async_copy_global_to_shared(
                    q_desc, [batch, start, column], full, qs.index(slot)
                )
                tma.async_copy_global_to_shared(lse_desc, [at], full, lses.index(slot))
                tma.async_copy_global_to_shared(
                    do_desc, [batch, start, column], full, dos.index(slot)
                )
                tma.async_copy_global_to_shared(
                    o_desc, [batch, start, column], full, os.index(slot)
                )
                slot, phase = _advance(slot, phase, STAGES)
                if block == asked:
                    kv, kv_phase = _advance(kv, kv_phase, 2)
                    next_head = tl.where(part == parts - 1, head + programs, head)
                    if next_head < total:
                        mbarrier.wait(kv_free.index(kv), kv_phase)
                        k_tile, v_tile = ks.index(kv), vs.index(kv)
                        next_part = (part + 1) % parts
                        full = kv_full.index(kv)
                        _load_tile(
                            k_desc, v_desc, k_tile, v_tile, full, next_head, next_part, heads
                        )


@gluon.jit
def _add_up(
    buffers,
    barriers,
    total: gl.constexpr,
    blocks: gl.constexpr,
    parts: gl.constexpr,
    programs: gl.constexpr,
):
    """The adding warp: sums of dO∘O along the head dimension, 8 queries at a time."""
    dos, os, deltas = buffers
    q_full, q_free, delta_full = barriers
    rows: gl.constexpr = 8
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [1, 1], [1, 0])
    slot = 0
    phase = 0
    for _ in range(tl.program_id(0), total, programs):
        for _ in range(parts * blocks):
            mbarrier.wait(q_full.index(slot), phase)
            o_block = os.index(slot).reshape([QUERIES, WIDTH])
            do_block = dos.index(slot).reshape([QUERIES, WIDTH])
            for i in gl.static_range(QUERIES // rows):
                o = o_block.slice(rows * i, rows, 0).load(layout).to(tl.float32)
                do = do_block.slice(rows * i, rows, 0).load(layout).to(tl.float32)
                deltas.index(slot).slice(rows * i, rows, 0).store(tl.sum(o * do, axis=1))
            tl.debug_barrier()
            mbarrier.arrive(delta_full.index(slot))
            mbarrier.arrive(q_free.index(slot))
            slot, phase = _advance(slot, phase, STAGES)


@gluon.jit
def _scores(k, q_block):
    """Starts K·Qᵀ: [keys of a group, queries]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    q = q_block.reshape([QUERIES, WIDTH]).permute((1, 0))
    zeros = gl.zeros((HALF, QUERIES), tl.float32, layout)
    return warpgroup_mma(k, q, zeros, use_acc=False, is_async=True)


@gluon.jit
def _half(tiles, kv, group: gl.constexpr):
    """The rows of a tile of K or V that are a group's."""
    return tiles.index(kv).reshape([KEYS, WIDTH]).slice(group * HALF, HALF, 0)


@gluon.jit
def _multiply(
    group: gl.constexpr,
    results,
    scratch,
    buffers,
    barriers,
    scale: gl.constexpr,
    heads: gl.constexpr,
    keys: gl.constexpr,
    total: gl.constexpr,
    blocks: gl.constexpr,
    parts: gl.constexpr,
    programs: gl.constexpr,
    ahead: gl.constexpr,
):
    """A group of warps that multiplies; with ``ahead`` the next block's scores are under way early.

    They are then computed beside dK and dQ of this block, which takes registers.
    """
    dq_desc, dk_desc, dv_desc = results
    ks, vs, qs, dos, lses, deltas, ds_halves, sums, dq_block = buffers
    kv_full, kv_free, q_full, q_free, delta_full, sum_full, sum_free = barriers
    dtype: gl.constexpr = dq_desc.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    thin: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    lhs: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    rows: gl.constexpr = gl.SliceLayout(1, thin)
    columns: gl.constexpr = gl.SliceLayout(0, thin)
    ragged: gl.constexpr = keys % KEYS != 0
    # The block in which what the tile before has stored is waited for.
    released: gl.constexpr = 1 if blocks > 1 else 0
    slot = 0
    phase = 0
    kv = 0
    kv_phase = 0
    hand = 0
    hand_phase = 0
    tiles = 0
    first = tl.program_id(0)
    ds_half = ds_halves.index(group)
    no_dq = gl.zeros((WIDTH, QUERIES), tl.float32, thin)
    if ahead:
        mbarrier.wait(kv_full.index(0), 0)
        mbarrier.wait(q_full.index(0), 0)
        s = _scores(_half(ks, 0, group), qs.index(0))
    for head in range(first, total, programs):
        batch = head // heads
        column = head % heads * WIDTH
        for part in range(parts):
            k = _half(ks, kv, group)
            v = _half(vs, kv, group)
            dk = gl.zeros((HALF, WIDTH), tl.float32, wide)
            dv = gl.zeros((HALF, WIDTH), tl.float32, wide)
            start_key = part * KEYS + group * HALF
            if not ahead:
                mbarrier.wait(kv_full.index(kv), kv_phase)
            for block in range(blocks):
                start = block * QUERIES
                q = qs.index(slot).reshape([QUERIES, WIDTH])
                do = dos.index(slot).reshape([QUERIES, WIDTH])
                if not ahead:
                    mbarrier.wait(q_full.index(slot), phase)
                    s = _scores(k, qs.index(slot))
                lse = lses.index(slot).load(columns) * LOG2_E
                score = warpgroup_mma_wait(0, deps=(s,))
                dp = _scores(v, dos.index(slot))
                p = tl.exp2(score * (scale * LOG2_E) - tl.expand_dims(lse, 0))
                if ragged:
                    seen = gl.arange(0, HALF, rows) < keys - start_key
                    p = tl.where(tl.expand_dims(seen, 1), p, 0.0)
                p_lhs = gl.convert_layout(p.to(dtype), lhs)
                dv = warpgroup_mma(p_lhs, do, dv, is_async=True)
                mbarrier.wait(delta_full.index(slot), phase)
                dp = warpgroup_mma_wait(1, deps=(dp,))
                delta = deltas.index(slot).load(columns)
                ds = (p * (dp - tl.expand_dims(delta, 0))).to(dtype)
                ds_half.store(ds)
                fence_async_shared()
                tl.debug_barrier()
                if block == released:
                    tma.store_wait(0)
                    mbarrier.arrive(kv_free.index(kv ^ 1), pred=tiles > 0)
                dk = warpgroup_mma(gl.convert_layout(ds, lhs), q, dk, is_async=True)
                dq = warpgroup_mma(k.permute((1, 0)), ds_half, no_dq, use_acc=False, is_async=True)
                if parts > 1 and group == 1:
                    own = tl.expand_dims(gl.arange(0, WIDTH, rows) * QUERIES, 1)
                    own = own + tl.expand_dims(gl.arange(0, QUERIES, columns), 0)
                    held = scratch + (first * blocks * QUERIES + start) * WIDTH + own
                    before = tl.load(held, mask=part > 0, other=0.0)
                next_slot, next_phase = _advance(slot, phase, STAGES)
                if ahead:
                    # Of the next tile after the last block; after the last of all, of nothing.
                    last = block == blocks - 1
                    more = (block < blocks - 1) | (part < parts - 1) | (head + programs < total)
                    next_kv = tl.where(last, kv ^ 1, kv)
                    next_kv_phase = tl.where(last & (kv == 1), kv_phase ^ 1, kv_phase)
                    mbarrier.wait(kv_full.index(next_kv), next_kv_phase, pred=last & more)
                    mbarrier.wait(q_full.index(next_slot), next_phase, pred=more)
                    s = _scores(_half(ks, next_kv, group), qs.index(next_slot))
                    dv, dk, dq = warpgroup_mma_wait(1, deps=(dv, dk, dq))
                else:
                    dv, dk, dq = warpgroup_mma_wait(0, deps=(dv, dk, dq))
                tl.debug_barrier()
                mbarrier.arrive(q_free.index(slot))
                if group == 0:
                    mbarrier.wait(sum_free.index(hand), hand_phase ^ 1)
                    sums.index(hand).store(dq)
                    tl.debug_barrier()
                    mbarrier.arrive(sum_full.index(hand))
                else:
                    mbarrier.wait(sum_full.index(hand), hand_phase)
                    dq += sums.index(hand).load(thin)
                    tl.debug_barrier()
                    mbarrier.arrive(sum_free.index(hand))
                    if parts > 1:
                        dq += before
                        tl.store(held, dq, mask=part < parts - 1)
                    if part == parts - 1:
                        tma.store_wait(0)
                        tl.debug_barrier()
                        out = dq_block.reshape([QUERIES, WIDTH]).permute((1, 0))
                        out.store((dq * scale).to(dtype))
                        fence_async_shared()
                        tl.debug_barrier()
                        tma.async_copy_shared_to_global(dq_desc, [batch, start, column], dq_block)
                hand, hand_phase = _advance(hand, hand_phase, 2)
                slot = next_slot
                phase = next_phase
            # All that reads this half of K and V is done: dK and dV take their place.
            v.store(dv.to(dtype))
            k.store((dk * scale).to(dtype))
            fence_async_shared()
            tl.debug_barrier()
            at = [batch, start_key, column]
            dv_half = vs.index(kv).slice(group * HALF, HALF, 1)
            dk_half = ks.index(kv).slice(group * HALF, HALF, 1)
            tma.async_copy_shared_to_global(dv_desc, at, dv_half)
            tma.async_copy_shared_to_global(dk_desc, at, dk_half)
            tiles += 1
            kv, kv_phase = _advance(kv, kv_phase, 2)
    if ahead:
        warpgroup_mma_wait(0, deps=(s,))
    tma.store_wait(0)


@gluon.jit
def attention_backward(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    do_desc,
    lse_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    scratch,
    scale: gl.constexpr,
    heads: gl.constexpr,
    total: gl.constexpr,
    queries: gl.constexpr,
    keys: gl.constexpr,
    programs: gl.constexpr,
    ahead: gl.constexpr,
):
    """The kernel: buffers, barriers, and which warps run which function."""
    dtype: gl.constexpr = q_desc.dtype
    blocks: gl.constexpr = (queries + QUERIES - 1) // QUERIES
    parts: gl.constexpr = (keys + KEYS - 1) // KEYS
    allocate: gl.constexpr = gl.allocate_shared_memory
    ks = allocate(dtype, [2, 1, KEYS, WIDTH], k_desc.layout)
    vs = allocate(dtype, [2, 1, KEYS, WIDTH], v_desc.layout)
    qs = allocate(dtype, [STAGES, 1, QUERIES, WIDTH], q_desc.layout)
    dos = allocate(dtype, [STAGES, 1, QUERIES, WIDTH], do_desc.layout)
    os = allocate(dtype, [STAGES, 1, QUERIES, WIDTH], o_desc.layout)
    lses = allocate(tl.float32, [STAGES, QUERIES], lse_desc.layout)
    deltas = allocate(tl.float32, [STAGES, QUERIES], lse_desc.layout)
    ds_halves = allocate(dtype, [2, HALF, QUERIES], gl.NVMMASharedLayout(64, 16, 2))
    sums = allocate(tl.float32, [2, WIDTH, QUERIES], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    dq_block = allocate(dtype, [1, QUERIES, WIDTH], dq_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = allocate(tl.int64, [2, 1], barrier)
    kv_free = allocate(tl.int64, [2, 1], barrier)
    q_full = allocate(tl.int64, [STAGES, 1], barrier)
    q_free = allocate(tl.int64, [STAGES, 1], barrier)
    delta_full = allocate(tl.int64, [STAGES, 1], barrier)
    sum_full = allocate(tl.int64, [2, 1], barrier)
    sum_free = allocate(tl.int64, [2, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_free.index(i), count=2)
        mbarrier.init(sum_full.index(i), count=1)
        mbarrier.init(sum_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=3)
        mbarrier.init(delta_full.index(i), count=1)
    operands = (q_desc, k_desc, v_desc, o_desc, do_desc, lse_desc)
    results = (dq_desc, dk_desc, dv_desc)
    loaded = (ks, vs, qs, dos, os, lses)
    read = (ks, vs, qs, dos, lses, deltas, ds_halves, sums, dq_block)
    loading = (kv_full, kv_free, q_full, q_free)
    adding = (q_full, q_free, delta_full)
    every = (kv_full, kv_free, q_full, q_free, delta_full, sum_full, sum_free)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    results,
                    scratch,
                    read,
                    every,
                    scale,
                    heads,
                    keys,
                    total,
                    blocks,
                    parts,
                    programs,
                    ahead,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    results,
                    scratch,
                    read,
                    every,
                    scale,
                    heads,
                    keys,
                    total,
                    blocks,
                    parts,
                    programs,
                    ahead,
                ),
            ),
            (_load, (operands, loaded, loading, heads, total, blocks, parts, programs)),
            (_add_up, ((dos, os, deltas), adding, total, blocks, parts, programs)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
