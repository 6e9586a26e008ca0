"""The training loop that every command shares: data, evaluation, checkpoints, signals, log, guard and ranks.

A Recipe holds the choices that are not flags of train/config.py, such as objective, data and console line.

    with started(config, Recipe(), typed) as (run, log):
        train(run, log)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from gptfast import checkpoint, mfu, runtime, untrusted
from gptfast.aside import locked, unwritable
from gptfast.data import Batches, Tokens, count_windows, load_tokens, whole_split
from gptfast.errors import UserError
from gptfast.log import Log, Row, Tracker, facts, import_tracker
from gptfast.log.lines import evaluation_line, iteration_line, whole_split_line
from gptfast.model import GPT
from gptfast.packing import PackedBatches, document_starts
from gptfast.parallel import launch
from gptfast.parallel.team import Team, join
from gptfast.step import Batch, Objective, Step, language_model
from gptfast.step import evaluate as mean_loss
from gptfast.tokenizer import bos_of
from train.build import build_model, build_optimizer, check_compiler, choose_graph, describe_data
from train.config import Pretrain
from train.guard import Guard, Output, Refused, Stopped, Stopper, tell
from train.schedules import set_schedule

EVAL_SEED = 0  # every evaluation of every run uses the same windows, so that two losses differ by the model alone
WARM_UP = 5  # iterations before MFU is measured

Line = Callable[[Row, Pretrain, "float | None"], "str | None"]


def nanogpt_line(row: Row, config: Pretrain, mfu_palm: float | None) -> str | None:
    """Returns nanoGPT's console line for a row. Its MFU is a running average in the PaLM convention."""
    return iteration_line(row["step"], row["loss"], row["ms"], mfu_palm)


class Data(Protocol):
    """Training data other than the token files of a data set."""

    vocab_size: int | None
    tokenizer: dict[str, Any]  # described as JSON

    def batches(self, config: Any, model: GPT, *, device: str, rank: int, ranks: int) -> Any:
        """Returns an endless iterator of batches for the recipe's objective, with state_dict and load_state_dict."""


@dataclass(frozen=True)
class Recipe:
    """The choices of a command that are not flags."""

    name: str | None = None  # name of the run in its rows; None: the data set's
    objective: Callable[[torch.nn.Module], Objective] = language_model
    line: Line = nanogpt_line  # console line for a row; it returns None to print nothing
    after_last: bool = True  # make one more update after the last evaluation, as nanoGPT does
    stage: str | None = None  # the run's name in a report card: base, mid, sft or rl; None: base
    data: Data | None = None  # instead of token files
    set_schedule: Callable[[Any, int, Any], float] = set_schedule  # sets the rates; returns the first
    evaluate: Callable[[Run, Log], dict[str, float]] | None = None  # replaces the loss on train and val
    fields: Callable[[Run], dict[str, Any]] = lambda run: {}  # added to the row of an update, overriding its fields


@dataclass
class Run:
    """A training run: its fixed parts and, from `model` on, the state that checkpoints save."""

    config: Pretrain
    recipe: Recipe
    team: Team
    device: str
    splits: dict[str, Tokens]  # the tokens of train and val
    tokenizer: dict[str, Any]  # described as JSON; goes into the checkpoint, so that sampling needs no data set
    model: GPT
    called: torch.nn.Module  # the model, or what gptfast.parallel wraps it in
    optimizer: Any  # torch.optim.Optimizer, or ShardedOptimizer
    scaler: torch.amp.GradScaler | None  # for fp16
    guard: Guard
    bos: int | None  # token that begins a document, where documents are packed
    batches: Any  # Batches, PackedBatches, or those of the recipe's data
    iteration: int = 0  # the next one
    best_val_loss: float = math.inf
    position: dict[str, Any] = field(default_factory=dict)  # state of the random streams at the start of `iteration`
    position_before: dict[str, Any] = field(default_factory=dict)  # the same at the start of the iteration before
    cuda_graph: bool = False
    whole_loss: float | None = None  # final loss over the whole validation split
    seconds: float = 0.0  # spent in updates
    step: Step | None = None
    saved: int = -1  # iteration of the last checkpoint


