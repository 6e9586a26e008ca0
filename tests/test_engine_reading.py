"""Texts are read by graphs of padded lengths: their tokens are those of the naive way, whatever stands behind them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from cpu_graph import captured
from test_engine import GPT2, GREEDY, PROMPTS, SHORT, expected_of, make, naive, run
from test_engine_fused import SWIGLU
from test_engine_server import WINDOWED
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from bench.host import Count
from bench.step_work import Idle
from gptfast.engine import Engine, KVCache, Sampling
from gptfast.engine.cache import Piece
from gptfast.engine.decoder import Decoder, padded
from gptfast.engine.weights import converted
from gptfast.model import GPT
from kernels._triton import launching
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
    lengths = [padded(n, 4) for n in range(1, 4097)]
    assert all(n <= length < n + max(64, n / 4) for n, length in enumerate(lengths, 1))
    assert len(set(lengths)) == 20 and lengths == sorted(lengths)
    assert padded(60, 4, 24) == 24 and padded(960, 4) == 1024 and padded(513, 4, 600) == 600
    assert {padded(n, 1) for n in range(1, 4097)} == {64, 128, 256, 512, 1024, 2048, 4096}


@pytest.mark.parametrize(
    "options",
    [
        dict(slots=3, page_size=5, pages=12), dict(slots=7, prefill_tokens=8), dict(slots=2, lag=2, prefill_tokens=1),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", SHORT)
def test_prompts_of_mixed_lengths_in_any_company(name: str, options: dict) -> None:
    """Beside pieces that begin later, known beginnings, and who gives way."""
    engine = recording(Engine(make(SHORT[name]), **options))
    assert run(engine, *((p, GREEDY) for p in PROMPTS)) == expected_of(name)
    assert (24, 0) in engine.decoder._readers and len(engine.decoder._readers) <= 2


def test_a_graph_reads_every_text_of_its_length() -> None:
    """Recorded with one text and replayed with others, longer and shorter; each in whatever slot is free."""
    model = make(LONG)
    engine = recording(Engine(model, slots=2, page_size=16, prefix_cache=False))
    prompts = [[(7 * i + n) % 61 for i in range(n)] for n in (100, 65, 128, 64, 1, 250, 193, 300, 120)]
    assert run(engine, *((p, Sampling(4, 0)) for p in prompts)) == [naive(model, p, 4) for p in prompts]
    assert sorted(engine.decoder._readers) == [(64, 0), (128, 0), (256, 0), (300, 0)]
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


def test_who_finds_no_memory_has_read_nothing() -> None:
    """Of two turns that are read together the second has no room for its graph; the first looks back at its past."""
    model = make(dataclasses.replace(SHORT["modern"], block_size=300))
    cache, other = (KVCache(model.config, model.ops, 2, page_size=4, remembers=True) for _ in "ab")
    decoder, plain = Decoder(model, cache, False), Decoder(model, other, False)
    text, calls = list(range(61)) * 4, []

    def short_of_memory(run: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return captured(run, *arguments)

    decoder.records, decoder.capture = True, short_of_memory
    with torch.inference_mode():
        for first, ends in ((0, (10, 10)), (10, (40, 240))):
            for one in (cache, other):
                assert one.reserve(0, ends[0]) and one.reserve(1, ends[1])
            pieces = [(Piece(slot, first, end - first), text[first:end]) for slot, end in enumerate(ends)]
            torch.testing.assert_close(decoder.read(pieces), plain.read(pieces), rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 and not decoder.records


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


@pytest.mark.parametrize(
    "options", [dict(prefill_tokens=64), dict(page_size=4), dict(page_size=8, prefix_cache=False)], ids=str
)
def test_layers_with_a_window_keep_the_newest_of_a_text(options: dict) -> None:
    """In their few pages, beside the inputs of token shifts; shorter texts than those and longer ones."""
    model = make(WINDOWED)
    engine = recording(Engine(model, slots=3, **options))
    assert engine.cache.is_ring(0) or engine.cache.pool.remembers
    prompts = [[(5 * i + n) % 61 for i in range(n)] for n in (1, 17, 60, 118, 100, 33, 70)]
    assert run(engine, *((p, Sampling(12, 0)) for p in prompts)) == [naive(model, p, 12) for p in prompts]
    assert {(64, 0), (120, 0)} & set(engine.decoder._readers) and engine.decoder.records


@pytest.mark.parametrize("storage", ["same", "int8"])
@pytest.mark.parametrize("name", ["gpt2", "modern", "windowed"])
def test_a_conversation_goes_on_from_what_it_holds(name: str, storage: Any) -> None:
    """Each turn is read by a graph from where the known pages end; so are the pieces of a long one, and a branch."""
    model = make(dataclasses.replace({**SHORT, "windowed": WINDOWED}[name], block_size=300, n_layer=2))
    engine, plain = (
        Engine(model, slots=1, prefill_tokens=100, page_size=8, kv_storage=storage, pages=140) for _ in "ab"
    )
    recording(engine)
    text: list[int] = []
    for turn, new in enumerate((3, 15, 60, 1, 130)):
        text += [(11 * i + turn) % 61 for i in range(new)]
        wanted = run(plain, (text, Sampling(9, 0)))
        assert run(engine, (text, Sampling(9, 0))) == wanted
        text += wanted[0]
    branch = ([*text[:64], 7], Sampling(9, 0))
    assert run(engine, branch) == run(plain, branch) and engine.tokens_reused == plain.tokens_reused > 100
    assert {(64, 128), (64, 256), (64, 512)} & set(engine.decoder._readers)
    assert engine.decoder.records


@torch.inference_mode()
@pytest.mark.parametrize("name", SHORT)
def test_the_cache_is_as_pieces_leave_it(name: str) -> None:
    """Keys, values, and the inputs of token shifts: the newest, and those at the ends of pages."""
    model, text = make(SHORT[name]), list(range(23))
    caches = [KVCache(model.config, model.ops, 2, page_size=4, remembers=True) for _ in "ab"]
    decoders = [Decoder(model, cache, False) for cache in caches]
    decoders[0].records = True
    for first, end in ((0, 1), (1, 10), (10, 23)):
        found = []
        for cache, decoder in zip(caches, decoders, strict=True):
            assert cache.reserve(1, end)
            found.append(decoder.read([(Piece(1, first, end - first), text[first:end])]))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        rows, (mine, theirs) = caches[0].rows(1, torch.arange(end)), caches
        full = torch.arange(2 * mine.pool.held[1][0], 2 * mine.pool.held[1][-1] + 2)[: end // 4 * 2]
        for one, other in (
            *((x.flatten(0, 1)[rows], y.flatten(0, 1)[rows]) for x, y in zip(mine.k, theirs.k, strict=True)),
            *((x.flatten(0, 1)[rows], y.flatten(0, 1)[rows]) for x, y in zip(mine.v, theirs.v, strict=True)),
            (mine._recent, theirs._recent),
            (mine._ends[:, full], theirs._ends[:, full]),
            (mine.lengths, theirs.lengths),
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert set(decoders[0]._readers) == {(24, 0), (64, 128)}


def test_what_others_left_behind_is_no_ones_harm() -> None:
    """A text that was no numbers lay in the slot before; the next one, read in two pieces, never looks there."""
    model = make(LONG)
    engine = recording(Engine(model, slots=1, prefill_tokens=40))
    for x in (*engine.cache.k, *engine.cache.v):
        x.fill_(float("nan"))
    text = [(11 * i) % 61 for i in range(70)]
    assert run(engine, (text, Sampling(5, 0))) == [naive(model, text, 5)]
    assert set(engine.decoder._readers) == {(64, 0), (64, 128)}


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


class Dispatched(TorchDispatchMode):
    """Every operator of torch that the host calls, be it a view or an allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def work_of_a_prompt(layers: int, records: bool, prompt: list[int]) -> tuple[Counter[str], int]:
    """Operators and launches from submit() to the first token, once what is recorded is."""
    count, ops = (
        Count(),
        kernels.Ops({n: ("triton", "counted", o.triton or o.reference) for n, o in kernels.OPS.items()}),
    )
    with torch.no_grad(), launching(count.launcher):
        model = GPT(dataclasses.replace(GPT2, n_layer=layers), ops).eval()
        model.dtype = torch.bfloat16
        engine = Engine(model, lag=1, prefill_alone=160)
        engine.decoder.records = records
        logits = torch.zeros(1, model.config.vocab_size)  # what kernels left out would have written may be no numbers
        engine.model.logits_of = lambda x: logits  # type: ignore[method-assign]
        wanted = Sampling(max_tokens=1, temperature=0)
        run(engine, (prompt, wanted))
        before = count.launches
        with Dispatched() as host:
            run(engine, (prompt, wanted))
    return host.seen, count.launches - before


