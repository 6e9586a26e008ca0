"""Shared by the Hopper kernels of attention: their requirements, descriptors, and the steps before and after them."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._triton import (
    HAS_GLUON,
    GluonDescriptor,
    arch,
    gl,
    gl_builtin,
    gl_hopper,
    gl_ir,
    gluon_jit,
    jit,
    launcher,
    skip,
    tl,
)
from ..shared import Options, document_bounds

HEAD_DIMS = (64, 128, 256)
LOG2_E = 1.4426950408889634
LEAST_SOFTCAP = 1e-6  # below, a masked share would be no mask
# One machine code for all sizes: no kernel here is faster for knowing that one of these is a multiple of 16, or 1.
SIZES = ("heads", "T", "S", "H", "G", "rows", "window")
plain_kernel = functools.partial(jit, do_not_specialize=SIZES)
gluon_kernel = functools.partial(gluon_jit, do_not_specialize=SIZES)


def obstacle(q: Tensor, k: Tensor, v: Tensor, options: Options) -> str:
    """Returns why these kernels cannot run, naming the argument; '' if they can."""
    (_, T, _, D), S, capability, by = q.shape, k.shape[1], arch(q), launcher()
    if not HAS_GLUON or (by is not None and not by.gluon):
        return "Triton: this version, or the interpreter, has no Gluon of the kind that the kernel is written in"
    if capability != 90:
        return f"q: the kernel is for sm_90, this is sm_{capability}"
    if q.dtype != torch.bfloat16 or D not in HEAD_DIMS:
        return f"q: needs bf16 and a head dim of 64, 128 or 256, got {q.dtype} and {D}"
    if S < T:
        return f"k: needs at least as many keys as queries, got {S} and {T}"
    if not options.causal:
        return "causal: needs True"
    if options.dropout:
        return "dropout: needs to be left out"
    if 0 < options.softcap < LEAST_SOFTCAP:
        return f"softcap: needs at least {LEAST_SOFTCAP}, got {options.softcap}"
    return ""


class Features(NamedTuple):
    """Of options, what every kernel is given."""

    window: int  # S if there is none
    documents: Tensor | None  # document_bounds
    share: float  # takes products of q and k to shares of the softcap; unused without one
    factor: float  # takes those, or without a softcap the products, to scores in base 2
    flags: dict[str, bool]


def features(options: Options, S: int) -> Features:
    documents, capped = document_bounds(options.cu_seqlens, S), options.softcap > 0
    share, factor = (options.scale / options.softcap, options.softcap) if capped else (0.0, options.scale)
    flags = dict(BOUNDED=options.bounded, DOCUMENTS=documents is not None, SOFTCAPPED=capped)
    return Features(options.window if options.window >= 0 else S, documents, share, factor * LOG2_E, flags)


def can_run(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    return launcher() is not skip and not obstacle(q, k, v, options)


def tiles_of(x: Tensor, block: int) -> Any:
    """Returns a descriptor of x (B, T, H, D) for tiles of `block` rows of a head, swizzled for matrix products."""
    (B, T, H, D), (b, t, h, d) = x.shape, x.stride()
    return _descriptor(x, (B, H, T, D), (b, h, t, d), (1, 1, block, D))


def statistics_of(x: Tensor, block: int) -> Any:
    """Returns a descriptor of x (2, heads, rows) fp32 that moves `block` numbers of one head."""
    return _descriptor(x, x.shape, x.stride(), (1, 1, block))


def sums_of(x: Tensor, rows: int, columns: int) -> Any:
    """Returns a descriptor of x (heads, rows, D) fp32 that adds tiles (rows, columns) to one head's."""
    return _descriptor(x, x.shape, x.stride(), (1, rows, columns))


