"""The cases of bench/ops.py under pytest-benchmark, for its saving and comparing:

    pytest bench/ --benchmark-only --benchmark-autosave
    pytest bench/ --benchmark-only --benchmark-compare

One size of each op. Rounds here are sequential and caches warm, so the figures serve to compare a machine with itself
over time; the rows of `python -m bench ops` are the ones to quote. A wrong answer fails the test.
"""

from __future__ import annotations

from typing import Any

import torch

import kernels
from bench.failures import FAILURES
from bench.ops import DIRECTIONS, Case, cases, compiling, variants
from bench.peers import OURS
from bench.timing import Truth, flatten, judge


def pytest_generate_tests(metafunc: Any) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    found = [
        (case, name)
        for case in cases(list(kernels.OPS), [dtype], DIRECTIONS, device, quick=True)
        for name in variants(case.op, device, compiled=False)
    ]
    metafunc.parametrize(("case", "name"), found, ids=[f"{case}-{name}".replace(" ", "-") for case, name in found])


def test_op(benchmark: Any, case: Case, name: str) -> None:
    import pytest

    function = variants(case.op, case.device, compiled=False)[name]
    with compiling(case.device.type == "cuda"):
        try:
            case.with_options(function)(*case.draw(0))
        except FAILURES as error:
            if name in OURS:
                raise
            pytest.skip(f"{name} cannot do it here: {error}")
    wanted = [] if case.direction == "forward" else case.differentiable(function)
    work = case.work(function, case.draw(0), wanted)

    def run() -> Any:
        outputs = work.run()
        if case.device.type == "cuda":
            torch.cuda.synchronize()
        return outputs

    benchmark.group = str(case)
    benchmark.extra_info |= {
        "dims": dict(case.dims),
        "dtype": case.dtype,
        "flops": case.cost.flops,
        "bytes": case.cost.bytes,
    }
    benchmark(run)
    truth: Truth = case.truth(wanted)
    work.refresh(1)
    verdict = judge(flatten(run()), truth.exact(1), truth.usual(1), any_dtype=name not in OURS)
    benchmark.extra_info["error"] = verdict.error
    assert verdict.valid, verdict.reason
