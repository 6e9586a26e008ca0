"""Reads what saving.py wrote with any number of ranks, in one process.

Apart from it, so that gptfast/checkpoint.py can read parts and saving.py can write checkpoints.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

MODEL, STATE = "model", "state"  # first words of the tensors' names: model/<parameter>/<matrix>, state/<index>/<key>/..


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


def read_parts(folder: Path, optimizer: dict[str, Any], aliases: dict[str, str]) -> dict[str, Tensor]:
    """Returns the whole model's tensors by name, on the CPU, in one process; puts the optimizer's into its tree.

    `aliases` maps the names of tied parameters to the name that holds their tensor.
    """
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
    return model | {name: model[other] for name, other in aliases.items()}
