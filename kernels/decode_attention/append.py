"""Attention of new tokens to a cache that they are appended to: all of a decoding step between two products.

    position[t] = lengths[b] + t        (q, k, v)[t] = qkv[b, t]: H heads of queries, G of keys, G of values
    q, k = norm(q) * q_norm, norm(k) * k_norm  if qk_norm        norm(x) = x / sqrt(mean_d(x^2) + eps)
    q, k = rotated by position, half-split, as in rotary.py      if there are cos and sin
    cache[position[t]] = k, v        out = decode_attention(q, cache, lengths + T)

    qkv: (B, T, H + 2 G, D)   k, v: (B, S, G, D), or pages of them, and the rest as in decode_attention
    cos, sin: (P, D/2)   q_norm, k_norm: (D,)   counts: (at least B * G * ceil(T * H / G / 32),) int32, all 0

The caches are written in place; positions past their end are dropped. The kernel is decode_attention's: its last split
takes the new keys and values from qkv, rounded as the cache rounds them, so that no program waits for what is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..op import Cost, Op, changed, check_eps, no_tensor, without_gradient
from ..prims import require_kernel_dtype
from . import Append, launch
from . import cost as attention_cost
from . import inputs as attention_inputs
from .reference import Cache, check, decode_attention_reference, quantize_kv


@torch.no_grad()
def append_attention_reference(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    pages: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    counts: Tensor | None = None,
    qk_norm: bool = False,
    eps: float = 1e-6,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Append the keys and values of qkv (B, T, H + 2 G, D) to the caches, attend; returns (B, T, H, D) of qkv's dtype.

    `lengths` (B,) counts the positions before the new ones. Positions past the tables of cos and sin take their last
    row. Queries, keys and values are computed in at least fp32, then rounded to qkv's dtype. `counts` is for the
    kernel, which leaves it all 0. Raises ValueError naming the argument, on a CPU also for lengths that leave no room
    for T.
    """
    append = Append(q_norm, k_norm, cos, sin, eps if qk_norm else None, counts)
    _check(qkv, Cache(k, v, k_scale, v_scale), lengths, pages, append, window, scale, softcap)
    check_eps(eps)
    (B, T), (rows, G) = qkv.shape[:2], k.shape[1:3]
    q, new_k, new_v = qkv.split((qkv.shape[2] - 2 * G, G, G), dim=2)
    position = lengths.long()[:, None] + torch.arange(T, device=qkv.device)
    q, new_k = (_rotated(x, norm, position, append).to(qkv.dtype) for x, norm in ((q, q_norm), (new_k, k_norm)))
    if pages is None:
        where = torch.arange(B, device=qkv.device)[:, None].expand(B, T), position
    else:
        where = pages.gather(1, position // rows).long(), position % rows
    for new, cache, scales in ((new_k, k, k_scale), (new_v, v, v_scale)):
        if scales is None:
            cache[where] = new
        else:
            numbers, of_each = quantize_kv(new, torch.int8 if cache.dtype == torch.int8 else torch.float8_e4m3fn)
            cache[where], scales[where] = numbers.to(cache.dtype), of_each.to(scales.dtype)
    return decode_attention_reference(
        q, k, v, lengths + T, pages, k_scale, v_scale, window=window, scale=scale, softcap=softcap
    )


def _rotated(x: Tensor, weight: Tensor | None, position: Tensor, append: Append) -> Tensor:
    """Returns heads x (B, T, H, D) normalized and rotated, in at least fp32."""
    x, cos, sin = x.to(torch.promote_types(x.dtype, torch.float32)), append.cos, append.sin
    if append.eps is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + append.eps)
        x = x if weight is None else x * weight.to(x.dtype)
    if cos is None or sin is None:
        return x
    at = position.clamp(max=cos.shape[0] - 1)
    c, s = cos[at].to(x.dtype)[:, :, None], sin[at].to(x.dtype)[:, :, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def _check(
    qkv: Tensor, cache: Cache, lengths: Tensor, pages: Tensor | None, append: Append, window: int | None,
    scale: float | None, softcap: float | None,
) -> None:  # fmt: skip
    """Refuse arguments that mean nothing: raises ValueError that names the argument and what it should be."""
    k, (q_norm, k_norm, cos, sin, eps, _) = cache.k, append
    if not (isinstance(qkv, Tensor) and isinstance(k, Tensor)):
        raise no_tensor(qkv=qkv, k=k)
    for name, tensor in (("cos", cos), ("sin", sin), ("q_norm", q_norm), ("k_norm", k_norm)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise no_tensor(**{name: tensor})
    if qkv.dim() != 4 or k.dim() != 4 or qkv.shape[2] <= 2 * k.shape[2]:
        raise ValueError(f"qkv: expected (B, T, H + 2 G, D) for k {tuple(k.shape)}, got {tuple(qkv.shape)}")
    T, D = qkv.shape[1], qkv.shape[3]
    q = qkv[:, :, : qkv.shape[2] - 2 * k.shape[2]]
    check(q, cache, lengths, pages, window, scale, softcap, T)
    if (cos is None) != (sin is None) or (cos is not None and sin is not None and cos.shape != sin.shape):
        raise ValueError("sin: cos and sin go together, of one shape")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (table.dim() != 2 or table.shape[1] * 2 != D):
            raise ValueError(f"{name}: expected (P, {D // 2}), got {tuple(table.shape)}")
    if (q_norm is None) != (k_norm is None) or (q_norm is not None and eps is None):
        raise ValueError("q_norm: q_norm and k_norm go together, and with qk_norm")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != (D,):
            raise ValueError(f"{name}: expected ({D},), got {tuple(weight.shape)}")


def _forward(
    qkv: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None,
    counts: Tensor | None, eps: float, window: int, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    cos, sin, q_norm, k_norm = (None if x is None else x.contiguous() for x in (cos, sin, q_norm, k_norm))
    qkv = qkv if qkv.stride(3) == 1 or qkv.shape[3] == 1 else qkv.contiguous()
    append = Append(q_norm, k_norm, cos, sin, eps if eps >= 0 else None, counts)
    heads = qkv.shape[2] - 2 * k.shape[2]
    return launch(qkv, Cache(k, v, k_scale, v_scale), lengths, pages, window, scale, softcap, heads, append)


_append_attention = without_gradient("append_attention", _forward, writes=("k", "v", "k_scale", "v_scale", "counts"))


def append_attention_triton(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    pages: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    counts: Tensor | None = None,
    qk_norm: bool = False,
    eps: float = 1e-6,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute append_attention_reference with decode_attention's kernel, on CUDA tensors of fp32, fp16 or bf16.

    Head dims D up to 256. One launch with `counts`, which concurrent calls may not share; without, a second one makes
    them. No two sequences may append to the same place. Deterministic; launches depend on shapes alone, so that a CUDA
    graph may replay them.
    """
    append = Append(q_norm, k_norm, cos, sin, eps if qk_norm else None, counts)
    _check(qkv, Cache(k, v, k_scale, v_scale), lengths, pages, append, window, scale, softcap)
    check_eps(eps)
    require_kernel_dtype("qkv", qkv)
    if qkv.shape[3] > 256:
        raise ValueError(f"qkv: head dims up to 256 have kernels, got {qkv.shape[3]}; use the reference")
    scale = qkv.shape[3] ** -0.5 if scale is None else float(scale)
    return _append_attention(
        qkv, k, v, lengths, pages, k_scale, v_scale, cos, sin, q_norm, k_norm, counts, float(eps) if qk_norm else -1.0,
        -1 if window is None else window, scale, float(softcap or 0.0),
    )  # fmt: skip


def inputs(
    B: int, T: int, S: int, H: int, G: int, D: int, *, shortest: int | None = None, page_size: int = 0, cache: str = "",
    rotary: bool = False, qk_norm: bool = False, norm_weight: bool = False, window: int | None = None,
    softcap: float | None = None, scale: float | None = None, counted: bool = True, dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
    """Draw normal qkv (B, T, H + 2 G, D), caches as for decode_attention, lengths up to S - T, tables of S angles."""
    shortest = S - T if shortest is None else min(shortest, S - T)
    (_, k, v, _, *rest), _ = attention_inputs(
        B, T, S, H, G, D, page_size=page_size, cache=cache, dtype=dtype, device=device
    )
    pages, k_scale, v_scale = (*rest, None, None, None)[:3]
    lengths = torch.linspace(shortest, S - T, B, dtype=torch.float64, device=device).round().to(torch.int32)
    qkv = torch.randn(B, T, H + 2 * G, D, dtype=dtype, device=device)
    counts = torch.zeros(B * G * T * H, dtype=torch.int32, device=device) if counted else None
    cos = sin = q_norm = k_norm = None
    if rotary:
        frequency = 10000.0 ** (torch.arange(0, D, 2, dtype=torch.float64, device=device) / -D)
        angle = torch.arange(S, dtype=torch.float64, device=device)[:, None] * frequency
        cos, sin = angle.cos().float(), angle.sin().float()
    if qk_norm and norm_weight:
        q_norm, k_norm = (1 + 0.1 * torch.randn(D, dtype=dtype, device=device) for _ in "qk")
    keywords = changed(append_attention_reference, window=window, softcap=softcap, scale=scale)
    return (qkv, k, v, lengths, pages, k_scale, v_scale, cos, sin, q_norm, k_norm, counts, qk_norm), keywords


def cost(
    B: int, T: int, S: int, H: int, G: int, D: int, *, shortest: int | None = None, page_size: int = 0, cache: str = "",
    rotary: bool = False, qk_norm: bool = False, norm_weight: bool = False, window: int | None = None,
    softcap: float | None = None, scale: float | None = None, counted: bool = True, itemsize: int,
) -> tuple[Cost, Cost]:  # fmt: skip
    """Count decode_attention's cost; the new keys and values come from qkv, and are written to the cache once."""
    whole, backward = attention_cost(B, T, S, H, G, D, shortest=shortest, cache=cache, window=window, itemsize=itemsize)
    return Cost(whole.flops, whole.bytes + 2 * B * T * G * D * itemsize), backward


APPEND_ATTENTION = Op(
    name="append_attention",
    reference=append_attention_reference,
    triton=append_attention_triton,
    inputs=inputs,
    parity=(
        dict(B=1, T=1, S=1, H=1, G=1, D=16), dict(B=1, T=1, S=150, H=1, G=1, D=16),
        dict(B=3, T=1, S=70, H=4, G=2, D=32, shortest=0), dict(B=2, T=8, S=67, H=3, G=1, D=80, shortest=5),
        dict(B=2, T=2, S=100, H=4, G=2, D=64, shortest=65), dict(B=0, T=1, S=5, H=2, G=1, D=16),
        dict(B=2, T=3, S=131, H=6, G=2, D=24, shortest=64),
    ),
    domain=dict(S=range(3, 50), B=(1, 2), T=(1, 2, 3), H=(1, 3), G=(1,), D=(16, 24), shortest=(0, 1, None)),
    options=dict(
        rotary=(False, True), qk_norm=(False, True), norm_weight=(False, True), window=(None, 9), softcap=(None, 2.0),
        scale=(None, 0.4), page_size=(0, 16), cache=("", "int8", "fp8"), counted=(True, False),
    ),
    bench=(
        dict(B=1, T=1, S=1024, H=12, G=12, D=64), dict(B=1, T=1, S=1024, H=25, G=25, D=64),
        dict(B=1, T=1, S=8192, H=32, G=8, D=128, rotary=True, qk_norm=True, norm_weight=True),
        dict(B=8, T=1, S=1024, H=12, G=12, D=64, rotary=True, qk_norm=True),
        dict(B=8, T=1, S=8192, H=32, G=8, D=128, page_size=64, rotary=True),
        dict(B=8, T=1, S=8192, H=32, G=8, D=128, cache="int8", rotary=True),
        dict(B=8, T=1, S=8192, H=32, G=8, D=128, cache="fp8", rotary=True),
        dict(B=2, T=4, S=4096, H=16, G=2, D=128, rotary=True), dict(B=8, T=1, S=8192, H=8, G=4, D=256, rotary=True),
    ),
    cost=cost,
    summary="q, k and v of new tokens normalized, rotated and put into their cache, and attention to all of it",
    differentiable=False,
    writes=frozenset((1, 2, 5, 6, 11)),
)  # fmt: skip
