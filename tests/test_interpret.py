"""The interpreter under the parity tests: bf16 bit for bit as torch, and a guard that sees what no GPU forgives."""

import numpy as np
import pytest
import torch

from kernels._triton import jit, launcher, tl
from kernels.prims import await_inputs, early_launch, prefetch_rows
from kernels.proof.interpret import Early, OutOfBounds, Overflow, Race, from_bf16, interpreting, to_bf16


def patterns() -> torch.Tensor:
    """Every fp32 exponent with random mantissas and signs, ties between bf16 values, subnormals, zeros, Inf, NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(0, 65536, dtype=torch.int64) << 16 | 0x8000).to(torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-45])
    return torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])


def test_rounding_to_bf16_is_torchs_bit_for_bit():
    x = patterns()
    expected = x.to(torch.bfloat16)
    found = torch.from_numpy(to_bf16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int16), expected[~nan].view(torch.int16))


def test_widening_bf16_is_exact():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    found = torch.from_numpy(from_bf16(every.view(torch.int16).numpy().view(np.uint16)))
    assert torch.equal(found.nan_to_num(7.0), every.float().nan_to_num(7.0))


@jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, N, OP: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: out = x OP y in the dtype of the operands."""
    n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + n, n < N, other=0.0)
    y = tl.load(y_ptr + n, n < N, other=1.0)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "max":
        z = tl.maximum(x, y)
    elif OP == "neg":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "where":
        z = tl.where(x < y, x, y)
    else:
        z = (x.to(tl.float32) / y.to(tl.float32)).to(x.dtype)
    tl.store(out_ptr + n, z, n < N)


@pytest.mark.parametrize("name, expected", [
    ("add", torch.add), ("sub", torch.sub), ("mul", torch.mul), ("max", torch.maximum), ("neg", lambda x, y: -x),
    ("abs", lambda x, y: x.abs()), ("where", lambda x, y: torch.where(x < y, x, y)),
    ("div", lambda x, y: (x.float() / y.float()).to(x.dtype)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_torchs(name, expected, dtype):
    x, y = torch.randn(2, 1000).mul(30).to(dtype).unbind()
    out = torch.empty_like(x)
    with interpreting():
        _arithmetic_kernel[(1,)](x, y, out, 1000, OP=name, BLOCK_N=1024)
    assert torch.equal(out, expected(x, y))


@jit
def _product_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    """One program: out = a @ b, BLOCK by BLOCK, and the sum of a bf16 row beside it."""
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)))


