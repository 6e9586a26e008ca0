"""The ids of an answer to text as they come, by part: what it says, what it calls, and what came of that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gptfast.chat.conversation import ENCLOSED, Chat
from gptfast.engine.text import TextStream
from gptfast.tokenizer import Tokenizer


class Piece(NamedTuple):
    """Some more text of a part of the kind "text", "python" or "python_output"."""

    kind: str
    text: str


class PartStream:
    """The pieces of one answer. Those of a kind add up to its part, "text" to all before the first stop string.

    Stop strings are looked for in what the answer says, not in its calls. Without a `chat` all ids are text.
    """

    def __init__(self, tokenizer: Tokenizer, chat: Chat | None = None, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._special = set(chat.ids.values()) if chat else set()
        pairs = {kind: ENCLOSED[kind] for kind in ENCLOSED} if chat else {}
        self._opens = {chat.ids[first]: kind for kind, (first, _) in pairs.items()} if chat else {}
        self._closes = {kind: chat.ids[last] for kind, (_, last) in pairs.items()} if chat else {}
        self._kind, self._part = "text", TextStream(tokenizer, self._stop)
        self.stopped = False  # a stop string is complete, and nothing follows

    def says(self, i: int) -> bool:
        """Whether the id `i`, the newest, is of what the answer says."""
        return self._kind == "text" and i not in self._special

    def push(self, ids: Iterable[int]) -> list[Piece]:
        """The pieces that `ids` make certain."""
        pieces: list[Piece] = []
        for i in ids:
            if self.stopped:
                break
            if i not in self._special:
                self._add(pieces, self._part.push(i))
            elif self._kind == "text" and i in self._opens:
                self._begin(pieces, self._opens[i])
            elif i == self._closes.get(self._kind):
                self._begin(pieces, "text")
        return pieces

    def flush(self) -> list[Piece]:
        """What is left when no id follows."""
        pieces: list[Piece] = []
        if not self.stopped:
            self._add(pieces, self._part.flush())
        return pieces

    def _begin(self, pieces: list[Piece], kind: str) -> None:
        self._add(pieces, self._part.flush())
        self._kind, self._part = kind, TextStream(self._tokenizer, self._stop if kind == "text" else ())

    def _add(self, pieces: list[Piece], text: str) -> None:
        self.stopped = self._kind == "text" and self._part.stopped
        if not text:
            return
        if pieces and pieces[-1].kind == self._kind:
            text = pieces.pop().text + text
        pieces.append(Piece(self._kind, text))
