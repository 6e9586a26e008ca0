"""Compile every kernel of every op ahead of time for seven architectures, without a GPU, and check gates on the code.

    python -m kernels.proof.aot           compile what changed, print the table, fail on a broken gate or a stale report
    python -m kernels.proof.aot --update  the same, and write results/aot.json
    python -m kernels.proof.aot --parity  compile the small cases of the parity tests, for H100; failures are named
    python -m kernels.proof.aot --rocm    compile, and no more, for AMD's gfx942 and gfx1100, where nothing ever ran

Each op runs forward and backward on meta tensors at its bench sizes, with its options combined by options.py; every
launch is recorded, and each distinct one is compiled exactly as it would be when launched; machine_code.py reads and
judges what comes out. Compilations are spread over --workers processes.
"""

import argparse
import contextlib
import gc
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .. import OPS, _command
from .._triton import Launcher, launching, tile_arch
from ..op import Op
from .machine_code import CHIPS, Code, broken_gates, bytes_in_flight, read_codes
from .options import combined, farthest_options

REPORT = Path(__file__).resolve().parents[2] / "results" / "aot.json"


# Accepted violations: the kernel, the constants that it must have, how the complaint starts, and why the tile is kept.
ODD_PITCH = (
    "rows of an odd pitch, such as 50,307, begin at no multiple of 16 bytes; pad the vocabulary to a multiple of 8"
)
FEW_BYTES = (
    "some bytes where options meet at the largest head dim; a tile of half the size costs more, and was not timed"
)
EVERYTHING = "dropout, a window and a softcap at once at the largest head dim: the least of the sixteen tiles tried"
FEW_ROWS = "a few bytes with some sets of options, once a row; fewer loads in flight would cost all others"
FEW_ROWS_PRODUCT = "a warp's product has fewer rows than theirs; a few bytes of two such products, once a program"
EXCUSED: tuple[tuple[str, str, str | tuple[str, ...], str], ...] = (
    ("cross_entropy_rows_kernel", "", "narrow loads", ODD_PITCH),
    ("cross_entropy_bwd_kernel", "", "narrow loads", ODD_PITCH),
    ("attention_bwd_kernel_dq", "BLOCK_D=256 WINDOWED", "spills: 8 B", FEW_BYTES),
    ("decode_greedy_fwd_kernel", "", "narrow loads", ODD_PITCH),
    ("decode_linear_fwd_kernel_columns", "", ("matrix product without", "spills: 8 B"), FEW_ROWS_PRODUCT),
    ("attention_bwd_kernel_dk_dv", "BLOCK_D=256 WINDOWED", "spills: 8 B", FEW_BYTES),
    ("attention_bwd_kernel_dk_dv", "BLOCK_D=256 DOCUMENTS", "spills: 8 B", FEW_BYTES),
    ("attention_bwd_kernel_dk_dv", "BLOCK_D=256 DROPOUT SOFTCAPPED WINDOWED", "spills: 128 B", EVERYTHING),
    ("cross_entropy_rows_kernel", "GRADIENT SMOOTHING SOFTCAP", "spills: 8 B", FEW_ROWS),
    ("decode_linear_fwd_kernel_rows", "", "spills: 8 B", FEW_ROWS),
    ("decode_linear_fwd_kernel_rows", "", "spills: 16 B", FEW_ROWS),
)


BATCH = 24  # launches whose code is disassembled at once
# Architectures for which Triton writes the same PTX, apart from the line that names the target: of the first it is
# compiled, for the others only ptxas runs. 3.7.1 was compared on every launch; of one launch in ONE_IN the PTX is
# compared whenever it is compiled. OWN_PTX names the kernels for which an architecture is no member of its family.
FAMILIES = ((80, 86, 89), (100, 103, 120))
OWN_PTX = {
    103: ("cross_entropy_rows_kernel",),
    120: (
        "attention_", "cross_entropy_rows_kernel", "decode_attention_", "decode_linear_fwd_kernel_tiles",
        "int8_linear_fwd_kernel_tiles", "newton_schulz_",
    ),
}  # fmt: skip
ONE_IN = 32

