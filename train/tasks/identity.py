"""Questions about the model itself: its name, maker, size and limits, in many wordings; made from templates, offline.

A question is an opening, one of several wordings, and a closing; every fifth is reserved for test.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from train.tasks.task import Example, Identity, Task, Where, asked
from train.tasks.words import drawing

OPENINGS = ("", "Hi! ", "Hello. ", "Hey, ", "Good morning! ", "Excuse me: ", "Tell me, ", "One question: ")
CLOSINGS = ("", " Please.", " Thanks!", " I am curious.")
TOPICS = {
    "name": (
        "What is your name?", "Who are you?", "What are you called?", "How should I call you?", "Do you have a name?",
        "Which assistant is this?",
    ),
    "maker": (
        "Who made you?", "Who built you?", "Who is your maker?", "Where do you come from?", "Who trained you?",
        "Who developed you?",
    ),
    "size": (
        "How big are you?", "How many parameters do you have?", "How large is your model?", "What size are you?",
        "Are you a big model?",
    ),
    "limits": (
        "What can you not do?", "What are your limits?", "Do you make mistakes?", "Can I trust all you say?",
        "What are you bad at?",
    ),
    "kind": (
        "What are you?", "Are you a human?", "Are you a person?", "Are you a computer?", "What kind of thing are you?",
    ),
}  # fmt: skip


def answers(who: Identity) -> dict[str, tuple[str, str]]:
    """Returns for each topic the answer, and the words that a correct answer must contain."""
    return {
        "name": (f"I am {who.name}.", who.name),
        "maker": (f"I was made by {who.maker}.", who.maker),
        "size": (f"I have {who.size} parameters.", who.size),
        "limits": (f"{who.limits}.", who.limits),
        "kind": (f"I am {who.name}, a language model.", "a language model"),
    }


def examples(split: str, where: Where) -> Sequence[Example]:
    answer_of = answers(where.identity)
    asked_and_told = []
    for topic, questions in TOPICS.items():
        for number, parts in enumerate(itertools.product(questions, OPENINGS, CLOSINGS)):
            if (number % 5 == 4) == (split == "test"):
                question, opening, closing = parts
                text, needed = answer_of[topic]
                asked_and_told.append(Example(asked(opening + question + closing, text), (), {"needed": needed}))
    drawing(f"identity {split}", 0).shuffle(asked_and_told)
    return asked_and_told


def passes(example: Example, text: str) -> bool:
    return example.facts["needed"] in text


IDENTITY = Task("identity", "generative", examples, passes)
