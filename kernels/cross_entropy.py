"""Softmax cross-entropy of logits.

    s = softcap * tanh(z / softcap)  if softcap else  z            lse = log sum_v exp(s[m, v])
    loss[m] = (1 - e) * (lse - s[m, target]) + e * (lse - mean_v s[m, v]) + z_loss * lse^2        e = label_smoothing

    ds[m, v] = (1 + 2 * z_loss * lse) * softmax(s)[m, v] - (1 - e) * [v == target] - e / V
    dz = ds * (1 - (s / softcap)^2)  if softcap else  ds

    Rows whose target is ignore_index have loss 0 and no gradient, and "mean" divides by the number of the others.

logits: (M, V)   targets: (M,) int   loss: () or, for reduction "none", (M,), at least fp32

z-loss: Chowdhery et al., "PaLM", arXiv:2204.02311, section 5. Softcap: Gemma 2, arXiv:2408.00118, section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Cost, Op


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Loss of logits (M, V) against targets (M,), computed and returned in at least fp32.

    Where the two overlap this is torch.nn.functional.cross_entropy, down to the NaN of a mean over no rows at all.
    """
    s = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    loss = F.cross_entropy(s, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    if z_loss:
        kept = targets != ignore_index
        square = torch.where(kept, torch.logsumexp(s, dim=-1).square(), 0.0)
        total = {"none": square, "sum": square.sum(), "mean": square.sum() / kept.sum()}[reduction]
        loss = loss + z_loss * total
    return loss


def inputs(M: int, V: int, *, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """logits (M, V), targets (M,) of which one in eight is -100, ignored."""
    targets = torch.randint(V, (M,), device=device)
    targets[7::8] = -100
    return torch.randn(M, V, dtype=dtype, device=device) * 3, targets


def cost(M: int, V: int, *, itemsize: int) -> tuple[Cost, Cost]:
    """Compulsory traffic: the logits in, their gradient out; targets and fp32 statistics once in each direction."""
    row = M * (8 + 4)
    return Cost(4 * M * V, M * V * itemsize + row), Cost(3 * M * V, 2 * M * V * itemsize + row)


CROSS_ENTROPY = Op(
    name="cross_entropy",
    reference=cross_entropy_reference,
    triton=None,
    inputs=inputs,
    parity=(dict(M=1, V=1), dict(M=5, V=65), dict(M=17, V=1023), dict(M=3, V=50257)),
    domain=dict(M=range(1, 40), V=range(2, 1500)),
    bench=(dict(M=16384, V=50304), dict(M=8192, V=131072), dict(M=4096, V=262144)),
    cost=cost,
    peers={"torch": F.cross_entropy},
    summary="log sum_v exp(z[v]) - z[target], with smoothing, z-loss and softcap",
)
