"""The server under load: time to first token and per token at arrivals that do not wait for answers.

    python -m bench serve                                   # GPT-2 124M, three loads; on a CPU a few requests of each
    python -m bench serve --models=char-cpu --loads=0.5,2,8 --requests=40
    python -m bench serve --quick

Requests arrive at random times (Poisson, the same for every variant) whether or not earlier ones are answered, as those
of many users do. `load` is their rate over what one answer at a time can keep up with, measured here first: beyond 1
such a loop falls behind for ever, and its times say only how long the bench ran. Variants: the server (HTTP and
server-sent events over loopback, clients in the same process, continuous batching over --slots), the engine as a plain
loop that gives one answer after the other, and transformers' generate as the same loop, where it is installed; the two
loops without HTTP. Greedy, random weights, prompts of random ids. `ttft_ms` is from a request's arrival to its first
token, `tpot_ms` the mean of its further ones, `ms` from its arrival to its last; `tokens_per_s` is all tokens over the
time from the first arrival to the last token.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptfast.chat.tools import Tools
from gptfast.cli import check_ranges
from gptfast.config import NAMES, GPTConfig, preset
from gptfast.engine import Engine, Sampling
from gptfast.errors import UserError
from gptfast.log import Log, Row, facts
from gptfast.model import GPT
from gptfast.runtime import made_current, threads_beside_requests
from gptfast.tokenizer import CharTokenizer

from . import results
from .decoders import fresh, let_go, transformers_model
from .failures import FAILURES, in_one_line
from .timing import summarize

FIRST_LETTER = 0x20000  # of a tokenizer that has a character, and nothing else, for every id
CALIBRATIONS = 3  # answers alone, whose median is what one at a time can do
LONGEST_S = 120.0  # that a client waits for the next token
FAILED: tuple[type[Exception], ...] = (*FAILURES, OSError)

Emit = Callable[[], None]  # to be called at every token
Generate = Callable[[list[int], int, Emit], None]  # n tokens after ids


@dataclass(frozen=True)
class Ask:
    """A request: `at` seconds after the start it wants as many tokens as all others after `prompt`."""

    at: float
    prompt: list[int]


@dataclass(frozen=True)
class Answered:
    """Seconds after the start at which a request arrived and each of its tokens came."""

    arrived: float
    tokens: list[float]


def arrivals(rate: float, requests: int, prompt: int, vocabulary: int, seed: int = 0) -> list[Ask]:
    """Poisson arrivals of `rate` a second; prompts of half to all of `prompt` ids."""
    draw, at, asks = random.Random(seed), 0.0, []
    for _ in range(requests):
        ids = [draw.randrange(vocabulary) for _ in range(draw.randint(max(prompt // 2, 1), prompt))]
        asks.append(Ask(at, ids))
        at += draw.expovariate(rate)
    return asks


# ---- one at a time ---------------------------------------------------------------------------------------------------
def one_at_a_time(generate: Generate, asks: Sequence[Ask], new: int) -> list[Answered]:
    """First come, first served, each alone."""
    start, found = time.perf_counter(), []
    for ask in asks:
        time.sleep(max(0.0, start + ask.at - time.perf_counter()))
        stamps: list[float] = []
        generate(ask.prompt, new, lambda stamps=stamps: stamps.append(time.perf_counter() - start))  # type: ignore[misc]
        found.append(Answered(ask.at, stamps))
    return found


def by_loop(model: GPT) -> Generate:
    """The engine with one slot."""
    engine = Engine(model, slots=1)

    def generate(prompt: list[int], new: int, emit: Emit) -> None:
        engine.submit(prompt, Sampling(max_tokens=new, temperature=0))
        while engine.busy:
            for update in engine.step():
                for _ in update.tokens:
                    emit()

    return generate


def by_transformers(config: GPTConfig, model: GPT) -> Generate:
    """transformers' generate with its cache, which tells its tokens to a streamer."""
    from transformers.generation.streamers import BaseStreamer

    on_cpu = model.lm_head.weight.device.type == "cpu"
    theirs = transformers_model(config, model, torch.float32 if on_cpu else torch.bfloat16)

    class Stamps(BaseStreamer):
        def __init__(self, emit: Emit) -> None:
            self._emit, self._is_prompt = emit, True

        def put(self, value: Any) -> None:
            if not self._is_prompt:
                self._emit()
            self._is_prompt = False

        def end(self) -> None:
            pass

    def generate(prompt: list[int], new: int, emit: Emit) -> None:
        tokens = torch.tensor([prompt], device=model.lm_head.weight.device)
        theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, streamer=Stamps(emit),
        )  # fmt: skip

    return generate


