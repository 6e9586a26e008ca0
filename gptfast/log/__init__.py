"""Logging: console lines, JSONL rows, trackers, and the facts about the machine that a measurement needs.

A row is one JSON object on one line. Rows of training and bench share one schema, `check_row`, so that plots, reports
and comparisons read both. A row with a time or a rate must state where it was measured: hardware, software, commit,
date and command. For the rows of a run (`step`, `eval`, ...), the `run` row that opens the file states it.

    with Log("out") as log:
        log.row("run", **facts("cuda"), config={...})
        log.row("step", step=0, loss=4.2, ms=12.0)
        log.say("iter 0: loss 4.2000")
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Self

from gptfast.errors import UserError, remedy

from .machine import command, commit, cpu_facts, driver_version, facts, gpu_limits, gpu_state, hardware, now, software
from .schema import (
    EVERY_ROW,
    FACTS,
    KINDS,
    LONGEST_NAME,
    NOT_FINITE,
    OPTIONAL,
    SCHEMA,
    Row,
    bounded,
    check_row,
    is_text,
    longest,
    plain,
)
from .trackers import Tracker, import_tracker

__all__ = [
    "EVERY_ROW", "FACTS", "KINDS", "LONGEST_NAME", "NOT_FINITE", "OPTIONAL", "SCHEMA", "Log", "Row", "Tracker",
    "bounded", "check_row", "command", "commit", "cpu_facts", "driver_version", "facts", "gpu_limits", "gpu_state",
    "hardware", "import_tracker", "is_text", "longest", "now", "plain", "software",
]  # fmt: skip

CHECKOUT = f"{Path(__file__).resolve().parents[2]}/"


class Log:
    """Console lines, and checked rows appended to `out_dir/name`, each flushed so that a killed run keeps its rows.

    `out_dir=None` writes no file; `console=False` prints nothing (both together: a rank that stays silent).
    """

    def __init__(self, out_dir: str | Path | None, *, name: str = "log.jsonl", console: bool = True) -> None:
        self.console = console
        self.path = None if out_dir is None else Path(out_dir) / name
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None if self.path is None else _open_at_line_start(self.path)

    def say(self, text: str) -> None:
        """Prints one line to the console."""
        if self.console:
            print(text, flush=True)

    def row(self, what: str, **fields: Any) -> Row:
        """Checks, writes and returns one row. Raises ValueError that names a missing or wrong field.

        Names that are longer than a reader takes are cut, so that no two become one. In the file, paths inside this
        checkout are relative to it, so that rows do not reveal the machine's folders.
        """
        row = check_row({"schema": SCHEMA, "what": what, "date": now(), **bounded(plain(fields))})
        if self._file is not None:
            line = json.dumps(row, allow_nan=False).replace(CHECKOUT, "") + "\n"
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                file, self._file = self._file, None
                with contextlib.suppress(OSError):  # closing retries the same bytes
                    file.close()
                raise UserError(
                    f"cannot write {self.path} ({len(line)} bytes needed): {error.strerror}; "
                    f"{remedy(error, 'see to that disk')}, or choose another --out_dir"
                ) from None
        return row

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_at_line_start(path: Path) -> Any:
    """Opens to append; ends a last line that a killed run left incomplete, so that the next row has its own line."""
    file = path.open("ab+")
    if file.tell() > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    file.close()
    return path.open("a", encoding="utf-8")
