"""Linear map by a matrix of 8-bit integers with one scale per row: half of bf16's bytes for a decoding step to read.

    y[m, n] = scale[n] * sum_k x[m, k] * weight[n, k] + bias[n]

    x: (..., K) -> (M, K)   weight: (N, K) int8   scale: (N,) fp32   bias: (N,)   y: (..., N), x's dtype

The scale of a row is applied after the sum, so that nothing is rounded before: an 8-bit integer is exact in bf16 and
fp16, and sums, scale and bias are in fp32. There is no derivative: `quantize` rounds the matrix after training.

With few rows of x the product is bound by memory alone. A program then takes up to four rows of the matrix, each lane
16 bytes of every row at a time, reads every byte once for all rows of x, and multiplies on the ordinary cores. These
keep up with an H100's memory for about four rows of x: of the 128 operations that a multiprocessor does per clock, each
of the 15 or so bytes that reach it takes one per row of x, and a few more. More rows are tiles of a matrix product; the
tile of the matrix is converted in registers. The product is transposed, the matrix first: only the first factor of a
matrix instruction may come from registers, and it has at least 64 rows on Hopper and Blackwell, where the second has as
few as 8 columns. The sum over K is not split among programs: that would take a second launch of 1 to 2 us, in which an
H100 reads any layer's matrix of GPT-2 124M.

One scale per row, symmetric: LLM.int8(), Dettmers et al., arXiv:2208.07339, section 2.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import arch, jit, launcher, multiprocessors, skip, tile_arch, tl, triton
from .op import Cost, Op, no_tensor, require, without_gradient
from .prims import as_rows, require_kernel_dtype

STEPS = 127  # of a scale on either side of zero; -128 is not used


@torch.no_grad()
def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight (N, K), of any floating dtype, to int8 (N, K), contiguous, with scale (N,) fp32.

    scale[n] = max_k |weight[n, k]| / 127, and scale[n] * int8[n, k] is off by at most half a step, scale[n] / 2, plus
    fp32's rounding. A row of zeros stays zeros; its scale is the smallest normal number. Reads the values, and so waits
    for a GPU. Raises ValueError naming the first row with NaN or Inf, which fp64 beyond fp32's range counts as.
    """
    require(weight.ndim == 2, f"weight: expected a matrix (N, K), got {tuple(weight.shape)}")
    require(weight.is_floating_point(), f"weight: expected a floating dtype, got {weight.dtype}")
    require(weight.shape[1] > 0, f"weight: expected (N, K) with K >= 1, got {tuple(weight.shape)}")
    weight = weight.float()
    largest = weight.abs().amax(dim=1)
    if not largest.isfinite().all():
        row = int((~largest.isfinite()).nonzero()[0])
        raise ValueError(f"weight: row {row} holds NaN or Inf, which no scale maps to 8 bits")
    scale = (largest / STEPS).clamp_(min=torch.finfo(torch.float32).tiny)  # a subnormal one would lose digits
    return (weight / scale[:, None]).round_().to(torch.int8).contiguous(), scale


