"""The end of a greedy step: numbers that are none, ties, splits, refusals and mutants, beside test_parity.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mutants import mutated

import kernels.decode_greedy as page
from kernels.decode_greedy import BLOCK_V, decode_greedy_reference, decode_greedy_triton, inputs
from kernels.proof.interpret import OutOfBounds, Overflow, Race, interpreting

INF, NAN = float("inf"), float("nan")
SPECIAL = {  # a row's logits, and its token
    "the first of two": ([1.0, 3.0, 3.0, 2.0], 1), "zeros of either sign": ([-1.0, -0.0, 0.0, -2.0], 1),
    "all below zero": ([-4.0, -3.0, -9.0, -3.5], 1), "some without a chance": ([-INF, -INF, -7.0, -INF], 2),
    "none": ([-INF] * 4, -1), "infinite": ([1.0, INF, 0.0, 2.0], -1), "NaN": ([1.0, NAN, 0.0, 2.0], -1),
    "NaN of another sign": ([1.0, -NAN, 0.0, 2.0], -1), "infinite and NaN": ([INF, NAN, -INF, 1.0], -1),
    "the smallest there is": ([-1e-45, 0.0, 1e-45, 0.0], 2), "the lowest": ([-3.4e38, -INF, -3.3e38, -INF], 2),
}  # fmt: skip


def arguments(rows: list[list[float]]) -> list[Any]:
    B = len(rows)
    lengths = torch.arange(B, dtype=torch.int32)
    return [
        torch.tensor(rows), torch.full((B, 1), 77), lengths, lengths.double() + 1, None,
        torch.zeros(B, 2, dtype=torch.int64),
    ]  # fmt: skip


def run(function: Any, given: list[Any], multiprocessors: int = 1, arch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    given = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
    with interpreting(multiprocessors=multiprocessors, arch=arch):
        out = function(*given)
    assert given[5] is None or not given[5].any(), "the workspace is left dirty"
    return out, given[1]


def check(module: Any) -> None:
    """What the reference gives: special rows, and long ones in several splits, some of which hold nothing."""
    rows = [row for row, _ in SPECIAL.values()]
    torch.manual_seed(0)
    long = torch.randn(3, 3 * BLOCK_V + 5)
    long[1, [5, 2 * BLOCK_V]] = 9.0  # equals in two splits
    long[2, -1] = 9.0
    short = arguments(rows)
    drawn, _ = run(module.decode_greedy_triton, short)
    assert drawn[:, 0].tolist() == [token for _, token in SPECIAL.values()]
    whole = arguments(long.tolist())
    whole[3] = whole[3] - torch.tensor([0, 1, 0.5], dtype=torch.float64)  # row 1 has ended, row 2 counts at 2 < 2.5
    cut = [*whole[:4], 2 * BLOCK_V, whole[5]]
    for given in (short, whole, cut):
        expected = run(decode_greedy_reference, given)
        for multiprocessors in (1, 2, 64):
            for arch in (0, 90):
                found = run(module.decode_greedy_triton, given, multiprocessors, arch)
                assert all(map(torch.equal, found, expected))


def test_numbers_that_are_none_and_splits():
    check(page)


def test_it_may_be_called_without_a_workspace():
    given = [*arguments([[1.0, 3.0], [2.0, 0.0]])[:5], None]
    assert run(decode_greedy_triton, given)[0].tolist() == [[1, 1], [0, 1]]


MUTANTS = {
    "the last of two": ("| (0x7FFFFFFF - v)", "| v"),
    "zeros differ": ("tl.where(x == 0.0, 0.0, x).to", "x.to"),
    "NaN is small": ("x = tl.where(x == x, x, float", "x = tl.where(x == x, x, -float"),
    "numbers below zero in the wrong order": ("bits ^ ((bits >> 31) & 0x7FFFFFFF)", "bits"),
    "padding has a chance": ("tl.where(v < V, key, 0)", "key"),
    "inf is a number": ("(rank < 0x7F800000)", "(rank < 0x7F800001)"),
    "-inf is a number": ("rank > 0x807FFFFF", "rank > 0x807FFFFE"),
    "the lowest is none": ("rank > 0x807FFFFF", "rank > 0x80900000"),
    "a split too few": ("== splits - 1", "== splits - 2"),
    "the row's best stays": ("key = tl.atomic_xchg(own, 0)", "key = tl.atomic_max(own, 0)"),
    "the count stays": ("        tl.atomic_xchg(own + 1, 0)\n", ""),
    "it counts at its end": (".to(tl.float64) <", ".to(tl.float64) <="),
    "ends are whole": ("tl.load(ends_ptr + b).to(tl.float64)", "tl.load(ends_ptr + b).to(tl.int32)"),
    "no token is fed": ("tl.maximum(token, 0)", "token"),
    "ended rows are fed": ("tl.where(count, tl.maximum(token, 0), tl.load(newest_ptr + b))", "tl.maximum(token, 0)"),
    "rows of another pitch": ("logits_ptr + b * logits_stride_b", "logits_ptr + b * V"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutant_is_caught(mistake, tmp_path, monkeypatch):
    module = mutated(page, *MUTANTS[mistake], tmp_path, monkeypatch)
    with pytest.raises((AssertionError, OutOfBounds, Overflow, Race)):
        check(module)


def test_wrong_arguments_are_refused():
    given = dict(zip(("logits", "newest", "lengths", "ends", "V", "workspace"), arguments([[1.0, 2.0]]), strict=True))
    for name, value, message in (
        ("logits", [1.0], "logits: expected a tensor"), ("logits", torch.ones(2), "logits: expected floating"),
        ("V", 3, "V: expected 1 to 2"), ("V", 0, "V: expected 1 to 2"), ("ends", torch.ones(2), "ends: expected"),
        ("newest", torch.zeros(1, 1), "newest: expected contiguous"), ("lengths", torch.ones(1), "lengths: expected"),
        ("workspace", torch.zeros(1, 2), "workspace: expected contiguous"),
        ("ends", torch.ones(1, device="meta"), "ends: on meta"),
    ):  # fmt: skip
        for function in (decode_greedy_reference, decode_greedy_triton):
            with pytest.raises((ValueError, TypeError), match=message):
                function(**{**given, name: value})


def test_the_rows_of_inputs_are_those_of_a_step():
    (logits, newest, lengths, ends, V, _), _ = inputs(B=4, V=6, padded=2, dtype=torch.bfloat16)
    assert logits.shape == (4, 8) and V == 6 and (lengths < ends).tolist() == [False, True, False, True]
    assert newest.tolist() == [[6]] * 4
