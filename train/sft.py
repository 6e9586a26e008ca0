"""Fine-tunes a model on conversations: one run for midtraining, one for SFT.

    python -m train.sft --init_from=out --stage=mid --out_dir=out-mid --mixture=smoltalk,mmlu*3,gsm8k*4
    python -m train.sft --init_from=out-mid --mixture=jsonl:mine.jsonl*2,identity,spellingbee --eval_tasks=gsm8k

Settings that are not typed are inherited from the checkpoint in `init_from` and printed: batch, context, optimizer and
its rates, the latter times `init_lr_frac`. The loop is that of train.pretrain, with its checkpoints,
`--resume=latest`, signals, ranks and log. The rate is constant, then decays to `final_lr_frac` in the last
`warmdown_ratio` of the updates.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from gptfast import checkpoint, cli, hf, untrusted
from gptfast.chat.conversation import Chat
from gptfast.config import config_of
from gptfast.errors import UserError
from gptfast.log import Log
from gptfast.log.lines import evaluation_line
from gptfast.model import IGNORED
from gptfast.optim import set_learning_rate, set_scheduled
from gptfast.parallel import launch, leave
from gptfast.step import Batch, Objective, language_model
from gptfast.step import evaluate as mean_loss
from gptfast.tokenizer import BPETokenizer
from train import score
from train.config import Pretrain
from train.mixture import ConversationBatches, Mixture, Part, read_mixture
from train.schedules import sft_momentum, sft_multiplier
from train.tasks import Identity, Where, judged
from train.trainer import EVAL_SEED, Recipe, Run, diverged, started, train

SAMPLED = 1000  # conversations from which the tokens of an epoch are estimated
INHERITED = (
    "batch_size", "gradient_accumulation_steps", "optimizer", "learning_rate", "matrix_lr", "head_lr", "scalar_lr",
    "weight_decay", "beta1", "beta2", "grad_clip", "momentum", "cautious", "decay_by_shape", "equalize", "normalize",
    "normalize_beta2", "rules", "newton_schulz_steps",
)  # fmt: skip
RATES = ("learning_rate", "matrix_lr", "head_lr", "scalar_lr")


@dataclass(frozen=True)
class Finetune(Pretrain):
    """The flags that SFT and RL share."""

    init_from: str = "out"  # the model to begin with: a checkpoint of ours, or one whose tokenizer can chat
    compile: bool = False  # rows of whole conversations differ in shape
    eval_interval: int = 200  # iterations between evaluations; 0: only at the end
    max_iters: int = 0  # updates; 0: `epochs` of them
    whole_val: bool = False  # end with the loss over the whole validation split, each token once
    task_dir: str = ""  # folder with a folder of files for each task; empty: the Hugging Face hub
    name: str = Identity.name  # of the model, in the conversations of `identity`
    maker: str = Identity.maker  # who made it
    size: str = Identity.size  # its parameters, in words
    limits: str = Identity.limits  # what it cannot do
    epochs: float = 1.0  # of the data, unless max_iters is given

    @property
    def where(self) -> Where:
        return Where(self.task_dir, Identity(self.name, self.maker, self.size, self.limits))


@dataclass(frozen=True)
class Sft(Finetune):
    out_dir: str = "out-sft"  # where checkpoints and metrics.jsonl go
    stage: str = "sft"  # what the report card calls it: mid or sft
    mixture: str = "smoltalk,mmlu*3,gsm8k*4"  # tasks and files, NAME*REPEATS with commas between; jsonl:PATH is a file
    val_mixture: str = ""  # mixture to evaluate on; empty: the test splits of the mixture's tasks, once each
    long: Literal["split", "drop"] = "split"  # split or drop conversations longer than block_size
    isolate: bool = True  # each conversation of a row attends to itself alone; slow on a CPU
    init_lr_frac: float = 0.8  # of inherited rates
    warmup_ratio: float = 0.0  # of the updates
    warmdown_ratio: float = 0.5  # of the updates
    final_lr_frac: float = 0.0  # of the rates, at the end
    eval_iters: int = 20  # batches of each split per evaluation
    eval_tasks: str = ""  # tasks to score at evaluations
    eval_examples: int = 24  # of each
    eval_tokens: int = 256  # of an answer, at most

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("warmup_ratio", "warmdown_ratio", "init_lr_frac", "final_lr_frac"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"--{key}={getattr(self, key)}: must be 0 to 1")
        if not self.epochs > 0:
            raise UserError(f"--epochs={self.epochs}: must be above 0")
        for key in ("eval_examples", "eval_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key}={getattr(self, key)}: must be at least 1")


def main(argv: list[str]) -> None:
    typed = cli.typed(argv, Sft)
    config = inherit(cli.parse(Sft, argv), typed)
    data = Conversations(config)
    config = data.config
    with started(config, data.recipe(), typed) as (run, log):
        train(run, log)
        tell(run, log)


def _can_be(value: Any, setting: Any) -> bool:
    """Returns whether `value` is of the kind of a setting: a text, a switch, or a number, which may be left out."""
    if isinstance(setting, str | bool):
        return type(value) is type(setting)
    return value is None or type(value) in (int, float)


def inherit(config: Any, typed: dict[str, str], fraction: float | None = None) -> Any:
    """Returns `config` with the settings that the model of `init_from` was trained with, unless typed; prints them."""
    fraction = config.init_lr_frac if fraction is None else fraction
    folder = hf.find(config.init_from)
    base: dict[str, Any] = {}
    block_size = None
    if any(folder.glob("ckpt-*")):
        meta = checkpoint.load(folder).meta
        with untrusted.expected(f"what {folder} was trained with", "train the base again"):
            base, block_size = dict(meta.get("config", {})), config_of(meta.get("model")).block_size
            for key in set(INHERITED) & set(base):
                if not _can_be(base[key], getattr(config, key)):
                    raise ValueError(f"{key} is {str(base[key])[:40]!r}")
                cli.check_range(key, base[key])
    chosen: dict[str, Any] = {} if "block_size" in typed or block_size is None else {"block_size": block_size}
    for key in INHERITED:
        if key in base and key not in typed:
            scaled = key in RATES and base[key] is not None
            chosen[key] = base[key] * fraction if scaled else base[key]
    if not launch().rank:
        for key, value in chosen.items():
            times = f" ({base[key]:g} x {fraction:g})" if key in RATES and value is not None else ""
            print(f"Inherited: {key} = {value:g}{times}" if isinstance(value, float) else f"Inherited: {key} = {value}")
        for key in typed:
            before = f" (the base had {base[key]})" if key in base and key in INHERITED else ""
            print(f"Overriding: {key} = {getattr(config, key)}{before}")
    with untrusted.expected(f"what {folder} was trained with", "train the base again"):
        return dataclasses.replace(config, **chosen)


def open_chat(source: str) -> tuple[BPETokenizer, Chat]:
    """Returns a model's tokenizer and its Chat. Raises UserError if the tokenizer lacks the special tokens."""
    tokenizer = hf.load_tokenizer(source)
    chat = Chat(tokenizer)  # type: ignore[arg-type]
    assert isinstance(tokenizer, BPETokenizer)  # no other has special tokens
    return tokenizer, chat


