"""The engine against the naive way: every token from a forward pass over all tokens before it."""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import kernels
from gptfast.config import GPTConfig
from gptfast.engine import Engine, KVCache, Request, Sampling, generate
from gptfast.engine.cache import Piece
from gptfast.engine.sampling import Kinds, Settings, draw, penalize
from gptfast.engine.text import TextStream
from gptfast.engine.weights import Int8Linear, choose_weights, converted
from gptfast.model import GPT
from gptfast.tokenizer import CharTokenizer

OPS = kernels.load("reference")
GPT2 = GPTConfig(block_size=160, vocab_size=61, n_layer=2, n_head=2, n_embd=16)
MODERN = dataclasses.replace(
    GPT2, bias=False, norm="rmsnorm", position="rope", activation="relu2", qk_norm=True, tied=False, n_kv_head=1,
    token_shift=True, softcap=5.0,
)  # fmt: skip
QWEN3 = dataclasses.replace(MODERN, qk_norm_weight=True, head_size=12, norm_eps=1e-2, token_shift=False)
ARCHITECTURES = {
    "gpt2": GPT2,
    "modern": MODERN,
    "qwen3": QWEN3,
    "shifted embedding": dataclasses.replace(MODERN, block_shift=False),
}
SHORT = {name: dataclasses.replace(config, block_size=24) for name, config in ARCHITECTURES.items()}
GREEDY = Sampling(max_tokens=30, temperature=0)
PROMPTS = ([1, 2, 3], [5] * 10, [4], list(range(24)), list(range(25)), [1, 2, 3], [7, 8])  # of SHORT, 24 is the window


def make(config: GPTConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT whose weights are large enough that its likeliest tokens vary."""
    torch.manual_seed(seed)
    model = GPT(config, OPS, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@functools.cache
def expected_of(name: str) -> list[list[int]]:
    """What `make(SHORT[name])` says after each of PROMPTS."""
    return [naive(make(SHORT[name]), prompt, 30) for prompt in PROMPTS]


@torch.no_grad()
def naive(model: GPT, prompt: Sequence[int], n: int) -> list[int]:
    """n likeliest tokens after `prompt`, nanoGPT's way."""
    tokens = list(prompt)
    for _ in range(n):
        context = torch.tensor([tokens[-model.config.block_size :]])
        tokens.append(int(model.logits(context, last_only=True)[0, -1].argmax()))
    return tokens[len(prompt) :]


def run(engine: Engine, *wanted: tuple[Sequence[int], Sampling]) -> list[list[int]]:
    requests = [engine.submit(prompt, sampling) for prompt, sampling in wanted]
    while engine.busy:
        engine.step()
    assert all(request.finish_reason == "length" for request in requests)
    assert_empty(engine)
    return [request.tokens for request in requests]


def assert_empty(engine: Engine) -> None:
    assert not engine.running and not engine.busy
    assert not engine.cache.lengths.any()
    assert engine.cache.free_pages == (engine.cache.pages if engine.cache.paged else 0)


# ---- the likeliest tokens are those of the naive way -----------------------------------------------------------------
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_hundred_tokens_past_the_window_for_five_seeds(name: str) -> None:
    found = set()
    for seed in range(5):
        model, prompt = make(dataclasses.replace(ARCHITECTURES[name], n_layer=1), seed), [seed + 1, 7, 3]
        expected = naive(model, prompt, 200)
        assert run(Engine(model), (prompt, Sampling(200, 0))) == [expected]
        found |= set(expected)
    assert len(found) > 20  # not one token for ever


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("options", [dict(slots=1), dict(slots=3, page_size=5), dict(slots=7)], ids=str)
def test_prompts_of_mixed_lengths_in_any_number_of_slots(name: str, options: dict) -> None:
    engine = Engine(make(SHORT[name]), **options)
    assert run(engine, *((p, GREEDY) for p in PROMPTS)) == expected_of(name)


def test_half_the_bytes_are_the_naive_way_over_rounded_matrices() -> None:
    """With float16 weights too, sums are in fp32: nothing but the matrices is rounded."""
    model = make(SHORT["modern"])
    engine = Engine(model, slots=2, weights="float16")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.half().float())
    prompts = PROMPTS[:3]
    assert run(engine, *((p, GREEDY) for p in prompts)) == [naive(model, p, 30) for p in prompts]


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("page_size", [None, 4])
def test_guesses_of_a_draft_leave_the_tokens_alone(name: str, page_size: int | None) -> None:
    model = make(SHORT[name])
    for draft, guesses in ((make(dataclasses.replace(SHORT[name], n_layer=1), 1), 3), (model, 7)):
        engine = Engine(model, slots=3, draft=draft, guesses=guesses, page_size=page_size)
        assert run(engine, *((p, GREEDY) for p in PROMPTS)) == expected_of(name)


