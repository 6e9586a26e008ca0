"""The one thread that runs the engine, and how requests of other threads get in and out of it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from gptfast.chat.answers import Answer, Answers
from gptfast.chat.conversation import Chat
from gptfast.chat.parts import PartStream, Piece
from gptfast.chat.tools import Tools
from gptfast.engine import Engine, Logprob, Sampling
from gptfast.serve.meter import Meter

PYTHONS = 4  # calls of Python at a time; the others wait
NO_MORE_THAN_S = 60  # that a client is told to wait before it tries again
ENDED = "the server is shutting down"


class Full(Exception):
    """No room in the queue; `retry_s` is when there may be."""

    def __init__(self, waiting: int, retry_s: int) -> None:
        super().__init__(f"the server is full: {waiting} requests wait already; try again in {retry_s} s")
        self.retry_s = retry_s


class Closing(Exception):
    """The server takes no more requests."""


@dataclass(frozen=True)
class Event:
    """What a step added to a ticket. With a `finish_reason` it is the last one."""

    pieces: list[Piece] = field(default_factory=list)
    likely: list[tuple[int, Logprob]] = field(default_factory=list)  # of the ids of what it says, if asked for
    finish_reason: str | None = None  # "stop", "length", "cancelled" or "error", with what went wrong in `error`
    error: str = ""


@dataclass(eq=False)
class Ticket:
    """One answer that is wanted; `deliver` gets its events, in the engine's thread."""

    prompt: list[int]
    sampling: Sampling  # its stop strings are looked for in what the answer says, not in its calls
    plain: bool
    deliver: Callable[[Event], None]
    answer: Answer | None = None
    parts: PartStream | None = None
    asked_at: float = 0.0
    first_at: float | None = None
    done: bool = False

    @property
    def tokens(self) -> int:
        """Of the answer so far, outputs of tools included."""
        return len(self.answer.ids) if self.answer else 0

    def read(self, ids: Sequence[int]) -> tuple[list[Piece], list[tuple[int, Logprob]]]:
        """The pieces that the newest `ids` of the answer make certain, and how probable those were that it says."""
        assert self.answer is not None and self.parts is not None
        if not self.answer.logprobs:
            return self.parts.push(ids), []
        pieces: list[Piece] = []
        likely: list[tuple[int, Logprob]] = []
        for i, logprob in zip(ids, self.answer.logprobs[len(self.answer.logprobs) - len(ids) :], strict=True):
            if self.parts.stopped:
                break
            pieces += self.parts.push([i])
            if logprob is not None and self.parts.says(i):
                likely.append((i, logprob))
        return pieces, likely