class Conversations:
    """The conversations of an SFT run: the Data of its Recipe (train/trainer.py)."""

    def __init__(self, config: Sft) -> None:
        resumed = config.resume and checkpoint.exists(config.out_dir)
        self._tokenizer, self.chat = open_chat(config.out_dir if resumed else config.init_from)
        self.vocab_size: int | None = self._tokenizer.vocab_size
        self.tokenizer = self._tokenizer.to_json()
        self.mixture = read_mixture(config.mixture, config.where, config.seed)
        self.validation = self._validation(config)
        print(f"an epoch has {len(self.mixture):,} conversations:\n{self.mixture.describe()}")
        if not config.max_iters:
            config = dataclasses.replace(config, max_iters=self.updates(config))
        self.config = config

    def _validation(self, config: Sft) -> Mixture:
        if config.val_mixture:
            return read_mixture(config.val_mixture, config.where, EVAL_SEED, "test")
        return Mixture([Part(part.name, find_test(part.name, config.where)) for part in self.mixture.parts], EVAL_SEED)

    def updates(self, config: Sft) -> int:
        """Returns how many updates `epochs` take, estimated from the first SAMPLED conversations of an epoch."""
        order = self.mixture.order(0)[:SAMPLED]
        most = config.block_size + 1 if config.long == "drop" else sys.maxsize
        lengths = [len(self.chat.render(self.mixture.example(*map(int, entry)).messages).ids) for entry in order]
        tokens = sum(length for length in lengths if length <= most) / len(order) * len(self.mixture)
        per_update = config.gradient_accumulation_steps * config.batch_size * config.block_size
        updates = max(1, math.ceil(config.epochs * tokens / per_update))
        print(f"max_iters: {updates:,}, for {config.epochs:g} epochs of about {tokens:,.0f} tokens")
        return updates

    def recipe(self) -> Recipe:
        return Recipe(
            name=self.config.stage, objective=objective_of(self.config), after_last=False, data=self,
            set_schedule=set_schedule, evaluate=self.evaluate, stage=self.config.stage,
        )  # fmt: skip

    def batches(self, config: Any, model: Any, **settings: Any) -> ConversationBatches:
        return self._batches(self.mixture, **settings)

    def _batches(self, mixture: Mixture, **settings: Any) -> ConversationBatches:
        config = self.config
        sizes = config.batch_size, config.block_size
        return ConversationBatches(mixture, self.chat, *sizes, long=config.long, **settings)

    # ---- evaluation

    def evaluate(self, run: Run, log: Log) -> dict[str, float]:
        """Returns each split's loss; also logs the validation's bits per byte and the accuracy on `eval_tasks`."""
        losses = {}
        for split, mixture in (("train", self.mixture), ("val", self.validation)):
            batches = list(self._first(Mixture(mixture.parts, EVAL_SEED), run))
            losses[split] = mean_loss(run.called, batches, run.team, run.recipe.objective).item()
        bits = self._bits_per_byte(run, batches)
        log.say(f"{evaluation_line(run.iteration, losses['train'], losses['val'])}, bits per byte {bits:.4f}")
        losses_row = dict(train_loss=losses["train"], val_loss=losses["val"], bits_per_byte=bits)
        log.row("eval", step=run.iteration, **losses_row)
        if not all(map(math.isfinite, losses.values())):
            raise diverged(run, "the loss is not a number")
        for found_score in self._scores(run):
            log.say(
                f"step {run.iteration}: {found_score.task} {score.percent(found_score.accuracy, found_score.error)}"
            )
            log.row(
                "eval", step=run.iteration, task=found_score.task, accuracy=found_score.accuracy,
                accuracy_error=found_score.error, examples=found_score.count,
            )  # fmt: skip
        return losses

    def _first(self, mixture: Mixture, run: Run) -> Iterator[Batch]:
        batches = self._batches(mixture, device=run.device)
        yield from islice(batches, self.config.eval_iters)
        batches.close()

    def _bits_per_byte(self, run: Run, batches: list[Batch]) -> float:
        """Returns bits per byte over the targets that stand for text; special tokens do not count."""
        sizes = self._tokenizer.token_bytes().to(run.device)
        texts: list[Batch] = []
        size = count = 0
        for x, y, *rest in batches:
            bytes_of = torch.where(y == IGNORED, 0, sizes[y.clamp(min=0)])
            size, count = size + int(bytes_of.sum()), count + int((bytes_of > 0).sum())
            texts.append((x, torch.where(bytes_of > 0, y, IGNORED), *rest))
        if not size:
            return math.nan
        nats = mean_loss(run.called, texts, run.team, run.recipe.objective).item()
        return nats * count / (math.log(2) * size)

    def _scores(self, run: Run) -> Iterator[score.Score]:
        config = self.config
        if not config.eval_tasks:
            return
        if run.team.size > 1 and config.parallel != "ddp":
            raise UserError("--eval_tasks goes with one process or --parallel=ddp; judge the checkpoint afterwards")
        player = score.Ours(run.model, self.chat)
        settings = score.Settings(max_tokens=config.eval_tokens)
        for task in judged(config.eval_tasks):
            examples = task.examples("test", config.where)[: config.eval_examples]
            yield score.measure(player, task, examples, settings)


