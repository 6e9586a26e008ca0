"""Token files and the batches drawn from them.

A token file has one of three formats, told apart by its first bytes; all numbers are little-endian:

    ours       64 bytes (magic, version, bytes per token, count, sha256 of the tokenizer), then uint16 or uint32 ids
    llm.c's    256 int32 (magic 20240520, version, count), then uint16 ids; with magic 20240801 uint32 ids
    nanoGPT's  uint16 ids and nothing else

`meta.json` beside it, if there is one, lists its size and sha256 (see train/prepare.py), so that a damaged file is
refused. A large split has several files, `train-00000.bin` and so on.

    tokens = load_tokens("data/shakespeare_char/train.bin", vocab_size=65, block_size=256)
    batches = Batches(tokens, batch_size=64, block_size=256, seed=1337, device="cuda")
    x, y = next(batches)                       # both (64, 256) int64; y[:, t] follows x[:, t]
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast.errors import UserError
from gptfast.tokenizer import LARGEST_VOCAB, read_meta

IN_MEMORY_BYTES = 64 * 2**20  # up to this size a split is loaded as int64 (2 to 4 times its size); beyond, it is mapped
CHECKED_BLOCKS, CHECKED_BLOCK = 256, 16_384  # blocks checked in a mapped file, and tokens in each (8 MiB in all)

MAGIC, VERSION = b"gptokens", 1
HEADER = struct.Struct("<8sIIQ32s8x")  # magic, version, bytes per token, count, sha256 of the tokenizer
LLMC_HEADER = struct.Struct("<iii1012x")  # magic, version, count
LLMC = {20240520: (1, 2), 20240801: (7, 4)}  # magic: version, bytes per token


@dataclass(frozen=True)
class Shards:
    """The tokens of several files as one split of len() tokens. No window crosses from one file to the next."""

    parts: Sequence[Tensor]  # each (len,), all of one dtype
    paths: Sequence[Path] = ()  # of the parts; empty if every id was checked on opening
    vocab_size: int | None = None  # exclusive bound of their ids

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def check(self, ids: Tensor) -> None:
        """Checks ids just read from the parts against vocab_size. Raises UserError that names the file."""
        if self.vocab_size is None or not self.paths or not ids.numel():
            return
        smallest, largest = (int(bound) for bound in ids.aminmax())
        if smallest < 0 or largest >= self.vocab_size:
            stray = _unsigned(smallest if smallest < 0 else largest)
            path = next((path for path, part in zip(self.paths, self.parts, strict=True) if _holds(part, stray)), None)
            raise _no_such_id(path or self.paths[0], stray, self.vocab_size)


Tokens = Tensor | Shards


def parts_of(tokens: Tokens) -> Sequence[Tensor]:
    """Returns the tensors (len,) that the tokens consist of, one per file."""
    return tokens.parts if isinstance(tokens, Shards) else [tokens]


@dataclass(frozen=True)
class TokenFile:
    """The header of a token file."""

    path: Path
    offset_bytes: int  # of the first token
    itemsize: int  # bytes per token, 2 or 4
    count: int  # tokens
    tokenizer: str | None  # fingerprint of the tokenizer, or None where the format states none

    def map(self) -> Tensor:
        """Returns its tokens (count,) mapped from the disk: uint16, or int32 for uint32 ids, all below 2^31."""
        dtype = torch.uint16 if self.itemsize == 2 else torch.int32
        skipped = self.offset_bytes // self.itemsize
        return torch.from_file(str(self.path), shared=False, size=skipped + self.count, dtype=dtype)[skipped:]


def header(count: int, vocab_size: int, fingerprint: str) -> bytes:
    """Returns the 64-byte header of our token files, for `count` tokens of the tokenizer with this fingerprint."""
    return HEADER.pack(MAGIC, VERSION, itemsize(vocab_size), count, bytes.fromhex(fingerprint))


def itemsize(vocab_size: int) -> int:
    """Returns the bytes per token in a file: 2, or 4 where ids do not fit 16 bits."""
    return 2 if vocab_size <= LARGEST_VOCAB else 4


def inspect(path: str | Path) -> TokenFile:
    """Reads the header of a token file and checks it against the file's size. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no token file {path}; make it: {_prepare(path)}")
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise _damaged(path, "it is empty")
    with path.open("rb") as file:
        start = file.read(LLMC_HEADER.size)
    tokens = _ours(path, start) or _llmc(path, start)
    if tokens is None:
        if size_bytes % 2:
            raise _damaged(path, f"its size of {size_bytes} bytes is odd, and a token has 2")
        return TokenFile(path, 0, 2, size_bytes // 2, None)
    expected_bytes = tokens.offset_bytes + tokens.itemsize * tokens.count
    if size_bytes != expected_bytes:
        raise _damaged(path, f"it has {size_bytes} bytes, and its {tokens.count} tokens take {expected_bytes}")
    if tokens.count == 0:
        raise _damaged(path, "it has no tokens")
    return tokens


def load_tokens(path: str | Path, vocab_size: int | None = None, block_size: int | None = None) -> Tokens:
    """Loads the tokens of a split from `train.bin`, or if that is missing from its files in order (see of_split).

    They are (len,) int64 in memory up to IN_MEMORY_BYTES, mapped from the disk beyond (see TokenFile.map). A split in
    memory is checked completely: size and sha256 against meta.json if listed there, every id against `vocab_size`, the
    length against `block_size`. Of a mapped one the size and the ids of evenly spaced blocks are checked, so that a
    large data set opens at once, and the ids of every batch. Raises UserError that names the file and the fix.
    """
    path = Path(path)
    meta = (read_meta(path.parent) if path.parent.is_dir() else None) or {}
    paths = [path] if path.is_file() else _shard_paths(path, meta)
    files = [inspect(shard) for shard in paths]
    for file in files:
        _check_manifest(file, meta)
    if len({file.itemsize for file in files}) > 1:
        raise UserError(f"the {path.stem} files of {path.parent} differ in bytes per token; prepare them again")
    is_small = sum(file.count * file.itemsize for file in files) <= IN_MEMORY_BYTES
    parts = [_read(file, meta) if is_small else file.map() for file in files]
    if vocab_size is not None:
        for file, part in zip(files, parts, strict=True):
            largest = _largest(part) if is_small else _sampled_largest(file)
            if largest >= vocab_size:
                raise _no_such_id(file.path, largest, vocab_size)
    tokens: Tokens = parts[0] if len(parts) == 1 else Shards(parts)
    if not is_small and vocab_size is not None:
        tokens = Shards(parts, [file.path for file in files], vocab_size)
    if block_size is not None:
        _check_length(tokens, block_size, str(path))
    return tokens


class Batches:
    """An endless iterator of random windows: `x, y = next(batches)`, both (batch_size, block_size) int64 on `device`.

    Windows start at `randint(len(tokens) - block_size, (batch_size,))`, as in nanoGPT, from a generator of its own: no
    other random numbers change the data, and `state_dict()` resumes at the exact next batch. With several files, every
    window is equally likely. On CUDA the batch is copied from pinned memory without blocking the host. Each of `ranks`
    iterators with one seed takes every ranks-th batch of the stream of a single iterator; all have the same state, from
    which any number of them can continue.
    """

    def __init__(
        self, tokens: Tokens, batch_size: int, block_size: int, *, seed: int = 1337, device: str | torch.device = "cpu",
        rank: int = 0, ranks: int = 1,
    ) -> None:  # fmt: skip
        _check_length(tokens, block_size, "the data")
        self._shards = tokens if isinstance(tokens, Shards) else None
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; set --batch_size to 1 or more")
        self.batch_size = batch_size
        self.block_size = block_size
        self.device = torch.device(device)
        self.rank, self.ranks = rank, ranks
        parts = [part for part in parts_of(tokens) if len(part) > block_size]
        self._windows = [
            part.unfold(0, block_size, 1) for part in parts
        ]  # (len - block_size + 1, block_size): no copies
        self._ends = torch.tensor([len(part) - block_size for part in parts]).cumsum(0)
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        starts = torch.randint(int(self._ends[-1]), (self.ranks, self.batch_size), generator=self._generator)
        x, y = self._gather(starts[self.rank])
        if self._shards is not None:
            x, y = checked(self._shards, x, y)
        return to_device(x, self.device), to_device(y, self.device)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the stream of batches, as a tensor (5056,) uint8, for `load_state_dict`."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])

    def _gather(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the windows at `start` (batch_size,), counted over all files, and the windows one token later."""
        if len(self._windows) == 1:
            # For two contiguous tensors, two gathers beat slicing one gather of block_size + 1.
            return self._windows[0].index_select(0, start), self._windows[0].index_select(0, start + 1)
        file = torch.bucketize(start, self._ends, right=True)
        first = torch.cat([self._ends.new_zeros(1), self._ends])[file]
        places = list(zip(file.tolist(), (start - first).tolist(), strict=True))
        x = torch.stack([self._windows[i][row] for i, row in places])
        return x, torch.stack([self._windows[i][row + 1] for i, row in places])


def to_device(rows: Tensor, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Copies token rows to `device` as `dtype`; to CUDA from pinned memory, without blocking the host."""
    if device.type != "cuda":
        return rows.to(device, dtype)
    # Pinned pages come from torch's caching allocator, which reuses them only when the copy is over.
    return rows.to(dtype).pin_memory().to(device, non_blocking=True)


def whole_split(
    tokens: Tokens, block_size: int, *, batch_size: int = 1, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every window of a split once, in order and without overlap: x, y (b, block_size) int64.

    There are (len(tokens) - 1) // block_size windows: 1742 of 64 in tinyshakespeare's val. b is `batch_size`, except
    for a smaller last batch, so a mean over the split must weight each batch by `len(x)`. Tokens after the last
    complete window of a file are left out. Raises UserError if no window fits.
    """
    _check_length(tokens, block_size, "the data")
    windows = [_in_order(part, block_size) for part in parts_of(tokens)]
    rows = (
        (x[first : first + batch_size], y[first : first + batch_size])
        for x, y in windows
        for first in range(0, len(x), batch_size)
    )
    if isinstance(tokens, Shards):
        rows = (checked(tokens, x, y) for x, y in rows)
    return ((x.to(device, torch.int64), y.to(device, torch.int64)) for x, y in rows)


def checked(tokens: Shards, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows of the tokens (B, T) as int64, after checking them against the vocabulary."""
    x, y = x.to(torch.int64), y.to(torch.int64)
    tokens.check(x)
    tokens.check(y[:, -1])
    return x, y


def count_windows(tokens: Tokens, block_size: int) -> int:
    """Returns how many windows `whole_split` yields in all."""
    return sum(len(_in_order(part, block_size)[0]) for part in parts_of(tokens))


def _in_order(tokens: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Returns the windows of one file: x, y (count, block_size), views."""
    count = max(len(tokens) - 1, 0) // block_size
    x = tokens[: count * block_size].view(count, block_size)
    return x, tokens[1 : count * block_size + 1].view(count, block_size)


def _ours(path: Path, start: bytes) -> TokenFile | None:
    """Returns the file if it has our header."""
    if not start.startswith(MAGIC):
        return None
    if len(start) < HEADER.size:
        raise _damaged(path, f"it ends within its header, after {len(start)} bytes")
    _, version, itemsize, count, tokenizer = HEADER.unpack(start[: HEADER.size])
    if version != VERSION:
        raise UserError(f"{path} is of version {version}, and this gptfast reads {VERSION}; prepare it again")
    if itemsize not in (2, 4):
        raise _damaged(path, f"its header states {itemsize} bytes per token, not 2 or 4")
    return TokenFile(path, HEADER.size, itemsize, count, tokenizer.hex())


def _llmc(path: Path, start: bytes) -> TokenFile | None:
    """Returns the file if it has llm.c's header."""
    if len(start) < LLMC_HEADER.size:
        return None
    magic, version, count = LLMC_HEADER.unpack(start)
    if magic not in LLMC:
        return None
    supported, itemsize = LLMC[magic]
    if version != supported:
        raise UserError(
            f"{path} is of llm.c's version {version}, and gptfast reads {supported}; fetch one of that version"
        )
    return TokenFile(path, LLMC_HEADER.size, itemsize, count, None)


def _shard_paths(path: Path, meta: dict[str, Any]) -> list[Path]:
    """Returns the files of a split that has no file `path`; all those that meta.json lists must exist."""
    names = [name for name in meta.get("files", {}) if of_split(name, path.stem)]
    if not names and path.parent.is_dir():
        names = [file.name for file in path.parent.iterdir() if of_split(file.name, path.stem)]
    paths = sorted(path.parent / name for name in names)
    if not paths:
        raise UserError(f"no token file {path}; make it: {_prepare(path)}")
    return paths


def of_split(name: str, split: str) -> bool:
    """Returns whether a file name belongs to the split: train-00000.bin, any_train.bin, fineweb_train_000001.bin.

    The split must be a whole word, and the last one except for a number: retrieval_train.bin belongs to train, not val.
    """
    return re.search(rf"(?:^|[\W_]){re.escape(split)}(?:[-_.]?[0-9]+)?\.bin$", name) is not None


def _check_manifest(file: TokenFile, meta: dict[str, Any]) -> None:
    """Checks a file's size and tokenizer against meta.json."""
    if file.tokenizer is not None and not meta:
        raise UserError(f"{file.path.parent} has no meta.json: it is not finished; go on: {_prepare(file.path)}")
    if file.tokenizer not in (None, meta.get("fingerprint")):
        raise UserError(
            f"{file.path} is of another tokenizer than the one of meta.json; prepare it again: {_prepare(file.path)}"
        )
    expected, size_bytes = _expected(file.path, meta), file.path.stat().st_size
    if expected.get("bytes", size_bytes) != size_bytes:
        raise _damaged(file.path, f"it has {size_bytes} bytes, not the {expected['bytes']} of meta.json")
    if expected.get("tokens", file.count) != file.count:
        raise _damaged(file.path, f"it does not begin as a token file of {expected['tokens']} tokens does")


def _read(file: TokenFile, meta: dict[str, Any]) -> Tensor:
    """Reads the tokens into memory, (count,) int64, after checking the sha256 that meta.json lists."""
    content = bytearray(file.path.read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    if _expected(file.path, meta).get("sha256", digest) != digest:
        raise _damaged(file.path, "its sha256 is not the one of meta.json")
    dtype = torch.uint16 if file.itemsize == 2 else torch.int32
    return torch.frombuffer(content, dtype=dtype, offset=file.offset_bytes).to(torch.int64)


def _expected(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry of this file in meta.json: `bytes`, `sha256` and perhaps `tokens`; empty without one."""
    files = meta.get("files", {})
    entry = files.get(path.name, {}) if isinstance(files, dict) else {}
    return entry if isinstance(entry, dict) else {}


def _largest(part: Tensor) -> int:
    """Returns the largest id of tokens in memory; an id of 2^31 or more was read as a negative number."""
    smallest = int(part.min())
    return _unsigned(smallest) if smallest < 0 else int(part.max())


def _unsigned(token: int) -> int:
    """Returns the uint32 id that was read as an int32."""
    return token + 2**32 if token < 0 else token


def _holds(part: Tensor, token: int) -> bool:
    """Returns whether an id is in a file; searches block by block, as the file may be larger than memory."""
    stored = token - 2**32 if token >= 2**31 else token
    return any(bool((block.to(torch.int64) == stored).any()) for block in part.split(2**24))


def _no_such_id(path: Path, token: int, vocab_size: int) -> UserError:
    return UserError(
        f"{path} has token id {token}, but vocab_size is {vocab_size}; "
        "prepare the data with this model's tokenizer, or train a model of a larger vocabulary"
    )


def _sampled_largest(file: TokenFile) -> int:
    """Returns the largest id in evenly spaced blocks, both ends included; reads them, which is faster than mapping."""
    dtype = f"<u{file.itemsize}"
    places = np.linspace(0, max(file.count - CHECKED_BLOCK, 0), CHECKED_BLOCKS).astype(np.int64).tolist()
    return max(
        int(np.fromfile(file.path, dtype, CHECKED_BLOCK, offset=file.offset_bytes + first * file.itemsize).max())
        for first in places
    )


def _check_length(tokens: Tokens, block_size: int, name: str) -> None:
    if block_size < 1:
        raise UserError(f"block_size is {block_size}; set --block_size to 1 or more")
    longest = max(map(len, parts_of(tokens)))
    if longest <= block_size:
        raise UserError(
            f"{name} has {longest} tokens, too few for block_size {block_size}; "
            f"set --block_size to {max(longest - 1, 1)} or less, or prepare more text"
        )


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}; prepare it again: {_prepare(path)}")


def _prepare(path: Path) -> str:
    """Returns the command that prepares the data set of this file."""
    root = "" if path.parent.parent == Path("data") else f" --data_dir {path.parent.parent}"
    return f"python -m train.prepare {path.parent.name}{root}"
