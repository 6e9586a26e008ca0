"""Small sums: with the calculator (arithmetic), or of two digits, from memory or with the calculator (addition).

Addition shows every sum twice from memory and once with the calculator, and a small model that has not seen it
often gets only the latter right. So after SFT it is mostly wrong, and reinforcement learning can teach it to prefer the
calculator.
"""

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
    return Example(asked(draw.choice(QUESTIONS).format(sum=f"{a} {sign} {b}"), _called(f"{a}{sign}{b}", value)))


def _called(call: str, value: int) -> list[dict[str, str]]:
    return [
        {"type": "python", "text": call},
        {"type": "python_output", "text": str(value)},
        {"type": "text", "text": str(value)},
    ]


def of_digits(split: str, where: Where) -> Sequence[Example]:
    """Returns the hundred sums of two digits from memory; train has each twice, and once with the calculator."""
    return Mapped(range(300 if split == "train" else 100), _of_digits)


def _of_digits(index: int) -> Example:
    a, b = divmod(index % 100, 10)
    return Example(asked(f"{a}+{b}=", str(a + b) if index < 200 else _called(f"{a}+{b}", a + b)))


def passes(example: Example, text: str) -> bool:
    """Returns whether the last number of the answer is correct."""
    numbers = NUMBER.findall(text)
    return bool(numbers) and numbers[-1] == NUMBER.findall(text_of(example.answer))[-1]


ARITHMETIC = Task("arithmetic", "generative", by_calculator, passes)
ADDITION = Task("addition", "generative", of_digits, passes)
