"""The Gluon backward of attention: values and barriers in the emulator, machine code, and when it is taken.

A mutant is a page with one mistake in its protocol. Each must be caught, whatever luck the schedule brings.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from mutants import mutated
from oracle import relative_error
from torch import Tensor

from kernels._triton import Launcher, launching
from kernels.attention import ATTENTION, attention_gluon, attention_triton, hopper
from kernels.attention.hopper import fused, pieces, stay, wide
from kernels.attention.reference import attention_reference
from kernels.proof import aot
from kernels.proof.emulate import ProtocolError, emulating
from kernels.proof.machine_code import broken_gates, read_code
from tests.test_attention_hopper import BOUNDS, options_of

pytestmark = pytest.mark.triton
KERNELS = {
    64: "attention_bwd_kernel_stay_hopper", 128: "attention_bwd_kernel_fused_hopper",
    256: "attention_bwd_kernel_wide_hopper",
}  # fmt: skip
AROUND = ["attention_bwd_kernel_prepare", "attention_bwd_kernel_finish"]


def case(B: int, T: int, S: int, H: int, G: int, D: int, **features) -> dict[str, Any]:
    """q, k, v, dout in bf16, and the forward's results in fp64, rounded as the kernel leaves them."""
    q, dout = torch.randn(2, B, T, H, D).bfloat16().unbind()
    k, v = torch.randn(2, B, S, G, D).bfloat16().unbind()
    out, lse = attention_reference(q.double(), k.double(), v.double(), return_lse=True, **features)
    return dict(
        q=q,
        k=k,
        v=v,
        dout=dout,
        out=out.bfloat16().contiguous(),
        lse=(lse / torch.tensor(2.0).log()).float().contiguous(),
        features=features,
    )


