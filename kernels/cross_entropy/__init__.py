"""Softmax cross-entropy of logits.

    s = softcap * tanh(z / softcap)  if softcap else  z            lse = log sum_v exp(s[m, v])
    loss[m] = (1 - e) * (lse - s[m, target]) + e * (lse - mean_v s[m, v]) + z_loss * lse^2        e = label_smoothing

    ds[m, v] = (1 + 2 * z_loss * lse) * softmax(s)[m, v] - (1 - e) * [v == target] - e / V
    dz = ds * (1 - (s / softcap)^2)  if softcap else  ds

    Rows whose target is ignore_index have loss 0 and no gradient, and "mean" divides by the number of the others.

logits: (M, N), of which the first V = vocab_size columns count   targets: (M,) int32 or int64
loss: () or, for reduction "none", (M,), at least fp32

A target neither in the vocabulary nor ignore_index is a ValueError on the CPU; on a GPU, which the host does not wait
for, it makes the loss NaN.

z-loss: Chowdhery et al., "PaLM", arXiv:2204.02311, section 5. Softcap: Gemma 2, arXiv:2408.00118, section 2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import jit, launcher, launching, tl, triton
from ..op import Cost, Op, changed, differentiable, no_tensor, refuse_second_derivative, require
from ..prims import as_rows, require_kernel_dtype
from .rows import TILES as ROW_TILES
from .rows import Criterion, check_criterion, cross_entropy_rows, load_logits, logits_gradient


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    inplace: bool = False,
) -> Tensor:
    """Returns the loss of logits (M, N) against targets (M,), computed in at least fp32.

    With the options that torch.nn.functional.cross_entropy has, the result is the same, also NaN for a mean over no
    rows. Columns from vocab_size on are padding. `inplace` permits overwriting the logits; the reference does not.
    """
    V = _vocabulary(logits, vocab_size)
    criterion = Criterion(ignore_index, label_smoothing, z_loss, softcap, V, reduction)
    _check(logits, targets, criterion)
    return formula(logits, targets, criterion)


def formula(logits: Tensor, targets: Tensor, criterion: Criterion) -> Tensor:
    """Returns the loss as the two references have it, for arguments that are checked."""
    ignore_index, label_smoothing, z_loss, softcap, V, reduction = criterion
    s = logits if V == logits.shape[-1] else logits[:, :V]  # a slice that takes all would cost its backward a copy
    s = s.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    targets = targets.long()
    loss = F.cross_entropy(s, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    if z_loss:
        kept = targets != ignore_index
        square = torch.where(kept, torch.logsumexp(s, dim=-1).square(), 0.0)
        total = {"none": square, "sum": square.sum(), "mean": square.sum() / kept.sum()}[reduction]
        loss = loss + z_loss * total
    return loss


def _vocabulary(logits: Tensor, vocab_size: int | None) -> int:
    """Returns how many columns of logits count: all by default; 0 where there are none."""
    if not isinstance(logits, Tensor):
        raise no_tensor(logits=logits)
    return (logits.shape[-1] if logits.dim() else 0) if vocab_size is None else vocab_size


def _check(logits: Tensor, targets: Tensor, criterion: Criterion) -> None:
    shape = logits.shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"logits: expected (M, N) with N >= 1, got {tuple(shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits: expected a floating dtype, got {logits.dtype}")
    check_criterion(targets, shape[0], shape[1], logits.device, criterion, "logits")


@jit
def cross_entropy_bwd_kernel(
    logits_ptr, targets_ptr, scale_ptr, maximum_ptr, log_sum_ptr, dlogits_ptr, logits_stride_m, scale_stride_m, M, N, V,
    ignore_index, label_smoothing, z_loss, softcap,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a block of the gradient: logits[m, v], maximum[m], log_sum[m], scale[m] -> dlogits[m, v]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    v = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    target = tl.load(targets_ptr + m, m < M, other=0).to(tl.int64)
    kept = (m < M) & (target != ignore_index)
    maximum = tl.load(maximum_ptr + m, m < M, other=0.0)
    log_sum = tl.load(log_sum_ptr + m, m < M, other=0.0)
    scale = tl.load(scale_ptr + m * scale_stride_m, m < M, other=0.0)
    s, share = load_logits(logits_ptr + m * logits_stride_m + v, kept & (v < N), v < V, softcap, SOFTCAP)
    dz = logits_gradient(s, share, v, target, maximum, log_sum, scale, V, label_smoothing, z_loss, SOFTCAP)
    dz = tl.where(kept & (v < V), dz, 0.0)
    tl.store(dlogits_ptr + m * N + v, dz.to(dlogits_ptr.dtype.element_ty), (m < M) & (v < N))


@jit
def cross_entropy_scale_kernel(dlogits_ptr, factor_ptr, dlogits_stride_m, factor_stride_m, N, BLOCK_N: tl.constexpr):
    """One program multiplies a block of dlogits[m, :] by factor[m] in place, and leaves it unread where that is one."""
    m = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + m * factor_stride_m)
    if factor != 1.0:
        v = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        at = dlogits_ptr + m * dlogits_stride_m + v
        dz = tl.load(at, v < N, other=0.0).to(tl.float32) * factor
        tl.store(at, dz.to(dlogits_ptr.dtype.element_ty), v < N)


def _count_rows(targets: Tensor, ignore_index: int) -> Tensor:
    """Returns how many rows count, () fp32, on their device, so that the host does not wait."""
    return (targets != ignore_index).sum(dtype=torch.float32)


def _reduced(loss: Tensor, counted: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / counted if reduction == "mean" else loss.sum()


def _row_scale(dloss: Tensor, counted: Tensor, M: int, reduction: str) -> Tensor:
    """Returns the gradient of each row's loss, (M,) fp32, often with stride 0."""
    return (dloss / counted if reduction == "mean" else dloss).expand(M)


