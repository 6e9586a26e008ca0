"""Deep tools that others have built, on one of our ops: counters of the hardware, checkers of memory and order.

    python -m bench deep --tool=ncu --op=rmsnorm        # Nsight Compute: what each kernel loses its time to, as rows
    python -m bench deep --tool=proton --op=attention       # Triton's profiler: time of each kernel, by call stack
    python -m bench deep --tool=memcheck --op=rotary        # compute-sanitizer over the op's parity tests on the GPU
    python -m bench deep --tool=racecheck --op=attention    # likewise, for races in shared memory
    python -m bench deep --tool=consan --op=attention       # Triton's check of barriers and copies, for Gluon kernels;
                                                            # they take minutes to compile with it

Each prints the exact command that it runs, and `--dry_run` that alone, to be taken to another machine. A report of
Nsight Compute that was made elsewhere is read by `--report=FILE.ncu-rep`, or FILE.csv from `ncu --csv --page raw`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from gptfast import untrusted
from gptfast.errors import UserError, nearest
from gptfast.log import Log, Row, facts
from kernels import _triton

from . import results
from .ops import DIRECTIONS, cases
from .peaks import DTYPES

LONGEST_LINE, MOST_COLUMNS, MOST_LAUNCHES = 2**20, 10_000, 2**17  # of a report, whose launches are held in memory
REPEATS = 3  # launches of the op that a profiler sees; a fourth, before them, compiles
# What Nsight Compute is asked for, and what a row calls it. Percentages are of the peak that the chip could sustain.
METRICS = {
    "gpu__time_duration.sum": "us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor_percent",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank_conflicts",
    "smsp__sass_inst_executed_op_local.sum": "local_memory_instructions",
    "launch__registers_per_thread": "registers",
}
COLUMNS = {
    "us": "us", "SM %": "sm_percent", "DRAM %": "dram_percent", "GB/s": "gbs", "L2 hits %": "l2_hit_percent",
    "warps %": "occupancy_percent", "tensor %": "tensor_percent", "registers": "registers",
}  # fmt: skip
UNITS = {  # factors to the unit of the row: us, bytes, plain numbers
    "nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6,
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
}  # fmt: skip
TESTS = {  # of an op's Gluon kernels
    "attention": ("tests/test_attention_hopper.py", "tests/test_attention_hopper_backward.py"),
    "cross_entropy": ("tests/test_cross_entropy_hopper.py",),
    "linear_cross_entropy": ("tests/test_cross_entropy_hopper.py",),
}


@dataclass(frozen=True)
class Tool:
    """A program, or a Python module, and how one comes by it."""

    program: str
    get: str
    module: bool = False

    def missing(self) -> bool:
        if self.module:
            return _triton.MISSING is not None
        return shutil.which(self.program) is None


SANITIZER = Tool("compute-sanitizer", "it comes with the CUDA toolkit, as /usr/local/cuda/bin/compute-sanitizer")
NCU = Tool(
    "ncu",
    "it comes with the CUDA toolkit, or as nsight-compute; its counters need root, or the driver's option "
    "NVreg_RestrictProfilingToAdminUsers=0",
)
TOOLS = {
    "ncu": NCU, "proton": Tool("triton.profiler", "it comes with triton: pip install triton", module=True),
    "memcheck": SANITIZER, "racecheck": SANITIZER, "synccheck": SANITIZER, "initcheck": SANITIZER,
    "consan": Tool("triton", "it comes with triton from 3.5 on: pip install triton", module=True),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench deep", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--tool", choices=(*TOOLS, "none"), default="ncu", help="none: only run the op, for a profiler of your own")
    add("--op", default="rmsnorm", help=f"one of {', '.join(kernels.OPS)}")
    add("--direction", choices=DIRECTIONS, default="forward")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16")
    add("--impl", default="triton", help="which implementation runs")
    add("--size", type=int, default=0, help="which of the op's bench sizes, counted from 0")
    add("--proton", help=argparse.SUPPRESS)  # where Proton writes
    add("--report", type=Path, help="read this report of Nsight Compute; nothing runs")
    add("--out", type=Path, help="folder of rows and reports (default: results/<machine>)")
    add("--dry_run", "--dry-run", action="store_true", help="print the command, and run nothing")
    options = parser.parse_args(argv)
    if options.op not in kernels.OPS:
        raise UserError(f"--op={options.op} is unknown{nearest(options.op, kernels.OPS)}")
    if options.tool == "none":
        return run_op(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or results.folder(facts(device)["hardware"])
    if options.report is not None:
        return tell(options, read_report(options.report), out, device)
    command = command_of(options, out)
    print(shlex.join(command), flush=True)
    if options.dry_run:
        return 0
    tool = TOOLS[options.tool]
    if tool.missing():
        raise UserError(f"--tool={options.tool} needs {tool.program}, which is not here: {tool.get}")
    if device.type != "cuda":
        raise UserError(f"--tool={options.tool} needs an NVIDIA GPU; --dry_run prints the command to run where one is")
    out.mkdir(parents=True, exist_ok=True)
    code = subprocess.run(command, check=False).returncode
    if options.tool == "ncu" and code == 0:
        return tell(options, read_report(report_of(options, out)), out, device)
    if options.tool == "proton" and code == 0:
        print("\n".join(tree(json.loads(proton_of(options, out).with_suffix(".hatchet").read_text()))))
    return code


def command_of(options: argparse.Namespace, out: Path) -> list[str]:
    """The one command that a tool is: what --dry_run prints."""
    python = Path(sys.executable).name
    case = [f"--{name}={getattr(options, name)}" for name in ("op", "direction", "dtype", "impl", "size")]
    op = [python, "-m", "bench", "deep", "--tool=none", *case]
    if options.tool == "ncu":  # the first call of the op compiles, and is no part of the range that is looked at
        metrics, report = ",".join(METRICS), str(report_of(options, out))
        return [
            "ncu",
            "--profile-from-start",
            "off",
            "--clock-control",
            "none",  # clocks as in training; by default it would lower and lock them, which others on the GPU feel too
            "--metrics",
            metrics,
            "--force-overwrite",
            "--export",
            report,
            *op,
        ]
    if options.tool == "proton":
        return [*op, f"--proton={proton_of(options, out)}"]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    if options.tool == "consan":
        pages = TESTS.get(options.op)
        if pages is None:
            raise UserError(f"--tool=consan is for kernels in Gluon; {options.op} has none, {', '.join(TESTS)} do")
        mode = ["env", "TRITON_INSTRUMENTATION_MODE=consan", "TRITON_ALWAYS_COMPILE=1"]
        return [*mode, *tests, "-p", "tests.instrumented", *pages]
    # torch's own allocator would hide accesses beyond a tensor that end within a larger block
    checker = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", f"--tool={options.tool}"]
    picked = ["tests/test_parity.py", "-k", f"{options.op} and not fuzz"]
    return [*checker, "--error-exitcode=9", "--target-processes=all", *tests, *picked]


def report_of(options: argparse.Namespace, out: Path) -> Path:
    return out / f"{options.op}-{options.direction}-{options.dtype}.ncu-rep"


def proton_of(options: argparse.Namespace, out: Path) -> Path:
    return out / f"{options.op}-{options.direction}-{options.dtype}-proton"


def run_op(options: argparse.Namespace) -> int:
    """The op a few times on one of its bench sizes, within the range that profilers are told to look at."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = cases([options.op], [options.dtype], [options.direction], device, quick=False)
    if not 0 <= options.size < len(there):
        raise UserError(f"--size={options.size}: {options.op} {options.direction} has sizes 0 to {len(there) - 1}")
    case = there[options.size]
    function = getattr(kernels.load("reference", **{options.op: options.impl}), options.op)
    wanted = [] if case.direction == "forward" else case.differentiable(function)
    work = case.work(function, case.draw(0), wanted)
    work.run()
    with looked_at(device, options.proton):
        for _ in range(REPEATS):
            work.run()
    print(case)
    return 0


