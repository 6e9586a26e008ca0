"""The Gluon forward of attention: its values and its barriers in the emulator, its machine code, and when it is taken.

A mutant is the page with one mistake in its protocol. Each must be caught, whatever luck the schedule brings.
"""

from __future__ import annotations

import dataclasses
import re
from types import ModuleType

import pytest
import torch
from mutants import mutated
from oracle import relative_error
from torch import Tensor

import kernels
from kernels._triton import Launcher, launching
from kernels.attention import ATTENTION, attention_gluon, attention_triton
from kernels.attention.hopper import forward as hopper
from kernels.attention.hopper import pieces
from kernels.attention.reference import attention_reference
from kernels.attention.shared import Options
from kernels.proof import aot
from kernels.proof.emulate import ProtocolError, emulating
from kernels.proof.interpret import interpreting
from kernels.proof.machine_code import broken_gates, listings, read_codes

pytestmark = pytest.mark.triton
KERNEL = "attention_fwd_kernel_hopper"


def qkv(B: int, T: int, S: int, H: int, G: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(B, T, H, D).bfloat16()
    return q, *torch.randn(2, B, S, G, D).bfloat16().unbind()


def options_of(
    q: Tensor, window: int | None = None, cu_seqlens: Tensor | None = None, softcap: float = 0.0,
    scale: float | None = None,
) -> Options:  # fmt: skip
    """What the kernels are given, as by attention_gluon."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return Options(cu_seqlens, None, True, -1 if window is None else window, scale, softcap, 0.0, True)


def forward(page: ModuleType, q: Tensor, k: Tensor, v: Tensor, seed: int, **features) -> tuple[Tensor, Tensor]:
    """out and the log-sum-exp in base 2, by the kernel of a page, into memory that holds NaN."""
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
    with emulating(seed, watch=check_turns):
        page.launch_forward_hopper(q, k, v, options_of(q, **features), out, lse)
    return out, lse


def check_turns(products: list[int]) -> None:
    """The groups multiply in turns, two products each. Nobody orders the first product of a group, nor its last."""
    first = {group: products.index(group) for group in (1, 2)}
    last = {group: len(products) - 1 - products[::-1].index(group) for group in (1, 2)}
    in_turns = [group for i, group in enumerate(products) if i not in (first[group], last[group])]
    assert in_turns == [1, 1, 2, 2] * (len(in_turns) // 4), f"not in turns: {products}"


def check(page: ModuleType, q: Tensor, k: Tensor, v: Tensor, seed: int, **features) -> None:
    """The error rule of tests/oracle.py."""
    found, lse = forward(page, q, k, v, seed, **features)
    truth, truth_lse = attention_reference(q.double(), k.double(), v.double(), return_lse=True, **features)
    same = attention_reference(q, k, v, **features)
    assert found.isfinite().all() and lse.isfinite().all()
    assert relative_error(found, truth) <= 2 * relative_error(same, truth) + torch.finfo(q.dtype).eps, "values"
    torch.testing.assert_close(lse.double() * torch.tensor(2.0).log(), truth_lse, rtol=1e-5, atol=1e-5)


# ---- values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "dims",
    [
        dict(B=2, T=1, S=1, H=2, G=2, D=64), dict(B=1, T=257, S=257, H=2, G=1, D=64),
        dict(B=1, T=131, S=640, H=2, G=2, D=64), dict(B=1, T=3, S=300, H=4, G=2, D=128),
        dict(B=2, T=130, S=389, H=2, G=1, D=128), dict(B=1, T=130, S=389, H=2, G=1, D=256),
    ],
    ids=lambda dims: " ".join(f"{letter}={size}" for letter, size in dims.items()),
)  # fmt: skip
def test_values(dims, seed):
    check(hopper, *qkv(**dims), seed)


BOUNDS = {
    "window": dict(window=100), "window of one": dict(window=1), "window of all": dict(window=1000),
    "documents": dict(cu_seqlens=torch.tensor([0, 0, 3, 64, 190, 330])),
    "documents and window": dict(cu_seqlens=torch.tensor([0, 150, 151, 330]), window=70),
    "softcap": dict(softcap=1.5, scale=0.3), "softcap and window": dict(softcap=20.0, window=100),
}  # fmt: skip


@pytest.mark.parametrize("D", hopper.TILES)
@pytest.mark.parametrize("features", BOUNDS.values(), ids=BOUNDS)
def test_windows_documents_and_softcaps(features, D):
    for seed in range(2):
        check(hopper, *qkv(1, 330, 330, 2, 1, D), seed, **features)
    if "cu_seqlens" not in features:
        check(hopper, *qkv(1, 70, 330, 1, 1, D), 2, **features)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("block_n", [64, 128])
def test_any_number_of_stages_and_tiles_half_as_wide(stages, block_n, monkeypatch):
    monkeypatch.setitem(hopper.TILES, 64, hopper.TILES[64]._replace(stages=stages, block_n=block_n))
    for seed in range(3):
        check(hopper, *qkv(1, 500, 500, 1, 1, 64), seed)


def test_gradients_follow_from_what_it_returns():
    """The backward kernels after this forward, on slices of a fused projection; the log-sum-exp has a gradient too."""
    T, H, G, D = 140, 2, 1, 64
    whole = torch.randn(1, T, H + 2 * G, D).bfloat16()

    def results(function, dtype: torch.dtype) -> list[Tensor]:
        fused = whole.to(dtype).requires_grad_()
        q, k, v = fused.split((H, G, G), dim=2)
        out, lse = function(q, k, v, return_lse=True)
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(x.shape, generator=generator).to(x) for x in (out, lse)]
        gradient = torch.autograd.grad((out, lse), fused, seeds)[0]
        return [out.detach(), lse.detach(), *gradient.split((H, G, G), dim=2)]

    with emulating():
        found = results(attention_gluon, torch.bfloat16)
    with interpreting(arch=90):
        plain = results(attention_triton, torch.bfloat16)
    same, truth = (results(attention_reference, dtype) for dtype in (torch.bfloat16, torch.float64))
    for f, p, s, t in zip(found, plain, same, truth, strict=True):
        bound = 2 * relative_error(s, t) + torch.finfo(f.dtype).eps
        assert relative_error(f, t) <= bound
        assert relative_error(f, p.double()) <= bound  # the plain forward, and this one


def test_nan_reaches_the_queries_that_see_it_and_no_program_that_does_not():
    q, k, v = qkv(1, 200, 200, 1, 1, 64)
    v[0, 150, 0, 3] = torch.nan
    out, _ = forward(hopper, q, k, v, 0)
    assert out[0, 150:, 0, 3].isnan().all()
    assert not out[0, :128].isnan().any() and not out[..., :3].isnan().any()


def test_one_seed_is_one_schedule():
    """The emulator repeats itself, and another seed is another run of the same values."""
    q, k, v = qkv(1, 257, 257, 1, 1, 64)
    outputs = [forward(hopper, q, k, v, seed)[0] for seed in (5, 5, 6)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


# ---- mutants of the protocol


GONE = "MBarrierLayout()"  # in place of a call of gl_hopper.mbarrier: does nothing
RACE, DEADLOCK, BY, EARLY = "race", "deadlock", "went by", "before it has been waited for"
VALUES, TURNS = "values", "not in turns"
WAIT_FOR_SCORES = "s = gl_hopper.warpgroup_mma_wait(1, [s])"
FREE_KEYS = "gl_hopper.mbarrier.arrive(k_free.index(k_stage))"
WAIT_FOR_SUMS = "acc, weights = gl_hopper.warpgroup_mma_wait(0, [acc, weights])"
FREE_VALUES = "gl_hopper.mbarrier.arrive(v_free.index(v_stage))"

# What is changed into what, and of which faults one must be found.
MUTANTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "keys overwritten": ("wait(k_free.index(stage), (i // STAGES + 1) & 1)", GONE, (RACE, "more often")),
    "values overwritten": ("wait(v_free.index(stage), ((i - 1) // STAGES + 1) & 1)", GONE, (RACE, "more often")),
    "phase of free keys": ("(i // STAGES + 1) & 1", "(i // STAGES) & 1", (DEADLOCK,)),
    "phase of free values": ("((i - 1) // STAGES + 1) & 1", "((i - 1) // STAGES) & 1", (DEADLOCK,)),
    "phase of free values, off by one": ("((i - 1) // STAGES + 1) & 1", "(i // STAGES + 1) & 1", (DEADLOCK, RACE)),
    "phase of keys": ("((i + 1) // STAGES) & 1", "(i // STAGES) & 1", (DEADLOCK, RACE, BY)),
    "phase of keys, as if of one stage": ("((i + 1) // STAGES) & 1", "(i + 1) & 1", (DEADLOCK, RACE, BY)),
    "phase of values": ("v_stage), ((i - 1) // STAGES) & 1", "v_stage), (i // STAGES) & 1", (DEADLOCK, RACE)),
    "queries not awaited": ("wait(q_full.index(GROUP), 0)", GONE, (RACE,)),
    "first keys not awaited": ("wait(k_full.index(0), 0)", GONE, (RACE,)),
    "second keys not awaited": ("wait(k_full.index(1 % STAGES), (1 // STAGES) & 1)", GONE, (RACE,)),
    "keys not awaited": ("wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1)", GONE, (RACE,)),
    "values not awaited": ("wait(v_full.index(v_stage), ((i - 1) // STAGES) & 1)", GONE, (RACE,)),
    "last values not awaited": ("wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)", GONE, (RACE,)),
    "first keys not given back": ("arrive(k_free.index(0))", GONE, (DEADLOCK,)),
    "keys not given back": ("arrive(k_free.index(k_stage))", GONE, (DEADLOCK,)),
    "values not given back": ("arrive(v_free.index(v_stage))", GONE, (DEADLOCK,)),
    "keys given back while read": (
        f"{WAIT_FOR_SCORES}\n        {FREE_KEYS}", f"{FREE_KEYS}\n        {WAIT_FOR_SCORES}", (RACE,)),
    "values given back while read": (
        f"{WAIT_FOR_SUMS}\n        {FREE_VALUES}", f"{FREE_VALUES}\n        {WAIT_FOR_SUMS}", (RACE,)),
    "one group frees the keys": ("k_free.index(stage), count=2", "k_free.index(stage), count=1", (RACE, DEADLOCK, BY)),
    "one group frees the values": (
        "v_free.index(stage), count=2", "v_free.index(stage), count=1", (RACE, DEADLOCK, BY)),
    "three groups free the keys": ("k_free.index(stage), count=2", "k_free.index(stage), count=3", (DEADLOCK,)),
    "turn not awaited": ("wait(turn.index(GROUP), (i - 1) & 1)", GONE, (TURNS,)),
    "turn not passed on": ("arrive(turn.index(1 - GROUP))", GONE, (DEADLOCK,)),
    "turn passed to oneself": ("arrive(turn.index(1 - GROUP))", "arrive(turn.index(GROUP))", (DEADLOCK,)),
    "turn passed on too early": (
        "gl_hopper.mbarrier.wait(v_full.index(v_stage)",
        "gl_hopper.mbarrier.arrive(turn.index(1 - GROUP))\n        gl_hopper.mbarrier.wait(v_full.index(v_stage)",
        (TURNS, DEADLOCK)),
    "no first turn": ("arrive(turn.index(0))", GONE, (DEADLOCK,)),
    "phase of the turn": ("turn.index(GROUP), (i - 1) & 1", "turn.index(GROUP), i & 1", (TURNS, DEADLOCK)),
    "barrier never made": ("init(v_full.index(stage), count=1)", GONE, ("no barrier yet",)),
    "too few stages": ("gl.bfloat16, [STAGES, 1", "gl.bfloat16, [STAGES - 1, 1", ("index out of range",)),
    "all keys to one stage": ("k_tiles.index(stage))", "k_tiles.index(0))", (RACE,)),
    "values before their keys": ("for i in range(tiles + 1):", "for i in range(tiles, -1, -1):", (DEADLOCK,)),
    "scores used too early": (WAIT_FOR_SCORES, WAIT_FOR_SCORES.replace("1,", "2,"), (EARLY,)),
    "sums used too early": (WAIT_FOR_SUMS, WAIT_FOR_SUMS.replace("0,", "1,"), (EARLY,)),
    "weights given up": (WAIT_FOR_SUMS, "acc = gl_hopper.warpgroup_mma_wait(0, [acc])", ("are given up",)),
    "result not fenced": ("    gl_hopper.fence_async_shared()\n", "", ("no fence",)),
    "result not awaited": ("    gl_hopper.tma.store_wait(0)\n", "", ("under way",)),
    "both groups the same queries": ("row + ROWS, start", "row, start", ("",)),
    "diagonal not masked": ("masked = n + BLOCK_N > first + 1", "masked = n > first + 1", (VALUES,)),
    "keys in another order than values": (
        "fetch(k, b, g, start + (tiles - 1 - i)", "fetch(k, b, g, start + i", (VALUES,)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutant_is_caught(mistake, tmp_path, monkeypatch):
    old, new, faults = MUTANTS[mistake]
    page = mutated(hopper, old, new, tmp_path, monkeypatch)
    arguments, found = qkv(1, 640, 640, 1, 1, 64), []
    for seed in range(4):
        try:
            check(page, *arguments, seed)
        except (ProtocolError, AssertionError, IndexError) as error:
            found.append(str(error))
    assert found, "not caught"
    assert all(any(fault in error for fault in faults) for error in found), found


BOUND_MUTANTS = {
    "first tile masked as if it were seen": ("masked | (n < last_seen)", "masked | (n > last_seen)"),
    "masked by the first query alone": ("gl.minimum(first + ROWS, S) - 1, S,", "gl.minimum(first, S - 1), S,"),
    "one key too few": ("seen[:, None] <= keys[None, :]", "seen[:, None] < keys[None, :]"),
    "one key too many": ("seen[:, None] <= keys[None, :]", "seen[:, None] <= keys[None, :] + 1"),
    "a tile too few": ("0) // BLOCK_N * BLOCK_N", "0) // BLOCK_N * BLOCK_N + BLOCK_N"),
    "start of another block": ("first_key(row + (S - T), S", "first_key(row + ROWS + (S - T), S"),
    "keys from the start": ("fetch(k, b, g, start + ", "fetch(k, b, g, "),
    "values from the start": ("fetch(v, b, g, start + ", "fetch(v, b, g, "),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BOUND_MUTANTS)
def test_mistaken_bound_is_caught(mistake, tmp_path, monkeypatch):
    page = mutated(hopper, *BOUND_MUTANTS[mistake], tmp_path, monkeypatch)
    with pytest.raises((AssertionError, ProtocolError)):
        for features in (dict(window=200), dict(cu_seqlens=torch.tensor([0, 193, 270, 640]))):
            check(page, *qkv(1, 640, 640, 1, 1, 64), 0, **features)


@pytest.mark.parametrize("mistake", [("s = tanh(s * share)", "s = s * share"), ("gl.exp2(s * factor", "gl.exp2(s")])
def test_mistaken_softcap_is_caught(mistake, tmp_path, monkeypatch):
    page = mutated(hopper, *mistake, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(page, *qkv(1, 330, 330, 1, 1, 64), 0, softcap=1.5, scale=0.3)


# ---- when it is taken


def launched(function, *arguments, arch: int = 90, **features) -> list[str]:
    """The kernels that a call would launch on a GPU of that architecture."""
    found: list[str] = []
    with launching(Launcher(lambda kernel, *_, **__: found.append(kernel.__name__), arch)):
        function(*arguments, **features)
    return found


FEATURES = (
    dict(), dict(causal=False), dict(window=3), dict(softcap=2.0), dict(dropout=0.1),
    dict(cu_seqlens=torch.tensor([0, 5])),
)  # fmt: skip


@pytest.mark.parametrize("features", FEATURES, ids=lambda features: next(iter(features), "plain"))
def test_it_is_taken_unasked_where_it_wins_and_for_what_it_can_do(features):
    arguments = qkv(1, 5, 5, 1, 1, 128)
    plain, gluon = ["attention_fwd_kernel"], [KERNEL]
    assert launched(attention_triton, *arguments, **features) == (plain if features else gluon)
    assert launched(attention_triton, *arguments, arch=100, **features) == plain
    for D in (64, 256):
        assert launched(attention_triton, *qkv(1, 5, 5, 1, 1, D), **features) == plain
        if not {"causal", "dropout"} & {*features}:
            assert launched(attention_gluon, *qkv(1, 5, 5, 1, 1, D), **features) == gluon


SMALL, WRONG = qkv(1, 5, 5, 1, 1, 64), "q: needs bf16 and a head dim of 64, 128 or 256, got torch"
REFUSED = {
    "causal": (SMALL, dict(causal=False)), "dropout": (SMALL, dict(dropout=0.1)),
    "softcap: needs at least 1e-06": (SMALL, dict(softcap=1e-7)),
    "k: needs at least": (qkv(1, 6, 5, 1, 1, 64), {}),
    f"{WRONG}.bfloat16 and 96": (qkv(1, 5, 5, 1, 1, 96), {}),
    f"{WRONG}.float16 and 64": (tuple(x.half() for x in SMALL), {}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_asked_for_by_name_it_refuses_what_it_cannot_do(message):
    arguments, features = REFUSED[message]
    with pytest.raises(ValueError, match=f"attention by Gluon: {message}.*attention_triton"):
        launched(attention_gluon, *arguments, **features)


def test_asked_for_by_name_it_refuses_other_chips_versions_and_processors(monkeypatch):
    arguments = qkv(1, 5, 5, 1, 1, 64)
    for arch in (80, 100):
        with pytest.raises(ValueError, match=f"for sm_90, this is sm_{arch}"):
            launched(attention_gluon, *arguments, arch=arch)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        attention_gluon(*arguments)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="attention: 'gluon' cannot run: no CUDA device"):
            kernels.load("auto", attention="gluon")
    with pytest.raises(ValueError, match="no implementation named 'gluon'"):
        kernels.load("auto", layernorm="gluon")
    monkeypatch.setattr(pieces, "HAS_GLUON", False)
    with pytest.raises(ValueError, match="Triton: this version"):
        launched(attention_gluon, *arguments)


def test_compiled_as_one_operator_of_the_same_shape():
    q, k, v = (x.to("meta") for x in qkv(1, 5, 5, 2, 1, 64))
    torch._dynamo.reset()
    out, lse = torch.compile(attention_gluon, fullgraph=True, backend="eager")(q, k, v, return_lse=True)
    assert out.shape == q.shape and lse.shape == (1, 2, 5)


# ---- machine code


@pytest.mark.parametrize("D", hopper.TILES)
def test_the_report_holds_its_machine_code_to_the_gates(D):
    rows = [row for row in aot.read_report() if row["kernel"] == KERNEL and f" D={D} " in row["constants"]]
    assert rows and {row["arch"] for row in rows} == {90}
    for row in rows:
        assert row["broken"] == []
        steps = D // 16 + hopper.TILES[D].block_n // 16  # of 16, in the two products of a tile
        assert row["matrix"] == f"HGMMA {2 * 2 * steps}"  # in the loop and around it, for both groups
        assert row["warps"] == 12 and row["bulk_copies"] > 0


@pytest.mark.parametrize("D", hopper.TILES)
def test_the_machine_code_for_documents_holds_the_gates(D):
    """Of forward and backward, with grouped heads; a window alone compiles to a part of it."""
    op = dataclasses.replace(ATTENTION, triton=attention_gluon, variants={})
    found = aot.launches(op, dict(B=1, T=512, S=512, H=4, G=2, D=D, documents=True), 90)
    gluon = [launch for launch in found if launch.kernel.__name__.endswith("_hopper")]
    assert len(gluon) == 2
    for code in read_codes([aot.compile_launch(launch, 90) for launch in gluon], 90):
        assert broken_gates(code, 90) == []


@pytest.mark.parametrize("D", hopper.TILES)
def test_the_order_of_its_instructions(D):
    """In the loop: both products, the wait for the scores, their exponentials, and only then the wait for the sums."""
    found, block_n = aot.launches(ATTENTION, dict(B=1, T=512, S=512, H=2, G=2, D=D), 90), hopper.TILES[D].block_n
    compiled = aot.compile_launch(next(launch for launch in found if launch.kernel.__name__ == KERNEL), 90)
    letters = {"HGMMA": "P", "WARPGROUP.DEPBAR": "w", "MUFU.EX2": "e"}
    (listing,) = listings([compiled.asm["cubin"]], 90)
    order = "".join(letter for op in listing for name, letter in letters.items() if op.startswith(name))
    loops = re.findall(rf"P{{{(D + block_n) // 16}}}we{{{block_n // 2},}}w", order)
    assert len(loops) == 2, order  # one of each group
    # The registers of all roles must fit those that the program starts with, or the last to ask would wait forever.
    assert ".maxnreg 168" in compiled.asm["ptx"]
    assert 2 * hopper.TILES[D].registers + 24 <= 3 * 168


@pytest.mark.gpu
@pytest.mark.parametrize("D", hopper.TILES)
def test_on_a_gpu(D):
    for T in (1, 63, 128, 1031, 4096):
        q, k, v = (x.cuda() for x in qkv(2, T, T + 3, 4, 2, D))
        for given in ({}, dict(window=100), dict(softcap=2.0)):
            truth = attention_reference(q.double(), k.double(), v.double(), **given)
            bound = 2 * relative_error(attention_reference(q, k, v, **given), truth) + torch.finfo(q.dtype).eps
            assert relative_error(attention_gluon(q, k, v, **given), truth) <= bound
