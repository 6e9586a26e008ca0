"""Cross-entropy of rows of logits, shared by cross_entropy and linear_cross_entropy.

Computes the loss of each row, the two parts of its log-sum-exp and, on demand, its gradient, written over the logits.
On a Hopper GPU rows of 16 bits that fit are held in shared memory (hopper.py); others are read twice.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import jit, tl
from ..op import check_count, no_tensor, require, traced
from ..prims import RowTile, RowTiles, tanh
from .hopper import fits, launch_hopper


class Criterion(NamedTuple):
    """The arguments of a cross-entropy besides its tensors, as the operators take them and in their order."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    vocab_size: int  # columns from here on are padding
    reduction: str = "mean"


def check_criterion(targets: Tensor, M: int, N: int, device: torch.device, criterion: Criterion, rows: str) -> None:
    """Refuse wrong arguments of a cross-entropy over M rows of N logits; the caller's argument `rows` holds those rows.

    On a CPU it also refuses targets outside the vocabulary; on a GPU, where the host would have to wait, the loss of
    such a row is NaN.
    """
    V = criterion.vocab_size
    if not isinstance(targets, Tensor):
        raise no_tensor(targets=targets)
    if targets.shape != (M,):
        raise ValueError(f"targets: expected shape {(M,)} for the rows of {rows}, got {tuple(targets.shape)}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets: expected int32 or int64, got {targets.dtype}")
    if targets.device != device:
        raise ValueError(f"targets: on {targets.device}, but {rows} is on {device}")
    check_count("vocab_size", V, 1)
    require(V <= N, "vocab_size: expected at least 1 and at most the number of logits")
    check_count("ignore_index", criterion.ignore_index, -(2**63))
    require(0 <= criterion.label_smoothing <= 1, "label_smoothing: expected 0 to 1")
    require(abs(criterion.z_loss) < math.inf, "z_loss: expected a finite number")
    cap = criterion.softcap
    require(cap is None or 0 < cap < math.inf, "softcap: expected None or a number above 0")
    if criterion.reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {criterion.reduction!r}")
    if device.type == "cpu" and not traced() and M:
        low, high = targets.aminmax()
        if low.item() >= 0 and high.item() < V:
            return  # the usual case, in one pass
        strange = ((targets < 0) | (targets >= V)) & (targets != criterion.ignore_index)
        if strange.any():
            wrong = int(targets[strange][0])
            raise ValueError(
                f"targets: {wrong} is outside 0 to {V - 1} and is not ignore_index ({criterion.ignore_index})"
            )


@jit
def load_logits(pointers, mask, real, softcap, SOFTCAP: tl.constexpr):
    """Returns logits in fp32 under their softcap, -inf where not `real`, and their share of the cap, -1 to 1.

    `mask` says what may be read. It is wider than `real` over padded columns: a mask that ends on a multiple of 16
    keeps loads 128 bits wide.
    """
    s = tl.load(pointers, mask, other=0.0).to(tl.float32)
    share = s
    if SOFTCAP:
        share = tanh(s / softcap)
        s = softcap * share
    return tl.where(real, s, float("-inf")), share


