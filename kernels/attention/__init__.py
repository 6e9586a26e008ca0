"""Scaled dot-product attention.

    s[t, u] = scale * sum_d q[t, d] * k[u, d]        s = softcap * tanh(s / softcap)  if softcap
    p = softmax_u(s where query t may see key u, else -inf)        out[t] = sum_u p[t, u] * v[u]

    dv = p^T @ dout        dp = dout @ v^T        ds = p * (dp - sum_u(p * dp)), times 1 - (s / softcap)^2 if softcap
    dq = scale * ds @ k    dk = scale * ds^T @ q  (sum_u(p * dp) is also sum_d(dout * out))

    Query t stands at position t + S - T, so that the last query sees the last key. Causal: it sees positions up to its
    own. Window: at most `window` positions before its own (and, without causal, after). Packed: only its own document. A
    query that sees no key gives 0. Query head h reads key head h // (H / G). Dropout zeroes entries of p and scales the
    others up.

q, out: (B, T, H, D)   k, v: (B, S, G, D)   p: (T, S) for each batch and head

Vaswani et al., arXiv:1706.03762; grouped heads: Ainslie et al., arXiv:2305.13245; tiling and the backward: Dao et al.,
"FlashAttention", arXiv:2205.14135.
"""

import torch
import torch.nn.functional as F

from ..op import Cost, Op
from .reference import attention_reference


def inputs(B: int, T: int, S: int, H: int, G: int, D: int, *, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """q (B, T, H, D), k and v (B, S, G, D), normal."""
    shapes = (B, T, H, D), (B, S, G, D), (B, S, G, D)
    return tuple(torch.randn(shape, dtype=dtype, device=device) for shape in shapes)


def cost(B: int, T: int, S: int, H: int, G: int, D: int, *, itemsize: int) -> tuple[Cost, Cost]:
    """Two causal products forward and five backward, hidden pairs left out; every operand and gradient moved once."""
    seen = sum(min(S, max(0, t + 1 + S - T)) for t in range(T))
    product, queries, keys = 2 * B * H * D * seen, B * T * H * D * itemsize, B * S * G * D * itemsize
    statistics = B * H * T * 4
    return (
        Cost(2 * product, 2 * queries + 2 * keys + statistics),
        Cost(5 * product, 4 * queries + 4 * keys + statistics),
    )


ATTENTION = Op(
    name="attention",
    reference=attention_reference,
    triton=None,
    inputs=inputs,
    parity=(
        dict(B=1, T=1, S=1, H=1, G=1, D=16), dict(B=2, T=37, S=37, H=3, G=3, D=32), dict(B=1, T=5, S=67, H=6, G=2, D=80),
    ),
    domain=dict(B=range(1, 3), T=range(1, 90), S=range(1, 90), H=(2, 4), G=(1, 2), D=(16, 24, 32, 64)),
    bench=(
        dict(B=16, T=1024, S=1024, H=12, G=12, D=64), dict(B=4, T=4096, S=4096, H=16, G=16, D=128),
    ),
    cost=cost,
    peers={
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
        ).transpose(1, 2),
    },
    summary="softmax(q k^T / sqrt(D) where the key is seen) v",
)  # fmt: skip
