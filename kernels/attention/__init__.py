"""Scaled dot-product attention.

    s[t, u] = scale * sum_d q[t, d] * k[u, d]        s = softcap * tanh(s / softcap)  if softcap
    p = softmax_u(s where query t may see key u, else -inf)        out[t] = sum_u p[t, u] * v[u]

    dv = p^T @ dout        dp = dout @ v^T        ds = p * (dp - sum_u(p * dp)), times 1 - (s / softcap)^2 if softcap
    dq = scale * ds @ k    dk = scale * ds^T @ q  (sum_u(p * dp) is also sum_d(dout * out))

    Query t stands at position t + S - T, so that the last query sees the last key. Causal: it sees positions up to its
    own. Window: at most `window` positions before its own (and, without causal, after). Packed: only its own document.
    A query that sees no key gives 0. Query head h reads key head h // (H / G). Dropout zeroes entries of p and scales
    the others up.

q, out: (B, T, H, D)   k, v: (B, S, G, D)   p: (T, S) for each batch and head
or q, k and v side by side in one projection: (B, T, H + 2 G, D), into whose gradient the kernels write dq, dk and dv

Vaswani et al., arXiv:1706.03762; grouped heads: Ainslie et al., arXiv:2305.13245; tiling and the backward: Dao et al.,
"FlashAttention", arXiv:2205.14135.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..op import Cost, Op, changed, differentiable
from ..prims import require_kernel_dtype
from .backward import launch_backward
from .cpu import attention_cpu
from .dropout import seed_tensor
from .forward import launch_forward
from .reference import attention_reference, check, operands
from .shared import Options

FARTHEST = 2**30  # a window that reaches everything; a position and a larger one would not add up in int32


def _forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, heads: int, cu_seqlens: Tensor | None, seed: Tensor | None,
    causal: bool, window: int, scale: float, softcap: float, dropout: float, gluon: bool, return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns out, the natural log-sum-exp (empty unless asked for), and the log-sum-exp in base 2 for the backward."""
    options = Options(cu_seqlens, seed, causal, window, scale, softcap, dropout, gluon)
    out, lse = launch_forward(*operands(q, k, v, heads), options)
    if not return_lse:
        return out, lse.new_empty(0), lse
    return out, torch.where(lse == torch.inf, -torch.inf, lse * 0.6931471805599453), lse


def _backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, lse: Tensor,
    heads: int, cu_seqlens: Tensor | None, seed: Tensor | None, causal: bool, window: int, scale: float, softcap: float,
    dropout: float, gluon: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of q, k and v, contiguous; those of cu_seqlens and seed are empty, as of what is absent."""
    options = Options(cu_seqlens, seed, causal, window, scale, softcap, dropout, gluon)
    dout = torch.zeros_like(out) if dout is None else dout  # only the log-sum-exp was used
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = (lse.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
                  for x in (q, k, v))  # fmt: skip
    gradients = operands(dq, dk, dv, heads)
    launch_backward(dout, dlse, *operands(q, k, v, heads), out, lse, options, gradients)
    return dq, dk, dv, lse.new_empty(0), lse.new_empty(0)


def _save(inputs: tuple, output: tuple) -> tuple:
    q, k, v, heads, *options, _ = inputs
    out, _, lse = output
    return q, k, v, out, lse, heads, *options


_attention = differentiable("attention", _forward, _backward, _save, outputs=2)


def attention_triton(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    heads: int | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    gluon: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention_reference with the kernels of this package, on CUDA tensors of fp32, fp16 or bf16.

    Head dims D up to 256. Slices of a fused projection are not copied, on sm_90 and sm_100 if their rows start at
    multiples of 16 bytes; results are contiguous. Memory is O(T). Dropout depends on seed and positions alone, so that
    the backward computes it again. Deterministic except for dq on sm_90 where hopper/ computes it: its last bits vary
    unless torch.use_deterministic_algorithms is set. `gluon` insists on the forward of hopper/, raises ValueError where
    it cannot run, and lets the backward of hopper/ do what has not been timed.
    """
    check(q, k, v, heads, window, scale, softcap, dropout, cu_seqlens)
    require_kernel_dtype("q", q)
    if q.shape[3] > 256:
        raise ValueError(f"q: head dims up to 256 have kernels, got {q.shape[3]}; use the reference")
    drawn = seed_tensor(dropout, seed, q.device)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    window = -1 if window is None else min(window, FARTHEST)
    softcap, dropout = float(softcap or 0.0), float(dropout)
    out, lse = _attention(
        q, k, v, heads or 0, cu_seqlens, drawn, causal, window, scale, softcap, dropout, gluon, return_lse
    )
    return (out, lse) if return_lse else out


attention_gluon = functools.partial(attention_triton, gluon=True)


