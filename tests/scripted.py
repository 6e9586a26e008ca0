"""An assistant whose every word is written by the test: a tiny model, and an engine that draws what it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


class Scripted(Engine):
    """An engine whose model answers the last user's text as `script` has it, one id after the other.

    Ids of the script that the output of a tool takes the place of are never drawn.
    """

    chat: Chat
    script: dict[str, list[int]]

    def _draw(self, logits: Tensor, requests: list[Any], guesses: Tensor | None = None) -> Tensor:
        return torch.tensor([self._next(request.prompt + request.tokens) for request in requests])

    def _next(self, ids: Sequence[int]) -> int:
        user, begin = (self.chat.ids[name] for name in ("<|user_start|>", "<|assistant_start|>"))
        asked = len(ids) - ids[::-1].index(begin)
        text = self.chat.tokenizer.decode(ids[len(ids) - ids[::-1].index(user) : asked - 2])
        return self.script[text][len(ids) - asked]


def scripted(chat: Chat, script: dict[str, list[int]], slots: int = 2, block_size: int = 512) -> Scripted:
    """An engine that answers each key of `script` with the ids of its value."""
    tokenizer: Any = chat.tokenizer
    engine = Scripted(tiny(tokenizer, block_size), slots=slots, tokenizer=tokenizer, weights="model")
    engine.chat, engine.script = chat, script
    return engine
