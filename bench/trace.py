"""What a trace of torch.profiler says of a step: kernels by part of the model, time in which the GPU waits, and why.

`read` takes the events of a Chrome trace as torch writes it, from a GPU (kernels, and the calls that launched them) or
from a CPU (operators). A kernel belongs to the part that its own name tells, else to that of the operators and
`record_function` ranges around its launch, else to that of the forward operator whose backward launched it. On a CPU
each operator counts for the time that it spends outside of others; what no operator spends is Python's.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]
STEP = "bench.step"  # the range around each step
PARTS = (
    "GEMMs", "norms + GEMMs", "attention", "norms", "loss", "MLP activation", "rotary", "optimizer", "embedding",
    "sums", "casts", "copies", "other", "Python", "idle",
)  # fmt: skip
SPECIFIC = (  # what a name tells for certain, the first that fits
    ("norms + GEMMs", r"decode_linear"),  # a kernel of both, and of the activation between two products
    ("loss", r"cross_entropy|log_?softmax|nll_loss|softmax_cross"),
    ("attention", r"attention|attn|flash|fmha|sdpa|compute_dot_do_o|convert_dq|_softmax|flex"),
    ("norms", r"layer_?norm|rms_?norm|LayerNorm|RMSNorm|sum_rows_kernel"),
    ("optimizer", r"multi_tensor|Optimizer|FusedOptim|_fused_adam|foreach|newton_schulz|gram_kernel|muon|clip_grad"),
    ("rotary", r"rotary|rope"),
    ("MLP activation", r"gelu|silu|swiglu|relu|tanh_backward|activation"),
    ("GEMMs", r"nvjet|gemm|cutlass|cublas|splitk|aten::(addmm|mm|bmm|matmul|linear|baddbmm)\b|mkldnn|dnnl|int8_linear"),
    ("embedding", r"embedding|index_?put|index_?select|indexing_backward"),
)
GENERAL = (
    ("casts", r"_to_copy|aten::to\b"),
    ("sums", r"reduce_kernel|_red_.*sum|_per_.*sum|aten::sum"),
    ("copies", r"memcpy|memset|copy|fused_cat|aten::cat|fill|zero|clone|contiguous"),
)
SYNCS = re.compile(r"(Stream|Device|Event|Context)Synchronize|^cudaMemcpy$|^cuMemcpy(HtoD|DtoH)")
LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
SHORTEST_GAP_US = 0.5


@dataclass(frozen=True)
class Piece:
    """A kernel, or on a CPU an operator: what it took of one step."""

    name: str
    part: str
    calls: float
    ms: float


@dataclass(frozen=True)
class Gap:
    """Time of one step in which the GPU had nothing to do, by cause."""

    cause: str
    calls: float
    ms: float


@dataclass(frozen=True)
class Trace:
    """A step as the profiler saw it; times are per step. `span_ms` is `busy_ms` and all gaps."""

    steps: int
    span_ms: float
    busy_ms: float
    pieces: tuple[Piece, ...]
    gaps: tuple[Gap, ...]
    syncs: Mapping[str, float]  # calls that wait for the GPU, a step, by the operator that makes them
    on_gpu: bool

    def parts(self) -> dict[str, tuple[float, float]]:
        """(calls, ms) of every part that took time, the longest first."""
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for piece in self.pieces:
            sums[piece.part][0] += piece.calls
            sums[piece.part][1] += piece.ms
        return {name: (calls, ms) for name, (calls, ms) in sorted(sums.items(), key=lambda item: -item[1][1])}

    @property
    def idle_ms(self) -> float:
        return self.span_ms - self.busy_ms


def part_of(names: Sequence[str], forward: Sequence[str] = ()) -> str:
    """The part of a kernel or operator: `names` are its own, then those around it from within; `forward` likewise."""
    own = names[0] if names else ""
    part = _first(SPECIFIC, own)
    if part == "GEMMs" and any(_first(SPECIFIC, name) == "attention" for name in (*names[1:], *forward)):
        return "attention"  # written as two products
    if part:
        return part
    if _first(GENERAL, own) == "casts" or any(_first(GENERAL[:1], name) for name in names[1:3]):
        return "casts"  # of a weight, say, which is none of the product's own time
    for around in (names[1:], forward):
        for name in around:
            part = _first(SPECIFIC, name)
            if part and part != "GEMMs":
                return part
    if any(_first(SPECIFIC, name) == "GEMMs" for name in names[1:]) and not _first(GENERAL, own):
        return "GEMMs"
    return _first(GENERAL, own) or "other"


def _first(patterns: Iterable[tuple[str, str]], name: str) -> str | None:
    return next((part for part, pattern in patterns if re.search(pattern, name, re.IGNORECASE)), None)


def read(events: Iterable[Event]) -> Trace:
    """Analyze the events of a trace whose steps are marked by ranges named STEP. ValueError where there is none."""
    events = [event for event in events if event.get("ph") == "X" and "dur" in event]
    marks = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == STEP and e.get("cat") == "user_annotation"
    )
    if not marks:
        raise ValueError(f"no range named {STEP} in the trace: profile by bench.profile, or mark the steps yourself")
    host = Host([e for e in events if e.get("cat") in ("cpu_op", "user_annotation")])
    gpu = sorted((e for e in events if e.get("cat") in ON_GPU), key=lambda e: e["ts"])
    return _of_gpu(events, gpu, host, marks) if gpu else _of_cpu(host, marks)


class Host:
    """Operators and ranges of each thread, as the trees that they are; and which forward a backward belongs to."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.threads: dict[Any, list[Event]] = defaultdict(list)
        for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            self.threads[event.get("tid")].append(event)
        self.parents: dict[int, Event | None] = {}
        self.children_us: Counter[int] = Counter()
        self.forward: dict[Any, Event] = {}
        for mine in self.threads.values():
            stack: list[Event] = []
            for event in mine:
                while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
                    stack.pop()
                self.parents[id(event)] = stack[-1] if stack else None
                if stack:
                    self.children_us[id(stack[-1])] += event["dur"]
                stack.append(event)
                number = event.get("args", {}).get("Sequence number", -1)
                if number >= 0 and not self._is_backward(event):
                    self.forward[number] = event
        self.starts = {tid: [e["ts"] for e in mine] for tid, mine in self.threads.items()}

    @staticmethod
    def _is_backward(event: Event) -> bool:
        return event["name"].startswith("autograd::engine") or event.get("args", {}).get("Fwd thread id", 0) > 0

    def at(self, tid: Any, ts: float) -> Event | None:
        """The innermost operator or range of a thread at a moment."""
        place = bisect.bisect_right(self.starts.get(tid, []), ts) - 1
        event: Event | None = self.threads[tid][place] if place >= 0 else None
        while event is not None and event["ts"] + event["dur"] < ts:
            event = self.parents[id(event)]
        return event

    def names(self, event: Event | None) -> list[str]:
        """The names from this one outward, without the step's."""
        names = []
        while event is not None:
            if event["name"] != STEP:
                names.append(event["name"])
            event = self.parents[id(event)]
        return names

    def forward_names(self, event: Event | None) -> list[str]:
        """The names around the forward operator whose backward this is a part of."""
        while event is not None:
            number = event.get("args", {}).get("Sequence number", -1)
            if number >= 0 and self._is_backward(event) and number in self.forward:
                return self.names(self.forward[number])
            event = self.parents[id(event)]
        return []


