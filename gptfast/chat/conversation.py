"""Conversations to token ids and back: one rendering for training, evaluation and serving, that of nanochat.

    chat = Chat(tokenizer)                     # a BPE tokenizer with the special tokens below, as train.tokenizer makes
    ids, mask = chat.render([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])
    chat.parse(ids)                            # the messages again
    chat.prompt([{"role": "user", "content": "2+2?"}])         # ids that end where an answer begins

    <|bos|> then, in turns, <|user_start|> text <|user_end|> and <|assistant_start|> parts <|assistant_end|>

An assistant's content is a text, or a list of parts {"type": "text" | "python" | "python_output", "text": ...}; a call
stands between <|python_start|> and <|python_end|>, what came of it between <|output_start|> and <|output_end|>. A
system message comes first, if at all, and is put before the first user message with a blank line between. The mask is 1
for what the assistant is to learn: its text, its calls and the end of its turn; and 0 for all else, outputs included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gptfast import untrusted
from gptfast.errors import UserError

BOS = "<|bos|>"
USER = ("<|user_start|>", "<|user_end|>")
ASSISTANT = ("<|assistant_start|>", "<|assistant_end|>")
PYTHON = ("<|python_start|>", "<|python_end|>")
OUTPUT = ("<|output_start|>", "<|output_end|>")
SPECIAL_TOKENS = (BOS, *USER, *ASSISTANT, *PYTHON, *OUTPUT)
ENCLOSED = {"python": PYTHON, "python_output": OUTPUT}  # parts of an answer that stand between two special tokens
PARTS = ("text", *ENCLOSED)

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant", "content": str, or for an assistant list[Part]}
Part = Mapping[str, str]  # {"type": one of PARTS, "text": str}
Content = str | list[dict[str, str]]


class ChatTokenizer(Protocol):
    """What rendering needs of a tokenizer: text never encodes to a special token."""

    @property
    def special_tokens(self) -> Mapping[str, int]: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Rendered(NamedTuple):
    ids: list[int]
    mask: list[int]  # 1 where the assistant learns to say this id, else 0


class Chat:
    """The rendering of conversations by `tokenizer`. Raises UserError if it lacks the special tokens."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        known = getattr(tokenizer, "special_tokens", {})
        missing = [name for name in SPECIAL_TOKENS if name not in known]
        if missing:
            raise UserError(
                f"the tokenizer has no {missing[0]}, so it cannot write conversations; train one that can "
                "(python -m train.tokenizer train), and a model with it"
            )
        self.tokenizer = tokenizer
        self.ids = {name: known[name] for name in SPECIAL_TOKENS}

    @property
    def bos(self) -> int:
        return self.ids[BOS]

    @property
    def end_of_turn(self) -> int:
        """The id that ends an answer."""
        return self.ids[ASSISTANT[1]]

    def render(self, messages: Sequence[Message], max_tokens: int | None = None) -> Rendered:
        """Ids and mask of a conversation, cut to its first `max_tokens`. Raises UserError if it is malformed."""
        check(messages)
        ids, mask = [self.bos], [0]

        def add(name_or_text: str, learnt: int, special: bool = False) -> None:
            new = [self.ids[name_or_text]] if special else self.tokenizer.encode(name_or_text)
            ids.extend(new)
            mask.extend([learnt] * len(new))

        for message in _without_system(messages):
            content = message["content"]
            if message["role"] == "user":
                add(USER[0], 0, special=True)
                add(content, 0)
                add(USER[1], 0, special=True)
                continue
            add(ASSISTANT[0], 0, special=True)
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                learnt = int(part["type"] != "python_output")
                first, last = ENCLOSED.get(part["type"], ("", ""))
                if first:
                    add(first, learnt, special=True)
                add(part["text"], learnt)
                if last:
                    add(last, learnt, special=True)
            add(ASSISTANT[1], 1, special=True)
        return Rendered(ids[:max_tokens], mask[:max_tokens])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the model is to answer; a last message of the assistant's is what it should have said."""
        asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        return [*self.render(asked).ids, self.ids[ASSISTANT[0]]]

    def output(self, text: str) -> list[int]:
        """The ids that a tool's output is forced in as."""
        return [self.ids[OUTPUT[0]], *self.tokenizer.encode(text), self.ids[OUTPUT[1]]]

    def parse(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The messages of rendered ids; the last may lack its end. Raises UserError for what `render` cannot give.

        A system message stays where rendering put it, and neighbouring parts of text come back as one.
        """
        names = {i: name for name, i in self.ids.items()}
        if not len(ids) or ids[0] != self.bos:
            raise UserError(f"a conversation begins with {BOS}")
        messages: list[dict[str, Any]] = []
        place = 1
        while place < len(ids):
            opening, closing = (USER, ASSISTANT)[len(messages) % 2]
            if ids[place] != self.ids[opening]:
                raise UserError(
                    f"token {place} of a conversation is {names.get(ids[place], ids[place])}, not {opening}"
                )
            end = place + 1
            while end < len(ids) and ids[end] != self.ids[closing]:
                end += 1
            inside = ids[place + 1 : end]
            if opening == USER[0]:
                messages.append({"role": "user", "content": self._text(inside)})
            else:
                messages.append({"role": "assistant", "content": self.parse_answer(inside)})
            place = end + 1
        return messages

    def parse_answer(self, ids: Sequence[int]) -> Content:
        """The content of an assistant's message from its ids, without the tokens around them: a text, or parts.

        Lenient, since a model may have said anything: a call or output that does not end is taken to end there.
        """
        opening = {self.ids[pair[0]]: (kind, self.ids[pair[1]]) for kind, pair in ENCLOSED.items()}
        parts: list[dict[str, str]] = []
        place = 0
        while place < len(ids):
            kind, last = opening.get(ids[place], ("text", None))
            start = end = place + (kind != "text")
            while end < len(ids) and (ids[end] != last if last is not None else ids[end] not in opening):
                end += 1
            parts.append({"type": kind, "text": self._text(ids[start:end])})
            place = end + (kind != "text")
        if not parts:
            return ""
        return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts

    def _text(self, ids: Sequence[int]) -> str:
        special = set(self.ids.values())
        return self.tokenizer.decode([i for i in ids if i not in special])


def text_of(content: str | Sequence[Part]) -> str:
    """What an answer says, calls and their outputs left out."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def _without_system(messages: Sequence[Message]) -> Sequence[Message]:
    if messages[0]["role"] != "system":
        return messages
    merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [merged, *messages[2:]]


# ---- what is a conversation, and files of them -----------------------------------------------------------------------


def check(messages: Any) -> None:
    """Raises UserError, which says which message is wrong and why, unless `messages` is a conversation."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("a conversation is a list of messages, and not an empty one")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(f"message {number} is no object with role and content")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise UserError("message 2 is missing: after the system message comes the user's")
    if turns is not messages and not isinstance(messages[0]["content"], str):
        raise UserError("message 1: the content of a system message is a text")
    for number, message in enumerate(turns, 1 + len(messages) - len(turns)):
        role = "user" if (number - 1 - len(messages) + len(turns)) % 2 == 0 else "assistant"
        if message["role"] != role:
            raise UserError(
                f"message {number} is from {message['role']!r}, not {role!r}; user and assistant take turns"
            )
        if isinstance(message["content"], str):
            continue
        if role == "user":
            raise UserError(f"message {number}: the content of a user's message is a text")
        _check_parts(number, message["content"])


def _check_parts(number: int, parts: Any) -> None:
    if not isinstance(parts, list | tuple):
        raise UserError(f"message {number}: its content is neither a text nor a list of parts")
    for place, part in enumerate(parts, 1):
        if not isinstance(part, Mapping) or part.get("type") not in PARTS or not isinstance(part.get("text"), str):
            raise UserError(f"message {number}, part {place}: expected type (one of {', '.join(PARTS)}) and text")


def read(path: str | Path) -> Iterator[list[dict[str, Any]]]:
    """The conversations of a JSONL file: on each line a list of messages, or an object with `messages`; checked.

    Empty lines are passed over. Raises UserError with the line and the reason.
    """
    try:
        with untrusted.opened(path) as file:
            number = 0
            try:
                for line in untrusted.lines(file):
                    number += 1
                    if line.strip():
                        yield messages_of(untrusted.parsed(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                where = f"{path}, line {number}: byte {error.start} is not UTF-8"
                raise UserError(f"{where}; convert the file first") from None
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error})") from None
            except ValueError as error:
                raise UserError(f"{path}, after line {number}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a .jsonl file of conversations") from None


def messages_of(row: Any) -> list[dict[str, Any]]:
    """The messages of one line or row, checked: itself if it is a list, else its `messages`."""
    messages: Any = row.get("messages") if isinstance(row, dict) else row
    check(messages)
    return list(messages)


# ---- the same for transformers ---------------------------------------------------------------------------------------


def _template() -> str:
    """A chat template by which `apply_chat_template` gives the ids of `render`.

    The template makes one string of the conversation, in which the special tokens are found again; so it refuses a text
    that spells one, where `render` takes that for ordinary text. Two parts of text in a row become one.
    """
    specials = " or ".join(f"'{name}' in text" for name in SPECIAL_TOKENS)
    lines = [
        "{%- macro plain(text) -%}",
        f"{{%- if {specials} -%}}",
        "{{- raise_exception('a message spells a special token; take it out') -}}",
        "{%- endif -%}{{- text -}}{%- endmacro -%}",
        "{%- set ns = namespace(before='', turns=messages) -%}",
        "{%- if messages[0]['role'] == 'system' -%}",
        "{%- set ns.before = messages[0]['content'] + '\\n\\n' -%}{%- set ns.turns = messages[1:] -%}",
        "{%- endif -%}",
        f"{{{{- '{BOS}' -}}}}",
        "{%- for message in ns.turns -%}",
        "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}",
        "{{- raise_exception('user and assistant take turns') -}}",
        "{%- endif -%}",
        "{%- if message['role'] == 'user' -%}",
        f"{{{{- '{USER[0]}' + plain((ns.before if loop.first else '') + message['content']) + '{USER[1]}' -}}}}",
        "{%- else -%}",
        f"{{{{- '{ASSISTANT[0]}' -}}}}",
        "{%- if message['content'] is string -%}{{- plain(message['content']) -}}{%- else -%}",
        "{%- for part in message['content'] -%}",
        *(
            f"{{%- if part['type'] == '{kind}' -%}}"
            f"{{{{- '{first}' + plain(part['text']) + '{last}' -}}}}{{%- endif -%}}"
            for kind, (first, last) in {"text": ("", ""), **ENCLOSED}.items()
        ),
        "{%- endfor -%}{%- endif -%}",
        f"{{{{- '{ASSISTANT[1]}' -}}}}",
        "{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- '{ASSISTANT[0]}' -}}}}{{%- endif -%}}",
    ]
    return "".join(lines)


TEMPLATE = _template()
