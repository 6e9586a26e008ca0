"""Talk to a model in the terminal, or through pipes: `python -m gptfast.chat out-chat/rl`.

A line is a message. A line that ends with a backslash goes on, a message of several lines stands between triple quotes,
and in a terminal Alt-Enter begins a new line. Lines that begin with a slash are commands: /help lists them. Ctrl-C
stops an answer, Ctrl-D ends the program. Through pipes stdout holds the answers alone; `--prompt` asks one question.
"""

from __future__ import annotations

from gptfast.runtime import set_up_process

if __name__ == "__main__":
    set_up_process()

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Literal

from gptfast import cli, runtime
from gptfast.chat.answers import Answers
from gptfast.chat.conversation import Chat
from gptfast.chat.parts import Piece
from gptfast.chat.sandbox import Sandbox
from gptfast.chat.session import Session
from gptfast.chat.terminal import Pipes, Terminal
from gptfast.chat.tools import Tools
from gptfast.engine import Engine, Sampling
from gptfast.errors import UserError, nearest
from gptfast.sample import load_model

PAGE = 16  # tokens of the cache: in pages, so that what was said is not read again at every turn


@dataclass(frozen=True)
class ChatConfig:
    out_dir: str = "out-chat/rl"  # folder with the checkpoint of a model that was taught to converse
    init_from: str = "resume"  # resume (the checkpoint in out_dir), or a folder that transformers reads
    prompt: str = ""  # one message: its answer is printed, and that is all
    system: str = ""  # what the model is told before the first message
    temperature: float = 0.6  # below 1 more likely text, above 1 more varied; 0 always takes the likeliest token
    top_k: int = 50  # draw from the likeliest top_k tokens only; 0 draws from all
    top_p: float = 1.0  # draw from the likeliest tokens only that sum to this probability; 1 draws from all
    max_tokens: int = 256  # of an answer
    seed: int | None = None  # of the draws; none: new ones every time
    tools: Literal["auto", "python", "calculator", "none"] = "auto"  # auto: Python as well where a sandbox works
    load: str = ""  # file of a conversation to go on with, as /save writes it
    history: str = ""  # file that keeps what was typed for the next time; empty: nothing is kept
    device: str = "cuda"  # cuda, cuda:N, mps or cpu; the default becomes cpu, and says so, where there is no GPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; auto: the best this device has
    quantize: Literal["none", "int8"] = "none"  # int8: keep the weights in 8 bits
    kernels: Literal["auto", "reference", "triton", "interpret"] = "auto"  # which implementation of each op runs


def main(argv: list[str]) -> int:
    config = cli.parse(ChatConfig, argv, positional="out_dir")
    sampling = sampling_of(config)
    with contextlib.redirect_stdout(sys.stderr):  # where only the answers go to stdout
        engine, chat, about = open_model(config, typed="device" in cli.typed(argv, ChatConfig))
        tools, why = tools_of(config.tools)
    with ThreadPoolExecutor(1) as pool:
        session = Session(Answers(engine, chat, tools, pool=pool), sampling, config.system)
        if config.load:
            session.load(config.load)
        interactive = sys.stdin.isatty() and sys.stdout.isatty() and not config.prompt
        screen = Terminal(COMMANDS, config.history) if interactive else Pipes()
        if config.prompt:
            return 0 if answer(session, screen, session.ask(config.prompt)) else 130
        if interactive:
            screen.note(f"{about}; tools: {why}")
            screen.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        talk(session, screen)
    return 0


