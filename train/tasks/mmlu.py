"""MMLU (Hendrycks et al., arXiv:2009.03300): questions of 57 subjects, four choices each. Train is auxiliary_train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.tasks.task import Example, Mapped, Task, Where, asked, multiple_choice, right_letter, rows

LETTERS = ("A", "B", "C", "D")


def examples(split: str, where: Where) -> Sequence[Example]:
    subset = "auxiliary_train" if split == "train" else "all"
    return Mapped(rows(where, "mmlu", split, "cais/mmlu", subset), make)


def make(row: dict[str, Any]) -> Example:
    row = row.get("train", row)  # rows of auxiliary_train are wrapped
    prompt = multiple_choice(row["question"], LETTERS, row["choices"])
    return Example(asked(prompt, LETTERS[row["answer"]]), LETTERS, {"subject": row.get("subject", "")})


MMLU = Task("mmlu", "categorical", examples, right_letter, chance=0.25)
