"""Which options are tried together: sets drawn from an op's declaration, so that no list of them stands beside it."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..op import Op


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases in which any two values of any two factors meet at least once.

    Greedy, and always the same; the first case has the first value of every factor, which for options is its default.
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
    """The defaults of an op's options, then sets in which any two values of any two of them meet."""
    return pairwise(op.options)


def farthest_options(op: Op) -> dict[str, Any]:
    """Of the option sets the one with the fewest defaults, with which most of a kernel's code runs."""
    return max(option_sets(op), key=lambda options: sum(v is not op.options[k][0] for k, v in options.items()))


def varied(op: Op) -> list[dict[str, Any]]:
    """The op's first bench size with each of its option sets but the defaults; what has its default is not named."""
    sets = [{k: v for k, v in options.items() if v is not op.options[k][0]} for options in option_sets(op)]
    return [{**op.bench[0], **options} for options in sets if options]


def sized(dims: Mapping[str, Any]) -> bool:
    """Whether no size is 0; capital letters are sizes."""
    return all(size for letter, size in dims.items() if letter.isupper())


def combined(op: Op, sizes: Sequence[Mapping[str, Any]], **factors: Sequence[Any]) -> list[dict[str, Any]]:
    """The sizes, the op's options and further factors, any two values of any two together, flat as `inputs` takes them.

    Where a size is 0 options say nothing: such sizes meet the further factors alone.
    """
    full, empty = ([dims for dims in sizes if sized(dims) is whole] for whole in (True, False))
    cases = pairwise({"dims": full, **factors, **op.options}) if full else []
    cases += [case for dims in empty for case in pairwise({"dims": [dims], **factors})]
    return [{**case.pop("dims"), **case} for case in cases]
