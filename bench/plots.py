"""Figures and README tables, drawn from the rows in results/ and from nothing else.

    python -m bench.plots                       # every machine: results/<machine>/*.jsonl -> PNGs beside them
    python -m bench.plots --out=results/<machine>
    python -m bench.plots --readme=models       # the table that the README shows, as Markdown; also --readme=ops

Each figure names the hardware, date, commit and, where it shows one, the convention of MFU. A folder with a row that is
damaged, of another schema, or of a second machine gives an error that names it, and no figure. Figures: each op against
size, the ladder of kernels, MFU and tokens/s by model, decoding, and the loss of training runs against time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gptfast import cli, report
from gptfast.cli import UserError
from gptfast.log import Row
from gptfast.rows import file_name

from . import results

Value = Callable[[Row], float]
DIRECTIONS = ("forward", "backward", "both")
COMPUTE_BOUND = 16  # FLOPs per byte from which an op is shown in TFLOP/s: above those that stream, below products
STYLES = {"triton": (report.BLUE, "o"), "reference": ("#888888", "s"), "compile": (report.ORANGE, "^")}
OTHERS = (
    (report.GREEN, "v"),
    ("#CC79A7", "D"),
    ("#E69F00", "P"),
    ("#56B4E9", "X"),
    (report.RED, "*"),
    ("#332288", "<"),
)


# ---- rows ------------------------------------------------------------------------------------------------------------
def machines(root: Path) -> list[Path]:
    """The folders of rows below `root`, one for each machine."""
    return sorted({path.parent for path in root.glob("*/*.jsonl")})


def read(folder: Path) -> tuple[list[Row], list[list[Row]]]:
    """(the newest bench rows of a machine, its training logs). UserError if any file is not wholly of this machine."""
    bench: list[Row] = []
    logs: list[list[Row]] = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = results.read(path)
        if any(row["what"] == "run" for row in rows):
            logs.append(rows)
        else:
            bench += rows
    stated = {
        row["hardware"]["name"]: row["what"] for row in [*bench, *(r for log in logs for r in log)] if "hardware" in row
    }
    if len(stated) > 1:
        raise UserError(f"{folder}: rows of different machines, {' and '.join(sorted(stated))}: one folder holds one")
    return results.latest(bench), logs


def valid(rows: Iterable[Row], what: str) -> list[Row]:
    return [row for row in rows if row["what"] == what and row.get("valid", True)]


def with_numbers(rows: Iterable[Row], *fields: str) -> list[Row]:
    """The rows that have a number in each of these fields."""
    return [row for row in rows if all(isinstance(row.get(field), int | float) for field in fields)]


def by(rows: Iterable[Row], *fields: str) -> dict[tuple, list[Row]]:
    """Rows grouped by these fields, in order of appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(field) for field in fields), []).append(row)
    return found


