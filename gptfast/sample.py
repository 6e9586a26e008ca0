"""Text from a trained model: `python -m gptfast.sample --out_dir=out --start="..."`, with nanoGPT's flags.

The tokenizer comes out of the checkpoint, so neither the data set nor its folder is needed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptfast import checkpoint, cli, hf
from gptfast.cli import UserError
from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer, from_json
from kernels import Ops

SEPARATOR = "---------------"


@dataclass(frozen=True)
class Sample:
    init_from: str = "resume"  # resume (a checkpoint in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
    out_dir: str = "out"  # folder with the checkpoint
    start: str = "\n"  # the prompt, or FILE:path to read it from a file
    num_samples: int = 10  # how many samples to draw
    max_new_tokens: int = 500  # tokens in each
    temperature: float = 0.8  # below 1 more likely text, above 1 more varied; 0 always takes the likeliest token
    top_k: int = 200  # draw from the likeliest top_k tokens only; 0 draws from all
    seed: int = 1337  # of the draws
    device: str = "cuda"  # cuda, cuda:N, mps or cpu; the default becomes cpu, and says so, where there is no GPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; auto: the best this device has
    compile: bool = False  # compile the model with torch.compile
    kernels: Literal["auto", "reference", "triton", "interpret"] = "auto"  # which implementation of each op runs

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        for name in ("temperature", "top_k"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name}={getattr(self, name)}: must not be negative")


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues each row of `tokens (B, T)` int64 by `max_new_tokens`; returns (B, T + max_new_tokens).

    Each new token is drawn from softmax(logits / temperature) over the `top_k` likeliest tokens (0: all of them);
    temperature 0 takes the likeliest. The model sees the last `block_size` tokens. `generator` lives on tokens' device.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for _ in range(max_new_tokens):
            context = tokens[:, -model.config.block_size :]
            logits = model.logits(context, last_only=True)[:, -1, :].float()
            tokens = torch.cat([tokens, draw(logits, temperature, top_k, generator)], dim=1)
    model.train(was_training)
    return tokens


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    """One token per row of `logits (B, V)`, as (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth_largest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)


def main(argv: list[str]) -> None:
    config = cli.parse(Sample, argv)
    device = cli.choose_device(config.device, typed="device" in cli.typed(argv, Sample))
    dtype, why = cli.choose_dtype(config.dtype, device)
    print(f"dtype: {str(dtype).removeprefix('torch.')}, {why}")
    model, tokenizer = load_model(config.init_from, config.out_dir, cli.choose_ops(config.kernels, device), dtype)
    prompt = tokenizer.encode(read_prompt(config.start))
    if not prompt:
        raise UserError("--start is empty; give at least one character")
    print(f"number of parameters: {model.num_params() / 1e6:.2f}M")
    model.to(device)
    if config.compile:
        model.logits = torch.compile(model.logits, dynamic=True)  # type: ignore[method-assign]
    generator = torch.Generator(device).manual_seed(config.seed)
    start = torch.tensor([prompt], device=device)
    for _ in range(config.num_samples):
        tokens = generate(
            model,
            start,
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            generator=generator,
        )
        print(tokenizer.decode(tokens[0].tolist()))
        print(SEPARATOR, flush=True)


def load_model(init_from: str, out_dir: str, ops: Ops, dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    """The model of the last checkpoint in `out_dir`, or a pretrained GPT-2, on the CPU; and its tokenizer."""
    if init_from != "resume":
        return hf.load(init_from, ops, dtype=dtype), hf.load_tokenizer(init_from)
    saved = checkpoint.load(out_dir)
    model = GPT(GPTConfig(**saved.meta["model"]), ops, dtype)
    model.load_state_dict(saved.model)
    return model, from_json(saved.meta["tokenizer"])


def read_prompt(start: str) -> str:
    """`start`, or the text of the file that `FILE:path` names."""
    if not start.startswith("FILE:"):
        return start
    path = start.removeprefix("FILE:")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"--start=FILE:{path}: cannot read it ({reason}); name a text file") from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
