"""An assistant whose every word is written by the test: a tiny model, and an engine that draws what it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import kernels
from gptfast.chat.conversation import Chat
from gptfast.config import GPTConfig
from gptfast.engine import Engine
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer


def tiny(tokenizer: BPETokenizer, block_size: int = 512) -> GPT:
    """A model with random weights, the same at every run, that takes the ids of `tokenizer`."""
    torch.manual_seed(0)
    config = GPTConfig(block_size, tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32, position="rope")
    return GPT(config, kernels.load("reference")).eval()


def told(chat: Chat, *parts: str | tuple[str, str]) -> list[int]:
    """The ids of an answer that ends: texts, and ("python", call)s each with its ("python_output", text) after it."""
    named = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0], "text": p[1]} for p in parts]
    asked = chat.prompt([{"role": "user", "content": ""}])
    return chat.render([{"role": "user", "content": ""}, {"role": "assistant", "content": named}]).ids[len(asked) :]


class Told:
    """What a step drew, with the tokens of the script in place of the model's."""

    def __init__(self, engine: Scripted, rows: list[Any], places: list[int], arriving: Any) -> None:
        self.engine, self.rows, self.places, self.arriving = engine, rows, places, arriving

    def read(self) -> tuple[list[list[int]], Any]:
        tokens, told = self.arriving.read()
        for row, place in zip(self.rows, self.places, strict=True):
            request = row.request
            if request.finish_reason is None and tokens[place][-1]:
                tokens[place] = [self.engine.next(request.prompt + request.tokens), 1]
        return tokens, told


class Scripted(Engine):
    """An engine whose model answers the last user's text as `script` has it, one id after the other.

    Ids of the script that the output of a tool takes the place of are never drawn.
    """

    chat: Chat
    script: dict[str, list[int]]

    def _depart(self, rows: list[Any], places: list[int], arriving: Any, *, decoded: bool) -> None:
        super()._depart(rows, places, Told(self, rows, places, arriving), decoded=decoded)  # type: ignore[arg-type]

    def next(self, ids: Sequence[int]) -> int:
        """The id that the script has after `ids`."""
        user, begin = (self.chat.ids[name] for name in ("<|user_start|>", "<|assistant_start|>"))
        asked = len(ids) - ids[::-1].index(begin)
        text = self.chat.tokenizer.decode(ids[len(ids) - ids[::-1].index(user) : asked - 2])
        return self.script[text][len(ids) - asked]


def scripted(
    chat: Chat, script: dict[str, list[int]], slots: int = 2, block_size: int = 512, page_size: int | None = None
) -> Scripted:
    """An engine that answers each key of `script` with the ids of its value."""
    tokenizer: Any = chat.tokenizer
    engine = Scripted(
        tiny(tokenizer, block_size), slots=slots, tokenizer=tokenizer, weights="model", page_size=page_size
    )
    engine.chat, engine.script = chat, script
    return engine
