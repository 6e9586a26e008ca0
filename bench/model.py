"""Whole training steps: ms/iter, tokens/s, mfu, mfu_palm, hfu and peak memory, against plain PyTorch and transformers.

    python -m bench model                            # what fits into --budget_s: GPT-2 124M with its ladder, then more
    python -m bench model --models=gpt2-xl --full    # every peer, whatever it takes
    python -m bench model --models=char-cpu --quick

A step is forward, backward and fused AdamW on random tokens; weights in fp32, activations in bf16 where it is native.
The ladder switches one kernel more to Triton at each rung, every rung compiled as the trainer compiles. Variants of one
model train side by side in one process, on one batch, the largest that fits all of them. After timing, each must have
learned the batch, and give the loss of a fresh one as an fp32 eager copy of its weights does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import io
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from gptfast import fp8, mfu
from gptfast.cli import check_ranges
from gptfast.config import NAMES, GPTConfig, preset
from gptfast.errors import UserError, nearest
from gptfast.log import Log, Row, facts, gpu_state
from gptfast.model import GPT, IGNORED
from gptfast.optim import adamw
from gptfast.runtime import compute_dtype, made_current
from gptfast.step import Step
from kernels import Ops

from . import compiling, peers, results
from .cpu import PlainGPT
from .failures import FAILURES, in_one_line
from .peaks import MEASURED_SLACK, from_rows
from .timing import Timing, interleave, summarize

GPU_MODELS = ("gpt2", "gpt2-xl", "modern", "gpt2-large", "gpt2-medium")  # in the order in which they are measured
CPU_MODELS = ("char-cpu", "char-modern-cpu")  # char, of 11M parameters, takes a minute more: --models=char
CPU_BATCH = {"char-cpu": 12, "char-modern-cpu": 12, "char": 2}
MOST_ROWS = 64  # of a micro-batch on a GPU; more gain nothing at T = 1024
LAYERS_COMPILED_WHOLE = 12  # of deeper models the block is compiled: compile time grows with depth, speed hardly does
SAMPLE_MS = 100.0  # a sample is as many steps in a row as fill this, so that the host can run ahead
TRITON = "triton"  # label of the variant with all of our kernels
FP8_MISSES = 0.02  # of a loss, relative: what train.pretrain --fp8 is held to
LEARNING: dict[str, Any] = {"learning_rate": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
PEAK_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


# ---- what is trained -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Maker:
    """How to make one variant. `build(dtype)` gives a module: tokens, targets (B, T) -> loss ()."""

    label: str
    dtype: torch.dtype  # of the activations
    build: Callable[[torch.dtype], nn.Module]
    twin: Callable[[], nn.Module]  # the same parameters, plain PyTorch in fp32: the judge
    compiled: str = "no"  # 'model', 'blocks' or 'no'
    mode: str | None = None  # of torch.compile
    autocast: bool = False  # whether the dtype comes by autocast
    attention: str | None = None  # the SDPA backend, named so that no version of torch chooses another
    graph: bool = False  # whether a step is launched as one CUDA graph
    rung: int | None = None  # of the ladder
    ours: bool = True
    fp8: bool = False  # whether the blocks' large linear maps multiply in 8 bits
    ops: Mapping[str, str] = dataclasses.field(default_factory=dict)


class TransformersGPT(nn.Module):
    """GPT-2 as Hugging Face writes it, with SDPA."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes: dict[str, Any] = dict(
            n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head
        )
        off: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id"), config.vocab_size - 1)
        same: dict[str, Any] = {"vocab_size": config.vocab_size, "activation_function": "gelu", "use_cache": False}
        chosen = GPT2Config(**same, **sizes, **off, **ids)
        chosen._attn_implementation = "sdpa"
        self.model = GPT2LMHeadModel(chosen)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(tokens).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORED)


def is_gpt2(config: GPTConfig) -> bool:
    """Whether a GPT-2 from elsewhere has this architecture, biases aside."""
    shape = (config.norm, config.position, config.activation, config.kv_heads, config.tied)
    return shape == ("layernorm", "learned", "gelu", config.n_head, True) and not (config.qk_norm or config.softcap)


def ours(config: GPTConfig, ops: Ops, label: str, dtype: torch.dtype, compiled: str, rung: int | None = None) -> Maker:
    return Maker(
        label, dtype, lambda dtype: GPT(config, ops, dtype), lambda: GPT(config, peers.ops_in_torch()),
        compiled=compiled, rung=rung, ops={name: how for name, (how, _) in ops.chosen.items()},
    )  # fmt: skip


