"""The optimizer's step over the matrices of a model, and the three products of Newton-Schulz.

    python -m bench optim                                  # on a GPU GPT-2 124M and 1558M, on a CPU the char model
    python -m bench optim --models=gpt2-xl --sizes=1600,4096
    python -m bench optim --rounds=5 --sizes=              # steps alone

Steps: ours, torch.optim.Muon and torch's fused AdamW, side by side over copies of the block's matrices (queries, keys
and values apart, as ours takes them), with the gradients standing. Products: ours where there is a GPU, torch's, and
with --compile torch's compiled, for X (B, n, n) and (B, n, 4 n); `tflops` counts a plain product's, 2 n² k, so that
half of the work shows as twice the rate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from gptfast.cli import check_ranges
from gptfast.config import GPTConfig, preset
from gptfast.errors import UserError
from gptfast.log import Log, Row, facts
from gptfast.optim import Muon
from gptfast.runtime import made_current
from kernels.newton_schulz import KERNEL_PRODUCTS, POLAR_EXPRESS, REFERENCE_PRODUCTS, Products

from . import compiling, results
from .failures import FAILURES, in_one_line
from .peaks import DTYPES
from .stats import compare
from .timing import Settings, Truth, Work, interleave, stopwatch, summarize

A, B, C = POLAR_EXPRESS[0]
SAMPLE_MS = 20.0  # a sample is as many steps in a row as fill this
Step = Callable[[], Any]


# ---- steps -----------------------------------------------------------------------------------------------------------
def shapes(config: GPTConfig) -> list[tuple[int, int]]:
    """The matrices of the blocks, as Muon takes them: of the attention, then of the MLP, layer by layer."""
    width, kv = config.n_embd, config.kv_heads * config.head_dim
    block = [(width, width), (kv, width), (kv, width), (width, width), (4 * width, width), (width, 4 * width)]
    return block * config.n_layer


def steps(config: GPTConfig, device: torch.device) -> dict[str, Step]:
    """One step of each optimizer, each over weights and gradients of its own with the same numbers."""

    def parameters() -> list[torch.nn.Parameter]:
        generator = torch.Generator(device).manual_seed(0)
        weights = []
        for shape in shapes(config):
            w, g = (torch.randn(shape, device=device, generator=generator) * 0.02 for _ in range(2))
            weights.append(torch.nn.Parameter(w))
            weights[-1].grad = g
        return weights

    newton_schulz = kernels.load("auto" if device.type == "cuda" else "reference").newton_schulz
    ours = Muon([{"kind": "muon", "params": parameters(), "lr": 1e-4}], newton_schulz)
    made: dict[str, Step] = {"ours": ours.step}
    if hasattr(torch.optim, "Muon"):  # torch 2.9 and newer
        made["torch.optim.Muon"] = torch.optim.Muon(parameters(), lr=1e-4, weight_decay=0.0).step
    made["AdamW fused"] = torch.optim.AdamW(parameters(), lr=1e-4, fused=True).step
    return made


def sampler(step: Step, device: torch.device) -> Callable[[], float]:
    """A function that takes one sample: milliseconds of a step, the mean of as many as fill SAMPLE_MS."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def timed(count: int) -> float:
        wait()
        start = time.perf_counter_ns()
        for _ in range(count):
            step()
        wait()
        return (time.perf_counter_ns() - start) / 1e6 / count

    timed(2)
    count = max(1, min(100, round(SAMPLE_MS / max(timed(1), 1e-3))))
    return lambda: timed(count)


