"""Requests that nobody should send, clients that leave, and many at once: no 5xx, no slot lost, no answer changed.

The long forms, 10,000 requests and 200 clients for a minute, run with --chaos.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import served
from served import Response, asking, chat, engine, exchange, parsed, serving, until, user

from gptfast.chat.answers import Answers, answer_all
from gptfast.engine import Sampling
from gptfast.serve import app
from gptfast.serve import server as server_page
from gptfast.serve.server import Server

MOST_AT_ONCE = 32
GROWTH_BYTES = 2**26  # of the whole process, that 8,000 requests may leave behind: 8 KB each would be far more
PATHS = ("/v1/chat/completions", "/v1/completions", "/chat/completions")
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**300, 1e308, -0.0, 0.5, "", "x", "x" * 9000, "\ud800",
    "\0", "🙂" * 50, "<script>", [], [[]], [None], {}, {"a": {}}, [1, "x"], [10**20], [-1], [{}], ["a"] * 600,
    user("x") * 3, [{"role": "user"}], [{"role": ["user"], "content": "x"}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}], [{"role": "system", "content": "x"}],
    {"include_usage": "yes"}, [[1, 2], "x"], float("nan"), float("inf"), "stream", ["x" * 300], user("y" * 3000),
]  # fmt: skip
FIELDS = (
    "messages", "prompt", "max_tokens", "temperature", "top_k", "top_p", "n", "seed", "stop", "stream",
    "stream_options", "logprobs", "top_logprobs", "model", "repetition_penalty", "max_completion_tokens", "tools",
    "logit_bias", "echo",
    "user", "__proto__", "\ud800", "constructor", "", "best_of", "a" * 5000,
)  # fmt: skip
HEADS = [
    b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\n\r\n", b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03", b"\0" * 9,
    b"GET http://[::1/ HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /%ff%00%zz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /v1/models HTTP/1.1\r\n\r\n",
    b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    + b"9" * 5000 + b"\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Type: application/json\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20, b"GET /health HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
    b"GET /stats HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", b"GET /stats HTTP/1.1\r\nHost: x\r\nAuthorization: \xff\r\n\r\n",
]  # fmt: skip


def odd_body(draw: random.Random) -> bytes:
    """JSON with fields that are wrong, or no JSON at all."""
    body: dict[str, Any] = {"messages": user("Hi"), "max_tokens": draw.randint(1, 4)}
    if draw.random() < 0.4:
        body = {"prompt": "Hi", "max_tokens": 3}
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
        body[draw.choice(FIELDS)] = draw.choice(VALUES)
    if draw.random() < 0.1:
        del body[draw.choice(list(body))]
    content = json.dumps(body).encode()
    spoilt: list[Callable[[], bytes]] = [
        lambda: content[: draw.randrange(len(content))], lambda: draw.randbytes(draw.randrange(3000)),
        lambda: content.decode().encode("utf-16"), lambda: b"\xef\xbb\xbf" + content, lambda: b"[" * 50_000,
        lambda: content.replace(b":", b""), lambda: b'{"a":' * 2000, lambda: b"", lambda: b"null",
        lambda: b"1" * 10_000, lambda: content + content, lambda: b" " * 2**20 + content,
    ]  # fmt: skip
    return draw.choice(spoilt)() if draw.random() < 0.25 else content


def odd_request(draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return draw.choice(HEADS)
    headers: dict[str, str] = {}
    if draw.random() < 0.15:
        odd = [
            ("Content-Type", "text/plain"), ("Content-Type", "application/json; charset=utf-16"), ("Content-Type", ""),
            ("Content-Encoding", "gzip"), ("Content-Length", str(draw.randrange(5000))), ("Content-Length", "0x10"),
            ("Authorization", "x"), ("Origin", "null"), ("Accept", "image/png"),
        ]  # fmt: skip
        name, value = draw.choice(odd)
        headers[name] = value
    return asking(draw.choice(PATHS), odd_body(draw), **headers)


async def misbehave(server: Server, draw: random.Random) -> Response | None:
    """One odd request, sent in one of the ways of bad clients."""
    sent, manner = odd_request(draw), draw.choice(("whole", "whole", "whole", "half-closed", "cut", "slow", "abort"))
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        if manner == "slow":
            for i in range(0, min(len(sent), 6 * 40), 40):
                writer.write(sent[i : i + 40])
                await asyncio.sleep(0.005)
        else:
            writer.write(sent[: draw.randrange(1, len(sent))] if manner == "cut" else sent)
        if manner == "half-closed":
            writer.write_eof()
        if manner == "abort":
            await asyncio.sleep(draw.random() * 0.01)
            writer.transport.abort()
            return None
        return parsed(await asyncio.wait_for(reader.read(), served.PATIENCE_S))
    except (ConnectionError, OSError):
        return None
    finally:
        writer.close()


def memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_nothing_that_is_sent_breaks_it(
    chaos: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.1)
    monkeypatch.setattr(app, "UNWANTED_S", 0.1)
    monkeypatch.setattr(server_page, "HEADERS_S", 0.1)
    monkeypatch.setattr(server_page, "KEEP_ALIVE_S", 0.1)
    count, draw = chaos(300, 10_000), random.Random(1337)
    statuses: Counter[int | None] = Counter()
    settled = 0

    async def all_of_them(server: Server) -> None:
        nonlocal settled
        turns = asyncio.Semaphore(MOST_AT_ONCE)

        async def one(seed: int) -> None:
            async with turns:
                response = await misbehave(server, random.Random(seed))
                statuses[response.status if response else None] += 1

        for start in range(0, count, 500):
            await asyncio.gather(*(one(draw.getrandbits(64)) for _ in range(min(500, count - start))))
            if start < 2000:
                settled = memory_bytes()

    with serving(queue=256) as server:
        asyncio.run(all_of_them(server))
        until(lambda: served.is_idle(server))
        until(lambda: not server._uvicorn.server_state.connections)
        replies = {key: n for key, n in server.meter._replies.items() if key[1] >= 500}
        good = asyncio.run(exchange(server, asking(PATHS[0], {"messages": user("Hi"), "max_tokens": 5})))
        assert good is not None and good.json["usage"]["completion_tokens"] == 5
        assert served.is_idle(server)
    assert not capfd.readouterr().err
    with capfd.disabled():
        print(f"\n{count} requests, {dict(statuses)}, {(memory_bytes() - settled) / 2**20:.1f} MiB more")
    assert not replies and not [status for status in statuses if status is not None and status >= 500]
    assert memory_bytes() - settled < GROWTH_BYTES
    assert statuses[200] and statuses[400] and sum(statuses.values()) == count


def test_who_dawdles_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers that never end, none at all, and a body that never ends."""
    monkeypatch.setattr(app, "BODY_S", 0.1)
    monkeypatch.setattr(server_page, "HEADERS_S", 0.1)
    body = asking(PATHS[0], b"{}", Content_Length="99")
    with serving() as server:
        assert asyncio.run(exchange(server, b"GET / HTTP/1.1\r\nHost:")) is None
        assert asyncio.run(exchange(server, b"")) is None
        late = asyncio.run(exchange(server, body))
        assert late is not None and late.status == 408
        until(lambda: not server._uvicorn.server_state.connections)


