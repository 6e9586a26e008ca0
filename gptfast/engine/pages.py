"""Whose page is which: the host's books of a pool of pages, and of the texts whose keys and values it still holds.

A page that is full can be known by the text up to its end: sha256 of the page's tokens after the digest of the page
before it. Who begins with that text holds the same page, and nothing is copied. A known page that nobody holds stays
until its memory is needed; the one that was used longest ago goes first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import sha256


class Pages:
    """The pages 1 ... `count` of `page_size` tokens each, and those that each of `slots` holds, in order of its text.

    Page 0 takes what slots without pages write, and belongs to nobody. `remembers` is whether full pages are known by
    their text. `changed` is set whenever what a slot holds changes; who has copied the table unsets it.
    """

    def __init__(self, slots: int, count: int, page_size: int, remembers: bool = False) -> None:
        self.count, self.page_size, self.remembers = count, page_size, remembers
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.changed = True
        self._free = list(range(count, 0, -1))
        self._holders = [0] * (count + 1)
        self._known: dict[bytes, int] = {}  # the page of a text
        self._text: dict[int, bytes] = {}  # the same, by page
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages that nobody holds, least recently used first

    @property
    def free(self) -> int:
        """Pages that no slot holds, those that are still known among them."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.page_size)

    def match(self, text: Sequence[int]) -> list[int]:
        """The pages of the longest known beginning of `text`, which leaves out at least its last token."""
        found: list[int] = []
        if self._known:
            for digest in self._digests(text, (len(text) - 1) // self.page_size):
                page = self._known.get(digest)
                if page is None:
                    break
                found.append(page)
        return found

    def missing(self, shared: Sequence[int], tokens: int) -> int:
        """How many free pages go into `tokens` that begin with the pages `shared`, those that are idle among them."""
        return self.needed(tokens) - len(shared) + sum(page in self._idle for page in shared)

    def hold(self, slot: int, shared: Sequence[int], tokens: int) -> bool:
        """Give the empty `slot` the pages `shared`, and free ones for the rest of `tokens`; False: too few are."""
        if self.missing(shared, tokens) > self.free:
            return False
        for page in shared:
            self._idle.pop(page, None)
            self._holders[page] += 1
        self.held[slot] = list(shared)
        self.changed = True
        return self.grow(slot, tokens)

    def grow(self, slot: int, tokens: int) -> bool:
        """Let `slot` have pages for `tokens` at least; False, with nothing done, if too few are free."""
        missing = self.needed(tokens) - len(self.held[slot])
        if missing <= 0:
            return True
        if missing > self.free:
            return False
        for _ in range(missing):
            page = self._free.pop() if self._free else self._evict()
            self._holders[page] = 1
            self.held[slot].append(page)
        self.changed = True
        return True

    def release(self, slot: int) -> None:
        """Take all pages from `slot`. Those at its end are the first that others get."""
        for page in reversed(self.held[slot]):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._text:
                self._idle[page] = None
            else:
                self._free.append(page)
        if self.held[slot]:
            self.held[slot] = []
            self.changed = True

    def learn(self, slot: int, text: Sequence[int]) -> None:
        """The pages of `slot` hold `text`: from now on the full ones are known by it."""
        if not self.remembers:
            return
        for page, digest in zip(self.held[slot], self._digests(text, len(text) // self.page_size), strict=False):
            if page not in self._text and digest not in self._known:
                self._known[digest], self._text[page] = page, digest

    def forget(self) -> None:
        """What all pages hold is worth nothing any more."""
        self._known.clear()
        self._text.clear()
        self._free += self._idle
        self._idle.clear()

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._known[self._text.pop(page)]
        return page

    def _digests(self, text: Sequence[int], pages: int) -> Iterator[bytes]:
        """Of the text up to the end of each of the first `pages` pages."""
        digest, size = b"", self.page_size
        for page in range(pages):
            digest = sha256(digest + array("q", text[page * size : (page + 1) * size]).tobytes()).digest()
            yield digest
