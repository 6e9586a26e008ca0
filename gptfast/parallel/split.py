"""Splits matrices over ranks, and wraps the model for parallel training.

A rank's part is described as a rectangle of the whole matrix. The sharded optimizer and checkpoints work with these
rectangles, so that neither depends on the number of ranks. A parameter that stacks queries, keys and values (c_attn)
counts as three matrices.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gptfast.config import GPTConfig
from gptfast.errors import UserError
from gptfast.model import GPT

from .team import Team

BY_COLUMN = ("c_attn.weight", "c_attn.bias", "c_fc.weight", "c_fc.bias", "c_gate.weight", "c_gate.bias")  # outputs
BY_ROW = ("c_proj.weight",)  # inputs


@dataclass(frozen=True)
class Rectangle:
    """A rank's part of one matrix (m, n), or vector (m,)."""

    matrix: int  # ordinal among the matrices stacked in the parameter
    shape: tuple[int, ...]  # of the whole matrix
    offset: tuple[int, ...]  # of the part in it
    size: tuple[int, ...]
    start: int  # its first row in the rank's part of the parameter

    def of_local(self, local: Tensor) -> Tensor:
        """Returns the rectangle as a view of the rank's part of the parameter."""
        return local[self.start : self.start + self.size[0]]

    def of_whole(self, matrix: Tensor) -> Tensor:
        """Returns the rectangle as a view of the whole matrix."""
        return matrix[tuple(slice(o, o + s) for o, s in zip(self.offset, self.size, strict=True))]


def stacked_rows(name: str, shape: torch.Size, config: GPTConfig) -> list[int]:
    """Returns the row counts of the matrices stacked in a parameter."""
    if ".c_attn." in name:
        return [heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    return [shape[0]]


def rectangles(name: str, shape: torch.Size, config: GPTConfig, team: Team, rank: int) -> list[Rectangle]:
    """Returns the rectangles of the parameter `name`, of this whole shape, that `rank` holds, in their stored order."""
    t, s = rank % team.tensor, rank // team.tensor % team.shards
    ways, index = team.shards, s
    if not name.startswith("transformer.h."):  # FSDP splits these over tensor ranks too
        ways, index = team.shards * team.tensor, s * team.tensor + t
    by_column = team.tensor > 1 and name.endswith(BY_COLUMN)
    by_row = team.tensor > 1 and name.endswith(BY_ROW)
    parts: list[tuple[int, int, int]] = []  # (matrix, first row, rows) after the split over tensor ranks
    for matrix, rows in enumerate(stacked_rows(name, shape, config)):
        here = rows // team.tensor if by_column else rows
        parts.append((matrix, t * here if by_column else 0, here))
    low, high = chunk(sum(rows for *_, rows in parts), ways, index)
    columns = tuple(n // team.tensor if by_row else n for n in shape[1:])
    first_column = tuple(t * n if by_row else 0 for n in columns)

    pieces, row = [], 0
    for (matrix, first, rows), whole in zip(parts, stacked_rows(name, shape, config), strict=True):
        a, b = max(low, row), min(high, row + rows)
        if a < b:
            offset = (first + a - row, *first_column)
            pieces.append(Rectangle(matrix, (whole, *shape[1:]), offset, (b - a, *columns), a - low))
        row += rows
    return pieces


def chunk(rows: int, ways: int, index: int) -> tuple[int, int]:
    """Returns the rows [low, high) of part `index`, as torch.chunk and FSDP split: ceil(rows / ways) rows first."""
    size = -(-rows // ways)
    return min(rows, index * size), min(rows, (index + 1) * size)


def local(p: Tensor | None) -> Tensor:
    """Returns this rank's part of an existing parameter or gradient; shares its memory."""
    assert p is not None
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p


def whole_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Returns the shape of every parameter before any split; a tied head appears once, as the embedding."""
    return {name: p.shape for name, p in model.named_parameters()}


def parallelize(model: GPT, team: Team, *, compiled: bool = False) -> nn.Module:
    """Parallelizes `model` over `team`, in this order: tensor ranks, compilation, shards or replicas.

    Returns the module to call; `model` is changed in place and keeps its names. Weights must be equal on every rank.
    Raises UserError where heads or widths cannot be split.
    """
    if team.size == 1:
        return torch.compile(model) if compiled else model  # type: ignore[return-value]
    assert team.mesh is not None
    if team.tensor > 1:
        split_matrices(model, team)
    blocks: Any = model.transformer["h"]
    if compiled:
        for block in blocks:
            block.compile()
    if team.mode == "ddp":
        # Do not broadcast the rotary tables in every step. torch 2.13 renamed the option, and warns about the old name.
        known = inspect.signature(DistributedDataParallel).parameters
        sent = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        settings: dict[str, Any] = {sent: False}
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **settings)
    # Weights are gathered in the dtype of their use; gradients are reduced in fp32. Rotary tables stay fp32.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if model.dtype.itemsize < 4:
        policy = MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False)
    over_shards = team.mesh["shard"] if team.mode == "fsdp" else team.mesh["replica", "shard"]
    over_all = team.mesh["shard", "tensor"]._flatten("shard_tensor") if team.tensor > 1 else over_shards
    for block in blocks:
        fully_shard(block, mesh=over_shards, mp_policy=policy)
    fully_shard(model, mesh=over_all, mp_policy=policy, reshard_after_forward=False)
    return model


def split_matrices(model: GPT, team: Team) -> None:
    """Splits as Megatron does (Shoeybi et al., arXiv:1909.08053): each tensor rank has some heads and part of the MLP.

    The model must be whole and equal on every rank.
    """
    assert team.mesh is not None
    config, ways = model.config, team.tensor
    for what, number in (("n_head", config.n_head), ("n_kv_head", config.kv_heads), ("MLP width", config.hidden_width)):
        if number % ways:
            raise UserError(f"--tensor_parallel={ways} does not divide the {what}, {number}")
    if config.qk_norm_weight:  # each rank would have only its own heads' gradient
        raise UserError(f"--tensor_parallel={ways} cannot split a model with qk_norm_weight; leave the flag out")
    if config.value_embeddings:  # their tables and gates span all heads
        raise UserError(f"--tensor_parallel={ways} cannot split a model with value_embeddings; leave the flag out")
    plan = {
        "attn.c_attn": ColwiseParallel(), "attn.c_proj": RowwiseParallel(),
        "mlp.c_fc": ColwiseParallel(), "mlp.c_proj": RowwiseParallel(),
    }  # fmt: skip
    blocks: Any = model.transformer["h"]
    if hasattr(blocks[0].mlp, "c_gate"):
        plan["mlp.c_gate"] = ColwiseParallel()
    heads = dataclasses.replace(
        config, n_head=config.n_head // ways, n_kv_head=config.kv_heads // ways, head_size=config.head_dim
    )
    for block in blocks:
        block.mlp.fuses_bias = False  # the layer adds its rank's part of the bias itself
        for p in block.attn.c_attn.parameters():
            p.data = by_rank(p.data, stacked_rows("x.c_attn.x", p.shape, config), ways)
        parallelize_module(block, team.mesh["tensor"], plan)
        block.attn.config = heads


def by_rank(stack: Tensor, rows: list[int], ways: int) -> Tensor:
    """Reorders stacked q, k, v to (q, k, v of the first rank's heads), (q, k, v of the second's), ..."""
    chunks = [matrix.chunk(ways) for matrix in stack.split(rows)]
    return torch.cat([matrix[rank] for rank in range(ways) for matrix in chunks])