# ---- recording launches


@dataclass(frozen=True)
class Launch:
    """A kernel launch, as an op made it on meta tensors."""

    kernel: JITFunction
    args: tuple
    kwargs: dict[str, Any]

    def signature(self) -> str:
        """Returns what the compiler sees: dtypes, divisibility, constants, options. It determines the machine code."""
        parts = []
        for parameter, value in zip(self.kernel.params, self.args, strict=False):
            parts.append(f"{parameter.name}={value if parameter.is_constexpr else _specialization(value)}")
        parts += [f"{k}={v}" for k, v in sorted(self.kwargs.items())]
        return " ".join(parts)


def _specialization(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{str(value.dtype).removeprefix('torch.')}{'' if value.storage_offset() % 16 == 0 else '?'}"
    if hasattr(value, "block_shape"):
        return f"desc<{_specialization(value.base)}{list(value.block_shape)}>"
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        width = "i32" if -(2**31) <= value < 2**31 else "i64"
        return "1" if value == 1 else f"{width}:16" if value % 16 == 0 else width
    if isinstance(value, (tuple, list)):
        return str([_specialization(v) for v in value])
    return type(value).__name__


def launches(
    op: Op, dims: dict[str, Any], arch: int, dtype: torch.dtype = torch.bfloat16, variants: bool = True
) -> list[Launch]:
    """Returns every launch that an op's forward and backward make at these dims on an architecture; none is run."""
    if op.triton is None:
        return []
    recorded: list[Launch] = []
    fill = CHIPS[arch].multiprocessors if arch in CHIPS else 108
    record = Launcher(lambda kernel, grid, *a, **k: recorded.append(Launch(kernel, a, k)), arch, fill)
    arguments, keywords = op.inputs(**dims, dtype=dtype, device="meta")
    leaves = [a.requires_grad_() for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    with launching(record):
        for function in (op.triton, *(op.variants.values() if variants else ())):
            try:
                out = function(*arguments, **keywords)
            except ValueError:  # a variant need not do every case, nor run everywhere
                if function is op.triton:
                    raise
                continue
            out = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor) and o.requires_grad]
            if out:
                torch.autograd.grad(out, leaves, [torch.empty_like(o) for o in out], allow_unused=True)
    return recorded


# ---- compiling


ROCM = {"gfx942": 64, "gfx1100": 32}  # MI300X and RX 7900, with the lanes of a wave


class _OfflineDriver(DriverBase):
    """As much of a driver as kernel.warmup needs to specialize a kernel exactly as in a launch."""

    def __init__(self, arch: int | str) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.arch, str):
            return GPUTarget("hip", self.arch, ROCM[self.arch])
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.arch if isinstance(self.arch, int) else -ROCM[self.arch]  # the caches of architectures stay apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed without a GPU")


@contextlib.contextmanager
def _offline(arch: int | str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_OfflineDriver(arch))
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def _noting_the_log() -> Iterator[None]:
    """While it lasts, what ptxas says of a kernel goes into the kernel's metadata, and with it into Triton's cache."""
    make, settings = CUDABackend.make_cubin, vars(knobs.nvidia)  # set by its name, a knob would enter the environment

    def noting(self: Any, ptx: str, metadata: dict[str, Any], *rest: Any) -> bytes:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            cubin = make(self, ptx, metadata, *rest)
        metadata["ptxas_log"] = log.getvalue()
        return cubin

    CUDABackend.make_cubin, settings["dump_ptxas_log"] = noting, True
    try:
        yield
    finally:
        CUDABackend.make_cubin = make
        del settings["dump_ptxas_log"]


