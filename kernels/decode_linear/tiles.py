"""More rows of x: tiles of a matrix product, the matrix first.

A matrix instruction has at least 64 rows on Hopper and Blackwell, but as few as 8 columns.
"""

from typing import NamedTuple

from .._triton import jit, tl
from ..prims import activated, await_inputs, softcapped
from .rows import prefetch_operands


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
        prefetch_operands(
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
