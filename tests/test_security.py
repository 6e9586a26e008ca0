"""Each promise of SECURITY.md names tests, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def promises() -> dict[str, list[str]]:
    """The sentences of the first list, each with the tests that it names."""
    page = (ROOT / "SECURITY.md").read_text("utf-8")
    section = page.partition("## What the code promises")[2].partition("\n## ")[0]
    items = re.findall(r"^- (.*?)(?=^- |^$)", section, re.M | re.S)
    return {" ".join(item.split()): re.findall(r"`(tests/test_\w+\.py(?:::\w+)?)`", item) for item in items}


def missing(test: str) -> bool:
    path, _, name = test.partition("::")
    if not (ROOT / path).is_file():
        return True
    functions = [
        node.name for node in ast.parse((ROOT / path).read_text("utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    return name not in functions if name else not any(function.startswith("test_") for function in functions)


def test_every_promise_has_its_tests() -> None:
    found = promises()
    assert len(found) >= 20
    assert not {promise: tests for promise, tests in found.items() if not tests or any(map(missing, tests))}


def test_a_test_that_is_not_there_is_seen() -> None:
    assert missing("tests/test_nothing.py") and missing("tests/test_security.py::test_nothing")
    assert not missing("tests/test_security.py::test_a_test_that_is_not_there_is_seen")
