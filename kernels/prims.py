"""Shared by two or more ops: tensors as rows, blocks for row-wise ops, the sum of partial rows, nonlinearities."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import jit, tile_arch, tl, triton
from .op import no_tensor


def as_rows(x: Tensor) -> Tensor:
    """Returns x (..., N) as (M, N) with unit last stride: a view wherever one exists."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_of(x: Tensor, N: int) -> tuple[Tensor, int]:
    """Returns a tensor that holds the rows of x (..., N), x itself if contiguous, and their stride in elements."""
    if x.is_contiguous():
        return x, N
    x = as_rows(x)
    return x, x.stride(0)


# Steps of training and decoding call these checks dozens of times: a message is made only where one fails.

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def require_kernel_dtype(name: str, x: Tensor) -> None:
    """Refuse dtypes that the kernels do not take: fp32, fp16 and bf16 have kernels, fp64 only references."""
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name}: expected fp32, fp16 or bf16, got {x.dtype}")


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Refuse a residual that differs from x in shape, dtype or device: nothing is broadcast or promoted."""
    if not (isinstance(x, Tensor) and isinstance(residual, Tensor)):
        raise no_tensor(x=x, residual=residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual: shape {residual.shape}, but x has {x.shape}")
    if residual.dtype != x.dtype:
        raise ValueError(f"residual: dtype {residual.dtype}, but x has {x.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: device {residual.device}, but x has {x.device}")


def check_rows(x: Tensor, **parameters: Tensor | None) -> None:
    """Refuse an x (..., N) that is not floating or has N = 0, and parameters that are not floating (N,) beside it."""
    if not isinstance(x, Tensor):
        raise no_tensor(x=x)
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"x: expected (..., N) with N >= 1, got {tuple(shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    row, device = (shape[-1],), x.device
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor):
            raise no_tensor(**{name: parameter})
        if parameter.shape != row:
            raise ValueError(f"{name}: expected shape {row}, got {tuple(parameter.shape)}")
        if parameter.device != device:
            raise ValueError(f"{name}: on {parameter.device}, but x is on {device}")
        if not parameter.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {parameter.dtype}")


class RowTile(NamedTuple):
    """Rows and columns of a program's block, and its warps. `long`: rows are processed in blocks of columns."""

    block_m: int
    block_n: int
    num_warps: int
    long: bool = False


class RowTiles(NamedTuple):
    """Blocks for rows of any length: up to `whole` columns in registers, `per_warp` of them per warp; else `long`."""

    whole: int
    per_warp: int
    long: RowTile

    def choose(self, N: int) -> RowTile:
        """Returns the block for rows of N columns. It has several short rows, so that a warp has 128 bytes to load."""
        return _row_tile(self, int(N))