@contextlib.contextmanager
def looked_at(device: torch.device, proton: str | None) -> Iterator[None]:
    """The range that Nsight Compute sees, and Proton where it has a file to write."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    if proton is not None:
        _triton.profiler().start(proton, hook="triton")
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    if proton is not None:
        _triton.profiler().finalize()


# ---- reports of Nsight Compute


def read_report(path: Path) -> list[dict[str, Any]]:
    """Kernels in the order of their launches: `kernel` and what METRICS names; what a report lacks is None."""
    if not path.is_file():
        raise UserError(f"--report={path}: no such file")
    if path.suffix == ".csv":
        fix = "make it by ncu --csv --page raw"
        try:
            with untrusted.opened(path) as file, untrusted.expected(f"--report={path}", fix):
                return list(parse(line.decode("utf-8") for line in untrusted.lines(file, LONGEST_LINE)))
        except (OSError, csv.Error) as error:
            raise UserError(f"--report={path}: cannot be read ({untrusted.reason(error)})") from None
    if TOOLS["ncu"].missing():
        raise UserError(f"--report={path} needs ncu to read it: {TOOLS['ncu'].get}; or give the .csv of --page raw")
    command = ["ncu", "--import", str(path), "--csv", "--page", "raw"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()[:300]}")
    return list(parse(done.stdout.splitlines(keepends=True)))


def parse(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The kernels of `ncu --csv --page raw`: a line of names, one of units, then a line for each launch."""
    lines = itertools.dropwhile(lambda line: not line.startswith('"ID"'), lines)
    first = next(lines, None)
    if first is None:
        raise UserError('this is no report of `ncu --csv --page raw`: it has no line that begins with "ID"')
    table = csv.DictReader(itertools.chain([first], lines))
    if len(table.fieldnames or ()) > MOST_COLUMNS:
        raise UserError(f"this is no report of `ncu --csv --page raw`: it has more than {MOST_COLUMNS:,} columns")
    units = next(table, None)
    for number, line in enumerate(table):
        if number == MOST_LAUNCHES:
            raise UserError(f"the report has more than {MOST_LAUNCHES:,} launches; let ncu look at fewer")
        assert units is not None
        kernel: dict[str, Any] = {
            "kernel": line["Kernel Name"],
            "grid": line.get("Grid Size"),
            "block": line.get("Block Size"),
        }
        for metric, name in METRICS.items():
            kernel[name] = _number(line.get(metric), units.get(metric) or "")
        moved, us = (kernel["bytes_read"], kernel["bytes_written"]), kernel["us"]
        kernel["gbs"] = sum(moved) / us / 1e3 if us and None not in moved else None
        yield kernel


