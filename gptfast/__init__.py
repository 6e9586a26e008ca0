"""A GPT to train and sample: model, optimizers, data, checkpoints and measures. Built on `kernels`."""

import os
import signal
import sys
from types import FrameType

COMMANDS = ("gptfast", "train", "bench")


def leave_at_once(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C while a command is still importing: one line, and the code of an interrupted command."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


# While `python -m` looks for the page of a command, argv[0] is "-m". From here until cli.run takes over, Ctrl-C would
# be a traceback out of some half-imported library.
if (
    sys.argv[:1] == ["-m"]
    and any(name.split(".")[0] in COMMANDS for name in sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1])
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, leave_at_once)
