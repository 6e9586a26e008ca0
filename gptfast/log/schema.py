"""The schema of rows, shared by training and bench: one JSON object of a known kind, with the kind's fields."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1


Row = dict[str, Any]


NUMBER = (int, float)


TEXT = (str,)


MAYBE_TEXT = (str, type(None))


MAYBE_NUMBER = (int, float, type(None))


EVERY_ROW: dict[str, tuple[type, ...]] = {"schema": (int,), "what": TEXT, "date": TEXT}


FACTS: dict[str, tuple[type, ...]] = {
    "hardware": (dict,), "software": (dict,), "commit": MAYBE_TEXT, "dirty": (bool, type(None)), "command": TEXT,
}  # fmt: skip


TIMES: dict[str, tuple[type, ...]] = {"ms_p20": NUMBER, "ms_p50": NUMBER, "ms_p80": NUMBER, "n": (int,)}


# required fields of each kind, besides EVERY_ROW
KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "run": FACTS,  # opens a training log; `config` and anything else that describes the run
    "step": {"step": (int,)},
    "eval": {"step": (int,)},
    "sample": {"text": TEXT},
    "note": {"text": TEXT},
    "summary": {"name": TEXT, **FACTS},
    "aot": {"name": TEXT, **FACTS},
    "op": {"name": TEXT, "impl": TEXT, "direction": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},
    "peak": {"name": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},
    "model": {"name": TEXT, "impl": TEXT, "dtype": TEXT, "tokens_per_s": NUMBER, **TIMES, **FACTS},
    "decode": {"name": TEXT, "impl": TEXT, "dtype": TEXT, "tokens_per_s": NUMBER, **TIMES, **FACTS},
    "serve": {"name": TEXT, "impl": TEXT, "dtype": TEXT, "dims": (dict,), "tokens_per_s": NUMBER, **TIMES, **FACTS},
    "optimizer": {"name": TEXT, "impl": TEXT, **TIMES, **FACTS},  # one step over the matrices of the model `name`
    "product": {"name": TEXT, "impl": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},  # of Newton-Schulz
    "profile": {"name": TEXT, "impl": TEXT, "direction": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},
    "host": {"name": TEXT, "impl": TEXT, "direction": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},
    "counters": {"name": TEXT, "impl": TEXT, "direction": TEXT, "dtype": TEXT, "kernels": (list,), **FACTS},
    "tune": {"name": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},
}


# optional fields and their types
OPTIONAL: dict[str, tuple[type, ...]] = {
    "config": (dict,), "dims": (dict,), "valid": (bool,), "invalid_reason": MAYBE_TEXT,
    "ms_low": NUMBER, "ms_high": NUMBER, "host_ms_p50": MAYBE_NUMBER, "method": TEXT, "threads": (int, type(None)),
    "tflops": MAYBE_NUMBER, "gbs": MAYBE_NUMBER, "roofline": MAYBE_NUMBER, "roofline_source": MAYBE_TEXT,
    "error": MAYBE_NUMBER, "error_allowed": MAYBE_NUMBER, "error_dims": (dict,), "inexact": MAYBE_TEXT,
    "mfu": MAYBE_NUMBER, "mfu_palm": MAYBE_NUMBER, "hfu": MAYBE_NUMBER, "mbu": MAYBE_NUMBER,
    "tokens_per_s": MAYBE_NUMBER, "memory_bytes": MAYBE_NUMBER, "loss": MAYBE_NUMBER, "ms": MAYBE_NUMBER,
    "state_before": (dict, type(None)), "state_after": (dict, type(None)),
}  # fmt: skip


LONGEST_NAME, LONGEST_TEXT = 300, 1_000_000  # characters of a name, and of a sample's text or the like


TEXTS = ("text", "command", "invalid_reason", "roofline_source", "inexact", "config")  # may be long, of many lines


def check_row(row: object) -> Row:
    """Returns `row` if it matches the current schema; else raises ValueError (TypeError) that names the field."""
    if not isinstance(row, dict):
        raise TypeError(f"a row is a JSON object, not {type(row).__name__}")
    if row.get("schema") != SCHEMA:
        raise ValueError(f"row has schema {row.get('schema', 'missing')}, this version reads schema {SCHEMA}")
    _check_fields(row, EVERY_ROW, required=True)
    what = row["what"]
    if what not in KINDS:
        raise ValueError(f"unknown kind of row what={what!r}; known: {', '.join(sorted(KINDS))}")
    _check_fields(row, KINDS[what], required=True)
    _check_fields(row, OPTIONAL, required=False)
    if "hardware" in row and not row["hardware"].get("name"):
        raise ValueError("hardware.name is missing: a figure must say which machine it is from")
    if "software" in row and not row["software"].get("torch"):
        raise ValueError("software.torch is missing")
    if "ms_p50" in row and not 0 <= row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] < math.inf:
        raise ValueError(f"times out of order: p20 {row['ms_p20']}, p50 {row['ms_p50']}, p80 {row['ms_p80']}")
    if row.get("n", 1) < 1:
        raise ValueError("n is the number of samples, at least 1")
    return row


def _check_fields(row: Row, fields: dict[str, tuple[type, ...]], required: bool) -> None:
    for name, types in fields.items():
        if name not in row:
            if required:
                raise ValueError(f"{row.get('what', 'row')}: field {name!r} is missing")
            continue
        value = row[name]
        if isinstance(value, str) and float in types and value in NOT_FINITE and not name.startswith("ms_"):
            continue  # a nan loss must be logged
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"field {name!r} is {value!r}, expected {expected}")


NOT_FINITE = ("nan", "inf", "-inf")  # JSON lacks these numbers, so they are stored as text that float() reads back


def plain(value: Any) -> Any:
    """Converts `value` for JSON: tensors of one element become numbers, tuples lists, non-finite floats text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if hasattr(value, "item") and not isinstance(value, bool | int | float | str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def is_text(where: str) -> bool:
    """Whether what stands at `where` in a row, such as 'row.kernels.name', is no name but text of any length."""
    return any(f".{name}" in where for name in TEXTS)


def longest(where: str) -> int:
    """Characters that may stand at `where` in a row."""
    return LONGEST_TEXT if is_text(where) else LONGEST_NAME


def bounded(value: Any, where: str = "row") -> Any:
    """`value` of JSON with the names and texts in it as a row may have them: C++ names of kernels can be far longer."""
    if isinstance(value, dict):
        return {shortened(key, "row"): bounded(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [bounded(item, where) for item in value]
    return shortened(value, where) if isinstance(value, str) else value


def shortened(text: str, where: str = "row") -> str:
    """`text` as it may stand at `where`: what is too long ends in an ellipsis and a number that tells it from others.

    What cannot be printed is escaped in a name, as Python escapes it.
    """
    whole, most = text, longest(where)
    if not is_text(where) and not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= most:
        return text
    number = f"… {hashlib.sha256(whole.encode('utf-8', 'replace')).hexdigest()[:8]}"
    return f"{text[: most - len(number)]}{number}"
