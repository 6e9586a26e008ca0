"""Few rows of x, on the ordinary cores. Every byte of the matrix is read once for all rows of x.

A warp takes whole rows of the matrix: each of its 32 lanes loads 16 bytes of a row at a time, and sums are reduced
across the warp only at the end. The next part of the matrix is loaded before the sums of this one. The norm needs no
pass over x of its own:

    rstd * (sum_k c norm_weight weight - mean(c) * sum_k norm_weight weight) + sum_k norm_bias weight,  c = x - start

where all five sums are computed in one pass, and start is the mean of the first numbers of x's row, so that nothing
cancels.
"""

from .._triton import jit, tl, triton
from ..prims import activated, await_inputs, prefetch_rows, softcapped

NUM_WARPS = 4  # of a program for few rows of x; each warp takes whole rows of the matrix
WARPS = tl.constexpr(NUM_WARPS)
LANES = tl.constexpr(32)


@jit
def _columns(start, WIDTH: tl.constexpr):
    """Returns the columns from `start` on of WARPS rows, WIDTH consecutive ones per lane."""
    k = start + tl.arange(0, LANES)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return tl.broadcast_to(k, (WARPS, LANES, WIDTH))


@jit
def _side_by_side(a, b):
    """Returns a and b (WARPS, LANES, n) as (WARPS, LANES, 2 n), b after a in each lane, so that none moves."""
    return tl.join(a, b).permute(0, 1, 3, 2).reshape(a.shape[0], a.shape[1], 2 * a.shape[2])


@jit
def _load_quarter(ptr, start, K, i: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr):
    k = _columns(start, WIDTH)
    if EACH < WIDTH:
        k = start + tl.arange(0, LANES)[None, :, None] * WIDTH + (i * EACH + tl.arange(0, EACH)[None, None, :])
        k = tl.broadcast_to(k, (WARPS, LANES, EACH))
    return tl.load(ptr + k, k < K, other=0.0).to(tl.float32)


