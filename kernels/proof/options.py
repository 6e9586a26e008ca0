"""Chooses which options are tested together: sets drawn from an op's declaration instead of lists beside it."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..op import Op


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns cases in which any two values of any two factors occur together at least once.

    Greedy and deterministic; the first case has the first value of every factor, which for options is the default.
    """
    names = list(factors)
    if not names:
        return [{}]
    pairs = itertools.combinations(names, 2) if len(names) > 1 else [(names[0], names[0])]
    unmet = {
        frozenset(((a, i), (b, j)))
        for a, b in pairs
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
        if a != b or i == j
    }

    def newly_met(case: dict[str, int], name: str, i: int) -> int:
        return sum(frozenset(((name, i), other)) in unmet for other in case.items())

    cases, case = [], dict.fromkeys(names, 0)
    while True:
        unmet -= {frozenset(pair) for pair in itertools.combinations_with_replacement(case.items(), 2)}
        cases.append({name: factors[name][case[name]] for name in names})
        if not unmet:
            return cases
        case = dict(min(map(sorted, unmet)))
        for name in names:
            if name not in case:
                case[name] = max(range(len(factors[name])), key=lambda i: newly_met(case, name, i))


def option_sets(op: Op) -> list[dict[str, Any]]:
    """Returns the defaults of an op's options, then sets in which any two values of any two of them occur together."""
    return pairwise(op.options)


def farthest_options(op: Op) -> dict[str, Any]:
    """Returns the option set with the fewest defaults, which runs most of a kernel's code."""
    return max(option_sets(op), key=lambda options: sum(v is not op.options[k][0] for k, v in options.items()))


def varied(op: Op) -> list[dict[str, Any]]:
    """Returns the op's first bench size with each option set but the defaults; options at their default are omitted."""
    sets = [{k: v for k, v in options.items() if v is not op.options[k][0]} for options in option_sets(op)]
    return [{**op.bench[0], **options} for options in sets if options]


def sized(dims: Mapping[str, Any]) -> bool:
    """Returns whether no size is 0; capital letters are sizes."""
    return all(size for letter, size in dims.items() if letter.isupper())


def combined(op: Op, sizes: Sequence[Mapping[str, Any]], **factors: Sequence[Any]) -> list[dict[str, Any]]:
    """Combine sizes, the op's options and further factors pairwise; returns flat cases, as `inputs` takes them.

    With a size of 0 options have no effect: such sizes are combined with the further factors alone.
    """
    full, empty = ([dims for dims in sizes if sized(dims) is whole] for whole in (True, False))
    cases = pairwise({"dims": full, **factors, **op.options}) if full else []
    cases += [case for dims in empty for case in pairwise({"dims": [dims], **factors})]
    return [{**case.pop("dims"), **case} for case in cases]
