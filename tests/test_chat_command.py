"""`python -m gptfast.chat`: through pipes, as one question, and in a pty, with models that say what they are told."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, scripted, tiny, told

from gptfast import checkpoint, cli
from gptfast.chat import __main__ as command
from gptfast.chat import conversation, terminal
from gptfast.chat.answers import Answers
from gptfast.chat.conversation import Chat
from gptfast.chat.sandbox import Sandbox
from gptfast.chat.session import Session
from gptfast.chat.tools import Tools
from gptfast.engine import Sampling
from gptfast.errors import UserError
from gptfast.tokenizer import BPETokenizer
from train import prepare
from train.tokenizer import train_bpe

CALL, OUTPUT = ("python", "12*7"), ("python_output", "84")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe(["What is 12*7? It is 84. Hello there, good day, naïve 🙂 " * 9], 300)


@pytest.fixture(scope="module")
def chat(tokenizer: BPETokenizer) -> Chat:
    return Chat(tokenizer)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(script, typed, *flags) -> exit code, stdout, stderr: the command through pipes."""

    def run(script: dict[str, list[int]], typed: str, *flags: str, engine: Any = None) -> tuple[int, str, str]:
        model = engine or scripted(chat, script, slots=1)
        monkeypatch.setattr(command, "open_model", lambda config, typed: (model, chat, "a test"))
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = cli.run(command.main, ["--tools=calculator", *flags])
        return code, *capsys.readouterr()

    return run


# ---- through pipes


def test_stdout_holds_the_answers_alone(run: Run, chat: Chat, tmp_path: Path) -> None:
    script = {
        "hello": told(chat, "Hello there 🙂"),
        "What is\n12*7?": told(chat, "It is ", CALL, OUTPUT, "84."),
        "a\nb": told(chat, "good\nday"),
        " /is that": told(chat, "naïve"),
    }
    saved = tmp_path / "talk.jsonl"
    typed = f'hello\n\nWhat is\\\n12*7?\n"""\na\nb\n"""\n /is that\n/save {saved}\n/save {saved}\n'
    code, out, err = run(script, typed, "--system=", "--temperature=0")
    assert code == 0 and out == "Hello there 🙂\nIt is 84.\ngood\nday\nnaïve\n"
    assert "  >>> 12*7\n      84\n" in err and err.count("tokens/s") == 4 and err.count("saved 8 messages") == 2
    (messages,) = conversation.read(saved)
    assert messages[3]["content"][1] == {"type": "python", "text": "12*7"} and messages[4]["content"] == "a\nb"
    prepare.main(["chat", f"--source={saved}"])  # which would be an error for what is no conversation


def test_commands(run: Run, chat: Chat, tmp_path: Path) -> None:
    script = {"one": told(chat, "Hello"), "two": told(chat, "good day"), "Be good.\n\none": told(chat, "84")}
    saved, other = tmp_path / "talk.jsonl", tmp_path / "other.jsonl"
    other.write_text("not ours")
    nowhere = tmp_path / "none" / "a" / "talk.jsonl"
    typed = "\n".join(
        [
            "/temperature 0.5", "/temperature", "/temperature -1", "/temperature warm", "/top_k 3", "/top_k 1e400",
            "/top_p 2", "/max_tokens 64", "/nonsense", "/undo", "/save", f"/save {saved}", "one", "two",
            f"/save {nowhere}",
            "/again", "/undo", f"/save {saved}", f"/save {other}", "/clear", "/system Be good.", "one",
            "/system none", f"/load {saved}", "two", f"/load {other}", f"/load {tmp_path / 'none'}", "/help",
            "/quit", "one",
        ]
    )  # fmt: skip
    code, out, err = run(script, typed)
    assert code == 0 and out.splitlines() == ["Hello", "good day", "good day", "84", "Hello", "good day"]
    assert other.read_text() == "not ours" and [len(messages) for messages in conversation.read(saved)] == [2]
    assert not (tmp_path / "none").exists()
    lines = [line for line in err.splitlines() if not line.startswith("(")]
    expected = [
        "temperature: 0.5", "temperature: 0.5", "error: temperature: must be 0, or 1e-06 to 1e+06, got -1.0",
        "error: temperature: expected a number, got warm", "top_k: 3", "error: top_k: expected a number, got 1e400",
        "error: top_p: must be above 0 and at most 1, got 2.0", "max_tokens: 64", "error: unknown command /nonsense",
        "error: nothing has been said yet", "error: /save needs a file",
        "error: nothing has been said yet, so there is",
        f"error: {nowhere}: there is no folder {nowhere.parent}; make it",
        "taken back: two", f"saved 2 messages in {saved}",
        f"error: {other} is there already", "a new conversation",
        "system: Be good.", "system: none", "going on with 2 messages", f"error: {other}, line 1: no JSON",
        f"error: cannot read {tmp_path / 'none'}", *command.COMMANDS,
    ]  # fmt: skip
    for line, start in zip(lines, expected, strict=False):
        assert line.startswith(start), (line, start)
    assert len(lines) == len(expected) + 1


