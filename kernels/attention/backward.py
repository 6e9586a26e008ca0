"""Attention backward, in two kernels without atomics: dq by programs of queries, dk and dv by programs of keys.

The weights are recomputed from the scores and the log-sum-exp. Both kernels compute the scores, so that there are seven
products where one kernel with atomic sums would need five; in return the result is deterministic, and no memory has to
be zeroed first.

For Hopper, hopper/ has one kernel for all three gradients. It adds to dq in no fixed order, so that these run instead
where torch.use_deterministic_algorithms is set.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import arch, jit, tile_arch, tl, triton
from .dropout import kept
from .hopper import launch_backward_hopper, takes_backward
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
    queries_seeing,
    rows,
    scores,
    segments,
)


@jit
def uncapped(ds, share, SOFTCAPPED: tl.constexpr):
    """Returns the gradient of the scores before the softcap: ds (1 - share^2), share = tanh of the scores over it."""
    if SOFTCAPPED:
        return ds * (1.0 - share * share)
    else:
        return ds


@jit
def _gather_dq(
    dq, q, dout, lse, delta, k, v, b, g, k_stride_s, v_stride_s, start, stop, S, position, first, end, head, seed_ptr,
    scale, softcap, threshold, undropped, MASKED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns dq with ds @ k added over the tiles of keys from start to stop."""
    for row in tl.range(start, stop, BLOCK_N):
        n = row + tl.arange(0, BLOCK_N)[None, :]
        k_tile = load_rows(k, b, g, row, k_stride_s, S, MASKED, DESCRIPTORS, D, BLOCK_N, BLOCK_D)
        v_tile = load_rows(v, b, g, row, v_stride_s, S, MASKED, DESCRIPTORS, D, BLOCK_N, BLOCK_D)
        # weights
        s, factor = scores(tl.dot(q, k_tile.T, input_precision="ieee"), scale, softcap, SOFTCAPPED)
        p = tl.exp2(s * factor - lse)
        # gradient of the scores
        dp = tl.dot(dout, v_tile.T, input_precision="ieee")
        if DROPOUT:
            dp = tl.where(kept(seed_ptr, n, position, head, threshold), dp * undropped, 0.0)
        ds = uncapped(p * (dp - delta), s, SOFTCAPPED)
        if MASKED:
            ds = tl.where((n >= first) & (n < end), ds, 0.0)
        # gradient of the queries
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@jit
def attention_bwd_kernel_dq(
    q, k, v, dout, out_ptr, lse_ptr, dlse_ptr, document_ptr, seed_ptr, dq_ptr, delta_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    dout_stride_b, dout_stride_t, dout_stride_h, dq_stride_t,
    heads, T, S, H, G, window, scale, softcap, threshold, undropped,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAPPED: tl.constexpr,
    DROPOUT: tl.constexpr, HAS_DLSE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head -> dq, and delta[t] = sum_d dout[t, d] * out[t, d] for dk and dv."""
    head, block = place(tl.program_id(0), tl.cdiv(T, BLOCK_M), heads, S, D, CAUSAL)
    b, h = head // H, head % H
    g = h // (H // G)
    q = head_of(q, b, h, q_stride_b, q_stride_h, DESCRIPTORS)
    k = head_of(k, b, g, k_stride_b, k_stride_h, DESCRIPTORS)
    v = head_of(v, b, g, v_stride_b, v_stride_h, DESCRIPTORS)
    dout = head_of(dout, b, h, dout_stride_b, dout_stride_h, DESCRIPTORS)
    # visible keys
    row = block * BLOCK_M
    t = (row + tl.arange(0, BLOCK_M))[:, None]
    position = t + (S - T)
    first, end = keys_seen(position, S, window, document_ptr, CAUSAL, WINDOWED, DOCUMENTS)
    first_0, end_0 = keys_seen(row + (S - T), S, window, document_ptr, CAUSAL, WINDOWED, DOCUMENTS)
    last = tl.minimum(row + BLOCK_M, T) - 1 + (S - T)
    first_1, end_1 = keys_seen(last, S, window, document_ptr, CAUSAL, WINDOWED, DOCUMENTS)
    start, full, ragged, stop = segments(first_0, end_0, first_1, end_1, BLOCK_N)

    # delta
    q_tile = load_rows(q, b, h, row, q_stride_t, T, True, DESCRIPTORS, D, BLOCK_M, BLOCK_D)
    dout_tile = load_rows(dout, b, h, row, dout_stride_t, T, True, DESCRIPTORS, D, BLOCK_M, BLOCK_D)
    d = tl.arange(0, BLOCK_D)[None, :]
    out_rows = out_ptr + ((b.to(tl.int64) * T + row) * H + h) * D  # contiguous
    out_tile = tl.load(out_rows + tl.arange(0, BLOCK_M)[:, None] * (H * D) + d, (t < T) & (d < D), other=0.0)
    delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)[:, None]
    statistics = head.to(tl.int64) * T
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + statistics + t, t < T, other=0.0)
    tl.store(delta_ptr + statistics + t, delta, t < T)
    lse = tl.load(lse_ptr + statistics + t, t < T, other=float("inf"))

    # dq: masked tiles at the start, mask-free ones, masked tiles at the end
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOWED or DOCUMENTS:
        dq = _gather_dq(
            dq, q_tile, dout_tile, lse, delta, k, v, b, g, k_stride_s, v_stride_s, start, full, S, position, first, end,
            head, seed_ptr, scale, softcap, threshold, undropped,
            True, SOFTCAPPED, DROPOUT, DESCRIPTORS, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dq = _gather_dq(
        dq, q_tile, dout_tile, lse, delta, k, v, b, g, k_stride_s, v_stride_s, full, ragged, S, position, first, end,
        head, seed_ptr, scale, softcap, threshold, undropped,
        False, SOFTCAPPED, DROPOUT, DESCRIPTORS, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _gather_dq(
        dq, q_tile, dout_tile, lse, delta, k, v, b, g, k_stride_s, v_stride_s, ragged, stop, S, position, first, end,
        head, seed_ptr, scale, softcap, threshold, undropped,
            True, SOFTCAPPED, DROPOUT, DESCRIPTORS, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq_rows = dq_ptr + (b.to(tl.int64) * T + row) * dq_stride_t + h * D
    tile = tl.arange(0, BLOCK_M)[:, None] * dq_stride_t + d
    tl.store(dq_rows + tile, (dq * scale).to(dq_ptr.dtype.element_ty), (t < T) & (d < D))


@jit
def _gather_dk_dv(
    dk, dv, k, v, q, dout, lse_ptr, delta_ptr, b, g, H, q_stride_b, q_stride_t, q_stride_h,
    dout_stride_b, dout_stride_t, dout_stride_h, start, stop, T, S, u, first, end,
    seed_ptr, scale, softcap, threshold, undropped,
    MASKED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns dk with ds^T @ q added and dv with p^T @ dout, over GROUP heads' tiles of queries from start to stop.

    Tiles are transposed: [keys, queries]. Rows past T need no mask: their log-sum-exp is read as +inf, so that their
    weights are 0. Heads and tiles share one flat loop: two nested loops take 40 to 80 registers more, and spill.
    """
    tiles = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    for i in tl.range(0, GROUP * tiles):
        h = g * GROUP + (i // tiles if GROUP > 1 else 0)
        row = start + (i % tiles if GROUP > 1 else i) * BLOCK_M
        head = b * H + h
        t = (row + tl.arange(0, BLOCK_M))[None, :]
        position = t + (S - T)
        q_head = head_of(q, b, h, q_stride_b, q_stride_h, DESCRIPTORS)
        dout_head = head_of(dout, b, h, dout_stride_b, dout_stride_h, DESCRIPTORS)
        q_tile = load_rows(q_head, b, h, row, q_stride_t, T, True, DESCRIPTORS, D, BLOCK_M, BLOCK_D)
        dout_tile = load_rows(dout_head, b, h, row, dout_stride_t, T, True, DESCRIPTORS, D, BLOCK_M, BLOCK_D)
        statistics = head.to(tl.int64) * T
        lse = tl.load(lse_ptr + statistics + t, t < T, other=float("inf"))
        delta = tl.load(delta_ptr + statistics + t, t < T, other=0.0)
        # weights
        s, factor = scores(tl.dot(k, q_tile.T, input_precision="ieee"), scale, softcap, SOFTCAPPED)
        p = tl.exp2(s * factor - lse)
        if MASKED:
            p = tl.where((position >= first) & (position < end), p, 0.0)
        # gradients of the weights and of the values
        dp = tl.dot(v, dout_tile.T, input_precision="ieee")
        if DROPOUT:
            keep = kept(seed_ptr, u, position, head, threshold)
            dv = tl.dot(tl.where(keep, p * undropped, 0.0).to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
            dp = tl.where(keep, dp * undropped, 0.0)
        else:
            dv = tl.dot(p.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
        # gradient of the keys
        ds = uncapped(p * (dp - delta), s, SOFTCAPPED)
        if MASKED:
            ds = tl.where((position >= first) & (position < end), ds, 0.0)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@jit
def attention_bwd_kernel_dk_dv(
    q, k, v, dout, lse_ptr, delta_ptr, document_ptr, seed_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    dout_stride_b, dout_stride_t, dout_stride_h, dk_stride_s,
    heads, T, S, H, G, window, scale, softcap, threshold, undropped,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAPPED: tl.constexpr,
    DROPOUT: tl.constexpr, DESCRIPTORS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key head -> dk and dv, over the queries of all its heads that see them."""
    head, block = place(tl.program_id(0), tl.cdiv(S, BLOCK_N), heads, T * GROUP, D, False)
    b, g = head // G, head % G
    k = head_of(k, b, g, k_stride_b, k_stride_h, DESCRIPTORS)
    v = head_of(v, b, g, v_stride_b, v_stride_h, DESCRIPTORS)
    # queries that see these keys
    row = block * BLOCK_N
    u = (row + tl.arange(0, BLOCK_N))[:, None]
    first, end = queries_seeing(u, T, S, window, document_ptr, CAUSAL, WINDOWED, DOCUMENTS)
    first_0, end_0 = queries_seeing(row, T, S, window, document_ptr, CAUSAL, WINDOWED, DOCUMENTS)
    last = tl.minimum(row + BLOCK_N, S) - 1
    first_1, end_1 = queries_seeing(last, T, S, window, document_ptr, CAUSAL, WINDOWED, DOCUMENTS)
    back = S - T  # from positions to the T rows of q
    start, full, ragged, stop = segments(
        tl.maximum(first_0 - back, 0), tl.maximum(end_0 - back, 0),
        tl.maximum(first_1 - back, 0), tl.maximum(end_1 - back, 0), BLOCK_M,
    )  # fmt: skip
    # Rows past T need no mask: if all keys are visible to the last row of q, the tile that holds it is mask-free.
    ragged = tl.where(end_0 >= S, tl.maximum(full, tl.cdiv(T, BLOCK_M) * BLOCK_M), ragged)

    k_tile = load_rows(k, b, g, row, k_stride_s, S, True, DESCRIPTORS, D, BLOCK_N, BLOCK_D)
    v_tile = load_rows(v, b, g, row, v_stride_s, S, True, DESCRIPTORS, D, BLOCK_N, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if CAUSAL or WINDOWED or DOCUMENTS:
        dk, dv = _gather_dk_dv(
            dk, dv, k_tile, v_tile, q, dout, lse_ptr, delta_ptr, b, g, H, q_stride_b, q_stride_t, q_stride_h,
            dout_stride_b, dout_stride_t, dout_stride_h, start, full, T, S, u, first, end,
            seed_ptr, scale, softcap, threshold, undropped,
            True, SOFTCAPPED, DROPOUT, DESCRIPTORS, GROUP, D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    dk, dv = _gather_dk_dv(
        dk, dv, k_tile, v_tile, q, dout, lse_ptr, delta_ptr, b, g, H, q_stride_b, q_stride_t, q_stride_h,
        dout_stride_b, dout_stride_t, dout_stride_h, full, ragged, T, S, u, first, end,
        seed_ptr, scale, softcap, threshold, undropped,
        False, SOFTCAPPED, DROPOUT, DESCRIPTORS, GROUP, D, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    if WINDOWED or DOCUMENTS:
        dk, dv = _gather_dk_dv(
            dk, dv, k_tile, v_tile, q, dout, lse_ptr, delta_ptr, b, g, H, q_stride_b, q_stride_t, q_stride_h,
            dout_stride_b, dout_stride_t, dout_stride_h, ragged, stop, T, S, u, first, end,
            seed_ptr, scale, softcap, threshold, undropped,
            True, SOFTCAPPED, DROPOUT, DESCRIPTORS, GROUP, D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    # epilogue
    d = tl.arange(0, BLOCK_D)[None, :]
    offset = (b.to(tl.int64) * S + u) * dk_stride_s + g * D + d
    tl.store(dk_ptr + offset, (dk * scale).to(dk_ptr.dtype.element_ty), (u < S) & (d < D))
    tl.store(dv_ptr + offset, dv.to(dv_ptr.dtype.element_ty), (u < S) & (d < D))


class Tile(NamedTuple):
    """Queries and keys of a tile, warps of a program, loads in flight, and whether they use descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# By architecture, then by the padded head dim. sm_90 at 64 and 128: the fastest of a search on an NVIDIA H200,
# 2026-11-26; the others from the compiled code (results/aot.json), not timed.
CONSERVATIVE = Tile(32, 32, 4, 2)
TILES = {
    "dq": {
        80: {64: Tile(128, 64, 8, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2)},
        86: {64: Tile(128, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
        90: {64: Tile(64, 64, 4, 2, True), 128: Tile(64, 64, 4, 2, True), 256: Tile(64, 32, 8, 2, True)},
        100: {64: Tile(128, 64, 8, 2, True), 128: Tile(128, 64, 8, 2, True), 256: Tile(64, 32, 8, 2, True)},
    },
    "dk_dv": {
        80: {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
        86: {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 16, 8, 2)},
        90: {64: Tile(32, 64, 4, 3, True), 128: Tile(32, 64, 4, 3, True), 256: Tile(16, 64, 8, 2, True)},
        100: {64: Tile(64, 128, 8, 2, True), 128: Tile(64, 128, 8, 2, True), 256: Tile(32, 64, 8, 2, True)},
    },
}
# Other tiles are faster from so many queries on. TFLOP/s at T = 4096 and 16384: dq 601 and 684 beside 555 and 594;
# dk_dv 452 and 497 beside 408 and 450. At 1024 they are slower. dk_dv with (32, 128, 4, 4) is as fast, and spills.
LONG = 2048
LONG_TILES = {("dq", 90, 128): Tile(128, 64, 8, 3, True), ("dk_dv", 90, 64): Tile(64, 64, 4, 3, True)}
# Dropout's random numbers take so many registers that the tiles above would spill.
DROPOUT_TILES = {
    ("dq", 90, 128): Tile(128, 64, 8, 3, True), ("dk_dv", 90, 128): Tile(32, 64, 8, 2, True),
    ("dq", 100, 256): Tile(64, 16, 8, 2, True), ("dk_dv", 100, 64): Tile(32, 128, 8, 2, True),
    ("dk_dv", 100, 128): Tile(32, 128, 8, 2, True), ("dq", 100, 64): Tile(128, 32, 8, 2, True),
    ("dq", 90, 256): Tile(64, 16, 8, 2, True), ("dk_dv", 90, 64): Tile(32, 64, 4, 3, True),
}  # fmt: skip


def tile(kernel: str, D: int, dtype: torch.dtype, arch: int, T: int = 0, dropout: bool = False) -> Tile:
    """Returns the tile of 'dq' or 'dk_dv' for head dim D and T queries; see forward.tile."""
    arch = tile_arch(arch)
    if arch not in TILES[kernel] or dtype == torch.float32:
        return CONSERVATIVE
    width = max(64, padded(D))
    chosen = TILES[kernel][arch][width]
    if T >= LONG:
        chosen = LONG_TILES.get((kernel, arch, width), chosen)
    if dropout:
        chosen = DROPOUT_TILES.get((kernel, arch, width), chosen)
    return CONSERVATIVE if chosen.descriptors and D % 8 else chosen


def launch_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill dq, dk and dv, in the shapes and dtypes of q, k, v: contiguous, or heads of one contiguous tensor.

    lse (B, H, T) is in base 2; dlse (B, H, T), contiguous, is the gradient of the natural log-sum-exp.
    """
    q, k, v, dout = rows(q), rows(k), rows(v), rows(dout)
    (B, T, H, D), (S, G), (dq, dk, dv) = q.shape, k.shape[1:3], gradients
    if dq.numel() == 0 or dk.numel() == 0:
        for x in gradients:
            x.zero_()
        return
    if dlse is None and takes_backward(q, k, v, options):
        launch_backward_hopper(dout, q, k, v, out, lse, options, gradients)
        return
    blocks = {kernel: tile(kernel, D, q.dtype, arch(q), T, options.dropout > 0) for kernel in TILES}
    if any(block.descriptors for block in blocks.values()):
        q, k, v, dout = aligned(q), aligned(k), aligned(v), aligned(dout)
    delta = torch.empty_like(lse)
    documents = document_bounds(options.cu_seqlens, S)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    scalars, flags = options.scalars(), options.flags(documents)

    def constants(block: Tile) -> dict:
        return dict(D=D, BLOCK_M=block.block_m, BLOCK_N=block.block_n, BLOCK_D=padded(D), num_warps=block.num_warps,
                    num_stages=block.num_stages)  # fmt: skip

    def operands(block: Tile) -> tuple:
        if not block.descriptors:
            return q, k, v, dout
        m, n = block.block_m, block.block_n
        return descriptor(q, m), descriptor(k, n), descriptor(v, n), descriptor(dout, m)

    block = blocks["dq"]
    attention_bwd_kernel_dq[(triton.cdiv(T, block.block_m) * B * H,)](
        *operands(block), out, lse, dlse, documents, options.seed, dq, delta, *strides, dq.stride(1),
        B * H, T, S, H, G, *scalars, **flags, HAS_DLSE=dlse is not None, DESCRIPTORS=block.descriptors,
        **constants(block),
    )  # fmt: skip
    block = blocks["dk_dv"]
    attention_bwd_kernel_dk_dv[(triton.cdiv(S, block.block_n) * B * G,)](
        *operands(block), lse, delta, documents, options.seed, dk, dv, *strides, dk.stride(1),
        B * G, T, S, H, G, *scalars, **flags, DESCRIPTORS=block.descriptors, GROUP=H // G, **constants(block),
    )  # fmt: skip
