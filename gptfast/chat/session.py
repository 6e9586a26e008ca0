"""One conversation with a model: what was said, how answers are drawn, and the next answer as it comes.

    session = Session(Answers(engine, chat))
    for piece in session.ask("What is 12*7?"):     # session.stop(), from a signal, ends it with the next token
        print(piece.text, end="")
    session.messages, session.figures

What no longer fits the model's context is left out of the prompt, the oldest messages first, never the system message.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptfast import untrusted
from gptfast.aside import write_whole
from gptfast.chat import conversation
from gptfast.chat.answers import Answers
from gptfast.chat.parts import PartStream, Piece
from gptfast.engine import Sampling
from gptfast.errors import UserError

LEAST_ROOM = 0.5  # of the context, which an answer has at least, unless the question alone needs it


@dataclass(frozen=True)
class Figures:
    """How the last answer came about."""

    tokens: int  # outputs of tools included
    first_s: float  # to the first token
    seconds: float  # from the first token to the last
    used: int  # of the context, prompt and answer
    context: int
    forgotten: int  # messages that the model has not seen, because they no longer fit
    finish_reason: str  # "stop", "length" or "cancelled"

    def __str__(self) -> str:
        speed = f"{(self.tokens - 1) / self.seconds:.1f} tokens/s" if self.tokens > 1 and self.seconds > 0 else "n/a"
        ended = {"stop": "", "length": ", cut at its limit", "cancelled": ", stopped"}[self.finish_reason]
        return (
            f"{self.tokens} tokens, {speed}, the first after {1000 * self.first_s:.0f} ms; "
            f"context {self.used} of {self.context}{ended}"
        )


class Session:
    """A conversation with the model of `answers`, which serves nobody else meanwhile. `sampling` holds for each answer.

    With a seed the n-th answer of a session is the same at every run.
    """

    def __init__(self, answers: Answers, sampling: Sampling | None = None, system: str = "") -> None:
        assert answers.chat is not None, "the model knows no conversations"
        self.answers, self.chat = answers, answers.chat
        self.sampling = Sampling(256, temperature=0.6, top_k=50) if sampling is None else sampling
        self.system = system
        self.turns: list[dict[str, Any]] = []  # of user and assistant
        self.figures: Figures | None = None
        self._count = 0
        self._files: set[Path] = set()  # that it has saved or loaded, and may write over
        self._stopping = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, its system message first if there is one."""
        return [*self._head(), *self.turns]

    @property
    def context(self) -> int:
        """Tokens that the model can see."""
        return self.answers.engine.config.block_size

    # ---- talking -----------------------------------------------------------------------------------------------------
    def ask(self, text: str) -> Iterator[Piece]:
        """The answer to `text`, piece by piece; it joins the conversation when it ends, or where its reader leaves it.

        Raises UserError, and forgets `text`, where it does not fit the context or the engine fails.
        """
        self.turns.append({"role": "user", "content": text})
        self._stopping = False
        try:
            prompt, forgotten = self._prompt()
            yield from self._answer(prompt, forgotten)
        finally:
            if self.turns and self.turns[-1]["role"] == "user":  # nothing came of it
                self.turns.pop()

    def again(self) -> Iterator[Piece]:
        """Another answer in place of the last. Raises UserError where there is none."""
        yield from self.ask(self.undo())

    def undo(self) -> str:
        """Takes back the last question, which it returns, and its answer. Raises UserError where there is none."""
        if not self.turns:
            raise UserError("nothing has been said yet")
        self.turns.pop()
        return str(self.turns.pop()["content"])

    def stop(self) -> None:
        """Ends the answer that grows, with what it has. A signal handler may call it."""
        self._stopping = True

    def _answer(self, prompt: list[int], forgotten: int) -> Iterator[Piece]:
        answers, started = self.answers, time.perf_counter()
        seed = random.SystemRandom().getrandbits(63) if self.sampling.seed is None else self.sampling.seed + self._count
        most = min(self.sampling.max_tokens, self.context - len(prompt))
        answer = answers.submit(prompt, replace(self.sampling, max_tokens=most, seed=seed % 2**63))
        self._count += 1
        stream, first, last = PartStream(self._tokenizer, self.chat), started, started
        try:
            while answers.busy and not self._stopping:
                for _, ids in answers.step():
                    last = time.perf_counter()
                    first = last if first == started else first
                    yield from stream.push(ids)
            yield from stream.flush()
        finally:
            answers.cancel(answer)
            reason = answer.finish_reason or "cancelled"
            if reason == "stop" or (answer.ids and reason != "error"):
                self.turns.append({"role": "assistant", "content": self.chat.parse_answer(answer.ids)})
            used = len(prompt) + len(answer.ids)
            self.figures = Figures(
                len(answer.ids), first - started, last - first, used, self.context, forgotten, reason
            )
        if reason == "error":
            raise UserError(f"the answer ended: {answer.error}")

    def _prompt(self) -> tuple[list[int], int]:
        """The ids to be answered, and how many of the oldest messages they leave out so that an answer has room."""
        room = min(self.sampling.max_tokens, int(LEAST_ROOM * self.context))
        for first in range(0, len(self.turns), 2):
            prompt = self.chat.prompt([*self._head(), *self.turns[first:]])
            if len(prompt) + room <= self.context:
                return prompt, first
        if len(prompt) < self.context:
            return prompt, len(self.turns) - 1
        what = "the message and the system message have" if self.system else "the message has"
        raise UserError(f"{what} {len(prompt)} tokens, and the model sees {self.context}; make it shorter")

    def _head(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    @property
    def _tokenizer(self) -> Any:
        return self.chat.tokenizer

    # ---- files -------------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Begins anew; the system message stays."""
        self.turns = []

    def save(self, path: str | Path) -> None:
        """Writes the conversation as a line of JSON, as train.prepare chat reads it.

        Raises UserError where it cannot, for a file that was there before and was not loaded, and for a folder that is
        not there.
        """
        if not self.turns:
            raise UserError("nothing has been said yet, so there is nothing to save")
        if os.path.lexists(path) and Path(path).resolve() not in self._files:
            raise UserError(f"{path} is there already; give another file")
        if not Path(path).parent.is_dir():
            raise UserError(f"{path}: there is no folder {Path(path).parent}; make it, or give another file")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            write_whole(Path(path), line)
        except (OSError, ValueError) as error:
            reason = str(error) if isinstance(error, UserError) else untrusted.reason(error)
            raise UserError(f"cannot write {path}: {reason}; give another file") from None
        self._files.add(Path(path).resolve())

    def load(self, path: str | Path) -> int:
        """Goes on with the last conversation of a file; how many there are. Raises UserError, and changes nothing."""
        count, messages = 0, list[dict[str, Any]]()
        for each in conversation.read(path):
            count, messages = count + 1, each
        if not count:
            raise UserError(f"{path} holds no conversation")
        begins_with_system = messages[0]["role"] == "system"
        turns = messages[begins_with_system:]
        if turns[-1]["role"] == "user":  # nobody has answered
            turns = turns[:-1]
        self.system = messages[0]["content"] if begins_with_system else ""
        self.turns = [dict(message) for message in turns]
        if count == 1:
            self._files.add(Path(path).resolve())
        return count
