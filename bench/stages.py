"""The stages of `python -m bench`: which pages run, with which flags, for how long, and how one is run.

A set is a list of stages. `campaign` fills the tables of results/. `proof` and `large` are for a GPU that is at hand
for minutes: the first runs what may fail and what has not been timed yet, the second the models of 1.5 billion.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gptfast.aside import file_aside

HERE = Path(__file__).resolve().parent
LOGS = "logs"  # below the folder of the rows, with --archive
TOLD = 25  # lines of a log that are shown when its stage has ended
LARGEST_PACKED = 2**23  # bytes of a file in the archive: traces that a browser opens are larger


@dataclass(frozen=True)
class Stage:
    """A page of the campaign, and the seconds it may take before it is stopped, its rows kept."""

    name: str
    limit_s: float
    page: str = ""  # to run instead of bench.<name>
    module: str = ""  # to run instead of any page
    flags: tuple[str, ...] = ("--out={out}",)
    quick: tuple[str, ...] | None = ("--quick",)  # added with --quick; None: the stage is left out then
    quick_s: float = 25  # its limit with --quick

    def command(self, quick: bool, out: Path) -> list[str]:
        start = [self.module] if self.module else ["bench", self.page or self.name]
        flags = (*self.flags, *((self.quick or ()) if quick else ()))
        return [sys.executable, "-m", *start, *(flag.format(out=out) for flag in flags)]

    def seconds(self, quick: bool) -> float:
        return self.quick_s if quick and self.quick is not None else self.limit_s


# The worthiest first: within 4 minutes the ops and the first models are there, all of it within 9 on a cold machine.
# With --quick all of it takes 4. A page's own budget ends it 10 seconds before it would be stopped.
GPU = (
    Stage("peaks", 25), Stage("warm", 60, flags=("--budget_s=50",), quick=("--quick", "--budget_s=25"), quick_s=35),
    Stage("ops", 125, flags=("--out={out}", "--budget_s=105"), quick=("--quick", "--budget_s=30"), quick_s=45),
    Stage("model", 130, flags=("--out={out}", "--budget_s=105"), quick=("--quick", "--budget_s=30"), quick_s=50),
    Stage("profile", 45, flags=("--out={out}", "--budget_s=20"), quick=("--quick", "--budget_s=15"), quick_s=30),
    Stage("decode", 65, flags=("--out={out}", "--models=gpt2", "--context=1024", "--budget_s=45"),
        quick=("--quick", "--budget_s=20"), quick_s=35),
    Stage("optim", 35, flags=("--out={out}", "--sizes=768,1600,4096", "--budget_s=25"), quick=None),
    Stage("plots", 20, quick_s=20),
    # Last and alone: kernels that no GPU may have run yet. One that never ends costs nothing but itself.
    Stage("unproven", 25, "ops", quick=None,
        flags=("--out={out}", "--variants=gluon", "--direction=forward", "--no-compile", "--budget_s=15")),
)  # fmt: skip
CPU = (
    Stage("peaks", 40), Stage("ops", 130, flags=("--out={out}", "--direction=both", "--budget_s=105"), quick_s=130),
    Stage("model", 50, quick_s=50), Stage("profile", 40, flags=("--out={out}", "--budget_s=20"), quick_s=40),
    Stage("decode", 100, flags=("--out={out}", "--new=64", "--budget_s=40"), quick_s=100),
    Stage("serve", 75, flags=("--out={out}", "--loads=1,4", "--requests=8", "--budget_s=40"), quick_s=60),
    Stage("optim", 35, flags=("--out={out}", "--quick"), quick=(), quick_s=35),
    Stage("cpu", 45, flags=("--out={out}/cpu.jsonl",), quick=("--rounds=8",), quick_s=45),
    Stage("aot", 30, module="kernels.proof.aot", flags=(), quick=(), quick_s=30), Stage("plots", 25),
)  # fmt: skip
TESTS = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "-rf", "--continue-on-collection-errors", "tests",
    "--ignore-glob=tests/test_serve*")  # fmt: skip
LARGEST_CASES = "50304"  # in their names; they take up to 46 GiB each, and so run one at a time
# What may fail, and what runs by default only once it has been timed: Gluon kernels and decoding kernels by name. The
# server's tests need no GPU, but packages that a borrowed machine may lack.
PROOF = (
    Stage("tests", 170, module="pytest", quick=("-k", "not parity"), quick_s=100,
        flags=(*TESTS, "-n", "10", "--dist", "worksteal", "-k", f"not {LARGEST_CASES}")),
    Stage("largest", 60, module="pytest", flags=(*TESTS, "-k", f"parity and {LARGEST_CASES}"), quick=None),
    Stage("gluon", 100, "ops", quick_s=35, quick=("--quick", "--budget_s=25"),
        flags=("--out={out}", "--only=attention", "--variants=gluon", "--no-compile", "--budget_s=90")),
    Stage("columns", 60, "decode", quick=("--rounds=2", "--budget_s=25"), quick_s=35, flags=("--out={out}",
        "--models=gpt2", "--batch=1", "--context=1024", "--variants=columns,in_order", "--no-compile",
        "--budget_s=45")),
    Stage("memcheck", 60, "deep", flags=("--tool=memcheck", "--op=decode_greedy", "--out={out}"), quick=None),
)  # fmt: skip
# Models that take a GPU's time and memory; and where their time goes.
LARGE = (
    Stage("peaks", 25, flags=("--out={out}", "--quick"), quick=()),
    Stage("model", 130, flags=("--out={out}", "--models=gpt2-xl", "--budget_s=115"), quick_s=90,
        quick=("--quick", "--budget_s=75")),
    Stage("profile", 60, flags=("--out={out}", "--models=gpt2-xl", "--budget_s=45"), quick_s=45,
        quick=("--quick", "--budget_s=30")),
    # torch.compile alone takes a minute or two before it decodes
    Stage("decode", 220, flags=("--out={out}", "--models=gpt2-xl", "--batch=1", "--context=1024", "--budget_s=200"),
        quick=("--no-compile", "--budget_s=60"), quick_s=75),
    Stage("plots", 20, quick_s=20),
)  # fmt: skip
SETS = {"campaign": GPU, "proof": PROOF, "large": LARGE}


def run_stage(stage: Stage, quick: bool, out: Path, log: IO[str] | None = None) -> str:
    """Run one stage in its own process, so that its memory is free again for the next. Returns how it ended.

    What it prints goes to the console, or into `log`.
    """
    process = subprocess.Popen(
        stage.command(quick, out), cwd=HERE.parent, stdout=log, stderr=None if log is None else subprocess.STDOUT
    )
    limit_s = stage.seconds(quick)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        stop(process)
        return f"stopped after its {limit_s:.0f} s; the rows so far are kept"
    except KeyboardInterrupt:
        stop(process)
        return "interrupted"
    return "done" if code == 0 else f"failed with exit code {code}"


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may not let go of one that hangs on its GPU
            process.wait(10)


def run_stages(
    stages: Sequence[Stage], quick: bool, out: Path, archive: Path | None = None, minutes: float | None = None
) -> Iterator[tuple[str, str]]:
    """Run stages one after another; gives the name and the end of each as it ends.

    With `archive` each one's output goes to a file and its last lines to the console, and everything in `out` is packed
    anew after each. No stage starts that would end after `minutes`.
    """
    started = time.monotonic()
    for number, stage in enumerate(stages, 1):
        gone_s = time.monotonic() - started
        print(f"\nbench: [{number}/{len(stages)}] {stage.name}, {gone_s:.0f} s gone", flush=True)
        if minutes is not None and gone_s + stage.seconds(quick) > 60 * minutes:
            yield stage.name, f"left out: its {stage.seconds(quick):.0f} s would end after --minutes={minutes:g}"
        elif archive is None:
            yield stage.name, run_stage(stage, quick, out)
        else:
            path = out / LOGS / f"{stage.name}.log"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as log:
                end = run_stage(stage, quick, out, log)
            lines = path.read_text(errors="replace").splitlines()
            print("\n".join(lines[-TOLD:]), flush=True)
            pack(out, archive)
            yield stage.name, end


def pack(folder: Path, archive: Path) -> None:
    """Everything in a folder as one .tar.gz, whole or not at all; files that are too large to take along left out."""
    with file_aside(archive) as aside, tarfile.open(aside, "w:gz") as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.stat().st_size <= LARGEST_PACKED and path not in (archive, aside):
                packed.add(path, path.relative_to(folder))
