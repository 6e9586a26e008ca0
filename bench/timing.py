"""How everything here is timed, and why the figure can be believed.

    with timing.stopwatch("cuda") as watch:
        works = {"ours": [Work(...), ...], "peer": [Work(...), ...]}
        timings = watch.measure(works)              # {"ours": Timing, "peer": Timing}
        verdicts = watch.verify(works, truth, seeds)    # {"ours": Verdict, "peer": Verdict}

- Variants are interleaved launch by launch in rotating order, so that a drifting clock or a noisy neighbour meets all
  of them alike. The figure is a median, with p20, p80 and a distribution-free interval.
- A `Work` is one set of inputs. Variants walk through several sets which together exceed three times the last-level
  cache, so each launch finds a cold one, as it would inside a model.
- CUDA: work is timed inside a graph of many launches, because events around one launch measure the gap that the host
  leaves (Triton PR #10149: 5.5 against 15 TFLOP/s for one small GEMM). What takes long, or what no graph can hold, is
  timed by events behind a spinning kernel that hides the host; a sample before which the spinning had ended is taken
  again, after a longer one. What the host spends stands in a field of its own. CPU: perf_counter_ns, with the threads
  stated.
- After timing, inputs are rewritten in place with new random numbers and the very callable (or graph) that was timed
  must give the new answers. That finds work skipped, answers remembered, precision dropped, inputs overwritten, work
  still running on another stream or thread, and clocks replaced.
- A figure that beats the machine's speed of light is invalid (`roofline`).

The cheats are those of KernelBench PR #82, gpu-mode reference-kernels #104 and #162, and pygpubench PR #7.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor

from gptfast.log import gpu_state

from .failures import in_one_line
from .stats import median_interval

_now_ns = time.perf_counter_ns  # taken at import: replacing time.perf_counter_ns later changes nothing here
_Event, _elapsed, _record = torch.cuda.Event, torch.cuda.Event.elapsed_time, torch.cuda.Event.record
_synchronize = torch.cuda.synchronize

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Settings:
    """How long to measure. A figure rests on at least `samples` samples, and on more while `budget_s` lasts."""

    samples: int = 40
    most_samples: int = 400
    warmup_s: float = 0.2
    budget_s: float = 1.0  # for all variants of one comparison together
    graph_below_ms: float = 2.0  # a launch shorter than this is timed inside a CUDA graph
    graph_ms: float = 2.0  # how long one replay of that graph should last
    most_sets: int = 256
    most_bytes: int = 8 << 30  # of all input sets together, on a GPU
    most_cpu_bytes: int = 128 << 20  # the same on a CPU, where drawing random numbers takes longer than timing


@dataclass(frozen=True)
class Work:
    """One thing to time on one set of inputs.

    `run()` does the work and returns its outputs. `inputs` are the tensors it may read; it must not change them, save
    those in the places `writes`, which are the same again when it is run again. `refresh(seed)` rewrites some of them
    in place with the random values of that seed.
    """

    run: Callable[[], Any]
    inputs: Tensors
    refresh: Callable[[int], Any]
    writes: frozenset[int] = frozenset()

    def constants(self) -> Tensors:
        """The inputs that it must not change."""
        return tuple(tensor for i, tensor in enumerate(self.inputs) if i not in self.writes)


@dataclass(frozen=True)
class Truth:
    """The right answers after `refresh(seed)`: `exact` in fp64, `usual` by the reference in the dtype that is timed."""

    exact: Callable[[int], Tensors]
    usual: Callable[[int], Tensors]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per launch: quantiles, and the interval [ms_low, ms_high] that holds the median 95 times of 100."""

    ms_p20: float
    ms_p50: float
    ms_p80: float
    ms_low: float
    ms_high: float
    n: int
    method: str  # 'perf_counter', 'events' or 'graph of 64'
    threads: int | None = None  # of the CPU; None on a GPU
    cold: bool = True  # whether the input sets together exceed three times the last-level cache
    host_ms_p50: float | None = None  # what the host spends to launch once; on a CPU it cannot be told apart
    state_before: dict | None = None  # clocks, power, temperature, throttling
    state_after: dict | None = None
    samples: tuple[float, ...] = field(default=(), repr=False)

    def fields(self) -> dict[str, Any]:
        """The fields of a result row; the samples themselves stay here."""
        return {name: value for name, value in vars(self).items() if name != "samples"}


@dataclass(frozen=True)
class Verdict:
    """What the check after timing found. `error` is relative to fp64 truth, `allowed` what the dtype excuses."""

    error: float | None
    allowed: float | None
    reason: str | None = None

    @property
    def valid(self) -> bool:
        return self.reason is None


