"""Reinforcement learning on tasks with a judge for answers: nanochat's simplified GRPO (train/policy.py).

    python -m train.rl --init_from=out-sft --task=gsm8k
    python -m train.rl --init_from=out-sft --task=addition --examples_per_step=8 --samples=16 --max_iters=60

Every update samples `samples` answers to each of `examples_per_step` questions with the engine and its tools, and
learns from their rewards. `--sigma`, `--clip` with `--passes`, and `--kl` are the usual additions. Checkpoints,
`--resume=latest`, signals and the log are those of train.pretrain. Answers depend only on seed, update, question and
ordinal, so a resumed run samples the same ones. Under torchrun (ddp) each rank samples the answers to its share of an
update's questions, and all ranks together sample the same answers as one process.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gptfast import checkpoint, cli, hf
from gptfast.chat.answers import Answers
from gptfast.engine import Engine, Sampling
from gptfast.errors import UserError
from gptfast.log import Log
from gptfast.model import GPT, IGNORED
from gptfast.optim import set_learning_rate
from gptfast.parallel import launch, leave
from gptfast.step import Batch, Objective
from gptfast.untrusted import count
from train import policy
from train.policy import Rollout
from train.schedules import rl_multiplier
from train.sft import Finetune, inherit, open_chat
from train.tasks import judged
from train.trainer import Recipe, Run, started, train

# An update includes sampling, and answers differ in length, so tokens/s and MFU of training are meaningless here.
UNKNOWN = dict.fromkeys(("tokens_per_s", "mfu", "mfu_palm", "hfu"))
MOST_SLOTS = 32  # answers at once; others wait
TOLD_EVERY_S = 10.0
Item = TypeVar("Item")


@dataclass(frozen=True)
class Rl(Finetune):
    init_from: str = "out-sft"  # the model to begin with
    out_dir: str = "out-rl"  # where checkpoints and metrics.jsonl go
    stage: str = "rl"  # what the report card calls it
    task: str = "gsm8k"  # task that rewards the answers
    examples_per_step: int = 16  # questions of an update
    samples: int = 16  # answers to each
    max_new_tokens: int = 256  # of an answer
    temperature: float = 1.0  # of answers
    top_k: int = 50  # tokens that an answer is drawn from
    lr_frac: float = 0.05  # of inherited rates
    sigma: bool = False  # divide advantages by their standard deviation
    passes: int = 1  # updates per set of sampled answers
    clip: float = 0.0  # PPO's bound on the ratio to the sampling policy; 0: none
    kl: float = 0.0  # weight of the divergence from the model of init_from
    eval_interval: int = 60  # iterations between evaluations; 0: only at the end
    eval_examples: int = 400  # questions of an evaluation
    eval_samples: int = 8  # answers to each, for pass@1 ... pass@8

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("examples_per_step", "samples", "max_new_tokens", "passes", "eval_examples", "eval_samples"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key}={getattr(self, key)}: must be at least 1")
        for key in ("clip", "kl", "lr_frac", "temperature", "top_k"):
            if not getattr(self, key) >= 0:
                raise UserError(f"--{key}={getattr(self, key)}: must not be negative")

    @property
    def groups(self) -> int:
        """Returns the number of micro-batches that the answers to one question take."""
        return -(-self.samples // self.batch_size)


def main(argv: list[str]) -> None:
    typed = cli.typed(argv, Rl)
    config = cli.parse(Rl, argv)
    ranks = launch().size
    if ranks > 1 and (config.parallel != "ddp" or config.passes > 1):
        raise UserError("under torchrun train.rl takes --parallel=ddp and --passes=1; set them, or leave torchrun out")
    if config.examples_per_step % ranks:
        raise UserError(f"--examples_per_step={config.examples_per_step}: must be a multiple of the {ranks} ranks")
    data = Questions(inherit(config, typed, config.lr_frac))
    with started(data.config, data.recipe(), typed) as (run, log):
        train(run, log)


def told(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yields the items, which are questions; prints now and then how many are answered."""
    before = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - before >= TOLD_EVERY_S:
            before = time.monotonic()
            print(f"{what}: {i} of {len(items)} questions answered", flush=True)
        yield item


