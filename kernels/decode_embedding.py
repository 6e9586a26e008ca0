"""The input of a GPT's first block in a decoding step: a token's row of one table, plus its position's of another.

    x[b, t] = table[tokens[b, t]] + positions[min(lengths[b] + t, P - 1)]

    table: (V, C)   tokens: (B, T) int64   positions: (P, C) or absent   lengths: (B,) int   x: (B, T, C)

Rows of fp32 parameters are read in fp32, and the sum is rounded once. There is no derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import jit, tl, triton
from .op import Cost, Op, no_tensor, require, traced, without_gradient
from .prims import as_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def decode_embedding_reference(
    table: Tensor,
    tokens: Tensor,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns rows of table (V, C) for tokens (B, T), plus those of positions (P, C) from `lengths` (B,) on: (B, T, C).

    The result is in `dtype`, by default the table's; the sum is in at least fp32. Positions past the table take its
    last row. Raises ValueError naming the argument.
    """
    _check(table, tokens, positions, lengths)
    if tokens.device.type == "cpu" and tokens.numel() and not traced():
        low, high = (int(x) for x in tokens.aminmax())
        require(0 <= low and high < table.shape[0], f"tokens: expected 0 to {table.shape[0] - 1}, got {low} to {high}")
    x = table[tokens].to(torch.promote_types(table.dtype, torch.float32))
    if positions is not None and lengths is not None:
        at = lengths.long()[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x = x + positions[at.clamp(max=positions.shape[0] - 1)].to(x.dtype)
    return x.to(table.dtype if dtype is None else dtype)


def _check(table: Tensor, tokens: Tensor, positions: Tensor | None, lengths: Tensor | None) -> None:
    """Refuse wrong arguments."""
    if not (isinstance(table, Tensor) and isinstance(tokens, Tensor)):
        raise no_tensor(table=table, tokens=tokens)
    for name, tensor in (("positions", positions), ("lengths", lengths)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise no_tensor(**{name: tensor})
    if table.dim() != 2 or not table.is_floating_point() or table.shape[1] == 0:
        raise ValueError(f"table: expected floating (V, C), got {table.dtype}{tuple(table.shape)}")
    if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens: expected (B, T) int64, got {tuple(tokens.shape)} {tokens.dtype}")
    if (positions is None) != (lengths is None):
        raise ValueError("lengths: positions and lengths go together")
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != table.shape[1]):
        raise ValueError(f"positions: expected (P, {table.shape[1]}), got {tuple(positions.shape)}")
    if lengths is not None and (lengths.shape != tokens.shape[:1] or lengths.dtype.is_floating_point):
        raise ValueError(f"lengths: expected ({tokens.shape[0]},) int, got {tuple(lengths.shape)} {lengths.dtype}")
    for name, x in (("tokens", tokens), ("positions", positions), ("lengths", lengths)):
        if x is not None and x.device != table.device:
            raise ValueError(f"{name}: on {x.device}, but table is on {table.device}")


@jit
def decode_embedding_fwd_kernel(
    table_ptr, tokens_ptr, positions_ptr, lengths_ptr, x_ptr, table_stride_v, positions_stride_p, T, C, P,
    HAS_POSITIONS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C columns of one token -> x[b, t, :]."""
    place, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.load(tokens_ptr + place).to(tl.int64)
    x = tl.load(table_ptr + token * table_stride_v + c, c < C, other=0.0).to(tl.float32)
    if HAS_POSITIONS:
        position = tl.minimum(tl.load(lengths_ptr + place // T).to(tl.int32) + place % T, P - 1).to(tl.int64)
        x += tl.load(positions_ptr + position * positions_stride_p + c, c < C, other=0.0).to(tl.float32)
    tl.store(x_ptr + place.to(tl.int64) * C + c, x.to(x_ptr.dtype.element_ty), c < C)


BLOCK_C, NUM_WARPS = 512, 2


def _forward(
    table: Tensor, tokens: Tensor, positions: Tensor | None, lengths: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (B, T), C = tokens.shape, table.shape[1]
    x = torch.empty((B, T, C), dtype=dtype, device=table.device)
    if x.numel() == 0:
        return x
    table, positions = as_rows(table), None if positions is None else as_rows(positions)
    lengths = None if lengths is None else lengths.contiguous()
    decode_embedding_fwd_kernel[(B * T, triton.cdiv(C, BLOCK_C))](
        table, tokens.contiguous(), positions, lengths, x, table.stride(0),
        0 if positions is None else positions.stride(0), T, C, 0 if positions is None else positions.shape[0],
        HAS_POSITIONS=positions is not None, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return x


_decode_embedding = without_gradient("decode_embedding", _forward)


def decode_embedding_triton(
    table: Tensor,
    tokens: Tensor,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute decode_embedding_reference in one launch, on CUDA tensors: fp32, fp16 or bf16. Tokens are not checked."""
    _check(table, tokens, positions, lengths)
    dtype = table.dtype if dtype is None else dtype
    if dtype not in DTYPES or table.dtype not in DTYPES:
        raise ValueError(f"table: expected fp32, fp16 or bf16, got {table.dtype} for {dtype}")
    return _decode_embedding(table, tokens, positions, lengths, dtype)


def inputs(
    B: int, T: int, V: int, C: int, *, P: int = 0, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple, dict[str, Any]]:
    """Draw normal table (V, C) and tokens (B, T); with P positions also their table (P, C), and lengths below P."""
    table = torch.randn(V, C, dtype=dtype, device=device)
    tokens = torch.randint(V, (B, T), device=device)
    if not P:
        return (table, tokens), {}
    lengths = torch.linspace(0, P - 1, B, device=device).to(torch.int32)
    return (table, tokens, torch.randn(P, C, dtype=dtype, device=device), lengths), {}


def cost(B: int, T: int, V: int, C: int, *, P: int = 0, itemsize: int) -> tuple[Cost, Cost]:
    """Count a row of each table read, and one written, for every token."""
    return Cost(B * T * C * (P > 0), B * T * (C * itemsize * (2 + (P > 0)) + 8)), Cost(0, 0)


DECODE_EMBEDDING = Op(
    name="decode_embedding",
    reference=decode_embedding_reference,
    triton=decode_embedding_triton,
    inputs=inputs,
    parity=(
        dict(B=1, T=1, V=1, C=1), dict(B=3, T=2, V=7, C=33, P=3), dict(B=0, T=1, V=3, C=4, P=2),
        dict(B=2, T=3, V=11, C=600, P=2),
    ),
    domain=dict(B=range(1, 9), T=(1, 2), V=(1, 5), C=(1, 15, 16, 600), P=(0, 1, 5)),
    bench=(
        dict(B=1, T=1, V=50304, C=768, P=1024), dict(B=32, T=1, V=50304, C=1600, P=1024),
        dict(B=32, T=2, V=50304, C=4096),
    ),
    cost=cost,
    summary="embedding of tokens plus that of their positions, while decoding",
    differentiable=False,
)  # fmt: skip
