"""Packs whole documents into rows, each document attending to itself alone.

    batches = PackedBatches(tokens, batch_size=32, block_size=2048, bos=tokenizer.bos, rank=0, ranks=8, device="cuda")
    x, y, cu_seqlens = next(batches)
    loss = model(x, y, cu_seqlens)

A row of block_size + 1 tokens is filled with documents, each after its BOS: always the longest of a buffer that still
fits, and if none does, the shortest, cropped to the rest of the row. So every row begins with a BOS, none is padded,
and at most the last document of a row is cropped. Best-fit packing: Ding et al., arXiv:2404.10830; cropping instead of
padding: nanochat.

A document longer than a row is first split into pieces, each after a BOS and all but the last of a full row, so that
each of its tokens is a target once. `cropped` counts the tokens that cropping drops.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from gptfast.data import Shards, Tokens, parts_of, to_device
from gptfast.errors import UserError
from gptfast.untrusted import count

# Pieces to choose from. With log-normal document lengths of mean 600 tokens, cropping drops 4 % of the tokens at a
# block_size of 1024 and 2 % at 2048; a buffer of a tenth drops a fifth more. One core packs 30 million tokens per
# second, and plans other ranks' batches at 50 million.
BUFFER = 1000
SCANNED = 2**20  # tokens scanned at a time for the next BOS


class PackedBatch(NamedTuple):
    x: Tensor  # (batch_size, block_size) int64
    y: Tensor  # (batch_size, block_size) int64, the next token after each of x; at a document's end, a BOS
    cu_seqlens: Tensor  # (documents + 1,) int32: the start of each in x.flatten(), and batch_size * block_size


class Piece(NamedTuple):
    """A document, or a part of one that fits a row: `length` tokens after a BOS. Sorts by length, then newest first."""

    length: int
    newness: int  # minus its ordinal among all pieces read
    part: int  # which file
    start: int  # its first token in that file


class Prefetched(ABC):
    """An endless iterator of PackedBatch that a thread packs ahead; what it packs, and how, a subclass says.

    Each of `ranks` loaders takes every ranks-th batch of the stream of a single loader. All have the same state, from
    which any number of them can continue: each plans the batches of all ranks, and fills its own. `state_dict()` holds
    plain ints, words and lists of them; a loader that loads it gives the very next batch.
    """

    def __init__(
        self, batch_size: int, block_size: int, rank: int, ranks: int, device: str | torch.device, prefetch: int
    ) -> None:
        for name, value in (("batch_size", batch_size), ("block_size", block_size)):
            if value < 1:
                raise UserError(f"{name} is {value}; set --{name} to 1 or more")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}, of {ranks} ranks; expected 0 ... {ranks - 1}")
        self.batch_size, self.block_size, self.rank, self.ranks = batch_size, block_size, rank, ranks
        self.device = torch.device(device)
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="packing")
        self._waiting: deque[Future[tuple[np.ndarray, dict[str, Any]]]] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PackedBatch:
        rows, self._state = self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._pack_batch))
        x, y, starts = self._split(torch.from_numpy(rows))
        return PackedBatch(
            to_device(x, self.device), to_device(y, self.device), to_device(starts, self.device, torch.int32)
        )

    def close(self) -> None:
        """Ends the thread; there are no more batches."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def epoch(self) -> int:
        """Returns the number of passes over all data completed when the last batch was packed."""
        return self._state["epoch"]

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last batch that was taken, however many are prefetched."""
        return {**json.loads(json.dumps(self._state)), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for a state of other data or other sizes, and untrusted.STRANGE for one that is damaged."""
        for name, value in self._identity().items():
            if state[name] != value:
                raise UserError(f"the checkpoint was made with {name}={state[name]}, not {value}; set it to that")
        self._begin({name: value for name, value in state.items() if name not in self._identity()})

    def _begin(self, state: dict[str, Any]) -> None:
        """Restarts at `state`, and starts prefetching."""
        while self._waiting:  # the thread must be idle before its data are replaced
            future = self._waiting.popleft()
            if not future.cancel():
                future.exception()
        self._state = state
        self._restore(state)
        self._waiting.extend(self._thread.submit(self._pack_batch) for _ in range(self._prefetch))

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Returns the data and the sizes that a state is valid for."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Goes to `state`, while the thread is idle."""

    @abstractmethod
    def _pack_batch(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns the next rows of this rank, and the state after them. Runs in the thread."""

    @abstractmethod
    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x, y and cu_seqlens of rows that `_pack_batch` made."""


class PackedBatches(Prefetched):
    """Batches of the documents of `tokens`, which the token `bos` separates. Raises UserError if there is none."""

    def __init__(
        self, tokens: Tokens, batch_size: int, block_size: int, *, bos: int, rank: int = 0, ranks: int = 1,
        device: str | torch.device = "cpu", prefetch: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, block_size, rank, ranks, device, prefetch)
        self.bos = bos
        self._parts = [part.numpy() for part in parts_of(tokens)]
        self._shards = tokens if isinstance(tokens, Shards) else None
        self._size = len(tokens)
        self._begin({"epoch": 0, "part": 0, "offset": 0, "read": 0, "cropped": 0, "buffer": []})

    @property
    def cropped(self) -> int:
        """Returns how many tokens cropping has dropped up to the last batch."""
        return self._state["cropped"]

    def _identity(self) -> dict[str, Any]:
        return {"tokens": self._size, "bos": self.bos, "block_size": self.block_size}

    def _restore(self, state: dict[str, Any]) -> None:
        self._epoch, self._part, self._offset = count(state["epoch"]), count(state["part"]), count(state["offset"])
        self._read, self._cropped = count(state["read"]), count(state["cropped"])
        self._buffer = [Piece(*piece) for piece in state["buffer"]]
        for piece in self._buffer:
            count(piece.length), count(-piece.newness), count(piece.part), count(piece.start)
        ends = [(piece.part, piece.start + piece.length) for piece in self._buffer]
        if any(end > len(self._parts[part]) for part, end in [(self._part, self._offset), *ends]):
            raise ValueError("it has documents that end behind their file")
        if self._buffer != sorted(self._buffer):
            raise ValueError("documents that wait are in another order than by length")
        self._unread = self._pieces()
        if not self._buffer:
            self._take()

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        return x, y, document_starts(x, self.bos)

    # ---- from here on, all runs in the thread

    def _pack_batch(self) -> tuple[np.ndarray, dict[str, Any]]:
        rows = np.empty((self.batch_size, self.block_size + 1), np.int64)
        for rank in range(self.ranks):
            for row in rows:
                self._pack_row(row if rank == self.rank else None)
        if self._shards is not None:
            self._shards.check(torch.from_numpy(rows))
        state = {
            "epoch": self._epoch, "part": self._part, "offset": self._offset, "read": self._read,
            "cropped": self._cropped, "buffer": self._buffer.copy(),
        }  # fmt: skip
        return rows, state

    def _pack_row(self, row: np.ndarray | None) -> None:
        """Chooses the documents of the next row, and writes them to `row` (block_size + 1,) int64 unless it is None."""
        width, filled = self.block_size + 1, 0
        while filled < width:
            if row is not None:
                row[filled] = self.bos
            space = width - filled - 1
            if space == 0:  # a BOS alone ends the row, without using up a document
                break
            while len(self._buffer) < BUFFER:
                self._take()
            fitting = bisect_right(self._buffer, space, key=lambda piece: piece.length)
            piece = self._buffer.pop(max(fitting - 1, 0))
            length = min(piece.length, space)
            if row is not None:
                row[filled + 1 : filled + 1 + length] = self._parts[piece.part][piece.start : piece.start + length]
            self._cropped += piece.length - length
            filled += 1 + length

    def _take(self) -> None:
        """Adds the next piece to the buffer, and records where reading continues."""
        piece = next(self._unread)
        self._part, self._offset = piece.part, piece.start + piece.length
        self._read += 1
        insort(self._buffer, piece)

    def _pieces(self) -> Iterator[Piece]:
        """Yields all pieces from the current position on, in endless passes."""
        begun, offset = self._part, self._offset
        while True:
            is_whole, read_before = (begun, offset) == (0, 0), self._read
            for part in range(begun, len(self._parts)):
                for start, stop in _bodies(self._parts[part], self.bos, offset):
                    for first in range(start, stop, self.block_size):
                        yield Piece(min(self.block_size, stop - first), -self._read, part, first)
                offset = 0
            if is_whole and self._read == read_before:
                raise UserError("the data has no documents, only what begins one; prepare more text")
            begun = 0
            self._epoch += 1


def document_starts(x: Tensor, bos: int) -> Tensor:
    """Returns cu_seqlens (documents + 1,) int64 of rows x (B, T); a document starts at each row and at each `bos`."""
    starts = x == bos
    starts[:, 0] = True
    indices = starts.flatten().nonzero().flatten()
    return torch.cat([indices, indices.new_tensor([x.numel()])])


def _bodies(tokens: np.ndarray, bos: int, offset: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of each run of tokens without `bos`, from `offset` on."""
    start = offset
    for block in range(offset, len(tokens), SCANNED):
        for stop in (block + np.flatnonzero(tokens[block : block + SCANNED] == bos)).tolist():
            if stop > start:
                yield start, stop
            start = stop + 1
    if start < len(tokens):
        yield start, len(tokens)
