"""Options are declared: what is tried together follows from the declaration, in which no option is missing."""

import inspect
import itertools
import math

import pytest
import torch

import kernels
from kernels.proof.options import combined, option_sets, pairwise

# Of the layout or the precision of one op, and tested on its page: `eps` is a number like any, `inplace` overwrites the
# logits, which `inputs` must not give away, and `dtype` asks for another result than the arguments'.
APART = {"eps", "inplace", "dtype"}
each_op = pytest.mark.parametrize("op", kernels.OPS.values(), ids=lambda op: op.name)


@each_op
def test_any_two_values_of_two_options_meet(op):
    sets = option_sets(op)
    assert sets[0] == {name: values[0] for name, values in op.options.items()}
    for a, b in itertools.combinations(op.options, 2):
        assert {(s[a], s[b]) for s in sets} == set(itertools.product(op.options[a], op.options[b]))
    longest = sorted(len(values) for values in op.options.values())[-2:]
    assert len(sets) <= max(12, math.prod(longest))


@each_op
def test_every_keyword_of_an_op_is_declared(op):
    """A keyword of the reference that nothing declared gives is one that no test but the op's own would try."""
    parameters = inspect.signature(op.reference).parameters
    drawn = itertools.product(op.parity, option_sets(op))
    given = {name for dims, options in drawn for name in op.inputs(**dims, **options, dtype=torch.float32)[1]}
    keywords = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords - APART <= given <= set(parameters)


@each_op
def test_every_optional_argument_of_an_op_is_there_and_is_not(op):
    signature = inspect.signature(op.reference)
    drawn = []
    for dims, options in itertools.product(op.parity, option_sets(op)):
        arguments, keywords = op.inputs(**dims, **options, dtype=torch.float32)
        drawn.append(signature.bind(*arguments, **keywords).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.default is None and name not in APART:
            assert {given.get(name) is not None for given in drawn} == {True, False}, name


def test_pairs_of_three_factors():
    cases = pairwise({"a": (1, 2), "b": "xyz", "c": (None, 0.5)})
    assert cases[0] == {"a": 1, "b": "x", "c": None} and len(cases) <= 7
    assert {(case["b"], case["c"]) for case in cases} == set(itertools.product("xyz", (None, 0.5)))
    assert pairwise({"a": (1, 2, 3)}) == [{"a": 1}, {"a": 2}, {"a": 3}] and pairwise({}) == [{}]


def test_sizes_of_zero_meet_no_options():
    op = kernels.OPS["layernorm"]
    cases = combined(op, (dict(M=0, N=4), dict(M=2, N=4)), dtype=("a", "b"))
    assert {(c["M"], c["dtype"], c.get("bias")) for c in cases} >= {(2, "a", True), (2, "b", False)}
    assert [c for c in cases if c["M"] == 0] == [dict(M=0, N=4, dtype="a"), dict(M=0, N=4, dtype="b")]
