"""Attention: sizes, edges, dropout and layouts, beside the generic tests of test_parity.py."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, relative_error
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels._triton import Launcher, jit, launcher, launching, skip, tl
from kernels.attention import attention_triton, backward, cpu, dropout, forward
from kernels.attention.cpu import attention_cpu
from kernels.attention.reference import attention_reference
from kernels.attention.shared import place
from kernels.proof import aot
from kernels.proof.interpret import interpreting
from kernels.proof.machine_code import Code, broken_gates, read_code

interpreted = kernels.load("reference", attention="interpret").attention


def qkv(
    T: int, S: int, *, B: int = 1, H: int = 2, G: int = 2, D: int = 16, dtype: torch.dtype = torch.float32
) -> tuple:
    q = torch.randn(B, T, H, D, dtype=dtype)
    return q, *torch.randn(2, B, S, G, D, dtype=dtype).unbind()


def results(function, q, k, v, **features) -> list[Tensor]:
    """out (and the log-sum-exp), dq, dk, dv for fixed random gradients."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    outputs = function(q, k, v, **features)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    seeds = [torch.where(o.isfinite(), s, 0.0) for o, s in zip(outputs, seeds, strict=True)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, (q, k, v), seeds)]


def in_one(function):
    """The function, which is given q, k and v as one projection."""
    return lambda q, k, v, **features: function(torch.cat((q, k, v), dim=2), heads=q.shape[2], **features)


def check(q: Tensor, k: Tensor, v: Tensor, function=interpreted, **features) -> None:
    """The error rule of tests/oracle.py, for a function with keyword arguments."""
    found, same = results(function, q, k, v, **features), results(attention_reference, q, k, v, **features)
    truth = results(attention_reference, q.double(), k.double(), v.double(), **features)
    for i, (f, s, t) in enumerate(zip(found, same, truth, strict=True)):
        finite = t.isfinite()
        assert f.shape == s.shape and f.dtype == s.dtype
        assert torch.equal(f.isfinite(), finite), f"result {i}: NaN or Inf in other places"
        f, s, t = f[finite], s[finite], t[finite]
        error, bound = relative_error(f, t), 2 * relative_error(s, t) + torch.finfo(f.dtype).eps
        assert error <= bound, f"result {i}: error {error:.2e}, allowed {bound:.2e}"


# ---- the reference against the definition, query by query