# ---- the server ------------------------------------------------------------------------------------------------------
def by_server(model: GPT, asks: Sequence[Ask], new: int, slots: int) -> list[Answered]:
    """All requests to a server of its own, each by a client that reads its stream."""
    from gptfast.serve.asking import Defaults
    from gptfast.serve.server import Serving, running

    tokenizer = CharTokenizer("".join(chr(FIRST_LETTER + i) for i in range(model.config.vocab_size)))
    engine = Engine(model, slots=slots, tokenizer=tokenizer)
    with running(engine, Tools(), Serving(Defaults("bench"), queue=len(asks))) as server:
        host, port = server.url.removeprefix("http://").split(":")
        asyncio.run(ask_server(host, int(port), [Ask(0.0, asks[0].prompt)], new))  # what is done once
        return asyncio.run(ask_server(host, int(port), asks, new))


async def ask_server(host: str, port: int, asks: Sequence[Ask], new: int) -> list[Answered]:
    start = time.perf_counter()

    async def one(ask: Ask) -> Answered:
        await asyncio.sleep(max(0.0, start + ask.at - time.perf_counter()))
        body = json.dumps({"prompt": ask.prompt, "max_tokens": new, "temperature": 0, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        stamps: list[float] = []
        while line := await asyncio.wait_for(reader.readline(), LONGEST_S):
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                stamps += [time.perf_counter() - start] * len(choice["text"])  # a character is a token
        writer.close()
        return Answered(ask.at, stamps)

    return list(await asyncio.gather(*(one(ask) for ask in asks)))


# ---- rows ------------------------------------------------------------------------------------------------------------
def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least `q` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1))]


def figures(
    name: str, impl: str, dtype: str, dims: dict[str, Any], rate: float, found: Sequence[Answered], new: int,
    threads: int | None,
) -> Row:  # fmt: skip
    """The fields of a row."""
    whole = [answer for answer in found if len(answer.tokens) == new]
    if not whole:
        raise RuntimeError(f"none of {len(found)} answers had {new} tokens")
    ttft = [1e3 * (answer.tokens[0] - answer.arrived) for answer in whole]
    tpot = [1e3 * (answer.tokens[-1] - answer.tokens[0]) / (new - 1) for answer in whole]
    ms = [1e3 * (answer.tokens[-1] - answer.arrived) for answer in whole]
    seconds = max(answer.tokens[-1] for answer in whole) - found[0].arrived
    lost = len(found) - len(whole)
    timing = summarize(ms, method="perf_counter from arrival to last token", threads=threads, cold=True)
    return {
        "name": name, "impl": impl, "dtype": dtype, "dims": dims, **timing.fields(), "rate_per_s": rate,
        "requests": len(found),
        **{f"ttft_ms_p{q}": percentile(ttft, q / 100) for q in (50, 95)},
        **{f"tpot_ms_p{q}": percentile(tpot, q / 100) for q in (50, 95)},
        "tokens_per_s": len(whole) * new / seconds,
        "valid": not lost, "invalid_reason": f"{lost} answers were not whole" if lost else None,
    }  # fmt: skip


def line(row: Row) -> str:
    """A row for the console."""
    verdict = "" if row["valid"] else f"  INVALID: {row['invalid_reason']}"
    first, each = (f"{row[f'{what}_ms_p50']:8.1f} {row[f'{what}_ms_p95']:8.1f}" for what in ("ttft", "tpot"))
    return (
        f"serve {row['name']:10s} {row['impl']:13s} load {row['dims']['load']:4g}  {row['tokens_per_s']:8.1f} tokens/s"
        f"  first p50 p95 {first} ms  each {each} ms{verdict}"
    )


