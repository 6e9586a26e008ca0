"""Attention on CPUs: torch's fused operator where it has the options asked for, else plain products, by window."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import transformed
from .dropout import drop
from .reference import check, document_of, hidden_pairs, log_sum_exp, operands, repeat_heads

# Up to this T plain products are faster than torch's fused operator on a CPU in bf16: forward and backward at
# B * H = 48 and T = 64 take 1.2 ms against 2.9, at T = 512 16.9 against 28.5; at 1024 it is 103 against 35
# (2 cores, AVX512-BF16; with AMX 1.4 against 5.0 at T = 64, 7.1 against 13.9 at 256). In fp32 the fused operator is
# never slower (with AVX-512, 1.0 ms against 1.9 at T = 64).
LONGEST_WRITTEN_OUT = 512
FEWEST_AT_ONCE = 128  # queries of a chunk, at least, where a window is computed by chunks


def attention_cpu(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention_reference faster; with a window in O(T * window) memory."""
    check(q, k, v, heads, window, scale, softcap, dropout, cu_seqlens)
    q, k, v = operands(q, k, v, heads)
    (B, T, H, D), S = q.shape, k.shape[1]
    scale = D**-0.5 if scale is None else scale
    plain = causal and T == S and window is None and softcap is None and cu_seqlens is None
    fused = (T > LONGEST_WRITTEN_OUT or (q.dtype == torch.float32 and dropout == 0.0)) and not transformed()
    if plain and fused and seed is None and not return_lse:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=k.shape[1] != H
        )
        return out.transpose(1, 2)
    document = document_of(cu_seqlens, S)
    # One contiguous batch of B * H matrices each; otherwise every product below would copy its operands.
    q, k, v = (repeat_heads(x, H).transpose(1, 2).reshape(B * H, x.shape[1], D) for x in (q, k, v))

    def attend(queries: range, keys: range) -> tuple[Tensor, Tensor]:
        """Returns out (B * H, queries, D) and log-sum-exp (B * H, queries) of these positions over these keys."""
        q_part = q[:, queries.start - (S - T) : queries.stop - (S - T)]
        k_part, v_part = k[:, keys.start : keys.stop], v[:, keys.start : keys.stop]
        hidden = None if plain else hidden_pairs(queries, keys, causal, window, document, q.device)
        if hidden is None:
            s = torch.baddbmm(_causal_bias(len(queries), len(keys), q), q_part, k_part.mT, alpha=scale)
        else:
            # Scaled before it is rounded: in fp16 a product may be too large where a score is not.
            alpha = scale if softcap is None else scale / softcap
            s = torch.baddbmm(q.new_zeros(1, 1, 1), q_part, k_part.mT, alpha=alpha)
            if softcap is not None:
                s = softcap * torch.tanh(s)
            # The lowest finite number, since a row of -inf has a NaN gradient; replaced, since a sum could be -inf.
            s = s.masked_fill(hidden, torch.finfo(s.dtype).min)
        p = torch.softmax(s, dim=-1)
        if hidden is not None:
            p = p.masked_fill(hidden, 0.0)  # a query that sees no key; elsewhere it changes nothing
        if dropout > 0.0:
            p = drop(p, dropout, seed, queries, keys)
        return p @ v_part, log_sum_exp(s, hidden) if return_lse else q.new_empty(0)

    positions = range(S - T, S)
    if window is None:
        parts = [attend(positions, range(S))]
    else:  # a chunk of `window` queries sees two or three times `window` keys
        step, right = max(window, FEWEST_AT_ONCE), 0 if causal else window
        chunks = [positions[i : i + step] for i in range(0, T, step)] or [positions]
        parts = [attend(c, range(S)[max(0, c.start - window) : max(0, c.stop + right)]) for c in chunks]
    out, lse = (torch.cat(x, dim=1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
    out = out.view(B, H, T, D).transpose(1, 2)
    return (out, lse.view(B, H, T)) if return_lse else out


def _causal_bias(T: int, S: int, like: Tensor) -> Tensor:
    """Returns (T, S) to add to scores: 0 where visible, else the lowest finite number. Every row sees a key."""
    return torch.full((T, S), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device).triu_(1)
