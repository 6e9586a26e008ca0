"""Counting the letters of a word, first by spelling it out, then by asking Python, as in nanochat's SpellingBee.

The questions and the words around the count are this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from string import ascii_lowercase

from gptfast.chat.conversation import text_of
from train.tasks import gsm8k
from train.tasks.task import Example, Mapped, Task, Where, asked
from train.tasks.words import TEST, TRAIN, drawing, words

QUESTIONS = (
    "How often is {letter} in {word}?", "How many times does the letter {letter} occur in {word}?",
    "Count every {letter} of {word}.", "{word}: how many {letter}?", "What number of {letter} has {word}?",
    "how many {letter} do you see in {word}", "In {word}, how often do we write {letter}?",
    "I need the number of letters {letter} in {word}.",
)  # fmt: skip
QUOTES = ("", "'", '"')


def examples(split: str, where: Where) -> Sequence[Example]:
    return Mapped(range(TRAIN if split == "train" else TEST), partial(make, split, words(where)))


def make(split: str, known: Sequence[str], index: int) -> Example:
    draw = drawing(split, index)
    word = draw.choice(known)
    letter = draw.choice(word) if draw.random() < 0.9 else draw.choice(ascii_lowercase)
    first, second = draw.choice(QUOTES), draw.choice(QUOTES)
    question = draw.choice(QUESTIONS).format(letter=f"{first}{letter}{first}", word=f"{second}{word}{second}")
    return Example(asked(question, solution(word, letter)))


def solution(word: str, letter: str) -> list[dict[str, str]]:
    """Returns the parts: a running count letter by letter, the same count by Python, and #### with the number."""
    count, lines = 0, [f"{word}:{','.join(word)}"]
    for position, character in enumerate(word, 1):
        count += character == letter
        lines.append(f"{position}:{character}" + (f" yes, {count}" if character == letter else ""))
    call = f"'{word}'.count('{letter}')"
    return [
        {"type": "text", "text": "\n".join([*lines, f"By hand: {count}. By Python: "])},
        {"type": "python", "text": call},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"{count}.\n#### {count}"},
    ]


def passes(example: Example, text: str) -> bool:
    return gsm8k.number(text) == gsm8k.number(text_of(example.answer))


SPELLINGBEE = Task("spellingbee", "generative", examples, passes)