def test_one_question(run: Run, chat: Chat, tmp_path: Path) -> None:
    script = {"Be good.\n\nhello": told(chat, "Hello"), "more": told(chat, "good")}
    assert run(script, "more\n", "--prompt=hello", "--system=Be good.")[:2] == (0, "Hello\n")
    earlier = tmp_path / "talk.jsonl"
    earlier.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n')
    assert run(script, "", "--prompt=more", f"--load={earlier}")[:2] == (0, "good\n")
    code, out, err = run(script, "", f"--prompt={'x' * 600}")
    assert (code, out) == (2, "") and "604 tokens" in err and "512" in err and "make it shorter" in err
    assert "--top_p: must be above 0" in run(script, "", "--top_p=0")[2]


def test_a_model_that_knows_no_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(command.main, [str(tmp_path / "none"), "--device=cpu"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_python_runs_in_the_sandbox(run: Run, chat: Chat) -> None:
    try:
        Sandbox()
    except UserError as error:
        pytest.skip(str(error))
    parts = ("python", "print(sum(range(10)), len('naïve'))"), ("python_output", "45 5\n")
    code, out, err = run({"hello": told(chat, *parts, "So 45.")}, "hello\n", "--tools=python")
    assert (code, out) == (0, "So 45.\n") and "  >>> print(sum(range(10)), len('naïve'))\n      45 5\n(" in err


def test_python_is_refused_where_there_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptfast.chat.sandbox.why_not", lambda kind: "there is none")
    with pytest.raises(UserError, match="install bubblewrap"):
        command.tools_of("python")
    tools, why = command.tools_of("auto")
    assert tools.python is None and tools.calculator and "no sandbox" in why
    assert command.tools_of("none")[0] == Tools(calculator=False)


# ---- a session


def test_a_real_model_answers_alike_for_a_seed(chat: Chat, tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """From a checkpoint: the same seed gives the same conversation; another answer is another."""
    model = tiny(tokenizer, 128)
    meta: dict[str, Any] = {"model": vars(model.config), "tokenizer": tokenizer.to_json()}
    checkpoint.save(tmp_path, step=0, model=model.state_dict(), optimizer={}, meta=meta)
    engine, chat, about = command.open_model(command.ChatConfig(out_dir=str(tmp_path), device="cpu"), typed=True)
    assert "context 128" in about

    def talk(seed: int) -> list[dict[str, Any]]:
        session = Session(Answers(engine, chat), Sampling(8, 1.0, seed=seed))
        for pieces in (session.ask("Hello"), session.ask("What?"), session.again()):
            said = "".join(piece.text for piece in pieces)
        assert conversation.text_of(session.turns[-1]["content"]) in said
        return session.messages

    first = talk(1)
    assert first == talk(1) != talk(2) and [message["role"] for message in first] == ["user", "assistant"] * 2


def test_what_no_longer_fits_is_forgotten(chat: Chat) -> None:
    """The oldest first, never the system message; and the whole window is never exceeded."""
    texts = [f"{n} " + "x" * 50 for n in range(5)]
    script = {text: told(chat, "y" * 40) for text in texts} | {f"Be good.\n\n{text}": told(chat, "z") for text in texts}
    session = Session(Answers(scripted(chat, script, slots=1, block_size=256), chat), Sampling(60), system="Be good.")
    forgotten = []
    for text in texts:
        list(session.ask(text))
        assert session.figures is not None and session.figures.used <= 256
        forgotten.append(session.figures.forgotten)
    assert forgotten == sorted(forgotten) and 0 < forgotten[-1] < 8 and len(session.turns) == 10, forgotten


def test_an_error_of_the_engine_takes_the_message_back(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted(chat, {"hello": told(chat, "Hello")}, slots=1)
    session = Session(Answers(engine, chat))
    monkeypatch.setattr(engine, "next", lambda ids: -1)
    with pytest.raises(UserError, match="not numbers"):
        list(session.ask("hello"))
    assert session.turns == [] and not engine.running
    monkeypatch.undo()
    assert "".join(piece.text for piece in session.ask("hello")) == "Hello"


def test_a_reader_who_leaves_frees_the_slot(chat: Chat) -> None:
    engine = scripted(chat, {"hello": told(chat, "Hello there")}, slots=1)
    session = Session(Answers(engine, chat))
    pieces = session.ask("hello")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert not engine.running and "Hello there".startswith(session.turns[-1]["content"])


class Interrupted(Scripted):
    """Ctrl-C comes while the answer's fourth token is drawn."""

    def next(self, ids: Sequence[int]) -> int:
        if len(ids) - ids[::-1].index(self.chat.ids["<|assistant_start|>"]) - len(ids) == -3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().next(ids)


def test_ctrl_c_stops_the_answer_and_not_the_program(run: Run, chat: Chat, tokenizer: BPETokenizer) -> None:
    engine = Interrupted(tiny(tokenizer), tokenizer=tokenizer, weights="model")
    engine.chat, engine.script = chat, {"hello": told(chat, "x" * 50), "more": told(chat, "y")}
    before = signal.getsignal(signal.SIGINT)
    code, out, err = run({}, "hello\nmore\n", engine=engine)
    first, second = out.splitlines()
    assert code == 0 and second == "y" and set(first) == {"x"} and len(first) < 10 and ", stopped" in err
    assert signal.getsignal(signal.SIGINT) is before
    assert run({}, "", "--prompt=hello", engine=engine)[0] == 130


def test_nothing_steers_the_terminal() -> None:
    hostile = "\x1b]0;title\x07 \x1b[2J\x9b31m a\u202eb\u2066c\u200bd \rover \x00\u2028\ud800"
    shown = terminal.visible(hostile)
    assert shown.isprintable() and "<U+001B>]0;title<U+0007>" in shown and "a<U+202E>b<U+2066>c<U+200B>d" in shown
    honest = "naïve 日本語 🙂 👩\u200d🚀\n\tif x:\u00a0"
    assert terminal.visible(honest) == honest


# ---- in a terminal

READY = r"(\x1b\[\?2004h[^>]*|\n)>"  # the line editor has taken over

PROGRAM = """
import sys, time
sys.path[:0] = {paths!r}
{before}
from scripted import Scripted, tiny, told
from gptfast import cli
from gptfast.chat import __main__ as command
from gptfast.chat.conversation import Chat
from train.tokenizer import train_bpe

class Slow(Scripted):
    def next(self, ids):
        time.sleep(0.02)
        return super().next(ids)

tokenizer = train_bpe(["What is 12*7? It is 84. Hello there, good day, " * 9], 290)
chat = Chat(tokenizer)
engine = Slow(tiny(tokenizer), tokenizer=tokenizer, weights="model")
engine.chat = chat
engine.script = dict(
    hello=told(chat, "It is ", ("python", "12*7"), ("python_output", "84"), "eighty \\x1b[31mfour"),
    long=told(chat, "la " * 150),
)
engine.script["two\\nlines"] = told(chat, "both seen")
command.open_model = lambda config, typed: (engine, chat, "a test")
sys.exit(cli.run(command.main, ["--tools=calculator", *sys.argv[1:]]))
"""


class Pty:
    """A program in a terminal of its own."""

    def __init__(self, program: str, *flags: str) -> None:
        self.process, self.descriptor = 0, 0
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "100", "LINES": "40"}
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            os.execve(sys.executable, [sys.executable, "-c", program, *flags], environment)
        self.said = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait(self, pattern: str, seconds: float = 60) -> str:
        """What was said since the last wait, up to the end of `pattern`."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.said)):
            assert time.monotonic() < deadline, f"{pattern} did not come; there is {self.said[-2000:]!r}"
            if select.select([self.descriptor], [], [], 0.5)[0]:
                try:
                    self.said += os.read(self.descriptor, 65536).decode("utf-8", "replace")
                except OSError:  # the program has ended
                    assert re.search(pattern, self.said), f"ended before {pattern}: {self.said[-2000:]!r}"
        before, self.said = self.said[: match.end()], self.said[match.end() :]
        return before

    def interrupt(self, typed: str, pattern: str) -> str:
        """Ctrl-C at the prompt, again if need be: CPython's readline misses one between its prompt and its select."""
        for _ in range(10):
            self.type(typed + "\x03")
            with contextlib.suppress(AssertionError):
                return self.wait(pattern, 5)
        return self.wait(pattern)

    def leave(self) -> int:
        """The exit code, once all that it says is read."""
        try:
            while os.read(self.descriptor, 65536):
                pass
        except OSError:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.parametrize("editor", ["prompt_toolkit", "readline"])
def test_in_a_terminal(editor: str, tmp_path: Path) -> None:
    """The stream, tools as they run, the figures, a stopped answer, several lines, history, and the way out."""
    if editor == "prompt_toolkit":
        pytest.importorskip("prompt_toolkit")
    before = "" if editor == "prompt_toolkit" else "sys.modules['prompt_toolkit'] = None"
    paths = [str(ROOT), str(ROOT / "tests")]
    screen = Pty(PROGRAM.format(paths=paths, before=before), f"--history={tmp_path / 'typed'}")
    screen.wait("Ctrl-D leaves")
    screen.wait(READY)
    screen.type("hello\r")
    said = screen.wait(r"tokens/s.*?\)")
    assert re.search(r"It is \s*\x1b\[2m\s+>>> 12\*7\s+84\s*\x1b\[0m\s+eighty <U\+001B>\[31mfour", said), said
    screen.wait(READY)
    screen.type("long\r")
    screen.wait("la la")
    screen.type("\x03")
    assert len(screen.wait(r", stopped\)")) < 400
    screen.wait(READY)
    screen.type("two\x1b\rlines\r" if editor == "prompt_toolkit" else "two\\\rlines\r")
    screen.wait("both seen")
    screen.wait(READY)
    screen.type("\x1b[A\x1b[A\x1b[A\r")  # up, to "long"; one is a line of the message between
    screen.wait("la la la")
    screen.type("\x03")
    screen.wait("stopped")
    screen.wait(READY)
    screen.interrupt("half", "Ctrl-D or /quit leaves")
    screen.wait(READY)
    screen.type("\x04")
    assert screen.leave() == 0
    assert "hello" in (tmp_path / "typed").read_text()
