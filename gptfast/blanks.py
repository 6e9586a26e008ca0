"""Long runs of blanks, cut as the pattern of a tokenizer cuts them.

The engine that tiktoken splits text with gives up in a run of some hundred thousand blanks. But where such a run is cut
follows from its two ends and its last line break alone, so it can be merged by itself, and the text around it encoded
as if the run were not there: no alternative of the known patterns looks back, and none that begins before a run enters
it, but for line breaks after punctuation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

LONG = 4096  # blanks that are cut here; every shorter run is the pattern's own affair

# Unicode's White_Space, which patterns call \s; Python's own \s has four control characters more.
_BLANK = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_RUN = re.compile(f"[{_BLANK}]{{{LONG},}}")

_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# How the known patterns begin: whether their punctuation takes the line breaks after it.
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
# How they end: whether a run at the end of the text is one piece, and whether a run is cut after its last line break.
_TAILS = {
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s": (True, True),
    r"\s*[\r\n]+|\s+(?!\S)|\s+": (False, True),
    r"\s*[\r\n]|\s+(?!\S)|\s+": (False, True),
    r"\s++$|\s+(?!\S)|\s": (True, False),
    r"\s+(?!\S)|\s+": (False, False),
}


@dataclass(frozen=True)
class Blanks:
    """What a pattern does with runs of blanks."""

    takes_breaks: bool  # punctuation takes the line breaks after it
    whole_at_end: bool  # a run that ends the text is one piece
    cut_at_break: bool  # a run is cut after its last line break

    @staticmethod
    def of(pattern: str) -> Blanks | None:
        """None for a pattern that is not known: its runs are left to it."""
        for head, takes_breaks in _HEADS.items():
            if pattern.startswith(head) and pattern[len(head) :] in _TAILS:
                return Blanks(takes_breaks, *_TAILS[pattern[len(head) :]])
        return None

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """`text` in order: what the pattern is still to split (False), and long pieces that it would make (True)."""
        done = 0
        for run in _RUN.finditer(text) if len(text) >= LONG else ():
            start, end = run.span()
            if self.takes_breaks and start and text[start] in "\r\n":
                kind = unicodedata.category(text[start - 1])
                if kind[0] == "M" or kind == "Cn":
                    continue  # whether the pattern takes it for a letter or for punctuation is not certain
                if kind[0] not in "LN":
                    start = _after_breaks(text, start, end)
                if start == end:  # all of it belongs to the punctuation, maybe with more that follows
                    continue
            cuts = [start, *self._cuts(text, start, end)]
            yield text[done:start], False
            yield from ((text[first:last], True) for first, last in pairwise(cuts) if first < last)
            done = cuts[-1]
        yield text[done:], False

    def _cuts(self, text: str, start: int, end: int) -> Iterator[int]:
        """Where the pieces of a run end; what follows the last is left to the pattern."""
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
    """`text` in parts in which no run of blanks is longer than LONG: for counting pieces, not for encoding."""
    done = 0
    for run in _RUN.finditer(text) if len(text) >= LONG else ():
        for place in range(run.start() + LONG, run.end(), LONG):
            yield text[done:place]
            done = place
    yield text[done:]
