"""Compare two campaigns: what became slower or faster, why, and an exit code for CI.

    python -m bench compare OLD NEW --threshold=0.05      # files or folders of rows
    python -m bench compare OLD NEW --json=summary.json

What changed is real unless something else explains it: `method`, it was timed otherwise; `versions`, other software;
`hardware`, the clocks were lower, the GPU was throttled, or peers whose code did not change moved as far; `noise`, the
intervals of the medians overlap though the medians are apart. Exit code 0: nothing of ours became slower for real; 1:
something did, or a row is invalid; 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptfast.aside import write_whole
from gptfast.errors import UserError
from gptfast.log import Row

from . import results
from .peers import OURS
from .results import Change

CLOCK_SLACK = 0.03  # lower clocks than this explain nothing
CAUSES = ("real", "method", "versions", "hardware", "noise")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench compare", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("old", help="a .jsonl file, or a folder of them")
    parser.add_argument("new")
    parser.add_argument("--threshold", type=float, default=0.05, help="how much slower is slower (0.05: 5%%)")
    parser.add_argument("--across", action="store_true", help="compare machines, not code: every change is real")
    parser.add_argument("--json", type=Path, help="a file for the summary")
    arguments = parser.parse_args(argv)
    if not arguments.threshold >= 0:
        raise UserError(f"--threshold={arguments.threshold} must not be below 0")
    old, new = results.read_all([arguments.old]), results.read_all([arguments.new])
    if not arguments.across:
        results.check_same_machine(old, new)
    changes = results.compare(old, new, arguments.threshold)
    if not changes:
        raise UserError(f"{arguments.old} and {arguments.new} have no measurement in common")
    with results.expected(f"{arguments.old} or {arguments.new}"):
        causes = {
            c.label: ("real", "") if arguments.across else cause(c, changes, arguments.threshold) for c in changes
        }
    if arguments.json:
        write_whole(arguments.json, json.dumps(summary(changes, causes), indent=1))
    return report(changes, causes, arguments.threshold)


# ---- why -------------------------------------------------------------------------------------------------------------
def cause(change: Change, changes: Sequence[Change], threshold: float) -> tuple[str, str]:
    """(one of CAUSES, why) of a change; ('', '') where nothing changed."""
    if change.verdict == "invalid":
        return "", ""
    if change.verdict == "same":
        apart = abs(change.ratio - 1) > threshold
        return ("noise", "the intervals of the medians overlap") if apart else ("", "")
    old, new = change.old, change.new
    for find in (_method, _versions, _clocks):
        why = find(old, new)
        if why:
            return find.__name__.strip("_").replace("clocks", "hardware"), why
    why = _peers(change, changes, threshold)
    return ("hardware", why) if why else ("real", "")


def _method(old: Row, new: Row) -> str | None:
    for field in ("method", "threads", "cold", "compiled", "side_by_side"):
        was, now = (row.get(field) for row in (old, new))
        if field == "method":  # 'graph of 64' and 'graph of 32' are one method
            was, now = (str(value).split(" ")[0] for value in (was, now))
        if was != now:
            return f"{field} was {was}, is {now}"
    return None


def _versions(old: Row, new: Row) -> str | None:
    was, now = (row.get("software", {}) for row in (old, new))
    other = [name for name in was.keys() | now.keys() if was.get(name) != now.get(name)]
    other += ["peer"] if old.get("peer_version") != new.get("peer_version") else []
    return ", ".join(f"{name} {was.get(name)} -> {now.get(name)}" for name in sorted(other)) or None


def _clocks(old: Row, new: Row) -> str | None:
    """Whether the clocks explain the direction of the change."""
    was, now = (row.get("state_after") or row.get("state_before") or {} for row in (old, new))
    slower = new["ms_p50"] > old["ms_p50"]
    throttled = set(now.get("throttle") or ()) - set(was.get("throttle") or ())
    if slower and throttled:
        return f"the GPU was throttled: {', '.join(sorted(throttled))}"
    for clock in ("sm_mhz", "memory_mhz"):
        if was.get(clock) and now.get(clock):
            ratio = now[clock] / was[clock]
            if (slower and ratio < 1 - CLOCK_SLACK) or (not slower and ratio > 1 + CLOCK_SLACK):
                return f"{clock} {was[clock]} -> {now[clock]}"
    return None


def _peers(change: Change, changes: Sequence[Change], threshold: float) -> str | None:
    """Whether others' code, on the same case, moved at least half as far: then it was the machine."""
    about = lambda row: (row["what"], row.get("name"), row.get("direction"), row.get("dims"), row.get("dtype"))
    peers = [
        other.ratio for other in changes
        if other is not change and about(other.new) == about(change.new) and other.new.get("impl") not in OURS
    ]  # fmt: skip
    if not peers or not is_ours(change.new):
        return None
    moved = statistics.median(peers)
    same_way = (moved - 1) * (change.ratio - 1) > 0
    if same_way and abs(moved - 1) > threshold and abs(moved - 1) >= abs(change.ratio - 1) / 2:
        return f"peers moved by {moved - 1:+.1%} as well"
    return None


# ---- telling ---------------------------------------------------------------------------------------------------------
Causes = Mapping[str, tuple[str, str]]


def summary(changes: Sequence[Change], causes: Causes) -> dict[str, Any]:
    """What CI reads: counts, the exit code, and every change with its cause."""
    told = [
        {"label": c.label, "old_ms": c.old_ms, "new_ms": c.new_ms, "ratio": c.ratio, "verdict": c.verdict,
         "cause": causes[c.label][0], "why": causes[c.label][1]}
        for c in changes
    ]  # fmt: skip
    return {"exit_code": exit_code(changes, causes), "counts": dict(counts(changes)), "changes": told}


def counts(changes: Sequence[Change]) -> Counter[str]:
    return Counter({"slower": 0, "faster": 0, "same": 0, "invalid": 0}) + Counter(c.verdict for c in changes)


def exit_code(changes: Sequence[Change], causes: Causes) -> int:
    slower = any(c.verdict == "slower" and causes[c.label][0] == "real" and is_ours(c.new) for c in changes)
    return 1 if slower or any(c.verdict == "invalid" for c in changes) else 0


def is_ours(row: Row) -> bool:
    """Whether a row is about code of ours; a peer that became slower is told, and fails nothing."""
    return row.get("ours", row["what"] != "op" or row.get("impl") in OURS)


def report(changes: Sequence[Change], causes: Causes, threshold: float) -> int:
    """Print what changed. Returns the exit code."""
    for change in changes:
        name, why = causes[change.label]
        if change.verdict != "same" or name == "noise":
            times = f"{change.old_ms:.4f} -> {change.new_ms:.4f} ms"
            told = f"  [{name}{': ' + why if why else ''}]" if name else ""
            print(f"{change.verdict:8s} {change.ratio - 1:+7.1%}  {times:>24s}  {change.label}{told}")
    totals = counts(changes)
    shown = ", ".join(f"{totals[verdict]} {verdict}" for verdict in ("slower", "faster", "same", "invalid"))
    print(f"{len(changes)} compared at a threshold of {threshold:.0%}: {shown}")
    return exit_code(changes, causes)
