"""Rotary: options, fused layouts, learned tables and meaning, beside the generic tests of test_parity.py."""

import itertools
from collections.abc import Callable

import pytest
import torch
from mutants import mutated
from oracle import relative_error
from torch import Tensor

import kernels
from kernels import rotary
from kernels._triton import Launcher, launching
from kernels.proof.interpret import OutOfBounds, Overflow, Race, interpreting
from kernels.rotary import ROTARY, inputs, rotary_cpu, rotary_reference, rotary_triton

interpreted = kernels.load("reference", rotary="interpret").rotary


def fused(B: int, T: int, H: int, G: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """q and k as the model has them: views of one projection that also holds v."""
    q, k, _ = torch.randn(B, T, H + 2 * G, D, dtype=dtype).split((H, G, G), dim=2)
    return q, k


def values_and_gradients(function, q, k, cos, sin, **options):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = function(q, k, cos, sin, **options)
    generator = torch.Generator().manual_seed(2)
    seeds = [torch.randn(o.shape, generator=generator).to(o) for o in out]
    return [*out, *torch.autograd.grad(out, (q, k), seeds)]


OPTIONS = [
    dict(qk_norm=norm, interleaved=interleaved, scale=scale)
    for norm, interleaved, scale in itertools.product((False, True), (False, True), (1.0, 1.7))
]


def check(function: Callable, options: dict, dtype: torch.dtype) -> None:
    """The error rule of tests/oracle.py, on slices of two projections, heads and pairs past a power of two."""
    q, k = fused(2, 5, 3, 2, 20, dtype)[0], fused(2, 5, 4, 2, 20, dtype)[1]
    cos, sin = inputs(1, 5, 1, 1, 20, dtype=torch.float32)[0][2:]
    found = values_and_gradients(function, q, k, cos, sin, **options)
    same = values_and_gradients(rotary_reference, q, k, cos, sin, **options)
    truth = values_and_gradients(rotary_reference, q.double(), k.double(), cos.double(), sin.double(), **options)
    for i, (f, s, t) in enumerate(zip(found, same, truth, strict=True)):
        t = t.detach()
        assert relative_error(f.detach(), t) <= 2 * relative_error(s.detach(), t) + torch.finfo(dtype).eps, i


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_the_path_for_cpus(options):
    """Against finite differences, to the second order."""
    q, k, cos, sin = inputs(1, 2, 2, 1, 6, dtype=torch.float64)[0]
    arguments = (q.requires_grad_(), k.requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: rotary_cpu(*x, cos, sin, **options), arguments)
    assert torch.autograd.gradgradcheck(lambda *x: rotary_cpu(*x, cos, sin, **options), arguments)


SECOND_HALF = "tl.load(x_ptr + D // 2 + d, seen"
BOTH_SQUARES = "tl.sum(x_a * x_a, axis=1) + tl.sum(x_b * x_b, axis=1)"
KEYS = "block - q_blocks, b, k_stride_b, k_stride_t"
SCALED_SINE = "sin = tl.load(sin_ptr + t * (D // 2) + d, mask & (d < D // 2), other=0.0).to(tl.float32) * scale"
MUTANTS = {
    "sign of the sine": ("y_a, y_b = x_a * cos - x_b * sin", "y_a, y_b = x_a * cos + x_b * sin"),
    "halves exchanged": ("x_b * cos + x_a * sin", "x_a * cos + x_b * sin"),
    "not turned back in the backward": ("dy_a * cos + dy_b * sin, dy_b", "dy_a * cos - dy_b * sin, dy_b"),
    "second half from the neighbour": (SECOND_HALF, SECOND_HALF.replace("D // 2", "1")),
    "half of the padded width": (SECOND_HALF, SECOND_HALF.replace("D // 2", "8")),
    "pairs that are not neighbours": (
        "tl.reshape(x, (BLOCK_M, BLOCK_D, 2))", "tl.trans(tl.reshape(x, (BLOCK_M, 2, BLOCK_D)), 0, 2, 1)"),
    "mask of the half forgotten": (
        "seen = mask & (d < D // 2)\n        tl.store", "seen = mask & (d < D)\n        tl.store"),
    "mask of the pairs off by one": ("mask & (both < D))", "mask & (both <= D))"),
    "angle of the head": ("cos_ptr + t * (D // 2) + d", "cos_ptr + h * (D // 2) + d"),
    "heads taken as contiguous": ("t * stride_t + h * stride_h, d, D", "(t * H + h) * D, d, D"),
    "batch forgotten": ("y_ptr + (b * T * H + row) * D", "y_ptr + row * D"),
    "keys with the strides of queries": (KEYS, KEYS.replace("k_", "q_")),
    "scale of the sine forgotten": (SCALED_SINE, SCALED_SINE.removesuffix(" * scale")),
    "norm of the first half alone": (BOTH_SQUARES, "2 * tl.sum(x_a * x_a, axis=1)"),
    "norm over the padded width": ("[:, None] / D + eps", "[:, None] / (2 * BLOCK_D) + eps"),
    "mean of g dropped": ("rstd * (g_a - x_a * mean_gx), rstd", "rstd * g_a, rstd"),
    "gradient of the norm without rstd": ("rstd * (g_b - x_b * mean_gx)", "(g_b - x_b * mean_gx)"),
    "last position left out": ("mask = t < T", "mask = t < T - 1"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutant_is_caught(mistake, tmp_path, monkeypatch):
    page = mutated(rotary, *MUTANTS[mistake], tmp_path, monkeypatch)

    def run(*args, **options):
        with interpreting():
            return page.rotary_triton(*args, **options)

    with pytest.raises((AssertionError, OutOfBounds, Overflow, Race)):
        for options in reversed(OPTIONS):  # those with the norm first, which more can go wrong with
            check(run, options, torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_vectors_of_zero_are_no_trouble_to_the_norm(interleaved):
    q, k = (torch.zeros(1, 2, 1, 8) for _ in range(2))
    cos, sin = inputs(1, 2, 1, 1, 8, dtype=torch.float32)[0][2:]
    for x in values_and_gradients(interpreted, q, k, cos, sin, qk_norm=True, interleaved=interleaved):
        assert x.isfinite().all()


def test_learned_tables_get_their_gradients():
    q, k, cos, sin = inputs(2, 5, 3, 2, 12, dtype=torch.float32)[0]
    for options in (dict(), dict(qk_norm=True, scale=0.5, interleaved=True)):
        tables = cos.clone().requires_grad_(), sin.clone().requires_grad_()
        found, expected = (
            torch.autograd.grad([o.square().sum() + o.sum() for o in f(q, k, *tables, **options)], tables)
            for f in (interpreted, rotary_reference)
        )
        torch.testing.assert_close(found, expected)


def test_fused_projection_is_read_in_place_and_results_are_contiguous():
    """One launch forward and one backward, given the addresses of the projection itself."""
    seen = []
    record = Launcher(lambda kernel, grid, *args, **kwargs: seen.append(args[:4]))
    q, k = fused(2, 6, 4, 2, 16)
    q.requires_grad_(), k.requires_grad_()
    cos, sin = inputs(1, 6, 1, 1, 16, dtype=torch.float32)[0][2:]
    with launching(record):
        out = rotary_triton(q, k, cos, sin, qk_norm=True)
        torch.autograd.grad(out, (q, k), [torch.ones_like(o) for o in out])
    assert len(seen) == 2
    assert [x.data_ptr() for x in seen[0][:2]] == [q.data_ptr(), k.data_ptr()]
    assert [x.data_ptr() for x in seen[1][2:4]] == [q.data_ptr(), k.data_ptr()]
    assert all(o.is_contiguous() for o in out)


@pytest.mark.parametrize("interleaved", [False, True])
def test_decoding_one_position_equals_that_position_of_the_whole(interleaved):
    q, k, cos, sin = inputs(1, 9, 2, 1, 16, dtype=torch.float32)[0]
    whole = interpreted(q, k, cos, sin, qk_norm=True, interleaved=interleaved)
    step = interpreted(q[:, 7:8], k[:, 7:8], cos[7:8], sin[7:8], qk_norm=True, interleaved=interleaved)
    for w, s in zip(whole, step, strict=True):
        assert torch.equal(w[:, 7:8], s)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("function", [rotary_reference, interpreted], ids=["reference", "kernel"])
def test_scores_depend_on_distance_alone(function, interleaved):
    """The point of the rotation: the same q and k at every position score by how far apart they stand; norms stay."""
    T, D = 12, 16
    cos, sin = inputs(1, T, 1, 1, D, dtype=torch.float64)[0][2:]
    q, k = (torch.randn(1, 1, 1, D).expand(1, T, 1, D).contiguous() for _ in range(2))
    rotated_q, rotated_k = function(q, k, cos, sin, interleaved=interleaved)
    scores = rotated_q[0, :, 0] @ rotated_k[0, :, 0].T
    for distance in range(-T + 1, T):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0, 0], scores[0, 1])
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))


