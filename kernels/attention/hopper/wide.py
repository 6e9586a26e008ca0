"""Attention backward for Hopper, head vectors of 256, in Gluon: dk, dv and dq in one kernel.

Registers have room for one accumulator of 64 x 256 in a group of four warps, so that the two groups share the work on
64 keys: one computes the weights and dv, the other dp, ds and dk. They hand each other weights and ds in shared memory.
As in fused.py each multiplies ds by half of the keys' columns and adds that to dq in global memory; in two parts, the
second in the next iteration, since shared memory holds one part of each group.

The hand-overs order all else. Weights are given when the scores are done, and so is the dq of the last tile, whose ds
may be overwritten; ds is given when dp is done and the weights are read. So the group for dk alone gives back queries,
and the other alone dout.
"""

from ..._triton import gl, gl_hopper, gluon_jit, tl
from ..shared import place
from .fused import supply_dk_dv
from .pieces import Tile, gluon_kernel, last_query, next_queries, queries_from, reduce_add, weights_of


@gluon_jit
def _send(dq_sum, head, row, column, part, a_tile, BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr):
    """Add a part of dq in global memory, once the last one has left the tile of shared memory."""
    gl_hopper.tma.store_wait(0)
    a_tile.reshape([BLOCK_M, COLUMNS]).store(part)
    gl_hopper.fence_async_shared()
    reduce_add(dq_sum, [head, row, column], a_tile)