def find_test(name: str, where: Where) -> Any:
    return read_mixture(name, where, EVAL_SEED, "test").parts[0].examples


def objective_of(config: Sft) -> Callable[[torch.nn.Module], Objective]:
    """Returns the objective: next-token prediction over the assistant's messages."""
    if config.isolate:
        return language_model

    def together(model: torch.nn.Module) -> Objective:
        objective = language_model(model)
        return lambda x, y, cu_seqlens: objective(x, y)

    return together


def set_schedule(optimizer: torch.optim.Optimizer, iteration: int, config: Any) -> float:
    """Sets this update's learning rates and Muon's momentum; returns the learning rate."""
    rate = config.learning_rate * sft_multiplier(
        iteration / max(1, config.max_iters), warmup=config.warmup_ratio, warmdown=config.warmdown_ratio,
        final=config.final_lr_frac,
    )  # fmt: skip
    for group in optimizer.param_groups:
        if group.get("kind") == "muon":
            set_scheduled(group, "momentum", sft_momentum(iteration))
    set_learning_rate(optimizer, rate)
    return rate


def tell(run: Run, log: Log) -> None:
    """Prints and logs how many conversations were taken, split and dropped."""
    counts = run.batches.counts
    text = (
        f"conversations taken {counts['taken']:,}, split {counts['split']:,}, dropped as too long "
        f"{counts['dropped']:,}, without anything to learn {counts['unlearnt']:,}; targets {counts['targets']:,}"
    )
    log.say(text)
    log.row("note", text=text, **{f"conversations_{key}": value for key, value in counts.items()})
    out = Path(run.config.out_dir)
    print(f"talk to it, or judge it: python -m gptfast.chat {out}; python -m train.evaluate --models={out} --tasks=...")


if __name__ == "__main__":
    leave(cli.run(main))
