"""What a compiled kernel's machine code uses, for seven architectures, and the gates that it must pass.

Registers, stack and spills come from the cubin, instruction counts from its disassembly, warnings from the log of
ptxas. All tools are in the Triton wheel.
"""

import collections
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs


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
RESERVED_SHARED = 1024  # bytes that a program takes on top of what it asks for
BYTES = 16  # of an instruction


# ---- reading machine code

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
ACCESSES = ("LDG", "STG", "ATOM.", "ATOMG", "RED.", "LD.", "ST.", "UTMA", "UBLKCP", "UBLKRED")  # of global memory
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
    waits: bool  # for the end of the kernel in front, if it may be launched before that
    early_accesses: int  # of memory, before that wait


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


def _processor(arch: int) -> str:
    return f"{arch}" + ("a" if arch >= 90 else "")


def instructions(cubin: bytes) -> bytes:
    """Returns the executable sections of an ELF file of 64 bits."""
    (table,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    return b"".join(cubin[at : at + length] for _, _, flags, _, at, length in headers if flags & 4)  # SHF_EXECINSTR


def listings(cubins: Sequence[bytes], arch: int) -> list[list[str]]:
    """Returns the names of each cubin's instructions with what modifies them, such as "LDG.E.128", in order.

    nvdisasm takes 0.2 s to start and 10 us for an instruction, so that it is given the code of all cubins at once.
    """
    codes = [instructions(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        text = _run(_tool("nvdisasm", arch), "-b", f"SM{_processor(arch)}", file.name)
    names = [m.group(1) for m in _INSTRUCTION.finditer(text)]
    lengths = [len(code) // BYTES for code in codes]
    if sum(lengths) != len(names):
        raise RuntimeError(f"nvdisasm listed {len(names)} instructions of {sum(lengths)}")
    starts = itertools.accumulate(lengths, initial=0)
    return [names[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def ptxas_log(compiled: Any, arch: int) -> str:
    """Returns what ptxas said of a kernel; where nobody noted it, as in a launch, ptxas is asked again."""
    noted = getattr(compiled.metadata, "ptxas_log", None)
    if noted is not None or "wgmma" not in compiled.asm["ptx"]:  # the only instruction that ptxas warns of
        return noted or ""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "k.ptx")
        ptx.write_text(compiled.asm["ptx"])
        name = f"--gpu-name=sm_{_processor(arch)}"
        return _run(_tool("ptxas", arch), "-v", name, str(ptx), "-o", str(Path(folder, "k.out")))


def read_code(compiled: Any, arch: int) -> Code:
    """Disassemble a compiled kernel."""
    return read_codes([compiled], arch)[0]


def read_codes(kernels: Sequence[Any], arch: int) -> list[Code]:
    """Disassemble compiled kernels of one architecture: many at once take little longer than one."""
    found = listings([compiled.asm["cubin"] for compiled in kernels], arch)
    return [_code(compiled, listing, arch) for compiled, listing in zip(kernels, found, strict=True)]


def _code(compiled: Any, listing: list[str], arch: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(_tool("cuobjdump", arch), "-res-usage", cubin.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
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
        ptxas_warnings=tuple(sorted(set(_WARNING.findall(ptxas_log(compiled, arch))))),
        waits="ACQBULK" in family or not compiled.metadata.launch_pdl,
        early_accesses=_early_accesses(listing),
        box_mismatch=any(re.sub(r"^(1x)+", "", box) != re.sub(r"^(1x)+", "", buffer) for box, buffer in boxes),
    )


def _early_accesses(listing: list[str]) -> int:
    """Returns how many instructions access global memory before the kernel waits for the one in front.

    Prefetches into the L2 cache are none: they tell the program nothing.
    """
    if "ACQBULK" not in listing:
        return 0
    return sum(op.startswith(ACCESSES) for op in listing[: listing.index("ACQBULK")])


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


def broken_gates(code: Code, arch: int) -> list[str]:
    """Returns the gates that this machine code violates, in words; empty if none."""
    broken = []
    if code.stack_bytes or code.local_accesses:
        broken.append(f"spills: {code.stack_bytes} B of stack, {code.local_accesses} local accesses")
    if code.ptxas_warnings:
        broken.append(f"ptxas serializes wgmma: {' '.join(code.ptxas_warnings)}")
    if code.shared_bytes > CHIPS[arch].shared_per_program:
        broken.append(f"shared memory: {code.shared_bytes} B, the chip has {CHIPS[arch].shared_per_program}")
    if not code.waits or code.early_accesses:
        early = f"{code.early_accesses} accesses before the wait" if code.waits else "never waits"
        broken.append(f"launched before the kernel in front ends: {early}")
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
