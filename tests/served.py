"""A tiny assistant behind HTTP, and plain clients to ask it with: for tests of the server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from scripted import tiny

from gptfast.chat.conversation import Chat
from gptfast.chat.tools import Tools
from gptfast.engine import Engine, Update
from gptfast.serve.asking import Defaults
from gptfast.serve.server import Server, Serving, running
from gptfast.tokenizer import BPETokenizer
from train.tokenizer import train_bpe

TEXT = "Hello there, what is 12 * 7? It is 84. The word berry has 2 r. Be brief. " * 4 + "naïve 日本語 🙂 " * 4
DEFAULTS = Defaults("tiny")
PATIENCE_S = 30.0  # for what must happen; on a good day it takes milliseconds


@cache
def tokenizer() -> BPETokenizer:
    """Its special tokens are among the holes, so that no answer ends by itself."""
    trained = train_bpe([TEXT], 300)
    special = torch.tensor(sorted(trained.special_tokens.values()))
    trained.holes = lambda: special  # type: ignore[method-assign]
    return trained


@cache
def chat() -> Chat:
    return Chat(tokenizer())


class Unhurried(Engine):
    """An engine that waits before each step, so that a test can act meanwhile."""

    pause_s = 0.0

    def step(self) -> list[Update]:
        time.sleep(self.pause_s)
        return super().step()


def engine(slots: int = 4, block_size: int = 256) -> Unhurried:
    model = tiny(tokenizer(), block_size)
    return Unhurried(model, slots=slots, tokenizer=tokenizer(), weights="model", page_size=16)


@contextmanager
def serving(made: Engine | None = None, tools: Tools | None = None, **settings: Any) -> Iterator[Server]:
    with running(engine() if made is None else made, tools or Tools(), Serving(DEFAULTS, **settings)) as server:
        yield server


def until(happened: Callable[[], bool]) -> None:
    """Wait until `happened`, and fail if it does not."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def is_idle(server: Server) -> bool:
    """Whether nothing is open: no answer, no slot, no position of the cache."""
    stats = server.state.stats()
    return not (server.batcher.open or stats["busy"] or stats["queue"] or server.engine.busy)


# ---- a client that does as it is told --------------------------------------------------------------------------------


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """What a stream of server-sent events told."""
        lines = [line.removeprefix(b"data: ") for line in self.body.split(b"\n\n") if line]
        return [line.decode() if line == b"[DONE]" else json.loads(line) for line in lines]


def asking(path: str, body: Any, **headers: str) -> bytes:
    """The bytes of a POST of JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    fields = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(content)), **given}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode() + content


async def exchange(server: Server, sent: bytes, patience_s: float = PATIENCE_S) -> Response | None:
    """What comes back for `sent`; None where the server closes without a word."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        received = await asyncio.wait_for(reader.read(), patience_s)
    except ConnectionError:
        return None
    finally:
        writer.close()
    return parsed(received)


def parsed(received: bytes) -> Response | None:
    if not received:
        return None
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = b"".join(_chunks(body))
    return Response(int(first.split()[1]), headers, body)


def _chunks(body: bytes) -> Iterator[bytes]:
    while body:
        size, _, rest = body.partition(b"\r\n")
        yield rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]


def post(server: Server, path: str, body: Any, **headers: str) -> Response:
    response = asyncio.run(exchange(server, asking(path, body, **headers)))
    assert response is not None
    return response


def get(server: Server, path: str, **headers: str) -> Response:
    head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "127.0.0.1", **headers}.items())
    response = asyncio.run(exchange(server, f"GET {path} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode()))
    assert response is not None
    return response


@contextmanager
def until_it_answers(url: str, body: Any) -> Iterator[list[bytes]]:
    """The lines of a streamed completion as they come; the block begins when the first has, and at its end all have."""
    lines: list[bytes] = []
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
        reader = threading.Thread(target=lambda: lines.extend(line for line in reply if line.strip()))
        reader.start()
        until(lambda: bool(lines))
        yield lines
        reader.join()


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def in_threads(works: list[Callable[[], Any]]) -> None:
    """Run all of `works` at once, each in a thread of its own."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
