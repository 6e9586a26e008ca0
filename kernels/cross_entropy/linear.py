"""Softmax cross-entropy of a linear map, without holding all of its logits.

    z[m, v] = sum_c x[m, c] * weight[v, c]        loss = cross_entropy(z, target)        (see cross_entropy)

    dx = dz @ weight        dweight = dz^T @ x

x: (M, C)   weight: (V, C), of whose rows the first vocab_size count   targets: (M,) int32 or int64
loss: () or, for reduction "none", (M,), at least fp32

Rows are processed in chunks: the logits of a chunk, their gradient written over them, and both products of that; no
other logits are held. dweight is summed over the chunks in fp32. Forward computes both gradients, and backward only
scales them by the cotangent of the loss. For reduction "none", with a cotangent per row, backward computes the logits
again.

Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009; chunked as in Liger-Kernel.
"""

from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import jit, launcher, skip, tl, triton
from ..op import Cost, Op, changed, check_count, differentiable, no_tensor, refuse_second_derivative, transformed
from ..prims import require_kernel_dtype
from . import OPTIONS, draw_targets, formula
from .rows import Criterion, check_criterion, cross_entropy_rows

# (logits (m, N), targets (m,), criterion, scale (m,) or None, loss (m,)): fills loss, writes scale * gradient to logits
RowsLoss = Callable[[Tensor, Tensor, Criterion, Tensor | None, Tensor], None]
Scaled = Callable[[Tensor, Tensor, torch.dtype], Tensor]  # (gradient, factor (), dtype of the product)


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Returns the loss of logits x (M, C) @ weight (V, C)^T against targets (M,), in at least fp32.

    Logits have x's dtype. If they fit in chunk_bytes (default 128 MiB on a CPU, 1 GiB on a GPU), torch differentiates
    the formula; otherwise at most that many bytes of them are held at a time.
    """
    criterion = Criterion(ignore_index, label_smoothing, z_loss, softcap, _vocabulary(weight, vocab_size), reduction)
    _check(x, weight, targets, criterion)
    x, weight = _operands(x, weight)
    rows = _rows_per_chunk(x, weight, chunk_bytes)
    if x.shape[0] > rows and not transformed():
        return _Chunked.apply(x, weight, targets, criterion, rows)
    return formula(F.linear(x, weight), targets, criterion)


def _operands(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x and weight as the products take them: in autocast's dtype, as in F.linear, and on a CPU x contiguous.

    torch 2.13's bf16 product on a CPU with AMX multiplies the memory between rows by zero, so that a NaN there spreads.
    """
    if _autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return (x.contiguous() if x.device.type == "cpu" else x), weight


