"""Root-mean-square normalization.

    rstd = 1 / sqrt(sum_n x[m, n]^2 / N + eps)        xhat = x * rstd        y = xhat * weight

    g = dy * weight        dx = rstd * (g - xhat * mean_n(g * xhat))        dweight = sum_m dy * xhat

    add_rmsnorm:    h = x + residual, rounded to their dtype    y = rmsnorm(h)    dx = dresidual = dh + the dx above

x, residual, h, y: (..., N), taken as (M, N)   weight: (N,) or absent, which is a weight of ones   rstd: (M,) fp32

Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467. Without a weight: nanochat. The kernels
follow layernorm's.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ._triton import arch, jit, multiprocessors, tile_arch, tl
from .op import Cost, Op, check_eps, differentiable, traced
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


def rmsnorm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Scale the last axis of x (..., N) to unit root mean square, then by weight (N,).

    Computes in at least fp32 and returns x's dtype. Raises ValueError for a wrong shape, dtype or device.
    """
    check_rows(x, weight=weight)
    check_eps(eps)
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(h.dtype)).to(x.dtype)


def rmsnorm_cpu(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Compute rmsnorm_reference on a CPU in fewer passes over memory, in half the time."""
    check_rows(x, weight=weight)
    check_eps(eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    if traced():
        return rmsnorm_reference(x, weight, eps)  # whose passes a compiler fuses, and which torch.func differentiates
    return _OnCPU.apply(x.to(wide), None if weight is None else weight.to(wide), eps).to(x.dtype)


class _OnCPU(torch.autograd.Function):
    """Computes rmsnorm in few passes: allocates y forward, and dy * xhat and dx backward.

    Twice differentiable, since backward computes rstd from x again.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y = x * _rstd(x, eps)
        return y if weight is None else y.mul_(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rstd, dweight = _rstd(x, ctx.eps), None
        product = (dy * x).mul_(rstd)  # dy * xhat
        if weight is not None:
            dweight = product.reshape(-1, product.shape[-1]).sum(0)
            product, dy = product.mul_(weight), dy * weight  # g * xhat, g
        mean = product.mean(-1, keepdim=True)
        return torch.addcmul(dy * rstd, x, rstd * rstd * mean, value=-1), dweight, None


def _rstd(x: Tensor, eps: float) -> Tensor:
    """Returns 1 / sqrt(mean(x^2) + eps) over the last axis, which is kept with length 1."""
    N = x.shape[-1]
    if N <= 8192:
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / N
    else:  # longer rows lose digits in vector_norm, which adds one after another: 2e-5 at a million
        mean = x.square().mean(-1, keepdim=True)
    return torch.rsqrt(mean + eps)


def add_rmsnorm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Returns (y, h): h = x + residual (..., N), of one shape and dtype, the new residual, and y = rmsnorm(h)."""
    check_residual(x, residual)
    h = x + residual
    return rmsnorm_reference(h, weight, eps), h


def add_rmsnorm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Compute add_rmsnorm_reference on a CPU."""
    check_residual(x, residual)
    h = x + residual
    return rmsnorm_cpu(h, weight, eps), h


@jit
def rmsnorm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, x_stride_m, residual_stride_m, M, N, eps,
    ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalizes BLOCK_M whole rows, held in registers: x[m, :] -> y[m, :]; with ADD also h[m, :]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    mask = (m < M) & (n < N)
    x = load_sum(x_ptr, residual_ptr, m * x_stride_m + n, m * residual_stride_m + n, h_ptr, mask, ADD)
    if ADD:
        tl.store(h_ptr + m * N + n, x.to(h_ptr.dtype.element_ty), mask)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1)[:, None] / N + eps)
    y = x * rstd
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(rstd_ptr + m, rstd, m < M)