def run_steps(name: str, device: torch.device, rounds: int, log: Log, common: Row) -> bool:
    """Time the optimizers over one model's matrices; a row for each, its speed relative to torch.optim.Muon.

    Whether ours could step; one that cannot is left out, and a note says why.
    """
    samplers, right = {}, True
    for key, step in steps(preset(name), device).items():
        try:
            samplers[key] = sampler(step, device)
        except FAILURES as error:
            say_failed(f"step of {name}: {key}", error, log)
            right = right and key != "ours"
    samples = interleave(samplers, rounds) if samplers else {}
    base = samples.get("torch.optim.Muon")
    threads = torch.get_num_threads() if device.type == "cpu" else None
    for key, values in samples.items():
        timing = summarize(values, method="perf_counter", threads=threads, cold=False)
        ratio = compare(values, base) if base else None
        log.row(
            "optimizer", name=name, impl=key, matrices=len(shapes(preset(name))), **timing.fields(),
            speedup=ratio and ratio.ratio, speedup_low=ratio and ratio.low, speedup_high=ratio and ratio.high, **common,
        )  # fmt: skip
        versus = f"   x{ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) of torch.optim.Muon" if ratio else ""
        log.say(f"optim  step of {name:14s} {key:18s} {timing.ms_p50:10.3f} ms{versus}")
    return right


def say_failed(what: str, error: Exception, log: Log) -> None:
    """A note for what could not be timed."""
    log.row("note", name=what, text=f"failed: {type(error).__name__}: {error}")
    log.say(f"optim  {what}: FAILED: {in_one_line(error)}")


# ---- products --------------------------------------------------------------------------------------------------------
def calls(products: Products) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Each product as a function of x (B, n, k) and of a symmetric S (B, n, n)."""
    return {
        "gram": lambda x, S: products.gram(x),
        "quadratic": lambda x, S: products.commuting(S, S, C, B, 0.0),
        "affine": lambda x, S: products.affine(S, x, A),
    }


def implementations(device: torch.device, compiled: bool) -> dict[str, Products]:
    products = {"triton": KERNEL_PRODUCTS} if device.type == "cuda" else {}
    products["torch"] = REFERENCE_PRODUCTS
    if compiled:
        products["compile"] = Products(*(torch.compile(f, dynamic=False) for f in vars(REFERENCE_PRODUCTS).values()))
    return products


def draw(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """x (B, n, k) and a symmetric S (B, n, n), of unit spectral size or so."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, n, k = size
    x = torch.randn(size, device=device, generator=generator) / k**0.5
    S = torch.randn((batch, n, n), device=device, generator=generator) / (2 * n) ** 0.5
    return x.to(dtype), (S + S.mT).to(dtype)


def run_product(
    product: str, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device,
    functions: Mapping[str, Products], settings: Settings, log: Log, common: Row,
) -> bool:  # fmt: skip
    """Time one product by every implementation and check it on fresh numbers; whether all were right.

    An implementation that cannot do it is left out, and a note says why.
    """
    batch, n, k = size
    flops = 2 * batch * n * n * (n if product == "quadratic" else k)
    right = True

    def work(products: Products, seed: int) -> Work:
        x, S = draw(size, dtype, device, seed)

        def refresh(seed: int) -> None:
            for old, new in zip((x, S), draw(size, dtype, device, seed), strict=True):
                old.copy_(new)

        return Work(partial(calls(products)[product], x, S), (x, S), refresh)

    def answer(seed: int, double: bool) -> tuple[Tensor]:
        x, S = draw(size, dtype, device, seed)
        return (calls(REFERENCE_PRODUCTS)[product](*((x.double(), S.double()) if double else (x, S))),)

    with stopwatch(device, settings) as watch:
        sets = watch.sets_needed(batch * (n * k + n * n) * dtype.itemsize)
        works = {}
        for name, f in functions.items():
            try:
                work(f, 0).run()
            except FAILURES as error:
                say_failed(f"{product} {batch}x{n}x{k}: {name}", error, log)
                right = right and name != "triton"
            else:
                works[name] = [work(f, seed) for seed in range(sets)]
        timings = watch.measure(works) if works else {}
        truth = Truth(partial(answer, double=True), partial(answer, double=False))
        verdicts = watch.verify(works, truth, [1, 2], [name for name in works if name != "triton"])
    for name, timing in timings.items():
        verdict, rate = verdicts[name], flops / timing.ms_p50 / 1e9
        right = right and verdict.valid
        log.row(
            "product", name=product, impl=name, dims={"B": batch, "n": n, "k": k}, dtype=str(dtype).split(".")[1],
            **timing.fields(), tflops=rate, error=verdict.error, valid=verdict.valid, invalid_reason=verdict.reason,
            **common,
        )  # fmt: skip
        wrong = "" if verdict.valid else f"  INVALID: {verdict.reason}"
        versus = f" x{timings['torch'].ms_p50 / timing.ms_p50:.2f}" if "torch" in timings else ""
        log.say(f"optim  {product:9s} {batch}x{n}x{k:<6d} {name:8s} {timing.ms_p50:9.4f} ms {rate:8.2f}{versus}{wrong}")
    return right


