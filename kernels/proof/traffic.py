"""Counts the bytes that an op's kernels move through memory, beside those they must move: a roofline without a GPU.

    python -m kernels.proof.traffic           count, print the table, fail if it is not what results/traffic.json says
    python -m kernels.proof.traffic --update  the same, and write results/traffic.json

Each op runs forward and backward in the interpreter at its bench sizes, and at the first of them with its options, with
the code and tiles of an H100, and every access is counted in the 32-byte sectors that DRAM moves. To be quick, M, N or
B is divided, and multiprocessors and L2 are divided alike, so that partial sums have their true weight. Within a launch
a sector is fetched once, except that if the rows of all running programs overflow L2, a program that reads its own
again fetches again what was evicted. Reads and writes of torch's own kernels between launches count too, and partial
sums count as written and read even if L2 holds them. Only directions that need less than half of the arithmetic that
would keep an H100 busy are listed: the others are not bound by memory.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import OPS, _command
from ..op import Cost, Op
from .interpret import Guard, interpreting
from .machine_code import CHIPS
from .options import varied

REPORT = Path(__file__).resolve().parents[2] / "results" / "traffic.json"
ARCH = 90
MULTIPROCESSORS = CHIPS[ARCH].multiprocessors
L2_BYTES = 50 << 20  # of an H100 (NVIDIA H100 white paper, table 4)
INTENSITY = 148  # FLOP to a byte: half of what keeps an H100's tensor cores busy, by the peaks in gptfast/mfu.py
SECTOR = 32  # bytes


@dataclass
class _Counter:
    """Counts the bytes moved so far, in launches of kernels and between them."""

    multiprocessors: int
    l2_bytes: float
    bytes: float = 0.0
    in_launch: bool = False

    def guard(self, kernel: str, arguments: Any) -> "_CountingGuard":
        self.in_launch = True
        return _CountingGuard(kernel, arguments, self)


class _CountingGuard(Guard):
    """A guard that adds the bytes that its launch moved to the counter when the launch ends."""

    def __init__(self, kernel: str, arguments: Any, counter: _Counter) -> None:
        super().__init__(kernel, arguments)
        self.counter = counter
        self.accesses: list[tuple[str, tuple[int, ...], np.ndarray]] = []  # kind, program, sectors

    def accessed(self, kind: str, addresses: np.ndarray, size: int, program: tuple[int, ...]) -> None:
        super().accessed(kind, addresses, size, program)
        self.accesses.append((kind, program, np.unique(addresses // np.uint64(SECTOR))))

    def finish(self) -> None:
        super().finish()
        self.counter.in_launch = False
        own, again, programs = 0, 0, {program for _, program, _ in self.accesses}
        for kind in ("load", "store", "atomic"):
            touched = [sectors for k, _, sectors in self.accesses if k == kind]
            if touched:
                self.counter.bytes += np.unique(np.concatenate(touched)).size * SECTOR
        for program in programs:
            read = [sectors for kind, p, sectors in self.accesses if p == program and kind == "load"]
            if read:
                distinct = np.unique(np.concatenate(read)).size
                own += distinct * SECTOR
                again += (sum(map(len, read)) - distinct) * SECTOR
        if again:
            running = own / len(programs) * min(len(programs), self.counter.multiprocessors)
            self.counter.bytes += again * max(0.0, 1 - self.counter.l2_bytes / running)


class _TorchTraffic(TorchDispatchMode):
    """Counts what torch's own kernels read and write: arguments once, results once; no views, no empty tensors."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not (self.counter.in_launch or views or "empty" in function._schema.name):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.counter.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        return out


