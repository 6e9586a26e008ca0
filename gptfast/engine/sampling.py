"""How a request wants its tokens drawn, and the drawing.

A token is found by inversion: candidates in a fixed order, and the first whose cumulative probability exceeds a uniform
number of the request's own. So a request draws the same tokens whatever shares its batch, and whatever guessed at them.

Top-p: Holtzman et al., arXiv:1904.09751; repetition penalty: Keskar et al., "CTRL", arXiv:1909.05858.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.op import require

LEAST, MOST = 1e-6, 1e6  # of temperatures and penalties
MOST_LOGPROBS = 20  # likeliest tokens that are told


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


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """A token (B,) int64 for each row of logits (B, V), with uniform (B,) fp64 in [0, 1).

    -1 where the logits of a row are not numbers. No row depends on another.
    """
    if temperature == 0:
        largest, token = logits.max(dim=-1)
        return torch.where(largest.isfinite(), token, -1)
    V, order = logits.shape[-1], None
    if 0 < top_k < V:
        logits, order = logits.topk(top_k, dim=-1)
    elif top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True)
    p = (logits.double() / temperature).softmax(dim=-1)
    cumulative = p.cumsum(dim=-1)
    sound = cumulative[:, -1].isfinite()
    if top_p < 1:
        cumulative = torch.where(cumulative - p < top_p, p, 0.0).cumsum(dim=-1)  # the first is always kept
    threshold = uniform[:, None] * cumulative[:, -1:]  # below the total, even rounded
    token = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    token = token.clamp(max=p.shape[-1] - 1)  # that of NaN is past the end
    if order is not None:
        token = order.gather(-1, token[:, None])[:, 0]
    return torch.where(sound, token, -1)


def logprobs_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """For each token, drawn from its row of logits (n, V) fp32: its log-probability, and the `top` likeliest with
    theirs."""
    log_p = logits.log_softmax(-1)
    own = log_p.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    return [
        (one, tuple(zip(row_ids, row, strict=True)))
        for one, row_ids, row in zip(own, ids.tolist(), values.tolist(), strict=True)
    ]


def penalize(logits: Tensor, occurred: Sequence[int], penalty: float) -> Tensor:
    """logits (V,) with those of tokens that occurred made less likely (by a penalty below 1: more)."""
    ids = torch.tensor(sorted(set(occurred)), device=logits.device)
    ids = ids[ids < logits.shape[-1]]
    found = logits[ids]
    return logits.index_copy(0, ids, torch.where(found > 0, found / penalty, found * penalty))
