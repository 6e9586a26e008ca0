"""Attention that puts keys and values into the cache: what the cache then holds, beside the tests of test_parity.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mutants import mutated
from torch import Tensor

import kernels.decode_attention as page
from kernels.decode_attention.append import (
    APPEND_ATTENTION,
    append_attention_reference,
    append_attention_triton,
    inputs,
)
from kernels.decode_attention.reference import decode_attention_reference
from kernels.proof.interpret import Race, interpreting
from kernels.rmsnorm import rmsnorm_reference
from kernels.rotary import rotary_reference

SPLIT, WHOLE = 1000, 1  # multiprocessors: a program for each tile of keys, and one that walks them all
CACHES = range(1, 3)  # k and v among the arguments
SCALES = range(5, 7)


def interpreted(arguments: tuple, multiprocessors: int, arch: int = 0, **keywords: Any) -> Tensor:
    with interpreting(multiprocessors=multiprocessors, arch=arch):
        return append_attention_triton(*arguments, **keywords)


def copied(arguments: tuple) -> tuple:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


def test_the_reference_is_the_ops_that_it_joins():
    """Norms with weights, rotation, writing and attention one by one, in fp64."""
    dims = dict(B=2, T=3, S=40, H=4, G=2, D=16, shortest=6)
    arguments, _ = inputs(**dims, rotary=True, qk_norm=True, norm_weight=True, dtype=torch.float64)
    qkv, k, v, lengths, *_, cos, sin, q_norm, k_norm, _, _ = arguments
    q, new_k, new_v = qkv.split((4, 2, 2), dim=2)
    q, new_k = rmsnorm_reference(q, q_norm), rmsnorm_reference(new_k, k_norm)
    k, v, expected = k.clone(), v.clone(), torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        now = slice(length, length + 3)
        turned, k[b : b + 1, now] = rotary_reference(q[b : b + 1], new_k[b : b + 1], cos[now], sin[now])
        v[b, now] = new_v[b]
        expected[b] = decode_attention_reference(turned, k[b : b + 1], v[b : b + 1], lengths[b : b + 1] + 3)[0]
    torch.testing.assert_close(append_attention_reference(*arguments), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(arguments[1], k, rtol=1e-12, atol=1e-12)
    assert torch.equal(arguments[2], v)


@pytest.mark.parametrize("multiprocessors", [SPLIT, WHOLE], ids=["split", "whole"])
@pytest.mark.parametrize("page_size, cache, arch", [
    (0, "", 0), (16, "", 0), (0, "int8", 0), (16, "int8", 0), (16, "fp8", 0), (0, "fp8", 80), (0, "fp8", 90),
])  # fmt: skip
def test_the_cache_holds_what_the_reference_puts_there(page_size, cache, arch, multiprocessors):
    """To a rounding of bf16, or a step of 8 bits; all else in it, and the counts, stay. On an A100 fp8 are bytes."""
    dims = dict(B=2, T=3, S=70, H=4, G=2, D=24, shortest=30, page_size=page_size, cache=cache)
    arguments, keywords = inputs(**dims, rotary=True, qk_norm=True, dtype=torch.bfloat16)
    before, other = copied(arguments), copied(arguments)
    expected = append_attention_reference(*other, **keywords)
    found = interpreted(arguments, multiprocessors, arch, **keywords)
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)
    for i in CACHES:
        mine, theirs = arguments[i].float(), other[i].float()
        changed = (theirs != before[i].float()).flatten(2).any(-1)
        assert changed.sum() == 2 * 3 and torch.equal(mine[~changed], before[i].float()[~changed])
        step = {"": 0.0, "int8": 1.0, "fp8": 0.0}[cache]
        torch.testing.assert_close(mine, theirs, rtol=2**-7 if not cache else 2**-3 * (cache == "fp8"), atol=step)
        close = (mine - theirs).abs() <= 1e-6
        assert close.float().mean() > 0.99  # all but ties
    for i in SCALES if cache else ():
        torch.testing.assert_close(arguments[i], other[i], rtol=2**-7, atol=0)
    assert not arguments[11].any()


@pytest.mark.parametrize("multiprocessors", [SPLIT, WHOLE], ids=["split", "whole"])
def test_several_blocks_of_queries_write_once(multiprocessors):
    """8 tokens of 5 heads are 40 queries, more than a program has; the guard sees two programs that write one place."""
    arguments, keywords = inputs(B=1, T=8, S=100, H=10, G=2, D=16, rotary=True, dtype=torch.float32)
    expected = append_attention_reference(*copied(arguments), **keywords)
    torch.testing.assert_close(interpreted(arguments, multiprocessors, **keywords), expected, rtol=1e-4, atol=1e-5)


def test_a_window_hides_the_new_ones_too():
    arguments, _ = inputs(B=2, T=4, S=90, H=2, G=1, D=16, shortest=0, dtype=torch.float32)
    for window in (0, 2, 50):
        expected = append_attention_reference(*copied(arguments), window=window)
        torch.testing.assert_close(interpreted(arguments, SPLIT, window=window), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_written_past_the_end():
    """Where a GPU's lengths leave no room: the host cannot know, and the kernel stops."""
    arguments, _ = inputs(B=1, T=3, S=20, H=1, G=1, D=16, dtype=torch.float32)
    before = copied(arguments)
    with pytest.raises(ValueError, match="lengths: 18 of sequence 0 is outside 0 to 17"):
        append_attention_reference(*arguments[:3], torch.tensor([18], dtype=torch.int32))
    q, k, v = arguments[:3]
    step = page.Append(None, None, None, None, None, None)
    with interpreting():
        cache = page.Cache(k, v, None, None)
        page.launch(q, cache, torch.tensor([18], dtype=torch.int32), None, -1, 0.25, 0.0, 1, step)
    assert torch.equal(k[:, :18], before[1][:, :18])
    assert torch.equal(k[:, 18:], q[:, :2, 1:2]) and torch.equal(v[:, 18:], q[:, :2, 2:])


