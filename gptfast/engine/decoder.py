"""A model, the cache that it fills, and the ways in: prompts, whole or in pieces, and a step of all slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gptfast.engine.cache import KVCache, Padded, Piece, all_to_device, to_device
from gptfast.engine.fused import step_of
from gptfast.model import GPT

Result = TypeVar("Result")
LONGEST = 4096  # positions of a text that a graph reads; of more the device takes longer than its host
TOGETHER = 8  # pieces that graphs read one by one; each reads all weights, so that of more one pass is better
ROUNDING = 64  # what lengths of graphs are multiples of


class Reader(NamedTuple):
    """A graph that reads pieces of one padded length: what it is given, and what it gives."""

    given: Padded
    graph: torch.cuda.CUDAGraph
    hidden: Tensor


class Decoder:
    """`model` over `cache`. A step has the same number of tokens for every slot; on CUDA `step` is one CUDA graph.

    With `records`, as on CUDA, pieces of texts are read by graphs too, one for each padded length, recorded when it
    first comes up: launch by launch the host takes longer than the device. Where memory does not suffice, it has none.
    """

    def __init__(self, model: GPT, cache: KVCache, compile: bool) -> None:
        self.cache, self._compile = cache, compile
        has_room = cache.paged or cache.capacity > model.config.block_size  # for what stands behind a text
        self.records = cache.lengths.device.type == "cuda" and has_room
        self.capture = captured  # how a graph is recorded
        self.use(model)

    def use(self, model: GPT) -> None:
        """Go on with another model of the same config; a step is recorded anew, and so is reading."""
        self.model = model
        self._graph: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self._readers: dict[tuple[int, int], Reader] = {}
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
            self._graph = self.capture(lambda: self.logits(self._tokens), tokens.device)
        self._tokens.copy_(tokens)
        self._graph[0].replay()
        return self._graph[1]

    def read(self, pieces: Sequence[tuple[Piece, Sequence[int]]]) -> Tensor:
        """Pieces of texts go into their slots; the hidden state (n, C) at the end of each."""
        lengths = [self._padded(piece) for piece, _ in pieces] if self.records else []
        fits = all(seen == 0 or not self.cache.has_rings for _, seen in lengths)
        if self.records and fits and len(pieces) <= TOGETHER and max(map(max, lengths)) <= LONGEST:
            try:  # all are recorded before any is read, so that who finds no memory has read nothing
                readers = [self._reader(*length, *piece) for length, piece in zip(lengths, pieces, strict=True)]
                return torch.cat([self._replayed(*one) for one in zip(readers, pieces, strict=True)])
            except torch.OutOfMemoryError:  # launch by launch it may suffice
                self._readers.clear()
                self.records = False
        going_in = self.cache.pieces([piece for piece, _ in pieces])
        given = torch.tensor([token for _, text in pieces for token in text])
        ends = torch.tensor([piece.tokens for piece, _ in pieces]).cumsum(0) - 1
        tokens, last = all_to_device([given, ends], self.cache.lengths.device)
        x = self.model.hidden(tokens[None], cache=going_in)
        going_in.advance()
        return x[0, last]

    def _padded(self, piece: Piece) -> tuple[int, int]:
        """How many tokens a graph has that reads `piece`, and positions that they see beside themselves, if any."""
        if piece.start == 0:
            return padded(piece.tokens, 4, self.model.config.block_size), 0
        tokens = padded(piece.tokens, 1)
        return tokens, padded(piece.start + tokens, 1)

    def _reader(self, tokens: int, seen: int, piece: Piece, text: Sequence[int]) -> Reader:
        """The graph of that length; it is recorded if `piece` is the first that needs it."""
        if (tokens, seen) not in self._readers:
            pool = next((reader.graph.pool() for reader in self._readers.values()), None)
            given = self.cache.padded(tokens, seen)
            # What is recorded runs before: on one token, which takes the place of nothing that the piece looks back at.
            given.give(Piece(piece.slot, piece.start, 1), text[:1])
            run = lambda: given.finish(self.model.hidden(given.tokens[None], cache=given))
            self._readers[tokens, seen] = Reader(given, *self.capture(run, given.tokens.device, pool))
        return self._readers[tokens, seen]

    def _replayed(self, reader: Reader, piece: tuple[Piece, Sequence[int]]) -> Tensor:
        """A piece goes into its slot; the hidden state (1, C) at its end."""
        reader.given.give(*piece)
        reader.graph.replay()
        return reader.hidden.clone()  # where it lies, other graphs write

    def read_whole(self, slot: int, prompt: Sequence[int]) -> Tensor:
        """A whole prompt goes into the empty `slot`; the logits (V,) of what follows it."""
        return self.model.logits_of(self.read([(Piece(slot, 0, len(prompt)), prompt)]))[0]

    def reread(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The logits (n, V) of what follows the last block_size tokens of each text, of which it has as many; nothing
        is kept."""
        tokens = torch.tensor([text[-self.model.config.block_size :] for text in texts])
        return self.model.logits(to_device(tokens, self.cache.lengths.device), last_only=True)[:, -1]


def padded(tokens: int, steps: int, most: int | None = None) -> int:
    """`tokens` rounded up to one of a few lengths, so many steps to each doubling, and none above `most`."""
    step = max(ROUNDING, (1 << (tokens - 1).bit_length()) // (2 * steps))
    length = -(-tokens // step) * step
    return length if most is None else min(length, most)


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
