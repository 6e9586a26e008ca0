"""Where the time of a step goes: by kernel, by part of the model, and in which the GPU waits, and for whom.

    python -m bench profile                                        # a training step of GPT-2, by ours and torch.compile
    python -m bench profile --models=gpt2-xl --batch_size=8 --impl=triton
    python -m bench profile --mode=decode --context=1024 --batch_size=1     # also --mode=prefill
    python -m bench profile --diff results/a:triton results/b:triton        # two profiles, part by part

    import bench                                                   # any function of your own, in three lines
    report = bench.profile(step)
    print(report)

The table has calls, milliseconds and share of every part, with GB/s and TFLOP/s by what the part must move and compute
(bench/costs.py), and the fraction of what a copy and a GEMM reach on this machine. The wall clock is taken without the
profiler. Time in which a GPU idles is told by cause. A step of decoding is the engine's, its kernels, its graph and its
host's work; with --impl=reference that of the model in plain torch. Parts follow from the names of kernels, operators
and torch.profiler.record_function ranges (bench/trace.py); mark your own code with ranges called attention, norms and
so on. trace-*.json.gz opens in https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import kernels
from gptfast.config import NAMES, PRESETS, GPTConfig, is_preset, preset
from gptfast.engine import Engine, KVCache, Sampling
from gptfast.engine.decoder import Decoder
from gptfast.errors import UserError, nearest
from gptfast.log import Log, Row, facts
from gptfast.model import GPT
from gptfast.runtime import compute_dtype, made_current
from kernels import Cost, Ops

from . import compiling, costs, peers, results, trace
from .failures import FAILURES, in_one_line
from .peaks import DTYPES, Ceilings, ceilings, measured_ceilings
from .saved import saved_bytes
from .timing import Timing, interleave, summarize

MODES = ("train", "prefill", "decode")
IMPLS = ("triton", "reference", "torch.compile", "eager")
TOP = 40  # kernels kept in a row
BATCH = {"train": 16, "prefill": 1, "decode": 1}
CPU_BATCH = 4
SAMPLES, SAMPLES_QUICK = 10, 3
PAST_THE_END = 8  # positions after a text whose decoding is profiled


@dataclass(frozen=True)
class Report:
    """A profiled step. print() it for the tables; `row()` gives the fields of a result row."""

    trace: trace.Trace
    wall: Timing  # of a step, without the profiler
    costs: Mapping[str, Cost] = field(default_factory=dict)
    measured: Ceilings | None = None
    dtype: str = "bfloat16"
    memory: Mapping[str, int] = field(default_factory=dict)  # bytes at the peak of a step, by what holds them

    @property
    def idle_ms(self) -> float:
        """Time of a step, by the wall clock, in which the GPU has nothing to do."""
        return max(0.0, self.wall.ms_p50 - self.trace.busy_ms) if self.trace.on_gpu else 0.0

    def parts(self) -> list[dict[str, Any]]:
        """Rows of the table by part: part, calls, ms, share of the wall clock, gbs, tflops, of_measured."""
        lines = []
        for name, (calls, ms) in self.trace.parts().items():
            cost = self.costs.get(name)
            known = cost is not None and ms > 0
            share = self.measured and known and self.measured.fraction(ms, cost.flops, cost.bytes, self.dtype)  # type: ignore[union-attr]
            lines.append({
                "part": name, "calls": calls, "ms": ms, "share": ms / self._whole_ms,
                "gbs": cost.bytes / ms / 1e6 if known else None,  # type: ignore[union-attr]
                "tflops": cost.flops / ms / 1e9 if known else None,  # type: ignore[union-attr]
                "of_measured": share or None,
            })  # fmt: skip
        return lines

    @property
    def _whole_ms(self) -> float:
        return max(self.wall.ms_p50, self.trace.busy_ms) if self.trace.on_gpu else self.trace.span_ms

    def row(self) -> Row:
        seen = self.trace
        return {
            **self.wall.fields(), "span_ms": seen.span_ms, "busy_ms": seen.busy_ms, "idle_ms": self.idle_ms,
            "accounted": sum(piece.ms for piece in seen.pieces) / (seen.busy_ms or 1.0),
            "parts": self.parts(), "kernels": [dataclasses.asdict(piece) for piece in seen.pieces[:TOP]],
            "gaps": [dataclasses.asdict(gap) for gap in seen.gaps], "syncs": dict(seen.syncs),
            "memory": dict(self.memory), "measured_source": self.measured and self.measured.source,
        }  # fmt: skip

    def __str__(self) -> str:
        return "\n".join(table(self.row(), self.trace.on_gpu))


def table(row: Row, on_gpu: bool, kernels_shown: int = 20) -> list[str]:
    """A profile's row as lines for the console."""
    value = lambda x, form: " " * 9 if x is None else format(x, form)
    lines = [f"{'part':16s} {'calls':>7s} {'ms':>9s} {'share':>6s} {'GB/s':>9s} {'TFLOP/s':>9s} {'of measured':>11s}"]
    for part in row["parts"]:
        fraction = "" if part["of_measured"] is None else f"{part['of_measured']:10.0%}"
        rates = f"{value(part['gbs'], '9.1f')} {value(part['tflops'], '9.2f')} {fraction}"
        lines.append(f"{part['part']:16s} {part['calls']:7.0f} {part['ms']:9.3f} {part['share']:6.1%} {rates}".rstrip())
    who = "the GPU's kernels" if on_gpu else "operators and Python"
    lines.append(f"{row['ms_p50']:.3f} ms a step by the wall clock; {who} {row['busy_ms']:.3f} ms under the profiler")
    if on_gpu:
        lines.append(f"the GPU idles for {row['idle_ms']:.3f} ms of it; under the profiler {idle(row):.3f} ms:")
        for gap in row["gaps"]:
            lines.append(f"  {gap['ms']:9.3f} ms in {gap['calls']:5.0f} gaps: {gap['cause']}")
    for who, calls in row["syncs"].items():
        lines.append(f"  waits for the GPU {calls:.0f} times a step: {who}")
    if row["memory"]:
        held = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in row["memory"].items())
        lines.append(f"GiB at the peak: {held}")
    for piece in row["kernels"][:kernels_shown]:
        lines.append(f"  {piece['ms']:9.3f} ms x{piece['calls']:<5.0f} {piece['part']:14s} {piece['name'][:90]}")
    return lines


