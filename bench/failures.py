"""What code raises that cannot do a case here. A page of the bench goes on after it, and says so in a row."""

from __future__ import annotations

from torch._dynamo.exc import FailOnRecompileLimitHit

from kernels import _triton

FAILURES: tuple[type[Exception], ...] = (
    RuntimeError, TypeError, ValueError, AssertionError, ImportError, AttributeError, FailOnRecompileLimitHit,
    *_triton.ERRORS,
)  # fmt: skip


def in_one_line(error: Exception) -> str:
    """Its kind and the first line of what it says, for the console; the rest is for the row."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