# ---- the command -----------------------------------------------------------------------------------------------------
def run_model(name: str, arguments: argparse.Namespace, log: Log, common: Row) -> bool:
    """Every variant at every load; returns whether anything failed or is invalid."""
    device = made_current(arguments.device)
    threads = None if device.type == "cuda" else torch.get_num_threads()
    config, longest = preset(name), arguments.prompt + arguments.new
    config = dataclasses.replace(config, dropout=0.0, block_size=max(config.block_size, longest))
    model = fresh(config, device)
    dtype = str(model.dtype).removeprefix("torch.")
    loop = by_loop(model)
    alone_s = calibrated(loop, arguments.prompt, arguments.new, config.vocab_size)
    log.say(f"serve {name}: one answer of {arguments.new} tokens takes {alone_s:.3f} s alone")
    ways: dict[str, Callable[[Sequence[Ask]], list[Answered]]] = {
        "server": lambda asks: by_server(model, asks, arguments.new, arguments.slots),
        "one at a time": lambda asks: one_at_a_time(loop, asks, arguments.new),
    }
    if importlib.util.find_spec("transformers") is None:
        log.say("serve transformers is not installed: its generate is left out")
    elif config.norm == "layernorm":  # what its GPT-2 can hold
        theirs = by_transformers(config, model)
        theirs([0], 2, lambda: None)
        ways["transformers"] = lambda asks: one_at_a_time(theirs, asks, arguments.new)
    failed, started = False, time.monotonic()
    for load in arguments.loads:
        rate = load / alone_s
        asks = arrivals(rate, arguments.requests, arguments.prompt, config.vocab_size)
        dims = {"load": load, "slots": arguments.slots, "prompt": arguments.prompt, "new": arguments.new}
        for impl, way in ways.items():
            if time.monotonic() - started > arguments.budget_s:
                log.say(f"serve {name} {impl} load {load:g}: left out, the {arguments.budget_s:.0f} s are spent")
                continue
            taken = threads
            if threads is not None:
                taken = threads_beside_requests(threads) if impl == "server" else threads
                torch.set_num_threads(taken)
            try:
                fields = figures(name, impl, dtype, dims, rate, way(asks), arguments.new, taken)
            except FAILED as error:
                failed = True
                log.row("note", name=f"{name} {impl} {dims}", text=f"failed: {type(error).__name__}: {error}")
                log.say(f"serve {name} {impl} {dims}: FAILED: {in_one_line(error)}")
                continue
            log.row("serve", **fields, **common)
            log.say(line(fields))
            failed |= not fields["valid"]
        let_go()
    if threads is not None:
        torch.set_num_threads(threads)
    return failed


def calibrated(generate: Generate, prompt: int, new: int, vocabulary: int) -> float:
    """Seconds of one answer alone, the median of a few after one to warm up."""
    (ask,) = arrivals(1.0, 1, prompt, vocabulary)
    taken = []
    for _ in range(1 + CALIBRATIONS):
        start = time.perf_counter()
        generate(ask.prompt, new, lambda: None)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[CALIBRATIONS // 2]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench serve", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--models", default="gpt2", help=f"of {NAMES}")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--loads", default="0.5,2,4", help="rates of arrival over what one answer at a time can do, comma-separated")
    add("--requests", type=int, help="of each load (default: 64 on a GPU, else 12)")
    add("--slots", type=int, default=8, help="of the server")
    add("--prompt", type=int, default=64, help="tokens of the longest prompt; the shortest has half")
    add("--new", type=int, help="tokens of each answer (default: 64 on a GPU, else 24)")
    add("--budget_s", type=float, default=120.0, help="start no variant after so long")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--quick", action="store_true", help="one load of the first model, 8 requests")
    add("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    arguments = check_ranges(parser.parse_args(argv))
    models = [name for name in arguments.models.split(",") if name]
    for name in models:
        preset(name, "--models")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not on_gpu:
        raise UserError(f"--device={arguments.device}: this machine has no CUDA device; leave --device out")
    arguments.new = arguments.new or (64 if on_gpu else 24)
    arguments.requests = arguments.requests or (8 if arguments.quick else 64 if on_gpu else 12)
    arguments.loads = loads(arguments.loads)[1 if arguments.quick else 0 :][: 1 if arguments.quick else None]
    for flag, least in (("new", 2), ("requests", 1), ("slots", 1), ("prompt", 1), ("budget_s", 1), ("threads", 1)):
        if not getattr(arguments, flag) >= least:
            raise UserError(f"--{flag}={getattr(arguments, flag)}: must be at least {least}")
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    common = facts(device)
    out = arguments.out or results.folder(common["hardware"])
    with Log(out, name="serve.jsonl") as log:
        failed = [run_model(name, arguments, log, common) for name in (models[:1] if arguments.quick else models)]
    results.compact(out / "serve.jsonl")
    return 1 if any(failed) else 0


def loads(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",") if word]
    except ValueError:
        raise UserError(f"--loads={text}: expected numbers, comma-separated") from None
    if not found or not all(0 < load <= 1000 for load in found):
        raise UserError(f"--loads={text}: expected numbers above 0 and at most 1000")
    return found
