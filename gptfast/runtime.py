"""Adapts a run to the machine: the process's threads and memory, the device, and the dtype to compute in.

Nothing here imports torch at module level, because `bound_spinning` must run before torch loads its thread pool.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptfast.errors import UserError

if TYPE_CHECKING:
    import torch

    from kernels import Ops

# Spins of a GNU OpenMP thread (torch's pool) at a barrier before it sleeps. The default of 300,000 takes some
# milliseconds, and all of them pass at each operation while another program has the core that the barrier waits for.
# On 2 cores beside four busy processes, a training step of char-cpu takes 412 ms by default and 212 ms with 1,000
# spins; on an idle machine 52 and 82 ms, because sleeping threads have to be woken.
SPIN_TURNS = 1000


# Freed memory that glibc keeps (M_TRIM_THRESHOLD), and the largest allocation that it serves from it (M_MMAP_THRESHOLD,
# at most this much). Both defaults are small, so that activations get new pages at each step, cleared one by one: a
# step of cpu-sprint then has 900 page faults and takes a fifth longer; with these settings it has none.
KEPT_BYTES, M_TRIM_THRESHOLD = 2**29, -1


SERVED_BYTES, M_MMAP_THRESHOLD = 2**25, -3


def set_up_process() -> None:
    """Sets threads and memory for training; every command of this library calls it before it imports torch."""
    bound_spinning()
    keep_memory()


def keep_memory() -> bool:
    """Makes the process keep freed memory for the next step. Returns False where the C library has no such setting.

    If the user has set MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_, neither is changed.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return True
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(
        mallopt(*setting) == 1 for setting in ((M_TRIM_THRESHOLD, KEPT_BYTES), (M_MMAP_THRESHOLD, SERVED_BYTES))
    )


def bound_spinning() -> bool:
    """Limits the spinning of CPU threads on a busy machine, where other programs need their cores.

    Must be called before torch loads its thread pool; returns True if it was. The user's own GOMP_SPINCOUNT or
    OMP_WAIT_POLICY is respected.
    """
    if "OMP_WAIT_POLICY" not in os.environ and 2 * others_running() >= (os.cpu_count() or 1):
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_TURNS))
    return "torch" not in sys.modules


def spin_turns() -> int | None:
    """Returns the bound in force, or None."""
    turns = os.environ.get("GOMP_SPINCOUNT", "")
    return int(turns) if turns.isdecimal() else None


def threads_beside_requests(cores: int) -> int:
    """Returns how many CPU threads a served model takes: all cores but one, which HTTP needs.

    Where both want the last core, each step waits for a thread that is not running: on two cores a server of a small
    model gave 1,027 tokens/s by one thread and 648 by two.
    """
    return max(1, cores - 1)


def others_running(loadavg: Path = Path("/proc/loadavg")) -> int:
    """Returns how many other threads are runnable now; 0 where the system (not Linux) does not say."""
    try:
        running, _, _ = loadavg.read_text().split()[3].partition("/")
        return int(running) - 1
    except (OSError, IndexError, ValueError):
        return 0


def made_current(name: str) -> torch.device:
    """Returns the device of that name; makes an existing, numbered GPU the current one for streams and launches.

    Raises UserError for a name torch does not know.
    """
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):  # argparse makes a list of `--device=--`
        raise UserError(f"--device={str(name)[:80]}: unknown device; use cuda, cuda:N or cpu") from None
    if device.type == "cuda" and device.index is not None and device.index < torch.cuda.device_count():
        torch.cuda.set_device(device)
    return device


def choose_device(name: str, *, typed: bool) -> str:
    """Checks and returns the device to run on; makes a GPU the current device, so that plain "cuda" means it.

    If the default GPU is missing, falls back to the CPU and prints so.

    Raises UserError for a missing device that the user typed, and for a name torch does not know.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name}: unknown device; use cuda, cuda:N, mps or cpu") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) < count:
            made_current(name)
            return name
        if typed:
            available = f"GPUs here: {count}" if count else "there is no CUDA GPU here"
            raise UserError(f"--device={name}: {available}; use --device={'cuda:0' if count else 'cpu'}")
        print("device: cpu, because there is no CUDA GPU here (--device=cpu says so by itself)")
        return "cpu"
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={name}: this torch has no MPS here; use --device=cpu")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"--device={name}: gptfast runs on cuda, mps and cpu; use --device=cpu")
    return name


def choose_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """Returns the dtype of activations for `--dtype=name` on `device`, and why. auto: the fastest that trains well."""
    import torch

    return compute_dtype(device) if name == "auto" else (getattr(torch, name), "asked for")


def choose_ops(name: str, device: str) -> Ops:
    """Returns the implementations for `--kernels=name` on `device`. Raises UserError for a choice that cannot run."""
    import torch

    import kernels

    if name == "auto" and torch.cuda.is_available() and not device.startswith("cuda"):
        name = "cpu"  # auto would choose for a GPU that this run does not use
    try:
        return kernels.load(name)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--kernels={name}: {error}") from None


def compute_dtype(device: str) -> tuple[torch.dtype, str]:
    """Returns the fastest dtype of activations in which `device` trains well, and a line for the log that says why."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bfloat16 matrix units"
        return torch.float16, "the GPU has no bfloat16 matrix units"
    if kind == "cpu":
        if torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "the CPU has bfloat16 matrix units (AMX)"
        if torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16, "the CPU has bfloat16 dot products (AVX512-BF16)"
        return torch.float32, "the CPU has no native bfloat16"
    return torch.float32, f"{kind} is not known to train well in less"
