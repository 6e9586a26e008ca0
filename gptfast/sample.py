"""Text from a trained model: `python -m gptfast.sample --out_dir=out --start="..."`, with nanoGPT's flags.

The tokenizer is read from the checkpoint, so the data set is not needed.
"""

from __future__ import annotations

from gptfast.runtime import set_up_process

if __name__ == "__main__":
    set_up_process()

import random
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch

from gptfast import checkpoint, cli, hf, runtime, untrusted
from gptfast.config import config_of
from gptfast.engine import Engine, Request, Sampling
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer, from_json
from kernels import Ops

LARGEST_PROMPT = 2**24  # bytes of a file
SEPARATOR = "---------------"
MOST_AT_ONCE = 16  # samples; the others wait for a free slot


@dataclass(frozen=True)
class Sample:
    init_from: str = "resume"  # resume (a checkpoint in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
    out_dir: str = "out"  # folder with the checkpoint
    start: str = "\n"  # the prompt, or FILE:path to read it from a file
    num_samples: int = 10  # how many samples to draw
    max_new_tokens: int = 500  # tokens in each
    temperature: float = 0.8  # below 1 more likely text, above 1 more varied; 0 always takes the likeliest token
    top_k: int = 200  # draw from the likeliest top_k tokens only; 0 draws from all
    top_p: float = 1.0  # draw only from the likeliest tokens whose probabilities sum to this; 1 draws from all
    repetition_penalty: float = 1.0  # above 1, tokens that occurred become less likely
    stop: str = ""  # end a sample where this text would begin; empty: no such text
    seed: int = 1337  # of the random draws
    device: str = "cuda"  # cuda, cuda:N, mps or cpu; the default becomes cpu, and says so, where there is no GPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; auto: the best this device has
    quantize: Literal["none", "int8"] = "none"  # int8: keep the weights in 8 bits
    compile: bool = False  # compile the decoding step with torch.compile
    kernels: Literal["auto", "cpu", "reference", "triton", "interpret"] = "auto"  # which implementation of each op runs

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        for name in ("temperature", "top_k"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name}={getattr(self, name)}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p}: must be above 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise UserError(f"--repetition_penalty={self.repetition_penalty}: must be above 0")


def main(argv: list[str]) -> None:
    config = cli.parse(Sample, argv)
    device = runtime.choose_device(config.device, typed="device" in cli.typed(argv, Sample))
    dtype, why = runtime.choose_dtype(config.dtype, device)
    print(f"dtype: {str(dtype).removeprefix('torch.')}, {why}")
    model, tokenizer = load_model(config.init_from, config.out_dir, runtime.choose_ops(config.kernels, device), dtype)
    prompt = read_prompt(config.start)
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise UserError("--start is empty; give at least one character")
    engine = Engine(
        model.to(device),
        slots=min(config.num_samples, MOST_AT_ONCE),
        tokenizer=tokenizer,
        weights="int8" if config.quantize == "int8" else "auto" if config.dtype == "auto" else "model",
        compile=config.compile,
    )
    print(f"weights: {engine.why}")
    print(f"number of parameters: {model.num_params() / 1e6:.2f}M")
    seeds = random.Random(config.seed)
    requests = [
        engine.submit(
            tokens,
            Sampling(
                max_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                repetition_penalty=config.repetition_penalty,
                seed=seeds.getrandbits(63),
                stop=(config.stop,) if config.stop else (),
            ),
        )
        for _ in range(config.num_samples)
    ]
    print(stream(engine, requests, tokenizer.decode(tokens)))


def stream(engine: Engine, requests: list[Request], prompt: str) -> str:
    """Prints the texts one after another, streaming the first; returns a line with the speed."""
    start = first = time.perf_counter()
    shown = 0  # characters of the text that is being printed
    queue = deque(requests)
    print(prompt, end="")
    while queue:
        engine.step()
        if first == start:
            first, early = time.perf_counter(), sum(len(request.tokens) for request in requests)
        while queue:
            print(queue[0].text[shown:], end="", flush=True)
            if queue[0].finish_reason == "error":
                print()
                raise UserError(f"a sample ended: {queue[0].error}")
            shown = len(queue[0].text)
            if queue[0].finish_reason is None:
                break
            print(f"\n{SEPARATOR}", flush=True)
            queue.popleft()
            print(prompt if queue else "", end="")
            shown = 0
    seconds, count = time.perf_counter() - first, sum(len(request.tokens) for request in requests) - early
    speed = f"{count / seconds:.1f}" if count else "n/a"
    return f"time to first token: {1000 * (first - start):.1f} ms, then {speed} tokens/s"


def load_model(init_from: str, out_dir: str, ops: Ops, dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    """Loads the model of the last checkpoint in `out_dir`, or a pretrained one, on the CPU; and its tokenizer."""
    if init_from != "resume":
        return hf.load(init_from, ops, dtype=dtype), hf.load_tokenizer(init_from)
    saved = checkpoint.load(out_dir)
    model = GPT.of(config_of(saved.meta.get("model")), saved.model, ops, dtype, where=str(saved.path))
    return model, from_json(saved.meta.get("tokenizer"))


def read_prompt(start: str) -> str:
    """Returns `start`, or the text of the file that `FILE:path` names."""
    if not start.startswith("FILE:"):
        return start
    path = start.removeprefix("FILE:")
    try:
        return untrusted.text(path, LARGEST_PROMPT).replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else untrusted.reason(error)
        raise UserError(f"--start=FILE:{path}: cannot read it ({reason}); name a text file") from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
