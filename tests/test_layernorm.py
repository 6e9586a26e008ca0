"""What tests/test_parity.py cannot know of layernorm: its formula spelled out, its errors, rows far apart in memory."""

import pytest
import torch
import torch.nn.functional as F
from oracle import check_parity, relative_error, run

import kernels
from kernels._triton import Launcher, launching
from kernels.layernorm import LAYERNORM, TILES, layernorm_reference, layernorm_triton
from kernels.prims import loop_tile
from kernels.proof import aot

interpreted = kernels.load("reference", layernorm="interpret").layernorm


def test_the_reference_is_the_formula():
    x, weight, bias = LAYERNORM.inputs(M=9, N=33, dtype=torch.float64)[0]
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    formula = (x - mean) / (variance + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(layernorm_reference(x, weight, bias), formula, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
def test_eps(eps):
    x, weight, bias = LAYERNORM.inputs(M=5, N=48, dtype=torch.float32)[0]
    x = x * 1e-3  # small enough for every eps here to matter
    truth = layernorm_reference(x.double(), weight.double(), bias.double(), eps)
    assert relative_error(interpreted(x, weight, bias, eps), truth) < 1e-6


@pytest.mark.parametrize("far", [6, 1e4])
@pytest.mark.parametrize("M, N", [(5, 300), (2, 33000)])
def test_rows_far_from_zero_lose_no_digits(M, N, far):
    """The mean of such a row is rounded by a step of its own size, which forward and backward make up for."""
    (x, *parameters), _ = LAYERNORM.inputs(M=M, N=N, dtype=torch.float32)
    check_parity(LAYERNORM, interpreted, (x + far, *parameters), f"{M}x{N} at {far}")


def test_the_reference_keeps_a_variance_that_rounding_the_mean_would_swamp():
    """Mean 4e4 and steps of 1/256, the last that fp32 tells apart there: the mean is off by as much as the spread."""
    x = 4e4 + torch.randint(-1, 2, (4, 768)) / 256
    weight = torch.ones(768)
    truth = layernorm_reference(x.double(), weight.double())
    assert relative_error(layernorm_reference(x, weight), truth) < 1e-6


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_fp32_parameters_beside_16_bit_activations(x_dtype):
    """As the model has them: master weights in fp32, activations in 16 bits; gradients come in each one's dtype."""
    x, weight, bias = LAYERNORM.inputs(M=37, N=65, dtype=torch.float32)[0]
    check_parity(LAYERNORM, interpreted, (x.to(x_dtype), weight, bias))
    y, dx, dweight, dbias = run(interpreted, (x.to(x_dtype), weight, bias))
    assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (x_dtype, x_dtype, torch.float32, torch.float32)


def test_leading_axes_are_rows():
    x, weight, bias = torch.randn(2, 3, 5, 16), torch.randn(16), torch.randn(16)
    torch.testing.assert_close(interpreted(x, weight, bias), F.layer_norm(x, (16,), weight, bias))
    torch.testing.assert_close(interpreted(x[0, 0, 0], weight, bias), F.layer_norm(x[0, 0, 0], (16,), weight, bias))


def test_rows_beyond_two_to_the_31(tmp_path):
    """Three rows a Gi of elements apart: the offset of the last does not fit 32 bits. The file is sparse."""
    stride, N = 2**30 + 16, 64
    storage = torch.from_file(str(tmp_path / "rows"), shared=True, size=2 * stride + N, dtype=torch.float16)
    x = storage.as_strided((3, N), (stride, 1))
    x.copy_(torch.randn(3, N))
    weight, bias = torch.randn(N, dtype=torch.float16), torch.randn(N, dtype=torch.float16)
    found = run(interpreted, (x, weight, bias))
    for f, expected in zip(found, run(interpreted, (x.contiguous(), weight, bias)), strict=True):
        assert torch.equal(f, expected)


@pytest.mark.parametrize("function", [layernorm_reference, interpreted], ids=["reference", "kernel"])
@pytest.mark.parametrize("x, weight, bias, message", [
    (torch.randn(3, 8), torch.ones(7), None, r"weight: expected shape \(8,\), got \(7,\)"),
    (torch.randn(3, 8), torch.ones(8), torch.ones(1), r"bias: expected shape \(8,\), got \(1,\)"),
    (torch.ones(3, 8, dtype=torch.int64), torch.ones(8), None, r"x: expected a floating dtype, got torch\.int64"),
    (torch.randn(3, 8), torch.ones(8, device="meta"), None, "weight: on meta, but x is on cpu"),
    (torch.randn(()), torch.ones(1), None, r"x: expected \(..., N\) with N >= 1"),
    (torch.randn(3, 0), torch.ones(0), None, r"x: expected \(..., N\) with N >= 1"),
    (torch.randn(3, 8), None, None, r"weight: expected a tensor \(N,\), got None"),
    (torch.randn(3, 8), 1.0, None, r"weight: expected a tensor \(N,\), got 1.0"),
])  # fmt: skip
def test_a_wrong_argument_is_named(function, x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        function(x, weight, bias)


def test_the_kernel_refuses_fp64():
    with pytest.raises(ValueError, match=r"x: expected fp32, fp16 or bf16, got torch\.float64"):
        layernorm_triton(torch.randn(2, 4, dtype=torch.float64), torch.ones(4))


@pytest.mark.parametrize("name", ["add_layernorm", "add_rmsnorm"])
def test_a_result_that_nobody_uses_costs_the_backward_nothing(name):
    """The last norm of a model leaves h unused: its gradient is neither made of zeros nor read. So with y unused."""
    op, interpreted = kernels.OPS[name], getattr(kernels.load("reference", **{name: "interpret"}), name)
    x, residual, *parameters = (a.requires_grad_() for a in op.inputs(M=5, N=48, dtype=torch.float32)[0])
    for used in (0, 1):
        loss = interpreted(x, residual, *parameters)[used].square().sum()
        launches = []
        with launching(Launcher(lambda kernel, grid, *args, launches=launches, **flags: launches.append(flags), 90)):
            copy = interpreted.kernel(x, residual, *parameters)[used].sum()
            torch.autograd.grad(copy, x)
        assert [flags["ADD"] for flags in launches if "ADD" in flags] == [True, used == 1]
        found = torch.autograd.grad(loss, (x, residual, *parameters))
        expected = torch.autograd.grad(op.reference(x, residual, *parameters)[used].square().sum(), (x, residual))
        torch.testing.assert_close(found[:2], expected)
        assert used == 0 or not any(g.any() for g in found[2:])


LENGTHS = pytest.mark.parametrize("N", [1, 2, 31, 64, 768, 1024, 1600, 4096, 8192, 8193, 16384, 65536])


@LENGTHS
def test_a_forward_tile_covers_the_row_or_walks_it(N):
    block = TILES["forward"].choose(N)
    assert block.long or block.block_n >= N
    assert block.block_m * block.block_n <= 32768 and 1 <= block.num_warps <= 32


@LENGTHS
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("arch", [0, 80, 90])
def test_a_backward_tile_is_in_registers_and_its_operands_in_shared_memory(N, itemsize, arch):
    tile = loop_tile(TILES["backward"], N, itemsize, arch)
    elements = tile.block_m * tile.block_n
    assert (tile.block_n >= N) == (N <= 8192) and tile.block_m <= 32
    assert elements <= 8192 and elements / tile.num_warps / 32 <= 32
    in_flight = 3 * (tile.num_stages - 1) * elements * itemsize * tile.per_multiprocessor
    assert in_flight < (160 << 10 if arch < 90 else 224 << 10)


def test_the_mean_is_a_rounded_quotient():
    """The GPU's quick division misses x / 1 by an ulp, and a row of one element would not be its own mean."""
    for launch in aot.launches(kernels.OPS["layernorm"], dict(M=5, N=1), 90, torch.float32)[:2]:
        assert "div.rn" in aot.compile_launch(launch, 90).asm["ptx"], launch.kernel.__name__