@jit
def rmsnorm_fwd_kernel_long(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, x_stride_m, residual_stride_m, N, eps,
    ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalizes one row too long for registers, reading it twice, the second time from cache."""
    m = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    # root mean square
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = load_sum(x_ptr, residual_ptr, m * x_stride_m + n, m * residual_stride_m + n, h_ptr, n < N, ADD)
        if ADD:
            tl.store(h_ptr + m * N + n, x.to(h_ptr.dtype.element_ty), n < N)
        total += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(total, axis=0) / N + eps)
    # output
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        y = load_sum(x_ptr, residual_ptr, m * x_stride_m + n, m * residual_stride_m + n, h_ptr, n < N, ADD) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), n < N)
    tl.store(rstd_ptr + m, rstd)


@jit
def rmsnorm_bwd_kernel(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, dy_stride_m, dh_stride_m, x_stride_m, M, N,
    ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program strides over blocks of whole rows: it writes dx[m, :] and a partial row of dweight.

    num_stages is given because Triton pipelines loads that feed no matrix product only where a loop asks for it.
    """
    p = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)[None, :]
    if HAS_WEIGHT:
        weight = parameter_row(weight_ptr, n, N, BLOCK_M, BLOCK_N)
    dweight = tl.zeros((1, BLOCK_N), tl.float32)
    for start in tl.range(p * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        m = start.to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
        mask = (m < M) & (n < N)
        rstd = tl.load(rstd_ptr + m, m < M, other=0.0)
        xhat = tl.load(x_ptr + m * x_stride_m + n, mask, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + m * dy_stride_m + n, mask, other=0.0).to(tl.float32)
        g = dy
        if HAS_WEIGHT:
            g = dy * weight
            dweight += tl.sum(dy * xhat, axis=0)[None, :]
        dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=1)[:, None] / N))
        if ADD:
            dx += tl.load(dh_ptr + m * dh_stride_m + n, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m * N + n, dx.to(dx_ptr.dtype.element_ty), mask)
    if HAS_WEIGHT:
        tl.store(partial_ptr + p.to(tl.int64) * N + n, dweight, n < N)