def test_bf16_dot_accumulates_in_fp32():
    a, b = torch.randn(2, 32, 32).bfloat16().unbind()
    out = torch.empty(32, 32)
    with interpreting():
        _product_kernel[(1,)](a, b, out, BLOCK=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@jit
def _loop_kernel(out_ptr, N):
    """One program: i * 2^31 of the last i < N, in the loop variable's own type."""
    last = 0
    for i in tl.range(0, N):
        last = i * 1073741824 * 2
    tl.store(out_ptr, last)


def test_loop_variables_are_int32_tensors():
    out = torch.zeros(1, dtype=torch.int64)
    with interpreting():
        _loop_kernel[(1,)](out, 1)
        with pytest.raises(Overflow):  # a Python integer would have given 2^31
            _loop_kernel[(1,)](out, 2)


@jit
def _copy_kernel(x_ptr, out_ptr, N, OVER: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program copies BLOCK_N elements, and reads OVER more than there are."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + n, tl.load(x_ptr + n, n < N + OVER, other=0.0), n < N)


@jit
def _careless_kernel(x_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    """Every program writes the same block."""
    n = tl.arange(0, BLOCK_N)
    tl.store(out_ptr + n, tl.load(x_ptr + n, n < N), n < N)


@jit
def _chained_kernel(x_ptr, BLOCK_N: tl.constexpr):
    """Each program reads what the one before it wrote: right in order, undefined on a GPU."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(x_ptr + n + BLOCK_N, tl.load(x_ptr + n) + 1)


@jit
def _counting_kernel(count_ptr):
    """Every program adds one to the same address, atomically."""
    tl.atomic_add(count_ptr, 1.0)


def test_guard_passes_a_right_kernel():
    x, out = torch.randn(100), torch.empty(100)
    with interpreting():
        _copy_kernel[(2,)](x, out, 100, OVER=0, BLOCK_N=64)
    assert torch.equal(x, out)


def test_tensors_of_another_device_are_refused():
    class OnGPU(torch.Tensor):
        device = torch.device("cuda", 0)

    x = torch.randn(100)
    with interpreting(), pytest.raises(ValueError, match=r"_copy_kernel: .* CPU tensors, one is on cuda:0"):
        _copy_kernel[(2,)](x, x.as_subclass(OnGPU), 100, OVER=0, BLOCK_N=64)


def test_guard_sees_one_element_too_many():
    x, out = torch.randn(101)[:100], torch.empty(100)  # the storage is long enough: the view is not
    with (
        interpreting(),
        pytest.raises(OutOfBounds, match=r"_copy_kernel: load out of bounds in program .1, 0, 0.: 1 of"),
    ):
        _copy_kernel[(2,)](x, out, 100, OVER=1, BLOCK_N=64)


@jit
def _scalar_mask_kernel(x_ptr, N, BLOCK_N: tl.constexpr):
    n = tl.arange(0, BLOCK_N)
    tl.store(x_ptr + n, n.to(tl.float32), tl.program_id(0) < N)


def test_guard_sees_every_address_under_a_condition_of_one_number():
    with interpreting(), pytest.raises(OutOfBounds, match="28 of 128 lanes"):
        _scalar_mask_kernel[(1,)](torch.zeros(100), 1, BLOCK_N=128)
    with interpreting():
        _scalar_mask_kernel[(1,)](torch.zeros(100), 0, BLOCK_N=128)


def test_guard_sees_two_programs_storing_to_one_address():
    with interpreting(), pytest.raises(Race, match="both store"):
        _careless_kernel[(2,)](torch.randn(64), torch.empty(64), 64, BLOCK_N=64)


def test_guard_sees_a_program_reading_what_another_wrote():
    with interpreting(), pytest.raises(Race, match="the first with a load"):
        _chained_kernel[(3,)](torch.zeros(256), BLOCK_N=64)


@jit
def _last_sums_kernel(parts_ptr, count_ptr, out_ptr, P, BARRIER: tl.constexpr, SEM: tl.constexpr):
    """Each program stores its part; the last one to finish sums them all, and makes the count 0 again."""
    tl.store(parts_ptr + tl.program_id(0), tl.program_id(0).to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem=SEM) == P - 1:
        p = tl.arange(0, 8)
        tl.store(out_ptr, tl.sum(tl.load(parts_ptr + p, p < P, other=0.0), axis=0))
        tl.atomic_xchg(count_ptr, 0)


def test_guard_lets_the_last_program_read_what_the_others_released():
    parts, count, out = torch.empty(5), torch.zeros(1, dtype=torch.int32), torch.empty(1)
    with interpreting():
        for _ in range(2):
            _last_sums_kernel[(5,)](parts, count, out, 5, BARRIER=True, SEM="acq_rel")
            assert out.item() == 10 and count.item() == 0


@pytest.mark.parametrize("without", [dict(BARRIER=False, SEM="acq_rel"), dict(BARRIER=True, SEM="relaxed")], ids=str)
def test_guard_sees_a_read_of_what_was_not_released(without):
    parts, count, out = torch.empty(5), torch.zeros(1, dtype=torch.int32), torch.empty(1)
    with interpreting(), pytest.raises(Race, match="the first with a load"):
        _last_sums_kernel[(5,)](parts, count, out, 5, **without)


def test_guard_lets_atomics_meet():
    count = torch.zeros(1)
    with interpreting():
        _counting_kernel[(5,)](count)
    assert count.item() == 5


@jit
def _early_kernel(
    x_ptr, out_ptr, N, K, PDL: tl.constexpr, READS: tl.constexpr, WAITS: tl.constexpr, ROWS: tl.constexpr
):
    """One program: out[n] = x[n, 0], after rows were brought nearer."""
    n = tl.arange(0, 8)
    if READS:
        tl.load(x_ptr + n * K, n < N)
    if PDL:
        prefetch_rows(x_ptr, K, tl.program_id(0) * 8, ROWS, K, 8, 1)
    if WAITS:
        await_inputs(PDL)
        tl.store(out_ptr + n, tl.load(x_ptr + n * K, n < N), n < N)


@pytest.mark.parametrize("K", [1, 40, 300])
def test_a_kernel_launched_early_prefetches_and_waits(K):
    x, out = torch.randn(7, K), torch.empty(7)
    with interpreting():
        _early_kernel[(1,)](x, out, 7, K, READS=False, WAITS=True, ROWS=7, **early_launch(True))
    assert torch.equal(out, x[:, 0])


def test_guard_sees_what_a_kernel_does_too_early():
    x, out, early = torch.randn(7, 40), torch.empty(7), early_launch(True)
    with interpreting():
        with pytest.raises(Early, match="before it waits"):
            _early_kernel[(1,)](x, out, 7, 40, READS=True, WAITS=True, ROWS=7, **early)
        with pytest.raises(Early, match="never waits"):
            _early_kernel[(1,)](x, out, 7, 40, READS=False, WAITS=False, ROWS=7, **early)
        with pytest.raises(OutOfBounds, match="prefetch out of bounds"):
            _early_kernel[(1,)](x, out, 7, 40, READS=False, WAITS=True, ROWS=8, **early)
        _early_kernel[(1,)](x, out, 7, 40, READS=True, WAITS=True, ROWS=7, **early_launch(False))


@jit
def _assembly_kernel(x_ptr):
    tl.inline_asm_elementwise("mov.b32 $0, %clock; // $1", "=r,r", [tl.load(x_ptr)], tl.int32, False, 1)


def test_an_instruction_that_the_interpreter_does_not_know_is_refused():
    with interpreting(), pytest.raises(NotImplementedError, match="does not know the instruction: mov"):
        _assembly_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


@jit
def _counting_past_int32_kernel(out_ptr, N, OP: tl.constexpr):
    n = N
    if OP == "add":
        n = N + N
    elif OP == "sub":
        n = -N - N
    elif OP == "mul":
        n = N * N
    tl.store(out_ptr, n)


@pytest.mark.parametrize(("op", "most"), [("add", 2**30 - 1), ("sub", 2**30), ("mul", 46340)])
def test_integers_that_do_not_fit_are_an_error(op, most):
    out = torch.zeros(1, dtype=torch.int64)
    with interpreting():
        _counting_past_int32_kernel[(1,)](out, most, OP=op)
        with pytest.raises(Overflow, match="int32"):
            _counting_past_int32_kernel[(1,)](out, most + 1, OP=op)
        _counting_past_int32_kernel[(1,)](out, 2**40, OP="add")  # int64 from the start


def test_an_error_leaves_the_language_and_the_launcher_as_they_were():
    members = {name: getattr(tl.core, name) for name in ("load", "store", "arange", "range")}
    with pytest.raises(OutOfBounds), interpreting():
        _copy_kernel[(2,)](torch.randn(100), torch.empty(100), 100, OVER=1, BLOCK_N=64)
    assert launcher() is None
    assert members == {name: getattr(tl.core, name) for name in members}
