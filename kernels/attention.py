"""Scaled dot-product attention.

    s[t, u] = scale * sum_d q[t, d] * k[u, d]        s = softcap * tanh(s / softcap)  if softcap
    p = softmax_u(s where query t may see key u, else -inf)        out[t] = sum_u p[t, u] * v[u]

    dv = p^T @ dout        dp = dout @ v^T        ds = p * (dp - sum_u(p * dp)), times 1 - (s / softcap)^2 if softcap
    dq = scale * ds @ k    dk = scale * ds^T @ q  (sum_u(p * dp) is also sum_d(dout * out))

    Query t stands at position t + S - T, so that the last query sees the last key. Causal: it sees positions up to its own.
    Window: at most `window` positions before its own (and, without causal, after). Packed: only its own document. A query that
    sees no key gives 0. Query head h reads key head h // (H / G). Dropout zeroes entries of p and scales the others up.

q, out: (B, T, H, D)   k, v: (B, S, G, D)   p: (T, S) for each batch and head

Vaswani et al., arXiv:1706.03762; grouped heads: Ainslie et al., arXiv:2305.13245; tiling and the backward: Dao et al.,
"FlashAttention", arXiv:2205.14135.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Cost, Op


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention of q (B, T, H, D) to k, v (B, S, G, D); any strides. `scale` is D^-1/2 by default. Returns q's dtype.

    Products are rounded to q's dtype, as any chain of matmuls is; the softmax computes in at least fp32. `window` 0 sees only
    its own position. `cu_seqlens` (N + 1,) int marks the starts of N documents packed along T = S, and the end. `seed` makes
    dropout repeatable; None draws from torch's default generator.
    """
    B, T, H, D = q.shape
    S, scale = k.shape[1], D**-0.5 if scale is None else scale
    causal_only = causal and T == S and window is None and softcap is None and cu_seqlens is None
    if causal_only and T > LONGEST_WRITTEN_OUT and seed is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=k.shape[1] != H
        )
        return out.transpose(1, 2)
    # One contiguous batch of B * H matrices each: without it every product below would copy its operands for itself.
    q, k, v = (_repeat(x, H).transpose(1, 2).reshape(B * H, x.shape[1], D) for x in (q, k, v))
    hidden = None if causal_only else _hidden(T, S, causal, window, cu_seqlens, q.device)
    bias = _bias(T, S, hidden, q)
    if softcap is None:
        s = torch.baddbmm(bias, q, k.mT, alpha=scale)
    else:
        s = softcap * torch.tanh(q @ k.mT * (scale / softcap)) + bias
    p = torch.softmax(s, dim=-1)
    if hidden is not None:
        p = p.masked_fill(hidden, 0.0)  # a query that sees no key; elsewhere it changes nothing
    if dropout > 0.0:
        p = _drop(p, dropout, seed)
    return (p @ v).view(B, H, T, D).transpose(1, 2)


# Below, the products written out are faster than torch's fused operator on a CPU in bf16: forward and backward at B * H = 48
# and T = 64 take 1.2 ms against 2.9, at T = 512 16.9 against 28.5; at 1024 it is 103 against 35 (2 cores, AVX512-BF16).
LONGEST_WRITTEN_OUT = 512


def _repeat(x: Tensor, heads: int) -> Tensor:
    """(B, S, G, D) -> (B, S, heads, D): each key head once for every query head that reads it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _bias(T: int, S: int, hidden: Tensor | None, like: Tensor) -> Tensor:
    """(T, S) to add to the scores: 0 where seen. Hidden is the least number, not -inf: a row of -inf has a NaN gradient."""
    least = torch.finfo(like.dtype).min
    if hidden is None:
        return torch.full((T, S), least, dtype=like.dtype, device=like.device).triu_(1)
    return torch.zeros(T, S, dtype=like.dtype, device=like.device).masked_fill_(hidden, least)


def _hidden(
    T: int, S: int, causal: bool, window: int | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """True (T, S) where the query must not see the key."""
    ahead = torch.arange(S, device=device) - (torch.arange(T, device=device) + S - T)[:, None]  # key minus query position
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (ahead.abs() > window)
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(S, device=device), cu_seqlens[1:], right=True)
        hidden = hidden | (document != document[S - T :, None])
    return hidden


def _drop(p: Tensor, dropout: float, seed: int | None) -> Tensor:
    if seed is None:
        return F.dropout(p, dropout)
    kept = torch.rand(p.shape, device=p.device, generator=torch.Generator(p.device).manual_seed(seed)) >= dropout
    return p * kept / (1.0 - dropout)


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
