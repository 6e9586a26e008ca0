"""Attention of each sequence's newest tokens to a cache of keys and values: the decoding step.

    position[t] = lengths[b] - T + t      query t sees keys u <= position[t]; u >= position[t] - window if windowed
    s[t, u] = scale * sum_d q[t, d] * k[u, d]        s = softcap * tanh(s / softcap)  if softcap
    p = softmax_u(s where query t sees key u, else -inf)        out[t] = sum_u p[t, u] * v[u]

    q, out: (B, T, H, D)   k, v: (B, S, G, D)   lengths: (B,) int   k_scale, v_scale: (B, S, G) fp32
    paged: k, v: (N, page_size, G, D)   pages: (B, P) int32   k_scale, v_scale: (N, page_size, G) fp32

`lengths` counts the keys of each sequence, including the T new ones; the rest of the cache is never read. A query that
sees no key (position below 0) gives 0. Query head h reads key head h // (H / G). In a paged cache, position u of
sequence b lies in page pages[b, u // page_size], row u % page_size. A cache of int8 or float8_e4m3fn holds k / k_scale
and v / v_scale; one of q's dtype may, too. There is no derivative.

Scales are per head and position, not per head: a head's scale would have to be known before its keys, and one outlier
would cost every other position its digits. A scale adds 4 bytes to the D of a row, and multiplies scores and weights
rather than keys and values, so that it costs no more arithmetic than a coarser one.

The keys of a sequence are split among as many programs as fill the GPU, while the partial results, fp32 numbers for
each query and split, stay few beside the keys. The last program of a head to finish combines them, always in one order:
an atomic counter tells which is the last, and makes what the others stored visible to it. It resets the counter to 0.
If heads and sequences alone fill the GPU, there is one split and nothing to combine.

Split over the keys with combination: Dao et al., "Flash-Decoding",
https://pytorch.org/blog/flash-decoding/; pages: Kwon et al., arXiv:2309.06180; grouped heads: arXiv:2305.13245.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import arch, jit, launcher, multiprocessors, skip, starts_early, tile_arch, tl, triton
from ..op import Cost, Op, changed, require, without_gradient
from ..prims import await_inputs, early_launch, require_kernel_dtype, softcapped
from .reference import QUANTIZED, Cache, check, decode_attention_reference, quantize_kv


@jit
def _place(pages_ptr, b, u, there, pages_stride_b, pages_stride_p, PAGE_SIZE: tl.constexpr):
    """Returns the indices of positions u of sequence b on the cache's first and second axes."""
    if PAGE_SIZE == 0:
        return b, u.to(tl.int64)
    else:
        page = tl.load(pages_ptr + b * pages_stride_b + u // PAGE_SIZE * pages_stride_p, there, other=0)
        return page.to(tl.int64), (u % PAGE_SIZE).to(tl.int64)


@jit
def _load_numbers(pointers, mask, dtype: tl.constexpr):
    """Returns a tile of the cache in the dtype of the products. uint8 stands for float8_e4m3fn, converted by hand."""
    x = tl.load(pointers, mask, other=0.0)
    if x.dtype == tl.uint8:
        return _from_bits(x).to(dtype)
    elif x.dtype == dtype:
        return x
    else:
        return x.to(tl.float32).to(dtype)


@jit
def _combine(
    part_ptr, lse_ptr, out_ptr, b, g, first, T, H, group, splits,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Combine the partial results of up to BLOCK_M queries of a key head, QUERIES at a time -> out."""
    d, n = tl.arange(0, BLOCK_D)[None, None, :], tl.arange(0, PARTS)[None, :, None]
    for start in tl.range(first, tl.minimum(first + BLOCK_M, T * group), QUERIES):
        m = start + tl.arange(0, QUERIES)[:, None, None]
        query = (b * T + m // group) * H + g * group + m % group
        maximum = tl.full((QUERIES, 1, 1), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES, 1, 1), tl.float32)
        acc = tl.zeros((QUERIES, 1, BLOCK_D), tl.float32)
        for one in tl.range(0, splits, PARTS):
            stored = (m < T * group) & (one + n < splits)
            place = query * splits + one + n
            lse = tl.load(lse_ptr + place, stored, other=float("-inf"), cache_modifier=".cg")  # not what L1 holds
            part = tl.load(part_ptr + place * D + d, stored & (d < D), other=0.0, cache_modifier=".cg")
            larger = tl.maximum(maximum, tl.max(lse, axis=1)[:, None, :])
            origin = tl.where(larger == float("-inf"), 0.0, larger)
            weight, alpha = tl.exp2(lse - origin), tl.exp2(maximum - origin)
            maximum, total = larger, total * alpha + tl.sum(weight, axis=1)[:, None, :]
            acc = acc * alpha + tl.sum(weight * part, axis=1)[:, None, :]
        out = tl.where(total != 0.0, acc / total, 0.0)
        tl.store(out_ptr + query * D + d, out.to(out_ptr.dtype.element_ty), (m < T * group) & (d < D))


@jit
def _head(
    ptr, d, stored, weight_ptr, cos_ptr, sin_ptr, angle, eps,
    NORMED: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROTATED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Returns head vectors (BLOCK_D, columns) in fp32, normalized, and rotated by row `angle` of the tables.

    The other number of a pair is loaded again, not exchanged between threads: it is in the multiprocessor's cache.
    """
    x = tl.load(ptr + d, stored & (d < D), other=0.0).to(tl.float32)
    if NORMED:
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0)[None, :] / D + eps)
        x *= rstd
        if HAS_WEIGHT:
            x *= tl.load(weight_ptr + d, d < D, other=0.0).to(tl.float32)
    if ROTATED:
        low = d < D // 2
        pair, at = tl.where(low, d + D // 2, d - D // 2), angle * (D // 2) + tl.where(low, d, d - D // 2)
        y = tl.load(ptr + pair, stored & (d < D), other=0.0).to(tl.float32)
        if NORMED:
            y *= rstd
            if HAS_WEIGHT:
                y *= tl.load(weight_ptr + pair, d < D, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + at, stored & (d < D), other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at, stored & (d < D), other=0.0).to(tl.float32)
        x = x * cos + tl.where(low, -y, y) * sin
    return x


@jit
def _from_bits(x):
    """Returns the fp32 values of bytes that hold float8_e4m3fn."""
    bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
    number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0  # the biases of the exponents are 8 apart
    return tl.where((x & 0x7F) == 0x7F, float("nan"), number)


@jit
def _to_bits(x):
    """Returns fp32 numbers up to 448 in magnitude as bytes of float8_e4m3fn, rounded to nearest even."""
    bits = tl.abs(x).to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20).to(tl.int32) - (120 << 3)
    small = _rounded(tl.abs(x) * 512.0).to(tl.int32)  # below 2^-6 a step is 2^-9
    number = tl.where(tl.abs(x) < 0.015625, small, normal)
    number = tl.where(x == x, number, 0x7F)
    return (number | tl.where(x < 0.0, 0x80, 0)).to(tl.uint8)


