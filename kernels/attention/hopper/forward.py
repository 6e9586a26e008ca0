"""Attention forward by Hopper's own instructions, in Gluon: causal, bf16, D = 64, 128 or 256.

A program has three roles that run concurrently: one warp copies tiles of keys and values into shared memory, and two
groups of four warps each attend from 64 queries to them. Within a group the product with the values lags by one tile,
so that it overlaps the exponentials of the next; the groups take turns on the tensor cores, so that one computes
exponentials while the other multiplies. After FlashAttention-3 (Shah et al., arXiv:2407.08608).

The roles synchronize by barriers in shared memory, which are reused; a barrier's phase, 0 or 1, distinguishes
consecutive uses. kernels/proof/emulate.py runs the protocol on a CPU and finds its races.
"""

from typing import NamedTuple

from torch import Tensor

from ..._triton import gl, gl_hopper, gluon_jit, triton
from ..shared import Options, aligned, place
from .pieces import features, fetch, first_key, tanh, tiles_of


@gluon_jit
def _supply(
    q, k, v, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free, b, h, g, row, start, tiles,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Run the role of the one warp: fetch tiles in the order in which the others consume them, the last keys first."""
    for group in gl.static_range(2):
        fetch(q, b, h, row + group * (BLOCK_M // 2), q_full.index(group), q_tiles.index(group))
    for i in range(tiles + 1):  # keys are needed one tile before their values
        if i < tiles:
            stage = i % STAGES
            gl_hopper.mbarrier.wait(k_free.index(stage), (i // STAGES + 1) & 1)
            fetch(k, b, g, start + (tiles - 1 - i) * BLOCK_N, k_full.index(stage), k_tiles.index(stage))
        if i > 0:
            stage = (i - 1) % STAGES
            gl_hopper.mbarrier.wait(v_free.index(stage), ((i - 1) // STAGES + 1) & 1)
            fetch(v, b, g, start + (tiles - i) * BLOCK_N, v_full.index(stage), v_tiles.index(stage))


@gluon_jit
def _softmax_step(
    s, m, l, first, seen, last_seen, n, share, factor, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    BOUNDED: gl.constexpr, SOFTCAPPED: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Fold the scores of keys from n on into the running maximum m and sum l; the first query's position is `first`.

    If BOUNDED, `seen` is the first key that each query sees, and `last_seen` that of the last query.
    """
    if SOFTCAPPED:
        s = tanh(s * share)
    masked = n + BLOCK_N > first + 1
    if BOUNDED:
        masked = masked | (n < last_seen)
    if masked:
        position = first + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        keys = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        s = gl.where(position[:, None] >= keys[None, :], s, float("-inf"))
        if BOUNDED:
            s = gl.where(seen[:, None] <= keys[None, :], s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)  # no key seen yet: every weight is exp2(-inf - 0) = 0
    p = gl.exp2(s * factor - origin[:, None])
    alpha = gl.exp2(m - origin)
    return p.to(gl.bfloat16), alpha, m_new, l * alpha + gl.sum(p, 1)


@gluon_jit
def _attend(
    out, lse_ptr, document_ptr, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free, turn, b, h, row,
    start, tiles, T, S, window, share, factor, BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr,
    SOFTCAPPED: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Run the role of a group of four warps: ROWS queries from `row` on -> out and the log-sum-exp in base 2."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    first = row + S - T
    seen, last_seen = gl.minimum(first + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)), S - 1), first
    if BOUNDED:
        last_seen = first_key(gl.minimum(first + ROWS, S) - 1, S, window, document_ptr, DOCUMENTS)
        seen = first_key(seen, S, window, document_ptr, DOCUMENTS)
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([ROWS, D], gl.float32, OUT)
    blank = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    q_tile = q_tiles.index(GROUP)
    q = q_tile.reshape([ROWS, D])

    # first tile
    gl_hopper.mbarrier.wait(q_full.index(GROUP), 0)
    gl_hopper.mbarrier.wait(k_full.index(0), 0)
    keys = k_tiles.index(0).reshape([BLOCK_N, D]).permute([1, 0])
    s = gl_hopper.warpgroup_mma(q, keys, blank, use_acc=False, is_async=True)
    s = gl_hopper.warpgroup_mma_wait(0, [s])
    gl_hopper.mbarrier.arrive(k_free.index(0))
    p, alpha, m, l = _softmax_step(
        s, m, l, first, seen, last_seen, start + (tiles - 1) * BLOCK_N, share, factor, ROWS, BLOCK_N, BOUNDED,
        SOFTCAPPED, SCORES,
    )  # fmt: skip
    weights = gl.convert_layout(p, WEIGHTS)
    if tiles > 1:
        gl_hopper.mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1)
    # scores of tile i, values of tile i - 1
    for i in range(1, tiles):
        k_stage, v_stage = i % STAGES, (i - 1) % STAGES
        gl_hopper.mbarrier.wait(turn.index(GROUP), (i - 1) & 1)
        keys = k_tiles.index(k_stage).reshape([BLOCK_N, D]).permute([1, 0])
        s = gl_hopper.warpgroup_mma(q, keys, blank, use_acc=False, is_async=True)
        gl_hopper.mbarrier.wait(v_full.index(v_stage), ((i - 1) // STAGES) & 1)
        values = v_tiles.index(v_stage).reshape([BLOCK_N, D])
        acc = gl_hopper.warpgroup_mma(weights, values, acc, is_async=True)
        gl_hopper.mbarrier.arrive(turn.index(1 - GROUP))
        s = gl_hopper.warpgroup_mma_wait(1, [s])
        gl_hopper.mbarrier.arrive(k_free.index(k_stage))
        p, alpha, m, l = _softmax_step(
            s, m, l, first, seen, last_seen, start + (tiles - 1 - i) * BLOCK_N, share, factor, ROWS, BLOCK_N, BOUNDED,
            SOFTCAPPED, SCORES,
        )  # fmt: skip
        # Waiting for the next keys here, not at the top, keeps ptxas from moving the exponentials below the wait for
        # the values' product, where they would no longer overlap it.
        if i + 1 < tiles:
            gl_hopper.mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1)
        acc, weights = gl_hopper.warpgroup_mma_wait(0, [acc, weights])
        gl_hopper.mbarrier.arrive(v_free.index(v_stage))
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
        weights = gl.convert_layout(p, WEIGHTS)
    # values of the last tile
    last = (tiles - 1) % STAGES
    gl_hopper.mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    acc = gl_hopper.warpgroup_mma(weights, v_tiles.index(last).reshape([BLOCK_N, D]), acc, is_async=True)
    acc, weights = gl_hopper.warpgroup_mma_wait(0, [acc, weights])

    # epilogue
    t = row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    gl.store(lse_ptr + t, m + gl.log2(l), t < T)
    acc = acc * gl.convert_layout(1.0 / l, gl.SliceLayout(1, OUT))[:, None]
    q.store(acc.to(gl.bfloat16))  # over the queries, which are no longer needed
    gl_hopper.fence_async_shared()
    gl_hopper.tma.async_copy_shared_to_global(out, [b, h, row, 0], q_tile)
    gl_hopper.tma.store_wait(0)


@gluon_jit
def attention_fwd_kernel_hopper(
    q, k, v, out, lse_ptr, document_ptr, heads, T, S, H, G, window, share, factor,
    BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAPPED: gl.constexpr,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, over the keys up to their own -> out and the log-sum-exp in base 2.

    q, k, v and out are descriptors of (B, heads, rows, D); share and factor as of Features. T <= S: every query sees a
    key. If BOUNDED, a query sees the `window` keys before its own and, if DOCUMENTS, none before its document (2, S).
    """
    ROWS: gl.constexpr = BLOCK_M // 2
    head, block = place(gl.program_id(0), gl.cdiv(T, BLOCK_M), heads, S, D, True)
    b, h = head // H, head % H
    g = h // (H // G)
    row = block * BLOCK_M
    start, end = 0, gl.minimum(row + BLOCK_M, T) + (S - T)  # up to the last key that a query sees
    if BOUNDED:
        start = gl.maximum(first_key(row + (S - T), S, window, document_ptr, DOCUMENTS), 0) // BLOCK_N * BLOCK_N
    tiles = gl.cdiv(end - start, BLOCK_N)
    lse_ptr += head.to(gl.int64) * T

    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, ROWS, D], q.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, BLOCK_N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, BLOCK_N, D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], gl_hopper.mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], gl_hopper.mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], gl_hopper.mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        gl_hopper.mbarrier.init(q_full.index(group), count=1)
        gl_hopper.mbarrier.init(turn.index(group), count=1)
    for stage in gl.static_range(STAGES):
        gl_hopper.mbarrier.init(k_full.index(stage), count=1)
        gl_hopper.mbarrier.init(v_full.index(stage), count=1)
        gl_hopper.mbarrier.init(k_free.index(stage), count=2)  # both groups are done with the tile
        gl_hopper.mbarrier.init(v_free.index(stage), count=2)
    gl_hopper.mbarrier.arrive(turn.index(0))  # the first turn is group 0's

    gl.warp_specialize(
        [
            (_attend, (out, lse_ptr, document_ptr, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
                       turn, b, h, row, start, tiles, T, S, window, share, factor, BOUNDED, DOCUMENTS,
                       SOFTCAPPED, 0, ROWS, BLOCK_N, D, STAGES)),
            (_attend, (out, lse_ptr, document_ptr, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
                       turn, b, h, row + ROWS, start, tiles, T, S, window, share, factor, BOUNDED, DOCUMENTS,
                       SOFTCAPPED, 1, ROWS, BLOCK_N, D, STAGES)),
            (_supply, (q, k, v, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free, b, h, g,
                       row, start, tiles, BLOCK_M, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


class Tile(NamedTuple):
    """Queries of a program, keys of a tile, tiles of keys in flight, registers per thread of the attending groups."""

    block_m: int
    block_n: int
    stages: int
    registers: int


# By head dim. NVIDIA H200, 2026-11-26, the best of (128, 128, 2), (128, 128, 3), (128, 64, 3), (128, 64, 4) at 64 and
# 128; at 256 what shared memory and registers hold, not timed.
TILES = {64: Tile(128, 128, 2, 240), 128: Tile(128, 128, 2, 240), 256: Tile(128, 64, 2, 240)}


def launch_forward_hopper(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor, lse: Tensor) -> None:
    """Fill out (B, T, H, D) and the log-sum-exp in base 2 (B, H, T) fp32, both contiguous."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    block, given = TILES[D], features(options, S)
    attention_fwd_kernel_hopper[(triton.cdiv(T, block.block_m) * B * H,)](
        tiles_of(q, block.block_m // 2), tiles_of(k, block.block_n), tiles_of(v, block.block_n),
        tiles_of(out, block.block_m // 2), lse, given.documents, B * H, T, S, H, G, given.window, given.share,
        given.factor, **given.flags, D=D, BLOCK_M=block.block_m, BLOCK_N=block.block_n, STAGES=block.stages,
        REGISTERS=block.registers, num_warps=4,
    )  # fmt: skip