def compile_launch(launch: Launch, arch: int | str) -> Any:
    """Returns a launch's compiled kernel: cubin, ptx, ttgir in `.asm`, shared bytes and warps in `.metadata`."""
    with _offline(arch), launching(None), _noting_the_log():
        return launch.kernel.warmup(*launch.args, grid=(1,), **launch.kwargs)


def compile_family(launch: Launch, archs: Sequence[int], compared: bool) -> list[Any]:
    """Returns what compile_launch returns for architectures of a family; after the first, only ptxas runs.

    If `compared`, all of Triton runs too; RuntimeError is raised where its PTX is not the same after all.
    """
    first = compile_launch(launch, archs[0])
    kernels = [first]
    for arch in archs[1:]:
        ptx = re.sub(r"\.target sm_\d+", f".target sm_{arch}", first.asm["ptx"])  # as Triton writes this line
        log: dict[str, Any] = {}
        with _noting_the_log():
            cubin = CUDABackend(GPUTarget("cuda", arch, 32)).make_cubin(ptx, log, first.metadata, arch)
        metadata = SimpleNamespace(**first.metadata._asdict() | log)
        kernels.append(SimpleNamespace(asm={**first.asm, "ptx": ptx, "cubin": cubin}, metadata=metadata))
        if compared and _without_paths(ptx) != _without_paths(compile_launch(launch, arch).asm["ptx"]):
            named = f"{launch.kernel.__name__} [{constants(launch)}]"
            raise RuntimeError(f"{named}: PTX for sm_{arch} is not that for sm_{archs[0]}, see OWN_PTX")
    return kernels


def _without_paths(ptx: str) -> str:
    """Returns PTX without the names of source files at its end: what is in Triton's cache may come from elsewhere."""
    return ptx.partition("\n\t.file")[0]


class _Read(Exception):
    """The compiler has read a kernel."""


def read_launch(launch: Launch, arch: int) -> None:
    """Compile only up to Triton's IR, which raises where a kernel's Python is at fault.

    Takes a fiftieth of the time. The interpreter cannot find these faults: in it every scalar is a tensor.
    """

    def stop(*args: Any) -> Any:
        raise _Read

    def stages(self: Any, table: dict[str, Callable], *rest: Any) -> None:
        table |= dict.fromkeys(("ttir", "ttgir"), stop)  # a kernel in Gluon begins with the second

    before, CUDABackend.add_stages = CUDABackend.add_stages, stages
    try:
        compile_launch(launch, arch)
    except _Read:
        pass
    finally:
        CUDABackend.add_stages = before


def of_ones(launch: Launch) -> Launch:
    """Returns the launch with strides, sizes and counts of 1, which the compiler takes as Python integers."""
    pairs = zip(launch.kernel.params, launch.args, strict=False)
    return replace(launch, args=tuple(1 if type(a) is int and not p.is_constexpr else a for p, a in pairs))


def parity_launches(op: Op, arch: int = 90) -> Iterator[tuple[str, Launch]]:
    """Yields each launch at the dims of an op's parity tests, in bf16 and fp32, with the case's name."""
    for dims in op.parity:
        for dtype in (torch.bfloat16, torch.float32):
            for launch in launches(op, dict(dims), arch, dtype):
                yield f"{op.name} {dict(dims)} {dtype} {launch.kernel.__name__}", launch


def parity_failures(ops: list[str], check: Callable[[Launch, int], Any], arch: int = 90, workers: int = 1) -> list[str]:
    """Returns the parity cases that fail `check`, or that do not compile with ones for scalars, and why.

    What several cases launch is judged once.
    """
    checks: dict[tuple, tuple[str, Launch, Callable[[Launch, int], Any]]] = {}
    for name in ops:
        for case, launch in parity_launches(OPS[name], arch):
            for judge, tried, what in ((check, launch, ""), (read_launch, of_ones(launch), " with ones")):
                checks.setdefault((judge, tried.kernel, tried.signature()), (f"{case}{what}", tried, judge))

    def failure(case: str, launch: Launch, judge: Callable[[Launch, int], Any]) -> str:
        try:
            judge(launch, arch)
        except Exception as error:  # a compiler that cannot do it may raise anything
            return f"{case}: {type(error).__name__}: {error}"
        return ""

    return [text for text in spread(lambda item: failure(*item), list(checks.values()), workers) if text]


