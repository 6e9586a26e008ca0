"""HumanEval (Chen et al., arXiv:2107.03374): functions to be written, judged by running their tests in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from gptfast.chat.sandbox import Sandbox
from train.tasks.task import Example, Mapped, Task, Where, asked, rows

FENCED = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


def examples(split: str, where: Where) -> Sequence[Example]:
    """Returns the examples; only a test split exists."""
    return Mapped(rows(where, "humaneval", "test", "openai/openai_humaneval"), make)


def make(row: dict[str, Any]) -> Example:
    facts = {"prompt": row["prompt"], "entry_point": row["entry_point"], "test": row["test"]}
    return Example(asked(row["prompt"], f"{row['prompt']}\n{row['canonical_solution']}"), (), facts)


def passes(example: Example, text: str) -> bool:
    """Returns whether the tests pass. Raises UserError, with how to get a sandbox, where there is none."""
    return _sandbox().run(program(example, text)).ok


def program(example: Example, text: str) -> str:
    """Returns the program to run: the prompt's imports, the model's function, its tests, and a call of them."""
    facts = example.facts
    return f"{imports(facts['prompt'])}\n\n{code(text)}\n\n{facts['test']}\ncheck({facts['entry_point']})"


def imports(prompt: str) -> str:
    """Returns the import lines at the beginning of a prompt."""
    lines = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            lines.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(lines)


def code(text: str) -> str:
    """Returns the first fenced block of Python, or the whole text where there is none."""
    fenced = FENCED.search(text)
    return (fenced[1] if fenced else text).strip()


@cache
def _sandbox() -> Sandbox:
    return Sandbox()


HUMANEVAL = Task("humaneval", "generative", examples, passes)
