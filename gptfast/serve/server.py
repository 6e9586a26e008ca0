"""The server around the application: uvicorn, with a limit on how long a request takes to come, and an end in time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from gptfast import mfu
from gptfast.chat.conversation import Chat
from gptfast.chat.sandbox import EXTRA_S
from gptfast.chat.tools import Tools
from gptfast.engine import Engine
from gptfast.errors import UserError, to_install
from gptfast.serve.app import Guarded, make_app
from gptfast.serve.asking import Defaults
from gptfast.serve.batcher import Batcher
from gptfast.serve.meter import Meter
from gptfast.serve.state import State

if TYPE_CHECKING:
    import uvicorn

HEADERS_S = 10.0  # for a request's headers to come
KEEP_ALIVE_S = 5.0  # for the next request on a connection
MOST_CONNECTIONS = 512
AFTER_GRACE_S = 3.0  # for the last answers to be told that they are over


@dataclass(frozen=True)
class Serving:
    """How the server behaves. `grace_s` is what running answers have to finish after Ctrl-C."""

    defaults: Defaults
    guarded: Guarded = field(default_factory=Guarded)
    queue: int = 64
    grace_s: float = 10.0


class Server:
    """A server on the bound socket `listener`. `serve` runs it; `stop` may be called from any thread."""

    def __init__(
        self, engine: Engine, tools: Tools, serving: Serving, listener: socket.socket, peak: mfu.Peak | None = None
    ) -> None:
        uvicorn = import_uvicorn()
        self.engine, self._serving, self._listener = engine, serving, listener
        self.meter = Meter()
        self.batcher = Batcher(engine, _chat_of(engine), tools, serving.queue, self.meter)
        self.state = State(engine, self.batcher, self.meter, serving.defaults.model, peak)
        app = make_app(self.state, self.batcher, serving.defaults, serving.guarded)
        self._uvicorn = _draining(self.batcher, serving.grace_s)(
            uvicorn.Config(
                app, http=_impatient(), ws="none", lifespan="off", log_level="error", access_log=False,
                server_header=False, limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=round(serving.grace_s + AFTER_GRACE_S),
            )
        )  # fmt: skip

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def ends_within_s(self) -> float:
        """Seconds from Ctrl-C to the end at most, a call of Python that runs included."""
        python = self.batcher.tools.python
        return self._serving.grace_s + AFTER_GRACE_S + (python.limits.seconds + EXTRA_S if python else 0.0)

    def serve(self) -> None:
        """Serves until Ctrl-C, SIGTERM or `stop`; then running answers may finish within `grace_s`."""
        self.batcher.start()
        try:
            asyncio.run(self._uvicorn.serve(sockets=[self._listener]))
        finally:
            self.batcher.drain(0)
            self.batcher.join()

    def stop(self) -> None:
        self._uvicorn.handle_exit(0, None)

    @property
    def started(self) -> bool:
        return self._uvicorn.started


@contextlib.contextmanager
def running(engine: Engine, tools: Tools, serving: Serving) -> Iterator[Server]:
    """A server on a free port of this machine, in a thread of its own, until the block ends."""
    server = Server(engine, tools, serving, listen("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.005)
        if not server.started:
            raise RuntimeError("the server did not start; its thread says why")
        yield server
    finally:
        server.stop()
        thread.join()


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to host and port. Raises UserError where that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # the latter: a name that no host can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host={host} --port={port}: {reason}; choose another") from None
    return listener


def import_uvicorn() -> Any:
    """uvicorn. Raises UserError where it, or FastAPI, is not installed."""
    try:
        import fastapi
        import uvicorn
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name in ("fastapi", "uvicorn")
        fix = "pip install 'gptfast[serve]'" if absent else to_install(error, "fastapi")
        raise UserError(f"serving needs fastapi and uvicorn: {fix}") from None
    assert fastapi
    return uvicorn


def _chat_of(engine: Engine) -> Chat | None:
    """The rendering of conversations, None where the tokenizer cannot write them."""
    try:
        return Chat(engine.tokenizer)  # type: ignore[arg-type]
    except UserError:
        return None


def _draining(batcher: Batcher, grace_s: float) -> type[uvicorn.Server]:
    """uvicorn's server, which tells the batcher as soon as it is to end."""
    import uvicorn

    class Draining(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not self.should_exit:
                # Not here: a signal may have interrupted the very code that holds the batcher's lock.
                threading.Thread(target=batcher.drain, args=(grace_s,)).start()
            super().handle_exit(sig, frame)

    return Draining


def _impatient() -> type[asyncio.Protocol]:
    """uvicorn's protocol, which waits only so long for the headers of a request."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        _overdue: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait_for_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self._wait_for_headers()
            elif self._overdue is not None:
                self._overdue.cancel()
                self._overdue = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self._overdue is not None:
                self._overdue.cancel()
            super().connection_lost(exc)

        def _wait_for_headers(self) -> None:
            if self._overdue is None:
                self._overdue = self.loop.call_later(HEADERS_S, self.transport.close)

    return Impatient