def rocm_failures(ops: list[str]) -> list[str]:
    """Returns the launches of ops at their first bench size that do not compile for AMD's GPUs, and why.

    With the most conservative tiles, which such a GPU takes. That code compiles does not show that it is right.
    """
    failures = []
    for name in ops:
        op = OPS[name]
        for launch in launches(op, dict(op.bench[0]), 0) if op.triton else ():
            for target in ROCM:
                try:
                    compile_launch(launch, target)
                except Exception as error:  # a compiler that cannot do it may raise anything
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    failures.append(f"{name} {target} {launch.kernel.__name__}: {reason[:200]}")
    return failures


# ---- gates


def excuse(row: dict[str, Any]) -> str:
    """Returns why a row's tile is accepted although it violates gates; "" if nothing excuses it."""
    for kernel, needed, complaint, why in EXCUSED:
        mine = row["kernel"] == kernel and set(needed.split()) <= set(row["constants"].split())
        if mine and all(text.startswith(complaint) for text in row["broken"]):
            return why
    return ""


# ---- the report


def digest(launch: Launch) -> str:
    """Returns a hash of the kernel's source and of what the compiler is told."""
    text = f"{triton.__version__} {launch.kernel.cache_key} {launch.signature()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cases(op: Op, arch: int) -> list[dict[str, Any]]:
    """Returns the cases an op is compiled at: its bench sizes, and its options with sizes that differ in tiles.

    An architecture that takes another's tiles has only such sizes, and the first of them with most of the options.
    """
    if op.triton is None:
        return []
    unlike: dict[Any, dict[str, Any]] = {}
    for dims in op.bench:
        sizes = {letter: size for letter, size in dims.items() if letter.isupper()}
        tiles = {(x.kernel.__name__, str(sorted(x.kwargs.items()))) for x in launches(op, sizes, arch, variants=False)}
        unlike.setdefault(frozenset(tiles), sizes)
    if tile_arch(arch) != arch:
        first = next(iter(unlike.values()))
        return [*unlike.values(), {**first, **farthest_options(op)}]
    return [*map(dict, op.bench), *combined(op, list(unlike.values()))]


def plan(ops: list[str], archs: list[int]) -> dict[tuple, Launch]:
    """Returns (kernel, arch, digest) -> launch; cases and ops that give the same code are merged.

    What has to be asked for by name is compiled at the bench sizes alone.
    """
    wanted: dict[tuple, Launch] = {}
    for name in ops:
        sizes = [*map(dict, OPS[name].bench)]
        for arch in archs:
            for case in cases(OPS[name], arch):
                for launch in launches(OPS[name], case, arch, variants=case in sizes):
                    wanted.setdefault((launch.kernel.__name__, arch, digest(launch)), launch)
    return wanted


def compiled_rows(batch: Sequence[tuple[Launch, list[tuple]]]) -> list[dict[str, Any]]:
    """Returns the report's rows of launches for each of their keys: compiled, disassembled, judged.

    `constants` are a launch's tiles and flags.
    """
    by_arch: dict[int, list[tuple[tuple, Launch, Any]]] = {}
    for launch, keys in batch:
        compared = int(keys[0][2], 16) % ONE_IN == 0
        for key, kernel in zip(keys, compile_family(launch, [arch for _, arch, _ in keys], compared), strict=True):
            by_arch.setdefault(key[1], []).append((key, launch, kernel))
    rows = []
    for arch, members in by_arch.items():
        codes = read_codes([kernel for *_, kernel in members], arch)
        rows += [_row(key, launch, code) for (key, launch, _), code in zip(members, codes, strict=True)]
    return rows