def by_definition(q, k, v, *, causal, window, scale, softcap, cu_seqlens) -> Tensor:
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    out = torch.zeros_like(q)
    bounds = [0, S] if cu_seqlens is None else cu_seqlens.tolist()
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        p = t + S - T
        seen = [
            u for u in range(S)
            if not (causal and u > p) and not (window is not None and abs(u - p) > window)
            and any(lo <= u < hi and (cu_seqlens is None or lo <= p < hi) for lo, hi in itertools.pairwise(bounds))
        ]  # fmt: skip
        if seen:
            s = k[b, seen, h // (H // G)] @ q[b, t, h] * (D**-0.5 if scale is None else scale)
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            out[b, t, h] = torch.softmax(s, 0) @ v[b, seen, h // (H // G)]
    return out


@pytest.mark.parametrize("T, S, documents", [(7, 7, None), (3, 8, None), (8, 3, None), (9, 9, [0, 0, 4, 5, 9])])
@pytest.mark.parametrize("softcap, scale", [(None, None), (1.5, 0.7)])
@pytest.mark.parametrize("window", [None, 0, 2, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_reference_and_cpu_path_are_the_definition(T, S, documents, softcap, scale, window, causal, monkeypatch):
    monkeypatch.setattr(cpu, "FEWEST_AT_ONCE", 3)  # so that a window is walked in several chunks
    q, k, v = qkv(T, S, B=2, H=4, dtype=torch.float64)
    features = dict(causal=causal, window=window, scale=scale, softcap=softcap)
    features["cu_seqlens"] = None if documents is None else torch.tensor(documents)
    expected = by_definition(q, k, v, **features)
    torch.testing.assert_close(attention_reference(q, k, v, **features), expected)
    torch.testing.assert_close(attention_cpu(q, k, v, **features), expected)


@pytest.mark.parametrize(
    "features", [dict(), dict(window=2, softcap=2.0), dict(causal=False, dropout=0.4, seed=3)], ids=str
)
@pytest.mark.parametrize("function", [attention_reference, attention_cpu])
def test_gradients_are_those_of_finite_differences(function, features):
    arguments = tuple(x.requires_grad_() for x in qkv(4, 6, H=2, G=1, D=3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: function(*x, return_lse=True, **features), arguments)
    whole = torch.randn(1, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, heads=2, return_lse=True, **features), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [8, 9], ids=["fused", "written out"])
def test_cpu_path_obeys_the_error_rule(longest, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "LONGEST_WRITTEN_OUT", longest)
    check(*qkv(9, 9, H=4, dtype=dtype), attention_cpu)


# ---- the kernels against the reference


@pytest.mark.parametrize("T, S", [(1, 2), (1, 300), (2, 3), (13, 131), (31, 33), (127, 97), (173, 173), (299, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_sizes(T, S, causal):
    few = min(T, S) < 5  # then several heads: the error of a handful of rows is a matter of luck
    check(*qkv(T, S, B=1 + few, H=1 + 7 * few, G=1 + 3 * few), causal=causal)


@pytest.mark.parametrize("D", [1, 16, 48, 80, 96, 128, 160, 256])
def test_head_dims(D):
    check(*qkv(18, 35, H=1, G=1, D=D, dtype=torch.bfloat16))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    "D, features", [(64, dict(window=70)), (80, dict(dropout=0.2, seed=5)), (256, dict(softcap=3.0))]
)
def test_tiles_of_every_architecture(arch, D, features):
    """The tiles and the tensor descriptors that are compiled for a GPU, interpreted."""
    q, k, v = qkv(150, 150, H=2, G=1, D=D, dtype=torch.bfloat16)
    with interpreting():
        interpreter = launcher()
    seen = []

    def record(kernel, grid, *args, **kwargs):
        seen.append(kwargs)
        interpreter.launch(kernel, grid, *args, **kwargs)

    with launching(Launcher(record, arch)):
        check(q, k, v, attention_triton, **features)
    assert len(seen) == 3
    assert all(kwargs["DESCRIPTORS"] == (arch >= 90) for kwargs in seen)


def compiled(kernel: str, q: Tensor, k: Tensor, v: Tensor, **features) -> Code:
    """The machine code for sm_90 of the kernel whose name ends so, as a call forward and backward launches it."""
    found: list[aot.Launch] = []
    with launching(Launcher(lambda kernel, grid, *a, **k: found.append(aot.Launch(kernel, a, k)), 90, 132)):
        results(attention_triton, q, k, v, **features)
    return read_code(aot.compile_launch(next(x for x in found if x.kernel.__name__.endswith(kernel)), 90), 90)


def test_dropout_leaves_the_registers_that_the_backward_needs():
    """At D = 128 the tile without dropout would spill. That of Triton 3.6 is slow, but does not."""
    code = compiled("dk_dv", *qkv(64, 64, D=128, dtype=torch.bfloat16), dropout=0.1, seed=1)
    assert code.stack_bytes == code.local_accesses == 0
    if aot.triton.__version__ == aot.report_version():
        assert broken_gates(code, 90) == []


def test_rows_that_no_descriptor_can_address_are_copied():
    """On sm_90 only: what is launched is what is launched, and compiled, for tensors that lie well."""
    plain = qkv(9, 9, dtype=torch.bfloat16)
    odd = tuple(F.pad(x, (3, 0))[..., 3:] for x in plain)
    for arch, same in ((80, True), (90, False), (100, False)):
        seen: list[tuple] = []
        with launching(Launcher(lambda kernel, grid, *a, seen=seen, **k: seen.append((a, k)), arch)):
            out = attention_triton(*odd)
        ((arguments, options),) = seen
        bases = [getattr(x, "base", x).data_ptr() for x in arguments[:3]]
        assert (bases == [x.data_ptr() for x in odd]) is same
        assert options["DESCRIPTORS"] is not same and out.is_contiguous()


def test_head_dims_that_no_descriptor_can_address_take_the_conservative_tile():
    for arch, descriptors in ((90, False), (100, False)):
        for D, expected in ((20, descriptors), (24, True)):
            assert forward.tile(D, torch.bfloat16, arch).descriptors is expected
            for kernel in backward.TILES:
                assert backward.tile(kernel, D, torch.bfloat16, arch, dropout=True).descriptors is expected


# ---- edges


@pytest.mark.parametrize("function", [attention_reference, interpreted], ids=["reference", "kernel"])
@pytest.mark.parametrize(
    "features", [dict(), dict(window=2), dict(causal=False, window=2), dict(dropout=0.5, seed=1)], ids=str
)
def test_a_query_that_sees_no_key_gives_zero(function, features):
    q, k, v = qkv(40, 9)
    out, lse, dq, dk, dv = results(function, q, k, v, return_lse=True, **features)
    blind = 31 - (2 if features.get("causal") is False else 0)
    assert not out[:, :blind].any() and not dq[:, :blind].any()
    assert (lse[:, :, :blind] == -torch.inf).all() and lse[:, :, blind:].isfinite().all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv)) and out[:, blind:].any() and dk.any() and dv.any()


@pytest.mark.parametrize("function", [attention_reference, interpreted], ids=["reference", "kernel"])
@pytest.mark.parametrize("features", [dict(), dict(window=1), dict(softcap=30.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_below_zero_leave_a_query_that_sees_no_key_without_gradient(function, features, dtype):
    """The least number of fp16 plus a score is -inf, and the softmax of a row of those has a NaN gradient."""
    q, k, v = qkv(5, 3, H=1, G=1, dtype=dtype)
    out, dq, dk, dv = results(function, torch.full_like(q, -4.0), torch.full_like(k, 4.0), v, **features)
    assert not out[:, :2].any() and not dq[:, :2].any()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("features", [dict(), dict(window=9)], ids=str)
def test_all_scores_far_below_zero(features):
    """Weights of less than the least fp32 relative to anything but the largest score of the row."""
    q, k, v = qkv(40, 40)
    check(torch.full_like(q, -60.0), 1 + 0.02 * k, v, **features)


@pytest.mark.parametrize("features", [dict(), dict(window=3), dict(softcap=50.0)], ids=str)
def test_on_a_cpu_a_product_past_fp16_is_scaled_before_it_is_rounded(features):
    q, v = torch.full((1, 5, 1, 64), 60.0).half(), torch.ones(1, 5, 1, 64).half()
    assert torch.equal(attention_cpu(q, q, v, **features), v)


def test_gradients_of_scores_close_to_their_cap():
    """The slope of the cap there, 1 - tanh^2, is what is left of two numbers that are almost equal."""
    q, k, v = qkv(40, 40)
    check(1 + 0.1 * q, 1 + 0.1 * k, v, softcap=4.0, scale=12.0 / q.shape[-1])


@jit
def places_kernel(out_ptr, blocks, heads, length, D: tl.constexpr):
    head, block = place(tl.program_id(0), blocks, heads, length, D, True)
    tl.store(out_ptr + head * blocks + block, tl.program_id(0))


@pytest.mark.parametrize("length", [64, 2**15, 2**17, 2**20])
def test_every_block_of_every_head_has_a_program(length):
    """Also where the keys of the heads fill the L2 cache and heads go in waves, the last of them smaller."""
    heads, blocks = 19, 3
    programs = torch.full((heads, blocks), -1, dtype=torch.int32)
    with interpreting():
        places_kernel[(heads * blocks,)](programs, blocks, heads, length, D=16)
    assert torch.equal(programs.flatten().sort().values, torch.arange(heads * blocks, dtype=torch.int32))


@pytest.mark.parametrize("function", [attention_reference, interpreted], ids=["reference", "kernel"])
@pytest.mark.parametrize("T, S", [(0, 0), (0, 5), (5, 0)])
def test_nothing_to_attend(function, T, S):
    out, lse, dq, dk, dv = results(function, *qkv(T, S), return_lse=True)
    assert out.shape == dq.shape == (1, T, 2, 16) and dk.shape == dv.shape == (1, S, 2, 16)
    assert not out.any() and not dq.any() and not dk.any() and not dv.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("features", [dict(window=0), dict(cu_seqlens=torch.arange(38))], ids=["window 0", "length 1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_sees_itself_alone_gives_its_value(features, dtype):
    """The gradients of q and k are then 0 but for rounding: each score's is the difference of two equal fp32 sums."""
    q, k, v = qkv(37, 37, dtype=dtype)
    out, dq, dk, dv = results(interpreted, q, k, v, causal=False, **features)
    assert torch.equal(out, v)
    assert max(dq.abs().max(), dk.abs().max()) < 20 * torch.finfo(torch.float32).eps * v.abs().max() * k.abs().max()
    assert torch.equal(dv, results(attention_reference, q, k, v, causal=False, **features)[3])


def test_a_window_as_long_as_the_sequence_changes_nothing():
    q, k, v = qkv(45, 45)
    for causal in (True, False):
        plain = results(interpreted, q, k, v, causal=causal)
        for a, b in zip(plain, results(interpreted, q, k, v, causal=causal, window=45), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_attended_one_by_one(causal):
    starts = [0, 0, 1, 6, 40, 41]
    q, k, v = qkv(41, 41)
    packed = interpreted(q, k, v, causal=causal, cu_seqlens=torch.tensor(starts))
    for lo, hi in itertools.pairwise(starts):
        alone = interpreted(q[:, lo:hi], k[:, lo:hi], v[:, lo:hi], causal=causal)
        torch.testing.assert_close(packed[:, lo:hi], alone, rtol=1e-5, atol=1e-6)


def test_keys_past_two_to_the_31_elements():
    """The third sequence of the batch lies 2^31 elements behind the first; only pages touched are allocated."""
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    q, k, v = qkv(5, 20, B=3, H=1, G=1, dtype=torch.bfloat16)
    k_far = far.as_strided(k.shape, (2**30, 16, 16, 1))
    k_far.copy_(k)
    assert torch.equal(interpreted(q, k_far, v), interpreted(q, k, v))


# ---- dropout


def dropped(function, H: int, T: int, S: int, dropout: float, seed: int | None, direction: str) -> Tensor:
    """(H, T, S): the weights that are not zero, seen through values, or gradients, that are unit vectors."""
    q, k = torch.zeros(1, T, H, max(T, S)), torch.zeros(1, S, H, max(T, S))
    unit = torch.eye(max(T, S))[None, :, None, :].expand(-1, -1, H, -1)
    v = unit[:, :S].clone().requires_grad_()
    out = function(q, k, v, causal=False, dropout=dropout, seed=seed)
    if direction == "forward":
        return out[0, :, :, :S].transpose(0, 1).detach()
    (dv,) = torch.autograd.grad(out, v, unit[:, :T])
    return dv[0, :, :, :T].permute(1, 2, 0)


@pytest.mark.parametrize("seed", [0, 1, -7, 2**62 + 12345])
def test_dropout_is_the_same_mask_forward_and_backward_and_in_the_reference(seed):
    H, T, S = 2, 19, 37
    forward, backward = (dropped(interpreted, H, T, S, 0.4, seed, d) for d in ("forward", "backward"))
    assert torch.equal(forward > 0, backward > 0)
    assert torch.equal(forward > 0, dropped(attention_reference, H, T, S, 0.4, seed, "forward") > 0)
    torch.testing.assert_close(forward[forward > 0], torch.full_like(forward[forward > 0], 1 / (S * 0.6)))


def test_dropout_keeps_its_share_and_its_mean():
    """Within three standard deviations, over positions and over seeds; no two heads, rows or seeds alike."""
    H, T, S, rate = 4, 64, 64, 0.3
    kept = torch.stack(
        [dropout.undropped(s, rate, H, range(T), range(S), torch.device("cpu")) for s in range(20)]
    ).double()
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 3 * sigma / kept.numel() ** 0.5
    for axes in (
        (0, 1, 2),
        (0, 1, 3),
        (0, 2, 3),
        (1, 2, 3),
    ):  # keys, queries, heads, seeds: 4.5 sigma, since there are many
        shares = kept.mean(axes)
        assert (shares - (1 - rate)).abs().max() < 4.5 * sigma / (kept.numel() / shares.numel()) ** 0.5
    rows = kept.view(-1, S)
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_philox_gives_its_published_numbers(monkeypatch):
    """The known answers of Random123 for philox4x32 in 7 rounds: counter and key 0 give 5f6fb709."""
    for bits, expected in ((0x5F6FB709, True), (0x5F6FB709 + 2, False)):
        monkeypatch.setattr(dropout, "dropout_threshold", lambda _, bits=bits: bits >> 1)
        assert dropout.undropped(0, 0.5, 1, range(1), range(1), torch.device("cpu")).item() is expected


def test_dropout_without_a_seed_follows_torch():
    q, k, v = qkv(9, 9)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(interpreted(q, k, v, dropout=0.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# ---- what is allocated, launched and compiled


class Allocations(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(
    "features", [dict(), dict(window=9), dict(dropout=0.1), dict(cu_seqlens=torch.tensor([0, 9, 512]))], ids=str
)
def test_the_kernel_path_has_no_tensor_of_queries_by_keys(features):
    T, H, D = 512, 2, 16
    q, k, v = qkv(T, T, H=H, D=D)
    with Allocations() as allocations, launching(skip):
        results(attention_triton, q, k, v, return_lse=True, **features)
    assert T * H * D <= allocations.largest <= 2 * T * H * D < T * T


def test_a_window_on_a_cpu_has_no_tensor_of_queries_by_keys():
    T, window = 2048, 16
    q, k, v = qkv(T, T, H=1, G=1)
    with Allocations() as allocations:
        results(attention_cpu, q, k, v, window=window)
    assert allocations.largest <= T * 2 * (window + cpu.FEWEST_AT_ONCE) < T * T


@pytest.mark.parametrize("arch", [80, 90])
def test_a_fused_projection_is_read_in_place(arch):
    whole = torch.randn(2, 33, 8, 64, dtype=torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in whole.split((4, 2, 2), dim=2))
    calls = []
    with launching(Launcher(lambda kernel, grid, *args, **kwargs: calls.append(args[:3]), arch, gluon=False)):
        out = attention_triton(q, k, v)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert len(calls) == 3
    for operands in calls:
        addresses = [getattr(x, "base", x).data_ptr() for x in operands]
        assert addresses == [x.data_ptr() for x in (q, k, v)]
    assert out.is_contiguous()


@pytest.mark.parametrize(
    "arch, gluon, D, features",
    [(80, True, 64, {}), (90, False, 64, {}), (90, True, 64, {}), (90, True, 128, {}), (90, True, 64, dict(window=3))],
    ids=str,
)
def test_a_projection_is_read_in_place_and_so_is_its_gradient_written(arch, gluon, D, features):
    """By all kernels, forward and backward: none reads or writes q, k, v or a gradient of theirs anywhere else."""
    whole, split = torch.randn(2, 33, 6, D, dtype=torch.bfloat16).requires_grad_(), (2, 2, 2)
    given: dict[str, set[int]] = {}

    def note(kernel, grid, *args, **kwargs):
        for name, x in zip(kernel.arg_names, args, strict=False):
            base = getattr(x, "base", x)
            if isinstance(base, Tensor):
                given.setdefault(re.sub("_(ptr|out)$", "", name), set()).add(base.data_ptr())

    with launching(Launcher(note, arch, gluon=gluon)):
        out = attention_triton(whole, heads=2, **features)
        (gradient,) = torch.autograd.grad(out, whole, torch.ones_like(out))
    for name, x in zip(("q", "k", "v"), whole.split(split, dim=2), strict=True):
        assert given[name] == {x.data_ptr()}, name
    for name, x in zip(("dq", "dk", "dv"), gradient.split(split, dim=2), strict=True):
        assert given[name] == {x.data_ptr()}, name
    assert gradient.is_contiguous() and gradient.shape == whole.shape


@pytest.mark.parametrize("features", [dict(), dict(window=4, dropout=0.3, seed=2, return_lse=True)], ids=str)
def test_a_projection_gives_the_bits_of_its_slices(features):
    """On every path, so that a model may take either."""
    x = qkv(21, 21, B=2, H=4)
    for function in (interpreted, attention_cpu, attention_reference):
        apart, whole = (results(f, *x, **features) for f in (function, in_one(function)))
        assert all(torch.equal(a, b) for a, b in zip(apart, whole, strict=True))


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40])
def test_a_window_may_be_larger_than_any_position(window):
    """Without a sum of it and a position that passes int32."""
    x = qkv(40, 40)
    for found, expected in zip(results(interpreted, *x, window=window), results(interpreted, *x), strict=True):
        torch.testing.assert_close(found, expected)


def test_torch_checks_the_operator_of_a_projection():
    whole = torch.randn(2, 5, 4, 8, requires_grad=True)
    arguments = (whole, None, None, 2, None, None, True, -1, 0.3, 0.0, 0.0, False, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.gptfast.attention.default, arguments, test_utils=checks)


def test_one_graph_serves_projections_of_many_sizes():
    """With the values of eager, forward and backward."""
    torch._dynamo.reset()
    graphs, made = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(interpreted, fullgraph=True, dynamic=True, backend=graphs)
    for B, T in ((2, 5), (3, 7)):
        x = qkv(T, T, B=B, G=1)
        found, expected = (results(in_one(f), *x, window=3) for f in (compiled, interpreted))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        made.append(graphs.frame_count)
    assert made[0] == made[-1]


def test_compiled_with_every_feature():
    """One graph, the values of eager, and dropout that draws its own seed inside the graph."""
    q, k, v = qkv(11, 11, H=2, G=1)
    documents = torch.tensor([0, 4, 11])

    def both(q, k, v, dropout):
        return interpreted(q, k, v, window=5, softcap=2.0, cu_seqlens=documents, dropout=dropout, return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        results(compiled, q, k, v, dropout=0.0), results(both, q, k, v, dropout=0.0), strict=True
    ):
        torch.testing.assert_close(found, expected)
    out, _ = compiled(q, k, v, 0.5)
    assert out.isfinite().all() and not torch.equal(out, compiled(q, k, v, 0.5)[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(3, 4, 8)), "q: expected (B, T, H, D)"),
        (dict(q=torch.zeros(1, 3, 4, 8, dtype=torch.int32)), "q: expected a floating dtype"),
        (dict(k=torch.zeros(1, 5, 2, 16)), "k: expected (B, S, G, D)"),
        (dict(k=torch.zeros(1, 5, 3, 8)), "k: its 3 heads do not divide the 4 heads of q"),
        (dict(v=torch.zeros(1, 6, 2, 8)), "v: expected the shape of k"),
        (dict(v=torch.zeros(1, 5, 2, 8).half()), "v: torch.float16, but q is torch.float32"),
        (dict(k=torch.zeros(1, 5, 2, 8, device="meta")), "k: on meta"),
        (dict(k=None), "k: expected a tensor, got None"),
        (dict(heads=2), "k, v: with heads, q is the projection of all three"),
        (dict(k=None, v=None, heads=3), "heads: expected H of the H + 2 G = 4 in q, where G divides H; got 3"),
        (dict(k=None, v=None, heads=0), "heads: expected H of the H + 2 G = 4"),
        (dict(k=None, v=None, heads=4), "heads: expected H of the H + 2 G = 4"),
        (dict(q=torch.zeros(1, 3, 7, 8), k=None, v=None, heads=3), "heads: expected H of the H + 2 G = 7"),
        (dict(window=-1), "window: expected"),
        (dict(dropout=0.5, seed=1.5), "seed: expected a whole number"),
        (dict(scale=0.0), "scale: expected a positive number"),
        (dict(softcap=-2.0), "softcap: expected a positive number"),
        (dict(dropout=1.0), "dropout: expected a probability"),
        (dict(cu_seqlens=torch.tensor([0, 3])), "cu_seqlens: packed documents need T = S"),
        (dict(q=torch.zeros(1, 5, 4, 8), cu_seqlens=torch.tensor([0.0, 5.0])), "cu_seqlens: expected (N + 1,) int32"),
        (dict(q=torch.zeros(1, 5, 4, 8), cu_seqlens=torch.tensor([0, 3, 2, 5])), "cu_seqlens: expected increasing"),
        (dict(q=torch.zeros(1, 5, 4, 8), cu_seqlens=torch.tensor([0, 4])), "cu_seqlens: expected increasing"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("function", [attention_reference, interpreted], ids=["reference", "kernel"])
def test_wrong_arguments_are_named(function, change, message):
    arguments = dict(q=torch.zeros(1, 3, 4, 8), k=torch.zeros(1, 5, 2, 8), v=torch.zeros(1, 5, 2, 8))
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**{**arguments, **change})


@pytest.mark.parametrize(
    "x, message", [(qkv(2, 2, D=257), "q: head dims up to 256"), (qkv(2, 2, dtype=torch.float64), "q: expected fp32")]
)
def test_what_only_the_reference_takes(x, message):
    attention_reference(*x)
    with pytest.raises(ValueError, match=message):
        interpreted(*x)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize(
    "features", [dict(), dict(window=200), dict(softcap=20.0, causal=False), dict(dropout=0.1, seed=1)], ids=str
)
def test_features_on_the_gpu(D, features):
    q, k, v = (x.cuda() for x in qkv(1031, 1031, B=2, H=4, G=2, D=D, dtype=torch.bfloat16))
    for function in (attention_triton, in_one(attention_triton)):
        check(q, k, v, function, **features)


def test_a_result_that_nobody_uses_costs_the_backward_nothing():
    q, k, v = (x.requires_grad_() for x in qkv(19, 19))
    for used, has_dlse in ((0, False), (1, True)):
        launches = []
        with launching(Launcher(lambda kernel, grid, *args, launches=launches, **flags: launches.append(flags))):
            torch.autograd.grad(attention_triton(q, k, v, return_lse=True)[used].sum(), q)
        assert [flags["HAS_DLSE"] for flags in launches if "HAS_DLSE" in flags] == [has_dlse]
        found, expected = (
            torch.autograd.grad(function(q, k, v, return_lse=True)[used].square().sum(), (q, k), allow_unused=True)
            for function in (interpreted, attention_reference)
        )
        torch.testing.assert_close(found, expected)
