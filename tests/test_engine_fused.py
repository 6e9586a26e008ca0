"""A step by few launches: its tokens are those of the naive way, whatever block and cache, and its launches are few."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_engine import ARCHITECTURES, GREEDY, PROMPTS, SHORT, expected_of, make, naive, run

import kernels
from bench.host import Count
from bench.step_work import CountOps, step_work
from gptfast.config import PRESETS, GPTConfig
from gptfast.engine import Engine, KVCache, Sampling
from gptfast.engine.decoder import Decoder
from gptfast.engine.fused import FusedStep, fits
from gptfast.engine.weights import converted
from gptfast.model import GPT
from kernels._triton import launching

# The engine takes these for kernels; they are the definitions, so that hundreds of tokens take seconds.
DEFINED = kernels.Ops({name: ("triton", "its definition", op.reference) for name, op in kernels.OPS.items()})
SWIGLU = dataclasses.replace(
    SHORT["gpt2"], activation="swiglu", norm="rmsnorm", norm_weight=True, position="rope", embedding_norm=True,
    window_pattern="SL", window=5,
)  # fmt: skip
NAMES = [name for name, config in ARCHITECTURES.items() if not (config.token_shift and config.block_shift)]


def by_few_launches(model: GPT) -> GPT:
    """The same model, whose steps are FusedStep."""
    twin = GPT(model.config, DEFINED, model.dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_tokens_past_the_window(name: str) -> None:
    model, prompt = make(dataclasses.replace(ARCHITECTURES[name], n_layer=1)), [1, 7, 3]
    assert run(Engine(by_few_launches(model)), (prompt, Sampling(200, 0))) == [naive(model, prompt, 200)]


@pytest.mark.parametrize("options", [dict(slots=1), dict(slots=3, page_size=5), dict(slots=7)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_mixed_lengths_in_any_number_of_slots(name: str, options: dict) -> None:
    engine = Engine(by_few_launches(make(SHORT[name])), **options)
    assert fits(engine.model)
    assert run(engine, *((p, GREEDY) for p in PROMPTS)) == expected_of(name)


@pytest.mark.parametrize("page_size", [None, 4])
def test_guesses_of_a_draft_leave_the_tokens_alone(page_size: int | None) -> None:
    model = by_few_launches(make(SHORT["qwen3"]))
    draft = by_few_launches(make(dataclasses.replace(SHORT["qwen3"], n_layer=1), 1))
    engine = Engine(model, slots=3, draft=draft, guesses=3, page_size=page_size)
    assert run(engine, *((p, GREEDY) for p in PROMPTS)) == expected_of("qwen3")


def test_a_gated_block_and_a_window() -> None:
    model = make(SWIGLU)
    wanted = [naive(model, p, 30) for p in PROMPTS[:3]]
    assert run(Engine(by_few_launches(model), slots=3), *((p, GREEDY) for p in PROMPTS[:3])) == wanted


@pytest.mark.parametrize("weights", ["model", "int8"])
@pytest.mark.parametrize("storage", ["same", "int8", "fp8"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_the_model(name: str, storage: str, weights: str) -> None:
    """Also where the cache is rounded, and with matrices in 8 bits; and so is what the cache then holds."""
    plain = make(SHORT[name])
    model = converted(by_few_launches(plain), weights)
    caches = [KVCache(model.config, DEFINED, 2, storage=storage, page_size=4) for _ in "ab"]
    steps = [FusedStep(model, caches[0]), lambda tokens: model.logits(tokens, cache=caches[1])]
    for cache in caches:
        assert cache.reserve(0, 12) and cache.reserve(1, 12)
    torch.manual_seed(0)
    with torch.inference_mode():
        for _ in range(3):
            tokens = torch.randint(61, (2, 3))
            found, expected = (step(tokens) for step in steps)
            torch.testing.assert_close(found, expected, rtol=2e-3 if storage != "same" else 1e-5, atol=1e-4)
            for cache in caches:
                cache.advance(3)
    for mine, theirs in zip(caches[0].k + caches[0].v_scale, caches[1].k + caches[1].v_scale, strict=True):
        torch.testing.assert_close(
            mine[1:].float(), theirs[1:].float(), rtol=1e-4, atol=1.0 if storage != "same" else 1e-5
        )


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_the_kernels_do_a_step(name: str) -> None:
    """Interpreted, one step of two layers by the kernels themselves; afterwards all counts are 0 again."""
    interpreted = kernels.load("reference", decode_linear="interpret", append_attention="interpret",
                               decode_embedding="interpret")  # fmt: skip
    model = by_few_launches(make(SHORT[name]))
    caches = [KVCache(model.config, ops, 2) for ops in (interpreted, DEFINED)]
    kernel = GPT(model.config, interpreted).eval()
    kernel.load_state_dict(model.state_dict())
    tokens = torch.tensor([[3], [5]])
    step = Decoder(kernel, caches[0], compile=False).logits
    with torch.inference_mode():
        torch.testing.assert_close(step(tokens), FusedStep(model, caches[1])(tokens), rtol=1e-5, atol=1e-5)
    assert isinstance(step, FusedStep) and not step.counts.any()
    for mine, theirs in zip(caches[0].k, caches[1].k, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["model", "int8"])
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("config", [PRESETS["char-cpu"], PRESETS["char-modern-cpu"]], ids=["gpt2", "modern"])
def test_five_launches_a_layer(config: GPTConfig, B: int, weights: str) -> None:
    """Counted by the launcher, and not one of torch's beside them; the loop that draws tokens is not in it."""
    count, seen = Count(), CountOps()
    ops = kernels.Ops({name: ("triton", "counted", op.triton or op.reference) for name, op in kernels.OPS.items()})
    with torch.no_grad(), launching(count.launcher):
        model = GPT(config, ops).eval()
        model.dtype = torch.bfloat16
        model = converted(model, weights)
        step = Decoder(model, KVCache(config, ops, B, dtype=model.dtype), compile=False).logits
        tokens = torch.zeros(B, 1, dtype=torch.int64)
        with seen:
            step(tokens)
    assert count.launches == 5 * config.n_layer + 2 and not seen.seen
    work = step_work(config, B, 32, weights)
    assert work.kernels == 5 * config.n_layer + 3 and work.torch_ops == 1  # the token's choice; a sum of lengths


def test_what_does_not_fit_goes_the_models_own_way() -> None:
    model = by_few_launches(make(SHORT["gpt2"]))
    assert fits(model) and not fits(make(SHORT["gpt2"]))  # no kernels
    cache, tokens = KVCache(model.config, DEFINED, 65), torch.randint(61, (65, 1))
    with torch.inference_mode():
        assert torch.equal(FusedStep(model, cache)(tokens), model.logits(tokens, cache=cache))
    for field in ("value_embeddings", "residual_scalars", "smear", "backout"):
        config = dataclasses.replace(SHORT["gpt2"], n_embd=24, **{field: True})
        assert not fits(GPT(config, DEFINED))
    assert not fits(converted(model, "float16"))
    model.dtype = torch.bfloat16
    assert not fits(model) and fits(converted(model, "model")) and fits(converted(model, "int8"))
    shifted = by_few_launches(make(SHORT["modern"]))
    assert not fits(shifted)
    assert run(Engine(shifted), *((p, GREEDY) for p in PROMPTS[:2])) == expected_of("modern")[:2]
