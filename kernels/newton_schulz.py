"""Newton-Schulz orthogonalization: bring all singular values of each matrix of a stack near one, by products alone.

    X0 = X / (1.01 |X|_F)                      |X|_F bounds the largest singular value; 1.01 leaves room for rounding
    for (a, b, c) in coefficients[:steps]:
        A = X Xᵀ                               the Gram matrix, symmetric
        P = b A + c A A                        symmetric too
        X = a X + P X                          maps each singular value s to a s + b s³ + c s⁵, keeps singular vectors

An odd polynomial of X acts on its singular values only, so that the iteration maps X = U S Vᵀ to U p(S) Vᵀ with p(S)
near 1: the direction of steepest descent under the spectral norm, which is Muon's update. Tall matrices are transposed
first, so that A is always (min(m, n), min(m, n)).

    x, out: (B, M, N)   A, P, T, Q: (B, K, K) with K = min(M, N)

A and P are symmetric: the kernel computes the tiles of one triangle and writes each twice, for half the work of a
product. There is no derivative: the iteration turns gradients into an update.

If a matrix is much longer than wide, most of the work is in products with X. Several steps can share them, since the
next Gram matrix follows from the last: a step multiplies X by T = a I + b A + c A A, and so maps A to T A T; two steps
multiply X by Q = T' T. All of these are polynomials of one A and commute, so that their products are symmetric as well,
again at half the work. Rounding errors accumulate in A, which is therefore computed from X again after two steps: the
error is then at most twice that of plain iteration; after three steps it would be up to 2.6 times.

Sources: Muon and its coefficients, Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; one polynomial per
step, each the best for the interval that the last one left, Polar Express, Amsel et al. 2025,
https://arxiv.org/abs/2505.16932. Half of a symmetric product: flash-muon, https://github.com/nil0x9/flash-muon. Steps
on the Gram matrix, with restarts: Dao-AILab 2026, https://github.com/Dao-AILab/gram-newton-schulz.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import arch, jit, tile_arch, tl, triton
from .op import Cost, Op, changed, check_count, no_tensor, require, without_gradient
from .prims import require_kernel_dtype

Coefficients = Sequence[tuple[float, float, float]]

# Steep at zero rather than convergent: after five steps singular values lie in about [0.7, 1.2].
QUINTIC: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5

# Greedy minimax polynomials, with the paper's guard against rounding (safety factor 2e-2, cushion 2). Four steps take
# the first four.
POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

COEFFICIENTS = {"polar express": POLAR_EXPRESS, "quintic": QUINTIC}

LONG = 1.5  # ratio of sides from which steps share a Gram matrix; below, that saves less than a sixth

SAFETY = 1.01
TINY = 1e-7  # smallest divisor, so that a zero matrix stays zero


@dataclass(frozen=True)
class Products:
    """The three products of the iteration."""

    gram: Callable[[Tensor], Tensor]  # x (B, M, N) -> x xᵀ (B, M, M)
    # x, y (B, M, M), alpha, beta, gamma -> alpha x y + beta y + gamma I, for symmetric x and y that commute
    commuting: Callable[[Tensor, Tensor, float, float, float], Tensor]
    affine: Callable[[Tensor, Tensor, float], Tensor]  # P (B, M, M), x (B, M, N), a -> a x + P x, for a symmetric P


def _commuting_reference(x: Tensor, y: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    if gamma == 0.0:
        return torch.baddbmm(y, x, y, beta=beta, alpha=alpha)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)  # the diagonal cancels: round once, at the end
    x, y = x.to(wide), y.to(wide)
    out = torch.baddbmm(y, x, y, beta=beta, alpha=alpha)
    out.diagonal(dim1=-2, dim2=-1).add_(gamma)
    return out.to(dtype)


REFERENCE_PRODUCTS = Products(
    gram=lambda x: torch.bmm(x, x.mT),
    commuting=_commuting_reference,
    affine=lambda P, x, a: torch.baddbmm(x, P, x, beta=a),
)


@torch.no_grad()
def newton_schulz_reference(x: Tensor, steps: int = 5, coefficients: Coefficients = POLAR_EXPRESS) -> Tensor:
    """Returns the orthogonal factors of a stack of matrices, up to the band of singular values of the coefficients.

    x: (B, M, N), any floating dtype -> (B, M, N) of that dtype. Every product is rounded to x's dtype, because that is
    the algorithm: Muon runs it in bf16 by design. Float64 in gives float64 truth. Matrices of a stack are independent:
    NaN in one stays there, and a zero matrix gives a zero.
    """
    return iterate(x, steps, coefficients, REFERENCE_PRODUCTS)


def iterate(x: Tensor, steps: int, coefficients: Coefficients, products: Products) -> Tensor:
    """Run the iteration at the head of this page with the given products."""
    _check(x, steps, coefficients)
    M, N = x.shape[-2:]
    if M > N:
        return iterate(x.mT, steps, coefficients, products).mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    norm = (SAFETY * norm).clamp_(min=TINY)
    narrow = norm if x.dtype == torch.float16 else norm.to(x.dtype)  # in fp16 a norm may be infinite
    x = (x / narrow).to(x.dtype)
    triples = iter(coefficients[:steps])
    for count in steps_per_gram(M, N, steps):
        x = advance(x, list(islice(triples, count)), products)
    return x


def steps_per_gram(M: int, N: int, steps: int) -> list[int]:
    """Returns how many steps use each successive Gram matrix of an (M, N) matrix; the numbers add up to `steps`.

    Pairs come first, where later steps correct rounding errors, and last, where singular values are near one. If steps
    are odd, the single step is in the middle: there a pair's error would move singular values out of the interval that
    Polar Express' next polynomial is made for. Fewer than four steps would not correct a pair's error.
    """
    if steps < 4 or max(M, N) < LONG * min(M, N):
        return [1] * steps
    counts = [2] * (steps // 2)
    if steps % 2:
        counts.insert(len(counts) // 2, 1)
    return counts


def advance(x: Tensor, coefficients: Coefficients, products: Products) -> Tensor:
    """Returns x (B, M, N) after these steps, computed from one Gram matrix of x."""
    A = products.gram(x)
    (a, b, c), *later = coefficients
    if not later:
        return products.affine(products.commuting(A, A, c, b, 0.0), x, a)
    Q = T = products.commuting(A, A, c, b, a)
    for a, b, c in later:
        A = products.commuting(T, products.commuting(T, A, 1.0, 0.0, 0.0), 1.0, 0.0, 0.0)
        T = products.commuting(A, A, c, b, a)
        Q = products.commuting(T, Q, 1.0, 0.0, 0.0)
    return products.affine(Q, x, 0.0)


def _check(x: Tensor, steps: int, coefficients: Coefficients) -> None:
    if not isinstance(x, Tensor):
        raise no_tensor(x=x)
    require(x.ndim == 3, f"x must be a stack of matrices (B, M, N), not {tuple(x.shape)}")
    require(x.is_floating_point(), f"x must be floating point, not {x.dtype}")
    most = len(coefficients)
    check_count("steps", steps)
    require(steps <= most, f"steps must be 0 to {most}, as many as there are coefficients")


@jit
def newton_schulz_fwd_kernel_symmetric(
    x_ptr, y_ptr, out_ptr, stride_b, stride_m, stride_k, M, K, alpha, beta, gamma,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of the lower triangle of x yᵀ, and writes it there and, mirrored, above the diagonal.

    The product must be symmetric: y is x, or both are symmetric and commute. They have the same strides. With ADD, for
    such a pair, the result is alpha x y + beta y + gamma I.
    """
    blocks = tl.cdiv(M, BLOCK_M)
    tiles = blocks * (blocks + 1) // 2
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles  # row by row through the triangle: row (row + 1) / 2 tiles come before a row
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row += ((row + 1) * (row + 2) // 2 <= tile).to(tl.int32)  # a root in fp32 may fall to the other side
    row -= (row * (row + 1) // 2 > tile).to(tl.int32)
    column = tile - row * (row + 1) // 2

    i, j = row.to(tl.int64) * BLOCK_M, column.to(tl.int64) * BLOCK_M  # where the tile's rows and columns begin
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)[None, :]
    x_ptr += b * stride_b
    y_ptr += b * stride_b
    rows = x_ptr + i * stride_m + (m[:, None] * stride_m + k * stride_k)
    columns = y_ptr + j * stride_m + (m[:, None] * stride_m + k * stride_k)
    is_row, is_column = m < M - i, m < M - j
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        x_rows = tl.load(rows, is_row[:, None] & (k < K - start), other=0.0)
        y_columns = tl.load(columns, is_column[:, None] & (k < K - start), other=0.0)
        acc = tl.dot(x_rows, tl.trans(y_columns), acc, input_precision="ieee")
        rows += BLOCK_K * stride_k
        columns += BLOCK_K * stride_k
    # epilogue
    if ADD:
        here = i * stride_m + j * stride_k + (m[:, None] * stride_m + m[None, :] * stride_k)
        acc = alpha * acc + beta * tl.load(y_ptr + here, is_row[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        acc += tl.where((row == column) & (m[:, None] == m[None, :]), gamma, 0.0)
    out = acc.to(out_ptr.dtype.element_ty)
    out_ptr += b * M * M
    tl.store(out_ptr + i * M + j + (m[:, None] * M + m[None, :]), out, is_row[:, None] & is_column[None, :])
    if row != column:
        mirrored = out_ptr + j * M + i + (m[:, None] * M + m[None, :])
        tl.store(mirrored, tl.trans(out), is_column[:, None] & is_row[None, :])


@jit
def newton_schulz_fwd_kernel_affine(
    p_ptr, x_ptr, out_ptr, x_stride_b, x_stride_m, x_stride_n, out_stride_b, out_stride_m, out_stride_n, M, N, a,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of a x + p x. Tiles are ordered in groups of GROUP rows, which share L2."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_M)
    b = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    tile = tl.program_id(0) % (rows * columns)
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    i = (first + tile % (GROUP * columns) % height).to(tl.int64) * BLOCK_M
    j = (tile % (GROUP * columns) // height).to(tl.int64) * BLOCK_M

    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    is_row, is_column = m < M - i, m < N - j
    p_ptr += b * M * M + i * M
    x_ptr += b * x_stride_b + j * x_stride_n
    p_tile = p_ptr + (m[:, None] * M + k[None, :])
    x_tile = x_ptr + (k[:, None] * x_stride_m + m[None, :] * x_stride_n)
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in tl.range(0, M, BLOCK_K):
        p = tl.load(p_tile, is_row[:, None] & (k[None, :] < M - start), other=0.0)
        x = tl.load(x_tile, (k[:, None] < M - start) & is_column[None, :], other=0.0)
        acc = tl.dot(p, x, acc, input_precision="ieee")
        p_tile += BLOCK_K
        x_tile += BLOCK_K * x_stride_m
    here = i * x_stride_m + (m[:, None] * x_stride_m + m[None, :] * x_stride_n)
    mask = is_row[:, None] & is_column[None, :]
    acc += a * tl.load(x_ptr + here, mask, other=0.0).to(tl.float32)
    out_ptr += b * out_stride_b + i * out_stride_m + j * out_stride_n
    out = out_ptr + (m[:, None] * out_stride_m + m[None, :] * out_stride_n)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask)


class Tile(NamedTuple):
    """A square tile of the result, its depth along the contracted axis, warps and stages of a program."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


# From the compiled code (results/aot.json): the largest without spills and with two warpgroups per multiprocessor. Not
# timed on a GPU yet. fp32 runs without tensor cores, and takes the conservative tile.
# With b tiles per side a symmetric product computes (b + 1) / 2b of them, at most 0.56 of a plain one from b = 9 on:
# K > 1024 with tiles of 128 (at 1024 itself 36 of 64, 0.5625), K > 512 with the tiles of 64 that fp32 takes.
TILES = {80: Tile(128, 32, 4, 4), 86: Tile(128, 32, 8, 4), 90: Tile(128, 64, 4, 3), 100: Tile(128, 64, 8, 3)}
CONSERVATIVE = Tile(64, 32, 4, 2)


def tile(x: Tensor) -> Tile:
    """Returns the tile for products of x's dtype on its GPU."""
    return CONSERVATIVE if x.dtype == torch.float32 else TILES.get(tile_arch(arch(x)), CONSERVATIVE)


def _symmetric(x: Tensor, y: Tensor, *terms: float) -> Tensor:
    """Returns x yᵀ or, with the terms alpha, beta and gamma, alpha x y + beta y + gamma I."""
    (B, M, K), block = x.shape, tile(x)
    out = torch.empty((B, M, M), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(M, block.block_m)
    if out.numel():
        newton_schulz_fwd_kernel_symmetric[(B * blocks * (blocks + 1) // 2,)](
            x, y, out, *x.stride(), M, K, *(terms or (1.0, 0.0, 0.0)), ADD=bool(terms),
            BLOCK_M=block.block_m, BLOCK_K=block.block_k, num_warps=block.num_warps, num_stages=block.num_stages,
        )  # fmt: skip
    return out


def _gram(x: Tensor) -> Tensor:
    return _symmetric(x, x)


def _affine(P: Tensor, x: Tensor, a: float) -> Tensor:
    (B, M, N), block = x.shape, tile(x)
    out = torch.empty_like(x)
    if out.numel():
        newton_schulz_fwd_kernel_affine[(B * triton.cdiv(M, block.block_m) * triton.cdiv(N, block.block_m),)](
            P, x, out, *x.stride(), *out.stride(), M, N, a, BLOCK_M=block.block_m, BLOCK_K=block.block_k, GROUP=8,
            num_warps=block.num_warps, num_stages=block.num_stages,
        )  # fmt: skip
    return out


KERNEL_PRODUCTS = Products(_gram, _symmetric, _affine)


def _forward(x: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    """Run the iteration with the kernels, which need unit stride along one axis; coefficients are flat, a b c a b c."""
    coalesced = x if 1 in x.stride()[1:] else x.contiguous()
    return iterate(coalesced, steps, list(zip(*[iter(coefficients)] * 3, strict=True)), KERNEL_PRODUCTS)


_newton_schulz = without_gradient("newton_schulz", _forward)


def newton_schulz_triton(x: Tensor, steps: int = 5, coefficients: Coefficients = POLAR_EXPRESS) -> Tensor:
    """Compute newton_schulz_reference with the kernels of this page, on CUDA tensors of fp32, fp16 or bf16.

    Deterministic.
    """
    _check(x, steps, coefficients)
    require_kernel_dtype("x", x)
    return _newton_schulz(x, steps, [number for triple in coefficients for number in triple])


def inputs(
    B: int, M: int, N: int, *, steps: int = 5, coefficients: str = "polar express", dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
    """Draw normal x (B, M, N); returns it with steps."""
    x = torch.randn(B, M, N, dtype=dtype, device=device)
    return (x, steps), changed(newton_schulz_reference, coefficients=COEFFICIENTS[coefficients])


def cost(
    B: int, M: int, N: int, *, steps: int = 5, coefficients: str = "polar express", itemsize: int
) -> tuple[Cost, Cost]:
    """Count symmetric products at half their FLOPs; x is read once and written once."""
    K, L = min(M, N), max(M, N)
    # one square of A per step; a second step on the same Gram matrix adds Q and two products for A
    flops = sum(3 * K * K * L + (4 * count - 3) * K**3 for count in steps_per_gram(M, N, steps))
    return Cost(B * flops, 2 * B * M * N * itemsize), Cost(0, 0)


NEWTON_SCHULZ = Op(
    name="newton_schulz",
    reference=newton_schulz_reference,
    triton=newton_schulz_triton,
    inputs=inputs,
    parity=(
        dict(B=1, M=1, N=1), dict(B=2, M=1, N=7), dict(B=1, M=70, N=65), dict(B=1, M=200, N=66),
        dict(B=0, M=3, N=4), dict(B=2, M=33, N=1), dict(B=1, M=5, N=130), dict(B=1, M=129, N=131),
        dict(B=2, M=33, N=66),
    ),
    domain=dict(M=(*range(1, 20), 31, 33, 63, 64, 65), N=(*range(1, 20), 32, 63, 65, 67), B=range(3)),
    options=dict(steps=(5, 4, 3, 2, 1), coefficients=tuple(COEFFICIENTS)),
    bench=(
        dict(B=12, M=768, N=3072), dict(B=48, M=768, N=768), dict(B=12, M=3072, N=768), dict(B=48, M=1600, N=6400),
        dict(B=192, M=1600, N=1600), dict(B=48, M=6400, N=1600), dict(B=24, M=1024, N=4096), dict(B=36, M=5120, N=1280),
        dict(B=8, M=4096, N=4096), dict(B=2, M=6400, N=6400),
    ),
    cost=cost,
    summary="U p(S) V^T with p(S) near 1 for each x = U S V^T of a stack; x <- a x + (b x x^T + c (x x^T)^2) x",
    differentiable=False,
)  # fmt: skip
