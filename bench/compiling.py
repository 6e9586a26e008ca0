"""torch.compile in the bench: what is timed as compiled was compiled.

Beyond 8 versions of one function torch runs it uncompiled, which its log tells and its caller does not hear of. A peer
that is timed so would lose for no fault of its own, so here 64 are allowed, and beyond them the variant fails.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

LIMIT = 64  # versions of one function: by layers, sizes and dtypes


def strict() -> AbstractContextManager[None]:
    """Guards what compiles: one function up to LIMIT times, then FailOnRecompileLimitHit, one of FAILURES."""
    return torch._dynamo.config.patch(recompile_limit=LIMIT, fail_on_recompile_limit_hit=True)


def count_breaks() -> int:
    """How often torch.compile has cut a function in two so far: what lies between the parts runs uncompiled."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())
