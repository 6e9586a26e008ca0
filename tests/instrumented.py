"""A plugin of pytest for kernels that Triton instruments: they ask for scratch memory, which nobody gives by default.

`triton.set_allocator` holds for one thread; autograd runs backward passes in another.
"""

from __future__ import annotations

import pytest
import torch
from triton.runtime import _allocation


def scratch(self: object, size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    _allocation.NullAllocator.__call__ = scratch
