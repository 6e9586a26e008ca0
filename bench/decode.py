"""Tokens per second of decoding: time to first token, time per output token, and how much of the bandwidth that uses.

    python -m bench decode                       # on a GPU batch 1, 8, 32 and contexts of 128 to 8k; on a CPU one size
    python -m bench decode --models=gpt2 --batch=1 --context=272 --new=256 --compile
    python -m bench decode --variants=columns,in_order    # kernels that run only when asked for, beside the others

Variants side by side in one process, round after round: the engine with each form of its weights that the device takes,
the naive loop that reads everything again for each token, transformers' generate with its cache, and on a GPU, or with
--compile, torch.compile of the same model over a static cache with torch's attention, as one CUDA graph on CUDA. All
continue the same random tokens greedily, with the same random weights. `ttft_ms` is the time of a call that gives one
token, `tpot_ms` what each further one adds; the naive loop is timed at a few of its lengths, which `timed_lengths`
counts. `mbu` is the bytes of weights and of keys and values that a step must read, over its time and the peak
bandwidth, by the datasheet or by the copy of `python -m bench peaks`. `error` is that of the logits after the prompt,
against the same weights in fp32 and plain torch, and `same_tokens` counts the first tokens that are theirs as well; of
more than four sequences the first four are compared. `kernels`, `torch_ops` and `host_us` are what a step of the engine
launches of ours and of torch's, and its host's work around that: bench/step_work.py, counted on any machine's CPU;
`first_host_us` is the host's work from a prompt to its first token, where graphs read it as on CUDA.
A step that torch.compile cut in parts is no one graph, which `graph_breaks` counts.
`shares` of the time of a step of the engine: `weights` and `cache`, what reading them takes at that bandwidth;
`launches`, all that is left, `launch_us` for each; and beside these `host`, its work, which the device need not wait
for while the host is a step ahead.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gptfast import mfu
from gptfast.cli import check_ranges
from gptfast.config import NAMES, GPTConfig, preset
from gptfast.errors import UserError, nearest
from gptfast.log import Log, Row, facts
from gptfast.model import GPT
from gptfast.runtime import made_current
from kernels import _triton

from . import compiling, decoders, peers, results
from .decoders import Size, Variant, asked_for, fresh, last, let_go, with_ops
from .failures import FAILURES, in_one_line
from .peaks import ceilings
from .step_work import StepWork, step_work
from .timing import relative_error, summarize

DISTURBED = 10  # how often one token may take longer than all of them, because the machine did something else meanwhile
COMPARED_ROWS, COMPARED_TOKENS = 4, 8  # the truth reads everything again for each token, in fp32
MEASURED_SLACK = 0.15  # a copy that other tenants slowed may be beaten


# ---- what is decoded, and the truth about it -------------------------------------------------------------------------
@dataclass(frozen=True)
class Truth:
    """Of the first sequences: their logits (b, V) fp64 after the prompt, and the tokens (b, n) that follow it."""

    logits: Tensor
    tokens: Tensor

    def against(self, way: Variant, prompts: Tensor) -> tuple[float, int]:
        """The error of a way's logits, and how many of its first tokens are right in every sequence."""
        rows, n = self.tokens.shape
        error = relative_error(way.logits(prompts[:rows]), self.logits)
        same = way.generate(prompts, n)[:rows].cpu().eq(self.tokens).all(0)
        return error, int(same.long().cumprod(0).sum())


def truth(model: GPT, prompts: Tensor, n: int) -> Truth:
    """What the weights of `model` say in fp32, by the reference of every op and without a cache."""
    plain = with_ops(model, peers.ops_in_torch())
    plain.dtype = torch.float32
    tokens, first = prompts[:COMPARED_ROWS], None
    for _ in range(n):  # one sequence at a time, which takes the least memory
        logits = torch.cat([last(plain)(row[None]) for row in tokens])
        first = logits.double() if first is None else first
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    assert first is not None
    return Truth(first, tokens[:, prompts.shape[1] :].cpu())


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
    failed: Callable[[Variant, Exception], None] = lambda *_: None,
) -> tuple[dict[str, Samples], float]:  # fmt: skip
    """Samples of every variant, in turn; at least one round, then while the budget lasts. And the seconds that went
    into making them and into their first calls.

    In the first round each is made and warmed up when its turn comes. `known` is told after every sample, so that who
    is stopped has the rows so far; `failed` of what a variant raised while it ran, which ends its turns alone.
    """

    def succeeds(way: Variant, run: Callable[[], Any]) -> bool:
        try:
            run()
            return True
        except FAILURES as error:
            failed(way, error)
        let_go()  # here, where no traceback holds the memory any more
        return False

    found: list[tuple[Variant, Samples]] = []
    started, round_s, once_s = time.monotonic(), 0.0, 0.0
    before = started
    for way in ways:
        samples = Samples()
        right = all(  # one token alone is read as no other is: rows end at once, and prompts are cut otherwise
            succeeds(way, functools.partial(way.generate, tokens, n)) for n in ((3, 1) if way.lengths is None else (1,))
        )
        now = time.monotonic()
        once_s, before = once_s + now - before, now
        right = right and succeeds(way, functools.partial(sample, way, tokens, new, samples))
        round_s += time.monotonic() - before
        if right and succeeds(way, functools.partial(known, way, samples)):
            found.append((way, samples))
        del way  # before the next is made: one that failed may hold much
        before = time.monotonic()
    for _ in range(rounds - 1):
        before = time.monotonic()
        if before - started + round_s > budget_s:
            break
        for way, samples in list(found):
            if not (
                succeeds(way, functools.partial(sample, way, tokens, new, samples))
                and succeeds(way, functools.partial(known, way, samples))
            ):
                found.remove((way, samples))
        round_s = time.monotonic() - before
    return {f"{way.impl} {way.dtype}": samples for way, samples in found}, once_s