# ---- statistics --------------------------------------------------------------------------------------------------
def summarize(samples: Sequence[float], **facts: Any) -> Timing:
    """The Timing of samples in milliseconds."""
    ordered = sorted(samples)
    low, high = median_interval(ordered)
    p20, p80 = (ordered[round(quantile * (len(ordered) - 1))] for quantile in (0.2, 0.8))
    return Timing(p20, statistics.median(ordered), p80, low, high, len(ordered), samples=tuple(samples), **facts)


def interleave(
    samplers: Mapping[str, Callable[[], float]],
    rounds: int,
    budget_s: float = 0.0,
    most_rounds: int = 0,
    clock_ns: Callable[[], int] = _now_ns,
) -> dict[str, list[float]]:
    """One sample of every variant per round, each round beginning with the next variant. Milliseconds by variant.

    At least `rounds` rounds, then more until `budget_s` has passed or there are `most_rounds`.
    """
    names = list(samplers)
    taken: dict[str, list[float]] = {name: [] for name in names}
    started, done = clock_ns(), 0
    while done < rounds or (done < most_rounds and clock_ns() - started < budget_s * 1e9):
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(samplers[name]())
        done += 1
    return taken


# ---- the speed of light --------------------------------------------------------------------------------------------
def roofline(
    ms: float, flops: float, bytes_moved: float, peak_flops: float | None, peak_bytes: float | None, slack: float = 0.0
) -> tuple[float | None, str | None]:
    """The fraction of the roofline that was reached, and the reason why the figure is invalid, if it is.

    The roofline's time is the longer of flops / peak_flops and bytes / peak_bytes; None for a peak that is not known.
    `slack` is how far a peak that was itself measured may be beaten by chance.
    """
    floors_s = [amount / peak for amount, peak in ((flops, peak_flops), (bytes_moved, peak_bytes)) if peak]
    if not floors_s:
        return None, None
    if ms <= 0:
        return None, "the clock did not advance"
    fraction = max(floors_s) * 1e3 / ms
    if fraction <= 1 + slack:
        return fraction, None
    return fraction, f"{fraction:.2f} of the speed of light: the work was not done, or not timed"


