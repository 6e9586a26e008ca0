"""The engine: requests in, updates out, and between them the steps of a model over one cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from gptfast.engine.cache import MAX_STEP, KVCache, Piece
from gptfast.engine.decoder import Decoder
from gptfast.engine.loop import Arriving, Loop
from gptfast.engine.requests import Logprob, Reason, Request, Update
from gptfast.engine.sampling import Kinds, Sampling
from gptfast.engine.scheduler import Row, Scheduler
from gptfast.engine.text import TextStream
from gptfast.engine.weights import Weights, choose_weights, converted, matrix_bytes, refresh
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer
from kernels.op import require

One = TypeVar("One")
NOT_NUMBERS = "the logits are not numbers: the model has diverged, or overflows its dtype"
PREFILL_TOKENS = 512  # of prompts, read between two steps
PREFILL_ALONE = 4096  # on CUDA while nobody decodes: there a pass takes as long as its launches, few tokens or many


@dataclass(frozen=True)
class Flight:
    """Tokens on their way to the host: of each row, drawn in that step of the engine."""

    step: int
    rows: list[Row]
    places: list[int]  # which row of what arrives is whose
    arriving: Arriving
    decoded: bool  # by a step, which has put keys and values into the cache


class Engine:
    """Continuous batching of requests over the `slots` of one KV cache. Reads the weights of `model` when it is made.

    `weights` is how the matrices are kept: "model" (the dtype of the model's activations), on a CPU also "float16" and
    "int8"; "auto" chooses, and `why` says what and why. The cache is contiguous or, with a `page_size`, a pool of
    `pages`, taken as texts grow; then with `prefix_cache` a text's beginning is not read again while the pool still
    holds it. `kv_storage` "int8" or "fp8" rounds the cache. Up to `prefill_tokens` of prompts are read between two
    steps, and up to `prefill_alone` while nobody decodes, whom that would keep waiting: by default 4096 on CUDA and as
    many as the others elsewhere, also once memory did not suffice. A `draft` GPT with the same vocabulary guesses
    `guesses` tokens a step. With a tokenizer, prompts may be text, stop strings are known, and ids without a token are
    never drawn. On CUDA the step is one CUDA graph, and so is reading a text of each of few lengths, recorded when one
    first comes up; the host hears of tokens up to `lag` calls of step() later: by default 1, and 0 on other devices.
    Raises ValueError, naming the argument, for what does not fit.
    """

    def __init__(
        self,
        model: GPT,
        *,
        slots: int = 1,
        tokenizer: Tokenizer | None = None,
        weights: Weights = "auto",
        page_size: int | None = None,
        pages: int | None = None,
        prefix_cache: bool = True,
        kv_storage: Literal["same", "int8", "fp8"] = "same",
        prefill_tokens: int = PREFILL_TOKENS,
        prefill_alone: int | None = None,
        draft: GPT | None = None,
        guesses: int = 4,
        lag: int | None = None,
        compile: bool = False,
    ) -> None:
        self.config, self.tokenizer = model.config, tokenizer
        if draft is not None:
            self._check_draft(draft, guesses)
        require(lag is None or lag >= 0, f"lag: must not be negative, got {lag}")
        self.weights, reason = choose_weights(model) if weights == "auto" else (weights, "asked for")
        self.why = f"{str(model.dtype).removeprefix('torch.') if self.weights == 'model' else self.weights}, {reason}"
        device = model.lm_head.weight.device
        self.prefill_tokens, self.prefill_alone = bounds_of_reading(prefill_tokens, prefill_alone, device)
        self.lag = int(device.type == "cuda") if lag is None else lag
        vocabulary = min(self.config.vocab_size, tokenizer.vocab_size if tokenizer else self.config.vocab_size)
        holes = tokenizer.holes() if tokenizer else torch.empty(0, dtype=torch.int64)
        guesses = guesses if draft else 0
        self._ahead = 1 + guesses  # tokens that a step may add

        def decoder(model: GPT, weights: Weights, beside: KVCache | None = None) -> Decoder:
            twin = converted(model, weights)
            capacity = self.config.block_size + self._ahead  # one more: for a row that waits for the host at its end
            cache = KVCache(
                twin.config, twin.ops, slots, dtype=twin.dtype, device=device, capacity=capacity, storage=kv_storage,
                page_size=page_size, pages=pages, remembers=prefix_cache, beside=beside,
            )  # fmt: skip
            return Decoder(twin, cache, compile)

        self._source, self._draft_source = model, draft
        self._main, self._draft = decoder(model, self.weights), None
        if draft is not None:
            self._draft_weights = choose_weights(draft)[0] if weights == "auto" else weights
            self._draft = decoder(draft, self._draft_weights, self._main.cache)
        self.matrix_bytes = matrix_bytes(model, self.weights)  # of what a step reads; the cache comes on top
        pool = self.cache.pool if self.cache.paged else None
        self._scheduler = Scheduler(slots, self.config.block_size, guesses, pool)
        self._loop = Loop(self._main, self._draft, guesses, vocabulary, holes[holes < vocabulary])
        self._vocabulary = vocabulary
        self._caches = [d.cache for d in (self._main, self._draft) if d is not None]
        self._flights: deque[Flight] = deque()
        self._steps = 0
        self._updates: dict[Request, Update] = {}
        self.prompts_read = 0  # texts that went through the model: of equal ones that are let in together, one
        self.tokens_read = 0  # of those texts, without what the cache held of them already
        self.tokens_reused = 0  # of texts: what the cache held of them when they were let in
        self.preemptions = 0  # requests that gave way because the pool was dry

    # ---- what callers use --------------------------------------------------------------------------------------------
    def submit(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Request:
        """Queue a request; step() runs it as soon as a slot is free. With max_tokens 0 it is finished at once.

        A prompt longer than block_size counts by its end. Raises ValueError for an empty prompt, an id outside the
        vocabulary, text or stop strings without a tokenizer, and a request that the pool of pages could never hold.
        """
        sampling = Sampling() if sampling is None else sampling
        has_text = self.tokenizer is not None
        require(has_text or not isinstance(prompt, str), "prompt: text needs a tokenizer; give Engine one, or give ids")
        require(has_text or not sampling.stop, "stop: strings need a tokenizer; give Engine one, or use stop_tokens")
        ids = self.tokenizer.encode(prompt) if self.tokenizer and isinstance(prompt, str) else prompt
        tokens, V = [int(token) for token in ids], self.config.vocab_size
        require(bool(tokens), "prompt: empty; give at least one token")
        low, high = min(tokens), max(tokens)
        require(0 <= low <= high < V, f"prompt: ids must be 0 to {V - 1}, got {low} to {high}")
        stream = TextStream(self.tokenizer, sampling.stop) if self.tokenizer else None
        request = Request(tokens, sampling, stream)
        needed, there = self.cache.pool.needed(self._scheduler.room(request)), self.cache.pages
        require(not self.cache.paged or needed <= there, f"pages: this request needs {needed}, the pool has {there}")
        if sampling.max_tokens:
            self._scheduler.waiting.append(request)
        else:
            request.finish_reason = "length"
        return request

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """End `request` now: its slot and pages are free at once. One that is finished stays as it is."""
        row = self._scheduler.row_of(request)
        if row is not None:
            self._finish(row, "cancelled")
        elif request.finish_reason is None and request in self._scheduler.waiting:
            self._scheduler.waiting.remove(request)
            request.finish_reason = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Give every running request its next token, or several guessed; then let waiting ones in, and read prompts.

        A request gets its first token when the last of its prompt is read. Returns what was added to each request, of
        this step and, with a `lag`, of earlier ones: when nothing is left to do, of all.
        """
        self._updates = {}
        self._steps += 1
        moved = self._decode()
        self._collect(self._steps - self.lag)
        moved = self._read() or moved
        self._collect(self._steps - self.lag if moved else self._steps)
        return list(self._updates.values())

    @torch.inference_mode()
    def load_weights(self, model: GPT | None = None) -> None:
        """Go on with the weights of `model` as they are now: by default of the one that the engine was made of.

        Nothing that was read is of use then: the running requests keep their tokens and are read again. The weights of
        the same model are written where the old ones were; others may lie elsewhere, and steps are recorded anew.
        Raises ValueError for a model of another config.
        """
        model = self._source if model is None else model
        require(model.config == self.config, "model: its config is not that of the engine's model; make a new Engine")
        self._collect(self._steps)
        running = sorted((row for row in self._scheduler.running if not row.slides), key=lambda row: -row.number)
        for row in running:
            if self._scheduler.row_of(row.request) is row:
                self._preempt(row)
        self.cache.pool.forget()
        if model is self._source:
            refresh(self._main.model, model)
            return
        self._source = model
        self._main.use(converted(model, self.weights))
        self._loop.forget_graphs()

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def running(self) -> list[Request]:
        """The requests that hold a slot, in order of slots."""
        return [row.request for row in self._scheduler.running]

    @property
    def model(self) -> GPT:
        """The model that it runs, its matrices in the form `weights`."""
        return self._main.model

    @property
    def decoder(self) -> Decoder:
        """The model's step over the cache."""
        return self._main

    @property
    def loop(self) -> Loop:
        """The step on the device."""
        return self._loop

    @property
    def cache(self) -> KVCache:
        """The keys and values of the running requests."""
        return self._main.cache

    # ---- a step ------------------------------------------------------------------------------------------------------
    def _decode(self) -> bool:
        """One step of all slots: the next tokens of the requests within the window. Whether there were any."""
        scheduler = self._scheduler
        rows = scheduler.decoding()
        while not scheduler.house_step(rows, self._ahead):
            if self._flights:  # what has ended gives its pages back, and who gives way takes its tokens along
                self._collect(self._steps)
            else:
                self.preemptions += 1
                self._preempt(scheduler.youngest())
            rows = scheduler.decoding()
        if not rows:
            return False
        self.cache.refresh()
        arriving = self._loop.step(Kinds.of([row.request.sampling for row in rows], self._vocabulary))
        self._depart(rows, [row.slot for row in rows], arriving, decoded=True)
        return True

    def _read(self) -> bool:
        """Waiting requests into free slots, and the next pieces of prompts. Whether anything was read."""
        for row in self._scheduler.admit():
            self.tokens_reused += row.held
            if row.held:
                for cache in self._caches:
                    cache.resume(row.slot, row.held)
            self._loop.seat(row.slot, row.request)
        self.cache.refresh()
        pieces = self._scheduler.pieces(self.prefill_tokens if self._scheduler.others_wait() else self.prefill_alone)
        count = sum(piece.tokens for _, piece in pieces)
        whole: list[tuple[Row, Tensor]] = []  # texts read to their ends, with the states there

        def read(some: list[tuple[Row, Piece]]) -> None:
            try:
                whole.extend(self._read_pieces(some))
            except torch.OutOfMemoryError:
                if count <= self.prefill_tokens:
                    raise
                self.prefill_alone = self.prefill_tokens  # nothing of it counts as read: smaller pieces come next

        self._try(read, pieces, lambda one: one[0])
        ready = [(taker, hidden) for row, hidden in whole for taker in self._copy_to_followers(row)]
        self._try(self._begin, ready, lambda one: one[0])
        sliding = self._scheduler.sliding(self.prefill_tokens - count)
        self._try(self._reread, sliding, lambda one: one)
        return bool(pieces or sliding)

    def _try(self, run: Callable[[list[One]], None], together: list[One], row_of: Callable[[One], Row]) -> None:
        """Run all together, or else each alone; whose own run fails, such as for want of memory, ends alone."""
        if not together:
            return
        try:
            run(together)
        except Exception as error:
            if len(together) == 1:
                return self._fail(row_of(together[0]), error)
            for one in together:
                self._try(run, [one], row_of)

    def _read_pieces(self, pieces: list[tuple[Row, Piece]]) -> list[tuple[Row, Tensor]]:
        """Pieces of prompts into the cache. Returns the rows whose texts end here, with their hidden states."""
        texts = [(piece, row.text[piece.start : piece.end]) for row, piece in pieces]
        if self._draft is not None:
            self._draft.read(texts)
        hidden = self._main.read(texts)
        for row, piece in pieces:
            row.held = piece.end
            self.tokens_read += piece.tokens
        return [(row, x) for (row, _), x in zip(pieces, hidden, strict=True) if row.held == len(row.text)]

    def _copy_to_followers(self, row: Row) -> list[Row]:
        """`row`, whose text has been read, and who waited for that, each with all of it."""
        self.prompts_read += 1
        row.read, pool, shared = True, self.cache.pool, 0
        if self.cache.paged:
            pool.learn(row.slot, row.text)
            shared = len(row.text) // pool.page_size
        followers = self._scheduler.followers(row)
        for follower in followers:
            for cache in self._caches:
                cache.copy(row.slot, follower.slot, shared, len(row.text))
            self.tokens_reused += len(row.text)
            follower.read, follower.held, follower.leader = True, len(row.text), None
        return [row, *followers]

    def _begin(self, ready: list[tuple[Row, Tensor]]) -> None:
        """The first token of rows whose texts have been read, which run from the next step on."""
        self._draw([row for row, _ in ready], self.model.logits_of(torch.stack([hidden for _, hidden in ready])))
        for row, _ in ready:
            self._loop.start(row.slot, self._scheduler.most(row.request))

    def _reread(self, rows: list[Row]) -> None:
        """The next token of rows beyond the window."""
        self._draw(rows, self._main.reread([row.request.prompt + row.request.tokens for row in rows]))
        for row in rows:
            self.prompts_read += not row.read
            row.read = True

    def _draw(self, rows: list[Row], logits: Tensor) -> None:
        arriving = self._loop.first(logits, [row.slot for row in rows], [row.request for row in rows])
        self._depart(rows, list(range(len(rows))), arriving, decoded=False)

    def _depart(self, rows: list[Row], places: list[int], arriving: Arriving, *, decoded: bool) -> None:
        self._flights.append(Flight(self._steps, rows, places, arriving, decoded))
        for row in rows:
            row.flights += 1

    # ---- the life of a request ---------------------------------------------------------------------------------------
    def _collect(self, until: int) -> None:
        """Give out what the steps up to `until` drew, except to those who have left meanwhile."""
        while self._flights and self._flights[0].step <= until:
            flight = self._flights.popleft()
            tokens, told = flight.arriving.read()
            for row, place in zip(flight.rows, flight.places, strict=True):
                if self._scheduler.rows[row.slot] is not row:
                    continue
                count = tokens[place][-1]
                row.flights -= 1
                row.held += count * flight.decoded
                self._take(row, tokens[place][:count], told[place])

    def _take(self, row: Row, tokens: list[int], told: list[list[float]]) -> None:
        """Add the new tokens to a request, up to the one that ends it; what goes wrong with them ends it alone."""
        try:
            self._add(row, tokens, told)
        except Exception as error:
            self._fail(row, error)

    def _add(self, row: Row, tokens: list[int], told: list[list[float]]) -> None:
        request = row.request
        update, sampling, stream = self._update(request), request.sampling, request._stream
        for token, numbers in zip(tokens, told, strict=False):
            require(token >= 0, NOT_NUMBERS)
            if token in sampling.stop_tokens:
                return self._finish(row, "stop")
            request.tokens.append(token)
            update.tokens.append(token)
            if sampling.logprobs is not None:
                logprob = Logprob.of(numbers, sampling.logprobs)
                request.logprobs.append(logprob)
                update.logprobs.append(logprob)
            if stream is not None:
                self._add_text(request, stream.push(token))
                if stream.stopped:
                    return self._finish(row, "stop")
            if len(request.tokens) == sampling.max_tokens:
                return self._finish(row, "length")
        if not row.slides and self._scheduler.slides(request):
            self._scheduler.vacate(row)
            self._empty([row])
            row.slides = True

    def _add_text(self, request: Request, text: str) -> None:
        request.text += text
        self._update(request).text += text

    def _update(self, request: Request) -> Update:
        update = self._updates.get(request)
        if update is None:
            update = self._updates[request] = Update(request)
        return update

    def _fail(self, row: Row, error: Exception) -> None:
        """End a request because of `error`, in one line of `request.error`."""
        row.request.error = (str(error).splitlines() or [type(error).__name__])[0][:300]
        self._update(row.request)
        if self._scheduler.rows[row.slot] is row:
            self._finish(row, "error")

    def _finish(self, row: Row, reason: Reason) -> None:
        request = row.request
        request.finish_reason = reason
        if request._stream is not None and reason not in ("cancelled", "error"):
            self._add_text(request, request._stream.flush())
        self._empty(self._scheduler.remove(row, sound=reason != "error"))

    def _preempt(self, row: Row) -> None:
        """`row` waits in line again; nothing of it may be under way."""
        self._empty(self._scheduler.preempt(row))

    def _empty(self, rows: list[Row]) -> None:
        """The slots of `rows` run no more, and hold nothing."""
        for row in rows:
            self._loop.stop(row.slot)
            for cache in self._caches:
                cache.lengths[row.slot] = 0

    def _check_draft(self, draft: GPT, guesses: int) -> None:
        most, V, T = MAX_STEP - 1, self.config.vocab_size, self.config.block_size
        require(1 <= guesses <= most, f"guesses: expected 1 to {most}, got {guesses}")
        theirs = draft.config
        require(theirs.vocab_size == V, f"draft: its vocab_size is {theirs.vocab_size}, the model's {V}")
        require(theirs.block_size >= T, f"draft: its block_size is {theirs.block_size}, the model's {T}")


def bounds_of_reading(tokens: int, alone: int | None, device: torch.device) -> tuple[int, int]:
    """Returns how many tokens of prompts are read at once: beside rows that decode, and while there are none."""
    require(tokens >= 1, f"prefill_tokens: expected at least 1, got {tokens}")
    require(alone is None or alone >= 1, f"prefill_alone: expected at least 1, got {alone}")
    default = PREFILL_ALONE if device.type == "cuda" else 0
    return tokens, max(tokens, default if alone is None else alone)
