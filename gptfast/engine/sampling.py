"""How a request wants its tokens drawn, and the drawing.

A token is found by inversion: candidates in a fixed order, and the first whose cumulative probability exceeds a uniform
number of the request's own. So a request draws the same tokens whatever shares its batch, and whatever guessed at them.
Candidates are ordered by their logits where some are cut off, equal ones by their ids, and by their ids otherwise.

Every row of a batch has settings of its own, in tensors, so that nothing need be known of them but which `Kinds` of
drawing there are. What is computed for a kind depends on shapes alone, and a CUDA graph may replay it.

Top-p: Holtzman et al., arXiv:1904.09751; repetition penalty: Keskar et al., "CTRL", arXiv:1909.05858.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.op import require

LEAST, MOST = 1e-6, 1e6  # of temperatures and penalties
MOST_LOGPROBS = 20  # likeliest tokens that are told
CUTS = (64, 1024)  # candidates that are ordered for a top_k up to as many; beyond, all are


@dataclass(frozen=True)
class Sampling:
    """What a request asks for. Raises ValueError, naming the field, for what cannot be drawn.

    A temperature or a penalty near 0 would make infinities of logits; so near that is refused.
    """

    max_tokens: int = 256  # new tokens at most; 0 gives none
    temperature: float = 1.0  # logits are divided by it; 0 always takes the likeliest token
    top_k: int = 0  # draw from the likeliest top_k tokens; 0, or more than there are, from all
    top_p: float = 1.0  # draw from the fewest likeliest tokens whose probabilities sum to top_p; 1: from all
    repetition_penalty: float = 1.0  # logits of tokens that occurred are divided by it, or multiplied if negative
    seed: int | None = None  # of the draws; None takes one from the system
    logprobs: int | None = None  # tell how probable each token was, and as many of the likeliest; None: nothing
    stop_tokens: tuple[int, ...] = ()  # any of them ends the text and is left out
    stop: tuple[str, ...] = ()  # the first occurrence of any of them ends the text and is left out

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "logprobs"):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            may_lack = name in ("seed", "logprobs") and value is None
            require(is_whole or may_lack, f"{name}: expected a whole number, got {value!r}")
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            require(is_number, f"{name}: expected a number, got {value!r}")
        require(self.max_tokens >= 0, f"max_tokens: must not be negative, got {self.max_tokens}")
        warmth, penalty = self.temperature, self.repetition_penalty
        require(
            warmth == 0 or LEAST <= warmth <= MOST, f"temperature: must be 0, or {LEAST:g} to {MOST:g}, got {warmth}"
        )
        require(self.top_k >= 0, f"top_k: must not be negative, got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p: must be above 0 and at most 1, got {self.top_p}")
        top = self.logprobs
        require(top is None or 0 <= top <= MOST_LOGPROBS, f"logprobs: must be 0 to {MOST_LOGPROBS} or None, got {top}")
        require(LEAST <= penalty <= MOST, f"repetition_penalty: must be {LEAST:g} to {MOST:g}, got {penalty}")
        tokens, strings = self.stop_tokens, self.stop
        require(not isinstance(strings, str), "stop: expected a tuple of strings, got one string")
        are_ids = isinstance(tokens, tuple | list) and all(isinstance(token, int) for token in tokens)
        require(are_ids, f"stop_tokens: expected a tuple of token ids, got {tokens!r}")
        are_strings = isinstance(strings, tuple | list) and all(isinstance(string, str) for string in strings)
        require(are_strings, f"stop: expected a tuple of strings, got {strings!r}")
        require(all(strings), "stop: an empty string stops before the first token; leave it out")


class Kinds(NamedTuple):
    """What a batch asks for: the kinds of drawing that must be computed."""

    greedy: bool = False  # some row takes the likeliest token
    plain: bool = False  # some row draws from all
    ordered: int = 0  # candidates that are ordered for rows that cut some off: one of CUTS, or V where it is more
    penalized: bool = False
    logprobs: int | None = None  # likeliest tokens that are told

    @staticmethod
    def of(samplings: Iterable[Sampling], V: int) -> Kinds:
        """All that requests with these `samplings` need, over V tokens."""
        greedy = plain = penalized = False
        ordered, told = 0, None
        for sampling in samplings:
            if sampling.temperature == 0:
                greedy = True
            elif 0 < sampling.top_k < V:
                ordered = max(ordered, min(V, next((cut for cut in CUTS if cut >= sampling.top_k), V)))
            elif sampling.top_p < 1:
                ordered = V
            else:
                plain = True
            penalized |= sampling.repetition_penalty != 1
            if sampling.logprobs is not None:
                told = max(told or 0, min(V, MOST_LOGPROBS) if sampling.logprobs else 0)
        return Kinds(greedy, plain, ordered, penalized, told)


class Settings(NamedTuple):
    """Of every row, fp64 (B,): Sampling's fields of the same names."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    repetition_penalty: Tensor

    @staticmethod
    def of(samplings: Iterable[Sampling]) -> Settings:
        """Those of a list of requests, on the host."""
        return Settings(*torch.tensor([as_numbers(sampling) for sampling in samplings], dtype=torch.float64).T)


