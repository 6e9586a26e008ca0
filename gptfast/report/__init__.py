"""Draws figures and one-page reports from rows (gptfast/log) alone, for train and bench.

Every figure names the hardware, date and commit of its rows, and the convention of any MFU it shows. Missing values are
not drawn, and print as n/a. matplotlib is imported only when a figure is made.

    python -m gptfast.report out-speedrun                   # its metrics.jsonl -> report.md and PNGs beside it
    python -m gptfast.report results/*/ops.jsonl --out_dir=report
    python -m gptfast.report out-base out-sft out-rl --card # one page on all stages of a model (card.py)
"""

from __future__ import annotations

import json
import math
import re
import statistics
import textwrap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any, NamedTuple

from gptfast import untrusted
from gptfast.aside import file_aside, unwritable, write_whole
from gptfast.errors import UserError
from gptfast.log import Row
from gptfast.rows import code, file_name, markdown, parse

MFU_CONVENTION = {
    "mfu": "mfu: model FLOPs, causal attention counted once, over the dense peak",
    "mfu_palm": "mfu_palm: 6N + 12·L·H·Q·T per token, over the dense peak",
    "hfu": "hfu: hardware FLOPs, recomputation included, over the dense peak",
    "mbu": "mbu: bytes that must be read, over the peak bandwidth",
}
BLUE, ORANGE, GREEN, RED = "#0072B2", "#D55E00", "#009E73", "#CC3311"  # safe for colour-blind readers (Okabe and Ito)
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#555555")
Columns = Mapping[str, str | Callable[[Row], Any]]  # heading -> a field's name, or a function of the row
GROUP_GAP = 0.6  # between groups of bars, in bars
SMOOTH_STEPS = 20  # rows that the bold line of a loss curve averages


# ---- rows -------------------------------------------------------------------------------------------------------
def read(paths: Iterable[Path | str]) -> list[Row]:
    """Reads the rows of JSONL files, in order. Raises UserError that names the file and the malformed line."""
    rows: list[Row] = []
    allowance = untrusted.Allowance()
    for path in map(Path, paths):
        cut: UserError | None = None
        try:
            for number, line in enumerate(untrusted.rows(path, allowance), 1):
                if not line.strip():
                    continue
                if cut is not None:
                    raise cut
                try:
                    rows.append(parse(line))
                except (ValueError, TypeError) as error:
                    cut = UserError(f"{path}:{number}: not a row: {error}; remove that line")
                    if not isinstance(error, json.JSONDecodeError):
                        raise cut from None
                    # Only the last line may be no JSON: that of a run that was killed.
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({untrusted.reason(error)}); give a .jsonl file of rows") from None
    return rows


def last_run(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of a log's last training run, from its `run` row on; empty if there is none."""
    starts = [i for i, row in enumerate(rows) if row["what"] == "run"]
    return list(rows[starts[-1] :]) if starts else []


def of_kind(rows: Iterable[Row], *kinds: str) -> list[Row]:
    """Returns the rows of these kinds, without those marked invalid."""
    return [row for row in rows if row["what"] in kinds and row.get("valid", True)]


def elapsed(rows: Sequence[Row]) -> Callable[[int], float]:
    """Returns a function of the step: the seconds of training up to it.

    It uses `seconds` of the step rows, or else `ms`, which then holds for all steps since the previous row.
    """
    steps, seconds, total, previous = [-1], [0.0], 0.0, -1
    for row in of_kind(rows, "step"):
        stated = row.get("seconds")
        total = stated if stated is not None else total + (row["step"] - previous) * (row.get("ms") or 0.0) / 1e3
        previous = row["step"]
        steps.append(previous)
        seconds.append(total)
    return lambda step: seconds[bisect_right(steps, step) - 1]


# ---- words ------------------------------------------------------------------------------------------------------
def number(value: Any, digits: int = 3) -> str:
    """Formats a number to `digits` significant digits with thousands separators; n/a for None."""
    if value is None:
        return "n/a"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 10 ** (digits - 1)):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def dims(row: Row) -> str:
    """Returns a row's dimensions, as `B=8 T=1024`."""
    return " ".join(f"{key}={value}" for key, value in row.get("dims", {}).items())


