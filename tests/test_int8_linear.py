"""The 8-bit linear map: quantization, which kernel runs, layouts, edges, beside the generic tests of test_parity.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import DTYPES, relative_error
from torch import Tensor

from bench.peers import PEERS
from kernels._triton import Launcher, launching
from kernels.int8_linear import (
    FEW_ROWS,
    INT8_LINEAR,
    MOST_ROWS,
    cost,
    inputs,
    int8_linear_reference,
    int8_linear_triton,
    quantize,
)
from kernels.proof.interpret import interpreting

H100 = 132  # multiprocessors
FEW, MANY = 3, 20  # rows of x, for the one kernel and for the other
each_kernel = pytest.mark.parametrize("M", [FEW, MANY], ids=["rows", "tiles"])


def interpreted(*arguments: Any, arch: int = 0, multiprocessors: int = 1) -> Tensor:
    with interpreting(arch=arch, multiprocessors=multiprocessors):
        return int8_linear_triton(*arguments)


def doubled(arguments: tuple) -> list:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def check(*arguments: Any, **gpu: int) -> None:
    """The error rule of tests/oracle.py, for any GPU's tiles."""
    found, same = interpreted(*arguments, **gpu), int8_linear_reference(*arguments)
    truth = int8_linear_reference(*doubled(arguments))
    assert found.shape == same.shape and found.dtype == same.dtype
    error, bound = relative_error(found, truth), 2 * relative_error(same, truth) + torch.finfo(found.dtype).eps
    assert error <= bound, f"error {error:.2e}, allowed {bound:.2e}"


# ---- quantization


