"""Attention to a cache in plain torch, the definition; its path for CPUs, its checks, and quantized caches' scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import check_scores, no_tensor, require, traced

QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FUSED = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of torch's fused operator on a CPU


class Cache(NamedTuple):
    """Keys and values, and the scales of quantized ones."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def each(self, function: Callable[[Tensor], Tensor]) -> Cache:
        """Returns the cache with the function applied to every tensor."""
        k_scale, v_scale = (x if x is None else function(x) for x in (self.k_scale, self.v_scale))
        return Cache(function(self.k), function(self.v), k_scale, v_scale)

    def widened(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns keys and values in this dtype, scales applied."""
        k, v = self.k.to(dtype), self.v.to(dtype)
        if self.k_scale is None or self.v_scale is None:
            return k, v
        return k * self.k_scale[..., None], v * self.v_scale[..., None]


@torch.no_grad()
def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    pages: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend from q (B, T, H, D) to the cached k, v (B, S, G, D), of which lengths (B,) are valid. Returns q's dtype.

    k and v have q's dtype, or are int8 or float8_e4m3fn with scales; any strides. `scale` is D^-1/2 by default; with a
    window of 0 a query sees only its own position. Sums are in at least fp32. Raises ValueError naming the argument, in
    eager mode on a CPU also for lengths and pages out of range: there lengths are read, and each sequence is attended
    to its own length only. Elsewhere nothing waits for their values, and the whole cache is processed.
    """
    cache = Cache(k, v, k_scale, v_scale)
    check(q, cache, lengths, pages, window, scale, softcap)
    (B, T), D = q.shape[:2], q.shape[3]
    scale = D**-0.5 if scale is None else scale
    if not on_host(lengths):
        if pages is not None:
            known = pages.clamp(0, k.shape[0] - 1)  # entries past a sequence's length may be anything
            cache = cache.each(lambda x: x[known].flatten(1, 2))
        position = lengths[:, None] - T + torch.arange(T, device=q.device)
        return _attend(q, cache, position, window, scale, softcap)

    def attend(batch: slice, length: int) -> Tensor:
        seeing = min(T, length)  # earlier queries have negative positions
        first = 0 if window is None else max(0, length - T - window)
        seen = cache.each(lambda x: _cut(x, pages, batch, first, length))
        return _attend_newest(q[batch, T - seeing :], seen, window, scale, softcap)

    stored = lengths.tolist()
    if pages is None and B > 0 and stored[0] >= T and stored.count(stored[0]) == B:
        return attend(slice(0, B), stored[0])
    out = torch.zeros(q.shape, dtype=q.dtype)
    for b, length in enumerate(stored):
        if length:
            out[b : b + 1, max(0, T - length) :] = attend(slice(b, b + 1), length)
    return out


def on_host(lengths: Tensor) -> bool:
    """Returns whether values may be read: on a GPU the host would wait for them, and a compiled graph has none."""
    return lengths.device.type == "cpu" and not traced()


def _cut(x: Tensor, pages: Tensor | None, batch: slice, first: int, length: int) -> Tensor:
    """Returns positions first to length of some sequences: x (B, S, ...) -> (batch, length - first, ...)."""
    if pages is None:
        return x[batch, first:length]
    before, after = first // x.shape[1], -(-length // x.shape[1])
    start = before * x.shape[1]
    return x[pages[batch, before:after]].flatten(1, 2)[:, first - start : length - start]


def _hidden(position: Tensor, S: int, window: int | None) -> Tensor:
    """Returns a mask (B, T, S), True where the query at position (B, T) must not see the key."""
    u, position = torch.arange(S, device=position.device), position[..., None]
    hidden = u > position
    return hidden if window is None else hidden | (u < position - window)


def _attend(
    q: Tensor, cache: Cache, position: Tensor, window: int | None, scale: float, softcap: float | None
) -> Tensor:  # fmt: skip
    """Attend from queries at position (B, T) to a contiguous cache (B, S, G, D): the definition."""
    (B, T, H, D), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    k, v = cache.widened(wide)
    S, G = k.shape[1:3]
    hidden = _hidden(position, S, window)
    beyond = (torch.arange(S, device=q.device) > position[:, -1:])[..., None, None]  # (B, S, 1, 1)
    v = v.masked_fill(beyond, 0.0)  # 0 times a NaN there would be NaN
    s = torch.einsum("btgrd,bsgd->bgrts", q.to(wide).reshape(B, T, G, H // G, D), k) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    hidden = hidden[:, None, None]
    p = torch.softmax(s.masked_fill(hidden, -torch.inf), dim=-1).masked_fill(hidden, 0.0)
    return torch.einsum("bgrts,bsgd->btgrd", p, v).reshape(B, T, H, D).to(q.dtype)


def _attend_newest(q: Tensor, cache: Cache, window: int | None, scale: float, softcap: float | None) -> Tensor:
    """Attend from the last positions of a cache that was cut to what they see, on a CPU.

    It uses torch's fused operator where that has the options: the queries of a group of heads are rows of one product.
    The operator reads 16-bit keys directly: at 1024 keys, H = G = 12, D = 64 on two cores, fp16 takes 0.35 ms, where
    converting takes 3.1 and two products 1.4; fp32 takes 0.30 either way.
    """
    (B, T, H, D), (S, G) = q.shape, cache.k.shape[1:3]
    if softcap is not None or cache.k_scale is not None or q.dtype not in FUSED:
        return _attend(q, cache, torch.arange(S - T, S)[None], window, scale, softcap)
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    if T == 1:  # it sees the whole cut
        rows = q.reshape(B, G, H // G, D)
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(B, 1, H, D)
    rows = q.reshape(B, T, G, H // G, D).transpose(1, 2).reshape(B, G, -1, D)
    seen = ~_hidden(torch.arange(S - T, S)[None], S, window)[:, None].repeat_interleave(H // G, dim=2)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen, scale=scale)
    return out.view(B, G, T, H // G, D).transpose(1, 2).reshape(B, T, H, D)


def quantize_kv(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Returns keys or values (..., D) as int8 or float8_e4m3fn (..., D), and the scales (...) fp32 to multiply them by.

    Each row is scaled so that its largest magnitude becomes 127 (int8) or 448 (fp8). A row of zeros has scale 1.
    """
    require(dtype in QUANTIZED.values(), f"dtype: expected torch.int8 or torch.float8_e4m3fn, got {dtype}")
    require(x.is_floating_point(), f"x: expected a floating dtype, got {x.dtype}")
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.abs().amax(dim=-1).float() / largest
    scale = torch.where(scale > 0, scale, 1.0)
    y = x.float() / scale[..., None]
    return (y.round() if dtype == torch.int8 else y).clamp(-largest, largest).to(dtype), scale


def check(
    q: Tensor, cache: Cache, lengths: Tensor, pages: Tensor | None, window: int | None, scale: float | None,
    softcap: float | None, new: int = 0,
) -> None:  # fmt: skip
    """Refuse arguments that mean nothing: raises ValueError that names the argument and what it should be.

    There must be room for `new` positions after `lengths`. A message is made only where a check fails: making all of
    them takes longer than attention over a short sequence.
    """
    k, v, k_scale, v_scale = cache
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and isinstance(lengths, Tensor)):
        raise no_tensor(q=q, k=k, v=v, lengths=lengths)
    for name, tensor in (("pages", pages), ("k_scale", k_scale), ("v_scale", v_scale)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise no_tensor(**{name: tensor})
    if q.dim() != 4 or min(q.shape[2:]) == 0:
        raise ValueError(f"q: expected (B, T, H, D), got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    B, _, H, D = q.shape
    if k.dim() != 4 or k.shape[3] != D or (pages is None and k.shape[0] != B):
        what = "(B, S, G, D) with q's B and D" if pages is None else "(N, page_size, G, D) with q's D"
        raise ValueError(f"k: expected {what}, got {tuple(k.shape)} for q {tuple(q.shape)}")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"k: its {k.shape[2]} heads do not divide the {H} heads of q")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v: expected {tuple(k.shape)} of {k.dtype} as k is, got {tuple(v.shape)} of {v.dtype}")
    quantized = k.dtype in QUANTIZED.values()
    if not quantized and k.dtype != q.dtype:
        raise ValueError(f"k: expected q's dtype {q.dtype}, int8 or float8_e4m3fn, got {k.dtype}")
    if lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths: expected ({B},) int32 or int64, got {tuple(lengths.shape)} {lengths.dtype}")
    if quantized or k_scale is not None or v_scale is not None:
        for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
            if x is None:
                raise ValueError(f"{name}: a cache of int8 or float8_e4m3fn needs both scales, and none goes alone")
            if x.shape != k.shape[:3] or not x.is_floating_point():
                raise ValueError(f"{name}: expected {tuple(k.shape[:3])} float32, got {tuple(x.shape)} {x.dtype}")
    if pages is not None:
        if pages.dim() != 2 or pages.shape[0] != B or pages.dtype != torch.int32:
            raise ValueError(f"pages: expected (B, P) int32, got {tuple(pages.shape)} {pages.dtype}")
        require(k.shape[1] > 0, "k: pages of no rows")
    tensors = {"k": k, "v": v, "lengths": lengths, "pages": pages, "k_scale": k_scale, "v_scale": v_scale}
    for name, x in tensors.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, but q is on {q.device}")
    check_scores(window, scale, softcap)
    if on_host(lengths):
        _check_values(k, lengths, pages, new)


def _check_values(k: Tensor, lengths: Tensor, pages: Tensor | None, new: int) -> None:
    """Refuse lengths outside the cache, and pages outside the pool as far as the lengths reach."""
    capacity = k.shape[1] if pages is None else pages.shape[1] * k.shape[1]
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= capacity - new:
            raise ValueError(f"lengths: {length} of sequence {b} is outside 0 to {capacity - new}")
        if pages is not None and length + new:
            low, high = (x.item() for x in pages[b, : -(-(length + new) // k.shape[1])].aminmax())
            require(0 <= low <= high < k.shape[0], f"pages: sequence {b} has {low} to {high}, the pool {k.shape[0]}")
