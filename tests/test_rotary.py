"""Rotary: options, fused layouts, learned tables and meaning, beside the generic tests of test_parity.py."""

import itertools

import pytest
import torch
from oracle import DTYPES, relative_error
from torch import Tensor

import kernels
from kernels._triton import Launcher, launching
from kernels.rotary import ROTARY, inputs, rotary_reference, rotary_triton

interpreted = kernels.load("reference", rotary="interpret").rotary


def fused(B: int, T: int, H: int, G: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """q and k as the model has them: views of one projection that also holds v."""
    q, k, _ = torch.randn(B, T, H + 2 * G, D, dtype=dtype).split((H, G, G), dim=2)
    return q, k


def values_and_gradients(function, q, k, cos, sin, **options):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = function(q, k, cos, sin, **options)
    generator = torch.Generator().manual_seed(2)
    seeds = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in out]
    return [*out, *torch.autograd.grad(out, (q, k), seeds)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(qk_norm=norm, interleaved=interleaved, scale=scale)
        for norm, interleaved, scale in itertools.product((False, True), (False, True), (1.0, 1.7))
    ],
    ids=str,
)
def test_options(options, dtype):
    """Every option in every combination, on slices of a fused projection, heads and pairs past a power of two."""
    q, k = fused(2, 5, 3, 2, 20, dtype)
    cos, sin = inputs(1, 5, 1, 1, 20, dtype=torch.float32)[2:]
    found = values_and_gradients(interpreted, q, k, cos, sin, **options)
    same = values_and_gradients(rotary_reference, q, k, cos, sin, **options)
    truth = values_and_gradients(rotary_reference, q.double(), k.double(), cos.double(), sin.double(), **options)
    for i, (f, s, t) in enumerate(zip(found, same, truth, strict=True)):
        t = t.detach()
        assert relative_error(f.detach(), t) <= 2 * relative_error(s.detach(), t) + torch.finfo(dtype).eps, i


@pytest.mark.parametrize("interleaved", [False, True])
def test_vectors_of_zero_are_no_trouble_to_the_norm(interleaved):
    q, k = (torch.zeros(1, 2, 1, 8) for _ in range(2))
    cos, sin = inputs(1, 2, 1, 1, 8, dtype=torch.float32)[2:]
    for x in values_and_gradients(interpreted, q, k, cos, sin, qk_norm=True, interleaved=interleaved):
        assert x.isfinite().all()


def test_learned_tables_get_their_gradients():
    q, k, cos, sin = inputs(2, 5, 3, 2, 12, dtype=torch.float32)
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
    cos, sin = inputs(1, 6, 1, 1, 16, dtype=torch.float32)[2:]
    with launching(record):
        out = rotary_triton(q, k, cos, sin, qk_norm=True)
        torch.autograd.grad(out, (q, k), [torch.ones_like(o) for o in out])
    assert len(seen) == 2
    assert [x.data_ptr() for x in seen[0][:2]] == [q.data_ptr(), k.data_ptr()]
    assert [x.data_ptr() for x in seen[1][2:4]] == [q.data_ptr(), k.data_ptr()]
    assert all(o.is_contiguous() for o in out)


@pytest.mark.parametrize("interleaved", [False, True])
def test_decoding_one_position_equals_that_position_of_the_whole(interleaved):
    q, k, cos, sin = inputs(1, 9, 2, 1, 16, dtype=torch.float32)
    whole = interpreted(q, k, cos, sin, qk_norm=True, interleaved=interleaved)
    step = interpreted(q[:, 7:8], k[:, 7:8], cos[7:8], sin[7:8], qk_norm=True, interleaved=interleaved)
    for w, s in zip(whole, step, strict=True):
        assert torch.equal(w[:, 7:8], s)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("function", [rotary_reference, interpreted], ids=["reference", "kernel"])
def test_scores_depend_on_distance_alone(function, interleaved):
    """The point of the rotation: the same q and k at every position score by how far apart they stand; norms stay."""
    T, D = 12, 16
    cos, sin = inputs(1, T, 1, 1, D, dtype=torch.float64)[2:]
    q, k = (torch.randn(1, 1, 1, D).expand(1, T, 1, D).contiguous() for _ in range(2))
    rotated_q, rotated_k = function(q, k, cos, sin, interleaved=interleaved)
    scores = rotated_q[0, :, 0] @ rotated_k[0, :, 0].T
    for distance in range(-T + 1, T):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0, 0], scores[0, 1])
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))


def test_the_two_conventions_are_one_rotation_in_another_order():
    q, k, cos, sin = inputs(1, 3, 2, 1, 10, dtype=torch.float32)
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
        interpreted(*ROTARY.inputs(1, 2, 1, 1, 4, dtype=torch.float64))
