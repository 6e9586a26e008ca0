"""The ways to decode that `bench decode` sets side by side: the engine in its forms, and its peers.

Each takes the same model with the same random weights, and continues tokens greedily.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from gptfast.config import GPTConfig
from gptfast.engine import Engine, KVCache, Sampling
from gptfast.engine.decoder import Decoder
from gptfast.engine.weights import Weights, choose_weights, converted
from gptfast.log import Log
from gptfast.model import GPT
from kernels import _triton

from . import compiling, peers
from .failures import FAILURES, in_one_line

NAIVE_LENGTHS = 6  # at which the naive loop is timed
IN_ORDER = "in_order"  # a variant of the engine: see launching_in_order


@dataclass(frozen=True)
class Size:
    """`new` tokens after `prompt` tokens, for B sequences at once."""

    B: int
    prompt: int
    new: int

    @property
    def dims(self) -> dict[str, int]:
        return {"B": self.B, "prompt": self.prompt, "new": self.new}


@dataclass(frozen=True)
class Variant:
    """One way to decode. `generate(tokens, n)` gives n tokens (B, n) after tokens (B, T), greedily."""

    impl: str
    dtype: str  # of the activations
    weight_bytes: float  # per number
    kv_bytes: float
    generate: Callable[[Tensor, int], Tensor]
    logits: Callable[[Tensor], Tensor]  # (B, V) after tokens (B, T)
    lengths: int | None = None  # of the naive loop: how many are timed
    weights: Weights | None = None  # of the engine: their form
    graph_breaks: Callable[[], int] | None = None  # of torch.compile's: how often its step was cut in two


def fresh(config: GPTConfig, device: torch.device) -> GPT:
    """A model with the same random weights at every call, as this device runs it."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config, kernels.load("auto" if device.type == "cuda" else "cpu")).eval()
    if device.type != "cpu":
        model.dtype = torch.bfloat16
    return model


def with_ops(model: GPT, ops: kernels.Ops) -> GPT:
    """The model with other kernels, over the same weights."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, {**shared, id(model.ops): ops})


def let_go() -> None:
    """Give memory that nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def by_engine(model: GPT, size: Size, weights: Weights) -> Variant:
    """The engine, with its matrices in the form `weights`."""
    engine = Engine(model, slots=size.B, weights=weights)

    def generate(tokens: Tensor, n: int) -> Tensor:
        requests = [engine.submit(row, Sampling(max_tokens=n, temperature=0)) for row in tokens.tolist()]
        while engine.busy:
            engine.step()
        return torch.tensor([request.tokens for request in requests])

    itemsize = {"float16": 2, "int8": 1}.get(weights, model.dtype.itemsize)
    dtype = engine.model.dtype
    impl = "engine" if weights == "model" else f"engine {weights}"
    return Variant(impl, name_of(dtype), itemsize, dtype.itemsize, generate, last(engine.model), None, weights)


def by_variant(model: GPT, size: Size, name: str) -> Variant:
    """The engine with kernels that run only when asked for, or with none that starts before the one in front ended."""
    if name != IN_ORDER:
        chosen = {op.name: name for op in kernels.OPS.values() if name in op.variants}
        model = with_ops(model, kernels.load("auto", **chosen))
    way = by_engine(model, size, "model")

    def generate(tokens: Tensor, n: int) -> Tensor:
        with _triton.launching_in_order() if name == IN_ORDER else contextlib.nullcontext():
            return way.generate(tokens, n)

    return dataclasses.replace(way, impl=f"engine {name}", generate=generate, weights=None)


def naive(model: GPT) -> Variant:
    """A forward pass over everything for each token, as nanoGPT's generate does."""

    def generate(tokens: Tensor, n: int) -> Tensor:
        start = tokens.shape[1]
        for _ in range(n):
            tokens = torch.cat((tokens, last(model)(tokens).argmax(-1, keepdim=True)), dim=1)
        return tokens[:, start:].cpu()

    itemsize = model.dtype.itemsize
    return Variant("naive", name_of(model.dtype), itemsize, itemsize, generate, last(model), NAIVE_LENGTHS)


