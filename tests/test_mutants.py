"""The parity tests can fail: each mutant is a kernel with one plausible mistake, and every one must be caught.

A mutant is a page with one line changed, loaded beside the real one under another name.
"""

import functools
import itertools
import sys

import pytest
import torch
from mutants import mutated
from oracle import Parity

import kernels
from kernels.proof.interpret import OutOfBounds, Overflow, Race, interpreting
from kernels.proof.options import combined

MUTANTS = {
    "layernorm": {
        "mask of the row forgotten": ("centered = tl.where(mask, x - mean, 0.0)", "centered = x - mean"),
        "mask off by one": ("mask = (m < M) & (n < N)\n    x =", "mask = (m < M) & (n <= N)\n    x ="),
        "rows taken as contiguous": (
            "load_sum(x_ptr, residual_ptr, m * x_stride_m + n", "load_sum(x_ptr, residual_ptr, m * N + n",
        ),
        "rounding of the mean forgotten": ("shift = rest * rstd\n    y", "shift = 0.0 * rstd\n    y"),
        "rounding of the mean forgotten on the way back": (
            "xhat = tl.where(mask, (x - mean) * rstd - shift, 0.0)", "xhat = tl.where(mask, (x - mean) * rstd, 0.0)"),
        "eps outside the root": ("- rest * rest + eps)", "- rest * rest) + eps"),
        "dweight of the last block only": ("dweight += tl.sum(dy * xhat, axis=0)[None, :]",
                                           "dweight = tl.sum(dy * xhat, axis=0)[None, :]"),
        "partial rows of dweight shared": (
            "row = p.to(tl.int64) * N\n    tl.store(partial_ptr + row + n, dweight, n < N)",
            "row = 0\n    tl.store(partial_ptr + row + n, dweight, n < N)"),
        "partial rows of dbias are those of dweight": ("row += tl.num_programs(0).to(tl.int64) * N", "row += 0"),
        "rstd taken from the means": (
            "rstd = tl.load(statistics_ptr + M + m, m < M", "rstd = tl.load(statistics_ptr + m, m < M"),
        "partial rows not summed": (
            "sum_partial_rows(partial, dweight", "sum_partial_rows(partial[:, :1].contiguous(), dweight"),
        "dbias is dweight": ("dbias if has_bias else None)", "dweight if has_bias else None)"),
        "mean of g dropped from dx": ("dx = rstd * (g - mean_g - xhat * mean_gx)", "dx = rstd * (g - xhat * mean_gx)"),
        "bias not added": (
            "    if HAS_BIAS:\n        y += tl.load(bias_ptr", "    if not HAS_BIAS:\n        y += tl.load(bias_ptr"),
    },
    "rmsnorm": {
        "mean over the padded row": ("tl.sum(x * x, axis=1)[:, None] / N", "tl.sum(x * x, axis=1)[:, None] / BLOCK_N"),
        "weight not applied": ("y *= tl.load(weight_ptr + n", "y *= 1.0 + 0.0 * tl.load(weight_ptr + n"),
        "gradient of the norm dropped": ("(g - xhat * (tl.sum(g * xhat, axis=1)[:, None] / N))", "g"),
        "weight left out of g": ("            g = dy * weight\n", "            g = dy\n"),
        "dweight of the last block only": ("dweight += tl.sum(dy * xhat, axis=0)[None, :]",
                                           "dweight = tl.sum(dy * xhat, axis=0)[None, :]"),
        "rows of dy as those of x": ("dy_ptr + m * dy_stride_m + n, mask", "dy_ptr + m * x_stride_m + n, mask"),
        "rows walked by one": ("tl.num_programs(0) * BLOCK_M, num_stages", "tl.num_programs(0), num_stages"),
        "partial rows not summed": (
            "sum_partial_rows(partial, dweight", "sum_partial_rows(partial[:, :1].contiguous(), dweight"),
    },
    "activation": {
        "bias not added": ("h_stride_m + n, mask, bias)\n    g = a", "h_stride_m + n, mask, 0.0)\n    g = a"),
        "backward without the bias": ("a = _load_biased(h_ptr + m * h_stride_m + n, mask, bias)",
                                      "a = _load_biased(h_ptr + m * h_stride_m + n, mask, 0.0)"),
        "rows taken as contiguous": ("_load_biased(h_ptr + m * h_stride_m + n, mask, bias)",
                                     "_load_biased(h_ptr + m * N + n, mask, bias)"),
        "mask off by one": ("mask = (m < M) & (n < N)\n    bias", "mask = (m < M) & (n <= N)\n    bias"),
        "density lost in gelu's slope": ("a * 0.39894228040143268", "0.0 * a * 0.39894228040143268"),
        "cubic term lost in gelu_tanh's slope": ("+ 0.2140644488178 * a * a", "+ 0.071354816272600 * a * a"),
        "half of relu2's slope": ("da = 2.0 * tl.where", "da = 1.0 * tl.where"),
        "silu's own slope lost": ("dg = a * (s + g * ds)", "dg = a * s"),
        "gate's bias not added": ("mask, gate_bias)\n    tl", "mask, 0.0)\n    tl"),
        "sums of the last block only": ("dbias += tl.where(m < M, dh, 0.0)", "dbias = tl.where(m < M, dh, 0.0)"),
        "partial rows shared": ("row = p.to(tl.int64) * N + n", "row = n"),
        "partial sums of both biases in one place": ("row += programs.to(tl.int64) * N", "row += 0"),
    },
    "newton_schulz": {
        "mirror image not written": ("    if row != column:\n", "    if row == column:\n"),
        "mirror image not transposed": ("tl.store(mirrored, tl.trans(out)", "tl.store(mirrored, out"),
        "mask of the contracted axis forgotten": (
            "x_rows = tl.load(rows, is_row[:, None] & (k < K - start)", "x_rows = tl.load(rows, is_row[:, None]"),
        "b A forgotten": ("acc = alpha * acc + beta * tl.load", "acc = alpha * acc + 0.0 * tl.load"),
        "a I in every tile": ("(row == column) & (m[:, None]", "(m[:, None]"),
        "second factor is the first": ("columns = y_ptr + j", "columns = x_ptr + j"),
        "a X of the first matrix for all": ("x_ptr += b * x_stride_b + j", "x_ptr += j"),
        "column of the tile from the next row": ("tile - row * (row + 1) // 2", "tile - row * (row - 1) // 2"),
    },
    "decode_attention": {
        "later tokens seen": ("seen = (u < stop) & (u <= position)", "seen = u < stop"),
        "length taken from the cache": ("end = tl.minimum(length, S)", "end = S + T * 0"),
        "parts weigh the same": (
            "weight, alpha = tl.exp2(lse - origin)", "weight, alpha = tl.exp2(lse - lse)"),
        "heads of another group": ("h = m // group, g * group + m % group", "h = m // group, m % group"),
        "values not scaled": ("p *= tl.load(v_scale_rows", "p += 0.0 * tl.load(v_scale_rows"),
        "empty queries not zero": ("out = tl.where(total != 0.0, acc / total, 0.0)  # NaN", "out = acc / total  # NaN"),
    },
    "int8_linear": {
        "few rows: one scale for all": ("tl.load(scale_ptr + n, n < N", "tl.load(scale_ptr + 0 * n, n < N"),
        "few rows: bias lost": ("y += bias", "y += 0.0 * bias"),
        "few rows: bytes without a sign": (
            "rows[r].to(tl.float32)", "rows[r].to(tl.uint8, bitcast=True).to(tl.float32)"),
        "few rows: rows past the end of the matrix": ("k < tl.where(first + r < N, rest, 0)", "k < rest"),
        "few rows: mask of K off by one": ("tl.where(first + r < N, rest, 0)", "tl.where(first + r < N, rest + 1, 0)"),
        "few rows: mask of x forgotten": ("tl.load(here, low < rest, other=0.0)", "tl.load(here)"),
        "few rows: first half of x twice": ("tl.load(here + 8, low + 8 < rest", "tl.load(here, low + 8 < rest"),
        "few rows: only the last round of K": ("(acc[i * ROWS + r] + tl.sum(", "(0.0 * acc[i * ROWS + r] + tl.sum("),
        "few rows: sums in another order": (
            "tl.join(parts[i], parts[i + 2 ** (LEVELS - 1 - level)])", "tl.join(parts[2 * i], parts[2 * i + 1])"),
        "few rows: x taken as contiguous": ("tl.full((), i, tl.int64) * x_stride_m", "i * K"),
        "tiles: scale lost": ("y = acc * tl.load(scale_ptr + i", "y = acc + 0.0 * tl.load(scale_ptr + i"),
        "tiles: bias lost": ("y += tl.load(bias_ptr + i", "y += 0.0 * tl.load(bias_ptr + i"),
        "tiles: bias of the first tile for all": ("tl.load(bias_ptr + i + n", "tl.load(bias_ptr + n"),
        "tiles: mask of K forgotten": ("is_row & (k[None, :] < K - start)", "is_row"),
        "tiles: mask of M forgotten": ("(k[:, None] < K - start) & is_column", "k[:, None] < K - start"),
        "tiles: x taken as contiguous": ("m.to(tl.int64) * x_stride_m", "m.to(tl.int64) * K"),
        "tiles: rows and columns of y swapped": ("y_ptr + j * N + i", "y_ptr + i * N + j"),
    },
    "attention": {
        "keys past the end seen": ("attention.forward", "(n >= first) & (n < end), s, float", "n >= first, s, float"),
        "sums not rescaled": ("attention.forward", "v_tile, acc * alpha[:, None]", "v_tile, acc"),
        "tiles before the window's left out": (
            "attention.shared", "start = first_of_first // BLOCK * BLOCK", "start = first_of_last // BLOCK * BLOCK"),
        "last tile taken as full": (
            "attention.shared", "tl.maximum(full, end_of_first // BLOCK * BLOCK)", "tl.maximum(full, end_of_last)"),
        "the key head of the first query head": ("attention.forward", "g = h // (H // G)", "g = h * 0"),
        "queries that see no key not zero": ("attention.forward", "tl.where(end > first, out, 0.0)", "out"),
        "log-sum-exp in base e": ("attention.forward", "m + tl.log2(l)", "m + tl.log(l)"),
        "delta left out of dq": (
            "attention.backward", "ds = uncapped(p * (dp - delta)", "ds = uncapped(p * dp"),
        "dq of the last tile": ("attention.backward", "k_tile, dq, input", "k_tile, dq * 0.0, input"),
        "dk not scaled": ("attention.backward", "(dk * scale)", "(dk * 1.0)"),
        "one head of each group": ("attention.backward", "tl.range(0, GROUP * tiles)", "tl.range(0, tiles)"),
        "dropout's scale lost on the way back": (
            "attention.backward", "tl.where(keep, p * undropped, 0.0)", "tl.where(keep, p, 0.0)"),
        "dq as if it lay alone": (
            "attention.backward", "(b.to(tl.int64) * T + row) * dq_stride_t", "(b.to(tl.int64) * T + row) * (H * D)"),
        "dk and dv as if they lay alone": (
            "attention.backward", "(b.to(tl.int64) * S + u) * dk_stride_s", "(b.to(tl.int64) * S + u) * (G * D)"),
        "the projection split as if every head had keys": (
            "attention", "gradients = operands(dq, dk, dv, heads)", "gradients = operands(dq, dk, dv, heads and 2)"),
        "rows of dout as those of q": ("attention.backward", "row, dout_stride_t, T, True", "row, q_stride_t, T, True"),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name, mistake", [pytest.param(n, m, id=f"{n}-{m}") for n, table in MUTANTS.items() for m in table]
)
def test_mutant_is_caught(name, mistake, tmp_path, monkeypatch):
    *at, old, new = MUTANTS[name][mistake]
    page = sys.modules[f"kernels.{at[0] if at else name}"]
    module = mutated(page, old, new, tmp_path, monkeypatch, of=sys.modules[f"kernels.{name}"])
    mutant = getattr(module, f"{name}_triton")
    with pytest.raises((AssertionError, OutOfBounds, Overflow, Race)):
        check(name, mutant)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_page_as_it_is_passes_what_catches_mutants(name):
    check(name, kernels.OPS[name].triton)


@functools.cache
def cases_of(name):
    """Parity at the op's small dims, with rows apart in memory and far enough from zero for statistics to matter."""
    op, cases = kernels.OPS[name], []
    # Of iterations one size that has two tiles each way and steps that share a product: others take five times as long.
    few = (op.parity[-1], op.parity[3]) if name == "newton_schulz" else (op.parity[-1], *op.parity[:4])
    dtypes = (torch.float32,) if name == "attention" else (torch.float32, torch.float16)
    for case, dtype in itertools.product(combined(op, few), dtypes):
        if case.get("steps") in (3, 4):
            continue
        torch.manual_seed(0)
        (first, *rest), keywords = op.inputs(**case, dtype=dtype)
        far = {"attention": 0, "layernorm": 60}.get(name, 6)
        apart = torch.cat([first + far, first], -1)[..., : first.shape[-1]]
        cases.append(Parity(op, (apart, *rest), f"{case}", **keywords))
    return cases


def check(name, function):
    """Judge the function by the cases of the op; the one that it fails is tried first from then on."""
    cases = cases_of(name)
    for i, case in enumerate(list(cases)):
        try:
            with interpreting():
                case.check(function)
        except Exception:
            cases.insert(0, cases.pop(i))
            raise
