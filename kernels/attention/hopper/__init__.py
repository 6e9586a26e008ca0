"""Attention by Hopper's own instructions, in Gluon: causal, bf16, head dims 64, 128 and 256, grouped heads, T <= S.

What decides which kernels `attention` uses by default: TFLOP/s on an NVIDIA H200 (2026-11-26, triton 3.6.0) of the
plain kernels with their best tiles, of these, and of cuDNN 9.19:

    (B, T, H, D)        forward             backward, five products counted
    16, 1024, 12, 64    273 / 240 / 313     254 / 277 / 220
    1, 16384, 32, 64    471 / 438 / 459     390 / 468 / 428
    4, 4096, 16, 128    473 / 602 / -       391 / 479 / 438

So this forward runs at D = 128, and this backward at 64 and 128, unless torch.use_deterministic_algorithms asks for
sums in a fixed order: then the plain kernels run. What has not been timed runs where `gluon` asks for it: windows,
documents and a softcap, D = 256, and this backward with grouped heads of 128.
"""

import torch
from torch import Tensor

from ..._triton import launcher, multiprocessors, skip, triton
from ...op import require
from ..shared import Options, aligned
from . import fused, stay, wide
from .forward import launch_forward_hopper
from .pieces import (
    attention_bwd_kernel_finish,
    attention_bwd_kernel_prepare,
    can_run,
    features,
    obstacle,
    statistics_of,
    sums_of,
    tiles_of,
)

__all__ = ["launch_backward_hopper", "launch_forward_hopper", "takes_backward", "takes_forward"]


def takes_forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    """Returns whether this forward can run and is faster. Raises ValueError if insisted on where it cannot."""
    if launcher() is skip:
        return False
    if options.gluon:
        why_not = obstacle(q, k, v, options)
        require(not why_not, f"attention by Gluon: {why_not}; leave the choice to attention_triton")
    timed = q.shape[3] == 128 and not (options.bounded or options.softcap)
    return can_run(q, k, v, options) and (options.gluon or timed)


def takes_backward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    """Returns whether this backward can run, and the order of dq's sums may vary.

    Windows, documents and a softcap, grouped heads of 128, and heads of 256 are left to the plain kernels unless
    insisted on: they have not been timed.
    """
    D, grouped = q.shape[3], q.shape[2] != k.shape[2]
    untimed = options.bounded or options.softcap > 0 or D == 256 or (D == 128 and grouped)
    if torch.are_deterministic_algorithms_enabled() or (untimed and not options.gluon):
        return False
    return can_run(q, k, v, options)


def launch_backward_hopper(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill dq, dk and dv, of the shapes of q, k, v. lse (B, H, T) fp32 in base 2; out contiguous."""
    q, k, v, dout = aligned(q), aligned(k), aligned(v), aligned(dout)
    (B, T, H, D), (S, G), (dq, dk, dv) = q.shape, k.shape[1:3], gradients
    rows, given = triton.cdiv(T, 64) * 64, features(options, S)
    statistics = torch.empty((2, B * H, rows), dtype=torch.float32, device=q.device)
    sums = torch.empty((B * H, rows, D), dtype=torch.float32, device=q.device)
    block = 64 if D <= 128 else 16  # rows of a program before and after, whose registers hold them
    attention_bwd_kernel_prepare[(rows // block, B * H)](
        out, dout, lse, statistics, sums, *dout.stride()[:3], B * H, T, H, rows, D=D, BLOCK=block, num_warps=4
    )
    programs, tile, kernel = triton.cdiv(S, 128) * B * G, fused.TILE, fused.attention_bwd_kernel_fused_hopper
    if D == 64:
        tile = stay.TILE if given.documents is None else stay.DOCUMENTS_TILE
        tile = stay.SOFTCAP_TILE if options.softcap else tile
        programs = min(programs, multiprocessors(q))
        kernel = stay.attention_bwd_kernel_stay_hopper
    elif D == 256:
        programs, tile, kernel = triton.cdiv(S, 64) * B * G, wide.TILE, wide.attention_bwd_kernel_wide_hopper
    kernel[(programs,)](
        tiles_of(q, tile.block_m), tiles_of(k, 64), tiles_of(v, 64), tiles_of(dout, tile.block_m),
        statistics_of(statistics, tile.block_m), given.documents, tiles_of(dk, 64), tiles_of(dv, 64),
        sums_of(sums, 64, 64), B * G, T, S, H, G, given.window, given.share, given.factor, options.scale, **given.flags,
        HEADS=H // G, D=D, BLOCK_M=tile.block_m, Q_STAGES=tile.q_stages, O_STAGES=tile.o_stages,
        S_STAGES=tile.s_stages, REGISTERS=tile.registers, num_warps=4,
    )  # fmt: skip
    attention_bwd_kernel_finish[(rows // block, B * H)](
        sums, dq, *dq.stride()[:3], T, H, rows, options.scale, D=D, BLOCK=block, num_warps=4
    )
