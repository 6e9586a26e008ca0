"""Linear map of a decoding step, fused with what a GPT's block does before and after it, in one launch.

    h[m, n] = scale[n] * sum_k norm(x)[m, k] * weight[n, k] + bias[n]        g[m, n] likewise, of gate
    y = softcap(activation(h, g) + residual)

    layernorm(x) = (x - mean) * rstd * norm_weight + norm_bias        rmsnorm(x) = x * rstd * norm_weight

    x: (..., K) -> (M, K)   weight, gate: (N, K) of x's dtype, or int8 with scale, gate_scale: (N,) fp32
    bias, gate_bias: (N,)   norm_weight, norm_bias: (K,)   residual, y: (..., N)

With few rows of x a product is bound by memory and, in a small model, by launches and each kernel's first bytes. So
norm, activation and residual sum are fused into the product's launch, and nothing is rounded between them. A block is
five launches: this one before and after `append_attention`, and two for the MLP.

Up to eight rows of x are multiplied on the ordinary cores. A warp takes whole rows of the matrix: each of its 32 lanes
loads 16 bytes of a row at a time, every byte is read once for all rows of x, and sums are reduced across the warp only
at the end. The next part of the matrix is loaded before the sums of this one. The norm needs no pass over x of its own:

    rstd * (sum_k c norm_weight weight - mean(c) * sum_k norm_weight weight) + sum_k norm_bias weight,  c = x - start

where all five sums are computed in one pass, and start is the mean of the first numbers of x's row, so that nothing
cancels. More rows, up to 64, are tiles of a matrix product, the matrix first: a matrix instruction has at least 64 rows
on Hopper and Blackwell, but as few as 8 columns. There is no derivative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import arch, jit, launcher, multiprocessors, skip, starts_early, tile_arch, tl, triton
from .op import Cost, Op, changed, no_tensor, without_gradient
from .prims import activated, as_rows, await_inputs, early_launch, prefetch_rows, require_kernel_dtype, softcapped

NORMS = ("none", "layernorm", "rmsnorm")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu2", "swiglu")
MOST_ROWS = 64  # of x; with more, products are bound by arithmetic and are better left to cuBLAS


@torch.no_grad()
def decode_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    norm: str = "none",
    activation: str = "none",
    eps: float = 1e-5,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Apply the map above to x (..., K) with weight (N, K); returns (..., N) in `dtype`, by default x's, rounded once.

    `norm`: none, layernorm or rmsnorm; a layernorm needs norm_weight. `activation`: none, gelu, gelu_tanh, relu2, or
    swiglu, silu(g) * h, which needs gate. int8 matrices need their scales. Raises ValueError naming the argument.
    """
    terms = Terms(bias, residual, norm_weight, norm_bias, gate, gate_bias, scale, gate_scale, norm, activation)
    _check(x, weight, terms)
    wide = torch.promote_types(x.dtype, torch.float32)

    def widened(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.to(wide)

    rows = x.to(wide)
    if norm == "layernorm":
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows - rows.mean(-1, keepdim=True)  # the mean of a row far from zero was rounded
    if norm != "none":
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
        rows = rows if norm_weight is None else rows * norm_weight.to(wide)
        rows = rows if norm_bias is None else rows + norm_bias.to(wide)

    def product(matrix: Tensor, scales: Tensor | None, offset: Tensor | None) -> Tensor:
        y = F.linear(rows, matrix.to(wide))
        y = y if scales is None else y * scales.to(wide)
        return y if offset is None else y + offset.to(wide)

    y = product(weight, scale, bias)
    if activation == "relu2":
        y = F.relu(y).square()
    elif gate is not None:
        y = F.silu(product(gate, gate_scale, gate_bias)) * y
    elif activation != "none":
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    y = y if residual is None else y + residual.to(wide)
    return (softcap * torch.tanh(y / softcap) if softcap else y).to(x.dtype if dtype is None else dtype)


class Terms(NamedTuple):
    """The arguments of decode_linear besides x and weight that a check looks at, in their order."""

    bias: Tensor | None
    residual: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None
    scale: Tensor | None
    gate_scale: Tensor | None
    norm: str
    activation: str


def _check(x: Tensor, weight: Tensor, terms: Terms) -> None:
    """Refuse wrong arguments. A message is made only where a check fails: a step calls this dozens of times."""
    bias, residual, norm_weight, norm_bias, gate, gate_bias, scale, gate_scale, norm, activation = terms
    for name, tensor in (("x", x), ("weight", weight), *zip(Terms._fields, terms[:-2], strict=False)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("x", "weight")):
            raise no_tensor(**{name: tensor})
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected floating (..., K) with K >= 1, got {x.dtype}{tuple(x.shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if (gate is not None) != (activation == "swiglu"):
        raise ValueError(f"gate: swiglu needs one and no other activation takes one; activation is {activation!r}")
    if norm == "layernorm" and norm_weight is None:
        raise ValueError("norm_weight: a layernorm needs one")
    if (norm == "none" and norm_weight is not None) or (norm != "layernorm" and norm_bias is not None):
        raise ValueError(f"norm_weight: norm is {norm!r}, which takes no {'weight' if norm == 'none' else 'bias'}")
    K, N = x.shape[-1], weight.shape[0] if weight.ndim else 0
    for name, matrix, scales in (("weight", weight, scale), ("gate", gate, gate_scale)):
        if matrix is None:
            continue
        if matrix.shape != (N, K):
            raise ValueError(f"{name}: expected ({N}, {K}) for x {tuple(x.shape)}, got {tuple(matrix.shape)}")
        if matrix.dtype != (torch.int8 if scales is not None else x.dtype):
            raise ValueError(f"{name}: expected x's dtype, {x.dtype}, or int8 with a scale, got {matrix.dtype}")
    if (gate_scale is not None) != (gate is not None and scale is not None):
        raise ValueError("gate_scale: needs a gate; and weight and gate have one dtype, so both scales or none")
    if bias is None and gate_bias is not None:
        raise ValueError("gate_bias: goes with a bias, and not alone")
    vectors = (
        ("bias", bias, (N,)), ("gate_bias", gate_bias, (N,)), ("scale", scale, (N,)), ("gate_scale", gate_scale, (N,)),
        ("norm_weight", norm_weight, (K,)), ("norm_bias", norm_bias, (K,)), ("residual", residual, (*x.shape[:-1], N)),
        ("weight", weight, weight.shape),
    )  # fmt: skip
    for name, tensor, shape in vectors:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")
        if tensor is not weight and not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"residual: dtype {residual.dtype}, but x has {x.dtype}")


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
def _prefetch(
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
        _prefetch(
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


@jit
def decode_linear_fwd_kernel_tiles(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, gate_ptr, gate_bias_ptr, scale_ptr,
    gate_scale_ptr, y_ptr, x_stride_m, weight_stride_n, gate_stride_n, residual_stride_m, M, N, K, eps, softcap,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    SOFTCAPPED: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_WARPS: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of weight x^T, for all rows of x -> y. x is rounded after its norm."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    if PDL:
        _prefetch(
            weight_ptr, gate_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, weight_stride_n, gate_stride_n, first, N, K,
            GATED, HAS_NORM_WEIGHT, HAS_NORM_BIAS, HAS_BIAS, BLOCK_N, TILE_WARPS,
        )  # fmt: skip
    await_inputs(PDL)
    n, m, k = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_K)
    is_row, is_column = n < N - first, m < M
    weights = weight_ptr + first * weight_stride_n + (n.to(tl.int64) * weight_stride_n + k[None, :])
    gates = gate_ptr + first * gate_stride_n + (n.to(tl.int64) * gate_stride_n + k[None, :]) if GATED else weights
    xs = x_ptr + (m.to(tl.int64) * x_stride_m + k[:, None])
    # statistics of the norm
    mean, rstd = tl.zeros((1, BLOCK_M), tl.float32), tl.full((1, BLOCK_M), 1.0, tl.float32)
    if NORM == "layernorm":
        total = tl.zeros((1, BLOCK_M), tl.float32)
        for start in tl.range(0, K, BLOCK_K):
            x = tl.load(xs + start, (k[:, None] < K - start) & is_column, other=0.0).to(tl.float32)
            total += tl.sum(x, axis=0)[None, :]
        mean = total / K
    if NORM != "none":
        total = tl.zeros((1, BLOCK_M), tl.float32)
        for start in tl.range(0, K, BLOCK_K):
            x = tl.load(xs + start, (k[:, None] < K - start) & is_column, other=0.0).to(tl.float32)
            x = tl.where(k[:, None] < K - start, x - mean, 0.0)
            total += tl.sum(x * x, axis=0)[None, :]
        rstd = 1.0 / tl.sqrt(total / K + eps)

    # products
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    gate_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        w = tl.load(weights, is_row & (k[None, :] < K - start), other=0)
        x = tl.load(xs, (k[:, None] < K - start) & is_column, other=0.0)
        if NORM != "none":
            y = (x.to(tl.float32) - mean) * rstd
            if HAS_NORM_WEIGHT:
                y *= tl.load(norm_weight_ptr + start + k, k < K - start, other=0.0).to(tl.float32)[:, None]
            if HAS_NORM_BIAS:
                y += tl.load(norm_bias_ptr + start + k, k < K - start, other=0.0).to(tl.float32)[:, None]
            x = tl.where(k[:, None] < K - start, y, 0.0).to(x_ptr.dtype.element_ty)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
        weights += BLOCK_K
        xs += BLOCK_K
        if GATED:
            v = tl.load(gates, is_row & (k[None, :] < K - start), other=0)
            gate_acc = tl.dot(v.to(x.dtype), x, gate_acc, input_precision="ieee")
            gates += BLOCK_K
    # epilogue
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + first + n, is_row, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first + n, is_row, other=0.0).to(tl.float32)
    if GATED:
        if HAS_SCALE:
            gate_acc *= tl.load(gate_scale_ptr + first + n, is_row, other=0.0).to(tl.float32)
        if HAS_GATE_BIAS:
            gate_acc += tl.load(gate_bias_ptr + first + n, is_row, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        acc = activated(acc, gate_acc, ACTIVATION)
    if HAS_RESIDUAL:
        here = residual_ptr + first + (m.to(tl.int64) * residual_stride_m + n)
        acc += tl.load(here, is_row & is_column, other=0.0).to(tl.float32)
    if SOFTCAPPED:
        acc = softcapped(acc, softcap)
    here = y_ptr + first + (m.to(tl.int64) * N + n)
    tl.store(here, acc.to(y_ptr.dtype.element_ty), is_row & is_column)


class Tile(NamedTuple):
    """Rows of the matrix in a tile, its depth along the contracted axis, warps and stages of a program."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# From the compiled code (results/aot.json). Not timed on a GPU yet. fp32 runs without tensor cores.
TILES = {80: Tile(64, 64, 4, 4), 86: Tile(64, 64, 4, 2), 90: Tile(64, 64, 4, 4), 100: Tile(64, 64, 4, 4)}
CONSERVATIVE = Tile(32, 32, 4, 2)
FEW_ROWS = 8  # of x: the most with which the ordinary cores keep up with memory
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


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None, scale: Tensor | None,
    gate_scale: Tensor | None, norm: str, activation: str, eps: float, softcap: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    N, K = weight.shape
    y = torch.empty((*x.shape[:-1], N), dtype=dtype, device=x.device)
    if launcher() is skip or not y.numel():  # by shape alone: the choice of a kernel must not tie a graph to M
        return y
    rows, added = as_rows(x), None if residual is None else as_rows(residual)
    bias, gate_bias, scale, gate_scale, norm_weight, norm_bias = (
        None if v is None else v.contiguous() for v in (bias, gate_bias, scale, gate_scale, norm_weight, norm_bias)
    )
    weight, gate = as_rows(weight), None if gate is None else as_rows(gate)
    M, gated = rows.shape[0], gate is not None
    arguments: tuple[Any, ...] = (
        rows, weight, bias, added, norm_weight, norm_bias, gate, gate_bias, scale, gate_scale, y, rows.stride(0),
        weight.stride(0), 0 if gate is None else gate.stride(0), 0 if added is None else added.stride(0),
    )  # fmt: skip
    flags: dict[str, Any] = dict(
        NORM=norm, ACTIVATION=activation, HAS_BIAS=bias is not None, HAS_RESIDUAL=added is not None,
        HAS_NORM_WEIGHT=norm_weight is not None, HAS_NORM_BIAS=norm_bias is not None,
        HAS_GATE_BIAS=gate_bias is not None, HAS_SCALE=scale is not None, SOFTCAPPED=softcap > 0,
        **early_launch(starts_early(x)),
    )  # fmt: skip
    if M <= FEW_ROWS:
        width = min(16 // weight.dtype.itemsize, 16 if M <= 4 else 8)  # wider loads of more rows spill registers
        each = rows_of_a_warp(M, N, width, gated, multiprocessors(x))
        decode_linear_fwd_kernel_rows[(triton.cdiv(N, each * NUM_WARPS),)](
            *arguments, N, K, eps, softcap, **flags, M=M, ROWS=each, DEPTH=depth(K, M, width, each, gated),
            WIDTH=width, num_warps=NUM_WARPS,
        )  # fmt: skip
    else:
        tile = CONSERVATIVE if x.dtype == torch.float32 else TILES.get(tile_arch(arch(x)), CONSERVATIVE)
        decode_linear_fwd_kernel_tiles[(triton.cdiv(N, tile.block_n),)](
            *arguments, M, N, K, eps, softcap, **flags, BLOCK_M=max(16, triton.next_power_of_2(M)),
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, TILE_WARPS=tile.num_warps, num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip
    return y


_decode_linear = without_gradient("decode_linear", _forward)


def decode_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    norm: str = "none",
    activation: str = "none",
    eps: float = 1e-5,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute decode_linear_reference with the kernels of this page, on CUDA tensors of fp32, fp16 or bf16.

    Up to 64 rows of x. One launch, deterministic; nothing waits for the GPU, so that a CUDA graph may replay it. Loads
    are 16 bytes wide if rows start at multiples of 16 bytes; others are correct but slower.
    """
    terms = Terms(bias, residual, norm_weight, norm_bias, gate, gate_bias, scale, gate_scale, norm, activation)
    _check(x, weight, terms)
    require_kernel_dtype("x", x)
    if dtype not in (None, torch.float32, x.dtype):
        raise ValueError(f"dtype: expected x's or float32, got {dtype}")
    if x.numel() > MOST_ROWS * x.shape[-1]:
        raise ValueError(f"x: up to {MOST_ROWS} rows have kernels, got {tuple(x.shape)}; use a product and a norm")
    out_dtype = x.dtype if dtype is None else dtype
    return _decode_linear(x, weight, *terms, float(eps), float(softcap or 0.0), out_dtype)


def inputs(
    M: int, N: int, K: int, *, norm: str = "none", activation: str = "none", bias: bool = True, residual: bool = False,
    packed: bool = False, softcap: float | None = None, dtype: torch.dtype, device: str = "cpu",
) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
    """Draw normal x (M, K), matrices that make y of unit size, int8 if `packed`, and what else the options need.

    A layernorm has both parameters, an rmsnorm its weight.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    def matrix() -> tuple[Tensor, Tensor | None]:
        if not packed:
            return draw(N, K) / K**0.5, None
        steps = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device)
        return steps, (0.5 + torch.rand(N, device=device)) / (74 * K**0.5)  # 74: the root mean square of such integers

    x, (weight, scale) = draw(M, K), matrix()
    gate, gate_scale = matrix() if activation == "swiglu" else (None, None)
    arguments = (
        x, weight, draw(N) if bias else None, draw(M, N) if residual else None,
        1 + 0.1 * draw(K) if norm != "none" else None, 0.1 * draw(K) if norm == "layernorm" else None,
        gate, draw(N) if bias and gate is not None else None, scale, gate_scale, norm, activation,
    )  # fmt: skip
    return arguments, changed(decode_linear_reference, softcap=softcap)


def cost(
    M: int, N: int, K: int, *, norm: str = "none", activation: str = "none", bias: bool = True, residual: bool = False,
    packed: bool = False, softcap: float | None = None, itemsize: int,
) -> tuple[Cost, Cost]:  # fmt: skip
    """Count one product, or two with a gate; matrices read once, x, vectors and residual read and y written."""
    matrices = 2 if activation == "swiglu" else 1
    numbers = M * K + M * N * (1 + residual) + N * bias * matrices + K * {"none": 0, "rmsnorm": 1, "layernorm": 2}[norm]
    of_a_matrix = N * K + 4 * N if packed else N * K * itemsize
    return Cost(2 * M * N * K * matrices, matrices * of_a_matrix + numbers * itemsize), Cost(0, 0)


DECODE_LINEAR = Op(
    name="decode_linear",
    reference=decode_linear_reference,
    triton=decode_linear_triton,
    inputs=inputs,
    parity=(
        dict(M=1, N=1, K=1), dict(M=1, N=70, K=530), dict(M=3, N=33, K=2065), dict(M=8, N=20, K=129),
        dict(M=0, N=3, K=4), dict(M=2, N=18, K=264), dict(M=33, N=70, K=72), dict(M=9, N=40, K=16),
        dict(M=5, N=65, K=200),
    ),
    domain=dict(M=(*range(1, 10), 17, 64), N=(1, 2, 15, 16, 17, 65), K=(1, 7, 8, 15, 17, 32, 100, 513)),
    options=dict(
        norm=NORMS, activation=ACTIVATIONS, bias=(True, False), residual=(False, True), packed=(False, True),
        softcap=(None, 2.0),
    ),
    bench=(
        dict(M=1, N=2304, K=768, norm="layernorm"), dict(M=1, N=768, K=768, residual=True),
        dict(M=1, N=3072, K=768, norm="layernorm", activation="gelu"), dict(M=1, N=768, K=3072, residual=True),
        dict(M=1, N=50304, K=768, norm="layernorm", bias=False),
        dict(M=1, N=6400, K=1600, norm="layernorm", activation="gelu", packed=True),
        dict(M=1, N=1600, K=6400, residual=True, packed=True),
        dict(M=1, N=11008, K=4096, norm="rmsnorm", activation="swiglu", bias=False),
        dict(M=4, N=6400, K=1600, norm="layernorm", activation="gelu"), dict(M=8, N=768, K=3072, residual=True),
        dict(M=8, N=6400, K=1600, norm="layernorm", activation="gelu", packed=True),
        dict(M=8, N=11008, K=4096, norm="rmsnorm", activation="swiglu", bias=False),
        dict(M=32, N=2304, K=768, norm="layernorm"), dict(M=32, N=1600, K=6400, residual=True),
        dict(M=64, N=6400, K=1600, norm="layernorm", activation="gelu", packed=True),
        dict(M=32, N=11008, K=4096, norm="rmsnorm", activation="swiglu", bias=False),
    ),
    cost=cost,
    summary="activation(norm(x) W^T + bias) + residual, of up to 64 rows, W in 16 or 8 bits: one launch",
    differentiable=False,
)  # fmt: skip