def plain(config: GPTConfig, label: str, dtype: torch.dtype, compiled: str, **more: Any) -> Maker:
    """nanoGPT's own way: fp32 modules under autocast, SDPA, all logits at once."""
    make = lambda _=None: PlainGPT(config)
    return Maker(label, dtype, make, make, compiled, autocast=dtype != torch.float32, ours=False, **more)


def transformers(config: GPTConfig, dtype: torch.dtype) -> Maker:
    make = lambda _=None: TransformersGPT(config)
    return Maker("transformers eager", dtype, make, make, autocast=dtype != torch.float32, ours=False)


def used_ops(config: GPTConfig) -> list[str]:
    """The ops that a model of this architecture calls, in the order of kernels.OPS; found by running a tiny one."""
    called: set[str] = set()

    def noting(name: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return function(*args, **kwargs)

        return run

    ops = Ops({name: ("reference", "", noting(name, peers.in_torch(op))) for name, op in kernels.OPS.items()})
    heads: dict[str, Any] = {"n_head": 2, "n_kv_head": 2, "n_embd": 8}
    tiny = dataclasses.replace(config, n_layer=2, vocab_size=8, block_size=4, dropout=0.0, **heads)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with torch.random.fork_rng([]):
        GPT(tiny, ops)(tokens, tokens)
    return [name for name in kernels.OPS if name in called]


def ladder(
    config: GPTConfig, dtype: torch.dtype, compiled: str, load: Callable[..., Ops] = kernels.load
) -> list[Maker]:
    """The reference, then one kernel more at each rung; the last rung, `triton`, has them all."""
    on = dict(peers.IN_TORCH)
    rungs = [ours(config, load("reference", **on), "reference", dtype, compiled, rung=0)]
    for name in (name for name in used_ops(config) if kernels.OPS[name].triton is not None):
        on[name] = "triton"
        rungs.append(ours(config, load("reference", **on), f"+{name}", dtype, compiled, rung=len(rungs)))
    rungs[-1] = dataclasses.replace(rungs[-1], label=TRITON) if len(rungs) > 1 else rungs[-1]
    return rungs


def makers(config: GPTConfig, device: torch.device, compiled: str, rungs: bool, full: bool, quick: bool) -> list[Maker]:
    """What to train of a model on this device, ours first; `rungs` asks for the whole ladder."""
    has_transformers = importlib.util.find_spec("transformers") is not None
    if device.type == "cpu":
        native, _ = compute_dtype("cpu")
        dtypes = dict.fromkeys((torch.float32, native))
        chosen = [ours(config, kernels.load("cpu"), "eager", dtype, "no") for dtype in dtypes]
        if is_gpt2(config):
            chosen.append(plain(config, "plain eager", torch.float32, "no"))
        if is_gpt2(config) and config.bias and has_transformers:
            chosen.append(transformers(config, torch.float32))
        return chosen
    dtype, _ = compute_dtype(str(device))
    chosen = ladder(config, dtype, compiled)
    chosen = chosen[::-1] if rungs else chosen[-1:]  # ours first, so that it is measured whatever happens
    if not quick and torch.cuda.get_device_capability(device) >= fp8.OLDEST:
        chosen.insert(1, dataclasses.replace(chosen[0], label=f"{TRITON} fp8", fp8=True, rung=None))
    if not is_gpt2(config):
        return chosen
    backend = "cudnn" if torch.cuda.get_device_capability(device)[0] >= 9 else "flash"
    chosen.insert(1, plain(config, "torch.compile", dtype, compiled, attention=backend))
    if full:
        mode = "max-autotune-no-cudagraphs"  # at these sizes the host is not what limits
        chosen.append(plain(config, "torch.compile max-autotune", dtype, compiled, mode=mode, attention=backend))
    if has_transformers and (rungs or full or quick):
        chosen.append(transformers(config, dtype))
    return chosen


def with_graphs(chosen: Sequence[Maker]) -> list[Maker]:
    """Ours and plain torch.compile once more, each step as one CUDA graph as the trainer launches it."""
    twins = [
        dataclasses.replace(maker, label=f"{maker.label} + CUDA graph", graph=True, rung=None)
        for maker in chosen
        if maker.label in (TRITON, f"{TRITON} fp8", "torch.compile")
    ]
    return [*chosen, *twins]


def asked_for(there: Sequence[Maker], labels: str | None) -> list[Maker]:
    """Those of the makers that a comma-separated list names; all without a list. UserError names one there is not."""
    if labels is None:
        return list(there)
    wanted, known = [label.strip() for label in labels.split(",")], [maker.label for maker in there]
    for label in wanted:
        if label not in known:
            raise UserError(f"--impl={label}: no such variant of this model here{nearest(label, known)}")
    return [maker for maker in there if maker.label in wanted]


# ---- one variant at work ---------------------------------------------------------------------------------------------
class Variant:
    """A model with its optimizer; `step` trains on one batch and returns the loss, detached."""

    def __init__(self, maker: Maker, device: torch.device) -> None:
        self.maker, self.device = maker, device
        torch.manual_seed(1337)
        before = allocated(device)
        with device:
            self.model = maker.build(maker.dtype)
        if maker.fp8 and isinstance(self.model, GPT):
            fp8.convert(self.model, fp8.way(str(device)))
        with contextlib.redirect_stdout(io.StringIO()):  # the table of groups
            self.optimizer = adamw(self.model, **LEARNING)
        self.loss: Callable[[Tensor, Tensor], Tensor] = self.model
        self.graph = False  # not before it is compiled: memory is fitted first
        self.reset()
        self.parameter_bytes = 16 * sum(p.numel() for p in self.model.parameters())  # weight, gradient, two moments
        self.resident_bytes = allocated(device) - before
        self.peak_bytes: int | None = None
        self.first_loss: float | None = None

    def reset(self) -> None:
        """Forget gradients, and what was captured for a batch of another size."""
        self.optimizer.zero_grad(set_to_none=True)
        self.update = Step(lambda *batch: (self.forward(*batch), 1), self.optimizer, graph=self.graph)

    def compile(self) -> None:
        """Compile the whole model, or in place each block of it, of which all share one graph; capture from here on."""
        maker = self.maker
        self.graph = maker.graph
        if maker.compiled == "model":
            self.loss = torch.compile(self.model, mode=maker.mode, dynamic=False)
        elif maker.compiled == "blocks":
            stacks = [m for m in self.model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
            for block in max(stacks, key=len):
                block.compile(mode=maker.mode, dynamic=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with attention_by(self.maker.attention):
            if self.maker.autocast:
                with torch.autocast(self.device.type, self.maker.dtype):
                    return self.loss(tokens, targets)
            return self.loss(tokens, targets)

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.update(iter([(tokens, targets)]))

    def measure_memory(self, tokens: Tensor, targets: Tensor) -> None:
        """Set `peak_bytes`: this variant's own parameters and states, and what a step needs beside them."""
        if self.device.type == "cuda" and not self.graph:  # whose memory is a pool, held between steps
            torch.cuda.reset_peak_memory_stats(self.device)
            before = allocated(self.device)
            self.step(tokens, targets)
            states = sum(t.nbytes for state in self.optimizer.state.values() for t in state.values())
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - before + self.resident_bytes + states

    def check(self, tokens: Tensor, targets: Tensor, vocab_size: int) -> tuple[float, float, str | None]:
        """(last loss, error of a fresh batch's loss, why the figure is invalid). Overwrites the batch."""
        last = self.step(tokens, targets).item()
        draw(tokens, targets, vocab_size, secrets.randbits(31))
        loss = self.forward(tokens, targets).item()
        with self.device:
            twin = self.maker.twin()
        twin.load_state_dict(self.model.state_dict())
        with torch.no_grad():  # row by row: all logits in fp32 are much memory
            exact = torch.stack([twin(x[None], y[None]) for x, y in zip(tokens, targets, strict=True)]).mean().item()
        error = abs(loss - exact) / abs(exact)
        eps = FP8_MISSES if self.maker.fp8 else torch.finfo(self.maker.dtype).eps
        allowed = max(eps, 8 * torch.finfo(torch.float32).eps)
        if not error <= allowed:
            return last, error, f"loss {loss:.6g} where its weights give {exact:.6g} in fp32"
        if self.first_loss is None or not last < self.first_loss:
            return last, error, f"the loss went from {self.first_loss} to {last:.6g}: nothing was learned"
        return last, error, None


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextlib.contextmanager
def attention_by(backend: str | None) -> Iterator[None]:
    """Make scaled_dot_product_attention use this backend, while tracing too."""
    if backend is None:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel({"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]):
        yield


def draw(tokens: Tensor, targets: Tensor, vocab_size: int, seed: int) -> None:
    """Overwrite a batch (B, T) with random tokens; targets are the tokens that follow."""
    B, T = tokens.shape
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(vocab_size, (B, T + 1), generator=generator)
    tokens.copy_(stream[:, :-1])
    targets.copy_(stream[:, 1:])


def fit(attempt: Callable[[int], Any], most: int) -> int:
    """The largest of most, most / 2, ..., 1 at which `attempt` does not run out of memory. UserError if none."""
    rows = most
    while rows:
        try:
            attempt(rows)
            return rows
        except torch.OutOfMemoryError:
            pass  # what the failed attempt holds is let go with its traceback
        gc.collect()
        torch.cuda.empty_cache()
        rows //= 2
    raise UserError("not even one sequence fits into this GPU's memory; choose smaller --models")


# ---- a group: variants of one model, side by side --------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """One model's measurement, and what it may cost."""

    name: str
    config: GPTConfig
    device: torch.device
    batch_size: int | None  # None: found by fitting memory
    samples: int
    budget_s: float  # of the timed loop


def run_group(plan: Plan, chosen: Sequence[Maker], peak: mfu.Peak | None, log: Log, common: Row) -> list[Row]:
    """Build, fit, compile, time side by side, check, and write a row for each variant."""
    torch.compiler.reset()
    gc.collect()
    variants = [Variant(maker, plan.device) for maker in chosen]
    tokens, targets = batch = fitted_batch(plan, variants, log)
    for variant in variants:
        variant.measure_memory(*batch)
    before = gpu_state(plan.device) if plan.device.type == "cuda" else None
    timings = time_steps(plan, variants, batch)
    after = gpu_state(plan.device) if plan.device.type == "cuda" else None
    rows = []
    for variant, timing in zip(variants, timings, strict=True):
        draw(tokens, targets, plan.config.vocab_size, 0)
        timing = dataclasses.replace(timing, state_before=before, state_after=after)
        rows.append(log.row("model", **figures(plan, variant, timing, batch, peak, len(variants)), **common))
        log.say(line(rows[-1]))
    return rows


def fitted_batch(plan: Plan, variants: list[Variant], log: Log) -> tuple[Tensor, Tensor]:
    """The batch that all variants train on, as large as fits; each has made a few steps on it, compiled.

    A peer that cannot train here is taken from `variants`, and a note says why.
    """
    held: list[Tensor] = []

    def steps(rows: int) -> None:
        held[:] = [torch.empty(rows, plan.config.block_size, dtype=torch.int64, device=plan.device) for _ in range(2)]
        draw(held[0], held[1], plan.config.vocab_size, 0)
        for variant in list(variants):
            started = time.monotonic()
            variant.reset()
            try:
                loss = variant.step(held[0], held[1]).item()
            except torch.OutOfMemoryError:
                raise
            except FAILURES as error:
                if variant.maker.ours and not variant.graph:
                    raise
                variants.remove(variant)
                told = f"{plan.name}: {variant.maker.label} cannot train here: {type(error).__name__}: {error}"
                log.row("note", name=f"{plan.name}: {variant.maker.label}", text=told)
                log.say(f"model  {told[:300]}")
                continue
            variant.first_loss = loss if variant.first_loss is None else variant.first_loss
            if plan.device.type == "cuda":
                log.say(f"model  {plan.name}: {variant.maker.label}, first step {time.monotonic() - started:.1f} s")

    rows = plan.batch_size or fit(steps, MOST_ROWS)
    for variant in variants:
        variant.compile()
    rows = fit(steps, rows)
    log.say(f"model  {plan.name}: {rows} x {plan.config.block_size} tokens in a micro-batch")
    return held[0], held[1]


def time_steps(plan: Plan, variants: Sequence[Variant], batch: tuple[Tensor, Tensor]) -> list[Timing]:
    """Wall-clock milliseconds per step, between moments when the device is idle; samples of several steps each."""

    def sampler(variant: Variant, steps: int) -> Callable[[], float]:
        def sample() -> float:
            synchronize(plan.device)
            start = time.perf_counter_ns()
            for _ in range(steps):
                variant.step(*batch)
            synchronize(plan.device)
            return (time.perf_counter_ns() - start) / 1e6 / steps

        return sample

    counts = []
    for variant in variants:
        sampler(variant, 1)()  # warm
        counts.append(max(1, min(20, math.ceil(SAMPLE_MS / sampler(variant, 2)()))))
    samplers = {str(i): sampler(v, n) for i, (v, n) in enumerate(zip(variants, counts, strict=True))}
    taken = interleave(samplers, plan.samples, plan.budget_s, 10 * plan.samples)
    threads = None if plan.device.type == "cuda" else torch.get_num_threads()
    return [
        summarize(values, method=f"wall clock over {steps} steps", threads=threads, cold=False)
        for values, steps in zip(taken.values(), counts, strict=True)
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figures(
    plan: Plan, variant: Variant, timing: Timing, batch: tuple[Tensor, Tensor], peak: mfu.Peak | None, side_by_side: int
) -> Row:
    """The fields of a row: rates, the three figures with their peak, memory, and whether it can be believed."""
    maker, config, (B, T) = variant.maker, plan.config, batch[0].shape
    last, error, reason = variant.check(*batch, config.vocab_size)
    dtype = str(maker.dtype).removeprefix("torch.")
    numbers = "fp8" if maker.fp8 else PEAK_NAMES[dtype]  # that are multiplied, by whose peak the shares are
    rate = peak.flops(numbers) if peak else None
    known = peak if rate else None
    tokens_per_s = B * T / timing.ms_p50 * 1e3
    flops = mfu.flops_per_token(config, T)
    shares = mfu.utilization(tokens_per_s, config, T, peak=peak, dtype=numbers, flops=flops)
    most = 1.0 + (MEASURED_SLACK if peak and peak.kind == "measured" else 0.0)
    if reason is None and shares["mfu"] is not None and shares["mfu"] > most:
        reason = f"mfu {shares['mfu']:.2f}: the work was not done, or not timed"
    return {
        "name": plan.name, "impl": maker.label, "dtype": dtype, "dims": {"B": B, "T": T}, **timing.fields(),
        "tokens_per_s": tokens_per_s, **shares, "memory_bytes": variant.peak_bytes,
        "parameters": mfu.palm_params(config), "flops_per_token": dataclasses.asdict(flops),
        "peak_flops": rate, "peak_kind": known and known.kind, "peak_source": known and known.source,
        "peak_device": known and known.device, "peak_dtype": numbers,
        "cuda_graph": maker.graph,
        "compiled": maker.compiled, "compile_mode": maker.mode, "attention": maker.attention, "ops": dict(maker.ops),
        "rung": maker.rung, "ours": maker.ours, "side_by_side": side_by_side, "config": dataclasses.asdict(config),
        "first_loss": variant.first_loss, "loss": last, "error": error,
        "valid": reason is None, "invalid_reason": reason,
    }  # fmt: skip


def line(row: Row) -> str:
    """A row for the console."""
    shares = " ".join(f"{name} {mfu.format_mfu(row[name])}" for name in ("mfu", "mfu_palm", "hfu"))
    memory = "" if row["memory_bytes"] is None else f" {row['memory_bytes'] / 2**30:6.1f} GiB"
    verdict = "" if row["valid"] else f"  INVALID: {row['invalid_reason']}"
    head = f"{row['name']:16s} {row['impl']:26s} {row['dtype']:8s} B={row['dims']['B']:<3d}"
    return f"model  {head} {row['ms_p50']:9.2f} ms/iter {row['tokens_per_s']:10,.0f} tokens/s {shares}{memory}{verdict}"


# ---- the command -----------------------------------------------------------------------------------------------------
def padded(config: GPTConfig) -> GPTConfig:
    """Without dropout, and a large vocabulary rounded up to a multiple of 64, as every trainer does."""
    V = config.vocab_size
    return dataclasses.replace(config, dropout=0.0, vocab_size=-(-V // 64) * 64 if V > 1024 else V)


def peak_for(device: torch.device, peak_tflops: float | None, out: Path) -> mfu.Peak | None:
    """The peak that was given, else the datasheet's, else what `bench peaks` measured into `out`, and named so."""
    peak = mfu.peak_of(device, peak_tflops)
    path = out / "peaks.jsonl"
    if peak is not None or not path.exists():
        return peak
    threads = None if device.type == "cuda" else torch.get_num_threads()
    seen = from_rows(row for row in results.latest(results.read(path)) if row.get("threads") == threads)
    if seen is None:
        return None
    flops = {PEAK_NAMES[name]: rate for name, rate in seen.flops.items()}
    how = f"python -m bench peaks, {seen.source}"
    return mfu.Peak.measured("a GEMM on this machine", flops, seen.bytes_per_s, how)


def groups(plan: Plan, chosen: Sequence[Maker]) -> Iterable[Sequence[Maker]]:
    """All variants side by side where their parameters take less than a third of the memory, else one at a time."""
    if plan.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(plan.device)
        if 16 * mfu.palm_params(plan.config) * len(chosen) > free / 3:
            return [[maker] for maker in chosen]
    return [chosen]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench model", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--models", help=f"of {NAMES} (default: {','.join(GPU_MODELS if on_gpu else CPU_MODELS)})")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--batch_size", type=int, help="sequences (default: what fits the GPU's memory; on a CPU a few)")
    add("--block_size", type=int, help="tokens per sequence, T (default: the model's)")
    add("--compile", choices=("auto", "model", "blocks", "no"), default="auto", help="auto: blocks where they are many")
    add("--peak_tflops", type=float, help="dense TFLOP/s of this device, where its peak is not known")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--samples", type=int, help="at least so many of each variant")
    add("--budget_s", type=float, default=180.0 if on_gpu else 40.0, help="start no model that would end after this")
    add("--full", action="store_true", help="every peer and every ladder, whatever the budget")
    add("--cuda_graph", type=boolean, default=True, help="time CUDA graphs too (default: True)")
    add("--impl", help="only these variants, comma-separated: 'triton + CUDA graph,torch.compile' (default: all)")
    add("--quick", action="store_true", help="the first model, without its ladder")
    add("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    arguments = check_ranges(parser.parse_args([_underscored(argument) for argument in argv]))
    device = made_current(arguments.device)
    check_arguments(arguments, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # as the trainer does; here for every variant
        torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(arguments.threads)
    common = facts(device)
    out = arguments.out or results.folder(common["hardware"])
    with compiling.strict(), results.campaign(out, "model.jsonl") as log:
        failed = campaign(arguments, device, peak_for(device, arguments.peak_tflops, out), log, common)
    return 1 if failed else 0


def boolean(value: str) -> bool:
    if value not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"expected True or False, not {value[:80]!r}")
    return value == "True"


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def check_arguments(arguments: argparse.Namespace, device: torch.device) -> None:
    """Raise UserError for what cannot be run."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device={arguments.device}: this machine has no CUDA device; leave --device out")
    for name in ("batch_size", "block_size", "samples", "threads", "peak_tflops", "budget_s"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name}={value} must be above 0")
    for name in (arguments.models or "").split(","):
        if name:
            preset(name, "--models")


def campaign(arguments: argparse.Namespace, device: torch.device, peak: mfu.Peak | None, log: Log, common: Row) -> bool:
    """Measure model after model while the budget lasts. Returns whether anything failed or is invalid."""
    on_gpu, failed, started, each_s = device.type == "cuda", False, time.monotonic(), 0.0
    default: Sequence[str] = GPU_MODELS if on_gpu else CPU_MODELS
    default = default[:1] if arguments.quick else default
    names = [name for name in (arguments.models or "").split(",") if name] or list(default)
    if importlib.util.find_spec("transformers") is None:
        log.say("model  transformers is not installed: its GPT-2 is left out")
    for number, name in enumerate(names):
        config = padded(preset(name))
        config = dataclasses.replace(config, block_size=arguments.block_size or config.block_size)
        whole = "model" if config.n_layer <= LAYERS_COMPILED_WHOLE else "blocks"
        compiled = whole if arguments.compile == "auto" else arguments.compile
        rungs = (number == 0 or arguments.full) and not arguments.quick
        chosen = makers(config, device, compiled, rungs, arguments.full, arguments.quick)
        chosen = with_graphs(chosen) if on_gpu and arguments.cuda_graph else chosen
        chosen = asked_for(chosen, arguments.impl)
        batch_size = arguments.batch_size or (None if on_gpu else CPU_BATCH.get(name, 1))
        samples = arguments.samples or (6 if arguments.quick else 12)
        plan = Plan(name, config, device, batch_size, samples, budget_s=min(1.0, arguments.budget_s / 40) * len(chosen))
        for group in groups(plan, chosen):
            spent = time.monotonic() - started
            if not arguments.full and number and spent + each_s * len(group) > arguments.budget_s:
                log.say(f"model  {name}: left out, {spent:.0f} of {arguments.budget_s:.0f} s are spent; --full runs it")
                break
            try:
                rows = run_group(plan, group, peak, log, common)
                failed |= not all(row["valid"] for row in rows)
            except FAILURES as error:
                failed = True
                labels = ", ".join(maker.label for maker in group)
                log.row("note", name=f"{name} ({labels})", text=f"failed: {type(error).__name__}: {error}")
                log.say(f"model  {name} ({labels}): FAILED: {in_one_line(error)}")
            gc.collect()
            each_s = (time.monotonic() - started - spent) / len(group)
    return failed
