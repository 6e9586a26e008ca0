"""Processes: the one place that reads what torchrun tells them and touches torch.distributed.

team.py        the processes of a run, and what they agree on
split.py       who holds which rectangle of which matrix; the model wrapped, in one visible order
optimizer.py   the optimizer whose state is shared out: 1/world of it on each rank
saving.py      checkpoints that every rank writes its part of, through torch.distributed.checkpoint
"""

from __future__ import annotations

import os
from dataclasses import dataclass


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
