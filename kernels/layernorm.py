"""Layer normalization.

    mean = sum_n x[m, n] / N        rstd = 1 / sqrt(sum_n (x[m, n] - mean)^2 / N + eps)
    xhat = (x - mean) * rstd        y = xhat * weight + bias

    g = dy * weight                 dx = rstd * (g - mean_n(g) - xhat * mean_n(g * xhat))
    dweight = sum_m dy * xhat       dbias = sum_m dy

    add_layernorm:                  h = x + residual, rounded to their dtype        y = layernorm(h)
                                    dx = dresidual = dh + the dx above

x, residual, h, y: (..., N), taken as (M, N)   weight, bias: (N,)   mean, rstd: (M,) fp32

Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450. Partial weight gradients per persistent program, then one
reduction: the scheme of NVIDIA Apex's and Triton's tutorial kernels, without their locks, so that it is deterministic.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import jit, multiprocessors, tl, triton
from .op import Cost, Op, differentiable
from .prims import (
    RowTile,
    RowTiles,
    as_rows,
    check_residual,
    check_row,
    check_rows,
    load_sum,
    require_kernel_dtype,
    sum_partial_rows,
)


def layernorm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalize the last axis of x (..., N) to zero mean and unit variance; scale by weight (N,), shift by bias (N,).

    Computes in at least fp32 and returns x's dtype. torch's own layer_norm is the formula above in one pass and
    accumulates in fp32 (fp64 for fp64), so the definition and the CPU fallback can be the same call; on a CPU it also
    takes a 16-bit x beside fp32 parameters as they are, which saves writing x in fp32 and back.
    """
    _check(x, weight, bias)
    shape, given = x.shape[-1:], [p for p in (weight, bias) if p is not None]
    if x.device.type == "cpu" and x.dtype.itemsize <= 4 and all(p.dtype == torch.float32 for p in given):
        return F.layer_norm(x, shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), shape, weight.to(wide), None if bias is None else bias.to(wide), eps).to(x.dtype)


def add_layernorm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(y, h) with h = x + residual, the new residual, and y = layernorm(h). x and residual (..., N) have one dtype."""
    check_residual(x, residual)
    h = x + residual
    return layernorm_reference(h, weight, bias, eps), h


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_rows(x)
    check_row("weight", weight, x)
    if bias is not None:
        check_row("bias", bias, x)


@jit
def layernorm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_stride_m, residual_stride_m, M, N, eps,
    ADD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalizes BLOCK_M whole rows, held in registers: x[m, :] -> y[m, :]; with ADD also h[m, :]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    mask = (m < M) & (n < N)
    x = load_sum(x_ptr, residual_ptr, m * x_stride_m + n, m * residual_stride_m + n, h_ptr, mask, ADD)
    if ADD:
        tl.store(h_ptr + m * N + n, x.to(h_ptr.dtype.element_ty), mask)
    mean = tl.sum(x, axis=1)[:, None] / N
    centered = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1)[:, None] / N + eps)
    y = centered * rstd * tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + m, mean, m < M)
    tl.store(rstd_ptr + m, rstd, m < M)


@jit
def layernorm_fwd_kernel_long(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, x_stride_m, residual_stride_m, N, eps,
    ADD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalizes one row too long for registers, reading it three times, the last two from cache."""
    m = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = load_sum(x_ptr, residual_ptr, m * x_stride_m + n, m * residual_stride_m + n, h_ptr, n < N, ADD)
        if ADD:
            tl.store(h_ptr + m * N + n, x.to(h_ptr.dtype.element_ty), n < N)
        total += x
    mean = tl.sum(total, axis=0) / N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = load_sum(x_ptr, residual_ptr, m * x_stride_m + n, m * residual_stride_m + n, h_ptr, n < N, ADD)
        centered = tl.where(n < N, x - mean, 0.0)
        total += centered * centered
    rstd = 1.0 / tl.sqrt(tl.sum(total, axis=0) / N + eps)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = load_sum(x_ptr, residual_ptr, m * x_stride_m + n, m * residual_stride_m + n, h_ptr, n < N, ADD)
        y = (x - mean) * rstd * tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), n < N)
    tl.store(mean_ptr + m, mean)
    tl.store(rstd_ptr + m, rstd)


