"""Answers of an engine to conversations, with the tools that they call.

    answers = Answers(engine, chat, Tools())
    answer = answers.submit(chat.prompt(messages), Sampling(max_tokens=256, temperature=0))
    while answers.busy:
        for answer, tokens in answers.step(): ...      # as they come
    chat.parse_answer(answer.ids)

A call is run when its <|python_end|> has been drawn; what comes of it is put after it, as if the model had said it, and
the model goes on. A call that has no output is left as it is. The engine reads prompt and answer again after each call,
under a seed derived from the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from gptfast.chat.conversation import PYTHON, Chat
from gptfast.chat.tools import Tools
from gptfast.engine import Engine, Request, Sampling


@dataclass(eq=False)
class Answer:
    """One answer as it grows. `ids` follow the prompt and lack the token that ends the turn."""

    prompt: list[int]
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)  # 1 where the model chose this id, 0 where a tool's output was put
    finish_reason: Literal["stop", "length", "cancelled", "error"] | None = None
    calls: int = 0


class Answers:
    """Runs any number of answers on `engine`, which has the tokenizer of `chat` and serves nobody else meanwhile."""

    def __init__(self, engine: Engine, chat: Chat, tools: Tools | None = None) -> None:
        self.engine, self.chat = engine, chat
        self.tools = Tools() if tools is None else tools
        self._stops = (chat.end_of_turn, chat.bos)
        self._running: dict[Request, Answer] = {}

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Answer:
        """Queues an answer to the ids `prompt`. Raises ValueError as Engine.submit does."""
        answer = Answer(list(prompt), sampling)
        self._submit(answer)
        return answer

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def cancel(self, answer: Answer) -> None:
        for request, running in list(self._running.items()):
            if running is answer:
                self.engine.cancel(request)
                del self._running[request]
                answer.finish_reason = "cancelled"

    def step(self) -> list[tuple[Answer, list[int]]]:
        """One step of the engine; what each answer has got, outputs of tools included."""
        grown = []
        for update in self.engine.step():
            request = update.request
            answer = self._running.get(request)
            if answer is None:
                continue
            before = len(answer.ids)
            called = self._take(answer, update.tokens)
            if called:
                self.engine.cancel(request)
                del self._running[request]
                self._submit(answer)
            elif request.finish_reason is not None:
                del self._running[request]
                answer.finish_reason = request.finish_reason
            grown.append((answer, answer.ids[before:]))
        return grown

    def _take(self, answer: Answer, tokens: Sequence[int]) -> bool:
        """Adds tokens up to the first call that has an output, and that output; whether there was one."""
        first, last = (self.chat.ids[name] for name in PYTHON)
        for token in tokens:
            answer.ids.append(token)
            answer.drawn.append(1)
            if token != last:
                continue
            start = next((i for i in range(len(answer.ids) - 2, -1, -1) if answer.ids[i] in (first, last)), -1)
            if start < 0 or answer.ids[start] != first:
                continue  # an end without a beginning
            output = self.tools.run(self.chat.tokenizer.decode(answer.ids[start + 1 : -1]))
            if output is not None:
                forced = self.chat.output(output)[: answer.sampling.max_tokens - len(answer.ids)]
                answer.ids += forced
                answer.drawn += [0] * len(forced)
                answer.calls += 1
                return True
        return False

    def _submit(self, answer: Answer) -> None:
        sampling, left = answer.sampling, answer.sampling.max_tokens - len(answer.ids)
        if left <= 0:
            answer.finish_reason = "length"
            return
        seed = None if sampling.seed is None else (sampling.seed + answer.calls * 0x9E3779B97F4A7C15) % 2**63
        stops = (*sampling.stop_tokens, *self._stops)
        request = self.engine.submit(
            answer.prompt + answer.ids, replace(sampling, max_tokens=left, seed=seed, stop_tokens=stops)
        )
        self._running[request] = answer


def answer_all(answers: Answers, prompts: Sequence[tuple[Sequence[int], Sampling]]) -> list[Answer]:
    """The finished answers to prompts, in order; those beyond the engine's slots wait."""
    found = [answers.submit(prompt, sampling) for prompt, sampling in prompts]
    while answers.busy:
        answers.step()
    return found
