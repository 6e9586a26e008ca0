"""Figures of ops and of profiles, drawn from rows: each to be read at a glance.

An op is drawn along one growing axis where three sizes or more follow one law, as of a batch that shrinks while the
context grows; other sizes stand as bars. Dashed is the datasheet's roofline, dotted what a copy and a GEMM reached on
that machine; the factor at our mark is how many times longer the best peer takes. Peers that ran the same code are told
once. `overview_figure` has every op of a machine, `roofline_figure` every row as a point.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptfast import report
from gptfast.log import Row
from gptfast.rows import file_name

from .peaks import Ceilings
from .peers import OURS
from .trace import PARTS

DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
COMPUTE_BOUND = 16  # FLOPs per byte from which an op is shown in TFLOP/s: above those that stream, below products
STYLES = {  # by the first word of a name, ours in blue
    **dict.fromkeys(("triton", "engine", "server"), (report.BLUE, "o")),
    **dict.fromkeys(("reference", "naive"), ("#888888", "s")),
}
OTHERS = (
    (report.GREEN, "v"), ("#CC79A7", "D"), ("#E69F00", "P"), ("#56B4E9", "X"), (report.RED, "*"), ("#332288", "<"),
)  # fmt: skip
# the axis along which an op grows, the first that serves, and the letters that go with it
AXES: Mapping[str, tuple[str, ...]] = {"T": ("B", "S"), "S": ("B",), "N": ("M",), "V": ("M",), "M": ()}
LEAST_POINTS = 3  # of a line
FAR = 4  # a roofline this many times beyond the longest bar is told, and not drawn
SAME_CODE = 0.03  # two peers of one family whose times are everywhere this near are one
COLORS = dict(zip(PARTS, (
    "#4477AA", "#225588", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#777777", "#999933", "#882255",
    "#DDCC77", "#88CCEE", "#BBBBBB", "#DDDDDD", "#FFFFFF",
), strict=True))  # fmt: skip
DARK = 420  # red, green and blue of a color together: below it a number is written in white
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
    names = list(dict.fromkeys(names))
    known = {name: STYLES[first] for name in names if (first := name.split(" ")[0]) in STYLES}
    rest = [name for name in names if name not in known]
    return {**STYLES, **known, **{name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}}


def ours_first(names: Iterable[str]) -> list[str]:
    """Ours, then peers as they appear, then the reference that both are measured by."""
    first = {name: name.split(" ")[0] for name in names}
    return sorted(first, key=lambda name: (first[name] in ("reference", "naive"), first[name] not in (*OURS, "engine")))


def serve_figure(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Tokens/s and the times of a request against the load, one line for each way of serving."""
    figure, (rate, first, each) = report.new_figure(title, panels=3)
    looks, legend = styles(row["impl"] for row in rows), dict[str, Any]()
    for (impl,), mine in by(sorted(rows, key=lambda row: row["dims"]["load"]), "impl").items():
        color, marker = looks[impl]
        load = [row["dims"]["load"] for row in mine]
        legend[impl] = rate.plot(load, [row["tokens_per_s"] for row in mine], color=color, marker=marker)[0]
        for axis, what in ((first, "ttft"), (each, "tpot")):
            axis.plot(load, [row[f"{what}_ms_p50"] for row in mine], color=color, marker=marker)
            axis.plot(load, [row[f"{what}_ms_p95"] for row in mine], color=color, linestyle="dotted")
    rate.set(ylabel="tokens/s", ylim=(0, None))
    first.set(ylabel="ms to the first token", yscale="log")
    each.set(ylabel="ms for each further token", ylim=(0, None), xscale="log")
    each.set(xlabel="load: requests that arrive, over those that one at a time can answer")
    plain_ticks(first.yaxis)
    loads = sorted({row["dims"]["load"] for row in rows})
    each.set_xticks(loads, [f"{load:g}" for load in loads])
    each.minorticks_off()
    sizes = dict.fromkeys(" ".join(f"{k}={v}" for k, v in row["dims"].items() if k != "load") for row in rows)
    return report.save_figure(
        figure, path, rows, notes=["solid: median; dotted: 95th percentile", *filter(None, sizes)], legend=legend
    )


def plain_ticks(axis: Any) -> None:
    """100 and 0.1 on a logarithmic axis; matplotlib's own powers of ten are formulas, which names must not be."""
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter("")


