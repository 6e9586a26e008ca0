from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gptfast import report
from gptfast.aside import check_writable
from gptfast.cli import run
from gptfast.report import card


def main(argv: list[str]) -> None:
    """Write a report on logs: files of rows, or folders with a metrics.jsonl."""
    parser = argparse.ArgumentParser(prog="python -m gptfast.report", description=main.__doc__)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--out_dir", "--out-dir", type=Path, help="where report.md goes; default: beside the first log")
    parser.add_argument("--card", action="store_true", help="a report card over folders, one for each stage")
    parser.add_argument(
        "--dollars_per_hour", "--dollars-per-hour", type=float, help="price of the machine, on the card"
    )
    options = parser.parse_args(argv)
    logs = [path / "metrics.jsonl" if path.is_dir() else path for path in options.paths]
    out_dir = options.out_dir or logs[0].parent
    check_writable(out_dir)
    if options.card:
        print(card.write(options.paths, out_dir, options.dollars_per_hour))
        return
    print(report.write_report(report.read(logs), out_dir))


if __name__ == "__main__":
    sys.exit(run(main))