@jit
def layernorm_bwd_kernel(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    dy_stride_m, dh_stride_m, x_stride_m, M, N,
    ADD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program strides over blocks of whole rows: dx[m, :], and its own partial row of dweight and dbias."""
    p = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)[None, :]
    weight = tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((1, BLOCK_N), tl.float32)
    dbias = tl.zeros((1, BLOCK_N), tl.float32)
    for start in tl.range(p * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        m = start.to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
        mask = (m < M) & (n < N)
        x = tl.load(x_ptr + m * x_stride_m + n, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m * dy_stride_m + n, mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + m, m < M, other=0.0)
        rstd = tl.load(rstd_ptr + m, m < M, other=0.0)
        xhat = tl.where(mask, (x - mean) * rstd, 0.0)
        g = dy * weight
        mean_g = tl.sum(g, axis=1)[:, None] / N
        mean_gx = tl.sum(g * xhat, axis=1)[:, None] / N
        dx = rstd * (g - mean_g - xhat * mean_gx)
        if ADD:
            dx += tl.load(dh_ptr + m * dh_stride_m + n, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m * N + n, dx.to(dx_ptr.dtype.element_ty), mask)
        dweight += tl.sum(dy * xhat, axis=0)[None, :]
        if HAS_BIAS:
            dbias += tl.sum(dy, axis=0)[None, :]
    row = p.to(tl.int64) * N
    tl.store(dweight_ptr + row + n, dweight, n < N)
    if HAS_BIAS:
        tl.store(dbias_ptr + row + n, dbias, n < N)


@jit
def layernorm_bwd_kernel_input(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dy_stride_m, dh_stride_m, x_stride_m, N,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program finds dx of one row too long for registers, reading it twice, the second time from cache."""
    m = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    mean = tl.load(mean_ptr + m)
    rstd = tl.load(rstd_ptr + m)
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m * dy_stride_m + n, n < N, other=0.0).to(tl.float32)
        g = dy * tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += tl.where(n < N, g * (x - mean) * rstd, 0.0)
    mean_g = tl.sum(sum_g, axis=0) / N
    mean_gx = tl.sum(sum_gx, axis=0) / N
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m * dy_stride_m + n, n < N, other=0.0).to(tl.float32)
        g = dy * tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
        dx = rstd * (g - mean_g - (x - mean) * rstd * mean_gx)
        if ADD:
            dx += tl.load(dh_ptr + m * dh_stride_m + n, n < N, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m * N + n, dx.to(dx_ptr.dtype.element_ty), n < N)


