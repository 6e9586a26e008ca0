"""The step on the device: model, draft and drawing in one go, each token fed back to where the next one is made.

A step needs nothing from the host and gives nothing to it but a copy of what was drawn, which is read when it has
arrived. What a row wants lies in tensors, written when a request begins and ends: its settings, its random numbers by
position, the tokens that occurred in it, and the length at which it stops. On CUDA a step is one graph for each set of
`Kinds`, recorded when it first comes up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.engine.cache import to_device
from gptfast.engine.decoder import Decoder, captured
from gptfast.engine.requests import Request
from gptfast.engine.sampling import Kinds, Settings, as_numbers, draw, logprobs_of, penalize


class Drawn(NamedTuple):
    """What a step drew, on the device. `told` is empty unless log-probabilities are asked for."""

    tokens: Tensor  # (n, 1 + guesses + 1) int64: after each guess, and last how many of them count
    told: Tensor  # (n, 1 + guesses, 1 + 2 top) fp64: as logprobs_of gives them


class Arriving:
    """Something drawn, on its way to the host."""

    def __init__(self, drawn: Drawn) -> None:
        self._event: torch.cuda.Event | None = None
        if drawn.tokens.device.type == "cuda":
            self._host = Drawn(*(torch.empty(x.shape, dtype=x.dtype, pin_memory=x.numel() > 0) for x in drawn))
            for there, here in zip(self._host, drawn, strict=True):
                if here.numel():
                    there.copy_(here, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = Drawn(*(x.clone() for x in drawn))

    def read(self) -> tuple[list[list[int]], list[list[list[float]]]]:
        """Its numbers, as soon as they are there: all that the host ever reads of a step."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tokens.tolist(), self._host.told.tolist()


