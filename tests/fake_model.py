"""A server that speaks as gptfast.serve does and says what the test tells it to: the page is tested without a model."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gptfast.serve.page import read_page

STATS = {
    "tokens_per_s": 1234.5, "ttft_ms_p50": 21.0, "slots": 8, "busy": 3, "queue": 2, "queue_limit": 64, "kv_used": 700,
    "kv_total": 2048, "mbu": 0.613, "kernels": {"attention": "triton", "rmsnorm": "triton", "rotary": "reference"},
    "model": "out-chat/rl", "context_length": 256, "device": "NVIDIA H200", "weights": "bfloat16, asked for",
    "tools": {"calculator": True, "python": False},
}  # fmt: skip

Piece = str | tuple[str, str]  # a text, or (a kind of part, its text)
Answer = Iterable[Piece | float | dict[str, Any]]  # pieces, pauses in seconds, and errors as the server's JSON has them


class FakeModel:
    """`answer(messages)` gives the pieces of an answer; `refusals` are (status, error, headers) that come first."""

    def __init__(self, answer: Callable[[list[dict[str, Any]]], Answer], cuts: int = 0) -> None:
        self.answer, self.cuts = answer, cuts  # cuts: bytes of a write, 0 for whole events
        self.stats: dict[str, Any] = dict(STATS)
        self.requests: list[dict[str, Any]] = []
        self.tokens: list[str] = []  # Authorization of each request
        self.refusals: list[tuple[int, dict[str, Any], dict[str, str]]] = []
        self.connections: list[socket.socket] = []
        self.gone = 0  # clients that left before their answer was whole
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:  # a browser keeps some open, and would ask by them
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _handler(fake) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                fake.connections.append(self.connection)

            def log_message(self, *_: Any) -> None: ...

            def send(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                fields = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
                for name, value in {**fields, **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if self.path == "/":
                    page, policy = read_page()
                    self.send(200, "text/html; charset=utf-8", page, {"Content-Security-Policy": policy})
                elif self.path == "/stats":
                    self.send(200, "application/json", json.dumps(fake.stats).encode())
                else:
                    self.send(404, "application/json", b"{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append(body)
                fake.tokens.append(self.headers.get("Authorization", ""))
                if fake.refusals:
                    status, error, headers = fake.refusals.pop(0)
                    return self.send(status, "application/json", json.dumps({"error": error}).encode(), headers)
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    self.stream(body)
                except (BrokenPipeError, ConnectionResetError):
                    fake.gone += 1

            def stream(self, body: dict[str, Any]) -> None:
                count = 0
                self.event(chunk({"role": "assistant", "content": ""}))
                for piece in fake.answer(body["messages"]):
                    if isinstance(piece, float):
                        time.sleep(piece)
                    elif isinstance(piece, dict):
                        return self.event(piece)
                    else:
                        count += 1
                        part = {"content": piece} if isinstance(piece, str) else None
                        self.event(chunk(part or {"part": {"type": piece[0], "text": piece[1]}}))
                self.event(chunk({}, "stop"))
                usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
                self.event({"object": "chat.completion.chunk", "choices": [], "usage": usage})
                self.write(b"data: [DONE]\n\n")

            def event(self, value: Any) -> None:
                self.write(b"data: " + json.dumps(value, ensure_ascii=not fake.cuts).encode() + b"\n\n")

            def write(self, data: bytes) -> None:
                size = fake.cuts or len(data)
                for at in range(0, len(data), size):
                    self.wfile.write(data[at : at + size])
                    self.wfile.flush()

        return Handler


def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m", "choices": choices, "usage": None}
