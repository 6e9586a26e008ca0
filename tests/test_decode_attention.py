"""Decode attention: lengths, pages, quantized caches, windows, splits, beside the generic tests of test_parity.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from oracle import DTYPES, relative_error
from torch import Tensor

from kernels import decode_attention as page
from kernels._triton import Launcher, launching
from kernels.decode_attention import (
    count_splits,
    decode_attention_reference,
    decode_attention_triton,
    inputs,
    quantize_kv,
    tile,
)
from kernels.decode_attention import reference as definition
from kernels.proof.interpret import interpreting

# A program for each tile of keys, whose last combines the parts; and one that walks them all.
SPLIT, WHOLE = 1000, 1
SMALL = dict(H=2, G=1, D=16)


def interpreted(*arguments: Any, multiprocessors: int = WHOLE, arch: int = 0, **features: Any) -> Tensor:
    with interpreting(arch=arch, multiprocessors=multiprocessors):
        return decode_attention_triton(*arguments, **features)


def cached(lengths: list[int], S: int, T: int = 1, *, dtype: torch.dtype = torch.float32, **dims: Any) -> tuple:
    """Arguments with these lengths; what lies beyond them is NaN."""
    q, k, v, _ = inputs(B=len(lengths), T=T, S=S, **{**SMALL, **dims}, dtype=dtype)[0]
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = torch.nan, torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int32)


def doubled(arguments: tuple) -> list:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def check(arguments: tuple, multiprocessors: int = WHOLE, arch: int = 0, **features: Any) -> None:
    """The error rule of tests/oracle.py, for keyword arguments and for any GPU's tiles and splits."""
    found = interpreted(*arguments, multiprocessors=multiprocessors, arch=arch, **features)
    same = decode_attention_reference(*arguments, **features)
    truth = decode_attention_reference(*doubled(arguments), **features)
    assert found.shape == same.shape and found.dtype == same.dtype
    error, bound = relative_error(found, truth), 2 * relative_error(same, truth) + torch.finfo(found.dtype).eps
    assert error <= bound, f"error {error:.2e}, allowed {bound:.2e}"


# ---- the reference against the definition, query by query


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    (B, T, H, D), G = q.shape, k.shape[2]
    out = torch.zeros_like(q)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        position, g = int(lengths[b]) - T + t, h // (H // G)
        seen = [u for u in range(position + 1) if window is None or u >= position - window]
        if seen:
            s = k[b, seen, g] @ q[b, t, h] / math.sqrt(D)
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            out[b, t, h] = torch.softmax(s, 0) @ v[b, seen, g]
    return out