def _autocasts(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _vocabulary(weight: Tensor, vocab_size: int | None) -> int:
    """Returns how many rows of weight count: all by default; 0 where weight has none to count."""
    if not isinstance(weight, Tensor):
        raise no_tensor(weight=weight)
    return (weight.shape[0] if weight.dim() else 0) if vocab_size is None else vocab_size


def _check(x: Tensor, weight: Tensor, targets: Tensor, criterion: Criterion) -> None:
    if not isinstance(x, Tensor):
        raise no_tensor(x=x)
    shape, weight_shape = x.shape, weight.shape
    if len(shape) != 2:
        raise ValueError(f"x: expected (M, C), got {tuple(shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if len(weight_shape) != 2 or weight_shape[0] == 0 or weight_shape[1] != shape[1]:
        expected = f"(V, {shape[1]}) with V >= 1 for x {tuple(shape)}"
        raise ValueError(f"weight: expected {expected}, got {tuple(weight_shape)}")
    if weight.dtype != x.dtype and not _autocasts(x):
        raise ValueError(f"weight: {weight.dtype}, but x has {x.dtype}; cast one to the other")
    if weight.device != x.device:
        raise ValueError(f"weight: on {weight.device}, but x is on {x.device}")
    check_criterion(targets, shape[0], weight_shape[0], x.device, criterion, "x")


def _rows_per_chunk(x: Tensor, weight: Tensor, chunk_bytes: int | None) -> int:
    """Returns how many rows of logits fit in the budget: at least one, a multiple of 128 if there is room for that."""
    if chunk_bytes is None:
        chunk_bytes = 1 << 27 if x.device.type == "cpu" else 1 << 30
    check_count("chunk_bytes", chunk_bytes, 1)
    rows = chunk_bytes // (weight.shape[0] * x.dtype.itemsize)
    return max(1, rows - rows % 128 if rows >= 128 else rows)


class Task(NamedTuple):
    """How to process the rows: `rows` of logits at a time, `pitch` elements apart, for which gradients.

    `widens` sums dweight in the products themselves, by addmm's out_dtype, on devices that have it. It is for code that
    is never traced, since torch 2.11 raises for out_dtype with out= on fake tensors. `shapes_only` skips products and
    loss, for a shape function.
    """

    rows_loss: RowsLoss
    scaled: Scaled
    criterion: Criterion
    rows: int
    pitch: int
    needs_dx: bool
    needs_dweight: bool
    widens: bool = False
    shapes_only: bool = False

    @property
    def early(self) -> bool:
        """Returns whether forward computes the gradients, which backward then scales by one number."""
        return self.criterion.reduction != "none" and (self.needs_dx or self.needs_dweight)


def _pass(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None, task: Task
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss (M,) in at least fp32 and, given a scale (M,), dx and dweight of (scale * loss).sum().

    Gradients that are not needed are empty. dx has x's dtype; so has dweight if it is a single bf16 product, rounded
    once; otherwise it is at least fp32. Products use `out=`, which saves allocations and which autocast leaves alone.
    """
    (M, C), V, rows = x.shape, weight.shape[0], task.rows
    wide = torch.promote_types(x.dtype, torch.float32)
    sum_dtype = x.dtype if M <= rows and x.dtype == torch.bfloat16 else wide
    loss = torch.empty(M, dtype=wide, device=x.device)
    dx = torch.empty((M, C) if task.needs_dx else (0,), dtype=x.dtype, device=x.device)
    dweight = torch.empty((V, C) if task.needs_dweight else (0,), dtype=sum_dtype, device=x.device)
    if task.shapes_only:
        return loss, dx, dweight
    logits = torch.empty((min(M, rows), task.pitch), dtype=x.dtype, device=x.device)
    for i, (x_part, targets_part, loss_part) in enumerate(
        zip(x.split(rows), targets.split(rows), loss.split(rows), strict=True)
    ):
        padded = logits.narrow(0, 0, x_part.shape[0])
        z = padded if task.pitch == V else padded.narrow(1, 0, V)
        torch.mm(x_part, weight.t(), out=z)
        scale_part = None if scale is None else scale.split(rows)[i]
        task.rows_loss(padded, targets_part, task.criterion, scale_part, loss_part)
        if scale is not None and task.needs_dx:
            torch.mm(z, weight, out=dx.split(rows)[i])
        if scale is not None and task.needs_dweight:
            _add_product(dweight, z, x_part, i == 0, task.widens)
    return loss, dx, dweight


def _add_product(total: Tensor, z: Tensor, x: Tensor, first: bool, widens: bool) -> None:
    """Add z (m, V)^T @ x (m, C) to total (V, C) in total's dtype; the `first` product is assigned, not added."""
    if total.dtype == z.dtype:
        torch.addmm(total, z.t(), x, beta=0 if first else 1, out=total)
    elif widens and z.device.type == "cuda":
        torch.addmm(total, z.t(), x, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:  # 16-bit products summed in total's dtype; on a CPU by parts of the total that stay in cache
        rows = 4096 if z.device.type == "cpu" else total.shape[0]
        for part, z_part in zip(total.split(rows), z.split(rows, dim=1), strict=True):
            product = torch.mm(z_part.t(), x)
            part.copy_(product) if first else part.add_(product)


def _forward(x: Tensor, weight: Tensor, targets: Tensor, task: Task) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the loss, then dx and dweight for a cotangent of one before the division, and the divisor ()."""
    one = torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    loss, dx, dweight = _pass(x, weight, targets, one.expand(x.shape[0]) if task.early else None, task)
    if task.criterion.reduction == "none":
        return loss, dx, dweight, one
    divisor = one
    if task.criterion.reduction == "mean":  # counted on the device: the host does not wait for it
        divisor = (targets != task.criterion.ignore_index).sum(dtype=one.dtype)
    return loss.sum() / divisor, dx, dweight, divisor


def _backward(
    dloss: Tensor,
    early: tuple[Tensor, Tensor, Tensor],
    late: tuple[Tensor, Tensor, Tensor] | None,
    task: Task,
) -> tuple[Tensor, Tensor]:
    """Returns dx and dweight in x's dtype: forward's (dx, dweight, divisor) scaled, or from (x, weight, targets)."""
    if late is not None:
        _, dx, dweight = _pass(*late, dloss, task)
        return dx, dweight.to(dx.dtype)
    dx, dweight, divisor = early
    factor = torch.where(divisor == 0, 0, dloss / divisor)  # no row counts: the mean is NaN, its gradient 0
    return task.scaled(dx, factor, dx.dtype), task.scaled(dweight, factor, dx.dtype)


def _scaled_reference(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _rows_loss_reference(
    logits: Tensor, targets: Tensor, criterion: Criterion, scale: Tensor | None, loss: Tensor
) -> None:
    """Fill the loss as a RowsLoss, in plain torch, in blocks of rows whose fp32 softmax stays in cache."""
    rows = logits.shape[0] if torch.compiler.is_compiling() else max(1, (1 << 20) // logits.shape[1])
    scales = repeat(None) if scale is None else scale.split(rows)
    blocks = zip(logits.split(rows), targets.split(rows), scales, strict=False)
    loss.copy_(torch.cat([_softmax_loss(z, target, criterion, factor) for z, target, factor in blocks]))


def _softmax_loss(z: Tensor, targets: Tensor, criterion: Criterion, scale: Tensor | None) -> Tensor:
    ignore_index, e, z_loss, softcap, V, _ = criterion
    s = z[:, :V].to(torch.promote_types(z.dtype, torch.float32))
    if softcap is not None:
        share = torch.tanh(s / softcap)
        s = softcap * share
    kept = targets != ignore_index
    at = torch.where(kept, targets, 0).long()[:, None]
    lse = torch.logsumexp(s, dim=1, keepdim=True) if z_loss else None
    log_p = torch.log_softmax(s, dim=1)
    loss = -(1 - e) * log_p.gather(1, at)
    if e:
        loss -= e * log_p.mean(dim=1, keepdim=True)
    if lse is not None:
        loss += z_loss * lse.square()
    if scale is not None:
        ds = log_p.exp_()
        pull = None if lse is None else 2 * z_loss * lse * ds
        ds.scatter_add_(1, at, torch.full_like(at, -1, dtype=ds.dtype))
        if e:
            ds.scatter_add_(1, at, torch.full_like(at, e, dtype=ds.dtype))
            ds -= e / V
        if pull is not None:
            ds += pull
        if softcap is not None:
            ds *= 1 - share.square()
        z[:, :V] = ds.mul_(torch.where(kept, scale, 0)[:, None])
        z[:, V:] = 0
    return loss[:, 0].masked_fill_(~kept, 0)


def chunked_task(weight: Tensor, criterion: Criterion, rows: int, needs_dx: bool, needs_dweight: bool) -> Task:
    """Returns how the reference goes through the rows: in what every version of torch can trace."""
    return Task(_rows_loss_reference, _scaled_reference, criterion, rows, weight.shape[0], needs_dx, needs_dweight)


class _Chunked(torch.autograd.Function):
    """Differentiates the passes above in plain torch."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, criterion: Criterion, rows: int) -> Tensor:
        task = chunked_task(weight, criterion, rows, *ctx.needs_input_grad[:2])
        loss, *early = _forward(x, weight, targets, task)
        ctx.task = task
        ctx.save_for_backward(*((x, weight, targets) if criterion.reduction == "none" else early))
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy", "give a chunk_bytes that all logits fit into")
        saved, task = ctx.saved_tensors, ctx.task
        late = task.criterion.reduction == "none"
        dx, dweight = _backward(dloss, saved, saved if late else None, task)
        return dx if task.needs_dx else None, dweight if task.needs_dweight else None, None, None, None


def _rows_loss_kernel(
    logits: Tensor, targets: Tensor, criterion: Criterion, scale: Tensor | None, loss: Tensor
) -> None:
    """Fill the loss as a RowsLoss, by the kernel of rows.py."""
    cross_entropy_rows(logits, targets.contiguous(), criterion, scale, loss)


@jit
def linear_cross_entropy_scale_kernel(gradient_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """One program multiplies a block of a gradient by one factor."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.load(gradient_ptr + i, i < size, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    tl.store(out_ptr + i, product.to(out_ptr.dtype.element_ty), i < size)


def _scaled_by_kernel(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gradient * factor. By torch it takes 3 times as long: its loads are narrow if a factor is a tensor."""
    product = torch.empty_like(gradient, dtype=dtype)
    if size := gradient.numel():
        linear_cross_entropy_scale_kernel[(triton.cdiv(size, 4096),)](gradient, factor, product, size, BLOCK=4096)
    return product


def _kernel_task(V: int, criterion: Criterion, rows: int, needs_dx: bool, needs_dweight: bool) -> Task:
    """Returns how the kernels go through the rows of logits of V columns."""
    pitch = (V + 15) // 16 * 16  # rows of logits start on 32 bytes, or else the kernel's loads would be narrow
    plan = criterion, rows, pitch, needs_dx, needs_dweight
    return Task(_rows_loss_kernel, _scaled_by_kernel, *plan, widens=True, shapes_only=launcher() is skip)


def _kernel_forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float | None, vocab_size: int, reduction: str, rows: int, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    criterion = Criterion(ignore_index, label_smoothing, z_loss, softcap, vocab_size, reduction)
    return _forward(x, weight, targets, _kernel_task(weight.shape[0], criterion, rows, needs_dx, needs_dweight))


def _kernel_backward(
    dloss: Tensor, x: Tensor | None, weight: Tensor | None, targets: Tensor, dx: Tensor, dweight: Tensor,
    divisor: Tensor, V: int, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
    vocab_size: int, reduction: str, rows: int, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    criterion = Criterion(ignore_index, label_smoothing, z_loss, softcap, vocab_size, reduction)
    task = _kernel_task(V, criterion, rows, needs_dx, needs_dweight)
    late = None if x is None or weight is None else (x, weight, targets)
    return *_backward(dloss, (dx, dweight, divisor), late, task), targets.new_empty(0)


def _save(inputs: tuple, output: tuple) -> tuple:
    x, weight, targets, *plain = inputs
    late = (x, weight) if Criterion(*plain[:6]).reduction == "none" else (None, None)
    return *late, targets, *output[1:], weight.shape[0], *plain


_linear_cross_entropy = differentiable("linear_cross_entropy", _kernel_forward, _kernel_backward, _save)


def linear_cross_entropy_triton(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Compute linear_cross_entropy_reference, softmax by a kernel, on CUDA tensors of fp32, fp16 or bf16.

    Deterministic. Holds at most chunk_bytes (default 1 GiB) of logits at a time, enough rows to run the three products
    at full speed.
    """
    criterion = Criterion(ignore_index, label_smoothing, z_loss, softcap, _vocabulary(weight, vocab_size), reduction)
    _check(x, weight, targets, criterion)
    x, weight = _operands(x, weight)
    require_kernel_dtype("x", x)
    rows, learns = _rows_per_chunk(x, weight, chunk_bytes), torch.is_grad_enabled()
    needs_dx, needs_dweight = learns and x.requires_grad, learns and weight.requires_grad
    return _linear_cross_entropy(x, weight, targets, *criterion, rows, needs_dx, needs_dweight)


def inputs(
    M: int, V: int, C: int, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: str = "mean", padding: int = 0, index: str = "int64",
    chunks: int = 1, dtype: torch.dtype, device: str = "cpu",
) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
    """Draw x (M, C) and weight (V + padding, C) with logits of unit variance, and targets (M,).

    With `chunks` above 1, chunk_bytes splits fp32 logits into about so many chunks.
    """
    targets, N = draw_targets(M, V, ignore_index, index, device), V + padding
    x = torch.randn(M, C, dtype=dtype, device=device)
    return (x, torch.randn(N, C, dtype=dtype, device=device) * C**-0.5, targets), changed(
        linear_cross_entropy_reference, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        softcap=softcap, reduction=reduction, vocab_size=V if padding else None,
        chunk_bytes=max(1, M // chunks) * N * 4 if chunks > 1 else None,
    )  # fmt: skip


def cost(
    M: int, V: int, C: int, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: str = "mean", padding: int = 0, index: str = "int64",
    chunks: int = 1, itemsize: int,
) -> tuple[Cost, Cost]:  # fmt: skip
    """Count three products; forward x, weight and targets read, backward again, and their gradients written."""
    N = V + padding
    operands = (M * C + N * C) * itemsize + M * getattr(torch, index).itemsize
    return Cost(2 * M * N * C, operands), Cost(4 * M * N * C, 2 * operands)


LINEAR_CROSS_ENTROPY = Op(
    name="linear_cross_entropy",
    reference=linear_cross_entropy_reference,
    triton=linear_cross_entropy_triton,
    inputs=inputs,
    parity=(dict(M=1, V=1, C=1), dict(M=5, V=65, C=16), dict(M=0, V=9, C=4), dict(M=17, V=1023, C=40)),
    domain=dict(M=range(1, 20), C=range(1, 70), V=(*range(1, 70), 127, 128, 129, 400, 1023, 1025, 8193)),
    options=dict(OPTIONS, chunks=(1, 3)),
    bench=(
        dict(M=8192, V=50304, C=768), dict(M=65536, V=50304, C=768), dict(M=4096, V=128256, C=4096),
        dict(M=8192, V=128256, C=4096), dict(M=8192, V=262144, C=2304),
    ),
    cost=cost,
    summary="cross_entropy(x @ weight^T, target) without all the logits",
)  # fmt: skip
