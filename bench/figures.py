"""Figures of ops and of profiles, drawn from rows: each to be read at a glance.

An op is drawn along one growing axis where three sizes or more differ in it alone; sizes that are each of their own
stand as bars. Dashed is the datasheet's roofline, dotted what a copy and a GEMM reached on that machine; the number at
our mark is how many times longer the best peer takes. Peers that ran the same code are told once. `overview` has every
op of a machine, `roofline_figure` every row as a point, and a profile is one stacked bar for each implementation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptfast import report
from gptfast.log import Row
from gptfast.rows import file_name

from .peaks import Ceilings
from .peers import OURS
from .trace import PARTS

DIRECTIONS = ("forward", "backward", "both")
COMPUTE_BOUND = 16  # FLOPs per byte from which an op is shown in TFLOP/s: above those that stream, below products
STYLES = {"triton": (report.BLUE, "o"), "reference": ("#888888", "s"), "compile": (report.ORANGE, "^")}
OTHERS = (
    (report.GREEN, "v"), ("#CC79A7", "D"), ("#E69F00", "P"), ("#56B4E9", "X"), (report.RED, "*"), ("#332288", "<"),
)  # fmt: skip
# the axis along which an op grows, the first that serves, and the letters that go with it
AXES: Mapping[str, tuple[str, ...]] = {"T": ("B", "S"), "S": ("B",), "N": ("M",), "V": ("M",), "M": ()}
LEAST_POINTS = 3  # of a line
SAME_CODE = 0.03  # two peers of one family whose times are everywhere this near are one
COLORS = dict(zip(PARTS, (
    "#4477AA", "#225588", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#777777", "#999933", "#882255",
    "#DDCC77", "#88CCEE", "#BBBBBB", "#DDDDDD", "#FFFFFF",
), strict=True))  # fmt: skip
NARROWEST = 0.045  # of the longest bar, for a number to be written into a piece


# ---- ops -------------------------------------------------------------------------------------------------------------
def by(rows: Iterable[Row], *fields: str) -> dict[tuple, list[Row]]:
    """Rows grouped by these fields, in order of appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(field) for field in fields), []).append(row)
    return groups


def in_flops(rows: Sequence[Row]) -> bool:
    """Whether these rows of an op are about arithmetic rather than memory."""
    return statistics.median(row["flops"] / max(row["bytes"], 1) for row in rows) >= COMPUTE_BOUND


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Color and marker by implementation: ours the same in every figure."""
    rest = [name for name in dict.fromkeys(names) if name not in STYLES]
    return {**STYLES, **{name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}}


def serve_figure(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Tokens/s and the times of a request against the load, one line for each way of serving."""
    figure, (rate, first, each) = report.new_figure(title, panels=3)
    looks = styles(row["impl"] for row in rows)
    for (impl,), mine in by(sorted(rows, key=lambda row: row["dims"]["load"]), "impl").items():
        color, marker = looks[impl]
        load = [row["dims"]["load"] for row in mine]
        rate.plot(load, [row["tokens_per_s"] for row in mine], color=color, marker=marker, label=impl)
        for axis, what in ((first, "ttft"), (each, "tpot")):
            axis.plot(load, [row[f"{what}_ms_p50"] for row in mine], color=color, marker=marker)
            axis.plot(load, [row[f"{what}_ms_p95"] for row in mine], color=color, linestyle="dotted")
    rate.set(ylabel="tokens/s")
    rate.set_ylim(bottom=0)
    first.set(ylabel="ms to the first token\np50; dotted p95", yscale="log")
    first.yaxis.set_major_formatter("{x:,g}")
    each.set(ylabel="ms for each further one\np50; dotted p95", xlabel="load: arrivals over what one at a time can do")
    each.set_ylim(bottom=0)
    rate.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return report.save_figure(figure, path, rows)


