"""Writes a report card: one page on a model and all stages of its training, from the rows of their logs alone.

    python -m gptfast.report out-base out-sft out-rl --card      # folders, in the order of training

Each folder holds the metrics.jsonl of its stage, named by `stage` in the `run` row (base, mid, sft or rl), and, if the
model was evaluated, tasks.jsonl (train.evaluate --tasks; for a base model --tasks=core) and evaluation.jsonl
(train.evaluate --text), written with --out_dir of the same folder. Missing figures are shown as -.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast import report, untrusted
from gptfast.aside import write_whole
from gptfast.errors import UserError
from gptfast.log import Row
from gptfast.rows import file_name, markdown

STAGES = ("base", "mid", "sft", "rl")
MISSING = "-"


@dataclass(frozen=True)
class Stage:
    """The rows of one stage: those of its last run, and those of later evaluations."""

    name: str
    run: list[Row]
    judged: list[Row]

    @property
    def steps(self) -> list[Row]:
        return report.of_kind(self.run, "step")

    @property
    def updates(self) -> int:
        """Returns the number of updates made, as far as the rows tell."""
        ended = [row["step"] for row in report.of_kind(self.run, "eval")]
        return max([row["step"] + 1 for row in self.steps] + ended, default=0)

    @property
    def seconds(self) -> float | None:
        """Returns the seconds of training, without evaluations."""
        return report.elapsed(self.run)(self.steps[-1]["step"]) if self.steps else None

    @property
    def tokens(self) -> float | None:
        """Returns the number of training tokens: from the step rows, else rate times time."""
        stated = [row["tokens"] for row in self.steps if "tokens" in row]
        if stated:
            return stated[-1]
        total, before = 0.0, 0.0
        for row in self.steps:
            now = report.elapsed(self.run)(row["step"])
            total += (row.get("tokens_per_s") or math.nan) * (now - before)
            before = now
        return total if self.steps and math.isfinite(total) else None

    @property
    def rate(self) -> str:
        """Returns tokens per second: the median over updates, else all tokens over all time."""
        if not any("tokens" in row for row in self.steps):
            return report._median(self.steps, "tokens_per_s")
        return _whole((self.tokens or 0) / self.seconds) if self.seconds else MISSING

    def last(self, key: str) -> Any:
        """Returns the newest figure of this name from the run's evaluations or from later ones."""
        values = [row[key] for row in (*report.of_kind(self.run, "eval"), *self.judged) if row.get(key) is not None]
        return values[-1] if values else None


def read(folders: Sequence[Path]) -> list[Stage]:
    """Reads the stages in `folders`. Raises UserError for a folder without a log, and for two stages of one name."""
    stages = []
    for number, folder in enumerate(folders):
        log = folder / "metrics.jsonl"
        if not log.is_file():
            raise UserError(f"{folder} has no metrics.jsonl; give the --out_dir of a stage of training")
        run = report.last_run(report.read([log]))
        judged = [path for path in (folder / "tasks.jsonl", folder / "evaluation.jsonl") if path.is_file()]
        name = run[0].get("stage") if run else None
        stages.append(Stage(name or ("base" if number == 0 else folder.name), run, report.read(judged)))
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise UserError(f"two folders are of one stage ({', '.join(names)}); give one folder for each")
    return stages


def write(folders: Sequence[Path | str], out_dir: Path | str, dollars_per_hour: float | None = None) -> Path:
    """Writes report.md and its figures to `out_dir`; returns the path of report.md."""
    out_dir = Path(out_dir)
    stages = read([Path(folder) for folder in folders])
    with untrusted.expected("one of the rows", "delete it, or make it again"):
        sections = [
            "# Report card", _environment(stages, dollars_per_hour), "## Summary", summary(stages),
            "## Time and tokens", _time(stages, dollars_per_hour),
            *(section for stage in stages for section in _stage(stage, out_dir)),
        ]  # fmt: skip
    path = out_dir / "report.md"
    write_whole(path, "\n\n".join(sections) + "\n")
    return path


def summary(stages: Sequence[Stage]) -> str:
    """Returns a Markdown table, metric x stage: losses, rewards, CORE, and the accuracy on every other task."""
    by_name = {stage.name: stage for stage in stages}
    names = [*STAGES, *(name for name in by_name if name not in STAGES)]
    lines = [f"| Metric | {' | '.join(markdown(name.upper()) for name in names)} |", "|---|" + "---:|" * len(names)]

    def line(metric: str, cells: Mapping[str, str]) -> None:
        if any(cell != MISSING for cell in cells.values()):
            lines.append(f"| {markdown(metric)} | {' | '.join(cells.get(name, MISSING) for name in names)} |")

    for metric, key in (
        ("validation loss", "val_loss"), ("bits per byte", "bits_per_byte"), ("reward", "reward"), ("pass@1", "pass@1"),
    ):  # fmt: skip
        line(metric, {name: _figure(stage.last(key)) for name, stage in by_name.items()})
    line("CORE", {name: _core(stage) for name, stage in by_name.items()})
    tasks = dict.fromkeys(row["task"] for stage in stages for row in stage.judged if "task" in row)
    tasks = {task: None for task in tasks if not task.startswith("core:")}  # without the tasks that CORE averages
    for task in sorted(tasks, key=lambda task: task == "ChatCORE"):
        line(task, {name: _accuracy(stage, task) for name, stage in by_name.items()})
    return "\n".join(lines)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) and math.isfinite(value) else MISSING


