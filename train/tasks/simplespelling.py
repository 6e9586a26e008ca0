"""Spelling a word, letter by letter: the part of counting letters that tokens make hard."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from train.tasks.task import Example, Mapped, Task, Where, asked
from train.tasks.words import TEST, TRAIN, drawing, words


def examples(split: str, where: Where) -> Sequence[Example]:
    return Mapped(range(TRAIN if split == "train" else TEST), partial(make, split, words(where)))


def make(split: str, known: Sequence[str], index: int) -> Example:
    word = drawing(f"spelling {split}", index).choice(known)
    return Example(asked(f"Spell the word: {word}", f"{word}:{','.join(word)}"))


def passes(example: Example, text: str) -> bool:
    return text.strip() == example.answer


SIMPLESPELLING = Task("simplespelling", "generative", examples, passes)
