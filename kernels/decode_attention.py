"""Attention of the newest tokens of each sequence to a cache of keys and values: the decoding step.

    position[t] = lengths[b] - T + t      query t sees keys u <= position[t]; u >= position[t] - window if windowed
    s[t, u] = scale * sum_d q[t, d] * k[u, d]        s = softcap * tanh(s / softcap)  if softcap
    p = softmax_u(s where query t sees key u, else -inf)        out[t] = sum_u p[t, u] * v[u]

    q, out: (B, T, H, D)   k, v: (B, S, G, D)   lengths: (B,) int   k_scale, v_scale: (B, S, G) fp32
    paged: k, v: (N, page_size, G, D)   pages: (B, P) int32   k_scale, v_scale: (N, page_size, G) fp32

`lengths` counts the keys of each sequence, the T new ones among them; the rest of the cache is not looked at, whatever
it holds. A query that sees no key (position below 0) gives 0. Query head h reads key head h // (H / G). In a paged
cache position u of sequence b lies in page pages[b, u // page_size], row u % page_size. A cache of int8 or
float8_e4m3fn numbers holds k / k_scale and v / v_scale; one of q's dtype may, too. There is no derivative: nothing is
learned from a cache.

One scale per head and position, not one per head: a head's scale would have to be known before its keys are, and one
outlier would cost every other position its digits. It adds 4 bytes to the D of a row, and multiplies scores and weights
rather than keys and values, so it costs no more arithmetic than the coarser one.

The keys of a sequence are split among programs, as many as fill the GPU while the parts, fp32 numbers for each query
and split, stay few beside the keys, and a second kernel combines them. The last program of a sequence could do that in
place, and save 1 to 2 us of launch; it would need counters that outlive the call, one set per stream, and its reads of
what others wrote are what the interpreter's guard exists to refuse. Where heads and sequences fill the GPU there is one
split, and no second launch.

Split over the keys with a combination of the parts: Dao et al., "Flash-Decoding",
https://pytorch.org/blog/flash-decoding/; pages: Kwon et al., arXiv:2309.06180; grouped heads: arXiv:2305.13245.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import arch, jit, multiprocessors, tile_arch, tl, triton
from .op import Cost, Op, changed, require, without_gradient
from .prims import require_kernel_dtype, softcapped

QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FUSED = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of torch's fused operator on a CPU


class Cache(NamedTuple):
    """Keys and values, and the scales of quantized ones."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def each(self, function: Callable[[Tensor], Tensor]) -> Cache:
        """The function of every tensor."""
        k_scale, v_scale = (x if x is None else function(x) for x in (self.k_scale, self.v_scale))
        return Cache(function(self.k), function(self.v), k_scale, v_scale)

    def widened(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as numbers of this dtype."""
        k, v = self.k.to(dtype), self.v.to(dtype)
        if self.k_scale is None or self.v_scale is None:
            return k, v
        return k * self.k_scale[..., None], v * self.v_scale[..., None]


@torch.no_grad()
def decode_attention_reference(
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
    """Attention of q (B, T, H, D) to the cached k, v (B, S, G, D), lengths (B,) of them valid. Returns q's dtype.

    k and v have q's dtype, or are int8 or float8_e4m3fn with scales; any strides. `scale` is D^-1/2 by default; a
    window of 0 sees only its own position. Sums in at least fp32. Raises ValueError naming the argument, in eager mode
    on a CPU also for lengths and pages out of range: there lengths are read, and a sequence costs what its own length
    does. Elsewhere nothing waits for their values, and the whole cache is gone through.
    """
    _check(q, k, v, lengths, pages, k_scale, v_scale, window, scale, softcap)
    (B, T), D = q.shape[:2], q.shape[3]
    scale, cache = D**-0.5 if scale is None else scale, Cache(k, v, k_scale, v_scale)
    if not _on_host(lengths):
        if pages is not None:
            known = pages.clamp(0, k.shape[0] - 1)  # entries past a sequence's length may be anything
            cache = cache.each(lambda x: x[known].flatten(1, 2))
        position = lengths[:, None] - T + torch.arange(T, device=q.device)
        return _attend(q, cache, position, window, scale, softcap)

    def attend(batch: slice, length: int) -> Tensor:
        seeing = min(T, length)  # the queries before them stand at no position
        first = 0 if window is None else max(0, length - T - window)
        seen = cache.each(lambda x: _cut(x, pages, batch, first, length))
        return _attend_newest(q[batch, T - seeing :], seen, window, scale, softcap)

    found = lengths.tolist()
    if pages is None and B > 0 and found[0] >= T and found.count(found[0]) == B:
        return attend(slice(0, B), found[0])
    out = torch.zeros(q.shape, dtype=q.dtype)
    for b, length in enumerate(found):
        if length:
            out[b : b + 1, max(0, T - length) :] = attend(slice(b, b + 1), length)
    return out


def _on_host(lengths: Tensor) -> bool:
    """Whether values may be looked at: on a GPU that would wait for it, in a compiled graph they are not there."""
    return lengths.device.type == "cpu" and not torch.compiler.is_compiling()


def _cut(x: Tensor, pages: Tensor | None, batch: slice, first: int, length: int) -> Tensor:
    """Positions first to length of some sequences: x (B, S, ...) -> (batch, length - first, ...)."""
    if pages is None:
        return x[batch, first:length]
    before, after = first // x.shape[1], -(-length // x.shape[1])
    start = before * x.shape[1]
    return x[pages[batch, before:after]].flatten(1, 2)[:, first - start : length - start]


def _hidden(position: Tensor, S: int, window: int | None) -> Tensor:
    """True (B, T, S) where the query at position (B, T) must not see the key."""
    u, position = torch.arange(S, device=position.device), position[..., None]
    hidden = u > position
    return hidden if window is None else hidden | (u < position - window)


def _attend(
    q: Tensor, cache: Cache, position: Tensor, window: int | None, scale: float, softcap: float | None
) -> Tensor:  # fmt: skip
    """The definition: queries at position (B, T) over a contiguous cache (B, S, G, D)."""
    (B, T, H, D), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    k, v = cache.widened(wide)
    S, G = k.shape[1:3]
    hidden = _hidden(position, S, window)
    beyond = (torch.arange(S, device=q.device) > position[:, -1:])[..., None, None]  # (B, S, 1, 1)
    v = v.masked_fill(beyond, 0.0)  # 0 times what lies there may be NaN
    s = torch.einsum("btgrd,bsgd->bgrts", q.to(wide).reshape(B, T, G, H // G, D), k) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    hidden = hidden[:, None, None]
    p = torch.softmax(s.masked_fill(hidden, -torch.inf), dim=-1).masked_fill(hidden, 0.0)
    return torch.einsum("bgrts,bsgd->btgrd", p, v).reshape(B, T, H, D).to(q.dtype)


def _attend_newest(q: Tensor, cache: Cache, window: int | None, scale: float, softcap: float | None) -> Tensor:
    """The same for queries of the last positions of a cache that was cut to what they see, on a CPU.

    By torch's fused operator where it can: the queries of a group of heads are rows of one product. It reads 16-bit
    keys as they are: at 1024 keys, H = G = 12, D = 64 on two cores, fp16 takes 0.35 ms where converting takes 3.1 and a
    pair of products 1.4; fp32 takes 0.30 either way.
    """
    (B, T, H, D), (S, G) = q.shape, cache.k.shape[1:3]
    if softcap is not None or cache.k_scale is not None or q.dtype not in FUSED:
        return _attend(q, cache, torch.arange(S - T, S)[None], window, scale, softcap)
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    if T == 1:  # it sees all that was cut out for it
        rows = q.reshape(B, G, H // G, D)
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(B, 1, H, D)
    rows = q.reshape(B, T, G, H // G, D).transpose(1, 2).reshape(B, G, -1, D)
    seen = ~_hidden(torch.arange(S - T, S)[None], S, window)[:, None].repeat_interleave(H // G, dim=2)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen, scale=scale)
    return out.view(B, G, T, H // G, D).transpose(1, 2).reshape(B, T, H, D)


def quantize_kv(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Keys or values (..., D) as int8 or float8_e4m3fn numbers (..., D), and the scales (...) fp32 to multiply back.

    Each row is divided by its largest magnitude, which becomes 127 (int8) or 448 (fp8). A row of zeros has scale 1.
    """
    require(dtype in QUANTIZED.values(), f"dtype: expected torch.int8 or torch.float8_e4m3fn, got {dtype}")
    require(x.is_floating_point(), f"x: expected a floating dtype, got {x.dtype}")
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.abs().amax(dim=-1).float() / largest
    scale = torch.where(scale > 0, scale, 1.0)
    y = x.float() / scale[..., None]
    return (y.round() if dtype == torch.int8 else y).clamp(-largest, largest).to(dtype), scale


def _check(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, window: int | None, scale: float | None, softcap: float | None,
) -> None:  # fmt: skip
    """Refuse arguments that mean nothing: raises ValueError that names the argument and what it should be.

    Messages are made only for what is refused: making them all takes longer than a short sequence.
    """
    if q.dim() != 4 or min(q.shape[2:]) == 0:
        raise ValueError(f"q: expected (B, T, H, D), got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    B, _, H, D = q.shape
    if k.dim() != 4 or k.shape[3] != D or (pages is None and k.shape[0] != B):
        what = "(B, S, G, D) with q's B and D" if pages is None else "(N, page_size, G, D) with q's D"
        raise ValueError(f"k: expected {what}, got {tuple(k.shape)} for q {tuple(q.shape)}")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"k: its {k.shape[2]} heads do not divide the {H} heads of q")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v: expected {tuple(k.shape)} of {k.dtype} as k is, got {tuple(v.shape)} of {v.dtype}")
    quantized = k.dtype in QUANTIZED.values()
    if not quantized and k.dtype != q.dtype:
        raise ValueError(f"k: expected q's dtype {q.dtype}, int8 or float8_e4m3fn, got {k.dtype}")
    if lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths: expected ({B},) int32 or int64, got {tuple(lengths.shape)} {lengths.dtype}")
    if quantized or k_scale is not None or v_scale is not None:
        for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
            if x is None:
                raise ValueError(f"{name}: a cache of int8 or float8_e4m3fn needs both scales, and none goes alone")
            if x.shape != k.shape[:3] or not x.is_floating_point():
                raise ValueError(f"{name}: expected {tuple(k.shape[:3])} float32, got {tuple(x.shape)} {x.dtype}")
    if pages is not None:
        if pages.dim() != 2 or pages.shape[0] != B or pages.dtype != torch.int32:
            raise ValueError(f"pages: expected (B, P) int32, got {tuple(pages.shape)} {pages.dtype}")
        require(k.shape[1] > 0, "k: pages of no rows")
    tensors = {"k": k, "v": v, "lengths": lengths, "pages": pages, "k_scale": k_scale, "v_scale": v_scale}
    for name, x in tensors.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, but q is on {q.device}")
    if window is not None and window < 0:
        raise ValueError(f"window: expected a number of positions or None, got {window}")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale: expected a positive number or None, got {scale}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if _on_host(lengths):
        _check_values(k, lengths, pages)


def _check_values(k: Tensor, lengths: Tensor, pages: Tensor | None) -> None:
    """Lengths within the cache, and pages within the pool as far as the lengths reach."""
    capacity = k.shape[1] if pages is None else pages.shape[1] * k.shape[1]
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"lengths: {length} of sequence {b} is outside 0 to {capacity}")
        if pages is not None and length:
            low, high = (x.item() for x in pages[b, : -(-length // k.shape[1])].aminmax())
            require(0 <= low <= high < k.shape[0], f"pages: sequence {b} has {low} to {high}, the pool {k.shape[0]}")


@jit
def _place(pages_ptr, b, u, there, pages_stride_b, pages_stride_p, PAGE_SIZE: tl.constexpr):
    """Where positions u of sequence b lie: index on the cache's first axis, and on its second."""
    if PAGE_SIZE == 0:
        return b, u.to(tl.int64)
    else:
        page = tl.load(pages_ptr + b * pages_stride_b + u // PAGE_SIZE * pages_stride_p, there, other=0)
        return page.to(tl.int64), (u % PAGE_SIZE).to(tl.int64)


@jit
def _load_numbers(pointers, mask, dtype: tl.constexpr):
    """A tile of the cache in the dtype of the products. Bytes are float8_e4m3fn to be converted by hand."""
    x = tl.load(pointers, mask, other=0.0)
    if x.dtype == tl.uint8:
        bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0  # the biases of the exponents are 8 apart
        return tl.where((x & 0x7F) == 0x7F, float("nan"), number).to(dtype)
    elif x.dtype == dtype:
        return x
    else:
        return x.to(tl.float32).to(dtype)


@jit
def decode_attention_fwd_kernel_split(
    q_ptr, k_ptr, v_ptr, lengths_ptr, pages_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_t, q_stride_h, q_stride_d, k_stride_n, k_stride_r, k_stride_g, k_stride_d,
    v_stride_n, v_stride_r, v_stride_g, v_stride_d, k_scale_stride_n, k_scale_stride_r, k_scale_stride_g,
    v_scale_stride_n, v_scale_stride_r, v_scale_stride_g, pages_stride_b, pages_stride_p,
    T, S, H, G, splits, window, scale, softcap,
    WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, QUANTIZED: tl.constexpr, WHOLE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M of the queries that share a key head, over one split of the keys they see -> out or a part.

    A part is the split's own softmax(s) v in fp32, with its log-sum-exp in base 2; WHOLE: there is one split. Products
    are transposed, keys first: a matrix instruction has at least 64 rows on Hopper and Blackwell, for which there are
    too few queries, but as little as 8 columns.
    """
    group = H // G
    blocks = tl.cdiv(T * group, BLOCK_M)
    head, split = tl.program_id(0) // blocks, tl.program_id(1)
    b, g = (head // G).to(tl.int64), (head % G).to(tl.int64)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    t, h = m // group, g * group + m % group
    d = tl.arange(0, BLOCK_D)
    stored = (m < T * group) & (d[:, None] < D)
    q_rows = q_ptr + b * q_stride_b + t.to(tl.int64) * q_stride_t + h * q_stride_h
    q = tl.load(q_rows + d[:, None] * q_stride_d, stored, other=0.0)

    end = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), S)
    position = end - T + t
    first = end * 0
    if WINDOWED:
        first = tl.maximum(end - T - window, 0)
    share = tl.cdiv(tl.cdiv(end - first, splits), BLOCK_N) * BLOCK_N
    start = first + split * share
    stop = tl.minimum(start + share, end)

    maximum = tl.full((1, BLOCK_M), float("-inf"), tl.float32)
    total = tl.zeros((1, BLOCK_M), tl.float32)
    acc = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    for row in tl.range(start, stop, BLOCK_N):
        u = row + tl.arange(0, BLOCK_N)[:, None]
        n, r = _place(pages_ptr, b, u, u < stop, pages_stride_b, pages_stride_p, PAGE_SIZE)
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

        larger = tl.maximum(maximum, tl.max(s, axis=0)[None, :])
        origin = tl.where(larger == float("-inf"), 0.0, larger)  # no key seen yet: every weight is exp2(-inf - 0) = 0
        p = tl.exp2(s - origin)
        alpha = tl.exp2(maximum - origin)
        maximum, total = larger, total * alpha + tl.sum(p, axis=0)[None, :]
        if QUANTIZED:
            v_scale_rows = v_scale_ptr + n * v_scale_stride_n + r * v_scale_stride_r + g * v_scale_stride_g
            p *= tl.load(v_scale_rows, u < stop, other=0.0).to(tl.float32)
        # Read as its transpose, not transposed after: so that tiles of all dtypes are copied ahead, past the registers.
        u = row + tl.arange(0, BLOCK_N)[None, :]
        n, r = _place(pages_ptr, b, u, u < stop, pages_stride_b, pages_stride_p, PAGE_SIZE)
        v_rows = v_ptr + n * v_stride_n + r * v_stride_r + g * v_stride_g
        v = _load_numbers(v_rows + d[:, None] * v_stride_d, (u < stop) & (d[:, None] < D), q.dtype)
        acc = tl.dot(v, p.to(q.dtype), acc * alpha, input_precision="ieee")

    sees = total != 0.0  # NaN, too, is something seen
    out = tl.where(sees, acc / total, 0.0)
    query = (b * T + t) * H + h
    if WHOLE:
        tl.store(out_ptr + query * D + d[:, None], out.to(out_ptr.dtype.element_ty), stored)
    else:
        part = query * splits + split
        tl.store(lse_ptr + part, maximum + tl.log2(total), m < T * group)  # of no key -inf
        tl.store(out_ptr + part * D + d[:, None], out, stored & sees)  # the others are not read either


@jit
def decode_attention_fwd_kernel_combine(
    part_ptr, lse_ptr, out_ptr, splits, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One program: the parts of one query, each by the weight of its keys -> out[b, t, h, :], always in one order."""
    query = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    maximum = tl.full((1, 1), float("-inf"), tl.float32)
    total = tl.zeros((1, 1), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(0, splits, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        lse = tl.load(lse_ptr + query * splits + n, n < splits, other=float("-inf"))
        part = tl.load(part_ptr + (query * splits + n) * D + d, (lse != float("-inf")) & (d < D), other=0.0)
        larger = tl.maximum(maximum, tl.max(lse, axis=0)[None, :])
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        weight = tl.exp2(lse - origin)
        alpha = tl.exp2(maximum - origin)
        maximum, total = larger, total * alpha + tl.sum(weight, axis=0)[None, :]
        acc = acc * alpha + weight * part
    out = tl.where(total != 0.0, tl.sum(acc, axis=0)[None, :] / total, 0.0)
    tl.store(out_ptr + query * D + d, out.to(out_ptr.dtype.element_ty), d < D)


class Tile(NamedTuple):
    """Keys of a tile, warps and stages of a program; `programs`: how many of a multiprocessor's the splits aim at."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int


# By architecture, then by the padded head dim. From the compiled code (results/aot.json); not timed on a GPU yet.
CONSERVATIVE = Tile(32, 4, 2, 4)
TILES = {
    80: {128: Tile(64, 4, 3, 4), 256: Tile(64, 8, 2, 2)},
    86: {128: Tile(64, 8, 3, 2), 256: Tile(64, 8, 2, 2)},
    90: {128: Tile(64, 4, 3, 4), 256: Tile(64, 8, 2, 2)},
    100: {128: Tile(64, 4, 3, 4), 256: Tile(64, 8, 2, 2)},
}
# Where the bounds of a window take so many registers that the tiles above would spill 8 B.
WINDOWED_TILES = {(100, 128): Tile(64, 8, 3, 4), (100, 256): Tile(32, 8, 2, 2)}
MOST_ROWS = 32  # queries of one program; with 64 the registers spill. Neighbours share their keys in the L2 cache
PART_SHARE = 12  # parts move at most one in so many of the bytes of the keys and values, where programs are many
COMBINED = 16  # parts that the combination takes at once


def tile(D: int, dtype: torch.dtype, arch: int, windowed: bool = False) -> Tile:
    """The tile for head dim D. Matrix products in fp32 run on the ordinary cores, and then small tiles are best."""
    arch, width = tile_arch(arch), 128 if D <= 128 else 256
    if arch not in TILES or dtype == torch.float32:
        return CONSERVATIVE
    plain = TILES[arch][width]
    return WINDOWED_TILES.get((arch, width), plain) if windowed else plain


def count_splits(keys: int, queries: int, itemsize: int, places: int, block: Tile, multiprocessors: int) -> int:
    """Splits of the keys of one head for its `queries`, in a launch of `places` programs: as many as fill the GPU.

    But the more queries, the more their parts weigh. So no more splits than move a twelfth of what the keys and values
    do, as long as every other multiprocessor has a program: on an H100, 66 with two tiles of 32 KiB under way have
    4 MiB in flight, and memory at 3.35 TB/s, which answers in some 0.7 us, can be kept busy with 2.3.
    """
    fill = block.programs * multiprocessors // places
    light = 2 * keys * itemsize // (PART_SHARE * 2 * 4 * queries)  # a part is fp32, and is written and read
    needed = triton.cdiv(multiprocessors, 2 * places)
    return max(1, min(triton.cdiv(keys, block.block_n), fill, max(light, needed)))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, window: int, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    (B, T, H, D), (S, G), page_size = q.shape, k.shape[1:3], 0
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    if pages is not None:
        S, page_size = S * pages.shape[1], S
    if out.numel() == 0 or S == 0:
        return out.zero_()
    if k.dtype == torch.float8_e4m3fn and arch(q) < 89:  # without an instruction to convert it, nor a Triton type
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    block, block_d = tile(D, q.dtype, arch(q), window >= 0), max(16, triton.next_power_of_2(D))
    queries = T * (H // G)
    block_m = min(MOST_ROWS, max(16, triton.next_power_of_2(queries)))
    places = B * G * triton.cdiv(queries, block_m)
    keys = S if window < 0 else min(S, T + window)
    splits = count_splits(keys, queries, k.dtype.itemsize, places, block, multiprocessors(q))
    parts = out if splits == 1 else q.new_empty((B, T, H, splits, D), dtype=torch.float32)
    lse = None if splits == 1 else q.new_empty((B, T, H, splits), dtype=torch.float32)
    strides = [
        (0,) * size if x is None else x.stride()
        for x, size in ((q, 4), (k, 4), (v, 4), (k_scale, 3), (v_scale, 3), (pages, 2))
    ]
    decode_attention_fwd_kernel_split[(places, splits)](
        q, k, v, lengths.contiguous(), pages, k_scale, v_scale, parts, lse, *itertools.chain(*strides),
        T, S, H, G, splits, window, scale, softcap,
        WINDOWED=window >= 0, SOFTCAPPED=softcap > 0, QUANTIZED=k_scale is not None, WHOLE=splits == 1,
        PAGE_SIZE=page_size, D=D, BLOCK_M=block_m, BLOCK_N=block.block_n, BLOCK_D=block_d,
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    if splits > 1:
        decode_attention_fwd_kernel_combine[(B * T * H,)](
            parts, lse, out, splits, D=D, BLOCK_N=COMBINED, BLOCK_D=block_d,
            num_warps=max(1, COMBINED * block_d // 512),
        )  # fmt: skip
    return out


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
    """decode_attention_reference by the kernels of this page, on CUDA tensors of fp32, fp16 or bf16, D up to 256.

    Caches are read where they lie, up to each sequence's length. Deterministic; nothing waits for the values of
    lengths, and launches depend on shapes alone, so that a CUDA graph may replay them.
    """
    _check(q, k, v, lengths, pages, k_scale, v_scale, window, scale, softcap)
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
    """q (B, T, H, D), k and v (B, S, G, D), normal; lengths evenly from `shortest` to S, all S by default.

    With a page_size the caches are pools of shuffled pages, and the table follows; with a `cache` of "int8" or "fp8"
    they are quantized, and the scales follow.
    """
    q = torch.randn(B, T, H, D, dtype=dtype, device=device)
    steps = torch.linspace(S if shortest is None else shortest, S, B, dtype=torch.float64, device=device)
    lengths = steps.round().to(torch.int32)
    pages, shape = None, (B, S, G, D)
    if page_size:
        P = -(-S // page_size)
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
    """Two products over the keys seen; every key and value that is seen, with its scale, read once, q and out once."""
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
