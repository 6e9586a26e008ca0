"""The README tells the truth: its commands exist, its links lead somewhere, its Python runs, its tables are fresh.

A table that a command prints stands between `<!-- python -m module ... -->` and `<!-- end -->`.
`python tests/test_readme.py` writes these tables anew.
"""

from __future__ import annotations

import io
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GENERATED = re.compile(r"(?P<head><!-- (?P<command>python -m .*?) -->\n)(?P<table>.*?)(?P<end><!-- end -->)", re.DOTALL)
CODE = re.compile(r"```(?:sh|python)\n(.*?)```|`([^`\n]+)`", re.DOTALL)


def text() -> str:
    return README.read_text(encoding="utf-8")


def commands(markdown: str) -> list[list[str]]:
    """Every `make ...` and `python -m ...` that the page shows, inline or in a block, split into words."""
    found = []
    for block, inline in CODE.findall(markdown):
        for line in (block or inline).replace("\\\n", " ").splitlines():
            if line.startswith(("make ", "python -m ")):
                found.append(shlex.split(line, comments=True))
    return found


def unique(rows: list[list[str]]) -> list[list[str]]:
    return [list(row) for row in dict.fromkeys(map(tuple, rows))]


MADE = unique([words for words in commands(text()) if words[0] == "make"])
RUN = unique([words for words in commands(text()) if words[0] == "python"])


@cache
def output(*arguments: str) -> tuple[object, str]:
    """Exit code and output of `python -m module ...`, run in this process: a new one would import torch again."""
    _, module, *rest = arguments
    said, argv = io.StringIO(), sys.argv
    sys.argv = [module, *rest]
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module may be imported already
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0, said.getvalue()
    except SystemExit as left:
        return left.code or 0, said.getvalue()
    finally:
        sys.argv = argv


def table(command: str) -> str:
    """The lines of a Markdown table that a command prints."""
    code, said = output(*shlex.split(command)[1:])
    assert code == 0, f"{command}: {said[-1000:]}"
    return "".join(f"{line}\n" for line in said.splitlines() if line.startswith("|"))


def refreshed(markdown: str) -> str:
    return GENERATED.sub(lambda m: m["head"] + table(m["command"]) + m["end"], markdown)


def flags_of(help_text: str) -> set[str]:
    return {flag.replace("-", "_") for flag in re.findall(r"--(\w[\w-]*)", help_text)}


def test_commands_are_found() -> None:
    page = "Type `make test`.\n```sh\npython -m a.b \\\n    --x=1  # as a flag\nls\n```\nNot `pip install`."
    assert commands(page) == [["make", "test"], ["python", "-m", "a.b", "--x=1"]]
    assert MADE and RUN


@pytest.mark.parametrize("words", MADE, ids=" ".join)
def test_target_exists(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) +\?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        assert name in (variables if equals else targets)


@pytest.mark.parametrize("words", RUN, ids=lambda words: " ".join(words)[:60])
def test_command_knows_its_flags(words: list[str]) -> None:
    """`--help` of the command answers, and lists every flag that the README gives it."""
    arguments = words[1:]
    shown = {a[2:].partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--")}
    code, said = output(*[a for a in arguments if not a.startswith("--")], "--help")
    assert code == 0 and "usage: " in said, said[-1000:]
    assert shown <= flags_of(said)


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^  make (\w+)", done.stdout, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony and listed == set(phony[1].split())


def test_targets_have_something_behind_them() -> None:
    modules = re.findall(r"\$\(PY\) -m ([\w.]+)", (ROOT / "Makefile").read_text())
    assert modules and not [name for name in modules if find_spec(name) is None]


def test_tables_are_fresh() -> None:
    assert GENERATED.search(text())
    assert refreshed(text()) == text(), "stale: run python tests/test_readme.py"


def test_a_stale_table_is_seen() -> None:
    page = "<!-- python -m kernels --markdown -->\n| op |\n<!-- end -->\n"
    assert refreshed(page) != page and refreshed(refreshed(page)) == refreshed(page)


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]


def test_python_examples_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text(), re.DOTALL)
    assert blocks
    for block in blocks:
        example = tmp_path / "example.py"
        example.write_text(block.replace('PRESETS["gpt2"]', 'PRESETS["char-cpu"]'))  # a thousandth of the cost
        runpy.run_path(str(example))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    README.write_text(refreshed(text()), encoding="utf-8")