def transformers_model(config: GPTConfig, model: GPT, dtype: torch.dtype) -> Any:
    """GPT-2 of transformers, with torch's attention, over the weights of `model`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from gptfast import hf

    settings, weights = hf.exported(model, "gpt2")
    chosen = GPT2Config(**{key: value for key, value in settings.items() if key != "architectures"})
    chosen._attn_implementation = "sdpa"
    with torch.device("meta"):  # its own random weights would be thrown away
        theirs: Any = GPT2LMHeadModel(chosen)
    theirs.load_state_dict({name: x.to(dtype) for name, x in weights.items()}, strict=False, assign=True)
    theirs.tie_weights()
    return theirs.eval()


def by_transformers(config: GPTConfig, model: GPT, dtype: torch.dtype) -> Variant:
    """transformers' generate, with its cache and torch's attention, over the same weights."""
    theirs = transformers_model(config, model, dtype)

    def generate(tokens: Tensor, n: int) -> Tensor:
        mask = torch.ones_like(tokens)
        out = theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
        )
        return out[:, tokens.shape[1] :].cpu()

    itemsize = dtype.itemsize
    return Variant(
        "transformers", name_of(dtype), itemsize, itemsize, generate, lambda tokens: theirs(tokens).logits[:, -1]
    )


def compiled(model: GPT, size: Size) -> Variant:
    """torch.compile of a step of the model in plain torch over a static cache, with torch's attention under a mask."""
    chosen = {name: ("reference", "plain torch", peers.in_torch(op)) for name, op in kernels.OPS.items()}
    fused = peers.sdpa_decode(None)
    ops = kernels.Ops({**chosen, "decode_attention": ("sdpa", "torch's attention", fused)})
    plain = converted(with_ops(model, ops), "model")
    cache = KVCache(model.config, ops, size.B, dtype=model.dtype, device=model.lm_head.weight.device)
    decoder = Decoder(plain, cache, compile=True)

    def generate(tokens: Tensor, n: int) -> Tensor:
        for slot in range(size.B):
            cache.release(slot)
        logits = torch.stack([decoder.read_whole(slot, row) for slot, row in enumerate(tokens.tolist())])
        found = [logits.argmax(-1, keepdim=True)]
        while len(found) < n:
            found.append(decoder.step(found[-1])[:, -1].argmax(-1, keepdim=True))
            cache.advance(1)
        return torch.cat(found, dim=1).cpu()

    itemsize, before = model.dtype.itemsize, compiling.count_breaks()
    breaks = lambda: compiling.count_breaks() - before
    dtype = name_of(model.dtype)
    return Variant("torch.compile", dtype, itemsize, itemsize, generate, last(plain), graph_breaks=breaks)


def asked_for() -> list[str]:
    """What --variants may name."""
    return [*sorted({name for op in kernels.OPS.values() for name in op.variants}), IN_ORDER]


def last(model: GPT) -> Callable[[Tensor], Tensor]:
    return lambda tokens: model.logits(tokens, last_only=True)[:, -1]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def variants(model: GPT, size: Size, compiles: bool, log: Log, asked: Sequence[str] = ()) -> Iterator[Variant]:
    """Every way that the model's device has, the naive one first; what cannot be made is said, and left out."""
    on_cpu = model.lm_head.weight.device.type == "cpu"
    chosen, _ = choose_weights(model)
    forms: tuple[Weights, ...] = ("model", "float16", "int8") if on_cpu else ("model", "int8")
    ways: dict[str, Callable[[], Variant]] = {"naive": lambda: naive(converted(model, "model"))}
    for form in sorted(forms, key=chosen.__ne__):
        ways[f"engine {form}"] = functools.partial(by_engine, model, size, form)
    ways |= {f"engine {name}": functools.partial(by_variant, model, size, name) for name in asked}
    if importlib.util.find_spec("transformers") is None:
        log.say("decode transformers is not installed: its generate is left out")
    else:
        for dtype in (torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16,):
            ways[f"transformers {name_of(dtype)}"] = functools.partial(by_transformers, model.config, model, dtype)
    if compiles:
        ways["torch.compile"] = lambda: compiled(model, size)
    for name, make in ways.items():
        try:
            yield make()
        except FAILURES as error:
            log.row("note", name=f"{name} {size.dims}", text=f"left out: {type(error).__name__}: {error}")
            log.say(f"decode {name}: left out: {in_one_line(error)}")
        let_go()