class Batcher:
    """Answers tickets on `engine`, in a thread of its own: at most `queue` of them wait while all slots are taken.

    Nobody else may use `engine` meanwhile. After `start`, `submit`, `cancel` and `drain` may be called from any thread.
    """

    def __init__(self, engine: Engine, chat: Chat | None, tools: Tools, queue: int, meter: Meter) -> None:
        assert engine.tokenizer is not None
        self.engine, self.chat, self.tools, self.queue, self.meter = engine, chat, tools, queue, meter
        self.slots = engine.cache.slots
        self._pool = ThreadPoolExecutor(PYTHONS, "python") if tools.python is not None else None
        self._answers = Answers(engine, chat, tools, pool=self._pool)
        self._wake = threading.Condition()
        self._arrived: list[Ticket] = []
        self._gone: list[Ticket] = []
        self._open: dict[Ticket, None] = {}  # all that are not done, in order of arrival
        self._by_answer: dict[Answer, Ticket] = {}
        self._deadline = math.inf
        self.closing = False
        self._thread = threading.Thread(target=self._run, name="engine")

    def start(self) -> None:
        """Begin to answer. To be followed by `drain` and `join`."""
        self._thread.start()

    # ---- any thread --------------------------------------------------------------------------------------------------
    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue all of `tickets`, or none: raises Full, and Closing after `drain`."""
        with self._wake:
            if self.closing or not self._thread.is_alive():
                raise Closing(ENDED)
            waiting = max(len(self._open) - self.slots, 0)
            if len(self._open) + len(tickets) > self.slots + self.queue:
                raise Full(waiting, self._retry_s(waiting))
            now = time.perf_counter()
            for ticket in tickets:
                ticket.asked_at = now
                self._open[ticket] = None
            self._arrived += tickets
            self._wake.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """End `tickets`, whose slots are free before the next step. Those that are done stay as they are."""
        with self._wake:
            self._gone += [ticket for ticket in tickets if not ticket.done]
            self._wake.notify()

    def drain(self, seconds: float) -> None:
        """Take no more tickets; end the open ones as errors if they are not done in `seconds`."""
        with self._wake:
            self.closing = True
            self._deadline = min(self._deadline, time.perf_counter() + seconds)
            self._wake.notify()

    def join(self) -> None:
        """Wait, after `drain`, until the thread has ended."""
        self._thread.join()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open(self) -> int:
        """Tickets that are not done."""
        return len(self._open)

    def _retry_s(self, waiting: int) -> int:
        seconds = self.meter.seconds_per_answer() * (1 + waiting / self.slots)
        return max(1, min(NO_MORE_THAN_S, math.ceil(seconds)))

    # ---- the engine's thread -----------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            with self._wake:
                self.closing = True
                left = list(self._open)
            for ticket in left:
                self._finish(ticket, "error", ENDED)

    def _turn(self) -> bool:
        """Take what has come in, then one step; False when the thread is to end."""
        with self._wake:
            while not (self._arrived or self._gone or self._answers.busy or self.closing):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            gone, self._gone = self._gone, []
            overdue = list(self._open) if time.perf_counter() > self._deadline else []
            if self.closing and not self._open:
                return False
        for ticket in gone:
            self._drop(ticket, "cancelled")
        for ticket in arrived:
            self._admit(ticket)
        for ticket in overdue:
            self._drop(ticket, "error", ENDED)
        if self._answers.busy:
            self._step()
        return True

    def _admit(self, ticket: Ticket) -> None:
        if ticket.done:
            return
        tokenizer, sampling = self.engine.tokenizer, ticket.sampling
        assert tokenizer is not None
        ticket.parts = PartStream(tokenizer, None if ticket.plain else self.chat, sampling.stop)
        try:
            ticket.answer = self._answers.submit(ticket.prompt, replace(sampling, stop=()), plain=ticket.plain)
        except ValueError as error:
            return self._finish(ticket, "error", str(error))
        self._by_answer[ticket.answer] = ticket

    def _step(self) -> None:
        busy = [ticket for ticket in self._by_answer.values() if ticket.first_at is not None]
        started = time.perf_counter()
        try:
            grown = self._answers.step()
        except Exception as error:  # of the whole batch: nobody's tokens can be trusted any more
            for ticket in list(self._by_answer.values()):
                self._drop(ticket, "error", f"the engine failed: {(str(error).splitlines() or [''])[0][:200]}")
            return
        now = time.perf_counter()
        self.meter.step(now, now - started, sum(len(ids) for _, ids in grown), self._kept(), len(busy))
        for answer, ids in grown:
            if answer in self._by_answer:
                self._grow(self._by_answer[answer], answer, ids, now)

    def _grow(self, ticket: Ticket, answer: Answer, ids: list[int], now: float) -> None:
        assert ticket.parts is not None
        if ids and ticket.first_at is None:
            ticket.first_at = now
            self.meter.first_token(now - ticket.asked_at)
        pieces, likely = ticket.read(ids)
        reason = answer.finish_reason
        if ticket.parts.stopped:
            self._answers.cancel(answer)
            reason = "stop"
        elif reason is not None:
            pieces += ticket.parts.flush()
        if reason is not None:
            return self._finish(ticket, reason, answer.error, Event(pieces, likely))
        if pieces or likely:
            ticket.deliver(Event(pieces, likely))

    def _drop(self, ticket: Ticket, reason: str, error: str = "") -> None:
        if ticket.answer is not None:
            self._answers.cancel(ticket.answer)
        self._finish(ticket, reason, error)

    def _finish(self, ticket: Ticket, reason: str, error: str = "", last: Event | None = None) -> None:
        if ticket.done:
            return
        ticket.done = True
        with self._wake:
            self._open.pop(ticket, None)
        if ticket.answer is not None:
            self._by_answer.pop(ticket.answer, None)
        now = time.perf_counter()
        self.meter.finished(reason, len(ticket.prompt), ticket.tokens, ticket.asked_at, ticket.first_at, now)
        ticket.deliver(replace(last or Event(), finish_reason=reason, error=error))

    def _kept(self) -> int:
        """Positions of the cache that running answers take; in pages, those that they share count once."""
        cache, most = self.engine.cache, self.engine.config.block_size
        if cache.paged:
            return (cache.pages - cache.pool.free) * cache.page_size
        return sum(min(len(request.prompt) + len(request.tokens), most) for request in self.engine.running)
