"""GSM8K (Cobbe et al., arXiv:2110.14168): word problems, solved in words and with the calculator.

A solution's <<48/2=24>> becomes a call of the calculator and its output; its last line is #### and the number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gptfast.chat.conversation import text_of
from train.tasks.task import Example, Mapped, Task, Where, asked, rows

CALL = re.compile(r"(<<[^>]+>>)")
ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def examples(split: str, where: Where) -> Sequence[Example]:
    return Mapped(rows(where, "gsm8k", split, "openai/gsm8k", "main"), make)


def make(row: dict[str, Any]) -> Example:
    return Example(asked(row["question"], parts(row["answer"])))


def parts(solution: str) -> list[dict[str, str]]:
    """Splits a solution into text, calls and outputs, in order."""
    pieces = []
    for piece in CALL.split(solution):
        if CALL.fullmatch(piece):
            call, equals, output = piece[2:-2].rpartition("=")
            pieces.append({"type": "python", "text": call if equals else output})
            pieces.append({"type": "python_output", "text": output if equals else ""})
        else:
            pieces.append({"type": "text", "text": piece})
    return pieces


def number(text: str) -> str | None:
    """Returns the number after the first ####, without commas; None where there is none."""
    match = ANSWER.search(text)
    return match[1].replace(",", "") if match else None


def passes(example: Example, text: str) -> bool:
    return number(text) == number(text_of(example.answer))


GSM8K = Task("gsm8k", "generative", examples, passes)
