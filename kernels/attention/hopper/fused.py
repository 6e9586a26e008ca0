"""Attention backward for Hopper, head vectors of 128, in Gluon: dk, dv and dq in one kernel.

As in stay.py, but registers and shared memory have no room for a third group: each of the two groups, which accumulate
dk and dv of 64 keys, also multiplies the ds of both by half of the keys' columns, and adds that to dq in global memory.
"""

from ..._triton import gl, gl_hopper, gluon_jit, tl
from ..shared import place
from .pieces import (
    Tile,
    fetch,
    fetch_both,
    gluon_kernel,
    last_query,
    next_queries,
    queries_from,
    reduce_add,
    weights_of,
)


@gluon_jit
def supply_dk_dv(
    q, k, v, dout, statistics, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, d_tiles, k_full, v_full, q_full, q_free,
    o_full, o_free, b, g, n, first, tiles, H, HEADS: gl.constexpr, KEY_TILES: gl.constexpr, BLOCK_M: gl.constexpr,
    Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr,
):  # fmt: skip
    """Run the role of the one warp: fetch the keys and values, then queries and dout of all HEADS heads, in order."""
    for group in gl.static_range(KEY_TILES):
        fetch(k, b, g, n + group * 64, k_full.index(group), k_tiles.index(group))
    h, row = g * HEADS, first
    for i in range(tiles * HEADS):
        stage = i % Q_STAGES
        gl_hopper.mbarrier.wait(q_free.index(stage), (i // Q_STAGES + 1) & 1)
        fetch_both(q, statistics, 0, b, h, H, row, q_full.index(stage), q_tiles.index(stage), l_tiles.index(stage))
        if i == 0:
            for group in gl.static_range(KEY_TILES):
                fetch(v, b, g, n + group * 64, v_full.index(group), v_tiles.index(group))
        stage = i % O_STAGES
        gl_hopper.mbarrier.wait(o_free.index(stage), (i // O_STAGES + 1) & 1)
        fetch_both(dout, statistics, 1, b, h, H, row, o_full.index(stage), o_tiles.index(stage), d_tiles.index(stage))
        h, row = next_queries(h, row, first, first + tiles * BLOCK_M, HEADS, BLOCK_M)


@gluon_jit
def _gather_all(
    dk_out, dv_out, dq_sum, document_ptr, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, d_tiles, s_tiles, a_tiles,
    k_full, v_full, q_full, q_free, o_full, o_free, s_full, s_free, kv_head, n, first, tiles, T, S, G, window, share,
    factor, scale, BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAPPED: gl.constexpr, HEADS: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr,
    S_STAGES: gl.constexpr,
):  # fmt: skip
    """Run the role of a group of four warps: dk and dv of 64 keys, and half of dq's columns per tile of queries."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    COLUMNS: gl.constexpr = D // 2
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    start = n + GROUP * 64
    until = last_query(gl.minimum(start, S - 1), S, window, document_ptr, DOCUMENTS)
    dk = gl.zeros([64, D], gl.float32, OUT)
    dv = gl.zeros([64, D], gl.float32, OUT)
    blank = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
    nothing = gl.zeros([64, COLUMNS], gl.float32, PART)
    k = k_tiles.index(GROUP).reshape([64, D])
    v = v_tiles.index(GROUP).reshape([64, D])
    for group in gl.static_range(2):
        gl_hopper.mbarrier.wait(k_full.index(group), 0)
    gl_hopper.mbarrier.wait(v_full.index(GROUP), 0)
    total = tiles * HEADS
    head, row = kv_head * HEADS, first
    for i in tl.range(0, total, disable_licm=True):
        q_stage, o_stage, s_stage = i % Q_STAGES, i % O_STAGES, i % S_STAGES
        # scores
        gl_hopper.mbarrier.wait(q_full.index(q_stage), (i // Q_STAGES) & 1)
        queries = q_tiles.index(q_stage).reshape([BLOCK_M, D])
        s = gl_hopper.warpgroup_mma(k, queries.permute([1, 0]), blank, use_acc=False, is_async=True)
        gl_hopper.mbarrier.wait(o_full.index(o_stage), (i // O_STAGES) & 1)
        douts = o_tiles.index(o_stage).reshape([BLOCK_M, D])
        dp = gl_hopper.warpgroup_mma(v, douts.permute([1, 0]), blank, use_acc=False, is_async=True)
        lse = l_tiles.index(q_stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, SCORES))
        s = gl_hopper.warpgroup_mma_wait(1, [s])
        # dv
        p, slope = weights_of(
            s, lse, row + (S - T), start, until, S, window, document_ptr, share, factor, BLOCK_M, BOUNDED, DOCUMENTS,
            SOFTCAPPED, SCORES,
        )  # fmt: skip
        weights = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
        dv = gl_hopper.warpgroup_mma(weights, douts, dv, is_async=True)
        # ds
        delta = d_tiles.index(o_stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, SCORES))
        gl_hopper.mbarrier.wait(s_free.index(s_stage), (i // S_STAGES + 1) & 1)
        dp = gl_hopper.warpgroup_mma_wait(1, [dp])
        differences = (slope * (dp - delta[None, :])).to(gl.bfloat16)
        s_tiles.index(s_stage * 2 + GROUP).store(differences)
        gl_hopper.fence_async_shared()
        gl_hopper.mbarrier.arrive(s_full.index(s_stage))
        ds = gl.convert_layout(differences, WEIGHTS)
        gl_hopper.mbarrier.wait(s_full.index(s_stage), (i // S_STAGES) & 1)
        # dq
        part = nothing
        for group in gl.static_range(2):
            half = s_tiles.index(s_stage * 2 + group)
            other_k = k_tiles.index(group).reshape([64, D])
            other_k = other_k.slice(GROUP * COLUMNS, COLUMNS, dim=1)
            part = gl_hopper.warpgroup_mma(half.permute([1, 0]), other_k, part, use_acc=group > 0, is_async=True)
        # dk, while dq is added
        dk = gl_hopper.warpgroup_mma(ds, queries, dk, is_async=True)
        dv, part, weights = gl_hopper.warpgroup_mma_wait(1, [dv, part, weights])
        gl_hopper.mbarrier.arrive(o_free.index(o_stage))
        gl_hopper.mbarrier.arrive(s_free.index(s_stage))
        gl_hopper.tma.store_wait(0)  # the last tile to be added has been read
        a_tile = a_tiles.index(GROUP)
        a_tile.reshape([64, COLUMNS]).store(part)
        gl_hopper.fence_async_shared()
        reduce_add(dq_sum, [head, row, GROUP * COLUMNS], a_tile)
        dk, ds = gl_hopper.warpgroup_mma_wait(0, [dk, ds])
        gl_hopper.mbarrier.arrive(q_free.index(q_stage))
        head, row = next_queries(head, row, first, first + tiles * BLOCK_M, HEADS, BLOCK_M)
    last = total - 1  # both groups read the keys until dq is complete
    gl_hopper.mbarrier.wait(s_free.index(last % S_STAGES), (last // S_STAGES) & 1)
    # epilogue
    v.store(dv.to(gl.bfloat16))
    k.store((dk * scale).to(gl.bfloat16))
    gl_hopper.fence_async_shared()
    gl_hopper.tma.async_copy_shared_to_global(dv_out, [kv_head // G, kv_head % G, start, 0], v_tiles.index(GROUP))
    gl_hopper.tma.async_copy_shared_to_global(dk_out, [kv_head // G, kv_head % G, start, 0], k_tiles.index(GROUP))
    gl_hopper.tma.store_wait(0)


@gluon_kernel
def attention_bwd_kernel_fused_hopper(
    q, k, v, dout, statistics, document_ptr, dk_out, dv_out, dq_sum, heads, T, S, H, G, window, share, factor, scale,
    BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAPPED: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
    BLOCK_M: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, S_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head -> dk and dv, over the queries of all its heads; adds to dq_sum in fp32."""
    head, block = place(gl.program_id(0), gl.cdiv(S, 128), heads, T * HEADS, D, False)
    b, g = head // G, head % G
    n = block * 128
    first, tiles = queries_from(n, T, S, window, document_ptr, 128, BLOCK_M, BOUNDED, DOCUMENTS)

    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [Q_STAGES, 1, 1, BLOCK_M, D], q.layout)
    o_tiles = gl.allocate_shared_memory(gl.bfloat16, [O_STAGES, 1, 1, BLOCK_M, D], dout.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, 64, D], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, 64, D], v.layout)
    l_tiles = gl.allocate_shared_memory(gl.float32, [Q_STAGES, 1, 1, BLOCK_M], statistics.layout)
    d_tiles = gl.allocate_shared_memory(gl.float32, [O_STAGES, 1, 1, BLOCK_M], statistics.layout)
    s_tiles = gl.allocate_shared_memory(gl.bfloat16, [2 * S_STAGES, 64, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2))
    a_tiles = gl.allocate_shared_memory(gl.float32, [2, 1, BLOCK_M, D // 2], dq_sum.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], gl_hopper.mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], gl_hopper.mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    o_full = gl.allocate_shared_memory(gl.int64, [O_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    o_free = gl.allocate_shared_memory(gl.int64, [O_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    s_full = gl.allocate_shared_memory(gl.int64, [S_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    s_free = gl.allocate_shared_memory(gl.int64, [S_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        gl_hopper.mbarrier.init(k_full.index(group), count=1)
        gl_hopper.mbarrier.init(v_full.index(group), count=1)
    for stage in gl.static_range(Q_STAGES):
        gl_hopper.mbarrier.init(q_full.index(stage), count=1)
        gl_hopper.mbarrier.init(q_free.index(stage), count=2)
    for stage in gl.static_range(O_STAGES):
        gl_hopper.mbarrier.init(o_full.index(stage), count=1)
        gl_hopper.mbarrier.init(o_free.index(stage), count=2)
    for stage in gl.static_range(S_STAGES):
        gl_hopper.mbarrier.init(s_full.index(stage), count=2)
        gl_hopper.mbarrier.init(s_free.index(stage), count=2)
    gl.warp_specialize(
        [
            (_gather_all, (dk_out, dv_out, dq_sum, document_ptr, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, d_tiles,
                           s_tiles, a_tiles, k_full, v_full, q_full, q_free, o_full, o_free, s_full, s_free, head, n,
                           first, tiles, T, S, G, window, share, factor, scale, BOUNDED, DOCUMENTS, SOFTCAPPED, HEADS,
                           0, BLOCK_M, D, Q_STAGES, O_STAGES, S_STAGES)),
            (_gather_all, (dk_out, dv_out, dq_sum, document_ptr, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, d_tiles,
                           s_tiles, a_tiles, k_full, v_full, q_full, q_free, o_full, o_free, s_full, s_free, head, n,
                           first, tiles, T, S, G, window, share, factor, scale, BOUNDED, DOCUMENTS, SOFTCAPPED, HEADS,
                           1, BLOCK_M, D, Q_STAGES, O_STAGES, S_STAGES)),
            (supply_dk_dv, (q, k, v, dout, statistics, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, d_tiles, k_full,
                            v_full, q_full, q_free, o_full, o_free, b, g, n, first, tiles, H, HEADS, 2, BLOCK_M,
                            Q_STAGES, O_STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


# NVIDIA H200, 2026-11-26, at 4 x 4096 x 16 heads of 128.
TILE = Tile(64, 2, 2, 1, 240)