def test_right_guesses_save_steps() -> None:
    model, steps = make(GPT2), 0
    engine = Engine(model, draft=model, guesses=4)
    engine.submit([1, 2], Sampling(101, 0))
    while engine.busy:
        engine.step()
        steps += 1
    assert steps == 1 + 100 // 5  # the prompt, then four guesses and a token of its own at a time


@pytest.mark.parametrize("name", SHORT)
def test_any_order_of_arrival(name: str) -> None:
    model, generator = make(SHORT[name]), random.Random(0)
    for _ in range(2):
        engine = Engine(model, slots=3)
        arrivals = sorted((generator.randrange(60), i) for i in range(len(PROMPTS)))
        requests: dict[int, Request] = {}
        for step in range(200):
            requests |= {i: engine.submit(PROMPTS[i], GREEDY) for at, i in arrivals if at == step}
            engine.step()
        assert [requests[i].tokens for i in range(len(PROMPTS))] == expected_of(name)
        assert_empty(engine)


@pytest.mark.parametrize("options", [dict(), dict(page_size=4)], ids=str)
@pytest.mark.parametrize("name", SHORT)
def test_equal_prompts_are_read_once_and_cloned(name: str, options: dict) -> None:
    model = make(SHORT[name])
    engine = Engine(model, slots=4, **options)
    seeds = [Sampling(12, seed=seed) for seed in range(4)]
    together = run(engine, *(([9, 8, 7, 6, 5, 4], sampling) for sampling in seeds))
    assert engine.prompts_read == 1
    alone = [run(Engine(model, slots=4), ([9, 8, 7, 6, 5, 4], sampling))[0] for sampling in seeds]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 4


def test_equal_texts_share_whole_pages_until_the_last_gives_them_back() -> None:
    model = make(SHORT["gpt2"])
    engine = Engine(model, slots=3, page_size=4, prefix_cache=False)
    requests = [engine.submit(list(range(10)), Sampling(n, 0)) for n in (3, 5, 8)]
    engine.step()
    assert engine.prompts_read == 1 and engine.cache.pages - engine.cache.free_pages == 2 + 3 * 1  # two are full
    table = engine.cache.table[:, :3].tolist()
    assert table[0][:2] == table[1][:2] == table[2][:2] and len({row[2] for row in table}) == 3
    while engine.busy:
        engine.step()
    assert [request.tokens for request in requests] == [naive(model, list(range(10)), n) for n in (3, 5, 8)]
    assert_empty(engine)


@pytest.mark.parametrize("storage", ["int8", "fp8"])
@pytest.mark.parametrize("page_size", [None, 4])
def test_a_rounded_cache_stays_close(storage: str, page_size: int | None) -> None:
    model = make(SHORT["modern"])
    tokens = torch.randint(61, (1, 20))
    expected = model.logits(tokens)[0, 12:]
    errors = []
    for kept in ("same", storage):
        cache = KVCache(model.config, OPS, 1, storage=kept, page_size=page_size)
        logits = step_by_step(model, cache, tokens, first=12)
        errors.append(((logits - expected).norm() / expected.norm()).item())
    assert errors[0] < 1e-5
    assert 1e-5 < errors[1] < {"int8": 0.02, "fp8": 0.1}[storage]


