"""The nonlinearity between the two layers of an MLP, the biases of the first layer added inside.

    a = h + bias        g = gate + gate_bias

    gelu        y = a * Phi(a), Phi(a) = (1 + erf(a / sqrt 2)) / 2       dy/da = Phi(a) + a exp(-a^2 / 2) / sqrt(2 pi)
    gelu_tanh   y = a * s, s = sigmoid(2 u), u = sqrt(2 / pi) * (a + 0.044715 a^3)         dy/da = s + 2 a u' s (1 - s)
    relu2       y = max(a, 0)^2                                              dy/da = 2 max(a, 0)
    swiglu      y = silu(g) * a, silu(g) = g * sigmoid(g)                    dy/da = silu(g), dy/dg = a * silu'(g)

    dh = dy * dy/da     dbias = sum_m dh       dgate = dy * dy/dg     dgate_bias = sum_m dgate

h, gate, y: (..., N), taken as (M, N)   bias, gate_bias: (N,)

With the biases here, the sums of their gradients ride on the backward pass instead of reading dh once more. Hendrycks
and Gimpel, arXiv:1606.08415; So et al., "Primer", arXiv:2109.08668; Shazeer, arXiv:2002.05202.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import jit, multiprocessors, tl
from .op import Cost, Op, differentiable, no_tensor, require, traced
from .prims import (
    LoopTile,
    activated,
    check_rows,
    loop_tile,
    normal,
    parameter_dtype,
    parameter_row,
    require_kernel_dtype,
    rows_of,
    sigmoid,
    sum_partial_rows,
)

KINDS = ("gelu", "gelu_tanh", "relu2", "swiglu")


def activation_reference(
    h: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    kind: str = "gelu",
) -> Tensor:
    """Apply the nonlinearity `kind` to h (..., N) plus bias (N,), in at least fp32; returns h's dtype.

    Only swiglu takes gate (..., N), of h's dtype, and gate_bias (N,). Without biases h need not be converted: torch's
    gelu computes in fp32 and rounds once, and the positive part in ReLU^2 is exact. On a CPU 16-bit swiglu rounds
    silu(g) too, which saves passes over memory.
    """
    _check(h, bias, gate, gate_bias, kind)
    wide, dtype = torch.promote_types(h.dtype, torch.float32), h.dtype
    if bias is not None or (gate is not None and (gate_bias is not None or h.device.type != "cpu")):
        h, gate = _biased(h, bias, wide), None if gate is None else _biased(gate, gate_bias, wide)
    if kind == "relu2":
        y = relu2(h)
    else:
        y = F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none") if gate is None else F.silu(gate) * h
    return y.to(dtype)


def _biased(x: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    return x.to(wide) if bias is None else x.to(wide) + bias.to(wide)


def relu2(x: Tensor) -> Tensor:
    """Returns the square of the positive part of x."""
    if x.device.type == "cpu" and not traced():
        return _ReLU2.apply(x)
    return F.relu(x).square()


class _ReLU2(torch.autograd.Function):
    """Computes relu2 in fewer passes: torch would save the positive part, and mask by comparison."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return 2 * dy * F.relu(x)
        return F.relu(x).mul_(dy).mul_(2)


