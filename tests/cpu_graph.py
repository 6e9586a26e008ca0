"""A CUDA graph's twin on a CPU: what torch and the kernels did while it was recorded, done again on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kernels._triton import launcher, launching

# Where the host would wait for the device, or copy numbers to it: what no capture can hold.
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"}
COPIES = {"scalar_tensor", "lift_fresh", "pin_memory"}


def storages(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, Tensor)}


class CpuGraph(TorchDispatchMode):
    """Recorded as it is entered, and replayed by `replay`."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Callable[[], None]] = []
        self.names: list[str] = []  # of what is done at a replay
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        assert name not in READS | COPIES, name
        out = function(*args, **kwargs)
        if function._schema.is_mutable:
            self._keep(name, lambda: function(*args, **kwargs))
        elif not storages(out) <= storages((args, kwargs)):  # no view
            tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.made += tensors

            def again() -> None:
                found = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
                for mine, new in zip(tensors, found, strict=True):
                    mine.copy_(new)

            if not name.startswith(("empty", "new_empty")):
                self._keep(name, again)
        return out

    def _keep(self, name: str, again: Callable[[], Any]) -> None:
        self.names.append(name)
        self.tape.append(again)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Launches too, if a launcher is at work."""
        by = launcher()

        def launch(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
            assert by is not None
            with _disable_current_modes():
                by.launch(kernel, grid, *args, **kwargs)
            self._keep(kernel.__name__, lambda: by.launch(kernel, grid, *args, **kwargs))

        with self, launching(None if by is None else replace(by, launch=launch)):
            yield
        for x in self.made:  # at a capture nothing runs
            if x.is_floating_point():
                x.fill_(float("nan"))

    def replay(self) -> None:
        for again in self.tape:
            again()

    def pool(self) -> None:
        """Its memory, which is anybody's here."""


@torch.inference_mode()
def captured(run: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[CpuGraph, Any]:
    """As gptfast.engine.decoder's, on a CPU."""
    run()
    graph = CpuGraph()
    with graph.recording():
        result = run()
    return graph, result