def _forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
    vocab_size: int, reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    criterion = Criterion(ignore_index, label_smoothing, z_loss, softcap, vocab_size, reduction)
    counted = _count_rows(targets, ignore_index)
    loss, maximum, log_sum = cross_entropy_rows(as_rows(logits), targets.contiguous(), criterion)
    return _reduced(loss, counted, reduction), maximum, log_sum, counted


def _backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, maximum: Tensor, log_sum: Tensor, counted: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, vocab_size: int, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = as_rows(logits)
    M, N = rows.shape
    dlogits = torch.empty((M, N), dtype=logits.dtype, device=logits.device)
    if M:
        scale, tile = _row_scale(dloss, counted, M, reduction), ROW_TILES["rows"].choose(N)
        cross_entropy_bwd_kernel[(triton.cdiv(M, tile.block_m), triton.cdiv(N, tile.block_n))](
            rows, targets.contiguous(), scale, maximum, log_sum, dlogits, rows.stride(0), scale.stride(0), M, N,
            vocab_size, ignore_index, label_smoothing, z_loss, softcap or 1.0,
            SOFTCAP=softcap is not None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
        )  # fmt: skip
    return dlogits, targets.new_empty(0)


_cross_entropy = differentiable(
    "cross_entropy", _forward, _backward,
    save=lambda inputs, output: (*inputs[:2], *output[1:], *inputs[2:]),
)  # fmt: skip


