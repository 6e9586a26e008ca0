"""How a conversation looks: in a terminal, with colours, history and keys; and through pipes, as plain text.

Through pipes stdout holds what the model says and nothing else; tools and notes go to stderr. A terminal shows all of
it where it happens, and letters that would steer the terminal, or turn the direction of text, as their numbers.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from gptfast import untrusted
from gptfast.chat.parts import Piece
from gptfast.errors import UserError

LARGEST_HISTORY = 2**24  # bytes
BLOCK = '"""'  # begins and ends a message of several lines
JOINERS = "\u200c\u200d"  # which letters and emoji are written with
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
FIRST = {"python": "  >>> ", "python_output": "      "}  # what stands before a part's first line
NEXT = {"python": "  ... ", "python_output": "      "}


def visible(text: str) -> str:
    """`text` with control, direction and invisible letters as <U+001B>, save newline, tab and joiners."""
    return "".join(letter if _is_harmless(letter) else f"<U+{ord(letter):04X}>" for letter in text)


def _is_harmless(letter: str) -> bool:
    return letter in "\n\t" or letter in JOINERS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


class Pipes:
    """Messages are lines of stdin: one that ends with a backslash goes on, and a block stands between triple quotes."""

    is_terminal = False

    def __init__(self) -> None:
        self._kind = "text"
        self._held = ""  # newlines that only count if more follows
        self._begun: set[TextIO] = set()  # the streams whose last line has not ended

    # ---- messages in -------------------------------------------------------------------------------------------------
    def read(self) -> str:
        """The next message. Raises EOFError where there is none."""
        line = self._line(first=True)
        if line.strip().startswith(BLOCK):
            lines = [line.strip().removeprefix(BLOCK)]
            while not lines[-1].rstrip().endswith(BLOCK):
                lines.append(self._line(first=False))
            lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
            return "\n".join(lines).strip("\n")
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line(first=False))
        return "\n".join(lines)

    def _line(self, first: bool) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")

    # ---- answers out -------------------------------------------------------------------------------------------------
    def show(self, piece: Piece) -> None:
        """More of the answer."""
        if piece.kind != self._kind:
            self._begin(piece.kind)
        text = self._held + self._safe(piece.text)
        if piece.kind != "text":
            shown = text.rstrip("\n")
            self._held, text = text[len(shown) :], shown.replace("\n", f"\n{NEXT[piece.kind]}")
        self._write(text)

    def end(self) -> None:
        """The answer is complete."""
        self._begin("text")
        self._break()

    def note(self, text: str) -> None:
        """A line that is no answer."""
        print(text, file=sys.stderr, flush=True)

    def _begin(self, kind: str) -> None:
        if self._kind != "text" or (kind != "text" and self.is_terminal):
            self._break()
        self._kind, self._held = kind, ""
        if kind != "text":
            self._write(FIRST[kind])

    def _break(self) -> None:
        """Ends the line of this part's stream, if one is begun."""
        if self._stream() in self._begun:
            self._write("\n")

    def _write(self, text: str) -> None:
        stream = self._stream()
        stream.write(text)
        stream.flush()
        if text and not text.endswith("\n"):
            self._begun.add(stream)
        elif text:
            self._begun.discard(stream)

    def _stream(self) -> TextIO:
        return sys.stdout if self._kind == "text" else sys.stderr

    def _safe(self, text: str) -> str:
        return text


class Terminal(Pipes):
    """A line editor with history, by prompt_toolkit where it is installed, else by readline.

    In prompt_toolkit Alt-Enter or Ctrl-J begins a new line, and Tab completes `commands`. `history` is a file that
    keeps what was typed, or empty. Raises UserError where it cannot be written.
    """

    is_terminal = True

    def __init__(self, commands: Iterable[str], history: str = "") -> None:
        super().__init__()
        if history:
            try:
                _check_history(history)
            except (OSError, ValueError) as error:
                reason = untrusted.reason(error)
                raise UserError(f"--history={history}: cannot write it ({reason}); give another file") from None
        self._prompt = _toolkit(list(commands), history) or _readline(history)

    def _line(self, first: bool) -> str:
        return self._prompt("> " if first else "  ")

    def note(self, text: str) -> None:
        print(f"{DIM}{visible(text)}{PLAIN}", flush=True)

    def _begin(self, kind: str) -> None:
        if kind == "text" and self._kind != "text":
            sys.stdout.write(PLAIN)
        elif kind != "text" and self._kind == "text":
            self._break()
            sys.stdout.write(DIM)
        super()._begin(kind)

    def _stream(self) -> TextIO:
        return sys.stdout

    def _safe(self, text: str) -> str:
        return visible(text)


def _check_history(path: str) -> None:
    """Makes the file if it is not there. Raises OSError or ValueError if it cannot be written, or is none of ours."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(untrusted.NO_FILE)
        if about.st_size > LARGEST_HISTORY:
            raise ValueError(f"it has {about.st_size:,} bytes, where {LARGEST_HISTORY:,} are the most")
    finally:
        os.close(descriptor)


def _toolkit(commands: list[str], history: str) -> Callable[[str], str] | None:
    """prompt(before) by prompt_toolkit, None where it is not installed."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        return None
    keys = KeyBindings()

    @keys.add("c-j")
    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: Any = PromptSession(
        history=FileHistory(history) if history else InMemoryHistory(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        prompt_continuation="  ",
    )
    return lambda before: session.prompt(before)


def _readline(history: str) -> Callable[[str], str]:
    """prompt(before) by Python's own input, with readline's history where there is one."""
    with contextlib.suppress(ImportError):  # it edits the lines of `input`
        import readline

        if history:
            import atexit

            with contextlib.suppress(OSError):  # not one of readline's own
                readline.read_history_file(history)
            atexit.register(readline.write_history_file, history)
    return input