def idle(row: Row) -> float:
    return sum(gap["ms"] for gap in row["gaps"])


# ---- profiling -------------------------------------------------------------------------------------------------------
def profile(
    step: Callable[[], Any],
    *,
    device: str | torch.device | None = None,
    steps: int = 3,
    warmup: int = 3,
    samples: int = 10,
    save: str | Path | None = None,
    costs: Mapping[str, Cost] | None = None,
    measured: Ceilings | None = None,
    dtype: str = "bfloat16",
    memory: Callable[[], Mapping[str, int]] | None = None,
) -> Report:
    """Time `step()` by the wall clock, then run it `steps` times under torch.profiler, and say where its time goes.

    device: 'cuda' or 'cpu'; default, CUDA where there is one. save: a file for the trace, .json or .json.gz.
    costs, measured, dtype: what the parts must compute and move, and what the machine reaches, for the rates.
    memory: called after a step of which the peak is known, gives bytes by what holds them.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    for _ in range(warmup):
        step()
    wall = time_steps(step, device, samples)
    held: Mapping[str, int] = {}
    if memory is not None:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        step()
        held = memory()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # the profiler's own first step is not kept: it is slow
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True) as profiler:
        step()
        synchronize(device)
        profiler.step()
        for _ in range(steps):
            with torch.profiler.record_function(trace.STEP):
                step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(save) if save is not None else Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        seen = trace.read(events(path))
    return Report(seen, wall, costs or {}, measured, dtype, held)


def events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a trace file, gzipped or not."""
    data = Path(path).read_bytes()
    loaded = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    return loaded["traceEvents"]


