"""Up to four rows of x in bf16, on the tensor cores, and as exact as rows.py.

On the ordinary cores a product of few rows is bound by instructions: an element of the matrix takes one to be widened
and one for each sum that it is part of, of which there are three beside a layernorm. Here these sums are columns of one
product. A row of x, times norm_weight, is a sum of three bf16 numbers, which hold the 24 bits of an fp32 number;
norm_weight and norm_bias have three columns each, or none. Warps share out the contracted axis, so that a program may
have as few as 16 rows of the matrix, and the matrix is prefetched into shared memory.
"""

from typing import NamedTuple

from .._triton import jit, tile_arch, tl
from ..prims import activated, await_inputs, softcapped
from .rows import prefetch_operands

MOST_ROWS = 4  # of x
SLICES = tl.constexpr(4)  # of the contracted axis, a warp each
START = tl.constexpr(16)  # numbers of a row of x whose mean is taken off first, so that nothing cancels


@jit
def _with_thirds(columns, x):
    """Returns columns and three bf16 numbers whose sum is x in fp32."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    columns += (high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16))
    return columns


@jit
def _side_by_side(columns, COUNT: tl.constexpr):
    """Returns (..., COUNT) from COUNT tensors, in the order of reversed bits: what _column undoes."""
    if COUNT == 1:
        return columns[0]
    else:
        pairs = ()  # type: tuple
        for i in tl.static_range(COUNT // 2):
            pair = tl.join(columns[2 * i], columns[2 * i + 1])
            if len(pair.shape) == 4:
                pair = tl.reshape(pair, (pair.shape[0], pair.shape[1], 2 * pair.shape[2]))
            pairs += (pair,)
        return _side_by_side(pairs, COUNT // 2)


@jit
def _column(COUNT: tl.constexpr):
    """Returns which column each row of a product (COUNT, n) is of, (COUNT, 1)."""
    i, c = tl.arange(0, COUNT)[:, None], tl.zeros((COUNT, 1), tl.int32)
    for bit in tl.static_range(5):
        if COUNT >> bit > 1:
            c = 2 * c + ((i >> bit) & 1)
    return c


@jit
def _sum_of(acc, column, first: tl.constexpr):
    """Returns the sum of three columns of a product, from `first` on: (n,)."""
    return tl.sum(tl.where((column >= first) & (column < first + 3), acc, 0.0), axis=0)


@jit
def _mapped(
    acc, column, m: tl.constexpr, M: tl.constexpr, mean, rstd, scale_ptr, bias_ptr, n, N,
    NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Returns h (n,) for row m of x."""
    h = _sum_of(acc, column, 3 * m)
    if NORM == "layernorm":
        h -= mean * _sum_of(acc, column, 3 * M)
    if NORM != "none":
        h *= rstd
    if HAS_NORM_BIAS:
        h += _sum_of(acc, column, 3 * M + 3)
    if HAS_SCALE:
        h *= tl.load(scale_ptr + n, n < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
    return h


@jit
def decode_linear_fwd_kernel_columns(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, gate_ptr, gate_bias_ptr, scale_ptr,
    gate_scale_ptr, y_ptr, x_stride_m, weight_stride_n, gate_stride_n, residual_stride_m, N, K, eps, softcap,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    SOFTCAPPED: tl.constexpr, PDL: tl.constexpr, M: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of the matrix, and of gate -> y[:, n], for all M rows of x.

    num_stages is given because it is by the loop that loads are pipelined.
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    SLICE: tl.constexpr = BLOCK_K // SLICES
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    if PDL:
        prefetch_operands(
            weight_ptr, gate_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, weight_stride_n, gate_stride_n, first, N, K,
            GATED, HAS_NORM_WEIGHT, HAS_NORM_BIAS, HAS_BIAS, BLOCK_N, SLICES,
        )  # fmt: skip
    await_inputs(PDL)
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, SLICES)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
    rows = n[None, None, :] * weight_stride_n + k[:, :, None]
    gate_rows = n[None, None, :] * gate_stride_n + k[:, :, None]
    zero = tl.zeros((SLICES, SLICE), tl.float32)
    sums, squares = (zero,) * M, (zero,) * M
    starts = ()  # type: tuple
    for m in tl.static_range(M):
        start = tl.full((), 0.0, tl.float32)
        if NORM == "layernorm":
            i = tl.arange(0, START)
            ahead = tl.load(x_ptr + tl.full((), m, tl.int64) * x_stride_m + i, i < K, other=0.0).to(tl.float32)
            start = tl.sum(ahead, axis=0) / tl.minimum(K, START)
        starts += (start,)
    acc = tl.zeros((SLICES, COUNT, BLOCK_N), tl.float32)
    gate_acc = tl.zeros((SLICES, COUNT, BLOCK_N), tl.float32)
    for here in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = k < K - here
        mask = inside[:, :, None] & (n[None, None, :] < N)
        w = tl.load(weight_ptr + rows + here, mask, other=0)
        norm_weight = tl.full((SLICES, SLICE), 1.0, tl.float32)
        if HAS_NORM_WEIGHT:
            norm_weight = tl.load(norm_weight_ptr + here + k, inside, other=0.0).to(tl.float32)
        columns = ()  # type: tuple
        new_sums = ()  # type: tuple
        new_squares = ()  # type: tuple
        for m in tl.static_range(M):
            x = tl.load(x_ptr + tl.full((), m, tl.int64) * x_stride_m + here + k, inside, other=0.0).to(tl.float32)
            if NORM == "layernorm":
                x = tl.where(inside, x - starts[m], 0.0)
                new_sums += (sums[m] + x,)
            else:
                new_sums += (sums[m],)
            if NORM != "none":
                new_squares += (squares[m] + x * x,)
            else:
                new_squares += (squares[m],)
            columns = _with_thirds(columns, x * norm_weight)
        sums, squares = new_sums, new_squares
        if NORM == "layernorm":
            columns = _with_thirds(columns, norm_weight)
        if HAS_NORM_BIAS:
            columns = _with_thirds(columns, tl.load(norm_bias_ptr + here + k, inside, other=0.0).to(tl.float32))
        for _ in tl.static_range(COUNT - len(columns)):
            columns += (tl.zeros((SLICES, SLICE), tl.bfloat16),)
        x_columns = tl.permute(_side_by_side(columns, COUNT), (0, 2, 1))
        acc = tl.dot(x_columns, w.to(tl.bfloat16), acc)
        if GATED:
            v = tl.load(gate_ptr + gate_rows + here, mask, other=0)
            gate_acc = tl.dot(x_columns, v.to(tl.bfloat16), gate_acc)

    # epilogue
    product, gate_product, column = tl.sum(acc, axis=0), tl.sum(gate_acc, axis=0), _column(COUNT)
    for m in tl.static_range(M):
        mean, row = tl.sum(tl.sum(sums[m], axis=1), axis=0) / K, tl.full((), m, tl.int64)
        variance = tl.sum(tl.sum(squares[m], axis=1), axis=0) / K - mean * mean
        rstd = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)
        y = _mapped(product, column, m, M, mean, rstd, scale_ptr, bias_ptr, n, N,
                    NORM, HAS_NORM_BIAS, HAS_SCALE, HAS_BIAS)  # fmt: skip
        g = y
        if GATED:
            g = _mapped(gate_product, column, m, M, mean, rstd, gate_scale_ptr, gate_bias_ptr, n, N,
                        NORM, HAS_NORM_BIAS, HAS_SCALE, HAS_GATE_BIAS)  # fmt: skip
        if ACTIVATION != "none":
            y = activated(y, g, ACTIVATION)
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + row * residual_stride_m + n, n < N, other=0.0).to(tl.float32)
        if SOFTCAPPED:
            y = softcapped(y, softcap)
        tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), n < N)


class Tile(NamedTuple):
    """Rows of the matrix in a program, how far it goes along the contracted axis at a time, and stages."""

    block_n: int
    block_k: int
    num_stages: int


def tile(N: int, gated: bool, multiprocessors: int, arch: int) -> Tile:
    """Returns the tile for a matrix of N rows: a wide one shares columns among more rows, if programs are enough.

    Of the compiled code; not timed on a GPU yet. Where shared memory is short, two stages leave room for two programs.
    """
    wide = N >= 64 * multiprocessors and not gated
    return Tile(32 if wide else 16, 256, 4 if tile_arch(arch) in (80, 90, 100) else 2)


def count_of(M: int, norm: str, has_norm_bias: bool) -> int:
    """Returns the columns for M rows of x, 16 or 32."""
    return 16 if 3 * (M + (norm == "layernorm") + has_norm_bias) <= 16 else 32