def facts(rows: Iterable[Row]) -> tuple[str, str, str, str]:
    """Returns what hardware, software, date and commit these rows have."""
    stated = [row for row in rows if "hardware" in row]
    hardware = _distinct(_hardware(row) for row in stated)
    software = _distinct(f"torch {row['software']['torch']}" for row in stated)
    dates = sorted(row["date"][:10] for row in stated)
    date = " to ".join(_distinct([dates[0], dates[-1]])) if dates else "date n/a"
    commits = _distinct(_commit(row) for row in stated)
    commit = f"commit {', '.join(commits) or 'n/a'}"
    return ", ".join(hardware) or "hardware n/a", ", ".join(software) or "torch n/a", date, commit


def caption(rows: Iterable[Row]) -> str:
    """Returns hardware, software, date and commit of rows in one line."""
    return " · ".join(facts(rows))


def _hardware(row: Row) -> str:
    hardware = row["hardware"]
    if hardware.get("kind") == "cuda":
        return hardware["name"]
    threads = hardware.get("cpu", {}).get("threads")
    return hardware["name"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def _commit(row: Row) -> str:
    return (row["commit"] or "n/a")[:10] + ("+changes" if row.get("dirty") else "")


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def table(rows: Iterable[Row], columns: Columns) -> str:
    """Returns a Markdown table. `columns` maps headings to field names or functions of the row; None prints as n/a."""
    getters = [(lambda row, key=get: row.get(key)) if isinstance(get, str) else get for get in columns.values()]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (markdown(number(get(row), 4)) for get in getters)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fenced(text: str) -> str:
    """Returns text as a Markdown code block, even if it contains backticks."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


# ---- figures ----------------------------------------------------------------------------------------------------
class Bar(NamedTuple):
    """A horizontal bar: its length, what stands at its end or from `text_at` on, and its color."""

    value: float
    text: str
    color: str
    text_at: float = 0.0


def new_figure(title: str, panels: int = 1) -> tuple[Any, list[Any]]:
    """Returns a figure and its panels, stacked on a shared x axis."""
    figure, axes = new_grid(title, panels, 1)
    return figure, [row[0] for row in axes]


def new_grid(
    title: str, rows: int, columns: int, heights: Sequence[float] | None = None
) -> tuple[Any, list[list[Any]]]:
    """Returns a figure and its rows x columns panels. No display is needed.

    Each column shares an x axis; or else `heights` has the inches of each row, and each panel its own axis.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a dollar sign in a name does not begin a formula
    size = 8 if columns == 1 else 5.5 * columns, 3.2 + 1.9 * rows if heights is None else 1.5 + sum(heights)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = {} if heights is None else {"height_ratios": heights}
    axes = figure.subplots(rows, columns, sharex=False if heights else "col", squeeze=False, gridspec_kw=ratios)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure, [list(row) for row in axes]


def save_figure(
    figure: Any,
    path: Path,
    rows: Sequence[Row],
    mfu_names: Iterable[str] = (),
    notes: Iterable[str] = (),
    legend: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a PNG of measured rows; returns its path.

    Above: the title, what hardware, dtype and date the rows have, and `legend`, the names of marks. Beneath: the
    software and commit, the definitions of MFU figures shown, and the notes.
    """
    hardware, software, date, commit = facts(rows)
    dtypes = ", ".join(_distinct(row["dtype"] for row in rows if "dtype" in row))
    about = " · ".join(filter(None, [hardware, dtypes, date]))
    return save_drawing(
        figure, path, about, [f"{software} · {commit}", *(MFU_CONVENTION[name] for name in mfu_names), *notes], legend
    )


def save_drawing(
    figure: Any, path: Path, about: str, notes: Iterable[str] = (), legend: Mapping[str, Any] | None = None
) -> Path:
    """Writes a PNG with `about` under its title, then `legend`, the names of marks, and `notes` beneath."""
    heading = f"{figure.get_suptitle()}\n{about}"
    if legend:  # as the legend's title, since a figure makes room for the higher of the two alone
        figure.suptitle("")
        columns = max(1, min(len(legend), int(figure.get_figwidth() * 16 / (max(map(len, legend)) + 7))))
        across = [name for first in range(columns) for name in list(legend)[first::columns]]  # it is filled downwards
        style = {"fontsize": 8, "title_fontsize": 10, "alignment": "left", "frameon": False}
        marks = [legend[name] for name in across]
        figure.legend(marks, across, title=heading, ncols=columns, loc="outside upper left", **style)
    else:
        figure.suptitle(heading, fontsize=10, x=0.02, ha="left")
    text = "\n".join(textwrap.fill(note, 125) for note in notes)
    figure.supxlabel(text, fontsize=7, color="#444444", x=0.02, ha="left")
    with unwritable(path), file_aside(path) as building:  # replaces a link, not its target
        figure.savefig(building, dpi=130, format="png")
    return path


def draw_bars(panel: Any, groups: Mapping[str, Sequence[Bar]]) -> dict[str, tuple[float, float]]:
    """Draws bars under one another, the groups apart, each named at its middle; returns where each begins and ends.

    What stands at a bar's end covers lines that are drawn across it.
    """
    ends: dict[str, tuple[float, float]] = {}
    place, longest = 0.0, max((max(bar.value, bar.text_at) for bars in groups.values() for bar in bars), default=0.0)
    for name, bars in groups.items():
        room = _bars_of(name, bars) - len(bars)
        ends[name] = place - 0.5, place + room + len(bars) - 0.5
        place += room / 2
        for bar in bars:
            panel.barh(place, bar.value, 0.86, color=bar.color)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            panel.annotate(bar.text, (max(bar.value, bar.text_at), place), (3, 0), textcoords="offset points",
                va="center", fontsize=7, bbox=box, zorder=4)  # fmt: skip
            place += 1
        place += room / 2 + GROUP_GAP
    panel.set_yticks([sum(end) / 2 for end in ends.values()], list(ends), fontsize=7)
    panel.set_ylim(place - GROUP_GAP - 0.3, -0.7)
    panel.grid(axis="y", visible=False)
    panel.tick_params(axis="x", labelsize=8)
    widest = max((len(bar.text) for bars in groups.values() for bar in bars), default=0)
    width = panel.figure.get_figwidth() / panel.get_subplotspec().get_gridspec().ncols - 1.2  # inches, without labels
    room = min(0.6, (0.056 * widest + 0.1) / width)  # of the axis, for the text at the longest bar
    panel.set_xlim(0, longest / (1 - room) if longest > 0 else 1)
    return ends


def bars_height(groups: Mapping[str, Sequence[Any]]) -> float:
    """Returns the inches that a panel of these bars takes, with its axis and its title."""
    return 0.75 + 0.165 * sum(_bars_of(name, bars) + GROUP_GAP for name, bars in groups.items())


def _bars_of(name: str, bars: Sequence[Any]) -> float:
    """Returns how many bars high a group is, whose name may have more lines."""
    return max(len(bars), 0.75 * (1 + name.count("\n")))


def loss_figure(rows: Sequence[Row], path: Path) -> Path | None:
    """Draws loss over seconds of training: batches, their running mean, and the validation split."""
    steps = [row for row in of_kind(rows, "step") if _finite(row.get("loss"))]
    evals = [row for row in of_kind(rows, "eval") if _finite(row.get("val_loss"))]
    if not steps and not evals:
        return None
    time = elapsed(rows)
    figure, (axis,) = new_figure(f"{run_name(rows)}: loss")
    if steps:
        seconds = [time(row["step"]) for row in steps]
        losses = [row["loss"] for row in steps]
        axis.plot(seconds, losses, color=BLUE, alpha=0.25, linewidth=0.8, label="training batch")
        axis.plot(seconds, _smooth(losses), color=BLUE, linewidth=1.8, label=f"mean over {SMOOTH_STEPS} of them")
    if evals:
        seconds = [time(row["step"] - 1) for row in evals]
        losses = [row["val_loss"] for row in evals]
        axis.plot(seconds, losses, "o-", color=ORANGE, markersize=4, label=f"validation, {losses[-1]:.4f} at the end")
    axis.set(xlabel="training time, s (evaluation left out)", ylabel="loss, nats per token")
    axis.legend(frameon=False)
    return save_figure(figure, path, rows)


def throughput_figure(rows: Sequence[Row], path: Path) -> Path | None:
    """Draws tokens per second, and MFU where a peak is known, over the step. Returns None without timed steps."""
    steps = [row for row in of_kind(rows, "step") if _finite(row.get("tokens_per_s"))]
    if not steps:
        return None
    names = [name for name in ("mfu", "mfu_palm") if any(_finite(row.get(name)) for row in steps)]
    figure, axes = new_figure(f"{run_name(rows)}: throughput", panels=2 if names else 1)
    rates = [row["tokens_per_s"] for row in steps]
    median = statistics.median(rates)
    axes[0].plot([row["step"] for row in steps], rates, color=BLUE, linewidth=1.0, label="tokens/s")
    axes[0].axhline(median, color="#444444", linewidth=0.8, linestyle="--", label=f"median {number(median)}")
    axes[0].set(ylabel="tokens/s", ylim=(0, 1.25 * max(rates)))
    axes[0].yaxis.set_major_formatter("{x:,.0f}")
    axes[0].legend(frameon=False, loc="upper right", ncols=2)
    highest = 0.0
    for name, color in zip(names, (BLUE, ORANGE), strict=False):
        known = [row for row in steps if _finite(row.get(name))]
        percent = [100 * row[name] for row in known]
        highest = max(highest, *percent)
        axes[1].plot([row["step"] for row in known], percent, color=color, linewidth=1.0, label=name)
    if names:
        axes[1].set(ylabel="% of dense peak", ylim=(0, 1.3 * highest))
        axes[1].legend(frameon=False, loc="upper right", ncols=2)
    axes[-1].set_xlabel("step" if names else "step; MFU n/a: no peak is known for this hardware")
    return save_figure(figure, path, rows, names)


def comparison_figure(rows: Sequence[Row], path: Path, title: str, value: str, unit: str) -> Path | None:
    """Draws bars of `value` (such as "gbs") in `unit` for each implementation in bench rows, grouped by size."""
    rows = [row for row in rows if row.get("valid", True) and _finite(row.get(value))]
    if not rows:
        return None
    colors = dict(zip(_distinct(row["impl"] for row in rows), cycle(COLORS), strict=False))
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        bar = Bar(row[value], f"{row['impl']} {number(row[value])}", colors[row["impl"]])
        groups.setdefault(_size_label(row), []).append(bar)
    figure, ((axis,),) = new_grid(title, 1, 1, [bars_height(groups)])
    draw_bars(axis, groups)
    axis.set_xlabel(unit, fontsize=8)
    return save_figure(figure, path, rows, [value] if value in MFU_CONVENTION else [])


def _size_label(row: Row) -> str:
    return "\n".join(filter(None, [row.get("direction", ""), dims(row) or row["name"], row["dtype"]]))


def run_name(rows: Sequence[Row]) -> str:
    """Returns the run's name in its `run` row, else its data set."""
    first = next((row for row in rows if row["what"] == "run"), {})
    return str(first.get("name") or first.get("config", {}).get("dataset") or "training")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _smooth(values: Sequence[float]) -> list[float]:
    """Returns the centred running mean over SMOOTH_STEPS values, fewer at the ends, so that the curve does not lag."""
    sums = [0.0, *accumulate(values)]
    reach, n = SMOOTH_STEPS // 2, len(values)
    spans = ((max(0, i - min(reach, n - 1 - i)), min(n, i + min(reach, i) + 1)) for i in range(n))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


# ---- one page ---------------------------------------------------------------------------------------------------
def write_report(rows: Sequence[Row], out_dir: Path | str) -> Path:
    """Draws the figures of the rows into `out_dir` and writes report.md with all of them; returns its path.

    For a training log it shows the last run; for op, model and decode rows a table and a figure for each name.
    """
    out_dir = Path(out_dir)
    with untrusted.expected("one of the rows", "delete it, or make it again"):
        sections = [*_training_sections(last_run(rows), out_dir), *_bench_sections(rows, out_dir)]
    if not sections:
        raise UserError("no rows of a training run or of the bench to report on; give the log of one")
    path = out_dir / "report.md"
    write_whole(path, "\n\n".join(sections) + "\n")
    return path


def _training_sections(rows: list[Row], out_dir: Path) -> list[str]:
    if not rows:
        return []
    first = rows[0]
    sections = [f"# {markdown(run_name(rows))}", _verdict(rows), _facts(rows[:1])]
    figures = (
        ("Loss against time", loss_figure(rows, out_dir / "loss.png")),
        ("Throughput", throughput_figure(rows, out_dir / "throughput.png")),
    )
    sections += [f"![{title}]({path.name})" for title, path in figures if path]
    time = elapsed(rows)
    evals = [row for row in of_kind(rows, "eval") if "val_loss" in row]
    if evals:
        shown = evals if len(evals) <= 12 else [*evals[:: math.ceil(len(evals) / 11)], evals[-1]]
        columns: Columns = {
            "step": "step",
            "training time, s": lambda row: time(row["step"] - 1),
            "train loss": lambda row: _loss(row.get("train_loss")),
            "val loss": lambda row: _loss(row.get("val_loss")),
        }
        sections += ["## Evaluations", table(shown, columns)]
    samples = of_kind(rows, "sample")
    if samples:
        sections += ["## Samples", *(fenced(row["text"]) for row in samples[-2:])]
    steps = of_kind(rows, "step")
    known = [name for name in ("mfu", "mfu_palm") if any(_finite(row.get(name)) for row in steps)]
    means = [f"{name}: {_median(steps, name, percent=True)} (median)" for name in ("mfu", "mfu_palm")]
    facts = [f"command: {code(first['command'])}", *means, *(MFU_CONVENTION[name] for name in known)]
    return [*sections, "## Facts", "\n".join(f"- {fact}" for fact in facts), _config_table(first)]


def _facts(rows: Sequence[Row]) -> str:
    """Returns the caption as Markdown."""
    return markdown(caption(rows))


def _verdict(rows: list[Row]) -> str:
    """Returns the run's result in a sentence."""
    steps, evals = of_kind(rows, "step"), of_kind(rows, "eval")
    whole = [row for row in evals if "whole_val_loss" in row]
    sampled = [row for row in evals if "val_loss" in row]
    taken = steps[-1]["step"] + 1 if steps else 0
    if whole:
        words = f"Loss **{_loss(whole[-1]['whole_val_loss'])}** over the whole validation split"
        words += f" ({whole[-1]['windows']:,} windows)" if "windows" in whole[-1] else ""
    else:
        words = f"Unfinished. Last validation loss {_loss(sampled[-1]['val_loss'] if sampled else None)}"
    words += f" after {taken:,} iterations and {number(elapsed(rows)(taken))} s of training"
    if "parameters" in rows[0]:
        words += f", {rows[0]['parameters']:,} parameters"
    return f"{words}, {_median(steps, 'tokens_per_s')} tokens/s (median)."


def _loss(value: Any) -> str:
    return f"{value:.4f}" if _finite(value) else number(value)


def _median(rows: Sequence[Row], key: str, percent: bool = False) -> str:
    values = [row[key] for row in rows if _finite(row.get(key))]
    if not values:
        return "n/a"
    return f"{100 * statistics.median(values):.1f} %" if percent else number(statistics.median(values))


def _config_table(row: Row) -> str:
    settings = {key: value for key, value in row.get("config", {}).items() if not isinstance(value, dict | list)}
    return "Settings: " + ", ".join(markdown(f"{key}={value}") for key, value in settings.items()) if settings else ""


def _bench_sections(rows: Sequence[Row], out_dir: Path) -> list[str]:
    rows = [row for row in rows if row["what"] in ("op", "model", "decode")]
    sections: list[str] = ["# Measurements"] if rows else []
    for what, name in dict.fromkeys((row["what"], row["name"]) for row in rows):
        mine = [row for row in rows if (row["what"], row["name"]) == (what, name)]
        value, unit = next(pair for pair in BENCH_VALUES if any(_finite(row.get(pair[0])) for row in mine))
        path = comparison_figure(mine, out_dir / f"{what}-{file_name(name)}.png", f"{name}: {unit}", value, unit)
        sections += [f"## {markdown(name)}", _facts(mine), table(mine, BENCH_COLUMNS)]
        sections += [f"![{markdown(name)}]({path.name})"] if path else []
    return sections


BENCH_VALUES = (("tokens_per_s", "tokens/s"), ("tflops", "TFLOP/s"), ("gbs", "GB/s"), ("ms_p50", "ms"))
BENCH_COLUMNS: Columns = {
    "implementation": "impl",
    "direction": "direction",
    "sizes": dims,
    "dtype": "dtype",
    "ms p20": "ms_p20",
    "ms p50": "ms_p50",
    "ms p80": "ms_p80",
    "TFLOP/s": "tflops",
    "GB/s": "gbs",
    "tokens/s": "tokens_per_s",
    "of roofline": "roofline",
    "error": "error",
    "valid": lambda row: "yes" if row.get("valid", True) else f"no: {row.get('invalid_reason')}",
}