# ---- the command -----------------------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser("python -m bench optim", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--models", default="gpt2,gpt2-xl" if on_gpu else "char-cpu", help="whose matrices to step")
    parser.add_argument(
        "--sizes", default="768,1024,1600,2048,4096,6400" if on_gpu else "256", help="n of the products"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="of the products")
    parser.add_argument("--batch", type=int, default=1, help="matrices in a stack, for the products")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each step")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=on_gpu, help="torch.compile as a peer"
    )
    parser.add_argument(
        "--budget_s", type=float, default=float("inf"), help="start no model and no product after this, and say which"
    )
    parser.add_argument("--quick", action="store_true", help="one model, one size, fewer samples")
    parser.add_argument("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    arguments = check_ranges(parser.parse_args(argv))
    device, models = made_current(arguments.device), [name for name in arguments.models.split(",") if name]
    if device.type == "cuda" and not on_gpu:
        raise UserError(f"--device={arguments.device}: this machine has no CUDA device; leave --device out")
    for name in models:
        preset(name, "--models")
    if not all(size.isdecimal() and int(size) > 0 for size in arguments.sizes.split(",") if size):
        raise UserError(f"--sizes={arguments.sizes}: whole numbers above 0, with commas")
    sizes = [int(size) for size in arguments.sizes.split(",") if size]
    with compiling.strict():
        return 0 if campaign(arguments, device, models, sizes) else 1


def campaign(arguments: argparse.Namespace, device: torch.device, models: list[str], sizes: list[int]) -> bool:
    """Steps of the optimizers, then products, as long as the budget lasts. Whether all went well and was right."""
    started, left = time.monotonic(), []
    rounds, samples = arguments.rounds, 40
    if arguments.quick:
        models, sizes, rounds, samples = models[:1], sizes[:1], min(rounds, 5), 5
    common = facts(device)

    def attempt(what: str, run: Callable[[], bool]) -> bool:
        """Whether `run` went well, or there was no time for it."""
        if time.monotonic() - started > arguments.budget_s:
            left.append(what)
            return True
        try:
            return run()
        except FAILURES as error:
            say_failed(what, error, log)
            return False

    right = True
    with results.campaign(arguments.out or results.folder(common["hardware"]), "optim.jsonl", compacted=False) as log:
        for name in models:
            right &= attempt(f"step of {name}", partial(run_steps, name, device, rounds, log, common))
        functions, dtype = implementations(device, arguments.compile), DTYPES[arguments.dtype]
        settings = Settings(samples=samples, budget_s=0.6 if device.type == "cuda" else 1.0)
        for n in sorted(sizes, reverse=True):  # the largest, where the time goes in a model, whatever is left out
            if arguments.compile:
                torch.compiler.reset()  # the shapes of one size are no versions of the next
            for product, k in (("gram", n), ("gram", 4 * n), ("quadratic", n), ("affine", n), ("affine", 4 * n)):
                size = (arguments.batch, n, k)
                case = partial(run_product, product, size, dtype, device, functions, settings, log, common)
                right &= attempt(f"{product} {arguments.batch}x{n}x{k}", case)
        if left:
            text = f"{len(left)} not begun within {arguments.budget_s:.0f} s: {'; '.join(left)}"
            log.row("note", text=text)
            log.say(f"optim  {text}")
    return right
