"""Rows packed with whole documents, each of which attends to itself alone.

    batches = PackedBatches(tokens, batch_size=32, block_size=2048, bos=tokenizer.bos, rank=0, world=8, device="cuda")
    x, y, cu_seqlens = next(batches)

A row of block_size + 1 tokens is filled with documents, each with its BOS in front: always the longest of a buffer of
documents that still fits, and when none does, the shortest, cropped to what is left of the row. So every row begins
with a BOS, none is padded, and at most the last document of each row lacks its end. Best-fit packing: Ding et al.,
arXiv:2404.10830; crops in place of padding: nanochat.

A document longer than a row is cut into rows of its own first, each but the last full, with a BOS in front of each: all
its tokens are targets once. Tokens that crops drop are counted in `cropped`.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptfast.cli import UserError
from gptfast.data import Tokens, parts_of, to_device

# Pieces to choose from. Of log-normal documents of 600 tokens on average, crops drop 4 % of the tokens at a block_size
# of 1024 and 2 % at 2048; a tenth of the buffer drops a fifth more. One core packs 30 million tokens per second.
BUFFER = 1000
SCANNED = 2**20  # tokens looked at in one go for the BOS that ends a document


class PackedBatch(NamedTuple):
    x: Tensor  # (batch_size, block_size) int64
    y: Tensor  # (batch_size, block_size) int64, the token that follows each of x; at a document's end, a BOS
    cu_seqlens: Tensor  # (documents + 1,) int32: where each starts in x.flatten(), and batch_size * block_size


class Piece(NamedTuple):
    """A document, or as much of one as fits a row: `length` tokens after a BOS. Sorts by length, then newest first."""

    length: int
    newness: int  # minus the number of pieces read before it
    part: int  # which file
    start: int  # its first token there


class PackedBatches:
    """An endless iterator of PackedBatch over the documents of `tokens`, which a token `bos` separates.

    Of every `world` pieces, in the order of the files, a loader takes the one at `rank`: ranks share nothing, and
    together they have everything. A thread prepares the next batches while the last one is in use. `state_dict()` is of
    plain ints and lists of them; a loader that loads it gives the very next batch. Raises UserError if there is no
    document for this rank.
    """

    def __init__(
        self, tokens: Tokens, batch_size: int, block_size: int, *, bos: int, rank: int = 0, world: int = 1,
        device: str | torch.device = "cpu", prefetch: int = 2,
    ) -> None:  # fmt: skip
        for name, value in (("batch_size", batch_size), ("block_size", block_size)):
            if value < 1:
                raise UserError(f"{name} is {value}; set --{name} to 1 or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}, of {world} ranks; expected 0 ... {world - 1}")
        self.batch_size, self.block_size, self.bos, self.rank, self.world = batch_size, block_size, bos, rank, world
        self.device = torch.device(device)
        self._parts = [part.numpy() for part in parts_of(tokens)]
        self._size = len(tokens)
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="packing")
        self._waiting: deque[Future[tuple[Tensor, dict[str, Any]]]] = deque()
        self._begin({"epoch": 0, "part": 0, "offset": 0, "index": 0, "read": 0, "cropped": 0, "buffer": []})

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> PackedBatch:
        rows, self._state = self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._pack_batch))
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        starts = (x.flatten() == self.bos).nonzero().flatten()
        cu_seqlens = torch.cat([starts, starts.new_tensor([x.numel()])])
        return PackedBatch(
            to_device(x, self.device), to_device(y, self.device), to_device(cu_seqlens, self.device, torch.int32)
        )

    @property
    def epoch(self) -> int:
        """How often all documents had been read when the last batch was packed."""
        return self._state["epoch"]

    @property
    def cropped(self) -> int:
        """How many tokens crops have dropped up to the last batch."""
        return self._state["cropped"]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was taken, however many are prepared."""
        buffer = [list(piece) for piece in self._state["buffer"]]
        return {**self._state, "buffer": buffer, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for a state of other data, other sizes, or another share of the ranks."""
        for name, value in self._identity().items():
            if state[name] != value:
                raise UserError(f"the place in the data was saved with {name} {state[name]}, and this is {value}")
        self._begin({name: value for name, value in state.items() if name not in self._identity()})

    def _identity(self) -> dict[str, int]:
        """What a state is valid for."""
        return {
            "tokens": self._size, "bos": self.bos, "block_size": self.block_size, "rank": self.rank,
            "world": self.world,
        }  # fmt: skip

    # ---- from here on, all but _begin runs in the thread

    def _begin(self, state: dict[str, Any]) -> None:
        """Starts over at `state`, and has the first batches prepared."""
        while self._waiting:  # the thread must be idle before what it works on is replaced
            future = self._waiting.popleft()
            if not future.cancel():
                future.exception()
        self._state = state
        self._epoch, self._part, self._offset = state["epoch"], state["part"], state["offset"]
        self._index, self._read, self._cropped = state["index"], state["read"], state["cropped"]
        self._buffer = [Piece(*piece) for piece in state["buffer"]]  # sorted
        self._unread = self._pieces()
        if not self._buffer:
            self._take()
        self._waiting.extend(self._thread.submit(self._pack_batch) for _ in range(self._prefetch))

    def _pack_batch(self) -> tuple[Tensor, dict[str, Any]]:
        rows = np.stack([self._pack_row() for _ in range(self.batch_size)])
        state = {
            "epoch": self._epoch, "part": self._part, "offset": self._offset, "index": self._index,
            "read": self._read, "cropped": self._cropped, "buffer": self._buffer.copy(),
        }  # fmt: skip
        return torch.from_numpy(rows), state

    def _pack_row(self) -> np.ndarray:
        """(block_size + 1,) int64."""
        row = np.empty(self.block_size + 1, np.int64)
        filled = 0
        while filled < len(row):
            row[filled] = self.bos
            space = len(row) - filled - 1
            if space == 0:  # the BOS of whatever comes next ends the row, so that no document is spent on it
                break
            while len(self._buffer) < BUFFER:
                self._take()
            fitting = bisect_right(self._buffer, space, key=lambda piece: piece.length)
            piece = self._buffer.pop(max(fitting - 1, 0))
            length = min(piece.length, space)
            row[filled + 1 : filled + 1 + length] = self._parts[piece.part][piece.start : piece.start + length]
            self._cropped += piece.length - length
            filled += 1 + length
        return row

    def _take(self) -> None:
        """Puts the next piece into the buffer, and notes where reading goes on."""
        self._index, piece = next(self._unread)
        self._part, self._offset = piece.part, piece.start + piece.length
        self._read += 1
        insort(self._buffer, piece)

    def _pieces(self) -> Iterator[tuple[int, Piece]]:
        """This rank's pieces from the present place on, over and over, each with the index of the one after it."""
        begun, offset, index = self._part, self._offset, self._index
        while True:
            is_whole, read_before = (begun, offset) == (0, 0), self._read
            for part in range(begun, len(self._parts)):
                for start, stop in _bodies(self._parts[part], self.bos, offset):
                    for first in range(start, stop, self.block_size):
                        index += 1
                        if (index - 1) % self.world == self.rank:
                            yield index, Piece(min(self.block_size, stop - first), -self._read, part, first)
                offset = 0
            if is_whole and self._read == read_before:
                raise UserError(
                    f"the data has {index} documents, and none for rank {self.rank} of {self.world}; "
                    "prepare more text, or use fewer ranks"
                )
            begun = index = 0
            self._epoch += 1


def _bodies(tokens: np.ndarray, bos: int, offset: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of tokens without `bos`, from `offset` on."""
    start = offset
    for block in range(offset, len(tokens), SCANNED):
        for stop in (block + np.flatnonzero(tokens[block : block + SCANNED] == bos)).tolist():
            if stop > start:
                yield start, stop
            start = stop + 1
    if start < len(tokens):
        yield start, len(tokens)