def _row(key: tuple, launch: Launch, code: Code) -> dict[str, Any]:
    kernel, arch, known = key
    return {
        "kernel": kernel, "arch": arch, "digest": known, "constants": constants(launch), "registers": code.registers,
        "shared_bytes": code.shared_bytes, "warps": code.warps, "programs_per_sm": code.programs_per_sm,
        "matrix": code.matrix, "bulk_copies": code.bulk_copies, "bytes_in_flight": bytes_in_flight(code),
        "broken": broken_gates(code, arch),
    }  # fmt: skip


def constants(launch: Launch) -> str:
    """Returns a launch's compile-time arguments without flags that are off: 'BLOCK_M=128 CAUSAL num_warps=4'."""
    shown = {name: value for name, value in sorted(launch.kwargs.items()) if value is not False and value != 0}
    return " ".join(name if value is True else f"{name}={value}" for name, value in shown.items())


FIELDS = (  # of a row, in the order in which they are written
    "kernel", "arch", "digest", "constants", "registers", "shared_bytes", "warps", "programs_per_sm", "matrix",
    "bulk_copies", "bytes_in_flight", "broken",
)  # fmt: skip
UNSAID = {"shared_bytes": 0, "matrix": "", "bulk_copies": 0, "broken": []}  # of a row, where it is so


