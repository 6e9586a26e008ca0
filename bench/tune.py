"""Better tiles for an op on the GPU at hand: candidates must pass the gates of the compiled code, be right, and win.

    python -m bench tune layernorm                        # every entry of TILES that matters at its first bench size
    python -m bench tune attention --dims=B=8,T=4096,H=16,G=16,D=128 --entry=forward.90.128
    python -m bench tune rmsnorm --arch=90                # without a GPU: the gates only

A page keeps its block sizes in a mapping TILES. An entry of it is replaced for the time of a trial and put back. From
the entry as it stands the search goes from neighbour to neighbour (a block size halved or doubled, a stage more or
less), times all that compile cleanly side by side, and moves on while one is faster beyond doubt. It prints the line to
commit. Without a GPU it ranks nothing by speed: what the compiler shows is not how fast a kernel is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import secrets
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from gptfast.cli import check_ranges
from gptfast.errors import UserError, nearest
from gptfast.log import Log, Row, facts, now
from kernels import Op

from . import results
from .failures import FAILURES
from .ops import Case
from .stats import compare
from .timing import Settings, Timing, Verdict, Work, stopwatch

ROUNDS = 8  # moves from neighbour to neighbour, at most
GAIN = 1.01  # a move must gain a hundredth, and be different beyond doubt (99%)


# ---- entries of TILES ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """One replaceable value in a page's TILES: a named tuple of block sizes, or a number."""

    module: str  # kernels.attention.forward
    path: tuple[Any, ...]  # keys from TILES down: (90, 128)
    table: MutableMapping = dataclasses.field(repr=False, compare=False)  # the mapping that holds it

    @property
    def value(self) -> Any:
        return self.table[self.path[-1]]

    def __str__(self) -> str:
        return ".".join([self.module.rpartition(".")[2], *map(str, self.path)])

    @contextlib.contextmanager
    def holding(self, value: Any) -> Iterator[None]:
        """With this entry replaced. Launches inside choose their tiles from it."""
        before = self.value
        self.table[self.path[-1]] = value
        try:
            yield
        finally:
            self.table[self.path[-1]] = before


def entries(op: Op) -> list[Entry]:
    """Every entry of TILES in the page of an op, or in the modules of its package."""
    assert op.triton is not None
    page = ".".join(op.triton.__module__.split(".")[:2])  # the package, of an op that is a page in one
    listed: list[Entry] = []
    for name, module in sorted(sys.modules.items()):
        if (name == page or name.startswith(f"{page}.")) and isinstance(getattr(module, "TILES", None), dict):
            listed += _leaves(name, (), module.TILES)
    return listed


def _leaves(module: str, path: tuple, table: MutableMapping) -> Iterator[Entry]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(module, (*path, key), value)
        else:
            yield Entry(module, (*path, key), table)