def test_the_two_conventions_are_one_rotation_in_another_order():
    q, k, cos, sin = inputs(1, 3, 2, 1, 10, dtype=torch.float32)[0]
    order = torch.arange(10).view(5, 2).T.flatten()  # even places first, then odd
    split = rotary_reference(q[..., order], k[..., order], cos, sin)
    for half, mixed in zip(split, rotary_reference(q, k, cos, sin, interleaved=True), strict=True):
        assert torch.equal(half, mixed[..., order])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(3, 2, 8)), "q: expected"),
        (dict(q=torch.zeros(1, 3, 2, 7)), "q: expected"),
        (dict(q=torch.zeros(1, 3, 2, 8, dtype=torch.int32)), "q: expected a floating dtype"),
        (dict(k=torch.zeros(1, 4, 2, 8)), "k: expected"),
        (dict(k=torch.zeros(1, 3, 2, 8).half()), "k: torch.float16"),
        (dict(cos=torch.zeros(4, 4)), "cos: expected.*slice"),
        (dict(sin=torch.zeros(3, 8)), "sin: expected"),
        (dict(sin=torch.zeros(3, 4, device="meta")), "sin: on meta"),
    ],
)
@pytest.mark.parametrize("function", [rotary_reference, interpreted], ids=["reference", "kernel"])
def test_wrong_arguments_are_named(function, change, message):
    arguments = dict(q=torch.zeros(1, 3, 2, 8), k=torch.zeros(1, 3, 1, 8), cos=torch.zeros(3, 4), sin=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **change})


def test_fp64_is_refused_by_the_kernel():
    with pytest.raises(ValueError, match="q: expected fp32, fp16 or bf16"):
        interpreted(*ROTARY.inputs(1, 2, 1, 1, 4, dtype=torch.float64)[0])