def figures(
    config: GPTConfig, name: str, size: Size, way: Variant, samples: Samples, error: float | None, agrees: int | None,
    peak: mfu.Peak, threads: int | None, work: StepWork | None = None,
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
        "graph_breaks": way.graph_breaks and way.graph_breaks(),
        "kernels": work and work.kernels, "torch_ops": work and work.torch_ops, "host_us": work and work.host_us,
        "first_host_us": work and work.first_us,
        "valid": not beyond, "invalid_reason": f"mbu {share:.2f}: not all was read" if beyond else None,
        **(shares(config, size, way, step_s, peak, work) if work else {}),
    }  # fmt: skip


def shares(config: GPTConfig, size: Size, way: Variant, step_s: float, peak: mfu.Peak, work: StepWork) -> Row:
    """Of a step of `step_s` seconds: what its bytes take, what is left for launches, and the host's work beside it."""
    if peak.bytes_per_s is None:
        return {}
    read = [
        mfu.decode_bytes(config, context, size.B, weight_bytes=way.weight_bytes, kv_bytes=way.kv_bytes)
        for context in (0, size.prompt + size.new // 2)
    ]
    weights, both = (count / peak.bytes_per_s / step_s for count in read)
    left = max(0.0, 1 - both)
    return {
        "shares": {"weights": weights, "cache": both - weights, "launches": left, "host": work.host_us / step_s / 1e6},
        "launch_us": left * step_s * 1e6 / (work.kernels + work.torch_ops),
    }


def line(row: Row) -> str:
    """A row for the console."""
    share = mfu.format_mfu(row["mbu"])
    sizes = " ".join(f"{key}={value}" for key, value in row["dims"].items())
    verdict = "" if row["valid"] else f"  INVALID: {row['invalid_reason']}"
    head = f"{row['name']:10s} {row['impl']:14s} {row['dtype']:8s}"
    times = f"{row['tokens_per_s']:9.1f} tokens/s  first {row['ttft_ms']:8.1f} ms  each {row['tpot_ms']:8.2f} ms"
    error = "    n/a" if row["error"] is None else f"{row['error']:.1e}"
    launches = "" if row["kernels"] is None else f"  launches {row['kernels']}+{row['torch_ops']}"
    first = "" if row["first_host_us"] is None else f", first {row['first_host_us']:.0f}"
    host = "" if row["host_us"] is None else f"  host {row['host_us']:.0f} us{first}"
    parts = " ".join(f"{part} {100 * value:.0f}%" for part, value in row.get("shares", {}).items())
    goes = f"  ({parts})" if parts else ""
    broken = f"  in {row['graph_breaks'] + 1} parts at least" if row.get("graph_breaks") else ""
    return f"decode {head} {times}  mbu {share:>7s}  error {error}{launches}{host}{goes}{broken}  {sizes}{verdict}"


# ---- the command -----------------------------------------------------------------------------------------------------
@torch.inference_mode()
def run_size(
    name: str, size: Size, arguments: argparse.Namespace, peak: mfu.Peak, log: Log, common: Row, budget_s: float
) -> tuple[list[Row], float]:
    """Time every variant at one size, and write a row for each. Returns them, and the seconds spent on making them."""
    if arguments.compile:
        torch.compiler.reset()  # the versions of one size are none of the next
    device = made_current(arguments.device)
    config = dataclasses.replace(preset(name), dropout=0.0, block_size=size.prompt + size.new)
    tokens = torch.randint(config.vocab_size, (size.B, size.prompt), device=device)
    model = fresh(config, device)
    right: Truth | None = None
    try:
        right = truth(model, tokens, min(COMPARED_TOKENS, size.new))
    except FAILURES as error:
        log.row("note", name=f"{name} {size.dims}", text=f"no truth to compare with: {type(error).__name__}: {error}")
        log.say(f"decode {name} {size.dims}: no truth to compare with: {in_one_line(error)}")
    let_go()
    compared: dict[Variant, tuple[float | None, int | None]] = {}
    rows: dict[Variant, Row] = {}
    work: dict[Variant, StepWork] = {}

    def known(way: Variant, samples: Samples) -> None:
        if way not in compared:
            compared[way] = (None, None) if right is None else right.against(way, tokens)
        error, agrees = compared[way]
        if (
            way.weights is not None and way.weights != "float16" and way not in work and not _triton.MISSING
        ):  # a GPU's forms
            work[way] = step_work(config, size.B, size.prompt, way.weights)
        fields = figures(config, name, size, way, samples, error, agrees, peak, _threads(device), work.get(way))
        if way not in rows:
            log.say(line(fields))
        rows[way] = log.row("decode", **fields, **common)  # the newest row of a variant counts

    def failed(way: Variant, error: Exception) -> None:
        what = f"{name} {way.impl} {way.dtype} {size.dims}"
        log.row("note", name=what, text=f"failed: {type(error).__name__}: {error}")
        log.say(f"decode {what}: FAILED: {in_one_line(error)}")

    ways = decoders.variants(model, size, arguments.compile, log, arguments.variants)
    _, once_s = measure(ways, tokens, size.new, arguments.rounds, budget_s, known, failed)
    for row in rows.values():
        if row["n"] > 1:
            log.say(line(row))
    return list(rows.values()), once_s


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
    add("--models", default="gpt2,gpt2-xl" if on_gpu else "gpt2", help=f"of {NAMES}")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--batch", help="sequences at once, comma-separated (default: 1,8,32 on a GPU, else 1)")
    add("--context", help="tokens of prompt and answer together, comma-separated (default: 128,1024,8192 on a GPU)")
    add("--new", type=int, help="tokens of the answer (default: 64 on a GPU, else 256)")
    add("--variants", default="", help=f"the engine with these too, on a GPU: of {', '.join(asked_for())}")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU; a minute or two)")
    add("--rounds", type=int, default=5, help="samples of each variant, at most")
    add("--budget_s", type=float, default=900.0 if on_gpu else 45.0, help="start no round or size that would end after")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--quick", action="store_true", help="one size of the first model, 64 new tokens")
    add("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    arguments = check_ranges(parser.parse_args(argv))
    device, models = made_current(arguments.device), [name for name in arguments.models.split(",") if name]
    for name in models:
        preset(name, "--models")
    if device.type == "cuda" and not on_gpu:
        raise UserError(f"--device={arguments.device}: this machine has no CUDA device; leave --device out")
    for flag in ("rounds", "budget_s", "threads"):
        if not getattr(arguments, flag) > 0:
            raise UserError(f"--{flag}={getattr(arguments, flag)} must be above 0")
    if arguments.new is not None and arguments.new < 2:
        raise UserError(f"--new={arguments.new}: at least 2, of which the second and on are timed as steps")
    arguments.variants = [name for name in arguments.variants.split(",") if name]
    for name in arguments.variants:
        if name not in asked_for():
            raise UserError(f"--variants={name} is unknown{nearest(name, asked_for())}")
    if arguments.variants and device.type != "cuda":
        raise UserError("--variants: these kernels need a CUDA device; `python -m bench host` counts launches without")
    chosen = sizes(arguments, device.type == "cuda")
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    common = facts(device)
    out = arguments.out or results.folder(common["hardware"])
    arguments.compile = device.type == "cuda" if arguments.compile is None else arguments.compile
    with compiling.strict(), results.campaign(out, "decode.jsonl") as log:
        peak = peak_bandwidth(device, out)
        chosen_models = models[:1] if arguments.quick else models
        failed = campaign([(name, size) for name in chosen_models for size in chosen], arguments, peak, log, common)
    return 1 if failed else 0


def campaign(
    todo: Sequence[tuple[str, Size]], arguments: argparse.Namespace, peak: mfu.Peak, log: Log, common: Row
) -> bool:
    """Measure size after size while the budget lasts. Returns whether anything failed or is invalid.

    A size is expected to take as long as the longest before it. What the first of a model spends on making its
    variants does not count: much of that, as imports and the compiling of kernels, is done once.
    """
    started, failed, expected_s = time.monotonic(), False, 0.0
    begun: set[str] = set()
    for name, size in todo:
        before = time.monotonic()
        left = arguments.budget_s - (before - started)
        if begun and expected_s > left:
            log.say(f"decode {name} {size.dims}: left out, the {arguments.budget_s:.0f} s are spent")
            continue
        once_s = 0.0
        try:
            rows, once_s = run_size(name, size, arguments, peak, log, common, max(left, 1.0) if len(todo) == 1 else 1.0)
            failed |= not rows or not all(row["valid"] for row in rows)
        except FAILURES as error:
            failed = True
            log.row("note", name=f"{name} {size.dims}", text=f"failed: {type(error).__name__}: {error}")
            log.say(f"decode {name} {size.dims}: FAILED: {in_one_line(error)}")
        let_go()
        took_s = time.monotonic() - before
        expected_s = max(expected_s, took_s if name in begun else took_s - once_s)
        begun.add(name)
    return failed
