"""A whole text into an empty slot, padded to one of a few lengths, so that one CUDA graph reads every text of a length.

Launch by launch the host takes ten times as long for a prompt of GPT-2's as the device. What is particular to a text
lies in one tensor, `given`; all else follows from the padded length. What stands behind the end of a text is seen by
nobody: attention is causal, no other operation mixes positions, and its keys and values go where nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptfast.engine.cache import KVCache, Piece, to_device
from gptfast.model import GPT, narrowed

LONGEST = 4096  # tokens; the device takes longer for more than its host
TOGETHER = 8  # texts that are read one by one; each reads all weights, so that more are better read in one pass
STEP = 64  # what lengths are rounded up to, at least


def padded(tokens: int, most: int) -> int:
    """`tokens` rounded up to one of a few lengths, four to each doubling and none above `most`."""
    step = max(STEP, 1 << (tokens - 1).bit_length() >> 3)
    return min(-(-tokens // step) * step, most)


def fits(cache: KVCache) -> bool:
    """Whether `cache` keeps keys and values alone, and all of a text: no inputs of token shifts, and no mere windows."""
    return not cache.shifts and not any(map(cache.is_ring, range(cache.config.n_layer)))


class WholeText:
    """What reads any one text of up to `length` tokens into a slot of `cache`: a cache to `model` while it does."""

    def __init__(self, model: GPT, cache: KVCache, length: int) -> None:
        self.model, self.cache, self.length = model, cache, length
        device = cache.lengths.device
        self.given = torch.zeros(2 * length + 3, dtype=torch.int64, device=device)
        self._tokens, self._where, self._end = self.given.split((length, length, 3))
        self._positions = torch.arange(length, device=device)[None]

    def give(self, piece: Piece, text: Sequence[int]) -> None:
        """`text` is what run() reads next, into the slot of `piece`."""
        behind = [0] * (self.length - piece.tokens)
        where = self.cache.padded_rows(piece.slot, self.length)
        end = torch.tensor([piece.tokens - 1, piece.slot, piece.end])
        given = torch.cat((torch.tensor([*text, *behind]), where, end))
        self.given.copy_(to_device(given, self.given.device))

    def run(self) -> Tensor:
        """The work for the device: the text that is given goes in; the hidden state (1, C) at its end."""
        x = self.model.hidden(self._tokens[None], cache=self)
        last, slot, end = self._end.split(1)
        self.cache.lengths.index_copy_(0, slot, end.to(torch.int32))
        return x[0].index_select(0, last)

    def place(self, T: int) -> Tensor:
        """Positions (1, length) of the text and of what stands behind it."""
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps k and v (1, length, G, D) of `layer`; causal attention of q (1, length, H, D) to them as kept."""
        cache = self.cache
        cache.keep(layer, self._where, k, v)
        window = narrowed(cache.config.windows[layer], self.length)
        return cache.ops.attention(q, cache.as_kept(k), cache.as_kept(v), causal=True, window=window)

    def previous(self, place: int, x: Tensor, taps: int) -> Sequence[Tensor]:
        raise NotImplementedError("a cache with token shifts does not fit")