@pytest.mark.parametrize("magnitude", [1e-40, 1e-20, 1.0, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_quantize_is_off_by_half_a_step_at_most(dtype, magnitude):
    """Whatever the magnitude, subnormal numbers included; the bound is reached, or steps could be finer."""
    weight = (torch.rand(9, 301, dtype=torch.float64) * 2 - 1).mul(magnitude).to(dtype)
    q, scale = quantize(weight)
    assert q.dtype == torch.int8 and q.shape == weight.shape and q.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (9,) and (scale > 0).all()
    off = (scale.double()[:, None] * q.double() - weight.double()).abs() / scale.double()[:, None]
    assert off.max() <= 0.5 + 127 * torch.finfo(torch.float32).eps
    assert off.max() > 0.45 or magnitude < 1e-38
    tiny = torch.finfo(torch.float32).tiny
    assert (scale <= (weight.abs().amax(dim=1).float() / 127).clamp(min=tiny)).all()  # no step coarser than it must be
    assert q.min() >= -127


def test_quantize_gives_each_row_its_own_scale():
    """The largest of a row becomes 127 or -127, and scale is its 127th part in fp32, not rounded to fewer bits."""
    weight = torch.randn(6, 50) * torch.logspace(-6, 6, 6)[:, None]
    q, scale = quantize(weight)
    largest, at = weight.abs().max(dim=1)
    assert torch.equal(scale, largest / 127)
    assert torch.equal(q[range(6), at].float(), 127 * weight[range(6), at].sign())
    assert not torch.equal(scale, scale.bfloat16().float())
    turned, turned_scale = quantize(weight.t().contiguous().t())
    assert torch.equal(turned, q) and torch.equal(turned_scale, scale) and turned.is_contiguous()


@each_kernel
def test_a_row_of_zeros_stays_zero(M):
    weight = torch.randn(5, 40)
    weight[2] = 0
    q, scale = quantize(weight)
    assert (q[2] == 0).all() and scale[2] > 0 and scale.isfinite().all()
    y = interpreted(torch.randn(M, 40), q, scale)
    assert (y[:, 2] == 0).all() and (y[:, [0, 1, 3, 4]] != 0).all()


def test_quantize_refuses_what_has_no_scale():
    for value in (torch.nan, torch.inf, -torch.inf):
        weight = torch.randn(4, 5)
        weight[3, 1] = weight[1, 4] = value
        with pytest.raises(ValueError, match="weight: row 1 holds NaN or Inf"):
            quantize(weight)
    with pytest.raises(ValueError, match="weight: row 0 holds"):
        quantize(torch.tensor([[1e300]], dtype=torch.float64))
    for wrong in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="weight: expected"):
            quantize(wrong)
    q, scale = quantize(torch.zeros(0, 3))
    assert q.shape == (0, 3) and scale.shape == (0,)


def test_the_product_is_that_of_the_matrix_that_was_quantized():
    """Within what half a step per element allows: |dy| <= sum_k |x[k]| * scale / 2."""
    weight, x, bias = torch.randn(20, 768).double(), torch.randn(2, 768).double(), torch.randn(20).double()
    q, scale = quantize(weight)
    off = (int8_linear_reference(x, q, scale, bias) - (x @ weight.t() + bias)).abs()
    bound = x.abs().sum(dim=1)[:, None] * scale.double() / 2
    assert (off <= bound).all() and (off > 1e-3 * bound).any()


# ---- which kernel runs


def launches(
    M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16, arch: int = 90
) -> list[tuple[str, int, dict]]:
    """(kernel, programs, constants) of each launch on an H100."""
    found: list[tuple[str, int, dict]] = []

    def record(kernel, grid, *_, **constants) -> None:
        found.append((kernel.__name__.removeprefix("int8_linear_fwd_kernel_"), grid[0], constants))

    with launching(Launcher(record, arch, H100)):
        int8_linear_triton(*inputs(M, N, K, dtype=dtype, device="meta")[0])
    return found


@pytest.mark.parametrize("M, N, dtype, kernel", [
    (1, 768, torch.bfloat16, "rows"), (1, 50304, torch.bfloat16, "rows"), (FEW_ROWS, 50304, torch.float16, "rows"),
    (FEW_ROWS + 1, 50304, torch.bfloat16, "tiles"), (FEW_ROWS + 1, 64 * H100 - 64, torch.bfloat16, "rows"),
    (FEW_ROWS + 1, 64 * H100 - 63, torch.bfloat16, "tiles"), (MOST_ROWS, 768, torch.bfloat16, "rows"),
    (MOST_ROWS + 1, 768, torch.bfloat16, "tiles"), (MOST_ROWS, 50304, torch.float32, "rows"),
    (MOST_ROWS + 1, 768, torch.float32, "tiles"), (1024, 768, torch.float16, "tiles"),
])  # fmt: skip
def test_few_rows_go_row_by_row_and_more_by_tiles(M, N, dtype, kernel):
    assert [name for name, _, _ in launches(M, N, 768, dtype)] == [kernel]


@pytest.mark.parametrize("N", [768, 1600, 2304, 3072, 4800, 6400, 50304])
@pytest.mark.parametrize("M", range(1, MOST_ROWS + 1))
def test_one_token_fills_the_gpu(M, N):
    """Two programs on each multiprocessor at least, at every width of a GPT-2; no more sums to a lane than fit."""
    for name, programs, constants in launches(M, N, 768):
        if name == "rows":
            assert programs >= 2 * H100 and programs * constants["ROWS"] >= N
            assert M * constants["ROWS"] <= 2 ** constants["LEVELS"] <= 16


@pytest.mark.parametrize("K, warps", [(1, 1), (512, 1), (513, 2), (768, 2), (1600, 4), (6400, 4)])
def test_warps_share_a_row_as_long_as_there_is_something_to_share(K, warps):
    ((_, _, constants),) = launches(1, 768, K)
    assert constants["num_warps"] == warps and constants["BLOCK_K"] == 512 * warps


def test_tiles_are_wide_where_these_fill_the_gpu():
    """And as high as x needs, down to 16."""
    for M, N, block_m, block_n in ((9, 768, 16, 64), (33, 50304, 64, 64), (1024, 768, 64, 64), (1024, 6400, 128, 128)):
        ((_, programs, constants),) = launches(M, N, 768)
        assert (constants["BLOCK_M"], constants["BLOCK_N"]) == (block_m, block_n)
        assert programs == -(-M // block_m) * -(-N // block_n)


# ---- the kernels


@pytest.mark.parametrize("multiprocessors", [1, 6, 16])
@pytest.mark.parametrize("M", range(1, MOST_ROWS + 1))
def test_every_number_of_few_rows(M, multiprocessors):
    """By four, two and one row of the matrix at once."""
    check(*inputs(M, 35, 600, dtype=torch.float32)[0], multiprocessors=multiprocessors)
    check(*inputs(M, 35, 33, dtype=torch.bfloat16)[0], arch=90, multiprocessors=multiprocessors)


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
@pytest.mark.parametrize("M", [9, 17, 70])
def test_tiles_of_every_architecture(M, arch):
    for N, K, dtype, multiprocessors in ((67, 200, torch.bfloat16, 1), (130, 33, torch.float16, 100)):
        check(*inputs(M, N, K, dtype=dtype)[0], arch=arch, multiprocessors=multiprocessors)


@pytest.mark.parametrize("M, N", [(20, 1100), (300, 600), (130, 1030)])
def test_more_tiles_than_a_group(M, N):
    check(*inputs(M, N, 16, dtype=torch.float32)[0])
    check(*inputs(M, N, 16, dtype=torch.bfloat16)[0], arch=90)


@each_kernel
@pytest.mark.parametrize("K", [1, 8, 15, 16, 17, 511, 512, 513, 2048, 2049])
def test_any_length_of_a_row(M, K):
    """One past a lane's 16 numbers, a half of them, a warp's, a program's; memory past the end holds NaN."""
    x, weight, scale, bias = inputs(M, 5, K, dtype=torch.float32)[0]
    fenced = torch.full((M, K + 16), torch.nan)
    fenced[:, :K] = x
    check(fenced[:, :K], weight, scale, bias)


@each_kernel
def test_bias_may_be_absent_or_of_another_dtype(M):
    x, weight, scale, bias = inputs(M, 33, 70, dtype=torch.bfloat16)[0]
    assert torch.equal(interpreted(x, weight, scale), interpreted(x, weight, scale, torch.zeros(33)))
    for dtype in DTYPES:
        check(x, weight, scale, bias.to(dtype))
    ones, fine = torch.ones(M, 16, dtype=torch.bfloat16), torch.full((5,), 1 + 2**-8)
    y = interpreted(ones, torch.ones(5, 16, dtype=torch.int8), torch.full((5,), 2.0**-13), fine)
    assert (y == 1 + 2**-7).all()  # of 1 + 2^-8 + 2^-9; a bias rounded to bf16 before the sum would give 1


@each_kernel
def test_the_scale_comes_after_the_sum(M):
    """A sum far beyond fp16 is scaled back into it, exactly: nothing is rounded on the way."""
    x, weight = torch.full((M, 100), 512.0, dtype=torch.float16), torch.full((7, 100), 127, dtype=torch.int8)
    y = interpreted(x, weight, torch.full((7,), 2.0**-10))
    assert torch.equal(y, torch.full((M, 7), 127 * 50.0, dtype=torch.float16))


@each_kernel
def test_every_byte_is_a_number(M):
    weight = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)[:, None].repeat(1, 16)
    y = interpreted(torch.ones(M, 16), weight, torch.ones(256))
    assert torch.equal(y, torch.arange(-128, 128).mul(16.0).expand(M, 256))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_kernel
def test_nan_stays_in_its_row(M, value):
    x, weight, scale, bias = inputs(M, 70, 100, dtype=torch.float16)[0]
    clean = interpreted(x, weight, scale, bias)
    x[1, 37] = value
    y = interpreted(x, weight, scale, bias)
    assert not y[1, weight[:, 37] != 0].isfinite().any()
    others = [m for m in range(M) if m != 1]
    assert torch.equal(y[others], clean[others])


@each_kernel
def test_nan_in_scale_or_bias_stays_in_its_column(M):
    x, weight, scale, bias = inputs(M, 70, 100, dtype=torch.float32)[0]
    scale[3], bias[66] = torch.nan, torch.inf
    finite = interpreted(x, weight, scale, bias).isfinite()
    assert not finite[:, [3, 66]].any() and finite.sum() == M * 68


def test_no_rows_and_no_columns():
    for function in (int8_linear_reference, interpreted):
        x, weight, scale, bias = inputs(0, 5, 7, dtype=torch.bfloat16)[0]
        assert function(x, weight, scale, bias).shape == (0, 5)
        assert function(x.view(2, 0, 7), weight, scale, bias).shape == (2, 0, 5)
        x, weight, scale, bias = inputs(3, 0, 7, dtype=torch.bfloat16)[0]
        assert function(x, weight, scale, bias).shape == (3, 0)
    assert launches(0, 5, 7) == launches(3, 0, 7) == []  # a GPU refuses a launch of no programs


@pytest.mark.parametrize("function", [int8_linear_reference, interpreted])
def test_axes_before_the_last_are_kept(function):
    x, weight, scale, bias = inputs(24, 11, 33, dtype=torch.float32)[0]
    y = function(x, weight, scale, bias)
    assert torch.equal(function(x.view(2, 3, 4, 33), weight, scale, bias), y.view(2, 3, 4, 11))
    assert function(x[5], weight, scale, bias).shape == (11,)
    torch.testing.assert_close(function(x[5], weight, scale, bias), y[5])


@each_kernel
def test_rows_far_apart_are_read_in_place(M):
    """Of x and of the matrix: parts of longer rows give the same bits, and reach the kernel uncopied."""
    x, weight, scale, bias = inputs(M, 40, 50, dtype=torch.bfloat16)[0]
    expected = interpreted(x, weight, scale, bias)
    long_x, long_weight = torch.cat([x, x], 1)[:, :50], torch.cat([weight, weight], 1)[:, :50]
    assert torch.equal(interpreted(long_x, long_weight, scale, bias), expected)
    seen: list[tuple] = []
    with launching(Launcher(lambda kernel, grid, *arguments, **kwargs: seen.append(arguments))):
        int8_linear_triton(long_x, long_weight, scale, bias)
    assert [a.data_ptr() for a in seen[0][:2]] == [long_x.data_ptr(), long_weight.data_ptr()]


@each_kernel
def test_a_matrix_of_more_elements_than_32_bits_count(M):
    x, weight, scale, bias = inputs(M, 3, 20, dtype=torch.float32)[0]
    far = torch.empty(2**31 + 4096, dtype=torch.int8).as_strided((3, 20), (2**30, 1))
    far.copy_(weight)
    assert torch.equal(interpreted(x, far, scale, bias), interpreted(x, weight, scale, bias))


def test_a_token_of_a_batch_is_what_it_is_alone():
    """Bit for bit, as long as both go through the kernel of few rows: the order of a sum does not know M."""
    x, weight, scale, bias = inputs(FEW_ROWS, 33, 600, dtype=torch.bfloat16)[0]
    batch = interpreted(x, weight, scale, bias)
    for m in range(FEW_ROWS):
        assert torch.equal(interpreted(x[m : m + 1], weight, scale, bias), batch[m : m + 1])


@pytest.mark.parametrize("function", [int8_linear_reference, interpreted])
def test_no_gradient(function):
    x, weight, scale, bias = inputs(2, 5, 7, dtype=torch.float32)[0]
    assert not function(x.requires_grad_(), weight, scale.requires_grad_(), bias.requires_grad_()).requires_grad


@pytest.mark.parametrize("function", [int8_linear_reference, int8_linear_triton])
@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(())), "x: expected"), (dict(x=torch.zeros(3, 0)), "x: expected"),
    (dict(x=torch.zeros(3, 7, dtype=torch.int8)), "x: expected a floating"), (dict(x=torch.zeros(3, 8)), "weight: exp"),
    (dict(weight=torch.zeros(5, dtype=torch.int8)), "weight: expected"),
    (dict(weight=torch.zeros(5, 7, dtype=torch.uint8)), "weight: expected int8"),
    (dict(weight=torch.zeros(7, 5, dtype=torch.int8).t()), "weight: rows must be contiguous"),
    (dict(scale=torch.ones(5, 1)), "scale: expected shape"), (dict(scale=torch.ones(6)), "scale: expected shape"),
    (dict(scale=torch.ones(5).bfloat16()), "scale: expected fp32"), (dict(scale=torch.ones(5).int()), "scale: exp"),
    (dict(bias=torch.zeros(7)), "bias: expected shape"), (dict(bias=torch.zeros(5).int()), "bias: expected a floating"),
    (dict(weight=torch.zeros(5, 7, dtype=torch.int8, device="meta")), "weight: on meta"),
    (dict(scale=torch.ones(5, device="meta")), "scale: on meta"), (dict(bias=torch.ones(5, device="meta")), "bias: on"),
], ids=str)  # fmt: skip
def test_wrong_arguments_are_named(function, change, message):
    right = dict(zip(("x", "weight", "scale", "bias"), inputs(3, 5, 7, dtype=torch.float32)[0], strict=True))
    with pytest.raises(ValueError, match=f"^{message}"):
        function(**{**right, **change})


