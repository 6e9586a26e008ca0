"""One step of training, and what goes around it; pretrain and speedrun share this page.

A batch is a pair of int64 tensors, `tokens, targets: (B, T)`, with `targets[b, t] = tokens[b, t + 1]` in the stream,
and where documents are packed (gptfast/packing.py) their cu_seqlens besides.
Only a guard reads numbers back from the device, once before each update; else losses stay tensors until someone prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gptfast.cli import UserError
from gptfast.optim import clip_grad_norm
from gptfast.parallel.team import ALONE, Team
from train.guard import Batch, Guard

if TYPE_CHECKING:
    from gptfast.parallel.optimizer import ShardedOptimizer

TRACE_GRAD = "trace_autograd_ops"  # torch 2.13's switch that lets a compiled graph hold its own backward


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


def make_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    accumulation: int = 1,
    clip: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    guard: Guard | None = None,
    compiled: bool = False,
) -> Callable[[Iterator[Batch]], Tensor]:
    """The function that makes one update from the next batches, as `step` does; compiled where asked for.

    On a CPU, forward, backward and clipping are one graph, for at sizes that a CPU trains much of an iteration passes
    between the kernels. Elsewhere, and with accumulation, forward and backward are compiled each by itself.
    """
    on_cpu = parameters(optimizer)[0].device.type == "cpu"
    if compiled and on_cpu and accumulation == 1 and scaler is None and hasattr(torch._dynamo.config, TRACE_GRAD):
        return _one_graph(model, optimizer, clip, guard)
    forward = torch.compile(model) if compiled else model
    return partial(step, forward, optimizer, accumulation=accumulation, clip=clip, scaler=scaler, guard=guard)


def step(
    model: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    *,
    accumulation: int = 1,
    clip: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    guard: Guard | None = None,
) -> Tensor:
    """One update from the next `accumulation` micro-batches; returns their mean loss, () fp32 on the device, detached.

    The gradient is that of the mean over micro-batches, so one batch of A·B rows and A batches of B rows give the same
    update. `clip` bounds the norm of the whole gradient (0 leaves it alone). `scaler` is for fp16; it passes over
    gradients that overflow. `guard` may refuse the update, or stop the run by raising Refused.
    """
    losses, taken = [], []
    for batch in islice(batches, accumulation):
        loss = model(*batch)
        losses.append(loss.detach())
        taken.append(tuple(batch))
        share = loss / accumulation if accumulation > 1 else loss
        (share if scaler is None else scaler.scale(share)).backward()
    mean = losses[0] if accumulation == 1 else torch.stack(losses).mean()
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = clip_grad_norm(parameters(optimizer), clip) if clip > 0 or guard is not None else mean.new_zeros(())
    if guard is None or guard.allows(mean.item(), norm.item() if scaler is None else 0.0, taken):
        optimizer.step() if scaler is None else scaler.step(optimizer)
    if scaler is not None:
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean


def parallel_step(
    optimizer: ShardedOptimizer, batches: Iterator[Batch], *, accumulation: int, clip: float, guard: Guard
) -> Tensor:
    """`step` on every rank of a team, each with `accumulation` micro-batches of its own; returns the mean over all."""
    losses, taken = [], []
    for i, batch in enumerate(islice(batches, accumulation), 1):
        optimizer.sync_gradients(i == accumulation)
        loss = optimizer.called(*batch)
        losses.append(loss.detach())
        taken.append(tuple(batch))
        (loss / accumulation).backward()
    mean = optimizer.team.mean(torch.stack(losses).mean())
    norm = optimizer.clip_grad_norm(clip)
    if guard.allows(mean.item(), norm.item(), taken):
        optimizer.step()
    optimizer.zero_grad()
    return mean


def _one_graph(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float, guard: Guard | None
) -> Callable[[Iterator[Batch]], Tensor]:
    """`step` with one micro-batch, everything before the optimizer compiled as a single graph."""
    trained = parameters(optimizer)
    setattr(torch._dynamo.config, TRACE_GRAD, True)

    @torch.compile(fullgraph=True)
    def differentiate(*batch: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        loss = model(*batch)
        gradients = list(torch.autograd.grad(loss, trained))
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if clip > 0:
            gradients = list(torch._foreach_mul(gradients, (clip / (norm + 1e-6)).clamp(max=1.0)))
        return loss.detach(), norm, gradients

    def compiled_step(batches: Iterator[Batch]) -> Tensor:
        batch = next(batches)
        loss, norm, gradients = differentiate(*batch)
        if guard is not None and not guard.allows(loss.item(), norm.item(), [tuple(batch)]):
            return loss
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return compiled_step


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that the optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group the rate `rate`, times the group's own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        scaled = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Iterable[Batch], team: Team = ALONE) -> Tensor:
    """Mean loss per token over `batches`, () fp32, in eval mode; draws nothing from torch's global generator.

    Every rank of a team is given all batches and evaluates its share of them, each equally many.
    """
    was_training = model.training
    model.eval()
    losses, counts = [], []
    stream = iter(batches)
    while turn := list(islice(stream, team.data_size)):
        batch = turn[min(team.data_rank, len(turn) - 1)]
        losses.append(model(*batch).float())
        counts.append(batch[1].numel() if team.data_rank < len(turn) else 0)  # the last turn may be short
    model.train(was_training)
    per_batch = torch.stack(losses)
    weights = torch.tensor(counts, dtype=torch.float32, device=per_batch.device)
    return team.mean((per_batch * weights).sum()) / team.mean(weights.sum())


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
