"""python -m bench              measure this machine: the whole campaign on a GPU, elsewhere what a CPU can show
python -m bench PAGE         one page of it, with flags of its own: python -m bench ops --help

The campaign runs its pages one after another, each in a process of its own, and keeps the rows of those that finished
when it is stopped. Rows go to results/<machine>/<page>.jsonl, figures are drawn from them. Exit code 1 means that a
page failed or that a figure is invalid, 2 a mistake in the command.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptfast import cli
from gptfast.errors import UserError, nearest

HERE = Path(__file__).resolve().parent


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
NEEDS_GPU = (
    "the speed of the Triton kernels, against cuDNN, FlashAttention, FlexAttention and torch.compile",
    "ms/iter, tokens/s, mfu, mfu_palm, hfu and peak memory of GPT-2 124M to 1558M, and the ladder of kernels",
    "decode tokens/s and mbu; the server under load",
    "where a training step's time goes, kernel by kernel, and when the GPU waits for the host",
    "tile tables: python -m bench tune",
    "tests that say 'CUDA' in the reason for which they were skipped",
)


def pages() -> dict[str, str]:
    """The pages that can be run, `main` in bench/<name>.py, with the first line of each; none of them is imported."""
    summaries = {}
    for path in sorted(HERE.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not path.stem.startswith("_") and any(
            isinstance(n, ast.FunctionDef) and n.name == "main" for n in tree.body
        ):
            summaries[path.stem] = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
    return summaries


def main(argv: Sequence[str]) -> int:
    if argv and not argv[0].startswith("-"):
        if argv[0] not in pages():
            raise UserError(f"no page {argv[0]} in the bench{nearest(argv[0], pages())}")
        return importlib.import_module(f"bench.{argv[0]}").main(list(argv[1:])) or 0
    parser = argparse.ArgumentParser("python -m bench", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "pages:\n" + "\n".join(f"  {name:10s} {about}" for name, about in pages().items())
    parser.add_argument("--only", help="pages, comma-separated: peaks,ops")
    parser.add_argument("--quick", action="store_true", help="one size of each thing: 4 minutes on a GPU")
    parser.add_argument("--out", type=Path, help="folder of rows and figures (default: results/<machine>)")
    arguments = parser.parse_args(argv)
    return campaign(arguments.only, arguments.quick, arguments.out)


# ---- the campaign ----------------------------------------------------------------------------------------------------
def campaign(only: str | None, quick: bool, out: Path | None) -> int:
    """Run the stages, say how each ended, and return the exit code."""
    import torch

    from gptfast.log import hardware

    from . import results

    on_gpu = torch.cuda.is_available()
    machine = hardware("cuda" if on_gpu else "cpu")
    out = out or results.folder(machine)
    stages = chosen(GPU if on_gpu else CPU, only, quick)
    print(f"bench: {machine['name']} -> {out}")
    minutes = sum(stage.seconds(quick) for stage in stages) / 60
    print(f"bench: {', '.join(stage.name for stage in stages)}; at most {minutes:.1f} minutes")
    started, ends = time.monotonic(), {}
    for number, stage in enumerate(stages, 1):
        print(f"\nbench: [{number}/{len(stages)}] {stage.name}, {time.monotonic() - started:.0f} s gone", flush=True)
        ends[stage.name] = run_stage(stage, quick, out)
        if ends[stage.name] == "interrupted":
            break
    print(f"\nbench: {time.monotonic() - started:.0f} s")
    for name, end in ends.items():
        print(f"bench: {name:8s} {end}")
    if not on_gpu:
        print("bench: this machine has no GPU. What needs one:")
        print("\n".join(f"  - {what}" for what in NEEDS_GPU))
    return 0 if all(end == "done" for end in ends.values()) and len(ends) == len(stages) else 1


def chosen(stages: Sequence[Stage], only: str | None, quick: bool = False) -> list[Stage]:
    """The stages that exist, or of them those that `only` names; with `quick` those that have a short form.

    UserError names one that there is not.
    """
    stages = [stage for stage in stages if only or not quick or stage.quick is not None]
    known = pages()
    there = {stage.name: stage for stage in stages if stage.module or (stage.page or stage.name) in known}
    if only is None:
        return list(there.values())
    names = [name for name in only.split(",") if name]
    for name in names:
        if name not in there:
            raise UserError(f"--only={name}: no such page of the campaign{nearest(name, there)}")
    return [there[name] for name in there if name in names]


def run_stage(stage: Stage, quick: bool, out: Path) -> str:
    """Run one stage in its own process, so that its memory is free again for the next. Returns how it ended."""
    process = subprocess.Popen(stage.command(quick, out), cwd=HERE.parent)
    limit_s = stage.seconds(quick)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        _stop(process)
        return f"stopped after its {limit_s:.0f} s; the rows so far are kept"
    except KeyboardInterrupt:
        _stop(process)
        return "interrupted"
    return "done" if code == 0 else f"failed with exit code {code}"


def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may not let go of one that hangs on its GPU
            process.wait(10)


if __name__ == "__main__":
    sys.exit(cli.run(main))
