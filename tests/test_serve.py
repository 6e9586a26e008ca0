"""The server: OpenAI's own client, streams and errors, tools, and who may ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import served
from openai import OpenAI
from scripted import scripted, tiny, told
from served import chat, engine, get, post, serving, until, user

from gptfast.chat.answers import Answers, answer_all
from gptfast.chat.conversation import text_of
from gptfast.chat.parts import PartStream
from gptfast.chat.sandbox import Limits, Result
from gptfast.chat.tools import Tools
from gptfast.engine import Engine, Sampling
from gptfast.serve.app import Guarded
from gptfast.serve.asking import SEED_STEP
from gptfast.serve.server import Server

ASKED = ["Hi", "What is 12 * 7?", "Be brief.", "naïve 日本語 🙂", "berry", "The word", "a", "Hello there, " * 9]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=served.PATIENCE_S)


def alone(text: str, sampling: Sampling) -> tuple[str, int]:
    """What an engine of as many slots answers to `text` when nobody else asks: the text and its tokens."""
    (answer,) = answer_all(Answers(engine(), chat()), [(chat().prompt(user(text)), sampling)])
    stream = PartStream(served.tokenizer(), chat())
    pieces = [*stream.push(answer.ids), *stream.flush()]
    return "".join(piece.text for piece in pieces if piece.kind == "text"), len(answer.ids)


def ask(client: OpenAI, text: str, **settings: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=user(text), **settings)


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_engine_alone_whatever_the_company(client: OpenAI) -> None:
    """Greedy and drawn, 16 at once on 4 slots, whole and streamed."""

    def asked(number: int) -> tuple[str, int]:
        text, settings = ASKED[number % 8], {"temperature": number % 3 / 2, "seed": number, "max_tokens": 10 + number}
        if number % 2:
            whole = ask(client, text, **settings)
            return whole.choices[0].message.content, whole.usage.completion_tokens
        chunks = list(ask(client, text, stream=True, stream_options={"include_usage": True}, **settings))
        assert [c.choices[0].finish_reason for c in chunks[:-1]].count(None) == len(chunks) - 2
        assert chunks[0].choices[0].delta.role == "assistant" and not chunks[-1].choices
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
        return said, chunks[-1].usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(asked, range(16)))
    for number, answer in enumerate(found):
        sampling = Sampling(10 + number, number % 3 / 2, 50, seed=number)
        assert answer == alone(ASKED[number % 8], sampling)


def test_texts_are_continued(client: OpenAI) -> None:
    ids = served.tokenizer().encode("Hello there")
    by_text = client.completions.create(model="tiny", prompt=["Hello there", "Be"], max_tokens=9, temperature=0, n=2)
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=9, temperature=0)
    texts = [choice.text for choice in by_text.choices]
    assert texts[0] == texts[1] == by_ids.choices[0].text and texts[2] == texts[3] and len(texts) == 4
    read = len(ids) + len(served.tokenizer().encode("Be"))
    assert by_text.usage.prompt_tokens == read and by_text.usage.completion_tokens == 36
    request = (alone_engine := engine()).submit(ids, Sampling(9, 0))
    while alone_engine.busy:
        alone_engine.step()
    assert request.text == texts[0]
    streamed = client.completions.create(model="tiny", prompt=ids, max_tokens=9, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == texts[0]


def test_choices_of_a_seed(client: OpenAI) -> None:
    several = ask(client, "Hi", n=3, seed=5, max_tokens=12)
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in several.choices] == [0, 1, 2]
    assert texts == [alone("Hi", Sampling(12, 0.8, 50, seed=(5 + i * SEED_STEP) % 2**63))[0] for i in range(3)]
    assert several.usage.completion_tokens == 36 and several.usage.prompt_tokens == len(chat().prompt(user("Hi")))
    streamed = ["", "", ""]
    for chunk in ask(client, "Hi", n=3, seed=5, max_tokens=12, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert ask(client, "Hi", seed=-1, max_tokens=12).choices[0].message.content not in texts


def test_stop_strings_end_an_answer_and_are_left_out(client: OpenAI, server: Server) -> None:
    whole, _ = alone("Hi", Sampling(40, 0.8, 50, seed=3))
    stop = [whole[7:9], "never said by anybody"]
    before = server.state.stats()["ended"].get("stop", 0)
    for stream in (False, True):
        found = ask(client, "Hi", seed=3, max_tokens=40, stop=stop, stream=stream)
        if stream:
            chunks = list(found)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            said = found.choices[0].message.content
            assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens < 40
        assert said == whole[: whole.index(stop[0])]
    assert server.state.stats()["ended"]["stop"] == before + 2
    assert ask(client, "Hi", seed=3, max_tokens=40, stop="never said").choices[0].message.content == whole


def test_probabilities_are_the_engines(client: OpenAI) -> None:
    (answer,) = answer_all(
        Answers(engine(), chat()), [(chat().prompt(user("Hi")), Sampling(8, 0.8, 50, seed=1, logprobs=3))]
    )
    assert len(answer.logprobs) == 8
    settings = {"seed": 1, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    whole = ask(client, "Hi", **settings).choices[0].logprobs.content
    streamed = [c for chunk in ask(client, "Hi", stream=True, **settings) for c in _content(chunk)]
    assert whole == streamed and len(whole) == 8
    texts = [bytes(entry.bytes).decode("utf-8", "replace") for entry in whole]
    assert texts == [served.tokenizer().decode([i]) for i in answer.ids]
    for entry, expected in zip(whole, answer.logprobs, strict=True):
        assert expected is not None
        assert [entry.logprob, *(t.logprob for t in entry.top_logprobs)] == [expected[0], *(p for _, p in expected[1])]
    assert ask(client, "Hi", seed=1, max_tokens=2).choices[0].logprobs is None

    plain = client.completions.create(model="tiny", prompt="Hi", max_tokens=6, seed=1, logprobs=2).choices[0].logprobs
    assert len(plain.tokens) == len(plain.token_logprobs) == 6 and all(len(top) == 2 for top in plain.top_logprobs)
    assert plain.text_offset == [sum(map(len, plain.tokens[:i])) for i in range(6)]


def _content(chunk: Any) -> list[Any]:
    logprobs = chunk.choices[0].logprobs
    return logprobs.content if logprobs else []


# ---- what is refused -------------------------------------------------------------------------------------------------

LONG = "x" * 8001
BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("messages", {"messages": []}, 400, "not an empty one"),
    ("messages", {"messages": [{"role": "user", "content": LONG}]}, 400, "at most 8000"),
    ("messages", {"messages": user("x" * 7000) * 1 + [{"role": "assistant", "content": "x" * 7000}] * 5}, 400, "32000"),
    ("messages", {"messages": user("x") * 501}, 400, "at most 500"),
    ("messages", {"messages": user("x") * 2}, 400, "take turns"),
    ("messages", {"messages": [{"role": "assistant", "content": "x"}]}, 400, "must be the user's"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}, 400, "than text"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}, *user("x")]}, 400, "'tool'"),
    ("messages", {"messages": user("x " * 1500)}, 400, "the model reads 256"),
    ("temperature", {"temperature": 2.1}, 400, "from 0 to 2"),
    ("temperature", {"temperature": "1"}, 400, "expected a number"),
    ("top_k", {"top_k": 201}, 400, "from 0 to 200"),
    ("top_p", {"top_p": 0}, 400, "from 1e-09 to 1"),
    ("max_tokens", {"max_tokens": 0}, 400, "from 1 to 4096"),
    ("max_tokens", {"max_tokens": True}, 400, "whole number"),
    ("n", {"n": 17}, 400, "from 1 to 16"),
    ("stop", {"stop": ["a"] * 5}, 400, "at most 4"),
    ("stop", {"stop": [""]}, 400, "1 to 256"),
    ("seed", {"seed": 1.5}, 400, "whole number"),
    ("top_logprobs", {"top_logprobs": 2}, 400, "needs logprobs"),
    ("stream_options", {"stream_options": {"include_usage": True}}, 400, "for a stream"),
    ("temprature", {"temprature": 1}, 400, "did you mean temperature?"),
    ("presence_penalty", {"presence_penalty": 0.5}, 400, "does not have it"),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "does not have it"),
    ("model", {"model": "gpt-4"}, 404, "ask for 'tiny'"),
]


@pytest.mark.parametrize(("param", "fields", "status", "said"), BAD, ids=[f"{b[0]}-{b[3]}" for b in BAD])
def test_bad_requests_are_told_why(client: OpenAI, param: str, fields: dict[str, Any], status: int, said: str) -> None:
    body = {"model": "tiny", "messages": user("Hi"), **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.status_code == status and said in caught.value.message
    assert caught.value.body["param"] == param  # type: ignore[index]


def test_what_asks_for_nothing_is_taken(client: OpenAI) -> None:
    body = {"messages": user("Hi"), "max_tokens": 1, "n": None, "stop": None, "presence_penalty": 0, "tools": [],
            "logit_bias": {}, "user": "me", "response_format": {"type": "text"}}  # fmt: skip
    assert client.post("/chat/completions", body=body, cast_to=object)


def test_other_bad_requests(server: Server) -> None:
    path = "/v1/chat/completions"
    for body, said in [
        (b"{", "not JSON"), (b"[]", "not an object"), (b"\xff{}", "not UTF-8"), (b"[" * 100_000, "nested too deeply"),
        (b'{"seed":' + b"1" * 5000 + b"}", "cannot be read: a number of more than 4,300 digits"),
        (b'{"temperature": NaN, "messages": []}', "messages"),
        (json.dumps({"messages": user("\ud800")}).encode(), "surrogate"),
    ]:  # fmt: skip
        response = post(server, path, body)
        assert response.status == 400 and said in response.json["error"]["message"]
    assert post(server, path, b"{}", Content_Type="text/plain").status == 415
    assert post(server, path, b" " * (2**20 + 1)).status == 413
    assert get(server, path).status == 405 and get(server, "/v1/nothing").status == 404
    ids = post(server, "/v1/completions", {"prompt": [10**6]})
    assert ids.status == 400 and ids.json["error"]["param"] == "prompt"


# ---- queue, cancellation, the end ------------------------------------------------------------------------------------


@pytest.fixture
def slow() -> Iterator[Server]:
    """A server of one slot and one place in the queue, which takes 10 ms for a token."""
    made = engine(slots=1)
    made.pause_s = 0.01
    with serving(made, queue=1, grace_s=0.1) as server:
        yield server


def test_who_comes_too_late_is_told_when_to_come_back(slow: Server) -> None:
    client = OpenAI(base_url=f"{slow.url}/v1", api_key="any", max_retries=0)
    streams = [ask(client, "Hi", max_tokens=250, stream=True)]
    next(iter(streams[0]))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, client, "Hi", max_tokens=1)
        until(lambda: slow.batcher.open == 2)
        with pytest.raises(openai.RateLimitError, match="the server is full: 1 requests wait") as caught:
            ask(client, "Hi", max_tokens=1)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        with pytest.raises(openai.BadRequestError, match="holds 2 answers at once"):
            ask(client, "Hi", n=3)
        streams[0].close()  # the client is gone: its slot is the next one's
        assert waiting.result().choices[0].finish_reason == "length"
    until(lambda: served.is_idle(slow))
    assert slow.state.stats()["ended"] == {"cancelled": 1, "length": 1}


def test_a_client_that_leaves_frees_its_slot(slow: Server) -> None:
    """Streamed or not, and whether it runs or waits."""
    client = OpenAI(base_url=f"{slow.url}/v1", api_key="any", max_retries=0)
    stream = ask(client, "Hi", max_tokens=250, stream=True)
    until(lambda: slow.state.stats()["busy"] == 1)
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.1), "Hi", max_tokens=250)
    until(lambda: slow.batcher.open == 1)
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.1), "Hi", max_tokens=250)
    until(lambda: served.is_idle(slow))
    assert slow.state.stats()["ended"] == {"cancelled": 3}


def test_the_end_lets_short_answers_finish_and_tells_the_others() -> None:
    made = engine(slots=2)
    made.pause_s = 0.01
    short: list[Any] = []
    long: list[Any] = []
    with serving(made, grace_s=1.0) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

        def finish() -> None:
            short.append(ask(client, "Hi", max_tokens=20))

        def be_cut() -> None:
            with pytest.raises(openai.APIError, match="shutting down"):
                long.extend(ask(client, "Hi", max_tokens=240, stream=True))
            long.append("told")

        threads = [threading.Thread(target=work) for work in (finish, be_cut)]
        for thread in threads:
            thread.start()
        until(lambda: server.state.stats()["busy"] == 2)
        server.stop()
        until(lambda: server.batcher.closing)
        assert not server.state.healthy
        for thread in threads:
            thread.join()
    assert short[0].usage.completion_tokens == 20 and long[-1] == "told"
    assert server.state.stats()["ended"] == {"length": 1, "error": 1}


def test_an_engine_that_fails_ends_its_answers_and_goes_on(slow: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    client = OpenAI(base_url=f"{slow.url}/v1", api_key="any", max_retries=0)
    decode = slow.engine._decode
    broken = [True]

    def failing() -> bool:
        if broken.pop() if broken else False:
            raise RuntimeError("out of memory\nmore")
        return decode()

    monkeypatch.setattr(slow.engine, "_decode", failing)
    with pytest.raises(openai.InternalServerError, match="the engine failed: out of memory"):
        ask(client, "Hi", max_tokens=9)
    assert (
        ask(client, "Hi", max_tokens=9, seed=1).choices[0].message.content
        == alone("Hi", Sampling(9, 0.8, 50, seed=1))[0]
    )


# ---- tools, nanochat, the rest ---------------------------------------------------------------------------------------

CALL, OUTPUT = ("python", "12*7"), ("python_output", "84")


def test_calls_are_shown_beside_what_is_said() -> None:
    parts = ["It is ", CALL, OUTPUT, " 84."]
    with serving(scripted(chat(), {"12*7?": told(chat(), *parts)})) as server:  # type: ignore[arg-type]
        asked = {"messages": user("12*7?"), "max_tokens": 99}
        message = post(server, "/v1/chat/completions", asked).json["choices"][0]["message"]
        assert message["content"] == "It is  84." == text_of(message["parts"])
        assert [(part["type"], part["text"]) for part in message["parts"]] == [
            ("text", "It is "), CALL, OUTPUT, ("text", " 84.")
        ]  # fmt: skip
        chunks = post(server, "/v1/chat/completions", {**asked, "stream": True}).events
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == "It is  84."
        shown = [delta["part"] for delta in deltas if "part" in delta]
        assert "".join(part["text"] for part in shown if part["type"] == "python") == "12*7"
        assert {"type": "python_output", "text": "84"} in shown and chunks[-1] == "[DONE]"
        # and given back, they are the ids that they were
        again = [*user("12*7?"), {"role": "assistant", "content": message["parts"]}, *user("12*7?")]
        assert post(server, "/v1/chat/completions", {**asked, "messages": again}).json["usage"]["prompt_tokens"] == len(
            chat().prompt(again)
        )
        events = post(server, "/chat/completions", asked).events
        assert events[-1] == {"done": True} and {"token": "84", "gpu": 0, "part": "python_output"} in events
        assert "".join(event.get("token", "") for event in events if "part" not in event) == "It is  84."


class Patient:
    """A sandbox whose code ends when the test says so."""

    def __init__(self) -> None:
        self.called, self.may_end, self.limits = threading.Event(), threading.Event(), Limits()

    def run(self, code: str) -> Result:
        self.called.set()
        assert self.may_end.wait(served.PATIENCE_S)
        return Result(True, f"ran {code}")


def test_others_go_on_while_python_runs() -> None:
    """On one slot; and who leaves meanwhile is gone at once."""
    call, output = ("python", "import time"), ("python_output", "ran import time")
    script = {"call": told(chat(), "So: ", call, output, "done."), "other": told(chat(), "Be brief.")}
    python = Patient()
    with (
        serving(scripted(chat(), script, slots=1), Tools(python=python), queue=1) as server,  # type: ignore[arg-type]
        ThreadPoolExecutor(1) as pool,
    ):
        client = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        calling = pool.submit(ask, client, "call", max_tokens=99)
        assert python.called.wait(served.PATIENCE_S)
        assert ask(client, "other").choices[0].message.content == "Be brief."
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.1), "call", max_tokens=99)
        until(lambda: server.batcher.open == 1)
        python.may_end.set()
        message = calling.result().choices[0].message
        assert message.content == "So: done." and {"type": output[0], "text": output[1]} in message.parts
        until(lambda: served.is_idle(server))


def test_figures(server: Server, client: OpenAI) -> None:
    ask(client, "Hi", max_tokens=20)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert get(server, "/health").json == {"status": "ok", "ready": True, "model": "tiny"}
    stats = get(server, "/stats").json
    assert stats["tokens_per_s"] > 0 and stats["ttft_ms_p50"] > 0 and stats["mbu"] is None
    assert (stats["slots"], stats["busy"], stats["queue"], stats["kv_used"]) == (4, 0, 0, 0)
    assert stats["kv_total"] >= 4 * 256 == 4 * stats["context_length"] and stats["model"] == "tiny"
    assert stats["kernels"]["attention"] == "reference" and stats["device"]
    text = get(server, "/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["gptfast_slots"]) == 4 and float(values['gptfast_tokens_total{kind="completion"}']) >= 20
    assert float(values["gptfast_ttft_seconds_count"]) == float(values['gptfast_ttft_seconds_bucket{le="+Inf"}']) > 0
    assert float(values['gptfast_http_replies_total{path="/health",status="200"}']) >= 1


@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_every_form_of_weights_is_served(weights: Any) -> None:
    made = Engine(tiny(served.tokenizer(), 256), slots=1, tokenizer=served.tokenizer(), weights=weights)
    with serving(made) as server:
        assert (
            post(server, "/v1/completions", {"prompt": "Hi", "max_tokens": 3}).json["usage"]["completion_tokens"] == 3
        )
        assert get(server, "/stats").json["weights"].startswith(weights)


def test_the_page_runs_under_a_policy(server: Server) -> None:
    page = get(server, "/")
    policy = page.headers["content-security-policy"]
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert "access-control-allow-origin" not in get(server, "/stats", Origin="http://evil.example").headers


def test_a_token_and_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(guarded=Guarded("0123456789abcdef", ("127.0.0.1",))) as server:
        right = {"Authorization": "Bearer 0123456789abcdef"}
        assert [get(server, "/v1/models", **headers).status for headers in ({}, right)] == [401, 200]
        for wrong in ("0123456789abcdef", "Bearer 0123456789abcdeg", "Bearer é", "Bearer"):
            response = post(server, "/v1/completions", {"prompt": "x"}, Authorization=wrong)
            assert response.status == 401 and response.headers["www-authenticate"] == "Bearer"
        assert get(server, "/health").status == get(server, "/").status == 200
        assert get(server, "/health", Host="evil.example").status == 403
        assert get(server, "/health", Host=f"127.0.0.1:{server.url.rsplit(':')[-1]}").status == 200
    assert not capsys.readouterr().err


def test_the_next_turn_does_not_read_the_last_again() -> None:
    """All whole pages of the conversation so far are there, the answer's too."""
    answer = "The word berry has 2 r. " * 6
    script = {"first": told(chat(), answer), "second": told(chat(), "Be brief.")}
    with serving(scripted(chat(), script, page_size=16)) as server:  # type: ignore[arg-type]
        conversation = user("first")
        reply = post(server, "/v1/chat/completions", {"messages": conversation}).json
        assert reply["choices"][0]["message"]["content"] == answer
        shared, before = (
            reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"],
            get(server, "/stats").json,
        )
        conversation += [reply["choices"][0]["message"], *user("second")]
        length = post(server, "/v1/chat/completions", {"messages": conversation}).json["usage"]["prompt_tokens"]
        after = get(server, "/stats").json
        reused = after["prompt_tokens_reused"] - before["prompt_tokens_reused"]
        assert after["prompt_tokens_read"] - before["prompt_tokens_read"] == length - reused
        assert shared - 16 <= reused <= shared and shared > 5 * 16
