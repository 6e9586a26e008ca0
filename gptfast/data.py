"""Token files and the batches drawn from them.

A token file is nanoGPT's: uint16 little-endian ids and nothing else. `meta.json` beside it, if there is one, tells its
size and sha256 (see train/prepare.py), so that a damaged file is refused instead of trained on.

    tokens = load_tokens("data/shakespeare_char/train.bin", vocab_size=65, block_size=256)
    batches = Batches(tokens, batch_size=64, block_size=256, seed=1337, device="cuda")
    x, y = next(batches)                       # both (64, 256) int64; y[:, t] follows x[:, t]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.cli import UserError
from gptfast.tokenizer import read_meta

IN_MEMORY_BYTES = 64 * 2**20  # a file up to this size is held as int64, 4 times its size; a larger one is mapped
CHECKED_BLOCKS, CHECKED_BLOCK = 256, 16_384  # of a mapped file: blocks looked at, tokens in each (8 MiB in all)


def load_tokens(path: str | Path, vocab_size: int | None = None, block_size: int | None = None) -> Tensor:
    """The tokens of a file, (len,): int64 in memory up to IN_MEMORY_BYTES, uint16 mapped from the disk beyond.

    A file in memory is checked whole: size and sha256 against meta.json where it lists them, every id against
    `vocab_size`, the length against `block_size`. A mapped one by size and by ids of evenly spaced blocks, so that a
    large data set opens at once. Raises UserError that names the file and the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no token file {path}; make it: {_prepare(path)}")
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise _damaged(path, "it is empty")
    if size_bytes % 2:
        raise _damaged(path, f"its size of {size_bytes} bytes is odd, and a token has 2")
    expected = _expected(path)
    if expected.get("bytes", size_bytes) != size_bytes:
        raise _damaged(path, f"it has {size_bytes} bytes, not the {expected['bytes']} of meta.json")

    if size_bytes <= IN_MEMORY_BYTES:
        content = bytearray(path.read_bytes())
        digest = hashlib.sha256(content).hexdigest()
        if expected.get("sha256", digest) != digest:
            raise _damaged(path, "its sha256 is not the one of meta.json")
        tokens = torch.frombuffer(content, dtype=torch.uint16).to(torch.int64)
        largest = int(tokens.max())
    else:
        tokens = torch.from_file(str(path), shared=False, size=size_bytes // 2, dtype=torch.uint16)
        largest = _sampled_largest(tokens)
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"{path} has token id {largest}, but vocab_size is {vocab_size}; "
            f"set --vocab_size to more than {largest}, or prepare the data with this model's tokenizer"
        )
    if block_size is not None:
        _check_length(tokens, block_size, str(path))
    return tokens


class Batches:
    """An endless iterator of random windows: `x, y = next(batches)`, both (batch_size, block_size) int64 on `device`.

    Windows start at `randint(len(tokens) - block_size, (batch_size,))`, as in nanoGPT, drawn from a generator of its
    own: nothing else that draws random numbers changes the data, and `state_dict()` resumes at the exact next batch. On
    CUDA the batch travels from pinned memory without blocking the host.
    """

    def __init__(
        self, tokens: Tensor, batch_size: int, block_size: int, *, seed: int = 1337, device: str | torch.device = "cpu"
    ) -> None:
        _check_length(tokens, block_size, "the data")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; set --batch_size to 1 or more")
        self.batch_size = batch_size
        self.block_size = block_size
        self.device = torch.device(device)
        self._windows = tokens.unfold(0, block_size, 1)  # (len - block_size + 1, block_size), a view: no copies
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        start = torch.randint(len(self._windows) - 1, (self.batch_size,), generator=self._generator)
        # One gather of rows each: for two contiguous tensors this beats slicing one gather of block_size + 1.
        x = self._windows.index_select(0, start)
        y = self._windows.index_select(0, start + 1)
        return self._to_device(x), self._to_device(y)

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream of batches, as a tensor (5056,) uint8; for `load_state_dict`."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])

    def _to_device(self, window: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return window.to(self.device, torch.int64)
        # Pinned pages come from torch's caching allocator, which reuses them only when the copy is over.
        return window.to(torch.int64).pin_memory().to(self.device, non_blocking=True)


def whole_split(
    tokens: Tensor, block_size: int, *, batch_size: int = 1, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every window of a split once, in order and without overlap: x, y (b, block_size) int64.

    There are (len(tokens) - 1) // block_size windows, 1742 of 64 in tinyshakespeare's val. b is `batch_size` but for a
    smaller last batch, so a mean over the split must weigh each batch by `len(x)`. Tokens after the last whole window
    are left out. Raises UserError if not one window fits.
    """
    _check_length(tokens, block_size, "the data")
    count = (len(tokens) - 1) // block_size
    x = tokens[: count * block_size].view(count, block_size)
    y = tokens[1 : count * block_size + 1].view(count, block_size)
    return (
        (x[first : first + batch_size].to(device, torch.int64), y[first : first + batch_size].to(device, torch.int64))
        for first in range(0, count, batch_size)
    )


def _expected(path: Path) -> dict[str, Any]:
    """What meta.json says of this file: `bytes` and `sha256`, or nothing."""
    files = (read_meta(path.parent) or {}).get("files", {})
    entry = files.get(path.name, {}) if isinstance(files, dict) else {}
    return entry if isinstance(entry, dict) else {}


def _sampled_largest(tokens: Tensor) -> int:
    """The largest id in evenly spaced blocks that include the file's both ends."""
    starts = torch.linspace(0, len(tokens) - CHECKED_BLOCK, CHECKED_BLOCKS, dtype=torch.float64).long().tolist()
    return max(int(tokens[start : start + CHECKED_BLOCK].to(torch.int32).max()) for start in starts)


def _check_length(tokens: Tensor, block_size: int, name: str) -> None:
    if block_size < 1:
        raise UserError(f"block_size is {block_size}; set --block_size to 1 or more")
    if len(tokens) <= block_size:
        raise UserError(
            f"{name} has {len(tokens)} tokens, too few for block_size {block_size}; "
            f"set --block_size to {max(len(tokens) - 1, 1)} or less, or prepare more text"
        )


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}; prepare it again: {_prepare(path)}")


def _prepare(path: Path) -> str:
    """The command that makes the data set of this file."""
    root = "" if path.parent.parent == Path("data") else f" --data_dir {path.parent.parent}"
    return f"python -m train.prepare {path.parent.name}{root}"
