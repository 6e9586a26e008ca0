"""The error rule of oracle.py: what it refuses and what it takes for luck."""

from __future__ import annotations

import pytest
import torch
from oracle import Parity, relative_error
from torch import Tensor

from kernels import OPS


def judged(excesses: list[float]) -> None:
    """Judge layernorm's reference with an error added that is so many times what is allowed; the last one stays."""
    op = OPS["layernorm"]
    arguments = op.inputs(M=5, N=33, dtype=torch.float32)[0]
    parity = Parity(op, arguments)
    calls = iter(excesses)
    last = excesses[-1]

    def function(*given: Tensor) -> Tensor:
        y = op.reference(*given)
        truth = op.reference(*(x.double() for x in given))
        allowed = 2 * relative_error(y, truth) + torch.finfo(y.dtype).eps
        noise = torch.randn(y.shape)
        return y + noise / noise.norm() * truth.norm() * (allowed * next(calls, last))

    parity.check(function)


def test_an_error_that_stays_is_refused_however_small_the_excess():
    judged([0.5])
    for excess in (1.3, 1.6, 3.0):
        with pytest.raises(AssertionError, match=r"error .*, allowed"):
            judged([excess])


def test_an_error_that_arguments_a_little_different_do_not_have_is_luck_unless_it_is_large():
    judged([1.5, 0.5])
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        judged([5.0, 0.0])