def in_flops(rows: Sequence[Row]) -> bool:
    """Whether these rows of an op are about arithmetic rather than memory."""
    return statistics.median(row["flops"] / max(row["bytes"], 1) for row in rows) >= COMPUTE_BOUND


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Color and marker by implementation: ours the same in every figure."""
    rest = [name for name in dict.fromkeys(names) if name not in STYLES]
    return {**STYLES, **{name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}}


# ---- figures ---------------------------------------------------------------------------------------------------------
def op_figure(rows: Sequence[Row], path: Path) -> Path:
    """TFLOP/s or GB/s of one op against size: a panel for each direction and dtype, with the roofline."""
    name, flops = rows[0]["name"], in_flops(rows)
    field, unit = ("tflops", "TFLOP/s") if flops else ("gbs", "GB/s")
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    shown = [direction for direction in DIRECTIONS if any(row["direction"] == direction for row in rows)]
    figure, axes = report.new_grid(f"{name}: {unit} by size", len(shown), len(dtypes))
    look, used = styles(row["impl"] for row in rows), {}
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    for (direction, dtype), mine in by(rows, "direction", "dtype").items():
        axis = axes[shown.index(direction)][dtypes.index(dtype)]
        sizes = sorted((row["flops" if flops else "bytes"], report.dims(row)) for row in rows if row["dtype"] == dtype)
        places = {label: i for i, label in enumerate(dict.fromkeys(label for _, label in sizes))}
        for (impl,), points in by(mine, "impl").items():
            points = sorted(points, key=lambda row: places[report.dims(row)])
            beside = 0.06 * (impls.index(impl) - (len(impls) - 1) / 2)  # so that equal figures do not hide each other
            x, y = [places[report.dims(row)] + beside for row in points], [row.get(field) for row in points]
            color, marker = look[impl]
            used[impl] = axis.plot(x, y, marker=marker, color=color, markersize=5, linewidth=1.0, label=impl)[0]
        roof = {
            places[report.dims(row)]: row[field] / row["roofline"]
            for row in mine
            if row.get("roofline") and row.get(field)
        }
        for place, height in roof.items():
            bar = axis.plot([place - 0.35, place + 0.35], [height] * 2, color="black", linewidth=1.2, linestyle="--")
            used["roofline"] = bar[0]
        labels, shared = told_apart(list(places))
        axis.set(title=", ".join([direction, dtype, *shared]), xlim=(-0.5, len(places) - 0.5), ylim=(0, None))
        crowded = len(places) > 6
        labels = [label if crowded else two_a_line(label) for label in labels]
        axis.set_xticks(range(len(places)), labels, fontsize=7, rotation=90 if crowded else 0)
    for row_of_axes in axes:
        row_of_axes[0].set_ylabel(unit)
    figure.legend(used.values(), used, loc="outside upper right", ncols=min(5, len(used)), frameon=False, fontsize=8)
    source = next((row["roofline_source"] for row in rows if row.get("roofline_source")), None)
    notes = [f"roofline: {source}"] if source else []
    return report.save(
        figure, path, rows, notes=[*notes, "both: forward and backward in one; GB/s of compulsory bytes"]
    )


def told_apart(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that tell labels apart, and those that all of them have: 'T=1 D=64', 'T=1 D=80' -> D=64, D=80; T=1."""
    words = [label.split(" ") for label in labels]
    shared = [word for word in words[0] if all(word in other for other in words)] if len(words) > 1 else []
    return [" ".join(word for word in mine if word not in shared) for mine in words], shared


def two_a_line(label: str) -> str:
    words = label.split(" ")
    return "\n".join(" ".join(words[i : i + 2]) for i in range(0, len(words), 2))


def ladder_figure(rows: Sequence[Row], path: Path) -> Path:
    """One model's rungs: the reference, then one kernel more at each; in % of peak where a peak is known."""
    rows = sorted(rows, key=lambda row: row["rung"])
    known = all(row.get("mfu") is not None for row in rows)
    figure, (axis,) = report.new_figure(f"{rows[0]['name']}: one kernel more at each rung")
    values = [100 * row["mfu"] if known else row["tokens_per_s"] for row in rows]
    bars = axis.barh(range(len(rows)), values, color=["#888888", *[report.BLUE] * (len(rows) - 1)], height=0.65)
    axis.bar_label(
        bars,
        [f" {row['ms_p50']:.1f} ms  {rows[0]['ms_p50'] / max(row['ms_p50'], 1e-9):.2f}x" for row in rows],
        fontsize=8,
    )
    axis.set_yticks(range(len(rows)), [row["impl"] for row in rows])
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel(f"mfu, % of {peak_label(rows[0])}" if known else "tokens/s")
    return report.save(figure, path, rows, ["mfu"] if known else [], [workload(rows)])


def mfu_figure(rows: Sequence[Row], path: Path) -> Path | None:
    """mfu and, as a line above it, mfu_palm of every model and implementation, against this machine's peak."""
    rows = with_numbers(rows, "mfu", "mfu_palm")
    if not rows:
        return None
    mfu, palm = lambda row: 100 * row["mfu"], lambda row: 100 * row["mfu_palm"]
    figure, axis, bars = model_bars(rows, "MFU by model", mfu, lambda row: max(mfu(row), palm(row)))
    for place, width, row in bars:
        axis.plot([place - width / 2, place + width / 2], [palm(row)] * 2, color="black", linewidth=1.0)
    axis.set_ylabel("mfu, % (bar and number; line above: mfu_palm)")
    peaks = dict.fromkeys(f"peak, {row['dtype']}: {peak_label(row)}" for row in rows)
    return report.save(figure, path, rows, ["mfu", "mfu_palm"], [*peaks, workload(rows)])