def _number(text: str | None, unit: str) -> float | None:
    try:
        return None if text is None else float(text.replace(",", "")) * UNITS.get(unit, 1.0)
    except ValueError:  # "n/a", "(!) nan"
        return None


def tell(options: argparse.Namespace, launches: list[dict[str, Any]], out: Path, device: torch.device) -> int:
    """Prints the launches and appends them to deep.jsonl."""
    if not launches:
        raise UserError("the report has no kernels; did the op run by kernels of its own (--impl=triton)?")
    print(f"{'kernel':40s}" + "".join(f"{title:>10s}" for title in COLUMNS))
    for launch in launches:
        print(f"{launch['kernel'][:40]:40s}" + "".join(f"{_shown(launch[name]):>10s}" for name in COLUMNS.values()))
    out.mkdir(parents=True, exist_ok=True)
    common: Row = facts(device)
    with Log(out, name="deep.jsonl") as log:
        log.row(
            "counters", name=options.op, impl=options.impl, direction=options.direction, dtype=options.dtype,
            kernels=launches, **common,
        )  # fmt: skip
    return 0


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


# ---- Proton


def tree(frames: list[dict[str, Any]], depth: int = 0) -> list[str]:
    """Lines of a Proton file in its hatchet form: calls and microseconds of every frame, callees below callers."""
    lines = []
    for frame in frames:
        metrics, name = frame.get("metrics", {}), frame.get("frame", {}).get("name")
        if name is None:  # the last entry describes devices
            continue
        if "time (ns)" in metrics:
            lines.append(
                f"{metrics['time (ns)'] / 1e3:12.1f} us {metrics.get('count', 0):6.0f} calls  {'  ' * depth}{name}"
            )
        else:
            lines.append(f"{'':29s}{'  ' * depth}{name}")
        lines += tree(frame.get("children", []), depth + 1)
    return lines
