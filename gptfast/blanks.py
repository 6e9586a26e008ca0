"""Splits long runs of blanks as the pattern of a tokenizer does.

tiktoken's regular-expression engine fails on runs of some hundred thousand blanks. The pieces of such a run depend only
on its two ends and its last line break, so it can be merged by itself and the text around it encoded as if the run were
not there: no alternative of the known patterns looks back, and only line breaks after punctuation let a match that
begins before a run extend into it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

LONG = 4096  # shortest run that is split here; shorter ones are left to the pattern

# Unicode's White_Space, the \s of the patterns; Python's \s has four more control characters.
_BLANK = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_RUN = re.compile(f"[{_BLANK}]{{{LONG},}}")
_LONG_PIECE = re.compile(f"[{_BLANK}]{{{LONG},}}|[^{_BLANK}]{{{LONG},}}")

_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Beginnings of the known patterns -> whether their punctuation takes the line breaks after it.
_HEADS = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|": False,  # GPT-2's, as tiktoken writes it
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|": False,  # as OpenAI wrote it
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|": True,  # nanochat's
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|": True,  # GPT-4's
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|": True,
    rf"{_ENDINGS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|": True,  # Llama 3's
    rf"{_ENDINGS}|{_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|": True,  # Qwen's
    "|".join(
        [rf"{_WORD}{_UPPER}*{_LOWER}+{_ENDINGS}?", rf"{_WORD}{_UPPER}+{_LOWER}*{_ENDINGS}?", r"\p{N}{1,3}",
         r" ?[^\s\p{L}\p{N}]+[\r\n/]*", ""]
    ): True,  # o200k's
}  # fmt: skip
# Ends of the known patterns -> (a run at the end of the text is one piece, a run is cut after its last line break).
_TAILS = {
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s": (True, True),
    r"\s*[\r\n]+|\s+(?!\S)|\s+": (False, True),
    r"\s*[\r\n]|\s+(?!\S)|\s+": (False, True),
    r"\s++$|\s+(?!\S)|\s": (True, False),
    r"\s+(?!\S)|\s+": (False, False),
}


@dataclass(frozen=True)
class Blanks:
    """How a pattern treats runs of blanks."""

    takes_breaks: bool  # punctuation takes the line breaks after it
    whole_at_end: bool  # a run that ends the text is one piece
    cut_at_break: bool  # a run is cut after its last line break

    @staticmethod
    def of(pattern: str) -> Blanks | None:
        """Returns the rules of a known pattern; None for others, which split their runs themselves."""
        for head, takes_breaks in _HEADS.items():
            if pattern.startswith(head) and pattern[len(head) :] in _TAILS:
                return Blanks(takes_breaks, *_TAILS[pattern[len(head) :]])
        return None

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yields `text` in order, as parts for the pattern to split (False) and long pieces already split (True)."""
        done = 0
        for run in _RUN.finditer(text) if len(text) >= LONG else ():
            start, end = run.span()
            if self.takes_breaks and start and text[start] in "\r\n":
                kind = unicodedata.category(text[start - 1])
                if kind[0] == "M" or kind == "Cn":
                    continue  # unclear whether the pattern takes it for a letter or for punctuation
                if kind[0] not in "LN":
                    start = _after_breaks(text, start, end)
                if start == end:  # all of the run belongs to the punctuation, perhaps with more after it
                    continue
            cuts = [start, *self._cuts(text, start, end)]
            yield text[done:start], False
            yield from ((text[first:last], True) for first, last in pairwise(cuts) if first < last)
            done = cuts[-1]
        yield text[done:], False

    def _cuts(self, text: str, start: int, end: int) -> Iterator[int]:
        """Yields the ends of a run's pieces; the rest after the last is left to the pattern."""
        at_end = end == len(text)
        if at_end and self.whole_at_end:
            yield end
            return
        if self.cut_at_break:
            last = max(text.rfind(char, start, end) for char in "\r\n")
            if last >= 0:
                start = last + 1
                yield start
        yield end if at_end else max(start, end - 1)  # the last blank may belong to the word after it


def _after_breaks(text: str, start: int, end: int) -> int:
    while start < end and text[start] in "\r\n":
        start += 1
    return start


def shortened(text: str) -> Iterator[str]:
    """Yields `text` in parts of which no run of blanks, or of anything else, is longer than LONG.

    It is for counting pieces, not for encoding.
    """
    done = 0
    for run in _LONG_PIECE.finditer(text) if len(text) >= LONG else ():
        for stop in range(run.start() + LONG, run.end(), LONG):
            yield text[done:stop]
            done = stop
    yield text[done:]
