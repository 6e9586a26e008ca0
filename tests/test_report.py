"""Figures and reports: drawn from rows alone, with what they must name, and n/a for what the rows do not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptfast import report
from gptfast.cli import run
from gptfast.errors import UserError
from gptfast.report import __main__ as report_command

FACTS: dict[str, Any] = {
    "hardware": {"kind": "cuda", "name": "NVIDIA Test 80GB"},
    "software": {"torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "command": "python -m train.speedrun",
}


def row(what: str, **fields: Any) -> dict[str, Any]:
    return {"schema": 1, "what": what, "date": "2026-11-21T01:02:03+00:00", **fields}


def training(steps: int = 40, mfu: float | None = 0.4) -> list[dict[str, Any]]:
    """A run of 10 ms steps whose loss is 4 - 0.05 step, evaluated at 0 and at the end."""
    rows = [row("run", name="speedrun test", parameters=1234567, config={"iters": steps, "seed": 7}, **FACTS)]
    rows.append(row("eval", step=0, train_loss=4.1, val_loss=4.2))
    for i in range(steps):
        timing = {"ms": 10.0, "seconds": 0.01 * (i + 1), "tokens_per_s": 1000.0, "mfu": mfu, "mfu_palm": mfu}
        rows.append(row("step", step=i, loss=4 - 0.05 * i, **timing))
    rows.append(row("eval", step=steps, train_loss=2.1, val_loss=2.25))
    rows.append(row("eval", step=steps, whole_val_loss=2.3456, windows=1742))
    rows.append(row("sample", text="a ```fence``` in the text"))
    return rows


def op_row(impl: str, M: int, ms: float, **fields: Any) -> dict[str, Any]:
    times = {"ms_p20": 0.9 * ms, "ms_p50": ms, "ms_p80": 1.2 * ms, "n": 100}
    what = {"name": "layernorm", "impl": impl, "direction": "forward", "dims": {"M": M, "N": 768}, "dtype": "bfloat16"}
    return row("op", **what, **times, **fields, **FACTS)


@pytest.fixture
def drawn(monkeypatch) -> dict[str, Any]:
    """The figures that a test saves, by file name, still open to questions."""
    figures: dict[str, Any] = {}
    save = report.save_figure

    def remember(figure: Any, path: Path, *rest: Any) -> Path:
        figures[path.name] = figure
        return save(figure, path, *rest)

    monkeypatch.setattr(report, "save_figure", remember)
    return figures


def texts(figure: Any) -> str:
    import matplotlib.text

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_training_log_becomes_one_page_with_its_figures(tmp_path, drawn):
    page = report.write_report(training(), tmp_path).read_text()
    assert page.startswith("# speedrun test\n")
    assert "Loss **2.3456** over the whole validation split (1,742 windows) after 40 iterations and 0.4 s" in page
    assert "1,234,567 parameters, 1,000 tokens/s (median)" in page
    assert "NVIDIA Test 80GB · torch 2.13.0 · 2026-11-21 · commit 0123456789" in page
    assert "mfu: 40.0 % (median)" in page and "iters=40, seed=7" in page
    assert "| 40 | 0.4 | 2.1000 | 2.2500 |" in page
    assert "````text\na ```fence``` in the text\n````" in page
    for name in ("loss.png", "throughput.png"):
        assert f"]({name})" in page
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_figures_name_hardware_date_commit_and_the_mfu_convention(tmp_path, drawn):
    report.write_report(training(), tmp_path)
    for figure in drawn.values():
        for fact in ("NVIDIA Test 80GB", "2026-11-21", "commit 0123456789"):
            assert fact in texts(figure)
    assert "causal attention counted once" in texts(drawn["throughput.png"])
    assert "12·L·H·Q·T" in texts(drawn["throughput.png"])
    for figure in drawn.values():
        assert all(axis.get_ylabel() for axis in figure.axes) and figure.axes[-1].get_xlabel()


def test_loss_is_drawn_against_seconds_of_training(tmp_path, drawn):
    report.loss_figure(training(), tmp_path / "loss.png")
    batch, mean, validation = drawn["loss.png"].axes[0].lines
    assert batch.get_xdata()[[0, -1]] == pytest.approx([0.01, 0.4])
    assert batch.get_ydata()[-1] == pytest.approx(4 - 0.05 * 39)
    assert mean.get_ydata() == pytest.approx(batch.get_ydata()), "a centred mean leaves a straight line as it is"
    assert list(validation.get_xdata()) == pytest.approx([0.0, 0.4]) and list(validation.get_ydata()) == [4.2, 2.25]


def test_time_comes_from_ms_where_no_seconds_are_stated():
    rows = [row("step", step=i, ms=100.0) for i in range(0, 50, 10)]
    time = report.elapsed(rows)
    assert [time(-1), time(0), time(9), time(40), time(1000)] == pytest.approx([0, 0.1, 0.1, 4.1, 4.1])


def test_an_unknown_peak_is_said_and_nothing_is_invented(tmp_path, drawn):
    page = report.write_report(training(mfu=None), tmp_path).read_text()
    assert "mfu: n/a (median)" in page and "40.0 %" not in page
    assert len(drawn["throughput.png"].axes) == 1
    assert "MFU n/a" in texts(drawn["throughput.png"]) and "12·L·H" not in texts(drawn["throughput.png"])


def test_a_stopped_run_and_a_diverged_one_are_reported(tmp_path):
    rows = [r for r in training() if r["what"] in ("run", "step")]
    assert "Unfinished. Last validation loss n/a after 40 iterations" in report.write_report(rows, tmp_path).read_text()
    rows[-1]["loss"] = "nan"
    report.write_report(rows, tmp_path)
    report.write_report(rows[:1], tmp_path)  # stopped before the first step


def test_the_last_run_of_a_log_is_the_one_reported(tmp_path):
    newer = training()
    newer[0]["name"] = "the newer"
    page = report.write_report([*training(steps=7), *newer], tmp_path).read_text()
    assert page.startswith("# the newer") and "after 40 iterations" in page


def test_bench_rows_become_tables_and_bars_and_invalid_ones_no_bars(tmp_path, drawn):
    rows = [op_row("ours", 64, 0.5, gbs=900.0), op_row("torch", 64, 1.0, gbs=450.0)]
    rows.append(op_row("ours", 4096, 2.0, gbs=1000.0))
    rows.append(op_row("torch", 4096, 0.001, gbs=9e9, valid=False, invalid_reason="faster than light"))
    page = report.write_report(rows, tmp_path).read_text()
    assert "| ours | forward | M=64 N=768 | bfloat16 | 0.45 | 0.5 | 0.6 | n/a | 900 |" in page
    assert "no: faster than light" in page
    (axis,) = drawn["op-layernorm.png"].axes
    assert [bar.get_width() for bar in axis.patches] == [900.0, 450.0, 1000.0] and axis.get_xlabel() == "GB/s"
    assert [text.get_text() for text in axis.texts] == ["ours 900", "torch 450", "ours 1,000"]


def test_numbers():
    values = [None, 1234567, 1234.5, 0.012345, 99.95, 2.0, "nan", True]
    assert [report.number(v) for v in values] == ["n/a", "1,234,567", "1,234", "0.0123", "100", "2", "nan", "True"]


def test_reading_names_the_file_and_line_that_is_no_row(tmp_path):
    good = row("note", text="x")
    path = write(tmp_path / "a.jsonl", [good, {"schema": 1}, good])
    with pytest.raises(UserError, match=r"a\.jsonl:2: not a row"):
        report.read([path])
    path.write_text(json.dumps(good) + "\n" + '{"schema": 1, "wh')
    assert report.read([path]) == [good], "the half line that a killed run was writing is passed over"
    with pytest.raises(UserError, match=r"missing\.jsonl: cannot be read"):
        report.read([tmp_path / "missing.jsonl"])


def test_command_line(tmp_path, capsys):
    write(tmp_path / "metrics.jsonl", training())
    assert run(report_command.main, [str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.md")
    write(tmp_path / "metrics.jsonl", [row("note", text="x")])
    assert run(report_command.main, [str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no rows of a training run")