def document_starts(T: int, device: str | torch.device = "cpu") -> Tensor:
    """Returns cu_seqlens, int32, of six documents packed along T positions, one of them empty and one short."""
    return torch.tensor([0, 0, T // 12, T // 9, T // 2, T - T // 9, T], dtype=torch.int32, device=device)


def inputs(
    B: int, T: int, S: int, H: int, G: int, D: int, *, spread: float = 1.0, causal: bool = True,
    window: int | None = None, softcap: float | None = None, scale: float | None = None, dropout: float = 0.0,
    documents: bool = False, return_lse: bool = False, projected: bool = False, dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
    """Draw normal q (B, T, H, D), k and v (B, S, G, D), or all as one projection; scores deviate by `spread`.

    With `documents` or `projected`, T and S are the longer of the two; six documents are packed along them.
    """
    T, S = (max(T, S),) * 2 if documents or projected else (T, S)
    q = torch.randn(B, T, H, D, dtype=dtype, device=device) * spread
    k, v = (torch.randn(B, S, G, D, dtype=dtype, device=device) for _ in "kv")
    return (torch.cat((q, k, v), 2),) if projected else (q, k, v), changed(
        attention_reference, heads=H if projected else None, causal=causal, window=window, softcap=softcap, scale=scale,
        dropout=dropout, seed=11 if dropout else None,
        cu_seqlens=document_starts(T, device) if documents else None, return_lse=return_lse,
    )  # fmt: skip


def cost(
    B: int, T: int, S: int, H: int, G: int, D: int, *, spread: float = 1.0, causal: bool = True,
    window: int | None = None, softcap: float | None = None, scale: float | None = None, dropout: float = 0.0,
    documents: bool = False, return_lse: bool = False, projected: bool = False, itemsize: int,
) -> tuple[Cost, Cost]:  # fmt: skip
    """Count two products per visible pair forward and five backward; every operand and gradient is moved once."""
    T, S = (max(T, S),) * 2 if documents or projected else (T, S)
    seen = pairs_seen(T, S, causal, window, document_starts(T).tolist() if documents else [0, S])
    product, queries, keys = 2 * B * H * D * seen, B * T * H * D * itemsize, B * S * G * D * itemsize
    statistics = B * H * T * 4 * (2 if return_lse else 1)
    return (
        Cost(2 * product, 2 * queries + 2 * keys + statistics),
        Cost(5 * product, 4 * queries + 4 * keys + statistics),
    )


def pairs_seen(T: int, S: int, causal: bool, window: int | None, starts: Sequence[int]) -> int:
    """Returns how many (query, key) pairs of one head are visible; `starts` are cu_seqlens."""
    total = 0
    for start, end in itertools.pairwise(starts):
        for p in range(max(start, S - T), end):
            first = start if window is None else max(start, p - window)
            last = p + 1 if causal else end if window is None else p + window + 1
            total += max(0, min(end, last) - first)
    return total


ATTENTION = Op(
    name="attention",
    reference=attention_reference,
    cpu=attention_cpu,
    triton=attention_triton,
    inputs=inputs,
    parity=(
        dict(B=1, T=37, S=37, H=3, G=3, D=32), dict(B=1, T=40, S=33, H=2, G=1, D=96),
        dict(B=2, T=19, S=19, H=4, G=2, D=24, projected=True), dict(B=1, T=0, S=0, H=2, G=1, D=16, projected=True),
        dict(B=2, T=0, S=5, H=2, G=1, D=16), dict(B=1, T=2, S=67, H=6, G=2, D=80), dict(B=2, T=3, S=9, H=8, G=4, D=16),
    ),
    # With few rows, or one key that takes all the weight, gradients are what rounding leaves of a difference.
    domain=dict(
        B=(1,), T=(*range(16, 36), 70), S=(*range(16, 36), 97), H=(2, 4), G=(1, 2), D=(16, 24), spread=(0.02,),
        projected=(False, True),
    ),
    options=dict(
        causal=(True, False), window=(None, 5, 1000), softcap=(None, 1.5), scale=(None, 0.4), dropout=(0.0, 0.3),
        documents=(False, True), return_lse=(False, True),
    ),
    bench=(
        *(dict(B=B, T=1024, S=1024, H=H, G=H, D=64) for B, H in ((16, 12), (16, 16), (16, 20), (16, 25))),  # GPT-2
        *(dict(B=16384 // T, T=T, S=T, H=32, G=32, D=64) for T in (512, 1024, 2048, 4096, 8192, 16384)),
        *(dict(B=16384 // T, T=T, S=T, H=16, G=16, D=128) for T in (512, 1024, 2048, 4096, 8192, 16384)),
        dict(B=4, T=4096, S=4096, H=32, G=8, D=128), dict(B=4, T=4096, S=4096, H=16, G=16, D=96),
        dict(B=4, T=4096, S=4096, H=8, G=4, D=256), dict(B=16, T=1024, S=1024, H=12, G=12, D=64, projected=True),
        dict(B=8, T=2048, S=2048, H=6, G=6, D=128, window=512),  # nanochat's short layers
        dict(B=16, T=1024, S=1024, H=12, G=12, D=64, documents=True),
    ),
    cost=cost,
    variants={"gluon": attention_gluon},
    summary="softmax(q k^T / sqrt(D) where the key is seen) v",
)  # fmt: skip
