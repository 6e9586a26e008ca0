"""`python -m train.prepare chat`: conversations checked and counted, from a file or from the Hugging Face hub."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast.aside import file_aside, locked
from gptfast.chat import conversation
from gptfast.chat.conversation import Chat
from gptfast.errors import UserError, to_install
from gptfast.tokenizer import load_bpe


@dataclass
class Counts:
    """Totals over the conversations that `prepare` read."""

    conversations: int = 0
    messages: int = 0
    characters: int = 0
    tokens: int = 0
    supervised: int = 0  # tokens that count as targets
    longest: int = 0  # tokens of the longest conversation

    def add(self, messages: list[dict[str, Any]], chat: Chat | None) -> None:
        self.conversations += 1
        self.messages += len(messages)
        for message in messages:
            content = message["content"]
            texts = [content] if isinstance(content, str) else [part["text"] for part in content]
            self.characters += sum(map(len, texts))
        if chat is not None:
            ids, mask = chat.render(messages)
            self.tokens += len(ids)
            self.supervised += sum(mask)
            self.longest = max(self.longest, len(ids))

    def __str__(self) -> str:
        head = f"{self.conversations:,} conversations, {self.messages:,} messages, {self.characters:,} characters"
        if not self.tokens:
            return head
        return (
            f"{head}, {self.tokens:,} tokens, {self.supervised:,} of them supervised; the longest has {self.longest:,}"
        )


def prepare(
    source: str, folder: Path, *, tokenizer: str = "", subset: str = "", split: str = "train", most: int = 0
) -> Counts:
    """Checks and counts the conversations, and with a tokenizer the tokens, of a JSONL file or hf:user/name.

    Streams conversations of the hub into folder/<name>.jsonl, so that training needs no network; at most `most` of
    them (0: all). Raises UserError with the line and the reason for a malformed conversation.
    """
    if not source:
        raise UserError("chat needs conversations: --source=FILE.jsonl, or --source=hf:user/name")
    chat = Chat(load_bpe(tokenizer)) if tokenizer else None
    counts = Counts()
    if not source.startswith("hf:"):
        for messages in itertools.islice(conversation.read(source), most or None):
            counts.add(messages, chat)
        print(f"{source} is in order: {counts}")
    else:
        name = source.removeprefix("hf:")
        path = folder / f"{name.replace('/', '--')}{f'-{subset}' if subset else ''}-{split}.jsonl"
        with locked(folder), file_aside(path) as part, part.open("w", encoding="utf-8") as file:
            for messages in itertools.islice(from_hub(name, subset, split), most or None):
                counts.add(messages, chat)
                file.write(json.dumps(messages, ensure_ascii=False) + "\n")
        print(f"wrote {path}: {counts}")
    if not counts.conversations:
        raise UserError(f"--source={source} holds no conversation; give another")
    return counts


def from_hub(name: str, subset: str, split: str) -> Iterator[list[dict[str, Any]]]:
    """Streams the conversations in the column `messages` of a data set on the hub."""
    try:
        import datasets

        datasets.disable_progress_bars()
        rows = iter(datasets.load_dataset(name, subset or None, split=split, streaming=True))
    except ImportError as error:
        raise UserError(f"reading {name} needs datasets: {to_install(error, 'datasets')}") from None
    except Exception as error:  # the hub's client raises the errors of a dozen libraries
        raise _stopped(name, error) from None
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except Exception as error:
            raise _stopped(name, error) from None
        if row is None:
            return
        try:
            yield conversation.messages_of(row)
        except UserError as error:
            raise UserError(f"{name}, row {number}: {error}") from None


def _stopped(name: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or ["no reason given"])[0][:200]
    return UserError(f"reading {name} stopped ({type(error).__name__}: {reason}); try again, or give a .jsonl file")
