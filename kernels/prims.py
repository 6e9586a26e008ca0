"""What two or more ops use unchanged: tensors as rows, blocks for ops that work row by row, the sum of partial rows."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import jit, tl, triton
from .op import require


def as_rows(x: Tensor) -> Tensor:
    """x (..., N) as (M, N) with unit last stride: a view wherever one exists."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_of(x: Tensor, N: int) -> tuple[Tensor, int]:
    """x (..., N), where its rows lie in memory, and how many elements apart: x itself where that is possible."""
    if x.is_contiguous():
        return x, N
    x = as_rows(x)
    return x, x.stride(0)


# The checks of what a training or decoding step calls dozens of times make their messages only for what they refuse.

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def require_kernel_dtype(name: str, x: Tensor) -> None:
    """The kernels take fp32, fp16 and bf16; only the references take fp64."""
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name}: expected fp32, fp16 or bf16, got {x.dtype}")


def check_residual(x: Tensor, residual: Tensor) -> None:
    """The two terms of a residual sum must agree in shape, dtype and device: nothing is broadcast or promoted."""
    if residual.shape != x.shape:
        raise ValueError(f"residual: shape {residual.shape}, but x has {x.shape}")
    if residual.dtype != x.dtype:
        raise ValueError(f"residual: dtype {residual.dtype}, but x has {x.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: device {residual.device}, but x has {x.device}")


def check_rows(x: Tensor, **parameters: Tensor | None) -> None:
    """What is taken row by row is floating, its rows are not empty, and a parameter that they meet is one row of it."""
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"x: expected (..., N) with N >= 1, got {tuple(shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    row, device = (shape[-1],), x.device
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if parameter.shape != row:
            raise ValueError(f"{name}: expected shape {row}, got {tuple(parameter.shape)}")
        if parameter.device != device:
            raise ValueError(f"{name}: on {parameter.device}, but x is on {device}")
        if not parameter.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {parameter.dtype}")


class RowTile(NamedTuple):
    """Rows and columns of a program's block, and its warps. `long`: rows are walked in blocks of columns."""

    block_m: int
    block_n: int
    num_warps: int
    long: bool = False


class RowTiles(NamedTuple):
    """Blocks for rows of any length: up to `whole` columns in registers, `per_warp` of them to a warp, else `long`."""

    whole: int
    per_warp: int
    long: RowTile

    def choose(self, N: int) -> RowTile:
        """Short rows are taken several at a time, so that a warp has 128 bytes to load."""
        return _row_tile(self, int(N))


