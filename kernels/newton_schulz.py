"""Newton-Schulz orthogonalization: replace the singular values of each matrix of a stack by ones, with products alone.

    X0 = X / (1.01 |X|_F)                      |X|_F bounds the largest singular value; 1.01 leaves room for rounding
    for (a, b, c) in coefficients[:steps]:
        A = X Xᵀ                               the Gram matrix, symmetric
        P = b A + c A A                        symmetric too
        X = a X + P X                          a s + b s³ + c s⁵ on every singular value s, singular vectors untouched

An odd polynomial of X acts on its singular values only, so the iteration maps X = U S Vᵀ to U p(S) Vᵀ with p(S) near 1:
the direction of steepest descent under the spectral norm, which is Muon's update. Tall matrices are iterated
transposed, so that A is always (min(m, n), min(m, n)).

    x, out: (B, m, n)   A, P: (B, min(m, n), min(m, n))

Sources: Muon and its coefficients, Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; one polynomial per
step, each the best for the interval that the last one left, Polar Express, Amsel et al. 2025,
https://arxiv.org/abs/2505.16932.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]

# Steep at zero rather than convergent: after five steps singular values scatter in about [0.7, 1.2].
QUINTIC: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5

# Greedy minimax polynomials, with the paper's guard against rounding (safety factor 2e-2, cushion 2). A run of four
# steps takes the first four.
POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

SAFETY = 1.01
TINY = 1e-7  # norms below it are not blown up: a zero matrix stays zero


@dataclass(frozen=True)
class Products:
    """The three products that the iteration is made of."""

    gram: Callable[[Tensor], Tensor]  # x (B, m, n) -> x xᵀ (B, m, m)
    quadratic: Callable[[Tensor, float, float], Tensor]  # A (B, m, m), b, c -> b A + c A A
    affine: Callable[[Tensor, Tensor, float], Tensor]  # P (B, m, m), x (B, m, n), a -> a x + P x


REFERENCE_PRODUCTS = Products(
    gram=lambda x: torch.bmm(x, x.mT),
    quadratic=lambda A, b, c: torch.baddbmm(A, A, A, beta=b, alpha=c),
    affine=lambda P, x, a: torch.baddbmm(x, P, x, beta=a),
)


def newton_schulz_reference(x: Tensor, steps: int = 5, coefficients: Coefficients = POLAR_EXPRESS) -> Tensor:
    """The orthogonal factors of a stack of matrices, up to the band that the coefficients promise.

    x: (B, m, n), any floating dtype -> (B, m, n) of that dtype. Every product is rounded to x's dtype, because that is
    the algorithm: Muon runs it in bf16 by design. Float64 in gives float64 truth. Matrices of a stack do not see each
    other: NaN in one stays there, and a zero matrix gives a zero.
    """
    return iterate(x, steps, coefficients, REFERENCE_PRODUCTS)


def iterate(x: Tensor, steps: int, coefficients: Coefficients, products: Products) -> Tensor:
    """The iteration at the head of this page, over whichever products."""
    _check(x, steps, coefficients)
    m, n = x.shape[-2:]
    if m > n:
        return iterate(x.mT, steps, coefficients, products).mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / (SAFETY * norm).clamp(min=TINY).to(x.dtype)
    for a, b, c in coefficients[:steps]:
        A = products.gram(x)
        x = products.affine(products.quadratic(A, b, c), x, a)
    return x


def _check(x: Tensor, steps: int, coefficients: Coefficients) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be a stack of matrices (B, m, n), not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    if not 0 <= steps <= len(coefficients):
        raise ValueError(f"steps must be 0 to {len(coefficients)}, as many as there are coefficients, not {steps}")