def time_steps(step: Callable[[], Any], device: torch.device, samples: int) -> Timing:
    """Milliseconds a step, the device idle before and after each sample of several steps in a row."""

    def sampler(count: int) -> Callable[[], float]:
        def sample() -> float:
            synchronize(device)
            start = time.perf_counter_ns()
            for _ in range(count):
                step()
            synchronize(device)
            return (time.perf_counter_ns() - start) / 1e6 / count

        return sample

    once = sampler(1)()
    count = max(1, min(20, round(100 / max(once, 1e-3)))) if device.type == "cuda" else 1
    taken = interleave({"step": sampler(count)}, samples, 0.0, samples)["step"]
    threads = None if device.type == "cuda" else torch.get_num_threads()
    return summarize(taken, method=f"wall clock over {count} steps", threads=threads, cold=False)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- steps of our models ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Subject:
    """A step to profile, and what is known of it."""

    step: Callable[[], Any]
    dims: Mapping[str, int]
    dtype: torch.dtype
    tokens: int  # of a step
    memory: Callable[[], Mapping[str, int]] | None = None


def named(ops: Ops) -> Ops:
    """The same ops, each in a range of its name, by which an eager profile knows its parts."""

    def within(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(f"gptfast::{name}"):
                return function(*args, **kwargs)

        return run

    return Ops({name: (how, why, within(name, getattr(ops, name))) for name, (how, why) in ops.chosen.items()})


def training(
    config: GPTConfig, impl: str, device: torch.device, B: int, compiled: str, graph: bool = False
) -> Subject:  # fmt: skip
    """Forward, backward and AdamW on one batch of random tokens, as `bench model` trains; `graph`, by a CUDA graph."""
    from . import model as page

    dtype, _ = compute_dtype(str(device))
    ops: Ops | None = None
    if impl == "torch.compile":
        backend = None if device.type == "cpu" else "cudnn" if _major(device) >= 9 else "flash"
        maker = page.plain(config, impl, dtype, "model" if compiled == "no" else compiled, attention=backend)
    elif impl == "eager":
        maker = page.plain(config, impl, dtype, "no")
    else:
        ops = kernels.load(impl) if impl != "reference" else peers.ops_in_torch()
        maker = page.ours(config, named(ops) if compiled == "no" else ops, impl, dtype, compiled)
    variant = page.Variant(dataclasses.replace(maker, graph=graph), device)
    variant.compile()
    variant.reset()  # what runs from here on is compiled, and captured
    tokens, targets = (torch.empty(B, config.block_size, dtype=torch.int64, device=device) for _ in range(2))
    page.draw(tokens, targets, config.vocab_size, 0)

    def memory() -> dict[str, int]:
        weights = sum(p.nbytes for p in variant.model.parameters())
        states = sum(t.nbytes for s in variant.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        held = {"weights": weights, "gradients": weights, "optimizer states": states}
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            held["activations and the rest"] = max(0, peak - sum(held.values()))
        if ops is not None and compiled == "no":  # compiled code keeps what it likes
            saved = saved_bytes(config, ops, dtype, tokens, targets)
            held |= {f"kept by {part}": size for part, size in saved.items() if size}
        return held

    step = lambda: variant.step(tokens, targets)
    return Subject(step, {"B": B, "T": config.block_size}, dtype, B * config.block_size, memory)


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def inference(config: GPTConfig, impl: str, device: torch.device, B: int, context: int, mode: str) -> Subject:
    """A prefill of B prompts of `context` tokens, or a step that decodes a token for each of B sequences that long.

    A step by triton is one of the engine; by reference, one of the model in plain torch over the engine's cache.
    """
    if impl not in ("triton", "reference"):
        raise UserError(f"--impl={impl}: --mode={mode} is of our engine, by triton or reference")
    dtype, _ = compute_dtype(str(device))
    T = min(context, config.block_size - 1)
    if mode == "decode":  # the engine is a step ahead of what it knows, so a text may not end where it is measured
        config = dataclasses.replace(config, block_size=max(config.block_size, T + PAST_THE_END))
    torch.manual_seed(1337)
    with device:
        ops = kernels.load(impl) if impl != "reference" else peers.ops_in_torch()
        model = GPT(config, named(ops), dtype)
    model.eval()
    tokens = torch.randint(config.vocab_size, (B, T), device=device)
    if mode == "prefill":
        prefill = torch.inference_mode()(lambda: model.logits(tokens, last_only=True))
        return Subject(prefill, {"B": B, "T": T}, dtype, B * T, lambda: {"weights": _bytes(model.parameters())})
    return of_engine(model, tokens) if impl == "triton" else of_model(model, tokens)


def of_engine(model: GPT, tokens: Tensor) -> Subject:
    """A step of an engine that decodes greedily after tokens (B, S), all that its user waits for: on CUDA a graph.

    Its rows are told to stop once they are read, so that every step is the first after S tokens: the device computes
    and draws all the same, and the host hears of no new token.
    """
    B, S = tokens.shape
    engine = Engine(model, slots=B, weights="model", prefill_tokens=B * S)
    requests = [engine.submit(row, Sampling(max_tokens=PAST_THE_END, temperature=0)) for row in tokens.tolist()]
    engine.step()  # reads all
    for slot in range(B):
        engine.loop.stop(slot)
    engine.step()
    if failed := [request.error for request in requests if not request.tokens or request.finish_reason is not None]:
        raise RuntimeError(f"the engine does not decode: {failed[0]}")
    weights = [*model.parameters(), *engine.model.parameters()]
    return Subject(engine.step, {"B": B, "S": S}, model.dtype, B, lambda: _held(weights, engine.cache))


def of_model(model: GPT, tokens: Tensor) -> Subject:
    """A step of the model over the engine's cache after tokens (B, S), on CUDA as a graph; nothing is drawn."""
    B, S = tokens.shape
    with torch.inference_mode():
        cache = KVCache(model.config, model.ops, B, dtype=model.dtype, device=tokens.device)
        decoder = Decoder(model, cache, compile=False)
        for slot in range(B):
            decoder.read_whole(slot, tokens[slot].tolist())
    newest = tokens[:, -1:].contiguous()
    step = torch.inference_mode()(lambda: decoder.step(newest))
    return Subject(step, {"B": B, "S": S}, model.dtype, B, lambda: _held(model.parameters(), cache))


def _held(weights: Iterable[Tensor], cache: KVCache) -> dict[str, int]:
    stored = [x for value in vars(cache).values() for x in (value if isinstance(value, list) else [value])]
    return {"weights": _bytes(weights), "cache": _bytes(x for x in stored if isinstance(x, Tensor))}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of these tensors, one that is there twice counted once."""
    return sum({x.data_ptr(): x.nbytes for x in tensors}.values())


# ---- two profiles beside each other ----------------------------------------------------------------------------------
def diff(a: Row, b: Row) -> list[str]:
    """Two profiles part by part, as lines: milliseconds of both and what b takes more."""
    mine, other = ({part["part"]: part["ms"] for part in row["parts"]} for row in (a, b))
    mine["idle"], other["idle"] = a["idle_ms"], b["idle_ms"]
    lines = [f"{'part':16s} {_label(a):>24s} {_label(b):>24s} {'more':>9s}"]
    for name in sorted(mine.keys() | other.keys(), key=lambda name: -abs(other.get(name, 0.0) - mine.get(name, 0.0))):
        x, y = mine.get(name, 0.0), other.get(name, 0.0)
        lines.append(f"{name:16s} {x:21.3f} ms {y:21.3f} ms {y - x:+9.3f}")
    lines.append(f"{'wall clock':16s} {a['ms_p50']:21.3f} ms {b['ms_p50']:21.3f} ms {b['ms_p50'] - a['ms_p50']:+9.3f}")
    return lines


def _label(row: Row) -> str:
    return f"{row['name']} {row['impl']} {(row.get('commit') or '')[:7]}"


def chosen_row(text: str) -> Row:
    """The profile that PATH or PATH:IMPL or PATH:MODEL:IMPL names. UserError where it names none or several."""
    path, *words = text.split(":")
    rows = [row for row in results.read_all([path]) if row["what"] == "profile"]
    rows = [row for row in rows if all(word in (row["name"], row["impl"], row["direction"]) for word in words)]
    if len(rows) != 1:
        there = "; ".join(f"{row['name']}:{row['impl']}:{row['direction']}" for row in rows) or "none"
        raise UserError(f"--diff {text}: names {len(rows)} profiles ({there}); write PATH:MODEL:IMPL:MODE")
    return rows[0]


# ---- the command -----------------------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench profile", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add(
        "--models",
        "--model",
        default="gpt2" if on_gpu else "char-cpu",
        help=f"comma-separated, of {NAMES}, or folders of checkpoints",
    )
    add("--mode", default="train", choices=MODES)
    add("--impl", help=f"comma-separated, of {', '.join(IMPLS)} (default: what the device has)")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--batch_size", type=int, help="sequences (default: 16 to train, halved until they fit; 1 else)")
    add("--block_size", type=int, help="tokens a sequence to train on (default: the model's)")
    add("--context", type=int, default=1024, help="tokens of a prompt, or in the cache")
    add("--compile", choices=("auto", "model", "blocks", "no"), default="auto", help="of ours; auto: no on a CPU")
    add(
        "--cuda_graph",
        action=argparse.BooleanOptionalAction,
        default=on_gpu,
        help="our training step as one CUDA graph, as the trainer launches it (default: on a GPU)",
    )
    add("--steps", type=int, default=3, help="under the profiler")
    add("--budget_s", type=float, default=float("inf"), help="start no other profile after this")
    add("--quick", action="store_true", help="fewer samples, one implementation")
    add("--out", type=Path, help="folder of rows, traces and figures (default: results/<machine>)")
    add("--diff", nargs=2, metavar=("A", "B"), help="print two profiles side by side: PATH, or PATH:MODEL:IMPL:MODE")
    arguments = parser.parse_args(argv)
    if arguments.diff:
        with results.expected(" or ".join(arguments.diff)):
            print("\n".join(diff(*map(chosen_row, arguments.diff))))
        return 0
    device = made_current(arguments.device)
    if device.type == "cuda" and not on_gpu:
        raise UserError(f"--device={arguments.device}: this machine has no CUDA device; leave --device out")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    default = (["triton", "torch.compile"] if arguments.mode == "train" else ["triton"]) if on_gpu else ["reference"]
    impls = _known("--impl", arguments.impl, IMPLS) if arguments.impl else default[: 1 if arguments.quick else None]
    models = [name for name in arguments.models.split(",") if name]
    for name in models:
        config_of(name)
    common = facts(device)
    out = arguments.out or results.folder(common["hardware"])
    return campaign(arguments, device, models, impls, out, common)


def config_of(name: str) -> GPTConfig:
    """The sizes of a preset, or of the model whose checkpoints are in a folder. UserError where it is neither."""
    if is_preset(name):
        return preset(name)
    from gptfast import checkpoint

    if not checkpoint.exists(name):
        raise UserError(f"--models={name}: no preset, no depth and no folder with a checkpoint{nearest(name, PRESETS)}")
    return GPTConfig(**checkpoint.load(name).meta["model"])


def _known(flag: str, text: str, there: Any) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in there:
            raise UserError(f"{flag}={name} is unknown{nearest(name, there)}")
    return names


def campaign(
    arguments: argparse.Namespace, device: torch.device, models: Sequence[str], impls: Sequence[str], out: Path,
    common: Row,
) -> int:  # fmt: skip
    """Profile every implementation of every model, and write rows, traces and figures. Returns the exit code."""
    from . import figures

    started, failed = time.monotonic(), False
    dtype = str(compute_dtype(str(device))[0]).removeprefix("torch.")
    threads = None if device.type == "cuda" else torch.get_num_threads()
    measured = measured_ceilings(ceilings(device, [dtype], out, threads), device, [dtype], out)
    with compiling.strict(), results.campaign(out, "profile.jsonl") as log:
        for name, impl in ((name, impl) for name in models for impl in impls):
            if time.monotonic() - started > arguments.budget_s:
                log.say(f"profile {name} {impl}: not begun within {arguments.budget_s:.0f} s")
                continue
            try:
                one(arguments, device, name, impl, out, measured, log, common)
            except FAILURES as error:
                failed = True
                log.row("note", name=f"{name} {impl}", text=f"failed: {type(error).__name__}: {error}")
                log.say(f"profile {name} {impl}: FAILED: {in_one_line(error)}")
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for path in figures.profiles(results.read(out / "profile.jsonl"), out):
        print(path)
    return 1 if failed else 0


def one(
    arguments: argparse.Namespace, device: torch.device, name: str, impl: str, out: Path, measured: Ceilings | None,
    log: Log, common: Row,
) -> None:  # fmt: skip
    from .model import LAYERS_COMPILED_WHOLE, padded

    config = padded(config_of(name))
    if arguments.mode == "train" and arguments.block_size:
        config = dataclasses.replace(config, block_size=arguments.block_size)
    whole = "model" if config.n_layer <= LAYERS_COMPILED_WHOLE else "blocks"
    auto = whole if device.type == "cuda" else "no"
    compiled = auto if arguments.compile == "auto" else arguments.compile
    B = arguments.batch_size or (BATCH[arguments.mode] if device.type == "cuda" else CPU_BATCH)
    graph = arguments.cuda_graph and arguments.mode == "train" and impl in ("triton", "reference")
    label = f"{impl} + CUDA graph" if graph else impl
    file = out / f"trace-{Path(name).name}-{arguments.mode}-{results.slug({'name': label})}.json.gz"
    samples = SAMPLES_QUICK if arguments.quick else SAMPLES
    train = arguments.mode == "train"
    length, T = ("block_size", config.block_size) if train else ("context", arguments.context)
    log.say(
        f"profile {name} {arguments.mode} {label}: some {arguments.steps + samples + 6} steps, B={B} "
        f"T={T}; --quick, --batch_size and --{length} make it shorter"
    )
    while True:
        try:
            subject, report = _profiled(arguments, device, config, impl, B, compiled, graph, file, measured)
            break
        except torch.OutOfMemoryError:
            if B == 1:
                raise
        B //= 2
        torch.cuda.empty_cache()
        log.say(f"profile {name} {impl}: {2 * B} sequences do not fit, {B} then")
    row = log.row(
        "profile", name=Path(name).name, impl=label, direction=arguments.mode, dims=dict(subject.dims),
        dtype=str(subject.dtype).removeprefix("torch."), compiled=compiled, **report.row(),
        tokens_per_s=subject.tokens / report.wall.ms_p50 * 1e3, config=dataclasses.asdict(config), **common,
    )  # fmt: skip
    sizes = " ".join(f"{letter}={size}" for letter, size in subject.dims.items())
    log.say(f"profile {name} {arguments.mode} {label} {row['dtype']} {sizes}: {row['tokens_per_s']:,.0f} tokens/s")
    for line in table(row, report.trace.on_gpu):
        log.say(f"profile   {line}")


def _profiled(
    arguments: argparse.Namespace, device: torch.device, config: GPTConfig, impl: str, B: int, compiled: str,
    graph: bool, file: Path, measured: Ceilings | None,
) -> tuple[Subject, Report]:  # fmt: skip
    mode = arguments.mode
    if mode == "train":
        subject = training(config, impl, device, B, compiled, graph)
    else:
        subject = inference(config, impl, device, B, arguments.context, mode)
    dtype = str(subject.dtype).removeprefix("torch.")
    dims = subject.dims
    parts = costs.of_step(config, B, dims.get("T", 1), DTYPES[dtype].itemsize, mode, dims.get("S", 0))
    report = profile(
        subject.step, device=device, steps=arguments.steps, samples=SAMPLES_QUICK if arguments.quick else SAMPLES,
        save=file, costs=parts, measured=measured, dtype=dtype, memory=subject.memory,
    )  # fmt: skip
    return subject, report


class _Page(ModuleType):
    """This page, which `bench.profile(step)` calls as the function of its name."""

    def __call__(self, step: Callable[[], Any], **more: Any) -> Report:
        return profile(step, **more)


sys.modules[__name__].__class__ = _Page
