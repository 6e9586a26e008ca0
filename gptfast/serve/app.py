"""The HTTP of the server: routes, who may ask, and answers as they come. Nothing here waits for the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import sys
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptfast.engine import Sampling
from gptfast.errors import UserError
from gptfast.serve import asking, replies
from gptfast.serve.asking import Asked, BadRequest, Defaults
from gptfast.serve.batcher import Batcher, Closing, Event, Full, Ticket
from gptfast.serve.page import read_page
from gptfast.serve.replies import Choice, Envelope
from gptfast.serve.state import State

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.types import Message, Receive, Scope, Send

MOST_BODY_BYTES = 2**20
BODY_S = 10.0  # for a request's body to come
MOST_UNWANTED_BYTES, UNWANTED_S = 2**24, 1.0  # of a refused body, read so that the refusal arrives
SEND_S = 30.0  # for a client to take what it is sent
OPEN_TO_ALL = ("/", "/health", "/favicon.ico")  # paths that need no token
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}  # fmt: skip
LOCAL = ("127.0.0.1", "localhost", "::1")


class Gone(Exception):
    """The client is not there any more."""


@dataclass(frozen=True)
class Guarded:
    """Who may ask. `token` None: anybody; `hosts` empty: under any name."""

    token: str | None = None
    hosts: tuple[str, ...] = ()


class Reply:
    """A whole reply, as an ASGI application."""

    def __init__(
        self, body: Any, status: int = 200, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        self.body = body if isinstance(body, bytes) else replies.dumps(body)
        self.status, self.kind, self.headers = status, kind, {**SAFE_HEADERS, **(headers or {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = {"Content-Type": self.kind, "Content-Length": str(len(self.body)), **self.headers}
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        body = b"" if scope["method"] == "HEAD" else self.body
        await send({"type": "http.response.body", "body": body})


def refusal(error: BadRequest, close: bool = False) -> Reply:
    headers = {"Connection": "close"} if close else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    kind = "authentication_error" if error.status == 401 else "invalid_request_error"
    return Reply(replies.error(error.message, kind, error.param, error.code), error.status, headers=headers)


def busy(error: Full | Closing) -> Reply:
    if isinstance(error, Full):
        return Reply(
            replies.error(str(error), "rate_limit_error", code="queue_full"), 429,
            headers={"Retry-After": str(error.retry_s)},
        )  # fmt: skip
    return Reply(replies.error(str(error), "server_error", code="closing"), 503, headers={"Retry-After": "10"})


class Gate:
    """Before every request: its host and its token; after it: its count; and a reply in JSON whatever went wrong."""

    def __init__(self, app: Callable[..., Awaitable[None]], state: State, guarded: Guarded) -> None:
        self.app, self.state, self.guarded = app, state, guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent, has_more = 0, True

        async def heard() -> Message:
            nonlocal has_more
            message = await receive()
            has_more = bool(message.get("more_body"))
            return message

        async def counted(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent = message["status"]
            async with asyncio.timeout(SEND_S):
                await send(message)

        try:
            self._check(scope)
            await self.app(scope, heard, counted)
        except BadRequest as error:
            if has_more:
                await _swallow(receive)
            await refusal(error, close=True)(scope, receive, counted)
        except (Gone, TimeoutError):
            if not sent:
                sent = 499  # what the client will never see
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if sent:
                raise  # the server closes the connection, since the answer is not whole
            await Reply(replies.error("the server failed; see its log", "server_error"), 500)(scope, receive, counted)
        finally:
            known = scope["path"] if scope["path"] in self.state.paths else "other"
            self.state.meter.reply(known, sent)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.guarded.hosts:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name.strip("[]") not in self.guarded.hosts:
                raise BadRequest("Host: this server is not known by that name; see --hosts", status=403)
        if self.guarded.token is not None and scope["path"] not in OPEN_TO_ALL:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.guarded.token}".encode()):
                raise BadRequest("give the server's token: Authorization: Bearer ...", status=401, code="invalid_token")


def make_app(state: State, batcher: Batcher, defaults: Defaults, guarded: Guarded) -> FastAPI:
    """The application. Raises ImportError where FastAPI is not installed."""
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their pages load scripts from elsewhere
    page, policy = read_page()
    secured = {"Content-Security-Policy": policy}
    service = Service(state, batcher, defaults)

    async def not_there(request: Request, error: HTTPException) -> Reply:
        headers = {**dict(error.headers or {}), "Connection": "close"}
        return Reply(replies.error(f"{error.detail}", "invalid_request_error"), error.status_code, headers=headers)

    app.add_exception_handler(HTTPException, not_there)  # type: ignore[arg-type]
    routes: dict[str, tuple[str, Callable[[Request], Awaitable[Any]]]] = {
        "/v1/chat/completions": ("POST", service.chat),
        "/v1/completions": ("POST", service.plain),
        "/chat/completions": ("POST", service.nanochat),
        "/v1/models": ("GET", answering(lambda: Reply(state.models()))),
        "/health": ("GET", answering(lambda: Reply(state.health(), 200 if state.healthy else 503))),
        "/stats": ("GET", answering(lambda: Reply(state.stats()))),
        "/metrics": ("GET", answering(lambda: Reply(state.metrics(), kind="text/plain; version=0.0.4"))),
        "/favicon.ico": ("GET", answering(lambda: Reply(b"", 204, kind="image/x-icon"))),
        "/": ("GET", answering(lambda: Reply(page, kind="text/html; charset=utf-8", headers=secured))),
    }
    for path, (method, handler) in routes.items():
        app.add_route(path, handler, methods=[method])
    state.paths = tuple(routes)
    app.add_middleware(Gate, state=state, guarded=guarded)
    return app


def answering(reply: Callable[[], Reply]) -> Callable[[Request], Awaitable[Reply]]:
    async def handler(request: Request) -> Reply:
        return reply()

    return handler


class Service:
    """The three ways to ask for text."""

    def __init__(self, state: State, batcher: Batcher, defaults: Defaults) -> None:
        self.state, self.batcher, self.defaults = state, batcher, defaults

    async def chat(self, request: Request) -> Any:
        return await self._openai(request, asking.chat, replies.Chat)

    async def plain(self, request: Request) -> Any:
        return await self._openai(request, asking.plain, replies.Plain)

    async def _openai(self, request: Request, parse: Callable[..., Asked], shape: Callable[..., Any]) -> Any:
        asked = parse(asking.read_json(await read_body(request)), self.defaults)
        spelling = None if asked.logprobs is None else self.state.spelling
        envelope = Envelope(shape(spelling), self.defaults.model)
        try:
            answers = await self._submit(asked)
        except (Full, Closing) as error:
            return busy(error)
        return Streamed(answers, asked, envelope) if asked.stream else Whole(answers, envelope)

    async def nanochat(self, request: Request) -> Any:
        """Always a stream, of {"token": ..., "gpu": 0} and {"done": true}."""
        asked = asking.chat(asking.read_json(await read_body(request)), self.defaults)
        if asked.n != 1:
            raise BadRequest("n: one answer here; /v1/chat/completions gives more", "n")
        try:
            return NanochatStream(await self._submit(asked))
        except (Full, Closing) as error:
            return busy(error)

    async def _submit(self, asked: Asked) -> Answering:
        prompts = await asyncio.to_thread(self._prompts, asked)
        answering = Answering(self.batcher)
        context, number = self.state.context, 0
        for ids in prompts:
            room = context - len(ids)
            if room < 1:
                raise BadRequest(
                    f"the prompt has {len(ids)} tokens, and the model reads {context}, the answer included; shorten it",
                    "messages" if asked.messages else "prompt", code="context_length_exceeded",
                )  # fmt: skip
            for _ in range(asked.n):
                sampling = Sampling(
                    min(asked.max_tokens, room), asked.temperature, asked.top_k, asked.top_p, asked.repetition_penalty,
                    seed=asked.seed_of(number), stop_tokens=() if asked.messages else self.state.plain_stops,
                    stop=asked.stop, logprobs=asked.logprobs,
                )  # fmt: skip
                answering.add(ids, sampling, plain=not asked.messages)
                number += 1
        most = self.batcher.slots + self.batcher.queue
        if number > most:
            raise BadRequest(f"n: this server holds {most} answers at once", "n")
        answering.submit()
        return answering

    def _prompts(self, asked: Asked) -> list[list[int]]:
        """Ids of what is asked; on a thread of its own, since a long text takes a while."""
        chat, tokenizer = self.batcher.chat, self.state.tokenizer
        try:
            if asked.messages:
                if chat is None:
                    raise BadRequest("this model knows no conversations; use /v1/completions", status=404)
                return [chat.prompt(asked.messages)]
            return [self._ids(prompt, tokenizer) for prompt in asked.prompts]
        except UserError as error:
            raise BadRequest(str(error), "messages" if asked.messages else "prompt") from None

    def _ids(self, prompt: str | list[int], tokenizer: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt) or ([tokenizer.bos] if tokenizer.bos is not None else [])
            if not ids:
                raise BadRequest("prompt: empty; give at least one character", "prompt")
            return ids
        most = self.state.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < most:
            raise BadRequest(f"prompt: ids are 0 to {most - 1}", "prompt")
        return prompt


class Answering:
    """The answers to one request on their way from the engine's thread to the event loop."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher, self._loop = batcher, asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()  # None: the client has left
        self._tickets: list[Ticket] = []
        self.choices: list[Choice] = []
        self._prompts: set[int] = set()

    def add(self, prompt: list[int], sampling: Sampling, *, plain: bool) -> None:
        index = len(self._tickets)

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self._tickets.append(Ticket(prompt, sampling, plain, deliver))
        is_new = id(prompt) not in self._prompts
        self._prompts.add(id(prompt))
        self.choices.append(Choice(len(prompt) if is_new else 0))

    def submit(self) -> None:
        self._batcher.submit(self._tickets)

    def cancel(self) -> None:
        self._batcher.cancel(self._tickets)

    async def events(self, receive: Receive) -> AsyncGenerator[list[tuple[int, Event]], None]:
        """Yields what has come, as (choice, event)s, until all answers are done. Raises Gone when the client leaves."""
        watch = asyncio.create_task(self._watch(receive))
        try:
            done = 0
            while done < len(self._tickets):
                came = [await self._events.get()]
                while not self._events.empty():
                    came.append(self._events.get_nowait())
                events = [one for one in came if one is not None]
                if len(events) < len(came):
                    raise Gone
                for index, event in events:
                    self.choices[index].add(event, self._tickets[index].tokens)
                    done += event.finish_reason is not None
                yield events
        finally:
            watch.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)


