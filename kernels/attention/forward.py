"""Attention forward: one pass over the keys with a running softmax, in base 2 with the scale folded into the exponent.

Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import arch, jit, tile_arch, tl, triton
from .dropout import kept
from .hopper import launch_forward_hopper, takes_forward
from .shared import (
    Options,
    aligned,
    descriptor,
    document_bounds,
    head_of,
    keys_seen,
    load_rows,
    padded,
    place,
    rows,
    scores,
    segments,
)


@jit
def _softmax_step(s, factor, m, l, n, first, end, MASKED: tl.constexpr):
    """Fold a tile of scores into the running maximum m and sum l. Returns p, and alpha, which rescales the sums."""
    if MASKED:
        s = tl.where((n >= first) & (n < end), s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1) * factor)
    origin = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key seen yet: every weight is exp2(-inf - 0) = 0
    p = tl.exp2(s * factor - origin[:, None])
    alpha = tl.exp2(m - origin)
    return p, alpha, m_new, l * alpha + tl.sum(p, axis=1)


@jit
def _attend(
    acc, m, l, q, k, v, b, g, k_stride_s, v_stride_s, start, stop, S, position, first, end, head, seed_ptr,
    scale, softcap, threshold, MASKED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns acc, m and l after the tiles of keys from start to stop."""
    for row in tl.range(start, stop, BLOCK_N):
        n = row + tl.arange(0, BLOCK_N)[None, :]
        # scores
        k_tile = load_rows(k, b, g, row, k_stride_s, S, MASKED, DESCRIPTORS, D, BLOCK_N, BLOCK_D)
        s, factor = scores(tl.dot(q, k_tile.T, input_precision="ieee"), scale, softcap, SOFTCAPPED)
        # softmax
        p, alpha, m, l = _softmax_step(s, factor, m, l, n, first, end, MASKED)
        if DROPOUT:
            p = tl.where(kept(seed_ptr, n, position, head, threshold), p, 0.0)
        # values
        v_tile = load_rows(v, b, g, row, v_stride_s, S, MASKED, DESCRIPTORS, D, BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(q.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
    return acc, m, l


@jit
def attention_fwd_kernel(
    q, k, v, document_ptr, seed_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    heads, T, S, H, G, window, scale, softcap, threshold, undropped,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAPPED: tl.constexpr,
    DROPOUT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, over the keys they see -> out and the log-sum-exp in base 2.

    q, k and v are pointers, or descriptors if DESCRIPTORS. lse is +inf for a query that sees no key, so that its
    weights in the backward are 0.
    """
    head, block = place(tl.program_id(0), tl.cdiv(T, BLOCK_M), heads, S, D, CAUSAL)
    b, h = head // H, head % H
    g = h // (H // G)
    q = head_of(q, b, h, q_stride_b, q_stride_h, DESCRIPTORS)
    k = head_of(k, b, g, k_stride_b, k_stride_h, DESCRIPTORS)
    v = head_of(v, b, g, v_stride_b, v_stride_h, DESCRIPTORS)
    # visible keys
    row = block * BLOCK_M
    t = row + tl.arange(0, BLOCK_M)
    position = (t + (S - T))[:, None]
    first, end = keys_seen(position, S, window, document_ptr, CAUSAL, WINDOWED, DOCUMENTS)
    first_0, end_0 = keys_seen(row + (S - T), S, window, document_ptr, CAUSAL, WINDOWED, DOCUMENTS)
    last = tl.minimum(row + BLOCK_M, T) - 1 + (S - T)
    first_1, end_1 = keys_seen(last, S, window, document_ptr, CAUSAL, WINDOWED, DOCUMENTS)
    start, full, ragged, stop = segments(first_0, end_0, first_1, end_1, BLOCK_N)

    # masked tiles at the start, mask-free ones, masked tiles at the end
    q_tile = load_rows(q, b, h, row, q_stride_t, T, True, DESCRIPTORS, D, BLOCK_M, BLOCK_D)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOWED or DOCUMENTS:
        acc, m, l = _attend(
            acc, m, l, q_tile, k, v, b, g, k_stride_s, v_stride_s, start, full, S, position, first, end, head,
            seed_ptr, scale, softcap, threshold, True, SOFTCAPPED, DROPOUT, DESCRIPTORS, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q_tile, k, v, b, g, k_stride_s, v_stride_s, full, ragged, S, position, first, end, head, seed_ptr,
        scale, softcap, threshold, False, SOFTCAPPED, DROPOUT, DESCRIPTORS, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q_tile, k, v, b, g, k_stride_s, v_stride_s, ragged, stop, S, position, first, end, head, seed_ptr,
        scale, softcap, threshold, True, SOFTCAPPED, DROPOUT, DESCRIPTORS, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    # epilogue
    out = acc / l[:, None]
    if DROPOUT:
        out *= undropped
    out = tl.where(end > first, out, 0.0)
    d = tl.arange(0, BLOCK_D)[None, :]
    out_rows = out_ptr + ((b.to(tl.int64) * T + row) * H + h) * D
    tl.store(
        out_rows + tl.arange(0, BLOCK_M)[:, None] * (H * D) + d,
        out.to(out_ptr.dtype.element_ty),
        (t < T)[:, None] & (d < D),
    )
    lse = tl.where(tl.reshape(end > first, (BLOCK_M,)), m + tl.log2(l), float("inf"))
    tl.store(lse_ptr + head.to(tl.int64) * T + t, lse, t < T)


class Tile(NamedTuple):
    """Queries and keys of a tile, warps of a program, loads in flight, and whether they use descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# By architecture, then by the padded head dim. sm_90 at 64 and 128: the fastest of 6 and 4 tiles on an NVIDIA H200,
# 2026-11-26 (bench tune attention); the others from the compiled code (results/aot.json), not timed.
CONSERVATIVE = Tile(32, 32, 4, 2)
TILES = {
    80: {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
    86: {64: Tile(64, 64, 4, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    90: {64: Tile(128, 64, 4, 3, True), 128: Tile(128, 128, 8, 3, True), 256: Tile(128, 64, 8, 2, True)},
    100: {64: Tile(128, 64, 8, 3, True), 128: Tile(128, 128, 8, 2, True), 256: Tile(128, 32, 8, 2, True)},
}
# Another tile is faster from so many queries on: 405 TFLOP/s beside 403 at T = 4096, 471 beside 453 at 16384.
LONG = 2048
LONG_TILES = {(90, 64): Tile(64, 128, 4, 3, True)}
# Dropout's random numbers take so many registers that the tiles above would spill. On sm_100 (128, 64, 8, 2) still
# spills 72 B with all options at once.
DROPOUT_TILES = {
    (90, 64): Tile(128, 64, 8, 2, True), (90, 128): Tile(64, 64, 8, 2, True),
    (100, 64): Tile(128, 32, 8, 2, True), (100, 128): Tile(128, 32, 8, 2, True),
    (80, 128): Tile(128, 32, 8, 3), (80, 256): Tile(64, 16, 8, 2), (86, 64): Tile(64, 32, 4, 3),
    (86, 256): Tile(64, 16, 8, 2), (90, 256): Tile(64, 32, 8, 2, True),
}  # fmt: skip
# So do the bounds of each query's keys, with a window or documents.
BOUNDED_TILES = {(80, 128): Tile(128, 32, 8, 3), (86, 128): Tile(64, 32, 4, 2)}


def tile(D: int, dtype: torch.dtype, arch: int, T: int = 0, dropout: bool = False, bounded: bool = False) -> Tile:
    """Returns the tile for head dim D and T queries.

    It is conservative in fp32, whose products run on the ordinary cores, and where no descriptor can address rows of D.
    """
    arch = tile_arch(arch)
    if arch not in TILES or dtype == torch.float32:
        return CONSERVATIVE
    width = max(64, padded(D))
    chosen = TILES[arch][width]
    if T >= LONG:
        chosen = LONG_TILES.get((arch, width), chosen)
    if bounded:
        chosen = BOUNDED_TILES.get((arch, width), chosen)
    if dropout:
        chosen = DROPOUT_TILES.get((arch, width), chosen)
    return CONSERVATIVE if chosen.descriptors and D % 8 else chosen


def launch_forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns out (B, T, H, D) and the log-sum-exp in base 2 (B, H, T) fp32."""
    q, k, v = rows(q), rows(k), rows(v)
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or S == 0:
        return out.zero_(), lse.fill_(torch.inf)
    if takes_forward(q, k, v, options):
        launch_forward_hopper(q, k, v, options, out, lse)
        return out, lse
    block = tile(D, q.dtype, arch(q), T, options.dropout > 0, options.bounded)
    operands = q, k, v
    if block.descriptors:
        q, k, v = aligned(q), aligned(k), aligned(v)
        operands = descriptor(q, block.block_m), descriptor(k, block.block_n), descriptor(v, block.block_n)
    documents = document_bounds(options.cu_seqlens, S)
    attention_fwd_kernel[(triton.cdiv(T, block.block_m) * B * H,)](
        *operands, documents, options.seed, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        B * H, T, S, H, G, *options.scalars(), **options.flags(documents), DESCRIPTORS=block.descriptors,
        D=D, BLOCK_M=block.block_m, BLOCK_N=block.block_n, BLOCK_D=padded(D),
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    return out, lse
