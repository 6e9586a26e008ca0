"""How a GPU is timed, on one made up: its clock, its queue and its graphs are a few numbers here.

What the machine does with works of a known length stands in tests/test_timing.py, and needs a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import timing
from bench.timing import CudaStopwatch, Settings, Stopwatch, Work, judge, summarize


class Machine:
    """A host and a GPU. The GPU does in order what it is given, and begins nothing before the host has let it go."""

    def __init__(self) -> None:
        self.host_ms, self.gpu_done_ms, self.beside_done_ms = 0.0, 0.0, 0.0
        self.captured: list[float] | None = None  # kernels of the graph that is being made
        self.captures, self.refused, self.debug = 0, "", 0
        self.submit_ms = 0.0  # of the host, for each kernel of a graph

    def enqueue(self, gpu_ms: float, host_ms: float = 0.0) -> None:
        self.host_ms += host_ms
        if self.captured is None:
            self.gpu_done_ms = max(self.gpu_done_ms, self.host_ms) + gpu_ms
        else:
            self.captured.append(gpu_ms)

    def enqueue_beside(self, gpu_ms: float) -> None:
        """On a stream that is not timed."""
        self.beside_done_ms = max(self.beside_done_ms, self.host_ms) + gpu_ms

    def wait(self, *_: Any) -> None:
        self.host_ms = max(self.host_ms, self.gpu_done_ms, self.beside_done_ms)

    def event(self, **_: Any) -> Any:
        machine = self

        class Event:
            at = 0.0

            def synchronize(self) -> None:
                machine.host_ms = max(machine.host_ms, self.at)

            def query(self) -> bool:
                return self.at <= machine.host_ms

        return Event()

    def record(self, event: Any) -> None:
        event.at = max(self.gpu_done_ms, self.host_ms)

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Any:
        self.captures += 1
        if self.refused:
            raise RuntimeError(self.refused)
        self.captured = graph.kernels
        yield
        self.captured = None

    def new_graph(self) -> Any:
        machine = self

        class Graph:
            def __init__(self) -> None:
                self.kernels: list[float] = []

            def replay(self) -> None:
                machine.enqueue(sum(self.kernels), machine.submit_ms * len(self.kernels))

        return Graph()

    def copy_to_host(self) -> None:
        if self.debug == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(timing, "_now_ns", lambda: round(made.host_ms * 1e6))
    monkeypatch.setattr(timing, "_synchronize", made.wait)
    monkeypatch.setattr(timing, "_Event", made.event)
    monkeypatch.setattr(timing, "_record", made.record)
    monkeypatch.setattr(timing, "_elapsed", lambda start, stop: stop.at - start.at)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: made.enqueue(cycles / 2e6))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", made.new_graph)
    monkeypatch.setattr(torch.cuda, "graph", made.graph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: made.debug)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(made, "debug", mode))
    monkeypatch.setattr(CudaStopwatch, "captures", True)
    return made


def sampler(run: Callable[[], Any]) -> tuple[Callable[[], float], str]:
    """One sample of `run` on the made-up machine, and how it is taken."""
    watch = CudaStopwatch.__new__(CudaStopwatch)  # a stream needs a GPU
    Stopwatch.__init__(watch, Settings(), None)
    watch.device, watch.stream = torch.device("cpu"), None
    sample, facts = watch.sampler([Work(run, (), lambda seed: None)], 0.0)
    return sample, facts["method"]


def outside(run: Callable[[], Any], ms: float) -> str | None:
    """What is said of work that lies outside of the timed span."""
    watch = CudaStopwatch.__new__(CudaStopwatch)
    watch.device = torch.device("cpu")
    return watch.look_outside([Work(run, (), lambda seed: None)], summarize([ms] * 8, method="events"))


def test_other_integers_are_wrong():
    right, wrong = (torch.tensor([[token, 1]]) for token in (5, 7))
    assert judge([right], [right], [right]).reason is None
    assert judge([wrong], [right], [right]).reason == "output 0: other integers than the reference's"


@pytest.mark.parametrize("submit_ms", [0.0, 0.00005, 0.002, 0.02])
def test_a_graph_is_timed_without_the_time_to_submit_it(machine, submit_ms):
    """A thousand kernels of 2 us: however long the host takes to enqueue them, the GPU takes as long as it does."""
    machine.submit_ms = submit_ms
    sample, method = sampler(lambda: machine.enqueue(0.002, 0.004))
    assert method == "graph of 1000" and sample() == pytest.approx(0.002)


def test_a_kernel_is_timed_without_the_time_to_launch_it(machine):
    sample, method = sampler(lambda: machine.enqueue(2.7, 3.9))
    assert method == "events" and sample() == pytest.approx(2.7)


def test_a_host_that_slows_down_after_it_was_measured_does_not_enter(machine):
    host_ms = [0.1]
    sample, method = sampler(lambda: [machine.enqueue(1.5, host_ms[0]) for _ in range(2)])
    host_ms[0] = 5.0
    assert method == "events" and sample() == pytest.approx(3.0)


def test_after_a_capture_that_failed_there_is_no_other(machine):
    """One row says why, the others that events timed what a graph would have."""
    machine.refused = "operation not permitted when stream is capturing\nCUDA kernel errors might"
    short = lambda: machine.enqueue(0.01)
    sample, method = sampler(short)
    reason = "operation not permitted when stream is capturing"
    assert method == f"events (no graph, and no more of them in this process: RuntimeError: {reason})"
    assert sample() == pytest.approx(0.01)
    machine.refused = ""
    assert [sampler(short)[1] for _ in range(2)] == ["events (no graph after one that failed)"] * 2
    assert machine.captures == 1


def test_work_that_waits_for_the_gpu_is_not_captured_and_costs_the_others_nothing(machine):
    def waits() -> None:
        machine.enqueue(0.01)
        machine.copy_to_host()

    assert "called a synchronizing CUDA operation" in sampler(waits)[1]
    assert machine.captures == 0 and machine.debug == 0
    assert sampler(lambda: machine.enqueue(0.01))[1].startswith("graph of ")


def test_a_host_of_uneven_speed_is_no_work_on_another_stream(machine):
    """An op of 0.115 ms for which the host takes 0.05 to 0.4 ms was once said to be busy for 0.250."""
    spans = itertools.cycle([0.05, 0.1, 0.2, 0.25, 0.4])
    assert outside(lambda: machine.enqueue(0.115, next(spans)), 0.115) is None


def test_work_on_another_stream_is_seen(machine):
    def elsewhere() -> None:
        machine.enqueue(0.01, 0.02)
        machine.enqueue_beside(0.5)

    assert "after the stream that is timed had ended" in (outside(elsewhere, 0.01) or "")
