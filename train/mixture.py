"""Mixes the conversations of several tasks for fine-tuning, each repeated as asked, and packs them uncropped in rows.

    mixture = Mixture([Part("gsm8k", examples, 4.0), Part("identity", others, 1.0)], seed=1)
    batches = ConversationBatches(mixture, chat, batch_size=8, block_size=2048, device="cuda", rank=0, ranks=8)
    x, y, cu_seqlens = next(batches)                   # as in gptfast.packing; y is -1 where there is no target

An epoch takes the conversations of each part `repeats` times, in an order that seed and epoch determine. With
fractional repeats, a part continues where the previous epoch stopped, so that every conversation is used equally often.

Rows are packed best-fit: first the oldest conversation of a buffer, then always the longest that still fits, then BOS
tokens as padding, which are no targets. None is cropped. A conversation longer than a row is either dropped or split
over rows, each but the first with a BOS in front; `counts` tells how many. A conversation without a target is left out
and counted, so that every batch has targets and no loss is 0 / 0. cu_seqlens keep conversations apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptfast.chat.conversation import Chat
from gptfast.errors import UserError
from gptfast.model import IGNORED
from gptfast.packing import Prefetched
from gptfast.untrusted import count
from train.tasks import Example, Where, find

BUFFER = 100  # pieces of conversations to choose from
COUNTED = ("taken", "split", "dropped", "unlearnt", "targets", "rows")
Long = Literal["split", "drop"]


@dataclass(frozen=True)
class Part:
    """Conversations, and how often an epoch takes each of them: 2.0 takes each twice, 0.5 every other one."""

    name: str
    examples: Sequence[Example]
    repeats: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.examples):
            raise UserError(f"{self.name} has no conversations; leave it out of the mixture, or give other data")
        if not 0 < self.repeats < float("inf"):
            raise UserError(f"{self.name}*{self.repeats}: repeats must be above 0")

    @property
    def per_epoch(self) -> int:
        return max(1, round(self.repeats * len(self.examples)))


class Mixture:
    """Several parts, merged into one order of conversations per epoch."""

    def __init__(self, parts: Sequence[Part], seed: int = 0) -> None:
        if not parts:
            raise UserError("a mixture needs a part: a task's name, or jsonl:PATH")
        self.parts, self.seed = list(parts), seed

    def __len__(self) -> int:
        """Conversations in an epoch."""
        return sum(part.per_epoch for part in self.parts)

    def order(self, epoch: int) -> np.ndarray:
        """Returns (len, 2) int64: the part, and the conversation within it, in the order of this epoch."""
        orders = []
        for number, part in enumerate(self.parts):
            position = epoch * part.per_epoch + np.arange(part.per_epoch)
            rounds, within = np.divmod(position, len(part.examples))
            which = np.empty(len(position), np.int64)
            for round_number in np.unique(rounds):  # a round takes each conversation of the part once
                shuffled = np.random.default_rng((self.seed, number, int(round_number))).permutation(len(part.examples))
                which[rounds == round_number] = shuffled[within[rounds == round_number]]
            orders.append(np.stack((np.full_like(which, number), which), axis=1))
        together = np.concatenate(orders)
        return together[np.random.default_rng((self.seed, len(self.parts), epoch)).permutation(len(together))]

    def example(self, part: int, index: int) -> Example:
        return self.parts[part].examples[index]

    def describe(self) -> str:
        """Returns a line for each part with its share of an epoch."""
        return "\n".join(
            f"  {part.name}: {len(part.examples):,} conversations x {part.repeats:g}, "
            f"{100 * part.per_epoch / len(self):.1f} % of an epoch"
            for part in self.parts
        )


def read_mixture(text: str, where: Where, seed: int, split: str = "train") -> Mixture:
    """Parses a mixture such as `gsm8k*4,identity,jsonl:mine.jsonl*2`. Raises UserError for a malformed list."""
    parts = []
    for word in filter(None, map(str.strip, text.split(","))):
        name, star, times = word.rpartition("*")
        try:
            repeats = float(times) if star else 1.0
        except ValueError:
            raise UserError(f"{word}: expected NAME or NAME*REPEATS, such as gsm8k*4") from None
        name = name if star else word
        parts.append(Part(name, find(name).examples(split, where), repeats))
    return Mixture(parts, seed)


class Piece(NamedTuple):
    """A unit of packing: a conversation or, if that is longer than a row, a part of it."""

    part: int
    which: int  # of the conversations
    number: int  # which piece of the conversation
    length: int  # tokens


class ConversationBatches(Prefetched):
    """Batches of a mixture's conversations. Raises UserError if there is no target at all."""

    def __init__(
        self, mixture: Mixture, chat: Chat, batch_size: int, block_size: int, *, rank: int = 0, ranks: int = 1,
        device: str | torch.device = "cpu", long: Long = "split", prefetch: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, block_size, rank, ranks, device, prefetch)
        self.mixture, self.chat, self.long = mixture, chat, long
        self._begin({"epoch": 0, "place": 0, "buffer": [], "counts": dict.fromkeys(COUNTED, 0)})

    @property
    def progress(self) -> float:
        """Returns the epochs up to the last batch, as a fraction."""
        return self._state["epoch"] + self._state["place"] / len(self.mixture)

    @property
    def counts(self) -> dict[str, int]:
        """Returns counts up to the last batch, over all ranks: conversations taken, split, dropped, without a target
        (unlearnt); targets; rows."""
        return dict(self._state["counts"])

    def _identity(self) -> dict[str, Any]:
        parts = [[part.name, len(part.examples), part.repeats] for part in self.mixture.parts]
        return {"mixture": parts, "seed": self.mixture.seed, "block_size": self.block_size, "long": self.long}

    def _restore(self, state: dict[str, Any]) -> None:
        self._epoch, self._place = count(state["epoch"]), count(state["place"])
        self._counts = {name: count(state["counts"][name]) for name in COUNTED}
        self._order = self.mixture.order(self._epoch)
        self._rendered: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}
        self._buffer = [Piece(*map(count, piece)) for piece in state["buffer"]]
        if self._place > len(self._order):
            raise ValueError(f"{self._place:,} conversations were taken, where an epoch has {len(self._order):,}")
        for piece in self._buffer:
            if piece.length != len(self._pieces(piece.part, piece.which)[piece.number][0]):
                raise ValueError(f"a conversation that waits has another length than {piece.length}")

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = rows[0, :, :-1].contiguous(), rows[1, :, 1:].contiguous()
        is_start = rows[2, :, :-1].flatten().nonzero().flatten()
        return x, y, torch.cat((is_start, is_start.new_tensor([x.numel()])))

    # ---- from here on, all runs in the thread

    def _pack_batch(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns ids, targets, 1 at document starts (3, batch_size, block_size + 1) int64; and the state after."""
        rows = np.empty((3, self.batch_size, self.block_size + 1), np.int64)
        for rank in range(self.ranks):
            rows[0], rows[1], rows[2] = self.chat.bos, IGNORED, 0
            filled = rows if rank == self.rank else rows.copy()
            for i in range(self.batch_size):
                self._pack_row(*filled[:, i])
            if rank == self.rank:
                mine = filled.copy()
        state = {
            "epoch": self._epoch, "place": self._place, "buffer": [list(piece) for piece in self._buffer],
            "counts": dict(self._counts),
        }  # fmt: skip
        return mine, state

    def _pack_row(self, ids: np.ndarray, targets: np.ndarray, starts: np.ndarray) -> None:
        """Fills a padded row (block_size + 1,) best-fit; what remains of the padding counts as a document too."""
        filled = 0
        while True:
            self._fill_buffer()
            fitting = [piece for piece in self._buffer if piece.length <= len(ids) - filled]
            if not fitting:
                break
            # The oldest begins a row, else short pieces would only ever fill gaps and never stand without context.
            piece = max(fitting, key=lambda piece: piece.length) if filled else self._buffer[0]
            self._buffer.remove(piece)
            tokens, mask = self._pieces(piece.part, piece.which)[piece.number]
            end = filled + piece.length
            ids[filled:end] = tokens
            starts[filled] = 1
            targets[filled:end] = np.where(mask, tokens, IGNORED)
            self._counts["targets"] += sum(mask)
            self._forget(piece)
            filled = end
            if not self._buffer and self._place == len(self._order):
                break  # the next epoch begins in a row of its own
        starts[filled : filled + 1] = 1
        self._counts["rows"] += 1

    def _fill_buffer(self) -> None:
        """Fills the buffer, up to the end of the epoch; the next epoch begins with an empty buffer."""
        if not self._buffer and self._place == len(self._order):
            self._epoch, self._place = self._epoch + 1, 0
            self._order = self.mixture.order(self._epoch)
        learnt = self._counts["taken"] - self._counts["dropped"] - self._counts["unlearnt"]
        while len(self._buffer) < BUFFER and self._place < len(self._order):
            part, index = map(int, self._order[self._place])
            self._place += 1
            self._counts["taken"] += 1
            pieces = self._pieces(part, index)
            wanted = [(number, ids) for number, (ids, mask) in enumerate(pieces) if any(mask)]
            if not wanted or (self.long == "drop" and len(pieces) > 1):
                self._counts["dropped" if wanted else "unlearnt"] += 1
                self._rendered.pop((part, index), None)
                continue
            self._counts["split"] += len(pieces) > 1
            self._buffer += [Piece(part, index, number, len(ids)) for number, ids in wanted]
        if not self._buffer:
            if not learnt:
                raise UserError(
                    f"nothing to learn in {len(self._order):,} conversations: none has an assistant's words that fit "
                    f"a row of {self.block_size} tokens; give others, a larger --block_size, or --long=split"
                )
            self._fill_buffer()  # the rest of the epoch had no targets

    def _pieces(self, part: int, index: int) -> list[tuple[list[int], list[int]]]:
        """Returns ids and mask of each piece of a conversation. Over all pieces, each learnt id is a target once."""
        pieces = self._rendered.get((part, index))
        if pieces is None:
            ids, mask = self.chat.render(self.mixture.example(part, index).messages)
            width, inside = self.block_size + 1, self.block_size
            pieces = [(ids[:width], mask[:width])]
            for first in range(width, len(ids), inside):
                last = first + inside
                pieces.append(([self.chat.bos, *ids[first:last]], [0, *mask[first:last]]))
            self._rendered[part, index] = pieces
        return pieces

    def _forget(self, piece: Piece) -> None:
        """Drops a rendered conversation once no piece of it waits in the buffer."""
        if not any((waiting.part, waiting.which) == (piece.part, piece.which) for waiting in self._buffer):
            self._rendered.pop((piece.part, piece.which), None)
