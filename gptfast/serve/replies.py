"""What is sent back, in the shapes that OpenAI's clients and nanochat's page know."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gptfast.chat.parts import Piece


def dumps(value: Any) -> bytes:
    """JSON in ASCII, so that no text can break it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else dumps(value)) + b"\n\n"


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Choice:
    """One answer as it has come so far."""

    prompt_tokens: int
    tokens: int = 0
    parts: list[Piece] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if self.parts and self.parts[-1].kind == piece.kind:
                piece = Piece(piece.kind, self.parts.pop().text + piece.text)
            self.parts.append(piece)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.parts if piece.kind == "text")


class Chat:
    """Replies of /v1/chat/completions."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if any(piece.kind != "text" for piece in choice.parts):
            message["parts"] = [{"type": piece.kind, "text": piece.text} for piece in choice.parts]
        return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}

    def begin(self, index: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def more(self, index: int, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [
            self._delta(
                index,
                {"content": piece.text} if piece.kind == "text" else {"part": {"type": piece.kind, "text": piece.text}},
            )
            for piece in pieces
        ]

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._delta(index, {}, reason)

    def _delta(self, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


class Plain:
    """Replies of /v1/completions."""

    object = chunk_object = "text_completion"
    prefix = "cmpl-"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return self._text(index, choice.text, choice.finish_reason)

    def begin(self, index: int) -> list[dict[str, Any]]:
        return []

    def more(self, index: int, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [self._text(index, piece.text, None) for piece in pieces]

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._text(index, "", reason)

    def _text(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


class Envelope:
    """What is the same around every reply to one request."""

    def __init__(self, shape: Chat | Plain, model: str) -> None:
        self.shape, self._model = shape, model
        self._id, self._created = f"{shape.prefix}{secrets.token_hex(12)}", int(time.time())

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        shown = [self.shape.choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head(self.shape.object), "choices": shown, "usage": usage(choices)}

    def chunk(self, choice: dict[str, Any], with_usage: bool) -> dict[str, Any]:
        return {
            **self._head(self.shape.chunk_object), "choices": [choice], **({"usage": None} if with_usage else {}),
        }  # fmt: skip

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {**self._head(self.shape.chunk_object), "choices": [], "usage": usage(choices)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens of the prompts, each counted once, and of the answers, outputs of tools included."""
    prompt = choices[0].prompt_tokens if choices else 0
    answered = sum(choice.tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}