@torch.no_grad()
def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x (..., K) times weight (N, K) int8, rows scaled by scale (N,) fp32, plus bias (N,): (..., N), x's dtype.

    bias has any floating dtype, or is None. Sums, scale and bias are in at least fp32, rounded once; fp64 x gives fp64.
    Rows of weight must be contiguous, with any stride between them. Raises ValueError naming the argument.
    """
    _check(x, weight, scale, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(wide), weight.to(wide)) * scale.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Refuse wrong arguments. A message is made only where a check fails: a step calls this dozens of times."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(scale, Tensor)):
        raise no_tensor(x=x, weight=weight, scale=scale)
    if bias is not None and not isinstance(bias, Tensor):
        raise no_tensor(bias=bias)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected (..., K) with K >= 1, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected (N, {x.shape[-1]}) for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if weight.dtype != torch.int8:
        raise ValueError(f"weight: expected int8, got {weight.dtype}; quantize() makes it")
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise ValueError(f"weight: rows must be contiguous, got strides {weight.stride()}")
    if scale.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scale: expected fp32, got {scale.dtype}")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias: expected a floating dtype, got {bias.dtype}")
    for name, row in (("weight", weight), ("scale", scale), ("bias", bias)):
        if row is not None and row.device != x.device:
            raise ValueError(f"{name}: on {row.device}, but x is on {x.device}")
        if row is not None and row is not weight and row.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected shape {(weight.shape[0],)}, got {tuple(row.shape)}")


@jit
def _gathered(parts, LEVELS: tl.constexpr):
    """Returns 2^LEVELS tensors (C,) as one of (C, 2^LEVELS), in order, without moving numbers between lanes."""
    C: tl.constexpr = parts[0].shape[0]
    for level in tl.static_range(LEVELS):
        pairs = ()  # type: tuple
        for i in tl.static_range(2 ** (LEVELS - 1 - level)):
            pairs += (tl.join(parts[i], parts[i + 2 ** (LEVELS - 1 - level)]),)
        parts = pairs
    return parts[0].reshape(C, 2**LEVELS)


@jit
def int8_linear_fwd_kernel_rows(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, x_stride_m, weight_stride_n, N, K,
    HAS_BIAS: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of the matrix -> y[:, n], for all M rows of x, M * ROWS <= 2^LEVELS.

    A lane takes 16 consecutive numbers of every row, and of x. A load is at most 16 bytes, so that those of x come in
    two halves, joined in registers. All loads of the matrix precede the sums, to keep that many bytes in flight.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    p = tl.arange(0, 2**LEVELS)[None, :]  # each pair of m and n is one sum
    m, n = p // ROWS, first + p % ROWS
    scale = tl.load(scale_ptr + n, n < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
    c = tl.arange(0, BLOCK_K // 16)[:, None] * 16
    k, low = c + tl.arange(0, 16)[None, :], c + tl.arange(0, 8)[None, :]
    acc = (tl.zeros((BLOCK_K // 16,), tl.float32),) * 2**LEVELS
    for start in tl.range(0, K, BLOCK_K):
        # loads of the matrix
        rest = K - start
        rows = ()  # type: tuple
        for r in tl.static_range(ROWS):
            here = weight_ptr + (first + r) * weight_stride_n + start + k
            rows += (tl.load(here, k < tl.where(first + r < N, rest, 0), other=0),)
        # products with each row of x
        sums = ()  # type: tuple
        for i in tl.static_range(M):
            here = x_ptr + tl.full((), i, tl.int64) * x_stride_m + start + low
            halves = tl.join(tl.load(here, low < rest, other=0.0), tl.load(here + 8, low + 8 < rest, other=0.0))
            x = halves.permute(0, 2, 1).reshape(BLOCK_K // 16, 16).to(tl.float32)
            for r in tl.static_range(ROWS):
                sums += (acc[i * ROWS + r] + tl.sum(rows[r].to(tl.float32) * x, axis=1),)
        for i in tl.static_range(M * ROWS, 2**LEVELS):
            sums += (acc[i],)
        acc = sums
    # epilogue
    y = tl.sum(_gathered(acc, LEVELS), axis=0)[None, :] * scale
    if HAS_BIAS:
        y += bias
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), (m < M) & (n < N))


@jit
def int8_linear_fwd_kernel_tiles(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, x_stride_m, weight_stride_n, M, N, K,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of weight x^T -> y. Tiles are ordered in groups of GROUP rows, which share L2."""
    rows, columns = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    i = (first + tile % (GROUP * columns) % height).to(tl.int64) * BLOCK_N
    j = (tile % (GROUP * columns) // height).to(tl.int64) * BLOCK_M

    n, m, k = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_K)
    is_row, is_column = n < N - i, m < M - j
    weights = weight_ptr + i * weight_stride_n + (n.to(tl.int64) * weight_stride_n + k[None, :])
    xs = x_ptr + j * x_stride_m + (m.to(tl.int64) * x_stride_m + k[:, None])
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        w = tl.load(weights, is_row & (k[None, :] < K - start), other=0)
        x = tl.load(xs, (k[:, None] < K - start) & is_column, other=0.0)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
        weights += BLOCK_K
        xs += BLOCK_K
    # epilogue
    y = acc * tl.load(scale_ptr + i + n, is_row, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + i + n, is_row, other=0.0).to(tl.float32)
    here = y_ptr + j * N + i + (m.to(tl.int64) * N + n)
    tl.store(here, y.to(y_ptr.dtype.element_ty), is_row & is_column)