@torch.no_grad()
def step_by_step(model: GPT, cache: KVCache, tokens: Tensor, first: int) -> Tensor:
    """Logits of tokens (1, T) from `first` on, one at a time after a prompt."""
    assert cache.reserve(0, tokens.shape[1])
    for start, end in ((0, first // 2), (first // 2, first)):  # in two pieces
        piece = cache.pieces([Piece(0, start, end - start)])
        model.hidden(tokens[:, start:end], cache=piece)
        piece.advance()
    found = []
    for token in tokens[0, first:]:
        found.append(model.logits(token[None, None], cache=cache)[0, 0])
        cache.advance(1)
    return torch.stack(found)


@pytest.mark.parametrize("name", SHORT)
def test_tokens_that_were_taken_back_leave_no_trace(name: str) -> None:
    model = make(SHORT[name])
    tokens = torch.randint(61, (1, 20))
    cache = KVCache(model.config, OPS, 1)
    step_by_step(model, cache, tokens, first=10)
    cache.advance(-7)
    again = torch.randint(61, (1, 5))
    with torch.no_grad():
        expected = model.logits(torch.cat((tokens[:, :13], again), dim=1))[:, 13:]
        torch.testing.assert_close(model.logits(again, cache=cache), expected)


# ---- draws -----------------------------------------------------------------------------------------------------------
WANTED = [
    ([1, 2, 3], Sampling(30, 0.9, seed=1)),
    ([4] * 9, Sampling(30, 1.3, top_k=5, seed=2)),
    ([1, 2, 3], Sampling(30, 1.0, top_p=0.7, seed=3, repetition_penalty=1.3)),
    ([7, 8], Sampling(30, 0, seed=4, repetition_penalty=1.5)),
    ([3] * 20, Sampling(30, 1.0, top_k=9, top_p=0.9, seed=5)),
]


@pytest.mark.parametrize("name", SHORT)
def test_a_seed_gives_its_tokens_in_any_company(name: str) -> None:
    model = make(SHORT[name])
    expected = [run(Engine(model), wanted)[0] for wanted in WANTED]
    for slots, order in ((5, (0, 1, 2, 3, 4)), (2, (4, 2, 0, 3, 1)), (3, (1, 0, 4, 3, 2))):
        together = run(Engine(model, slots=slots), *(WANTED[i] for i in order))
        assert together == [expected[i] for i in order]
    assert run(Engine(model, slots=3, draft=model, guesses=3), *WANTED) == expected


@pytest.mark.parametrize("weights", ["model", "float16", "int8"])
def test_company_changes_no_bit_of_a_slots_logits(weights: str) -> None:
    model, tokens = converted(make(GPT2), weights), torch.randint(61, (4, 1))
    cache = KVCache(model.config, OPS, 4)
    with torch.no_grad():
        alone = model.logits(torch.where(torch.arange(4)[:, None] == 2, tokens, 0), cache=cache)
        together = model.logits(tokens, cache=cache)
    assert torch.equal(alone[2], together[2])
    assert not torch.equal(alone[1], together[1])


def drawn(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Of every row by these settings, beside one row that wants something else."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    kinds = Kinds.of([sampling, Sampling(top_k=2), Sampling()], logits.shape[-1])
    return draw(logits, uniform, Settings.of([sampling] * len(logits)), kinds)


def test_draws_follow_the_probabilities() -> None:
    logits, uniform = torch.tensor([[1.0, 2.0, 0.0, 4.0]]), (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature, top_k, top_p, kept in (
        (1.0, 0, 1.0, [0, 1, 2, 3]), (1.0, 9, 1.0, [0, 1, 2, 3]), (2.0, 2, 1.0, [1, 3]), (1.0, 0, 0.9, [1, 3]),
        (1.0, 3, 0.8, [3]), (0.5, 0, 0.999, [0, 1, 3]),
    ):  # fmt: skip
        tokens = drawn(logits.expand(20_000, 4), uniform, temperature, top_k, top_p)
        share = torch.bincount(tokens, minlength=4) / 20_000
        hidden = torch.tensor([i not in kept for i in range(4)])
        expected = (logits[0] / temperature).masked_fill(hidden, float("-inf")).softmax(0)
        torch.testing.assert_close(share, expected, atol=1e-4, rtol=0)
    assert drawn(logits.expand(20_000, 4), uniform, 0.0, 0, 1.0).unique().tolist() == [3]


def test_the_ends_of_the_random_numbers_draw_possible_tokens() -> None:
    uniform = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    logits = torch.tensor([-torch.inf, 1.0, 2.0, 1.0, -torch.inf]).expand(2, 5)
    for settings in ((1.0, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.99), (1.0, 5, 0.5)):
        assert set(drawn(logits, uniform, *settings).tolist()) <= {1, 2, 3}
    assert drawn(logits, uniform, 1.0, 0, 1.0).tolist() == [1, 3]


def test_logits_that_are_not_numbers_are_an_error() -> None:
    bad = torch.tensor([[0.0, torch.nan, 1.0]])
    for settings in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.5)):
        assert drawn(bad, torch.tensor([0.5], dtype=torch.float64), *settings).tolist() == [-1]
    model = make(SHORT["gpt2"])
    with torch.no_grad():
        model.transformer["ln_f"].weight[3] = torch.nan
    engine = Engine(model)
    request = engine.submit([1], GREEDY)
    engine.step()
    assert request.finish_reason == "error" and "logits are not numbers" in request.error and request.tokens == []
    assert_empty(engine)
    with pytest.raises(ValueError, match="logits are not numbers"):
        generate(model, torch.tensor([[1]]), 3)


def test_a_penalty_strikes_what_occurred() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, -1.0])
    occurred = torch.tensor([[True, True, False, False]])
    assert penalize(logits[None], occurred, torch.tensor([2.0])).tolist() == [[1.0, -4.0, 1.0, -1.0]]
    assert logits.tolist() == [2.0, -2.0, 1.0, -1.0]


