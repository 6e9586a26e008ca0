"""Attention in plain torch: the definition, the CPU path, and the oracle that the kernels are held to."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import require

# Below, the products written out are faster than torch's fused operator on a CPU in bf16: forward and backward at
# B * H = 48 and T = 64 take 1.2 ms against 2.9, at T = 512 16.9 against 28.5; at 1024 it is 103 against 35
# (2 cores, AVX512-BF16; with AMX 1.4 against 5.0 at T = 64, 7.1 against 13.9 at 256). In fp32 the fused operator is
# never slower (with AVX-512, 1.0 ms against 1.9 at T = 64).
LONGEST_WRITTEN_OUT = 512
FEWEST_AT_ONCE = 128  # queries: the least that a window's pass over chunks of them takes
ROUNDS = 7  # of Philox: the fewest that pass BigCrush (Salmon et al., SC 2011)


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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q (B, T, H, D) to k, v (B, S, G, D); any strides. `scale` is D^-1/2 by default. Returns q's dtype.

    Products are rounded to q's dtype, as any chain of matmuls is; the softmax computes in at least fp32. `window` 0
    sees only its own position. `cu_seqlens` (N + 1,) int marks the starts of N documents packed along T = S, and the
    end. `seed` makes dropout repeatable, the same entries here and in the kernels; None draws from torch's default
    generator. With `return_lse` also the logarithm of each softmax's denominator, (B, H, T) fp32, -inf where no key is
    seen. Raises ValueError naming the argument. Memory is O(T * S), with a window O(T * window).
    """
    check(q, k, v, window, scale, softcap, dropout, cu_seqlens)
    (B, T, H, D), S = q.shape, k.shape[1]
    scale = D**-0.5 if scale is None else scale
    plain = causal and T == S and window is None and softcap is None and cu_seqlens is None
    fused = T > LONGEST_WRITTEN_OUT or (q.dtype == torch.float32 and dropout == 0.0)
    if plain and fused and seed is None and not return_lse:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=k.shape[1] != H
        )
        return out.transpose(1, 2)
    document = None if cu_seqlens is None else _documents(cu_seqlens, S)
    # One contiguous batch of B * H matrices each: without it every product below would copy its operands for itself.
    q, k, v = (_repeat(x, H).transpose(1, 2).reshape(B * H, x.shape[1], D) for x in (q, k, v))

    def attend(queries: range, keys: range) -> tuple[Tensor, Tensor]:
        """out (B * H, queries, D) and log-sum-exp (B * H, queries) of queries at those positions over those keys."""
        q_part = q[:, queries.start - (S - T) : queries.stop - (S - T)]
        k_part, v_part = k[:, keys.start : keys.stop], v[:, keys.start : keys.stop]
        hidden = None if plain else _hidden(queries, keys, causal, window, document, q.device)
        if hidden is None:
            s = torch.baddbmm(_causal_bias(len(queries), len(keys), q), q_part, k_part.mT, alpha=scale)
        else:
            if softcap is None:
                s = torch.baddbmm(q.new_zeros(1, 1, 1), q_part, k_part.mT, alpha=scale)
            else:
                s = softcap * torch.tanh(q_part @ k_part.mT * (scale / softcap))
            # The least number, for a row of -inf has a NaN gradient; in place of the score, for their sum may be -inf.
            s = s.masked_fill(hidden, torch.finfo(s.dtype).min)
        p = torch.softmax(s, dim=-1)
        if hidden is not None:
            p = p.masked_fill(hidden, 0.0)  # a query that sees no key; elsewhere it changes nothing
        if dropout > 0.0:
            p = _drop(p, dropout, seed, queries, keys)
        return p @ v_part, _log_sum_exp(s, hidden) if return_lse else q.new_empty(0)

    positions = range(S - T, S)
    if window is None:
        parts = [attend(positions, range(S))]
    else:  # a chunk of as many queries as the window has keys sees two or three windows of keys
        step, right = max(window, FEWEST_AT_ONCE), 0 if causal else window
        chunks = [positions[i : i + step] for i in range(0, T, step)] or [positions]
        parts = [attend(c, range(S)[max(0, c.start - window) : max(0, c.stop + right)]) for c in chunks]
    out, lse = (torch.cat(x, dim=1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
    out = out.view(B, H, T, D).transpose(1, 2)
    return (out, lse.view(B, H, T)) if return_lse else out


def _documents(cu_seqlens: Tensor, S: int) -> Tensor:
    """(S,): which document each position belongs to."""
    return torch.bucketize(torch.arange(S, device=cu_seqlens.device), cu_seqlens[1:], right=True)


def _repeat(x: Tensor, heads: int) -> Tensor:
    """(B, S, G, D) -> (B, S, heads, D): each key head once for every query head that reads it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _causal_bias(T: int, S: int, like: Tensor) -> Tensor:
    """(T, S) to add to the scores: 0 where seen, else the least number. Every row sees a key."""
    return torch.full((T, S), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device).triu_(1)


def _hidden(
    queries: range, keys: range, causal: bool, window: int | None, document: Tensor | None, device: torch.device
) -> Tensor:
    """True (queries, keys) where the query must not see the key; `document` (S,) numbers the documents by position."""
    key = torch.arange(keys.start, keys.stop, device=device)
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    hidden = key > query if causal else torch.zeros(len(queries), len(keys), dtype=torch.bool, device=device)
    if window is not None:
        hidden = hidden | ((key - query).abs() > window)
    if document is not None:
        hidden = hidden | (document[key] != document[query])
    return hidden


def _log_sum_exp(s: Tensor, hidden: Tensor | None) -> Tensor:
    lse = torch.logsumexp(s.to(torch.promote_types(s.dtype, torch.float32)), dim=-1)
    return lse if hidden is None else lse.masked_fill(hidden.all(dim=-1), -torch.inf)


def _drop(p: Tensor, dropout: float, seed: int | None, queries: range, keys: range) -> Tensor:
    if seed is None:
        return F.dropout(p, dropout)
    return torch.where(_kept(seed, dropout, p.shape[0], queries, keys, p.device), p, 0.0) / (1.0 - dropout)


def _kept(seed: int, dropout: float, heads: int, queries: range, keys: range, device: torch.device) -> Tensor:
    """True (heads, queries, keys) where dropout keeps the weight: Philox4x32 of the seed at (key, query, head).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The kernels draw the same bits, tile by tile.
    """

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """High and low 32 bits of a * b, in int64 without overflow."""
        high_part = a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)
        return high_part >> 16, (a * b) & 0xFFFFFFFF

    c0 = torch.arange(keys.start, keys.stop, device=device)[None, None, :] & 0xFFFFFFFF
    c1 = torch.arange(queries.start, queries.stop, device=device)[None, :, None] & 0xFFFFFFFF
    c2 = torch.arange(heads, device=device)[:, None, None]
    c3 = torch.zeros_like(c2)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(ROUNDS):
        (high0, low0), (high2, low2) = product(0xD2511F53, c0), product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return (c0 >> 1) >= dropout_threshold(dropout)


def dropout_threshold(dropout: float) -> int:
    """Random numbers of 31 bits below this are dropped."""
    return round(dropout * 2**31)


def check(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, softcap: float | None, dropout: float,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """Refuse arguments that mean nothing: raises ValueError that names the argument and what it should be."""
    require(q.dim() == 4 and min(q.shape[2:]) > 0, f"q: expected (B, T, H, D), got {tuple(q.shape)}")
    require(q.is_floating_point(), f"q: expected a floating dtype, got {q.dtype}")
    (B, T, H, D), expected = q.shape, "(B, S, G, D) with q's B and D"
    fits = k.dim() == 4 and (k.shape[0], k.shape[3]) == (B, D)
    require(fits, f"k: expected {expected} = {(B, D)}, got {tuple(k.shape)}")
    require(k.shape[2] > 0 and H % k.shape[2] == 0, f"k: its {k.shape[2]} heads do not divide the {H} heads of q")
    require(v.shape == k.shape, f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        require(x.dtype == q.dtype, f"{name}: {x.dtype}, but q is {q.dtype}")
        require(x.device == q.device, f"{name}: on {x.device}, but q is on {q.device}")
    # Written out, since torch.compile cannot put a number that varies into a message, used or not.
    if window is not None and window < 0:
        raise ValueError(f"window: expected a number of positions or None, got {window}")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale: expected a positive number or None, got {scale}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if cu_seqlens is not None:
        _check_documents(cu_seqlens, T, k.shape[1], q.device)


def _check_documents(cu_seqlens: Tensor, T: int, S: int, device: torch.device) -> None:
    integral = cu_seqlens.dtype in (torch.int32, torch.int64)
    require(cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2 and integral, "cu_seqlens: expected (N + 1,) int32 or int64")
    require(T == S, f"cu_seqlens: packed documents need T = S, got T = {T}, S = {S}")
    require(cu_seqlens.device == device, f"cu_seqlens: on {cu_seqlens.device}, but q is on {device}")
    if device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU looking at values would wait for it
        starts = cu_seqlens.tolist()
        require(
            starts[0] == 0 and starts[-1] == T and starts == sorted(starts),
            f"cu_seqlens: expected increasing starts from 0 to T = {T}, got {starts}",
        )
