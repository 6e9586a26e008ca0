"""Rotary position embedding of queries and keys, with an optional RMS norm of every head vector.

    xhat = x / sqrt(mean_d(x^2) + eps)  if qk_norm else  x

    half-split:    (a, b) = xhat[: D/2], xhat[D/2 :]        interleaved:    (a, b) = xhat[0::2], xhat[1::2]
    y_a = scale * (a * cos - b * sin)                       y_b = scale * (b * cos + a * sin)

    The rotation is orthogonal: its gradient is the rotation by the opposite angle, and it may come before or after the norm.

q: (B, T, H, D)   k: (B, T, G, D)   cos, sin: (T, D/2), of position * base^(-2i / D)

Su et al., "RoFormer", arXiv:2104.09864; half-split as in GPT-NeoX and Llama, interleaved as in the paper. QK-norm: Henry et
al., "Query-Key Normalization for Transformers", arXiv:2010.04245.
"""

import torch
from torch import Tensor

from .op import Cost, Op


def rotary_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    qk_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, D) and k (B, T, G, D) by the angles whose cos and sin are (T, D/2). Returns their dtype.

    Computes in at least fp32. With `qk_norm` every head vector has unit root mean square (no weight) before `scale`.
    """

    def rotate(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        xhat = x.to(wide)
        if qk_norm:
            xhat = xhat * torch.rsqrt(xhat.square().mean(-1, keepdim=True) + eps)
        a, b = (xhat[..., 0::2], xhat[..., 1::2]) if interleaved else xhat.chunk(2, dim=-1)
        c, s = cos.to(wide)[:, None, :] * scale, sin.to(wide)[:, None, :] * scale  # (T, 1, D/2): over batch and heads
        halves = a * c - b * s, b * c + a * s
        y = torch.stack(halves, dim=-1).flatten(-2) if interleaved else torch.cat(halves, dim=-1)
        return y.to(x.dtype)

    return rotate(q), rotate(k)


def inputs(B: int, T: int, H: int, G: int, D: int, *, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """q (B, T, H, D), k (B, T, G, D), and cos and sin (T, D/2) of the angles position * 10000^(-2i / D)."""
    q, k = (torch.randn(B, T, heads, D, dtype=dtype, device=device) for heads in (H, G))
    angle = torch.outer(torch.arange(T, device=device), 10000.0 ** (torch.arange(0, D, 2, device=device) / -D))
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


def cost(B: int, T: int, H: int, G: int, D: int, *, itemsize: int) -> tuple[Cost, Cost]:
    """Compulsory traffic without the norm: q and k in and out, the gradients in and out, cos and sin once."""
    elements = B * T * (H + G) * D
    direction = Cost(3 * elements, (2 * elements + T * D) * itemsize)
    return direction, direction


ROTARY = Op(
    name="rotary",
    reference=rotary_reference,
    triton=None,
    inputs=inputs,
    parity=(dict(B=1, T=1, H=1, G=1, D=2), dict(B=2, T=7, H=6, G=3, D=80), dict(B=1, T=129, H=4, G=4, D=64)),
    domain=dict(B=range(1, 3), T=range(1, 40), H=(2, 4, 6), G=(1, 2), D=range(2, 130, 2)),
    bench=(dict(B=16, T=1024, H=12, G=12, D=64), dict(B=4, T=4096, H=32, G=8, D=128)),
    cost=cost,
    summary="(a, b) -> (a cos - b sin, b cos + a sin) of q and k, RMS-normalized first if asked",
)
