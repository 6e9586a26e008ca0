"""What clients may ask, read out of the JSON that they send; whatever else they send is refused by name.

Limits of messages, characters, temperature, top_k and max_tokens are those of nanochat's server.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptfast import untrusted
from gptfast.errors import nearest

MOST_MESSAGES, MOST_IN_MESSAGE, MOST_IN_ALL = 500, 8000, 32000  # characters
MOST_TEMPERATURE, MOST_TOP_K, MOST_TOKENS = 2.0, 200, 4096
MOST_CHOICES, MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS = 16, 4, 256, 20
SEED_STEP = 0x632BE59BD9B4E019  # between the seeds of the choices of one request

COMMON = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "n", "stop", "stream",
    "stream_options", "seed", "logprobs", "user", "metadata", "store", "service_tier",
}  # fmt: skip
CHAT_FIELDS = COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
PLAIN_FIELDS = COMMON | {"prompt"}
# What the API has and this server has not, by the values that ask for nothing; any other is refused.
ABSENT: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "modalities": (["text"],), "reasoning_effort": (), "verbosity": (),
    "echo": (False,), "suffix": ("",), "best_of": (1,),
}  # fmt: skip


class BadRequest(Exception):
    """A request that cannot be answered, and why; `status` is HTTP's."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass(frozen=True)
class Defaults:
    """What is meant where a request does not say."""

    model: str
    max_tokens: int = 512
    temperature: float = 0.8
    top_k: int = 50


@dataclass(frozen=True)
class Asked:
    """A request, checked. `prompts` are texts or ids, `messages` a conversation; one of the two is empty."""

    messages: list[dict[str, Any]]
    prompts: list[str | list[int]]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    seed: int | None
    logprobs: int | None  # of how many likely tokens beside the one that was drawn

    def seed_of(self, choice: int) -> int | None:
        """Each choice has a seed of its own, and the first that of the request."""
        return None if self.seed is None else (self.seed + choice * SEED_STEP) % 2**63


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of `body`. Raises BadRequest."""
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:200]}") from None
    except RecursionError:
        raise BadRequest("the body cannot be read: it is nested too deeply") from None
    except ValueError as error:
        raise BadRequest(f"the body cannot be read: {untrusted.reason(error)}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body is JSON, but not an object")
    return value


def chat(body: Mapping[str, Any], defaults: Defaults) -> Asked:
    """A request for an answer in a conversation. Raises BadRequest."""
    _check_fields(body, CHAT_FIELDS)
    if body.get("max_completion_tokens") is not None:
        body = {**body, "max_tokens": body["max_completion_tokens"]}
    wanted = _flag(body, "logprobs")
    top = _whole(body, "top_logprobs", 0, MOST_LOGPROBS, 0)
    if top and not wanted:
        raise BadRequest("top_logprobs: needs logprobs: true", "top_logprobs")
    return _asked(body, defaults, messages(body.get("messages")), [], top if wanted else None)


def plain(body: Mapping[str, Any], defaults: Defaults) -> Asked:
    """A request for the continuation of texts. Raises BadRequest."""
    _check_fields(body, PLAIN_FIELDS)
    top = None if body.get("logprobs") is None else _whole(body, "logprobs", 0, MOST_LOGPROBS, 0)
    return _asked(body, defaults, [], _prompts(body.get("prompt")), top)


def _asked(
    body: Mapping[str, Any], defaults: Defaults, messages: list[dict[str, Any]], prompts: list[str | list[int]],
    logprobs: int | None,
) -> Asked:  # fmt: skip
    model = body.get("model")
    if model is not None and model != defaults.model:
        shown = repr(model)[:100] if isinstance(model, str) else "no name"
        raise BadRequest(
            f"model: {shown} is not here; leave it out, or ask for {defaults.model!r}", "model", status=404,
            code="model_not_found",
        )  # fmt: skip
    stream = _flag(body, "stream")
    options = body.get("stream_options")
    if options is not None and not (stream and isinstance(options, dict) and set(options) <= {"include_usage"}):
        raise BadRequest("stream_options: an object with include_usage, for a stream", "stream_options")
    n = _whole(body, "n", 1, MOST_CHOICES, 1)
    if n * max(len(prompts), 1) > MOST_CHOICES:
        raise BadRequest(f"n: at most {MOST_CHOICES} answers in all, prompts times n", "n")
    seed = _whole(body, "seed", -(2**63), 2**64 - 1, None)
    return Asked(
        messages, prompts,
        max_tokens=_whole(body, "max_tokens", 1, MOST_TOKENS, defaults.max_tokens),
        temperature=_number(body, "temperature", 0.0, MOST_TEMPERATURE, defaults.temperature, least_above_0=1e-6),
        top_k=_whole(body, "top_k", 0, MOST_TOP_K, defaults.top_k),
        top_p=_number(body, "top_p", 1e-9, 1.0, 1.0),
        repetition_penalty=_number(body, "repetition_penalty", 1e-6, 1e6, 1.0),
        n=n, stop=_stops(body.get("stop")), stream=stream,
        include_usage=_flag(options or {}, "include_usage"),
        seed=None if seed is None else seed % 2**63, logprobs=logprobs,
    )  # fmt: skip


def _check_fields(body: Mapping[str, Any], known: Collection[str]) -> None:
    for name, value in body.items():
        if name in known or value is None:
            continue
        if name not in ABSENT:
            raise BadRequest(f"{_shown(name)}: no such field{_like(name, known)}", _shown(name))
        if not any(value == harmless and type(value) is type(harmless) for harmless in ABSENT[name]):
            raise BadRequest(f"{name}: this server does not have it; leave it out", name, code="unsupported_parameter")


def _like(name: str, known: Collection[str]) -> str:
    close = nearest(name[:50], known)
    return close if "mean" in close else ""


def messages(value: Any) -> list[dict[str, Any]]:
    """A conversation that ends with the user's turn, as gptfast.chat.conversation has them. Raises BadRequest."""
    if not isinstance(value, list) or not value:
        raise BadRequest("messages: expected a list of messages, and not an empty one", "messages")
    if len(value) > MOST_MESSAGES:
        raise BadRequest(f"messages: at most {MOST_MESSAGES}, got {len(value)}", "messages")
    found, total = [], 0
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"messages: number {number} is no object with role and content", "messages")
        role = "system" if message["role"] == "developer" else message["role"]
        content, length = _content(number, role, message.get("content"))
        total += length
        if length > MOST_IN_MESSAGE:
            raise BadRequest(
                f"messages: number {number} has {length} characters, at most {MOST_IN_MESSAGE} are taken", "messages"
            )
        found.append({"role": role, "content": content})
    if total > MOST_IN_ALL:
        raise BadRequest(f"messages: {total} characters in all, at most {MOST_IN_ALL} are taken", "messages")
    if found[-1]["role"] != "user":
        raise BadRequest("messages: the last must be the user's", "messages")
    return found