@functools.cache  # Triton's own arithmetic on the host takes 1.5 us a call
def _row_tile(tiles: RowTiles, N: int) -> RowTile:
    if N > tiles.whole:
        return tiles.long
    block_n = triton.next_power_of_2(N)
    block_m = max(1, min(16, 1024 // block_n))
    return RowTile(block_m, block_n, max(1, min(32, block_m * block_n // tiles.per_warp)))


class LoopTile(NamedTuple):
    """A persistent program's block, warps and pipeline stages, and how many programs share a multiprocessor."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    per_multiprocessor: int

    def programs(self, M: int, multiprocessors: int) -> int:
        """Returns how many programs share M rows."""
        return min(-(-M // self.block_m), self.per_multiprocessor * multiprocessors)


# For a norm's backward, by padded row length. Blocks of whole rows keep 8,192 elements of each operand in flight per
# multiprocessor and stage. NVIDIA H200, 2026-11-26, layernorm in bf16 at 65536x768, 32768x1600,
# 16384x4096 and 8192x8192: 3701, 3861, 3991 and 3927 GB/s, where a copy reaches 4233; with one stage 2966 to
# 2858. (At 1600 a block of one row and four programs reach 3914, but with twice the partial sums.)
NORM_BACKWARD = {
    1024: LoopTile(block_m=4, block_n=1024, num_warps=4, num_stages=3, per_multiprocessor=2),
    2048: LoopTile(block_m=2, block_n=2048, num_warps=4, num_stages=3, per_multiprocessor=2),
    4096: LoopTile(block_m=2, block_n=4096, num_warps=8, num_stages=3, per_multiprocessor=1),
    8192: LoopTile(block_m=1, block_n=8192, num_warps=8, num_stages=3, per_multiprocessor=1),
    0: LoopTile(block_m=1, block_n=4096, num_warps=8, num_stages=1, per_multiprocessor=2),
}


def loop_tile(tiles: Mapping[int, LoopTile], N: int, itemsize: int, arch: int) -> LoopTile:
    """Returns the tile for rows of N columns. Rows longer than its block_n are processed in blocks."""
    N = int(N)
    return _loop_tile(tiles.get(max(1024, 1 << (N - 1).bit_length()), tiles[0]), N, itemsize, arch)


@functools.cache
def _loop_tile(tile: LoopTile, N: int, itemsize: int, arch: int) -> LoopTile:
    if N > tile.block_n:
        return tile
    block_n = triton.next_power_of_2(N)
    block_m = min(32, tile.block_m * tile.block_n // block_n)  # more rows if they are short
    num_warps = max(1, min(tile.num_warps, block_m * block_n // 256))
    crowded = (itemsize > 2 and tile_arch(arch) < 90) or arch in (120, 121)  # three take 192 KiB, or spill
    return LoopTile(block_m, block_n, num_warps, tile.num_stages - crowded, tile.per_multiprocessor)


# Programmatic dependent launch, of sm_90 and newer. The kernels of a decoding step take a few microseconds each, and
# much of that is the way from one's last store to the next one's first bytes. With `launch_pdl` a kernel starts while
# the one in front of it still runs. It may bring constants into the L2 cache, and then calls await_inputs. Nothing may
# be read or written before that: not even constants, which the kernel in front may be about to write.
# kernels/proof/machine_code.py finds a load or store before the wait.


def early_launch(pdl: bool) -> dict[str, bool]:
    """Returns the arguments of a launch of a kernel that calls await_inputs."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@jit
def await_inputs(PDL: tl.constexpr):
    """Let the next kernel start, and wait until all kernels in front have ended and their results can be read."""
    if PDL:
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, False, 1)
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, False, 1)


@jit
def prefetch_rows(ptr, stride, first, N, K, ROWS: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Bring rows first to first + ROWS of a matrix (N, K) of contiguous rows into the L2 cache, a program's part of it.

    Nothing is read into the program, so that the matrix may be written meanwhile. One thread at a time issues a copy,
    so that copies are few: 16, or a row each.
    """
    PARTS: tl.constexpr = max(1, 16 // ROWS)  # of a row
    PER_WARP: tl.constexpr = max(1, ROWS * PARTS // NUM_WARPS)
    i = tl.arange(0, 32 * NUM_WARPS)
    part = i // 32 * PER_WARP + i % 32
    row_bytes = K * (ptr.dtype.element_ty.primitive_bitwidth // 8)
    part_bytes = tl.cdiv(tl.cdiv(row_bytes, PARTS), 128) * 128
    n, start = first + part // PARTS, part % PARTS * part_bytes
    issues = (i % 32 < PER_WARP) & (part < ROWS * PARTS) & (n < N)
    wanted = tl.minimum(row_bytes - start, part_bytes) & -16  # the instruction takes multiples of 16 bytes
    wanted = tl.where(issues & (wanted > 0), wanted, 0)
    address = (ptr + n * stride).to(tl.int64) + start
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r", [address & -16, wanted], tl.int32, False, 1,
    )  # fmt: skip


@jit
def load_sum(x_ptr, residual_ptr, x_offset, residual_offset, h_ptr, mask, ADD: tl.constexpr):
    """Returns a block of x in fp32; with ADD, of x + residual rounded to h's dtype.

    Later passes compute the sum again: reading h back in the program that stored it would need a barrier.
    """
    x = tl.load(x_ptr + x_offset, mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + residual_offset, mask, other=0.0).to(tl.float32)
        x = x.to(h_ptr.dtype.element_ty).to(tl.float32)
    return x


@jit
def sum_rows_kernel(partial_ptr, first_ptr, second_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program sums BLOCK_N columns of one stack of partial rows, always in the same order.

    partial[0, :, n] -> first[n]; partial[1, :, n] -> second[n]
    """
    stack = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    partial_ptr += stack.to(tl.int64) * P * N
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in tl.range(0, P, BLOCK_P):
        p = start.to(tl.int64) + tl.arange(0, BLOCK_P)[:, None]
        total += tl.load(partial_ptr + p * N + n, (p < P) & (n < N), other=0.0)
    out = tl.sum(total, axis=0)[None, :]
    if stack == 0:
        tl.store(first_ptr + n, out.to(first_ptr.dtype.element_ty), n < N)
    else:
        tl.store(second_ptr + n, out.to(second_ptr.dtype.element_ty), n < N)


def sum_partial_rows(partial: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Sum the rows of partial (1 or 2, P, N) fp32 into first (N,) and, if there are two stacks, second (N,).

    One launch, deterministic; rounded to the dtypes of first and second. NVIDIA H200, 2026-11-26, best of eight tiles:
    3.5 us for two stacks of 1,056 rows of 768, 2.5 us for 264 of 1,600, 4.3 us for 528 of 4,096; longer rows were not
    timed.
    """
    stacks, P, N = partial.shape
    block_p, block_n = (256, 16) if N <= 2048 else (128, 32) if N <= 8192 else (64, 128)
    sum_rows_kernel[(-(-N // block_n), stacks)](
        partial, first, first if second is None else second, P, N, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=8
    )


@jit
def tanh(x):
    """Returns tanh(x) to 2 ulp; libdevice's tanh does not exist in the interpreter."""
    square = x * x
    inner = 0.13332970 + square * (
        -0.053899970 + square * (0.021301694 - 0.0066535580 * square)
    )  # minimax on |x| < 1/2
    near = x + x * square * (-0.33333328 + square * inner)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0.0, -far, far))


@jit
def softcapped(z, softcap):
    """Returns softcap * tanh(z / softcap)."""
    return softcap * tanh(z / softcap)


def parameter_dtype(parameters: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of drawn parameters: the one named, as in training float32, or that of the activations."""
    return getattr(torch, parameters) if parameters else dtype


@jit
def parameter_row(row_ptr, n, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns parameters of the columns n (1, BLOCK_N) in fp32, in the registers where a tile has those columns.

    Read as a row, parameters of another dtype than the tile's have a layout of their own, and what is computed from
    both is computed once in either: the backward of GELU took 0.27 ms instead of 0.1. A tile of equal rows, reduced at
    once, is laid out as the tile.
    """
    pointers = tl.broadcast_to(row_ptr + n, (BLOCK_M, BLOCK_N))
    return tl.max(tl.load(pointers, n < N, other=0.0).to(tl.float32), axis=0)[None, :]


@jit
def sigmoid(x):
    """Returns the sigmoid s of x and its derivative; s * (1 - s) would lose digits where s is near 1."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * r, r), e * r * r


@jit
def normal(a):
    """Returns the normal distribution's Phi(a), and exp(-a^2 / 2).

    Phi(-|a|) = exp(-a^2 / 2) t Q(t) with t = 1 / (1 + 0.3 |a| / sqrt(2)), the form of Abramowitz and Stegun 7.1.26;
    Q is minimax, to 4e-8 of Phi. erf would need its own exponential and both its branches, half of GELU's time.
    """
    magnitude = tl.abs(a)
    t = 1.0 / (1.0 + 0.21213203435596426 * magnitude)
    q = 0.23591310904013565 - 0.06330828841064898 * t
    q = 0.2585243587370019 + t * (-0.24234587303856514 + t * q)
    q = 0.10319255211940087 + t * (-0.03702451486585128 + t * q)
    q = 0.08460237667310602 + t * (0.085211858857517 + t * (0.07523444007988124 + t * q))
    e = tl.exp2(a * a * -0.7213475204444817)
    tail = t * q * e
    return tl.where(a < 0.0, tail, 1.0 - tail), e


@jit
def activated(a, g, KIND: tl.constexpr):
    """Returns the nonlinearity KIND of activation.py, of fp32 a and, for swiglu, gate g."""
    if KIND == "gelu":
        phi, _ = normal(a)
        y = a * phi
    elif KIND == "gelu_tanh":
        s, _ = sigmoid(a * (1.5957691216057308 + 0.071354816272600 * a * a))
        y = a * s
    elif KIND == "relu2":
        positive = tl.where(a < 0.0, 0.0, a)  # not maximum, which need not keep NaN
        y = positive * positive
    else:
        s, _ = sigmoid(g)
        y = a * g * s
    return y