class Questions:
    """The questions of an RL run: the Data of its Recipe (train/trainer.py)."""

    def __init__(self, config: Rl) -> None:
        resumed = config.resume and checkpoint.exists(config.out_dir)
        self._tokenizer, self.chat = open_chat(config.out_dir if resumed else config.init_from)
        self.vocab_size: int | None = self._tokenizer.vocab_size
        self.tokenizer = self._tokenizer.to_json()
        named = judged(config.task)
        if len(named) != 1:
            raise UserError(f"--task={config.task}: name one task")
        self.task = named[0]
        self.examples = self.task.examples("train", config.where)
        self.questions = self.task.examples("test", config.where)[: config.eval_examples]
        per_update = config.examples_per_step * config.groups
        if not config.max_iters:
            updates = round(config.epochs * config.passes * len(self.examples) / config.examples_per_step)
            config = dataclasses.replace(config, max_iters=max(1, updates))
            print(f"max_iters: {config.max_iters:,}, for {config.epochs:g} epochs of {len(self.examples):,} questions")
        self.config = dataclasses.replace(config, gradient_accumulation_steps=per_update)
        self.reward = 0.0  # mean over the answers sampled last
        self.tokens = 0  # sampled by the model in this process
        self._answers: dict[int, Answers] = {}  # by number of slots
        self._answered = False  # an evaluation

    def recipe(self) -> Recipe:
        return Recipe(
            name=self.config.stage, objective=objective_of(self.config), line=line, after_last=False, data=self,
            set_schedule=set_schedule, evaluate=self.evaluate, stage=self.config.stage,
            fields=self.fields,
        )  # fmt: skip

    def fields(self, run: Run) -> dict[str, Any]:
        rewards, tokens = zip(*run.team.gather((self.reward, self.tokens)), strict=True)
        return {"reward": sum(rewards) / len(rewards), "tokens": sum(tokens), **UNKNOWN}

    def batches(self, config: Any, model: GPT, **settings: Any) -> Drawing:
        return Drawing(self, model, torch.device(settings["device"]), settings["rank"], settings["ranks"])

    def sampling(self) -> Sampling:
        config = self.config
        return Sampling(config.max_new_tokens, config.temperature, config.top_k)

    def answers(self, model: GPT, slots: int) -> Answers:
        """Returns an engine with the current weights; made once per number of slots, then refreshed."""
        slots = min(slots, MOST_SLOTS)
        if slots in self._answers:
            self._answers[slots].engine.load_weights(model)
        else:
            engine = Engine(model, slots=slots, tokenizer=self._tokenizer, weights="model")
            self._answers[slots] = Answers(engine, self.chat)
        return self._answers[slots]

    def draw(self, model: GPT, drawing: int, rank: int = 0, ranks: int = 1) -> list[list[Rollout]]:
        """Samples the answers to this rank's questions; returns a list of rollouts for each question."""
        config, n = self.config, len(self.examples)
        answers = self.answers(model, config.samples)
        groups = []
        for i in told(range(rank, config.examples_per_step, ranks), "sampling an update"):
            epoch, position = divmod(drawing * config.examples_per_step + i, n)
            index = int(np.random.default_rng((config.seed, epoch)).permutation(n)[position])
            settings: dict[str, Any] = dict(samples=config.samples, sampling=self.sampling())
            seed = policy.seed_of(config.seed, drawing, index)
            groups.append(policy.roll_out(answers, self.task, self.examples[index], seed=seed, **settings))
        rewards = [rollout.reward for group in groups for rollout in group]
        self.reward = sum(rewards) / len(rewards)
        self.tokens += sum(sum(rollout.drawn) for group in groups for rollout in group)
        return groups

    def evaluate(self, run: Run, log: Log) -> dict[str, float]:
        """Logs pass@k of `eval_samples` answers to each question of the test split; returns the failure rates."""
        config = self.config
        answers = self.answers(run.model, config.eval_samples)
        passed = []
        if not self._answered:
            log.say(
                f"evaluating: {len(self.questions)} questions x {config.eval_samples} answers of up to "
                f"{config.max_new_tokens} tokens; fewer by --eval_examples, --eval_samples, --max_new_tokens and "
                "--eval_interval"
            )
        self._answered = True
        mine = list(enumerate(self.questions))[run.team.data_rank :: run.team.data_size]
        for i, example in told(mine, "evaluating"):
            settings: dict[str, Any] = dict(samples=config.eval_samples, sampling=self.sampling())
            seed = policy.seed_of(config.seed, -1, i)
            drawn = policy.roll_out(answers, self.task, example, seed=seed, **settings)
            passed.append([rollout.reward > 0 for rollout in drawn])
        passed = [answers for part in run.team.gather(passed) for answers in part]
        shares = {f"pass@{k}": policy.pass_at_k(passed, k) for k in range(1, config.eval_samples + 1)}
        log.say(
            f"Step {run.iteration} | " + ", ".join(f"{name.title()}: {share:.4f}" for name, share in shares.items())
        )
        log.row("eval", step=run.iteration, task=self.task.name, questions=len(passed), **shares)
        return {"train": 1 - self.reward, "val": 1 - shares["pass@1"]}  # failure rates


