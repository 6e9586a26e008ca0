"""Ahead-of-time compilation: the checked-in report is fresh, its gates hold, and the gates see bad code."""

import dataclasses
import re
import sys
import types

import pytest
import torch

from kernels import OPS
from kernels._triton import jit, tl
from kernels.prims import await_inputs
from kernels.proof import aot, machine_code
from kernels.proof.machine_code import (
    CHIPS,
    Code,
    broken_gates,
    bytes_in_flight,
    listings,
    programs_per_sm,
    read_code,
    read_codes,
)

WITH_KERNEL = [name for name, op in OPS.items() if op.triton is not None]


def test_the_report_is_fresh():
    """Every launch of every op, at its bench sizes and with its options, is in results/aot.json, as it is now."""
    if aot.triton.__version__ != aot.report_version():
        pytest.skip(f"the report is of triton {aot.report_version()}, here is {aot.triton.__version__}")
    assert not aot.stale(aot.read_report()), "run `python -m kernels.proof.aot --update`"


def test_every_gate_in_the_report_holds():
    rows = aot.read_report()
    assert {row["arch"] for row in rows} == set(CHIPS)
    broken = [row for row in rows if row["broken"] and not aot.excuse(row)]
    assert [aot._label(aot.row_key(row), row["constants"]) for row in broken] == []
    excused = {next(entry for entry in aot.EXCUSED if entry[3] == aot.excuse(row)) for row in rows if row["broken"]}
    assert {why for *_, why in excused} == {why for *_, why in aot.EXCUSED}  # an excuse that nobody needs is gone
    spilling = {"kernel": "cross_entropy_bwd_kernel", "constants": "", "broken": ["narrow loads: 18", "spills: 8 B"]}
    assert not aot.excuse(spilling) and aot.excuse({**spilling, "broken": ["narrow loads: 18"]})


def test_the_report_stays_small():
    assert aot.REPORT.stat().st_size < 600_000


@pytest.mark.parametrize("arch", list(CHIPS))
def test_the_report_says_what_the_compiler_says(arch):
    """A sample of two launches on each architecture, compiled anew, gives the rows that are checked in."""
    if aot.triton.__version__ != aot.report_version():
        pytest.skip(f"the report is of triton {aot.report_version()}, here is {aot.triton.__version__}")
    rows = {aot.row_key(row): row for row in aot.read_report()}
    name = WITH_KERNEL[list(CHIPS).index(arch) % len(WITH_KERNEL)]
    wanted = list(aot.plan([name], [arch]).items())
    ends = [wanted[0], wanted[-1]]
    assert aot.compiled_rows([(launch, [key]) for key, launch in ends]) == [rows[key] for key, _ in ends]


@pytest.mark.parametrize(("name", "archs"), [
    ("attention", (80, 86, 89)), ("decode_linear", (100, 103, 120)), ("decode_attention", (100, 103)),
])  # fmt: skip
def test_architectures_of_the_same_ptx_give_the_code_that_triton_gives(name, archs):
    """After the first of them only ptxas runs, and makes of an op's last launch what Triton would."""
    launch = aot.launches(OPS[name], dict(OPS[name].bench[0]), archs[0])[-1]
    assert all(aot.family(arch, launch.kernel.__name__) == archs for arch in archs)
    by_ptxas = aot.compile_family(launch, archs, compared=True)
    for arch, kernel in list(zip(archs, by_ptxas, strict=True))[1:]:
        mine, of_triton = read_codes([kernel, aot.compile_launch(launch, arch)], arch)
        assert mine == of_triton and f".target sm_{arch}" in kernel.asm["ptx"]


def test_architectures_of_another_ptx_are_told():
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    with pytest.raises(RuntimeError, match=r"_product_kernel \[BLOCK=64\]: PTX for sm_90 is not that for sm_80"):
        aot.compile_family(aot.Launch(_product_kernel, (x, x), dict(BLOCK=64)), (80, 90), compared=True)


@jit
def _product_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """One program squares a matrix, on a Hopper by another instruction."""
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x).to(x.dtype))


