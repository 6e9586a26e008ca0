"""Small sums: with the calculator (arithmetic), and of two digits by heart (addition)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from gptfast.chat.conversation import text_of
from train.tasks.task import Example, Mapped, Task, Where, asked
from train.tasks.words import TEST, TRAIN, drawing

QUESTIONS = ("What is {sum}?", "{sum} = ?", "Calculate {sum}.", "How much is {sum}?", "Please work out {sum}.")
SIGNS = ("+", "-", "*")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def by_calculator(split: str, where: Where) -> Sequence[Example]:
    return Mapped(range(TRAIN if split == "train" else TEST), partial(_call, split))


def _call(split: str, index: int) -> Example:
    draw = drawing(f"arithmetic {split}", index)
    a, sign, b = draw.randrange(100), draw.choice(SIGNS), draw.randrange(100)
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    parts = [
        {"type": "python", "text": f"{a}{sign}{b}"},
        {"type": "python_output", "text": str(value)},
        {"type": "text", "text": str(value)},
    ]
    return Example(asked(draw.choice(QUESTIONS).format(sum=f"{a} {sign} {b}"), parts))


def by_heart(split: str, where: Where) -> Sequence[Example]:
    """All hundred sums of two digits; train and test are the same."""
    return Mapped(range(100), lambda i: Example(asked(f"{i // 10}+{i % 10}=", str(i // 10 + i % 10))))


def passes(example: Example, text: str) -> bool:
    """Whether the last number of the answer is the right one."""
    found = NUMBER.findall(text)
    return bool(found) and found[-1] == NUMBER.findall(text_of(example.answer))[-1]


ARITHMETIC = Task("arithmetic", "generative", by_calculator, passes)
ADDITION = Task("addition", "generative", by_heart, passes)