def _descriptor(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """Returns a descriptor. Its checks and layout do not depend on the address, and are cached."""
    assert x.data_ptr() % 16 == 0, "descriptors begin at multiples of 16 bytes"
    made = object.__new__(GluonDescriptor)
    made.__dict__.update(_fields(x.dtype, shape, strides, block), base=x)
    return made


@functools.lru_cache(maxsize=4096)
def _fields(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> dict:
    bits = dtype.itemsize * 8
    if block[:-1] == (1,) * (len(block) - 1):  # a line of numbers is not swizzled
        layout = gl.NVMMASharedLayout(0, bits, rank=len(block))
    else:
        layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16 if bits == 16 else gl.float32)
    like = torch.empty(0, dtype=dtype, device="cpu")
    return dict(vars(GluonDescriptor(like, list(shape), list(strides), list(block), layout)))


class Tile(NamedTuple):
    """Queries of a tile; tiles of queries, dout and ds in flight; registers per thread of the groups for dk and dv."""

    block_m: int
    q_stages: int
    o_stages: int
    s_stages: int
    registers: int


# ---- inside kernels

if HAS_GLUON:

    @gl_builtin
    def reduce_add(desc, coord, source, _semantic=None):
        """Add a tile of shared memory to global memory by the tensor memory accelerator; Gluon has no name for it."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(gl_ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, source.handle)

    reduce_add.emulated = "reduce_add"

else:
    reduce_add = None


@gluon_jit
def fetch(source, b, head, row, full, target):
    """Start the copy of a tile of rows of one head; the barrier `full` completes when it has landed."""
    gl_hopper.mbarrier.expect(full, source.block_type.nbytes)
    gl_hopper.tma.async_copy_global_to_shared(source, [b, head, row, 0], full, target)


@gluon_jit
def fetch_both(source, statistics, kind, b, head, H, row, full, target, statistics_target):
    """Start the copy of such a tile together with the log-sum-exp (kind 0) or delta (1) of its rows."""
    gl_hopper.mbarrier.expect(full, source.block_type.nbytes + statistics.block_type.nbytes)
    gl_hopper.tma.async_copy_global_to_shared(source, [b, head, row, 0], full, target)
    gl_hopper.tma.async_copy_global_to_shared(statistics, [kind, b * H + head, row], full, statistics_target)


@gluon_jit
def first_key(p, S, window, document_ptr, DOCUMENTS: gl.constexpr):
    """Returns the first key that the query at position p < S sees, or a negative number for key 0."""
    first = p - window
    if DOCUMENTS:
        first = gl.maximum(first, gl.load(document_ptr + p))
    return first


@gluon_jit
def last_query(u, S, window, document_ptr, DOCUMENTS: gl.constexpr):
    """Returns the position of the last query that sees key u < S, or a number past the last query."""
    last = u + window
    if DOCUMENTS:
        last = gl.minimum(last, gl.load(document_ptr + S + u) - 1)
    return last


@gluon_jit
def queries_from(
    n, T, S, window, document_ptr, KEYS: gl.constexpr, BLOCK_M: gl.constexpr, BOUNDED: gl.constexpr,
    DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """Returns the row of the first tile of queries that see one of KEYS keys from n on, and the number of tiles.

    There is always one; where keys are too old for every query, its mask leaves nothing.
    """
    first = gl.maximum(n - (S - T), 0) // BLOCK_M * BLOCK_M
    end = T
    if BOUNDED:
        last = last_query(gl.minimum(n + KEYS, S) - 1, S, window, document_ptr, DOCUMENTS)
        end = gl.minimum(T, gl.maximum(last + 1 - (S - T), first + 1))
    return first, gl.cdiv(end - first, BLOCK_M)


@gluon_jit
def next_queries(head, row, first, end, HEADS: gl.constexpr, BLOCK_M: gl.constexpr):
    """Returns head and row of the next tile of queries, of rows first to end of each of HEADS heads."""
    row = row + BLOCK_M
    if HEADS > 1 and row == end:
        head, row = head + 1, first
    return head, row


@gluon_jit
def tanh(x):
    """Returns tanh(x) in fp32, as ..shared.tanh does."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return gl.where(square < 0.09, series, 1.0 - 2.0 / (gl.exp2(x * 2.8853900817779268) + 1.0))


@gluon_jit
def weights_of(
    s, lse, position, start, until, S, window, document_ptr, share, factor, BLOCK_M: gl.constexpr,
    BOUNDED: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAPPED: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Returns the weights [64 keys from start on, queries from position on], 0 where a query does not see a key, and
    their gradients' factor ds / (dp - delta): the weights, times the slope of the softcap.

    `until` is last_query of the first key: up to there, and from the last key on, a tile needs no mask. Under a softcap
    shares are masked, so that fewer tiles of numbers are held at once: by -1e9, whose square is finite.
    """
    HIDDEN: gl.constexpr = -1e9 if SOFTCAPPED else 0.0
    if SOFTCAPPED:
        p = tanh(s * share)
    else:
        p = gl.exp2(s * factor - lse[None, :])
    masked = position < start + 63
    if BOUNDED:
        masked = masked | (position + (BLOCK_M - 1) > until)
    if masked:
        keys = start + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        queries = position + gl.arange(0, BLOCK_M, gl.SliceLayout(0, SCORES))
        p = gl.where(queries[None, :] >= keys[:, None], p, HIDDEN)
        if BOUNDED:
            last = last_query(gl.minimum(keys, S - 1), S, window, document_ptr, DOCUMENTS)
            p = gl.where(queries[None, :] <= last[:, None], p, HIDDEN)
    slope = p
    if SOFTCAPPED:
        slope = 1.0 - p * p
        p = gl.exp2(p * factor - lse[None, :])
        slope = slope * p
    return p, slope


# ---- before and after the backward


@plain_kernel
def attention_bwd_kernel_prepare(
    out_ptr, dout_ptr, lse_ptr, statistics_ptr, sums_ptr, dout_stride_b, dout_stride_t, dout_stride_h,
    heads, T, H, rows, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK queries of one head. statistics (2, heads, rows): the log-sum-exp, +inf past T, and
    delta[t] = sum_d dout[t, d] * out[t, d], 0 past T; sums (heads, rows, D) <- 0. rows is a multiple of BLOCK.
    """
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)[None, :]
    row, inside = t[:, None].to(tl.int64), (t < T)[:, None]
    out = tl.load(out_ptr + ((b * T + row) * H + h) * D + d, inside, other=0.0)
    dout_rows = dout_ptr + b * dout_stride_b + h * dout_stride_h + row * dout_stride_t
    dout = tl.load(dout_rows + d, inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + head.to(tl.int64) * T + t, t < T, other=float("inf"))
    tl.store(statistics_ptr + head.to(tl.int64) * rows + t, lse, t < rows)
    tl.store(statistics_ptr + (heads + head).to(tl.int64) * rows + t, delta, t < rows)
    tl.store(sums_ptr + (head.to(tl.int64) * rows + row) * D + d, tl.zeros((BLOCK, D), tl.float32))


@plain_kernel
def attention_bwd_kernel_finish(
    sums_ptr, dq_ptr, dq_stride_b, dq_stride_t, dq_stride_h, T, H, rows, scale, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: BLOCK queries of one head of the sums (heads, rows, D) fp32 -> dq, rounded."""
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, D)[None, :]
    dq = tl.load(sums_ptr + (head.to(tl.int64) * rows + t) * D + d, t < T, other=0.0) * scale
    dq_rows = dq_ptr + b * dq_stride_b + h * dq_stride_h + t.to(tl.int64) * dq_stride_t
    tl.store(dq_rows + d, dq.to(dq_ptr.dtype.element_ty), t < T)
