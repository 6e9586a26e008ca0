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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import arch, jit, multiprocessors, tl
from .op import Cost, Op, check_eps, differentiable
from .prims import (
    NORM_BACKWARD,
    RowTile,
    RowTiles,
    check_residual,
    check_rows,
    load_sum,
    loop_tile,
    parameter_dtype,
    parameter_row,
    require_kernel_dtype,
    rows_of,
    sum_partial_rows,
)


def layernorm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalize the last axis of x (..., N) to zero mean and unit variance; scale by weight (N,), shift by bias (N,).

    Computes in at least fp32 and returns x's dtype. Raises ValueError for a wrong shape, dtype or device.
    """
    _check(x, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    centered = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    centered = centered - centered.mean(-1, keepdim=True)  # the mean of a row far from zero was rounded
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def layernorm_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Compute layernorm_reference on a CPU by one call of torch.

    torch takes a 16-bit x beside fp32 parameters as it is, which saves writing x in fp32 and back, but sums the
    gradients of the parameters in 16 bits. Where those are needed, x is converted to fp32 first. Rows of one column
    go to the reference: their gradient is 0, which torch's is not.
    Rows far from zero keep as many digits as torch's statistics do: at mean 4e4 and deviation 0.01 y errs by 0.2,
    where the reference does by 1e-6.
    """
    _check(x, weight, bias, eps)
    if x.shape[-1] == 1:
        return layernorm_reference(x, weight, bias, eps)
    parameters = [p for p in (weight, bias) if p is not None]
    learned = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    if not learned and x.dtype.itemsize == 2 and all(p.dtype == torch.float32 for p in parameters):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias, eps).to(x.dtype)


def add_layernorm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Returns (y, h): h = x + residual (..., N), of one shape and dtype, the new residual, and y = layernorm(h)."""
    check_residual(x, residual)
    h = x + residual
    return layernorm_reference(h, weight, bias, eps), h


def add_layernorm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Compute add_layernorm_reference on a CPU."""
    check_residual(x, residual)
    h = x + residual
    return layernorm_cpu(h, weight, bias, eps), h


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight: expected a tensor (N,), got {weight!r}; without scale and shift, give ones")
    check_rows(x, weight=weight, bias=bias)
    check_eps(eps)


@jit
def layernorm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, statistics_ptr,
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
    mean = tl.div_rn(tl.sum(x, axis=1)[:, None], N * 1.0)  # rounded: x - mean is exactly 0 where N is 1
    centered = tl.where(mask, x - mean, 0.0)
    rest = tl.sum(centered, axis=1)[:, None] / N  # of the mean, which far from zero was rounded by a step of its size
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1)[:, None] / N - rest * rest + eps)
    shift = rest * rstd
    y = (centered * rstd - shift) * tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(statistics_ptr + m, mean, m < M)
    tl.store(statistics_ptr + M + m, rstd, m < M)
    tl.store(statistics_ptr + M + M + m, shift, m < M)


