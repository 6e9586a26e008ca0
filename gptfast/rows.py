"""Rows that somebody else may have written: checked on reading, and harmless in names of files, figures and Markdown.

The schema (gptfast/log) says what a row must hold. Here is what any row may hold at most, so that drawing it neither
fails nor writes where it should not: numbers are finite and of a size that can be drawn, texts short and on one line,
and what a figure reads is of the type that it reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from typing import Any

from gptfast.log import LONGEST_NAME, NOT_FINITE, Row, check_row, is_text, longest

LARGEST = 10.0**30  # of numbers
DEEPEST, MOST_VALUES = 12, 100_000

NUMBER, MAYBE_TEXT = (int, float, type(None)), (str, type(None))
DRAWN: dict[str, tuple[type, ...]] = {  # what figures and tables read beside the schema's fields
    "tokens_per_s": NUMBER, "gbs": NUMBER, "tflops": NUMBER, "mfu": NUMBER, "mfu_palm": NUMBER, "roofline": NUMBER,
    "rung": NUMBER, "parameters": NUMBER, "flops": NUMBER, "bytes": NUMBER, "peak_flops": NUMBER, "seconds": NUMBER,
    "windows": NUMBER, "val_loss": NUMBER, "train_loss": NUMBER, "whole_val_loss": NUMBER, "peak_kind": MAYBE_TEXT,
    "peak_device": MAYBE_TEXT, "impl": (str,), "name": (str,), "direction": (str,), "dtype": (str,), "stage": (str,),
    "busy_ms": NUMBER, "idle_ms": NUMBER, "best_gbs": NUMBER, "best_tflops": NUMBER, "wall_s": NUMBER, "cpu_s": NUMBER,
    "accuracy": NUMBER, "accuracy_error": NUMBER, "core": NUMBER, "core_error": NUMBER, "task": (str,),
    "reward": NUMBER, "pass@1": NUMBER, "bits_per_byte": NUMBER, "tokens": NUMBER, "ttft_ms_p50": NUMBER,
    "ttft_ms_p95": NUMBER, "tpot_ms_p50": NUMBER, "tpot_ms_p95": NUMBER, "of_measured": NUMBER,
}  # fmt: skip
SIGNED = ("reward", "core", "val_loss", "train_loss", "whole_val_loss")  # which may be below 0
PART: dict[str, tuple[type, ...]] = {"part": (str,), "ms": (int, float), "gbs": NUMBER, "tflops": NUMBER}  # of a step


def parse(line: str) -> Row:
    """The row of a line. Raises ValueError (TypeError), which names the field, for what is none or cannot be drawn."""
    try:
        row = json.loads(line, parse_constant=_no_constant)
        _check_value("row", row, DEEPEST, [0])
        return _check_drawn(check_row(row))
    except RecursionError:
        raise ValueError("nested too deep for a row") from None


def _check_drawn(row: Row) -> Row:
    """`row` if figures find in it what they read."""
    try:
        is_dated = datetime.fromisoformat(row["date"]).tzinfo is not None
    except ValueError:
        is_dated = False
    if not is_dated:
        raise ValueError(f"field 'date' is {_short(row['date'])}, expected one such as 2026-01-31T12:00:00+00:00")
    _check_types("field ", row, DRAWN)
    parts = row.get("parts", [])
    if not isinstance(parts, list):
        raise ValueError(f"field 'parts' is {_short(parts)}, expected a list")
    for part in parts:
        if not (isinstance(part, dict) and {"part", "ms"} <= part.keys()):
            raise ValueError(f"one of parts is {_short(part)}, expected an object with part and ms")
        _check_types("parts: ", part, PART)
    for field, key in (("hardware", "name"), ("software", "torch")):
        if field in row and not isinstance(row[field].get(key), str):
            raise ValueError(f"{field}.{key} is {_short(row[field].get(key))}, expected text")
    cpu = row.get("hardware", {}).get("cpu")
    if cpu is not None and not (isinstance(cpu, dict) and isinstance(cpu.get("threads"), int | None)):
        raise ValueError(f"hardware.cpu is {_short(cpu)}, expected an object with a number of threads")
    for key, value in row.get("dims", {}).items():
        if not isinstance(value, str | int | float):
            raise ValueError(f"dims.{_short(key)} is {_short(value)}, expected a number or a word")
    return row


def _check_types(where: str, fields: Row, expected: dict[str, tuple[type, ...]]) -> None:
    """Raises ValueError for a field that is there and of another type; numbers may be not finite, as text."""
    for name, types in expected.items():
        value = fields.get(name)
        is_lost = isinstance(value, str) and float in types and value in NOT_FINITE
        if name in fields and not is_lost and (not isinstance(value, types) or isinstance(value, bool)):
            raise ValueError(f"{where}{name!r} is {_short(value)}, expected {_named(types)}")
        if name not in SIGNED and isinstance(value, int | float) and value < 0:
            raise ValueError(f"{where}{name!r} is {_short(value)}, which cannot be below 0")


def _check_value(where: str, value: Any, depth: int, count: list[int]) -> None:
    count[0] += 1
    if not depth or count[0] > MOST_VALUES:
        raise ValueError(f"{where}: nested too deep, or too many values for a row")
    if isinstance(value, int | float) and not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{where} is {_short(value)}, expected a finite number of at most {LARGEST:g}")
    if isinstance(value, str):
        most = longest(where)
        if len(value) > most:
            kind = "text" if is_text(where) else "name"
            raise ValueError(f"{where} has {len(value):,} characters; a {kind} has {most:,} at most")
        if not is_text(where) and not value.isprintable():
            raise ValueError(f"{where} is {_short(value)}, expected one line of printable characters")
    if isinstance(value, dict):
        for key, item in value.items():
            if len(key) > LONGEST_NAME or not key.isprintable():
                raise ValueError(f"{where} has a field {_short(key)}, which is no name")
            _check_value(f"{where}.{key}", item, depth - 1, count)
    elif isinstance(value, list):
        for item in value:
            _check_value(where, item, depth - 1, count)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _named(types: tuple[type, ...]) -> str:
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- where they go ---------------------------------------------------------------------------------------------------
def file_name(text: str) -> str:
    """`text` as part of a file's name: itself if it is plain, else its plain characters and a number that tells it."""
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.")[:80]
    if plain and plain == text:
        return text
    return f"{plain or 'unnamed'}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]}"


def markdown(text: str) -> str:
    """`text` as words of one line of Markdown, and of HTML made of it: no markup, no link, no table cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def code(text: str) -> str:
    """`text` as code within a line of Markdown, whatever backticks it holds."""
    text = " ".join(text.split())
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"
