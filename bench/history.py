"""How every figure moved over commits: the rows of a results folder through git's history, or of several folders.

    python -m bench history                            # this machine's folder in results/, through git
    python -m bench history results/nvidia-h200 --name=attention --impl=triton
    python -m bench history before/ after/ --plain     # folders as they are, oldest first

Prints a line for each case with its first, best and latest time, the latest that differ most first, and draws
history-<name>.png into the (last) folder: times over commits, each case by its first.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from gptfast import report, untrusted
from gptfast.errors import UserError
from gptfast.log import Row, facts
from gptfast.rows import file_name, parse

from . import results
from .figures import by

SHOWN = 12  # cases in a figure: those that moved most


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench history", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folders", nargs="*", type=Path, help="of rows (default: results/<this machine>)")
    add("--plain", action="store_true", help="read the folders as they are, not their past in git")
    add("--name", help="only this op or model")
    add("--impl", help="only this implementation")
    add("--direction", help="only this direction")
    arguments = parser.parse_args(argv)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    folders = arguments.folders or [results.folder(facts(here)["hardware"])]
    rows = [row for folder in folders for row in (_plain(folder) if arguments.plain else through_git(folder))]
    wanted = {name: getattr(arguments, name) for name in ("name", "impl", "direction")}
    rows = [row for row in rows if all(value is None or row.get(name) == value for name, value in wanted.items())]
    cases = histories(rows)
    if not cases:
        raise UserError(f"{', '.join(map(str, folders))}: no timed rows there; python -m bench writes them")
    with results.expected(", ".join(map(str, folders))):
        print("\n".join(table(cases)))
        for (name,), mine in by((case[-1] for case in cases), "name").items():
            labels = {results.label(row) for row in mine}
            drawn = figure([case for case in cases if results.label(case[-1]) in labels], folders[-1], str(name))
            if drawn is not None:
                print(drawn)
    return 0


def _plain(folder: Path) -> list[Row]:
    return results.read_all([folder])


def through_git(folder: Path) -> list[Row]:
    """All rows that the .jsonl files of a folder ever held, as committed and as they are; damaged lines left out."""
    folder = folder.resolve()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `python -m bench` writes results")
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None:
        raise UserError(f"{folder}: not in a git repository; --plain reads it as it is")
    rows: dict[str, Row] = {}
    allowance = untrusted.Allowance()  # of rows that differ; of a file in one commit, beside it
    place = folder.relative_to(Path(top.strip()).resolve())
    for commit in (_git(folder, "log", "--format=%H", "--reverse", "--", ".") or "").split():
        names = (
            _git(folder, "ls-tree", "-r", "--name-only", "--full-tree", commit, "--", str(place)) or ""
        ).splitlines()
        for name in names:
            if name.endswith(".jsonl"):
                _keep(rows, (_git(folder, "show", f"{commit}:{name}") or "").splitlines(), allowance)
    for path in sorted(folder.rglob("*.jsonl")):
        _keep(rows, results.lines(path, untrusted.Allowance()), allowance)
    return list(rows.values())


def _keep(rows: dict[str, Row], lines: Iterable[str], allowance: untrusted.Allowance) -> None:
    for line in lines:
        try:
            row = parse(line)
        except (ValueError, TypeError):  # of a schema of its time
            continue
        if "ms_p50" not in row or not row.get("valid", True):
            continue
        key = f"{row['date']} {results.key(row)}"
        if key not in rows:
            try:
                allowance.take(line.encode("utf-8", "replace"))
            except ValueError as error:
                raise UserError(
                    f"the rows of all commits are too many ({error}); --plain reads them as they are"
                ) from None
            rows[key] = row


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None where it fails or says more than a file of rows may hold, as packed files can."""
    command = ["git", "-C", str(folder), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            said = untrusted.whole(process.stdout, untrusted.LARGEST_ROWS)
        except ValueError:
            process.kill()
            return None
    return said.decode("utf-8", "replace") if process.returncode == 0 else None


def histories(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case by date, of a machine each; those whose latest is farthest from their first come first."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "ms_p50" in row and row.get("valid", True):
            cases.setdefault((row.get("hardware", {}).get("name", ""), results.key(row)), []).append(row)
    ordered = [sorted(case, key=lambda row: row["date"]) for case in cases.values()]
    return sorted(ordered, key=lambda case: -abs(moved(case) - 1))


def moved(case: Sequence[Row]) -> float:
    """The latest time over the first."""
    return case[-1]["ms_p50"] / case[0]["ms_p50"] if case[0]["ms_p50"] > 0 else 1.0


def table(cases: Sequence[Sequence[Row]]) -> list[str]:
    lines = [f"{'first':>10s} {'best':>10s} {'latest':>10s} {'moved':>8s}  rows  case"]
    for case in cases:
        first, best, latest = case[0]["ms_p50"], min(row["ms_p50"] for row in case), case[-1]["ms_p50"]
        commits = f"{(case[0].get('commit') or 'n/a')[:7]}..{(case[-1].get('commit') or 'n/a')[:7]}"
        change = f"{moved(case) - 1:+8.1%}"
        lines.append(
            f"{first:10.4f} {best:10.4f} {latest:10.4f} {change} {len(case):5d}  {results.label(case[-1])}  {commits}"
        )
    return lines


def figure(cases: Sequence[Sequence[Row]], folder: Path, name: str) -> Path | None:
    """Times over commits, each case by its first; None where no case was measured twice."""
    cases = [case for case in cases if len(case) > 1][:SHOWN]
    if not cases:
        return None
    dates = sorted({(row["date"], (row.get("commit") or "n/a")[:7]) for case in cases for row in case})
    commits = list(dict.fromkeys(commit for _, commit in dates))
    drawn, (axis,) = report.new_figure(f"{name}: time over commits, the first of each case = 1")
    legend = {}
    for case in cases:
        newest = {(row.get("commit") or "n/a")[:7]: row for row in case}
        x = [commits.index(commit) for commit in newest]
        y = [row["ms_p50"] / case[0]["ms_p50"] for row in newest.values()]
        label = results.label(case[-1]).removeprefix(f"{name} ")
        (legend[label],) = axis.plot(x, y, marker="o", markersize=4, linewidth=1.1)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(commits)), commits, fontsize=7)
    axis.set(ylabel="ms / first ms", ylim=(0, None))
    rows = [row for case in cases for row in case]
    return report.save_figure(drawn, folder / f"history-{file_name(name)}.png", rows, legend=legend)