def sampling_of(config: ChatConfig) -> Sampling:
    """How answers are drawn. Raises UserError, naming the flag, for what cannot be drawn."""
    try:
        return Sampling(config.max_tokens, config.temperature, config.top_k, config.top_p, seed=config.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def open_model(config: ChatConfig, typed: bool) -> tuple[Engine, Chat, str]:
    """The engine, the rendering of conversations, and a line about the model."""
    device = runtime.choose_device(config.device, typed=typed)
    dtype, _ = runtime.choose_dtype(config.dtype, device)
    model, tokenizer = load_model(config.init_from, config.out_dir, runtime.choose_ops(config.kernels, device), dtype)
    chat = Chat(tokenizer)  # type: ignore[arg-type]  # a tokenizer without special tokens is refused there
    weights: Any = "int8" if config.quantize == "int8" else "auto" if config.dtype == "auto" else "model"
    engine = Engine(model.to(device), tokenizer=tokenizer, weights=weights, page_size=PAGE)
    name = config.out_dir if config.init_from == "resume" else config.init_from
    size = f"{model.num_params() / 1e6:.1f}M parameters"
    return engine, chat, f"{name}: {size}, context {model.config.block_size}, {engine.weights} weights on {device}"


def tools_of(name: str) -> tuple[Tools, str]:
    """The tools that `--tools=name` means, and in words. Raises UserError for Python where no sandbox works."""
    if name in ("none", "calculator"):
        return Tools(calculator=name == "calculator"), name
    try:
        sandbox = Sandbox()
    except UserError:
        if name == "python":
            raise
        return Tools(), "calculator (no sandbox for Python here; --tools=python says how to get one)"
    return Tools(python=sandbox), f"calculator, Python in a sandbox ({sandbox.kind})"


# ---- a conversation --------------------------------------------------------------------------------------------------


def talk(session: Session, screen: Pipes) -> None:
    """Answers messages and obeys commands until there are none."""
    while True:
        try:
            text = screen.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not screen.is_terminal:
                raise
            screen.note("Ctrl-D or /quit leaves")
            continue
        try:
            if not text.strip():
                continue
            if not text.startswith("/"):
                answer(session, screen, session.ask(text))
            elif not obey(session, screen, text):
                return
        except UserError as error:
            screen.note(f"error: {error}")


def answer(session: Session, screen: Pipes, pieces: Iterator[Piece]) -> bool:
    """Shows an answer as it comes, and how fast that was; False if Ctrl-C stopped it."""
    with stopped_by_ctrl_c(session):
        try:
            for piece in pieces:
                screen.show(piece)
        finally:
            screen.end()
    figures = session.figures
    assert figures is not None
    if figures.forgotten:
        screen.note(f"(the first {figures.forgotten} messages no longer fit the model's context)")
    screen.note(f"({figures})")
    return figures.finish_reason != "cancelled"


@contextlib.contextmanager
def stopped_by_ctrl_c(session: Session) -> Iterator[None]:
    """Ctrl-C ends the answer between two tokens, so that the engine stays whole; a second one ends the program."""
    pressed = 0

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        session.stop()
        if pressed > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---- commands --------------------------------------------------------------------------------------------------------

Command = Callable[[Session, Pipes, str], None]


def obey(session: Session, screen: Pipes, line: str) -> bool:
    """Does what a line that begins with a slash says; False if that is to leave. Raises UserError for a mistake."""
    name, _, argument = line.strip().partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name not in COMMANDS:
        raise UserError(f"unknown command {name[:40]}{nearest(name, COMMANDS)}")
    COMMANDS[name][1](session, screen, argument.strip())
    return True


def show_help(session: Session, screen: Pipes, argument: str) -> None:
    for name, (what, _) in COMMANDS.items():
        screen.note(f"{name:13} {what}")
    screen.note("a message that begins with a slash needs a space before it")


def clear(session: Session, screen: Pipes, argument: str) -> None:
    session.clear()
    screen.note("a new conversation")


def set_system(session: Session, screen: Pipes, argument: str) -> None:
    if argument:
        session.system = "" if argument == "none" else argument
    screen.note(f"system: {session.system or 'none'}")


def setting(name: str, kind: type) -> Command:
    """The command that shows a field of Sampling, or sets it."""

    def command(session: Session, screen: Pipes, argument: str) -> None:
        if argument:
            try:
                session.sampling = replace(session.sampling, **{name: kind(argument)})
            except (ValueError, OverflowError) as error:
                told = str(error).startswith(name)
                raise UserError(str(error) if told else f"{name}: expected a number, got {argument[:40]}") from None
        screen.note(f"{name}: {getattr(session.sampling, name)}")

    return command


def again(session: Session, screen: Pipes, argument: str) -> None:
    answer(session, screen, session.again())


def undo(session: Session, screen: Pipes, argument: str) -> None:
    screen.note(f"taken back: {session.undo()}")


def save(session: Session, screen: Pipes, argument: str) -> None:
    if not argument:
        raise UserError("/save needs a file: /save talk.jsonl")
    session.save(argument)
    screen.note(f"saved {len(session.messages)} messages in {argument}")


def load(session: Session, screen: Pipes, argument: str) -> None:
    if not argument:
        raise UserError("/load needs a file: /load talk.jsonl")
    count = session.load(argument)
    which = "" if count == 1 else f", the last of {count} conversations"
    screen.note(f"going on with {len(session.messages)} messages{which}")
    if session.turns:
        said = session.turns[-1]["content"]
        for part in [{"type": "text", "text": said}] if isinstance(said, str) else said:
            screen.show(Piece(part["type"], part["text"]))
        screen.end()


COMMANDS: dict[str, tuple[str, Command]] = {
    "/help": ("this list", show_help),
    "/clear": ("begin a new conversation", clear),
    "/system": ("show the system message, or set it: /system Be brief. (/system none removes it)", set_system),
    "/temperature": (
        "show it, or set it: /temperature 0.8; 0 always takes the likeliest token",
        setting("temperature", float),
    ),
    "/top_k": ("show it, or set it: /top_k 50; 0 draws from all tokens", setting("top_k", int)),
    "/top_p": ("show it, or set it: /top_p 0.9; 1 draws from all tokens", setting("top_p", float)),
    "/max_tokens": ("show it, or set it: /max_tokens 256, of an answer", setting("max_tokens", int)),
    "/again": ("another answer to the last message", again),
    "/undo": ("take the last message and its answer back", undo),
    "/save": ("write the conversation: /save talk.jsonl, which train.prepare chat reads", save),
    "/load": ("go on with a conversation: /load talk.jsonl", load),
    "/quit": ("leave, as Ctrl-D does", lambda session, screen, argument: None),
}

if __name__ == "__main__":
    sys.exit(cli.run(main))
