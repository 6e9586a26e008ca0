"""How the server is doing: counts since its start for Prometheus, and the last seconds for the page's live panel."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import NamedTuple

WINDOW_S = 5.0  # what a rate looks back on
ANSWERS = 64  # whose times a median looks back on
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Step(NamedTuple):
    """One step of the engine."""

    at: float
    seconds: float
    tokens: int  # that answers got from it
    kept: int  # positions of the cache that held something
    decoding: int  # answers that had their first token before it


class Histogram:
    """Seconds counted in BUCKETS_S."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(BUCKETS_S) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[next((i for i, most in enumerate(BUCKETS_S) if seconds <= most), len(BUCKETS_S))] += 1
        self.total += seconds

    def lines(self, name: str, about: str) -> Iterable[str]:
        yield from (f"# HELP {name} {about}", f"# TYPE {name} histogram")
        below = 0
        for most, count in zip((*map(str, BUCKETS_S), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{most}"}} {below}'
        yield from (f"{name}_sum {self.total:.6f}", f"{name}_count {below}")


class Meter:
    """Told by the engine's thread, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: deque[Step] = deque()
        self._ttft, self._tpot = Histogram(), Histogram()
        self._recent_ttft: deque[float] = deque(maxlen=ANSWERS)
        self._durations: deque[float] = deque(maxlen=ANSWERS)
        self._ends: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._replies: Counter[tuple[str, int]] = Counter()

    def step(self, at: float, seconds: float, tokens: int, kept: int, decoding: int) -> None:
        with self._lock:
            self._steps.append(Step(at, seconds, tokens, kept, decoding))
            self._forget(at)

    def first_token(self, seconds: float) -> None:
        with self._lock:
            self._ttft.add(seconds)
            self._recent_ttft.append(seconds)

    def finished(
        self, reason: str, prompt: int, tokens: int, asked_at: float, first_at: float | None, now: float
    ) -> None:
        with self._lock:
            self._ends[reason] += 1
            self._tokens["prompt"] += prompt
            self._tokens["completion"] += tokens
            if first_at is not None:
                self._durations.append(now - first_at)
                if tokens > 1:
                    self._tpot.add((now - first_at) / (tokens - 1))

    def reply(self, path: str, status: int) -> None:
        with self._lock:
            self._replies[path, status] += 1

    def seconds_per_answer(self) -> float:
        """Median of the last answers, from their first token to their last; 1 before there is one."""
        with self._lock:
            return median(self._durations) if self._durations else 1.0

    def recent(self) -> tuple[list[Step], float | None]:
        """The steps of the last WINDOW_S, and the median time to first token of the last answers."""
        with self._lock:
            self._forget(time.perf_counter())
            return list(self._steps), median(self._recent_ttft) if self._recent_ttft else None

    def ends(self) -> Mapping[str, int]:
        """How many answers ended for which reason."""
        with self._lock:
            return dict(self._ends)

    def prometheus(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All that is known, and `gauges` {name: (about, value)}, in Prometheus's text format."""
        with self._lock:
            lines = list(_counter("answers_total", "answers by how they ended", "reason", self._ends))
            lines += _counter("tokens_total", "tokens read and given", "kind", self._tokens)
            lines += ("# HELP gptfast_http_replies_total replies", "# TYPE gptfast_http_replies_total counter")
            for (path, status), count in sorted(self._replies.items()):
                lines.append(f'gptfast_http_replies_total{{path="{path}",status="{status}"}} {count}')
            lines += self._ttft.lines("gptfast_ttft_seconds", "from the request to its first token")
            lines += self._tpot.lines("gptfast_tpot_seconds", "mean time of each further token of an answer")
        for name, (about, value) in gauges.items():
            lines += (f"# HELP gptfast_{name} {about}", f"# TYPE gptfast_{name} gauge", f"gptfast_{name} {value:g}")
        return "\n".join(lines) + "\n"

    def _forget(self, now: float) -> None:
        while self._steps and self._steps[0].at < now - WINDOW_S:
            self._steps.popleft()


def _counter(name: str, about: str, label: str, counts: Mapping[str, int]) -> Iterable[str]:
    yield from (f"# HELP gptfast_{name} {about}", f"# TYPE gptfast_{name} counter")
    for key, count in sorted(counts.items()):
        yield f'gptfast_{name}{{{label}="{key}"}} {count}'
