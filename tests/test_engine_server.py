"""What a server asks of the engine: prompts together and in pieces, beginnings that are known, a pool that runs dry."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import kernels
from gptfast.config import GPTConfig
from gptfast.engine import Engine, Request, Sampling
from gptfast.engine.loop import Arriving
from gptfast.engine.pages import Pages
from gptfast.engine.sampling import Kinds, Settings, draw
from gptfast.model import GPT

OPS = kernels.load("reference")
GPT2 = GPTConfig(block_size=48, vocab_size=61, n_layer=2, n_head=2, n_embd=16)
MODERN = dataclasses.replace(
    GPT2, bias=False, norm="rmsnorm", position="rope", activation="relu2", qk_norm=True, tied=False, n_kv_head=1,
    token_shift=True, softcap=5.0,
)  # fmt: skip
ARCHITECTURES = {"gpt2": GPT2, "modern": MODERN}


def make(config: GPTConfig, seed: int = 0) -> GPT:
    """A GPT whose weights are large enough that its likeliest tokens vary."""
    torch.manual_seed(seed)
    model = GPT(config, OPS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def assert_empty(engine: Engine) -> None:
    assert not engine.running and not engine.busy and not engine.cache.lengths.any()
    assert engine.cache.free_pages == (engine.cache.pages if engine.cache.paged else 0)


def ask(engine: Engine, wanted: Sequence[tuple[Sequence[int], Sampling]]) -> list[list[int]]:
    requests = [engine.submit(*one) for one in wanted]
    finish(engine)
    assert [request.error for request in requests] == [""] * len(requests)
    assert_empty(engine)
    return [request.tokens for request in requests]


def texts(n: int, longest: int, seed: int = 0) -> list[tuple[list[int], Sampling]]:
    """n prompts of up to `longest` tokens, every third of which begins like another; greedy and drawn."""
    rng = random.Random(seed)
    wanted: list[tuple[list[int], Sampling]] = []
    for i in range(n):
        prompt = [rng.randrange(61) for _ in range(rng.randint(1, longest))]
        if i % 3 == 2:
            prompt = [*wanted[i - 1][0][: rng.randint(1, longest)], *prompt][:longest]
        settings = rng.choice(
            [dict(temperature=0), dict(temperature=0), dict(), dict(top_k=5), dict(top_p=0.8),
             dict(top_k=70, repetition_penalty=1.3), dict(temperature=0, repetition_penalty=1.5)]
        )  # fmt: skip
        wanted.append((prompt, Sampling(rng.randint(1, 40), seed=i, **settings)))
    return wanted


def alone(model: GPT, wanted: Sequence[tuple[Sequence[int], Sampling]]) -> list[list[int]]:
    """What each request gets by itself, its prompt read in one go."""
    return [ask(Engine(model), [one])[0] for one in wanted]


COUNT = 16


@functools.cache
def expected_of(name: str) -> list[list[int]]:
    return alone(make(ARCHITECTURES[name]), texts(COUNT, 44))


OPTIONS = [
    dict(slots=3, prefill_tokens=5),
    dict(slots=5, page_size=4, prefill_tokens=7),
    dict(slots=5, page_size=4, pages=13),  # one text at its longest, and a page
    dict(slots=4, page_size=1, pages=60, prefill_tokens=9),
    dict(slots=4, page_size=5, pages=20, draft=True, guesses=3, prefill_tokens=11),
    dict(slots=4, lag=2, page_size=4, pages=20, prefill_tokens=16),
    dict(slots=4, lag=1, draft=True, guesses=2, page_size=3, pages=30),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_request_draws_depends_on_nothing_else(name: str, options: dict) -> None:
    """In pieces, beside others, from known beginnings, after giving way, with guesses, and read late."""
    model = make(ARCHITECTURES[name])
    options = options | (dict(draft=make(ARCHITECTURES[name], 1)) if options.get("draft") else {})
    engine, expected = Engine(model, **options), expected_of(name)
    assert ask(engine, texts(COUNT, 44)) == expected
    assert len({token for tokens in expected for token in tokens}) > 30
    if "pages" in options and "draft" not in options:
        assert engine.preemptions > 0
    if engine.cache.paged:
        assert engine.tokens_reused > 0


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_a_rounded_cache_does_not_tell_where_a_text_was_cut(storage: str) -> None:
    model, wanted = make(MODERN), texts(10, 44)
    whole = [ask(Engine(model, kv_storage=storage), [one])[0] for one in wanted]
    engine = Engine(model, slots=4, page_size=4, pages=14, prefill_tokens=5, kv_storage=storage)
    assert ask(engine, wanted) == whole and engine.preemptions > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_next_turn_of_a_conversation_reads_what_is_new(name: str) -> None:
    model = make(ARCHITECTURES[name])
    engine = Engine(model, slots=2, page_size=4)
    first = engine.submit(list(range(14)), Sampling(9, 0))
    finish(engine)
    assert (engine.tokens_read, engine.tokens_reused) == (14, 0)
    turn = [*first.prompt, *first.tokens, 5, 6, 7]
    second = engine.submit(turn, Sampling(9, seed=1))
    other = engine.submit([60, *turn[1:]], Sampling(3, 0))  # alike but for its beginning
    finish(engine)
    kept = (14 + 9 - 1) // 4 * 4  # whole pages of what was read: the last token was only drawn
    assert (engine.tokens_read, engine.tokens_reused) == (14 + len(turn) - kept + len(turn), kept)
    assert [second.tokens, other.tokens] == alone(model, [(turn, second.sampling), (other.prompt, other.sampling)])
    assert_empty(engine)
    silent = Engine(model, slots=2, page_size=4, prefix_cache=False)
    assert ask(silent, [(first.prompt, first.sampling)] * 2)[0] == first.tokens
    ask(silent, [(first.prompt, first.sampling)])
    assert silent.tokens_read == 28  # of those that came together, one


def test_known_pages_go_when_memory_is_needed_the_oldest_first() -> None:
    pages = Pages(slots=2, count=6, page_size=2, remembers=True)
    old, new = [1, 2, 3, 4, 5], [6, 7, 8, 9]
    for text in (old, new):
        assert pages.hold(0, pages.match(text), len(text))
        pages.learn(0, text)
        pages.release(0)
    assert pages.free == 6 and len(pages.match([*old, 0])) == 2 and len(pages.match([*new, 0])) == 2
    assert len(pages.match(new)) == 1  # something must be left to read
    assert pages.match([9, 2, 3, 4, 5]) == []  # equal pages after another beginning are others
    assert pages.hold(0, pages.match([*old, 0]), 6)  # used again, and so not the oldest any more
    pages.release(0)
    assert pages.hold(1, [], 6)
    assert len(pages.match([*old, 0])) == 2 and len(pages.match([*new, 0])) == 1  # its end went first
    assert not pages.hold(0, [], 8) and pages.held[0] == []
    shared = pages.match([*old, 0])
    assert pages.hold(0, shared, 4) and pages.free == 1
    pages.forget()
    assert pages.match([*old, 0]) == [] and pages.free == 1
    pages.release(0)
    pages.release(1)
    assert pages.free == 6


def test_prompts_are_read_in_pieces_between_the_steps_of_others() -> None:
    """Whoever decodes gets a token at every step, and no step reads more than it may."""
    engine = Engine(make(GPT2), slots=4, prefill_tokens=8)
    steady = engine.submit([1], Sampling(40, 0))
    engine.step()
    long = [engine.submit([i, *range(40)], Sampling(3, 0)) for i in range(3)]
    late = engine.submit([7], Sampling(2, 0))
    before, reads = engine.tokens_read, []
    for _ in range(16):
        seen = len(steady.tokens)
        engine.step()
        reads.append(engine.tokens_read - before)
        before += reads[-1]
        assert len(steady.tokens) == seen + 1
    assert max(reads) == 8 and sum(reads) == 3 * 41 + 1
    assert all(len(request.tokens) > 0 for request in (*long, late))


def test_prompts_are_read_at_once_while_nobody_decodes() -> None:
    """In one pass up to `prefill_alone` tokens; as soon as somebody decodes, in the pieces that bound its wait."""
    model = make(GPT2)
    engine = Engine(model, slots=4, prefill_tokens=8, prefill_alone=64)
    wanted = [(range(40), Sampling(9, 0)), ([1, *range(30)], Sampling(9, 1, seed=3)), ([5] * 20, Sampling(9, 0))]
    requests, reads = [engine.submit(*one) for one in wanted], []
    while engine.busy:
        before = engine.tokens_read
        engine.step()
        reads.append(engine.tokens_read - before)
    assert reads[:5] == [64, 8, 8, 8, 3] and not any(reads[5:])
    assert [request.tokens for request in requests] == alone(model, wanted)
    sliding = engine.submit([3] * 60, Sampling(30, 0))  # waits for a pass for each of its tokens
    engine.step()
    engine.submit(range(40), Sampling(2, 0))
    before = engine.tokens_read
    engine.step()
    assert engine.tokens_read - before == 8 and len(sliding.tokens) == 2
    assert Engine(model).prefill_alone == 512, "a CPU gains nothing by it"
    with pytest.raises(ValueError, match="prefill_alone: expected at least 1, got 0"):
        Engine(model, prefill_alone=0)


@pytest.mark.parametrize("draft", [False, True])
def test_what_is_too_much_to_read_at_once_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, draft: bool) -> None:
    model = make(MODERN)
    more: dict[str, Any] = {"draft": make(MODERN, 1)} if draft else {}
    engine, sizes = Engine(model, slots=2, prefill_tokens=16, prefill_alone=64, **more), []
    read = engine.decoder.read

    def scarce(texts: Any) -> Any:
        sizes.append(sum(piece.tokens for piece, _ in texts))
        if sizes[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(texts)

    monkeypatch.setattr(engine.decoder, "read", scarce)
    wanted = [(range(35), Sampling(4, 0)), ([2] * 20, Sampling(4, 0))]
    assert ask(engine, wanted) == alone(model, wanted)
    assert sizes[:3] == [55, 16, 16] and max(sizes[1:]) == 16 and engine.prefill_alone == 16
    assert_empty(engine)


def test_texts_beyond_the_window_delay_others_by_one_pass() -> None:
    engine = Engine(make(GPT2), slots=5, prefill_tokens=8)
    beyond = [engine.submit([i] * 60, Sampling(4, 0)) for i in range(3)]
    inside = engine.submit([1, 2], Sampling(20, 0))
    for step in range(12):
        engine.step()
        assert len(inside.tokens) == step + 1
        assert sum(len(request.tokens) for request in beyond) == min(12, step + 1)  # each in turn
    assert [request.finish_reason for request in beyond] == ["length"] * 3


def test_who_gives_way_is_the_youngest_and_comes_back_first() -> None:
    model = make(GPT2)
    engine = Engine(model, slots=3, page_size=4, pages=12, prefix_cache=False)
    requests = [engine.submit([i, i], Sampling(40, 0)) for i in range(3)]
    ends: list[Request] = []
    while engine.busy:
        ends += [update.request for update in engine.step() if update.request.finish_reason]
        assert engine.cache.free_pages >= 0
    assert ends == requests and engine.preemptions >= 2
    assert [request.tokens for request in requests] == alone(model, [([i, i], Sampling(40, 0)) for i in range(3)])
    assert_empty(engine)


def test_whoever_waits_for_a_text_that_is_cancelled_reads_it_itself() -> None:
    model = make(MODERN)
    for page_size in (None, 4):
        engine = Engine(model, slots=3, page_size=page_size, prefill_tokens=6)
        requests = [engine.submit(list(range(20)), Sampling(5, seed=i)) for i in range(3)]
        engine.step()
        engine.cancel(requests[0])
        finish(engine)
        wanted = [(list(range(20)), Sampling(5, seed=i)) for i in (1, 2)]
        assert [request.tokens for request in requests[1:]] == alone(model, wanted)
        assert_empty(engine)


def test_new_weights_are_used_from_now_on_by_who_runs_and_who_comes() -> None:
    """Those of the same model, changed where they are; and those of another."""
    for weights, page_size in itertools.product(("model", "float16", "int8"), (None, 4)):
        model, other = make(GPT2), make(GPT2, seed=1)
        engine = Engine(model, slots=2, weights=weights, page_size=page_size)
        running = engine.submit([1, 2, 3], Sampling(12, 0))
        for _ in range(5):
            engine.step()
        so_far = list(running.tokens)
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)
        engine.load_weights()
        finish(engine)
        fresh = Engine(other, weights=weights)
        rest = ask(fresh, [([1, 2, 3, *so_far], Sampling(12 - len(so_far), 0))])[0]
        assert running.tokens == [*so_far, *rest]
        again = ask(engine, [([1, 2, 3], Sampling(12, 0))])
        assert again == ask(fresh, [([1, 2, 3], Sampling(12, 0))]) and again[0] != running.tokens
        third = make(GPT2, seed=2)
        engine.load_weights(third)
        wanted = [([1, 2, 3], Sampling(12, 0))]
        assert ask(engine, wanted) == ask(Engine(third, weights=weights), wanted)
    with pytest.raises(ValueError, match="model: its config"):
        engine.load_weights(make(MODERN))


@pytest.mark.parametrize("lag", [0, 2])
def test_random_arrivals_and_departures_lose_no_page(lag: int) -> None:
    """The fast form of two thousand requests that come, and are cancelled, whenever they like."""
    model, rng = make(dataclasses.replace(GPT2, n_layer=1)), random.Random(lag)
    wanted = texts(30, 60, seed=1)  # some beyond the window
    expected = alone(model, wanted)
    engine = Engine(model, slots=4, page_size=4, pages=25, prefill_tokens=13, lag=lag)
    requests: list[Request] = []
    while engine.busy or len(requests) < len(wanted):
        for one in wanted[len(requests) : len(requests) + rng.choice((0, 0, 0, 1, 1, 4))]:
            requests.append(engine.submit(*one))
        if requests and rng.random() < 0.03:
            engine.cancel(rng.choice(requests))
        engine.step()
    assert_empty(engine)
    for request, tokens in zip(requests, expected, strict=True):
        cut = len(request.tokens) if request.finish_reason == "cancelled" else None
        assert request.tokens == tokens[:cut]
    assert {request.finish_reason for request in requests} == {"length", "cancelled"}


# ---- the loop on the device ------------------------------------------------------------------------------------------
class NoReads(TorchFunctionMode):
    """Refuses whatever would let the host wait for a number, but where it is allowed."""

    READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero")
    allowed = False
    reads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READS and not self.allowed:
            raise AssertionError(f"the host reads by {name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guesses", [0, 2])
def test_a_step_reads_nothing_back_and_tokens_come_the_stated_steps_late(
    guesses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to draw, in requests of every kind; attention may look at its lengths, which on a CPU it does."""
    model, reading = make(MODERN), NoReads()
    options = dict(draft=make(MODERN, 1), guesses=guesses) if guesses else {}
    engine = Engine(model, slots=4, page_size=4, lag=2, **options)
    kinds = [dict(temperature=0), dict(logprobs=2), dict(top_k=5, repetition_penalty=1.2), dict(top_p=0.7)]
    requests = [engine.submit([i, 1, 2], Sampling(40, seed=i, **kind)) for i, kind in enumerate(kinds)]

    def unseen(function: Callable[..., Any], counts: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            reading.allowed, before = True, reading.allowed
            reading.reads += counts
            try:
                return function(*arguments, **named)
            finally:
                reading.allowed = before

        return call

    for ops in {id(twin.ops): twin.ops for twin in (engine.model, engine.loop.main.model)}.values():
        monkeypatch.setattr(ops, "decode_attention", unseen(ops.decode_attention))
    engine.step()  # the prompts
    monkeypatch.setattr(Arriving, "read", unseen(Arriving.read, counts=True))
    with reading:
        for steps in range(1, 9):
            engine.step()
            assert reading.reads == max(0, steps - 1)  # of the prompts' first tokens, then of a step each, two late
            if not guesses:
                assert [len(request.tokens) for request in requests] == [max(0, steps - 1)] * 4
    finish(engine)
    assert [request.tokens for request in requests] == alone(model, [(r.prompt, r.sampling) for r in requests])


def test_what_ends_is_seen_late_and_nobody_sees_what_came_after() -> None:
    """A stop token while a step and another are under way: the slot's next tokens are nobody's."""
    model = make(GPT2)
    (tokens,) = alone(model, [([1, 2], Sampling(30, seed=1))])
    stop = next(token for token in tokens[8:] if token not in tokens[:8])
    engine = Engine(model, slots=2, lag=2)
    stopped = engine.submit([1, 2], Sampling(30, seed=1, stop_tokens=(stop,)))
    other = engine.submit([3], Sampling(30, seed=2))
    after = engine.submit([1, 2], Sampling(30, seed=1))
    given: dict[Request, list[int]] = {stopped: [], other: [], after: []}
    while engine.busy:
        for update in engine.step():
            given[update.request] += update.tokens
    assert stopped.finish_reason == "stop" and given[stopped] == stopped.tokens == tokens[: tokens.index(stop)]
    assert given[after] == after.tokens == tokens
    assert given[other] == alone(model, [([3], Sampling(30, seed=2))])[0]
    assert_empty(engine)


def test_rows_of_every_kind_draw_what_each_draws_alone() -> None:
    """One batch of all kinds, with equal logits among them, as in 16 bits: the order of equals is part of the rule."""
    samplings = [
        Sampling(temperature=0), Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_k=64),
        Sampling(top_k=65), Sampling(top_k=500), Sampling(top_p=0.6), Sampling(top_k=9, top_p=0.9), Sampling(top_k=700),
    ]  # fmt: skip
    logits = torch.randn(len(samplings), 600).mul(2).round()  # some hundred of each value
    uniform = torch.rand(len(samplings), dtype=torch.float64)
    together = draw(logits, uniform, Settings.of(samplings), Kinds.of(samplings, 600))
    for i, sampling in enumerate(samplings):
        one = draw(logits[i : i + 1], uniform[i : i + 1], Settings.of([sampling]), Kinds.of([sampling], 600))
        assert one[0] == together[i]
    expected = sorted(range(600), key=lambda token: (-logits[3, token].item(), token))[:3]
    drawn = draw(logits[3].expand(99, 600), torch.linspace(0, 0.999, 99).double(), Settings.of([samplings[3]] * 99),
                 Kinds.of([samplings[3]], 600))  # fmt: skip
    assert sorted(set(drawn.tolist())) == sorted(expected)