@contextlib.contextmanager
def started(config: Pretrain, recipe: Recipe, typed: Mapping[str, str]) -> Iterator[tuple[Run, Log]]:
    """Yields a run before its first update and its log; alone or under torchrun, where only the first rank prints."""
    device = runtime.choose_device(config.device, typed="device" in typed)
    mode, degrees = config.parallel, dict(tensor=config.tensor_parallel, shard_size=config.shard_size)
    with (
        silence() if launch().rank else contextlib.nullcontext(),  # the first rank speaks for all
        join(mode, backend=config.backend, device=device, **degrees) as team,
        held(config.out_dir, team),
        open_log(config.out_dir, team) as log,
    ):
        config = without_absent_wandb(config, typed)
        import_tracker(*tracker_kind(config))  # what is missing is said before a model is made
        run = start(config, recipe, team, typed)
        model = dataclasses.asdict(run.model.config)
        named = {key: value for key, value in (("name", recipe.name), ("stage", recipe.stage)) if value}
        log.row(
            "run", **named, parameters=count_parameters(run.model), **facts(run.device),
            config=dataclasses.asdict(config), model=model, ranks=team.size,
        )  # fmt: skip
        yield run, log


def without_absent_wandb(config: Pretrain, typed: Mapping[str, str]) -> Pretrain:
    """Returns the config without a preset's wandb_log, which nobody typed, where the package is missing; says so."""
    if not config.wandb_log or "wandb_log" in typed or importlib.util.find_spec("wandb") is not None:
        return config
    print("wandb_log: no, wandb is not installed; metrics.jsonl has all that it would be sent")
    return dataclasses.replace(config, wandb_log=False)


def count_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppresses stdout in the block."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def held(out_dir: str, team: Team) -> Iterator[None]:
    """Locks out_dir for this run, on the first rank for all. Raises UserError that names another run using it."""
    with contextlib.ExitStack() as stack:
        if team.is_main:
            with unwritable(Path(out_dir)):
                stack.enter_context(locked(Path(out_dir)))
        yield


def open_log(out_dir: str, team: Team) -> Log:
    """Opens out_dir/metrics.jsonl on the first rank. Raises UserError where it cannot be written, before any work."""
    if not team.is_main:
        return Log(None, console=False)
    with unwritable(Path(out_dir)):
        return Log(out_dir, name="metrics.jsonl")


# ---- before the first step


def start(config: Pretrain, recipe: Recipe, team: Team, typed: Collection[str] = ()) -> Run:
    """Sets up a run to its first step: data, model, optimizer, resumed state. Prints its choices and the reasons."""
    torch.manual_seed(config.seed)
    device, dtype = team.device, settings_of_torch(config, team)
    folder = Path(config.data_dir) / config.dataset
    if recipe.data is None:
        vocab_size, tokenizer = describe_data(folder)
    else:
        vocab_size, tokenizer = recipe.data.vocab_size, recipe.data.tokenizer
    bos = bos_of(tokenizer) if config.documents else None
    if config.documents and bos is None:
        raise UserError(
            f"--documents=True: nothing in {folder} begins a document; prepare it with a BPE tokenizer, or leave it out"
        )
    saved = find_checkpoint(config)
    if saved is not None:
        check_same(config, saved)
    model = build_model(config, device, dtype, vocab_size, tokenizer, saved, typed)
    print(f"number of parameters: {model.num_params() / 1e6:.2f}M")
    block_size = model.config.block_size
    ids = min(vocab_size or model.config.vocab_size, model.config.vocab_size)  # larger ids of the model are padding
    names = ("train", "val") if recipe.data is None else ()
    splits = {split: load_tokens(folder / f"{split}.bin", ids, block_size) for split in names}
    if team.size > 1 and (dtype == torch.float16 or config.async_save):
        raise UserError("--dtype=float16 and --async_save=True go with one process; leave them out under torchrun")
    called, optimizer = build_optimizer(config, model, team)
    run = Run(
        config=config,
        recipe=recipe,
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
        batches=open_batches(config, recipe, model, splits.get("train"), bos, team),
        cuda_graph=choose_graph(config.cuda_graph, device, team, dtype, documents=splits == {} or bos is not None),
    )
    if saved is not None:
        restore(run, saved)
    if team.size > 1:  # each data rank has its own dropout masks; tensor ranks share them
        torch.manual_seed(hash((config.seed, run.iteration, team.data_rank)))
    return run


