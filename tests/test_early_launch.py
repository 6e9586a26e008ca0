"""Kernels that are launched before the one in front has ended: results, and faults that only such a launch has."""

from __future__ import annotations

import pytest
import torch
from mutants import mutated
from oracle import check_parity

import kernels.decode_attention as attention_page
import kernels.decode_linear as linear_page
import kernels.decode_linear.rows as rows_page
import kernels.decode_linear.tiles as tiles_page
from kernels import OPS
from kernels._triton import Launcher, launching
from kernels.proof import aot
from kernels.proof.interpret import Early, Guard, OutOfBounds, interpreting

CASES = {
    "decode_linear": (
        dict(M=3, N=18, K=300, norm="layernorm", activation="swiglu", residual=True),
        dict(M=9, N=40, K=72, packed=True),
        dict(M=1, N=70, K=531, norm="rmsnorm", packed=True), dict(M=33, N=70, K=40, norm="layernorm"),
    ),
    "append_attention": (
        dict(B=2, T=2, S=100, H=4, G=2, D=64, shortest=65), dict(B=1, T=1, S=20, H=2, G=1, D=16, page_size=16),
    ),
    "decode_attention": (dict(B=2, T=1, S=90, H=4, G=4, D=64, shortest=33),),
}  # fmt: skip


@pytest.mark.parametrize("name, dims", [(name, dims) for name in CASES for dims in CASES[name]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_right(name, dims, dtype):
    op = OPS[name]

    def run(*arguments, **keywords):
        with interpreting(arch=90, multiprocessors=4):
            return op.triton(*arguments, **keywords)

    torch.manual_seed(0)
    arguments, keywords = op.inputs(**dims, dtype=dtype)
    check_parity(op, run, arguments, str(dims), **keywords)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("arch, early", [(89, False), (90, True), (100, True), (120, True)])
def test_it_is_for_gpus_that_can(name, arch, early):
    for dims in CASES[name]:
        for launch in aot.launches(OPS[name], dims, arch):
            assert launch.kwargs["PDL"] == early == launch.kwargs.get("launch_pdl", False)


def test_amd_gpus_never_launch_early():
    seen = []
    arguments, keywords = OPS["decode_linear"].inputs(M=1, N=8, K=8, dtype=torch.bfloat16, device="meta")
    with launching(Launcher(lambda kernel, grid, *rest, **flags: seen.append(flags), 0)):
        OPS["decode_linear"].triton(*arguments, **keywords)
    assert not seen[0]["PDL"] and "launch_pdl" not in seen[0]


@pytest.mark.parametrize("dims", [
    dict(M=1, N=70, K=96), dict(M=1, N=70, K=531), dict(M=1, N=37, K=2000, norm="layernorm"), dict(M=2, N=5, K=6400),
    dict(M=9, N=70, K=96, norm="rmsnorm"), dict(M=9, N=70, K=1100, packed=True, activation="swiglu"),
], ids=str)  # fmt: skip
def test_every_program_brings_its_rows_once(dims):
    """All bytes of the matrices but for 16 at the end of a row that is no multiple of 16 bytes, and vectors once."""
    brought: dict[int, int] = {}

    class Noting(Guard):
        def prefetch(self, addresses, sizes, program):
            super().prefetch(addresses, sizes, program)
            for start, size in zip(addresses.tolist(), sizes.tolist(), strict=True):
                for byte in range(start, start + size):
                    brought[byte] = brought.get(byte, 0) + 1

    arguments, keywords = OPS["decode_linear"].inputs(**dims, dtype=torch.bfloat16)
    with interpreting(Noting, arch=90, multiprocessors=1):
        OPS["decode_linear"].triton(*arguments, **keywords)
    weight, gate, norm_weight = arguments[1], arguments[6], arguments[4]
    for matrix in (m for m in (weight, gate) if m is not None):
        row = matrix.shape[1] * matrix.element_size()
        for n in range(matrix.shape[0]):
            start = matrix.data_ptr() + n * row
            times = [brought.get(byte, 0) for byte in range(start, start + row)]
            assert min(times[: row - 31]) >= 1 and max(times) <= (1 if row % 16 == 0 else 2)
    if norm_weight is not None:
        times = [brought.get(norm_weight.data_ptr() + i, 0) for i in range(norm_weight.numel() * 2 - 31)]
        assert set(times) == {1}


ROWS, TILES = (rows_page, linear_page, "decode_linear"), (tiles_page, linear_page, "decode_linear")
ATTENTION = (attention_page, attention_page, "decode_attention")
ROWS_OF = "weight_stride_n, first, N, K, ROWS"
MUTANTS = {
    "few rows do not wait": (ROWS, 0, "    await_inputs(PDL)\n    part = ", "    part = ", "waits"),
    "tiles do not wait": (TILES, 1, "    await_inputs(PDL)\n    n, m, k", "    n, m, k", "waits"),
    "an early read": (ROWS, 0, "    if PDL:\n", "    if PDL:\n        tl.load(weight_ptr)\n", "before it waits"),
    "rows past the end": (ROWS, 0, ROWS_OF, "weight_stride_n, first, N + 9, K, ROWS", "bounds"),
    "columns past the end": (ROWS, 0, ROWS_OF, "weight_stride_n, first, N, K + 64, ROWS", "bounds"),
    "attention does not wait": (ATTENTION, 0, "    await_inputs(PDL)\n    group", "    group", "waits"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutant_is_caught(mistake, tmp_path, monkeypatch):
    (part, page, name), case, old, new, complaint = MUTANTS[mistake]
    module = mutated(part, old, new, tmp_path, monkeypatch, of=page)
    arguments, keywords = OPS[name].inputs(**CASES[name][case], dtype=torch.bfloat16)
    with interpreting(arch=90, multiprocessors=4), pytest.raises((Early, OutOfBounds), match=complaint):
        getattr(module, f"{name}_triton")(*arguments, **keywords)
