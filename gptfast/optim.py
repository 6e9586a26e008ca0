"""AdamW in nanoGPT's two groups, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


def adamw(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the parameters that want a gradient; those with two or more axes decay, biases and gains do not.

    One fused kernel updates all parameters where the device has it. Prints both groups, as nanoGPT does.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() >= 2]
    plain = [p for p in parameters if p.dim() < 2]
    for name, group in (("decayed", decayed), ("non-decayed", plain)):
        print(f"num {name} parameter tensors: {len(group)}, with {sum(p.numel() for p in group):,} parameters")
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
    print(f"using fused AdamW: {fused}")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=fused)


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place so that their joint 2-norm is at most `max_norm`; 0 leaves them. Returns the norm before, ().

    The foreach form: a few calls for all tensors. torch chooses it by itself on a GPU only.
    """
    parameters = list(parameters)
    if max_norm == 0.0:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