def tokens_figure(rows: Sequence[Row], path: Path) -> Path:
    """Tokens per second of every model and implementation."""
    figure, axis, _ = model_bars(rows, "Training throughput", *[lambda row: row["tokens_per_s"]] * 2)
    axis.set_ylabel("tokens/s")  # linear, from zero: a bar's height is what the eye compares
    axis.yaxis.set_major_formatter("{x:,.0f}")
    return report.save(figure, path, rows, notes=[workload(rows)])


def model_bars(
    rows: Sequence[Row], title: str, value: Value, label_at: Value
) -> tuple[Any, Any, list[tuple[float, float, Row]]]:
    """(figure, axis, (place, width, row) of each bar): a group for each model, in it a bar for each variant."""
    rows = sorted(rows, key=lambda row: row["parameters"])
    figure, (axis,) = report.new_figure(title)
    mixed = len({row["dtype"] for row in rows}) > 1
    names = [row["impl"] + (f", {row['dtype']}" if mixed else "") for row in rows]
    look, place, bars, ticks, labelled = styles(names), 0.0, [], {}, set()
    for (model,), mine in by(rows, "name").items():
        first = place
        for row in mine:
            name = row["impl"] + (f", {row['dtype']}" if mixed else "")
            axis.bar(place, value(row), 0.9, color=look[name][0], label=None if name in labelled else name)
            axis.annotate(
                report.number(value(row)),
                (place, label_at(row)),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
            labelled.add(name)
            bars.append((place, 0.9, row))
            place += 1
        millions = mine[0]["parameters"] / 1e6
        ticks[(first + place - 1) / 2] = f"{model}\n{millions:,.0f}M" if millions >= 10 else f"{model}\n{millions:.2g}M"
        place += 0.8
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.margins(y=0.15)
    axis.legend(frameon=False, ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    return figure, axis, bars


def peak_label(row: Row) -> str:
    peak = "n/a" if row.get("peak_flops") is None else f"{row['peak_flops'] / 1e12:.4g}"
    return f"{peak} TFLOP/s, {row.get('peak_kind')}: {row.get('peak_device')}"


def workload(rows: Sequence[Row]) -> str:
    sizes = (
        f"{', '.join(dict.fromkeys(row['name'] for row in mine))} at {label}" for label, mine in by_size(rows).items()
    )
    return "forward, backward and AdamW on random tokens; " + "; ".join(sizes)


def by_size(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(report.dims(row), []).append(row)
    return found


def figures(folder: Path, bench: Sequence[Row], logs: Sequence[list[Row]]) -> list[Path]:
    """Draw all that a machine's rows hold, into its folder."""
    made: list[Path | None] = []
    for (name,), rows in by(with_numbers(valid(bench, "op"), "flops", "bytes"), "name").items():
        made.append(op_figure(rows, folder / f"op-{file_name(name)}.png"))
    models = with_numbers(valid(bench, "model"), "parameters")
    for (name,), rows in by((row for row in models if row.get("rung") is not None), "name").items():
        if len(rows) > 1:
            made.append(ladder_figure(rows, folder / f"ladder-{file_name(name)}.png"))
    ends = [row for row in models if not between(row)]
    if ends:
        made += [mfu_figure(ends, folder / "model-mfu.png"), tokens_figure(ends, folder / "model-tokens.png")]
    for (name,), rows in by(valid(bench, "decode"), "name").items():
        title = f"{name}: decoded tokens/s"
        made.append(
            report.comparison_figure(rows, folder / f"decode-{file_name(name)}.png", title, "tokens_per_s", "tokens/s")
        )
    for log in logs:
        run = report.last_run(log)
        made.append(
            report.loss_figure(run, folder / f"loss-{file_name(results.slug({'name': report.run_name(run)}))}.png")
        )
    return [path for path in made if path]


def between(row: Row) -> bool:
    """Whether a row is a rung between the ladder's ends."""
    return row.get("rung") is not None and row["impl"] not in ("triton", "reference")


# ---- tables ----------------------------------------------------------------------------------------------------------
def models_table(rows: Sequence[Row]) -> str:
    """Training steps: one line for each machine, model and implementation."""
    rows = [row for row in with_numbers(valid(rows, "model"), "parameters") if not between(row)]
    percent = lambda name: lambda row: None if row.get(name) is None else f"{100 * row[name]:.1f} %"
    memory = lambda row: None if row.get("memory_bytes") is None else f"{row['memory_bytes'] / 2**30:.1f}"
    columns: report.Columns = {
        "machine": machine, "model": "name", "implementation": "impl", "dtype": "dtype", "sizes": report.dims,
        "ms/iter": "ms_p50", "tokens/s": "tokens_per_s", "mfu": percent("mfu"), "mfu_palm": percent("mfu_palm"),
        "hfu": percent("hfu"), "of peak": lambda row: row.get("peak_kind") if row.get("mfu") is not None else None,
        "GiB": memory, "measured": provenance,
    }  # fmt: skip
    return report.table(rows, columns)


def ops_table(rows: Sequence[Row]) -> str:
    """Forward and backward of every op at the largest size that was measured, beside the fastest peer."""
    picked = []
    for group in by(with_numbers(valid(rows, "op"), "flops", "bytes"), "hardware_name", "name", "dtype").values():
        mine = [row for row in group if row["direction"] == "both"]
        largest = max((row["bytes"] for row in mine), default=None)
        mine = [row for row in mine if row["bytes"] == largest]
        ours = next((row for impl in ("triton", "reference") for row in mine if row["impl"] == impl), None)
        if ours is not None:
            peers = [row for row in mine if row["impl"] not in ("triton", "reference") and row.get("inexact") is None]
            picked.append(
                {**ours, "peer": min(peers, key=lambda row: row["ms_p50"], default=None), "flop": in_flops(mine)}
            )
    tflops, gbs = lambda row: report.number(row.get("tflops")), lambda row: report.number(row.get("gbs"))
    rate = lambda row: f"{tflops(row)} TFLOP/s" if row["flop"] else f"{gbs(row)} GB/s"
    against = lambda row: (
        row["peer"] and f"{row['peer']['impl']}, {row['peer']['ms_p50'] / max(row['ms_p50'], 1e-9):.2f}x our time"
    )
    columns: report.Columns = {
        "machine": machine, "op": "name", "sizes": report.dims, "dtype": "dtype", "ours": "impl", "ms": "ms_p50",
        "rate": rate, "of roofline": lambda row: row.get("roofline") and f"{100 * row['roofline']:.0f} %",
        "fastest peer": against, "measured": provenance,
    }  # fmt: skip
    return report.table(picked, columns)


def machine(row: Row) -> str:
    return row["hardware"]["name"]


def provenance(row: Row) -> str:
    return f"{row['date'][:10]}, {(row['commit'] or 'n/a')[:10]}"


TABLES = {"models": models_table, "ops": ops_table}


# ---- the command -----------------------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench.plots", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="the folder of one machine (default: all in --root)")
    parser.add_argument("--root", type=Path, default=results.ROOT, help="where the machines' folders are")
    parser.add_argument("--readme", choices=TABLES, help="print this table as Markdown, and draw nothing")
    parser.add_argument("--quick", action="store_true", help="accepted as in every page; drawing is quick")
    arguments = parser.parse_args(argv)
    folders = [arguments.out] if arguments.out else machines(arguments.root)
    if arguments.readme:
        rows = [row for folder in folders for row in read(folder)[0]]
        print(TABLES[arguments.readme]([{**row, "hardware_name": row.get("hardware", {}).get("name")} for row in rows]))
        return 0
    failed = False
    for folder in folders:
        try:
            bench, logs = read(folder)
        except UserError as error:
            print(f"error: {error}; nothing is drawn from {folder}", file=sys.stderr)
            failed = True
            continue
        made = figures(folder, bench, logs)
        print("\n".join(map(str, made)) if made else f"{folder}: no rows to draw from")
    if not folders:
        print(f"{arguments.root}: no rows; python -m bench writes them")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
