"""Answers of an engine: tools are run and their output forced in, while others go on; and their parts as they come."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from scripted import scripted, told

from gptfast.chat.answers import Answers, answer_all
from gptfast.chat.conversation import SPECIAL_TOKENS, Chat, text_of
from gptfast.chat.parts import PartStream, Piece
from gptfast.chat.tools import Tools
from gptfast.engine import Sampling
from train.tokenizer import train_bpe

CALL, OUTPUT = ("python", "12*7"), ("python_output", "84")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_bpe(["What is 12*7? It is 84. print sleep naïve 日本語 🙂 " * 9], 300))


def prompt(chat: Chat, text: str) -> list[int]:
    return chat.prompt([{"role": "user", "content": text}])


def test_calls_are_run_and_their_output_forced_in(chat: Chat) -> None:
    encode, ids = chat.tokenizer.encode, chat.ids
    call = [ids["<|python_start|>"], *encode("12*7"), ids["<|python_end|>"]]
    forced, after = chat.output("84"), encode(" is it.")
    junk = [0] * len(forced)  # never drawn: the tool's output stands there
    # a call with no output is left alone, as is an end without a beginning; tokens of tools count
    bad = [ids["<|python_start|>"], *encode("nonsense"), ids["<|python_end|>"], ids["<|python_end|>"]]
    script = {
        "twice": [*call, *junk, *after, *call, *junk, *after, chat.end_of_turn],
        "bad": [*bad, *after, chat.end_of_turn],
    }
    answers = Answers(scripted(chat, script), chat)
    (answer,) = answer_all(answers, [(prompt(chat, "twice"), Sampling(max_tokens=100, seed=3))])
    assert answer.ids == [*call, *forced, *after] * 2
    assert answer.drawn == [*[1] * len(call), *[0] * len(forced), *[1] * len(after)] * 2
    assert answer.finish_reason == "stop" and answer.calls == 2
    content = chat.parse_answer(answer.ids)
    assert isinstance(content, list) and content[1] == {"type": "python_output", "text": "84"}
    assert text_of(content) == " is it. is it."
    (answer,) = answer_all(answers, [(prompt(chat, "bad"), Sampling(max_tokens=100))])
    assert answer.ids == [*bad, *after] and answer.calls == 0 and 0 not in answer.drawn
    (answer,) = answer_all(answers, [(prompt(chat, "twice"), Sampling(max_tokens=len(call) + 1))])
    assert answer.ids == [*call, forced[0]] and answer.finish_reason == "length"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


class Slow:
    """In place of a sandbox: it answers when it is told to, or has no process to run in."""

    def __init__(self) -> None:
        self.go, self.asked = threading.Event(), threading.Event()

    def run(self, call: str) -> Any:
        self.asked.set()
        assert self.go.wait(20)
        if call == "fail":
            raise OSError(11, "no more processes")
        return type("Result", (), {"text": f"ran {call}"})


def test_python_runs_while_others_go_on(chat: Chat, pool: ThreadPoolExecutor) -> None:
    """The call is seen before its output, its slot is free meanwhile, and the model hears of a failure."""
    ran = ("python_output", "ran sleep")
    script = {
        "slow": told(chat, ("python", "sleep"), ran, " Done."),
        "fail": told(chat, ("python", "fail"), ("python_output", "Python could not run: no more processes"), " Oh."),
        "quick": told(chat, " It is ", CALL, OUTPUT, "."),
    }
    slow = Slow()
    engine = scripted(chat, script, slots=1)
    answers = Answers(engine, chat, Tools(python=slow), pool=pool)  # type: ignore[arg-type]
    first, failing = (answers.submit(prompt(chat, text), Sampling(seed=1)) for text in ("slow", "fail"))
    while len(answers._calling) < 2:
        answers.step()
    assert slow.asked.wait(20) and not engine.running and first.finish_reason is None
    assert chat.parse_answer(first.ids) == [{"type": "python", "text": "sleep"}]
    quick = answers.submit(prompt(chat, "quick"), Sampling())
    while quick.finish_reason is None:
        answers.step()
    assert text_of(chat.parse_answer(quick.ids)) == " It is ." and first.finish_reason is None and answers.busy
    slow.go.set()
    while answers.busy:
        answers.step()
    assert first.ids == script["slow"][:-1] and first.finish_reason == "stop" and first.calls == 1
    assert failing.ids == script["fail"][:-1] and failing.finish_reason == "stop"


def test_an_answer_whose_tool_runs_can_be_cancelled(chat: Chat, pool: ThreadPoolExecutor) -> None:
    slow = Slow()
    script = {"slow": told(chat, ("python", "sleep"), ("python_output", ""), " Done.")}
    answers = Answers(scripted(chat, script), chat, Tools(python=slow), pool=pool)  # type: ignore[arg-type]
    answer = answers.submit(prompt(chat, "slow"), Sampling())
    while not answers._calling:
        answers.step()
    answers.cancel(answer)
    assert answer.finish_reason == "cancelled" and not answers.busy
    slow.go.set()
    assert answers.step() == [] and chat.parse_answer(answer.ids) == [{"type": "python", "text": "sleep"}]


def joined(pieces: list[Piece]) -> list[dict[str, str]]:
    """Neighbours of a kind as one part."""
    return [
        {"type": kind, "text": "".join(piece.text for piece in group)}
        for kind, group in itertools.groupby(pieces, lambda piece: piece.kind)
    ]


def parts_of(chat: Chat, ids: list[int]) -> list[dict[str, str]]:
    """The parts of a whole answer that have a text, neighbours of a kind as one."""
    content = chat.parse_answer(ids)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return joined([Piece(part["type"], part["text"]) for part in parts if part["text"]])


def test_pieces_add_up_to_the_parts(chat: Chat) -> None:
    """Of what a model should say, and of any ids in any order, whole characters at a time."""
    ids = told(chat, "naïve 日本語 ßéøÆ🙃 ", CALL, OUTPUT, "🙂", ("python", ""), ("python_output", ""))
    stream = PartStream(chat.tokenizer, chat)  # type: ignore[arg-type]
    pieces = [piece for token in ids for piece in stream.push([token])] + stream.flush()
    assert joined(pieces) == parts_of(chat, ids)
    assert not any("\ufffd" in piece.text for piece in pieces) and len(pieces) > 12
    draw = random.Random(1)
    for _ in range(300):
        some = [chat.ids[draw.choice(SPECIAL_TOKENS)] if draw.random() < 0.4 else draw.randrange(256) for _ in range(9)]
        stream = PartStream(chat.tokenizer, chat)  # type: ignore[arg-type]
        assert joined(stream.push(some) + stream.flush()) == parts_of(chat, some)