def settings_of_torch(config: Pretrain, team: Team) -> torch.dtype:
    """Sets torch up for the device; returns the dtype of the activations. Prints its choice and the reason."""
    print(f"running on {team}")
    team.share(config.gradient_accumulation_steps)
    tokens_per_iteration = config.gradient_accumulation_steps * config.batch_size * config.block_size
    print(f"tokens per iteration will be: {tokens_per_iteration:,}")
    if config.compile:
        check_compiler(team.device)
    dtype, why = runtime.choose_dtype(config.dtype, team.device)
    print(f"dtype: {str(dtype).removeprefix('torch.')}, {why}; the weights are float32")
    if team.device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = True  # as in nanoGPT: the remaining fp32 products use TF32
        torch.backends.cudnn.allow_tf32 = True
    return dtype


def open_batches(
    config: Pretrain, recipe: Recipe, model: GPT, tokens: Tokens | None, bos: int | None, team: Team
) -> Any:
    """Returns this rank's micro-batches: the recipe's own, or windows of `tokens`, or with `bos` packed documents."""
    settings: dict[str, Any] = dict(device=team.device, rank=team.data_rank, ranks=team.data_size)
    if recipe.data is not None:
        return recipe.data.batches(config, model, **settings)
    assert tokens is not None
    if bos is None:
        return Batches(tokens, config.batch_size, model.config.block_size, seed=config.seed, **settings)
    return PackedBatches(tokens, config.batch_size, model.config.block_size, bos=bos, **settings)


def find_checkpoint(config: Pretrain) -> checkpoint.Checkpoint | None:
    """Returns the checkpoint that `--resume` or `--init_from=resume` asks for; None to start anew."""
    if config.resume == "latest" and not checkpoint.exists(config.out_dir):
        print(f"--resume=latest: no checkpoint in {config.out_dir} yet")
        return None
    if config.resume.isdecimal():
        return checkpoint.load(config.out_dir, step=int(config.resume))
    if config.resume or config.init_from == "resume":
        return checkpoint.load(config.out_dir, best=config.resume == "best")
    return None


def check_same(config: Pretrain, saved: checkpoint.Checkpoint) -> None:
    """Raises UserError where `saved` is a checkpoint of an incompatible run."""
    if "batches" not in saved.meta:
        raise UserError(
            f"{saved.path} holds no position in the data, so no run goes on from it; train anew in another --out_dir, "
            f"from its weights if you like: --init_from={saved.path.parent}"
        )
    with untrusted.expected(f"the state in {saved.path}", "train anew in another --out_dir"):
        config_then = dict(saved.meta["config"])
    for name, before in (("optimizer", "adamw"), ("documents", False)):  # name, and value in runs from before the flag
        saved_value = config_then.get(name, before)
        if saved_value != getattr(config, name):
            raise UserError(f"--{name}={getattr(config, name)}: {saved.path} was trained with --{name}={saved_value}")


# ---- saving and resuming


