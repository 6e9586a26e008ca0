"""Processes: the one place that reads what torchrun tells them and touches torch.distributed.

team.py        the processes of a run, and what they agree on
split.py       who holds which rectangle of which matrix; the model wrapped, in one visible order
optimizer.py   the optimizer whose state is shared out: 1/world of it on each rank
saving.py      checkpoints that every rank writes its part of, through torch.distributed.checkpoint; parts.py reads them
"""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process; the values of a process that it did not start."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    attempt: int = 0  # how many times torchrun has started the ranks again
    by_torchrun: bool = False


def launch() -> Launch:
    """This process as torchrun started it, or alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Launch()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    rank, size, local_rank, local_size, attempt = (int(os.environ[name]) for name in names)
    return Launch(rank, size, local_rank, local_size, attempt, by_torchrun=True)


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code; a rank of torchrun's ends without finalizing the interpreter.

    A thread of gloo's may still be releasing a tensor, for which it needs the interpreter's lock. Where the interpreter
    is gone, the thread is ended by force, and the process aborts after all its work is done ("terminate called without
    an active exception"; torch 2.13, 1 run in 10 on a busy machine).
    """
    if launch().by_torchrun:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)
