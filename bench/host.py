"""Host time of every op: microseconds of Python and dispatch per call, with the kernels' launches left out.

    python -m bench host                     # every op, eager: forward and backward
    python -m bench host --ops=attention --profile

A GPU waits for whoever is slower. What a call costs before the GPU hears of it shows on any CPU: the kernels' own pages
run on CPU tensors as if for an H100, and a launch does nothing but be counted. What Triton adds to a launch (20 to
50 us eager, nothing in a CUDA graph) is not in these figures. Products that an op leaves to torch do run, and are
small.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from gptfast.errors import UserError, nearest
from gptfast.log import Log, Row, facts
from kernels._triton import Launcher, launching

from . import results

SHORT = dict.fromkeys("BMTSV", 64)  # axes cut to this length: the host's work does not depend on it
CALLS, SAMPLES = 50, 21


class Count:
    """A launcher that launches nothing and counts what it was asked for."""

    def __init__(self, arch: int = 90, multiprocessors: int = 132) -> None:
        self.launches = 0
        self.launcher = Launcher(self._launch, arch, multiprocessors)

    def _launch(self, kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        self.launches += 1


def short(dims: dict[str, Any]) -> dict[str, Any]:
    return {name: min(value, SHORT[name]) if name in SHORT else value for name, value in dims.items()}


def calls(op: kernels.Op, dims: dict[str, Any], dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What to time, by direction. The backward alone is the difference to a forward that keeps what it needs."""
    arguments, keywords = op.inputs(**dims, dtype=dtype)
    assert op.triton is not None
    kernel = functools.partial(op.triton, **keywords) if keywords else op.triton  # a partial would cost time of its own
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]

    def leaf(i: int, a: Any) -> Any:
        wanted = isinstance(a, Tensor) and a.is_floating_point() and i not in op.constants
        return a.detach().requires_grad_() if wanted else a

    arguments = tuple(leaf(i, a) for i, a in enumerate(arguments))
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            kernel(*plain)

    functions: dict[str, Callable[[], Any]] = {"forward": forward}
    if op.differentiable:
        outputs = kernel(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [torch.ones_like(o) for o in outputs]

        def both() -> None:
            outputs = kernel(*arguments)
            torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), leaves, gradients)

        functions["kept forward"], functions["both"] = lambda: kernel(*arguments), both
    return functions


def samples(call: Callable[[], Any]) -> list[float]:
    """Microseconds per call, of SAMPLES runs of CALLS calls, after warming up."""
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(SAMPLES):
        started = time.perf_counter_ns()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter_ns() - started) / CALLS / 1e3)
    return sorted(times)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(op: kernels.Op, dtype: torch.dtype, log: Log, common: Row) -> list[Row]:
    """A row for each direction of one op."""
    dims, count, rows = short(dict(op.bench[0])), Count(), []
    with launching(count.launcher), one_thread():
        todo = calls(op, dims, dtype)
        launches = {name: launched(count, call) for name, call in todo.items()}
        taken = {name: samples(call) for name, call in todo.items()}
    if "both" in taken:
        kept, both = taken.pop("kept forward"), taken.pop("both")
        taken["backward"] = sorted(b - statistics.median(kept) for b in both)
        launches["backward"] = launches["both"] - launches["kept forward"]
    for direction, us in taken.items():
        p20, p50, p80 = us[SAMPLES // 5], us[SAMPLES // 2], us[-1 - SAMPLES // 5]
        times = {"ms_p20": max(0.0, p20) / 1e3, "ms_p50": max(0.0, p50) / 1e3, "ms_p80": max(0.0, p80) / 1e3}
        what = dict(
            name=op.name, impl="triton", direction=direction, dims=dims, dtype=str(dtype).removeprefix("torch.")
        )
        rows.append(log.row("host", **what, **times, n=SAMPLES, launches=launches[direction], **common))
        log.say(f"host  {op.name:22s} {direction:9s} {p50:8.1f} us  {launches[direction]} launches")
    return rows


def launched(count: Count, call: Callable[[], Any]) -> int:
    before = count.launches
    call()
    return count.launches - before


def profile(op: kernels.Op, dtype: torch.dtype) -> None:
    """Print where the time of forward and backward goes."""
    with launching(Count().launcher), one_thread():
        todo = calls(op, short(dict(op.bench[0])), dtype)
        call = todo.get("both", todo["forward"])
        samples(call)
        with cProfile.Profile() as profiler:
            for _ in range(20 * CALLS):
                call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(20)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench host", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ops", help="comma-separated: layernorm,attention (default: all)")
    parser.add_argument("--profile", action="store_true", help="print where the time goes; write no rows")
    parser.add_argument("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    arguments = parser.parse_args(argv)
    known = [name for name, op in kernels.OPS.items() if op.triton is not None]
    names = [name for name in arguments.ops.split(",") if name] if arguments.ops else known
    for name in names:
        if name not in known:
            raise UserError(f"--ops={name}: no such op{nearest(name, known)}")
    if arguments.profile:
        for name in names:
            profile(kernels.OPS[name], torch.bfloat16)
        return 0
    common = facts("cpu")
    out = arguments.out or results.folder(common["hardware"])
    with results.campaign(out, "host.jsonl") as log:
        for name in names:
            measure(kernels.OPS[name], torch.bfloat16, log, common)
    return 0
