"""Figures of profiles: one stacked bar for each implementation, the time in which the GPU waits included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptfast import report
from gptfast.log import Row

from .trace import PARTS

COLORS = dict(zip(PARTS, (
    "#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#777777", "#999933", "#882255", "#DDCC77",
    "#88CCEE", "#BBBBBB", "#DDDDDD", "#FFFFFF",
), strict=True))  # fmt: skip
NARROWEST = 0.045  # of the longest bar, for a number to be written into a piece


def profiles(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A figure for each model and mode of `profile` rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["what"] == "profile":
            groups.setdefault((row["name"], row["direction"]), []).append(row)
    return [profile_figure(mine, folder / f"profile-{name}-{mode}.png") for (name, mode), mine in groups.items()]


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
                axis.text(left + width / 2, place, f"{width:.3g}", ha="center", va="center", fontsize=7)
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
    return report.save(figure, path, rows, notes=notes)


def _whole(row: Row) -> float:
    return sum(part["ms"] for part in row["parts"]) + row["idle_ms"]