def same_code_once(rows: Sequence[Row]) -> list[Row]:
    """The rows without peers that ran the same code as another of their family, which bears both names.

    A family is a first word (sdpa, sdpa cudnn); the reference, where it is one call of torch, belongs to all of them.
    """
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row["impl"], {})[f"{row['direction']} {row['dtype']} {report.dims(row)}"] = row["ms_p50"]
    named = {impl: impl for impl in times}
    for impl in sorted(times, key=lambda name: (name != "reference", len(name))):  # the vaguer name goes
        for other in times:
            related = "reference" == impl or impl.split()[0] == other.split()[0]
            if impl == other or "triton" in (impl, other) or named[impl] is not impl or not related:
                continue
            common = times[impl].keys() & times[other].keys()
            if (
                common == times[impl].keys()
                and named[other] is other
                and all(abs(times[impl][case] / times[other][case] - 1) < SAME_CODE for case in common)
            ):
                named[impl] = other
                break
    bearing = {other: [impl for impl, name in named.items() if name == other and impl != other] for other in times}
    label = {impl: " = ".join([impl, *bearing[impl]]) for impl in times}
    return [{**row, "impl": label[row["impl"]]} for row in rows if named[row["impl"]] == row["impl"]]


def series(sizes: Sequence[Mapping[str, Any]]) -> tuple[str | None, dict[str, list[Mapping[str, Any]]], list]:
    """(axis, {what the sizes of a line share: the sizes, growing}, sizes that are on no line)."""
    best: tuple[int, str | None, dict[str, list[Mapping[str, Any]]]] = (0, None, {})
    for axis, along in AXES.items():
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for dims in sizes:
            if axis in dims:
                rest = {letter: size for letter, size in dims.items() if letter not in (axis, *along)}
                groups.setdefault(" ".join(f"{letter}={size}" for letter, size in rest.items()), []).append(dims)
        groups = {
            name: sorted(mine, key=lambda dims: dims[axis])
            for name, mine in groups.items()
            if len({dims[axis] for dims in mine}) >= LEAST_POINTS and len({dims[axis] for dims in mine}) == len(mine)
        }
        held = sum(map(len, groups.values()))
        if held > best[0]:
            best = (held, axis, groups)
    _, chosen, lines = best
    on_a_line = [dims for mine in lines.values() for dims in mine]
    return chosen, lines, [dims for dims in sizes if dims not in on_a_line]


def op_figure(rows: Sequence[Row], path: Path, measured: Ceilings | None = None) -> Path:
    """TFLOP/s or GB/s of one op: a row of panels for each direction and dtype, a panel for each line and for bars."""
    name, flops = rows[0]["name"], in_flops(rows)
    field, unit = ("tflops", "TFLOP/s") if flops else ("gbs", "GB/s")
    rows = same_code_once(rows)
    source = next((row["roofline_source"] for row in rows if row.get("roofline_source")), None)
    measured = None if measured and measured.source == source else measured  # drawn as the roofline already
    sizes = list({report.dims(row): row["dims"] for row in rows}.values())
    axis_name, lines, alone = series(sizes)
    shown = sorted(by(rows, "direction", "dtype"), key=lambda key: DIRECTIONS.index(key[0]))
    columns = len(lines) + bool(alone)
    figure, axes = report.new_grid(f"{name}: {unit}", len(shown), columns)
    impls = dict.fromkeys(row["impl"] for row in rows)
    look, used = styles(impls), {}
    tall = max(2.1, 0.45 + len(alone) * max(0.3, 0.12 * len(impls)))
    figure.set_size_inches(8 if columns == 1 else 5.5 * columns, 2.0 + tall * len(shown))
    for panels, (direction, dtype) in zip(axes, shown, strict=True):
        mine = [row for row in rows if (row["direction"], row["dtype"]) == (direction, dtype)]
        for panel, (shared, group) in zip(panels, lines.items(), strict=False):
            ticks = [dims[axis_name or ""] for dims in group]
            used.update(
                _lines(panel, [row for row in mine if row["dims"] in group], axis_name or "", field, look, ticks)
            )
            used.update(_roofs(panel, [row for row in mine if row["dims"] in group], field, measured, axis_name))
            panel.set(title=" ".join([direction, dtype, shared]), ylim=(0, None), xlabel=axis_name)
        if alone:
            ones = [row for row in mine if row["dims"] in alone]
            used.update(_bars(panels[-1], ones, field, look))
            used.update(_roofs(panels[-1], ones, field, measured, None))
            panels[-1].set(title=f"{direction} {dtype}", xlim=(0, None), xlabel=unit)
        if lines:
            panels[0].set_ylabel(unit)
    figure.legend(used.values(), used, loc="outside upper right", ncols=min(6, len(used)), frameon=False, fontsize=8)
    notes = [f"dashed: {source}"] if source else []
    notes += [f"dotted: {measured.source}"] if measured else []
    notes.append("at our mark: how many times longer the best peer takes; both: forward and backward in one")
    return report.save_figure(figure, path, rows, notes=[*notes, "GB/s of compulsory bytes"])


