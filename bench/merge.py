"""Bring home the rows that another machine wrote: into results/<that machine>, with its figures drawn anew.

    mkdir rows && tar -xzf rows.tar.gz -C rows && python -m bench merge rows
    python -m bench merge rows --commit=470b760      # of a copy without git, whose rows say no commit

Of what both have measured the newer row counts. Notes, and rows that the bench called invalid, stay behind.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptfast.aside import check_writable, locked
from gptfast.errors import UserError
from gptfast.log import Row

from . import plots, results


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench merge", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="of rows, as python -m bench --out=FOLDER writes them")
    parser.add_argument("--commit", help="of rows that say none")
    parser.add_argument("--root", type=Path, default=results.ROOT, help="where the machines' folders are")
    arguments = parser.parse_args(argv)
    if arguments.commit is not None and not re.fullmatch(r"[0-9a-f]{7,40}", arguments.commit):
        raise UserError(f"--commit={arguments.commit}: expected 7 to 40 digits of 0-9 and a-f (git rev-parse HEAD)")
    files = sorted(arguments.folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"{arguments.folder}: no .jsonl file there; `python -m bench --out=FOLDER` writes them")
    brought = [(path.name, *sorted_out(results.read(path), arguments.commit)) for path in files]
    lacking = sum(row.get("commit", "") is None for _, rows, _ in brought for row in rows)
    if lacking:
        raise UserError(f"{arguments.folder}: {lacking} rows say no commit; name it by --commit")
    folders = set()
    for name, rows, left in brought:
        for machine, mine in by_machine(rows).items():
            folder = check_writable(arguments.root / machine)
            folders.add(folder)
            taken = merged(folder / name, mine)
            older = f"; {len(mine) - taken} are older than what is there" if taken < len(mine) else ""
            print(f"merge  {name:14s} {taken} rows into {folder}{older}")
        if left:
            print(f"merge  {name:14s} {len(left)} left behind: " + "; ".join(left))
    return max((plots.main([f"--out={folder}"]) for folder in sorted(folders)), default=0)


def sorted_out(rows: Iterable[Row], commit: str | None) -> tuple[list[Row], list[str]]:
    """The rows of measurements, each with its commit; and what is said of the others."""
    taken, left = [], []
    for row in results.last(rows):
        if row["what"] == "note":
            left.append(f"note on {row.get('name', 'n/a')}")
        elif not row.get("valid", True):
            left.append(f"{results.label(row)}, invalid: {row.get('invalid_reason') or 'n/a'}")
        else:
            says_none = "commit" in row and row["commit"] is None
            taken.append(row | {"commit": commit} if says_none else row)
    return taken, left


def by_machine(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "hardware" in row:  # a measurement
            found.setdefault(results.slug(row["hardware"]), []).append(row)
    return found


def merged(path: Path, rows: Sequence[Row]) -> int:
    """Add rows to those of a file, the newest of each thing kept. Returns how many of `rows` it has now."""
    with locked(path.parent):
        there = results.read(path) if path.exists() else []
        kept = results.latest([*results.last(there), *rows])
        results.write(path, kept)
    return sum(any(row is other for other in kept) for row in rows)