# ---- many at once ----------------------------------------------------------------------------------------------------

TEXTS = ["Hi", "What is 12 * 7?", "Be brief.", "naïve 日本語 🙂", "berry", "The word", "a", "Hello there, " * 9]


def prepared(slots: int) -> list[tuple[dict[str, Any], str]]:
    """Requests, and the answer that each gets alone."""
    found = []
    answers = Answers(engine(slots), chat())
    for number in range(24):
        body = {
            "messages": user(TEXTS[number % 8]), "max_tokens": 4 + number, "seed": number,
            "temperature": number % 3 / 2, "top_k": 20, "stream": bool(number % 2),
        }  # fmt: skip
        sampling = Sampling(4 + number, number % 3 / 2, 20, seed=number)
        (answer,) = answer_all(answers, [(chat().prompt(body["messages"]), sampling)])
        found.append((body, served.tokenizer().decode(answer.ids)))
    return found


def said(response: Response, stream: bool) -> str:
    if not stream:
        return response.json["choices"][0]["message"]["content"]
    assert response.events[-1] == "[DONE]"
    return "".join(event["choices"][0]["delta"].get("content", "") for event in response.events[:-1])


async def leave_midway(server: Server, sent: bytes, draw: random.Random) -> None:
    """Ask, read a little, and go."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    if draw.random() < 0.7:
        await reader.read(draw.randrange(1, 900))
    writer.transport.abort()


def test_many_at_once_get_what_they_would_get_alone(
    chaos: Callable[[int, int], int], capfd: pytest.CaptureFixture[str]
) -> None:
    """And a third of them leave in the middle."""
    clients, seconds, slots = chaos(40, 200), chaos(0, 60), 4
    patience_s = float(chaos(30, 600))  # 200 wait for 4 slots
    asks = prepared(slots)
    counts: Counter[str] = Counter()

    async def client(server: Server, draw: random.Random, end: float) -> None:
        while True:
            body, expected = draw.choice(asks)
            sent = asking(PATHS[0], body)
            if draw.random() < 1 / 3:
                await leave_midway(server, sent, draw)
                counts["left"] += 1
            else:
                response = await exchange(server, sent, patience_s)
                assert response is not None and response.status == 200
                assert said(response, body["stream"]) == expected
                counts["equal"] += 1
            if time.monotonic() > end:
                return

    async def all_of_them(server: Server) -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(server, random.Random(number), end) for number in range(clients)))

    with serving(engine(slots), queue=512) as server:
        asyncio.run(all_of_them(server))
        until(lambda: served.is_idle(server))
        ended = server.state.stats()["ended"]
    with capfd.disabled():
        print(f"\n{clients} clients, {seconds} s: {dict(counts)}; answers ended: {ended}")
    assert set(ended) <= {"length", "cancelled"} and ended["length"] >= counts["equal"] > clients / 3
    assert 0 < ended["cancelled"] <= counts["left"] and sum(ended.values()) <= sum(counts.values())
