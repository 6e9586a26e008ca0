"""Stops a run on a signal, and refuses an update on a non-finite loss or gradient or on a loss spike."""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import statistics
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, Self

from gptfast.errors import UserError
from gptfast.step import Batch
from gptfast.untrusted import count

# Schedulers send SIGTERM or SIGUSR1, people SIGINT, and a closing terminal SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
WINDOW = 128  # accepted losses that a spike is measured against
WARM_WINDOW = 16  # accepted losses needed before spikes are looked for


class Stopped(KeyboardInterrupt):
    """Raised when a signal asks the run to save and exit. Not an Exception, so no compiler or tracker swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stopper:
    """Turns a signal into `Stopped`, raised at once, or, while held, at `release`.

        with Stopper() as stopper:
            ...                    # a signal raises here
            stopper.hold()         # weights change, a checkpoint is written: a signal waits
            stopper.release()      # until here

    The second SIGINT exits at once, without saving. `deferred`: signals are only noted in `signum`, for
    ranks that must agree to exit together. Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, *, deferred: bool = False) -> None:
        self.signum: int | None = None
        self.deferred = deferred
        self._held = True
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            wanted = [number for number in SIGNALS if not (number == signal.SIGHUP and is_nohup)]
            self._before = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self, *_: object) -> None:
        """Makes signals wait. Ignores its arguments, so that it can be an optimizer's pre-step hook."""
        self._held = True

    def release(self, agreed: int = 0) -> None:
        """Lets signals raise at once again; raises Stopped for one that came while held or, deferred, for `agreed`."""
        self._held = self.deferred
        signum = agreed if self.deferred else self.signum
        if signum:
            self._held = True
            raise Stopped(signum)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum == signal.SIGINT == signum:
            tell("interrupted again: leaving without a save")
            os._exit(128 + signum)
        self.signum = signum
        tell(f"{signal.Signals(signum).name}: saving, then leaving")
        if not self._held:
            self._held = True  # the next signal must not interrupt the handling of this one
            raise Stopped(signum)


def tell(text: str) -> None:
    """Writes to stderr if it is still open. Not by print, which a signal may have interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


class Output(io.TextIOBase):
    """Stdout while training: once it cannot be written, as after `| head`, the run saves and exits as on a signal.

    So the current update is finished first. Whatever is printed after that is dropped.
    """

    def __init__(self, stream: Any, stopper: Stopper) -> None:
        self.stream, self.stopper = stream, stopper
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def isatty(self) -> bool:
        return self.failure is None and bool(self.stream.isatty())

    def _try(self, write: Callable[[], object]) -> None:
        if self.failure is None:
            try:
                write()
            except OSError as error:
                self.failure = error
                self.stopper.signum = self.stopper.signum or signal.SIGPIPE
                tell("the output cannot be written any more: saving, then leaving")


class Refused(UserError):
    """Raised for a refused update that stops the run; the weights are unchanged. `batches` holds its micro-batches."""

    def __init__(self, reason: str, batches: list[Batch]) -> None:
        super().__init__(reason)
        self.batches = batches


class Guard:
    """Judges updates by loss and gradient norm, and is told which were taken (gptfast/step.py).

    A non-finite update stops the run, or with nonfinite="skip" is skipped and counted. With spike > 0 an update is
    skipped if its loss lies more than `spike` standard deviations above the mean of the last WINDOW accepted losses.
    The newest is left out of that window, since the next update begins before its loss is known here. Losses of skipped
    updates never enter it, so neither a NaN nor a spike can move it. More than `max_skips` skips in a row stop the
    run.
    """

    def __init__(self, nonfinite: Literal["stop", "skip"] = "stop", spike: float = 0.0, max_skips: int = 10) -> None:
        self.nonfinite: Literal["stop", "skip"] = nonfinite
        self.spike, self.max_skips = spike, max_skips
        self.skipped = 0  # in the whole run
        self.in_a_row = 0
        self.heard = 0  # updates reported to this process
        self.news: list[tuple[int, str]] = []  # ordinal and reason of each skipped update
        self._losses: deque[float] = deque(maxlen=WINDOW + 1)

    def limit(self, unread: int = 0) -> float:
        """Returns the loss above which the next update is a spike; `unread`: 1 if the previous loss is not read yet."""
        mean, deviation = self._measure(newest=unread > 0 or self.in_a_row > 0)
        return mean + self.spike * deviation

    def _measure(self, newest: bool) -> tuple[float, float]:
        """Returns mean and deviation of the accepted losses; an infinite mean if they are too few or `spike` is 0."""
        losses = list(self._losses)[: None if newest else -1][-WINDOW:]
        if self.spike == 0 or len(losses) < WARM_WINDOW:
            return math.inf, 0.0
        return statistics.fmean(losses), statistics.pstdev(losses)

    def record(self, loss: float, norm: float, taken: bool, batches: list[Batch]) -> None:
        """Records the outcome of an update. Raises Refused where the run must stop."""
        self.heard += 1
        if taken:
            self._losses.append(loss)
            self.in_a_row = 0
            return
        reason = self._objection(loss, norm)
        self.skipped += 1
        self.in_a_row += 1
        if self.nonfinite == "stop" and not (math.isfinite(loss) and math.isfinite(norm)):
            raise Refused(reason, batches)
        if self.in_a_row > self.max_skips:
            raise Refused(f"{reason}, as were {self.max_skips} before", batches)
        self.news.append((self.heard - 1, f"update skipped, {reason}; {self.skipped} so far"))

    def _objection(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return "the loss is not a number"
        if not math.isfinite(norm):
            return "the gradient is not a number"
        mean, deviation = self._measure(newest=self.in_a_row > 0)
        return f"the loss {loss:.4f} is a spike over {mean:.4f} ± {deviation:.4f}"

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises untrusted.STRANGE for a state that is damaged."""
        self.skipped, self.in_a_row = count(state["skipped"]), count(state["in_a_row"])
        if not all(isinstance(loss, float) and math.isfinite(loss) for loss in state["losses"]):
            raise ValueError("a loss is no finite number")
        self._losses = deque(state["losses"], maxlen=WINDOW + 1)