def _accuracy(stage: Stage, task: str) -> str:
    rows = [row for row in stage.judged if row.get("task") == task]
    if not rows:
        return MISSING
    scale, digits, unit = (1, 4, "") if task == "ChatCORE" else (100, 1, " %")
    return _with_error(rows[-1]["accuracy"], rows[-1].get("accuracy_error"), scale, digits, unit)


def _core(stage: Stage) -> str:
    rows = [row for row in stage.judged if isinstance(row.get("core"), int | float)]
    return _with_error(rows[-1]["core"], rows[-1].get("core_error")) if rows else MISSING


def _with_error(value: float, error: Any, scale: int = 1, digits: int = 4, unit: str = "") -> str:
    text = f"{scale * value:.{digits}f}{unit}"
    known = isinstance(error, int | float) and math.isfinite(error)
    return f"{text} ± {scale * float(error or 0):.{digits}f}" if known else text


def _environment(stages: Sequence[Stage], dollars_per_hour: float | None) -> str:
    first = [stage.run[0] for stage in stages if stage.run]
    cost = "cost: - (give --dollars_per_hour)"
    total = _total(stages)
    if total is not None and dollars_per_hour is not None:
        cost = f"cost: {total / 3600 * dollars_per_hour:,.2f} $ of training at {dollars_per_hour:g} $ per hour"
    settings = [row.get("config", {}) for row in first]
    data = [found.get("mixture") or found.get("task") or found.get("dataset") for found in settings]
    named = (
        "; ".join(
            markdown(f"{stage.name}: {name or MISSING}")
            for stage, name in zip((s for s in stages if s.run), data, strict=True)
        )
        or MISSING
    )
    return "\n".join([report.caption(first), "", f"- data: {named}", f"- {cost}"])


def _total(stages: Sequence[Stage]) -> float | None:
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    return sum(known) if known else None


def _time(stages: Sequence[Stage], dollars_per_hour: float | None) -> str:
    lines = ["| stage | updates | tokens | training time, s | tokens/s | MFU |", "|---|" + "---:|" * 5]
    for stage in stages:
        cells = [
            f"{stage.updates:,}" if stage.steps else MISSING, _whole(stage.tokens), _whole(stage.seconds),
            stage.rate, report._median(stage.steps, "mfu", percent=True),
        ]  # fmt: skip
        cells = [MISSING if cell == "n/a" else cell for cell in cells]
        lines.append(f"| {markdown(stage.name)} | {' | '.join(cells)} |")
    total = [_whole(sum(t for t in (s.tokens for s in stages) if t is not None)), _whole(_total(stages))]
    lines.append(f"| all | | {' | '.join(total)} | | |")
    return "\n".join(lines)


def _whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _stage(stage: Stage, out_dir: Path) -> list[str]:
    """Returns the report's lines on a stage: its figures and its last samples."""
    figures = (
        ("loss", report.loss_figure(stage.run, out_dir / f"{file_name(stage.name)}-loss.png")),
        ("reward", reward_figure(stage.run, out_dir / f"{file_name(stage.name)}-reward.png")),
    )
    sections = [f"## {markdown(stage.name.upper())}"]
    sections += [f"![{markdown(stage.name)}: {title}]({path.name})" for title, path in figures if path is not None]
    samples = report.of_kind(stage.run, "sample")
    sections += [report.fenced(row["text"]) for row in samples[-2:]]
    return sections if len(sections) > 1 else [*sections, MISSING]


def reward_figure(rows: Sequence[Row], path: Path) -> Path | None:
    """Draws the reward of sampled answers, and pass@1 where measured, over the update; returns None without them."""
    steps = [row for row in report.of_kind(rows, "step") if isinstance(row.get("reward"), int | float)]
    if not steps:
        return None
    figure, (axis,) = report.new_figure(f"{report.run_name(rows)}: reward")
    numbers, rewards = [row["step"] for row in steps], [row["reward"] for row in steps]
    axis.plot(numbers, rewards, color=report.BLUE, alpha=0.25, linewidth=0.8, label="answers of one update")
    axis.plot(numbers, report._smooth(rewards), color=report.BLUE, linewidth=1.8, label="running mean")
    evals = [row for row in report.of_kind(rows, "eval") if isinstance(row.get("pass@1"), int | float)]
    if evals:
        places, passed = [row["step"] for row in evals], [row["pass@1"] for row in evals]
        axis.plot(places, passed, "o-", color=report.ORANGE, markersize=4, label=f"pass@1, {passed[-1]:.3f} at the end")
    axis.set(xlabel="update", ylabel="share of answers that pass", ylim=(-0.02, 1.02))
    axis.legend(frameon=False)
    return report.save_figure(figure, path, rows)
