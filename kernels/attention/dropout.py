"""Dropout of attention's weights: the seed, and the same random numbers drawn in torch and in the kernels.

Whether a weight is dropped depends on seed, key, query and head alone, so that the backward pass, every tile shape and
the reference agree. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import jit, tl
from ..op import check_count

ROUNDS = 7  # of Philox: the fewest that pass BigCrush (Salmon et al., SC 2011)


def seed_tensor(dropout: float, seed: int | None, device: torch.device) -> Tensor | None:
    """Returns the seed (1,) int64 that the kernels read, drawn on the device where none is given; None without dropout.

    It is a tensor so that a CUDA graph draws a new one at each replay.
    """
    if dropout == 0.0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    check_count("seed", seed, -(2**63))
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def drop(p: Tensor, dropout: float, seed: int | None, queries: range, keys: range) -> Tensor:
    """Returns p (..., queries, keys) with entries zeroed at this rate and the others scaled up."""
    if seed is None:
        return F.dropout(p, dropout)
    check_count("seed", seed, -(2**63))
    heads = p.shape[:-2].numel()
    drawn = undropped(seed, dropout, heads, queries, keys, p.device).view(p.shape)
    return torch.where(drawn, p, 0.0) / (1.0 - dropout)  # a NaN that is dropped is 0, as in the kernels


def undropped(seed: int, dropout: float, heads: int, queries: range, keys: range, device: torch.device) -> Tensor:
    """Returns a mask (heads, queries, keys), True where dropout keeps the weight: Philox4x32 at (key, query, head).

    The kernels draw the same bits, tile by tile.
    """

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the high and low 32 bits of a * b, in int64 without overflow."""
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
    """Returns the bound below which a random number of 31 bits means that the weight is dropped."""
    return round(dropout * 2**31)


@jit
def kept(seed_ptr, key, query, head, threshold):
    """Returns True where dropout keeps the weight: Philox4x32 in 7 rounds, of the seed at (key, query, head)."""
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), key, query, head, head * 0, 7)
    return (bits >> 1).to(tl.int32) >= threshold
