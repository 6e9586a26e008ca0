"""A training step on the CPU against the plain way of writing it, side by side in one process.

    python -m bench.cpu                         # plain, and ours in bf16 and fp32
    python -m bench.cpu --compile               # and ours compiled, after a warm-up that is not counted
    python -m bench.cpu --rounds=40 --out=results/cpu.jsonl

A step is the next batch, forward, backward, clipping and AdamW, for nanoGPT's README command on a CPU: 4 layers of
4 heads, 128 wide, block 64, batch 12, 65 characters, no dropout; on random tokens. `plain` is that model as usually
typed: nn.Linear in fp32, F.scaled_dot_product_attention, AdamW with torch's defaults, clip_grad_norm_, and a batch
stacked from a memory-mapped file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from bench import stats, timing
from gptfast import cli
from gptfast.aside import check_writable
from gptfast.config import PRESETS, GPTConfig
from gptfast.data import Batches
from gptfast.errors import UserError
from gptfast.log import Log, facts
from gptfast.model import GPT, IGNORED
from gptfast.optim import adamw
from gptfast.runtime import compute_dtype
from gptfast.step import Step, language_model

CONFIG = PRESETS["char-cpu"]
BATCH_SIZE = 12
TOKENS = 1_000_000  # as many as tinyshakespeare has to train on
ADAMW: dict[str, Any] = {"learning_rate": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
CLIP = 1.0
STEPS_PER_SAMPLE = 5  # so that a variant finds its own data in the caches, as it would alone

Run = Callable[[], Tensor]


class PlainBlock(nn.Module):
    """A pre-norm block, written as in many a tutorial."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.heads = config.n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(C, bias=config.bias), nn.LayerNorm(C, bias=config.bias)
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=config.bias), nn.Linear(C, C, bias=config.bias)
        self.wide, self.narrow = nn.Linear(C, 4 * C, bias=config.bias), nn.Linear(4 * C, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(C, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.narrow(F.gelu(self.wide(self.norm_2(x))))


class PlainGPT(nn.Module):
    """The same architecture as GPT(CONFIG), without this project."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(PlainBlock(config) for _ in range(config.n_layer)))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tokens.weight = self.head.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORED)


def plain_step(path: Path) -> Run:
    """The plain model's training step over the uint16 tokens in the file at `path`."""
    model, T = PlainGPT(CONFIG), CONFIG.block_size
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=ADAMW["learning_rate"], betas=ADAMW["betas"])

    def step() -> Tensor:
        tokens = numpy.memmap(path, dtype=numpy.uint16, mode="r")
        starts = torch.randint(len(tokens) - T, (BATCH_SIZE,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(tokens[i + shift : i + shift + T].astype(numpy.int64)) for i in starts])
            for shift in (0, 1)
        )
        loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_step(tokens: Tensor, dtype: torch.dtype, compiled: bool) -> Run:
    """Our training step in `dtype`; `compiled` puts forward, backward and clipping into one graph."""
    model = GPT(CONFIG, kernels.load("cpu"), dtype)
    with contextlib.redirect_stdout(io.StringIO()):  # the table of groups
        optimizer = adamw(model, **ADAMW)
    batches = Batches(tokens, BATCH_SIZE, CONFIG.block_size)
    step = Step(language_model(model), optimizer, clip=CLIP, compiled=compiled)
    return lambda: step(batches)


def sampler(step: Run) -> Callable[[], float]:
    """Milliseconds of one step, the mean of a few in a row."""

    def sample() -> float:
        start = time.perf_counter_ns()
        for _ in range(STEPS_PER_SAMPLE):
            step()
        return (time.perf_counter_ns() - start) / (1e6 * STEPS_PER_SAMPLE)

    return sample


def compare(rounds: int, compiled: bool, out: Path | None) -> None:
    """Measure every variant, print a table of ms/iter and ratios to `plain`, and append rows to `out`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        numpy.random.default_rng(0).integers(CONFIG.vocab_size, size=TOKENS, dtype=numpy.uint16).tofile(path)
        tokens = torch.from_numpy(numpy.fromfile(path, dtype=numpy.uint16).astype(numpy.int64))
        fast, reason = compute_dtype("cpu")
        print(
            f"{torch.get_num_threads()} threads; {reason}; median ms/iter of {rounds} x {STEPS_PER_SAMPLE} steps",
            flush=True,
        )
        steps = {"plain float32": plain_step(path)}
        for dtype in dict.fromkeys((fast, torch.float32)):
            name = str(dtype).removeprefix("torch.")
            steps[f"eager {name}"] = our_step(tokens, dtype, compiled=False)
            if compiled:
                steps[f"compiled {name}"] = our_step(tokens, dtype, compiled=True)
        for step in steps.values():  # warm up; a compiled one compiles
            for _ in range(STEPS_PER_SAMPLE):
                step()
        samples = timing.interleave({name: sampler(step) for name, step in steps.items()}, rounds)
    with Log(None) if out is None else Log(out.parent, name=out.name) as log:
        _report(samples, log)


def _report(samples: dict[str, list[float]], log: Log) -> None:
    base, tokens_per_step = samples["plain float32"], BATCH_SIZE * CONFIG.block_size
    print(f"{'':20} {'p20':>8} {'median':>8} {'p80':>8} {'faster than plain':>20}")
    for variant, values in samples.items():
        (impl, dtype), ratio = variant.split(), stats.compare(values, base)
        times = timing.summarize(values, method="perf_counter", threads=torch.get_num_threads(), cold=False)
        print(
            f"{impl:9} {dtype:10} {times.ms_p20:8.2f} {times.ms_p50:8.2f} {times.ms_p80:8.2f}"
            f"   x{ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        )
        log.row(
            "model", name="char-cpu step", impl=impl, dtype=dtype, tokens_per_s=tokens_per_step / times.ms_p50 * 1e3,
            speedup=ratio.ratio, speedup_low=ratio.low, speedup_high=ratio.high, **times.fields(), **facts("cpu"),
        )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench.cpu", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=30, help="samples of each variant")
    parser.add_argument("--compile", action="store_true", help="also time the step compiled")
    parser.add_argument("--out", type=Path, help="file that the rows are appended to")
    arguments = cli.check_ranges(parser.parse_args(argv))
    if arguments.rounds < 1:
        raise UserError(f"rounds is {arguments.rounds}; give 1 or more")
    if arguments.out is not None:
        check_writable(arguments.out.parent)
        if arguments.out.is_dir():
            raise UserError(f"--out={arguments.out}: it is a folder; name a file")
    compare(arguments.rounds, arguments.compile, arguments.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
