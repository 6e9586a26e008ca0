"""The report card: a stage's figures in its column, - where nothing was measured, and the sums of time and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptfast import cli
from gptfast.log import Log, facts
from gptfast.report import __main__ as report_command
from gptfast.report import card


def stage(folder: Path, name: str | None, rows: list[tuple[str, dict[str, Any]]], tasks: dict[str, float]) -> Path:
    known = facts("cpu")
    with Log(folder, name="metrics.jsonl", console=False) as log:
        log.row("run", **known, config={"dataset": f"data-of-{name}"}, **({"stage": name} if name else {}))
        for what, fields in rows:
            log.row(what, **fields)
    if tasks:
        with Log(folder, name="tasks.jsonl", console=False) as log:
            for task, accuracy in tasks.items():
                log.row("summary", name="m", task=task, accuracy=accuracy, accuracy_error=0.01, **known)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    steps = [
        ("step", {"step": i, "loss": 5 - i / 10, "seconds": 2.0 * (i + 1), "tokens_per_s": 100}) for i in range(10)
    ]
    base = [*steps, ("eval", {"step": 9, "val_loss": 4.25, "train_loss": 4.0}), ("sample", {"text": "once `` upon"})]
    rl = [("step", {"step": i, "reward": i / 10, "ms": 500.0, "tokens": 30 * (i + 1)}) for i in range(10)]
    return [
        stage(tmp_path / "base", None, base, {"gsm8k": 0.0}),
        stage(tmp_path / "sft", "sft", steps[:5], {"gsm8k": 0.125, "ChatCORE": 0.25}),
        stage(tmp_path / "rl", "rl", [*rl, ("eval", {"step": 9, "pass@1": 0.75})], {"gsm8k": 0.5}),
    ]


def test_every_figure_stands_in_its_column(folders: list[Path], tmp_path: Path) -> None:
    lines = card.summary(card.read(folders)).splitlines()
    assert lines[0] == "| Metric | BASE | MID | SFT | RL |"
    assert "| validation loss | 4.2500 | - | - | - |" in lines
    assert "| pass@1 | - | - | - | 0.7500 |" in lines
    assert "| gsm8k | 0.0 % ± 1.0 | - | 12.5 % ± 1.0 | 50.0 % ± 1.0 |" in lines
    assert lines[-1] == "| ChatCORE | - | - | 0.2500 ± 0.0100 | - |"


def test_core_is_one_line_and_its_tasks_are_none(folders: list[Path]) -> None:
    known = facts("cpu")
    with Log(folders[0], name="tasks.jsonl", console=False) as log:
        log.row("summary", name="m", task="core:boolq", accuracy=0.7, accuracy_error=0.01, **known)
        log.row("summary", name="m", core=0.2565, core_error=0.0042, tasks=22, **known)
    with Log(folders[0], name="evaluation.jsonl", console=False) as log:
        log.row("summary", name="m", loss=4.2, bits_per_byte=1.25, **known)
    page = card.summary(card.read(folders))
    assert "| CORE | 0.2565 ± 0.0042 | - | - | - |" in page and "boolq" not in page
    assert "| validation loss | 4.2500 |" in page and "| bits per byte | 1.2500 |" in page


def test_the_page_has_every_section(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*map(str, folders), "--card", f"--out_dir={tmp_path / 'card'}", "--dollars_per_hour=3600"]
    assert cli.run(report_command.main, arguments) == 0
    path = Path(capsys.readouterr().out.strip())
    text = path.read_text()
    for title in ("# Report card", "## Summary", "## Time and tokens", "## BASE", "## SFT", "## RL"):
        assert f"\n{title}\n" in f"\n{text}"
    # base: 20 s at 100 tokens/s, sft: 10 s, rl: ten updates of half a second and 300 tokens
    assert "| base | 10 | 2,000 | 20 | 100 | - |" in text and "| rl | 10 | 300 | 5 | 60 | - |" in text
    assert "| all | | 3,300 | 35 | | |" in text and "cost: 35.00 $" in text
    assert "base: data-of-None; sft: data-of-sft; rl: data-of-rl" in text and "once `` upon" in text
    for name in ("base-loss.png", "sft-loss.png", "rl-reward.png"):
        assert f"({name})" in text and (path.parent / name).stat().st_size > 5000
    assert not (path.parent / "base-reward.png").exists()


def test_what_is_no_stage_is_refused(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.run(report_command.main, [str(tmp_path / "empty"), "--card"]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    again = stage(tmp_path / "again", "sft", [], {})
    assert cli.run(report_command.main, [str(folders[1]), str(again), "--card"]) == 2
    assert "two folders are of one stage" in capsys.readouterr().err


def test_a_stage_without_rows_is_shown_as_such(tmp_path: Path) -> None:
    folder = stage(tmp_path / "mid", "mid", [], {})
    text = card.write([folder], tmp_path).read_text()
    assert "## MID\n\n-" in text and "| mid | - | - | - | - | - |" in text