class Drawing:
    """An endless iterator of micro-batches, sampled from the current `model` when they are needed.

    (tokens, targets, advantages); with `clip` or more than one pass also each target's loss when it was sampled, and
    with `kl` its loss under the reference. `state_dict` holds the samples that are not used yet.
    """

    def __init__(self, questions: Questions, model: GPT, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        self.questions, self.model, self.device, self.rank, self.ranks = questions, model, device, rank, ranks
        self.drawing = 0  # the next one
        self._drawn: list[list[Tensor]] = []  # micro-batches sampled last, on the CPU
        self._left: deque[int] = deque()  # indices of those still to be used
        self._reference: GPT | None = None
        if questions.config.kl:
            self._reference = hf.load(questions.config.init_from, model.ops, dtype=model.dtype).to(device).eval()

    def __iter__(self) -> Drawing:
        return self

    def __next__(self) -> Batch:
        if not self._left:
            self._draw()
        batch = tuple(tensor.to(self.device) for tensor in self._drawn[self._left.popleft()])
        if not self._left:
            self._drawn = []
        return batch

    def _draw(self) -> None:
        config = self.questions.config
        was_training = self.model.training
        self.model.eval()
        for group in self.questions.draw(self.model, self.drawing, self.rank, self.ranks):
            batch = policy.batch_of(group, self.questions.chat.bos, sigma=config.sigma)
            for tensors in zip(*(tensor.split(config.batch_size) for tensor in batch), strict=True):
                tokens, targets = (tensor.to(self.device) for tensor in tensors[:2])
                more = []
                with torch.no_grad():
                    if config.clip or config.passes > 1:
                        more.append(policy.nll(self.model, tokens, targets).cpu())
                    if self._reference is not None:
                        more.append(policy.nll(self._reference, tokens, targets).cpu())
                self._drawn.append([*tensors, *more])
        self.model.train(was_training)
        self._left = deque(list(range(len(self._drawn))) * config.passes)
        self.drawing += 1

    def state_dict(self) -> dict[str, Any]:
        return {"drawing": self.drawing, "drawn": self._drawn, "left": list(self._left), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for a state of another task or other sizes, untrusted.STRANGE for one that is damaged."""
        for name, value in self._identity().items():
            if state[name] != value:
                raise UserError(f"the checkpoint was made with --{name}={state[name]}, not {value}; set it to that")
        self.drawing, self._drawn = count(state["drawing"]), state["drawn"]
        self._left = deque(map(count, state["left"]))
        if self._left and max(self._left) >= len(self._drawn):
            raise ValueError(f"micro-batch {max(self._left)} is still to be used, of {len(self._drawn)}")
        for tensors in self._drawn:
            self._check(*tensors)

    def _check(self, tokens: Tensor, targets: Tensor, advantages: Tensor, *more: Tensor) -> None:
        """Raises ValueError for a micro-batch that this run cannot have sampled."""
        config, vocab_size = self.questions.config, self.model.config.vocab_size
        B, T = tokens.shape
        losses = (config.clip > 0 or config.passes > 1) + (config.kl > 0)
        fits = 0 < B <= config.batch_size and 0 < T <= self.model.config.block_size
        fits &= tokens.dtype == targets.dtype == torch.int64 and targets.shape == tokens.shape
        fits &= advantages.shape == (B,) and len(more) == losses and all(each.shape == (B, T) for each in more)
        fits &= all(each.is_floating_point() and bool(each.isfinite().all()) for each in (advantages, *more))
        if not fits:
            raise ValueError("it has answers of other shapes than this run samples")
        ids = torch.cat((tokens, targets.where(targets != IGNORED, tokens)))
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(f"it has answers with tokens outside the vocabulary of {vocab_size}")

    def _identity(self) -> dict[str, Any]:
        config = self.questions.config
        names = ("task", "seed", "examples_per_step", "samples", "batch_size", "passes")
        return {name: getattr(config, name) for name in names}


def objective_of(config: Rl) -> Callable[[torch.nn.Module], Objective]:
    """Returns the policy-gradient objective over the micro-batches of Drawing."""

    def make(model: torch.nn.Module) -> Objective:
        def objective(tokens: Tensor, targets: Tensor, advantages: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
            rest = list(more)
            old = rest.pop(0) if config.clip or config.passes > 1 else None
            reference = rest.pop(0) if rest else None
            nlls = policy.nll(model, tokens, targets)
            return policy.objective(
                nlls, targets, advantages, old=old, clip=config.clip, reference=reference, kl=config.kl
            )

        return objective

    return make


def set_schedule(optimizer: torch.optim.Optimizer, iteration: int, config: Any) -> float:
    """Sets this update's learning rates, which fall linearly to 0; returns the learning rate."""
    rate = config.learning_rate * rl_multiplier(iteration, max(1, config.max_iters))
    set_learning_rate(optimizer, rate)
    return rate


def line(row: dict[str, Any], config: Any, mfu_palm: float | None) -> str:
    return f"iter {row['step']}: loss {row['loss']:.4f}, reward {row['reward']:.4f}, time {row['ms']:.0f}ms"


if __name__ == "__main__":
    leave(cli.run(main))
