"""The ceilings: sizes that fit the memory there is, and a copy that is right to the bit."""

from __future__ import annotations

import pytest
import torch

from bench import peaks, timing
from bench.results import read
from bench.timing import Settings
from gptfast.log import Log, facts

CPU, GPU = torch.device("cpu"), torch.device("cuda")
QUICK = Settings(samples=3, most_samples=3, warmup_s=0.0, budget_s=0.0)
SILENT = Log(None, console=False)


@pytest.fixture
def free(monkeypatch):
    """A GPU with as many GiB left as the test says."""
    left = {"gib": 75.0}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(left["gib"] * 2**30), 80 << 30))
    return left


@pytest.mark.parametrize("gib, copies, products", [
    (75, [28, 30, 32], [8192, 16384]), (39, [28, 30, 31], [8192, 16384]), (15, [28, 30], [8192]), (2.6, [28], [4096]),
])  # fmt: skip
def test_sizes_are_those_for_which_there_is_memory(free, monkeypatch, capsys, gib, copies, products):
    free["gib"], ran = gib, {"copy": [], "gemm": []}
    monkeypatch.setattr(peaks, "_measure_copy", lambda device, size, *_: ran["copy"].append(size) or {})
    monkeypatch.setattr(peaks, "_measure_gemm", lambda device, n, *_: ran["gemm"].append(n) or {})
    monkeypatch.setattr(peaks, "facts", lambda device: {})
    peaks.measure(GPU, ["bfloat16"], Log(None))
    assert ran["copy"] == [1 << power for power in copies]
    assert ran["gemm"][-len(products) :] == products
    assert ("instead of" in capsys.readouterr().out) == (gib < 75)


def test_without_a_gpu_sizes_stay_as_they_are():
    assert peaks.fitted([4, 2], lambda size: 1 << 60, CPU, SILENT) == [4, 2]


def test_a_copy_is_checked_bit_by_bit_without_copies_in_fp64(monkeypatch):
    monkeypatch.setattr(timing, "relative_error", lambda *_: pytest.fail("an fp64 copy of everything"))
    row = peaks._measure_copy(CPU, 1 << 16, QUICK, 1, SILENT, facts(CPU))
    assert row["valid"] and row["error"] == 0.0 and row["dims"] == {"bytes": 1 << 16}


def test_a_copy_that_is_not_one_is_refused(monkeypatch, tmp_path):
    made = torch.empty_like

    def off_by_one_bit(source):
        target = made(source)
        target.copy_ = lambda new: target.set_(new * (1 + 2**-20))
        return target

    monkeypatch.setattr(torch, "empty_like", off_by_one_bit)
    with Log(tmp_path, console=False) as log:
        peaks._measure_copy(CPU, 1 << 16, QUICK, 1, log, facts(CPU))
    (row,) = read(tmp_path / "log.jsonl")
    assert not row["valid"] and "output 0 is wrong" in row["invalid_reason"]