def _ours(impl: str) -> bool:
    return impl.split(" = ")[0] in ("triton", "gluon")


def _ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times longer the best peer takes than ours at the same size; None without one, or where it is a peer."""
    peers = [r["ms_p50"] for r in rows if r["dims"] == row["dims"] and not _ours(r["impl"]) and not r.get("inexact")]
    return min(peers) / row["ms_p50"] if _ours(row["impl"]) and peers else None


def _lines(
    panel: Any, rows: Sequence[Row], axis: str, field: str, look: Mapping, ticks: Sequence[int]
) -> dict[str, Any]:  # fmt: skip
    used = {}
    for (impl,), points in by(rows, "impl").items():
        points = sorted(points, key=lambda row: row["dims"][axis])
        color, marker = look[impl]
        x, y = [row["dims"][axis] for row in points], [row[field] for row in points]
        used[impl] = panel.plot(x, y, marker=marker, color=color, markersize=5, linewidth=1.2, label=impl)[0]
        for row in points:
            ratio = _ratio(row, rows)
            if ratio is not None and impl == "triton":
                below = ratio < 1  # where the peer's line lies above
                panel.annotate(f"{ratio:.2f}x", (row["dims"][axis], row[field]), (0, -11 if below else 5), color=color,
                    fontsize=7, textcoords="offset points", ha="center")  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [short(tick) for tick in ticks], fontsize=7)
    panel.minorticks_off()
    return used


def short(size: int) -> str:
    """16k for 16384, 768 for 768."""
    return f"{size // 1024}k" if size >= 1024 and size % 1024 == 0 else str(size)


def _bars(panel: Any, rows: Sequence[Row], field: str, look: Mapping) -> dict[str, Any]:
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    labels = list(dict.fromkeys(report.dims(row) for row in rows))
    used, height = {}, 0.8 / max(1, len(impls))
    for row in rows:
        place = labels.index(report.dims(row)) + height * (impls.index(row["impl"]) - (len(impls) - 1) / 2)
        used[row["impl"]] = panel.barh(place, row[field], height, color=look[row["impl"]][0])
        ratio = _ratio(row, rows)
        if ratio is not None and row["impl"] == "triton":
            panel.annotate(f" {ratio:.2f}x", (row[field], place), va="center", fontsize=7, color=look["triton"][0])
    short_labels, shared = told_apart(labels)
    panel.set_yticks(range(len(labels)), [two_a_line(label) for label in short_labels], fontsize=7)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    if shared:
        panel.text(1, 1.01, " ".join(shared), transform=panel.transAxes, fontsize=7, ha="right")
    return used


def _roofs(
    panel: Any, rows: Sequence[Row], field: str, measured: Ceilings | None, axis: str | None
) -> dict[str, Any]:  # fmt: skip
    """The datasheet's roofline at each size, dashed, and the measured one, dotted."""
    used: dict[str, Any] = {}
    labels = list(dict.fromkeys(report.dims(row) for row in rows))
    for label, style in (("roofline", "--"), ("measured", ":")):
        heights = {}
        for row in rows:
            part = row.get("roofline") if label == "roofline" else _of_measured(row, measured)
            if part and (label == "roofline" or part != row.get("roofline")):
                heights[report.dims(row)] = (row, row[field] / part)
        if axis is None:
            for name, (_, height) in heights.items():
                place = labels.index(name)
                used[label] = panel.plot([height] * 2, [place - 0.42, place + 0.42], color="black", linestyle=style)[0]
        elif heights:
            points = sorted((row["dims"][axis], height) for row, height in heights.values())
            used[label] = panel.plot(*zip(*points, strict=True), color="black", linewidth=1.1, linestyle=style)[0]
    return used


