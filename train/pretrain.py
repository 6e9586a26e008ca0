"""Trains a GPT on token files, with nanoGPT's flags, defaults and log lines.

    python -m train.pretrain shakespeare_char --device=cpu --compile=False --eval_iters=20 --log_interval=1 \\
        --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 \\
        --dropout=0.0

`--init_from=resume` goes on where the last checkpoint of out_dir stands, bit for bit on a CPU; `--resume=latest` does
too, and starts anew where there is none, so that one command starts and restarts a job. Ctrl-C, SIGTERM and SIGUSR1
save and leave; a second Ctrl-C leaves at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gptfast import checkpoint, cli, hf, mfu
from gptfast.cli import UserError
from gptfast.config import GPTConfig
from gptfast.data import Batches, Tokens, count_windows, load_tokens, whole_split
from gptfast.log import Log, Tracker, facts
from gptfast.model import GPT
from gptfast.optim import adamw, groups_table, muon
from gptfast.packing import PackedBatches, document_starts
from gptfast.parallel import launch
from gptfast.parallel.team import Team, join
from gptfast.step import Batch, Step, language_model, no_graph
from gptfast.step import evaluate as mean_loss
from gptfast.tokenizer import GPT2_VOCAB, bos_of, load_tokenizer, read_meta
from train import dial, loop, plan
from train.config import Pretrain
from train.guard import Guard, Refused, Stopped, Stopper
from train.presets import PRESETS

EVAL_SEED = 0  # every evaluation of every run sees the same windows, so that two figures differ by the model alone
WARM_UP = 5  # iterations before MFU is reckoned


@dataclass
class Run:
    """A training run: what it works with and, from `model` on, what must survive a stop."""

    config: Pretrain
    team: Team
    device: str
    splits: dict[str, Tokens]  # the tokens of train and val
    tokenizer: dict[str, Any]  # described as JSON; goes into the checkpoint, so that sampling needs no data set
    model: GPT
    called: torch.nn.Module  # the model, or what gptfast.parallel wraps it in
    optimizer: Any  # torch.optim.Optimizer, or ShardedOptimizer
    scaler: torch.amp.GradScaler | None  # for fp16
    guard: Guard
    bos: int | None  # what begins a document, where they are packed
    batches: Batches | PackedBatches
    iteration: int = 0  # the next one
    best_val_loss: float = math.inf
    position: dict[str, Any] = field(default_factory=dict)  # of the random streams, where `iteration` begins
    position_before: dict[str, Any] = field(default_factory=dict)  # and where the one before it began
    cuda_graph: bool = False
    step: Step | None = None
    saved: int = -1  # the iteration that the last checkpoint stands at


def main(argv: list[str]) -> None:
    config = cli.parse(Pretrain, argv, PRESETS)
    typed = cli.typed(argv, Pretrain)
    for key in typed if not launch().rank else ():
        print(f"Overriding: {key} = {getattr(config, key)}")
    if config.depth:
        config = dial.turn(config, typed, vocab_size_of(config))
    if config.dry_run:
        print(plan.describe(config, architecture_of(config, vocab_size_of(config))))
        return
    device = cli.choose_device(config.device, typed="device" in typed)
    mode, degrees = config.parallel, dict(tensor=config.tensor_parallel, shard_size=config.shard_size)
    with (
        silence() if launch().rank else contextlib.nullcontext(),  # the first rank speaks for all
        join(mode, backend=config.backend, device=device, **degrees) as team,
        open_log(config.out_dir, team) as log,
    ):
        run = start(config, team)
        model = dataclasses.asdict(run.model.config)
        log.row("run", **facts(run.device), config=dataclasses.asdict(config), model=model, ranks=team.size)
        train(run, log)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Whatever is printed goes nowhere, save for errors."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def open_log(out_dir: str, team: Team) -> Log:
    """out_dir/metrics.jsonl, of the first rank. Raises UserError where it cannot be written, before any computing."""
    if not team.is_main:
        return Log(None, console=False)
    try:
        return Log(out_dir, name="metrics.jsonl")
    except OSError as error:
        raise UserError(f"--out_dir={out_dir}: cannot write there ({error.strerror}); choose another") from None


# ---- before the first step


def start(config: Pretrain, team: Team) -> Run:
    """Everything up to the first step: data, model, optimizer, state to resume. Prints what it chose, and why."""
    torch.manual_seed(config.seed)
    device = team.device
    print(f"running on {team}")
    team.share(config.gradient_accumulation_steps)
    tokens_per_iteration = config.gradient_accumulation_steps * config.batch_size * config.block_size
    print(f"tokens per iteration will be: {tokens_per_iteration:,}")
    if config.compile:
        loop.check_compiler(device)
    dtype, why = cli.choose_dtype(config.dtype, device)
    print(f"dtype: {str(dtype).removeprefix('torch.')}, {why}; the weights are float32")
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = True  # as in nanoGPT: what is left in fp32 multiplies as TF32
        torch.backends.cudnn.allow_tf32 = True

    folder = Path(config.data_dir) / config.dataset
    vocab_size, tokenizer = describe_data(folder)
    bos = bos_of(tokenizer) if config.documents else None
    if config.documents and bos is None:
        raise UserError(
            f"--documents=True: nothing in {folder} begins a document; prepare it with a BPE tokenizer, or leave it out"
        )
    saved = find_checkpoint(config)
    if saved is not None:
        check_same(config, saved)
    model = build_model(config, device, dtype, vocab_size, tokenizer, saved)
    print(f"number of parameters: {model.num_params() / 1e6:.2f}M")
    block_size = model.config.block_size
    ids = min(vocab_size or model.config.vocab_size, model.config.vocab_size)  # the rest of the model's are padding
    splits = {split: load_tokens(folder / f"{split}.bin", ids, block_size) for split in ("train", "val")}
    if team.size > 1 and (dtype == torch.float16 or config.async_save):
        raise UserError("--dtype=float16 and --async_save=True go with one process; leave them out under torchrun")
    called, optimizer = build_optimizer(config, model, team)
    settings: dict[str, Any] = dict(device=device, rank=team.data_rank, ranks=team.data_size)
    batches: Batches | PackedBatches
    if bos is None:
        batches = Batches(splits["train"], config.batch_size, block_size, seed=config.seed, **settings)
    else:
        batches = PackedBatches(splits["train"], config.batch_size, block_size, bos=bos, **settings)
    run = Run(
        config=config,
        team=team,
        device=device,
        splits=splits,
        tokenizer=tokenizer,
        model=model,
        called=called,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(torch.device(device).type) if dtype == torch.float16 else None,
        guard=Guard(config.nonfinite, config.spike, config.max_skips),
        bos=bos,
        batches=batches,
        cuda_graph=choose_graph(config.cuda_graph, device, team, dtype, documents=bos is not None),
    )
    if saved is not None:
        restore(run, saved)
    if team.size > 1:  # each draws dropout of its own, tensor ranks the same
        torch.manual_seed(hash((config.seed, run.iteration, team.data_rank)))
    return run


def choose_graph(asked: bool | None, device: str, team: Team, dtype: torch.dtype, *, documents: bool) -> bool:
    """Whether an update is one CUDA graph; says so, and why. Raises UserError where it is asked for and cannot be."""
    obstacle = no_graph(device, ranks=team.size, dtype=dtype, documents=documents)
    if asked and obstacle:
        raise UserError(f"--cuda_graph=True: {obstacle}; leave it out")
    chosen = asked is not False and obstacle is None
    why = obstacle or ("as asked" if asked is not None else "one GPU and batches of one shape")
    print(f"cuda_graph: {'an update is one CUDA graph' if chosen else 'no'}, {why}")
    return chosen


def find_checkpoint(config: Pretrain) -> checkpoint.Checkpoint | None:
    """What `--resume` or `--init_from=resume` asks to go on from; None to start anew."""
    if config.resume == "latest" and not checkpoint.exists(config.out_dir):
        print(f"--resume=latest: no checkpoint in {config.out_dir} yet")
        return None
    if config.resume.isdecimal():
        return checkpoint.load(config.out_dir, step=int(config.resume))
    if config.resume or config.init_from == "resume":
        return checkpoint.load(config.out_dir, best=config.resume == "best")
    return None


def check_same(config: Pretrain, saved: checkpoint.Checkpoint) -> None:
    """Raises UserError where the state of `saved` means nothing to this run."""
    for name, before in (("optimizer", "adamw"), ("documents", False)):  # and what a run without the flag had
        theirs = saved.meta["config"].get(name, before)
        if theirs != getattr(config, name):
            raise UserError(f"--{name}={getattr(config, name)}: {saved.path} was trained with --{name}={theirs}")


def describe_data(folder: Path) -> tuple[int | None, dict[str, Any]]:
    """The vocabulary size and the tokenizer, as JSON, that meta.json states; without meta.json, None and GPT-2's."""
    meta = read_meta(folder)
    if meta is not None:
        print(f"found vocab_size = {meta['vocab_size']} (inside {folder / 'meta.json'})")
        return meta["vocab_size"], meta["tokenizer"]
    if (folder / "meta.pkl").exists():
        load_tokenizer(folder)  # says what to do about a pickle
    return None, {"kind": "tiktoken", "name": "gpt2"}


