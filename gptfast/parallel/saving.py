"""Checkpoints that every rank writes its part of, through torch.distributed.checkpoint, and one process can read.

The parts are safetensors files with each rectangle's place in the whole, so nothing is pickled, and what is saved by
one number of ranks, in whichever mode, is read by any other.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gptfast import checkpoint
from gptfast.cli import UserError

from .optimizer import ShardedOptimizer
from .split import Rectangle, local

MODEL, STATE = "model", "state"  # first words of the tensors' names: model/<parameter>/<matrix>, state/<index>/<key>/..


class Piece(Tensor):
    """A rectangle of a whole tensor, in the terms of torch.distributed.checkpoint (its protocol `_Checkpointable`)."""

    # what is computed from it is a plain tensor
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


def save(
    out_dir: str | Path, optimizer: ShardedOptimizer, *, step: int, meta: dict[str, Any],
    **settings: Any,
) -> None:  # fmt: skip
    """`checkpoint.save`, to be called by every rank; out_dir must be the same folder for all of them."""

    def write(folder: Path) -> None:
        write_parts(folder, optimizer)

    if optimizer.team.is_main:
        checkpoint.save(
            out_dir, step=step, model={}, optimizer=optimizer.settings(), meta=meta, write_parts=write, **settings
        )
    else:
        try:
            write(checkpoint.building_of(out_dir, step))
        except OSError as error:
            raise UserError(f"cannot save step {step} in {out_dir} (rank {optimizer.team.rank}): {error}") from None
    optimizer.team.barrier()


def write_parts(folder: Path, optimizer: ShardedOptimizer) -> None:
    """Every rank calls this; when it returns, the tensors of model and optimizer are in `folder`, made by rank 0."""
    pieces = {}
    for name, p in zip(optimizer.names, optimizer.parameters, strict=True):
        for rectangle in optimizer.rectangles(name, optimizer.team.rank):
            pieces[f"{MODEL}/{name}/{rectangle.matrix}"] = Piece.of(rectangle, rectangle.of_local(local(p)))
    for index, key, rectangle, tensor in optimizer.pieces():
        pieces[f"{STATE}/{index}/{key}/{rectangle.matrix}"] = Piece.of(rectangle, tensor)
    optimizer.team.barrier()  # the folder is there
    dcp.save(pieces, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    if optimizer.team.is_main:
        (folder / checkpoint.PARTS).write_text(json.dumps({"ranks": optimizer.team.size, "aliases": optimizer.aliases}))
    optimizer.team.barrier()


def check_cover(name: str, shape: Sequence[int], pieces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Raises ValueError unless the pieces (offset, size) hold every element of a tensor of this shape exactly once.

    So a tensor is no larger than the files that hold it, before memory is taken for it.
    """
    for offset, size in pieces:
        if len(offset) != len(shape) or any(o < 0 or o + s > n for o, s, n in zip(offset, size, shape, strict=True)):
            raise ValueError(f"{name} has a piece outside its shape {tuple(shape)}")
    if sum(math.prod(size) for _, size in pieces) != math.prod(shape):
        raise ValueError(f"the pieces of {name} do not make up its shape {tuple(shape)}")
    for (a, m), (b, n) in itertools.combinations([piece for piece in pieces if math.prod(piece[1])], 2):
        if all(x < y + k and y < x + j for x, j, y, k in zip(a, m, b, n, strict=True)):
            raise ValueError(f"two pieces of {name} hold the same elements")


def read_parts(folder: Path, optimizer: dict[str, Any]) -> dict[str, Tensor]:
    """The whole model's tensors by name, on the CPU, in one process; the optimizer's go into its tree."""
    reader = HuggingFaceStorageReader(str(folder))
    known = {
        name: about
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if name.startswith((f"{MODEL}/", f"{STATE}/")) and isinstance(about, TensorStorageMetadata)
    }
    for name, about in known.items():  # equal pieces are those of replicas
        check_cover(name, about.size, list({(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in about.chunks}))
    found = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in known.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    stacks: dict[str, list[Tensor]] = {}
    for name in sorted(found):  # the matrices of one parameter, in order
        stacks.setdefault(name.rpartition("/")[0], []).append(found[name])
    model: dict[str, Tensor] = {}
    for name, matrices in stacks.items():
        kind, *path = name.split("/")
        tensor = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        if kind == MODEL:
            model[path[0]] = tensor
        else:
            optimizer["state"].setdefault(int(path[0]), {})[path[1]] = tensor
    aliases = json.loads((folder / checkpoint.PARTS).read_text())["aliases"]
    return model | {name: model[other] for name, other in aliases.items()}
