"""The harness proves itself: equal variants are not told apart, a planted slowdown is found, and cheats are caught.

The statistics run on simulated time (noise, outliers and drift as on a busy machine), so nothing here depends on how
loaded this machine is. Each cheat has an honest twin that must pass.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch

from bench import timing
from bench.stats import compare, median_interval
from bench.timing import Settings, Truth, Work, interleave, judge, roofline, stopwatch

QUICK = Settings(samples=8, most_samples=8, warmup_s=0.0, budget_s=0.0)
N = 64


# ---- statistics, in simulated time -------------------------------------------------------------------------------
def noisy_machine(rng: random.Random, ms: dict[str, float]) -> dict[str, Callable[[], float]]:
    """Samplers of variants that take `ms`: 2% noise, 5% outliers up to 3x, and a clock that drifts by 20% for all."""
    drift = {"now": 1.0}

    def sampler(true_ms: float) -> Callable[[], float]:
        def sample() -> float:
            drift["now"] = min(1.2, max(0.8, drift["now"] * rng.gauss(1, 0.005)))
            outlier = rng.uniform(1, 3) if rng.random() < 0.05 else 1.0
            return true_ms * drift["now"] * outlier * rng.lognormvariate(0, 0.02)

        return sample

    return {name: sampler(true_ms) for name, true_ms in ms.items()}


def times_called_different(slowdown: float, samples: int, trials: int = 100) -> int:
    found = 0
    for seed in range(trials):
        taken = interleave(noisy_machine(random.Random(seed), {"a": 1.0, "b": 1.0 + slowdown}), samples)
        found += compare(taken["a"], taken["b"]).different
    return found


def test_equal_variants_are_flagged_at_most_5_times_in_100():
    assert times_called_different(0.0, samples=200) <= 5


def test_a_slowdown_of_3_percent_is_found_at_least_95_times_in_100():
    assert times_called_different(0.03, samples=200) >= 95
    assert times_called_different(-0.03, samples=200) >= 95


def test_interleaving_is_what_makes_that_so():
    """The same noise, measured one variant after the other as triton.testing.do_bench does: equal variants differ."""
    fooled = 0
    for seed in range(50):
        machine = noisy_machine(random.Random(seed), {"a": 1.0, "b": 1.0})
        a = [machine["a"]() for _ in range(200)]
        b = [machine["b"]() for _ in range(200)]
        fooled += compare(a, b).different
    assert fooled > 25


def test_order_rotates_so_that_no_variant_is_always_first():
    order: list[str] = []
    interleave({name: lambda name=name: order.append(name) or 1.0 for name in "abc"}, rounds=3)
    assert "".join(order) == "abcbcacab"


def test_sampling_goes_on_while_the_budget_lasts_and_never_below_the_least_count():
    ticks = iter(range(0, 10**9, 10**6))  # each look at the clock is a millisecond later
    taken = interleave({"a": lambda: 1.0}, 5, budget_s=0.02, most_rounds=1000, clock_ns=lambda: next(ticks))
    assert len(taken["a"]) == 5 + 19
    assert len(interleave({"a": lambda: 1.0}, 5, budget_s=0.0, most_rounds=1000)["a"]) == 5
    assert len(interleave({"a": lambda: 1.0}, 5, budget_s=60.0, most_rounds=7)["a"]) == 7


@pytest.mark.parametrize(("n", "low", "high"), [(5, 0, 4), (6, 0, 5), (10, 1, 8), (20, 5, 14), (100, 39, 60)])
def test_median_interval_has_the_ranks_of_the_tables(n, low, high):
    # ranks of the 95% sign-test interval, e.g. Conover, Practical Nonparametric Statistics, table A3
    assert median_interval(random.Random(0).sample(range(n), n)) == (low, high)


def test_median_interval_covers_the_median():
    rng = random.Random(1)
    held = 0
    for _ in range(400):
        low, high = median_interval([rng.expovariate(1) for _ in range(40)])
        held += low <= 0.6931 <= high
    assert held >= 0.93 * 400


def test_summary_orders_its_quantiles():
    found = timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0, 100.0], method="perf_counter")
    assert found.ms_low <= found.ms_p20 <= found.ms_p50 == 3.5 <= found.ms_p80 <= found.ms_high
    assert found.n == 6
    assert "samples" not in found.fields()


def spin(ms: float) -> None:
    """Work of a known length."""
    until = time.perf_counter_ns() + ms * 1e6
    while time.perf_counter_ns() < until:
        pass


def test_a_real_slowdown_is_found():
    """Work of 200 and 240 us under the real clock; the ratio of paired medians shrugs off preemption."""
    works = {name: [Work(lambda ms=ms: spin(ms), (), lambda seed: None)] for name, ms in (("a", 0.2), ("b", 0.24))}
    with stopwatch("cpu", Settings(samples=101, warmup_s=0.0, budget_s=0.0)) as watch:
        found = watch.measure(works)
    comparison = compare(found["a"].samples, found["b"].samples)
    assert comparison.different and comparison.low > 1.0
    assert found["a"].ms_p20 >= 0.2 and found["b"].ms_p20 >= 0.24  # a clock cannot read less than was spun


# ---- cheats ------------------------------------------------------------------------------------------------------
class Subject:
    """y = x * scale + x.sum(), timed on a few sets of inputs, by an implementation that may cheat."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], device: str = "cpu") -> None:
        self.sets = [self.draw(i).to(device) for i in range(3)]
        self.works = [self.work(function, x) for x in self.sets]
        self.truth = Truth(
            exact=lambda seed: (self.right(self.draw(seed).double().to(device)),),
            usual=lambda seed: (self.right(self.draw(seed).to(device)),),
        )

    @staticmethod
    def draw(seed: int) -> torch.Tensor:
        return torch.randn(N, N, generator=torch.Generator().manual_seed(seed))

    @staticmethod
    def right(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + x.sum(-1, keepdim=True)

    def work(self, function: Callable, x: torch.Tensor) -> Work:
        return Work(lambda: function(x), (x,), lambda seed: x.data.copy_(self.draw(seed)))


def verdict_on(function: Callable[[torch.Tensor], torch.Tensor], device: str = "cpu") -> timing.Verdict:
    subject = Subject(function, device)
    with stopwatch(device, QUICK, threads=1 if device == "cpu" else None) as watch:
        watch.measure({"it": subject.works})
        return watch.verify({"it": subject.works}, subject.truth, (101, 102))["it"]


honest = Subject.right


def skips_work_after(calls: int) -> Callable:
    count = 0

    def function(x):
        nonlocal count
        count += 1
        return honest(x) if count <= calls else torch.empty_like(x)

    return function


def remembers(key: Callable) -> Callable:
    answers: dict = {}

    def function(x):
        if key(x) not in answers:
            answers[key(x)] = honest(x)
        return answers[key(x)]

    return function


def overwrites_input(x):
    answer = honest(x)
    x.add_(1e-6)
    return answer


def overwrites_input_between(first: int, last: int) -> Callable:
    """In these calls only: a measurement here makes 11 before the check."""
    count = 0

    def function(x):
        nonlocal count
        count += 1
        answer = honest(x)
        if first <= count <= last:
            x.data.mul_(1.5)
        return answer

    return function


def finishes_later(x):
    answer = torch.zeros_like(x)

    def finish() -> None:
        time.sleep(0.02)
        answer.copy_(honest(x))

    threading.Thread(target=finish, daemon=True).start()
    return answer


class Lazy(torch.Tensor):
    """A tensor subclass, which could put off its work until somebody looks."""


CHEATS = {
    "skips work after some calls": (lambda: skips_work_after(6), "wrong"),
    "skips work once it is timed": (lambda: skips_work_after(12), "wrong"),
    "remembers one answer": (lambda: remembers(lambda x: 0), "wrong"),
    "remembers answers by address": (lambda: remembers(lambda x: x.data_ptr()), "wrong"),
    "remembers answers by address and version": (lambda: remembers(lambda x: (x.data_ptr(), x._version)), "wrong"),
    "computes in bf16": (lambda: lambda x: honest(x.bfloat16()).float(), "wrong"),
    "returns another dtype": (lambda: lambda x: honest(x).bfloat16(), "output 0 is"),
    "returns part of the answer": (lambda: lambda x: honest(x)[:1], "output 0 is"),
    "returns nothing": (lambda: lambda x: None, "0 outputs"),
    "returns NaN": (lambda: lambda x: honest(x) * float("nan"), "wrong"),
    "puts work off": (lambda: lambda x: honest(x).as_subclass(Lazy), "Lazy"),
    "overwrites its input": (lambda: overwrites_input, "overwritten"),
    "overwrites its input while timed": (lambda: overwrites_input_between(1, 4), "overwritten while timing"),
    "overwrites its input after it was timed": (lambda: overwrites_input_between(12, 99), "are overwritten"),
    "finishes on another thread": (lambda: finishes_later, "wrong"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_is_caught(name):
    make, reason = CHEATS[name]
    verdict = verdict_on(make())
    assert not verdict.valid
    assert reason in verdict.reason


@pytest.mark.parametrize(
    "function",
    [
        honest,
        lambda x: (x + x) + x.sum(1)[:, None],
        lambda x: torch.addcmul(x.sum(-1, keepdim=True), x, torch.full_like(x, 2.0)),
        lambda x: (honest(x), None),  # an output that is absent is no output
    ],
)
def test_honest_work_passes(function):
    verdict = verdict_on(function)
    assert verdict.valid, verdict.reason
    assert verdict.error <= verdict.allowed < 1e-5


def test_replaced_clock_is_caught_and_not_used(monkeypatch):
    subject, real = Subject(honest), time.perf_counter_ns
    waits = [Work(lambda: _wait_ns(real, 300_000), (), lambda seed: None)]
    with stopwatch("cpu", QUICK) as watch:
        monkeypatch.setattr(time, "perf_counter_ns", lambda: real() // 1000)
        waited_ms = watch.measure({"it": waits})["it"].ms_p20
        verdict = watch.verify({"it": subject.works}, subject.truth, (101,))["it"]
    assert waited_ms >= 0.3  # the time that passed, not the thousandth part that the replaced clock tells
    assert verdict.reason == "time.perf_counter_ns was replaced"


def _wait_ns(clock: Callable[[], int], ns: int) -> None:
    until = clock() + ns
    while clock() < until:
        pass


def test_a_reference_that_errs_itself_excuses_nothing():
    exact, wrong = Subject.draw(0).double(), Subject.draw(1)
    assert "checks nothing" in judge((wrong,), (exact,), (wrong,)).reason


def test_a_peer_may_answer_in_a_lower_dtype_and_is_held_to_that_one():
    exact = Subject.right(Subject.draw(0).double())
    usual = exact.float()
    assert not judge((exact.bfloat16(),), (exact,), (usual,)).valid
    assert judge((exact.bfloat16(),), (exact,), (usual,), any_dtype=True).valid
    assert not judge((exact.bfloat16() * 1.05,), (exact,), (usual,), any_dtype=True).valid


def test_one_cheat_does_not_spoil_the_verdict_on_others():
    cheat, fair = Subject(overwrites_input_between(1, 4)), Subject(honest)
    with stopwatch("cpu", QUICK) as watch:
        works = {"cheat": cheat.works, "fair": fair.works}
        watch.measure(works)
        verdicts = watch.verify(works, fair.truth, (101, 102))
    assert not verdicts["cheat"].valid
    assert verdicts["fair"].valid


def test_allowed_error_follows_the_dtype():
    exact = Subject.draw(0).double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = exact.to(dtype)
        assert judge((rounded,), (exact,), (rounded,)).valid
        nudged = (exact * (1 + 8 * torch.finfo(dtype).eps)).to(dtype)
        assert not judge((nudged,), (exact,), (rounded,)).valid


# ---- the speed of light ------------------------------------------------------------------------------------------
def test_faster_than_light_is_invalid():
    fraction, reason = roofline(1.0, flops=2e9, bytes_moved=1e6, peak_flops=1e12, peak_bytes=1e9)
    assert fraction == pytest.approx(2.0)
    assert "speed of light" in reason
    fraction, reason = roofline(4.0, flops=2e9, bytes_moved=1e6, peak_flops=1e12, peak_bytes=1e9)
    assert fraction == pytest.approx(0.5)
    assert reason is None


def test_the_roofline_is_the_slower_of_both_roofs_and_unknown_is_none():
    assert roofline(10.0, 1e9, 5e6, 1e12, 1e9)[0] == pytest.approx(0.5)
    assert roofline(10.0, 1e9, 5e6, 1e12, None)[0] == pytest.approx(0.1)
    assert roofline(10.0, 1e9, 5e6, None, None) == (None, None)
    assert "did not advance" in roofline(0.0, 1e9, 5e6, 1e12, None)[1]
    assert roofline(0.95, 0, 1e6, None, 1e9, slack=0.1)[1] is None  # a measured peak may be beaten by a little


def test_enough_sets_of_inputs_to_leave_the_cache_cold():
    with stopwatch("cpu", Settings(most_cpu_bytes=1 << 30)) as watch:
        for size in (1 << 20, 16 << 20, 1 << 31):
            sets = watch.sets_needed(size)
            enough = sets * size >= 3 * watch.cache_bytes()
            assert sets == 1 or (sets - 1) * size < 3 * watch.cache_bytes()  # and not more than needed
            assert enough or sets == watch.settings.most_sets or (sets + 1) * size > watch.most_bytes()


def test_threads_are_set_stated_and_put_back():
    before = torch.get_num_threads()
    with stopwatch("cpu", QUICK, threads=1) as watch:
        found = watch.measure({"it": Subject(honest).works})["it"]
        assert torch.get_num_threads() == 1
    assert (found.threads, found.method) == (1, "perf_counter")
    assert torch.get_num_threads() == before


# ---- the same on a GPU -------------------------------------------------------------------------------------------
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="times CUDA kernels")


@gpu
@pytest.mark.parametrize("name", [name for name in CHEATS if "thread" not in name])
def test_cheat_is_caught_on_gpu(name):
    """Inside a graph Python runs once, so cheats by counting calls do honest work there or answer wrongly."""
    make, _ = CHEATS[name]
    if "skips" in name or "address" in name or "timed" in name:
        events_only = Settings(samples=8, most_samples=8, warmup_s=0.0, budget_s=0.0, graph_below_ms=0.0)
        subject = Subject(make(), "cuda")
        with stopwatch("cuda", events_only) as watch:
            watch.measure({"it": subject.works})
            assert not watch.verify({"it": subject.works}, subject.truth, (101, 102))["it"].valid
    else:
        assert not verdict_on(make(), "cuda").valid


@gpu
def test_side_stream_is_caught_on_gpu():
    side = torch.cuda.Stream()

    def elsewhere(x):
        answer = torch.zeros_like(x)
        with torch.cuda.stream(side):
            torch.cuda._sleep(4_000_000)
            answer.copy_(honest(x))
        return answer

    assert not verdict_on(elsewhere, "cuda").valid


@gpu
@pytest.mark.parametrize("graph_below_ms", [0.0, 10.0])
def test_honest_work_passes_on_gpu(graph_below_ms):
    settings = Settings(samples=20, most_samples=20, warmup_s=0.05, budget_s=0.0, graph_below_ms=graph_below_ms)
    subject = Subject(honest, "cuda")
    with stopwatch("cuda", settings) as watch:
        found = watch.measure({"it": subject.works})["it"]
        verdict = watch.verify({"it": subject.works}, subject.truth, (101, 102))["it"]
    assert verdict.valid, verdict.reason
    assert found.method.startswith("graph" if graph_below_ms else "events")


@gpu
@pytest.mark.parametrize("cycles", [20_000, 2_000_000])
def test_a_spin_of_known_cycles_scales_on_gpu(cycles):
    """Ten times the cycles take ten times as long, whether a graph or events hold the clock."""
    works = {
        "one": [Work(lambda: torch.cuda._sleep(cycles), (), lambda seed: None)],
        "ten": [Work(lambda: torch.cuda._sleep(10 * cycles), (), lambda seed: None)],
    }
    with stopwatch("cuda", Settings(samples=20, budget_s=0.2)) as watch:
        found = watch.measure(works)
    assert found["ten"].ms_p50 / found["one"].ms_p50 == pytest.approx(10, rel=0.15)
