"""The end of a decoding step that takes the likeliest token: the token, whether it counts, and what is fed next.

    token[b] = the first of the largest logits[b, :V], or -1 if that is not finite or a logit is NaN
    count[b] = lengths[b] < ends[b]        newest[b] = max(token[b], 0) if count[b]

    logits: (B, W), W >= V   newest: (B, 1) int64, written in place   lengths: (B,) int   ends: (B,) of any type
    out: (B, 2) int64, token and count   workspace: (B, 2) int64, all 0 before and after

In plain torch these are a dozen launches, each of which takes longer to start than to run. Here several programs share
a row. Each turns its largest logit and that one's place into an integer, of which the larger is the better; the largest
of all is found by an atomic operation, whose order does not matter, and the last program to arrive writes the results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import jit, launcher, multiprocessors, skip, starts_early, tl, triton
from .op import Cost, Op, no_tensor, without_gradient
from .prims import as_rows, await_inputs, early_launch, require_kernel_dtype


@torch.no_grad()
def decode_greedy_reference(
    logits: Tensor,
    newest: Tensor,
    lengths: Tensor,
    ends: Tensor,
    V: int | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Choose among the first V of logits (B, W), by default all; returns (B, 2) int64: tokens, and whether they count.

    A token counts where lengths (B,) is below ends (B,), and goes into newest (B, 1) there. `workspace` is for the
    kernel, which leaves it all 0. Raises ValueError naming the argument.
    """
    V = _check(logits, newest, lengths, ends, V, workspace)
    largest, token = logits[:, :V].max(dim=-1)
    token = torch.where(largest.abs() < float("inf"), token, -1)  # NaN is not less
    count = lengths < ends
    newest.copy_(torch.where(count, token.clamp(min=0), newest[:, 0])[:, None])
    return torch.stack((token, count.long()), dim=1)


def _check(
    logits: Tensor, newest: Tensor, lengths: Tensor, ends: Tensor, V: int | None, workspace: Tensor | None
) -> int:
    """Refuse wrong arguments; returns V."""
    others = (("newest", newest), ("lengths", lengths), ("ends", ends), ("workspace", workspace))
    for name, x in (("logits", logits), *others):
        if not isinstance(x, Tensor) and not (name == "workspace" and x is None):
            raise no_tensor(**{name: x})
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits: expected floating (B, W), got {logits.dtype}{tuple(logits.shape)}")
    (B, W), V = logits.shape, logits.shape[1] if V is None else V
    if not 0 < V <= min(W, 2**31 - 1):
        raise ValueError(f"V: expected 1 to {W}, the columns of logits, got {V}")
    if newest.shape != (B, 1) or newest.dtype != torch.int64 or not newest.is_contiguous():
        raise ValueError(f"newest: expected contiguous ({B}, 1) int64, got {tuple(newest.shape)} {newest.dtype}")
    if lengths.shape != (B,) or lengths.dtype.is_floating_point:
        raise ValueError(f"lengths: expected ({B},) int, got {tuple(lengths.shape)} {lengths.dtype}")
    if ends.shape != (B,):
        raise ValueError(f"ends: expected ({B},), got {tuple(ends.shape)}")
    if workspace is not None and (
        workspace.shape != (B, 2) or workspace.dtype != torch.int64 or not workspace.is_contiguous()
    ):
        raise ValueError(f"workspace: expected contiguous ({B}, 2) int64, got {tuple(workspace.shape)}")
    for name, x in others:
        if x is not None and x.device != logits.device:
            raise ValueError(f"{name}: on {x.device}, but logits is on {logits.device}")
    return V