def _of_cpu(host: Host, marks: Sequence[tuple[float, float]]) -> Trace:
    steps = len(marks)
    spent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for mine in host.threads.values():
        for event in mine:
            if not _within(event["ts"], marks):
                continue
            own_us = event["dur"] - host.children_us[id(event)]
            names = host.names(event)
            is_step = event["name"] == STEP
            part = "Python" if is_step else part_of(names, host.forward_names(event))
            name = "between operators" if is_step else event["name"]
            spent[name, part][0] += 1
            spent[name, part][1] += own_us
    span = sum(stop - start for start, stop in marks) / steps / 1e3
    pieces = _pieces(spent, steps)
    return Trace(steps, span, sum(piece.ms for piece in pieces), pieces, (), {}, False)


def _of_gpu(events: Sequence[Event], gpu: Sequence[Event], host: Host, marks: Sequence[tuple[float, float]]) -> Trace:
    steps = len(marks)
    calls = [event for event in events if event.get("cat") in LAUNCHES]
    launched = {e["args"]["correlation"]: e for e in calls if "correlation" in e.get("args", {})}
    spent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    covered_us = gpu[0]["ts"]
    for event in gpu:
        launch = launched.get(event.get("args", {}).get("correlation"))
        around = host.at(launch.get("tid"), launch["ts"]) if launch else None
        names = [event["name"], *host.names(around)]
        part = part_of(names, host.forward_names(around))
        start, stop = event["ts"], event["ts"] + event["dur"]
        spent[event["name"], part][0] += 1
        spent[event["name"], part][1] += max(0.0, stop - max(start, covered_us))  # not where it waits for the last one
        covered_us = max(covered_us, stop)
    syncs: Counter[str] = Counter()
    waits = []
    for call in calls:
        if SYNCS.search(call["name"]) and _within(call["ts"], marks):
            names = host.names(host.at(call.get("tid"), call["ts"]))
            who = f"{call['name']} in {names[0]}" if names else call["name"]
            syncs[who] += 1
            waits.append((call["ts"], call["ts"] + call["dur"], who))
    gaps: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    start_us = end_us = gpu[0]["ts"]
    for event in gpu:
        start, stop = event["ts"], event["ts"] + event["dur"]
        if start - end_us > 0:
            cause = _cause(end_us, start, launched.get(event.get("args", {}).get("correlation")), waits)
            gaps[cause][0] += start - end_us > SHORTEST_GAP_US
            gaps[cause][1] += start - end_us
        end_us = max(end_us, stop)
    idle = tuple(Gap(cause, n / steps, us / steps / 1e3) for cause, (n, us) in _longest(gaps))
    per_step = {who: n / steps for who, n in syncs.items()}
    span = (end_us - start_us) / steps / 1e3
    busy_us = sum(us for _, us in spent.values())
    return Trace(steps, span, busy_us / steps / 1e3, _pieces(spent, steps), idle, per_step, True)


