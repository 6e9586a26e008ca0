"""Figures and README tables, drawn from the rows in results/ and from nothing else.

    python -m bench.plots                       # every machine: results/<machine>/*.jsonl -> PNGs beside them
    python -m bench.plots --out=results/<machine>
    python -m bench.plots --readme=models       # a table of the README, as Markdown: summary, models or ops

Each figure names the hardware, date, commit and, where it shows one, the convention of MFU. A folder with a row that is
damaged, of another schema, or of a second machine gives an error that names it, and no figure. Figures: an overview of
all ops, each op against size, rooflines, the ladder of kernels, MFU and tokens/s by model, where the time of a step
goes, decoding, the server under load, and the loss of training runs against time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gptfast import cli, mfu, report
from gptfast.errors import UserError
from gptfast.log import Row
from gptfast.rows import file_name

from . import results
from .figures import (
    by,
    decode_figure,
    growing,
    in_flops,
    op_figure,
    overview_figure,
    profiles,
    roofline_figure,
    same_code_once,
    serve_figure,
    styles,
)
from .peaks import Ceilings, from_rows
from .peers import OURS

Value = Callable[[Row], float]


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


# ---- figures ---------------------------------------------------------------------------------------------------------
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
    return report.save_figure(figure, path, rows, ["mfu"] if known else [], [workload(rows)])


def mfu_figure(rows: Sequence[Row], path: Path) -> Path | None:
    """mfu and, as a line beyond it, mfu_palm of every model and implementation, against this machine's peak."""
    rows = with_numbers(rows, "mfu", "mfu_palm")
    if not rows:
        return None
    text = lambda row: f"{100 * row['mfu']:.1f} %, mfu_palm {100 * row['mfu_palm']:.1f} %"
    palm = lambda row: 100 * row["mfu_palm"]
    figure, panels, places = model_bars(rows, "MFU of training steps", lambda row: 100 * row["mfu"], text, palm)
    for axis, place, row in places:
        line = axis.plot([palm(row)] * 2, [place - 0.43, place + 0.43], color="black", linewidth=1.5)
    panels[-1].set_xlabel("mfu, % of the dense peak", fontsize=8)
    peaks = dict.fromkeys(f"peak, {row['dtype']}: {peak_label(row)}" for row in rows)
    notes = [*peaks, workload(rows)]
    return report.save_figure(figure, path, rows, ["mfu", "mfu_palm"], notes, {"mfu_palm": line[0]})


def tokens_figure(rows: Sequence[Row], path: Path) -> Path:
    """Tokens per second of every model and implementation."""
    text = lambda row: f"{row['tokens_per_s']:,.0f}, {report.number(row['ms_p50'])} ms a step"
    figure, panels, _ = model_bars(rows, "Training throughput", lambda row: row["tokens_per_s"], text)
    panels[-1].set_xlabel("tokens/s", fontsize=8)  # linear, from zero: a bar's length is what the eye compares
    for panel in panels:
        panel.xaxis.set_major_formatter("{x:,.0f}")
    return report.save_figure(figure, path, rows, notes=[workload(rows)])


def model_bars(
    rows: Sequence[Row], title: str, value: Value, text: Callable[[Row], str], text_at: Value = lambda row: 0.0
) -> tuple[Any, list[Any], list[tuple[Any, float, Row]]]:
    """(figure, panels, (panel, middle, row) of each bar): a panel for each model, a named bar for each variant."""
    rows = sorted(rows, key=lambda row: row["parameters"])
    mixed = len({row["dtype"] for row in rows}) > 1
    look = styles(row["impl"] for row in rows)
    groups = {
        model: {
            f"{row['impl']}, {row['dtype']}" if mixed else row["impl"]: row
            for row in sorted(mine, key=lambda row: -value(row))
        }
        for (model,), mine in by(rows, "name").items()
    }
    heights = [report.bars_height({name: [row] for name, row in mine.items()}) for mine in groups.values()]
    figure, panels = report.new_grid(title, len(groups), 1, heights)
    places = []
    for (axis,), (model, mine) in zip(panels, groups.items(), strict=True):
        bars = {
            name: [report.Bar(value(row), text(row), look[row["impl"]][0], text_at(row))] for name, row in mine.items()
        }
        for row, (first, last) in zip(mine.values(), report.draw_bars(axis, bars).values(), strict=True):
            places.append((axis, (first + last) / 2, row))
        axis.set_title(f"{model}, {parameters(next(iter(mine.values())))} parameters", fontsize=9, loc="left")
    return figure, [axis for (axis,) in panels], places


def parameters(row: Row) -> str:
    millions = row["parameters"] / 1e6
    return f"{millions:,.0f}M" if millions >= 10 else f"{millions:.2g}M"