# ---- layers with a window --------------------------------------------------------------------------------------------
WINDOWED = dataclasses.replace(MODERN, n_layer=3, block_size=120, window=5, window_pattern="SSL")


@pytest.mark.parametrize(
    "options",
    [
        dict(prefill_tokens=7), dict(page_size=4, prefix_cache=False, pages=70, prefill_tokens=60),
        dict(kv_storage="int8", prefill_tokens=9), dict(page_size=4, pages=70, prefill_tokens=9),
        dict(draft=True, guesses=3, prefill_tokens=30), dict(page_size=8, prefix_cache=False, lag=1),
    ],
    ids=str,
)  # fmt: skip
def test_layers_with_a_window_hold_that_and_no_more(options: dict) -> None:
    """Past where their few pages begin again, in any company: and a pool that remembers holds all."""
    model = make(WINDOWED)
    options = options | (dict(draft=make(WINDOWED, 1)) if options.get("draft") else {})
    engine = Engine(model, slots=3, **options)
    rng = random.Random(3)
    wanted = [
        ([rng.randrange(61) for _ in range(n)], Sampling(m, 0)) for n, m in ((1, 60), (50, 12), (50, 12), (59, 9))
    ]
    wanted[2] = (wanted[1][0], Sampling(12, seed=1))  # cloned
    storage = {key: options[key] for key in ("kv_storage",) if key in options}
    assert ask(engine, wanted) == [ask(Engine(model, **storage), [one])[0] for one in wanted]
    if not storage:
        assert ask(engine, wanted[:1])[0] == naive(model, *wanted[0])
    first, last = engine.cache.k[0], engine.cache.k[-1]
    if engine.cache.paged and engine.cache.pool.remembers:
        assert first.shape == last.shape and not engine.cache.is_ring(0)
    else:
        page = min(engine.cache.page_size, 16)
        assert len(first) * first.shape[1] <= 3 * (5 + 2 * 8 + 2 * page) and engine.cache.is_ring(1)
        assert engine.cache.paged or first.numel() < last.numel() / 2


@torch.no_grad()
def naive(model: GPT, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    tokens = list(prompt)
    for _ in range(sampling.max_tokens):
        tokens.append(int(model.logits(torch.tensor([tokens[-model.config.block_size :]]), last_only=True).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_on_a_gpu_a_step_is_one_graph_for_each_set_of_kinds(name: str) -> None:
    """The CPU's test_what_a_request_draws_depends_on_nothing_else, by the kernels, with tokens that are read late."""
    model = make(ARCHITECTURES[name])
    model.ops = kernels.load("auto")
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = model.ops
    model, wanted = model.cuda(), texts(COUNT, 44)
    whole = [ask(Engine(model, lag=0), [one])[0] for one in wanted]
    engine = Engine(model, slots=4, page_size=4, pages=40, prefill_tokens=9)
    assert engine.lag == 1 and ask(engine, wanted) == whole
    recorded = len(engine.loop._graphs)
    assert ask(engine, wanted) == whole and len(engine.loop._graphs) == recorded > 1
