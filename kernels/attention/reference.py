"""Attention in plain torch: the definition, and the oracle for kernels and CPU path."""

import torch
from torch import Tensor

from ..op import check_scores, no_tensor, require, traced
from .dropout import drop


def attention_reference(
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
    """Attend from q (B, T, H, D) to k, v (B, S, G, D); any strides. `scale` is D^-1/2 by default. Returns q's dtype.

    With `heads`, the H query heads, q is the fused projection (B, T, H + 2 G, D) of all three, without k and v; so is
    its gradient, and nobody has to put it together from three.

    Products are rounded to q's dtype, as any chain of matmuls is; the softmax computes in at least fp32. With `window`
    0 a query sees only its own position. `cu_seqlens` (N + 1,) int holds the starts of N documents packed along T = S,
    and the end. `seed` makes dropout repeatable, with the same entries here and in the kernels; None draws from torch's
    default generator. With `return_lse` it also returns the log of each softmax's denominator, (B, H, T) fp32, -inf
    where no key is visible. Raises ValueError naming the argument. Memory is O(T * S).
    """
    check(q, k, v, heads, window, scale, softcap, dropout, cu_seqlens)
    q, k, v = operands(q, k, v, heads)
    (_, T, H, D), S = q.shape, k.shape[1]
    q, k, v = (repeat_heads(x, H).transpose(1, 2) for x in (q, k, v))  # (B, H, T or S, D)
    s = q @ k.mT * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    queries, keys = range(S - T, S), range(S)
    hidden = hidden_pairs(queries, keys, causal, window, document_of(cu_seqlens, S), q.device)
    s = s.masked_fill(hidden, torch.finfo(s.dtype).min)  # not -inf, of which a whole row has a NaN gradient
    p = torch.softmax(s, dim=-1).masked_fill(hidden, 0.0)  # 0 for a query that sees no key
    if dropout > 0.0:
        p = drop(p, dropout, seed, queries, keys)
    out = (p @ v).transpose(1, 2)
    return (out, log_sum_exp(s, hidden)) if return_lse else out


def operands(q: Tensor, k: Tensor | None, v: Tensor | None, heads: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v; if there are `heads`, as slices of the fused projection q."""
    if heads:
        groups = (q.shape[2] - heads) // 2
        q, k, v = q.split((heads, groups, groups), dim=2)
    assert k is not None and v is not None
    return q, k, v


def document_of(cu_seqlens: Tensor | None, S: int) -> Tensor | None:
    """Returns the number of the document that each position belongs to, (S,); None where nothing is packed."""
    if cu_seqlens is None:
        return None
    return torch.bucketize(torch.arange(S, device=cu_seqlens.device), cu_seqlens[1:], right=True)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Returns (B, S, heads, D) from (B, S, G, D): each key head repeated for every query head that reads it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def hidden_pairs(
    queries: range, keys: range, causal: bool, window: int | None, document: Tensor | None, device: torch.device
) -> Tensor:
    """Returns a mask (queries, keys), True where the query must not see the key; `document` is from `document_of`."""
    key = torch.arange(keys.start, keys.stop, device=device)
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    hidden = key > query if causal else torch.zeros(len(queries), len(keys), dtype=torch.bool, device=device)
    if window is not None:
        hidden = hidden | ((key - query).abs() > window)
    if document is not None:
        hidden = hidden | (document[key] != document[query])
    return hidden


def log_sum_exp(s: Tensor, hidden: Tensor | None) -> Tensor:
    """Returns log(sum(exp(s))) over keys in at least fp32, without the last axis; -inf where every key is hidden."""
    lse = torch.logsumexp(s.to(torch.promote_types(s.dtype, torch.float32)), dim=-1)
    return lse if hidden is None else lse.masked_fill(hidden.all(dim=-1), -torch.inf)


def check(
    q: Tensor, k: Tensor | None, v: Tensor | None, heads: int | None, window: int | None, scale: float | None,
    softcap: float | None, dropout: float, cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """Refuse arguments that mean nothing: raises ValueError that names the argument and what it should be."""
    if not isinstance(q, Tensor):
        raise no_tensor(q=q)
    # Written out: a message is made only where one is needed, and torch.compile cannot put a number that varies in it.
    if q.dim() != 4 or min(q.shape[2:]) == 0:
        raise ValueError(f"q: expected (B, T, H, D), got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    S = _check_keys(q, k, v) if heads is None else _check_projection(q, k, v, heads)
    check_scores(window, scale, softcap)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if cu_seqlens is not None:
        _check_documents(cu_seqlens, q.shape[1], S, q.device)


def _check_keys(q: Tensor, k: Tensor | None, v: Tensor | None) -> int:
    """Returns S."""
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
        raise no_tensor(k=k, v=v)
    (B, _, H, D), of_k, dtype, device = q.shape, k.shape, q.dtype, q.device
    if len(of_k) != 4 or of_k[0] != B or of_k[3] != D:
        raise ValueError(f"k: expected (B, S, G, D) with q's B and D = {(B, D)}, got {tuple(of_k)}")
    if of_k[2] == 0 or H % of_k[2]:
        raise ValueError(f"k: its {of_k[2]} heads do not divide the {H} heads of q")
    if v.shape != of_k:
        raise ValueError(f"v: expected the shape of k, {tuple(of_k)}, got {tuple(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != dtype:
            raise ValueError(f"{name}: {x.dtype}, but q is {dtype}")
        if x.device != device:
            raise ValueError(f"{name}: on {x.device}, but q is on {device}")
    return of_k[1]


def _check_projection(q: Tensor, k: Tensor | None, v: Tensor | None, heads: int) -> int:
    """Returns S, which is T."""
    if k is not None or v is not None:
        raise ValueError("k, v: with heads, q is the projection of all three; leave them out")
    both = q.shape[2] - heads  # of keys and of values
    if not (heads > 0 and both > 0 and both % 2 == 0 and 2 * heads % both == 0):
        raise ValueError(f"heads: expected H of the H + 2 G = {q.shape[2]} in q, where G divides H; got {heads}")
    return q.shape[1]


def _check_documents(cu_seqlens: Tensor, T: int, S: int, device: torch.device) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise no_tensor(cu_seqlens=cu_seqlens)
    integral = cu_seqlens.dtype in (torch.int32, torch.int64)
    require(cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2 and integral, "cu_seqlens: expected (N + 1,) int32 or int64")
    require(T == S, f"cu_seqlens: packed documents need T = S, got T = {T}, S = {S}")
    require(cu_seqlens.device == device, f"cu_seqlens: on {cu_seqlens.device}, but q is on {device}")
    if device.type == "cpu" and not traced():  # on a GPU looking at values would wait for it
        starts = cu_seqlens.tolist()
        require(
            starts[0] == 0 and starts[-1] == T and starts == sorted(starts),
            f"cu_seqlens: expected increasing starts from 0 to T = {T}, got {starts}",
        )
