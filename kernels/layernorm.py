"""Layer normalization.

    mean = sum_n x[m, n] / N        rstd = 1 / sqrt(sum_n (x[m, n] - mean)^2 / N + eps)
    xhat = (x - mean) * rstd        y = xhat * weight + bias

    g = dy * weight                 dx = rstd * (g - mean_n(g) - xhat * mean_n(g * xhat))
    dweight = sum_m dy * xhat       dbias = sum_m dy

x, y: (..., N), taken as (M, N)   weight, bias: (N,)   mean, rstd: (M,) fp32

Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450. Partial weight gradients per persistent program, then one
reduction: the scheme of NVIDIA Apex's and Triton's tutorial kernels, without their locks, so that it is deterministic.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import arch, jit, multiprocessors, tl, triton
from .op import Cost, Op, differentiable, require


def layernorm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalize the last axis of x (..., N) to zero mean and unit variance, then scale by weight (N,) and shift by bias (N,).

    Computes in at least fp32 and returns x's dtype. torch's own layer_norm is the formula above in one pass and
    accumulates in fp32 (fp64 for fp64), so the definition and the CPU fallback can be the same call; on a CPU it also
    takes a 16-bit x beside fp32 parameters as they are, which saves writing x in fp32 and back.
    """
    _check(x, weight, bias)
    parameters, shape = (weight, bias), x.shape[-1:]
    mixed = x.dtype.itemsize == 2 and all(p is None or p.dtype == torch.float32 for p in parameters)
    if mixed and x.device.type == "cpu":
        return F.layer_norm(x, shape, *parameters, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), shape, *(None if p is None else p.to(wide) for p in parameters), eps).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require(x.dim() >= 1 and x.shape[-1] > 0, f"x: expected (..., N) with N >= 1, got {tuple(x.shape)}")
    require(x.is_floating_point(), f"x: expected a floating dtype, got {x.dtype}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            require(
                parameter.shape == x.shape[-1:], f"{name}: expected shape {(x.shape[-1],)}, got {tuple(parameter.shape)}"
            )
            require(parameter.device == x.device, f"{name}: on {parameter.device}, but x is on {x.device}")
            require(parameter.is_floating_point(), f"{name}: expected a floating dtype, got {parameter.dtype}")


@jit
def layernorm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, x_stride_m, M, N, eps,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalizes BLOCK_M whole rows, held in registers: x[m, :] -> y[m, :]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    mask = (m < M) & (n < N)
    x = tl.load(x_ptr + m * x_stride_m + n, mask, other=0.0).to(tl.float32)
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
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, x_stride_m, N, eps,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalizes one row too long for registers, reading it three times, the last two from cache."""
    m = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        total += tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32)
        centered = tl.where(n < N, x - mean, 0.0)
        total += centered * centered
    rstd = 1.0 / tl.sqrt(tl.sum(total, axis=0) / N + eps)
    for start in tl.range(0, N, BLOCK_N):
        n = start + block
        x = tl.load(x_ptr + m * x_stride_m + n, n < N, other=0.0).to(tl.float32)
        y = (x - mean) * rstd * tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), n < N)
    tl.store(mean_ptr + m, mean)
    tl.store(rstd_ptr + m, rstd)


@jit
def layernorm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, dy_stride_m, x_stride_m, M, N,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dy_stride_m, x_stride_m, N, BLOCK_N: tl.constexpr
):
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


@jit
def layernorm_bwd_kernel_reduce(partial_ptr, out_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program sums BLOCK_N columns of the partial rows: partial[:, n] -> out[n], always in the same order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in tl.range(0, P, BLOCK_P):
        p = start.to(tl.int64) + tl.arange(0, BLOCK_P)[:, None]
        total += tl.load(partial_ptr + p * N + n, (p < P) & (n < N), other=0.0)
    out = tl.sum(total, axis=0)[None, :]
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), n < N)


class Tile(NamedTuple):
    """Rows and columns of a program's block, and its warps. `long`: rows are walked in blocks of columns."""

    block_m: int
    block_n: int
    num_warps: int
    long: bool = False


# Longest row held in registers, and columns per warp, forward and backward. Chosen from registers and spills of the compiled code
# (results/aot.json); no row here has been timed on a GPU yet.
TILES = {
    "forward": {"whole": 16384, "columns_per_warp": 512},
    "backward": {"whole": 8192, "columns_per_warp": 256},
}
LONG = Tile(1, 4096, 8, long=True)