def test_wrong_arguments_are_refused():
    arguments, _ = inputs(B=1, T=1, S=90, H=2, G=1, D=16, rotary=True, dtype=torch.float32)
    for wrong, message in (
        ({0: arguments[0][:, :, :2]}, "qkv: expected"), ({8: None}, "sin: cos and sin"),
        ({7: arguments[7][:, :3], 8: arguments[8][:, :3]}, "cos: expected"),
        ({9: torch.ones(16)}, "q_norm: q_norm and k_norm"),
        ({11: torch.zeros(0, dtype=torch.int32)}, "counts: expected at least 1"),
    ):  # fmt: skip
        changed = [wrong.get(i, a) for i, a in enumerate(arguments)]
        with pytest.raises(ValueError, match=message):
            interpreted(tuple(changed), SPLIT)


MUTANTS = {
    "not released": ("        tl.debug_barrier()", "        pass"),
    "nothing acquired": ('sem="acq_rel"', 'sem="relaxed"'),
    "the count stays": ("tl.atomic_xchg(count_ptr + tl.program_id(0), 0)", "pass"),
    "combined too early": ("== splits - 1:\n            start", "== 0:\n            start"),
    "every split appends": ("tl.where(split == splits - 1, T, 0)", "T + 0 * split"),
    "weight of the other norm": ("u >= 0, k_norm_ptr", "u >= 0, q_norm_ptr"),
    "turned the other way": ("tl.where(low, -y, y) * sin", "tl.where(low, y, -y) * sin"),
    "the keys' place for the values": ("new_k + G * q_stride_h", "new_k + 0 * q_stride_h"),
    "later tokens seen": ("            seen = u <= position\n", "            seen = u <= position + T\n"),
    "positions of the first token": ("position = length + t\n", "position = length + 0 * t\n"),
    "not scaled back": ("acc * alpha + y * (p * y_scale)", "acc * alpha + y * p"),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutant_is_caught(mistake, tmp_path, monkeypatch):
    dims = dict(B=2, T=2, S=75, H=2, G=1, D=16, shortest=68, cache="int8", rotary=True, qk_norm=True, norm_weight=True)
    torch.manual_seed(0)
    arguments, keywords = inputs(**dims, dtype=torch.float32)
    expected = append_attention_reference(*copied(arguments), **keywords)
    right = copied(arguments)
    torch.testing.assert_close(interpreted(right, SPLIT, **keywords), expected, rtol=1e-3, atol=1e-3)
    module = mutated(page, *MUTANTS[mistake], tmp_path, monkeypatch)
    cache = module.Cache(*arguments[1:3], *arguments[5:7])
    step = module.Append(arguments[9], arguments[10], arguments[7], arguments[8], 1e-6, arguments[11])
    with pytest.raises((AssertionError, Race)), interpreting(multiprocessors=SPLIT):
        for _ in range(2):
            found = module.launch(arguments[0], cache, *arguments[3:5], -1, 0.25, 0.0, 2, step)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            assert not arguments[11].any()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["", "int8", "fp8"])
def test_on_the_gpu_many_steps_leave_the_counts_at_zero(cache):
    """Hundreds of launches one after the other, as a graph replays them, each the same as the reference."""
    dims = APPEND_ATTENTION.bench[0]
    arguments, keywords = inputs(**dims, cache=cache, dtype=torch.bfloat16, device="cuda")
    expected = append_attention_reference(*copied(arguments), **keywords)
    first = append_attention_triton(*arguments, **keywords)
    torch.testing.assert_close(first.float(), expected.float(), rtol=2e-2, atol=2e-2)
    for _ in range(300):
        assert torch.equal(append_attention_triton(*arguments, **keywords), first)
    assert not arguments[11].any()