@jit
def logits_gradient(
    s, share, v, target, maximum, log_sum, scale, V, label_smoothing, z_loss, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Returns scale[m] * dloss[m] / dz[m, v] for a block s of capped logits and their share of the cap.

    The softcap's derivative is computed from the share: from s / softcap, rounded once more, it would lose digits where
    the share is near one. The log-sum-exp comes as two parts, maximum and log_sum: with their rounded sum softmax would
    lose digits where logits are large.
    """
    p = tl.exp((s - maximum) - log_sum)
    hit = tl.where(v == target, 1.0, 0.0)
    ds = scale * ((p - hit) + label_smoothing * (hit - 1.0 / V) + 2.0 * z_loss * (maximum + log_sum) * p)
    if SOFTCAP:
        ds *= (1.0 - share) * (1.0 + share)
    return ds


@jit
def _include(s, maximum, denominator):
    """Returns the running maximum (BLOCK_M, 1) and the sums of exp(s - maximum) by column, with a block s included."""
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
    """One program computes loss[m], and maximum[m] + log_sum[m], the log-sum-exp, of BLOCK_M rows.

    With GRADIENT it also writes scale[m] * dloss[m] / dz[m, :] over the logits. WHOLE rows stay in registers for that.
    Longer rows are read by blocks, and again from the end, since what was read last is most likely still in L2.
    The first V of N columns count; the others get gradient 0.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    target = tl.load(targets_ptr + m, m < M, other=0).to(tl.int64)
    kept = (m < M) & (target != ignore_index)
    known = (target >= 0) & (target < V)
    row = logits_ptr + m * logits_stride_m
    chosen = load_logits(row + target, kept & known, known, softcap, SOFTCAP)[0]
    chosen = tl.where(known, chosen, float("nan"))
    if GRADIENT:
        tl.debug_barrier()  # every warp has its target's logit before any warp writes over it
    # maximum and sum of exponentials
    maximum = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    denominator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WHOLE:
        v = tl.arange(0, BLOCK_N)[None, :]
        s, share = load_logits(row + v, kept & (v < N), v < V, softcap, SOFTCAP)
        maximum, denominator = _include(s, maximum, denominator)
        if SMOOTHING:
            total = tl.where(v < V, s, 0.0)
    else:
        for start in tl.range(0, N, BLOCK_N, num_stages=3):
            v = start + tl.arange(0, BLOCK_N)[None, :]
            s = load_logits(row + v, kept & (v < N), v < V, softcap, SOFTCAP)[0]
            maximum, denominator = _include(s, maximum, denominator)
            if SMOOTHING:
                total += tl.where(v < V, s, 0.0)
    log_sum = tl.log(tl.sum(denominator, axis=1)[:, None])
    # loss
    loss = log_sum - (chosen - maximum)
    if SMOOTHING:
        mean = tl.sum(total, axis=1)[:, None] / V
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (log_sum - (mean - maximum))
    loss += z_loss * (maximum + log_sum) * (maximum + log_sum)
    log_sum = tl.where(known, log_sum, float("nan"))
    tl.store(loss_ptr + m, tl.where(kept, loss, 0.0), m < M)
    tl.store(maximum_ptr + m, maximum, m < M)
    tl.store(log_sum_ptr + m, log_sum, m < M)
    # gradient
    if GRADIENT:
        scale = tl.load(scale_ptr + m * scale_stride_m, m < M, other=0.0)
        if WHOLE:
            dz = logits_gradient(s, share, v, target, maximum, log_sum, scale, V, label_smoothing, z_loss, SOFTCAP)
            dz = tl.where(kept & (v < V), dz, 0.0)
            tl.store(row + v, dz.to(logits_ptr.dtype.element_ty), (m < M) & (v < N))
        else:
            last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
            for start in tl.range(0, N, BLOCK_N, num_stages=3):
                v = last - start + tl.arange(0, BLOCK_N)[None, :]
                s, share = load_logits(row + v, kept & (v < N), v < V, softcap, SOFTCAP)
                dz = logits_gradient(s, share, v, target, maximum, log_sum, scale, V, label_smoothing, z_loss, SOFTCAP)
                dz = tl.where(kept & (v < V), dz, 0.0)
                tl.store(row + v, dz.to(logits_ptr.dtype.element_ty), (m < M) & (v < N))


# Whole rows take the widest blocks without spills (results/aot.json). Long rows, loads pipelined in three stages: on an
# NVIDIA H200, 2026-11-26, bf16 in place, 2810 GB/s at 16384x50304 and 2704 at V = 131072; blocks of 8192 in one stage
# reached 2290.
TILES = {"rows": RowTiles(whole=8192, per_warp=512, long=RowTile(1, 2048, 4, long=True))}


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, criterion: Criterion, scale: Tensor | None = None, loss: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss, maximum and log sum_v exp(s - maximum), each (M,) fp32, of logits (M, N) and targets (M,).

    Rows of logits are contiguous. With a scale (M,) fp32, scale times the gradient is written over the logits. Ignored
    rows are not read. The loss is written to `loss` if that is given.
    """
    M, N = logits.shape
    loss = torch.empty(M, dtype=torch.float32, device=logits.device) if loss is None else loss
    maximum, log_sum = torch.empty_like(loss), torch.empty_like(loss)
    if M == 0:
        return loss, maximum, log_sum
    tile, factor = TILES["rows"].choose(N), loss if scale is None else scale
    if tile.long and fits(logits, scale is not None):
        launch_hopper(logits, targets, scale, loss, maximum, log_sum, criterion)
        return loss, maximum, log_sum
    cross_entropy_rows_kernel[(-(-M // tile.block_m),)](
        logits, targets, factor, loss, maximum, log_sum, logits.stride(0), factor.stride(0), M, N, criterion.vocab_size,
        criterion.ignore_index, criterion.label_smoothing, criterion.z_loss, criterion.softcap or 1.0,
        SOFTCAP=criterion.softcap is not None, SMOOTHING=criterion.label_smoothing > 0, GRADIENT=scale is not None,
        WHOLE=not tile.long, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return loss, maximum, log_sum
