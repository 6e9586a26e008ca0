"""A request, what a step adds to it, and how probable its tokens were."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gptfast.engine.sampling import Sampling
from gptfast.engine.text import TextStream

Reason = Literal["stop", "length", "cancelled", "error"]


class Logprob(NamedTuple):
    """How probable a token was: by the model's own logits, before temperature, penalty and cuts."""

    logprob: float  # natural logarithm of the probability of the token that was drawn
    top: tuple[tuple[int, float], ...]  # the likeliest (token, logprob), as many as were asked for, likeliest first

    @staticmethod
    def of(numbers: list[float], top: int) -> Logprob:
        """From the numbers that sampling.logprobs_of gives of one token, for at least `top` others."""
        count = len(numbers) // 2
        ids, values = numbers[1 : 1 + top], numbers[1 + count : 1 + count + top]
        return Logprob(numbers[0], tuple((int(token), value) for token, value in zip(ids, values, strict=True)))


class Request:
    """One prompt and what became of it. `tokens` are the new ones; `text` is theirs, if the engine has a tokenizer.

    `finish_reason` is None while it waits and runs, then "stop" (a stop token or string), "length", "cancelled", or
    "error", with what went wrong in `error`: such a request ends alone, and the others go on as without it. With
    Sampling's `logprobs` there is a Logprob for each token in `logprobs`; otherwise that is empty.
    """

    def __init__(self, prompt: list[int], sampling: Sampling, stream: TextStream | None) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.text = ""
        self.finish_reason: Reason | None = None
        self.error = ""
        self._stream = stream
        self._random = random.Random(random.SystemRandom().getrandbits(64) if sampling.seed is None else sampling.seed)
        self._uniforms: list[float] = []

    def uniform(self, i: int) -> float:
        """The random number in [0, 1) that draws token i: the same whenever it is asked for."""
        while len(self._uniforms) <= i:
            self._uniforms.append(self._random.random())
        return self._uniforms[i]


@dataclass
class Update:
    """What a step added to a request: its new tokens, a Logprob of each if asked for, and the text made certain."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    text: str = ""