class _InPlace(torch.autograd.Function):
    """Writes the gradient over the logits in the pass that computes the loss; backward scales it where needed.

    Eager mode only: a compiled graph gets the functional operator, since an operator that writes its argument has no
    autograd there. The version counter lets torch report other uses of the logits, and a second backward.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, criterion: Criterion) -> Tensor:
        counted = _count_rows(targets, criterion.ignore_index)
        scale = _row_scale(torch.ones_like(counted), counted, len(logits), criterion.reduction)
        loss, *_ = cross_entropy_rows(logits, targets.contiguous(), criterion, scale)
        torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(logits)
        ctx.launcher = launcher()
        return _reduced(loss, counted, criterion.reduction)

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative("cross_entropy", "use kernels.load('reference')")
        (dlogits,) = ctx.saved_tensors
        M, N = dlogits.shape
        factor = dloss.expand(M)
        if M:
            with launching(ctx.launcher):
                cross_entropy_scale_kernel[(M, triton.cdiv(N, 4096))](
                    dlogits, factor, dlogits.stride(0), factor.stride(0), N, BLOCK_N=4096, num_warps=8
                )
        torch.autograd.graph.increment_version(dlogits)
        return dlogits, None, None


def cross_entropy_triton(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    inplace: bool = False,
) -> Tensor:
    """Compute cross_entropy_reference with the kernels of this page, on CUDA tensors of fp32, fp16 or bf16.

    Deterministic. Forward reads the logits once; backward reads them again and writes their gradient to new memory.
    With `inplace` forward writes the gradient over the logits, which are lost. A compiled graph ignores `inplace`.
    """
    V = _vocabulary(logits, vocab_size)
    criterion = Criterion(ignore_index, label_smoothing, z_loss, softcap, V, reduction)
    _check(logits, targets, criterion)
    require_kernel_dtype("logits", logits)
    if not inplace or torch.compiler.is_compiling() or not (logits.requires_grad and torch.is_grad_enabled()):
        return _cross_entropy(logits, targets, *criterion)
    require(logits.is_cuda or launcher() is not None, f"logits: cross_entropy needs CUDA tensors, got {logits.device}")
    require(not logits.is_leaf, "logits: inplace would overwrite a leaf tensor that requires a gradient")
    require(
        logits.stride(1) == 1 and (logits.stride(0) >= logits.shape[1] or len(logits) == 1),
        f"logits: inplace needs rows that lie whole and apart in memory, got strides {logits.stride()}",
    )
    return _InPlace.apply(logits, targets, criterion)


# Options of both losses. The last `padding` columns of logits do not count.
OPTIONS: dict[str, tuple] = dict(
    label_smoothing=(0.0, 0.1), z_loss=(0.0, 1e-2), softcap=(None, 5.0), reduction=("mean", "sum", "none"),
    ignore_index=(-100, 0), padding=(0, 3), index=("int64", "int32"),
)  # fmt: skip


def draw_targets(M: int, V: int, ignore_index: int, index: str, device: str) -> Tensor:
    """Draw targets (M,) below V; one in eight is ignore_index, and others may be if it is in the vocabulary."""
    targets = torch.randint(V, (M,), device=device)
    targets[7::8] = ignore_index
    return targets.to(getattr(torch, index))


def inputs(
    M: int, V: int, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: str = "mean", padding: int = 0, index: str = "int64",
    dtype: torch.dtype, device: str = "cpu",
) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
    """Draw logits (M, V + padding) and targets (M,)."""
    targets = draw_targets(M, V, ignore_index, index, device)
    logits = torch.randn(M, V + padding, dtype=dtype, device=device) * 3
    return (logits, targets), changed(
        cross_entropy_reference, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        softcap=softcap, reduction=reduction, vocab_size=V if padding else None,
    )  # fmt: skip


def cost(
    M: int, V: int, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: str = "mean", padding: int = 0, index: str = "int64",
    itemsize: int,
) -> tuple[Cost, Cost]:  # fmt: skip
    """Count compulsory traffic: logits read, their gradient written; in each direction targets and fp32 statistics."""
    row, N = M * (getattr(torch, index).itemsize + 4), V + padding
    return Cost(4 * M * V, M * N * itemsize + row), Cost(3 * M * V, 2 * M * N * itemsize + row)


CROSS_ENTROPY = Op(
    name="cross_entropy",
    reference=cross_entropy_reference,
    triton=cross_entropy_triton,
    inputs=inputs,
    parity=(
        dict(M=1, V=1), dict(M=5, V=65), dict(M=0, V=7), dict(M=17, V=1023), dict(M=3, V=50257), dict(M=2, V=8193),
        dict(M=11, V=129),
    ),
    domain=dict(M=range(1, 9), V=(*range(1, 70), 127, 128, 129, 500, 1023, 1024, 1025, 8192, 8193, 16400)),
    options=OPTIONS,
    bench=(dict(M=16384, V=50304), dict(M=8192, V=131072), dict(M=4096, V=262144)),
    cost=cost,
    summary="log sum_v exp(z[v]) - z[target], with smoothing, z-loss and softcap",
)  # fmt: skip
