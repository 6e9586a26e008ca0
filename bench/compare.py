"""Compare two campaigns: what became slower or faster, and an exit code for CI.

    python -m bench compare OLD NEW --threshold=0.05      # files or folders of rows

Exit code 0: nothing slower; 1: something slower, or a row that is invalid; 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gptfast.cli import UserError

from . import results


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench compare", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("old", help="a .jsonl file, or a folder of them")
    parser.add_argument("new")
    parser.add_argument("--threshold", type=float, default=0.05, help="how much slower is slower (0.05: 5%%)")
    parser.add_argument("--across", action="store_true", help="compare machines, not code")
    arguments = parser.parse_args(argv)
    if not arguments.threshold >= 0:
        raise UserError(f"--threshold={arguments.threshold} must not be below 0")
    old, new = results.read_all([arguments.old]), results.read_all([arguments.new])
    if not arguments.across:
        results.check_same_machine(old, new)
    changes = results.compare(old, new, arguments.threshold)
    if not changes:
        raise UserError(f"{arguments.old} and {arguments.new} have no measurement in common")
    return report(changes, arguments.threshold)


def report(changes: Sequence[results.Change], threshold: float) -> int:
    """Print what changed. Returns the exit code."""
    counts = dict.fromkeys(("slower", "faster", "same", "invalid"), 0)
    for change in changes:
        counts[change.verdict] += 1
        if change.verdict != "same":
            times = f"{change.old_ms:.4f} -> {change.new_ms:.4f} ms"
            print(f"{change.verdict:8s} {change.ratio - 1:+7.1%}  {times:>24s}  {change.label}")
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{len(changes)} compared at a threshold of {threshold:.0%}: {summary}")
    return 1 if counts["slower"] or counts["invalid"] else 0