def _content(number: int, role: str, content: Any) -> tuple[str | list[dict[str, str]], int]:
    """A message's content, and its characters. Parts of text alone are put together, as most clients mean them."""
    if isinstance(content, str):
        return text(content, "messages"), len(content)
    if not isinstance(content, list):
        raise BadRequest(f"messages: the content of number {number} is neither a text nor a list of parts", "messages")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or not isinstance(part.get("type"), str):
            raise BadRequest(f"messages: a part of number {number} is not an object of type and text", "messages")
        text(part["text"], "messages")
    length = sum(len(part["text"]) for part in content)
    if all(part["type"] == "text" for part in content):
        return "".join(part["text"] for part in content), length
    if role != "assistant":
        raise BadRequest(f"messages: number {number} holds something else than text", "messages")
    return [{"type": part["type"], "text": part["text"]} for part in content], length


def text(value: str, param: str) -> str:
    """`value`, if it can be written as UTF-8. Raises BadRequest."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(f"{param}: character {error.start} is half of a surrogate pair", param) from None
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    several = isinstance(value, list) and bool(value) and not _is_whole(value[0])
    prompts = value if several else [value]
    if len(prompts) > MOST_CHOICES:
        raise BadRequest(f"prompt: at most {MOST_CHOICES} at once, got {len(prompts)}", "prompt")
    for prompt in prompts:
        is_ids = isinstance(prompt, list) and bool(prompt) and all(map(_is_whole, prompt))
        if not isinstance(prompt, str) and not is_ids:
            raise BadRequest("prompt: expected a text, a list of token ids, or a list of either", "prompt")
        if isinstance(prompt, str):
            text(prompt, "prompt")
    total = sum(map(len, prompts))
    if total > MOST_IN_ALL:
        raise BadRequest(f"prompt: {total} characters or ids in all, at most {MOST_IN_ALL} are taken", "prompt")
    return list(prompts)


def _stops(value: Any) -> tuple[str, ...]:
    stops: Sequence[Any] = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise BadRequest(f"stop: expected a text or a list of at most {MOST_STOPS}", "stop")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= LONGEST_STOP:
            raise BadRequest(f"stop: expected texts of 1 to {LONGEST_STOP} characters", "stop")
        text(stop, "stop")
    return tuple(stops)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name}: expected true or false", name)
    return bool(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(body: Mapping[str, Any], name: str, least: int, most: int, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not _is_whole(value) or not least <= value <= most:
        raise BadRequest(f"{name}: expected a whole number from {least} to {most}, got {_shown(value)}", name)
    return value


def _number(
    body: Mapping[str, Any], name: str, least: float, most: float, default: float, least_above_0: float = 0.0
) -> float:
    value = body.get(name)
    if value is None:
        return default
    if not (_is_whole(value) or isinstance(value, float)) or not least <= value <= most:
        raise BadRequest(f"{name}: expected a number from {least:g} to {most:g}, got {_shown(value)}", name)
    return max(float(value), least_above_0) if value else 0.0


def _shown(value: Any) -> str:
    """A value of the client's as an error repeats it."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a longer number"
    shown = json.dumps(value) if isinstance(value, int | float | bool) else type(value).__name__
    return value[:60].encode("ascii", "backslashreplace").decode() if isinstance(value, str) else shown