@jit
def layernorm_fwd_kernel_long(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, statistics_ptr, x_stride_m, residual_stride_m, M, N, eps,
    ADD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalizes one row too long for registers, reading it three times, the last two from cache."""
    m = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    # mean
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = load_sum(x_ptr, residual_ptr, m * x_stride_m + n, m * residual_stride_m + n, h_ptr, n < N, ADD)
        if ADD:
            tl.store(h_ptr + m * N + n, x.to(h_ptr.dtype.element_ty), n < N)
        total += x
    mean = tl.div_rn(tl.sum(total, axis=0), N * 1.0)
    # variance
    total = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = load_sum(x_ptr, residual_ptr, m * x_stride_m + n, m * residual_stride_m + n, h_ptr, n < N, ADD)
        centered = tl.where(n < N, x - mean, 0.0)
        total += centered
        squares += centered * centered
    rest = tl.sum(total, axis=0) / N
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / N - rest * rest + eps)
    shift = rest * rstd
    # output
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = load_sum(x_ptr, residual_ptr, m * x_stride_m + n, m * residual_stride_m + n, h_ptr, n < N, ADD)
        y = ((x - mean) * rstd - shift) * tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), n < N)
    tl.store(statistics_ptr + m, mean)
    tl.store(statistics_ptr + M + m, rstd)
    tl.store(statistics_ptr + M + M + m, shift)


@jit
def layernorm_bwd_kernel(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, statistics_ptr, dx_ptr, partial_ptr,
    dy_stride_m, dh_stride_m, x_stride_m, M, N,
    ADD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program strides over blocks of whole rows: it writes dx[m, :] and a partial row of dweight and dbias.

    num_stages is given because Triton pipelines loads that feed no matrix product only where a loop asks for it.
    """
    p = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)[None, :]
    weight = parameter_row(weight_ptr, n, N, BLOCK_M, BLOCK_N)
    dweight = tl.zeros((1, BLOCK_N), tl.float32)
    dbias = tl.zeros((1, BLOCK_N), tl.float32)
    for start in tl.range(p * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        # xhat and g
        m = start.to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
        mask = (m < M) & (n < N)
        x = tl.load(x_ptr + m * x_stride_m + n, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m * dy_stride_m + n, mask, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + m, m < M, other=0.0)
        rstd = tl.load(statistics_ptr + M + m, m < M, other=0.0)
        shift = tl.load(statistics_ptr + M + M + m, m < M, other=0.0)
        xhat = tl.where(mask, (x - mean) * rstd - shift, 0.0)
        g = tl.fma(dy, weight, 0.0)  # rounded, as its mean is: one column's gradient is exactly zero
        # dx
        mean_g = tl.div_rn(tl.sum(g, axis=1)[:, None], N * 1.0)
        mean_gx = tl.sum(g * xhat, axis=1)[:, None] / N
        dx = rstd * (g - mean_g - xhat * mean_gx)
        if ADD:
            dx += tl.load(dh_ptr + m * dh_stride_m + n, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m * N + n, dx.to(dx_ptr.dtype.element_ty), mask)
        # gradients of the parameters
        dweight += tl.sum(dy * xhat, axis=0)[None, :]
        if HAS_BIAS:
            dbias += tl.sum(dy, axis=0)[None, :]
    row = p.to(tl.int64) * N
    tl.store(partial_ptr + row + n, dweight, n < N)
    if HAS_BIAS:
        row += tl.num_programs(0).to(tl.int64) * N
        tl.store(partial_ptr + row + n, dbias, n < N)


@jit
def layernorm_bwd_kernel_input(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, statistics_ptr, dx_ptr, dy_stride_m, dh_stride_m, x_stride_m, M, N,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes dx of one row too long for registers, reading it twice, the second time from cache."""
    m = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    mean = tl.load(statistics_ptr + m)
    rstd = tl.load(statistics_ptr + M + m)
    shift = tl.load(statistics_ptr + M + M + m)
    # means of g and g * xhat
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m * dy_stride_m + n, n < N, other=0.0).to(tl.float32)
        g = dy * tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += tl.where(n < N, g * ((x - mean) * rstd - shift), 0.0)
    mean_g = tl.div_rn(tl.sum(sum_g, axis=0), N * 1.0)
    mean_gx = tl.sum(sum_gx, axis=0) / N
    # dx
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m * dy_stride_m + n, n < N, other=0.0).to(tl.float32)
        g = dy * tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
        dx = rstd * (g - mean_g - ((x - mean) * rstd - shift) * mean_gx)
        if ADD:
            dx += tl.load(dh_ptr + m * dh_stride_m + n, n < N, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m * N + n, dx.to(dx_ptr.dtype.element_ty), n < N)


@jit
def layernorm_bwd_kernel_weight(
    dy_ptr, x_ptr, statistics_ptr, partial_ptr, dy_stride_m, x_stride_m, M, N,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program sums a block of columns over every num_programs(0)-th row, into its part of a partial row."""
    p = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for row in tl.range(p, M, tl.num_programs(0)):
        m = row.to(tl.int64)
        x = tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m * dy_stride_m + n, n < N, other=0.0).to(tl.float32)
        xhat = (x - tl.load(statistics_ptr + m)) * tl.load(statistics_ptr + M + m)
        dweight += dy * (xhat - tl.load(statistics_ptr + M + M + m))
        dbias += dy
    row = p.to(tl.int64) * N
    tl.store(partial_ptr + row + n, dweight, n < N)
    if HAS_BIAS:
        row += tl.num_programs(0).to(tl.int64) * N
        tl.store(partial_ptr + row + n, dbias, n < N)


# Rows up to `whole` columns are held in registers, `per_warp` columns per warp; longer rows are processed in blocks.
# Chosen by registers and spills of the compiled code (results/aot.json): the forward at 65536 columns spills 152 B. The
# long forward takes 32 warps so that one program fills a multiprocessor and its row stays in cache for the other reads.
# Forward, NVIDIA H200, 2026-11-26, 65536x768 in bf16: 52.6 us with 1,024 columns to a warp, 56.2 us with 512.
TILES: dict[str, Any] = {
    "forward": RowTiles(whole=32768, per_warp=1024, long=RowTile(1, 16384, 32, long=True)),
    "backward": NORM_BACKWARD,
}


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, h (empty without a residual), and (3, M) fp32: mean, rstd, and (mean unrounded - mean) * rstd."""
    N, add = x.shape[-1], residual is not None
    M = x.numel() // N
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = torch.empty_like(y) if add else y.new_empty(0)
    statistics = x.new_empty(3, M, dtype=torch.float32)
    if M:
        rows, stride = rows_of(x, N)
        other, other_stride = (rows, stride) if residual is None else rows_of(residual, N)
        weight = weight.contiguous()
        arguments = (
            rows, other, weight, weight if bias is None else bias.contiguous(), y, h, statistics,
            stride, other_stride, M, N, eps,
        )  # fmt: skip
        tile = TILES["forward"].choose(N)
        flags = dict(ADD=add, HAS_BIAS=bias is not None, BLOCK_N=tile.block_n, num_warps=tile.num_warps)
        if tile.long:
            layernorm_fwd_kernel_long[(M,)](*arguments, **flags)
        else:
            layernorm_fwd_kernel[(-(-M // tile.block_m),)](*arguments, BLOCK_M=tile.block_m, **flags)
    return y, h, statistics


def _backward(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor | None, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, which is also dresidual, dweight and dbias; h is x where there is no residual."""
    dy = torch.zeros_like(h) if dy is None else dy  # only h was used
    N, add, has_bias = h.shape[-1], dh is not None, bias is not None
    M, weight = h.numel() // N, weight.contiguous()
    dx, dweight = torch.empty_like(h, memory_format=torch.contiguous_format), torch.empty_like(weight)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    if M == 0:
        return dx, dweight.zero_(), dbias.zero_()
    (rows, stride), (dy, dy_stride) = rows_of(h, N), rows_of(dy, N)
    other, other_stride = (dy, dy_stride) if dh is None else rows_of(dh, N)
    tile = loop_tile(TILES["backward"], N, h.itemsize, arch(h))
    programs, size = tile.programs(M, multiprocessors(h)), dict(BLOCK_N=tile.block_n, num_warps=tile.num_warps)
    partial = h.new_empty((1 + has_bias, programs, N), dtype=torch.float32)
    if N <= tile.block_n:
        layernorm_bwd_kernel[(programs,)](
            dy, other, rows, weight, statistics, dx, partial, dy_stride, other_stride, stride, M, N,
            ADD=add, HAS_BIAS=has_bias, BLOCK_M=tile.block_m, STAGES=tile.num_stages, **size,
        )  # fmt: skip
    else:
        layernorm_bwd_kernel_input[(M,)](
            dy, other, rows, weight, statistics, dx, dy_stride, other_stride, stride, M, N, ADD=add, **size
        )
        layernorm_bwd_kernel_weight[(programs, -(-N // tile.block_n))](
            dy, rows, statistics, partial, dy_stride, stride, M, N, HAS_BIAS=has_bias, **size
        )
    sum_partial_rows(partial, dweight, dbias if has_bias else None)
    return dx, dweight, dbias


def _save(inputs: tuple, output: tuple) -> tuple:
    x, residual, weight, bias, _ = inputs
    _, h, statistics = output
    return x if residual is None else h, weight, bias, statistics


_layernorm = differentiable(
    "layernorm", _forward, _backward, _save, outputs=2, spread=lambda dx, dweight, dbias: (dx, dx, dweight, dbias)
)


def layernorm_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Compute layernorm_reference with the kernels of this page, on CUDA tensors: fp32, fp16 or bf16. Deterministic."""
    _check(x, weight, bias, eps)
    require_kernel_dtype("x", x)
    return _layernorm(x, None, weight, bias, eps)[0]


def add_layernorm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Compute add_layernorm_reference in one pass over memory: read x and residual, write y and h. Deterministic."""
    check_residual(x, residual)
    _check(x, weight, bias, eps)
    require_kernel_dtype("x", x)
    return _layernorm(x, residual, weight, bias, eps)


def inputs(
    M: int, N: int, *, bias: bool = True, parameters: str = "", dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple, dict[str, Any]]:
    """Draw x (M, N) with mean 1/2, weight (N,) with mean 1, and bias (N,) or None; `parameters` names their dtype."""
    x = torch.randn(M, N, dtype=dtype, device=device) + 0.5
    dtype = parameter_dtype(parameters, dtype)
    weight = torch.randn(N, dtype=dtype, device=device) * 0.5 + 1
    return (x, weight, torch.randn(N, dtype=dtype, device=device) if bias else None), {}


def cost(M: int, N: int, *, bias: bool = True, parameters: str = "", itemsize: int) -> tuple[Cost, Cost]:
    """Count compulsory traffic: forward x and y; backward dy, x and dx; parameters and fp32 statistics once in each."""
    row, statistics = N * (4 if parameters else itemsize), 2 * M * 4
    return (
        Cost(8 * M * N, 2 * M * N * itemsize + (1 + bias) * row + statistics),
        Cost(14 * M * N, 3 * M * N * itemsize + (2 + bias) * row + statistics),
    )


def add_inputs(
    M: int, N: int, *, bias: bool = True, parameters: str = "", dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple, dict[str, Any]]:
    """Draw x and residual (M, N), weight (N,), and bias (N,) or None."""
    (x, *rest), keywords = inputs(M, N, bias=bias, parameters=parameters, dtype=dtype, device=device)
    return (x, torch.randn(M, N, dtype=dtype, device=device), *rest), keywords


def add_cost(M: int, N: int, *, bias: bool = True, parameters: str = "", itemsize: int) -> tuple[Cost, Cost]:
    """Add to layernorm's cost: forward residual read and h written, backward dh read."""
    forward, backward = cost(M, N, bias=bias, parameters=parameters, itemsize=itemsize)
    return (
        Cost(forward.flops + M * N, forward.bytes + 2 * M * N * itemsize),
        Cost(backward.flops + M * N, backward.bytes + M * N * itemsize),
    )


LAYERNORM = Op(
    name="layernorm",
    reference=layernorm_reference,
    cpu=layernorm_cpu,
    triton=layernorm_triton,
    inputs=inputs,
    parity=(
        dict(M=1, N=1), dict(M=5, N=1), dict(M=1, N=768), dict(M=7, N=129), dict(M=3, N=1023),
        dict(M=0, N=16), dict(M=19, N=64), dict(M=2, N=32769), dict(M=3, N=8193), dict(M=150, N=65),
    ),
    domain=dict(M=range(20), N=(*range(1, 130), 255, 256, 257, 700, 1023, 1024, 1025)),
    options=dict(bias=(True, False), parameters=("", "float32")),
    bench=(
        dict(M=65536, N=768), dict(M=32768, N=1024), dict(M=16384, N=1600), dict(M=16384, N=4096), dict(M=8192, N=8192),
        dict(M=1024, N=65536), dict(M=16384, N=768, parameters="float32"),  # a training step of GPT-2
    ),
    cost=cost,
    summary="y = (x - mean) / sqrt(var + eps) * weight + bias",
)  # fmt: skip

ADD_LAYERNORM = dataclasses.replace(
    LAYERNORM,
    name="add_layernorm",
    reference=add_layernorm_reference,
    cpu=add_layernorm_cpu,
    triton=add_layernorm_triton,
    inputs=add_inputs,
    parity=(
        dict(M=1, N=1), dict(M=7, N=129), dict(M=0, N=16), dict(M=3, N=1023), dict(M=2, N=32769),
        dict(M=3, N=8193), dict(M=150, N=65),
    ),
    cost=add_cost,
    summary="h = x + residual, y = layernorm(h); returns (y, h)",
)  # fmt: skip
