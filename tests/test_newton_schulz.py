"""The products of Newton-Schulz, interpreted, and the iteration against float64 numpy and the band it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import DTYPES, relative_error
from torch import Tensor

import kernels
import kernels.newton_schulz as newton_schulz_page
from kernels._triton import Launcher, launching
from kernels.interpret import interpreting
from kernels.newton_schulz import (
    KERNEL_PRODUCTS,
    POLAR_EXPRESS,
    QUINTIC,
    REFERENCE_PRODUCTS,
    SAFETY,
    Coefficients,
    cost,
    newton_schulz_reference,
    newton_schulz_triton,
    steps_per_gram,
)

IMPLEMENTATIONS = {
    "reference": newton_schulz_reference,
    "interpret": kernels.load("reference", newton_schulz="interpret").newton_schulz,
}
each_implementation = pytest.mark.parametrize("newton_schulz", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(B: int, M: int) -> Tensor:
    x = normal(B, M, M)
    return (x + x.mT) / 2


def commuting(B: int, M: int) -> tuple[Tensor, Tensor]:
    """Two polynomials of one symmetric matrix of unit size or so."""
    A = symmetric(B, M) / M**0.5
    return A + 2 * A @ A, A @ A - 0.5 * A


ARGUMENTS = {
    "gram": lambda M, N: (normal(2, M, N),),
    "commuting": lambda M, N: (*commuting(2, M), 1.5, -2.5, 3.0),
    "affine": lambda M, N: (symmetric(2, M), normal(2, M, N), 3.5),
}


def rounded(arguments: tuple, dtype: torch.dtype) -> tuple:
    return tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N", [(1, 3), (65, 33), (129, 40)])
@pytest.mark.parametrize("product", ARGUMENTS)
def test_a_product_meets_the_parity_rule(product: str, M: int, N: int, dtype: torch.dtype) -> None:
    arguments = rounded(ARGUMENTS[product](M, N), dtype)
    with interpreting():
        found = getattr(KERNEL_PRODUCTS, product)(*arguments)
    same = getattr(REFERENCE_PRODUCTS, product)(*arguments)
    truth = getattr(REFERENCE_PRODUCTS, product)(*rounded(arguments, torch.float64))
    assert found.dtype == dtype and found.shape == same.shape
    assert relative_error(found, truth) <= 2 * relative_error(same, truth) + torch.finfo(dtype).eps


@pytest.mark.parametrize("product", ["gram", "affine"])
def test_a_product_takes_a_tall_matrix_as_it_lies(product: str) -> None:
    """Transposed, or as part of longer rows; the update keeps the memory layout of x, as the optimizer's sums want."""
    *P, x = (a.float() for a in ARGUMENTS[product](65, 70)[: 1 + (product == "affine")])
    with interpreting():
        plain = getattr(KERNEL_PRODUCTS, product)(*P, x, *([2.0] if P else []))
        for laid in (x.mT.contiguous().mT, torch.cat([x, x], -1)[..., :70]):
            found = getattr(KERNEL_PRODUCTS, product)(*P, laid, *([2.0] if P else []))
            torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-5)
            if P and laid.stride(-2) == 1:
                assert found.stride() == laid.stride()


def test_symmetric_products_are_symmetric_bit_for_bit() -> None:
    x = normal(1, 130, 20).bfloat16()
    with interpreting():
        A = KERNEL_PRODUCTS.gram(x)
        P = KERNEL_PRODUCTS.commuting(A, A, -2.5, 1.5, 0.5)
    assert torch.equal(A, A.mT) and torch.equal(P, P.mT)