@jit
def _load_row(ptr, start, K, WIDTH: tl.constexpr):
    """Returns WIDTH numbers per lane of every warp from `start` of a row of K, in fp32, zeros past its end.

    A load is at most 16 bytes, so that it may take several, joined in registers.
    """
    EACH: tl.constexpr = min(WIDTH, 128 // ptr.dtype.element_ty.primitive_bitwidth)
    x = _load_quarter(ptr, start, K, 0, WIDTH, EACH)
    if EACH < WIDTH:
        x = _side_by_side(x, _load_quarter(ptr, start, K, 1, WIDTH, EACH))
    if 2 * EACH < WIDTH:
        rest = _load_quarter(ptr, start, K, 2, WIDTH, EACH)
        x = _side_by_side(x, _side_by_side(rest, _load_quarter(ptr, start, K, 3, WIDTH, EACH)))
    return x


@jit
def _load_part(ptr, stride_n, first, start, N, K, ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the next DEPTH * LANES * WIDTH columns of ROWS rows of a matrix per warp, by loads of 16 bytes."""
    part = ()  # type: tuple
    for d in tl.static_range(DEPTH):
        for r in tl.static_range(ROWS):
            n, k = first + (r * WARPS + tl.arange(0, WARPS)[:, None, None]), _columns(start + d * LANES * WIDTH, WIDTH)
            part += (tl.load(ptr + n * stride_n + k, (n < N) & (k < K), other=0),)
    return part


@jit
def _load_vectors(ptr, offset, first, N, ROWS: tl.constexpr, EXISTS: tl.constexpr, ABSENT: tl.constexpr):
    """Returns the elements of a vector (N,) for the program's rows of the matrix: ROWS vectors (WARPS,)."""
    found = ()  # type: tuple
    for r in tl.static_range(ROWS):
        n = first + (r * WARPS + tl.arange(0, WARPS))
        if EXISTS:
            found += (tl.load(ptr + offset + n, n < N, other=0.0).to(tl.float32),)
        else:
            found += (tl.full((WARPS,), ABSENT, tl.float32),)
    return found


@jit
def _add_products(totals, part, d: tl.constexpr, x, M: tl.constexpr, m: tl.constexpr, ROWS: tl.constexpr):
    """Returns totals with the products of row m of x and a part's rows added, lane by lane."""
    added = ()  # type: tuple
    for i in tl.static_range(M * ROWS):
        if i // ROWS == m:
            added += (totals[i] + tl.sum(part[d * ROWS + i % ROWS].to(tl.float32) * x, axis=2),)
        else:
            added += (totals[i],)
    return added


@jit
def prefetch_operands(
    weight_ptr, gate_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, weight_stride_n, gate_stride_n, first, N, K,
    GATED: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, NUM_WARPS: tl.constexpr,
):  # fmt: skip
    """Bring a program's rows of the matrices into the L2 cache; the first program brings the vectors, too."""
    prefetch_rows(weight_ptr, weight_stride_n, first, N, K, ROWS, NUM_WARPS)
    if GATED:
        prefetch_rows(gate_ptr, gate_stride_n, first, N, K, ROWS, NUM_WARPS)
    if tl.program_id(0) == 0:
        if HAS_NORM_WEIGHT:
            prefetch_rows(norm_weight_ptr, K, 0, 1, K, 1, NUM_WARPS)
        if HAS_NORM_BIAS:
            prefetch_rows(norm_bias_ptr, K, 0, 1, K, 1, NUM_WARPS)
        if HAS_BIAS:
            prefetch_rows(bias_ptr, N, 0, 1, N, 1, NUM_WARPS)


@jit
def decode_linear_fwd_kernel_rows(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, gate_ptr, gate_bias_ptr, scale_ptr,
    gate_scale_ptr, y_ptr, x_stride_m, weight_stride_n, gate_stride_n, residual_stride_m, N, K, eps, softcap,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    SOFTCAPPED: tl.constexpr, PDL: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of the matrix, and of gate, per warp -> y[:, n], for all M rows of x."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    PART: tl.constexpr = DEPTH * LANES * WIDTH
    first = tl.program_id(0).to(tl.int64) * (WARPS * ROWS)
    if PDL:
        prefetch_operands(
            weight_ptr, gate_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, weight_stride_n, gate_stride_n, first, N, K,
            GATED, HAS_NORM_WEIGHT, HAS_NORM_BIAS, HAS_BIAS, WARPS * ROWS, WARPS,
        )  # fmt: skip
    await_inputs(PDL)
    part = _load_part(weight_ptr, weight_stride_n, first, 0, N, K, ROWS, DEPTH, WIDTH)
    gate_part = part
    if GATED:
        gate_part = _load_part(gate_ptr, gate_stride_n, first, 0, N, K, ROWS, DEPTH, WIDTH)
    bias = _load_vectors(bias_ptr, 0, first, N, ROWS, HAS_BIAS, 0.0)
    scale = _load_vectors(scale_ptr, 0, first, N, ROWS, HAS_SCALE, 1.0)
    gate_bias = _load_vectors(gate_bias_ptr, 0, first, N, ROWS, HAS_GATE_BIAS, 0.0)
    gate_scale = _load_vectors(gate_scale_ptr, 0, first, N, ROWS, HAS_SCALE and GATED, 1.0)
    residual = ()  # type: tuple
    starts = ()  # type: tuple
    for m in tl.static_range(M):
        row = tl.full((), m, tl.int64)
        residual += _load_vectors(residual_ptr, row * residual_stride_m, first, N, ROWS, HAS_RESIDUAL, 0.0)
        if NORM == "layernorm":
            x = _load_row(x_ptr + row * x_stride_m, 0, K, WIDTH)
            starts += (tl.sum(tl.sum(x, axis=2), axis=1)[:, None, None] / tl.minimum(K, LANES * WIDTH),)

    # sums by lane
    zero = tl.zeros((WARPS, LANES), tl.float32)
    totals, gate_totals, sums, squares = (zero,) * (M * ROWS), (zero,) * (M * ROWS), (zero,) * M, (zero,) * M
    weight_sums, bias_sums, gate_weight_sums, gate_bias_sums = ((zero,) * ROWS,) * 4
    for start in tl.range(0, K, PART):
        after = _load_part(weight_ptr, weight_stride_n, first, start + PART, N, K, ROWS, DEPTH, WIDTH)
        gate_after = after
        if GATED:
            gate_after = _load_part(gate_ptr, gate_stride_n, first, start + PART, N, K, ROWS, DEPTH, WIDTH)
        for d in tl.static_range(DEPTH):
            here = start + d * LANES * WIDTH
            if HAS_NORM_WEIGHT:
                norm_weight = _load_row(norm_weight_ptr, here, K, WIDTH)
            if NORM == "layernorm":
                weight_sums = _add_products(weight_sums, part, d, norm_weight, 1, 0, ROWS)
                if GATED:
                    gate_weight_sums = _add_products(gate_weight_sums, gate_part, d, norm_weight, 1, 0, ROWS)
            if HAS_NORM_BIAS:
                norm_bias = _load_row(norm_bias_ptr, here, K, WIDTH)
                bias_sums = _add_products(bias_sums, part, d, norm_bias, 1, 0, ROWS)
                if GATED:
                    gate_bias_sums = _add_products(gate_bias_sums, gate_part, d, norm_bias, 1, 0, ROWS)
            new_sums = ()  # type: tuple
            new_squares = ()  # type: tuple
            for m in tl.static_range(M):
                x = _load_row(x_ptr + tl.full((), m, tl.int64) * x_stride_m, here, K, WIDTH)
                if NORM == "layernorm":
                    x = tl.where(_columns(here, WIDTH) < K, x - starts[m], 0.0)
                    new_sums += (sums[m] + tl.sum(x, axis=2),)
                else:
                    new_sums += (sums[m],)
                if NORM != "none":
                    new_squares += (squares[m] + tl.sum(x * x, axis=2),)
                else:
                    new_squares += (squares[m],)
                if HAS_NORM_WEIGHT:
                    x *= norm_weight
                totals = _add_products(totals, part, d, x, M, m, ROWS)
                if GATED:
                    gate_totals = _add_products(gate_totals, gate_part, d, x, M, m, ROWS)
            sums, squares = new_sums, new_squares
        part, gate_part = after, gate_after

    # epilogue
    for m in tl.static_range(M):
        mean, row = tl.sum(sums[m], axis=1) / K, tl.full((), m, tl.int64)
        variance = tl.sum(squares[m], axis=1) / K - mean * mean
        rstd = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)
        for r in tl.static_range(ROWS):
            y = _mapped(totals[m * ROWS + r], mean, rstd, weight_sums[r], bias_sums[r], scale[r], bias[r],
                        NORM, HAS_NORM_BIAS)  # fmt: skip
            g = y
            if GATED:
                g = _mapped(gate_totals[m * ROWS + r], mean, rstd, gate_weight_sums[r], gate_bias_sums[r],
                            gate_scale[r], gate_bias[r], NORM, HAS_NORM_BIAS)  # fmt: skip
            if ACTIVATION != "none":
                y = activated(y, g, ACTIVATION)
            y += residual[m * ROWS + r]
            if SOFTCAPPED:
                y = softcapped(y, softcap)
            n = first + (r * WARPS + tl.arange(0, WARPS))
            tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), n < N)


