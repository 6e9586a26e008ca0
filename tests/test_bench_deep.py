"""The commands that deep tools are given, and what is read out of their reports."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench import deep
from gptfast import cli

CASE = dict(direction="forward", dtype="bfloat16", impl="triton", size=0)
REPORT = (
    "==PROF== Connected to process 7\n"
    '"ID","Process ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum","dram__bytes_read.sum",'
    '"dram__bytes_write.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","launch__registers_per_thread"\n'
    '"","","","","","usecond","Mbyte","Kbyte","%","register/thread"\n'
    '"0","7","rmsnorm_kernel","(128, 1, 1)","(4096, 1, 1)","20.00","50.0","30,000.0","91.5","40"\n'
    '"1","7","rmsnorm_kernel","(128, 1, 1)","(4096, 1, 1)","0.5","n/a","30.0","n/a","40"\n'
)


def test_a_report_of_nsight_compute_becomes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.csv"
    report.write_text(REPORT)
    assert cli.run(deep.main, [f"--report={report}", f"--out={tmp_path}"]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split()[:5] == ["rmsnorm_kernel", "20.0", "n/a", "91.5", "4,000"]  # 80 MB in 20 us
    assert second.split()[:5] == ["rmsnorm_kernel", "0.5", "n/a", "n/a", "n/a"]
    (row,) = (json.loads(line) for line in (tmp_path / "deep.jsonl").read_text().splitlines())
    assert [kernel["bytes_written"] for kernel in row["kernels"]] == [30e6, 30e3]
    assert row["kernels"][1]["bytes_read"] is None and row["kernels"][0]["registers"] == 40


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("ncu", ["ncu", "--clock-control none", "dram__bytes_read.sum", "--tool=none", "--op=rotary"]),
        ("proton", ["--tool=none", "--op=rotary", "--proton="]),
        ("memcheck", ["compute-sanitizer", "--tool=memcheck", "--error-exitcode=9", "rotary and not fuzz"]),
        ("racecheck", ["compute-sanitizer", "--tool=racecheck"]),
    ],
)
def test_the_command_is_printed_and_not_run(tool: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(deep.main, [f"--tool={tool}", "--op=rotary", "--dry_run", "--out=somewhere"]) == 0
    printed = capsys.readouterr().out
    assert not [word for word in words if word not in printed]


def test_instrumented_kernels_get_the_memory_that_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any thread, as autograd's; without the plugin a launch raises."""
    from triton.runtime import _allocation

    import tests.instrumented as plugin

    command = deep.command_of(argparse.Namespace(tool="consan", op="attention", **CASE), Path("somewhere"))
    assert command[-4:-2] == ["-p", "tests.instrumented"] and command[-1].endswith("backward.py")
    monkeypatch.setattr(_allocation.NullAllocator, "__call__", _allocation.NullAllocator.__call__)
    plugin.pytest_configure(None)
    assert _allocation._NULL_ALLOCATOR(4, 8, None).numel() == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tool=racecheck"], "compute-sanitizer, which is not here: it comes with the CUDA toolkit"),
        (["--tool=consan", "--op=rotary"], "rotary has none"),
        (["--op=rmsnrom"], "rmsnorm"),
        (["--tool=none", "--impl=reference", "--size=99"], "--size=99"),
        (["--report=nowhere.csv"], "no such file"),
    ],
)
def test_what_is_missing_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deep.shutil, "which", lambda program: None)
    assert cli.run(deep.main, arguments) == 2
    assert said in capsys.readouterr().err


def test_a_text_that_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("==ERROR== no permission\n")
    assert cli.run(deep.main, [f"--report={tmp_path / 'x.csv'}"]) == 2
    assert "no report of" in capsys.readouterr().err


def test_the_op_runs_for_a_profiler_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(deep.main, ["--tool=none", "--op=rmsnorm", "--impl=cpu", "--direction=both"]) == 0
    assert capsys.readouterr().out.startswith("rmsnorm both bfloat16")


def test_a_tree_of_proton_is_told_with_its_times() -> None:
    kernel = {"frame": {"name": "rmsnorm_kernel"}, "metrics": {"time (ns)": 2500, "count": 2}, "children": []}
    lines = deep.tree([{"frame": {"name": "ROOT"}, "metrics": {}, "children": [kernel]}, {"CUDA": {"0": {}}}])
    assert [line.split() for line in lines] == [["ROOT"], ["2.5", "us", "2", "calls", "rmsnorm_kernel"]]