def described(run: Run) -> dict[str, Any]:
    """Returns a checkpoint's metadata: the run's state, besides model and optimizer, at the start of `iteration`."""
    return {
        "config": dataclasses.asdict(run.config),
        "model": dataclasses.asdict(run.model.config),
        "tokenizer": run.tokenizer,
        "best_val_loss": run.best_val_loss,
        "scaler": run.scaler.state_dict() if run.scaler is not None else None,
        "guard": run.guard.state_dict(),
        **run.position,
    }


def save_run(run: Run, saver: checkpoint.Saver, score: float | None = None) -> None:
    """Writes the checkpoint out_dir/ckpt-<iteration>. `score`: its validation loss, if it was just evaluated."""
    print(f"saving checkpoint to {run.config.out_dir}")
    first = run.saved < 0  # what is there is of an earlier run
    write(run, saver, run.config.out_dir, described(run), keep=run.config.keep, score=score, first=first)
    run.saved = run.iteration


def write(run: Run, saver: checkpoint.Saver, folder: str | Path, meta: dict[str, Any], **settings: Any) -> None:
    """Writes folder/ckpt-<iteration>; every rank calls this."""
    if run.team.size == 1:
        model, optimizer = run.model.state_dict(), run.optimizer.state_dict()
        saver.save(folder, step=run.iteration, model=model, optimizer=optimizer, meta=meta, **settings)
        return
    from gptfast.parallel import saving

    saving.save_sharded(folder, run.optimizer, step=run.iteration, meta=meta, **settings)


