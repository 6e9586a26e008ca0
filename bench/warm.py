"""Compile what `bench ops` will time, by several processes at once, so that the timed pages find it cached on disk.

    python -m bench warm --budget_s=40            # before python -m bench ops, on a GPU whose caches are cold

Triton and torch.compile compile on one core. Each process takes a share of the cases and runs it once; nothing is
timed, and what fails says so when it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gptfast.errors import UserError

MOST_JOBS = 6  # each holds the tensors of a case on the GPU


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench warm", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=max(1, min(MOST_JOBS, cores // 2)), help="processes")
    parser.add_argument("--only", help="ops, comma-separated (default: all)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile too")
    parser.add_argument("--quick", action="store_true", help="one size of each op")
    parser.add_argument("--budget_s", type=float, default=60.0, help="stop all of it after this")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        raise UserError(f"--jobs={arguments.jobs} must be at least 1")
    if not torch.cuda.is_available():
        print("warm   nothing to do: kernels are compiled where there is a CUDA device")
        return 0
    return run(commands(arguments.jobs, arguments.only, arguments.compile, arguments.quick, arguments.budget_s),
        arguments.budget_s)  # fmt: skip


def commands(jobs: int, only: str | None, compiled: bool, quick: bool, budget_s: float) -> list[list[str]]:
    """One command a process; together they take every case once."""
    flags = [f"--budget_s={budget_s:g}", "--compile" if compiled else "--no-compile"]
    flags += [f"--only={only}"] if only else []
    flags += ["--quick"] if quick else []
    return [[sys.executable, "-m", "bench", "ops", f"--warm={i}/{jobs}", *flags] for i in range(jobs)]


def run(todo: Sequence[Sequence[str]], budget_s: float) -> int:
    """Run the commands side by side; those that have not ended within the budget are stopped, which is no failure."""
    started, here = time.monotonic(), Path(__file__).resolve().parents[1]
    processes = [subprocess.Popen(command, cwd=here) for command in todo]
    ended = 0
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, started + budget_s - time.monotonic()))
                ended += process.returncode == 0
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
    print(f"warm   {ended} of {len(todo)} processes did their share in {time.monotonic() - started:.0f} s")
    return 0
