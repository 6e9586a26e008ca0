"""A second device that every machine has: what is right on a CPU and wrong where tensors lie on a GPU is seen here.

Its tensors call themselves `meta` and hold their values on the CPU. As on a GPU, an operation takes tensors of one
device alone, numbers of no axes apart; tensors come and go by copies.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _There(Tensor):
    """A tensor of the second device around its values."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "_There":
        there = Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device="meta"
        )
        there.values_here = values
        return there

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Elsewhere():
            return function(*args, **(kwargs or {}))


class Elsewhere(TorchDispatchMode):
    """While it is entered, device="meta" is the second device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        strangers = [t for t in tensors if not isinstance(t, _There) and t.dim()]
        there = any(isinstance(t, _There) for t in tensors)
        if there and strangers and function not in _COPIES:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found meta and cpu")
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == "meta"
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(lambda t: t.values_here if isinstance(t, _There) else t, (args, kwargs))
        out = function(*args, **kwargs)
        return tree_map(lambda t: _There(t) if isinstance(t, Tensor) else t, out) if there else out