def neighbours(value: Any, name: str = "") -> list[Any]:
    """Values one step away: numbers halved or doubled (`num_stages` one more or less), flags turned, field by field."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        return [n for n in steps if n >= 1 and not (name == "num_warps" and n > 32)]
    if hasattr(value, "_fields"):
        return [
            value._replace(**{field: changed})
            for field in value._fields
            for changed in neighbours(getattr(value, field), field)
        ]
    return []


# ---- gates -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Trial:
    """A value for an entry, and what the compiler made of it."""

    value: Any
    codes: tuple[Any, ...]  # kernels.proof.machine_code.Code of each launch
    broken: tuple[str, ...]  # the gates it breaks
    kernels: tuple[str, ...]  # names of what it launches
    signatures: tuple[str, ...]


def trial(op: Op, dims: dict[str, Any], arch: int, dtype: torch.dtype, entry: Entry, value: Any) -> Trial:
    """Compile every launch of the op with the entry at this value, and hold the code to the gates."""
    from kernels.proof import aot, machine_code

    with entry.holding(value):
        launches = aot.launches(op, dims, arch, dtype)
    signatures = tuple(f"{launch.kernel.__name__} {launch.signature()}" for launch in launches)
    codes, broken = [], []
    for launch in dict(zip(signatures, launches, strict=True)).values():
        name = launch.kernel.__name__
        try:
            code = machine_code.read_code(aot.compile_launch(launch, arch), arch)
        except Exception as error:  # a compiler that cannot do it may raise anything
            broken.append(f"{name} does not compile: {(str(error).splitlines() or [type(error).__name__])[0][:100]}")
            continue
        codes.append(code)
        broken += [f"{name}: {gate}" for gate in machine_code.broken_gates(code, arch)]
    return Trial(value, tuple(codes), tuple(broken), tuple(s.split()[0] for s in signatures), signatures)


def signatures(
    op: Op, dims: dict[str, Any], arch: int, dtype: torch.dtype, entry: Entry, value: Any
) -> tuple[str, ...]:
    """What a value would launch, found without compiling; () where the page refuses it."""
    from kernels.proof import aot

    try:
        with entry.holding(value):
            return tuple(f"{x.kernel.__name__} {x.signature()}" for x in aot.launches(op, dims, arch, dtype))
    except FAILURES:
        return ()


def distinct(op: Op, dims: dict[str, Any], arch: int, dtype: torch.dtype, entry: Entry) -> list[Any]:
    """Neighbours of the entry that launch something else than it does now, each other code once."""
    seen = {signatures(op, dims, arch, dtype, entry, entry.value), ()}
    unique = []
    for value in neighbours(entry.value):
        launched = signatures(op, dims, arch, dtype, entry, value)
        if launched not in seen:
            seen.add(launched)
            unique.append(value)
    return unique


def describe(tried: Trial) -> str:
    """One line: the value, what its kernels use, and the gates."""
    uses = ", ".join(f"{code.registers} regs {code.shared_bytes} B {code.programs_per_sm}/SM" for code in tried.codes)
    return f"{short(tried.value)}: {uses}: {'; '.join(tried.broken) or 'clean'}"


def short(value: Any) -> str:
    """A value as it is written in the page."""
    if hasattr(value, "_fields"):
        fields = ", ".join(f"{name}={short(field)}" for name, field in zip(value._fields, value, strict=True))
        return f"{type(value).__name__}({fields})"
    return repr(value)


# ---- time ------------------------------------------------------------------------------------------------------------
def direction_of(changed: Sequence[str]) -> str:
    """Which direction to time for the kernels that an entry changes; by rule their names say it."""
    backward = ["bwd" in name for name in changed]
    return "backward" if all(backward) else "both" if any(backward) else "forward"


def race(case: Case, entry: Entry, values: Sequence[Any], settings: Settings) -> list[tuple[Timing, Verdict]]:
    """Time the op with the entry at each value, side by side, and check the answers of what was timed."""
    assert case.op.triton is not None
    with stopwatch(case.device, settings) as watch:
        wanted = [] if case.direction == "forward" else case.differentiable(case.op.triton)
        input_bytes = sum(a.nbytes for a in case.draw(0) if isinstance(a, torch.Tensor))
        sets = [case.draw(seed) for seed in range(watch.sets_needed(input_bytes))]
        works = {}
        for i, value in enumerate(values):
            with entry.holding(value):
                plain = [case.work(case.op.triton, arguments, wanted) for arguments in sets]
            works[str(i)] = [dataclasses.replace(work, run=_holding(entry, value, work)) for work in plain]
        timings = watch.measure(works)
        try:
            verdicts = watch.verify(works, case.truth(wanted), [secrets.randbits(31)])
        except torch.OutOfMemoryError:
            raise UserError(f"{case}: the fp64 truth does not fit into memory; give smaller --dims") from None
    return [(timings[name], verdicts[name]) for name in works]


def _holding(entry: Entry, value: Any, work: Work) -> Any:
    def run() -> Any:
        with entry.holding(value):
            return work.run()

    return run


def climb(case: Case, arch: int, entry: Entry, settings: Settings, log: Log, common: Row) -> Any:
    """The best value found for an entry at these dims, starting from the one it has; a row for each that was timed."""
    dtype, dims = getattr(torch, case.dtype), dict(case.dims)
    start = best = entry.value
    known: dict[Any, Trial] = {}
    for _ in range(ROUNDS):
        with entry.holding(best):
            values = [best, *(v for v in distinct(case.op, dims, arch, dtype, entry) if v not in known)]
        for value in values:
            known[value] = trial(case.op, dims, arch, dtype, entry, value)
            log.say(f"tune   {entry} {describe(known[value])}")
        clean = [value for value in values if value == best or not known[value].broken]
        if len(clean) == 1:
            break
        raced = race(case, entry, clean, settings)
        reigning = raced[0][0]
        for value, (timing, verdict) in zip(clean, raced, strict=True):
            log.row(
                "tune", name=case.op.name, dims=dims, dtype=case.dtype, direction=case.direction, impl="triton",
                entry=str(entry), tile=short(value), arch=arch, current=value == start, **timing.fields(),
                error=verdict.error, valid=verdict.valid, invalid_reason=verdict.reason, **common,
            )  # fmt: skip
            wrong = "" if verdict.valid else f"  WRONG: {verdict.reason}"
            log.say(f"tune   {entry} {short(value)}: {timing.ms_p50:.4f} ms{wrong}")
        right = [(timing, value) for value, (timing, verdict) in zip(clean, raced, strict=True) if verdict.valid]
        if not right:
            break
        timing, winner = min(right, key=lambda pair: pair[0].ms_p50)
        comparison = compare(timing.samples, reigning.samples)
        if winner == best or not (comparison.different and comparison.ratio >= GAIN):
            break
        best = winner
    return best


def line_to_commit(entry: Entry, value: Any, case: Case, common: Row) -> str:
    """The assignment for the page, with the GPU, date and command that a table of tiles must bear."""
    keys = "".join(f"[{key!r}]" for key in entry.path)
    sizes = " ".join(f"{letter}={size}" for letter, size in case.dims.items())
    where = f"{common['hardware']['name']}, {now()[:10]}, {case.direction} {case.dtype} {sizes}"
    return f"{entry.module}: TILES{keys} = {short(value)}  # {where}: `{common['command']}`"


# ---- the command -----------------------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench tune", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    tunable = [op.name for op in kernels.OPS.values() if op.triton is not None and entries(op)]
    parser.add_argument("op", help=f"one of {', '.join(tunable)}")
    parser.add_argument("--dims", help="M=8192,N=768 (default: the first bench size)")
    parser.add_argument("--entry", help="only entries that begin so: forward.90")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--arch", type=int, help="without a GPU: compile for 80, 90 or 100 (default: 90)")
    parser.add_argument("--samples", type=int, default=60, help="of each candidate, at least")
    parser.add_argument("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    arguments = check_ranges(parser.parse_args(argv))
    if arguments.op not in tunable:
        raise UserError(f"nothing to tune under the name {arguments.op}{nearest(arguments.op, tunable)}")
    op = kernels.OPS[arguments.op]
    dims = {**op.bench[0], **read_dims(arguments.dims, op.bench[0])}
    chosen = [entry for entry in entries(op) if str(entry).startswith(arguments.entry or "")]
    if not chosen:
        raise UserError(f"--entry={arguments.entry}: there are {', '.join(map(str, entries(op)))}")
    if torch.cuda.is_available():
        return tune(op, dims, chosen, arguments)
    return show_gates(op, dims, chosen, arguments.arch or 90, getattr(torch, arguments.dtype))


def read_dims(text: str | None, known: Any) -> dict[str, int]:
    """{'M': 8192} from 'M=8192'. UserError names a dim that the op has not, or a value that is no number."""
    dims = {}
    for pair in (text or "").split(","):
        name, _, value = pair.partition("=")
        if pair and (name not in known or not value.isdecimal()):
            raise UserError(f"--dims={pair}: expected {','.join(f'{k}=number' for k in known)}")
        if pair:
            dims[name] = int(value)
    return dims


def known_arch(arch: int) -> int:
    """`arch` where the gates know its limits, else UserError."""
    from kernels.proof.machine_code import CHIPS

    if arch not in CHIPS:
        raise UserError(f"sm_{arch}: the gates know {', '.join(f'sm_{a} ({c.name})' for a, c in CHIPS.items())}")
    return arch


def tune(op: Op, dims: dict[str, Any], chosen: Sequence[Entry], arguments: argparse.Namespace) -> int:
    """Search every entry that matters at these dims on this GPU. Returns the exit code."""
    device, dtype = torch.device("cuda"), getattr(torch, arguments.dtype)
    major, minor = torch.cuda.get_device_capability(device)
    arch, common = known_arch(10 * major + minor), facts(device)
    out = arguments.out or results.folder(common["hardware"])
    settings = Settings(samples=arguments.samples, most_samples=10 * arguments.samples, budget_s=2.0)
    lines = []
    with results.campaign(out, "tune.jsonl", compacted=False) as log:
        for entry in chosen:
            changed = changed_kernels(op, dims, arch, dtype, entry)
            if not changed:
                log.say(f"tune   {entry}: changes nothing at these sizes")
                continue
            case = Case(op, dims, arguments.dtype, direction_of(changed), device)
            best = climb(case, arch, entry, settings, log, common)
            verb = "keep" if best == entry.value else "commit"
            lines.append(f"{verb}: {line_to_commit(entry, best, case, common)}")
    print("\n".join(lines))
    return 0


def changed_kernels(op: Op, dims: dict[str, Any], arch: int, dtype: torch.dtype, entry: Entry) -> list[str]:
    """Names of the kernels that launch differently when the entry changes."""
    now_launched = set(signatures(op, dims, arch, dtype, entry, entry.value))
    others = {s for value in neighbours(entry.value) for s in signatures(op, dims, arch, dtype, entry, value)}
    return sorted({signature.split()[0] for signature in others - now_launched})


def show_gates(op: Op, dims: dict[str, Any], chosen: Sequence[Entry], arch: int, dtype: torch.dtype) -> int:
    """Without a GPU: which neighbours compile cleanly. Returns the exit code."""
    known_arch(arch)
    for entry in chosen:
        values = distinct(op, dims, arch, dtype, entry)
        for value in [entry.value, *values] if values else ():
            print(f"tune   sm_{arch} {entry} {describe(trial(op, dims, arch, dtype, entry, value))}", flush=True)
    print("tune   this machine has no GPU: these are the gates of the compiled code, in no order of speed.")
    print(f"tune   what is fastest needs a GPU: python -m bench tune {op.name}")
    return 0
