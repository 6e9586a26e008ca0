"""What a training step keeps in memory from forward to backward, by the part of the model that keeps it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.model import GPT
from kernels import Ops

PARTS = {  # of the ops; whatever else is kept are inputs of matrix products
    "attention": "attention", "rotary": "rotary", "activation": "MLP activation", "cross_entropy": "loss",
    "linear_cross_entropy": "loss", "layernorm": "norms", "rmsnorm": "norms", "add_layernorm": "norms",
    "add_rmsnorm": "norms",
}  # fmt: skip


def saved_bytes(config: GPTConfig, ops: Ops, dtype: torch.dtype, tokens: Tensor, targets: Tensor) -> Counter[str]:
    """Bytes saved by one eager forward pass over tokens, targets (B, T), by part; what two parts share counts once."""
    running = ["GEMMs"]  # the part that runs, innermost last

    def within(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            running.append(PARTS.get(name, name))
            try:
                return function(*args, **kwargs)
            finally:
                running.pop()

        return run

    noted = Ops({name: (how, why, within(name, getattr(ops, name))) for name, (how, why) in ops.chosen.items()})
    with tokens.device:
        model = GPT(config, noted, dtype)
    held = (*model.parameters(), *model.buffers(), tokens, targets)
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: dict[int, tuple[str, int, Tensor]] = {}  # by address; the tensor, so that no other comes to lie there

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            saved.setdefault(storage.data_ptr(), (running[-1], storage.nbytes(), tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(tokens, targets)
    sizes: Counter[str] = Counter(dict.fromkeys(("GEMMs", *PARTS.values()), 0))
    for part, size, _ in saved.values():
        sizes[part] += size
    return sizes
