"""A model behind HTTP: `python -m gptfast.serve --out_dir=out-chat/rl`, then http://127.0.0.1:8000 in a browser.

OpenAI's API is at /v1, nanochat's at /chat/completions. Ctrl-C lets running answers finish within --grace_s seconds; a
second one does not.
"""

from __future__ import annotations

from gptfast.runtime import set_up_process

if __name__ == "__main__":
    set_up_process()

import contextlib
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from gptfast import cli, mfu, runtime, untrusted
from gptfast.chat.sandbox import Sandbox
from gptfast.chat.tools import Tools
from gptfast.engine import Engine, Sampling
from gptfast.errors import UserError
from gptfast.sample import load_model
from gptfast.serve.app import LOCAL, Guarded
from gptfast.serve.asking import MOST_TEMPERATURE, MOST_TOKENS, MOST_TOP_K, Defaults
from gptfast.serve.server import Server, Serving, import_uvicorn, listen

SHORTEST_TOKEN, LARGEST_TOKEN_FILE = 16, 10_000  # characters, bytes


@dataclass(frozen=True)
class Serve:
    init_from: str = "resume"  # resume (a checkpoint in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
    out_dir: str = "out"  # folder with the checkpoint
    host: str = "127.0.0.1"  # address to listen at; 0.0.0.0 for every one of this machine, with a --token_file
    port: int = 8000  # 0 takes a free one
    name: str = ""  # of the model, as clients ask for it; empty: out_dir, or init_from
    slots: int = 8  # answers at once
    page_size: int = (
        16  # tokens; what a conversation's next turn shares with the last is not read again, by whole pages
    )
    queue: int = 64  # answers that may wait for a slot; those beyond are told to come back (429)
    tools: Literal["none", "calculator", "python"] = "calculator"  # python: and a sandbox, for what that cannot do
    max_tokens: int = 512  # of an answer, unless a request says otherwise
    temperature: float = 0.8  # of an answer, unless a request says otherwise
    top_k: int = 50  # of an answer, unless a request says otherwise
    token_file: str = ""  # file with the token that clients must give as `Authorization: Bearer`; empty: none
    hosts: str = ""  # more names, comma-separated, by which a server on 127.0.0.1 may be asked for
    grace_s: float = 10.0  # seconds that running answers have to finish after Ctrl-C
    memory_gbs: float = 0.0  # what this machine reads from memory, for mbu; 0: by its datasheet, if it is known
    device: str = "cuda"  # cuda, cuda:N, mps or cpu; the default becomes cpu, and says so, where there is no GPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; auto: the best this device has
    quantize: Literal["none", "int8"] = "none"  # int8: keep the weights in 8 bits
    compile: bool = False  # compile the decoding step with torch.compile
    kernels: Literal["auto", "reference", "triton", "interpret"] = "auto"  # which implementation of each op runs
    threads: int = 0  # of a CPU, for the model; 0: as many as there are cores, but one, which HTTP takes

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "port": (0, 65535), "slots": (1, 1024), "page_size": (1, 4096), "queue": (0, 100_000),
            "max_tokens": (1, MOST_TOKENS),
            "temperature": (0, MOST_TEMPERATURE), "top_k": (0, MOST_TOP_K), "grace_s": (0, 3600),
            "memory_gbs": (0, 1e6), "threads": (0, 4096),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name}={getattr(self, name):g}: must be {least:g} to {most:g}")


def main(argv: list[str]) -> int:
    config = cli.parse(Serve, argv)
    import_uvicorn()
    guarded = guarded_by(config)
    tools = Tools(config.tools != "none", Sandbox() if config.tools == "python" else None)
    listener = listen(config.host, config.port)
    device = runtime.choose_device(config.device, typed="device" in cli.typed(argv, Serve))
    if device == "cpu":
        torch.set_num_threads(config.threads or runtime.threads_beside_requests(torch.get_num_threads()))
        print(f"threads: {torch.get_num_threads()}")
    dtype, why = runtime.choose_dtype(config.dtype, device)
    print(f"dtype: {str(dtype).removeprefix('torch.')}, {why}")
    model, tokenizer = load_model(config.init_from, config.out_dir, runtime.choose_ops(config.kernels, device), dtype)
    model = model.to(device).eval()
    engine = Engine(
        model,
        slots=config.slots,
        tokenizer=tokenizer,
        page_size=config.page_size,
        weights="int8" if config.quantize == "int8" else "auto" if config.dtype == "auto" else "model",
        compile=config.compile,
    )
    print(f"weights: {engine.why}")
    name = config.name or (config.out_dir if config.init_from == "resume" else config.init_from)
    defaults = Defaults(name, config.max_tokens, config.temperature, config.top_k)
    warm_up(engine, defaults)
    serving = Serving(defaults, guarded, config.queue, config.grace_s)
    server = Server(engine, tools, serving, listener, peak_of(config, device))
    print(f"serving {name} at {server.url}; Ctrl-C ends it within {server.ends_within_s:g} s", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn's way to say that it ended because of one
        server.serve()
    print("ended")
    return 0


def warm_up(engine: Engine, defaults: Defaults) -> None:
    """What is done once, such as compiling kernels and recording graphs: the first to ask need not wait for it."""
    for temperature in (0.0, defaults.temperature):
        engine.submit([0], Sampling(max_tokens=3, temperature=temperature, top_k=defaults.top_k))
    while engine.busy:
        engine.step()


def guarded_by(config: Serve) -> Guarded:
    """Who may ask. A server on this machine alone knows itself by its own names, so that no web page of another name
    that resolves to it can reach it."""
    names = tuple(name.strip().lower() for name in config.hosts.split(",") if name.strip())
    hosts = (*LOCAL, *names) if config.host in LOCAL else ()
    if not config.token_file:
        if config.host not in LOCAL:
            print(f"--host={config.host} without --token_file: whoever reaches this machine may use the model")
        return Guarded(None, hosts)
    try:
        token = untrusted.content(config.token_file, LARGEST_TOKEN_FILE).decode("ascii").strip()
    except (OSError, ValueError) as error:
        reason = "it is not ASCII" if isinstance(error, UnicodeDecodeError) else untrusted.reason(error)
        raise UserError(f"--token_file={config.token_file}: cannot read it ({reason})") from None
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise UserError(
            f"--token_file={config.token_file}: expected one line of at least {SHORTEST_TOKEN} letters and digits"
        )
    return Guarded(token, hosts)


def peak_of(config: Serve, device: str) -> mfu.Peak | None:
    if config.memory_gbs:
        return mfu.Peak.measured("this machine", {}, config.memory_gbs * 1e9, "--memory_gbs")
    return mfu.peak_of(torch.device(device))


if __name__ == "__main__":
    sys.exit(cli.run(main))