@jit
def decode_greedy_fwd_kernel(
    logits_ptr, newest_ptr, lengths_ptr, ends_ptr, out_ptr, workspace_ptr, logits_stride_b, V, W, splits,
    PDL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a split of a row's logits -> the workspace; the last of a row -> out[b, :] and newest[b]."""
    await_inputs(PDL)
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    share = tl.cdiv(tl.cdiv(V, splits), BLOCK_V) * BLOCK_V
    best = tl.zeros((BLOCK_V,), tl.int64)
    for start in tl.range(split * share, tl.minimum(split * share + share, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        # Also what is past V: where W is a multiple of 16, loads of 16 bytes are within it or not.
        x = tl.load(logits_ptr + b * logits_stride_b + v, v < W, other=0.0).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))  # NaN ends a text as inf does
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
        rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the numbers
        key = ((rank.to(tl.int64) + 0x80000000) << 31) | (0x7FFFFFFF - v)
        best = tl.maximum(best, tl.where(v < V, key, 0))
    own = workspace_ptr + 2 * b
    tl.atomic_max(own, tl.max(best, axis=0))
    if tl.atomic_add(own + 1, 1, sem="acq_rel") == splits - 1:
        key = tl.atomic_xchg(own, 0)
        tl.atomic_xchg(own + 1, 0)
        rank = (key >> 31) - 0x80000000
        finite = (rank > 0x807FFFFF - 0x100000000) & (rank < 0x7F800000)  # the ranks of -inf and inf
        token = tl.where(finite, 0x7FFFFFFF - (key & 0x7FFFFFFF), -1)
        count = tl.load(lengths_ptr + b).to(tl.float64) < tl.load(ends_ptr + b).to(tl.float64)
        tl.store(out_ptr + 2 * b, token)
        tl.store(out_ptr + 2 * b + 1, count.to(tl.int64))
        tl.store(newest_ptr + b, tl.where(count, tl.maximum(token, 0), tl.load(newest_ptr + b)))


BLOCK_V, NUM_WARPS = 1024, 4
PROGRAMS = 2  # per multiprocessor


def _forward(
    logits: Tensor, newest: Tensor, lengths: Tensor, ends: Tensor, V: int, workspace: Tensor | None
) -> Tensor:
    B = logits.shape[0]
    out = torch.empty((B, 2), dtype=torch.int64, device=logits.device)
    if launcher() is skip or B == 0:
        return out
    rows, workspace = as_rows(logits), torch.zeros_like(out) if workspace is None else workspace
    splits = min(triton.cdiv(V, BLOCK_V), max(1, PROGRAMS * multiprocessors(logits) // B))
    decode_greedy_fwd_kernel[(B, splits)](
        rows, newest, lengths.contiguous(), ends.contiguous(), out, workspace, rows.stride(0), V, logits.shape[1],
        splits, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS, **early_launch(starts_early(logits)),
    )  # fmt: skip
    return out


_decode_greedy = without_gradient("decode_greedy", _forward, writes=("newest", "workspace"))


def decode_greedy_triton(
    logits: Tensor,
    newest: Tensor,
    lengths: Tensor,
    ends: Tensor,
    V: int | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Compute decode_greedy_reference in one launch, on CUDA tensors with logits of fp32, fp16 or bf16.

    Deterministic. Concurrent calls may not share a workspace; without one, a second launch makes it.
    """
    V = _check(logits, newest, lengths, ends, V, workspace)
    require_kernel_dtype("logits", logits)
    return _decode_greedy(logits, newest, lengths, ends, V, workspace)


def inputs(
    B: int, V: int, *, padded: int = 0, ties: bool = False, given: bool = True, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple, dict[str, Any]]:
    """Draw normal logits (B, V + padded), whole numbers if `ties`; rows of which every other one has ended."""
    logits = torch.randn(B, V + padded, dtype=dtype, device=device)
    if ties:
        logits = logits.round()
    lengths = torch.arange(B, device=device).to(torch.int32)
    ends = lengths.double() + lengths % 2
    newest = torch.full((B, 1), V, device=device)
    workspace = torch.zeros(B, 2, dtype=torch.int64, device=device) if given else None
    return (logits, newest, lengths, ends, V if padded else None, workspace), {}


def cost(
    B: int, V: int, *, padded: int = 0, ties: bool = False, given: bool = True, itemsize: int
) -> tuple[Cost, Cost]:
    """Count the logits read once, and what is read and written of each row besides."""
    return Cost(0, B * (V * itemsize + 4 + 8 + 3 * 8)), Cost(0, 0)


DECODE_GREEDY = Op(
    name="decode_greedy",
    reference=decode_greedy_reference,
    triton=decode_greedy_triton,
    inputs=inputs,
    parity=(dict(B=1, V=1), dict(B=3, V=1025), dict(B=0, V=5), dict(B=9, V=1024), dict(B=2, V=5000)),
    domain=dict(B=range(1, 6), V=(1, 2, 15, 300, 1023, 1024, 1025, 2500)),
    options=dict(padded=(0, 7), ties=(False, True), given=(True, False)),
    bench=(
        dict(B=1, V=50257, padded=47), dict(B=1, V=128256), dict(B=32, V=50257, padded=47), dict(B=64, V=32768),
    ),
    cost=cost,
    summary="the likeliest token of each row, and the bookkeeping of a step around it, while decoding",
    differentiable=False,
    writes=frozenset((1, 5)),
)  # fmt: skip
