"""Conversations of a file of your own: a list of messages on each line, or an object with `messages`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gptfast.chat.conversation import read
from train.tasks.task import Example, Task, Where


def of_file(path: str) -> Task:
    """Returns the task `jsonl:PATH`: each split is the whole file. Reading it raises UserError with line and reason."""
    return Task(f"jsonl:{path}", "conversations", partial(examples, path))


def examples(path: str, split: str, where: Where) -> list[Example]:
    return [Example(messages) for messages in read(Path(path))]