@jit
def _rounded(x):
    """Returns fp32 numbers below 2^22 in magnitude rounded to integers, ties to even."""
    return (x + 12582912.0) - 12582912.0


@jit
def _keep(x, number_ptrs, scale_ptr, kept, stored, dtype: tl.constexpr, QUANTIZED: tl.constexpr):
    """Write one key or value (BLOCK_D, 1) to the cache; returns what the cache then holds, in fp32, and its scale."""
    x = x.to(dtype).to(tl.float32)
    scale = tl.full((1, 1), 1.0, tl.float32)
    if not QUANTIZED:
        tl.store(number_ptrs, x.to(dtype), kept & stored)
    else:
        INT8: tl.constexpr = number_ptrs.dtype.element_ty == tl.int8
        largest = tl.max(tl.abs(x), axis=0)[None, :]
        scale = tl.div_rn(largest, tl.full((1, 1), 127.0 if INT8 else 448.0, tl.float32))
        scale = tl.where(scale > 0.0, scale, 1.0)
        y = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
        if INT8:
            y = tl.where(y == y, tl.minimum(tl.maximum(_rounded(y), -127.0), 127.0), 0.0)  # bytes hold no NaN
            tl.store(number_ptrs, y.to(tl.int8), kept & stored)
            x = y
        else:
            bits = _to_bits(tl.minimum(tl.maximum(y, -448.0), 448.0))
            if number_ptrs.dtype.element_ty == tl.uint8:
                tl.store(number_ptrs, bits, kept & stored)
            else:
                tl.store(number_ptrs, bits.to(tl.float8e4nv, bitcast=True), kept & stored)
            x = _from_bits(bits)
        tl.store(scale_ptr + tl.zeros((1, 1), tl.int32), scale, kept)
    return x, scale


