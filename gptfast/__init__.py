"""A GPT to train and sample: model, optimizers, data, checkpoints and measures. Built on `kernels`."""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType

COMMANDS = ("gptfast", "train", "bench")


def leave_at_once(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C while a command is still importing: one line, and the code of an interrupted command."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


# While `python -m` looks for the page of a command, argv[0] is "-m". From here until cli.run takes over, Ctrl-C would
# be a traceback out of some half-imported library.
_IS_COMMAND = sys.argv[:1] == ["-m"] and any(
    name.split(".")[0] in COMMANDS for name in sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1]
)
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave_at_once)


def _foreign_kernels() -> str:
    """What is wrong if `import kernels` finds another package than the one beside this: Hugging Face has one too."""
    ours = Path(__file__).resolve().parents[1] / "kernels" / "__init__.py"
    found = sys.modules["kernels"].__spec__ if "kernels" in sys.modules else importlib.util.find_spec("kernels")
    origin = None if found is None else found.origin
    if origin is not None and Path(origin).resolve() == ours:
        return ""
    return (
        f"gptfast needs its own package kernels, {ours.parent}, but Python finds {origin or 'none'} under that name; "
    )


if _problem := _foreign_kernels():
    _problem += "put the folder of gptfast before that one in sys.path, or remove the other package"
    if _IS_COMMAND:
        sys.exit(f"error: {_problem}")
    raise ImportError(_problem)