def _of_measured(row: Row, measured: Ceilings | None) -> float | None:
    if row.get("of_measured"):
        return row["of_measured"]
    if measured is None:
        return None
    return measured.fraction(row["ms_p50"], row["flops"], row["bytes"], row["dtype"], row.get("cold", True))


def told_apart(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that tell labels apart, and those that all of them have: 'T=1 D=64', 'T=1 D=80' -> D=64, D=80; T=1."""
    words = [label.split(" ") for label in labels]
    shared = [word for word in words[0] if all(word in other for other in words)] if len(words) > 1 else []
    return [" ".join(word for word in mine if word not in shared) for mine in words], shared


def two_a_line(label: str) -> str:
    words = label.split(" ")
    return "\n".join(" ".join(words[i : i + 2]) for i in range(0, len(words), 2))


# ---- all ops of a machine --------------------------------------------------------------------------------------------
def overview_figure(rows: Sequence[Row], path: Path, measured: Ceilings | None = None) -> Path | None:
    """Every op of ours: how many times longer its best peer takes, and its fraction of the ceiling; a dot a size."""
    marks: dict[str, list[tuple[float | None, float | None]]] = {}
    mine = next((impl for impl in OURS if any(row["impl"] == impl for row in rows)), None)
    for (name, direction, dtype), group in by(rows, "name", "direction", "dtype").items():
        if direction == "backward" and any(r["name"] == name and r["direction"] == "both" for r in rows):
            continue
        for row in group:
            if row["impl"] == mine:
                peers = [r["ms_p50"] for r in group if r["dims"] == row["dims"] and r["impl"] != mine
                    and not _ours(r["impl"]) and not r.get("inexact")]  # fmt: skip
                ratio = min(peers) / row["ms_p50"] if peers else None
                share = _of_measured(row, measured) or row.get("roofline")
                marks.setdefault(f"{name}, {direction}, {dtype}", []).append((ratio, share))
    if not marks:
        return None
    figure, ((left, right),) = report.new_grid(f"Every op ({mine}): best peer, and ceiling", 1, 2)
    figure.set_size_inches(11, 2.4 + 0.27 * len(marks))
    for place, values in enumerate(marks.values()):
        ratios = [ratio for ratio, _ in values if ratio is not None]
        shares = [100 * share for _, share in values if share is not None]
        for panel, some, form in ((left, ratios, "{:.2f}x"), (right, shares, "{:.0f} %")):
            if not some:
                continue
            middle = statistics.median(some)
            good = panel is right or middle >= 1
            base = 1.0 if panel is left else 0.0
            panel.barh(
                place, middle - base, left=base, height=0.6, color=report.BLUE if good else report.ORANGE, alpha=0.6
            )
            panel.plot(some, [place] * len(some), ".", color="black", markersize=4)
            panel.annotate("  " + form.format(middle), (max(*some, base), place), va="center", fontsize=8)
    left.axvline(1.0, color="black", linewidth=1.0)
    left.set_xscale("log", base=2)
    most = [r for values in marks.values() for r, _ in values if r is not None] or [1.0]
    ticks = [2.0**i for i in range(math.floor(math.log2(min(*most, 1))), math.ceil(math.log2(max(*most, 1))) + 2)]
    left.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    left.minorticks_off()
    left.set_yticks(range(len(marks)), list(marks), fontsize=8)
    right.set_yticks([])
    for panel in (left, right):
        panel.set_ylim(len(marks) - 0.4, -0.6)
    left.set_xlabel("time of the best peer / ours (right of the line: ours is faster)")
    right.set(xlabel="% of what a copy or a GEMM reaches" if measured else "% of the roofline", xlim=(0, 118))
    notes = ["a dot is a size, a bar their median; the plain torch reference counts as a peer"]
    notes += [f"ceiling: {measured.source}"] if measured else []
    return report.save_figure(figure, path, rows, notes=notes)


def roofline_figure(
    points: Sequence[Row], path: Path, title: str, roofs: Sequence[Ceilings], rows: Sequence[Row]
) -> Path:
    """TFLOP/s against FLOPs per byte. A point has label, flops, bytes, ms; `roofs` are lines, dotted if measured."""
    figure, (axis,) = report.new_figure(title)
    seen: set[str] = set()
    markers = "ovD^sPX*<>hd"
    names = list(dict.fromkeys(point["label"] for point in points))
    palette = list(COLORS.values())
    for point in points:
        name = point["label"]
        place = names.index(name)
        color = COLORS.get(name) or palette[place % 11]
        axis.plot(point["flops"] / point["bytes"], point["flops"] / point["ms"] / 1e9, markers[place % len(markers)],
            color=color, markersize=6, markeredgecolor="black", markeredgewidth=0.4, linestyle="",
            label=None if name in seen else name)  # fmt: skip
        seen.add(name)
    x = [point["flops"] / point["bytes"] for point in points]
    low, high = min(x) / 2, max(*x, 1000) * 2
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    for roof in roofs:
        flops, memory = max(roof.flops.values(), default=None), roof.bytes_per_s
        if flops and memory:
            axis.plot(grid, [min(flops, memory * v) / 1e12 for v in grid], color="black", linewidth=1.1,
                linestyle=":" if roof.slack else "--", label=roof.source)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per compulsory byte", ylabel="TFLOP/s")
    axis.legend(frameon=False, fontsize=7, ncols=2)
    return report.save_figure(figure, path, rows)


# ---- profiles --------------------------------------------------------------------------------------------------------
def profiles(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A figure for each model and mode of `profile` rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["what"] == "profile":
            groups.setdefault((row["name"], row["direction"]), []).append(row)
    return [
        profile_figure(mine, folder / f"profile-{file_name(name)}-{file_name(mode)}.png")
        for (name, mode), mine in groups.items()
    ]


def profile_figure(rows: Sequence[Row], path: Path) -> Path:
    """Milliseconds of a step by part, a bar for each implementation; what the GPU waits is the white end."""
    first = rows[0]
    figure, (axis,) = report.new_figure(f"{first['name']}: where a {first['direction']} step goes")
    figure.set_size_inches(9, 2.6 + 0.75 * len(rows))
    longest, seen = max(map(_whole, rows)), set()
    for place, row in enumerate(rows):
        ms = {part["part"]: part["ms"] for part in row["parts"]} | {"idle": row["idle_ms"]}
        left = 0.0
        for part in PARTS:
            width = ms.get(part, 0.0)
            if width <= 0:
                continue
            label = None if part in seen else part
            seen.add(part)
            hatch = "///" if part == "idle" else None
            axis.barh(place, width, left=left, height=0.62, color=COLORS[part], edgecolor="black", linewidth=0.4,
                label=label, hatch=hatch)  # fmt: skip
            if width > NARROWEST * longest:
                box = {"facecolor": COLORS[part], "edgecolor": "none", "pad": 1}
                axis.text(left + width / 2, place, f"{width:.3g}", ha="center", va="center", fontsize=7, bbox=box)
            left += width
        axis.annotate(
            f" {row['ms_p50']:.4g} ms, {row['tokens_per_s']:,.0f} tokens/s", (left, place), va="center", fontsize=8
        )
    axis.set_yticks(range(len(rows)), [f"{row['impl']}\n{report.dims(row)} {row['dtype']}" for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="ms of one step", xlim=(0, longest * 1.28))
    axis.legend(frameon=False, ncols=5, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1.0))
    notes = [
        "kernels under torch.profiler; the number at the end is the wall clock without it; idle: what is left of it"
    ]
    return report.save_figure(figure, path, rows, notes=notes)


def _whole(row: Row) -> float:
    return sum(part["ms"] for part in row["parts"]) + row["idle_ms"]