def _check(h: Tensor, bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not (isinstance(h, Tensor) and (gate is None or isinstance(gate, Tensor))):
        raise no_tensor(h=h, gate=gate)
    if h.dim() == 0 or h.shape[-1] == 0 or not h.is_floating_point():
        raise ValueError(f"h: expected floating (..., N) with N >= 1, got {h.dtype}{tuple(h.shape)}")
    if bias is not None or gate_bias is not None:
        check_rows(h, bias=bias, gate_bias=gate_bias)
    if (gate is not None) != (kind == "swiglu") or (gate is None and gate_bias is not None):
        raise ValueError(f"gate: swiglu needs one and no other kind takes one or its bias; kind is {kind!r}")
    if gate is not None:
        same = gate.shape == h.shape and gate.dtype == h.dtype and gate.device == h.device
        require(
            same, f"gate: expected {h.dtype}{tuple(h.shape)} on {h.device} as h, got {gate.dtype}{tuple(gate.shape)}"
        )


@jit
def _slopes(a, g, KIND: tl.constexpr):
    """Returns dy/da and, for swiglu, dy/dg, of fp32 a and g."""
    if KIND == "gelu":
        phi, e = normal(a)
        da = phi + a * 0.39894228040143268 * e
        dg = da
    elif KIND == "gelu_tanh":
        s, ds = sigmoid(a * (1.5957691216057308 + 0.071354816272600 * a * a))
        da = s + a * (1.5957691216057308 + 0.2140644488178 * a * a) * ds
        dg = da
    elif KIND == "relu2":
        da = 2.0 * tl.where(a < 0.0, 0.0, a)
        dg = da
    else:
        s, ds = sigmoid(g)
        da = g * s
        dg = a * (s + g * ds)
    return da, dg


@jit
def _load_biased(pointers, mask, bias):
    return tl.load(pointers, mask, other=0.0).to(tl.float32) + bias


@jit
def _load_row(row_ptr, n, N, EXISTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    if EXISTS:
        row = parameter_row(row_ptr, n, N, BLOCK_M, BLOCK_N)
    else:
        row = 0.0
    return row


@jit
def activation_fwd_kernel(
    h_ptr, gate_ptr, bias_ptr, gate_bias_ptr, y_ptr, h_stride_m, gate_stride_m, M, N,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a block of y: h[m, n], gate[m, n] and the biases of the columns n -> y[m, n]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (m < M) & (n < N)
    bias = _load_row(bias_ptr, n, N, HAS_BIAS, BLOCK_M, BLOCK_N)
    a = _load_biased(h_ptr + m * h_stride_m + n, mask, bias)
    g = a
    if KIND == "swiglu":
        gate_bias = _load_row(gate_bias_ptr, n, N, HAS_GATE_BIAS, BLOCK_M, BLOCK_N)
        g = _load_biased(gate_ptr + m * gate_stride_m + n, mask, gate_bias)
    tl.store(y_ptr + m * N + n, activated(a, g, KIND).to(y_ptr.dtype.element_ty), mask)


@jit
def activation_bwd_kernel(
    dy_ptr, h_ptr, gate_ptr, bias_ptr, gate_bias_ptr, dh_ptr, dgate_ptr, partial_ptr,
    dy_stride_m, h_stride_m, gate_stride_m, M, N,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program strides down its columns: it writes dh[m, n], dgate[m, n] and partial rows of the bias gradients."""
    p, programs = tl.program_id(0), tl.num_programs(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    bias = _load_row(bias_ptr, n, N, HAS_BIAS, BLOCK_M, BLOCK_N)
    gate_bias = _load_row(gate_bias_ptr, n, N, HAS_GATE_BIAS, BLOCK_M, BLOCK_N)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dgate_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(p * BLOCK_M, M, programs * BLOCK_M, num_stages=NUM_STAGES):
        m = start.to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
        mask = (m < M) & (n < N)
        dy = tl.load(dy_ptr + m * dy_stride_m + n, mask, other=0.0).to(tl.float32)
        # inputs with their biases
        a = _load_biased(h_ptr + m * h_stride_m + n, mask, bias)
        g = a
        if KIND == "swiglu":
            g = _load_biased(gate_ptr + m * gate_stride_m + n, mask, gate_bias)
        # gradients
        da, dg = _slopes(a, g, KIND)
        dh = dy * da
        tl.store(dh_ptr + m * N + n, dh.to(dh_ptr.dtype.element_ty), mask)
        if HAS_BIAS:
            dbias += tl.where(m < M, dh, 0.0)  # past the end 0 * inf would be NaN
        if KIND == "swiglu":
            dgate = dy * dg
            tl.store(dgate_ptr + m * N + n, dgate.to(dgate_ptr.dtype.element_ty), mask)
            if HAS_GATE_BIAS:
                dgate_bias += tl.where(m < M, dgate, 0.0)
    # partial rows
    row = p.to(tl.int64) * N + n
    if HAS_BIAS:
        tl.store(partial_ptr + row, tl.sum(dbias, axis=0)[None, :], n < N)
        row += programs.to(tl.int64) * N
    if HAS_GATE_BIAS:
        tl.store(partial_ptr + row, tl.sum(dgate_bias, axis=0)[None, :], n < N)


# By padded row length, as for the norms. Each program keeps 4,096 elements of each operand in flight per stage: four
# loads of 16 bytes by each of 128 threads. Chosen from the compiled code (results/aot.json).
TILES = {
    1024: LoopTile(block_m=4, block_n=1024, num_warps=4, num_stages=3, per_multiprocessor=4),
    0: LoopTile(block_m=4, block_n=1024, num_warps=4, num_stages=3, per_multiprocessor=4),
}


def _forward(
    h: Tensor, bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    N = h.shape[-1]
    y = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    M = h.numel() // N
    if M:
        tile = loop_tile(TILES, N, 2, 90)
        rows, stride = rows_of(h, N)
        gates, gate_stride = (rows, stride) if gate is None else rows_of(gate, N)
        activation_fwd_kernel[(-(-M // tile.block_m), -(-N // tile.block_n))](
            rows, gates, rows if bias is None else bias.contiguous(),
            rows if gate_bias is None else gate_bias.contiguous(), y, stride, gate_stride, M, N,
            KIND=kind, HAS_BIAS=bias is not None, HAS_GATE_BIAS=gate_bias is not None,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
        )  # fmt: skip
    return y, y.new_empty(0)


def _backward(
    dy: Tensor, h: Tensor, bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = h.shape[-1]
    M = h.numel() // N
    dh, none = torch.empty(h.shape, dtype=h.dtype, device=h.device), h.new_empty(0)
    dgate = none if gate is None else torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dbias, dgate_bias = (
        none if b is None else torch.empty((N,), dtype=b.dtype, device=b.device) for b in (bias, gate_bias)
    )
    stacks = (bias is not None) + (gate_bias is not None)
    if M == 0:
        return dh, dbias.zero_(), dgate, dgate_bias.zero_()
    tile = loop_tile(TILES, N, h.dtype.itemsize, 80)
    columns = -(-N // tile.block_n)
    programs = min(-(-M // tile.block_m), max(1, tile.per_multiprocessor * multiprocessors(h) // columns))
    partial = torch.empty((stacks, programs, N), dtype=torch.float32, device=h.device) if stacks else none
    rows, stride = rows_of(h, N)
    dy, dy_stride = rows_of(dy, N)
    gates, gate_stride = (rows, stride) if gate is None else rows_of(gate, N)
    activation_bwd_kernel[(programs, columns)](
        dy, rows, gates, rows if bias is None else bias.contiguous(),
        rows if gate_bias is None else gate_bias.contiguous(), dh, dgate, partial,
        dy_stride, stride, gate_stride, M, N,
        KIND=kind, HAS_BIAS=bias is not None, HAS_GATE_BIAS=gate_bias is not None,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, NUM_STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    if stacks:
        sums = [total for total, b in ((dbias, bias), (dgate_bias, gate_bias)) if b is not None]
        sum_partial_rows(partial, *sums)
    return dh, dbias, dgate, dgate_bias


_activation = differentiable("activation", _forward, _backward, save=lambda inputs, output: inputs)


def activation_triton(
    h: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    kind: str = "gelu",
) -> Tensor:
    """Compute activation_reference with the kernels of this page, on CUDA tensors of fp32, fp16 or bf16.

    Deterministic.
    """
    _check(h, bias, gate, gate_bias, kind)
    require_kernel_dtype("h", h)
    return _activation(h, bias, gate, gate_bias, kind)


def inputs(
    M: int, N: int, *, kind: str = "gelu", bias: bool = True, parameters: str = "", dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
    """Draw h (M, N), bias (N,) and, for swiglu, gate (M, N) and gate_bias (N,); `parameters` is the biases' dtype."""

    def draw(*shape: int) -> Tensor:
        drawn = dtype if len(shape) == 2 else parameter_dtype(parameters, dtype)
        return torch.randn(*shape, dtype=drawn, device=device) * 1.5

    gated = kind == "swiglu"
    h, gate = draw(M, N), draw(M, N) if gated else None
    return (h, draw(N) if bias else None, gate, draw(N) if bias and gated else None, kind), {}


def cost(
    M: int, N: int, *, kind: str = "gelu", bias: bool = True, parameters: str = "", itemsize: int
) -> tuple[Cost, Cost]:
    """Count compulsory traffic: h and gate read, y written; backward also dy read, and their gradients written."""
    operands = 2 if kind == "swiglu" else 1
    rows = operands * N * (4 if parameters else itemsize) if bias else 0
    return (
        Cost(12 * M * N, (operands + 1) * M * N * itemsize + rows),
        Cost(20 * M * N, (2 * operands + 1) * M * N * itemsize + 2 * rows),
    )


ACTIVATION = Op(
    name="activation",
    reference=activation_reference,
    triton=activation_triton,
    inputs=inputs,
    parity=(
        dict(M=1, N=1), dict(M=5, N=65), dict(M=3, N=1023), dict(M=0, N=9), dict(M=2, N=2050), dict(M=70, N=129),
    ),
    domain=dict(M=range(12), N=(*range(1, 70), 129, 1024, 1030)),
    options=dict(kind=KINDS, bias=(True, False), parameters=("", "float32")),
    bench=(
        dict(M=16384, N=3072), dict(M=16384, N=3072, kind="gelu_tanh"), dict(M=8192, N=16384, kind="relu2", bias=False),
        dict(M=8192, N=11008, kind="swiglu", bias=False), dict(M=16384, N=3072, parameters="float32"),  # as in training
    ),
    cost=cost,
    summary="gelu, gelu_tanh, relu2 of h + bias, or silu(gate) * h",
)  # fmt: skip