# ---- the life of a request -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [dict(), dict(page_size=4)], ids=str)
def test_a_cancelled_request_frees_its_slot_at_once(options: dict) -> None:
    model = make(SHORT["gpt2"])
    engine = Engine(model, slots=1, **options)
    first, second, third = (engine.submit([i], GREEDY) for i in (1, 2, 3))
    for _ in range(5):
        engine.step()
    engine.cancel(third)
    engine.cancel(first)
    assert (first.finish_reason, third.finish_reason, len(first.tokens)) == ("cancelled", "cancelled", 5)
    assert not engine.running
    (update,) = engine.step()
    assert update.request is second and engine.running == [second]
    while engine.busy:
        engine.step()
    assert second.tokens == naive(model, [2], 30)
    engine.cancel(second)
    assert second.finish_reason == "length"
    assert_empty(engine)


def test_a_thousand_cancelled_requests_leak_nothing() -> None:
    engine = Engine(make(SHORT["modern"]), slots=2, page_size=4)

    def cycle(n: int) -> int:
        for i in range(n):
            requests = [engine.submit([1 + i % 9, 2], GREEDY) for _ in range(3)]
            if i % 50 == 0:
                engine.step()
            for request in requests:
                engine.cancel(request)
        assert_empty(engine)
        gc.collect()
        return sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor | Request))

    assert cycle(20) == cycle(1000)


def test_a_full_pool_lets_requests_wait_in_line() -> None:
    model = make(SHORT["gpt2"])
    engine = Engine(model, slots=3, page_size=4, pages=8)
    long, short = (list(range(18)), Sampling(4, 0)), ([3], Sampling(3, 0))
    requests = [engine.submit(*wanted) for wanted in (long, (long[0][::-1], long[1]), short)]
    engine.step()
    assert engine.running == requests[:1]  # the second needs as many pages again, and the third does not overtake it
    while engine.busy:
        engine.step()
    assert [r.tokens for r in requests] == [
        naive(model, p, s.max_tokens) for p, s in (long, (long[0][::-1], long[1]), short)
    ]
    with pytest.raises(ValueError, match="this request needs 6, the pool has 5"):
        Engine(model, page_size=4, pages=5).submit([1, 2], Sampling(40))


