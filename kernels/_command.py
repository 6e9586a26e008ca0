"""Start and end of this package's commands: `python -m kernels`, `kernels.proof.aot`, `kernels.proof.traffic`.

It does for them what gptfast.cli, which this package may not import, does for all others.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType


def leave_at_once(signum: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C while a command is still importing: print one line, exit as an interrupted command does."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


# While `python -m` looks for the page of a command, argv[0] is "-m"; see gptfast/__init__.py.
if (
    sys.argv[:1] == ["-m"]
    and any(name.split(".")[0] == "kernels" for name in sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1])
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, leave_at_once)


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C: raise KeyboardInterrupt, but leave at once from an import, where libraries in C++ would abort."""
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename == "<frozen importlib._bootstrap>":
            leave_at_once(signum, frame)
        caller = caller.f_back
    raise KeyboardInterrupt


def run(main: Callable[[], int]) -> int:
    """Returns the exit code of `main`; 130 after Ctrl-C, 1 if the output cannot be written, each with one line."""
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal lacks is no reason to stop
    failures: list[OSError] = []  # errors of writing the output, which argparse swallows
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        write = sys.stdout.write

        def noted(text: str) -> int:
            try:
                return write(text)
            except OSError as error:
                failures.append(error)
                raise

        sys.stdout.write = noted  # type: ignore[method-assign]
    code = 1
    try:
        try:
            code = main()
        except SystemExit as end:  # --help and argparse's errors
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            failures.append(error)
        if not failures:
            if error.filename is None:
                raise
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
    if failures:
        if not isinstance(failures[0], BrokenPipeError):
            print(f"error: cannot write the output: {failures[0].strerror}", file=sys.stderr)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return code or 1
    return code