def _cause(idle_from: float, until: float, launch: Event | None, waits: Sequence[tuple[float, float, str]]) -> str:
    """Why the GPU had nothing to do until a kernel began."""
    if launch is None:
        return "unknown: the launch is not in the trace"
    in_graph = "GraphLaunch" in launch["name"]
    if launch["ts"] + launch["dur"] <= idle_from or (in_graph and launch["ts"] <= idle_from):
        return "between the kernels of a graph" if in_graph else "between kernels that were waiting to run"
    for begun, ended, who in waits:
        if begun < until and idle_from - 20 <= ended <= launch["ts"] + 1:  # it ends when the GPU has become idle
            return f"the host waited for the GPU: {who}"
    return "the host was late"


def _pieces(spent: Mapping[tuple[str, str], Sequence[float]], steps: int) -> tuple[Piece, ...]:
    return tuple(Piece(name, part, n / steps, us / steps / 1e3) for (name, part), (n, us) in _longest(spent))


def _longest(spent: Mapping[Any, Sequence[float]]) -> Iterator[tuple[Any, Sequence[float]]]:
    return iter(sorted(spent.items(), key=lambda item: -item[1][1]))


def _within(ts: float, marks: Sequence[tuple[float, float]]) -> bool:
    place = bisect.bisect_right(marks, (ts, float("inf"))) - 1
    return place >= 0 and ts <= marks[place][1]