def test_corner_cases_of_a_request() -> None:
    model = make(SHORT["gpt2"])
    engine = Engine(model, slots=2)
    nothing = engine.submit([1], Sampling(max_tokens=0))
    assert (nothing.tokens, nothing.finish_reason, engine.busy, engine.step()) == ([], "length", False, [])
    prompt = [i % 61 for i in range(100)]  # four windows long
    assert run(engine, (prompt, GREEDY)) == [naive(model, prompt, 30)]
    wide, all_of_them = Sampling(9, top_k=62, seed=1), Sampling(9, seed=1)
    assert run(engine, ([1], wide)) == run(engine, ([1], all_of_them))
    one = engine.submit([1, 2], Sampling(1, 0))
    assert [update.tokens for update in engine.step()] == [naive(model, [1, 2], 1)]
    assert one.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "prompt: empty"),
        ([61], {}, "prompt: ids must be 0 to 60, got 61"),
        ([-1], {}, "prompt: ids must be 0 to 60, got -1"),
        ("text", {}, "prompt: text needs a tokenizer"),
        ([1], dict(stop=("a",)), "stop: strings need a tokenizer"),
        ([1], dict(stop="a"), "stop: expected a tuple"),
        ([1], dict(stop=("",)), "stop: an empty string"),
        ([1], dict(max_tokens=-1), "max_tokens: must not be negative, got -1"),
        ([1], dict(temperature=-0.1), "temperature: must be 0, or 1e-06 to"),
        ([1], dict(temperature=float("nan")), "temperature: must be 0, or 1e-06 to"),
        ([1], dict(top_k=-1), "top_k: must not be negative"),
        ([1], dict(top_p=0.0), "top_p: must be above 0"),
        ([1], dict(repetition_penalty=0.0), "repetition_penalty: must be 1e-06 to"),
    ],
)
def test_bad_requests_name_the_argument(prompt: Sequence[int], sampling: dict, message: str) -> None:
    engine = Engine(make(SHORT["gpt2"]))
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, Sampling(**sampling))
    assert not engine.busy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(slots=0), "slots: expected at least 1"),
        (dict(weights="int3"), "weights: expected model, float16 or int8"),
        (dict(pages=4), "pages: a pool of pages needs a page_size"),
        (dict(page_size=0), "page_size: expected at least 1"),
        (dict(kv_storage="int4"), "storage: expected same, int8 or fp8"),
        (dict(draft=make(SHORT["gpt2"]), guesses=8), "guesses: expected 1 to 7, got 8"),
        (dict(draft=make(GPTConfig(24, 60, 1, 1, n_embd=8))), "draft: its vocab_size is 60, the model's 61"),
        (dict(draft=make(GPTConfig(23, 61, 1, 1, n_embd=8))), "draft: its block_size is 23, the model's 24"),
    ],
)
def test_bad_engines_name_the_argument(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(make(SHORT["gpt2"]), **options)


# ---- text ------------------------------------------------------------------------------------------------------------
class Bytes:
    """A tokenizer with one token for each byte, so that characters span tokens."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_no_character_is_cut() -> None:
    text = "naïve 日本 🙂 ok"
    stream, tokens = TextStream(Bytes()), Bytes().encode(text)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == text and stream.flush() == ""
    assert [piece for piece in pieces if piece] == list(text)
    half = TextStream(Bytes())
    assert [half.push(token) for token in "🙂".encode()[:3]] == ["", "", ""]
    assert half.flush() == "\ufffd"


def test_bytes_that_are_no_text_become_what_the_tokenizer_says() -> None:
    draws = random.Random(0)
    for _ in range(50):
        tokens = draws.choices([0x41, 0xE6, 0x97, 0xA5, 0xFF, 0xF0, 0x9F], k=12)
        stream = TextStream(Bytes())
        assert "".join(map(stream.push, tokens)) + stream.flush() == Bytes().decode(tokens)


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (("ab",), "xa"), (("b", "aab"), "x"), (("zz",), "xaabab"), (("abb", "bab"), "xaa"), (("xaabab",), ""),
        (("ba", "xx"), "xaa"), ((), "xaabab"),
    ],
)  # fmt: skip
def test_a_stop_string_is_never_shown(stop: tuple[str, ...], shown: str) -> None:
    stream, text = TextStream(Bytes(), stop), ""
    for token in b"xaabab":
        text += stream.push(token)
        assert shown.startswith(text)
        if stream.stopped:
            break
    assert text + stream.flush() == shown
    assert stream.stopped == (shown != "xaabab")


def test_requests_of_text_stop_where_they_should() -> None:
    config = dataclasses.replace(SHORT["gpt2"], vocab_size=64)  # padded: the tokenizer knows 26
    tokenizer, model = CharTokenizer("abcdefghijklmnopqrstuvwxyz"), make(config)
    with torch.no_grad():  # the likeliest of all is an id that no character has
        model.lm_head.weight[40] = 100 * model.lm_head.weight[40]
    engine = Engine(model, slots=2, tokenizer=tokenizer)
    free = engine.submit("hello", Sampling(30, 0.9, seed=3))
    shown = {}
    while engine.busy:
        for update in engine.step():
            shown[update.request] = shown.get(update.request, "") + update.text
    assert free.text == shown[free] == tokenizer.decode(free.tokens) and len(free.tokens) == 30
    text = free.text
    stop = text[10:12]
    stopped = engine.submit("hello", Sampling(30, 0.9, seed=3, stop=(stop, "never")))
    ended = engine.submit("hello", Sampling(30, 0.9, seed=3, stop_tokens=(free.tokens[7],)))
    while engine.busy:
        engine.step()
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[7])] and ended.finish_reason == "stop"
    assert_empty(engine)


# ---- generate, and the weights ---------------------------------------------------------------------------------------
def test_generate_continues_each_row_and_leaves_the_model_as_it_was() -> None:
    model = make(dataclasses.replace(SHORT["modern"], dropout=0.5)).train()
    start, state = torch.randint(61, (35, 5)), torch.get_rng_state()  # more rows than slots
    tokens = generate(model, start, 6, top_k=5, generator=torch.Generator().manual_seed(1))
    assert tokens.shape == (35, 11) and torch.equal(tokens[:, :5], start)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())  # no dropout, and every draw from the generator given
    again = generate(model, start, 6, top_k=5, generator=torch.Generator().manual_seed(1))
    other = generate(model, start, 6, top_k=5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(tokens, again) and not torch.equal(tokens, other)
    greedy, model = generate(model, start[:2], 30, temperature=0), model.eval()
    assert greedy[:, 5:].tolist() == [naive(model, row, 30) for row in start[:2].tolist()]
    assert torch.equal(generate(model, start, 0), start)


@pytest.mark.parametrize(("weights", "bound"), [("float16", 1e-3), ("int8", 2e-2)])
def test_converted_weights_stay_close(weights: str, bound: float) -> None:
    model = make(GPT2)
    tokens = torch.randint(61, (2, 50))
    with torch.no_grad():
        expected, found = model.logits(tokens), converted(model, weights).logits(tokens)
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-6 < error < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-2), (torch.bfloat16, 3e-2)])
def test_eight_bits_by_the_kernel_stay_close_and_keep_the_dtype(dtype: torch.dtype, bound: float) -> None:
    """What a GPU runs, with the kernel interpreted."""
    ops = kernels.load("reference", int8_linear="interpret")
    model, calls = make(GPT2, dtype=dtype), []
    model.ops = ops
    twin, tokens = converted(model, "int8"), torch.randint(61, (2, 5))
    for module in twin.modules():
        if isinstance(module, Int8Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected, found = model.logits(tokens), twin.logits(tokens)
    assert found.dtype == dtype and len(calls) == 4 * model.config.n_layer + 1
    assert 1e-4 < ((found - expected).norm() / expected.norm()).item() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_cast_once_and_shared_where_they_can_be(dtype: torch.dtype) -> None:
    model, tokens = make(GPT2, dtype=dtype), torch.randint(61, (2, 50))
    twin = converted(model, "model")
    assert twin.lm_head.weight.dtype == dtype
    assert (twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()) == (dtype == torch.float32)
    assert twin.transformer["wte"].weight is model.transformer["wte"].weight
    with torch.no_grad():
        assert torch.equal(twin.logits(tokens), model.logits(tokens))


def test_the_choice_of_weights_comes_with_a_reason() -> None:
    assert choose_weights(make(GPT2)) == ("model", "the matrices stay in the CPU's cache")
    with torch.device("meta"):
        large = GPT(GPTConfig(), OPS)
    assert choose_weights(large)[0] == "model"
    large.lm_head.weight = torch.nn.Parameter(torch.empty(1))  # on the CPU; the rest is as large as before
    kept, reason = choose_weights(large)
    assert kept == ("float16" if torch.backends.quantized.engine in ("x86", "fbgemm") else "model")
    assert "FBGEMM" in reason
    engine = Engine(make(GPT2))
    assert engine.why == "float32, the matrices stay in the CPU's cache"
    assert engine.matrix_bytes == 4 * (2 * 12 * 16 * 16 + 61 * 16)
    assert Engine(make(GPT2), weights="int8").matrix_bytes == engine.matrix_bytes // 4


def test_a_step_takes_no_whole_prompt() -> None:
    model = make(SHORT["gpt2"])
    with pytest.raises(ValueError, match="a step takes 1 to 8 a row, got 9"):
        model.logits(torch.zeros(1, 9, dtype=torch.int64), cache=KVCache(model.config, OPS, 1))


def test_a_step_is_one_graph() -> None:
    """For torch.compile: no graph break, and the logits of eager."""
    model = make(SHORT["modern"])
    caches = [KVCache(model.config, OPS, 2) for _ in range(2)]
    tokens = torch.tensor([[3], [4]])
    torch._dynamo.reset()
    step = torch.compile(lambda tokens: model.logits(tokens, cache=caches[1]), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(step(tokens), model.logits(tokens, cache=caches[0]))
            for cache in caches:
                cache.advance(1)