def divided(dims: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns the dims with M, N or B divided, and the multiprocessors that belong to them.

    In attention all groups of heads are alike; without keys all positions are. A product with fewer rows than there are
    multiprocessors is divided by columns.
    """
    if "M" in dims:
        shared = "M" if dims["M"] >= MULTIPROCESSORS else "N"
        return {**dims, shared: max(1, dims[shared] // MULTIPROCESSORS)}, 1
    if "T" not in dims:  # rows, each shared by as many programs as there is room for
        return {**dims, "B": 1}, max(1, MULTIPROCESSORS // dims["B"])
    if "S" not in dims:
        return {**dims, "B": 1, "T": max(1, dims["T"] // 16)}, max(1, MULTIPROCESSORS // dims["B"])
    groups = dims["B"] * dims["G"]
    return {**dims, "B": 1, "H": dims["H"] // dims["G"], "G": 1}, max(1, MULTIPROCESSORS // groups)


def moved(op: Op, small: dict[str, Any], multiprocessors: int) -> dict[str, float]:
    """Returns the bytes that each direction of an op moves in bf16 at these dims, on so many multiprocessors."""
    torch.manual_seed(0)
    arguments, keywords = op.inputs(**small, dtype=torch.bfloat16)
    leaves = [
        a.requires_grad_(op.differentiable)
        for i, a in enumerate(arguments)
        if isinstance(a, Tensor) and a.is_floating_point() and i not in op.constants
    ]
    counter = _Counter(multiprocessors, L2_BYTES * multiprocessors / MULTIPROCESSORS)
    assert op.triton is not None
    with interpreting(counter.guard, ARCH, multiprocessors):
        with _TorchTraffic(counter):
            out = op.triton(*arguments, **keywords)
        moved_bytes = {"forward": counter.bytes}
        if op.differentiable:
            outputs = out if isinstance(out, tuple) else (out,)
            gradients = [torch.ones_like(o) for o in outputs]
            counter.bytes = 0.0
            with _TorchTraffic(counter):
                torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
            moved_bytes["backward"] = counter.bytes
    return moved_bytes


def is_bound_by_memory(cost: Cost) -> bool:
    """Returns whether arithmetic per compulsory byte is so low that memory bounds the time."""
    return cost.bytes > 0 and cost.flops / cost.bytes < INTENSITY


def rows(op: Op, dims: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row per direction that memory bounds: compulsory and moved bytes of the divided dims, their ratio."""
    costs = dict(zip(("forward", "backward"), op.cost(**dims, itemsize=2), strict=True))
    bound = [name for name, cost in costs.items() if is_bound_by_memory(cost)]
    if op.triton is None or not bound:
        return []
    small, multiprocessors = divided(dims)
    compulsory = dict(zip(("forward", "backward"), op.cost(**small, itemsize=2), strict=True))
    return [
        {
            "op": op.name, "direction": name, "dims": dims, "divided": small,
            "compulsory_bytes": compulsory[name].bytes, "moved_bytes": round(count),
            "ratio": round(count / compulsory[name].bytes, 3),
        }
        for name, count in moved(op, small, multiprocessors).items() if name in bound
    ]  # fmt: skip


def read_report() -> list[dict[str, Any]]:
    """Returns the checked-in rows; none if there is no report yet."""
    return json.loads(REPORT.read_text()) if REPORT.exists() else []


def main(argv: list[str] | None = None) -> int:
    """Count and print. Returns 0 if the report agrees with what was counted, 1 otherwise."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m kernels.proof.traffic", description=about)
    parser.add_argument("--update", action="store_true", help=f"write {REPORT.parent.name}/{REPORT.name}")
    about = "only this op, as python -m kernels lists them; may be repeated"
    parser.add_argument("--op", action="append", choices=list(OPS), metavar="OP", help=about)
    args = parser.parse_args(argv)
    chosen = args.op or list(OPS)
    stale = []
    for name in chosen:
        counted = []
        for dims in (*OPS[name].bench, *varied(OPS[name])):
            for row in rows(OPS[name], dict(dims)):
                counted.append(row)
                sizes = " ".join(f"{letter}={size}" for letter, size in dims.items())
                print(f"{name:20s} {row['direction']:8s} {row['ratio']:6.3f} of compulsory bytes  {sizes}", flush=True)
        before = read_report()
        if args.update:
            write_report([row for row in before if row["op"] != name] + counted)
        elif [row for row in before if row["op"] == name] != counted:
            stale.append(name)
    if stale:
        print(
            f"results/{REPORT.name} is stale ({', '.join(stale)}): run `python -m kernels.proof.traffic --update` "
            "and commit it"
        )
    return 1 if stale else 0


def write_report(report: list[dict[str, Any]]) -> None:
    """Write one row per line, in the order of OPS."""
    order = list(OPS)
    lines = ",\n".join(json.dumps(row) for row in sorted(report, key=lambda row: order.index(row["op"])))
    REPORT.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    sys.exit(_command.run(main))