# ---- the check after the timed loop --------------------------------------------------------------------------------
def flatten(outputs: Any) -> Tensors:
    """The tensors of an output, in order: a tensor, or a tuple or list of tensors and None."""
    if isinstance(outputs, tuple | list):
        return tuple(tensor for part in outputs for tensor in flatten(part))
    return () if outputs is None else (outputs,)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact|, Frobenius, in fp64; |result| where the truth is zero, inf where not finite."""
    exact = exact.double()
    distance = torch.linalg.vector_norm(result.double() - exact)
    size = torch.linalg.vector_norm(exact)
    error = (distance / size if size > 0 else distance).item()
    return error if math.isfinite(error) else math.inf


def judge(results: Tensors, exact: Tensors, usual: Tensors, any_dtype: bool = False) -> Verdict:
    """Whether every output is as near the truth as its dtype allows: twice the reference's own error, plus eps.

    `any_dtype`: a peer may answer in another dtype than the reference, and is judged by that dtype.
    """
    if len(results) != len(exact):
        return Verdict(None, None, f"{len(results)} outputs instead of {len(exact)}")
    worst = Verdict(0.0, 0.0)
    for i, (out, truth, common) in enumerate(zip(results, exact, usual, strict=True)):
        if type(out) not in (Tensor, torch.nn.Parameter):
            return Verdict(None, None, f"output {i} is a {type(out).__name__}: work may be put off")
        if out.shape != truth.shape or (out.dtype != common.dtype and not any_dtype):
            return Verdict(None, None, f"output {i} is {tuple(out.shape)} {out.dtype}, expected {tuple(truth.shape)}")
        if not out.is_floating_point():
            if not torch.equal(out.long(), truth.long()):
                return Verdict(None, None, f"output {i}: other integers than the reference's")
            continue
        if out.dtype == truth.dtype and torch.equal(out, truth):
            continue  # as a copy is; there the three fp64 tensors of its size below would be the most memory by far
        error = relative_error(out, truth)
        # One number may be rounded right by luck, so the reference's own error says little about a sum of thousands.
        rounding = torch.finfo(out.dtype).eps * (8 if out.numel() < 64 else 1)
        usual_error = relative_error(common.to(out.dtype), truth)
        if usual_error > 0.5:
            return Verdict(
                error, None, f"output {i}: the reference itself errs by {usual_error:.3g}, which checks nothing"
            )
        allowed = 2 * usual_error + rounding
        if not error <= allowed:
            return Verdict(error, allowed, f"output {i} is wrong: error {error:.3g}, {allowed:.3g} allowed")
        if error >= (worst.error or 0.0):
            worst = Verdict(error, allowed)
    return worst


def _same_bits(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def _bits(tensors: Tensors) -> Tensors:
    """Copies by which a change of even one bit is seen (NaN equals NaN here, and -0 differs from 0)."""
    return tuple(tensor.detach().clone().contiguous().reshape(-1) for tensor in tensors)


def clocks_replaced() -> str | None:
    """Which of the clocks that time us somebody has replaced, or None."""
    if time.perf_counter_ns is not _now_ns or not isinstance(_now_ns, BuiltinFunctionType):
        return "time.perf_counter_ns was replaced"
    if torch.cuda.Event is not _Event or (_Event.elapsed_time, _Event.record) != (_elapsed, _record):
        return "torch.cuda.Event was replaced"
    if torch.cuda.synchronize is not _synchronize:
        return "torch.cuda.synchronize was replaced"
    return None


def _severity(verdict: Verdict) -> tuple[bool, float]:
    return not verdict.valid, verdict.error or 0.0


# ---- stopwatches ----------------------------------------------------------------------------------------------------
class Stopwatch:
    """Measures on a CPU; `CudaStopwatch` overrides what a GPU does otherwise. Made by `stopwatch(device)`."""

    device = torch.device("cpu")

    def __init__(self, settings: Settings, threads: int | None) -> None:
        self.settings = settings
        self.threads = threads
        self._replay: dict[int, Callable[[], Any]] = {}  # by id of a Work: how it was run when it was timed
        self._before: dict[int, Tensors] = {}  # by id of a Work: the bits of its inputs before timing
        self._outside: dict[int, str] = {}  # by id of a Work: work seen outside of what the clock spans

    # what a subclass changes
    def cache_bytes(self) -> int:
        return cpu_cache_bytes()

    def most_bytes(self) -> int:
        return self.settings.most_cpu_bytes

    def synchronize(self) -> None:
        pass

    def state(self) -> dict | None:
        return None

    def sampler(self, works: Sequence[Work], estimate_ms: float) -> tuple[Callable[[], float], dict[str, Any]]:
        """A function that takes one sample, and the facts of how it does."""
        turn = 0

        def sample() -> float:
            nonlocal turn
            run = works[turn % len(works)].run
            turn += 1
            start = _now_ns()
            outputs = run()
            stop = _now_ns()
            del outputs  # freed outside of the timed span
            return (stop - start) / 1e6

        return sample, {"method": "perf_counter", "threads": torch.get_num_threads()}

    def look_outside(self, works: Sequence[Work], timing: Timing) -> str | None:
        """The reason to believe that part of the work lies outside of the timed span, if there is one."""
        return None

    # what all share
    def sets_needed(self, input_bytes: int) -> int:
        """How many sets of inputs of this size make every launch find a cold cache."""
        wanted = math.ceil(3 * self.cache_bytes() / max(input_bytes, 1))
        affordable = self.most_bytes() // max(input_bytes, 1)
        return max(1, min(wanted, affordable, self.settings.most_sets))

    def measure(self, variants: Mapping[str, Sequence[Work]]) -> dict[str, Timing]:
        """Time every variant side by side. Each has its Works, one per input set, all of the same size."""
        for works in variants.values():
            self._before[id(works[0])] = _bits(works[0].constants())
        estimates = self._warm_up(variants)
        samplers, facts = {}, {}
        for name, works in variants.items():
            samplers[name], facts[name] = self.sampler(works, estimates[name])
            facts[name] |= {"cold": self._is_cold(works), "host_ms_p50": self.host_ms(works)}
        before = self.state()
        gc_was_on = gc.isenabled()
        gc.disable()
        try:
            limits = self.settings
            taken = interleave(samplers, limits.samples, limits.budget_s, limits.most_samples)
        finally:
            if gc_was_on:
                gc.enable()
        self.synchronize()
        shared = {"state_before": before, "state_after": self.state()}
        timings = {name: summarize(taken[name], **facts[name], **shared) for name in variants}
        for name, works in variants.items():
            seen = self.look_outside(works, timings[name])
            if seen:
                self._outside[id(works[0])] = seen
        return timings

    def _warm_up(self, variants: Mapping[str, Sequence[Work]]) -> dict[str, float]:
        """Run all variants in turn until `warmup_s` has passed. Returns the shortest time of each, host included."""
        best = dict.fromkeys(variants, math.inf)
        started, turn = _now_ns(), 0
        while turn < 3 or _now_ns() - started < self.settings.warmup_s * 1e9:
            for name, works in variants.items():
                self.synchronize()
                start = _now_ns()
                works[turn % len(works)].run()
                self.synchronize()
                best[name] = min(best[name], (_now_ns() - start) / 1e6)
            turn += 1
        return best

    def host_ms(self, works: Sequence[Work]) -> float | None:
        return None

    def _is_cold(self, works: Sequence[Work]) -> bool:
        input_bytes = sum(tensor.nbytes for tensor in works[0].inputs)
        return len(works) * input_bytes >= 3 * self.cache_bytes()

    def verify(
        self,
        variants: Mapping[str, Sequence[Work]],
        truth: Truth,
        seeds: Sequence[int],
        any_dtype: Collection[str] = (),
    ) -> dict[str, Verdict]:
        """After `measure`: are the answers right, on inputs that were not there before, and were the inputs let be?

        `any_dtype`: names of variants that may answer in another dtype than the reference.
        """
        verdicts = {name: self._after_timing(works[0]) for name, works in variants.items()}
        for seed in seeds:
            exact, usual = truth.exact(seed), truth.usual(seed)
            for name, works in variants.items():
                if verdicts[name].valid:
                    verdict = self._on_fresh_inputs(works[0], seed, exact, usual, name in any_dtype)
                    verdicts[name] = max(verdict, verdicts[name], key=_severity)
        return verdicts

    def _after_timing(self, work: Work) -> Verdict:
        reason = clocks_replaced() or self._outside.get(id(work))
        before = self._before.get(id(work))
        if before is not None and not _same_bits(_bits(work.constants()), before):
            reason = reason or "the inputs were overwritten while timing"
        return Verdict(None, None, reason)

    def _on_fresh_inputs(self, work: Work, seed: int, exact: Tensors, usual: Tensors, any_dtype: bool) -> Verdict:
        work.refresh(seed)
        before = _bits(work.constants())
        self.synchronize()
        outputs = flatten(self._replay.get(id(work), work.run)())
        snapshot = self._snapshot(outputs)  # at once: what a thread or stream writes later comes too late
        if _same_bits(_bits(work.constants()), before):
            return judge(snapshot, exact, usual, any_dtype)
        for tensor, bits in zip(work.constants(), before, strict=True):
            tensor.data.copy_(bits.view(tensor.shape))
        return Verdict(None, None, "the inputs are overwritten")

    def _snapshot(self, outputs: Tensors) -> Tensors:
        return tuple(
            tensor.detach().clone() if type(tensor) in (Tensor, torch.nn.Parameter) else tensor for tensor in outputs
        )


class CudaStopwatch(Stopwatch):
    """Measures on a GPU, on a stream of its own: all Works must be built and run inside `with stopwatch(...)`."""

    # After a capture that failed, torch 2.11 may refuse every further one of the process (pytorch issue 180395).
    captures = True

    def __init__(self, device: torch.device, settings: Settings) -> None:
        super().__init__(settings, None)
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def cache_bytes(self) -> int:
        return getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or (64 << 20)

    def most_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(self.settings.most_bytes, free // 4)

    def synchronize(self) -> None:
        _synchronize(self.device)

    def state(self) -> dict | None:
        return gpu_state(self.device)

    def host_ms(self, works: Sequence[Work]) -> float | None:
        """Median time until one launch returns to the host, the GPU idle before it."""
        return self._until_returned_ms([work.run for work in works])

    def _until_returned_ms(self, calls: Sequence[Callable[[], Any]]) -> float:
        spans = []
        for turn in range(15):
            self.synchronize()
            start = _now_ns()
            calls[turn % len(calls)]()
            spans.append((_now_ns() - start) / 1e6)
        self.synchronize()
        return statistics.median(spans)

    def _hold_cycles(self, calls: Sequence[Callable[[], Any]]) -> int:
        """How long the GPU must spin for the host to enqueue one of `calls` meanwhile, with as much again to spare.

        Else the events around it would span the wait for the host.
        """
        return int(2e6 * 2 * (self._until_returned_ms(calls) + 0.02))  # at 2 GHz, which is about the fastest

    def sampler(self, works: Sequence[Work], estimate_ms: float) -> tuple[Callable[[], float], dict[str, Any]]:
        waits = self._waits(works[0])
        by_events = self._event_sampler(works, waits is not None)
        kernel_ms = min(by_events() for _ in range(5))
        if waits is not None:  # no graph can hold it; found without a capture that fails
            return by_events, {"method": f"events (no graph: {waits})"}
        if kernel_ms >= self.settings.graph_below_ms:
            return by_events, {"method": "events"}
        if not CudaStopwatch.captures:
            return by_events, {"method": "events (no graph after one that failed)"}
        try:
            return self._graph_sampler(works, kernel_ms)
        except RuntimeError as error:
            CudaStopwatch.captures = False
            self.synchronize()
            why = in_one_line(error)
            return by_events, {"method": f"events (no graph, and no more of them in this process: {why})"}

    def _waits(self, work: Work) -> str | None:
        """What torch says where the work waits for the GPU, as a copy to the host does; None where it does not."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work.run()
        except RuntimeError as error:
            return in_one_line(error)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return None

    def _event_sampler(self, works: Sequence[Work], waits: bool) -> Callable[[], float]:
        turn = 0

        def run() -> Any:
            nonlocal turn
            turn += 1
            return works[(turn - 1) % len(works)].run()

        return self._held_sampler(run, self._hold_cycles([work.run for work in works]), 0 if waits else 5)

    def _held_sampler(self, run: Callable[[], Any], hold_cycles: int, longer: int = 5) -> Callable[[], float]:
        """Time `run` by events behind a kernel that spins until the host has enqueued all of it.

        Where it had stopped spinning before that, the span between the events holds time of the host: the sample is
        taken again behind a kernel that spins twice as long, and so are all that follow; so often at most.
        """

        def sample() -> float:
            nonlocal hold_cycles, longer
            while True:
                start, stop = _Event(enable_timing=True), _Event(enable_timing=True)
                torch.cuda._sleep(hold_cycles)
                _record(start)
                outputs = run()
                _record(stop)
                was_held = not start.query()
                stop.synchronize()
                del outputs
                if was_held or not longer:
                    return _elapsed(start, stop)
                hold_cycles, longer = 2 * hold_cycles, longer - 1

        return sample

    def _graph_sampler(self, works: Sequence[Work], kernel_ms: float) -> tuple[Callable[[], float], dict[str, Any]]:
        wanted = math.ceil(self.settings.graph_ms / max(kernel_ms, 1e-3))
        launches = len(works) * max(1, round(wanted / len(works)))
        graph = torch.cuda.CUDAGraph()
        outputs: list[Any] = [None] * len(works)  # kept, so that each set of inputs has outputs of its own, cold too
        self.synchronize()
        with torch.cuda.graph(graph, stream=self.stream):
            for i in range(launches):
                outputs[i % len(works)] = works[i % len(works)].run()
        graph.replay()  # the first uploads it
        held = self._held_sampler(graph.replay, self._hold_cycles([graph.replay]))

        def sample() -> float:
            return held() / launches

        def replay() -> Any:
            graph.replay()
            return outputs[0]

        self._replay[id(works[0])] = replay
        return sample, {"method": f"graph of {launches}"}

    def look_outside(self, works: Sequence[Work], timing: Timing) -> str | None:
        """Whether the GPU is still busy when the stream that is timed has come to its end: work lies on others then.

        Both moments are seen after the host has given all it has to give, so what the host takes does not enter, be it
        ever so uneven. The least of three looks, for the host may be interrupted between the two.
        """
        launches = max(4, min(50, math.ceil(5 / max(timing.ms_p50, 1e-3))))
        late_ms = math.inf
        for _ in range(3):
            self.synchronize()
            stop = _Event(enable_timing=True)
            for i in range(launches):
                works[i % len(works)].run()
            _record(stop)
            stop.synchronize()
            start = _now_ns()
            self.synchronize()
            late_ms = min(late_ms, (_now_ns() - start) / 1e6)
        if late_ms <= 0.1 + 0.25 * timing.ms_p50:
            return None
        return f"the GPU was busy for {late_ms:.3f} ms after the stream that is timed had ended"


@contextlib.contextmanager
def stopwatch(
    device: str | torch.device, settings: Settings | None = None, threads: int | None = None
) -> Iterator[Stopwatch]:
    """A stopwatch for this device. On a CPU torch keeps to `threads` threads (default: as many as it has now)."""
    device, settings = torch.device(device), settings or Settings()
    if device.type == "cuda":
        watch = CudaStopwatch(device, settings)
        watch.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(watch.stream):
            yield watch
        torch.cuda.current_stream(device).wait_stream(watch.stream)
        return
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        yield Stopwatch(settings, threads or threads_before)
    finally:
        torch.set_num_threads(threads_before)


def cpu_cache_bytes() -> int:
    """The last-level cache of CPU 0, as Linux tells it; 32 MB where it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)