async def _swallow(receive: Receive) -> None:
    """Read the rest of a body that nobody wants, if it comes soon: who still sends would not see the reply."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(UNWANTED_S):
            while size < MOST_UNWANTED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body"):
                    return


class Whole:
    """All answers in one reply."""

    def __init__(self, answering: Answering, envelope: Envelope) -> None:
        self.answering, self.envelope = answering, envelope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure = None
        try:
            async with contextlib.aclosing(self.answering.events(receive)) as events:
                async for came in events:
                    failure = next(filter(None, (_failure(event) for _, event in came)), failure)
        finally:
            self.answering.cancel()
        if failure is not None:
            await Reply(replies.error(failure, "server_error"), 503)(scope, receive, send)
        else:
            await Reply(self.envelope.whole(self.answering.choices))(scope, receive, send)


class EventStream:
    """Answers as server-sent events, while they come."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no", **SAFE_HEADERS}
        raw = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            await self._send(send, self.begin())
            async with contextlib.aclosing(self.answering.events(receive)) as events:
                async for came in events:
                    await self._send(send, [part for index, event in came for part in self.more(index, event)])
            await self._send(send, self.end())
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.answering.cancel()

    async def _send(self, send: Send, found: Sequence[Any]) -> None:
        if found:
            body = b"".join(map(replies.event, found))
            await send({"type": "http.response.body", "body": body, "more_body": True})

    def begin(self) -> list[Any]:
        return []

    def more(self, index: int, event: Event) -> list[Any]:
        raise NotImplementedError

    def end(self) -> list[Any]:
        raise NotImplementedError