@jit
def layernorm_bwd_kernel_weight(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, dy_stride_m, x_stride_m, M, N,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program sums a block of columns over every num_programs(0)-th row: a piece of one partial row."""
    p = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for row in tl.range(p, M, tl.num_programs(0)):
        m = row.to(tl.int64)
        x = tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m * dy_stride_m + n, n < N, other=0.0).to(tl.float32)
        dweight += dy * (x - tl.load(mean_ptr + m)) * tl.load(rstd_ptr + m)
        dbias += dy
    row = p.to(tl.int64) * N
    tl.store(dweight_ptr + row + n, dweight, n < N)
    if HAS_BIAS:
        tl.store(dbias_ptr + row + n, dbias, n < N)


# Rows up to `whole` columns are held in registers, `per_warp` columns to a warp; longer ones are walked in blocks. From
# registers and spills of the compiled code (results/aot.json): forward at 65536 columns spills 152 B, backward at 16384
# 232 B. The long forward takes 32 warps so that one program fills a multiprocessor and its row stays in cache for the
# second and third read. No row here has been timed on a GPU yet.
TILES = {
    "forward": RowTiles(whole=32768, per_warp=512, long=RowTile(1, 16384, 32, long=True)),
    "backward": RowTiles(whole=8192, per_warp=512, long=RowTile(1, 4096, 8, long=True)),
}


def _normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, weight, add = as_rows(x), weight.contiguous(), residual is not None
    other = as_rows(residual) if residual is not None else rows
    M, N = rows.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    h = torch.empty_like(y) if add else y.new_empty(0)
    if M:
        block = TILES["forward"].choose(N)
        pointers = rows, other, weight, weight if bias is None else bias.contiguous(), y, h, mean, rstd
        strides = rows.stride(0), other.stride(0)
        flags = dict(ADD=add, HAS_BIAS=bias is not None, BLOCK_N=block.block_n, num_warps=block.num_warps)
        if block.long:
            layernorm_fwd_kernel_long[(M,)](*pointers, *strides, N, eps, **flags)
        else:
            grid = (triton.cdiv(M, block.block_m),)
            layernorm_fwd_kernel[grid](*pointers, *strides, M, N, eps, **flags, BLOCK_M=block.block_m)
    return y, h, mean, rstd


def _differentiate(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dy, weight, has_bias, add = as_rows(h), as_rows(dy), weight.contiguous(), bias is not None, dh is not None
    other = as_rows(dh) if dh is not None else dy
    M, N = rows.shape
    dx, dweight = torch.empty_like(h, memory_format=torch.contiguous_format), torch.empty_like(weight)
    dbias = torch.empty_like(bias) if bias is not None else weight.new_empty(0)
    if M == 0:
        return dx, dweight.zero_(), dbias.zero_()
    block = TILES["backward"].choose(N)
    programs = block.programs(M, multiprocessors(h))
    partial = torch.empty((1 + has_bias, programs, N), dtype=torch.float32, device=h.device)
    sums = partial[0], partial[-1]
    strides = dy.stride(0), other.stride(0), rows.stride(0)
    size = dict(BLOCK_N=block.block_n, num_warps=block.num_warps)
    if block.long:
        layernorm_bwd_kernel_input[(M,)](dy, other, rows, weight, mean, rstd, dx, *strides, N, ADD=add, **size)
        layernorm_bwd_kernel_weight[(programs, triton.cdiv(N, block.block_n))](
            dy, rows, mean, rstd, *sums, dy.stride(0), rows.stride(0), M, N, HAS_BIAS=has_bias, **size
        )
    else:
        layernorm_bwd_kernel[(programs,)](
            dy, other, rows, weight, mean, rstd, dx, *sums, *strides, M, N,
            ADD=add, HAS_BIAS=has_bias, BLOCK_M=block.block_m, **size,
        )  # fmt: skip
    sum_partial_rows(partial[0], dweight)
    if has_bias:
        sum_partial_rows(partial[1], dbias)
    return dx, dweight, dbias


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _normalize(x, None, weight, bias, eps)
    return y, mean, rstd


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _differentiate(dy, None, x, weight, bias, mean, rstd)


def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _normalize(x, residual, weight, bias, eps)


def _add_backward(
    dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _differentiate(dy, dh, h, weight, bias, mean, rstd)


_layernorm = differentiable(
    "layernorm", _forward, _backward, save=lambda inputs, output: (*inputs[:3], output[1], output[2])
)
_add_layernorm = differentiable(
    "add_layernorm", _add_forward, _add_backward, outputs=2,
    save=lambda inputs, output: (output[1], inputs[2], inputs[3], output[2], output[3]),
    spread=lambda dx, dweight, dbias: (dx, dx, dweight, dbias),
)  # fmt: skip


def layernorm_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """layernorm_reference by the kernels of this page, on CUDA tensors of fp32, fp16 or bf16. Deterministic."""
    _check(x, weight, bias)
    require_kernel_dtype("x", x)
    return _layernorm(x, weight, bias, eps)


def add_layernorm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """add_layernorm_reference in one pass over memory: reads x and residual, writes y and h. Deterministic."""
    check_residual(x, residual)
    _check(x, weight, bias)
    require_kernel_dtype("x", x)
    return _add_layernorm(x, residual, weight, bias, eps)


def inputs(M: int, N: int, *, bias: bool = True, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """x (M, N) off-centre, weight (N,) about one, bias (N,)."""
    x = torch.randn(M, N, dtype=dtype, device=device) + 0.5
    weight = torch.randn(N, dtype=dtype, device=device) * 0.5 + 1
    return x, weight, torch.randn(N, dtype=dtype, device=device) if bias else None


def cost(M: int, N: int, *, bias: bool = True, itemsize: int) -> tuple[Cost, Cost]:
    """Compulsory traffic: x and y forward, dy, x and dx backward, the parameters and fp32 statistics once."""
    parameters, statistics = (1 + bias) * N * itemsize, 2 * M * 4
    return (
        Cost(8 * M * N, 2 * M * N * itemsize + parameters + statistics),
        Cost(14 * M * N, 3 * M * N * itemsize + N * itemsize + parameters + statistics),
    )


def add_inputs(M: int, N: int, *, bias: bool = True, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """x and residual (M, N), weight (N,), bias (N,)."""
    x, weight, bias_ = inputs(M, N, bias=bias, dtype=dtype, device=device)
    return x, torch.randn(M, N, dtype=dtype, device=device), weight, bias_


def add_cost(M: int, N: int, *, bias: bool = True, itemsize: int) -> tuple[Cost, Cost]:
    """As layernorm, and forward residual in and h out, backward dh in."""
    forward, backward = cost(M, N, bias=bias, itemsize=itemsize)
    return (
        Cost(forward.flops + M * N, forward.bytes + 2 * M * N * itemsize),
        Cost(backward.flops + M * N, backward.bytes + M * N * itemsize),
    )


LAYERNORM = Op(
    name="layernorm",
    reference=layernorm_reference,
    triton=layernorm_triton,
    inputs=inputs,
    parity=(
        dict(M=1, N=1), dict(M=5, N=1), dict(M=1, N=768), dict(M=7, N=129, bias=False), dict(M=3, N=1023),
        dict(M=0, N=16), dict(M=19, N=64, bias=False), dict(M=2, N=32769), dict(M=3, N=8193), dict(M=150, N=65),
    ),
    domain=dict(M=range(20), N=(*range(1, 130), 255, 256, 257, 700, 1023, 1024, 1025), bias=(True, False)),
    bench=(
        dict(M=65536, N=768), dict(M=32768, N=1024), dict(M=16384, N=1600), dict(M=16384, N=4096), dict(M=8192, N=8192),
        dict(M=1024, N=65536),
    ),
    cost=cost,
    summary="y = (x - mean) / sqrt(var + eps) * weight + bias",
)  # fmt: skip

ADD_LAYERNORM = dataclasses.replace(
    LAYERNORM,
    name="add_layernorm",
    reference=add_layernorm_reference,
    triton=add_layernorm_triton,
    inputs=add_inputs,
    parity=(
        dict(M=1, N=1), dict(M=7, N=129, bias=False), dict(M=0, N=16), dict(M=3, N=1023), dict(M=2, N=32769),
        dict(M=3, N=8193), dict(M=150, N=65),
    ),
    cost=add_cost,
    summary="h = x + residual, y = layernorm(h); returns (y, h)",
)  # fmt: skip
