"""Threads, memory and processes: the one place that reads the environment and touches torch.distributed.

    team.py        the processes of a run, and what they agree on
    split.py       who holds which rectangle of which matrix; the model wrapped, in one visible order
    optimizer.py   the optimizer whose state is shared out: 1/world of it on each rank
    saving.py      checkpoints that every rank writes its part of, through torch.distributed.checkpoint

Nothing here imports torch at module level, because `bound_spinning` must run before torch loads its thread pool.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# Turns that a thread of GNU OpenMP, torch's pool, spins at a barrier before it sleeps. By default 300,000, some
# milliseconds, and while another program has the core that a barrier waits for, each operation burns them all. On 2
# cores beside four busy processes a training step of char-cpu takes 412 ms so, and 212 with 1,000 turns; but alone 52
# and 82, for threads that sleep between operations have to be woken.
SPIN_TURNS = 1000

# What of the freed memory glibc keeps (M_TRIM_THRESHOLD), and up to which size it hands out what it keeps
# (M_MMAP_THRESHOLD, at most this much): by default little of either, so that activations are new pages at each step,
# cleared one by one. A step of cpu-sprint has 900 page faults so and takes a fifth longer; without, none.
KEPT_BYTES, M_TRIM_THRESHOLD = 2**29, -1
SERVED_BYTES, M_MMAP_THRESHOLD = 2**25, -3


def settle() -> None:
    """What a command of this library does first, before it imports torch: threads and memory as training wants them."""
    bound_spinning()
    keep_memory()


def keep_memory() -> bool:
    """Let freed memory stay with the process, for the next step to take. False where the C library has no such knob.

    The user's own MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ stands, for both.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return True
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(
        mallopt(*setting) == 1 for setting in ((M_TRIM_THRESHOLD, KEPT_BYTES), (M_MMAP_THRESHOLD, SERVED_BYTES))
    )


def bound_spinning() -> bool:
    """On a busy machine, keep CPU threads from spinning while another program needs their core.

    To be called before torch loads its pool: True if it came in time. The user's own GOMP_SPINCOUNT or OMP_WAIT_POLICY
    stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ and 2 * others_running() >= (os.cpu_count() or 1):
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_TURNS))
    return "torch" not in sys.modules


def spin_turns() -> int | None:
    """The bound that is in force, None where there is none."""
    turns = os.environ.get("GOMP_SPINCOUNT", "")
    return int(turns) if turns.isdecimal() else None


def others_running(loadavg: Path = Path("/proc/loadavg")) -> int:
    """How many threads beside this one run, or want to, at this moment; 0 where the system (not Linux) does not say."""
    try:
        running, _, _ = loadavg.read_text().split()[3].partition("/")
        return int(running) - 1
    except (OSError, IndexError, ValueError):
        return 0


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