@jit
def rmsnorm_bwd_kernel_input(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dy_stride_m, dh_stride_m, x_stride_m, N,
    ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes dx of one row too long for registers, reading it twice, the second time from cache."""
    m = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    rstd = tl.load(rstd_ptr + m)
    # mean of g * xhat
    sum_gx = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        g = tl.load(dy_ptr + m * dy_stride_m + n, n < N, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
        sum_gx += g * tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32) * rstd
    mean_gx = tl.sum(sum_gx, axis=0) / N
    # dx
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        g = tl.load(dy_ptr + m * dy_stride_m + n, n < N, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
        xhat = tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32) * rstd
        dx = rstd * (g - xhat * mean_gx)
        if ADD:
            dx += tl.load(dh_ptr + m * dh_stride_m + n, n < N, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m * N + n, dx.to(dx_ptr.dtype.element_ty), n < N)


@jit
def rmsnorm_bwd_kernel_weight(
    dy_ptr, x_ptr, rstd_ptr, partial_ptr, dy_stride_m, x_stride_m, M, N, BLOCK_N: tl.constexpr
):
    """One program sums a block of columns over every num_programs(0)-th row, into its part of a partial row."""
    p = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    for row in tl.range(p, M, tl.num_programs(0)):
        m = row.to(tl.int64)
        x = tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32)
        dweight += tl.load(dy_ptr + m * dy_stride_m + n, n < N, other=0.0).to(tl.float32) * x * tl.load(rstd_ptr + m)
    tl.store(partial_ptr + p.to(tl.int64) * N + n, dweight, n < N)


# By compute capability. With 512 columns per warp the code for sm_80, where ptxas aims for 32 registers, spills 8 B; so
# do long rows without a weight in 32 warps.
# Forward, NVIDIA H200, 2026-11-26, 65536x768 in bf16: 50.8 us with 512 columns per warp, 51.4 us with 1,024.
TILES: dict[str, Any] = {
    "forward": {
        80: RowTiles(whole=32768, per_warp=1024, long=RowTile(1, 8192, 16, long=True)),
        90: RowTiles(whole=32768, per_warp=512, long=RowTile(1, 8192, 32, long=True)),
    },
    "backward": NORM_BACKWARD,
}


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, h (empty without a residual) and rstd (M,)."""
    N, add = x.shape[-1], residual is not None
    M = x.numel() // N
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = torch.empty_like(y) if add else y.new_empty(0)
    rstd = x.new_empty(M, dtype=torch.float32)
    if M:
        rows, stride = rows_of(x, N)
        other, other_stride = (rows, stride) if residual is None else rows_of(residual, N)
        tile = TILES["forward"][90 if tile_arch(arch(x)) >= 90 else 80].choose(N)
        pointers = rows, other, rows if weight is None else weight.contiguous(), y, h, rstd
        flags = dict(ADD=add, HAS_WEIGHT=weight is not None, BLOCK_N=tile.block_n, num_warps=tile.num_warps)
        if tile.long:
            rmsnorm_fwd_kernel_long[(M,)](*pointers, stride, other_stride, N, eps, **flags)
        else:
            grid = (-(-M // tile.block_m),)
            rmsnorm_fwd_kernel[grid](*pointers, stride, other_stride, M, N, eps, BLOCK_M=tile.block_m, **flags)
    return y, h, rstd


def _backward(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns dx, which is also dresidual, and dweight; h is x where there is no residual."""
    dy = torch.zeros_like(h) if dy is None else dy  # only h was used
    N, add, has_weight = h.shape[-1], dh is not None, weight is not None
    M = h.numel() // N
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dweight = h.new_empty(0) if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)
    if M == 0:
        return dx, dweight.zero_()
    (rows, stride), (dy, dy_stride) = rows_of(h, N), rows_of(dy, N)
    other, other_stride = (dy, dy_stride) if dh is None else rows_of(dh, N)
    scale = rows if weight is None else weight.contiguous()
    tile = loop_tile(TILES["backward"], N, h.itemsize, arch(h))
    programs, size = tile.programs(M, multiprocessors(h)), dict(BLOCK_N=tile.block_n, num_warps=tile.num_warps)
    partial = h.new_empty((1, programs, N), dtype=torch.float32) if has_weight else rstd
    if N <= tile.block_n:
        rmsnorm_bwd_kernel[(programs,)](
            dy, other, rows, scale, rstd, dx, partial, dy_stride, other_stride, stride, M, N,
            ADD=add, HAS_WEIGHT=has_weight, BLOCK_M=tile.block_m, STAGES=tile.num_stages, **size,
        )  # fmt: skip
    else:
        rmsnorm_bwd_kernel_input[(M,)](
            dy, other, rows, scale, rstd, dx, dy_stride, other_stride, stride, N, ADD=add, HAS_WEIGHT=has_weight, **size
        )
        if has_weight:
            rmsnorm_bwd_kernel_weight[(programs, -(-N // tile.block_n))](
                dy, rows, rstd, partial, dy_stride, stride, M, N, **size
            )
    if has_weight:
        sum_partial_rows(partial, dweight)
    return dx, dweight


def _save(inputs: tuple, output: tuple) -> tuple:
    x, residual, weight, _ = inputs
    _, h, rstd = output
    return x if residual is None else h, weight, rstd


_rmsnorm = differentiable(
    "rmsnorm", _forward, _backward, _save, outputs=2, spread=lambda dx, dweight: (dx, dx, dweight)
)


def rmsnorm_triton(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Compute rmsnorm_reference with the kernels of this page, on CUDA tensors of fp32, fp16 or bf16. Deterministic."""
    check_rows(x, weight=weight)
    check_eps(eps)
    require_kernel_dtype("x", x)
    return _rmsnorm(x, None, weight, eps)[0]


def add_rmsnorm_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Compute add_rmsnorm_reference in one pass over memory: read x and residual, write y and h. Deterministic."""
    check_residual(x, residual)
    check_rows(x, weight=weight)
    check_eps(eps)
    require_kernel_dtype("x", x)
    return _rmsnorm(x, residual, weight, eps)


def inputs(
    M: int, N: int, *, weight: bool = True, parameters: str = "", dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple, dict[str, Any]]:
    """Draw x (M, N), and weight (N,) with mean 1 or None; `parameters` names its dtype, x's if empty."""
    x = torch.randn(M, N, dtype=dtype, device=device)
    dtype = parameter_dtype(parameters, dtype)
    return (x, torch.randn(N, dtype=dtype, device=device) * 0.5 + 1 if weight else None), {}


def cost(M: int, N: int, *, weight: bool = True, parameters: str = "", itemsize: int) -> tuple[Cost, Cost]:
    """Count compulsory traffic: forward x and y; backward dy, x and dx; in each, the weight and fp32 rstd once."""
    row, statistics = weight * N * (4 if parameters else itemsize), M * 4
    return (
        Cost(4 * M * N, 2 * M * N * itemsize + row + statistics),
        Cost(8 * M * N, 3 * M * N * itemsize + 2 * row + statistics),
    )


def add_inputs(
    M: int, N: int, *, weight: bool = True, parameters: str = "", dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple, dict[str, Any]]:
    """Draw x and residual (M, N), and weight (N,) or None."""
    (x, parameter), keywords = inputs(M, N, weight=weight, parameters=parameters, dtype=dtype, device=device)
    return (x, torch.randn(M, N, dtype=dtype, device=device), parameter), keywords


def add_cost(M: int, N: int, *, weight: bool = True, parameters: str = "", itemsize: int) -> tuple[Cost, Cost]:
    """Add to rmsnorm's cost: forward residual read and h written, backward dh read."""
    forward, backward = cost(M, N, weight=weight, parameters=parameters, itemsize=itemsize)
    return (
        Cost(forward.flops + M * N, forward.bytes + 2 * M * N * itemsize),
        Cost(backward.flops + M * N, backward.bytes + M * N * itemsize),
    )


RMSNORM = Op(
    name="rmsnorm",
    reference=rmsnorm_reference,
    cpu=rmsnorm_cpu,
    triton=rmsnorm_triton,
    inputs=inputs,
    parity=(
        dict(M=1, N=1), dict(M=1, N=768), dict(M=7, N=129), dict(M=3, N=1023), dict(M=0, N=16),
        dict(M=2, N=32769), dict(M=3, N=8193), dict(M=150, N=65),
    ),
    domain=dict(M=range(20), N=(*range(1, 130), 255, 256, 257, 700, 1023, 1024, 1025)),
    options=dict(weight=(True, False), parameters=("", "float32")),
    bench=(
        dict(M=65536, N=768), dict(M=32768, N=1024), dict(M=16384, N=1600), dict(M=16384, N=4096),
        dict(M=8192, N=8192, weight=False), dict(M=1024, N=65536),
        dict(M=16384, N=768, parameters="float32"),
    ),
    cost=cost,
    summary="y = x / sqrt(mean(x^2) + eps) * weight",
)  # fmt: skip

ADD_RMSNORM = dataclasses.replace(
    RMSNORM,
    name="add_rmsnorm",
    reference=add_rmsnorm_reference,
    cpu=add_rmsnorm_cpu,
    triton=add_rmsnorm_triton,
    inputs=add_inputs,
    parity=(
        dict(M=1, N=1), dict(M=7, N=129), dict(M=0, N=16), dict(M=3, N=1023), dict(M=2, N=32769),
        dict(M=3, N=8193), dict(M=150, N=65),
    ),
    cost=add_cost,
    summary="h = x + residual, y = rmsnorm(h); returns (y, h)",
)  # fmt: skip
