"""Who runs: requests wait in line, get a slot and its pages, are read in pieces, and decode; some must give way.

First come, first served. A request is let in as soon as a slot is free and the pool has pages for its text, and holds
more only as it grows. When the pool is dry the youngest gives its pages back and waits in front of the line; let in
again, it is read again with the tokens that it has. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from gptfast.engine.cache import Piece
from gptfast.engine.pages import Pages
from gptfast.engine.requests import Request


class Row:
    """A request in a slot. `text` is the prompt and the tokens that it had when it was let in."""

    def __init__(self, request: Request, slot: int, number: int) -> None:
        self.request, self.slot, self.number = request, slot, number
        self.text = request.prompt + request.tokens
        self.held = 0  # positions whose keys and values are in the cache, for all that the host knows
        self.read = False  # whether all of `text` is in the cache, or on its way
        self.flights = 0  # steps under way that give it a token each, or more
        self.leader: Row | None = None  # of the same text, which is read for both
        self.slides = False  # the model sees only the end of it, so that no key or value can be kept


class Scheduler:
    """Requests in line, and rows in `slots`. `pool` is None for a contiguous cache, where a slot has room for all.

    A text has up to `window` tokens in the cache, and `guesses` more that may be thrown away.
    """

    def __init__(self, slots: int, window: int, guesses: int, pool: Pages | None) -> None:
        self.window, self.guesses, self.pool = window, guesses, pool
        self.waiting: deque[Request] = deque()
        self.rows: list[Row | None] = [None] * slots
        self._seated: dict[Request, Row] = {}
        self._number = 0  # of rows so far

    # ---- what is asked -----------------------------------------------------------------------------------------------
    @property
    def running(self) -> list[Row]:
        """Rows in the order of slots."""
        return [row for row in self.rows if row is not None]

    def row_of(self, request: Request) -> Row | None:
        return self._seated.get(request)

    def slides(self, request: Request) -> bool:
        """Whether the text has outgrown the window."""
        return len(request.prompt) + len(request.tokens) > self.window

    def most(self, request: Request) -> int:
        """Tokens of `request` that are read in the cache, at most; the last one drawn is not."""
        return min(len(request.prompt) + max(request.sampling.max_tokens - 1, 0), self.window)

    def room(self, request: Request) -> int:
        """Tokens that the cache must have room for, at most: guesses come on top."""
        return 0 if self.slides(request) else self.most(request) + self.guesses

    def decoding(self) -> list[Row]:
        """Rows that a step may give a token: whatever is under way, none surely has come to its end."""
        return [row for row in self.rows if row is not None and row.read and not row.slides and self._goes_on(row)]

    def _goes_on(self, row: Row) -> bool:
        request = row.request
        fewest = len(request.tokens) + row.flights
        return fewest < request.sampling.max_tokens and len(request.prompt) + fewest <= self.window

    # ---- letting in --------------------------------------------------------------------------------------------------
    def admit(self) -> Iterator[Row]:
        """Waiting requests into free slots, as far as there is room. Those behind one that must wait do, too, or a
        request for many pages might never be let in."""
        for slot in [slot for slot, row in enumerate(self.rows) if row is None]:
            if not self.waiting:
                return
            row = Row(self.waiting[0], slot, self._number)
            row.slides = self.slides(row.request)
            if not row.slides and not self._house(row):
                return
            self.waiting.popleft()
            self._number += 1
            self.rows[slot] = self._seated[row.request] = row
            yield row

    def _house(self, row: Row) -> bool:
        """Pages for the text of `row`, those that are known among them; False if too few are free.

        One more for each that runs stays free, or what is let in would soon have to give way.
        """
        row.leader = next((other for other in self.running if self._leads(other, row)), None)
        if self.pool is None:
            return True
        if row.leader is not None:
            shared = self.pool.held[row.leader.slot][: len(row.text) // self.pool.page_size]
        else:
            shared = self.pool.match(row.text)
            row.held = len(shared) * self.pool.page_size
        tokens = min(len(row.text) + 1, self.most(row.request)) + self.guesses
        spare = sum(not other.slides for other in self.running)
        if self.pool.missing(shared, tokens) + spare > self.pool.free:
            return False
        return self.pool.hold(row.slot, shared, tokens)

    def _leads(self, other: Row, row: Row) -> bool:
        return not (other.read or other.slides or other.leader) and other.text == row.text

    # ---- reading -----------------------------------------------------------------------------------------------------
    def pieces(self, budget: int) -> list[tuple[Row, Piece]]:
        """Pieces of texts to be read next, up to `budget` tokens: whoever was let in first."""
        found = []
        for row in sorted((r for r in self.running if not (r.read or r.slides or r.leader)), key=lambda r: r.number):
            if budget <= 0:
                break
            count = min(budget, len(row.text) - row.held)
            found.append((row, Piece(row.slot, row.held, count)))
            budget -= count
        return found

    def others_wait(self) -> bool:
        """Whether somebody waits for a next token while prompts are read."""
        return any(row.read or row.slides for row in self.running)

    def followers(self, leader: Row) -> list[Row]:
        """Rows that wait for the text of `leader`."""
        return [row for row in self.running if row.leader is leader]

    def sliding(self, budget: int) -> list[Row]:
        """Rows to be read again for their next token, `window` tokens each: one, or more within `budget`."""
        rows = [row for row in self.running if row.slides and not row.flights]
        rows.sort(key=lambda row: len(row.request.tokens))
        return rows[: max(1, budget // self.window)]

    # ---- leaving -----------------------------------------------------------------------------------------------------
    def house_step(self, rows: Sequence[Row], ahead: int) -> bool:
        """Pages for the next step of `rows`, where each step under way adds up to `ahead` tokens; False: too few."""
        if self.pool is None:
            return True
        for row in sorted(rows, key=lambda row: row.number):
            tokens = min(row.held + ahead * (row.flights + 1), self.most(row.request) + self.guesses)
            if not self.pool.grow(row.slot, tokens):
                return False
        return True

    def youngest(self) -> Row:
        """Who gives way when the pool is dry."""
        return max((row for row in self.running if not row.slides), key=lambda row: row.number)

    def preempt(self, row: Row) -> list[Row]:
        """`row`, and who waits for it, back into the line, in front. Returns those that have lost their slots."""
        rows = sorted([row, *self.followers(row)], key=lambda row: -row.number)
        for one in rows:
            self.vacate(one)
            self._unseat(one)
            self.waiting.appendleft(one.request)
        return rows

    def remove(self, row: Row, sound: bool = True) -> list[Row]:
        """`row` has ended; who waits for its text waits in line again. Returns those that have lost their slots."""
        self.vacate(row, sound)
        self._unseat(row)
        lost = [row]
        for follower in sorted(self.followers(row), key=lambda row: -row.number):
            lost += self.preempt(follower)
        return lost

    def vacate(self, row: Row, sound: bool = True) -> None:
        """Nothing that the slot of `row` holds is needed any more; a `sound` text may be of use to others."""
        if self.pool is None:
            return
        if sound and not row.leader:
            text = row.request.prompt + row.request.tokens
            self.pool.learn(row.slot, text[: row.held])
        self.pool.release(row.slot)

    def _unseat(self, row: Row) -> None:
        self.rows[row.slot] = None
        del self._seated[row.request]