@jit
def decode_attention_fwd_kernel_split(
    q_ptr, k_ptr, v_ptr, lengths_ptr, pages_ptr, k_scale_ptr, v_scale_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr,
    out_ptr, part_ptr, lse_ptr, count_ptr,
    q_stride_b, q_stride_t, q_stride_h, q_stride_d, k_stride_n, k_stride_r, k_stride_g, k_stride_d,
    v_stride_n, v_stride_r, v_stride_g, v_stride_d, k_scale_stride_n, k_scale_stride_r, k_scale_stride_g,
    v_scale_stride_n, v_scale_stride_r, v_scale_stride_g, pages_stride_b, pages_stride_p,
    T, S, H, G, angles, splits, window, scale, softcap, eps,
    WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, QUANTIZED: tl.constexpr, WHOLE: tl.constexpr,
    APPEND: tl.constexpr, NORMED: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, ROTATED: tl.constexpr, PDL: tl.constexpr,
    PAGE_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries that share a key head, over one split of their keys -> out, or a partial result.

    A partial result is the split's own softmax(s) v in fp32, with its log-sum-exp in base 2. WHOLE: there is one split.
    Products are transposed, keys first: a matrix instruction has at least 64 rows on Hopper and Blackwell, more than
    there are queries, but as few as 8 columns. APPEND: q is followed by the keys and values of its own positions; the
    last split attends to them directly, and writes them to the cache, where no other program reads them.
    """
    await_inputs(PDL)
    group = H // G
    blocks = tl.cdiv(T * group, BLOCK_M)
    head, split = tl.program_id(0) // blocks, tl.program_id(1)
    b, g = (head // G).to(tl.int64), (head % G).to(tl.int64)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    t, h = m // group, g * group + m % group
    d = tl.arange(0, BLOCK_D)
    stored = (m < T * group) & (d[:, None] < D)
    q_rows = q_ptr + b * q_stride_b + t.to(tl.int64) * q_stride_t + h * q_stride_h
    length = tl.load(lengths_ptr + b).to(tl.int32)
    end = tl.minimum(length, S)
    position = end - T + t
    if APPEND:
        position = length + t
        angle = tl.minimum(position, angles - 1).to(tl.int64)
        q = _head(
            q_rows, d[:, None], m < T * group, q_norm_ptr, cos_ptr, sin_ptr, angle, eps,
            NORMED, HAS_NORM_WEIGHT, ROTATED, D,
        ).to(q_ptr.dtype.element_ty)  # fmt: skip
    else:
        q = tl.load(q_rows + d[:, None] * q_stride_d, stored, other=0.0)
    first = end * 0
    if WINDOWED:
        first = tl.maximum((length if APPEND else end - T) - window, 0)
    share = tl.cdiv(tl.cdiv(end - first, splits), BLOCK_N) * BLOCK_N
    start = first + split * share
    stop = tl.minimum(start + share, end)

    # cached keys
    maximum = tl.full((1, BLOCK_M), float("-inf"), tl.float32)
    total = tl.zeros((1, BLOCK_M), tl.float32)
    acc = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    for row in tl.range(start, stop, BLOCK_N):
        u = row + tl.arange(0, BLOCK_N)[:, None]
        n, r = _place(pages_ptr, b, u, u < stop, pages_stride_b, pages_stride_p, PAGE_SIZE)
        # scores
        k_rows = k_ptr + n * k_stride_n + r * k_stride_r + g * k_stride_g
        k = _load_numbers(k_rows + d[None, :] * k_stride_d, (u < stop) & (d[None, :] < D), q.dtype)
        s = tl.dot(k, q, input_precision="ieee") * scale
        if QUANTIZED:
            k_scale_rows = k_scale_ptr + n * k_scale_stride_n + r * k_scale_stride_r + g * k_scale_stride_g
            s *= tl.load(k_scale_rows, u < stop, other=0.0).to(tl.float32)
        if SOFTCAPPED:
            s = softcapped(s, softcap)
        seen = (u < stop) & (u <= position)
        if WINDOWED:
            seen = seen & (u >= position - window)
        s = tl.where(seen, s * 1.4426950408889634, float("-inf"))

        # softmax
        larger = tl.maximum(maximum, tl.max(s, axis=0)[None, :])
        origin = tl.where(larger == float("-inf"), 0.0, larger)  # no key seen yet: every weight is exp2(-inf - 0) = 0
        p = tl.exp2(s - origin)
        alpha = tl.exp2(maximum - origin)
        maximum, total = larger, total * alpha + tl.sum(p, axis=0)[None, :]
        if QUANTIZED:
            v_scale_rows = v_scale_ptr + n * v_scale_stride_n + r * v_scale_stride_r + g * v_scale_stride_g
            p *= tl.load(v_scale_rows, u < stop, other=0.0).to(tl.float32)
        # values; loaded transposed, not transposed afterwards, so that tiles of any dtype are prefetched asynchronously
        u = row + tl.arange(0, BLOCK_N)[None, :]
        n, r = _place(pages_ptr, b, u, u < stop, pages_stride_b, pages_stride_p, PAGE_SIZE)
        v_rows = v_ptr + n * v_stride_n + r * v_stride_r + g * v_stride_g
        v = _load_numbers(v_rows + d[:, None] * v_stride_d, (u < stop) & (d[:, None] < D), q.dtype)
        acc = tl.dot(v, p.to(q.dtype), acc * alpha, input_precision="ieee")

    # new keys
    if APPEND:
        for i in tl.range(0, tl.where(split == splits - 1, T, 0)):
            u = tl.full((1, 1), 0, tl.int32) + (length + i)
            new_k = q_ptr + b * q_stride_b + i.to(tl.int64) * q_stride_t + (H + g) * q_stride_h
            at = tl.minimum(u, angles - 1).to(tl.int64)
            x = _head(
                new_k, d[:, None], u >= 0, k_norm_ptr, cos_ptr, sin_ptr, at, eps, NORMED, HAS_NORM_WEIGHT, ROTATED, D
            )
            y = tl.load(new_k + G * q_stride_h + d[:, None], d[:, None] < D, other=0.0).to(tl.float32)
            kept = u < tl.where(tl.program_id(0) % blocks == 0, S, 0)  # one block of queries writes
            n, r = _place(pages_ptr, b, u, u < S, pages_stride_b, pages_stride_p, PAGE_SIZE)
            k_row = k_ptr + n * k_stride_n + r * k_stride_r + g * k_stride_g
            v_row = v_ptr + n * v_stride_n + r * v_stride_r + g * v_stride_g
            k_scale_row, v_scale_row = k_scale_ptr, v_scale_ptr
            if QUANTIZED:
                k_scale_row = k_scale_ptr + n * k_scale_stride_n + r * k_scale_stride_r + g * k_scale_stride_g
                v_scale_row = v_scale_ptr + n * v_scale_stride_n + r * v_scale_stride_r + g * v_scale_stride_g
            x, x_scale = _keep(
                x, k_row + d[:, None] * k_stride_d, k_scale_row, kept, d[:, None] < D, q.dtype, QUANTIZED
            )
            y, y_scale = _keep(
                y, v_row + d[:, None] * v_stride_d, v_scale_row, kept, d[:, None] < D, q.dtype, QUANTIZED
            )
            s = tl.sum(x * q.to(tl.float32), axis=0)[None, :] * (scale * x_scale)
            if SOFTCAPPED:
                s = softcapped(s, softcap)
            seen = u <= position
            if WINDOWED:
                seen = seen & (u >= position - window)
            s = tl.where(seen, s * 1.4426950408889634, float("-inf"))
            larger = tl.maximum(maximum, s)
            origin = tl.where(larger == float("-inf"), 0.0, larger)
            p, alpha = tl.exp2(s - origin), tl.exp2(maximum - origin)
            maximum, total = larger, total * alpha + p
            acc = acc * alpha + y * (p * y_scale)

    # epilogue
    out = tl.where(total != 0.0, acc / total, 0.0)  # NaN, too, is something seen
    query = (b * T + t) * H + h
    if WHOLE:
        tl.store(out_ptr + query * D + d[:, None], out.to(out_ptr.dtype.element_ty), stored)
    else:
        part = query * splits + split
        tl.store(lse_ptr + part, maximum + tl.log2(total), m < T * group)  # of no key -inf
        tl.store(part_ptr + part * D + d[:, None], out, stored)
        tl.debug_barrier()  # the atomic below releases the stores of one thread, so all threads must be done
        if tl.atomic_add(count_ptr + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
            start = tl.program_id(0) % blocks * BLOCK_M
            _combine(part_ptr, lse_ptr, out_ptr, b, g, start, T, H, group, splits, D, BLOCK_M, BLOCK_D, QUERIES, PARTS)
            tl.atomic_xchg(count_ptr + tl.program_id(0), 0)


class Append(NamedTuple):
    """How append.py prepares new queries and keys, and its counters, all 0."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    eps: float | None  # None: no norm
    counts: Tensor | None


class Tile(NamedTuple):
    """Keys of a tile, warps and stages of a program; `programs` per multiprocessor that splits aim at.

    `registers` is the limit per thread: unless it is given, ptxas for sm_100 spills rather than take more than 128.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs: int
    registers: int | None = None


# By architecture, then by the padded head dim. From the compiled code (results/aot.json); not timed on a GPU yet.
CONSERVATIVE = Tile(32, 4, 2, 4)
TILES = {
    80: {128: Tile(64, 8, 3, 4), 256: Tile(64, 8, 2, 2)},
    86: {128: Tile(64, 8, 3, 2), 256: Tile(64, 8, 2, 2)},
    90: {128: Tile(64, 4, 3, 4), 256: Tile(64, 8, 2, 2)},
    100: {128: Tile(64, 8, 3, 4, 255), 256: Tile(64, 8, 2, 2, 255)},
}
# The bounds of a window, and a cache of 8 bits, take so many registers that the tiles above would spill.
CROWDED_TILES = {(86, 128): Tile(32, 8, 3, 2), (90, 256): Tile(32, 8, 2, 2), (100, 256): Tile(32, 8, 2, 2, 255)}
MOST_ROWS = 32  # queries of one program; with 64, registers spill. Neighbours share their keys in the L2 cache
PART_SHARE = 12  # partial results move at most this fraction of the bytes of keys and values, if programs are many
COMBINED = 2048  # numbers of partial results that a combination loads at once


def tile(D: int, dtype: torch.dtype, arch: int, crowded: bool = False) -> Tile:
    """Returns the tile for head dim D; the smallest in fp32, whose products run on the ordinary cores."""
    arch, width = tile_arch(arch), 128 if D <= 128 else 256
    if arch not in TILES or dtype == torch.float32:
        return CONSERVATIVE
    plain = TILES[arch][width]
    return CROWDED_TILES.get((arch, width), plain) if crowded else plain


def count_splits(keys: int, queries: int, itemsize: int, places: int, block: Tile, multiprocessors: int) -> int:
    """Returns into how many splits a head's keys go for its `queries`, if one split makes `places` programs.

    As many as fill the GPU, but partial results grow with the queries. So they may move a twelfth of the bytes of keys
    and values, or more only until every other multiprocessor has a program: on an H100, 66 programs with two tiles of
    32 KiB in flight have 4 MiB, and 2.3 MiB keep its memory busy at 3.35 TB/s and a latency of 0.7 us.
    """
    fill = block.programs * multiprocessors // places
    light = 2 * keys * itemsize // (PART_SHARE * 2 * 4 * queries)  # a part is fp32, and is written and read
    needed = triton.cdiv(multiprocessors, 2 * places)
    return max(1, min(triton.cdiv(keys, block.block_n), fill, max(light, needed)))


def launch(
    q: Tensor, cache: Cache, lengths: Tensor, pages: Tensor | None, window: int, scale: float, softcap: float, H: int,
    append: Append | None = None,
) -> Tensor:  # fmt: skip
    """Returns attention of the first H heads of q. With `append` the cache does not hold q's positions yet."""
    k, v, k_scale, v_scale = cache
    (B, T, _, D), (S, G), page_size = q.shape, k.shape[1:3], 0
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    if launcher() is skip:  # depends on the shape alone: the number of splits must not tie a compiled graph to sizes
        return out
    if pages is not None:
        S, page_size = S * pages.shape[1], S
    if out.numel() == 0 or S == 0:
        return out.zero_()
    if k.dtype == torch.float8_e4m3fn and arch(q) < 89:  # no instruction converts it, and Triton has no type for it
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    block, block_d = tile(D, q.dtype, arch(q), window >= 0 or k_scale is not None), max(16, triton.next_power_of_2(D))
    queries = T * (H // G)
    block_m = min(MOST_ROWS, max(16, triton.next_power_of_2(queries)))
    places = B * G * triton.cdiv(queries, block_m)
    keys = S if window < 0 else min(S, T + window)
    splits = count_splits(keys, queries, k.dtype.itemsize, places, block, multiprocessors(q))
    combined = COMBINED // block_d
    at_once = min(block_m, combined // 2, triton.next_power_of_2(queries))
    parts, lse, counts = None, None, None
    if splits > 1:
        parts = q.new_empty((B, T, H, splits, D), dtype=torch.float32)
        lse = q.new_empty((B, T, H, splits), dtype=torch.float32)
        counts = q.new_zeros(places, dtype=torch.int32) if append is None or append.counts is None else append.counts
        require(counts.numel() >= places, f"counts: expected at least {places} of them, got {tuple(counts.shape)}")
    strides = [
        (0,) * size if x is None else x.stride()
        for x, size in ((q, 4), (k, 4), (v, 4), (k_scale, 3), (v_scale, 3), (pages, 2))
    ]
    q_norm, k_norm, cos, sin, eps = (None, None, None, None, None) if append is None else append[:5]
    decode_attention_fwd_kernel_split[(places, splits)](
        q, k, v, lengths.contiguous(), pages, k_scale, v_scale, q_norm, k_norm, cos, sin, out, parts, lse, counts,
        *itertools.chain(*strides), T, S, H, G, 0 if cos is None else cos.shape[0], splits, window, scale, softcap,
        0.0 if eps is None else eps,
        WINDOWED=window >= 0, SOFTCAPPED=softcap > 0, QUANTIZED=k_scale is not None, WHOLE=splits == 1,
        APPEND=append is not None, NORMED=eps is not None, HAS_NORM_WEIGHT=q_norm is not None, ROTATED=cos is not None,
        PAGE_SIZE=page_size, D=D, BLOCK_M=block_m, BLOCK_N=block.block_n, BLOCK_D=block_d,
        QUERIES=at_once, PARTS=combined // at_once, num_warps=block.num_warps, num_stages=block.num_stages,
        **early_launch(starts_early(q)), **({} if block.registers is None else {"maxnreg": block.registers}),
    )  # fmt: skip
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, window: int, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    return launch(q, Cache(k, v, k_scale, v_scale), lengths, pages, window, scale, softcap, q.shape[2])


_decode_attention = without_gradient("decode_attention", _forward)


def decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    pages: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute decode_attention_reference with the kernels of this page, on CUDA tensors of fp32, fp16 or bf16.

    Head dims D up to 256. Caches are not copied, and are read up to each sequence's length. Deterministic; nothing
    waits for the values of lengths, and launches depend on shapes alone, so that a CUDA graph may replay them.
    """
    check(q, Cache(k, v, k_scale, v_scale), lengths, pages, window, scale, softcap)
    require_kernel_dtype("q", q)
    require(q.shape[3] <= 256, f"q: head dims up to 256 have kernels, got {q.shape[3]}; use the reference")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    window = -1 if window is None else window
    return _decode_attention(q, k, v, lengths, pages, k_scale, v_scale, window, scale, float(softcap or 0.0))


def inputs(
    B: int, T: int, S: int, H: int, G: int, D: int, *, shortest: int | None = None, page_size: int = 0, cache: str = "",
    window: int | None = None, softcap: float | None = None, scale: float | None = None, dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
    """Draw normal q (B, T, H, D), k and v (B, S, G, D); lengths are spaced from `shortest` to S, all S by default.

    With a page_size the caches are pools of shuffled pages, and their table follows; with a `cache` of "int8" or "fp8"
    they are quantized, and their scales follow.
    """
    q = torch.randn(B, T, H, D, dtype=dtype, device=device)
    steps = torch.linspace(S if shortest is None else shortest, S, B, dtype=torch.float64, device=device)
    lengths = steps.round().to(torch.int32)
    pages, shape = None, (B, S, G, D)
    if page_size:
        P = max(2, -(-S // page_size))  # a table of one is special to a compiler
        pages = torch.randperm(B * P, device=device).to(torch.int32).view(B, P)
        shape = (B * P, page_size, G, D)
    k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in "kv")
    keywords = changed(decode_attention_reference, window=window, softcap=softcap, scale=scale)
    if not cache:
        return (q, k, v, lengths) if pages is None else (q, k, v, lengths, pages), keywords
    (k, k_scale), (v, v_scale) = (quantize_kv(x, QUANTIZED[cache]) for x in (k, v))
    return (q, k, v, lengths, pages, k_scale, v_scale), keywords


def cost(
    B: int, T: int, S: int, H: int, G: int, D: int, *, shortest: int | None = None, page_size: int = 0, cache: str = "",
    window: int | None = None, softcap: float | None = None, scale: float | None = None, itemsize: int,
) -> tuple[Cost, Cost]:  # fmt: skip
    """Count two products over visible keys; visible keys and values with their scales, q and out are moved once."""
    if window is None:
        keys = B * (S + (S if shortest is None else shortest)) // 2
        seen = T * keys - B * T * (T - 1) // 2
    else:  # of lengths not far below S
        keys, seen = B * min(S, window + T), B * T * min(S, window + 1)
    row = D + 4 if cache else D * itemsize
    return Cost(4 * H * D * max(0, seen), 2 * keys * G * row + 2 * B * T * H * D * itemsize), Cost(0, 0)


DECODE_ATTENTION = Op(
    name="decode_attention",
    reference=decode_attention_reference,
    triton=decode_attention_triton,
    inputs=inputs,
    parity=(
        dict(B=1, T=1, S=1, H=1, G=1, D=16), dict(B=1, T=1, S=150, H=1, G=1, D=16),
        dict(B=3, T=1, S=70, H=4, G=2, D=32, shortest=0),
        dict(B=2, T=2, S=100, H=4, G=2, D=64, shortest=65),
        dict(B=2, T=8, S=67, H=3, G=1, D=80, shortest=5),
        dict(B=0, T=1, S=5, H=2, G=1, D=16), dict(B=2, T=1, S=90, H=4, G=4, D=64, shortest=33),
        dict(B=2, T=3, S=131, H=6, G=2, D=24, shortest=64),
    ),
    domain=dict(S=range(1, 50), B=(1, 2), T=(1, 2, 3), H=(1, 3), G=(1,), D=(16, 24), shortest=(0, 1, None)),
    options=dict(
        window=(None, 9), softcap=(None, 2.0), scale=(None, 0.4), page_size=(0, 16), cache=("", "int8", "fp8")
    ),
    bench=(
        dict(B=1, T=1, S=1024, H=12, G=12, D=64), dict(B=32, T=1, S=8192, H=32, G=8, D=128),
        dict(B=1, T=1, S=32768, H=32, G=8, D=128), dict(B=8, T=1, S=1024, H=25, G=25, D=64),
        dict(B=32, T=1, S=8192, H=32, G=8, D=128, cache="int8"), dict(B=32, T=1, S=8192, H=32, G=8, D=128, cache="fp8"),
        dict(B=32, T=1, S=8192, H=32, G=8, D=128, page_size=64), dict(B=8, T=4, S=4096, H=16, G=2, D=128),
        dict(B=8, T=8, S=4096, H=32, G=8, D=128), dict(B=8, T=1, S=8192, H=8, G=4, D=256),
    ),
    cost=cost,
    summary="softmax(q k^T / sqrt(D)) v of the newest tokens against a cache of keys and values, its own length of it",
    differentiable=False,
)  # fmt: skip
