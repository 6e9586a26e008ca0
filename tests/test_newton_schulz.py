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
from kernels.proof.interpret import interpreting

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


def launches(
    M: int, N: int, arch: int, steps: int = 1, dtype: torch.dtype = torch.bfloat16
) -> list[tuple[str, int, int]]:
    """(product, programs, rows of a tile) of each launch for one matrix; gram, commuting or affine."""
    found = []

    def record(kernel, grid, *_, **constants) -> None:
        product = {None: "affine", False: "gram", True: "commuting"}[constants.get("ADD")]
        found.append((product, grid[0], constants["BLOCK_M"]))

    with launching(Launcher(record, arch)):
        newton_schulz_triton(torch.empty(1, M, N, dtype=dtype, device="meta"), steps)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [0, 80, 90, 100])
@pytest.mark.parametrize("n", [1024, 1025, 1280, 1600, 2048, 4096, 6400])
@pytest.mark.parametrize("aspect", [1, 4])
def test_symmetric_products_launch_little_more_than_half_of_the_tiles(
    n: int, aspect: int, arch: int, dtype: torch.dtype
) -> None:
    """At most 0.56 of what a plain product launches, b (b + 1) / 2 of b² tiles, as soon as b is 9.

    With tiles of 64 that is from n = 513, with tiles of 128 from n = 1025: at n = 1024 it is 36 of 64, 0.5625.
    """
    for M, N in ((n, aspect * n), (aspect * n, n)):
        for steps in (1, 5):
            products = launches(M, N, arch, steps, dtype)
            names = [name for name, _, _ in products]
            assert names.count("gram") == names.count("affine") == len(steps_per_gram(M, N, steps))
            assert names.count("commuting") == sum(4 * count - 3 for count in steps_per_gram(M, N, steps))
            for name, programs, block in products:
                if name == "affine":
                    continue
                blocks = -(-n // block)
                assert programs == blocks * (blocks + 1) // 2
                if (n, block) == (1024, 128):
                    assert programs == 0.5625 * blocks**2
                else:
                    assert programs <= 0.56 * blocks**2


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


SPECTRA = MATRICES | {"condition 1e6": with_singular_values(torch.logspace(0, -6, 16, dtype=torch.float64), 16, 48)}


def ends(start: Tensor, coefficients: Coefficients) -> Tensor:
    """Where the five polynomials take a singular value."""
    for a, b, c in coefficients:
        start = a * start + b * start**3 + c * start**5
    return start


def band(coefficients: Coefficients) -> tuple[float, float]:
    """What the polynomials promise: the lowest end of a start in [1/100, 1], and the highest of any in [0, 1]."""
    start = torch.linspace(0, 1 / SAFETY, 100_001, dtype=torch.float64)
    found = ends(start, coefficients)
    return found[start >= 0.01].min().item(), found.max().item()


@pytest.mark.parametrize("coefficients, low, high", [(QUINTIC, 0.68, 1.21), (POLAR_EXPRESS, 0.858, 1.142)])
def test_the_band_is_the_published_one(coefficients: Coefficients, low: float, high: float) -> None:
    found = band(coefficients)
    assert low <= found[0] < found[1] <= high


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_singular_values_end_in_the_band(newton_schulz, kind: str, dtype: torch.dtype) -> None:
    """Those that start above a hundredth of the norm end near one, and no singular value ends above the band.

    Of a matrix of lower rank, or one so badly conditioned that rounding drowns its smallest singular values, these
    stay below the band: there nothing is promised but that they do not leave it upwards.
    """
    x = SPECTRA[kind].to(dtype)
    start = torch.linalg.svdvals(x.double())
    start = start / (SAFETY * start.norm())
    for coefficients in (QUINTIC, POLAR_EXPRESS):
        low, high = band(coefficients)
        found = torch.linalg.svdvals(newton_schulz(x, 5, coefficients).double())
        slack = 8 * torch.finfo(dtype).eps
        assert found.max() <= high + slack
        assert found[start > 0.01].min() >= low - slack


@each_implementation
@pytest.mark.parametrize("dtype, N", [(torch.float32, 6), (torch.bfloat16, 9)], ids=str)
def test_zero_stays_zero_and_nan_stays_in_its_matrix(newton_schulz, dtype: torch.dtype, N: int) -> None:
    """Of (6, 6) by plain steps, of (6, 9) by steps that share a Gram matrix."""
    x = normal(4, 6, N).to(dtype)
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
