"""Result files: reading them strictly, telling machines apart, and comparing two campaigns.

results/<machine>/<stage>.jsonl holds the rows of one machine. A stage appends; of rows about the same thing the newest
counts, and `compact` drops the others. A file that is damaged, of another schema, or of two machines is an error that
names the line, and nothing is made from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast import untrusted
from gptfast.aside import locked, unwritable, write_whole
from gptfast.errors import UserError
from gptfast.log import Log, Row
from gptfast.rows import parse

ROOT = Path(__file__).resolve().parents[1] / "results"


def slug(hardware: Row) -> str:
    """The folder of a machine, 'nvidia-h100-80gb-hbm3'."""
    return re.sub(r"[^a-z0-9]+", "-", hardware["name"].lower().replace("(r)", "")).strip("-")


def folder(hardware: Row) -> Path:
    return ROOT / slug(hardware)


def read(path: str | Path, allowance: untrusted.Allowance | None = None) -> list[Row]:
    """The rows of one file, all of one machine. Raises UserError that names the file and line of what is wrong.

    `allowance`: of the files that are held in memory together, where there are several.
    """
    path, allowance = Path(path), allowance or untrusted.Allowance()
    rows = [_row(path, number, line) for number, line in enumerate(lines(path, allowance), 1) if line.strip()]
    _check_one_machine(path, rows)
    return rows


def lines(path: Path, allowance: untrusted.Allowance) -> Iterator[str]:
    """The lines of a file of rows. Raises UserError where it cannot be read."""
    try:
        yield from untrusted.rows(path, allowance)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `python -m bench` writes results") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text: {untrusted.reason(error)}") from None


def read_all(paths: Iterable[str | Path]) -> list[Row]:
    """The newest rows of files and folders (every *.jsonl below a folder); each file holds one machine."""
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{', '.join(map(str, paths))}: no .jsonl file there; `python -m bench` writes results")
    allowance = untrusted.Allowance()
    return latest(row for file in files for row in last(read(file, allowance)))


def _row(path: Path, number: int, line: str) -> Row:
    try:
        return parse(line)
    except json.JSONDecodeError:
        raise UserError(f"{path}:{number}: not JSON; the line is damaged or cut off: delete it") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}:{number}: {error}; delete the line or measure again") from None


def _check_one_machine(path: Path, rows: Sequence[Row]) -> None:
    first: tuple[int, str] | None = None
    for number, row in enumerate(rows, 1):
        if "hardware" not in row:
            continue
        machine = row["hardware"]["name"]
        if first is None:
            first = (number, machine)
        elif machine != first[1]:
            raise UserError(
                f"{path}: row {first[0]} is from {first[1]!r}, row {number} from {machine!r}: split the file"
            )


def key(row: Row) -> str:
    """What a row is about; two rows of one key measure the same thing."""
    about = ("what", "name", "impl", "direction", "dims", "dtype", "threads", "step")
    return json.dumps({name: row[name] for name in about if name in row}, sort_keys=True)


def expected(where: str | Path) -> AbstractContextManager[None]:
    """Guards a block that uses rows: UserError, which names `where` they are, if one lacks what the block reads."""
    return untrusted.expected(f"a row in {where}", "delete that row, or measure again")


@contextmanager
def campaign(out: Path, name: str, *, compacted: bool = True) -> Iterator[Log]:
    """The log out/name of a measurement, to which only the newest rows of each thing stay where that succeeds.

    The folder is this process's meanwhile, for what another appended would be lost by that. Raises UserError where
    another is at it, or nothing can be written, before anything is measured.
    """
    with unwritable(out), locked(out):
        with Log(out, name=name) as log:
            yield log
        if compacted:
            compact(out / name)


def latest(rows: Iterable[Row]) -> list[Row]:
    """One row for each machine and key, the newest by date, in the order of their first appearance."""
    newest: dict[tuple[str, str], Row] = {}
    for row in rows:
        about = _about(row)
        if about not in newest or row["date"] >= newest[about]["date"]:
            newest[about] = row
    return list(newest.values())


def _about(row: Row) -> tuple[str, str]:
    return row.get("hardware", {}).get("name", ""), key(row)


def last(rows: Iterable[Row]) -> list[Row]:
    """The same of one file, whose rows were appended: the last is the newest, even if the clock was set back since."""
    newest: dict[tuple[str, str], Row] = {}
    for row in rows:
        newest[_about(row)] = row
    return list(newest.values())


def compact(path: str | Path) -> None:
    """Rewrite a file to its latest rows, whole or not at all."""
    write(path, last(read(path)))


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a file of these rows, whole or not at all."""
    write_whole(Path(path), "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


# ---- comparison ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Change:
    """One thing measured in both campaigns. `ratio` is new time over old: 1.10 is a tenth slower."""

    label: str
    old_ms: float
    new_ms: float
    ratio: float
    verdict: str  # 'slower', 'faster', 'same', 'invalid'
    old: Row
    new: Row


def label(row: Row) -> str:
    """'layernorm forward bfloat16 triton M=4096 N=1024'."""
    words = [row[name] for name in ("name", "direction", "dtype", "impl") if name in row]
    return " ".join([*words, *(f"{letter}={size}" for letter, size in row.get("dims", {}).items())])


def compare(old: Sequence[Row], new: Sequence[Row], threshold: float = 0.05) -> list[Change]:
    """What became slower or faster by more than `threshold`, where the intervals of the medians are apart as well."""
    before = {key(row): row for row in latest(old) if "ms_p50" in row}
    changes = []
    for row in latest(new):
        if "ms_p50" in row and key(row) in before:
            changes.append(_change(before[key(row)], row, threshold))
    return sorted(changes, key=lambda change: -change.ratio)


def _change(old: Row, new: Row, threshold: float) -> Change:
    ratio = new["ms_p50"] / old["ms_p50"] if old["ms_p50"] > 0 else float("inf")
    if not (old.get("valid", True) and new.get("valid", True)):
        verdict = "invalid"
    elif ratio > 1 + threshold and _low(new) > _high(old):
        verdict = "slower"
    elif ratio < 1 / (1 + threshold) and _high(new) < _low(old):
        verdict = "faster"
    else:
        verdict = "same"
    return Change(label(new), old["ms_p50"], new["ms_p50"], ratio, verdict, old, new)


def _low(row: Row) -> float:
    return row["ms_low"] if "ms_low" in row else row["ms_p20"]


def _high(row: Row) -> float:
    return row["ms_high"] if "ms_high" in row else row["ms_p80"]


def check_same_machine(old: Sequence[Row], new: Sequence[Row]) -> None:
    """Raise UserError where the campaigns are from different machines: their times say nothing about the code."""
    machines: list[set[Any]] = [{row["hardware"]["name"] for row in rows if "hardware" in row} for rows in (old, new)]
    if machines[0] != machines[1]:
        names = [", ".join(sorted(names)) or "unknown" for names in machines]
        raise UserError(
            f"measured on different machines: {names[0]} and {names[1]}; --across compares them all the same"
        )