def peak_label(row: Row) -> str:
    peak = "n/a" if row.get("peak_flops") is None else f"{row['peak_flops'] / 1e12:.4g}"
    return f"{peak} TFLOP/s, {row.get('peak_kind')}: {row.get('peak_device')}"


def workload(rows: Sequence[Row]) -> str:
    sizes = (
        f"{', '.join(dict.fromkeys(row['name'] for row in mine))} at {label}" for label, mine in by_size(rows).items()
    )
    return "forward, backward and AdamW on random tokens; " + "; ".join(sizes)


def by_size(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(report.dims(row), []).append(row)
    return groups


def figures(folder: Path, bench: Sequence[Row], logs: Sequence[list[Row]]) -> list[Path]:
    """Draw all that a machine's rows hold, into its folder."""
    made: list[Path | None] = []
    measured = from_rows(row for row in bench if row["what"] == "peak")
    ops = with_numbers(valid(bench, "op"), "flops", "bytes", "gbs", "tflops")
    for (name,), rows in by(ops, "name").items():
        made.append(op_figure(rows, folder / f"op-{file_name(name)}.png", measured))
    if ops:
        made += [overview_figure(ops, folder / "overview.png", measured), *rooflines(ops, bench, folder, measured)]
    made += profiles(bench, folder)
    models = with_numbers(valid(bench, "model"), "parameters")
    for (name,), rows in by((row for row in models if row.get("rung") is not None), "name").items():
        if len(rows) > 1:
            made.append(ladder_figure(rows, folder / f"ladder-{file_name(name)}.png"))
    ends = [row for row in models if not between(row)]
    if ends:
        made += [mfu_figure(ends, folder / "model-mfu.png"), tokens_figure(ends, folder / "model-tokens.png")]
    for (name,), rows in by(with_numbers(valid(bench, "decode"), "ttft_ms", "tpot_ms", "tokens_per_s"), "name").items():
        made.append(decode_figure(rows, folder / f"decode-{file_name(name)}.png", f"{name}: decoding"))
    for (name,), rows in by(valid(bench, "serve"), "name").items():
        made.append(serve_figure(rows, folder / f"serve-{file_name(name)}.png", f"{name}: the server under load"))
    for log in logs:
        run = report.last_run(log)
        made.append(
            report.loss_figure(run, folder / f"loss-{file_name(results.slug({'name': report.run_name(run)}))}.png")
        )
    return [path for path in made if path]


def rooflines(ops: Sequence[Row], bench: Sequence[Row], folder: Path, measured: Ceilings | None) -> list[Path]:
    """Every row of our ops as a point, and every part of a profiled step whose work is declared."""
    mine = next((impl for impl in OURS if any(row["impl"] == impl for row in ops)), "")
    points = [{**row, "label": row["name"], "ms": row["ms_p50"]} for row in ops if row["impl"] == mine and row["flops"]]
    roofs = [roof for roof in (sheet(ops), measured) if roof is not None]
    made = []
    if points:
        made.append(
            roofline_figure(points, folder / "roofline-ops.png", f"Every op ({mine}) on the roofline", roofs, ops)
        )
    for row in bench:
        parts = [part for part in row["parts"] if part.get("tflops")] if row["what"] == "profile" else []
        points = [
            {"label": part["part"], "ms": part["ms"], "flops": part["tflops"] * part["ms"] * 1e9,
             "bytes": part["gbs"] * part["ms"] * 1e6} for part in parts if part["gbs"]
        ]  # fmt: skip
        if len(points) > 1 and row["direction"] == "train" and row["impl"].split(" + ")[0] == mine:
            title, path = f"{row['name']}: parts of a step by {mine}", folder / f"roofline-{file_name(row['name'])}.png"
            made.append(roofline_figure(points, path, title, roofs, [row]))
    return made


def sheet(rows: Sequence[Row]) -> Ceilings | None:
    """The datasheet of the machine of these rows, where there is one."""
    hardware = next((row["hardware"] for row in rows if "hardware" in row), dict[str, Any](name=""))
    peak = mfu.peak(hardware["name"], memory_gb=(hardware.get("memory_bytes") or 0) / 2**30)
    if peak is None or peak.bytes_per_s is None or hardware.get("kind") != "cuda":
        return None
    return Ceilings(
        {"bfloat16": peak.bf16 or 0.0}, peak.bytes_per_s, peak.bytes_per_s, f"datasheet of {peak.device}", 0.0
    )


def between(row: Row) -> bool:
    """Whether a row is a rung between the ladder's ends."""
    return row.get("rung") is not None and row["impl"] not in OURS


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
        ours = next((row for impl in OURS for row in mine if row["impl"] == impl), None)
        if ours is not None:
            peers = [row for row in mine if row["impl"] not in OURS and row.get("inexact") is None]
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


def summary_table(rows: Sequence[Row]) -> str:
    """What a reader asks first, ours beside the best peer: training steps, attention, and decoding token by token."""
    lines: list[Row] = []
    for group in by(with_numbers(valid(rows, "model"), "parameters"), "hardware_name", "name", "dtype").values():
        for mine in by_size(group).values():
            lines += beside(mine, f"training step of {mine[0]['name']}", "ms_p50", lambda row: first_word(row) in OURS)
    attention = [row for row in valid(rows, "op") if row["name"] == "attention" and row["direction"] == "both"]
    for group in by(attention, "hardware_name", "dtype").values():
        exact = same_code_once([row for row in group if row.get("inexact") is None and row["impl"] != "reference"])
        for mine in by_size(sorted(exact, key=lambda row: growing(row["dims"]))).values():
            lines += beside(mine, "attention, forward + backward", "ms_p50", lambda row: first_word(row) in OURS)
    for group in by(valid(rows, "decode"), "hardware_name", "name", "dtype").values():
        for mine in by_size(group).values():
            peers = [row for row in mine if first_word(row) not in ("engine", "naive")]
            same_weights = [*(row for row in mine if row["impl"] == "engine"), *peers]
            if any(first_word(row) == "torch.compile" for row in peers):  # without it the best peer is unknown
                for what, field in (("a token of", "tpot_ms"), ("the first token of", "ttft_ms")):
                    timed = with_numbers(same_weights, field)
                    lines += beside(timed, f"{what} {mine[0]['name']}", field, lambda row: row["impl"] == "engine")
    columns: report.Columns = {
        "what": "about", "sizes": lambda row: f"{report.dims(row)} {row['dtype']}", "ours, ms": "ours_ms",
        "best peer, ms": "peer_ms", "best peer": "peer", "ours is": lambda row: f"{row['times']:.2f}x as fast",
        "measured": lambda row: f"{machine(row)}, {provenance(row)}",
    }  # fmt: skip
    return report.table(lines, columns)


def beside(rows: Sequence[Row], about: str, field: str, ours: Callable[[Row], bool]) -> list[Row]:
    """One line on rows of one size: the fastest of ours, and the fastest of the others; none without either."""
    best = lambda some: min(some, key=lambda row: row[field], default=None)
    mine, peer = best([row for row in rows if ours(row)]), best([row for row in rows if not ours(row)])
    if mine is None or peer is None:
        return []
    return [{**mine, "about": about, "ours_ms": mine[field], "peer_ms": peer[field], "peer": peer["impl"],
        "times": peer[field] / max(mine[field], 1e-9)}]  # fmt: skip


def first_word(row: Row) -> str:
    """Who ran: triton of 'triton + CUDA graph'."""
    return row["impl"].split(" ")[0]


def machine(row: Row) -> str:
    return row["hardware"]["name"]


def provenance(row: Row) -> str:
    return f"{row['date'][:10]}, {(row['commit'] or 'n/a')[:10]}"


TABLES = {"summary": summary_table, "models": models_table, "ops": ops_table}


# ---- the command -----------------------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench.plots", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="the folder of one machine (default: all in --root)")
    parser.add_argument("--root", type=Path, default=results.ROOT, help="where the machines' folders are")
    parser.add_argument("--readme", choices=TABLES, help="print this table as Markdown, and draw nothing")
    parser.add_argument("--quick", action="store_true", help="accepted as in every page; drawing is quick")
    arguments = parser.parse_args(argv)
    for flag, folder in (("out", arguments.out), ("root", arguments.root)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"--{flag}={folder}: no such folder; give one with rows, as python -m bench writes them")
    folders = [arguments.out] if arguments.out else machines(arguments.root)
    if arguments.readme:
        rows = [row for folder in folders for row in read(folder)[0]]
        with results.expected(", ".join(map(str, folders))):
            named = [{**row, "hardware_name": row.get("hardware", {}).get("name")} for row in rows]
            print(TABLES[arguments.readme](named))
        return 0
    failed = False
    for folder in folders:
        try:
            bench, logs = read(folder)
        except UserError as error:
            print(f"error: {error}; nothing is drawn from {folder}", file=sys.stderr)
            failed = True
            continue
        try:
            with results.expected(folder):
                made = figures(folder, bench, logs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        print("\n".join(map(str, made)) if made else f"{folder}: no rows to draw from")
    if not folders:
        print(f"{arguments.root}: no rows; python -m bench writes them")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
