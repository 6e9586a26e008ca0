"""One update of the weights, shared by training and bench.

    step = Step(language_model(model), optimizer, accumulation=4, clip=1.0, guard=guard)
    loss = step(batches)                      # the mean over all counted targets, () fp32, on the device

An objective is a function of a batch that returns (sum of losses, number of counted targets). The gradient is that of
sum / count over all micro-batches and ranks together, so that it does not depend on how targets are spread over them:

    loss = sum_i / (A numel)                  for micro-batch i of A; numel counts all of a batch's targets
    g    = A numel / count · sum_i d loss     the factor is exactly 1 if every target counts
    g    = min(1, clip / |g|) g

Nothing here waits for the device. The device itself decides whether to take an update (loss and gradient are finite,
the loss is no spike), and an optimizer with `found_inf` skips a refused one. The host reads the verdict one update
late; until then the device refuses every update after one that must stop the run.

With `graph` the update is one CUDA graph; see Capture.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gptfast.model import IGNORED
from gptfast.optim import clip_coefficient, grad_norm

Batch = tuple[Tensor, ...]  # tokens, targets: (B, T) int64; where documents are packed, cu_seqlens
Objective = Callable[..., tuple[Tensor, "Tensor | int"]]

TRACE_GRAD = "trace_autograd_ops"  # torch 2.13's option to trace the backward pass into a compiled graph
WARM_UPS = 3  # refused updates before a capture, which compile, tune and allocate


def language_model(model: Callable[..., Tensor]) -> Objective:
    """Returns the objective of next-token prediction; `model` is a GPT or a wrapped one."""

    def objective(tokens: Tensor, targets: Tensor, *packed: Tensor) -> tuple[Tensor, Tensor]:
        return model(tokens, targets, *packed, reduction="sum"), (targets != IGNORED).sum()

    return objective


class Watch(Protocol):
    """Sets the limits for updates and records their outcome; train.guard.Guard is one."""

    in_a_row: int  # consecutive updates refused up to now
    max_skips: int  # after more consecutive refusals than this, no update is taken
    nonfinite: Literal["stop", "skip"]  # stop: nor after a single non-finite loss or gradient

    def limit(self, unread: int) -> float:
        """Returns the loss above which the next update is refused; the last `unread` verdicts are not known yet."""

    def record(self, loss: float, norm: float, taken: bool, batches: list[Batch]) -> None:
        """Records the outcome of an update, in order. May raise, to stop the run."""


class Capture:
    """Captures a function without arguments, on static tensors, as one CUDA graph; on a CPU, just calls it.

    The function must have run before, so that it is compiled and its memory and states are allocated. Calls replay the
    captured launches on the same addresses.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, pool: Any = None) -> None:
        self._replay: Callable[[], Any] = function
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                function()
            self._replay = graph.replay

    def __call__(self) -> None:
        self._replay()


@dataclass
class Unread:
    """An update whose verdict is being copied to the host."""

    verdict: Tensor  # (3,) fp32 on the host: loss, norm, 1 where the update was taken
    arrived: Any  # a CUDA event, or None
    batches: list[Batch]


def no_graph(device: str, *, ranks: int, dtype: torch.dtype, documents: bool) -> str | None:
    """Returns why an update of such a run cannot be one CUDA graph; None if it can."""
    if not device.startswith("cuda"):
        return f"{device} is no CUDA GPU"
    if ranks > 1:
        return "more than one rank takes part"
    if dtype == torch.float16:
        return "fp16's loss scale is not captured"
    return "batches of packed documents differ in shape" if documents else None


