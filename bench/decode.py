"""Tokens per second of decoding: time to first token, time per output token, and how much of the bandwidth that uses.

    python -m bench decode                       # on a GPU batch 1, 8, 32 and contexts of 128 to 8k; on a CPU one size
    python -m bench decode --models=gpt2 --batch=1 --context=272 --new=256 --compile
    python -m bench decode --quick

Variants side by side in one process, round after round: the engine with each form of its weights that the device takes,
the naive loop that reads everything again for each token, transformers' generate with its cache, and on a GPU, or with
--compile, torch.compile of the same model over a static cache with torch's attention, as one CUDA graph on CUDA. All
continue the same random tokens greedily, with the same random weights. `ttft_ms` is the time of a call that gives one
token, `tpot_ms` what each further one adds; the naive loop is timed at a few of its lengths, which `timed_lengths`
counts. `mbu` is the bytes of weights and of keys and values that a step must read, over its time and the peak
bandwidth, by the datasheet or by the copy of `python -m bench peaks`. `error` is that of the logits after the prompt,
against the same weights in fp32 and plain torch.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import kernels
from gptfast import mfu
from gptfast.cli import UserError, nearest
from gptfast.config import PRESETS, GPTConfig
from gptfast.engine import Engine, KVCache, Sampling
from gptfast.engine.decoder import Decoder
from gptfast.engine.weights import choose_weights, converted
from gptfast.log import Log, Row, facts
from gptfast.model import GPT

from . import results
from .peaks import ceilings
from .timing import FAILURES, relative_error, summarize

NAIVE_LENGTHS = 6  # at which the naive loop is timed
DISTURBED = 10  # how often one token may take longer than all of them, because the machine did something else meanwhile
MEASURED_SLACK = 0.15  # a copy that other tenants slowed may be beaten


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


# ---- ways to decode --------------------------------------------------------------------------------------------------
def by_engine(model: GPT, size: Size, weights: Any) -> Variant:
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
    return Variant(impl, _name(dtype), itemsize, dtype.itemsize, generate, _last(engine.model))


def naive(model: GPT) -> Variant:
    """A forward pass over everything for each token, as nanoGPT's generate does."""

    def generate(tokens: Tensor, n: int) -> Tensor:
        start = tokens.shape[1]
        for _ in range(n):
            tokens = torch.cat((tokens, _last(model)(tokens).argmax(-1, keepdim=True)), dim=1)
        return tokens[:, start:].cpu()

    itemsize = model.dtype.itemsize
    return Variant("naive", _name(model.dtype), itemsize, itemsize, generate, _last(model), NAIVE_LENGTHS)


def by_transformers(config: GPTConfig, model: GPT, dtype: torch.dtype) -> Variant:
    """transformers' generate, with its cache and torch's attention, over the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from gptfast import hf

    settings, weights = hf.exported(model, "gpt2")
    chosen = GPT2Config(**{key: value for key, value in settings.items() if key != "architectures"})
    chosen._attn_implementation = "sdpa"
    with torch.device("meta"):  # its own random weights would be thrown away
        theirs: Any = GPT2LMHeadModel(chosen)
    theirs.load_state_dict({name: x.to(dtype) for name, x in weights.items()}, strict=False, assign=True)
    theirs.tie_weights()
    theirs.eval()

    def generate(tokens: Tensor, n: int) -> Tensor:
        mask = torch.ones_like(tokens)
        out = theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
        )
        return out[:, tokens.shape[1] :].cpu()

    itemsize = dtype.itemsize
    return Variant(
        "transformers", _name(dtype), itemsize, itemsize, generate, lambda tokens: theirs(tokens).logits[:, -1]
    )


def compiled(model: GPT, size: Size) -> Variant:
    """torch.compile of a step of the model in plain torch over a static cache, with torch's attention under a mask."""
    chosen = {name: ("reference", "plain torch", op.reference) for name, op in kernels.OPS.items()}
    fused = kernels.OPS["decode_attention"].peers["sdpa"]
    ops = kernels.Ops({**chosen, "decode_attention": ("sdpa", "torch's attention", fused)})
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, {**shared, id(model.ops): ops})
    plain = converted(plain, "model")
    cache = KVCache(model.config, ops, size.B, dtype=model.dtype, device=model.lm_head.weight.device)
    decoder = Decoder(plain, cache, 1, compile=True)

    def generate(tokens: Tensor, n: int) -> Tensor:
        for slot in range(size.B):
            cache.release(slot)
        logits = torch.stack([decoder.read(slot, row) for slot, row in enumerate(tokens.tolist())])
        found = [logits.argmax(-1, keepdim=True)]
        while len(found) < n:
            found.append(decoder.step(found[-1])[:, -1].argmax(-1, keepdim=True))
            cache.advance(1)
        return torch.cat(found, dim=1).cpu()

    itemsize = model.dtype.itemsize
    return Variant("torch.compile", _name(model.dtype), itemsize, itemsize, generate, _last(plain))


