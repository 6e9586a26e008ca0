"""Requests that harm nobody else: what cannot be drawn is refused, or ends alone."""

from __future__ import annotations

import pytest
import torch

import kernels
from gptfast.config import GPTConfig
from gptfast.engine import Engine, Sampling
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer, CharTokenizer

OPS = kernels.load("reference")


def test_ids_that_have_no_token_are_never_drawn() -> None:
    """As in cl100k_base, whose special tokens do not follow on its others."""
    with_gaps = BPETokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, {"<|bos|>": 300})
    assert with_gaps.holes().tolist() == list(range(256, 300))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=1, n_head=1, n_embd=8), OPS).eval()
    with torch.no_grad():
        model.lm_head.weight[256:300] *= 50
    engine = Engine(model, slots=2, tokenizer=with_gaps)
    requests = [engine.submit("abc", Sampling(max_tokens=60, temperature=t, seed=1)) for t in (0.0, 1.0)]
    while engine.busy:
        engine.step()
    tokens = [token for request in requests for token in request.tokens]
    assert len(tokens) == 120 and not set(tokens) & set(range(256, 300)) and max(tokens) <= 300


def small() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=16, tied=False), OPS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.transformer["wte"].weight[19] = torch.nan  # poison: whoever reads this token
        model.lm_head.weight[19] = 0.0
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-320}, {"temperature": float("nan")}, {"temperature": "1"}, {"repetition_penalty": 1e-320},
        {"repetition_penalty": float("inf")}, {"top_k": 1.5}, {"top_p": float("nan")}, {"max_tokens": 1.5},
        {"max_tokens": True}, {"stop_tokens": 5}, {"stop_tokens": ("a",)}, {"stop": (5,)}, {"stop": "ab"},
        {"seed": 1.5}, {"seed": "x"}, {"logprobs": 21}, {"logprobs": -1}, {"logprobs": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_before_any_step(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}: "):
        Sampling(**settings)


ASKED = [([1, 2], Sampling(9, seed=1)), ([3], Sampling(12, 0)), ([4, 5, 6], Sampling(30, top_k=5, seed=2))]


def alone(model: GPT) -> list[list[int]]:
    found = []
    for prompt, sampling in ASKED:
        engine = Engine(model, slots=4)
        request = engine.submit(prompt, sampling)
        while engine.busy:
            engine.step()
        found.append(request.tokens)
    return found


@pytest.mark.parametrize("options", [{}, {"page_size": 4}, {"draft": True}], ids=str)
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_request_of_nan_ends_alone(options: dict, after: int) -> None:
    """Whenever it comes, and whoever has its slot and pages next."""
    model = small()
    options = options | ({"draft": model, "guesses": 2} if options.get("draft") else {})
    engine = Engine(model, slots=4, **options)
    requests = [engine.submit(prompt, sampling) for prompt, sampling in ASKED]
    for _ in range(after):
        engine.step()
    bad = engine.submit([7, 19, 8], Sampling(10, 0))
    long = engine.submit([1] * 14 + [19], Sampling(10, 0))
    while engine.busy:
        engine.step()
    assert [(r.finish_reason, r.tokens) for r in (bad, long)] == [("error", []), ("error", [])]
    assert "not numbers" in bad.error
    again = [engine.submit(prompt, sampling) for prompt, sampling in ASKED]
    while engine.busy:
        engine.step()
    expected = alone(model)
    assert [request.tokens for request in requests] == [request.tokens for request in again] == expected
    assert not engine.cache.lengths.any() and engine.cache.free_pages == (
        engine.cache.pages if "page_size" in options else 0
    )


@pytest.mark.parametrize("draft", [False, True])
def test_whatever_a_request_raises_takes_nothing_from_the_others(draft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text cannot be decoded; its prompt cannot be read; and a failure of the whole step can be tried again."""
    model = small()
    tokenizer = CharTokenizer("abcdefghijklmnopqrst")
    engine = Engine(model, slots=4, tokenizer=tokenizer, **({"draft": model, "guesses": 2} if draft else {}))
    requests = [engine.submit(prompt, sampling) for prompt, sampling in ASKED]
    bad = engine.submit([9], Sampling(8, 0))
    assert bad._stream is not None
    monkeypatch.setattr(bad._stream, "push", lambda token: 1 / 0)
    engine.step()
    assert (bad.finish_reason, bad.error) == ("error", "division by zero")
    unread = engine.submit([10, 11], Sampling(8, 0))
    with monkeypatch.context() as patched:
        patched.setattr(engine._main, "read", lambda pieces: (_ for _ in ()).throw(MemoryError("too long")))
        engine.step()
    assert (unread.finish_reason, unread.error) == ("error", "too long")
    step, calls = engine._main.logits, 0

    def failing(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")
        return step(tokens)

    monkeypatch.setattr(engine._main, "logits", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        while engine.busy:
            engine.step()
    while engine.busy:
        engine.step()
    assert [request.tokens for request in requests] == alone(model)


@pytest.mark.parametrize("options", [{}, {"page_size": 4}, {"draft": True}], ids=str)
def test_log_probabilities_are_those_of_the_whole_text(options: dict) -> None:
    """Whatever the temperature, before and past the window, and only for who asked."""
    model = small()
    options = options | ({"draft": model, "guesses": 2} if options.get("draft") else {})
    engine = Engine(model, slots=3, **options)
    asked = [engine.submit([1, 2], Sampling(30, t, top_k=k, seed=1, logprobs=3)) for t, k in ((0.0, 0), (0.7, 5))]
    silent = engine.submit([3], Sampling(5, seed=2))
    told: dict = {request: [] for request in (*asked, silent)}
    while engine.busy:
        for update in engine.step():
            told[update.request] += update.logprobs
    assert told[silent] == silent.logprobs == [] and len(silent.tokens) == 5
    for request in asked:
        assert told[request] == request.logprobs and len(request.logprobs) == len(request.tokens) == 30
        text = request.prompt + request.tokens
        for i, (token, (logprob, top)) in enumerate(zip(request.tokens, request.logprobs, strict=True)):
            seen = torch.tensor([text[: 2 + i][-16:]])
            with torch.no_grad():
                expected = model.logits(seen)[0, -1].log_softmax(-1)
            assert logprob == pytest.approx(expected[token].item(), abs=1e-4)
            assert [one for one, _ in top] == expected.topk(3).indices.tolist()
            assert [p for _, p in top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