@jit
def _mapped(total, mean, rstd, weight_sum, bias_sum, scale, bias, NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr):
    """Returns h (WARPS,) for one row of x and a row of the matrix per warp, from sums reduced across lanes."""
    h = tl.sum(total, axis=1)
    if NORM == "layernorm":
        h -= mean * tl.sum(weight_sum, axis=1)
    if NORM != "none":
        h *= rstd
    if HAS_NORM_BIAS:
        h += tl.sum(bias_sum, axis=1)
    return h * scale + bias


MOST_SUMS = 128  # per lane: rows of the matrix times rows of x times numbers of a load; with more, registers spill
UNDER_WAY = 4  # loads of 16 bytes per lane in flight, and as many of the next part


def rows_of_a_warp(M: int, N: int, width: int, gated: bool, multiprocessors: int) -> int:
    """Returns the rows of the matrix per warp, 1, 2 or 4. They share loads of x, but programs should fill the GPU."""
    rows = 4
    least = (2 if M < 4 else 1) * multiprocessors * NUM_WARPS
    while rows > 1 and (rows * M * width * (1 + gated) > MOST_SUMS or N < least * rows):
        rows //= 2
    return rows


def depth(K: int, M: int, width: int, rows: int, gated: bool) -> int:
    """Returns the loads of a lane from one row at a time, such that the last round has as many as the others."""
    loads, crowded = triton.cdiv(K, 32 * width), rows * M * width * (1 + gated) >= MOST_SUMS
    most = 1 if crowded else max(1, UNDER_WAY // rows // (1 + gated))
    return triton.cdiv(loads, triton.cdiv(loads, most))
