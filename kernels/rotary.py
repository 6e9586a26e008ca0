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
