"""Softmax cross-entropy of a linear map, without holding all of its logits.

    z[m, v] = sum_c x[m, c] * weight[v, c]        loss = cross_entropy(z, target)        (see cross_entropy)

    dx = dz @ weight        dweight = dz^T @ x

x: (M, C)   weight: (V, C)   targets: (M,) int   loss: () or, for reduction "none", (M,), at least fp32

Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009; chunked as in Liger-Kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Loss of the logits x (M, C) @ weight (V, C)^T against targets (M,). The logits have x's dtype, the loss at least fp32."""
    s = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    loss = F.cross_entropy(
        s, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    if z_loss:
        kept = targets != ignore_index
        square = torch.where(kept, torch.logsumexp(s, dim=-1).square(), 0.0)
        total = {"none": square, "sum": square.sum(), "mean": square.sum() / kept.sum()}[reduction]
        loss = loss + z_loss * total
    return loss