class Rows(NamedTuple):
    """The most rows of the matrix per program, 1, 2 or 4, and the most warps that share them."""

    rows: int
    num_warps: int


class Tile(NamedTuple):
    """Rows of x and of the matrix in a tile, its depth along the contracted axis, warps and stages of a program."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """`rows` for few rows of x, `narrow` for more, `wide` where there are as many such tiles as multiprocessors."""

    rows: Rows
    narrow: Tile
    wide: Tile


# From the compiled code (results/aot.json): the largest without spills and with two warpgroups per multiprocessor. Not
# timed on a GPU yet. fp32 runs without tensor cores, and takes the conservative tiles.
TILES = {
    80: Tiles(Rows(4, 4), Tile(64, 64, 128, 4, 4), Tile(128, 128, 64, 8, 4)),
    86: Tiles(Rows(4, 4), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
    90: Tiles(Rows(4, 4), Tile(64, 64, 128, 4, 4), Tile(128, 128, 64, 8, 4)),
    100: Tiles(Rows(4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 4)),
}
CONSERVATIVE = Tiles(Rows(4, 4), Tile(32, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2))
OF_A_WARP = 512  # numbers of a row that 32 lanes take at once
MOST_SUMS = 16  # per lane; with 32, registers spill
FEW_ROWS, MOST_ROWS = 4, 8  # rows of x with which the ordinary cores keep up with memory, and nearly do
LEAST_TILE = 64  # rows of a matrix instruction on Hopper and Blackwell


def by_rows(M: int, N: int, dtype: torch.dtype, multiprocessors: int) -> bool:
    """Returns whether M rows of x take the kernel for few rows instead of tiles of a matrix product.

    Five to eight rows do if tiles of 64 rows of the matrix would leave multiprocessors idle, or in fp32, where tiles
    run on the ordinary cores too.
    """
    if M <= FEW_ROWS:
        return True
    return M <= MOST_ROWS and (dtype == torch.float32 or triton.cdiv(N, LEAST_TILE) < multiprocessors)


def tiles(dtype: torch.dtype, arch: int) -> Tiles:
    """Returns the tiles of products in this dtype on that architecture."""
    return CONSERVATIVE if dtype == torch.float32 else TILES.get(tile_arch(arch), CONSERVATIVE)


def rows_at_once(block: Rows, M: int, N: int, K: int, multiprocessors: int) -> tuple[int, int]:
    """Returns rows and warps of a program. Rows share loads of x, but each multiprocessor should get two programs."""
    rows = block.rows
    while rows > 1 and (M * rows > MOST_SUMS or N < 2 * multiprocessors * rows):
        rows //= 2
    return rows, min(block.num_warps, triton.next_power_of_2(triton.cdiv(K, OF_A_WARP)))


def tile(M: int, N: int, block: Tiles, multiprocessors: int) -> Tile:
    """Returns the tile for M rows of x and N of the matrix: wide if that fills the GPU, and no higher than M needs."""
    wide, narrow = block.wide, block.narrow
    if M > narrow.block_m and triton.cdiv(M, wide.block_m) * triton.cdiv(N, wide.block_n) >= multiprocessors:
        return wide
    return narrow._replace(block_m=min(narrow.block_m, max(16, triton.next_power_of_2(M))))


def _forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    N, K = weight.shape
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if launcher() is skip:  # depends on the shape alone: the choice of a kernel must not tie a compiled graph to its M
        return y
    if y.numel():
        rows = as_rows(x)
        _launch(rows, weight, scale.contiguous(), None if bias is None else bias.contiguous(), y, rows.shape[0], N, K)
    return y


def _launch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor, M: int, N: int, K: int) -> None:
    fill, block = multiprocessors(x), tiles(x.dtype, arch(x))
    if by_rows(M, N, x.dtype, fill):
        rows, num_warps = rows_at_once(block.rows, M, N, K, fill)
        int8_linear_fwd_kernel_rows[(triton.cdiv(N, rows),)](
            x, weight, scale, bias, y, x.stride(0), weight.stride(0), N, K,
            HAS_BIAS=bias is not None, M=M, ROWS=rows, LEVELS=(M * rows - 1).bit_length(),
            BLOCK_K=num_warps * OF_A_WARP, num_warps=num_warps,
        )  # fmt: skip
    else:
        chosen = tile(M, N, block, fill)
        int8_linear_fwd_kernel_tiles[(triton.cdiv(M, chosen.block_m) * triton.cdiv(N, chosen.block_n),)](
            x, weight, scale, bias, y, x.stride(0), weight.stride(0), M, N, K, HAS_BIAS=bias is not None,
            BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k, GROUP=8,
            num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip


_int8_linear = without_gradient("int8_linear", _forward)


def int8_linear_triton(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute int8_linear_reference with the kernels of this page, on CUDA tensors, x in fp32, fp16 or bf16.

    Deterministic. Loads are 16 bytes wide if K is a multiple of 16 and x's rows start at multiples of 16 bytes; others
    are correct but slower. Nothing waits for the GPU, and launches depend on shapes alone, so that a CUDA graph may
    replay them.
    """
    _check(x, weight, scale, bias)
    require_kernel_dtype("x", x)
    return _int8_linear(x, weight, scale, bias)


