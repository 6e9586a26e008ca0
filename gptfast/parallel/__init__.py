"""Parallel training: the only package that reads torchrun's settings and uses torch.distributed.

team.py        the processes of a run, and their collectives
split.py       how matrices are split over ranks; wraps the model
optimizer.py   the sharded optimizer, with 1/world of the state on each rank
saving.py      checkpoints written in parts by every rank, through torch.distributed.checkpoint; parts.py reads them
"""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Launch:
    """A process's settings from torchrun; the defaults are those of a process started alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    attempt: int = 0  # how many times torchrun has started the ranks again
    by_torchrun: bool = False


def launch() -> Launch:
    """Returns this process's settings from torchrun, or those of a single process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Launch()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    rank, size, local_rank, local_size, attempt = (int(os.environ[name]) for name in names)
    return Launch(rank, size, local_rank, local_size, attempt, by_torchrun=True)


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code; a torchrun rank exits without finalizing the interpreter.

    A gloo thread may still be releasing a tensor, for which it needs the interpreter's lock. If the interpreter is
    already finalized, the thread is killed and the process aborts after all its work is done ("terminate called without
    an active exception"; torch 2.13, 1 run in 10 on a busy machine).
    """
    if launch().by_torchrun:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)