def restore(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Restores all but the weights: optimizer, loss scale, data position, torch's generators, iteration, best loss."""
    with untrusted.expected(f"the state in {saved.path}", "train anew in another --out_dir"):
        run.optimizer.load_state_dict(saved.optimizer)  # a sharded optimizer takes its share
        run.batches.load_state_dict(saved.meta["batches"])
        if run.scaler is not None and saved.meta["scaler"]:
            run.scaler.load_state_dict(saved.meta["scaler"])
        set_generator_state(saved.meta["generators"])
        if "guard" in saved.meta:  # version 0.1 had none
            run.guard.load_state_dict(saved.meta["guard"])
        run.iteration = run.saved = saved.step
        run.best_val_loss = float(saved.meta["best_val_loss"])


def generator_state() -> dict[str, torch.Tensor]:
    """Returns the state of torch's generators, by device, as uint8 tensors for the checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generator_state(state: dict[str, Any]) -> None:
    """Restores the result of `generator_state`; ignores a CUDA state where there is no GPU."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# ---- the loop


def train(run: Run, log: Log) -> None:
    """Runs the iterations `run.iteration ... max_iters`. A signal or a refused update saves the run and raises."""
    with (
        Stopper(deferred=run.team.size > 1) as stopper,
        checkpoint.Saver(background=run.config.async_save) as saver,
        tracker(run.config) as track,
        contextlib.redirect_stdout(Output(sys.stdout, stopper)) as output,
    ):
        first = run.iteration
        try:
            try:
                iterate(run, log, stopper, saver, track)
            except Stopped:
                if run.step is not None:
                    run.step.finish()
                raise
        except Stopped as stop:
            if run.saved != run.iteration:
                save_run(run, saver)
            saver.wait()
            text = f"{stop} at iteration {run.iteration}; go on with --resume=latest"
            if run.team.is_main and output.failure is not None:
                tell(text)
            log.say(text)
            if stop.signum == signal.SIGINT:
                raise
            sys.exit(128 + stop.signum)
        except Refused as refusal:
            if first + run.guard.heard - 1 < run.iteration:  # known one update late; no update was taken since
                run.iteration, run.position = run.iteration - 1, run.position_before
            folder = Path(run.config.out_dir) / "post-mortem"
            refused = {"reason": str(refusal), "batches": refusal.batches}
            write(run, saver, folder, {**described(run), "refused": refused}, keep=1)
            saver.wait()
            raise diverged(run, str(refusal), folder / f"ckpt-{run.iteration:06d}") from None


def iterate(run: Run, log: Log, stopper: Stopper, saver: checkpoint.Saver, track: Tracker) -> None:
    """Makes one update per iteration, after an evaluation where one is due."""
    config = run.config
    first = run.iteration
    if first > config.max_iters:
        log.say(f"already at step {first} of {config.max_iters}: nothing to do; raise --max_iters")
    meter = Meter(run)
    if config.compile:
        print("compiling the model... (takes a ~minute)")
    run.step = step = Step(
        run.recipe.objective(run.called), run.optimizer, clip=config.grad_clip,
        accumulation=run.team.share(config.gradient_accumulation_steps),
        scaler=run.scaler, guard=run.guard, team=run.team,
        compiled=config.compile and run.team.size == 1, graph=run.cuda_graph, before_update=stopper.hold,
    )  # fmt: skip
    for run.iteration in range(first, config.max_iters + 1):
        run.position_before = run.position
        run.position = {"batches": run.batches.state_dict(), "generators": generator_state()}
        stopper.release(run.team.agree(stopper.signum or 0) if run.team.size > 1 else 0)
        rate = run.recipe.set_schedule(run.optimizer, run.iteration, config)
        is_last = run.iteration == config.max_iters
        if is_last or config.eval_only or (config.eval_interval and run.iteration % config.eval_interval == 0):
            meter.pause()
            step.finish()
            losses = (run.recipe.evaluate or evaluate)(run, log)
            track.log(wandb_row(run.iteration, losses, rate, meter.mfu_palm))
            if config.eval_only:
                return
            is_best = losses["val"] < run.best_val_loss
            run.best_val_loss = min(losses["val"], run.best_val_loss)
            if (is_best or config.always_save_checkpoint) and run.iteration > first:
                stopper.hold()
                save_run(run, saver, score=losses["val"])
                stopper.release()
            if is_last and config.whole_val:
                run.whole_loss = evaluate_whole_split(run, log)
            if is_last and not run.recipe.after_last:
                break
            meter.resume()
        loss = step(run.batches)
        meter.iterations += 1
        due = run.iteration % config.log_interval == 0
        if due:
            step.finish()
        skipped = tell_skipped(run, log, first)
        if due and run.iteration not in skipped:
            meter.report(loss.item(), rate, log)
    step.finish()
    tell_skipped(run, log, first)
    stopper.hold()


def tell_skipped(run: Run, log: Log, first: int) -> list[int]:
    """Reports the skipped iterations that the guard knows of and that were not reported yet; returns them."""
    skipped = []
    while run.guard.news:
        ordinal, reason = run.guard.news.pop(0)
        skipped.append(first + ordinal)
        text = f"iteration {first + ordinal}: {reason}"
        log.say(text)
        log.row("note", step=first + ordinal, text=text)
    return skipped


def evaluate(run: Run, log: Log) -> dict[str, float]:
    """Returns the mean loss of `eval_iters` batches of each split; leaves weights and random streams unchanged."""
    losses = {}
    for split, tokens in run.splits.items():
        sizes = run.config.batch_size, run.model.config.block_size
        batches: Batches | PackedBatches
        if run.bos is None:
            batches = Batches(tokens, *sizes, seed=EVAL_SEED, device=run.device)
        else:
            batches = PackedBatches(tokens, *sizes, bos=run.bos, device=run.device)
        losses[split] = mean_loss(
            run.called, islice(batches, run.config.eval_iters), run.team, run.recipe.objective
        ).item()
        if isinstance(batches, PackedBatches):
            batches.close()
    log.say(evaluation_line(run.iteration, losses["train"], losses["val"]))
    log.row("eval", step=run.iteration, train_loss=losses["train"], val_loss=losses["val"])
    if not all(map(math.isfinite, losses.values())):
        raise diverged(run, "the loss is not a number")
    return losses


def evaluate_whole_split(run: Run, log: Log) -> float:
    """Returns the loss of the last checkpoint's weights over every window of the validation split."""
    tokens, block_size = run.splits["val"], run.model.config.block_size
    windows: Iterable[Batch] = whole_split(tokens, block_size, batch_size=run.config.batch_size, device=run.device)
    if run.bos is not None:
        bos = run.bos
        windows = ((x, y, document_starts(x, bos)) for x, y in windows)
    loss = mean_loss(run.called, windows, run.team, run.recipe.objective).item()
    count = count_windows(tokens, block_size)
    log.say(whole_split_line(loss, count, block_size))
    log.row("eval", step=run.iteration, whole_val_loss=loss, windows=count)
    return loss


def diverged(run: Run, reason: str, post_mortem: Path | None = None) -> UserError:
    hint = "" if post_mortem is None else f"the batch and the weights before it are in {post_mortem}; "
    return UserError(
        f"{reason} at iteration {run.iteration}; lower --learning_rate, or lengthen --warmup_iters; "
        f"{hint}checkpoints in {run.config.out_dir} are from before"
    )


class Meter:
    """Times updates (not evaluations) and reports them on the console and in the log.

    The host runs ahead of a GPU, so the clock is read only after a synchronization.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.peak = mfu.peak_of(torch.device(run.device), run.config.peak_tflops)
        self.mfu_palm: float | None = None  # running average
        self.iterations = 0  # since the last line
        self.seconds = 0.0  # time of these iterations up to the last pause
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
        """Logs a line and a row on the iterations since the last report; `loss` is that of the newest."""
        end = time.perf_counter()
        seconds = (self.seconds + end - self.started) / self.iterations
        self.total_iterations += self.iterations
        self.total_seconds += seconds * self.iterations
        self.started, self.seconds, self.iterations = end, 0.0, 0

        run, config = self.run, self.run.config
        block_size = run.model.config.block_size
        tokens_per_s = config.gradient_accumulation_steps * config.batch_size * block_size / seconds
        per_rank = tokens_per_s / run.team.size
        dtype = "fp8" if config.fp8 else run.model.dtype
        used = mfu.utilization(per_rank, run.model.config, block_size, peak=self.peak, dtype=dtype)
        if self.total_iterations > WARM_UP and used["mfu_palm"] is not None:
            fresh, average = used["mfu_palm"], self.mfu_palm
            self.mfu_palm = fresh if average is None else 0.9 * average + 0.1 * fresh
        run.seconds = self.total_seconds
        figures = {"tokens_per_s": tokens_per_s, **used, **run.recipe.fields(run)}
        row = log.row(
            "step", step=run.iteration, loss=loss, ms=1e3 * seconds, seconds=self.total_seconds, lr=rate, **figures
        )
        line = run.recipe.line(row, config, self.mfu_palm)
        if line is not None:
            log.say(line)


def tracker_kind(config: Pretrain) -> tuple[str, str]:
    """Returns what evaluations are sent to, and the flag that asked; nanoGPT's `wandb_log` means --tracker=wandb."""
    kind, flag = config.tracker, f"--tracker={config.tracker}"
    if config.wandb_log and kind == "none":
        kind, flag = "wandb", "--wandb_log=True"
    return "none" if config.eval_only or launch().rank else kind, flag


def tracker(config: Pretrain) -> Tracker:
    """Returns the tracker that evaluations are sent to."""
    kind, flag = tracker_kind(config)
    project, name = config.wandb_project, config.wandb_run_name
    return Tracker(kind, flag, config.out_dir, project, name, dataclasses.asdict(config))


def wandb_row(iteration: int, losses: dict[str, float], rate: float, mfu_palm: float | None) -> dict[str, Any]:
    """Returns a row of nanoGPT's five wandb keys."""
    percent = None if mfu_palm is None else 100 * mfu_palm
    return {"iter": iteration, "train/loss": losses["train"], "val/loss": losses["val"], "lr": rate, "mfu": percent}
