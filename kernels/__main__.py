"""Prints the table of ops: `python -m kernels`; with `--gpu=L4` what that card runs of them, and why.

`--markdown` and `--cards` print the tables of the README.
"""

import argparse
import re
import sys

from . import OPS, _command, _triton, load


def rows() -> list[tuple[str, str, list[str]]]:
    """Returns (name, formula, kernels) of every op."""
    return [(op.name, op.summary, kernel_names(op.name)) for op in OPS.values()]


def kernel_names(name: str) -> list[str]:
    """Returns the kernels that an op launches at its bench sizes, forward first; none where Triton is missing."""
    op = OPS[name]
    if op.triton is None or _triton.MISSING:
        return []
    from .proof.aot import launches

    names = (launch.kernel.__name__ for dims in op.bench for launch in launches(op, dict(dims), 90))
    return sorted(dict.fromkeys(names), key=lambda kernel: "_bwd_" in kernel)


def markdown() -> str:
    """Returns the README's table. Names of kernels are shortened by the parts that they share."""
    lines = ["| op | what it computes | kernels |", "|---|---|---|"]
    for name, summary, kernels in rows():
        short = [re.sub(r"^.*(fwd|bwd)_kernel", r"\1", kernel).replace("_kernel", "") for kernel in kernels]
        cells = [f"[`{name}`]({_page(name)})", summary.replace("|", r"\|"), ", ".join(short) or "reference only"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _home(name: str) -> str:
    """Returns the module or package of an op: kernels.layernorm."""
    return ".".join(OPS[name].reference.__module__.split(".")[:2])


def _page(name: str) -> str:
    """Returns the path of an op's page in the repository: a file, or the folder of a package."""
    home = _home(name)
    return home.replace(".", "/") + ("" if hasattr(sys.modules[home], "__path__") else ".py")


def main(argv: list[str] | None = None) -> int:
    """Print the table, and what load('auto') chooses here."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description="The table of ops.")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    parser.add_argument("--cards", action="store_true", help="the GPUs compiled for and measured on, as such a table")
    parser.add_argument("--gpu", help="what this card takes: A10, RTX 4090, sm_89")
    args = parser.parse_args(argv)
    if args.cards or args.gpu:
        if _triton.MISSING:
            parser.error(_triton.MISSING)
        from .proof import cards

        try:
            print(cards.markdown() if args.cards else "\n".join(cards.page(args.gpu)))
        except ValueError as error:
            parser.error(str(error))
        return 0
    if args.markdown:
        print(markdown())
        return 0
    table = rows()
    width = max(len(name) for name, _, _ in table)
    for name, summary, kernels in table:
        print(f"{name:<{width}}  {summary}\n{'':<{width}}  {', '.join(kernels) or 'reference only'}\n")
    print(f"Here, load('auto') runs:\n{load('auto')}")
    return 0


if __name__ == "__main__":
    sys.exit(_command.run(main))
