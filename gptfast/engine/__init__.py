"""Text from a GPT: prompts go in once, every step gives each running request its next token.

    engine = Engine(model, slots=8, tokenizer=tokenizer)
    request = engine.submit("Once upon", Sampling(max_tokens=100, temperature=0.8, top_k=200, seed=1, stop=("\\n",)))
    while engine.busy:
        for update in engine.step():  # submit and cancel at any time between steps
            print(update.text, end="")
    request.tokens, request.text, request.finish_reason

    tokens = generate(model, tokens, 100, temperature=0)  # (B, T) -> (B, T + 100)

A request's tokens do not depend on its company. Its prompt goes in alone, a step has the same shape whatever the slots
hold, no kernel adds up over the rows of a batch, and each request draws with random numbers of its own. Only another
number of slots, or of guesses, may change the last bit of a logit: in fp32 some 1e-6 of it; not with float16 and int8
weights on a CPU, whose products are the same to the bit for any number of rows.

Past the model's block_size each new token comes from a forward pass over the last block_size tokens, as in nanoGPT: all
positions have changed, and with them every key and value.

A draft model may guess the next tokens (Leviathan et al., arXiv:2211.17192). A guess is kept where it is the token that
the model itself draws with the request's random number, so the text is that without a draft, greedy or not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gptfast.engine.cache import MAX_STEP, KVCache
from gptfast.engine.decoder import Decoder
from gptfast.engine.requests import Logprob, Reason, Request, Update
from gptfast.engine.sampling import Sampling, draw, logprobs_of, penalize
from gptfast.engine.text import TextStream
from gptfast.engine.weights import Weights, choose_weights, converted, matrix_bytes
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer
from kernels.op import require

__all__ = ["Engine", "KVCache", "Logprob", "Request", "Sampling", "Update", "Weights", "generate"]

MOST_SLOTS = 32  # of generate(): rows beyond wait until one is done


NOT_NUMBERS = "the logits are not numbers: the model has diverged, or overflows its dtype"


class Engine:
    """Continuous batching of requests over the `slots` of one KV cache. Reads the weights of `model` when it is made.

    `weights` is how the matrices are kept: "model" (the dtype of the model's activations), on a CPU also "float16" and
    "int8"; "auto" chooses, and `why` says what and why. The cache is contiguous or, with a `page_size`, a pool of
    `pages`; `kv_storage` "int8" or "fp8" rounds it. A `draft` GPT with the same vocabulary guesses `guesses` tokens a
    step. With a tokenizer, prompts may be text, stop strings are known, and ids without a token are never
    drawn. On CUDA the step is one CUDA graph. Raises ValueError, naming the argument, for what does not fit.
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
        kv_storage: Literal["same", "int8", "fp8"] = "same",
        draft: GPT | None = None,
        guesses: int = 4,
        compile: bool = False,
    ) -> None:
        self.config, self.tokenizer = model.config, tokenizer
        if draft is not None:
            self._check_draft(draft, guesses)
        self.weights, reason = choose_weights(model) if weights == "auto" else (weights, "asked for")
        self.why = f"{str(model.dtype).removeprefix('torch.') if self.weights == 'model' else self.weights}, {reason}"
        self._vocabulary = min(self.config.vocab_size, tokenizer.vocab_size if tokenizer else self.config.vocab_size)
        self._device = model.lm_head.weight.device
        holes = tokenizer.holes() if tokenizer else torch.empty(0, dtype=torch.int64)
        self._holes = holes[holes < self._vocabulary]  # ids without a token, which are never drawn
        self._guesses = guesses if draft else 0

        def decoder(model: GPT, weights: Weights, T: int) -> Decoder:
            model = converted(model, weights)
            cache = KVCache(
                model.config,
                model.ops,
                slots,
                dtype=model.dtype,
                device=self._device,
                capacity=self.config.block_size + self._guesses,
                storage=kv_storage,
                page_size=page_size,
                pages=pages,
            )
            return Decoder(model, cache, T, compile)

        self._main, self._draft = decoder(model, self.weights, 1 + self._guesses), None
        if draft is not None:
            self._draft = decoder(draft, choose_weights(draft)[0] if weights == "auto" else weights, 1)
        self.matrix_bytes = matrix_bytes(model, self.weights)  # of what a step reads; the cache comes on top
        self._caches = [d.cache for d in (self._main, self._draft) if d is not None]
        self._slots: list[Request | None] = [None] * slots
        self._waiting: deque[Request] = deque()
        self._updates: dict[Request, Update] = {}
        self.prompts_read = 0  # forward passes over a prompt: of equal prompts that are let in together, one

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
        needed, there = self.cache.pages_for(self._room(request)), self.cache.pages
        require(not self.cache.paged or needed <= there, f"pages: this request needs {needed}, the pool has {there}")
        if sampling.max_tokens:
            self._waiting.append(request)
        else:
            request.finish_reason = "length"
        return request

    def cancel(self, request: Request) -> None:
        """End `request` now: its slot and pages are free at once. One that is finished stays as it is."""
        if request in self._waiting:
            self._waiting.remove(request)
            request.finish_reason = "cancelled"
        elif request in self._slots:
            self._finish(request, "cancelled")

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Let waiting requests into free slots, or else give every running request its next token, or several guessed.

        A request that is let in gets its first token at once. Returns what was added to each request.
        """
        self._updates = {}
        if not self._admit():
            # A request that outgrows the window in this decoding gets its token there, and is reread from the next on.
            sliding = [request for request in self.running if self._slides(request)]
            self._decode()
            for request in sliding:
                try:
                    logits = self._main.reread(request.prompt + request.tokens)
                    drawn = self._draw(logits[None], [request]).tolist()
                    logprobs = self._logprobs(logits[None], request, drawn)
                except Exception as error:
                    self._fail(request, error)
                    continue
                self._take(request, drawn, logprobs)
        return list(self._updates.values())

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self.running)

    @property
    def running(self) -> list[Request]:
        """The requests that hold a slot, in order of slots."""
        return [request for request in self._slots if request is not None]

    @property
    def model(self) -> GPT:
        """The model that it runs, its matrices in the form `weights`."""
        return self._main.model

    @property
    def decoder(self) -> Decoder:
        """The model's step over the cache."""
        return self._main

    @property
    def cache(self) -> KVCache:
        """The keys and values of the running requests."""
        return self._main.cache

    # ---- the life of a request ---------------------------------------------------------------------------------------
    def _admit(self) -> bool:
        """Waiting requests, first come first served, into free slots. Equal prompts are read once and cloned."""
        read: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        admitted: list[tuple[Request, Tensor]] = []
        for slot in [slot for slot, held in enumerate(self._slots) if held is None]:
            if not self._waiting:
                break
            request = self._waiting[0]
            key = tuple(request.prompt)
            if not self._reserve(slot, self._room(request), read[key][0] if key in read else None):
                break  # those behind wait too, or a request for many pages might never be let in
            self._slots[slot] = self._waiting.popleft()
            if key not in read:
                try:
                    read[key] = slot, self._read(slot, request)
                except Exception as error:  # such as want of memory for a long prompt
                    self._fail(request, error)
                    continue
            admitted.append((request, read[key][1]))
        for request, logits in admitted:  # after the cloning, since the first token may be the last
            try:
                drawn = self._draw(logits[None], [request]).tolist()
                logprobs = self._logprobs(logits[None], request, drawn)
            except Exception as error:
                self._fail(request, error)
                continue
            self._take(request, drawn, logprobs)
        return bool(admitted)

    def _slides(self, request: Request) -> bool:
        """Whether the model sees only the end of it, so that no key or value can be kept."""
        return len(request.prompt) + len(request.tokens) > self.config.block_size

    def _room(self, request: Request) -> int:
        """Tokens of `request` that the cache must hold: all that are read in it, and guesses at what follows."""
        if self._slides(request):
            return 0
        read = len(request.prompt) + max(request.sampling.max_tokens - 1, 0)  # the last one drawn is not
        return min(read, self.config.block_size) + self._guesses

    def _reserve(self, slot: int, tokens: int, source: int | None) -> bool:
        """Room in `slot` of every cache, all of which have as many free pages; a clone of `source` if there is one."""
        if source is None:
            return all(cache.reserve(slot, tokens) for cache in self._caches)
        return all(cache.clone(source, slot, tokens) for cache in self._caches)

    def _read(self, slot: int, request: Request) -> Tensor:
        """The logits (V,) of what follows the prompt, which goes into the empty `slot` unless it slides."""
        self.prompts_read += 1
        if self._slides(request):
            return self._main.reread(request.prompt)
        if self._draft is not None:
            self._draft.read(slot, request.prompt)
        return self._main.read(slot, request.prompt)

    def _decode(self) -> None:
        """One step of all slots: the next tokens of the requests within the window."""
        within = [(slot, r) for slot, r in enumerate(self._slots) if r is not None and not self._slides(r)]
        if not within:
            return
        rows, requests = [slot for slot, _ in within], [request for _, request in within]
        held = dict(within)
        newest = [[held[slot].tokens[-1] if slot in held else 0] for slot in range(len(self._slots))]
        try:
            tokens = self._guess(torch.tensor(newest, device=self._device), rows, requests)
            logits, guesses = self._main.step(tokens)[rows], tokens[rows, 1:]
            drawn = [self._draw(logits[:, i], requests, guesses[:, :i]) for i in range(1 + self._guesses)]
        except Exception:
            for cache in self._caches[1:]:  # nothing was taken, so nothing may have advanced
                cache.lengths.copy_(self.cache.lengths)
            raise
        taken = [
            right[: self._count_right(request, right, guessed)]
            for request, right, guessed in zip(requests, torch.stack(drawn, 1).tolist(), guesses.tolist(), strict=True)
        ]
        counts = [0] * len(self._slots)
        for slot, new in zip(rows, taken, strict=True):
            counts[slot] = len(new)
        self.cache.advance(torch.tensor(counts, dtype=torch.int32, device=self._device))
        for cache in self._caches[1:]:
            cache.lengths.copy_(self.cache.lengths)
        for row, (request, new) in enumerate(zip(requests, taken, strict=True)):
            self._take(request, new, self._logprobs(logits[row], request, new))

    def _guess(self, newest: Tensor, rows: list[int], requests: list[Request]) -> Tensor:
        """The newest token of every slot (slots, 1) and the draft's guesses at the next: (slots, 1 + guesses)."""
        tokens = newest
        if self._draft is None:
            return tokens
        for i in range(self._guesses + 1):  # the last one only goes into the draft's cache
            logits = self._draft.step(tokens[:, -1:])[rows, 0]
            self._draft.cache.advance(1)
            if i < self._guesses:
                guess = torch.zeros_like(newest)
                guess[rows, 0] = self._draw(logits, requests, tokens[rows, 1:]).clamp(min=0)
                tokens = torch.cat((tokens, guess), dim=1)
        return tokens

    def _count_right(self, request: Request, right: list[int], guessed: list[int]) -> int:
        """How many of the tokens `right`, each drawn after the guesses before it, count: those after right guesses."""
        position, n = len(request.prompt) + len(request.tokens) - 1, 1
        while n <= len(guessed) and guessed[n - 1] == right[n - 1] and position + n < self.config.block_size:
            n += 1
        return n

    def _draw(self, logits: Tensor, requests: list[Request], guesses: Tensor | None = None) -> Tensor:
        """The token (n,) int64 of each of n requests from its logits (n, V), after guesses (n, i) at i tokens."""
        ahead = 0 if guesses is None else guesses.shape[1]
        alike: dict[tuple[float, int, float], list[int]] = {}
        for row, request in enumerate(requests):
            sampling = request.sampling
            alike.setdefault((sampling.temperature, sampling.top_k, sampling.top_p), []).append(row)
        where = torch.device("cpu") if self._device.type == "mps" else self._device  # MPS has no fp64
        drawn = torch.empty(len(requests), dtype=torch.int64, device=where)
        for settings, rows in alike.items():
            candidates = logits[rows, : self._vocabulary].to(where, torch.float32)
            if len(self._holes):
                candidates.index_fill_(1, self._holes.to(where), float("-inf"))
            for i, request in enumerate(requests[row] for row in rows):
                penalty = request.sampling.repetition_penalty
                if penalty != 1:
                    guessed = [] if guesses is None else guesses[rows[i]].tolist()
                    candidates[i] = penalize(candidates[i], request.prompt + request.tokens + guessed, penalty)
            uniforms = [requests[row].uniform(len(requests[row].tokens) + ahead) for row in rows]
            uniform = torch.tensor(uniforms, dtype=torch.float64, device=where)
            drawn[rows] = draw(candidates, uniform, *settings)
        return drawn.to(self._device)

    def _logprobs(self, logits: Tensor, request: Request, tokens: list[int]) -> list[Logprob]:
        """Of each of the tokens, drawn from the first of the rows of logits (n, V); none unless asked for."""
        top = request.sampling.logprobs
        if top is None or min(tokens) < 0:
            return []
        seen = logits[: len(tokens), : self._vocabulary].float()
        if len(self._holes):
            seen = seen.index_fill(1, self._holes.to(seen.device), float("-inf"))
        return [Logprob(*found) for found in logprobs_of(seen, tokens, top)]

    def _take(self, request: Request, tokens: list[int], logprobs: list[Logprob]) -> None:
        """Add the new tokens to `request`, up to the one that ends it; what goes wrong with them ends it alone."""
        try:
            self._add(request, tokens, logprobs)
        except Exception as error:
            self._fail(request, error)

    def _add(self, request: Request, tokens: list[int], logprobs: list[Logprob]) -> None:
        update, stream = self._updates.setdefault(request, Update(request)), request._stream
        for i, token in enumerate(tokens):
            require(token >= 0, NOT_NUMBERS)
            if token in request.sampling.stop_tokens:
                return self._finish(request, "stop")
            request.tokens.append(token)
            update.tokens.append(token)
            if logprobs:
                request.logprobs.append(logprobs[i])
                update.logprobs.append(logprobs[i])
            if stream is not None:
                self._add_text(request, stream.push(token))
                if stream.stopped:
                    return self._finish(request, "stop")
            if len(request.tokens) == request.sampling.max_tokens:
                return self._finish(request, "length")
        if self._slides(request):
            self._vacate(self._slots.index(request))

    def _add_text(self, request: Request, text: str) -> None:
        request.text += text
        self._updates[request].text += text

    def _fail(self, request: Request, error: Exception) -> None:
        """End `request` because of `error`, in one line of `request.error`."""
        request.error = (str(error).splitlines() or [type(error).__name__])[0][:300]
        self._updates.setdefault(request, Update(request))
        if request in self._slots:
            self._finish(request, "error")

    def _finish(self, request: Request, reason: Reason) -> None:
        request.finish_reason = reason
        if request._stream is not None and reason not in ("cancelled", "error"):
            self._add_text(request, request._stream.flush())
        slot = self._slots.index(request)
        self._slots[slot] = None
        self._vacate(slot)

    def _vacate(self, slot: int) -> None:
        """Nothing of `slot` is needed any more."""
        for cache in self._caches:
            cache.release(slot)

    def _check_draft(self, draft: GPT, guesses: int) -> None:
        most, V, T = MAX_STEP - 1, self.config.vocab_size, self.config.block_size
        require(1 <= guesses <= most, f"guesses: expected 1 to {most}, got {guesses}")
        theirs = draft.config
        require(theirs.vocab_size == V, f"draft: its vocab_size is {theirs.vocab_size}, the model's {V}")
        require(theirs.block_size >= T, f"draft: its block_size is {theirs.block_size}, the model's {T}")


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    weights: Weights = "auto",
) -> Tensor:
    """Continues each row of `tokens (B, T)` int64 by `max_new_tokens`; returns (B, T + max_new_tokens).

    Drawn as Sampling says, each row by a seed from `generator`, which lives on the device of `tokens`; None is torch's
    own generator. Raises ValueError as Engine and its submit do.
    """
    require(tokens.dim() == 2, f"tokens: expected (B, T), got {tuple(tokens.shape)}")
    seeds = torch.randint(2**63 - 1, (len(tokens),), generator=generator, device=tokens.device).tolist()
    engine = Engine(model, slots=max(1, min(len(tokens), MOST_SLOTS)), weights=weights)
    requests = [
        engine.submit(prompt, Sampling(max_new_tokens, temperature, top_k, top_p, seed=seed))
        for prompt, seed in zip(tokens.tolist(), seeds, strict=True)
    ]
    while engine.busy:
        engine.step()
        for request in requests:
            require(request.finish_reason != "error", request.error)
    new = torch.tensor([request.tokens for request in requests], dtype=tokens.dtype, device=tokens.device)
    return torch.cat((tokens, new.view(len(tokens), max_new_tokens)), dim=1)
