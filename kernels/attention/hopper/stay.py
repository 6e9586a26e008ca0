"""Attention backward for Hopper, head vectors of 64, in Gluon: dk, dv and dq in one kernel of persistent programs.

A program processes one block of 128 keys after another, and the start of each overlaps the end of the last. Its roles
run concurrently: one warp copies; two groups of four warps each accumulate dk and dv of 64 keys over tiles of queries
and dout; a third group multiplies ds, which those leave in shared memory, by the keys, and adds the product to dq in
global memory, in fp32, by the tensor memory accelerator. That takes five products instead of the seven of separate
kernels; but the order in which programs add to dq is not fixed, and its last bits differ from run to run.

Tiles of scores are [keys, queries], so that weights and ds are operands of dv and dk in the registers that hold them.
Barriers are used as in forward.py; `differences` are ds before its scale.
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
def _work(
    j, document_ptr, T, S, heads, G, window, BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr, HEADS: gl.constexpr,
    D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Returns batch, key head, first key, first query and tiles of queries of this program's j-th block of keys."""
    w = gl.program_id(0) + j * gl.num_programs(0)
    head, block = place(w, gl.cdiv(S, 128), heads, T * HEADS, D, False)
    n = block * 128
    first, tiles = queries_from(n, T, S, window, document_ptr, 128, BLOCK_M, BOUNDED, DOCUMENTS)
    return head // G, head % G, n, first, tiles * HEADS


