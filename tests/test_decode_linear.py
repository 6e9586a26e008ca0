"""The linear map of a decoding step: which kernel runs, far memory, refusals, mutants, beside test_parity.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from mutants import mutated
from oracle import check_parity

import kernels.decode_linear as page
import kernels.decode_linear.columns as columns
import kernels.decode_linear.rows as few_rows
import kernels.decode_linear.tiles as tiles
from kernels._triton import Launcher, launching
from kernels.decode_linear import (
    DECODE_LINEAR,
    decode_linear_columns,
    decode_linear_reference,
    decode_linear_triton,
    inputs,
)
from kernels.decode_linear.columns import count_of, tile
from kernels.decode_linear.rows import depth, rows_of_a_warp
from kernels.proof.interpret import OutOfBounds, Overflow, Race, interpreting

H100 = 132  # multiprocessors
# Few rows of x in three rounds over K, and a tile that neither rows of x nor of the matrix fill.
FEW, MANY = dict(M=3, N=18, K=300), dict(M=9, N=40, K=72)
AROUND = dict(norm="layernorm", activation="swiglu", residual=True)


def check(module: Any) -> None:
    """The error rule for the cases above, x far from zero and its rows apart, in fp32 and with matrices in 8 bits."""

    def run(*arguments: Any, **keywords: Any) -> torch.Tensor:
        with interpreting():
            return module.decode_linear_triton(*arguments, **keywords)

    torch.manual_seed(0)
    for dims in (FEW, MANY):
        for packed in (False, True):
            (x, *rest), keywords = inputs(**dims, **AROUND, packed=packed, dtype=torch.float32)
            apart = torch.cat((x + 6, x), dim=-1)[:, : x.shape[1]]
            check_parity(DECODE_LINEAR, run, (apart, *rest), str(dims), **keywords)
    (x, *rest), keywords = inputs(M=2, N=3, K=9, norm="rmsnorm", dtype=torch.float32)
    check_parity(DECODE_LINEAR, run, (x * 1e-3, *rest), "a small x, where eps counts", **keywords)


def test_the_page_as_it_is_passes_what_catches_mutants() -> None:
    check(page)


MUTANTS = {
    "few rows: mask of K off by one": (
        "tl.load(ptr + n * stride_n + k, (n < N) & (k < K)",
        "tl.load(ptr + n * stride_n + k, (n < N) & (k <= K)",
    ),
    "few rows: rows past the end of the matrix": ("(n < N) & (k < K), other=0)", "k < K, other=0)"),
    "few rows: mask of x forgotten": ("return tl.load(ptr + k, k < K, other=0.0)", "return tl.load(ptr + k)"),
    "few rows: second numbers are the first": (
        "_load_quarter(ptr, start, K, 1, WIDTH, EACH)",
        "_load_quarter(ptr, start, K, 0, WIDTH, EACH)",
    ),
    "few rows: only the last round of K": ("added += (totals[i] + tl.sum(", "added += (0.0 * totals[i] + tl.sum("),
    "few rows: the next part not taken": ("part, gate_part = after, gate_after", "gate_part = gate_after"),
    "few rows: x taken as contiguous": (
        "x = _load_row(x_ptr + tl.full((), m, tl.int64) * x_stride_m, here",
        "x = _load_row(x_ptr + m * K, here",
    ),
    "few rows: mean not taken off": ("h -= mean * tl.sum(weight_sum", "h -= 0.0 * mean * tl.sum(weight_sum"),
    "few rows: bias of the norm lost": ("h += tl.sum(bias_sum, axis=1)", "h += 0.0 * tl.sum(bias_sum, axis=1)"),
    "few rows: columns past the end in the norm": (
        "x = tl.where(_columns(here, WIDTH) < K, x - starts[m], 0.0)",
        "x = x - starts[m]",
    ),
    "few rows: eps outside the root": (
        "tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)",
        "(tl.sqrt(tl.where(variance < 0.0, 0.0, variance)) + eps)",
    ),
    "few rows: scale lost": ("return h * scale + bias", "return h + bias"),
    "few rows: residual of another row": ("y += residual[m * ROWS + r]", "y += residual[r]"),
    "few rows: gate is the matrix": (
        "gate_part = _load_part(gate_ptr, gate_stride_n, first, 0",
        "gate_part = _load_part(weight_ptr, gate_stride_n, first, 0",
    ),
    "tiles: mask of K forgotten": (
        "w = tl.load(weights, is_row & (k[None, :] < K - start)",
        "w = tl.load(weights, is_row",
    ),
    "tiles: residual lost": ("acc += tl.load(here, is_row", "acc += 0.0 * tl.load(here, is_row"),
    "tiles: mean of the padded row": ("mean = total / K", "mean = total / (K + 1)"),
    "tiles: norm's bias lost": ("y += tl.load(norm_bias_ptr + start", "y += 0.0 * tl.load(norm_bias_ptr + start"),
    "tiles: gate's scale lost": ("gate_acc *= tl.load(", "gate_acc *= 1.0 + 0.0 * tl.load("),
    "tiles: bias of the first tile for all": ("tl.load(bias_ptr + first + n, is_row", "tl.load(bias_ptr + n, is_row"),
}


COLUMNS = {  # mistakes in the kernel of the columns
    "the smallest third lost": ("(rest - middle.to(tl.float32)).to(tl.bfloat16)", "(0.0 * rest).to(tl.bfloat16)"),
    "thirds of another row": ("h = _sum_of(acc, column, 3 * m)", "h = _sum_of(acc, column, 0)"),
    "the mean's product at the wrong place": ("mean * _sum_of(acc, column, 3 * M)", "mean * _sum_of(acc, column, 3)"),
    "the norm's bias lost": ("h += _sum_of(acc, column, 3 * M + 3)", "h += 0.0 * _sum_of(acc, column, 3 * M + 3)"),
    "columns in another order": ("c = 2 * c + ((i >> bit) & 1)", "c = c + (i & (1 << bit))"),
    "no start taken off": ("x - starts[m], 0.0)", "x, 0.0)"),
    "columns past the end": ("x = tl.where(inside, x - starts[m], 0.0)", "x = x - starts[m]"),
    "rows past the end": ("inside[:, :, None] & (n[None, None, :] < N)", "inside[:, :, None]"),
    "x taken as contiguous": ("tl.full((), m, tl.int64) * x_stride_m + here", "m * K + here"),
    "scale lost": ("h *= tl.load(scale_ptr + n", "h *= 1.0 + 0.0 * tl.load(scale_ptr + n"),
    "residual of the first row": ("row * residual_stride_m + n", "n"),
    "gate is the matrix": ("tl.load(gate_ptr + gate_rows", "tl.load(weight_ptr + gate_rows"),
    "eps outside the root": (
        "tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)",
        "(tl.sqrt(tl.where(variance < 0.0, 0.0, variance)) + eps)",
    ),
}  # fmt: skip


def check_columns(module: Any) -> None:
    """Up to four rows in bf16, x far from zero, its rows apart and K no multiple of a slice, against fp64 in fp32.

    The result is asked for in fp32: rounded to bf16 it would not show what a third of a number is worth.
    """
    torch.manual_seed(0)
    plain = {**AROUND, "activation": "none"}
    for M, options in itertools.product((1, 3, 4), (AROUND, plain, dict(norm="rmsnorm"), {})):
        for packed in (False, True):
            (x, *rest), _ = inputs(M=M, N=18, K=300, **options, packed=packed, dtype=torch.bfloat16)
            apart = torch.cat((x + 60, x), dim=-1)[:, :300]
            doubled = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in rest]
            truth = decode_linear_reference(apart.double(), *doubled)
            with interpreting():
                found = module.decode_linear_columns(apart, *rest, dtype=torch.float32)
            torch.testing.assert_close(found.double(), truth, rtol=5e-6, atol=5e-6)
    for K, size in ((9, 1e-3), (1, 1.0)):  # a small x, where eps counts; one product of 24 bits
        x, weight = size * torch.randn(4, K).bfloat16(), torch.randn(3, K).bfloat16()
        norm = dict(norm="rmsnorm", norm_weight=torch.rand(K) + 0.5)
        with interpreting():
            found = module.decode_linear_columns(x, weight, **norm, dtype=torch.float32)
        truth = decode_linear_reference(x.double(), weight.double(), **norm)
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-7)


def test_columns_are_as_exact_as_sums_in_fp32():
    check_columns(page)


@pytest.mark.parametrize("mistake", COLUMNS)
def test_mutant_of_the_columns_is_caught(mistake, tmp_path, monkeypatch):
    module = mutated(columns, *COLUMNS[mistake], tmp_path, monkeypatch, of=page)
    with pytest.raises((AssertionError, OutOfBounds, Overflow, Race)):
        check_columns(module)


def test_columns_and_tiles_by_size():
    counts = [count_of(M, norm, bias) for M, norm, bias in (
        (1, "none", False), (4, "rmsnorm", False), (4, "layernorm", False), (3, "layernorm", True),
        (4, "layernorm", True),
    )]  # fmt: skip
    assert counts == [16, 16, 16, 16, 32]
    assert [tile(*case, H100, 90).block_n for case in ((50304, False), (50304, True), (6400, False))] == [32, 16, 16]
    assert [tile(768, False, 84, arch).num_stages for arch in (0, 80, 86, 90, 103, 120)] == [2, 4, 2, 4, 4, 2]


@pytest.mark.parametrize("x", [torch.ones(5, 8).bfloat16(), torch.ones(1, 8)], ids=["rows", "dtype"])
def test_what_columns_are_not_for_goes_by_rows(x):
    seen: list[str] = []
    with launching(Launcher(lambda kernel, grid, *rest, **flags: seen.append(kernel.__name__), 90, H100)):
        decode_linear_columns(x, torch.ones(3, 8, dtype=x.dtype))
    assert seen == ["decode_linear_fwd_kernel_rows"]


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [case for case in DECODE_LINEAR.bench if case["M"] <= 4], ids=str)
def test_columns_on_a_gpu(dims):
    torch.manual_seed(0)
    arguments, keywords = inputs(**dims, dtype=torch.bfloat16, device="cuda")
    check_parity(DECODE_LINEAR, decode_linear_columns, arguments, str(dims), **keywords)


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutant_is_caught(mistake, tmp_path, monkeypatch):
    part = few_rows if mistake.startswith("few rows") else tiles
    module = mutated(part, *MUTANTS[mistake], tmp_path, monkeypatch, of=page)
    with pytest.raises((AssertionError, OutOfBounds, Overflow, Race)):
        check(module)


@pytest.mark.parametrize("M, kernel", [(1, "rows"), (8, "rows"), (9, "tiles"), (64, "tiles")])
def test_one_launch_whatever_is_around_the_product(M, kernel):
    seen: list[str] = []
    arguments, keywords = inputs(M=M, N=96, K=64, **AROUND, dtype=torch.bfloat16, device="meta")
    with launching(Launcher(lambda kernel, grid, *rest, **flags: seen.append(kernel.__name__), 90, H100)):
        y = decode_linear_triton(*arguments, **keywords)
    assert seen == [f"decode_linear_fwd_kernel_{kernel}"] and y.shape == (M, 96)


@pytest.mark.parametrize("M, N, width, gated, rows", [
    (1, 768, 8, False, 1), (1, 2304, 8, False, 2), (1, 50304, 8, False, 4), (8, 50304, 8, False, 2),
    (8, 50304, 8, True, 1), (1, 6400, 16, False, 4),
])  # fmt: skip
def test_rows_share_x_where_the_gpu_stays_full(M, N, width, gated, rows):
    assert rows_of_a_warp(M, N, width, gated, H100) == rows


@pytest.mark.parametrize("K, expected", [(768, 3), (1024, 4), (1600, 4), (3072, 4), (100, 1)])
def test_rounds_over_k_are_alike(K, expected):
    """Up to four loads of a lane at a time, and in the last round as many as in the others, but for one."""
    assert depth(K, 1, 8, 1, False) == expected


def test_a_mean_far_from_zero_loses_no_digits():
    """A row around a million, in fp32: sums that cancel would leave none. The reference centres twice."""
    x = torch.randn(2, 300) + 1e6
    weight, norm_weight = torch.randn(5, 300) / 17, torch.ones(300)
    expected = decode_linear_reference(x.double(), weight.double(), norm_weight=norm_weight.double(), norm="layernorm")
    with interpreting():
        found = decode_linear_triton(x, weight, norm_weight=norm_weight, norm="layernorm")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_matrices_of_more_elements_than_32_bits_count():
    x, weight = torch.randn(2, 16), torch.randint(-127, 128, (9, 16), dtype=torch.int8)
    far = torch.empty(2**31 + 4096, dtype=torch.int8).as_strided((9, 16), (2**28, 1))
    far.copy_(weight)
    for rows in (x, x.repeat(6, 1)):
        with interpreting():
            near, apart = (decode_linear_triton(rows, w, scale=torch.ones(9)) for w in (weight, far))
        assert torch.equal(near, apart)


def test_logits_may_be_wider_than_x():
    x, weight = torch.randn(2, 64).bfloat16(), torch.randn(9, 64).bfloat16()
    with interpreting():
        y = decode_linear_triton(x, weight, softcap=3.0, dtype=torch.float32)
    expected = decode_linear_reference(x.double(), weight.double(), softcap=3.0)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_refused():
    x, w = torch.randn(2, 8), torch.randn(4, 8)
    for keywords, message in (
        (dict(norm="batch"), "norm: expected one of"), (dict(activation="tanh"), "activation: expected one of"),
        (dict(activation="swiglu"), "gate: swiglu needs one"), (dict(norm="layernorm"), "norm_weight: a layernorm"),
        (dict(norm_weight=torch.ones(8)), "norm_weight: norm is 'none'"), (dict(bias=torch.ones(3)), "bias: expected"),
        (dict(residual=torch.ones(2, 4).double()), "residual: dtype"), (dict(scale=torch.ones(4)), "weight: expected"),
        (dict(gate_bias=torch.ones(4)), "gate_bias: goes with"), (dict(dtype=torch.float16), "dtype: expected"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message), interpreting():
            decode_linear_triton(x, w, **keywords)
    with pytest.raises(ValueError, match="x: up to 64 rows"), interpreting():
        decode_linear_triton(torch.randn(65, 8), w)
