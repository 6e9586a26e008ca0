"""What tests/test_parity.py cannot know of rmsnorm: its formula spelled out, and rows of a million."""

import pytest
import torch
from oracle import doubled, relative_error, run

import kernels
from kernels.rmsnorm import RMSNORM, rmsnorm_cpu, rmsnorm_reference

interpreted = kernels.load("reference", rmsnorm="interpret").rmsnorm


@pytest.mark.parametrize("function", [rmsnorm_reference, rmsnorm_cpu])
def test_it_is_the_formula(function):
    x, weight = RMSNORM.inputs(M=9, N=33, dtype=torch.float64)[0]
    formula = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(function(x, weight), formula, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
@pytest.mark.parametrize("function", [rmsnorm_cpu, interpreted], ids=["cpu", "kernel"])
def test_eps(function, eps):
    x, weight = RMSNORM.inputs(M=5, N=48, dtype=torch.float32)[0]
    x = x * 1e-3  # small enough for every eps here to matter
    assert relative_error(function(x, weight, eps), rmsnorm_reference(x.double(), weight.double(), eps)) < 1e-6


@pytest.mark.parametrize("function", [rmsnorm_reference, rmsnorm_cpu])
def test_a_row_of_a_million_keeps_its_digits(function):
    """Squares added one after another would lose two of seven."""
    arguments = RMSNORM.inputs(M=1, N=1_000_003, dtype=torch.float32)[0]
    for f, t in zip(run(function, arguments), run(rmsnorm_reference, doubled(arguments)), strict=True):
        assert relative_error(f, t) < 4 * torch.finfo(torch.float32).eps


def test_the_path_for_cpus_is_twice_differentiable():
    arguments = [a.requires_grad_() for a in RMSNORM.inputs(M=3, N=5, dtype=torch.float64)[0]]
    assert torch.autograd.gradcheck(rmsnorm_cpu, arguments)
    assert torch.autograd.gradgradcheck(rmsnorm_cpu, arguments)