def launches(M: int, N: int, arch: int, steps: int = 1) -> list[tuple[str, int, int]]:
    """(product, programs, rows of a tile) of each launch for one matrix; gram, commuting or affine."""
    found = []

    def record(kernel, grid, *_, **constants) -> None:
        product = {None: "affine", False: "gram", True: "commuting"}[constants.get("ADD")]
        found.append((product, grid[0], constants["BLOCK_M"]))

    with launching(Launcher(record, arch)):
        newton_schulz_triton(torch.empty(1, M, N, dtype=torch.bfloat16, device="meta"), steps)
    return found


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
@pytest.mark.parametrize("n", [1024, 1280, 1600, 2048, 4096, 6400])
@pytest.mark.parametrize("aspect", [1, 4])
def test_symmetric_products_launch_little_more_than_half_of_the_tiles(n: int, aspect: int, arch: int) -> None:
    for M, N in ((n, aspect * n), (aspect * n, n)):
        products = launches(M, N, arch)
        assert [name for name, _, _ in products] == ["gram", "commuting", "affine"]
        for _, programs, block in products[:2]:
            blocks = -(-n // block)
            assert programs <= 0.5625 * blocks**2  # 0.56 but for n = 1024, where a tile is an eighth of it


@pytest.mark.parametrize("M, N, steps", [(512, 512, 5), (512, 2048, 5), (4096, 1024, 4), (512, 1024, 3), (640, 768, 4)])
def test_cost_is_that_of_the_launches(M: int, N: int, steps: int) -> None:
    """A symmetric product counts half of its FLOPs; the kernels also find the other half of tiles on the diagonal."""
    K, L = min(M, N), max(M, N)
    flops, grams, launched = 0.0, 0, launches(M, N, 0, steps)
    for kernel, programs, block in launched:
        contracted = L if kernel == "gram" else K
        half = 0.5 * (K / block) ** 2 / programs if kernel != "affine" else 1.0
        flops += 2 * half * programs * block * block * contracted
        grams += kernel == "gram"
    assert flops == pytest.approx(cost(B=1, M=M, N=N, steps=steps, itemsize=2)[0].flops)
    assert grams == len(steps_per_gram(M, N, steps)) and sum(steps_per_gram(M, N, steps)) == steps
    plain = steps * (3 * K * K * L + K**3)
    assert flops < 0.73 * plain if steps >= 4 and L == 4 * K else flops == pytest.approx(plain)


def in_numpy(x: np.ndarray, steps: int, coefficients: Coefficients) -> np.ndarray:
    """The formulas of the page's head, one matrix at a time."""
    if x.shape[0] > x.shape[1]:
        return in_numpy(x.T, steps, coefficients).T
    x = x / max(SAFETY * np.sqrt((x * x).sum()), 1e-7)
    for a, b, c in coefficients[:steps]:
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return x


@each_implementation
@pytest.mark.parametrize("coefficients", [QUINTIC, POLAR_EXPRESS], ids=["quintic", "polar express"])
@pytest.mark.parametrize("M, N", [(5, 9), (66, 3)])
def test_every_stage_is_numpys(newton_schulz, M: int, N: int, coefficients: Coefficients) -> None:
    x = normal(2, M, N)
    for steps in range(4):
        expected = np.stack([in_numpy(matrix, steps, coefficients) for matrix in x.numpy()])
        found = newton_schulz(x.float(), steps, coefficients)
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def with_singular_values(s: Tensor, M: int, N: int) -> Tensor:
    u, _, v = torch.linalg.svd(normal(1, M, N, seed=1), full_matrices=False)
    return u * s @ v


GRAM_MATRICES = {
    "condition 1e6": with_singular_values(torch.logspace(0, -6, 64, dtype=torch.float64), 64, 256),
    "a spike": normal(1, 64, 256) + 20 * normal(1, 64, 1, seed=3) @ normal(1, 1, 256, seed=4),
}
MATRICES = {
    "random": normal(1, 24, 70),
    "tall": normal(1, 70, 24),
    "one row": normal(1, 1, 40),
    "rank 3 of 16": normal(1, 16, 3) @ normal(1, 3, 48, seed=2),
    "condition 50": with_singular_values(torch.logspace(0, -1.7, 16, dtype=torch.float64), 16, 48),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*MATRICES, "condition 1e6", "a spike"])
def test_gram_and_plain_agree_by_the_parity_rule(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that share a Gram matrix err at most twice as much as steps that each find their own."""
    x = (MATRICES | GRAM_MATRICES)[kind].to(dtype)
    found = {steps: newton_schulz_reference(x, steps) for steps in (4, 5)}
    monkeypatch.setattr(newton_schulz_page, "LONG", math.inf)
    for steps, gram in found.items():
        plain, truth = newton_schulz_reference(x, steps), newton_schulz_reference(x.double(), steps)
        assert not torch.equal(gram, plain)
        assert relative_error(gram, truth) <= 2 * relative_error(plain, truth) + torch.finfo(dtype).eps


LARGEST = {QUINTIC: (0.65, 1.21), POLAR_EXPRESS: (0.85, 1.15)}  # of singular values that start above 1/100


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MATRICES)
def test_singular_values_end_in_the_band(newton_schulz, kind: str, dtype: torch.dtype) -> None:
    """Those that start above a hundredth of the norm end near one, and no singular value ends above the band."""
    x = MATRICES[kind].to(dtype)
    start = torch.linalg.svdvals(x.double())
    start = start / (SAFETY * start.norm())
    for coefficients, (low, high) in LARGEST.items():
        found = torch.linalg.svdvals(newton_schulz(x, 5, coefficients).double())
        slack = 8 * torch.finfo(dtype).eps
        assert found.max() <= high + slack
        assert found[start > 0.01].min() >= low - slack


@each_implementation
def test_zero_stays_zero_and_nan_stays_in_its_matrix(newton_schulz) -> None:
    x = normal(4, 6, 9).bfloat16()
    alone = newton_schulz(x[3:])
    x[0], x[1, 2, 3], x[2, 0, 0] = 0.0, torch.nan, torch.inf
    y = newton_schulz(x)
    assert (y[0] == 0).all() and y[1].isnan().all() and not y[2].isfinite().any()
    assert torch.equal(y[3:], alone)


@each_implementation
def test_no_gradient_and_no_write_to_the_input(newton_schulz) -> None:
    x = normal(1, 3, 4).float()
    before = x.clone()
    assert not newton_schulz(x.requires_grad_()).requires_grad
    assert torch.equal(x.detach(), before)


def test_half_precision_survives_a_large_norm() -> None:
    x = torch.full((1, 64, 64), 6e4, dtype=torch.float16)
    assert newton_schulz_reference(x).float().norm() == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("newton_schulz", [newton_schulz_reference, newton_schulz_triton])
def test_wrong_arguments_are_named(newton_schulz) -> None:
    for arguments, message in [
        ((torch.zeros(3, 3),), "x must be a stack"),
        ((torch.zeros(1, 3, 3, dtype=torch.int64),), "x must be floating"),
        ((torch.zeros(1, 3, 3), 6), "steps must be 0 to 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            newton_schulz(*arguments)
