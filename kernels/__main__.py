"""The table of ops: `python -m kernels`, or `python -m kernels --markdown` for the README."""

import argparse
import sys

from . import OPS, _triton, load


def rows() -> list[tuple[str, str, str]]:
    """(name, formula, kernels) of every op; an op's kernels are the functions of its page that end in _kernel or _kernel_*."""
    return [(op.name, op.summary, ", ".join(kernel_names(op.name)) or "reference only") for op in OPS.values()]


def kernel_names(name: str) -> list[str]:
    """Kernels on the page of an op, in the order of the page."""
    page = vars(sys.modules[OPS[name].reference.__module__])
    return [key for key, value in page.items() if isinstance(value, _triton.jit) and "_kernel" in key]


def markdown() -> str:
    """The table as the README shows it."""
    lines = ["| op | what it computes | kernels |", "|---|---|---|"]
    for name, summary, kernels in rows():
        page = OPS[name].reference.__module__.replace(".", "/") + ".py"
        lines.append(f"| [`{name}`]({page}) | {summary.replace('|', chr(92) + '|')} | {kernels.replace(', ', '<br>')} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table, and what load('auto') would run here."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description="The table of ops.")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    if parser.parse_args(argv).markdown:
        print(markdown())
        return 0
    table = rows()
    width = max(len(name) for name, _, _ in table)
    for name, summary, kernels in table:
        print(f"{name:<{width}}  {summary}\n{'':<{width}}  {kernels}\n")
    print(f"Here, load('auto') runs:\n{load('auto')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