def read_report(path: Path = REPORT) -> list[dict[str, Any]]:
    """Returns the checked-in rows; none if there is no report yet."""
    return [UNSAID | row for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def report_version() -> str:
    """Returns the version of Triton that compiled the checked-in report."""
    return json.loads(REPORT.read_text())["triton"]


def row_key(row: dict[str, Any]) -> tuple:
    """Returns a row's key: kernel, architecture, and the digest of source and compiler arguments."""
    return row["kernel"], row["arch"], row["digest"]


def stale(rows: list[dict[str, Any]]) -> list[str]:
    """Returns what the report lacks or has too many of, in words, without compiling anything."""
    reported, wanted = {row_key(row): row["constants"] for row in rows}, plan(list(OPS), list(CHIPS))
    lines = [f"missing: {_label(key, constants(launch))}" for key, launch in wanted.items() if key not in reported]
    return lines + [f"gone: {_label(key, constants)}" for key, constants in reported.items() if key not in wanted]


def _label(key: tuple, constants: str) -> str:
    kernel, arch, _ = key
    return f"sm_{arch} {kernel} [{constants}]"


def family(arch: int, kernel: str) -> tuple[int, ...]:
    """Returns the architectures for which Triton writes the same PTX of a kernel as for `arch`."""
    for members in FAMILIES:
        alike = tuple(a for a in members if not kernel.startswith(OWN_PTX.get(a, ())))
        if arch in alike:
            return alike
    return (arch,)


def batches(wanted: dict[tuple, Launch]) -> list[list[tuple[Launch, list[tuple]]]]:
    """Deal launches, each with the keys of its family's architectures, into batches of one family that cost alike.

    Neighbours are launches of one kernel, and so go to different batches.
    """
    families: dict[tuple[int, ...], dict[tuple, tuple[Launch, list[tuple]]]] = {}
    for key, launch in wanted.items():
        kernel, arch, known = key
        families.setdefault(family(arch, kernel), {}).setdefault((kernel, known), (launch, []))[1].append(key)
    dealt = []
    for members in map(list, map(dict.values, families.values())):
        count = -(-len(members) // BATCH)
        dealt += [members[i::count] for i in range(count)]
    return dealt


_spread: tuple[Callable[[Any], Any], list[Any]]


def spread(work: Callable[[Any], Any], items: list[Any], workers: int) -> Iterator[Any]:
    """Yields what `work` returns of each item, in order. Workers are forked: launches cannot be sent to others."""
    global _spread
    if workers < 2:
        yield from map(work, items)
        return
    _spread = work, items
    gc.freeze()  # what there is now, workers share; without this each of their collections goes over all of torch
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(_work, range(len(items)))


def _work(i: int) -> Any:
    work, items = _spread
    return work(items[i])


def main(argv: list[str] | None = None) -> int:
    """Compile and print. Returns 0 if every gate holds and the report is fresh, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m kernels.proof.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help=f"write {REPORT.parent.name}/{REPORT.name}")
    about = "only this op, as python -m kernels lists them; may be repeated"
    parser.add_argument("--op", action="append", choices=list(OPS), metavar="OP", help=about)
    parser.add_argument(
        "--arch", action="append", type=int, choices=list(CHIPS), help="only this architecture, as --op"
    )
    parser.add_argument("--all", action="store_true", help="compile again what the report already has")
    parser.add_argument("--parity", action="store_true", help="compile the cases of the parity tests instead")
    parser.add_argument("--rocm", action="store_true", help="compile for AMD's GPUs instead")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    args = parser.parse_args(argv)
    ops, archs = args.op or list(OPS), args.arch or list(CHIPS)
    if args.parity:
        return _say_failures(
            parity_failures(ops, compile_launch, workers=args.workers),
            "cases of the parity tests do not compile for sm_90",
        )
    if args.rocm:
        return _say_failures(rocm_failures(ops), f"launches do not compile for {', '.join(ROCM)}")
    reported = {row_key(row): row for row in read_report()}
    known = {} if args.all else reported
    wanted = plan(ops, archs)
    rows = {key: known[key] for key in wanted if key in known}
    missing = {key: launch for key, launch in wanted.items() if key not in known}
    compiled = itertools.chain.from_iterable(spread(compiled_rows, batches(missing), args.workers))
    for i, row in enumerate(compiled, 1):
        rows[row_key(row)] = row
        print(
            f"[{i}/{len(missing)}] {_label(row_key(row), row['constants']):<110} {row['registers']:>3} regs "
            f"{row['shared_bytes']:>6} B shared {row['programs_per_sm']:>2}/SM "
            f"{row['bytes_in_flight'] / 1024:6.1f} KiB in flight {row['matrix']:<10} {'; '.join(row['broken'])}",
            flush=True,
        )
        if args.update and i % 50 == 0:  # an interrupted run keeps what it has compiled
            write_report([*{**known, **rows}.values()])
    for row in filter(lambda row: row["broken"], rows.values()):
        why = excuse(row)
        print(f"{_label(row_key(row), row['constants'])}: {'; '.join(row['broken'])}{why and f' ({why})'}")
    broken = [row for row in rows.values() if row["broken"] and not excuse(row)]
    some = args.op or args.arch
    if args.update:
        write_report([*({**known, **rows} if some else rows).values()])
    print(f"{len(rows)} kernels for {', '.join(f'sm_{a} ({CHIPS[a].name})' for a in archs)}: ", end="")
    print(f"{len(missing)} compiled, {len(broken)} broken")
    changed = any(reported.get(key) != row for key, row in rows.items()) or (not some and len(reported) != len(rows))
    if changed and not args.update:
        print(f"{REPORT.parent.name}/{REPORT.name} is stale: run `python -m kernels.proof.aot --update` and commit it")
    return 1 if broken or (changed and not args.update) else 0


def _say_failures(failures: list[str], what: str) -> int:
    print("\n".join([*failures, f"{len(failures)} {what}"]))
    return 1 if failures else 0


def write_report(rows: list[dict[str, Any]]) -> None:
    """Write one row per line, sorted, so that a change reads well in a diff."""
    rows = sorted(rows, key=lambda r: (r["kernel"], r["arch"], r["constants"], r["digest"]))
    said = ({name: row[name] for name in FIELDS if row[name] != UNSAID.get(name, ())} for row in rows)
    lines = ",\n".join(map(json.dumps, said))
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    sys.exit(_command.run(main))
