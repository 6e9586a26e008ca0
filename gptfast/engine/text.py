"""Tokens to text as they come: no character is cut in two, and nothing is shown that a stop string may still take."""

from __future__ import annotations

from collections.abc import Sequence

from gptfast.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a tokenizer makes of bytes that are not UTF-8, such as the beginning of a character

PENDING = 8  # tokens that may wait for the end of a character; more are no beginning of one


class TextStream:
    """The text of one sequence of tokens. The pieces that it gives out add up to the text before the first stop."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []  # they end within a character
        self._text = ""  # it may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` makes certain. Sets `stopped` if a stop string is complete."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(REPLACEMENT):
            return self._release(self._before_last(text)) if len(self._tokens) >= PENDING else ""
        self._tokens.clear()
        return self._release(text)

    def _before_last(self, text: str) -> str:
        """Takes off the tokens, and gives the text, before what may be the beginning of a character.

        That has at most 3 bytes, so one of the last 4 tokens begins where a character, or what is none, ends.
        """
        for first in range(len(self._tokens) - 1, 0, -1):
            certain, rest = (self._tokenizer.decode(part) for part in (self._tokens[:first], self._tokens[first:]))
            if certain + rest == text:
                del self._tokens[:first]
                return certain
        return ""

    def flush(self) -> str:
        """What is left when no token follows: half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._tokenizer.decode(self._tokens)) + self._text
        self._tokens.clear()
        self._text = ""
        return text

    def _release(self, text: str) -> str:
        self._text += text
        found = [i for i in (self._text.find(stop) for stop in self._stop) if i >= 0]
        if found:
            self.stopped = True
            certain, self._text = self._text[: min(found)], ""
            return certain
        held = max((_overlap(self._text, stop) for stop in self._stop), default=0)
        certain = self._text[: len(self._text) - held]
        self._text = self._text[len(certain) :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
