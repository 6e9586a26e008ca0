"""Reads, in one process, the checkpoints that saving.py wrote with any number of ranks.

It is separate from saving.py to keep imports acyclic: gptfast/checkpoint.py imports this page, and saving.py that one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

from gptfast import untrusted

MODEL, STATE = "model", "state"  # prefixes of tensor names: model/<parameter>/<matrix>, state/<index>/<key>/..

PLACES, OFFSET = "DCP_SHARDING_INFO", "saved_offsets"  # torch.distributed.checkpoint's keys for offsets

MOST_PIECES = 2**20  # of all ranks

Extent = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size of a piece


def check_cover(name: str, shape: Sequence[int], pieces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Raises ValueError unless the pieces (offset, size) cover every element of a tensor of this shape exactly once.

    So a tensor cannot be larger than its files, which is checked before memory is allocated.
    """
    for offset, size in pieces:
        if len(offset) != len(shape) or any(o < 0 or o + s > n for o, s, n in zip(offset, size, shape, strict=True)):
            raise ValueError(f"{name} has a piece outside its shape {tuple(shape)}")
    if sum(math.prod(size) for _, size in pieces) != math.prod(shape):
        raise ValueError(f"the pieces of {name} do not make up its shape {tuple(shape)}")
    for (a, m), (b, n) in itertools.combinations([piece for piece in pieces if math.prod(piece[1])], 2):
        if all(x < y + k and y < x + j for x, j, y, k in zip(a, m, b, n, strict=True)):
            raise ValueError(f"two pieces of {name} hold the same elements")


def read_parts(
    files: Iterable[BufferedReader], optimizer: dict[str, Any], aliases: dict[str, str]
) -> dict[str, Tensor]:
    """Returns the whole model's tensors by name, on the CPU; adds the optimizer's tensors to `optimizer`.

    `files` are open; `aliases` maps names of tied parameters to the name under which their tensor is stored. Raises
    ValueError for pieces that do not form a tensor.
    """
    pieces: dict[str, dict[Extent, Tensor]] = {}
    count = 0
    for file in files:
        tensors, about = untrusted.tensors(file)
        count += len(tensors)
        if count > MOST_PIECES:
            raise ValueError(f"its parts have more than {MOST_PIECES:,} tensors")
        offsets = untrusted.parsed(about[PLACES])
        for name, tensor in tensors.items():
            if name.startswith((f"{MODEL}/", f"{STATE}/")):  # replicas have equal pieces
                pieces.setdefault(name, {})[tuple(offsets[name][OFFSET]), tuple(tensor.shape)] = tensor
    stacks: dict[str, list[Tensor]] = {}
    for name in sorted(pieces):  # the matrices of one parameter, in order
        stacks.setdefault(name.rpartition("/")[0], []).append(joined(name, pieces.pop(name)))
    model: dict[str, Tensor] = {}
    for name, matrices in stacks.items():
        kind, *path = name.split("/")
        tensor = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        if kind == MODEL:
            model[path[0]] = tensor
        else:
            optimizer["state"].setdefault(int(path[0]), {})[path[1]] = tensor
    return model | {name: model[stored_name] for name, stored_name in aliases.items()}


def joined(name: str, pieces: dict[Extent, Tensor]) -> Tensor:
    """Assembles a tensor from its pieces."""
    dims = {len(offset) for offset, _ in pieces}
    if len(dims) > 1 or any(type(o) is not int for offset, _ in pieces for o in offset):
        raise ValueError(f"the pieces of {name} have no common shape")
    ends = [[o + s for o, s in zip(offset, size, strict=True)] for offset, size in pieces]
    shape = [max(column) for column in zip(*ends, strict=True)]
    check_cover(name, shape, list(pieces))
    first = next(iter(pieces.values()))
    if len(pieces) == 1:
        return first
    if len({piece.dtype for piece in pieces.values()}) > 1:
        raise ValueError(f"the pieces of {name} are of several dtypes")
    whole = torch.empty(shape, dtype=first.dtype)
    for (offset, size), piece in pieces.items():
        whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))] = piece
    return whole
