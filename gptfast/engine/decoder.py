"""A model, the cache that it fills, and the ways in: prompts, whole or in pieces, and a step of all slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptfast.engine.cache import KVCache, Piece, Whole, all_to_device, to_device
from gptfast.engine.fused import step_of
from gptfast.model import GPT

Result = TypeVar("Result")
LONGEST = 4096  # tokens of a text that a graph reads; of more the device takes longer than its host
TOGETHER = 8  # texts that graphs read one by one; each reads all weights, so that of more one pass is better
ROUNDING = 64  # what lengths of graphs are multiples of


class Decoder:
    """`model` over `cache`. A step has the same number of tokens for every slot; on CUDA `step` is one CUDA graph.

    With `records`, as on CUDA, whole texts are read by graphs too, one for each padded length, recorded when it first
    comes up. Launch by launch the host takes longer than the device. Where memory does not suffice, there are none.
    """

    def __init__(self, model: GPT, cache: KVCache, compile: bool) -> None:
        self.cache, self._compile = cache, compile
        self.records = cache.lengths.device.type == "cuda"
        self.use(model)

    def use(self, model: GPT) -> None:
        """Go on with another model of the same config; a step is recorded anew, and so is reading."""
        self.model = model
        self._graph: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self._readers: dict[int, tuple[Whole, torch.cuda.CUDAGraph, Tensor]] = {}
        logits = step_of(model, self.cache)
        # Compiled without CUDA graphs of torch's own, which refuse a step that writes into its cache.
        self.logits: Callable[[Tensor], Tensor] = torch.compile(logits, dynamic=False) if self._compile else logits

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (slots, T, V) of tokens (slots, T), T always the same; the next call overwrites them.

        What the step writes while it is recorded lies past the lengths of the cache, where nothing is read.
        """
        if self.cache.lengths.device.type != "cuda":
            return self.logits(tokens)
        if self._graph is None:
            self._tokens = tokens.clone()
            self._graph = captured(lambda: self.logits(self._tokens), tokens.device)
        self._tokens.copy_(tokens)
        self._graph[0].replay()
        return self._graph[1]

    def read(self, pieces: Sequence[tuple[Piece, Sequence[int]]]) -> Tensor:
        """Pieces of texts go into their slots; the hidden state (n, C) at the end of each."""
        whole = all(piece.start == 0 and piece.tokens <= LONGEST for piece, _ in pieces)
        if self.records and whole and len(pieces) <= TOGETHER:
            try:
                return torch.cat([self._read_recorded(piece, text) for piece, text in pieces])
            except torch.OutOfMemoryError:  # launch by launch it may
                self._readers.clear()
                self.records = False
        going_in = self.cache.pieces([piece for piece, _ in pieces])
        given = torch.tensor([token for _, text in pieces for token in text])
        ends = torch.tensor([piece.tokens for piece, _ in pieces]).cumsum(0) - 1
        tokens, last = all_to_device([given, ends], self.cache.lengths.device)
        x = self.model.hidden(tokens[None], cache=going_in)
        going_in.advance()
        return x[0, last]

    def _read_recorded(self, piece: Piece, text: Sequence[int]) -> Tensor:
        """A text goes into the empty slot of `piece` by one graph; the hidden state (1, C) at its end."""
        length = padded(piece.tokens, self.model.config.block_size)
        if length not in self._readers:
            pool = next((graph.pool() for _, graph, _ in self._readers.values()), None)
            whole = self.cache.whole(length)
            whole.give(piece.slot, text)  # what is recorded runs before, and writes into the cache
            run = lambda: whole.finish(self.model.hidden(whole.tokens[None], cache=whole))
            self._readers[length] = whole, *captured(run, whole.tokens.device, pool)
        whole, graph, hidden = self._readers[length]
        whole.give(piece.slot, text)
        graph.replay()
        return hidden.clone()  # where it lies, other graphs write

    def read_whole(self, slot: int, prompt: Sequence[int]) -> Tensor:
        """A whole prompt goes into the empty `slot`; the logits (V,) of what follows it."""
        return self.model.logits_of(self.read([(Piece(slot, 0, len(prompt)), prompt)]))[0]

    def reread(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The logits (n, V) of what follows the last block_size tokens of each text, of which it has as many; nothing
        is kept."""
        tokens = torch.tensor([text[-self.model.config.block_size :] for text in texts])
        return self.model.logits(to_device(tokens, self.cache.lengths.device), last_only=True)[:, -1]


def padded(tokens: int, most: int) -> int:
    """`tokens` rounded up to one of a few lengths, four to each doubling and none above `most`."""
    step = max(ROUNDING, 1 << (tokens - 1).bit_length() >> 3)
    return min(-(-tokens // step) * step, most)


@torch.inference_mode()
def captured(run: Callable[[], Result], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Every launch of `run`, recorded once; and its result, which each replay overwrites."""
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # kernels are compiled and buffers allocated before the recording
            for _ in range(2):
                run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = run()
    return graph, result