def _last(model: GPT) -> Callable[[Tensor], Tensor]:
    return lambda tokens: model.logits(tokens, last_only=True)[:, -1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def variants(config: GPTConfig, size: Size, device: torch.device, full: bool, log: Log) -> Iterator[Variant]:
    """Every way that this device has, over the same weights, the naive one first; what cannot run is said, left out."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config, kernels.load("auto" if device.type == "cuda" else "reference")).eval()
    on_cpu = device.type == "cpu"
    if not on_cpu:
        model.dtype = torch.bfloat16
    chosen, _ = choose_weights(model)
    forms = ("model", "float16", "int8") if on_cpu else ("model", "int8")
    ways: dict[str, Callable[[], Variant]] = {"naive": lambda: naive(converted(model, "model"))}
    for form in sorted(forms, key=chosen.__ne__):
        ways[f"engine {form}"] = functools.partial(by_engine, model, size, form)
    if importlib.util.find_spec("transformers") is None:
        log.say("decode transformers is not installed: its generate is left out")
    else:
        for dtype in (torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16,):
            ways[f"transformers {_name(dtype)}"] = functools.partial(by_transformers, config, model, dtype)
    if full or not on_cpu:
        ways["torch.compile"] = lambda: compiled(model, size)
    for name, make in ways.items():
        try:
            yield make()
        except FAILURES as error:
            log.row("note", text=f"{name}: {error}")
            log.say(f"decode {name}: left out: {str(error).splitlines()[0][:120]}")


# ---- timing ----------------------------------------------------------------------------------------------------------
@dataclass
class Samples:
    """Seconds to the first token and to the last, one of each for every round."""

    first_s: list[float] = dataclasses.field(default_factory=list)
    all_s: list[float] = dataclasses.field(default_factory=list)

    def step_s(self, new: int) -> list[float]:
        """Seconds of each token after the first."""
        return [(last - first) / (new - 1) for first, last in zip(self.first_s, self.all_s, strict=True)]


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call that ends with its result on the host."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def sample(variant: Variant, tokens: Tensor, new: int, into: Samples) -> None:
    """One sample of a variant after the prompt `tokens` (B, T)."""
    first = timed(lambda: variant.generate(tokens, 1))
    if variant.lengths is None:
        for _ in range(DISTURBED):
            everything = timed(lambda: variant.generate(tokens, new))
            if everything > first:
                break
            first = timed(lambda: variant.generate(tokens, 1))
        else:
            raise UserError(f"{variant.impl}: {new} tokens took less time than one; the machine is too busy")
        into.first_s.append(first)
        into.all_s.append(everything)
        return
    into.first_s.append(first)
    longest = torch.cat((tokens, tokens.new_zeros(len(tokens), new)), dim=1)
    seen = [tokens.shape[1] + round((i + 0.5) / variant.lengths * (new - 1)) for i in range(variant.lengths)]
    each = [timed(lambda T=T: variant.generate(longest[:, :T], 1)) for T in seen]  # type: ignore[misc]
    into.all_s.append(into.first_s[-1] + sum(each) / len(each) * (new - 1))


def measure(
    ways: Iterable[Variant], tokens: Tensor, new: int, rounds: int, budget_s: float,
    known: Callable[[Variant, Samples], None] = lambda *_: None,
) -> dict[str, Samples]:  # fmt: skip
    """Samples of every variant, in turn; at least one round, then while the budget lasts.

    In the first round each is made and warmed up when its turn comes. `known` is told after every sample, so that who
    is stopped has the rows so far.
    """
    found: list[tuple[Variant, Samples]] = []
    started, round_s = time.monotonic(), 0.0
    for way in ways:
        way.generate(tokens, 3 if way.lengths is None else 1)
        found.append((way, Samples()))
        before = time.monotonic()
        sample(way, tokens, new, found[-1][1])
        round_s += time.monotonic() - before
        known(*found[-1])
    for _ in range(rounds - 1):
        before = time.monotonic()
        if before - started + round_s > budget_s:
            break
        for way, samples in found:
            sample(way, tokens, new, samples)
            known(way, samples)
        round_s = time.monotonic() - before
    return {f"{way.impl} {way.dtype}": samples for way, samples in found}


def figures(
    config: GPTConfig, name: str, size: Size, way: Variant, samples: Samples, error: float, agrees: int,
    peak: mfu.Peak, threads: int | None,
) -> Row:  # fmt: skip
    """The fields of a row."""
    steps = samples.step_s(size.new)
    step_s, method = median(steps), f"perf_counter over {size.new} tokens, per token after the first"
    timing = summarize([s * 1e3 for s in steps], method=method, threads=threads, cold=True)
    read = mfu.decode_bytes(
        config, size.prompt + size.new // 2, size.B, weight_bytes=way.weight_bytes, kv_bytes=way.kv_bytes
    )
    share = mfu.mbu(step_s, read, peak)
    most = 1.0 + (MEASURED_SLACK if peak.kind == "measured" else 0.0)
    beyond = way.lengths is None and share is not None and share > most
    return {
        "name": name, "impl": way.impl, "dtype": way.dtype, "dims": size.dims, **timing.fields(),
        "ttft_ms": median(samples.first_s) * 1e3, "tpot_ms": step_s * 1e3,
        "tokens_per_s": size.B * size.new / median(samples.all_s), "mbu": None if way.lengths else share,
        "read_bytes": read, "weight_bytes": way.weight_bytes, "kv_bytes": way.kv_bytes, "timed_lengths": way.lengths,
        "peak_bytes_per_s": peak.bytes_per_s, "peak_kind": peak.kind, "peak_source": peak.source,
        "error": error, "same_tokens": agrees, "config": dataclasses.asdict(config),
        "valid": not beyond, "invalid_reason": f"mbu {share:.2f}: not all was read" if beyond else None,
    }  # fmt: skip


def line(row: Row) -> str:
    """A row for the console."""
    share = mfu.format_mfu(row["mbu"])
    sizes = " ".join(f"{key}={value}" for key, value in row["dims"].items())
    verdict = "" if row["valid"] else f"  INVALID: {row['invalid_reason']}"
    head = f"{row['name']:10s} {row['impl']:14s} {row['dtype']:8s}"
    times = f"{row['tokens_per_s']:9.1f} tokens/s  first {row['ttft_ms']:8.1f} ms  each {row['tpot_ms']:8.2f} ms"
    return f"decode {head} {times}  mbu {share:>7s}  error {row['error']:.1e}  {sizes}{verdict}"


# ---- the command -----------------------------------------------------------------------------------------------------
@torch.inference_mode()
def run_size(
    name: str, size: Size, arguments: argparse.Namespace, peak: mfu.Peak, log: Log, common: Row, budget_s: float
) -> list[Row]:
    """Time every variant at one size, and write a row for each."""
    device = torch.device(arguments.device)
    config = dataclasses.replace(PRESETS[name], dropout=0.0, block_size=size.prompt + size.new)
    tokens = torch.randint(config.vocab_size, (size.B, size.prompt), device=device)
    truth: list[Tensor] = []  # logits after the prompt and first tokens of the first variant, the naive one
    compared: dict[Variant, tuple[float, int]] = {}
    rows: dict[Variant, Row] = {}

    def known(way: Variant, samples: Samples) -> None:
        if way not in compared:
            found = way.logits(tokens).double(), way.generate(tokens, min(8, size.new))
            truth.extend(() if truth else found)
            same = found[1].eq(truth[1]).all(0)
            compared[way] = relative_error(found[0], truth[0]), int(same.long().cumprod(0).sum())
        error, agrees = compared[way]
        fields = figures(config, name, size, way, samples, error, agrees, peak, _threads(device))
        if way not in rows:
            log.say(line(fields))
        rows[way] = log.row("decode", **fields, **common)  # the newest row of a variant counts

    measure(variants(config, size, device, arguments.compile, log), tokens, size.new, arguments.rounds, budget_s, known)
    for row in rows.values():
        if row["n"] > 1:
            log.say(line(row))
    return list(rows.values())


def _threads(device: torch.device) -> int | None:
    return None if device.type == "cuda" else torch.get_num_threads()


def peak_bandwidth(device: torch.device, out: Path) -> mfu.Peak:
    """The datasheet's, else what a copy on this machine reached, measured before into `out` or now."""
    found = mfu.peak_of(device)
    if found is not None and found.bytes_per_s is not None:
        return found
    roof = ceilings(device, (), out, _threads(device))
    return mfu.Peak.measured("a copy on this machine", {}, roof.bytes_per_s, f"python -m bench peaks, {roof.source}")


def sizes(arguments: argparse.Namespace, on_gpu: bool) -> list[Size]:
    """The sizes asked for; by default a GPU's grid, or on a CPU a short prompt and one sequence."""
    new = arguments.new or (64 if arguments.quick or on_gpu else 256)
    default = ((128, 1024, 8192) if on_gpu else (16 + new,)) if not arguments.quick else (16 + new,)
    batches = _numbers("--batch", arguments.batch) or ([1, 8, 32] if on_gpu and not arguments.quick else [1])
    contexts = _numbers("--context", arguments.context) or list(default)
    for context in contexts:
        if context <= new:
            raise UserError(
                f"--context={context}: it must hold a prompt and --new={new} tokens; give more, or fewer new"
            )
    return [Size(B, context - new, new) for context in contexts for B in batches]


def _numbers(flag: str, text: str | None) -> list[int]:
    try:
        found = [int(word) for word in (text or "").split(",") if word]
    except ValueError:
        raise UserError(f"{flag}={text}: expected whole numbers, comma-separated") from None
    if any(number < 1 for number in found):
        raise UserError(f"{flag}={text}: numbers must be above 0")
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench decode", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--models", default="gpt2,gpt2-xl" if on_gpu else "gpt2", help=f"of {', '.join(PRESETS)}")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--batch", help="sequences at once, comma-separated (default: 1,8,32 on a GPU, else 1)")
    add("--context", help="tokens of prompt and answer together, comma-separated (default: 128,1024,8192 on a GPU)")
    add("--new", type=int, help="tokens of the answer (default: 64 on a GPU, else 256)")
    add("--compile", action="store_true", help="torch.compile on a CPU as well, which takes a minute or two")
    add("--rounds", type=int, default=5, help="samples of each variant, at most")
    add("--budget_s", type=float, default=55.0 if on_gpu else 45.0, help="start no round or size that would end after")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--quick", action="store_true", help="one size of the first model, 64 new tokens")
    add("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    arguments = parser.parse_args(argv)
    device, models = torch.device(arguments.device), [name for name in arguments.models.split(",") if name]
    for name in models:
        if name not in PRESETS:
            raise UserError(f"--models={name} is unknown{nearest(name, PRESETS)}")
    if device.type == "cuda" and not on_gpu:
        raise UserError(f"--device={arguments.device}: this machine has no CUDA device; leave --device out")
    for flag in ("rounds", "budget_s", "threads"):
        if not getattr(arguments, flag) > 0:
            raise UserError(f"--{flag}={getattr(arguments, flag)} must be above 0")
    if arguments.new is not None and arguments.new < 2:
        raise UserError(f"--new={arguments.new}: at least 2, of which the second and on are timed as steps")
    chosen = sizes(arguments, device.type == "cuda")
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    common = facts(device)
    out = arguments.out or results.folder(common["hardware"])
    started, failed, longest = time.monotonic(), False, 0.0
    with Log(out, name="decode.jsonl") as log:
        peak = peak_bandwidth(device, out)
        for name in models[:1] if arguments.quick else models:
            for size in chosen:
                left = arguments.budget_s - (time.monotonic() - started)
                if longest and longest > left:
                    log.say(f"decode {name} {size.dims}: left out, the {arguments.budget_s:.0f} s are spent")
                    continue
                before = time.monotonic()
                rows = run_size(name, size, arguments, peak, log, common, max(left, 1.0) if len(chosen) == 1 else 1.0)
                failed |= not all(row["valid"] for row in rows)
                longest = max(longest, time.monotonic() - before)
                gc.collect()
    results.compact(out / "decode.jsonl")
    return 1 if failed else 0
