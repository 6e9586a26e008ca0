"""Root-mean-square normalization.

    rstd = 1 / sqrt(sum_n x[m, n]^2 / N + eps)        xhat = x * rstd        y = xhat * weight

    g = dy * weight        dx = rstd * (g - xhat * mean_n(g * xhat))        dweight = sum_m dy * xhat

x, y: (..., N), taken as (M, N)   weight: (N,) or absent, which is a weight of ones   rstd: (M,) fp32

Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467. Without a weight: nanochat.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Cost, Op


def rmsnorm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Scale the last axis of x (..., N) to unit root mean square, then by weight (N,). Returns x's dtype.

    Computes in at least fp32; torch's rms_norm is the formula above.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), x.shape[-1:], None if weight is None else weight.to(wide), eps).to(x.dtype)


def inputs(M: int, N: int, *, weight: bool = True, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """x (M, N), weight (N,) about one or None."""
    x = torch.randn(M, N, dtype=dtype, device=device)
    return x, torch.randn(N, dtype=dtype, device=device) * 0.5 + 1 if weight else None


def cost(M: int, N: int, *, weight: bool = True, itemsize: int) -> tuple[Cost, Cost]:
    """Compulsory traffic: x and y forward; dy, x and dx backward; the weight, its gradient and fp32 statistics once."""
    gain, statistics = weight * N * itemsize, M * 4
    return (
        Cost(4 * M * N, 2 * M * N * itemsize + gain + statistics),
        Cost(9 * M * N, 3 * M * N * itemsize + 2 * gain + statistics),
    )


RMSNORM = Op(
    name="rmsnorm",
    reference=rmsnorm_reference,
    triton=None,
    inputs=inputs,
    parity=(
        dict(M=1, N=1), dict(M=1, N=768), dict(M=7, N=129, weight=False), dict(M=37, N=65), dict(M=0, N=16),
        dict(M=2, N=16385, weight=False),
    ),
    domain=dict(M=range(70), N=range(1, 1100), weight=(True, False)),
    bench=(dict(M=65536, N=768), dict(M=16384, N=1600), dict(M=16384, N=4096), dict(M=8192, N=8192, weight=False)),
    cost=cost,
    peers={"torch": lambda x, weight=None, eps=1e-6: F.rms_norm(x, x.shape[-1:], weight, eps)},
    summary="y = x / sqrt(mean(x^2) + eps) * weight",
)  # fmt: skip
