"""What is sent back, in the shapes that OpenAI's clients and nanochat's page know."""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptfast.chat.parts import Piece
from gptfast.engine import Logprob
from gptfast.serve.batcher import Event
from gptfast.tokenizer import Tokenizer

NEVER = -9999.0  # the logarithm of no probability, as OpenAI's API writes it


def dumps(value: Any) -> bytes:
    """JSON in ASCII, so that no text can break it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else dumps(value)) + b"\n\n"


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Spelling:
    """How tokens are written where their probabilities are told."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        ranks: Mapping[bytes, int] = getattr(tokenizer, "ranks", {})
        self._bytes = {token: spelled for spelled, token in ranks.items()}

    def content(self, token: int) -> bytes:
        """The bytes of a token, which need not be whole characters."""
        spelled = self._bytes.get(token)
        return self._tokenizer.decode([token]).encode() if spelled is None else spelled

    def text(self, token: int) -> str:
        """The token's text, or its bytes where they are none: bytes:\\xe6\\x97."""
        content = self.content(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token as the chat API has it."""
        shown = {"token": self.text(token), "bytes": list(self.content(token))}
        return {**shown, "logprob": max(logprob, NEVER)}


@dataclass
class Choice:
    """One answer as it has come so far."""

    prompt_tokens: int  # of its prompt, 0 where an earlier choice has the same
    tokens: int = 0
    pieces: list[Piece] = field(default_factory=list)
    likely: list[tuple[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, event: Event, tokens: int) -> None:
        """What an event adds; the answer has `tokens` now."""
        self.pieces += event.pieces
        self.likely += event.likely
        self.tokens, self.finish_reason = tokens, event.finish_reason

    @property
    def parts(self) -> list[Piece]:
        """Its text, calls and outputs in order, each as one."""
        groups = itertools.groupby(self.pieces, key=lambda piece: piece.kind)
        return [Piece(kind, "".join(piece.text for piece in pieces)) for kind, pieces in groups]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces if piece.kind == "text")


class Chat:
    """Replies of /v1/chat/completions. `spelling` where probabilities are asked for."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, spelling: Spelling | None) -> None:
        self.spelling = spelling

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if any(piece.kind != "text" for piece in choice.pieces):
            message["parts"] = [{"type": piece.kind, "text": piece.text} for piece in choice.parts]
        logprobs = self._logprobs(choice.likely)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def begin(self, index: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def more(self, index: int, pieces: Sequence[Piece], likely: Sequence[tuple[int, Logprob]]) -> list[dict[str, Any]]:
        found = [
            self._delta(
                index,
                {"content": piece.text} if piece.kind == "text" else {"part": {"type": piece.kind, "text": piece.text}},
            )
            for piece in pieces
        ]
        if likely:
            found = found or [self._delta(index, {"content": ""})]
            found[0]["logprobs"] = self._logprobs(likely)
        return found

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._delta(index, {}, reason)

    def _delta(self, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _logprobs(self, likely: Sequence[tuple[int, Logprob]]) -> dict[str, Any] | None:
        if self.spelling is None:
            return None
        content = []
        for token, (logprob, top) in likely:
            entries = [self.spelling.entry(*candidate) for candidate in top]
            content.append({**self.spelling.entry(token, logprob), "top_logprobs": entries})
        return {"content": content, "refusal": None}


class Plain:
    """Replies of /v1/completions. `spelling` where probabilities are asked for."""

    object = chunk_object = "text_completion"
    prefix = "cmpl-"

    def __init__(self, spelling: Spelling | None) -> None:
        self.spelling = spelling
        self._written: dict[int, int] = {}  # characters of each choice's tokens so far

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return self._text(index, choice.text, choice.finish_reason, self._logprobs(index, choice.likely))

    def begin(self, index: int) -> list[dict[str, Any]]:
        return []

    def more(self, index: int, pieces: Sequence[Piece], likely: Sequence[tuple[int, Logprob]]) -> list[dict[str, Any]]:
        text = "".join(piece.text for piece in pieces)
        return [self._text(index, text, None, self._logprobs(index, likely))] if text or likely else []

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._text(index, "", reason, None)

    def _text(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, likely: Sequence[tuple[int, Logprob]]) -> dict[str, Any] | None:
        if self.spelling is None:
            return None
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, (logprob, top) in likely:
            text = self.spelling.text(token)
            found["tokens"].append(text)
            found["token_logprobs"].append(max(logprob, NEVER))
            found["top_logprobs"].append({self.spelling.text(other): max(value, NEVER) for other, value in top})
            found["text_offset"].append(self._written.get(index, 0))
            self._written[index] = self._written.get(index, 0) + len(text)
        return found


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
    prompt = sum(choice.prompt_tokens for choice in choices)
    answered = sum(choice.tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}