def as_numbers(sampling: Sampling) -> tuple[float, ...]:
    """The fields of Settings of one row."""
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty


def draw(logits: Tensor, uniform: Tensor, settings: Settings, kinds: Kinds) -> Tensor:
    """A token (B,) int64 for each row of logits (B, V) fp32, with uniform (B,) fp64 in [0, 1).

    -1 where the logits of a row are not numbers. No row depends on another. `kinds` is of all rows that count.
    """
    largest, token = logits.max(dim=-1)
    if kinds.plain or kinds.ordered:
        V, temperature = logits.shape[-1], settings.temperature
        cut = ((settings.top_k > 0) & (settings.top_k < V)) | (settings.top_p < 1)
        warmth = torch.where(temperature > 0, temperature, 1.0)[:, None]
        if kinds.plain:
            weight = ((logits.double() - largest[:, None]) / warmth).exp()
            drawn = _invert(weight, uniform)
            token = torch.where((temperature > 0) & ~cut, drawn, token)
        if kinds.ordered:
            order = _largest(logits, kinds.ordered)
            weight = ((logits.gather(-1, order).double() - largest[:, None]) / warmth).exp()
            most = torch.where((settings.top_k > 0) & (settings.top_k < V), settings.top_k, V)[:, None]
            weight = weight.masked_fill(torch.arange(kinds.ordered, device=logits.device) >= most, 0.0)
            cumulative = weight.cumsum(dim=-1)
            few = cumulative - weight < settings.top_p[:, None] * cumulative[:, -1:]  # the first is always kept
            weight = torch.where(few | (settings.top_p == 1)[:, None], weight, 0.0)
            drawn = order.gather(-1, _invert(weight, uniform)[:, None])[:, 0]
            token = torch.where((temperature > 0) & cut, drawn, token)
    return torch.where(largest.isfinite(), token, -1)


def _invert(weight: Tensor, uniform: Tensor) -> Tensor:
    """The first place (B,) at which the sums of weight (B, n) exceed uniform times their total."""
    cumulative = weight.cumsum(dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]  # below the total, even rounded
    place = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return place.clamp(max=weight.shape[-1] - 1)  # that of NaN is past the end


def _largest(logits: Tensor, n: int) -> Tensor:
    """Ids (B, n) of the n largest logits (B, V) fp32, in order; of equal ones the smaller id first.

    By keys that no two tokens share, so that neither n nor the way to sort matters.
    """
    V = logits.shape[-1]
    bits = logits.view(torch.int32)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the numbers
    key = (rank.long() << 32) | torch.arange(V - 1, -1, -1, device=logits.device)
    key = key.topk(n, dim=-1).values if n < V else key.sort(dim=-1, descending=True).values
    return V - 1 - (key & 0xFFFFFFFF)


def logprobs_of(logits: Tensor, tokens: Tensor, top: int) -> Tensor:
    """Of tokens (B,) drawn from logits (B, V) fp32: (B, 1 + 2 top) fp64, the log-probability of each, the `top`
    likeliest tokens, and theirs."""
    log_p = logits.log_softmax(-1)
    own = log_p.gather(-1, tokens.clamp(min=0)[:, None])
    values, ids = log_p.topk(top, dim=-1)
    return torch.cat((own, ids, values), dim=-1).double() if top else own.double()


def penalize(logits: Tensor, occurred: Tensor, penalty: Tensor) -> Tensor:
    """logits (B, V) with those of tokens that occurred (B, V) made less likely, by a penalty (B,) below 1: more."""
    penalty = penalty.to(logits.dtype)[:, None]
    return torch.where(occurred, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
