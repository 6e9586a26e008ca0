"""The speedrun: from nothing to a trained, sampled, plotted GPT in one command.

    python -m train.speedrun                                             the preset for this machine, on embedded text
    python -m train.speedrun --preset=cpu-sprint --dataset=shakespeare_char
    python -m train.speedrun --iters=200 --seed=7 --out_dir=out-seven

Prepares the data where it is missing, trains, and leaves in out_dir: metrics.jsonl (the rows), a checkpoint that
`python -m gptfast.sample` reads, loss.png, throughput.png and report.md. Ctrl-C stops training, saves, and reports on
what is there.

The recipe: rotary positions, normalized queries and keys, RMSNorm, ReLU², no biases, an untied head that starts at
zero, token shift; Muon for the matrices, Adam for the rest, rates that fall linearly to zero. Every ingredient has a
flag that leaves it out; `python -m bench speedrun` tells what each is worth.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from gptfast import checkpoint, cli, mfu, report
from gptfast.cli import UserError
from gptfast.config import GPTConfig
from gptfast.data import Batches, Tokens, count_windows, load_tokens, whole_split
from gptfast.engine import generate
from gptfast.log import Log, facts
from gptfast.model import GPT
from gptfast.optim import Muon, groups_table, muon, set_learning_rate, set_scheduled
from gptfast.step import Step, language_model, no_graph
from gptfast.step import evaluate as mean_loss
from gptfast.tokenizer import load_tokenizer, read_meta
from kernels.newton_schulz import POLAR_EXPRESS
from train.prepare import prepare

EVAL_SEED = 0  # every evaluation of every run sees the same windows
CONSOLE_LINES = 20  # progress lines of a run
COUNTS = (
    "iters", "batch_size", "accumulation", "block_size", "n_layer", "n_head", "n_embd", "eval_iters", "log_interval",
)  # fmt: skip
RATES = ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr")


@dataclass(frozen=True)
class Speedrun:
    preset: str = "auto"  # cpu, cpu-plain, cpu-sprint, gpu, gpu-embedded; auto: what suits the device and its data
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto: the GPU where there is one
    dataset: str = "pystdlib"  # pystdlib, shakespeare_char, or any that is prepared
    data_dir: str = "data"  # folder of the data sets
    out_dir: str = "out-speedrun"  # where rows, checkpoint, figures and report.md go
    seed: int = 1337  # of weights and batches
    iters: int = 600  # updates
    batch_size: int = 12  # sequences per micro-batch
    accumulation: int = 1  # micro-batches per update
    block_size: int = 64  # tokens per sequence
    vocab_size: int = 0  # rows of embedding and head; 0: as many as the data has tokens
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads
    n_embd: int = 128  # width
    token_shift: bool = True  # positions also see the one before (in the embedding, two), channel by channel
    block_shift: bool = True  # with token_shift, in the blocks as well as in the embedding
    position: Literal["rope", "learned"] = "rope"  # how a position is told
    qk_norm: bool = True  # normalize queries and keys
    activation: Literal["relu2", "gelu"] = "relu2"  # of the MLP
    tied: bool = False  # head and embedding are one matrix, started small, instead of a head that starts at zero
    optimizer: Literal["muon", "adamw"] = "muon"  # of the matrices in the blocks
    matrix_lr: float = 0.05  # their rate
    embedding_lr: float = 0.15  # Adam's, for the embedding
    head_lr: float = 0.02  # Adam's, for the head
    scalar_lr: float = 0.06  # Adam's, for token shifts
    momentum: float = 0.9  # Muon's, reached from momentum_start
    momentum_start: float = 0.8  # Muon's at the first update
    momentum_iters: int = 50  # updates until momentum is reached
    newton_schulz_steps: int = 4  # Muon's; the last of five buys nothing at this size
    weight_decay: float = 0.0  # of the matrices, at the first update; falls linearly to zero
    warmup: float = 0.0  # the part of the run, at its start, over which the rates rise
    decay: float = 1.0  # the part of the run, at its end, over which the rates fall linearly to zero
    eval_interval: int = 200  # updates between evaluations; 0: only at the end
    eval_iters: int = 20  # batches of each split per evaluation
    log_interval: int = 1  # updates between rows
    num_samples: int = 2  # texts to draw at the end
    sample_tokens: int = 300  # tokens in each
    report: bool = True  # draw loss.png and throughput.png and write report.md at the end
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; auto: the best this device has
    kernels: Literal["auto", "reference", "triton", "interpret"] = "auto"  # which implementation of each op runs
    compile: bool = False  # compile with torch.compile: faster steps after a slow start
    cuda_graph: bool | None = None  # launch an update as one CUDA graph; default: on a GPU
    peak_tflops: float = 0.0  # dense peak to reckon MFU against, for a device whose peak is not known

    def __post_init__(self) -> None:
        for name in (*COUNTS, *RATES, "decay"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name}={getattr(self, name)}: must be above 0")
        if not 0 < self.decay <= 1:
            raise UserError(f"--decay={self.decay}: must be at most 1, the whole run")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"--warmup={self.warmup}: must be between 0 and 1, the whole run")
        if self.weight_decay < 0:
            raise UserError(f"--weight_decay={self.weight_decay}: must not be below 0")
        if not 1 <= self.newton_schulz_steps <= len(POLAR_EXPRESS):
            raise UserError(f"--newton_schulz_steps={self.newton_schulz_steps}: must be 1 to {len(POLAR_EXPRESS)}")
        for name in ("momentum", "momentum_start"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 0 and below 1")
        if self.dtype == "float16":
            raise UserError("--dtype=float16: the speedrun has no loss scaling; use bfloat16 or float32")


# GPT-2's 124M layers, with heads of 128 and 0.5M tokens per update, on FineWeb's first ten billion GPT-2 tokens
GPU = Speedrun(
    preset="gpu", dataset="fineweb10B", iters=5000, batch_size=32, accumulation=16, block_size=1024, vocab_size=50304,
    n_layer=12, n_head=6, n_embd=768, token_shift=False,
    matrix_lr=0.02, embedding_lr=0.3, head_lr=0.004, scalar_lr=0.04, decay=0.4,
    momentum=0.95, momentum_start=0.85, momentum_iters=300, newton_schulz_steps=5, log_interval=10, compile=True,
)  # fmt: skip

# Two ways to the loss of nanoGPT's CPU command on tinyshakespeare, 1.898 over the whole validation split, tuned with
# seeds 1, 2 and 3 on a CPU without bfloat16. First with a model of its size, 803,328 parameters for its 804,096;
CPU_PLAIN = Speedrun(
    preset="cpu-plain", iters=95, batch_size=24, block_shift=False, matrix_lr=0.06, embedding_lr=0.2, head_lr=0.03,
    scalar_lr=0.08, momentum_iters=20, eval_interval=0,
)  # fmt: skip
# then with one of any size, where small and narrow takes the fewest seconds
CPU_SPRINT = Speedrun(
    preset="cpu-sprint", iters=185, batch_size=24, n_layer=1, n_head=2, n_embd=64, qk_norm=False, matrix_lr=0.07,
    embedding_lr=0.2, head_lr=0.03, scalar_lr=0.08, momentum_iters=25, newton_schulz_steps=3, eval_interval=0,
    eval_iters=1,
)  # fmt: skip

PRESETS: dict[str, Speedrun] = {
    "cpu": Speedrun(preset="cpu"),
    "cpu-plain": CPU_PLAIN,
    "cpu-sprint": CPU_SPRINT,
    "gpu": GPU,
    # the same model where FineWeb is not at hand: for throughput and MFU, since the text is soon known by heart
    "gpu-embedded": dataclasses.replace(GPU, preset="gpu-embedded", dataset="pystdlib", iters=100, eval_interval=50),
}


@dataclass
class Run:
    """What a speedrun works with. `iteration` is the number of updates done, `seconds` the time they took."""

    config: Speedrun
    device: str
    facts: dict[str, Any]  # the machine, the software and the commit, for rows that stand alone
    splits: dict[str, Tokens]
    tokenizer: dict[str, Any]
    model: GPT
    optimizer: Muon
    batches: Batches
    iteration: int = 0
    seconds: float = 0.0


def main(argv: list[str]) -> None:
    config = configure(argv)
    with open_log(config.out_dir) as log:
        run = start(config, log)
        try:
            train(run, log)
            finish(run, log)
        except KeyboardInterrupt:
            log.say(f"stopped after {run.iteration} of {config.iters} updates")
            if 0 < run.iteration < config.iters:
                log.say(f"saved {save(run)}")
            raise
        finally:
            if run.iteration and config.report:
                rows = report.read([Path(config.out_dir) / "metrics.jsonl"])
                log.say(f"report: {report.write_report(rows, config.out_dir)}")


def configure(argv: list[str]) -> Speedrun:
    """The preset of this machine, or the one named, with every flag typed; `auto` is resolved."""
    asked = cli.parse(Speedrun, argv)
    device = asked.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = cli.choose_device(device, typed=True)
    preset = asked.preset
    if preset == "auto" and device.startswith("cuda"):
        preset = "gpu" if (Path(asked.data_dir) / GPU.dataset / "train.bin").is_file() else "gpu-embedded"
    elif preset == "auto":
        preset = "cpu"
    if preset not in PRESETS:
        raise UserError(f"--preset={preset}: no such preset{cli.nearest(preset, PRESETS)}")
    return dataclasses.replace(cli.parse(Speedrun, [preset, *argv], PRESETS), preset=preset, device=device)


def open_log(out_dir: str) -> Log:
    """out_dir/metrics.jsonl. Raises UserError where it cannot be written, before anything is computed."""
    try:
        return Log(out_dir, name="metrics.jsonl")
    except OSError as error:
        raise UserError(f"--out_dir={out_dir}: cannot write there ({error.strerror}); choose another") from None


# ---- before the first step


def start(config: Speedrun, log: Log) -> Run:
    """Data, model and optimizer; says what was chosen, and why, and opens the rows."""
    torch.manual_seed(config.seed)
    dtype, why = cli.choose_dtype(config.dtype, config.device)
    log.say(f"preset {config.preset} on {config.device}; dtype {str(dtype).removeprefix('torch.')}: {why}")
    folder = Path(config.data_dir) / config.dataset
    if not (folder / "train.bin").is_file():
        prepare(config.dataset, config.data_dir)
    meta = read_meta(folder)
    vocab_size = config.vocab_size or (meta["vocab_size"] if meta else 50304)
    splits = {split: load_tokens(folder / f"{split}.bin", vocab_size, config.block_size) for split in ("train", "val")}

    model = GPT(architecture(config, vocab_size), cli.choose_ops(config.kernels, config.device), dtype)
    initialize(model)
    model.to(config.device)
    optimizer = muon(
        model, model.config, matrix_lr=config.matrix_lr, embedding_lr=config.embedding_lr, head_lr=config.head_lr,
        scalar_lr=config.scalar_lr, momentum=config.momentum, steps=config.newton_schulz_steps, cautious=True,
        matrix_kind=config.optimizer, newton_schulz=model.ops.newton_schulz,
    )  # fmt: skip
    parameters = count_parameters(model)
    tokens = config.accumulation * config.batch_size * config.block_size
    log.say(f"{parameters:,} parameters; {tokens:,} tokens per update; {config.iters} updates")
    log.say(groups_table(optimizer))
    here = facts(config.device)
    log.row(
        "run", name=f"speedrun {config.preset} on {config.dataset}", parameters=parameters, **here,
        config=dataclasses.asdict(config), model=dataclasses.asdict(model.config),
    )  # fmt: skip
    return Run(
        config=config,
        device=config.device,
        facts=here,
        splits=splits,
        tokenizer=meta["tokenizer"] if meta else {"kind": "tiktoken", "name": "gpt2"},
        model=model,
        optimizer=optimizer,
        batches=Batches(splits["train"], config.batch_size, config.block_size, seed=config.seed, device=config.device),
    )


def count_parameters(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def architecture(config: Speedrun, vocab_size: int) -> GPTConfig:
    """The modern GPT of this size."""
    return GPTConfig(
        block_size=config.block_size, vocab_size=vocab_size, n_layer=config.n_layer, n_head=config.n_head,
        n_embd=config.n_embd, bias=False, norm="rmsnorm", position=config.position, activation=config.activation,
        qk_norm=config.qk_norm, token_shift=config.token_shift, block_shift=config.block_shift,
        tied=config.tied,
    )  # fmt: skip


@torch.no_grad()
def initialize(model: GPT) -> None:
    """Every block starts as the identity and every logit at zero: the first loss is ln V, and no warm-up is needed.

    Projections into the residual stream and the head are zero, other matrices uniform with deviation 0.5 / sqrt(C),
    embeddings N(0, 1). A tied head is a matrix like the others, and there the first loss is a little above ln V.
    """
    bound = 0.5 * math.sqrt(3 / model.config.n_embd)
    for name, p in model.named_parameters():
        if model.config.tied and p is model.lm_head.weight:
            p.uniform_(-bound, bound)
        elif name.endswith(("c_proj.weight", "lm_head.weight")):
            p.zero_()
        elif name.endswith("wte.weight"):
            p.normal_()
        elif name.endswith(("c_attn.weight", "c_fc.weight")):
            p.uniform_(-bound, bound)


# ---- the loop


def train(run: Run, log: Log) -> None:
    """Updates until `iters`, with rows, progress lines and evaluations in between."""
    config = run.config
    graph = choose_graph(config, run, log)
    step = Step(
        language_model(run.model), run.optimizer, accumulation=config.accumulation, compiled=config.compile, graph=graph
    )
    peak = mfu.peak_of(torch.device(run.device), config.peak_tflops or None)
    console_interval = math.ceil(config.iters / CONSOLE_LINES)
    since = 0  # updates since the last row
    clock = time.perf_counter()
    while run.iteration < config.iters:
        if config.eval_interval and run.iteration % config.eval_interval == 0:
            paused = time.perf_counter()
            evaluate(run, log)
            clock += time.perf_counter() - paused
        schedule(run.optimizer, run.iteration, config)
        loss = step(run.batches)
        since += 1
        if run.iteration % config.log_interval == 0 or run.iteration == config.iters - 1:
            loss_now = loss.item()  # waits for the device
            now = time.perf_counter()
            took, clock = now - clock, now
            run.seconds += took
            row = step_row(run, loss_now, took / since, peak)
            log.row("step", **row)
            since = 0
            if run.iteration % console_interval == 0 or run.iteration == config.iters - 1:
                log.say(progress(row, config.iters))
            if not math.isfinite(loss_now):
                raise UserError(f"the loss is {loss_now} at update {run.iteration}; lower --matrix_lr, --embedding_lr")
        run.iteration += 1


def choose_graph(config: Speedrun, run: Run, log: Log) -> bool:
    """Whether an update is one CUDA graph; says so. Raises UserError where it is asked for and cannot be."""
    obstacle = no_graph(run.device, ranks=1, dtype=run.model.dtype, documents=False)
    if config.cuda_graph and obstacle:
        raise UserError(f"--cuda_graph=True: {obstacle}; leave it out")
    chosen = config.cuda_graph is not False and obstacle is None
    log.say(f"cuda_graph: {'an update is one CUDA graph' if chosen else 'no'}{f', {obstacle}' if obstacle else ''}")
    return chosen


def schedule(optimizer: Muon, iteration: int, config: Speedrun) -> None:
    """Gives every group the rates, momentum and weight decay of this update."""
    set_learning_rate(optimizer, rate_factor(iteration, config))
    for group in optimizer.param_groups:
        if group["name"] == "matrices":
            if group["kind"] == "muon":
                set_scheduled(group, "momentum", momentum(iteration, config))
            set_scheduled(group, "weight_decay", weight_decay(iteration, config))


def rate_factor(iteration: int, config: Speedrun) -> float:
    """Warm-up, stable, decay: what all rates are multiplied by. Linear over the first `warmup` and last `decay`."""
    warmup_iters, decay_iters = config.warmup * config.iters, config.decay * config.iters
    rise = (iteration + 1) / warmup_iters if iteration + 1 < warmup_iters else 1.0
    return min(rise, 1.0, (config.iters - iteration) / decay_iters)


def momentum(iteration: int, config: Speedrun) -> float:
    """Linear from `momentum_start` to `momentum` over `momentum_iters`, then constant."""
    rise = min(1.0, iteration / max(1, config.momentum_iters))
    return config.momentum_start + rise * (config.momentum - config.momentum_start)


def weight_decay(iteration: int, config: Speedrun) -> float:
    """Linear from `weight_decay` to zero at the end of the run."""
    return config.weight_decay * (1 - iteration / config.iters)


def step_row(run: Run, loss: float, step_s: float, peak: mfu.Peak | None) -> dict[str, Any]:
    config = run.config
    tokens_per_s = config.accumulation * config.batch_size * config.block_size / step_s
    used = mfu.utilization(tokens_per_s, run.model.config, config.block_size, peak=peak, dtype=run.model.dtype)
    timing = {"ms": 1e3 * step_s, "seconds": run.seconds, "tokens_per_s": tokens_per_s}
    return {"step": run.iteration, "loss": loss, **timing, **used}


def progress(row: dict[str, Any], iters: int) -> str:
    """`iter 50/230: loss 2.4213, 24.10 ms, 31,867 tokens/s, mfu n/a, eta 0:04`"""
    done = row["step"] + 1
    eta_s = round(row["seconds"] / done * (iters - done))
    return (
        f"iter {done}/{iters}: loss {row['loss']:.4f}, {row['ms']:.2f} ms, {row['tokens_per_s']:,.0f} tokens/s, "
        f"mfu {mfu.format_mfu(row['mfu'])}, eta {eta_s // 60}:{eta_s % 60:02d}"
    )


def evaluate(run: Run, log: Log) -> None:
    """Mean loss over `eval_iters` windows of each split; prints and logs it."""
    config = run.config
    losses = {}
    for split, tokens in run.splits.items():
        windows = Batches(tokens, config.batch_size, config.block_size, seed=EVAL_SEED, device=run.device)
        losses[split] = mean_loss(run.model, islice(windows, config.eval_iters)).item()
    log.say(f"step {run.iteration}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    log.row("eval", step=run.iteration, train_loss=losses["train"], val_loss=losses["val"])


# ---- after the last step


def finish(run: Run, log: Log) -> None:
    """The last evaluation, the loss over the whole validation split, a checkpoint and samples."""
    config = run.config
    evaluate(run, log)
    windows = count_windows(run.splits["val"], config.block_size)
    batch_size = max(config.batch_size, 4096 // config.block_size)
    whole = whole_split(run.splits["val"], config.block_size, batch_size=batch_size, device=run.device)
    loss = mean_loss(run.model, whole).item()
    log.say(f"whole validation split: val loss {loss:.4f} over {windows} windows of {config.block_size}")
    log.row("eval", step=run.iteration, whole_val_loss=loss, windows=windows)
    log.row(
        "summary", name="speedrun", preset=config.preset, dataset=config.dataset, seed=config.seed, loss=loss,
        iterations=run.iteration, seconds=run.seconds, parameters=count_parameters(run.model), **run.facts,
    )  # fmt: skip
    path = save(run)
    log.say(f"saved {path}; more text: python -m gptfast.sample --out_dir={config.out_dir} --device={run.device}")
    if config.num_samples > 0:
        sample(run, log)


def save(run: Run) -> Path:
    """Writes out_dir/ckpt-<iteration>, in the form that gptfast.sample reads."""
    return checkpoint.save(
        run.config.out_dir,
        step=run.iteration,
        model=run.model.state_dict(),
        optimizer=run.optimizer.state_dict(),
        meta={
            "config": dataclasses.asdict(run.config),
            "model": dataclasses.asdict(run.model.config),
            "tokenizer": run.tokenizer,
        },
    )


def sample(run: Run, log: Log) -> None:
    """Prints and logs texts that the model writes from a newline on."""
    config = run.config
    try:
        tokenizer = load_tokenizer(Path(config.data_dir) / config.dataset)
        prompt = tokenizer.encode("\n")
    except UserError as error:  # no ranks for GPT-2's tokens, or no newline in the text: the run is done all the same
        log.say(f"no samples: {error}")
        return
    tokens = torch.tensor([prompt] * config.num_samples, device=run.device)
    generator = torch.Generator(run.device).manual_seed(config.seed)
    drawn = generate(run.model, tokens, config.sample_tokens, temperature=0.8, top_k=200, generator=generator)
    for ids in drawn.tolist():
        known = [i for i in ids if i < tokenizer.vocab_size]  # the rest is padding of the vocabulary
        text = tokenizer.decode(known).strip("\n")
        log.say(f"---------------\n{text}")
        log.row("sample", text=text)


if __name__ == "__main__":
    sys.exit(cli.run(main))
