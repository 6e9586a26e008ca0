"""Answers of an engine to conversations, with the tools that they call.

    answers = Answers(engine, chat, Tools())
    answer = answers.submit(chat.prompt(messages), Sampling(max_tokens=256, temperature=0))
    while answers.busy:
        for answer, tokens in answers.step(): ...      # as they come
    chat.parse_answer(answer.ids)

A call is run when its <|python_end|> has been drawn; what comes of it is put after it, as if the model had said it, and
the model goes on. A call that has no output is left as it is. The engine reads prompt and answer again after each call,
under a seed derived from the first. The calculator answers at once; Python runs in a thread while other answers go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

from gptfast.chat.conversation import ENCLOSED, PYTHON, Chat
from gptfast.chat.tools import Tools
from gptfast.engine import Engine, Request, Sampling
from gptfast.engine.text import TextStream
from gptfast.tokenizer import Tokenizer

TOOLS_AT_ONCE = 4  # calls of Python that run beside each other; others wait
PATIENCE_S = 0.05  # how long a step waits for tools when the engine has nothing to do


@dataclass(eq=False)
class Answer:
    """One answer as it grows. `ids` follow the prompt and lack the token that ends the turn."""

    prompt: list[int]
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)  # 1 where the model chose this id, 0 where a tool's output was put
    finish_reason: Literal["stop", "length", "cancelled", "error"] | None = None
    error: str = ""  # what went wrong, where finish_reason is "error"
    calls: int = 0  # that had an output


class Answers:
    """Runs any number of answers on `engine`, which has the tokenizer of `chat` and serves nobody else meanwhile."""

    def __init__(self, engine: Engine, chat: Chat, tools: Tools | None = None) -> None:
        self.engine, self.chat = engine, chat
        self.tools = Tools() if tools is None else tools
        self._stops = (chat.end_of_turn, chat.bos)
        self._running: dict[Request, Answer] = {}
        self._calling: dict[Future[str], Answer] = {}
        self._threads: ThreadPoolExecutor | None = None

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Answer:
        """Queues an answer to the ids `prompt`. Raises ValueError as Engine.submit does."""
        answer = Answer(list(prompt), sampling)
        self._submit(answer)
        return answer

    @property
    def busy(self) -> bool:
        """Whether any answer waits, grows or has a tool running."""
        return bool(self._running or self._calling)

    def cancel(self, answer: Answer) -> None:
        """Ends `answer` now; its slot is free at once, and what a tool of it still does is for nothing."""
        for request, running in list(self._running.items()):
            if running is answer:
                self.engine.cancel(request)
                del self._running[request]
                answer.finish_reason = "cancelled"
        for call, caller in list(self._calling.items()):
            if caller is answer:
                call.cancel()
                del self._calling[call]
                answer.finish_reason = "cancelled"

    def step(self) -> list[tuple[Answer, list[int]]]:
        """Tools that are done, and one step of the engine; what each answer has got, outputs of tools included."""
        grown = self._finish_calls()
        for update in self.engine.step():
            request = update.request
            answer = self._running.get(request)
            if answer is None:
                continue
            before = len(answer.ids)
            call = self._take(answer, update.tokens)
            if call is not None:
                self.engine.cancel(request)
                del self._running[request]
                self._call(answer, call)
            elif request.finish_reason is not None:
                del self._running[request]
                answer.finish_reason, answer.error = request.finish_reason, request.error
            grown.append((answer, answer.ids[before:]))
        return grown

    def _take(self, answer: Answer, tokens: Sequence[int]) -> str | None:
        """Adds tokens, up to the first call that has an output or may have one; the text of that call."""
        first, last = (self.chat.ids[name] for name in PYTHON)
        for token in tokens:
            answer.ids.append(token)
            answer.drawn.append(1)
            if token != last:
                continue
            start = next((i for i in range(len(answer.ids) - 2, -1, -1) if answer.ids[i] in (first, last)), -1)
            if start < 0 or answer.ids[start] != first:
                continue  # an end without a beginning
            call = self.chat.tokenizer.decode(answer.ids[start + 1 : -1])
            if self.tools.python is not None or self.tools.calculate(call) is not None:
                return call
        return None

    def _call(self, answer: Answer, call: str) -> None:
        """Goes on with the output of `call`, or lets a thread find it."""
        output = self.tools.calculate(call)
        if output is not None:
            self._put(answer, output)
            self._submit(answer)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(TOOLS_AT_ONCE, "tool")
        self._calling[self._threads.submit(self.tools.run_python, call)] = answer

    def _finish_calls(self) -> list[tuple[Answer, list[int]]]:
        """Puts the outputs of tools that are done; what each answer has got. Waits a little if that is all to do."""
        if not self._calling:
            return []
        done = wait(self._calling, 0 if self.engine.busy else PATIENCE_S, FIRST_COMPLETED).done
        grown = []
        for call in [call for call in self._calling if call in done]:
            answer, error = self._calling.pop(call), call.exception()
            before = len(answer.ids)
            if error is not None:
                answer.finish_reason, answer.error = "error", f"a tool failed: {type(error).__name__}: {error}"
            else:
                self._put(answer, call.result())
                self._submit(answer)
            grown.append((answer, answer.ids[before:]))
        return grown

    def _put(self, answer: Answer, output: str) -> None:
        forced = self.chat.output(output)[: answer.sampling.max_tokens - len(answer.ids)]
        answer.ids += forced
        answer.drawn += [0] * len(forced)
        answer.calls += 1

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


class Piece(NamedTuple):
    """Some text of an answer. `opens`: it begins a part of its kind; without it, it goes on with the part before."""

    kind: Literal["text", "python", "python_output"]
    text: str
    opens: bool


class PieceStream:
    """The parts of one answer as its ids come, as Chat.parse_answer has them at the end; no character is cut in two."""

    def __init__(self, chat: Chat) -> None:
        self._tokenizer = cast(Tokenizer, chat.tokenizer)  # of which no more than decoding is used
        self._specials = set(chat.ids.values())
        self._opening: dict[int, tuple[Any, int]] = {
            chat.ids[first]: (kind, chat.ids[last]) for kind, (first, last) in ENCLOSED.items()
        }
        self._kind: Literal["text", "python", "python_output"] = "text"
        self._last: int | None = None  # the id that ends this part
        self._opens = True
        self._text = TextStream(self._tokenizer)

    def push(self, ids: Sequence[int]) -> list[Piece]:
        """What `ids` make certain, in order."""
        pieces = []
        for token in ids:
            if token == self._last:
                pieces += self.flush()
                self._kind, self._last, self._opens = "text", None, True
            elif self._last is None and token in self._opening:
                pieces += self.flush()
                self._kind, self._last = self._opening[token]
                self._opens = False  # as this piece says
                pieces.append(Piece(self._kind, "", True))
            elif token not in self._specials:
                pieces += self._piece(self._text.push(token))
        return pieces

    def flush(self) -> list[Piece]:
        """What is left of this part when nothing follows: half a character becomes U+FFFD."""
        left = self._piece(self._text.flush())
        self._text = TextStream(self._tokenizer)
        return left

    def _piece(self, text: str) -> list[Piece]:
        if not text:
            return []
        piece = Piece(self._kind, text, self._opens)
        self._opens = False
        return [piece]