class Streamed(EventStream):
    """OpenAI's stream."""

    def __init__(self, answering: Answering, asked: Asked, envelope: Envelope) -> None:
        super().__init__(answering)
        self.asked, self.envelope = asked, envelope

    def _chunks(self, choices: Sequence[dict[str, Any]]) -> list[Any]:
        return [self.envelope.chunk(choice, self.asked.include_usage) for choice in choices]

    def begin(self) -> list[Any]:
        shape = self.envelope.shape
        return self._chunks([part for index in range(len(self.answering.choices)) for part in shape.begin(index)])

    def more(self, index: int, event: Event) -> list[Any]:
        found = self._chunks(self.envelope.shape.more(index, event.pieces, event.likely))
        failure = _failure(event)
        if failure is not None:
            return [*found, replies.error(failure, "server_error")]
        if event.finish_reason is not None:
            found += self._chunks([self.envelope.shape.end(index, event.finish_reason)])
        return found

    def end(self) -> list[Any]:
        usage = [self.envelope.usage_chunk(self.answering.choices)] if self.asked.include_usage else []
        return [*usage, b"[DONE]"]


class NanochatStream(EventStream):
    """nanochat's stream."""

    def more(self, index: int, event: Event) -> list[Any]:
        found: list[Any] = [
            {"token": piece.text, "gpu": 0, **({"part": piece.kind} if piece.kind != "text" else {})}
            for piece in event.pieces
        ]
        failure = _failure(event)
        return found if failure is None else [*found, {"error": failure}]

    def end(self) -> list[Any]:
        return [{"done": True}]


def _failure(event: Event) -> str | None:
    """What went wrong with an answer that is over but not whole."""
    return (event.error or event.finish_reason) if event.finish_reason in ("error", "cancelled") else None


async def read_body(request: Request) -> bytes:
    """The body of a request that says it is JSON. Raises BadRequest where it is too long, or too long in coming."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest("Content-Type: send application/json", status=415)
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > MOST_BODY_BYTES:
        raise BadRequest(f"the body is larger than {MOST_BODY_BYTES} bytes", status=413)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > MOST_BODY_BYTES:
                    raise BadRequest(f"the body is larger than {MOST_BODY_BYTES} bytes", status=413)
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise BadRequest(f"the body did not come within {BODY_S:g} s", status=408) from None