@pytest.mark.parametrize("window", [None, 0, 5, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("T", [1, 4])
def test_the_reference_is_the_definition(T, softcap, window, monkeypatch):
    """In fp64; in fp32 where torch's fused operator does the work; and where lengths may not be looked at."""
    wide = cached([0, 1, 2, 23, 30], 30, T, H=6, G=2, dtype=torch.float64)
    expected = by_definition(*wide, window, softcap)
    torch.testing.assert_close(decode_attention_reference(*wide, window=window, softcap=softcap), expected)
    narrow = [a.float() if a.is_floating_point() else a for a in wide]
    found = decode_attention_reference(*narrow, window=window, softcap=softcap)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(definition, "on_host", lambda lengths: False)
    torch.testing.assert_close(decode_attention_reference(*wide, window=window, softcap=softcap), expected)


def test_sequences_of_one_length_are_one_pass():
    arguments = cached([20, 20, 20], 30, T=2, H=4, G=2)
    alone = [decode_attention_reference(*(a[b : b + 1] for a in arguments)) for b in range(3)]
    torch.testing.assert_close(decode_attention_reference(*arguments), torch.cat(alone), rtol=1e-6, atol=1e-6)


# ---- the kernels


@pytest.mark.parametrize("multiprocessors", [WHOLE, SPLIT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(dtype, multiprocessors):
    """None, one, a tile less one, a tile, one past it, past many splits, mixed; what lies beyond is NaN."""
    check(cached([0, 1, 32, 33, 70], 70, dtype=dtype), multiprocessors)


@pytest.mark.parametrize("T, H, G", [(1, 1, 1), (2, 4, 2), (3, 6, 2), (8, 5, 1), (4, 2, 2), (5, 3, 3)])
def test_tokens_and_groups(T, H, G):
    """One to eight tokens; a key head for each query head, for some, for all; more queries than a program takes."""
    check(cached([40, 3], 40, T, H=H, G=G), SPLIT)


@pytest.mark.parametrize("features", [
    dict(window=0), dict(window=1), dict(window=31), dict(window=32), dict(window=40), dict(window=1000),
    dict(softcap=2.0), dict(scale=0.7), dict(window=33, softcap=1.0, scale=0.5),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("multiprocessors", [WHOLE, SPLIT])
def test_features(features, multiprocessors):
    check(cached([2, 70], 70, T=3), multiprocessors, **features)


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
def test_tiles_of_every_architecture(arch):
    check(cached([150, 64], 150, D=64, dtype=torch.bfloat16), SPLIT, arch)
    check(cached([70], 90, T=2, D=160, dtype=torch.float16), SPLIT, arch)


def test_a_query_before_the_first_position_gives_zero():
    arguments = cached([3, 0], 10, T=5)
    for multiprocessors in (WHOLE, SPLIT):
        out = interpreted(*arguments, multiprocessors=multiprocessors)
        assert (out[0, :2] == 0).all() and (out[1] == 0).all() and (out[0, 2:] != 0).all()


def test_an_empty_cache_gives_zero():
    q, k, v, lengths = cached([0, 0], 0)
    assert (interpreted(q, k, v, lengths) == 0).all() and (decode_attention_reference(q, k, v, lengths) == 0).all()


def test_nothing_outside_a_window_is_multiplied():
    """A key before the window may hold anything that a split does not share a tile with."""
    q, k, v, lengths = cached([100], 100)
    expected = interpreted(q, k, v, lengths, window=3)
    k[:, :90], v[:, :90] = torch.nan, torch.nan
    assert torch.equal(interpreted(q, k, v, lengths, window=3), expected)


def test_views_of_a_longer_cache_are_read_in_place():
    """Positions, heads and sequences far apart in any order give the same bits, and reach the kernel uncopied."""
    q, k, v, lengths = cached([50, 64], 64, T=2, H=4, G=2, dtype=torch.bfloat16)
    expected = interpreted(q, k, v, lengths)
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.cat([k, v], dim=-1)
    longer = torch.cat([both, both], dim=1)
    views = longer[:, :64, :, :16], longer[:, :64, :, 16:]
    assert torch.equal(interpreted(q, heads_first, v, lengths), expected)
    assert torch.equal(interpreted(q, *views, lengths), expected)
    seen: list[tuple] = []
    with launching(Launcher(lambda kernel, grid, *arguments, **kwargs: seen.append(arguments))):
        decode_attention_triton(q, *views, lengths)
    assert [x.data_ptr() for x in seen[0][1:3]] == [x.data_ptr() for x in views]


def test_a_cache_of_more_elements_than_32_bits_count():
    q, k, v, lengths = inputs(B=3, T=1, S=20, H=1, G=1, D=16, cache="int8", dtype=torch.float32)[0][:4]
    scales = torch.ones(2, 3, 20, 1)
    far = torch.empty(2**31 + 4096, dtype=torch.int8).as_strided(k.shape, (2**30, 16, 16, 1))
    far.copy_(k)
    assert torch.equal(
        interpreted(q, far, v, lengths, None, *scales), interpreted(q, k, v, lengths, None, *scales)
    )  # fmt: skip


def test_launches_depend_on_shapes_alone():
    """A CUDA graph that was captured with some lengths is right for all: the host never looks at them."""

    def launches(lengths: Tensor) -> list:
        q, k, v, _ = cached([5, 99], 4096)
        found = []
        with launching(Launcher(lambda kernel, grid, *args, **kwargs: found.append((grid, kwargs)), 90, 132)):
            decode_attention_triton(q.to(lengths.device), k.to(lengths.device), v.to(lengths.device), lengths)
        return found

    short, long = launches(torch.tensor([1, 2])), launches(torch.tensor([4096, 4000]))
    assert short == long == launches(torch.empty(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("B, G, S, T, splits", [
    (1, 12, 1024, 1, 16), (1, 1, 65536, 1, 528), (32, 8, 8192, 1, 2), (64, 12, 1024, 1, 1), (1, 12, 64, 1, 1),
])  # fmt: skip
def test_splits_fill_the_gpu_and_no_more(B, G, S, T, splits):
    """On 132 multiprocessors: as many as there are tiles of keys, up to four programs each; one where heads suffice."""
    seen: list[tuple] = []
    q, k, v, lengths = inputs(B=B, T=T, S=S, H=G, G=G, D=64, dtype=torch.bfloat16, device="meta")[0]
    with launching(Launcher(lambda kernel, grid, *args, **kwargs: seen.append((kernel.__name__, grid)), 90, 132)):
        decode_attention_triton(q, k, v, lengths)
    assert seen == [("decode_attention_fwd_kernel_split", (B * G, splits))]


@pytest.mark.parametrize("keys, queries, itemsize, places, splits", [
    (8192, 4, 2, 8, 66), (4096, 32, 2, 64, 5), (4096, 32, 1, 64, 2), (4096, 32, 2, 16, 5), (4096, 256, 2, 8, 9),
])  # fmt: skip
def test_parts_stay_few_beside_the_keys(keys, queries, itemsize, places, splits):
    """Parts move a twelfth of what the keys and values do, or every other of 132 multiprocessors would have nothing."""
    found = count_splits(keys, queries, itemsize, places, tile(128, torch.bfloat16, 90), 132)
    assert found == splits
    light = 12 * found * queries * 2 * 4 <= 2 * keys * itemsize
    assert light or places * (found - 1) < 132 / 2


# ---- pages


@pytest.mark.parametrize("page_size", [1, 24, 64])
@pytest.mark.parametrize("multiprocessors", [WHOLE, SPLIT])
def test_paged_equals_contiguous_bit_for_bit(page_size, multiprocessors):
    """Shuffled pages of a common pool; the entries of a table past a length point anywhere."""
    lengths, P = [0, 33, 64], -(-64 // page_size)
    S = P * page_size
    q, k, v, n = cached(lengths, S, T=2)
    order = torch.randperm(3 * P)
    pages, pools = order.to(torch.int32).view(3, P), []
    for x in (k, v):
        pool = torch.empty(3 * P, page_size, 1, 16)
        pool[order] = x.view(3 * P, page_size, 1, 16)
        pools.append(pool)
    for b, length in enumerate(lengths):
        pages[b, -(-length // page_size) :] = -7 - b
    expected = interpreted(q, k, v, n, multiprocessors=multiprocessors)
    assert torch.equal(interpreted(q, *pools, n, pages, multiprocessors=multiprocessors), expected)
    reference = decode_attention_reference(q, k, v, n)
    torch.testing.assert_close(decode_attention_reference(q, *pools, n, pages), reference, rtol=1e-6, atol=1e-6)
    wide = torch.stack([pages, pages], dim=-1)[..., 0]  # the table itself strided
    assert torch.equal(interpreted(q, *pools, n, wide, multiprocessors=multiprocessors), expected)


# ---- int8 and fp8


@pytest.mark.parametrize("cache, allowed", [("int8", 0.01), ("fp8", 0.04)])
def test_error_of_a_quantized_cache(cache, allowed):
    """Against the unquantized cache in fp64: 0.6 % in int8, 2.6 % in fp8, for normal keys and values."""
    q, k, v, lengths = inputs(B=1, T=1, S=256, H=4, G=1, D=64, dtype=torch.float64)[0]
    truth = decode_attention_reference(q, k, v, lengths)
    (k8, k_scale), (v8, v_scale) = (quantize_kv(x, page.QUANTIZED[cache]) for x in (k, v))
    quantized = k8, v8, lengths, None, k_scale, v_scale
    error = relative_error(decode_attention_reference(q, *quantized), truth)
    assert allowed / 4 < error < allowed
    assert abs(relative_error(interpreted(q.float(), *quantized), truth) - error) < 1e-4


def test_a_scale_per_position_survives_an_outlier():
    """Keys a thousand times larger cost the others nothing; with one scale per head no digit would be left to them."""
    _, k, *_ = inputs(B=1, T=1, S=64, H=1, G=1, D=64, dtype=torch.float64)[0]
    k[:, ::2] *= 1000
    numbers, scale = quantize_kv(k)
    small = relative_error((numbers.double() * scale[..., None])[:, 1::2], k[:, 1::2])
    coarse = (k / (k.abs().max() / 127)).round() * (k.abs().max() / 127)
    assert small < 0.01 < 0.5 < relative_error(coarse[:, 1::2], k[:, 1::2])


@pytest.mark.parametrize("cache", ["int8", "fp8"])
@pytest.mark.parametrize("arch", [0, 90])  # bytes converted by hand, and by the type of the language
@pytest.mark.parametrize("page_size", [0, 16])
def test_quantized_kernels(cache, arch, page_size):
    dims = dict(B=2, T=2, S=70, H=2, G=1, D=32, shortest=33, cache=cache, page_size=page_size)
    for dtype in (torch.float32, torch.float16):
        check(inputs(**dims, dtype=dtype)[0], SPLIT, arch)


def test_every_byte_of_fp8_is_converted_right_by_hand():
    """One key of 256 values: the output is that row of the cache."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 1, 256)
    q, one = torch.zeros(1, 1, 1, 256), torch.ones(1, 1, 1)
    key = torch.zeros_like(every.float()).to(torch.float8_e4m3fn)
    finite = every.float().nan_to_num(0.0).to(torch.float8_e4m3fn)
    out = interpreted(q, key, finite, torch.tensor([1]), None, one, one)
    assert torch.equal(out, finite.float())
    assert torch.equal(interpreted(q, key, every, torch.tensor([1]), None, one, one).isnan(), every.float().isnan())


def test_garbage_beyond_a_quantized_length_does_not_spread():
    q, k, v, _, _, k_scale, v_scale = inputs(B=2, T=1, S=70, H=2, G=1, D=16, cache="fp8", dtype=torch.float32)[0]
    lengths = torch.tensor([33, 0])
    expected = interpreted(q, k, v, lengths, None, k_scale, v_scale)
    for x in (k.view(torch.uint8), v.view(torch.uint8)):
        x[0, 33:], x[1] = 0x7F, 0x7F
    k_scale[0, 33:], v_scale[0, 33:] = torch.nan, torch.nan
    assert torch.equal(interpreted(q, k, v, lengths, None, k_scale, v_scale), expected)
    assert decode_attention_reference(q, k, v, lengths, None, k_scale, v_scale).isfinite().all()


@pytest.mark.parametrize("dtype, allowed", [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 1 / 16)])
def test_quantize_kv(dtype, allowed):
    """Rounded to half a step of the row's largest magnitude (int8), or to half a unit of 4 bits (fp8)."""
    x = torch.randn(3, 5, 2, 16, dtype=torch.float64) * torch.logspace(-6, 6, 5, dtype=torch.float64)[:, None, None]
    x[0, 0, 0] = 0.0
    numbers, scale = quantize_kv(x, dtype)
    assert numbers.dtype == dtype and scale.dtype == torch.float32 and scale.shape == x.shape[:-1]
    back = numbers.double() * scale[..., None].double()
    assert ((back - x).abs() <= allowed * x.abs().amax(-1, keepdim=True) * (1 + 1e-6)).all()
    assert scale[0, 0, 0] == 1.0 and (back[0, 0, 0] == 0).all()
    with pytest.raises(ValueError, match=r"dtype: expected torch\.int8 or torch\.float8_e4m3fn"):
        quantize_kv(x, torch.int16)


# ---- bad arguments


POOL = torch.zeros(6, 4, 2, 16)
TABLE = torch.arange(4, dtype=torch.int32).view(2, 2)
SCALES = torch.ones(2, 8, 2)
BYTES = torch.zeros(2, 8, 2, 16, dtype=torch.int8)


@pytest.mark.parametrize("function", [decode_attention_reference, interpreted])
@pytest.mark.parametrize("change, complaint", [
    (dict(q=torch.zeros(2, 1, 64)), r"q: expected \(B, T, H, D\)"),
    (dict(q=torch.zeros(2, 1, 4, 16, dtype=torch.int32)), "q: expected a floating dtype"),
    (dict(q=torch.zeros(3, 1, 4, 16)), "k: expected .B, S, G, D. with q's B"),
    (dict(q=torch.zeros(2, 1, 3, 16)), "k: its 2 heads do not divide the 3 heads of q"),
    (dict(k=torch.zeros(2, 8, 2, 8)), "k: expected"),
    (dict(v=torch.zeros(2, 7, 2, 16)), r"v: expected \(2, 8, 2, 16\)"),
    (dict(v=torch.zeros(2, 8, 2, 16, dtype=torch.float16)), "v: .* of torch.float32 as k is, got .* torch.float16"),
    (dict(q=torch.zeros(2, 1, 4, 16).half()), "k: expected q's dtype torch.float16"),
    (dict(lengths=torch.tensor([1])), r"lengths: expected \(2,\)"),
    (dict(lengths=torch.tensor([1.0, 2.0])), "lengths: expected .* int32 or int64"),
    (dict(lengths=torch.tensor([1, 9])), "lengths: 9 of sequence 1 is outside 0 to 8"),
    (dict(lengths=torch.tensor([-1, 8])), "lengths: -1 of sequence 0 is outside 0 to 8"),
    (dict(k=BYTES, v=BYTES), "k_scale: a cache of int8 or float8_e4m3fn needs both"),
    (dict(k=BYTES, v=BYTES, k_scale=SCALES), "v_scale: a cache of int8 or float8_e4m3fn needs both"),
    (dict(k=BYTES, v=BYTES, k_scale=SCALES, v_scale=SCALES[:, :7]), r"v_scale: expected \(2, 8, 2\)"),
    (dict(k=BYTES, v=BYTES, k_scale=SCALES.int(), v_scale=SCALES), "k_scale: expected .* float32, got .* torch.int32"),
    (dict(k_scale=SCALES), "v_scale: .* none goes alone"),
    (dict(k=POOL, v=POOL, pages=TABLE.long()), "pages: expected .* int32, got .* torch.int64"),
    (dict(k=POOL, v=POOL, pages=TABLE[0]), r"pages: expected \(B, P\)"),
    (dict(k=POOL, v=POOL, pages=TABLE + 3), "pages: sequence 1 has 5 to 6, the pool 6"),
    (dict(k=POOL, v=POOL, pages=TABLE - 1), "pages: sequence 0 has -1 to 0, the pool 6"),
    (dict(k=POOL[:, :0], v=POOL[:, :0], pages=TABLE), "k: pages of no rows"),
    (dict(k=BYTES.float().to("meta"), v=BYTES.float().to("meta")), "k: on meta, but q is on cpu"),
    (dict(window=-1), "window: expected a whole number"), (dict(scale=0.0), "scale: expected a positive"),
    (dict(softcap=-1.0), "softcap: expected a positive"),
], ids=lambda x: x[:30] if isinstance(x, str) else "")  # fmt: skip
def test_bad_arguments(change, complaint, function):
    q, k, v, lengths = inputs(B=2, T=1, S=8, H=4, G=2, D=16, dtype=torch.float32)[0]
    arguments = {**dict(q=q, k=k, v=v, lengths=lengths), **change}
    positional = [arguments.pop(name) for name in ("q", "k", "v", "lengths")]
    with pytest.raises(ValueError, match=complaint):
        function(*positional, **arguments)


def test_the_kernels_refuse_what_they_do_not_have():
    for changed, complaint in ((dict(dtype=torch.float64), "fp32, fp16 or bf16"), (dict(D=512), "head dims up to 256")):
        arguments = inputs(**{**dict(B=1, T=1, S=4, H=1, G=1, D=16, dtype=torch.float32), **changed})[0]
        with pytest.raises(ValueError, match=f"q: .*{complaint}"):
            interpreted(*arguments)