def test_one_disassembly_of_many_kernels_is_that_of_each_whole_file(tmp_path):
    """Instructions of bare code, told apart by its length, are those that nvdisasm lists of the ELF files."""
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    tried = [aot.Launch(_product_kernel, (x, x), dict(BLOCK=64)), aot.Launch(_copy_kernel, (x, x), dict(BLOCK=64))]
    cubins = [aot.compile_launch(launch, 90).asm["cubin"] for launch in tried]
    found = listings(cubins, 90)
    for cubin, names in zip(cubins, found, strict=True):
        (tmp_path / "whole").write_bytes(cubin)
        whole = machine_code._run(machine_code._tool("nvdisasm", 90), "-c", str(tmp_path / "whole"))
        assert names == [m.group(1) for m in machine_code._INSTRUCTION.finditer(whole)]
    assert any(name.startswith("HGMMA") for name in found[0]) and "EXIT" in found[1]


def test_what_ptxas_says_is_noted_while_it_compiles(monkeypatch):
    """A kernel compiled by a launch has no such note; there ptxas is asked again, and says the same."""
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    compiled = aot.compile_launch(aot.Launch(_product_kernel, (x, x), dict(BLOCK=128)), 90)
    assert "registers" in compiled.metadata.ptxas_log
    launched = types.SimpleNamespace(asm=compiled.asm, metadata=None)

    def uses(log):
        return re.findall(r"Used \d+ registers|C75\d\d", log)

    assert uses(machine_code.ptxas_log(launched, 90)) == uses(compiled.metadata.ptxas_log) != []


def test_batches_deal_every_launch_once_to_all_its_architectures():
    wanted = aot.plan(["rmsnorm"], [80, 86, 89, 90, 100, 103])
    dealt = aot.batches(wanted)
    assert sorted(key for batch in dealt for _, keys in batch for key in keys) == sorted(wanted)
    assert max(map(len, dealt)) <= aot.BATCH
    for launch, keys in (item for batch in dealt for item in batch):
        assert all(key[0] == launch.kernel.__name__ and key[2] == aot.digest(launch) for key in keys)
        assert len(keys) == 1 or {arch for _, arch, _ in keys} <= set(aot.family(keys[0][1], keys[0][0]))
    assert {len(keys) for batch in dealt for _, keys in batch} == {1, 2, 3}


@pytest.mark.parametrize("arch", list(CHIPS))
@pytest.mark.parametrize("name", WITH_KERNEL)
def test_recorded_launches_cover_forward_and_backward(name, arch):
    """An op launches something in its forward pass; the ops of a page, at bench sizes, all its backward kernels."""

    def home_of(op):
        return ".".join(op.reference.__module__.split(".")[:2])

    home = home_of(OPS[name])
    cases = [(op, dict(dims)) for op in OPS.values() if home_of(op) == home for dims in op.bench]
    found = {launch.kernel.__name__ for op, dims in cases for launch in aot.launches(op, dims, arch)}
    paths = [
        path for path in sys.modules if f"{path}.".startswith(f"{home}.") and (arch == 90 or ".hopper" not in path)
    ]
    pages = [vars(sys.modules[path]) for path in paths]
    backward = {key for page in pages for key, value in page.items() if isinstance(value, jit) and "_bwd_kernel" in key}
    assert any("_bwd_" not in kernel for kernel in found)
    assert backward <= found


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_the_compiler_can_read_every_parity_case(name):
    """Also where every size, stride and count is 1, and so a Python integer; `make aot` compiles them whole."""
    assert aot.parity_failures([name], aot.read_launch) == []


@jit
def _striding_kernel(x_ptr, out_ptr, x_stride, N, BLOCK: tl.constexpr):
    """One program takes each x_stride-th element, with an offset in int64: an integer of Python has no `to`."""
    n = tl.arange(0, BLOCK)
    tl.store(out_ptr + n, tl.load(x_ptr + n * x_stride.to(tl.int64), n < N))


def test_a_scalar_of_one_that_is_taken_for_a_tensor_is_found():
    x = torch.empty(8, device="meta")
    launch = aot.Launch(_striding_kernel, (x, x, 3, 8), dict(BLOCK=8))
    aot.read_launch(launch, 90)
    assert aot.of_ones(launch).args[2:] == (1, 1)
    with pytest.raises(aot.triton.CompilationError, match="has no attribute 'to'"):
        aot.read_launch(aot.of_ones(launch), 90)