@functools.cache  # Triton's own arithmetic on the host takes 1.5 us a call
def _row_tile(tiles: RowTiles, N: int) -> RowTile:
    if N > tiles.whole:
        return tiles.long
    block_n = triton.next_power_of_2(N)
    block_m = max(1, min(16, 1024 // block_n))
    return RowTile(block_m, block_n, max(1, min(32, block_m * block_n // tiles.per_warp)))


class LoopTile(NamedTuple):
    """Of a persistent program: its block, warps, stages of its pipeline, and how many there are to a multiprocessor."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    per_multiprocessor: int

    def programs(self, M: int, multiprocessors: int) -> int:
        """How many programs share M rows."""
        return min(-(-M // self.block_m), self.per_multiprocessor * multiprocessors)


# Of the backward of a norm, by the padded length of the rows. Blocks of whole rows keep 8,192 elements of each operand
# in flight on a multiprocessor at each stage. NVIDIA H200, 2026-11-26, layernorm in bf16 at 65536x768, 32768x1600,
# 16384x4096 and 8192x8192: 3701, 3861, 3991 and 3927 GB/s, where a copy has 4233; in one stage 2966 to 2858.
# (At 1600 a block of one row and four programs have 3914, but twice the partial sums.)
NORM_BACKWARD = {
    1024: LoopTile(block_m=4, block_n=1024, num_warps=4, num_stages=3, per_multiprocessor=2),
    2048: LoopTile(block_m=2, block_n=2048, num_warps=4, num_stages=3, per_multiprocessor=2),
    4096: LoopTile(block_m=2, block_n=4096, num_warps=8, num_stages=3, per_multiprocessor=1),
    8192: LoopTile(block_m=1, block_n=8192, num_warps=8, num_stages=3, per_multiprocessor=1),
    0: LoopTile(block_m=1, block_n=4096, num_warps=8, num_stages=1, per_multiprocessor=2),
}


def loop_tile(tiles: Mapping[int, LoopTile], N: int, itemsize: int, arch: int) -> LoopTile:
    """The tile for rows of N columns. Rows longer than its block_n are walked in blocks."""
    N = int(N)
    return _loop_tile(tiles.get(max(1024, 1 << (N - 1).bit_length()), tiles[0]), N, itemsize, arch)


@functools.cache
def _loop_tile(tile: LoopTile, N: int, itemsize: int, arch: int) -> LoopTile:
    if N > tile.block_n:
        return tile
    block_n = triton.next_power_of_2(N)
    block_m = min(32, tile.block_m * tile.block_n // block_n)  # of short rows as many more
    num_warps = max(1, min(tile.num_warps, block_m * block_n // 256))
    crowded = itemsize > 2 and arch < 90  # three operands in three stages take 192 KiB in 32 bits, an A100 has 163
    return LoopTile(block_m, block_n, num_warps, tile.num_stages - crowded, tile.per_multiprocessor)


@jit
def load_sum(x_ptr, residual_ptr, x_offset, residual_offset, h_ptr, mask, ADD: tl.constexpr):
    """A block of x in fp32; with ADD of x + residual, rounded as h holds it.

    A later pass forms the sum anew: reading h back in the program that stored it would need a barrier.
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
    """Sum the rows of partial (1 or 2, P, N) fp32 into first (N,) and, where there are two stacks, second (N,).

    One launch, in the dtypes of what it writes. Deterministic. NVIDIA H200, 2026-11-26, the best of eight tiles: 3.5 us
    for two stacks of 1,056 rows of 768, 2.5 us for 264 of 1,600, 4.3 us for 528 of 4,096; longer rows were not timed.
    """
    stacks, P, N = partial.shape
    block_p, block_n = (256, 16) if N <= 2048 else (128, 32) if N <= 8192 else (64, 128)
    sum_rows_kernel[(-(-N // block_n), stacks)](
        partial, first, first if second is None else second, P, N, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=8
    )


# ---- softmax cross-entropy of rows of logits, for cross_entropy and linear_cross_entropy


class Criterion(NamedTuple):
    """What cross-entropy is asked for, its reduction apart. Columns from vocab_size on are padding."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    vocab_size: int


def check_criterion(
    targets: Tensor, M: int, N: int, device: torch.device, criterion: Criterion, reduction: str, rows: str
) -> None:
    """Refuse wrong arguments of a cross-entropy over M rows of N logits, which the caller knows as the argument `rows`.

    On a CPU also if a target lies outside the vocabulary; on a GPU, for which the host would have to wait, the loss of
    such a row is NaN.
    """
    V = criterion.vocab_size
    require(targets.shape == (M,), f"targets: expected shape {(M,)} for the rows of {rows}, got {tuple(targets.shape)}")
    require(targets.dtype in (torch.int32, torch.int64), f"targets: expected int32 or int64, got {targets.dtype}")
    require(targets.device == device, f"targets: on {targets.device}, but {rows} is on {device}")
    require(1 <= V <= N, "vocab_size: expected at least 1 and at most the number of logits")
    require(0 <= criterion.label_smoothing <= 1, "label_smoothing: expected 0 to 1")
    require(criterion.softcap is None or criterion.softcap > 0, "softcap: expected None or a number above 0")
    require(reduction in ("none", "mean", "sum"), f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if device.type == "cpu" and not torch.compiler.is_compiling() and M:
        low, high = targets.aminmax()
        if low.item() >= 0 and high.item() < V:
            return  # the usual case, in one pass
        strange = ((targets < 0) | (targets >= V)) & (targets != criterion.ignore_index)
        if strange.any():
            found = int(targets[strange][0])
            raise ValueError(
                f"targets: {found} is outside 0 to {V - 1} and is not ignore_index ({criterion.ignore_index})"
            )


@jit
def softcapped(z, softcap):
    """softcap * tanh(z / softcap), to 2 ulp: libdevice's tanh does not exist in the interpreter."""
    x = z / softcap
    square = x * x
    inner = 0.13332970 + square * (
        -0.053899970 + square * (0.021301694 - 0.0066535580 * square)
    )  # minimax on |x| < 1/2
    near = x + x * square * (-0.33333328 + square * inner)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return softcap * tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0.0, -far, far))


@jit
def load_logits(pointers, mask, real, softcap, SOFTCAP: tl.constexpr):
    """Logits in fp32 under their cap, minus infinity where they are not `real`. `mask` says what may be read.

    The two differ over padded columns: a mask that ends on a multiple of 16 keeps the loads 128 bits wide.
    """
    s = tl.load(pointers, mask, other=0.0).to(tl.float32)
    if SOFTCAP:
        s = softcapped(s, softcap)
    return tl.where(real, s, float("-inf"))


@jit
def logits_gradient(
    s, v, target, maximum, log_sum, scale, V, label_smoothing, z_loss, softcap, SOFTCAP: tl.constexpr
):  # fmt: skip
    """scale[m] * dloss[m] / dz[m, v] for a block s of capped logits.

    The log-sum-exp comes in its two parts: of their rounded sum, softmax would lose digits where the logits are large.
    """
    p = tl.exp((s - maximum) - log_sum)
    hit = tl.where(v == target, 1.0, 0.0)
    ds = scale * ((p - hit) + label_smoothing * (hit - 1.0 / V) + 2.0 * z_loss * (maximum + log_sum) * p)
    if SOFTCAP:
        ds *= 1.0 - (s / softcap) * (s / softcap)
    return ds


@jit
def _include(s, maximum, denominator):
    """One more block in the running maximum (BLOCK_M, 1) and in the sum of exp(s - maximum), still apart by column."""
    larger = tl.maximum(maximum, tl.max(s, axis=1)[:, None])
    shift = tl.where(larger == float("-inf"), 0.0, larger)  # so far only -inf: exp(-inf - -inf) would be NaN
    return larger, denominator * tl.exp(maximum - shift) + tl.exp(s - shift)


@jit
def cross_entropy_rows_kernel(
    logits_ptr, targets_ptr, scale_ptr, loss_ptr, maximum_ptr, log_sum_ptr, logits_stride_m, scale_stride_m, M, N, V,
    ignore_index, label_smoothing, z_loss, softcap,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program finds loss[m], maximum[m] and log_sum[m], which make up the log-sum-exp, of BLOCK_M rows.

    With GRADIENT it also writes scale[m] * dloss[m] / dz[m, :] over the logits. WHOLE rows stay in registers for it.
    Longer ones are read by blocks, and again from the end: what was read last is likeliest still in L2.
    The first V of N columns count, the others get gradient 0.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    target = tl.load(targets_ptr + m, m < M, other=0).to(tl.int64)
    kept = (m < M) & (target != ignore_index)
    known = (target >= 0) & (target < V)
    row = logits_ptr + m * logits_stride_m
    chosen = load_logits(row + target, kept & known, known, softcap, SOFTCAP)
    chosen = tl.where(known, chosen, float("nan"))
    if GRADIENT:
        tl.debug_barrier()  # every warp has its target's logit before any warp writes over it
    maximum = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    denominator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WHOLE:
        v = tl.arange(0, BLOCK_N)[None, :]
        s = load_logits(row + v, kept & (v < N), v < V, softcap, SOFTCAP)
        maximum, denominator = _include(s, maximum, denominator)
        if SMOOTHING:
            total = tl.where(v < V, s, 0.0)
    else:
        for start in tl.range(0, N, BLOCK_N):
            v = start + tl.arange(0, BLOCK_N)[None, :]
            s = load_logits(row + v, kept & (v < N), v < V, softcap, SOFTCAP)
            maximum, denominator = _include(s, maximum, denominator)
            if SMOOTHING:
                total += tl.where(v < V, s, 0.0)
    log_sum = tl.log(tl.sum(denominator, axis=1)[:, None])
    loss = log_sum - (chosen - maximum)
    if SMOOTHING:
        mean = tl.sum(total, axis=1)[:, None] / V
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (log_sum - (mean - maximum))
    loss += z_loss * (maximum + log_sum) * (maximum + log_sum)
    log_sum = tl.where(known, log_sum, float("nan"))
    tl.store(loss_ptr + m, tl.where(kept, loss, 0.0), m < M)
    tl.store(maximum_ptr + m, maximum, m < M)
    tl.store(log_sum_ptr + m, log_sum, m < M)
    if GRADIENT:
        scale = tl.load(scale_ptr + m * scale_stride_m, m < M, other=0.0)
        if WHOLE:
            dz = logits_gradient(s, v, target, maximum, log_sum, scale, V, label_smoothing, z_loss, softcap, SOFTCAP)
            dz = tl.where(kept & (v < V), dz, 0.0)
            tl.store(row + v, dz.to(logits_ptr.dtype.element_ty), (m < M) & (v < N))
        else:
            last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
            for start in tl.range(0, N, BLOCK_N):
                v = last - start + tl.arange(0, BLOCK_N)[None, :]
                s = load_logits(row + v, kept & (v < N), v < V, softcap, SOFTCAP)
                dz = logits_gradient(
                    s, v, target, maximum, log_sum, scale, V, label_smoothing, z_loss, softcap, SOFTCAP
                )
                dz = tl.where(kept & (v < V), dz, 0.0)
                tl.store(row + v, dz.to(logits_ptr.dtype.element_ty), (m < M) & (v < N))


# From the compiled code (results/aot.json): the widest blocks without spills. Not timed on a GPU yet.
CROSS_ENTROPY_TILES = {"rows": RowTiles(whole=8192, per_warp=512, long=RowTile(1, 8192, 16, long=True))}


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, criterion: Criterion, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, maximum and log sum_v exp(s - maximum), each (M,) fp32, of logits (M, N) and targets (M,), rows contiguous.

    With a scale (M,) fp32, the gradient times it is written over the logits. Ignored rows are not read.
    """
    M, N = logits.shape
    loss, maximum, log_sum = (torch.empty(M, dtype=torch.float32, device=logits.device) for _ in range(3))
    if M == 0:
        return loss, maximum, log_sum
    tile, factor = CROSS_ENTROPY_TILES["rows"].choose(N), loss if scale is None else scale
    cross_entropy_rows_kernel[(triton.cdiv(M, tile.block_m),)](
        logits, targets, factor, loss, maximum, log_sum, logits.stride(0), factor.stride(0), M, N, criterion.vocab_size,
        criterion.ignore_index, criterion.label_smoothing, criterion.z_loss, criterion.softcap or 1.0,
        SOFTCAP=criterion.softcap is not None, SMOOTHING=criterion.label_smoothing > 0, GRADIENT=scale is not None,
        WHOLE=not tile.long, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return loss, maximum, log_sum