def inputs(
    M: int, N: int, K: int, *, bias: bool = True, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple, dict[str, Any]]:
    """Draw normal x (M, K) and bias (N,), uniform weight (N, K), and scales that make y of unit size."""
    x = torch.randn(M, K, dtype=dtype, device=device)
    weight = torch.randint(-STEPS, STEPS + 1, (N, K), dtype=torch.int8, device=device)
    scale = (0.5 + torch.rand(N, device=device)) / (74 * K**0.5)  # 74 is the root mean square of such integers
    return (x, weight, scale, torch.randn(N, dtype=dtype, device=device) if bias else None), {}


def cost(M: int, N: int, K: int, *, bias: bool = True, itemsize: int) -> tuple[Cost, Cost]:
    """Count one product; the matrix and its scales read once, x and bias read and y written in x's dtype."""
    return Cost(2 * M * N * K, N * K + 4 * N + (M * K + M * N + N * bias) * itemsize), Cost(0, 0)


INT8_LINEAR = Op(
    name="int8_linear",
    reference=int8_linear_reference,
    triton=int8_linear_triton,
    inputs=inputs,
    parity=(
        dict(M=1, N=1, K=1), dict(M=3, N=70, K=530), dict(M=1, N=5, K=16), dict(M=4, N=33, K=2065),
        dict(M=0, N=3, K=4), dict(M=8, N=65, K=129), dict(M=9, N=16, K=32), dict(M=40, N=530, K=16),
        dict(M=67, N=131, K=200),
    ),
    domain=dict(
        M=(*range(1, 20), 33, 65), N=(1, 2, 15, 16, 17, 63, 65), K=(1, 7, 8, 15, 16, 17, 32, 100, 513, 2072),
    ),
    options=dict(bias=(True, False)),
    bench=(
        dict(M=1, N=2304, K=768), dict(M=1, N=768, K=3072), dict(M=8, N=3072, K=768), dict(M=1, N=3072, K=768),
        dict(M=1, N=50304, K=768, bias=False), dict(M=8, N=50304, K=768, bias=False), dict(M=1, N=768, K=768),
        dict(M=1, N=4800, K=1600), dict(M=1, N=6400, K=1600), dict(M=1, N=1600, K=6400), dict(M=8, N=6400, K=1600),
        dict(M=8, N=1600, K=6400), dict(M=1024, N=3072, K=768), dict(M=1024, N=6400, K=1600),
        dict(M=32, N=6400, K=1600),
    ),
    cost=cost,
    summary="scale (x W^T) + bias with W in 8-bit integers and a scale for each of its rows, for decoding",
    differentiable=False,
)  # fmt: skip