def test_fp64_is_for_the_reference():
    arguments = doubled(inputs(3, 5, 7, dtype=torch.float64)[0])
    assert int8_linear_reference(*arguments).dtype == torch.float64
    with pytest.raises(ValueError, match="x: expected fp32, fp16 or bf16"):
        int8_linear_triton(*arguments)


# ---- what is compared with it


@pytest.mark.parametrize("name", PEERS["int8_linear"])
def test_peers_do_the_same_work(name):
    arguments, peer = inputs(4, 64, 96, dtype=torch.bfloat16)[0], PEERS["int8_linear"][name].run
    truth = int8_linear_reference(*doubled(arguments))
    assert relative_error(peer(*arguments), truth) < 0.01
    assert relative_error(peer(*arguments[:3]), int8_linear_reference(*doubled(arguments[:3]))) < 0.01


@pytest.mark.parametrize("dims", INT8_LINEAR.bench, ids=str)
def test_cost_counts_every_tensor_once(dims):
    arguments = inputs(**dims, dtype=torch.bfloat16, device="meta")[0]
    found = cost(**dims, itemsize=2)[0]
    assert found.bytes == sum(a.nbytes for a in arguments if a is not None) + dims["M"] * dims["N"] * 2
    assert found.flops == 2 * dims["M"] * arguments[1].numel()
