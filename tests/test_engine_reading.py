"""Whole texts are read by a graph for each padded length: their tokens are those of the naive way, whatever is behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cpu_graph import CpuGraph, captured
from test_engine import GPT2, GREEDY, PROMPTS, SHORT, assert_empty, expected_of, make, naive, run
from test_engine_fused import SWIGLU
from test_engine_server import WINDOWED

import kernels
from gptfast.engine import Engine, KVCache, Sampling
from gptfast.engine.cache import Piece
from gptfast.engine.decoder import Decoder, padded
from gptfast.engine.weights import converted
from gptfast.model import GPT
from kernels.proof.interpret import interpreting

LONG = dataclasses.replace(GPT2, block_size=300, n_layer=1)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptfast.engine.decoder.captured", captured)


def recording(engine: Engine) -> Engine:
    """The engine, as on CUDA."""
    for decoder in (engine.decoder, engine._draft):
        if decoder is not None:
            decoder.records = True
    return engine


def test_few_lengths() -> None:
    lengths = [padded(n, 5000) for n in range(1, 4097)]
    assert all(n <= length < n + max(64, n / 4) for n, length in enumerate(lengths, 1))
    assert len(set(lengths)) == 20 and lengths == sorted(lengths)
    assert padded(60, 24) == 24 and padded(960, 1024) == 1024 and padded(513, 600) == 600


@pytest.mark.parametrize(
    "options",
    [
        dict(slots=1), dict(slots=3, page_size=5), dict(slots=7, prefill_tokens=8), dict(slots=2, lag=2),
        dict(slots=3, page_size=4, pages=12), dict(slots=4, page_size=4, prefix_cache=False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", SHORT)
def test_prompts_of_mixed_lengths_in_any_company(name: str, options: dict) -> None:
    """Beside pieces that begin later, known beginnings, and who gives way."""
    engine = recording(Engine(make(SHORT[name]), **options))
    assert run(engine, *((p, GREEDY) for p in PROMPTS)) == expected_of(name)
    assert list(engine.decoder._readers) == [24]


def test_a_graph_reads_every_text_of_its_length() -> None:
    """Recorded with one text and replayed with others, longer and shorter; each in whatever slot is free."""
    model = make(LONG)
    engine = recording(Engine(model, slots=2, page_size=16, prefix_cache=False))
    prompts = [[(7 * i + n) % 61 for i in range(n)] for n in (100, 65, 128, 64, 1, 250, 193, 300, 120)]
    assert run(engine, *((p, Sampling(4, 0)) for p in prompts)) == [naive(model, p, 4) for p in prompts]
    assert sorted(engine.decoder._readers) == [64, 128, 256, 300]
    assert engine.prompts_read == len(prompts)


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_a_rounded_cache_is_attended_to_as_it_is_kept(storage: Any) -> None:
    model, wanted = make(SHORT["qwen3"]), [(p, GREEDY) for p in PROMPTS]
    plain = Engine(model, slots=3, kv_storage=storage)
    assert run(recording(Engine(model, slots=3, kv_storage=storage)), *wanted) == run(plain, *wanted)


def test_a_gated_block_and_a_window_and_8_bits() -> None:
    model = make(dataclasses.replace(SWIGLU, block_size=20))
    engine = recording(Engine(model, slots=3, page_size=4))  # which remembers, so that no layer is a ring
    assert run(engine, *((p, GREEDY) for p in PROMPTS[:3])) == [naive(model, p, 30) for p in PROMPTS[:3]]
    assert engine.decoder._readers


def test_guesses_of_a_draft() -> None:
    model, draft = make(SHORT["qwen3"]), make(dataclasses.replace(SHORT["qwen3"], n_layer=1), 1)
    engine = recording(Engine(model, slots=3, draft=draft, guesses=3, page_size=4))
    assert run(engine, *((p, GREEDY) for p in PROMPTS)) == expected_of("qwen3")
    assert engine._draft is not None and engine._draft._readers


def test_other_weights_are_recorded_anew() -> None:
    engine, other = recording(Engine(make(SHORT["gpt2"]))), make(SHORT["gpt2"], 1)
    run(engine, ([1, 2], GREEDY))
    engine.load_weights(other)
    assert not engine.decoder._readers
    assert run(engine, ([1, 2], GREEDY)) == [naive(other, [1, 2], 30)]


@pytest.mark.parametrize("where", [0, 1])
def test_without_memory_for_a_graph_texts_are_read_launch_by_launch(
    where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the first does not fit or a later one."""
    calls: list[int] = []

    def short_of_memory(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > where:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return captured(*arguments)

    monkeypatch.setattr("gptfast.engine.decoder.captured", short_of_memory)
    model, prompts = make(LONG), [[3] * 50, [5] * 100, [7] * 200]
    engine = recording(Engine(model, slots=1, prefill_tokens=300))
    assert run(engine, *((p, Sampling(3, 0)) for p in prompts)) == [naive(model, p, 3) for p in prompts]
    assert not engine.decoder.records and not engine.decoder._readers and len(calls) == where + 1
    assert engine.prefill_alone == 300


@pytest.mark.parametrize("options", [dict(), dict(page_size=4), dict(page_size=8, prefix_cache=False)], ids=str)
def test_layers_with_a_window_keep_the_newest_of_a_text(options: dict) -> None:
    """In their few pages, beside the inputs of token shifts; shorter texts than those and longer ones."""
    model = make(WINDOWED)
    engine = recording(Engine(model, slots=3, **options))
    assert engine.cache.is_ring(0) or engine.cache.pool.remembers
    prompts = [[(5 * i + n) % 61 for i in range(n)] for n in (1, 17, 60, 118, 100, 33, 70)]
    assert run(engine, *((p, Sampling(12, 0)) for p in prompts)) == [naive(model, p, 12) for p in prompts]
    assert sorted(engine.decoder._readers) == [64, 120]


def test_who_begins_alike_goes_on_from_what_a_graph_wrote() -> None:
    """With the inputs of token shifts at the ends of its pages."""
    model, text = make(SHORT["modern"]), list(range(20))
    engine = recording(Engine(model, slots=1, page_size=4))
    assert run(engine, (text, GREEDY)) == [naive(model, text, 30)]
    other = [*text[:13], 50]
    assert run(engine, (other, GREEDY)) == [naive(model, other, 30)] and engine.tokens_reused == 12


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_the_kernels_read(name: str) -> None:
    """Interpreted, from a graph of a shorter text: the hidden state and the cache of the definitions."""
    config = dataclasses.replace(SHORT[name], block_size=20, n_layer=1)
    plain = make(config)
    ops = kernels.Ops({op.name: ("triton", "its kernels", op.triton or op.reference) for op in kernels.OPS.values()})
    model = GPT(config, ops).eval()
    model.load_state_dict(plain.state_dict())
    caches = [KVCache(config, ops, 2, page_size=4), KVCache(config, plain.ops, 2, page_size=4)]
    mine, theirs = Decoder(converted(model, "model"), caches[0], False), Decoder(plain, caches[1], False)
    mine.records = True
    with interpreting(), torch.inference_mode():
        for slot, text in ((0, [1, 2, 3]), (1, list(range(11)))):
            for cache in caches:
                assert cache.reserve(slot, len(text))
            found, expected = (decoder.read([(Piece(slot, 0, len(text)), text)]) for decoder in (mine, theirs))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            for kept in zip(*(cache.kept(0, slot, 0, cache.rows(slot, torch.arange(len(text))), torch.float32)
                              for cache in caches), strict=True):  # fmt: skip
                torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-4)
    assert len(mine._readers) == 1 and caches[0].lengths.tolist() == [3, 11]