def vocab_size_of(config: Pretrain) -> int:
    """Of a new model: that of the data set if it is prepared, else the dial's or GPT-2's; rounded up."""
    folder = Path(config.data_dir) / config.dataset
    meta = read_meta(folder) if folder.is_dir() else None
    if meta is not None:
        return rounded(meta["vocab_size"], meta["tokenizer"], config.vocab_multiple)
    return rounded(GPT2_VOCAB if folder.is_dir() or not config.depth else dial.VOCAB, None, config.vocab_multiple)


def rounded(vocab_size: int, tokenizer: Any, multiple: int) -> int:
    """Up to a multiple: matrix products of odd sizes are slow. Characters are left alone, as nanoGPT does."""
    by_character = isinstance(tokenizer, dict) and tokenizer.get("kind") == "char"
    return vocab_size if by_character else -(-vocab_size // multiple) * multiple


def build_model(
    config: Pretrain, device: str, dtype: torch.dtype, vocab_size: int | None, tokenizer: dict[str, Any],
    saved: checkpoint.Checkpoint | None,
) -> GPT:  # fmt: skip
    """The model that `init_from` asks for, on `device`, no longer than `config.block_size`."""
    ops = cli.choose_ops(config.kernels, device)
    print(f"kernels:\n{ops}")
    if saved is not None:
        print(f"Resuming training from {saved.path}")
        architecture = GPTConfig(**saved.meta["model"])
        model = GPT(dataclasses.replace(architecture, dropout=config.dropout), ops, dtype)
        model.load_state_dict(saved.model)
    elif config.init_from == "scratch":
        print("Initializing a new model from scratch")
        tokens = vocab_size or GPT2_VOCAB
        padded = rounded(tokens, tokenizer, config.vocab_multiple)
        if vocab_size is None:
            print(f"defaulting to vocab_size of GPT-2 to {padded} (50257 rounded up for efficiency)")
        elif padded > tokens:
            print(f"vocab_size: {padded}, {tokens} rounded up for efficiency (--vocab_multiple=1 leaves it)")
        model = GPT(architecture_of(config, padded), ops, dtype)
    else:
        print(f"Initializing from pretrained weights: {config.init_from}")
        pretrained = hf.load(config.init_from, ops, dtype=dtype)
        model = GPT(dataclasses.replace(pretrained.config, dropout=config.dropout), ops, dtype)
        model.load_state_dict(pretrained.state_dict())
    if config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    elif config.block_size > model.config.block_size:
        print(f"block_size: {model.config.block_size}, the model's own, not {config.block_size}")
    return model.to(device)


def build_optimizer(config: Pretrain, model: GPT, team: Team) -> tuple[torch.nn.Module, Any]:
    """What to call, and the optimizer; both are the team's, if there is one."""
    if team.size == 1:
        return model, make_optimizer(config, model)
    from gptfast.parallel.optimizer import ShardedOptimizer
    from gptfast.parallel.split import parallelize, whole_shapes

    shapes = whole_shapes(model)
    called = parallelize(model, team, compiled=config.compile)
    return called, ShardedOptimizer(make_optimizer(config, model), model, called, shapes, model.config, team)


def make_optimizer(config: Pretrain, model: GPT) -> torch.optim.Optimizer:
    """nanoGPT's AdamW; or Muon for the matrices in the blocks at `matrix_lr`, and AdamW for the rest. Prints groups."""
    rate, betas, decay = config.learning_rate, (config.beta1, config.beta2), config.weight_decay
    if config.optimizer == "adamw":
        return adamw(model, learning_rate=rate, betas=betas, weight_decay=decay)
    optimizer = muon(
        model, model.config, matrix_lr=config.matrix_lr, embedding_lr=rate, scalar_lr=rate, betas=betas,
        head_lr=rate if config.head_lr is None else config.head_lr, weight_decay=decay, cautious=config.cautious,
        normalize=config.normalize, newton_schulz=model.ops.newton_schulz,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr_scale"] = group["lr"] / rate  # the schedule is that of `learning_rate`
    print(groups_table(optimizer))
    return optimizer


def architecture_of(config: Pretrain, vocab_size: int) -> GPTConfig:
    """The fields that the flags and GPTConfig have in common."""
    flags = dataclasses.asdict(config)
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    return GPTConfig(vocab_size=vocab_size, **{name: flags[name] for name in names & flags.keys()})


# ---- what survives a stop


def described(run: Run) -> dict[str, Any]:
    """What a checkpoint holds beside the tensors of model and optimizer: the run where `iteration` begins."""
    return {
        "config": dataclasses.asdict(run.config),
        "model": dataclasses.asdict(run.model.config),
        "tokenizer": run.tokenizer,
        "best_val_loss": run.best_val_loss,
        "scaler": run.scaler.state_dict() if run.scaler is not None else None,
        "guard": run.guard.state_dict(),
        **run.position,
    }


def save(run: Run, saver: checkpoint.Saver, score: float | None = None) -> None:
    """Writes the checkpoint out_dir/ckpt-<iteration>. `score`: its validation loss, where it was just evaluated."""
    print(f"saving checkpoint to {run.config.out_dir}")
    write(run, saver, run.config.out_dir, described(run), keep=run.config.keep, score=score)
    run.saved = run.iteration


def write(run: Run, saver: checkpoint.Saver, folder: str | Path, meta: dict[str, Any], **settings: Any) -> None:
    """Writes folder/ckpt-<iteration>; every rank calls this."""
    if run.team.size == 1:
        model, optimizer = run.model.state_dict(), run.optimizer.state_dict()
        saver.save(folder, step=run.iteration, model=model, optimizer=optimizer, meta=meta, **settings)
        return
    from gptfast.parallel import saving

    saving.save(folder, run.optimizer, step=run.iteration, meta=meta, **settings)


def restore(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Puts back all but the weights: optimizer, loss scale, data position, torch's generators, iteration, best loss."""
    run.optimizer.load_state_dict(saved.optimizer)  # a sharded one takes its part
    run.batches.load_state_dict(saved.meta["batches"])
    if run.scaler is not None and saved.meta["scaler"]:
        run.scaler.load_state_dict(saved.meta["scaler"])
    loop.set_generator_state(saved.meta["generators"])
    if "guard" in saved.meta:  # version 0.1 had none
        run.guard.load_state_dict(saved.meta["guard"])
    run.iteration = run.saved = saved.step
    run.best_val_loss = saved.meta["best_val_loss"]


# ---- the loop


def train(run: Run, log: Log) -> None:
    """Iterations `run.iteration ... max_iters`. A signal saves and raises; so does an update that may not happen."""
    with (
        Stopper(deferred=run.team.size > 1) as stopper,
        checkpoint.Saver(background=run.config.async_save) as saver,
        tracker(run.config) as track,
    ):
        first = run.iteration
        try:
            try:
                iterate(run, log, stopper, saver, track)
            except Stopped:
                if run.step is not None:
                    run.step.settle()
                raise
        except Stopped as stop:
            if run.saved != run.iteration:
                save(run, saver)
            saver.wait()
            log.say(f"{stop} at iteration {run.iteration}; go on with --resume=latest")
            if stop.signum == signal.SIGINT:
                raise
            sys.exit(128 + stop.signum)
        except Refused as refusal:
            if first + run.guard.heard - 1 < run.iteration:  # heard one update late, and no other was taken since
                run.iteration, run.position = run.iteration - 1, run.position_before
            folder = Path(run.config.out_dir) / "post-mortem"
            refused = {"reason": str(refusal), "batches": refusal.batches}
            write(run, saver, folder, {**described(run), "refused": refused}, keep=1)
            saver.wait()
            raise diverged(run, str(refusal), folder / f"ckpt-{run.iteration:06d}") from None


def iterate(run: Run, log: Log, stopper: Stopper, saver: checkpoint.Saver, track: Tracker) -> None:
    """One update for each iteration, and before it an evaluation where one is due."""
    config = run.config
    first = run.iteration
    meter = Meter(run)
    if config.compile:
        print("compiling the model... (takes a ~minute)")
    run.step = step = Step(
        language_model(run.called), run.optimizer, accumulation=run.team.share(config.gradient_accumulation_steps),
        clip=config.grad_clip, scaler=run.scaler, guard=run.guard, team=run.team,
        compiled=config.compile and run.team.size == 1, graph=run.cuda_graph, before_update=stopper.hold,
    )  # fmt: skip
    for run.iteration in range(first, config.max_iters + 1):
        run.position_before = run.position
        run.position = {"batches": run.batches.state_dict(), "generators": loop.generator_state()}
        stopper.release(run.team.agree(stopper.signum or 0) if run.team.size > 1 else 0)
        rate = dial.follow(run.optimizer, run.iteration, config)
        is_last = run.iteration == config.max_iters
        if run.iteration % config.eval_interval == 0 or is_last or config.eval_only:
            meter.pause()
            step.settle()
            losses = evaluate(run, log)
            track.log(wandb_row(run.iteration, losses, rate, meter.mfu_palm))
            if config.eval_only:
                return
            is_best = losses["val"] < run.best_val_loss
            run.best_val_loss = min(losses["val"], run.best_val_loss)
            if (is_best or config.always_save_checkpoint) and run.iteration > first:
                stopper.hold()
                save(run, saver, score=losses["val"])
                stopper.release()
            if is_last and config.whole_val:
                evaluate_whole_split(run, log)
            meter.resume()
        loss = step(run.batches)
        meter.iterations += 1
        due = run.iteration % config.log_interval == 0
        if due:
            step.settle()
        skipped = tell_skipped(run, log, first)
        if due and run.iteration not in skipped:
            meter.report(loss.item(), rate, log)
    step.settle()
    tell_skipped(run, log, first)
    stopper.hold()


def tell_skipped(run: Run, log: Log, first: int) -> list[int]:
    """Say which iterations were passed over, as far as the guard has heard of them and not told; returns them."""
    skipped = []
    while run.guard.news:
        ordinal, reason = run.guard.news.pop(0)
        skipped.append(first + ordinal)
        text = f"iteration {first + ordinal}: {reason}"
        log.say(text)
        log.row("note", step=first + ordinal, text=text)
    return skipped


def evaluate(run: Run, log: Log) -> dict[str, float]:
    """Mean loss of `eval_iters` batches of each split. Training's weights and random streams stay as they were."""
    losses = {}
    for split, tokens in run.splits.items():
        sizes = run.config.batch_size, run.model.config.block_size
        batches: Batches | PackedBatches
        if run.bos is None:
            batches = Batches(tokens, *sizes, seed=EVAL_SEED, device=run.device)
        else:
            batches = PackedBatches(tokens, *sizes, bos=run.bos, device=run.device)
        losses[split] = mean_loss(run.called, islice(batches, run.config.eval_iters), run.team).item()
        if isinstance(batches, PackedBatches):
            batches.close()
    log.say(f"step {run.iteration}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    log.row("eval", step=run.iteration, train_loss=losses["train"], val_loss=losses["val"])
    if not all(map(math.isfinite, losses.values())):
        raise diverged(run, "the loss is not a number")
    return losses


def evaluate_whole_split(run: Run, log: Log) -> float:
    """The loss over every window of the validation split, of the weights that the last checkpoint holds."""
    tokens, block_size = run.splits["val"], run.model.config.block_size
    windows: Iterable[Batch] = whole_split(tokens, block_size, batch_size=run.config.batch_size, device=run.device)
    if run.bos is not None:
        bos = run.bos
        windows = ((x, y, document_starts(x, bos)) for x, y in windows)
    loss = mean_loss(run.called, windows, run.team).item()
    count = count_windows(tokens, block_size)
    log.say(f"whole validation split: val loss {loss:.4f} over {count} windows of {block_size}")
    log.row("eval", step=run.iteration, whole_val_loss=loss, windows=count)
    return loss


def diverged(run: Run, reason: str, post_mortem: Path | None = None) -> UserError:
    kept = "" if post_mortem is None else f"the batch and the weights before it are in {post_mortem}; "
    return UserError(
        f"{reason} at iteration {run.iteration}; lower --learning_rate, or lengthen --warmup_iters; "
        f"{kept}checkpoints in {run.config.out_dir} are from before"
    )


class Meter:
    """The clock of training: times steps, not evaluations, and prints nanoGPT's line.

    The host runs ahead of a GPU, so time is read only where the device has just been waited for.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.peak = mfu.peak_of(torch.device(run.device), run.config.peak_tflops)
        self.mfu_palm: float | None = None  # running average
        self.iterations = 0  # since the last line
        self.seconds = 0.0  # of them, up to the last pause
        self.total_iterations = 0
        self.total_seconds = 0.0
        self.started = time.perf_counter()

    def pause(self) -> None:
        if self.run.device.startswith("cuda"):
            torch.cuda.synchronize(self.run.device)
        self.seconds += time.perf_counter() - self.started

    def resume(self) -> None:
        self.started = time.perf_counter()

    def report(self, loss: float, rate: float, log: Log) -> None:
        """One line and one row on the iterations since the last, whose `loss` is that of the newest."""
        now = time.perf_counter()
        seconds = (self.seconds + now - self.started) / self.iterations
        self.total_iterations += self.iterations
        self.total_seconds += seconds * self.iterations
        self.started, self.seconds, self.iterations = now, 0.0, 0

        run, config = self.run, self.run.config
        block_size = run.model.config.block_size
        tokens_per_s = config.gradient_accumulation_steps * config.batch_size * block_size / seconds
        per_rank = tokens_per_s / run.team.size
        used = mfu.utilization(per_rank, run.model.config, block_size, peak=self.peak, dtype=run.model.dtype)
        if self.total_iterations > WARM_UP and used["mfu_palm"] is not None:
            fresh, average = used["mfu_palm"], self.mfu_palm
            self.mfu_palm = fresh if average is None else 0.9 * average + 0.1 * fresh
        log.say(log_line(run.iteration, loss, 1e3 * seconds, self.mfu_palm))
        log.row(
            "step", step=run.iteration, loss=loss, ms=1e3 * seconds, seconds=self.total_seconds, lr=rate,
            tokens_per_s=tokens_per_s, **used,
        )  # fmt: skip


def log_line(iteration: int, loss: float, ms: float, mfu_palm: float | None) -> str:
    """nanoGPT's line. Its MFU is the PaLM convention, 6N + 12·L·H·Q·T FLOPs per token."""
    return f"iter {iteration}: loss {loss:.4f}, time {ms:.2f}ms, mfu {mfu.format_mfu(mfu_palm)}"


def tracker(config: Pretrain) -> Tracker:
    """The service that evaluations are sent to; nanoGPT's `wandb_log` names the same one."""
    kind, flag = config.tracker, f"--tracker={config.tracker}"
    if config.wandb_log and kind == "none":
        kind, flag = "wandb", "--wandb_log=True"
    if config.eval_only or launch().rank:
        kind = "none"
    project, name = config.wandb_project, config.wandb_run_name
    return Tracker(kind, flag, config.out_dir, project, name, dataclasses.asdict(config))


def wandb_row(iteration: int, losses: dict[str, float], rate: float, mfu_palm: float | None) -> dict[str, Any]:
    """nanoGPT's five keys."""
    percent = None if mfu_palm is None else 100 * mfu_palm
    return {"iter": iteration, "train/loss": losses["train"], "val/loss": losses["val"], "lr": rate, "mfu": percent}


if __name__ == "__main__":
    sys.exit(cli.run(main))
