"""Shared by the forward and backward kernels of attention: masks, scores, loads and addresses.

Every query sees one interval of keys, and every key is seen by one interval of queries: causality, windows and
documents only move its ends. `keys_seen` and `queries_seeing` compute the two. The intervals of a tile's first and last
row determine which tiles to visit, and which of them every row sees in full, so that they need no mask.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import TensorDescriptor, jit, tl, triton
from .dropout import dropout_threshold


class Options(NamedTuple):
    """The arguments of attention besides q, k and v, as the operator takes them and in its order."""

    cu_seqlens: Tensor | None
    seed: Tensor | None  # (1,) int64; None without dropout
    causal: bool
    window: int  # -1 for none
    scale: float
    softcap: float  # 0 for none
    dropout: float
    gluon: bool  # insists on the forward of hopper/, and lets its backward do what has not been timed

    @property
    def bounded(self) -> bool:
        """Returns whether a query may not see all keys before its own."""
        return self.window >= 0 or self.cu_seqlens is not None

    def scalars(self) -> tuple:
        """Returns the runtime arguments of every kernel, in order."""
        return self.window, self.scale, self.softcap, dropout_threshold(self.dropout), 1.0 / (1.0 - self.dropout)

    def flags(self, documents: Tensor | None) -> dict[str, Any]:
        """Returns the compile-time arguments of every kernel."""
        return dict(
            CAUSAL=self.causal, WINDOWED=self.window >= 0, DOCUMENTS=documents is not None,
            SOFTCAPPED=self.softcap > 0, DROPOUT=self.dropout > 0,
        )  # fmt: skip


def document_bounds(cu_seqlens: Tensor | None, S: int) -> Tensor | None:
    """Returns (2, S) int32: the start and the end of each position's document."""
    if cu_seqlens is None:
        return None
    position = torch.arange(S, device=cu_seqlens.device)
    document = torch.bucketize(position, cu_seqlens[1:], right=True)
    edges = torch.cat([cu_seqlens.new_zeros(1), cu_seqlens[1:], cu_seqlens.new_full((1,), S)]).clamp(0, S)
    return torch.stack([edges[document], edges[document + 1]]).to(torch.int32)


def rows(x: Tensor) -> Tensor:
    """Returns x with unit last stride: x itself if it has that, so that a slice of a fused projection is not copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(D: int) -> int:
    """Returns the width of a tile that holds head vectors of D: a power of two that a matrix instruction takes."""
    return max(16, triton.next_power_of_2(D))


def aligned(x: Tensor) -> Tensor:
    """Returns x (B, T, H, D) of 16 bits, D a multiple of 8, as the tensor memory accelerator can address it.

    That is x itself if its rows start at multiples of 16 bytes, else a copy. Pointers instead would cost so many
    registers that kernels on sm_90 spill, or that ptxas serializes their matrix products.
    """
    start = x.storage_offset() * x.element_size() if x.is_meta else x.data_ptr()
    fits = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return x if fits and start % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def descriptor(x: Tensor, block: int) -> Any:
    """Returns a tensor descriptor of x (B, T, H, D) that moves tiles of `block` rows of one head."""
    view = x.transpose(1, 2)
    return TensorDescriptor(view, list(view.shape), list(view.stride()), [1, 1, block, padded(x.shape[3])])


# ---- inside kernels


@jit
def place(program, blocks, heads, length, D: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Returns (head, block) of a program. Heads are ordered in waves whose keys and values fit L2, heavy blocks first.

    A wave has 4 M elements of keys, with the values 16 MB in 16 bits: a third of the L2 of an A100 or H100. Not tuned.
    """
    wave = tl.maximum(1, 4194304 // D // length)
    first = program // (wave * blocks) * wave
    size = tl.minimum(wave, heads - first)
    rest = program - first * blocks
    block = rest // size
    return first + rest % size, blocks - 1 - block if LAST_FIRST else block


@jit
def keys_seen(
    p, S, window, document_ptr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr
):  # fmt: skip
    """Returns [first, end), the keys visible to the query at position p."""
    first, end = p * 0, p * 0 + S
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(p + 1, 0))
    if WINDOWED:
        first = tl.maximum(first, p - window)
        if not CAUSAL:
            end = tl.minimum(end, tl.maximum(p + window + 1, 0))
    if DOCUMENTS:
        first = tl.maximum(first, tl.load(document_ptr + p, p < S, other=0))
        end = tl.minimum(end, tl.load(document_ptr + S + p, p < S, other=0))
    return first, end


@jit
def queries_seeing(
    u, T, S, window, document_ptr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr
):  # fmt: skip
    """Returns [first, end), the positions of the queries that see key u; queries stand at S - T to S - 1."""
    first, end = u * 0 + (S - T), u * 0 + S
    if CAUSAL:
        first = tl.maximum(first, u)
    if WINDOWED:
        end = tl.minimum(end, u + window + 1)
        if not CAUSAL:
            first = tl.maximum(first, u - window)
    if DOCUMENTS:
        first = tl.maximum(first, tl.load(document_ptr + u, u < S, other=0))
        end = tl.minimum(end, tl.load(document_ptr + S + u, u < S, other=0))
    return first, end


@jit
def segments(first_of_first, end_of_first, first_of_last, end_of_last, BLOCK: tl.constexpr):
    """Returns key offsets (start, full, ragged, stop): tiles in [full, ragged) need no mask.

    From the intervals that a tile's first and last row see. All but `stop` are multiples of BLOCK.
    """
    start = first_of_first // BLOCK * BLOCK
    full = tl.minimum(tl.maximum(tl.cdiv(first_of_last, BLOCK) * BLOCK, start), tl.cdiv(end_of_last, BLOCK) * BLOCK)
    ragged = tl.maximum(full, end_of_first // BLOCK * BLOCK)
    return start, full, ragged, end_of_last


@jit
def head_of(x, b, head, stride_b, stride_h, DESCRIPTORS: tl.constexpr):
    """Returns what load_rows reads from: a pointer to the head's first row, or the descriptor of the whole tensor."""
    if DESCRIPTORS:
        return x
    else:
        return x + b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@jit
def load_rows(
    x, b, head, row, stride, length, CHECKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns a head's rows from `row` on, (BLOCK, BLOCK_D). Columns past D are 0, rows past length if CHECKED."""
    if DESCRIPTORS:
        return tl.reshape(x.load([b, head, row, 0]), (BLOCK, BLOCK_D))
    else:
        r, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
        tile_ptr = x + row.to(tl.int64) * stride + (r * stride + d)
        if CHECKED:
            return tl.load(tile_ptr, (row + r < length) & (d < D), other=0.0)
        elif D != BLOCK_D:
            return tl.load(tile_ptr, (r >= 0) & (d < D), other=0.0)
        else:
            return tl.load(tile_ptr)


@jit
def scores(products, scale, softcap, SOFTCAPPED: tl.constexpr):
    """Returns scores, or shares of the cap, and the factor of base-2 scores, which an FMA applies at no cost."""
    if SOFTCAPPED:
        return tanh(products * (scale / softcap)), softcap * 1.4426950408889634
    else:
        return products, scale * 1.4426950408889634


@jit
def tanh(x):
    """Returns tanh(x) in fp32; near 0, where 1 - 2 / (exp(2x) + 1) cancels, by its series.

    The tanh of prims.py is more exact there, and costs the forward 50 registers.
    """
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.09, series, 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))
