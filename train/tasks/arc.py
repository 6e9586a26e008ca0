"""ARC (Clark et al., arXiv:1803.05457): school science in multiple choice, mostly of four."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from train.tasks.task import Example, Mapped, Task, Where, asked, multiple_choice, right_letter, rows


def examples(name: str, subset: str, split: str, where: Where) -> Sequence[Example]:
    return Mapped(rows(where, name, split, "allenai/ai2_arc", subset), make)


def make(row: dict[str, Any]) -> Example:
    letters, choices = tuple(row["choices"]["label"]), row["choices"]["text"]
    return Example(asked(multiple_choice(row["question"], letters, choices), row["answerKey"]), letters)


ARC_EASY = Task("arc_easy", "categorical", partial(examples, "arc_easy", "ARC-Easy"), right_letter, chance=0.25)
ARC_CHALLENGE = Task(
    "arc_challenge", "categorical", partial(examples, "arc_challenge", "ARC-Challenge"), right_letter, chance=0.25
)