def decode_figure(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Three panels of each size: the time to the first token, the rate from there on, and that of the whole request."""
    groups = by(({**row, "size": report.dims(row)} for row in rows), "dtype", "size")
    panels = (
        ("ms to the first token", lambda row: row["ttft_ms"]),
        ("tokens/s after the first", lambda row: 1000 * row["dims"].get("B", 1) / row["tpot_ms"]),
        ("tokens/s with the prompt's time", lambda row: row["tokens_per_s"]),
    )
    heights = [report.bars_height({row["impl"]: [row] for row in mine}) for mine in groups.values()]
    figure, axes = report.new_grid(title, len(groups), len(panels), heights)
    figure.set_figwidth(11)
    look = styles(row["impl"] for row in rows)
    for line, ((dtype, dims), mine) in zip(axes, groups.items(), strict=True):
        for axis, (unit, value) in zip(line, panels, strict=True):
            here = {row["impl"]: value(row) for row in mine}
            report.draw_bars(
                axis,
                {impl: [report.Bar(here[impl], report.number(here[impl]), look[impl][0])] for impl in ours_first(here)},
            )
            axis.set_xlabel(unit, fontsize=8)
            if axis is not line[0]:
                axis.set_yticklabels([])
        line[0].set_title(
            f"{dims}, {dtype}" if len({row["dtype"] for row in rows}) > 1 else dims, fontsize=9, loc="left"
        )
    notes = ["naive: reads the whole text again for each token"] if any(r["impl"] == "naive" for r in rows) else []
    return report.save_figure(figure, path, rows, notes=notes)


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
            if len({dims[axis] for dims in mine}) == len(mine) >= LEAST_POINTS
            and all(lawful(mine, axis, letter) for letter in along if letter in mine[0])
        }
        held = sum(map(len, groups.values()))
        if held > best[0]:
            best = (held, axis, groups)
    _, chosen, lines = best
    on_a_line = [dims for mine in lines.values() for dims in mine]
    return chosen, lines, [dims for dims in sizes if dims not in on_a_line]


def lawful(sizes: Sequence[Mapping[str, Any]], axis: str, letter: str) -> bool:
    """Whether `letter` stays, grows with `axis` or shrinks against it: only such sizes are joined by a line."""
    laws = (lambda a, b: b, lambda a, b: b / a, lambda a, b: b * a)
    return any(max(values) <= 1.1 * min(values) for law in laws if (values := [law(s[axis], s[letter]) for s in sizes]))


def growing(dims: Mapping[str, Any]) -> tuple:
    """The order of sizes in a figure: by context, row length or vocabulary, then by what is left."""
    return tuple(dims.get(letter, 0) for letter in (*AXES, "D", "H", "B", "K")), len(dims), report.dims({"dims": dims})


def op_figure(rows: Sequence[Row], path: Path, measured: Ceilings | None = None) -> Path:
    """TFLOP/s or GB/s of one op: a row of panels for each direction, in it for each dtype its lines and its bars."""
    name, flops = rows[0]["name"], in_flops(rows)
    field, unit = ("tflops", "TFLOP/s") if flops else ("gbs", "GB/s")
    rows = same_code_once(rows)
    source = next((row["roofline_source"] for row in rows if row.get("roofline_source")), None)
    measured = None if measured and measured.source == source else measured  # drawn as the roofline already
    sizes = sorted({report.dims(row): row["dims"] for row in rows}.values(), key=growing)
    axis_name, lines, alone = series(sizes)
    short_of_points = [
        shared for shared, group in lines.items()
        if any(len({report.dims(row) for row in mine if row["dims"] in group}) < LEAST_POINTS
            for mine in by(rows, "dtype").values())
    ]  # fmt: skip
    alone = sorted([*alone, *(dims for shared in short_of_points for dims in lines.pop(shared))], key=growing)
    look, legend = styles(ours_first(row["impl"] for row in rows)), dict[str, Any]()
    cases = by(rows, "direction", "dtype")
    directions = [direction for direction in DIRECTIONS if any(direction == first for first, _ in cases)]
    dtypes, per_dtype = sorted({dtype for _, dtype in cases}), len(lines) + bool(alone)
    bars = {case: _bars(mine, alone, field, look) for case, mine in cases.items()}
    heights = [
        max(
            2.2 if lines else 0.0,
            *(report.bars_height(_named(bars[case])[0]) for case in cases if case[0] == direction),
        )
        for direction in directions
    ]
    figure, axes = report.new_grid(f"{name}, {unit}", len(directions), per_dtype * len(dtypes), heights)
    for direction, panels in zip(directions, axes, strict=True):
        for i, dtype in enumerate(dtypes):
            mine, here = cases.get((direction, dtype), []), panels[i * per_dtype : (i + 1) * per_dtype]
            about = DIRECTIONS[direction] + (f", {dtype}" if len(dtypes) > 1 else "")
            for panel, (shared, group) in zip(here, lines.items(), strict=False):
                along, ticks = [row for row in mine if row["dims"] in group], [dims[axis_name or ""] for dims in group]
                legend |= _lines(panel, along, axis_name or "", field, look, ticks)
                used, far = _roofs(panel, along, field, measured, axis_name, {})
                legend |= used
                panel.set(ylim=(0, None), ylabel=unit)
                panel.set_xlabel("; beyond the axis: ".join(filter(None, [axis_name, far])), fontsize=8)
                panel.set_title(f"{about}; {shared}" if shared else about, fontsize=9, loc="left")
            if alone:
                ones = [row for row in mine if row["dims"] in alone]
                legend |= _bars_panel(here[-1], about, unit, bars.get((direction, dtype), {}), ones, field, measured)
    meaning = {"roofline": f"roofline: {source}", "measured": f"roofline: {measured.source}" if measured else ""}
    notes = [] if flops else ["GB/s of the bytes that must be moved"]
    if any(_ratio(row, mine) for mine in cases.values() for row in mine):
        notes.append("a factor is how many times longer the best peer takes than we do")
    notes += ["=: the same code by two names"] if any(" = " in row["impl"] for row in rows) else []
    return report.save_figure(
        figure, path, rows, notes=notes, legend={meaning.get(mark, mark): handle for mark, handle in legend.items()}
    )


def _bars_panel(
    panel: Any, about: str, unit: str, bars: Mapping[str, Sequence[report.Bar]], rows: Sequence[Row], field: str,
    measured: Ceilings | None,
) -> dict[str, Any]:  # fmt: skip
    """Fill a panel with bars by size and their rooflines; returns the marks that a legend explains."""
    if not bars:
        panel.set_axis_off()
        return {}
    named, shared = _named(bars)
    ends = dict(zip(bars, report.draw_bars(panel, named).values(), strict=True))
    used, far = _roofs(panel, rows, field, measured, None, ends)
    panel.set_xlabel("; beyond the axis: ".join(filter(None, [unit, far])), fontsize=8)
    panel.set_title("; ".join(filter(None, [about, " ".join(shared)])), fontsize=9, loc="left")
    return used


def _named(bars: Mapping[str, Sequence[report.Bar]]) -> tuple[dict[str, Sequence[report.Bar]], list[str]]:
    """The groups by what tells their sizes apart, two words a line, and the words that all of them have."""
    labels, shared = told_apart(list(bars))
    return dict(zip(map(two_a_line, labels), bars.values(), strict=True)), shared


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


def _bars(
    rows: Sequence[Row], alone: Sequence[Mapping[str, Any]], field: str, look: Mapping
) -> dict[str, list[report.Bar]]:  # fmt: skip
    """The bars of rows of one direction and dtype by size, each with the implementation's name and rate."""
    groups: dict[str, list[report.Bar]] = {}
    for dims in alone:
        here = {row["impl"]: row for row in rows if row["dims"] == dims}
        for impl in ours_first(here):
            row, ratio = here[impl], _ratio(here[impl], rows)
            text = f"{impl} {report.number(row[field])}" + (f", {ratio:.2f}x" if ratio is not None else "")
            groups.setdefault(report.dims(row), []).append(report.Bar(row[field], text, look[impl][0]))
    return groups


def _roofs(
    panel: Any, rows: Sequence[Row], field: str, measured: Ceilings | None, axis: str | None,
    ends: Mapping[str, tuple[float, float]],
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Draw the datasheet's roofline at each size, dashed, and the measured one, dotted; over bars those that are near.

    Returns the marks that a legend explains, and what lies beyond the axis in words.
    """
    used: dict[str, Any] = {}
    far: dict[str, list[float]] = {}
    longest = max((row[field] for row in rows), default=0.0)
    for label, style in (("roofline", "--"), ("measured", ":")):
        heights = {}
        for row in rows:
            part = row.get("roofline") if label == "roofline" else _of_measured(row, measured)
            if part and (label == "roofline" or part != row.get("roofline")):
                heights[report.dims(row)] = (row, row[field] / part)
        if any(height > FAR * longest for _, height in heights.values()):
            far[label] = [height for _, height in heights.values()]
        elif axis is None:
            for name, (_, height) in heights.items():
                used[label] = panel.plot([height] * 2, ends[name], color="black", linestyle=style, linewidth=1.2)[0]
                panel.set_xlim(0, max(panel.get_xlim()[1], 1.04 * height))
        elif heights:
            points = sorted((row["dims"][axis], height) for row, height in heights.values())
            used[label] = panel.plot(*zip(*points, strict=True), color="black", linewidth=1.1, linestyle=style)[0]
    spans = {
        label: " to ".join(dict.fromkeys([report.number(min(values)), report.number(max(values))]))
        for label, values in far.items()
    }
    words = {"roofline": "roofline", "measured": "measured roofline"}
    return used, ", ".join(f"{words[label]} {span}" for label, span in spans.items())


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
class Standing(NamedTuple):
    """One size of an op of ours: best peer's time over ours, whether others wrote that peer, share of the ceiling."""

    ratio: float | None
    by_others: bool
    share: float | None


def standings(rows: Sequence[Row], mine: str, measured: Ceilings | None) -> dict[str, list[Standing]]:
    """Where our ops stand, by op, direction and, if there are several, dtype; a backward alone only without both."""
    found: dict[str, list[Standing]] = {}
    dtypes = {row["dtype"] for row in rows}
    for (name, direction, dtype), group in by(rows, "name", "direction", "dtype").items():
        if direction == "backward" and any(r["name"] == name and r["direction"] == "both" for r in rows):
            continue
        for row in group:
            if row["impl"] != mine:
                continue
            peers = [r for r in group if r["dims"] == row["dims"] and r["impl"] != mine and not _ours(r["impl"])
                and not r.get("inexact")]  # fmt: skip
            best = min((r["ms_p50"] for r in peers), default=None)
            by_others = any(r["impl"] not in OURS for r in peers)
            share = _of_measured(row, measured) or row.get("roofline")
            label = f"{name}, {DIRECTIONS[direction]}" + (f", {dtype}" if len(dtypes) > 1 else "")
            standing = Standing(None if best is None else best / row["ms_p50"], by_others, share)
            found.setdefault(label, []).append(standing)
    return found


def overview_figure(rows: Sequence[Row], path: Path, measured: Ceilings | None = None) -> Path | None:
    """Every op of ours: how many times longer its best peer takes, and its fraction of the ceiling; a dot a size."""
    mine = next((impl for impl in OURS if any(row["impl"] == impl for row in rows)), "")
    marks = standings(rows, mine, measured)
    if not marks:
        return None
    figure, ((left, right),) = report.new_grid(f"Every op ({mine}) beside its best peer and its ceiling", 1, 2)
    figure.set_size_inches(11, 2.0 + 0.24 * len(marks))
    legend: dict[str, Any] = {}
    dots: Any = None
    for place, values in enumerate(marks.values()):
        others = any(one.by_others for one in values)  # then what only the reference was timed beside does not count
        ratios = [one.ratio for one in values if one.ratio is not None and one.by_others == others]
        shares = [100 * one.share for one in values if one.share is not None]
        for panel, some, form in ((left, ratios, "{:.2f}x"), (right, shares, "{:.0f} %")):
            if not some:
                continue
            middle = statistics.median(some)
            base, kind = (1.0, f"{mine} is {'faster' if middle >= 1 else 'slower'}") if panel is left else (0.0, "")
            kind = "no peer but the plain PyTorch reference" if panel is left and not others else kind
            color = report.ORANGE if kind.endswith("slower") else report.BLUE
            look = {"facecolor": "white" if kind.startswith("no peer") else color, "edgecolor": color, "alpha": 0.6}
            bar = panel.barh(place, middle - base, left=base, height=0.6, **look)
            legend |= {kind: bar} if kind else {}
            (dots,) = panel.plot(some, [place] * len(some), ".", color="black", markersize=4)
            panel.annotate(form.format(middle), (1.01, place), xycoords=panel.get_yaxis_transform(), va="center",
                fontsize=8)  # fmt: skip
    legend |= {"a size; the bar is the median": dots} if dots else {}
    left.axvline(1.0, color="black", linewidth=1.0)
    left.set_xscale("log", base=2)
    low, high = left.dataLim.intervalx if left.lines else (1.0, 1.0)
    first, last = math.floor(math.log2(min(low, 0.5))), math.ceil(math.log2(max(1.1 * high, 2.0)))
    left.set_xticks([2.0**i for i in range(first, last + 1)], [f"{2.0**i:g}x" for i in range(first, last + 1)])
    left.set_xlim(2.0**first, 2.0**last)
    left.minorticks_off()
    left.set_yticks(range(len(marks)), list(marks), fontsize=8)
    right.set_yticks([])
    for panel in (left, right):
        panel.set_ylim(len(marks) - 0.4, -0.6)
        panel.grid(axis="y", visible=False)
    left.set_xlabel("time of the best peer / ours")
    right.set(xlabel="% of what a copy or a GEMM reaches" if measured else "% of the roofline", xlim=(0, 105))
    notes = [f"ceiling: {measured.source}"] if measured else []
    return report.save_figure(figure, path, rows, notes=notes, legend=legend)


def roofline_figure(
    points: Sequence[Row], path: Path, title: str, roofs: Sequence[Ceilings], rows: Sequence[Row]
) -> Path:
    """TFLOP/s against FLOPs per byte. A point has label, flops, bytes, ms; `roofs` are lines, dotted if measured."""
    figure, (axis,) = report.new_figure(title)
    legend: dict[str, Any] = {}
    markers = "ovD^sPX*<>hd"
    names = list(dict.fromkeys(point["label"] for point in points))
    palette = list(COLORS.values())
    for point in points:
        name = point["label"]
        place = names.index(name)
        color = COLORS.get(name) or palette[place % 11]
        (legend[name],) = axis.plot(point["flops"] / point["bytes"], point["flops"] / point["ms"] / 1e9,
            markers[place % len(markers)], color=color, markersize=6, markeredgecolor="black", markeredgewidth=0.4,
            linestyle="")  # fmt: skip
    x = [point["flops"] / point["bytes"] for point in points]
    low, high = min(x) / 2, max(*x, 1000) * 2
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    for roof in roofs:
        flops, memory = max(roof.flops.values(), default=None), roof.bytes_per_s
        if flops and memory:
            (legend[roof.source],) = axis.plot(grid, [min(flops, memory * v) / 1e12 for v in grid], color="black",
                linewidth=1.1, linestyle=":" if roof.slack else "--")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must be moved", ylabel="TFLOP/s")
    plain_ticks(axis.xaxis)
    plain_ticks(axis.yaxis)
    return report.save_figure(figure, path, rows, legend=legend)


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
    """Milliseconds of a step by part, a bar for each implementation; what the GPU waits is the hatched end."""
    first = rows[0]
    step = {"train": "training", "decode": "decoding"}.get(first["direction"], first["direction"])
    figure, (axis,) = report.new_figure(f"{first['name']}: where the time of a {step} step goes")
    figure.set_size_inches(9, 2.4 + 0.65 * len(rows))
    longest, legend = max(map(_whole, rows)), dict[str, Any]()
    for place, row in enumerate(rows):
        ms = {part["part"]: part["ms"] for part in row["parts"]} | {"idle": row["idle_ms"]}
        left = 0.0
        for part in PARTS:
            width = ms.get(part, 0.0)
            if width <= 0:
                continue
            hatch = "///" if part == "idle" else None
            legend[part] = axis.barh(place, width, left=left, height=0.62, color=COLORS[part], edgecolor="black",
                linewidth=0.4, hatch=hatch)  # fmt: skip
            if width > NARROWEST * longest:
                box = {"facecolor": COLORS[part], "edgecolor": "none", "pad": 1}
                ink = "white" if sum(int(COLORS[part][i : i + 2], 16) for i in (1, 3, 5)) < DARK else "black"
                axis.text(left + width / 2, place, f"{width:.3g}", ha="center", va="center", fontsize=7, color=ink,
                    bbox=box)  # fmt: skip
            left += width
        axis.annotate(
            f" {row['ms_p50']:.4g} ms, {row['tokens_per_s']:,.0f} tokens/s", (left, place), va="center", fontsize=8
        )
    commits = {row.get("commit") for row in rows}
    when = lambda row: f"\n{row['date'][:10]}, {(row.get('commit') or 'n/a')[:7]}" if len(commits) > 1 else ""
    names = [f"{row['impl']}\n{report.dims(row)} {row['dtype']}{when(row)}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.grid(axis="y", visible=False)
    axis.invert_yaxis()
    axis.set(xlabel="ms of one step", xlim=(0, longest * 1.28))
    notes = ["parts: kernels under torch.profiler; the number at the end: the clock without it; idle: the difference"]
    legend = {part: legend[part] for part in PARTS if part in legend}
    return report.save_figure(figure, path, rows, notes=notes, legend=legend)


def _whole(row: Row) -> float:
    return sum(part["ms"] for part in row["parts"]) + row["idle_ms"]