def tile(direction: str, N: int, arch: int) -> Tile:
    """The block for rows of length N; short rows are taken several at a time, so that a warp has 128 bytes to load."""
    row = TILES[direction]
    if N > row["whole"]:
        return LONG
    block_n = triton.next_power_of_2(N)
    block_m = max(1, min(16, 1024 // block_n))
    return Tile(block_m, block_n, max(1, min(32, block_m * block_n // row["columns_per_warp"])))


def _rows(x: Tensor) -> Tensor:
    """x (..., N) as (M, N) with unit last stride: a view wherever one exists."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, weight = _rows(x), weight.contiguous()
    M, N = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = torch.empty(M, dtype=torch.float32, device=x.device), torch.empty(M, dtype=torch.float32, device=x.device)
    if M == 0:
        return y, mean, rstd
    block = tile("forward", N, arch(x))
    bias_or_weight = weight if bias is None else bias.contiguous()
    args = (rows, weight, bias_or_weight, y, mean, rstd, rows.stride(0))
    if block.long:
        layernorm_fwd_kernel_long[(M,)](
            *args, N, eps, HAS_BIAS=bias is not None, BLOCK_N=block.block_n, num_warps=block.num_warps
        )
    else:
        layernorm_fwd_kernel[(triton.cdiv(M, block.block_m),)](
            *args, M, N, eps, HAS_BIAS=bias is not None,
            BLOCK_M=block.block_m, BLOCK_N=block.block_n, num_warps=block.num_warps,
        )  # fmt: skip
    return y, mean, rstd


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dy, weight = _rows(x), _rows(dy), weight.contiguous()
    M, N = rows.shape
    has_bias = bias is not None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty_like(weight)
    dbias = torch.empty_like(bias) if bias is not None else weight.new_empty(0)
    if M == 0:
        return dx, dweight.zero_(), dbias.zero_()
    block = tile("backward", N, arch(x))
    # Two programs a multiprocessor keep both its memory pipes and a bounded buffer of partial sums.
    programs = min(triton.cdiv(M, block.block_m), 2 * multiprocessors(x))
    partial = torch.empty((1 + has_bias, programs, N), dtype=torch.float32, device=x.device)
    if block.long:
        layernorm_bwd_kernel_input[(M,)](
            dy, rows, weight, mean, rstd, dx, dy.stride(0), rows.stride(0), N,
            BLOCK_N=block.block_n, num_warps=block.num_warps,
        )  # fmt: skip
        layernorm_bwd_kernel_weight[(programs, triton.cdiv(N, block.block_n))](
            dy, rows, mean, rstd, partial[0], partial[-1], dy.stride(0), rows.stride(0), M, N,
            HAS_BIAS=has_bias, BLOCK_N=block.block_n, num_warps=block.num_warps,
        )  # fmt: skip
    else:
        layernorm_bwd_kernel[(programs,)](
            dy, rows, weight, mean, rstd, dx, partial[0], partial[-1], dy.stride(0), rows.stride(0), M, N,
            HAS_BIAS=has_bias, BLOCK_M=block.block_m, BLOCK_N=block.block_n, num_warps=block.num_warps,
        )  # fmt: skip
    for sums, out in zip(partial, (dweight, dbias), strict=False):
        layernorm_bwd_kernel_reduce[(triton.cdiv(N, 64),)](sums, out, programs, N, BLOCK_P=32, BLOCK_N=64, num_warps=4)
    return dx, dweight, dbias


_layernorm = differentiable(
    "layernorm", _forward, _backward,
    save=lambda inputs, output: (inputs[0], inputs[1], output[1], output[2], inputs[2]),
)  # fmt: skip


def layernorm_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """layernorm_reference by the kernels of this page, on CUDA tensors of fp32, fp16 or bf16. Deterministic."""
    _check(x, weight, bias)
    require(x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"x: expected fp32, fp16 or bf16, got {x.dtype}")
    return _layernorm(x, weight, bias, eps)


def inputs(M: int, N: int, *, bias: bool = True, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """x (M, N) so far off-centre that statistics taken in 16 bits would show, weight (N,) about one, bias (N,)."""
    x = torch.randn(M, N, dtype=dtype, device=device) + 6
    weight = torch.randn(N, dtype=dtype, device=device) * 0.5 + 1
    return x, weight, torch.randn(N, dtype=dtype, device=device) if bias else None


def cost(M: int, N: int, *, bias: bool = True, itemsize: int) -> tuple[Cost, Cost]:
    """Compulsory traffic: x and y forward, dy, x and dx backward, the parameters and fp32 statistics once."""
    parameters, statistics = (1 + bias) * N * itemsize, 2 * M * 4
    return (
        Cost(8 * M * N, 2 * M * N * itemsize + parameters + statistics),
        Cost(14 * M * N, 3 * M * N * itemsize + N * itemsize + parameters + statistics),
    )


LAYERNORM = Op(
    name="layernorm",
    reference=layernorm_reference,
    triton=layernorm_triton,
    inputs=inputs,
    parity=(
        dict(M=1, N=1), dict(M=5, N=1), dict(M=1, N=768), dict(M=7, N=129, bias=False), dict(M=3, N=1023), dict(M=0, N=16),
        dict(M=19, N=64, bias=False), dict(M=2, N=16385), dict(M=3, N=8193), dict(M=37, N=65),
    ),
    domain=dict(M=range(20), N=(*range(1, 130), 255, 256, 257, 700, 1023, 1024, 1025), bias=(True, False)),
    bench=(
        dict(M=65536, N=768), dict(M=32768, N=1024), dict(M=16384, N=1600), dict(M=16384, N=4096), dict(M=8192, N=8192),
        dict(M=1024, N=65536),
    ),
    cost=cost,
    peers={"torch": lambda x, weight, bias=None, eps=1e-5: F.layer_norm(x, (x.shape[-1],), weight, bias, eps)},
    summary="y = (x - mean) / sqrt(var + eps) * weight + bias",
)  # fmt: skip