class Step:
    """Makes one update from the next `accumulation` micro-batches per call.

    clip: bound on the norm of the whole gradient; 0: none. scaler: for fp16; gradients that overflow change only the
    scale. guard: see Watch. team: the ranks that share the update; `optimizer` is then a ShardedOptimizer. compiled:
    by torch.compile; on a CPU, forward, backward and clipping are one graph, because at CPU sizes much of an iteration
    passes between the kernels. before_update: called before anything changes the weights. graph: capture a CUDA
    graph; batches must have one shape, without a scaler or ranks.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Any,
        *,
        accumulation: int = 1,
        clip: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
        guard: Watch | None = None,
        team: Any = None,
        compiled: bool = False,
        graph: bool = False,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        self.optimizer, self.accumulation, self.clip, self.scaler = optimizer, accumulation, clip, scaler
        self.guard, self.before_update = guard, before_update
        self.team = team if team is not None and team.size > 1 else None
        self.parameters: list[Tensor] = (
            optimizer.parameters if self.team else [p for group in optimizer.param_groups for p in group["params"]]
        )
        self.device = self.parameters[0].device
        if (guard is not None or graph) and not hasattr(optimizer, "found_inf"):
            raise TypeError(f"optimizer: {type(optimizer).__name__} cannot refuse a step; use those of gptfast.optim")
        if graph and (scaler is not None or self.team):
            raise ValueError("graph: neither fp16's loss scale nor ranks can be captured; leave graph out")
        self._one_graph = (
            compiled and self.device.type == "cpu" and accumulation == 1 and scaler is None and not self.team
            and not graph and hasattr(torch._dynamo.config, TRACE_GRAD)
        )  # fmt: skip
        self._objective = torch.compile(objective) if compiled and not self._one_graph else objective
        self._differentiate = self._compile_whole(objective) if self._one_graph else None
        # Static, so that a graph can read and write them.
        self._sum, self._count, self._mean, self._refused, self._in_a_row, self._limit = torch.zeros(
            6, device=self.device
        ).unbind()
        self._verdict = torch.zeros(3, device=self.device)
        self._limit.fill_(math.inf)
        if guard is not None:
            self._in_a_row.fill_(guard.in_a_row)
        self._gated = guard is not None or graph or scaler is not None
        self._unread: list[Unread] = []
        self._graph = graph
        self._static: list[Tensor] = []  # input batch of the graph
        self._captured: list[Capture] = []  # the whole update; with accumulation, a micro-batch and `_rest`

    def __call__(self, batches: Iterator[Batch]) -> Tensor:
        """Makes the next update; returns its mean loss () fp32 on the device. May raise for the previous update."""
        micro_batches = [tuple(batch) for batch in islice(batches, self.accumulation)]
        if self.guard is not None:
            self._limit.fill_(self.guard.limit(len(self._unread)))
        (self._replay if self._graph else self._launch)(micro_batches)
        if self.guard is not None:
            self._unread.append(self._send(micro_batches))
            while len(self._unread) > 1:
                self._read()
        return self._mean.clone()

    def finish(self) -> None:
        """Waits for the device, and reports the last update to the guard."""
        while self._unread:
            self._read()

    # ---- on the device

    def _launch(self, batches: Sequence[Batch]) -> None:
        if self._differentiate is not None:
            loss, norm, gradients = self._differentiate(*batches[0])
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.before_update()
            self._decide_and_step(loss, norm)
        else:
            self._sum.zero_()
            self._count.zero_()
            for i, batch in enumerate(batches, 1):
                if self.team:
                    self.optimizer.sync_gradients(i == self.accumulation)
                self._backward(batch)
            self.before_update()
            self._update(batches[0])
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch) -> None:
        """Accumulates the gradient of a micro-batch's share of the loss."""
        total, count = self._objective(*batch)
        self._known = isinstance(count, int)  # the host knows the count of targets
        self._nominal = self.accumulation * (count if isinstance(count, int) else batch[1].numel())
        share = total if self._nominal == 1 else total / self._nominal
        (share if self.scaler is None else self.scaler.scale(share)).backward()
        self._sum += total.detach()
        self._count += count

    def _update(self, batch: Batch) -> None:
        """Normalizes and clips the accumulated gradients, decides on the update, and steps."""
        total, count = self._sum, self._count
        if self.team:
            total, count = self.team.mean(torch.stack((total, count))).unbind()
        count = count.clamp(min=1.0)
        factor = None if self._known else self._nominal / count
        if self._scale is not None:
            factor = self._scale.reciprocal() if factor is None else factor / self._scale
        gradients = self.optimizer.gradients() if self.team else self._gradients()
        norm = torch.zeros_like(total)
        if self.clip > 0 or self.guard is not None or self.scaler is not None:
            norm = self.optimizer.grad_norm() if self.team else grad_norm(gradients)
            norm = norm if factor is None else norm * factor
        if self.clip > 0:
            clipped = clip_coefficient(norm, self.clip)
            factor = clipped if factor is None else clipped * factor
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        self._decide_and_step(total / count, norm)

    def _decide_and_step(self, mean: Tensor, norm: Tensor) -> None:
        self._mean.copy_(mean)
        if self._gated:
            self._decide(mean, norm)
            self.optimizer.found_inf = self._refused
        self.optimizer.step()

    @torch.no_grad()
    def _decide(self, mean: Tensor, norm: Tensor) -> None:
        """Sets `_refused`, and sends the verdict to the host."""
        overflowed = ~norm.isfinite()
        allowed = self._in_a_row <= (self.guard.max_skips if self.guard is not None else 0)
        if self.guard is not None:
            finite = mean.isfinite() if self.scaler is not None else mean.isfinite() & ~overflowed
            allowed = allowed & finite & (mean <= self._limit)
            refused = self._in_a_row + 1.0  # masked_fill, as torch.where would copy its scalars from the host
            if self.guard.nonfinite == "stop":
                refused = refused.masked_fill(~finite, math.inf)
            self._in_a_row.copy_(refused.masked_fill(allowed, 0.0))
            self._verdict.copy_(torch.stack((mean, norm if self.scaler is None else norm * 0.0, allowed.float())))
        self._refused.copy_(~allowed | overflowed)
        if self.scaler is not None:  # as GradScaler.update does, without leaving the device
            scaler, grown = self.scaler, self.scaler._growth_tracker
            assert self._scale is not None and grown is not None
            torch._amp_update_scale_(
                self._scale, grown, overflowed.float(), scaler.get_growth_factor(), scaler.get_backoff_factor(),
                scaler.get_growth_interval(),
            )  # fmt: skip

    @property
    def _scale(self) -> Tensor | None:
        """Returns the fp16 loss scale, () fp32 on the device."""
        return None if self.scaler is None else self.scaler._scale

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def _compile_whole(self, objective: Objective) -> Callable[..., tuple[Tensor, Tensor, list[Tensor]]]:
        """Compiles one graph: batch -> mean loss, the gradient's norm before clipping, and the clipped gradients."""
        setattr(torch._dynamo.config, TRACE_GRAD, True)
        trained, clip = self.parameters, self.clip

        @torch.compile(fullgraph=True)
        def differentiate(*batch: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            total, count = objective(*batch)
            mean = total / (max(count, 1) if isinstance(count, int) else count.clamp(min=1))
            gradients = list(torch.autograd.grad(mean, trained))
            norm = grad_norm(gradients)
            if clip > 0:
                gradients = list(torch._foreach_mul(gradients, clip_coefficient(norm, clip)))
            return mean.detach(), norm, gradients

        return differentiate

    # ---- captured

    def _replay(self, batches: Sequence[Batch]) -> None:
        if not self._captured:
            self._capture(batches[0])
        for batch in batches:
            shapes = [tuple(t.shape) for t in batch]
            if shapes != [tuple(t.shape) for t in self._static]:
                raise ValueError(f"a captured step takes batches of one shape, not {shapes}; leave --cuda_graph out")
            for static, fresh in zip(self._static, batch, strict=True):
                static.copy_(fresh, non_blocking=True)
            if len(self._captured) > 1:
                self._captured[0]()
        self.before_update()
        self._captured[-1]()

    def _whole_update(self) -> None:
        for p in self.parameters:
            p.grad = None
        self._sum.zero_()
        self._count.zero_()
        self._backward(tuple(self._static))
        self._update(tuple(self._static))

    def _one_micro_batch(self) -> None:
        self._backward(tuple(self._static))

    def _rest(self) -> None:
        """Ends an update after all micro-batches; leaves sums and gradients at zero for the next."""
        self._update(tuple(self._static))
        torch._foreach_zero_([*self._gradients(), self._sum, self._count])

    def _capture(self, batch: Batch) -> None:
        """Warms up by refused updates, which compile and allocate; then captures. Random streams are restored."""
        self._static = [t.clone() for t in batch]
        self.optimizer.make_capturable()
        functions = [self._whole_update] if self.accumulation == 1 else [self._one_micro_batch, self._rest]
        if self.accumulation > 1:
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
            self._sum.zero_()
            self._count.zero_()
        before = self._in_a_row.clone()
        self._in_a_row.fill_(math.nan)  # nan is not <= any limit, so no update is taken
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with _side_stream(self.device):
                for _ in range(WARM_UPS):
                    for function in functions:
                        function()
            self._in_a_row.copy_(before)
            on_gpu = self.device.type == "cuda"
            pool = torch.cuda.graph_pool_handle() if on_gpu else None
            self._captured = [Capture(function, self.device, pool) for function in functions]

    # ---- verdicts

    def _send(self, batches: list[Batch]) -> Unread:
        if self.device.type != "cuda":
            return Unread(self._verdict.to("cpu", copy=True), None, batches)
        on_host = torch.empty(3, pin_memory=True).copy_(self._verdict, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Unread(on_host, arrived, batches)

    def _read(self) -> None:
        unread = self._unread.pop(0)
        if unread.arrived is not None:
            unread.arrived.synchronize()
        loss, norm, was_taken = unread.verdict.tolist()
        assert self.guard is not None
        self.guard.record(loss, norm, was_taken > 0, unread.batches)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Uses a side stream on a GPU, since code to be captured must not have run on the default stream."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    team: Any = None,
    objective: Callable[[torch.nn.Module], Objective] = language_model,
) -> Tensor:
    """Returns the mean loss over all counted targets of `batches`, () fp32, in eval mode; uses no random numbers.

    Every rank of a team is given all batches and evaluates its share of them, the same number on each rank.
    """
    was_training = model.training
    model.eval()
    measure = objective(model)
    size, rank = (team.data_size, team.data_rank) if team is not None else (1, 0)
    sums, counts = [], []
    stream = iter(batches)
    while of_ranks := list(islice(stream, size)):
        batch = of_ranks[min(rank, len(of_ranks) - 1)]
        total, count = measure(*batch)
        mine = float(rank < len(of_ranks))  # the last round may be short
        sums.append(total.float() * mine)
        counts.append(torch.as_tensor(count, device=total.device).float() * mine)
    model.train(was_training)
    both = torch.stack((torch.stack(sums).sum(), torch.stack(counts).sum()))
    if team is not None:
        both = team.mean(both)
    return both[0] / both[1]
