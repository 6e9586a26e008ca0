"""Conversations of a file of your own: a list of messages on each line, or an object with `messages`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gptfast import untrusted
from gptfast.chat.conversation import messages_of, read
from train.tasks.task import Example, Mapped, Task, Where


def of_file(path: str) -> Task:
    """Returns the task `jsonl:PATH`: each split is the whole file. Reading it raises UserError with line and reason."""
    return Task(f"jsonl:{path}", "conversations", partial(examples, path))


def examples(path: str, split: str, where: Where) -> Sequence[Example]:
    for _ in read(path):
        pass  # each is checked once, and read again when it is asked for
    return Mapped(untrusted.JsonLines(Path(path), is_checked=True), lambda row: Example(messages_of(row)))
