"""Softmax cross-entropy of a linear map, without holding all of its logits.

    z[m, v] = sum_c x[m, c] * weight[v, c]        loss = cross_entropy(z, target)        (see cross_entropy)

    dx = dz @ weight        dweight = dz^T @ x

x: (M, C)   weight: (V, C)   targets: (M,) int   loss: () or, for reduction "none", (M,), at least fp32

Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009; chunked as in Liger-Kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Cost, Op


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
    """Loss of the logits x (M, C) @ weight (V, C)^T, in x's dtype, against targets (M,). Returns at least fp32."""
    s = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    loss = F.cross_entropy(s, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    if z_loss:
        kept = targets != ignore_index
        square = torch.where(kept, torch.logsumexp(s, dim=-1).square(), 0.0)
        total = {"none": square, "sum": square.sum(), "mean": square.sum() / kept.sum()}[reduction]
        loss = loss + z_loss * total
    return loss


def inputs(M: int, V: int, C: int, *, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """x (M, C) and weight (V, C) with logits of unit variance, targets (M,) of which one in eight is -100, ignored."""
    targets = torch.randint(V, (M,), device=device)
    targets[7::8] = -100
    x = torch.randn(M, C, dtype=dtype, device=device)
    return x, torch.randn(V, C, dtype=dtype, device=device) * C**-0.5, targets


def cost(M: int, V: int, C: int, *, itemsize: int) -> tuple[Cost, Cost]:
    """Three products. Compulsory traffic: x, weight and targets in; backward, both again and their gradients out."""
    operands = (M * C + V * C) * itemsize + M * 8
    return Cost(2 * M * V * C, operands), Cost(4 * M * V * C, 2 * operands)


LINEAR_CROSS_ENTROPY = Op(
    name="linear_cross_entropy",
    reference=linear_cross_entropy_reference,
    triton=None,
    inputs=inputs,
    parity=(dict(M=1, V=1, C=1), dict(M=5, V=65, C=16), dict(M=33, V=1023, C=40)),
    domain=dict(M=range(1, 40), C=range(1, 70), V=range(2, 400)),
    bench=(dict(M=8192, V=50304, C=768), dict(M=8192, V=128256, C=4096)),
    cost=cost,
    summary="cross_entropy(x @ weight^T, target) without all the logits",
)