@gluon_jit
def _stay_supply(
    q, k, v, dout, statistics, document_ptr, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, d_tiles, k_full, v_full,
    kv_free, q_full, q_free, o_full, o_free, rounds, T, S, heads, H, G, window, BOUNDED: gl.constexpr,
    DOCUMENTS: gl.constexpr, HEADS: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr,
    O_STAGES: gl.constexpr,
):  # fmt: skip
    """Run the role of the one warp: fetch tiles in the order in which the others consume them."""
    t = rounds * 0  # tiles of queries so far, of all blocks
    for j in range(rounds):
        b, g, n, first, total = _work(j, document_ptr, T, S, heads, G, window, BOUNDED, DOCUMENTS, HEADS, D, BLOCK_M)
        kv = j % 2
        gl_hopper.mbarrier.wait(kv_free.index(kv), (j // 2 + 1) & 1)
        for group in gl.static_range(2):
            fetch(k, b, g, n + group * 64, k_full.index(kv * 2 + group), k_tiles.index(kv * 2 + group))
        h, row = g * HEADS, first
        for i in range(total):
            stage = t % Q_STAGES
            gl_hopper.mbarrier.wait(q_free.index(stage), (t // Q_STAGES + 1) & 1)
            fetch_both(q, statistics, 0, b, h, H, row, q_full.index(stage), q_tiles.index(stage), l_tiles.index(stage))
            if i == 0:
                for group in gl.static_range(2):
                    fetch(v, b, g, n + group * 64, v_full.index(kv * 2 + group), v_tiles.index(kv * 2 + group))
            stage = t % O_STAGES
            gl_hopper.mbarrier.wait(o_free.index(stage), (t // O_STAGES + 1) & 1)
            full = o_full.index(stage)
            fetch_both(dout, statistics, 1, b, h, H, row, full, o_tiles.index(stage), d_tiles.index(stage))
            t += 1
            h, row = next_queries(h, row, first, first + total // HEADS * BLOCK_M, HEADS, BLOCK_M)


@gluon_jit
def _stay_gather(
    dk_out, dv_out, document_ptr, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, d_tiles, s_tiles, k_full, v_full,
    kv_free, q_full, q_free, o_full, o_free, s_full, s_free, rounds, T, S, heads, G, window, share, factor, scale,
    BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAPPED: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, S_STAGES: gl.constexpr,
):  # fmt: skip
    """Run the role of a group of four warps: dk and dv of 64 keys of one block after another."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    before = rounds * 0  # tiles of queries of earlier blocks
    for j in tl.range(0, rounds, disable_licm=True):
        b, g, n, first, total = _work(j, document_ptr, T, S, heads, G, window, BOUNDED, DOCUMENTS, HEADS, D, BLOCK_M)
        kv, parity, start = j % 2, (j // 2) & 1, n + GROUP * 64
        until = last_query(gl.minimum(start, S - 1), S, window, document_ptr, DOCUMENTS)
        dk = gl.zeros([64, D], gl.float32, OUT)
        dv = gl.zeros([64, D], gl.float32, OUT)
        blank = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
        k = k_tiles.index(kv * 2 + GROUP).reshape([64, D])
        v = v_tiles.index(kv * 2 + GROUP).reshape([64, D])

        # first tile of queries
        q_stage, o_stage, s_stage = before % Q_STAGES, before % O_STAGES, before % S_STAGES
        gl_hopper.mbarrier.wait(k_full.index(kv * 2 + GROUP), parity)
        gl_hopper.mbarrier.wait(q_full.index(q_stage), (before // Q_STAGES) & 1)
        queries = q_tiles.index(q_stage).reshape([BLOCK_M, D])
        s = gl_hopper.warpgroup_mma(k, queries.permute([1, 0]), blank, use_acc=False, is_async=True)
        gl_hopper.mbarrier.wait(v_full.index(kv * 2 + GROUP), parity)
        gl_hopper.mbarrier.wait(o_full.index(o_stage), (before // O_STAGES) & 1)
        douts = o_tiles.index(o_stage).reshape([BLOCK_M, D])
        dp = gl_hopper.warpgroup_mma(v, douts.permute([1, 0]), blank, use_acc=False, is_async=True)
        lse = l_tiles.index(q_stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, SCORES))
        gl_hopper.tma.store_wait(0)  # the last block's results have left its tiles of keys and values
        gl_hopper.mbarrier.arrive(kv_free.index(1 - kv), pred=j > 0)
        s = gl_hopper.warpgroup_mma_wait(1, [s])
        p, slope = weights_of(
            s, lse, first + S - T, start, until, S, window, document_ptr, share, factor, BLOCK_M, BOUNDED, DOCUMENTS,
            SOFTCAPPED, SCORES,
        )  # fmt: skip
        weights = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
        dv = gl_hopper.warpgroup_mma(weights, douts, dv, is_async=True)
        delta = d_tiles.index(o_stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, SCORES))
        dp = gl_hopper.warpgroup_mma_wait(1, [dp])
        differences = (slope * (dp - delta[None, :])).to(gl.bfloat16)
        gl_hopper.mbarrier.wait(s_free.index(s_stage), (before // S_STAGES + 1) & 1)
        s_tiles.index(s_stage * 2 + GROUP).store(differences)
        gl_hopper.fence_async_shared()
        gl_hopper.mbarrier.arrive(s_full.index(s_stage))
        ds = gl.convert_layout(differences, WEIGHTS)
        dv, weights = gl_hopper.warpgroup_mma_wait(0, [dv, weights])
        gl_hopper.mbarrier.arrive(o_free.index(o_stage))
        if total > 1:
            gl_hopper.mbarrier.wait(q_full.index((before + 1) % Q_STAGES), ((before + 1) // Q_STAGES) & 1)
        # scores of tile i, dk of tile i - 1
        head, row = g * HEADS, first
        for i in tl.range(1, total, disable_licm=True):
            t = before + i
            q_stage, o_stage, s_stage, last = t % Q_STAGES, t % O_STAGES, t % S_STAGES, (t - 1) % Q_STAGES
            head, row = next_queries(head, row, first, first + total // HEADS * BLOCK_M, HEADS, BLOCK_M)
            queries = q_tiles.index(q_stage).reshape([BLOCK_M, D])
            dk = gl_hopper.warpgroup_mma(ds, q_tiles.index(last).reshape([BLOCK_M, D]), dk, is_async=True)
            s = gl_hopper.warpgroup_mma(k, queries.permute([1, 0]), blank, use_acc=False, is_async=True)
            gl_hopper.mbarrier.wait(o_full.index(o_stage), (t // O_STAGES) & 1)
            douts = o_tiles.index(o_stage).reshape([BLOCK_M, D])
            dp = gl_hopper.warpgroup_mma(v, douts.permute([1, 0]), blank, use_acc=False, is_async=True)
            lse = l_tiles.index(q_stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, SCORES))
            s, dk, ds = gl_hopper.warpgroup_mma_wait(1, [s, dk, ds])
            gl_hopper.mbarrier.arrive(q_free.index(last))
            p, slope = weights_of(
                s, lse, row + S - T, start, until, S, window, document_ptr, share, factor, BLOCK_M, BOUNDED, DOCUMENTS,
                SOFTCAPPED, SCORES,
            )  # fmt: skip
            weights = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
            dv = gl_hopper.warpgroup_mma(weights, douts, dv, is_async=True)
            delta = d_tiles.index(o_stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, SCORES))
            dp = gl_hopper.warpgroup_mma_wait(1, [dp])
            differences = (slope * (dp - delta[None, :])).to(gl.bfloat16)
            gl_hopper.mbarrier.wait(s_free.index(s_stage), (t // S_STAGES + 1) & 1)
            s_tiles.index(s_stage * 2 + GROUP).store(differences)
            gl_hopper.fence_async_shared()
            gl_hopper.mbarrier.arrive(s_full.index(s_stage))
            ds = gl.convert_layout(differences, WEIGHTS)
            # Waiting for the next queries here keeps ptxas from moving the work above to below the wait for dv.
            if i + 1 < total:
                gl_hopper.mbarrier.wait(q_full.index((t + 1) % Q_STAGES), ((t + 1) // Q_STAGES) & 1)
            dv, weights = gl_hopper.warpgroup_mma_wait(0, [dv, weights])
            gl_hopper.mbarrier.arrive(o_free.index(o_stage))
        # dk of the last tile
        before += total
        last = (before - 1) % Q_STAGES
        dk = gl_hopper.warpgroup_mma(ds, q_tiles.index(last).reshape([BLOCK_M, D]), dk, is_async=True)
        dk, ds = gl_hopper.warpgroup_mma_wait(0, [dk, ds])
        gl_hopper.mbarrier.arrive(q_free.index(last))
        # the keys are read until dq is complete
        gl_hopper.mbarrier.wait(s_free.index((before - 1) % S_STAGES), ((before - 1) // S_STAGES) & 1)
        # epilogue
        v.store(dv.to(gl.bfloat16))  # over the keys and values, which are no longer needed
        k.store((dk * scale).to(gl.bfloat16))
        gl_hopper.fence_async_shared()
        gl_hopper.tma.async_copy_shared_to_global(dv_out, [b, g, start, 0], v_tiles.index(kv * 2 + GROUP))
        gl_hopper.tma.async_copy_shared_to_global(dk_out, [b, g, start, 0], k_tiles.index(kv * 2 + GROUP))
    gl_hopper.tma.store_wait(0)


@gluon_jit
def _stay_sums(
    dq_sum, document_ptr, k_tiles, s_tiles, a_tiles, k_full, kv_free, s_full, s_free, rounds, T, S, heads, H, G, window,
    BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr, HEADS: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr,
    S_STAGES: gl.constexpr,
):  # fmt: skip
    """Run the role of the group of four warps that multiplies the others' ds by the keys and adds it to dq."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    t = rounds * 0
    for j in tl.range(0, rounds, disable_licm=True):
        b, g, _, first, total = _work(j, document_ptr, T, S, heads, G, window, BOUNDED, DOCUMENTS, HEADS, D, BLOCK_M)
        kv = j % 2
        nothing = gl.zeros([BLOCK_M, D], gl.float32, OUT)
        for group in gl.static_range(2):
            gl_hopper.mbarrier.wait(k_full.index(kv * 2 + group), (j // 2) & 1)
        head, row = b * H + g * HEADS, first
        for i in tl.range(0, total, disable_licm=True):
            stage = t % S_STAGES
            gl_hopper.mbarrier.wait(s_full.index(stage), (t // S_STAGES) & 1)
            part = nothing
            for group in gl.static_range(2):
                ds = s_tiles.index(stage * 2 + group).permute([1, 0])
                keys = k_tiles.index(kv * 2 + group).reshape([64, D])
                part = gl_hopper.warpgroup_mma(ds, keys, part, use_acc=group > 0, is_async=True)
            gl_hopper.tma.store_wait(0)  # the last tile to be added has been read
            part = gl_hopper.warpgroup_mma_wait(0, [part])
            if i + 1 == total:
                gl_hopper.mbarrier.arrive(kv_free.index(kv))
            gl_hopper.mbarrier.arrive(s_free.index(stage))
            a_tiles.index(0).reshape([BLOCK_M, D]).store(part)
            gl_hopper.fence_async_shared()
            reduce_add(dq_sum, [head, row, 0], a_tiles.index(0))
            t += 1
            head, row = next_queries(head, row, first, first + total // HEADS * BLOCK_M, HEADS, BLOCK_M)
    gl_hopper.tma.store_wait(0)


@gluon_kernel
def attention_bwd_kernel_stay_hopper(
    q, k, v, dout, statistics, document_ptr, dk_out, dv_out, dq_sum, heads, T, S, H, G, window, share, factor, scale,
    BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAPPED: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
    BLOCK_M: gl.constexpr, Q_STAGES: gl.constexpr, O_STAGES: gl.constexpr, S_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: one block of 128 keys after another -> dk and dv; it adds to dq_sum in fp32."""
    works = gl.cdiv(S, 128) * heads
    rounds = gl.cdiv(works - gl.program_id(0), gl.num_programs(0))
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [Q_STAGES, 1, 1, BLOCK_M, D], q.layout)
    o_tiles = gl.allocate_shared_memory(gl.bfloat16, [O_STAGES, 1, 1, BLOCK_M, D], dout.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [4, 1, 1, 64, D], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [4, 1, 1, 64, D], v.layout)
    l_tiles = gl.allocate_shared_memory(gl.float32, [Q_STAGES, 1, 1, BLOCK_M], statistics.layout)
    d_tiles = gl.allocate_shared_memory(gl.float32, [O_STAGES, 1, 1, BLOCK_M], statistics.layout)
    s_tiles = gl.allocate_shared_memory(gl.bfloat16, [2 * S_STAGES, 64, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2))
    a_tiles = gl.allocate_shared_memory(gl.float32, [1, 1, BLOCK_M, D], dq_sum.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [4, 1], gl_hopper.mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [4, 1], gl_hopper.mbarrier.MBarrierLayout())
    kv_free = gl.allocate_shared_memory(gl.int64, [2, 1], gl_hopper.mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    o_full = gl.allocate_shared_memory(gl.int64, [O_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    o_free = gl.allocate_shared_memory(gl.int64, [O_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    s_full = gl.allocate_shared_memory(gl.int64, [S_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    s_free = gl.allocate_shared_memory(gl.int64, [S_STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    for tile in gl.static_range(4):
        gl_hopper.mbarrier.init(k_full.index(tile), count=1)
        gl_hopper.mbarrier.init(v_full.index(tile), count=1)
    for kv in gl.static_range(2):
        gl_hopper.mbarrier.init(kv_free.index(kv), count=3)
    for stage in gl.static_range(Q_STAGES):
        gl_hopper.mbarrier.init(q_full.index(stage), count=1)
        gl_hopper.mbarrier.init(q_free.index(stage), count=2)
    for stage in gl.static_range(O_STAGES):
        gl_hopper.mbarrier.init(o_full.index(stage), count=1)
        gl_hopper.mbarrier.init(o_free.index(stage), count=2)
    for stage in gl.static_range(S_STAGES):
        gl_hopper.mbarrier.init(s_full.index(stage), count=2)
        gl_hopper.mbarrier.init(s_free.index(stage), count=1)
    gl.warp_specialize(
        [
            (_stay_gather, (dk_out, dv_out, document_ptr, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, d_tiles, s_tiles,
                            k_full, v_full, kv_free, q_full, q_free, o_full, o_free, s_full, s_free, rounds, T, S,
                            heads, G, window, share, factor, scale, BOUNDED, DOCUMENTS, SOFTCAPPED, HEADS, 0,
                            BLOCK_M, D, Q_STAGES, O_STAGES, S_STAGES)),
            (_stay_gather, (dk_out, dv_out, document_ptr, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles, d_tiles, s_tiles,
                            k_full, v_full, kv_free, q_full, q_free, o_full, o_free, s_full, s_free, rounds, T, S,
                            heads, G, window, share, factor, scale, BOUNDED, DOCUMENTS, SOFTCAPPED, HEADS, 1,
                            BLOCK_M, D, Q_STAGES, O_STAGES, S_STAGES)),
            (_stay_sums, (dq_sum, document_ptr, k_tiles, s_tiles, a_tiles, k_full, kv_free, s_full, s_free, rounds, T,
                          S, heads, H, G, window, BOUNDED, DOCUMENTS, HEADS, BLOCK_M, D, S_STAGES)),
            (_stay_supply, (q, k, v, dout, statistics, document_ptr, q_tiles, k_tiles, v_tiles, o_tiles, l_tiles,
                            d_tiles, k_full, v_full, kv_free, q_full, q_free, o_full, o_free, rounds, T, S, heads, H,
                            G, window, BOUNDED, DOCUMENTS, HEADS, BLOCK_M, D, Q_STAGES, O_STAGES)),
        ],
        [4, 4, 1],
        [REGISTERS, 512 - 24 - 2 * REGISTERS, 24],
    )  # fmt: skip


# NVIDIA H200, 2026-11-26, at 16 x 1024 x 12 and 1 x 16384 x 32 heads of 64.
TILE = Tile(64, 3, 3, 2, 192)
DOCUMENTS_TILE = Tile(64, 3, 3, 2, 200)  # with 192 registers a few values spill, once a block
SOFTCAP_TILE = Tile(64, 3, 3, 2, 208)  # with 200 they would; not timed
