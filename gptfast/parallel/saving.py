"""Checkpoints written in parts by every rank, through torch.distributed.checkpoint; parts.py reads them.

The parts are safetensors files with each rectangle's offset in the whole matrix, so nothing is pickled, and any number
of ranks, in any mode, can read what another number wrote.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gptfast import checkpoint
from gptfast.errors import UserError

from .optimizer import ShardedOptimizer
from .parts import MODEL, STATE
from .split import Rectangle, local


class Piece(Tensor):
    """A rectangle of a whole tensor that implements torch.distributed.checkpoint's protocol `_Checkpointable`."""

    # operations on it return plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    whole: torch.Size
    place: ChunkStorageMetadata

    @staticmethod
    def of(rectangle: Rectangle, tensor: Tensor) -> Piece:
        piece = tensor.detach().as_subclass(Piece)
        piece.whole = torch.Size(rectangle.shape)
        piece.place = ChunkStorageMetadata(torch.Size(rectangle.offset), torch.Size(rectangle.size))
        return piece

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        data = TensorWriteData(self.place, TensorProperties.create_from_tensor(self), self.whole)
        return [WriteItem(MetadataIndex(name, self.place.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self.place]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.as_subclass(Tensor)


def save_sharded(
    out_dir: str | Path, optimizer: ShardedOptimizer, *, step: int, meta: dict[str, Any],
    **settings: Any,
) -> None:  # fmt: skip
    """Does `checkpoint.save` for a team; every rank must call it, with the same shared folder out_dir."""

    def write(folder: Path) -> None:
        write_parts(folder, optimizer)

    main = optimizer.team.gather(os.getpid())[0]
    if optimizer.team.is_main:
        checkpoint.save(
            out_dir, step=step, model={}, optimizer=optimizer.settings(), meta=meta, write_parts=write, **settings
        )
    else:
        try:
            write(checkpoint.building_of(out_dir, step, main))
        except OSError as error:
            raise UserError(f"cannot save step {step} in {out_dir} (rank {optimizer.team.rank}): {error}") from None
    optimizer.team.barrier()


def write_parts(folder: Path, optimizer: ShardedOptimizer) -> None:
    """Writes the tensors of model and optimizer into `folder`, which rank 0 creates; every rank must call this."""
    pieces = {}
    for name, p in zip(optimizer.names, optimizer.parameters, strict=True):
        for rectangle in optimizer.rectangles(name, optimizer.team.rank):
            pieces[f"{MODEL}/{name}/{rectangle.matrix}"] = Piece.of(rectangle, rectangle.of_local(local(p)))
    for index, key, rectangle, tensor in optimizer.pieces():
        pieces[f"{STATE}/{index}/{key}/{rectangle.matrix}"] = Piece.of(rectangle, tensor)
    optimizer.team.barrier()  # now the folder exists
    dcp.save(pieces, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    if optimizer.team.is_main:
        (folder / checkpoint.PARTS).write_text(json.dumps({"ranks": optimizer.team.size, "aliases": optimizer.aliases}))
    optimizer.team.barrier()
