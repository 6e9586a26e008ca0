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
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field, replace
from typing import Literal

from gptfast.chat.conversation import PYTHON, Chat
from gptfast.chat.tools import Tools
from gptfast.engine import Engine, Logprob, Request, Sampling

NAP_S = 0.02  # that a step waits for Python when nothing else is to be done


@dataclass(eq=False)
class Answer:
    """One answer as it grows. `ids` follow the prompt and lack the token that ends the turn."""

    prompt: list[int]
    sampling: Sampling
    plain: bool = False  # a text to be continued, in which nothing is called
    ids: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)  # 1 where the model chose this id, 0 where a tool's output was put
    logprobs: list[Logprob | None] = field(default_factory=list)  # of each id that was drawn, if asked for
    finish_reason: Literal["stop", "length", "cancelled", "error"] | None = None
    error: str = ""  # what went wrong
    calls: int = 0


class Answers:
    """Runs any number of answers on `engine`, which has the tokenizer of `chat` and serves nobody else meanwhile.

    With a `pool` Python runs in its threads while other answers go on; without one a step waits for it. Where the model
    knows no conversations, `chat` is None and all answers are plain.
    """

    def __init__(
        self, engine: Engine, chat: Chat | None, tools: Tools | None = None, *, pool: Executor | None = None
    ) -> None:
        self.engine, self.pool = engine, pool
        self._chat = chat
        self.tools = Tools() if tools is None else tools
        self._running: dict[Request, Answer] = {}
        self._calling: dict[Future[str], Answer] = {}

    def submit(self, prompt: Sequence[int], sampling: Sampling, *, plain: bool = False) -> Answer:
        """Queues an answer to the ids `prompt`, or their continuation. Raises ValueError as Engine.submit does."""
        answer = Answer(list(prompt), sampling, plain or self._chat is None)
        self._submit(answer)
        return answer

    @property
    def chat(self) -> Chat:
        """The rendering of conversations. Raises ValueError where the model knows none."""
        if self._chat is None:
            raise ValueError("chat: this model knows no conversations; all its answers are plain")
        return self._chat

    @property
    def busy(self) -> bool:
        return bool(self._running or self._calling)

    def cancel(self, answer: Answer) -> None:
        """End `answer` now: its slot is free at once. One that is finished stays as it is."""
        for request in [request for request, running in self._running.items() if running is answer]:
            self.engine.cancel(request)
            del self._running[request]
            answer.finish_reason = "cancelled"
        for call in [call for call, running in self._calling.items() if running is answer]:
            call.cancel()
            del self._calling[call]
            answer.finish_reason = "cancelled"

    def step(self) -> list[tuple[Answer, list[int]]]:
        """One step of the engine; what each answer has got, outputs of tools included."""
        grown = self._outputs()
        for update in self.engine.step() if self._running else ():
            request = update.request
            answer = self._running.get(request)
            if answer is None:
                continue
            before = len(answer.ids)
            if self._take(answer, update.tokens, update.logprobs):
                self.engine.cancel(request)
                del self._running[request]
            elif request.finish_reason is not None:
                del self._running[request]
                answer.finish_reason, answer.error = request.finish_reason, request.error
            grown.append((answer, answer.ids[before:]))
        return grown

    def _take(self, answer: Answer, tokens: Sequence[int], logprobs: Sequence[Logprob]) -> bool:
        """Adds tokens up to the first call that has an output, which is put in now or when Python is done."""
        for i, token in enumerate(tokens):
            answer.ids.append(token)
            answer.drawn.append(1)
            if logprobs:
                answer.logprobs.append(logprobs[i])
            call = self._call(answer)
            if call is None:
                continue
            output = self.tools.calculated(call)
            if output is None and self.tools.python is None:
                continue
            if output is None and self.pool is not None:
                self._calling[self.pool.submit(self.tools.executed, call)] = answer
            else:
                self._put_in(answer, self.tools.executed(call) if output is None else output)
            return True
        return False

    def _call(self, answer: Answer) -> str | None:
        """The call that the newest id ends, None if it ends none."""
        if answer.plain:
            return None
        first, last = (self.chat.ids[name] for name in PYTHON)
        if answer.ids[-1] != last:
            return None
        start = next((i for i in range(len(answer.ids) - 2, -1, -1) if answer.ids[i] in (first, last)), -1)
        if start < 0 or answer.ids[start] != first:
            return None  # an end without a beginning
        return self.chat.tokenizer.decode(answer.ids[start + 1 : -1])

    def _outputs(self) -> list[tuple[Answer, list[int]]]:
        """What Python has put into answers since the last step."""
        if self._calling and not self._running:
            wait(self._calling, NAP_S, FIRST_COMPLETED)
        grown = []
        for call in [call for call in self._calling if call.done()]:
            answer = self._calling.pop(call)
            before = len(answer.ids)
            self._put_in(answer, call.result())
            grown.append((answer, answer.ids[before:]))
        return grown

    def _put_in(self, answer: Answer, output: str) -> None:
        forced = self.chat.output(output)[: answer.sampling.max_tokens - len(answer.ids)]
        answer.ids += forced
        answer.drawn += [0] * len(forced)
        if answer.sampling.logprobs is not None:
            answer.logprobs += [None] * len(forced)
        answer.calls += 1
        self._submit(answer)

    def _submit(self, answer: Answer) -> None:
        sampling, left = answer.sampling, answer.sampling.max_tokens - len(answer.ids)
        if left <= 0:
            answer.finish_reason = "length"
            return
        seed = None if sampling.seed is None else (sampling.seed + answer.calls * 0x9E3779B97F4A7C15) % 2**63
        stops = sampling.stop_tokens
        if not answer.plain:
            stops = (*stops, self.chat.end_of_turn, self.chat.bos)
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
