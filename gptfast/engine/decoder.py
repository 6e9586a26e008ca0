"""A model, the cache that it fills, and the two ways in: a whole prompt, and a step of all slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptfast.engine.cache import KVCache
from gptfast.engine.fused import step_of
from gptfast.model import GPT


class Decoder:
    """`model` over `cache`, a step of it with T tokens for every slot: one CUDA graph on CUDA, as torch on the rest."""

    def __init__(self, model: GPT, cache: KVCache, T: int, compile: bool) -> None:
        self.model, self.cache = model, cache

        step = step_of(model, cache)
        # Compiled without CUDA graphs of torch's own, which refuse a step that writes into its cache.
        self.step: Callable[[Tensor], Tensor] = torch.compile(step, dynamic=False) if compile else step
        if cache.lengths.device.type == "cuda":
            self.step = captured(self.step, torch.zeros(cache.slots, T, dtype=torch.int64, device=cache.lengths.device))

    def read(self, slot: int, prompt: Sequence[int]) -> Tensor:
        """Prefill: `prompt` into the empty `slot`; the logits (V,) of what follows it."""
        going_in = self.cache.prompt(slot)
        logits = self.model.logits(self._row(prompt), last_only=True, cache=going_in)
        going_in.advance(len(prompt))
        return logits[0, -1]

    def reread(self, tokens: Sequence[int]) -> Tensor:
        """The logits (V,) of what follows the last block_size of `tokens`; nothing is kept."""
        return self.model.logits(self._row(tokens[-self.model.config.block_size :]), last_only=True)[0, -1]

    def _row(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([tokens], device=self.cache.lengths.device)


@torch.inference_mode()
def captured(step: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """`step` as one CUDA graph: every launch of it is recorded once, and replayed on tokens like `example`.

    The result is overwritten by the next call. What `step` writes while it is recorded lies past the lengths of the
    cache, where nothing is read.
    """
    with torch.cuda.device(example.device):
        tokens, here, aside = example.clone(), torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # kernels are compiled and buffers allocated before the recording
            for _ in range(2):
                step(tokens)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(tokens)

    def replay(new: Tensor) -> Tensor:
        tokens.copy_(new)
        graph.replay()
        return logits

    return replay