CLEAN = Code(
    registers=64, stack_bytes=0, local_accesses=0, shared_bytes=4096, warps=4, programs_per_sm=8, instructions=300,
    matrix="", has_dot=False, softmax_overlap=0, loads_128=8, loads_narrow=1, stores_128=4, stores_narrow=0,
    bulk_copies=0, ptxas_warnings=(), box_mismatch=False, waits=True, early_accesses=0,
)  # fmt: skip


def test_a_clean_kernel_breaks_no_gate():
    assert broken_gates(CLEAN, 90) == []


@pytest.mark.parametrize("change, complaint", [
    (dict(stack_bytes=48), "spills"), (dict(local_accesses=2), "spills"),
    (dict(ptxas_warnings=("C7510",)), "serializes"), (dict(shared_bytes=232449), "shared memory"),
    (dict(box_mismatch=True), "box"), (dict(waits=False), "never waits"), (dict(early_accesses=1), "before the wait"),
    (dict(has_dot=True, matrix="HMMA 64"), "without HGMMA"),
    (dict(has_dot=True, matrix="HGMMA 8", programs_per_sm=1), "warps"),
    (dict(loads_128=0, loads_narrow=33), "narrow loads"),
])  # fmt: skip
def test_a_gate_sees(change, complaint):
    assert complaint in " ".join(broken_gates(dataclasses.replace(CLEAN, **change), 90))


@jit
def _copy_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """One program copies BLOCK elements."""
    n = tl.arange(0, BLOCK)
    tl.store(out_ptr + n, tl.load(x_ptr + n))


@jit
def _early_copy_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, WAITS: tl.constexpr):
    """One program copies BLOCK elements, which it reads before it waits for them, if it waits at all."""
    n = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n)
    if WAITS:
        await_inputs(True)
        x = tl.load(x_ptr + BLOCK + n) + x
    tl.store(out_ptr + n, x)


@pytest.mark.parametrize("waits, complaint", [(True, "1 accesses before the wait"), (False, "never waits")])
def test_machine_code_that_does_not_wait_is_seen(waits, complaint):
    x, out = (torch.empty(4096, device="meta") for _ in "xo")
    launch = aot.Launch(_early_copy_kernel, (x, out), dict(BLOCK=128, WAITS=waits, launch_pdl=True, num_warps=4))
    code = read_code(aot.compile_launch(launch, 90), 90)
    assert complaint in " ".join(broken_gates(code, 90))


@jit
def _spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """One warp holds far more than its registers."""
    n = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n)
    y = tl.load(x_ptr + BLOCK + n)
    for i in range(3):
        x = x * tl.sum(y) + y
        y = y * tl.sum(x) + i
    tl.store(out_ptr + n, x + y)


def test_a_real_spill_is_read_out_of_the_machine_code():
    launch = aot.Launch(
        _spilling_kernel, (torch.empty(8, device="meta"), torch.empty(8, device="meta")), dict(BLOCK=8192, num_warps=1)
    )
    code = read_code(aot.compile_launch(launch, 90), 90)
    assert code.stack_bytes > 0 and "spills" in broken_gates(code, 90)[0]


def test_bytes_in_flight_are_those_of_all_programs_of_a_multiprocessor():
    """One program of four warps copies 2,048 fp32: four loads of 16 bytes by each of 128 threads."""
    launch = aot.Launch(
        _copy_kernel, (torch.empty(8, device="meta"), torch.empty(8, device="meta")), dict(BLOCK=2048, num_warps=4)
    )
    code = read_code(aot.compile_launch(launch, 90), 90)
    assert code.loads_128 == 4 and code.loads_narrow == 0
    assert bytes_in_flight(code) == code.programs_per_sm * 2048 * 4


def test_occupancy_of_known_kernels():
    """By the occupancy calculator's rules: registers by 256 a warp, warps by 4, shared memory with 1 KiB reserved."""
    assert programs_per_sm(90, 64, 4, 4096) == 8
    assert programs_per_sm(90, 255, 4, 0) == 2
    assert programs_per_sm(80, 32, 1, 100) == 32
    assert programs_per_sm(90, 32, 4, 150_000) == 1
    assert programs_per_sm(80, 32, 4, 170_000) == 0