def test_the_host_does_little_for_a_layer_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch by launch, four of ours, four products, and two copies into the cache; the rest are views and memory.
    From a graph nothing, however many layers there are and long the prompt is."""
    (two, launches), (four, more) = (work_of_a_prompt(n, False, [1] * 50) for n in (2, 4))
    layer = {name: (four[name] - count) / 2 for name, count in two.items() if four[name] != count}
    assert (more - launches) / 2 == 4 and layer["linear"] == 4 and layer["index_copy_"] == 2
    assert sum(layer.values()) <= 34 and sum(two.values()) - 2 * sum(layer.values()) <= 83

    monkeypatch.setattr("gptfast.engine.decoder.captured", lambda run, device, pool: (Idle(), run()))
    found = [work_of_a_prompt(layers, True, [1] * n) for layers, n in ((2, 50), (4, 50), (2, 160))]
    assert found[0] == found[1] == found[2] and found[0][1] == 0 and sum(found[0][0].values()) <= 59


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SHORT, "windowed"])
def test_on_a_gpu_graphs_read_what_launches_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's test_a_conversation_goes_on_from_what_it_holds, by the kernels and CUDA graphs."""
    monkeypatch.undo()
    config = dataclasses.replace({**SHORT, "windowed": WINDOWED}[name], block_size=300, n_layer=2)
    plain = make(config)
    model = GPT(config, kernels.load("auto")).eval().cuda()
    model.load_state_dict(plain.state_dict())
    for page_size in (None, 8):
        text: list[int] = []
        graphs, launches = (Engine(model, slots=1, prefill_tokens=100, page_size=page_size) for _ in "ab")
        launches.decoder.records = False
        assert graphs.decoder.records
        for turn, new in enumerate((3, 15, 60, 1, 130)):
            text += [(11 * i + turn) % 61 for i in range(new)]
            wanted = run(launches, (text, Sampling(9, 0)))
            assert run(graphs, (text, Sampling(9, 0))) == wanted
            text += wanted[0]
        assert graphs.decoder.records and len(graphs.decoder._readers) >= 2