def gradients(c: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    operands = [c[name].to(dtype).requires_grad_() for name in "qkv"]
    return torch.autograd.grad(attention_reference(*operands, **c["features"]), operands, c["dout"].to(dtype))


def check(c: dict[str, Any], seed: int) -> None:
    """The error rule of tests/oracle.py, for dq, dk and dv written into memory that held NaN."""
    found = tuple(torch.full_like(c[name], torch.nan) for name in "qkv")
    with emulating(seed):
        hopper.launch_backward_hopper(
            c["dout"], c["q"], c["k"], c["v"], c["out"], c["lse"], options_of(c["q"], **c["features"]), found
        )
    same, truth = gradients(c, torch.bfloat16), gradients(c, torch.float64)
    for name, f, s, t in zip("qkv", found, same, truth, strict=True):
        assert f.isfinite().all(), f"values: d{name}"
        assert relative_error(f, t) <= 2 * relative_error(s, t) + torch.finfo(f.dtype).eps, f"values: d{name}"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("D", KERNELS)
@pytest.mark.parametrize(
    "dims", [(2, 1, 3, 2, 2), (1, 257, 257, 2, 1), (2, 130, 200, 2, 2), (1, 65, 400, 4, 2)], ids=str
)
def test_values(dims, D, seed):
    check(case(*dims, D), seed)


@pytest.mark.parametrize("D", KERNELS)
@pytest.mark.parametrize("features", BOUNDS.values(), ids=BOUNDS)
def test_windows_documents_and_softcaps(features, D):
    check(case(1, 330, 330, 1, 1, D, **features), 0)
    if "cu_seqlens" not in features:
        check(case(1, 70, 330, 1, 1, D, **features), 1)  # the first keys are too old for every query


@pytest.mark.parametrize("D", KERNELS)
def test_gradients_may_lie_in_one_tensor(D):
    """As slices of the gradient of a fused projection, which q, k and v are slices of."""
    c, (H, G) = case(1, 140, 140, 2, 1, D), (2, 1)
    projection = torch.cat([c[name] for name in "qkv"], dim=2)
    c |= zip("qkv", projection.split((H, G, G), dim=2), strict=True)
    whole = torch.full((1, 140, H + 2 * G, D), torch.nan, dtype=torch.bfloat16)
    apart = tuple(torch.empty_like(c[name]) for name in "qkv")
    for into in (apart, whole.split((H, G, G), dim=2)):
        with emulating():
            hopper.launch_backward_hopper(
                c["dout"], c["q"], c["k"], c["v"], c["out"], c["lse"], options_of(c["q"]), into
            )
    assert torch.equal(whole, torch.cat(apart, dim=2))


# ---- mutants of the protocol

WAIT, ARRIVE = "gl_hopper.mbarrier.wait", "gl_hopper.mbarrier.arrive"
GONE = "gl_hopper.mbarrier.MBarrierLayout()"  # in place of a call: does nothing
STAY = {
    "keys overwritten": (f"{WAIT}(kv_free.index(kv), (j // 2 + 1) & 1)", GONE),
    "queries overwritten": (f"{WAIT}(q_free.index(stage), (t // Q_STAGES + 1) & 1)", GONE),
    "phase of free dout": ("(t // O_STAGES + 1) & 1", "(t // O_STAGES) & 1"),
    "keys not awaited": (f"{WAIT}(k_full.index(kv * 2 + GROUP), parity)", GONE),
    "values not awaited": (f"{WAIT}(v_full.index(kv * 2 + GROUP), parity)", GONE),
    "dout not awaited": (f"{WAIT}(o_full.index(o_stage), (t // O_STAGES) & 1)", GONE),
    "keys not given back": (f"{ARRIVE}(kv_free.index(1 - kv), pred=j > 0)", GONE),
    "results not awaited": ("gl_hopper.tma.store_wait(0)  # the last block's", f"{GONE}  # the last block's"),
    "differences overwritten": (f"{WAIT}(s_free.index(s_stage), (t // S_STAGES + 1) & 1)", GONE),
    "dout not given back": (f"{ARRIVE}(o_free.index(o_stage))", GONE),
    "keys overwritten by dk": (f"{WAIT}(s_free.index((before - 1) % S_STAGES), ((before - 1) // S_STAGES) & 1)", GONE),
    "tiles miscounted": ("        before += total\n", "        before += total - 1\n"),
    "differences not awaited": (f"{WAIT}(s_full.index(stage), (t // S_STAGES) & 1)", GONE),
    "sums overwritten": ("gl_hopper.tma.store_wait(0)  # the last tile", f"{GONE}  # the last tile"),
    "differences not given back": (f"{ARRIVE}(s_free.index(stage))", GONE),
    "half of the differences": ("use_acc=group > 0", "use_acc=group > 1"),
    "two give back the keys": ("kv_free.index(kv), count=3", "kv_free.index(kv), count=2"),
    "one fills the differences": ("s_full.index(stage), count=2", "s_full.index(stage), count=1"),
}  # fmt: skip
FUSED = {
    "keys not awaited": (f"{WAIT}(k_full.index(group), 0)", GONE),
    "differences not awaited": (f"{WAIT}(s_full.index(s_stage), (i // S_STAGES) & 1)", GONE),
    "differences overwritten": (f"{WAIT}(s_free.index(s_stage), (i // S_STAGES + 1) & 1)", GONE),
    "keys overwritten by dk": (f"{WAIT}(s_free.index(last % S_STAGES), (last // S_STAGES) & 1)", GONE),
    "differences not given back": (f"{ARRIVE}(s_free.index(s_stage))", GONE),
    "sums overwritten": ("gl_hopper.tma.store_wait(0)  # the last tile", f"{GONE}  # the last tile"),
    "queries given back while read": (
        f"dk, ds = gl_hopper.warpgroup_mma_wait(0, [dk, ds])\n        {ARRIVE}(q_free.index(q_stage))",
        f"{ARRIVE}(q_free.index(q_stage))\n        dk, ds = gl_hopper.warpgroup_mma_wait(0, [dk, ds])"),
    "both groups the first half": ("GROUP * COLUMNS, COLUMNS, dim=1", "0 * COLUMNS, COLUMNS, dim=1"),
    "differences not fenced": (
        "gl_hopper.fence_async_shared()\n        gl_hopper.mbarrier.arrive(s_full", "gl_hopper.mbarrier.arrive(s_full"),
}  # fmt: skip
WIDE = {
    "keys not awaited": (f"{WAIT}(k_full.index(0), 0)", GONE),
    "values not awaited": (f"{WAIT}(v_full.index(0), 0)", GONE),
    "queries not awaited": (f"{WAIT}(q_full.index(q_stage), (i // Q_STAGES) & 1)", GONE),
    "dout not awaited": (f"{WAIT}(o_full.index(o_stage), (i // O_STAGES) & 1)", GONE),
    "weights not awaited": (f"{WAIT}(p_full.index(0), i & 1)", GONE),
    "weights not given": (f"{ARRIVE}(p_full.index(0))", GONE),
    "phase of weights": ("p_full.index(0), i & 1", "p_full.index(0), (i + 1) & 1"),
    "weights given before they are stored": (
        f"p_tiles.index(0).store(slope.to(gl.bfloat16))\n        {ARRIVE}(p_full.index(0))",
        f"{ARRIVE}(p_full.index(0))\n        p_tiles.index(0).store(slope.to(gl.bfloat16))"),
    "differences not awaited": (f"{WAIT}(s_full.index(0), i & 1)", GONE),
    "differences not fenced": (f"gl_hopper.fence_async_shared()\n        {ARRIVE}(s_full", f"{ARRIVE}(s_full"),
    "queries not given back": (f"{ARRIVE}(q_free.index(q_stage))", GONE),
    "queries given back while read": (
        f"dk, operand = gl_hopper.warpgroup_mma_wait(2, [dk, operand])\n        {ARRIVE}(q_free.index(q_stage))",
        f"{ARRIVE}(q_free.index(q_stage))\n        dk, operand = gl_hopper.warpgroup_mma_wait(2, [dk, operand])"),
    "dout given back while read": (
        f"dv, weights = gl_hopper.warpgroup_mma_wait(2, [dv, weights])\n        {ARRIVE}(o_free.index(o_stage))",
        f"{ARRIVE}(o_free.index(o_stage))\n        dv, weights = gl_hopper.warpgroup_mma_wait(2, [dv, weights])"),
    "two give back dout": ("o_free.index(stage), count=1", "o_free.index(stage), count=2"),
    "dp used too early": ("dp = gl_hopper.warpgroup_mma_wait(0, [dp])", "dp = gl_hopper.warpgroup_mma_wait(1, [dp])"),
    "operand given up": ("dk, operand = gl_hopper.warpgroup_mma_wait(2, [dk, operand])",
                         "dk = gl_hopper.warpgroup_mma_wait(2, [dk])"),
    "differences overwritten while read": (
        "part = gl_hopper.warpgroup_mma_wait(0, [part])", "part = gl_hopper.warpgroup_mma_wait(1, [part])"),
    "sums overwritten": ("gl_hopper.tma.store_wait(0)\n    a_tile", "a_tile"),
    "sums not fenced": ("gl_hopper.fence_async_shared()\n    reduce_add", "reduce_add"),
    "keys overwritten by dk": (f"{WAIT}(k_free.index(0), 0)", GONE),
    "the first part twice": ("HALF + COLUMNS, part, a_tile", "HALF, part, a_tile"),
    "the second part of another tile": ("last_head, last_row = head, row\n        head, row =", "head, row ="),
    "the next tile of the same head": ("next_queries(head, row, first,", "next_queries(head, row - BLOCK_M, first,"),
    "both groups the first half": ("k.slice(HALF, COLUMNS, dim=1)", "k.slice(0, COLUMNS, dim=1)"),
}  # fmt: skip
MUTANTS = [(stay, 64, name, change) for name, change in STAY.items()]
MUTANTS += [(fused, 128, name, change) for name, change in FUSED.items()]
MUTANTS += [(wide, 256, name, change) for name, change in WIDE.items()]


@pytest.mark.parametrize(
    ("page", "D", "name", "change"),
    MUTANTS,
    ids=[f"{page.__name__.split('.')[-1]}-{name}" for page, _, name, _ in MUTANTS],
)
def test_mutant_is_caught(page, D, name, change, tmp_path, monkeypatch):
    mutant = mutated(page, *change, tmp_path, monkeypatch)
    monkeypatch.setattr(hopper, page.__name__.split(".")[-1], mutant)
    c = case(1, 320, 320, 2, 2, D)
    caught = 0
    for seed in range(2):
        try:
            check(c, seed)
        except (ProtocolError, AssertionError, IndexError):
            caught += 1
    assert caught == 2, "not caught"


BOUND_MUTANTS = {
    "last tile not masked": ("masked | (position + (BLOCK_M - 1) > until)", "masked | (position > until)"),
    "one query too few": ("queries[None, :] <= last[:, None]", "queries[None, :] < last[:, None]"),
    "one query too many": ("queries[None, :] <= last[:, None]", "queries[None, :] <= last[:, None] + 1"),
    "a tile too few": ("gl.maximum(last + 1 - (S", "gl.maximum(last + 1 - BLOCK_M - (S"),
    "no tile": ("gl.maximum(last + 1 - (S - T), first + 1)", "last + 1 - (S - T)"),
    "queries of the first key": ("gl.minimum(n + KEYS, S) - 1", "gl.minimum(n, S - 1)"),
    "documents end one later": ("gl.load(document_ptr + S + u) - 1", "gl.load(document_ptr + S + u)"),
    "starts of documents": ("gl.load(document_ptr + S + u)", "gl.load(document_ptr + u)"),
}  # fmt: skip


@pytest.mark.parametrize("D", KERNELS)
@pytest.mark.parametrize("mistake", BOUND_MUTANTS)
def test_mistaken_bound_is_caught(mistake, D, tmp_path, monkeypatch):
    page = mutated(pieces, *BOUND_MUTANTS[mistake], tmp_path, monkeypatch, of=hopper)
    monkeypatch.setattr(sys.modules[__name__], "hopper", page)
    documents, window = dict(cu_seqlens=torch.tensor([0, 193, 270, 400])), dict(window=100)
    with pytest.raises((AssertionError, ProtocolError, IndexError)):
        for T, features in ((400, documents), (400, window), (64, window)):
            check(case(1, T, 400, 1, 1, D, **features), 0)


SOFTCAP_MUTANTS = {
    "no slope": ("slope = 1.0 - p * p", "slope = 1.0 - 0.0 * p"),
    "slope of the scores": ("slope = slope * p", "slope = slope * s"),
    "hidden keys seen": ("-1e9 if SOFTCAPPED", "-1.0 if SOFTCAPPED"),
    "scores not capped": ("p = tanh(s * share)", "p = s * share"),
    "far from zero by the series": ("square < 0.09", "square < 9.0"),
}  # fmt: skip


@pytest.mark.parametrize("D", KERNELS)
@pytest.mark.parametrize("mistake", SOFTCAP_MUTANTS)
def test_mistaken_softcap_is_caught(mistake, D, tmp_path, monkeypatch):
    page = mutated(pieces, *SOFTCAP_MUTANTS[mistake], tmp_path, monkeypatch, of=hopper)
    monkeypatch.setattr(sys.modules[__name__], "hopper", page)
    with pytest.raises(AssertionError):
        check(case(1, 330, 330, 1, 1, D, softcap=1.5, scale=0.3), 0)


# ---- when it is taken


def launched(arch: int = 90, D: int = 64, gluon: bool = False, **features) -> list[str]:
    """The kernels that forward and backward would launch on a GPU of that architecture."""
    found: list[str] = []
    q, k, v = (torch.randn(1, 64, 2, D).bfloat16().requires_grad_() for _ in range(3))
    with launching(Launcher(lambda kernel, *_, **__: found.append(kernel.__name__), arch)):
        out = (attention_gluon if gluon else attention_triton)(q, k, v, **features)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return found[1:]


PLAIN = ["attention_bwd_kernel_dq", "attention_bwd_kernel_dk_dv"]


@pytest.mark.parametrize("D", KERNELS)
def test_it_is_taken_where_it_can_run(D):
    """At D = 256 only where it is asked for."""
    hopper = [AROUND[0], KERNELS[D], AROUND[1]]
    assert launched(D=D) == (PLAIN if D == 256 else hopper) and launched(D=D, gluon=True) == hopper
    assert launched(D=D, arch=100) == PLAIN and launched(D=D, arch=80) == PLAIN
    for features in (dict(causal=False), dict(window=3), dict(softcap=2.0), dict(dropout=0.1)):
        assert launched(D=D, **features) == PLAIN
    for features in (dict(window=3), dict(softcap=2.0), dict(cu_seqlens=torch.tensor([0, 9, 64]))):
        assert launched(D=D, gluon=True, **features) == hopper
    assert launched(D=96) == PLAIN


def test_deterministic_algorithms_take_the_kernels_that_sum_in_order():
    torch.use_deterministic_algorithms(True)
    try:
        assert launched() == PLAIN and launched(D=256, gluon=True) == PLAIN
    finally:
        torch.use_deterministic_algorithms(False)


# ---- machine code


@pytest.mark.parametrize("D", KERNELS)
def test_the_report_holds_its_machine_code_to_the_gates(D):
    rows = [row for row in aot.read_report() if row["kernel"] == KERNELS[D]]
    assert rows and {row["arch"] for row in rows} == {90}
    for row in rows:
        assert row["broken"] == []
        assert re.match("HGMMA ", row["matrix"]) and row["bulk_copies"] > 0


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("D", KERNELS)
def test_the_registers_of_all_roles_fit_those_that_the_program_starts_with(D, softcap):
    """Or the last to ask would wait forever. Nor do values spill, but for one at the end of a program."""
    found = aot.launches(ATTENTION, dict(B=1, T=512, S=512, H=2, G=2, D=D, softcap=softcap), 90)
    launch = next(launch for launch in found if launch.kernel.__name__ == KERNELS[D])
    compiled = aot.compile_launch(launch, 90)
    granted = int(re.search(r"\.maxnreg (\d+)", compiled.asm["ptx"]).group(1))
    spills = ["spills: 8 B of stack, 2 local accesses"] if softcap and D == 128 else []
    assert broken_gates(read_code(compiled, 90), 90) == spills
    groups, tile = (3 if D == 64 else 2), {64: stay, 128: fused, 256: wide}[D].TILE
    tile = stay.SOFTCAP_TILE if softcap and D == 64 else tile
    asked = 2 * tile.registers + (512 - 24 - 2 * tile.registers if D == 64 else 0)
    assert asked + 24 <= granted * (groups + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("D", KERNELS)
def test_on_a_gpu(D):
    for T, S in ((1, 3), (63, 66), (128, 128), (1031, 1031), (700, 2048)):
        q, dout = torch.randn(2, 2, T, 4, D, device="cuda").bfloat16().unbind()
        k, v = torch.randn(2, 2, S, 2, D, device="cuda").bfloat16().unbind()

        def run(function, dtype, features, operands=(q, k, v), dout=dout):
            leaves = [x.to(dtype).requires_grad_() for x in operands]
            return torch.autograd.grad(function(*leaves, **features), leaves, dout.to(dtype))

        edges = torch.tensor([0, T // 3, T // 2, T], device="cuda")
        for features in ({}, dict(window=100), dict(softcap=2.0), *([dict(cu_seqlens=edges)] if T == S else [])):
            found, same = (run(f, torch.bfloat16, features) for f in (attention_gluon, attention_reference))
            for f, s, t in zip(found, same, run(attention_reference, torch.float64, features), strict=True):
                assert relative_error(f, t) <= 2 * relative_error(s, t) + torch.finfo(f.dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("D", KERNELS)
def test_a_projection_on_a_gpu(D):
    """The gradients of its slices; but the sums of dq differ in their order."""
    whole, dout = torch.randn(2, 1031, 12, D, device="cuda").bfloat16(), torch.randn(2, 1031, 4, D, device="cuda")
    slices = whole.split((4, 4, 4), dim=2)

    def run(*operands, **form):
        leaves = [x.detach().requires_grad_() for x in operands]
        return torch.cat(torch.autograd.grad(attention_gluon(*leaves, **form), leaves, dout.bfloat16()), dim=2)

    found, apart = run(whole, heads=4), run(*slices)
    assert torch.equal(found[:, :, 4:], apart[:, :, 4:])
    assert relative_error(found[:, :, :4], apart[:, :, :4].double()) <= torch.finfo(torch.bfloat16).eps
