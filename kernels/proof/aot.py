"""Compile every kernel of every op ahead of time for seven architectures, without a GPU, and check gates on the code.

    python -m kernels.proof.aot           compile what changed, print the table, fail on a broken gate or a stale report
    python -m kernels.proof.aot --update  the same, and write results/aot.json
    python -m kernels.proof.aot --parity  compile the small cases of the parity tests, for H100; failures are named
    python -m kernels.proof.aot --rocm    compile, and no more, for AMD's gfx942 and gfx1100, where nothing ever ran

Each op runs forward and backward on meta tensors at its bench sizes, with its options combined by options.py; every
launch is recorded, and each distinct one is compiled exactly as it would be when launched. Registers, stack and spills
come from the cubin, instruction counts from its disassembly, warnings from ptxas. All tools are in the Triton wheel.
Compilations are spread over --workers processes.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
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
from .options import combined, farthest_options

REPORT = Path(__file__).resolve().parents[2] / "results" / "aot.json"


@dataclass(frozen=True)
class Chip:
    """Limits of a multiprocessor, from the CUDA Programming Guide 13, table "Technical specifications per compute
    capability", and how many the named card has, which represents the others of its architecture.
    """

    name: str
    multiprocessors: int
    shared_per_sm: int  # bytes
    shared_per_program: int  # bytes
    matrix: str  # how the names of its instructions for matrix products begin
    others: str = ""
    registers: int = 65536
    warps: int = 64
    programs: int = 32


CHIPS = {
    80: Chip("A100", 108, 167936, 166912, "HMMA", "A30, A800"),
    86: Chip("A10", 72, 102400, 101376, "HMMA", "RTX 30, A40, A6000", warps=48, programs=16),
    89: Chip("L40S", 142, 102400, 101376, "HMMA", "RTX 40, L4, L40", warps=48, programs=24),
    90: Chip("H100", 132, 233472, 232448, "HGMMA", "H200, H800, GH200"),
    100: Chip("B200", 148, 233472, 232448, "UTC", "B100, GB200"),
    103: Chip("B300", 148, 233472, 232448, "UTC", "GB300"),
    # The guide says 24 programs, the tuning guide 32. GB10, sm_121, has the same limits and takes the same code.
    120: Chip("RTX 5080", 84, 102400, 101376, "HMMA", "RTX 50, RTX PRO 6000, GB10", warps=48, programs=24),
}
# Accepted violations: the kernel, the constants that it must have, how the complaint starts, and why the tile is kept.
ODD_PITCH = (
    "rows of an odd pitch, such as 50,307, begin at no multiple of 16 bytes; pad the vocabulary to a multiple of 8"
)
FEW_BYTES = (
    "some bytes where options meet at the largest head dim; a tile of half the size costs more, and was not timed"
)
EVERYTHING = "dropout, a window and a softcap at once at the largest head dim: the least of the sixteen tiles tried"
FEW_ROWS = "a few bytes with some sets of options, once a row; fewer loads in flight would cost all others"
EXCUSED = (
    ("cross_entropy_rows_kernel", "", "narrow loads", ODD_PITCH),
    ("cross_entropy_bwd_kernel", "", "narrow loads", ODD_PITCH),
    ("attention_bwd_kernel_dk_dv", "BLOCK_D=256 WINDOWED", "spills: 8 B", FEW_BYTES),
    ("attention_bwd_kernel_dk_dv", "BLOCK_D=256 DOCUMENTS", "spills: 8 B", FEW_BYTES),
    ("attention_bwd_kernel_dk_dv", "BLOCK_D=256 DROPOUT SOFTCAPPED WINDOWED", "spills: 128 B", EVERYTHING),
    ("cross_entropy_rows_kernel", "GRADIENT SMOOTHING SOFTCAP", "spills: 8 B", FEW_ROWS),
    ("decode_linear_fwd_kernel_rows", "", "spills: 8 B", FEW_ROWS),
    ("decode_linear_fwd_kernel_rows", "", "spills: 16 B", FEW_ROWS),
)
RESERVED_SHARED = 1024  # bytes that a program takes on top of what it asks for


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


def launches(op: Op, dims: dict[str, Any], arch: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Returns every launch that an op's forward and backward make at these dims on an architecture; none is run."""
    if op.triton is None:
        return []
    recorded: list[Launch] = []
    fill = CHIPS[arch].multiprocessors if arch in CHIPS else 108
    record = Launcher(lambda kernel, grid, *a, **k: recorded.append(Launch(kernel, a, k)), arch, fill)
    arguments, keywords = op.inputs(**dims, dtype=dtype, device="meta")
    leaves = [a.requires_grad_() for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    with launching(record):
        for function in (op.triton, *op.variants.values()):
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


def compile_launch(launch: Launch, arch: int | str) -> Any:
    """Returns a launch's compiled kernel: cubin, ptx, ttgir in `.asm`, shared bytes and warps in `.metadata`."""
    with _offline(arch), launching(None):
        return launch.kernel.warmup(*launch.args, grid=(1,), **launch.kwargs)


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
    """Yields each distinct launch at the dims of an op's parity tests, in bf16 and fp32, with the case's name."""
    seen = set()
    for dims in op.parity:
        for dtype in (torch.bfloat16, torch.float32):
            for launch in launches(op, dict(dims), arch, dtype):
                key = launch.kernel.__name__, launch.signature()
                if key not in seen:
                    seen.add(key)
                    yield f"{op.name} {dict(dims)} {dtype} {launch.kernel.__name__}", launch


def parity_failures(ops: list[str], check: Callable[[Launch, int], Any], arch: int = 90) -> list[str]:
    """Returns the parity cases that fail `check`, or that do not compile with ones for scalars, and why."""
    failures = []
    for name in ops:
        for case, launch in parity_launches(OPS[name], arch):
            for judge, tried, what in ((check, launch, ""), (read_launch, of_ones(launch), " with ones")):
                try:
                    judge(tried, arch)
                except Exception as error:  # a compiler that cannot do it may raise anything
                    failures.append(f"{case}{what}: {type(error).__name__}: {error}")
    return failures


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


# ---- reading machine code

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_WARNING = re.compile(r"\bC751[0-7]\b")  # wgmma serialized; C7519, an arrive put in, costs nothing
_TMA_COPY = re.compile(r"async_tma_copy_global_to_local.*?tensordesc<tensor<([\dx]+)x\w+.*?->.*?memdesc<([\dx]+)x\w+")


@dataclass(frozen=True)
class Code:
    """Resources and instructions of a kernel's machine code, counted in the listing, not as executed."""

    registers: int
    stack_bytes: int
    local_accesses: int
    shared_bytes: int
    warps: int
    programs_per_sm: int
    instructions: int
    matrix: str  # the matrix instructions and how many: 'HGMMA 12'; '' where there are none
    has_dot: bool
    softmax_overlap: int  # exponentials between a matrix instruction and the next
    loads_128: int
    loads_narrow: int  # global loads of fewer than 128 bits
    stores_128: int
    stores_narrow: int
    bulk_copies: int  # tensor memory accelerator
    ptxas_warnings: tuple[str, ...]
    box_mismatch: bool  # a bulk copy whose box differs from the buffer it fills


def programs_per_sm(arch: int, registers: int, warps: int, shared_bytes: int) -> int:
    """Returns how many programs (CTAs) fit on a multiprocessor.

    Registers are allocated by 256 per warp, warps by 4, shared memory by 128 B.
    """
    chip = CHIPS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = chip.registers // per_warp // 4 * 4 // warps
    shared = -(-(shared_bytes + RESERVED_SHARED) // 128) * 128
    by_shared = chip.shared_per_sm // shared if shared_bytes <= chip.shared_per_program else 0
    return min(by_registers, chip.warps // warps, by_shared, chip.programs)


def _tool(name: str, arch: int) -> str:
    tool = "ptxas_blackwell" if name == "ptxas" and arch >= 100 else name
    return getattr(knobs.nvidia, tool).path


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([tool, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def read_code(compiled: Any, arch: int) -> Code:
    """Disassemble a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run(_tool("cuobjdump", arch), "-res-usage", str(cubin))
        sass = _run(_tool("nvdisasm", arch), "-c", str(cubin))
        name = f"sm_{arch}" + ("a" if arch >= 90 else "")
        verbose = ""
        if "wgmma" in compiled.asm["ptx"]:  # the only instruction that ptxas warns of
            verbose = _run(_tool("ptxas", arch), "-v", f"--gpu-name={name}", str(ptx), "-o", str(Path(folder, "k.out")))
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    listing = [m.group(1) for m in _INSTRUCTION.finditer(sass)]
    family = collections.Counter(op.split(".")[0] for op in listing)
    loads = [op for op in listing if op.startswith(("LDG.", "LDGSTS"))]
    stores = [op for op in listing if op.startswith("STG.")]
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    boxes = [m.groups() for line in compiled.asm["ttgir"].splitlines() if (m := _TMA_COPY.search(line))]
    matrix = [
        k for k in family if k in ("HGMMA", "QGMMA", "HMMA", "IMMA", "DMMA") or (k.startswith("UTC") and "MMA" in k)
    ]
    return Code(
        registers=used["REG"],
        stack_bytes=used["STACK"] + used.get("LOCAL", 0),
        local_accesses=family["LDL"] + family["STL"],
        shared_bytes=shared,
        warps=warps,
        programs_per_sm=programs_per_sm(arch, used["REG"], warps, shared),
        instructions=len(listing),
        matrix=" ".join(f"{k} {family[k]}" for k in sorted(matrix)),
        has_dot="tt.dot" in compiled.asm.get("ttir", "") or "warp_group_dot" in compiled.asm["ttgir"],  # no ttir: Gluon
        softmax_overlap=_softmax_overlap(listing),
        loads_128=sum(".128" in op for op in loads),
        loads_narrow=sum(".128" not in op for op in loads),
        stores_128=sum(".128" in op for op in stores),
        stores_narrow=sum(".128" not in op for op in stores),
        bulk_copies=family["UTMALDG"] + family["UTMASTG"],
        ptxas_warnings=tuple(sorted(set(_WARNING.findall(verbose)))),
        box_mismatch=any(re.sub(r"^(1x)+", "", box) != re.sub(r"^(1x)+", "", buffer) for box, buffer in boxes),
    )


def _softmax_overlap(listing: list[str]) -> int:
    """Returns how many exponentials stand between matrix instructions, which can hide them."""
    matrix = [i for i, op in enumerate(listing) if op.startswith(("HGMMA", "QGMMA", "HMMA", "UTC"))]
    if len(matrix) < 2:
        return 0
    return sum(op == "MUFU.EX2" for op in listing[matrix[0] : matrix[-1]])


def bytes_in_flight(code: Code) -> int:
    """Returns the bytes in flight on a multiprocessor: every load of the listing once, by all programs that fit on it.

    A narrow load counts as 4 bytes, bulk copies as the shared memory that they fill. To hide latency an H100 needs
    25 KB per multiprocessor for each microsecond of it (Little's law: 3.35 TB/s over 132 multiprocessors).
    """
    by_a_thread = 16 * code.loads_128 + 4 * code.loads_narrow
    return code.programs_per_sm * (code.shared_bytes if code.bulk_copies else 32 * code.warps * by_a_thread)


# ---- gates


def excuse(row: dict[str, Any]) -> str:
    """Returns why a row's tile is accepted although it violates gates; "" if nothing excuses it."""
    for kernel, needed, complaint, why in EXCUSED:
        mine = row["kernel"] == kernel and set(needed.split()) <= set(row["constants"].split())
        if mine and all(text.startswith(complaint) for text in row["broken"]):
            return why
    return ""


def broken_gates(code: Code, arch: int) -> list[str]:
    """Returns the gates that this machine code violates, in words; empty if none."""
    broken = []
    if code.stack_bytes or code.local_accesses:
        broken.append(f"spills: {code.stack_bytes} B of stack, {code.local_accesses} local accesses")
    if code.ptxas_warnings:
        broken.append(f"ptxas serializes wgmma: {' '.join(code.ptxas_warnings)}")
    if code.shared_bytes > CHIPS[arch].shared_per_program:
        broken.append(f"shared memory: {code.shared_bytes} B, the chip has {CHIPS[arch].shared_per_program}")
    if code.box_mismatch:
        broken.append("a bulk copy's box differs from its buffer")
    if code.has_dot:
        wanted = CHIPS[arch].matrix
        if wanted not in code.matrix:
            broken.append(f"matrix product without {wanted}: {code.matrix or 'none'}")
        if code.programs_per_sm * code.warps < 8:
            broken.append(f"{code.programs_per_sm * code.warps} warps per multiprocessor, a matrix product wants 8")
    elif code.loads_narrow > code.loads_128 * 4 + 8:
        broken.append(f"narrow loads: {code.loads_narrow} against {code.loads_128} of 128 bits")
    return broken


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
        constants = {(x.kernel.__name__, str(sorted(x.kwargs.items()))) for x in launches(op, dict(dims), arch)}
        unlike.setdefault(frozenset(constants), {letter: size for letter, size in dims.items() if letter.isupper()})
    if tile_arch(arch) != arch:
        first = next(iter(unlike.values()))
        return [*unlike.values(), {**first, **farthest_options(op)}]
    return [*map(dict, op.bench), *combined(op, list(unlike.values()))]


def plan(ops: list[str], archs: list[int]) -> dict[tuple, Launch]:
    """Returns (kernel, arch, digest) -> launch; cases and ops that give the same code are merged."""
    wanted: dict[tuple, Launch] = {}
    for name in ops:
        for arch in archs:
            for case in cases(OPS[name], arch):
                for launch in launches(OPS[name], case, arch):
                    wanted.setdefault((launch.kernel.__name__, arch, digest(launch)), launch)
    return wanted


def compiled_row(key: tuple, launch: Launch) -> dict[str, Any]:
    """Returns the report's row of a kernel: compiled, disassembled, judged. `constants` are its tiles and flags."""
    kernel, arch, known = key
    code = read_code(compile_launch(launch, arch), arch)
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


def read_report(path: Path = REPORT) -> list[dict[str, Any]]:
    """Returns the checked-in rows; none if there is no report yet."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


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


def compiled_rows(wanted: dict[tuple, Launch], workers: int) -> Iterator[dict[str, Any]]:
    """Yields rows of the launches, in order. Workers are forked, since launches cannot be sent to other processes."""
    global _queue
    _queue = list(wanted.items())
    if workers < 2:
        yield from map(_compiled, range(len(_queue)))
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(_compiled, range(len(_queue)))


_queue: list[tuple[tuple, Launch]] = []


def _compiled(i: int) -> dict[str, Any]:
    return compiled_row(*_queue[i])


def main(argv: list[str] | None = None) -> int:
    """Compile and print. Returns 0 if every gate holds and the report is fresh, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m kernels.proof.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help=f"write {REPORT.parent.name}/{REPORT.name}")
    parser.add_argument("--op", action="append", choices=list(OPS), help="only this op; may be repeated")
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
        return _say_failures(parity_failures(ops, compile_launch), "cases of the parity tests do not compile for sm_90")
    if args.rocm:
        return _say_failures(rocm_failures(ops), f"launches do not compile for {', '.join(ROCM)}")
    known = {} if args.all else {row_key(row): row for row in read_report()}
    wanted = plan(ops, archs)
    rows = {key: known[key] for key in wanted if key in known}
    missing = {key: launch for key, launch in wanted.items() if key not in known}
    for i, row in enumerate(compiled_rows(missing, args.workers), 1):
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
    changed = bool(missing) or (not some and known.keys() != rows.keys())
    if changed and not args.update:
        print(f"{REPORT.parent.name}/{REPORT.name} is stale: run `python -m kernels.proof.aot --update` and commit it")
    return 1 if broken or (changed and not args.update) else 0


def _say_failures(failures: list[str], what: str) -> int:
    print("\n".join([*failures, f"{len(failures)} {what}"]))
    return 1 if failures else 0


def write_report(rows: list[dict[str, Any]]) -> None:
    """Write one row per line, sorted, so that a change reads well in a diff."""
    rows = sorted(rows, key=lambda r: (r["kernel"], r["arch"], r["constants"], r["digest"]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    sys.exit(_command.run(main))
