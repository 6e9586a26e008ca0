"""Linear map of a decoding step, fused with what a GPT's block does before and after it, in one launch.

    h[m, n] = scale[n] * sum_k norm(x)[m, k] * weight[n, k] + bias[n]        g[m, n] likewise, of gate
    y = softcap(activation(h, g) + residual)

    layernorm(x) = (x - mean) * rstd * norm_weight + norm_bias        rmsnorm(x) = x * rstd * norm_weight

    x: (..., K) -> (M, K)   weight, gate: (N, K) of x's dtype, or int8 with scale, gate_scale: (N,) fp32
    bias, gate_bias: (N,)   norm_weight, norm_bias: (K,)   residual, y: (..., N)

With few rows of x a product is bound by memory and, in a small model, by launches and each kernel's first bytes. So
norm, activation and residual sum are fused into the product's launch, and nothing is rounded between them. A block is
five launches: this one before and after `append_attention`, and two for the MLP.

Up to eight rows of x are multiplied on the ordinary cores (rows.py), more, up to 64, are tiles of a matrix product
(tiles.py). Both kernels start before the one in front has ended, where the GPU can do that: they bring their part of
the matrix into the L2 cache, and then wait. There is no derivative.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import arch, launcher, multiprocessors, skip, starts_early, tile_arch, triton
from ..op import Cost, Op, changed, check_eps, no_tensor, without_gradient
from ..prims import as_rows, early_launch, require_kernel_dtype
from . import columns as columns_page
from .rows import NUM_WARPS, decode_linear_fwd_kernel_rows, depth, rows_of_a_warp
from .tiles import CONSERVATIVE, TILES, decode_linear_fwd_kernel_tiles

NORMS = ("none", "layernorm", "rmsnorm")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu2", "swiglu")
FEW_ROWS = 8  # of x: the most with which the ordinary cores keep up with memory
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
    _check(x, weight, terms, eps, softcap)
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


def _check(x: Tensor, weight: Tensor, terms: Terms, eps: float, softcap: float | None) -> None:
    """Refuse wrong arguments. A message is made only where a check fails: a step calls this dozens of times."""
    bias, residual, norm_weight, norm_bias, gate, gate_bias, scale, gate_scale, norm, activation = terms
    for name, tensor in (("x", x), ("weight", weight), *zip(Terms._fields, terms[:-2], strict=False)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("x", "weight")):
            raise no_tensor(**{name: tensor})
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected floating (..., K) with K >= 1, got {x.dtype}{tuple(x.shape)}")
    check_eps(eps)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
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


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None, scale: Tensor | None,
    gate_scale: Tensor | None, norm: str, activation: str, eps: float, softcap: float, dtype: torch.dtype,
    columns: bool,
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
    if columns and M <= columns_page.MOST_ROWS:
        part = columns_page.tile(N, gated, multiprocessors(x), arch(x))
        columns_page.decode_linear_fwd_kernel_columns[(triton.cdiv(N, part.block_n),)](
            *arguments, N, K, eps, softcap, **flags, M=M, COUNT=columns_page.count_of(M, norm, norm_bias is not None),
            BLOCK_N=part.block_n, BLOCK_K=part.block_k, STAGES=part.num_stages, num_warps=NUM_WARPS,
        )  # fmt: skip
    elif M <= FEW_ROWS:
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
    *,
    columns: bool = False,
) -> Tensor:
    """Compute decode_linear_reference with the kernels of this page, on CUDA tensors of fp32, fp16 or bf16.

    Up to 64 rows of x. One launch, deterministic; nothing waits for the GPU, so that a CUDA graph may replay it. Loads
    are 16 bytes wide if rows start at multiples of 16 bytes; others are correct but slower. With `columns`, up to four
    rows in bf16 go by columns.py.
    """
    terms = Terms(bias, residual, norm_weight, norm_bias, gate, gate_bias, scale, gate_scale, norm, activation)
    _check(x, weight, terms, eps, softcap)
    require_kernel_dtype("x", x)
    if dtype not in (None, torch.float32, x.dtype):
        raise ValueError(f"dtype: expected x's or float32, got {dtype}")
    if x.numel() > MOST_ROWS * x.shape[-1]:
        raise ValueError(f"x: up to {MOST_ROWS} rows have kernels, got {tuple(x.shape)}; use a product and a norm")
    out_dtype = x.dtype if dtype is None else dtype
    columns = columns and x.dtype == torch.bfloat16
    return _decode_linear(x, weight, *terms, float(eps), float(softcap or 0.0), out_dtype, columns)


decode_linear_columns = functools.partial(decode_linear_triton, columns=True)


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
    variants={"columns": decode_linear_columns},
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
