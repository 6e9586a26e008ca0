"""python -m bench              measure this machine: the whole campaign on a GPU, elsewhere what a CPU can show
python -m bench PAGE         one page of it, with flags of its own: python -m bench ops --help

The campaign runs its pages one after another, each in a process of its own, and keeps the rows of those that finished
when it is stopped. Rows go to results/<machine>/<page>.jsonl, figures are drawn from them. Exit code 1 means that a
page failed or that a figure is invalid, 2 a mistake in the command.

On a GPU that is at hand for minutes, with everything to take along in one file:

    python -m bench --set=proof --out=rows --archive=proof.tar.gz     # the tests; kernels that nobody has timed
    python -m bench --minutes=9 --out=rows --archive=rows.tar.gz      # the campaign
    python -m bench --set=large --out=rows --archive=large.tar.gz     # GPT-2 1558M: step, profile, decoding
    python -m bench merge rows                   # at home, unpacked: into results/<machine>, figures drawn anew
"""

from __future__ import annotations

import argparse
import ast
import importlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gptfast import cli
from gptfast.aside import check_writable
from gptfast.errors import UserError, nearest

from .stages import CPU, SETS, Stage, run_stages

HERE = Path(__file__).resolve().parent
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
    parser.add_argument("--set", choices=tuple(SETS), default="campaign", help="which stages; the others need a GPU")
    parser.add_argument("--only", help="stages, comma-separated: peaks,ops")
    parser.add_argument("--quick", action="store_true", help="one size of each thing: 4 minutes on a GPU")
    parser.add_argument("--minutes", type=float, help="start no stage that could end after this")
    parser.add_argument("--out", type=Path, help="folder of rows and figures (default: results/<machine>)")
    parser.add_argument("--archive", type=Path, help="pack rows, figures and logs into this .tar.gz after every stage")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the commands, and run nothing")
    return campaign(parser.parse_args(argv))


# ---- the campaign ----------------------------------------------------------------------------------------------------
def campaign(arguments: argparse.Namespace) -> int:
    """Run the stages, say how each ended, and return the exit code."""
    import torch

    from gptfast.log import hardware

    from . import results

    on_gpu, quick, minutes = torch.cuda.is_available(), arguments.quick, arguments.minutes
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes={minutes:g} must be above 0")
    machine = hardware("cuda" if on_gpu else "cpu")
    out = (arguments.out or results.folder(machine)).absolute()
    of_set = SETS[arguments.set] if on_gpu or arguments.set != "campaign" else CPU
    stages = chosen(of_set, arguments.only, quick)
    if arguments.dry_run:
        for stage in stages:
            print(f"# {stage.name}, at most {stage.seconds(quick):.0f} s\n{shlex.join(stage.command(quick, out))}")
        return 0
    if not on_gpu and arguments.set != "campaign":
        raise UserError(f"--set={arguments.set} needs a CUDA device; --dry_run prints what it would run")
    archive = arguments.archive and arguments.archive.absolute()
    if archive is not None:
        check_writable(archive.parent)
    print(f"bench: {machine['name']} -> {out}")
    whole = sum(stage.seconds(quick) for stage in stages) / 60
    print(f"bench: {', '.join(stage.name for stage in stages)}; at most {min(whole, minutes or whole):.1f} minutes")
    started, ends = time.monotonic(), {}
    for name, end in run_stages(stages, quick, out, archive, minutes):
        ends[name] = end
        if end == "interrupted":
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


if __name__ == "__main__":
    sys.exit(cli.run(main))