@gluon_jit
def _gather_dv(
    dv_out, dq_sum, document_ptr, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, p_tiles, s_tiles, a_tiles, k_full,
    q_full, q_free, o_full, o_free, p_full, s_full, k_free, kv_head, n, first, tiles, T, S, G, window, share, factor,
    BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAPPED: gl.constexpr, HEADS: gl.constexpr,
    BLOCK_M: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr,
):  # fmt: skip
    """Run the role of the first group of four warps: weights and dv of 64 keys, and the first half of dq's columns."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    COLUMNS: gl.constexpr = D // 4  # of dq in a part
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    dv = gl.zeros([64, D], gl.float32, OUT)
    blank = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
    nothing = gl.zeros([BLOCK_M, COLUMNS], gl.float32, PART)
    part = nothing
    k = k_tiles.index(0).reshape([64, D])
    a_tile = a_tiles.index(0)
    until = last_query(gl.minimum(n, S - 1), S, window, document_ptr, DOCUMENTS)
    gl_hopper.mbarrier.wait(k_full.index(0), 0)
    head, row = kv_head * HEADS, first
    last_head, last_row = head, row
    for i in tl.range(0, tiles * HEADS, disable_licm=True):
        q_stage, o_stage = i % Q_STAGES, i % O_STAGES
        # scores, while the second part of the last dq is added
        gl_hopper.mbarrier.wait(q_full.index(q_stage), (i // Q_STAGES) & 1)
        queries = q_tiles.index(q_stage).reshape([BLOCK_M, D])
        s = gl_hopper.warpgroup_mma(k, queries.permute([1, 0]), blank, use_acc=False, is_async=True)
        if i > 0:
            _send(dq_sum, last_head, last_row, COLUMNS, part, a_tile, BLOCK_M, COLUMNS)
        lse = l_tiles.index(q_stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, SCORES))
        s = gl_hopper.warpgroup_mma_wait(0, [s])
        # weights, for the other group too
        p, slope = weights_of(
            s, lse, row + (S - T), n, until, S, window, document_ptr, share, factor, BLOCK_M, BOUNDED, DOCUMENTS,
            SOFTCAPPED, SCORES,
        )  # fmt: skip
        p_tiles.index(0).store(slope.to(gl.bfloat16))
        gl_hopper.mbarrier.arrive(p_full.index(0))
        # dv
        weights = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
        gl_hopper.mbarrier.wait(o_full.index(o_stage), (i // O_STAGES) & 1)
        douts = o_tiles.index(o_stage).reshape([BLOCK_M, D])
        dv = gl_hopper.warpgroup_mma(weights, douts, dv, is_async=True)
        # dq
        gl_hopper.mbarrier.wait(s_full.index(0), i & 1)
        ds = s_tiles.index(0).permute([1, 0])
        keys = k.slice(0, COLUMNS, dim=1)
        begun = gl_hopper.warpgroup_mma(ds, keys, nothing, use_acc=False, is_async=True)
        keys = k.slice(COLUMNS, COLUMNS, dim=1)
        part = gl_hopper.warpgroup_mma(ds, keys, nothing, use_acc=False, is_async=True)
        dv, weights = gl_hopper.warpgroup_mma_wait(2, [dv, weights])
        gl_hopper.mbarrier.arrive(o_free.index(o_stage))
        begun = gl_hopper.warpgroup_mma_wait(1, [begun])
        _send(dq_sum, head, row, 0, begun, a_tile, BLOCK_M, COLUMNS)
        part = gl_hopper.warpgroup_mma_wait(0, [part])
        last_head, last_row = head, row
        head, row = next_queries(head, row, first, first + tiles * BLOCK_M, HEADS, BLOCK_M)
    gl_hopper.mbarrier.arrive(k_free.index(0))
    _send(dq_sum, last_head, last_row, COLUMNS, part, a_tile, BLOCK_M, COLUMNS)
    # epilogue: the other group was done with the values when it gave the last ds
    v_tiles.index(0).reshape([64, D]).store(dv.to(gl.bfloat16))
    gl_hopper.fence_async_shared()
    gl_hopper.tma.async_copy_shared_to_global(dv_out, [kv_head // G, kv_head % G, n, 0], v_tiles.index(0))
    gl_hopper.tma.store_wait(0)


@gluon_jit
def _gather_dk(
    dk_out, dq_sum, q_tiles, k_tiles, v_tiles, o_tiles, d_tiles, p_tiles, s_tiles, a_tiles, k_full, v_full, q_full,
    q_free, o_full, o_free, p_full, s_full, k_free, kv_head, n, first, tiles, G, scale,
    HEADS: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr,
):  # fmt: skip
    """Run the role of the second group of four warps: ds and dk of 64 keys, and the second half of dq's columns."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    COLUMNS: gl.constexpr = D // 4  # of dq in a part
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    HALF: gl.constexpr = D // 2
    dk = gl.zeros([64, D], gl.float32, OUT)
    blank = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
    nothing = gl.zeros([BLOCK_M, COLUMNS], gl.float32, PART)
    part = nothing
    k = k_tiles.index(0).reshape([64, D])
    v = v_tiles.index(0).reshape([64, D])
    a_tile = a_tiles.index(1)
    gl_hopper.mbarrier.wait(k_full.index(0), 0)
    gl_hopper.mbarrier.wait(v_full.index(0), 0)
    head, row = kv_head * HEADS, first
    last_head, last_row = head, row
    for i in tl.range(0, tiles * HEADS, disable_licm=True):
        q_stage, o_stage = i % Q_STAGES, i % O_STAGES
        # dp
        gl_hopper.mbarrier.wait(o_full.index(o_stage), (i // O_STAGES) & 1)
        douts = o_tiles.index(o_stage).reshape([BLOCK_M, D])
        dp = gl_hopper.warpgroup_mma(v, douts.permute([1, 0]), blank, use_acc=False, is_async=True)
        delta = d_tiles.index(o_stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, SCORES))
        dp = gl_hopper.warpgroup_mma_wait(0, [dp])
        # the second part of the last dq, while the other group computes the weights
        if i > 0:
            _send(dq_sum, last_head, last_row, HALF + COLUMNS, part, a_tile, BLOCK_M, COLUMNS)
        # ds, for the other group too
        gl_hopper.mbarrier.wait(p_full.index(0), i & 1)
        p = p_tiles.index(0).load(SCORES).to(gl.float32)
        differences = (p * (dp - delta[None, :])).to(gl.bfloat16)
        s_tiles.index(0).store(differences)
        gl_hopper.fence_async_shared()
        gl_hopper.mbarrier.arrive(s_full.index(0))
        # dk
        operand = gl.convert_layout(differences, WEIGHTS)
        gl_hopper.mbarrier.wait(q_full.index(q_stage), (i // Q_STAGES) & 1)
        queries = q_tiles.index(q_stage).reshape([BLOCK_M, D])
        dk = gl_hopper.warpgroup_mma(operand, queries, dk, is_async=True)
        # dq
        gl_hopper.mbarrier.wait(s_full.index(0), i & 1)
        ds = s_tiles.index(0).permute([1, 0])
        keys = k.slice(HALF, COLUMNS, dim=1)
        begun = gl_hopper.warpgroup_mma(ds, keys, nothing, use_acc=False, is_async=True)
        keys = k.slice(HALF + COLUMNS, COLUMNS, dim=1)
        part = gl_hopper.warpgroup_mma(ds, keys, nothing, use_acc=False, is_async=True)
        dk, operand = gl_hopper.warpgroup_mma_wait(2, [dk, operand])
        gl_hopper.mbarrier.arrive(q_free.index(q_stage))
        begun = gl_hopper.warpgroup_mma_wait(1, [begun])
        _send(dq_sum, head, row, HALF, begun, a_tile, BLOCK_M, COLUMNS)
        part = gl_hopper.warpgroup_mma_wait(0, [part])
        last_head, last_row = head, row
        head, row = next_queries(head, row, first, first + tiles * BLOCK_M, HEADS, BLOCK_M)
    _send(dq_sum, last_head, last_row, HALF + COLUMNS, part, a_tile, BLOCK_M, COLUMNS)
    gl_hopper.mbarrier.wait(k_free.index(0), 0)  # the other group reads the keys until its dq is complete
    # epilogue
    k.store((dk * scale).to(gl.bfloat16))
    gl_hopper.fence_async_shared()
    gl_hopper.tma.async_copy_shared_to_global(dk_out, [kv_head // G, kv_head % G, n, 0], k_tiles.index(0))
    gl_hopper.tma.store_wait(0)


@gluon_kernel
def attention_bwd_kernel_wide_hopper(
    q, k, v, dout, statistics, document_ptr, dk_out, dv_out, dq_sum, heads, T, S, H, G, window, share, factor, scale,
    BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAPPED: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
    BLOCK_M: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, S_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: 64 keys of one key head -> dk and dv, over the queries of all its heads; adds to dq_sum in fp32."""
    head, block = place(gl.program_id(0), gl.cdiv(S, 64), heads, T * HEADS, D, False)
    b, g = head // G, head % G
    n = block * 64
    first, tiles = queries_from(n, T, S, window, document_ptr, 64, BLOCK_M, BOUNDED, DOCUMENTS)

    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [Q_STAGES, 1, 1, BLOCK_M, D], q.layout)
    o_tiles = gl.allocate_shared_memory(gl.bfloat16, [O_STAGES, 1, 1, BLOCK_M, D], dout.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [1, 1, 1, 64, D], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [1, 1, 1, 64, D], v.layout)
    l_tiles = gl.allocate_shared_memory(gl.float32, [Q_STAGES, 1, 1, BLOCK_M], statistics.layout)
    d_tiles = gl.allocate_shared_memory(gl.float32, [O_STAGES, 1, 1, BLOCK_M], statistics.layout)
    p_tiles = gl.allocate_shared_memory(gl.bfloat16, [S_STAGES, 64, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2))
    s_tiles = gl.allocate_shared_memory(gl.bfloat16, [S_STAGES, 64, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2))
    a_tiles = gl.allocate_shared_memory(gl.float32, [2, 1, BLOCK_M, D // 4], dq_sum.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1, 1], gl_hopper.mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1, 1], gl_hopper.mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    o_full = gl.allocate_shared_memory(gl.int64, [O_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    o_free = gl.allocate_shared_memory(gl.int64, [O_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [1, 1], gl_hopper.mbarrier.MBarrierLayout())
    s_full = gl.allocate_shared_memory(gl.int64, [1, 1], gl_hopper.mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [1, 1], gl_hopper.mbarrier.MBarrierLayout())
    gl_hopper.mbarrier.init(k_full.index(0), count=1)
    gl_hopper.mbarrier.init(v_full.index(0), count=1)
    for stage in gl.static_range(Q_STAGES):
        gl_hopper.mbarrier.init(q_full.index(stage), count=1)
        gl_hopper.mbarrier.init(q_free.index(stage), count=1)
    for stage in gl.static_range(O_STAGES):
        gl_hopper.mbarrier.init(o_full.index(stage), count=1)
        gl_hopper.mbarrier.init(o_free.index(stage), count=1)
    gl_hopper.mbarrier.init(p_full.index(0), count=1)
    gl_hopper.mbarrier.init(s_full.index(0), count=1)
    gl_hopper.mbarrier.init(k_free.index(0), count=1)
    gl.warp_specialize(
        [
            (_gather_dv, (dv_out, dq_sum, document_ptr, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, p_tiles, s_tiles,
                          a_tiles, k_full, q_full, q_free, o_full, o_free, p_full, s_full, k_free, head, n, first,
                          tiles, T, S, G, window, share, factor, BOUNDED, DOCUMENTS, SOFTCAPPED, HEADS, BLOCK_M, D,
                          Q_STAGES, O_STAGES)),
            (_gather_dk, (dk_out, dq_sum, q_tiles, k_tiles, v_tiles, o_tiles, d_tiles, p_tiles, s_tiles, a_tiles,
                          k_full, v_full, q_full, q_free, o_full, o_free, p_full, s_full, k_free, head, n,
                          first, tiles, G, scale, HEADS, BLOCK_M, D, Q_STAGES, O_STAGES)),
            (supply_dk_dv, (q, k, v, dout, statistics, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, d_tiles, k_full,
                            v_full, q_full, q_free, o_full, o_free, b, g, n, first, tiles, H, HEADS, 1, BLOCK_M,
                            Q_STAGES, O_STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


TILE = Tile(64, 2, 1, 1, 240)  # the most that shared memory holds; not timed
