"""What goes around an update (gptfast/step.py): nanoGPT's schedule, random streams, whether a compiler is there."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from gptfast.cli import UserError


class Schedule(Protocol):
    """What `learning_rate` reads; any configuration with these fields will do."""

    @property
    def decay_lr(self) -> bool: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_iters(self) -> int: ...
    @property
    def lr_decay_iters(self) -> int: ...
    @property
    def min_lr(self) -> float: ...


def learning_rate(iteration: int, schedule: Schedule) -> float:
    """Linear warm-up to `learning_rate`, half a cosine down to `min_lr` (Loshchilov & Hutter 2017), then `min_lr`."""
    peak, floor = schedule.learning_rate, schedule.min_lr
    warmup, end = schedule.warmup_iters, schedule.lr_decay_iters
    if not schedule.decay_lr:
        return peak
    if iteration < warmup:
        return peak * (iteration + 1) / (warmup + 1)
    if iteration > end:
        return floor
    progress = (iteration - warmup) / max(1, end - warmup)
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)


def check_compiler(device: str) -> None:
    """Raises UserError where --compile=True cannot work on `device`: on a CPU, torch.compile needs a C++ compiler."""
    if torch.device(device).type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        raise UserError(
            "--compile=True needs a C++ compiler on a CPU, and there is none; install g++, or give --compile=False"
        ) from None


def generator_state() -> dict[str, Tensor]:
    """The state of torch's generators, by device: uint8 tensors, to be saved beside the weights."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generator_state(state: dict[str, Any]) -> None:
    """Puts back what `generator_state` gave; a CUDA state is passed over where there is no GPU."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