class Loop:
    """Steps of `main`, with `guesses` by `draft`. Tokens are drawn below `vocabulary`, and never from `holes`."""

    def __init__(self, main: Decoder, draft: Decoder | None, guesses: int, vocabulary: int, holes: Tensor) -> None:
        self.main, self.draft, self.guesses, self.vocabulary = main, draft, guesses, vocabulary
        slots, device = main.cache.slots, main.cache.lengths.device
        self._device = device
        self._where = torch.device("cpu") if device.type == "mps" else device  # of drawing: MPS has no fp64
        self._holes = holes.to(self._where)
        self._window = main.model.config.block_size
        self._newest = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._workspace = torch.zeros(slots, 2, dtype=torch.int64, device=device)
        self._uniforms = torch.zeros(slots, self._window + 1, dtype=torch.float64, device=self._where)  # by position
        self._occurred: Tensor | None = None  # (slots, vocabulary) bool, as soon as someone asks for a penalty
        self._rows = torch.arange(slots, device=self._where)
        # The host's copy, a list for each row: the length at which it stops, 0 where nothing runs, and its settings.
        self._wanted = [[0.0, 0.0, 0.0, 1.0, 1.0] for _ in range(slots)]
        self._state = torch.tensor(self._wanted, dtype=torch.float64, device=self._where).T.contiguous()
        self._changed = False
        self._graphs: dict[Kinds, tuple[torch.cuda.CUDAGraph, Drawn]] = {}

    # ---- rows begin and end ------------------------------------------------------------------------------------------
    def seat(self, slot: int, request: Request) -> None:
        """What `request` wants is what row `slot` wants; it does not run yet."""
        sampling, tokens = request.sampling, request.tokens
        self._wanted[slot] = [0.0, *as_numbers(sampling)]
        self._changed = True
        first, length = len(request.prompt), len(request.prompt) + len(tokens)
        if sampling.temperature and length <= self._window:
            last = min(first + sampling.max_tokens, self._window + 1)
            uniforms = [request.uniform(at - first) for at in range(length, last)]
            self._uniforms[slot, length:last] = to_device(torch.tensor(uniforms, dtype=torch.float64), self._where)
        if sampling.repetition_penalty != 1:
            if self._occurred is None:
                self._occurred = torch.zeros(len(self._rows), self.vocabulary, dtype=torch.bool, device=self._where)
            self._occurred[slot] = False
            text = torch.tensor([token for token in {*request.prompt, *tokens} if token < self.vocabulary])
            self._occurred[slot, to_device(text, self._where)] = True

    def start(self, slot: int, most: int) -> None:
        """Row `slot` runs from the next step on, until its cache holds `most` tokens."""
        self._wanted[slot][0] = float(most)
        self._changed = True

    def stop(self, slot: int) -> None:
        """Row `slot` does not run any more."""
        if self._wanted[slot][0]:
            self._wanted[slot][0] = 0.0
            self._changed = True

    def forget_graphs(self) -> None:
        """The weights lie elsewhere: steps are recorded anew."""
        self._graphs.clear()

    # ---- drawing -----------------------------------------------------------------------------------------------------
    def first(self, logits: Tensor, slots: Sequence[int], requests: Sequence[Request]) -> Arriving:
        """The next token of `requests` in `slots` from logits (n, V), each fed to the step that follows."""
        samplings = [request.sampling for request in requests]
        kinds = Kinds.of(samplings, self.vocabulary)
        uniforms = [r.uniform(len(r.tokens)) if r.sampling.temperature else 0.0 for r in requests]
        given = torch.stack((*torch.tensor([slots, uniforms], dtype=torch.float64), *Settings.of(samplings)))
        where, uniform, *numbers = to_device(given, self._where)  # in one copy
        rows, settings = where.long(), Settings(*numbers)
        occurred = self._occurred[rows] if self._occurred is not None and kinds.penalized else None
        token, told = self._draw(logits, uniform, settings, kinds, occurred)
        fed = token.clamp(min=0)
        self._newest[rows.to(self._device)] = fed[:, None].to(self._device)
        if self._occurred is not None and kinds.penalized:
            self._occurred[rows, fed] = True
        return Arriving(Drawn(torch.stack((token, torch.ones_like(token)), dim=1), told[:, None]))

    def step(self, kinds: Kinds) -> Arriving:
        """The next token of every row that runs, or several with a draft; `kinds` is of those rows."""
        if self._changed:
            self._changed = False
            wanted = torch.tensor(self._wanted, dtype=torch.float64).T.contiguous()
            self._state.copy_(to_device(wanted, self._where))
        return Arriving(self.run(kinds))

    def run(self, kinds: Kinds) -> Drawn:
        """The step's work for the device; what it gives is overwritten by the next."""
        if self._device.type != "cuda":
            return self._advance(kinds)
        if kinds not in self._graphs:
            self._graphs[kinds] = self._record(kinds)
        graph, drawn = self._graphs[kinds]
        graph.replay()
        return drawn

    def _record(self, kinds: Kinds) -> tuple[torch.cuda.CUDAGraph, Drawn]:
        """One step as a graph. Nothing runs while it is recorded: what is written lies past the ends of the texts."""
        running = self._state[0].clone()
        self._state[0].zero_()
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
        graph, drawn = captured(lambda: self._advance(kinds), self._device, pool)
        self._state[0].copy_(running)
        return graph, drawn

    def _advance(self, kinds: Kinds) -> Drawn:
        if kinds == Kinds(greedy=True) and self.draft is None and self._where == self._device and not len(self._holes):
            return self._advance_greedily()
        cache = self.main.cache
        lengths = cache.lengths.to(self._where)
        live, settings = lengths < self._state[0], Settings(*self._state[1:])
        tokens = self._newest if self.draft is None else self._guess(self.draft, lengths, settings, kinds)
        logits, guesses = self.main.logits(tokens), tokens[:, 1:].to(self._where)
        found = [self._draw_at(logits[:, i], lengths, guesses[:, :i], settings, kinds) for i in range(1 + self.guesses)]
        drawn = torch.stack([token for token, _ in found], dim=1) if self.guesses else found[0][0][:, None]
        if self.draft is None:
            count, newest = live.to(torch.int32), drawn
        else:  # a guess counts where it is what the model draws there, and so do those before it
            right = (guesses == drawn[:, :-1]).int().cumprod(dim=1).sum(dim=1, dtype=torch.int32)
            count = torch.where(live, torch.minimum(right + 1, self._window - lengths), 0)
            newest = drawn.gather(1, (count.long() - 1).clamp(min=0)[:, None])
        newest = newest.clamp(min=0)  # of logits that are no numbers; the host ends that row when it hears of it
        if self._where == self._device:
            torch.where(live[:, None], newest, self._newest, out=self._newest)
        else:
            self._newest.copy_(torch.where(live[:, None], newest, self._newest.to(self._where)))
        if self._occurred is not None and kinds.penalized:
            for i in range(1 + self.guesses):
                token = drawn[:, i].clamp(min=0)
                self._occurred[self._rows, token] = self._occurred[self._rows, token] | (i < count)
        cache.advance(count.to(self._device))
        return Drawn(torch.cat((drawn, count[:, None]), dim=1), torch.stack([told for _, told in found], dim=1))

    def _advance_greedily(self) -> Drawn:
        """The same where all rows take their likeliest token: in one launch beside the model's."""
        model, cache = self.main.model, self.main.cache
        logits = self.main.logits(self._newest)[:, 0]
        drawn = model.ops.decode_greedy(
            logits, self._newest, cache.lengths, self._state[0], self.vocabulary, self._workspace
        )
        cache.advance(drawn[:, 1])
        return Drawn(drawn, logits.new_empty(len(logits), 1, 0))

    def _guess(self, draft: Decoder, lengths: Tensor, settings: Settings, kinds: Kinds) -> Tensor:
        """The newest token of every slot and the draft's guesses at the next: (slots, 1 + guesses)."""
        tokens = self._newest
        draft.cache.lengths.copy_(self.main.cache.lengths)
        for i in range(self.guesses + 1):  # the last one only goes into the draft's cache
            logits = draft.logits(tokens[:, -1:])[:, 0]
            draft.cache.advance(1)
            if i < self.guesses:
                guess, _ = self._draw_at(logits, lengths, tokens[:, 1:].to(self._where), settings, kinds)
                tokens = torch.cat((tokens, guess.clamp(min=0)[:, None].to(self._device)), dim=1)
        return tokens

    def _draw_at(
        self, logits: Tensor, lengths: Tensor, guesses: Tensor, settings: Settings, kinds: Kinds
    ) -> tuple[Tensor, Tensor]:
        """A token for every slot from its logits (slots, V), after its text and guesses (slots, i)."""
        uniform = self._uniforms[:, 0]  # of no matter where nobody draws
        if kinds.plain or kinds.ordered:
            at = (lengths.long() + 1 + guesses.shape[1]).clamp(max=self._window)[:, None]
            uniform = self._uniforms.gather(1, at)[:, 0]
        occurred = self._occurred if kinds.penalized else None
        if occurred is not None and guesses.shape[1]:
            occurred = occurred.scatter(1, guesses.clamp(max=self.vocabulary - 1), True)
        return self._draw(logits, uniform, settings, kinds, occurred)

    def _draw(
        self, logits: Tensor, uniform: Tensor, settings: Settings, kinds: Kinds, occurred: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A token (n,) for each row of logits (n, V), and what is told of it."""
        logits = logits[:, : self.vocabulary].to(self._where, torch.float32)
        if len(self._holes):
            logits = logits.index_fill(1, self._holes, float("-inf"))
        likely = logits if occurred is None else penalize(logits, occurred, settings.repetition_penalty)
        token = draw(likely, uniform, settings, kinds)
        told = (
            logits.new_empty(len(logits), 0) if kinds.logprobs is None else logprobs_of(logits, token, kinds.logprobs)
        )
        return token, told
