"""What a step of decoding, and a prompt, give a GPU and its host to do: counted and timed on any CPU without launches.

On a GPU the step is one replay of a graph, the drawing of tokens in it, so the host's work is what the engine does
around it; the device's time grows with the number of its launches. They are counted for greedy requests.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from gptfast.config import GPTConfig
from gptfast.engine import Engine, KVCache, Sampling
from gptfast.engine.decoder import LONGEST, Decoder
from gptfast.engine.loop import Drawn, Loop
from gptfast.engine.sampling import Kinds
from gptfast.engine.weights import Weights, converted
from gptfast.model import GPT
from kernels import OPS
from kernels._triton import launching

from .host import Count, one_thread

MAKES_NOTHING = {  # a launch
    "alias", "detach", "empty", "empty_like", "empty_strided", "new_empty", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
HOST_STEPS = 100


@dataclass(frozen=True)
class StepWork:
    """What one step of the engine asks of a GPU and of the host."""

    kernels: int  # launches of ours
    torch_ops: int  # of torch's, each a launch or more
    host_us: float  # of the engine for each step, its device's work left out
    first_us: float | None  # of the engine from a prompt to its first token, likewise; None where no graph reads it


class CountOps(TorchDispatchMode):
    """Counts torch's operators that compute or copy; views and allocations give a GPU nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in MAKES_NOTHING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def step_work(config: GPTConfig, B: int, length: int, weights: Weights) -> StepWork:
    """The work of one step of B sequences of `length` tokens, at most block_size - 1.

    By a narrow twin of the model on the CPU: what is launched depends on layers, heads and lengths, not on widths. The
    kernels' pages run as for an H100, and launch nothing.
    """
    narrow = dataclasses.replace(config, n_embd=16 * config.n_head, vocab_size=64)
    ops = kernels.Ops({name: ("triton", "launches left out", op.triton or op.reference) for name, op in OPS.items()})
    count, seen = Count(), CountOps()
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=()), launching(count.launcher):
        model = GPT(narrow, ops).eval()
        model.dtype = torch.bfloat16
        model = converted(model, weights)
        cache = KVCache(narrow, ops, B, dtype=model.dtype, device=torch.device("cpu"))
        for slot in range(B):
            cache.reserve(slot, length + 1)
        cache.lengths.fill_(length)
        # The drawing and the rest of the loop on the device belong to the step.
        loop = Loop(Decoder(model, cache, compile=False), None, 0, narrow.vocab_size, torch.empty(0, dtype=torch.int64))
        step = lambda: loop.run(Kinds(greedy=True))
        step()
        cache.lengths.fill_(length)  # what counts them did not run
        before = count.launches
        with seen:
            step()
        launches = count.launches - before
        with one_thread():
            taken_us, first = host_us(model, B), first_us(model, length) if length <= LONGEST else None
    return StepWork(launches, len(seen.seen), taken_us, first)


def host_us(model: GPT, B: int) -> float:
    """Microseconds of the engine for each step of B greedy requests, where the device's work is done already.

    What is timed ends with the tokens in their requests. A request that ended early would let the engine idle.
    """
    rounds = max(2, min(HOST_STEPS, model.config.block_size - 2))
    engine = Engine(model, slots=B, weights="model")
    drawn = Drawn(torch.ones(B, 2, dtype=torch.int64), torch.empty(B, 1, 0, dtype=torch.float64))
    engine.loop.run = lambda kinds: drawn  # type: ignore[method-assign]
    engine.decoder.read = lambda pieces: torch.zeros(len(pieces), model.config.n_embd)  # type: ignore[method-assign]
    engine.model.logits_of = lambda x: torch.randn(len(x), model.config.vocab_size)  # type: ignore[method-assign]
    requests = [engine.submit([0], Sampling(max_tokens=rounds + 1, temperature=0)) for _ in range(B)]
    engine.step()  # lets them in
    taken = [_timed(engine.step) for _ in range(rounds)]
    unlike = {(request.finish_reason, request.error) for request in requests} - {("length", "")}
    if unlike or engine.busy:
        raise RuntimeError(f"the engine did not decode as it was timed: {unlike or 'it still runs'}")
    return median(taken) * 1e6


class Idle:
    """A graph whose replay does nothing."""

    def replay(self) -> None: ...

    def pool(self) -> None: ...


def first_us(model: GPT, prompt: int) -> float:
    """Microseconds of the engine from submit() to the first token of a prompt, where the device's work is done already.

    Of a prompt whose length has been read before, so that a graph reads it.
    """
    engine = Engine(model, slots=1, weights="model", prefill_alone=prompt)
    logits = torch.zeros(1, model.config.vocab_size)
    engine.model.logits_of = lambda x: logits  # type: ignore[method-assign]
    engine.decoder.records = True
    engine.decoder.capture = lambda run, device, pool: (Idle(), run())  # type: ignore[assignment,misc]
    text = [i % model.config.vocab_size for i in range(prompt)]

    def first() -> None:
        request = engine.submit(text, Sampling(max_tokens=1, temperature=0))
        while engine.busy:
            engine.step()
        if request.finish_reason != "length":
            raise RuntimeError(f"the prompt was not read as it was timed: {request.error}")

    first()
    return median(_timed(first) for _ in range(HOST_STEPS)) * 1e6


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
