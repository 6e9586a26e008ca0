"""Root-mean-square normalization.

    rstd = 1 / sqrt(sum_n x[m, n]^2 / N + eps)        xhat = x * rstd        y = xhat * weight

    g = dy * weight        dx = rstd * (g - xhat * mean_n(g * xhat))        dweight = sum_m dy * xhat

x, y: (..., N), taken as (M, N)   weight: (N,) or absent, which is a weight of ones   rstd: (M,) fp32

Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467. Without a weight: nanochat.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rmsnorm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Scale the last axis of x (..., N) to unit root mean square, then by weight (N,). Returns x's dtype.

    Computes in at least fp32; torch's rms_norm is the formula above.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), x.shape[-1:], None if weight is None else weight.to(wide), eps).to(x.dtype)
