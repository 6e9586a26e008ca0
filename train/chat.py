"""Trains an assistant from scratch, offline: tokenizer, base model, SFT, RL, evaluation and a report card.

    python -m train.chat                           # `make chat`: ten minutes on two cores
    python -m train.chat --name=Ada --sft_iters=1200

The base model reads the source of Python's standard library in byte pairs; SFT teaches it who it is, small sums with
the calculator, spelling and counting letters, from templates (train/tasks). It sees two-digit sums answered both from
memory, which it gets wrong, and with the calculator; RL teaches it which of the two to use. Everything lands in
out_dir: tokenizer, data, base, sft, rl, and report.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gptfast import cli, runtime
from gptfast.aside import LOCK, locked, unwritable
from gptfast.chat.conversation import text_of
from gptfast.errors import UserError
from gptfast.report import card
from train import evaluate, pretrain, rl, sft
from train.prepare import PrepareConfig, prepare_as, pystdlib_text
from train.tasks import Identity, Where, find
from train.tokenizer import train_bpe

MIXTURE = "identity*2,arithmetic,simplespelling*0.75,spellingbee*0.6,addition*0.4"
TASKS = "identity,arithmetic,addition,simplespelling,spellingbee"
TEXT_CHARACTERS = 1_000_000  # of the base model's text, for training the tokenizer
PER_TASK = 500  # conversations of each task, for training the tokenizer


@dataclass(frozen=True)
class ChatRun:
    out_dir: str = "out-chat"  # where everything goes
    name: str = Identity.name  # of the assistant
    maker: str = Identity.maker  # who made it
    size: str = Identity.size  # its parameters, in words
    limits: str = Identity.limits  # what it cannot do
    vocab_size: int = 512  # of the tokenizer
    n_layer: int = 3  # blocks
    n_embd: int = 128  # width
    block_size: int = 256  # tokens per sequence
    base_iters: int = 200  # updates of the base model
    sft_iters: int = 800  # of SFT
    rl_iters: int = 16  # of RL; more make other skills worse
    questions: int = 100  # of an evaluation of RL
    examples: int = 60  # of each task, to evaluate on
    answer_tokens: int = 160  # at most, in an evaluated answer
    device: str = "cuda"  # cuda, cuda:N, mps or cpu; the default becomes cpu, and says so, where there is no GPU
    seed: int = 1337  # of weights, data and answers


def main(argv: list[str]) -> None:
    config = cli.parse(ChatRun, argv)
    started = time.perf_counter()
    device = runtime.choose_device(config.device, typed="device" in cli.typed(argv, ChatRun))
    out = Path(config.out_dir)
    with unwritable(out), locked(out):
        if any(path.name != LOCK for path in out.iterdir()):
            raise UserError(f"--out_dir={out}: it holds files already; choose another, or remove it")
        for title, stage in STAGES.items():
            before = time.perf_counter()
            print(f"\n== {title}")
            stage(config, out, device)
            print(f"== {title}: {time.perf_counter() - before:.0f} s")
        path = card.write([out / stage for stage in ("base", "sft", "rl")], out)
    print(f"\n{path}: written {time.perf_counter() - started:.0f} s after the start")
    print(f"talk to it here:         python -m gptfast.chat {out / 'rl'}")
    print(f"or in a browser:         python -m gptfast.serve --out_dir={out / 'rl'}")


def make_data(config: ChatRun, out: Path, device: str) -> None:
    """Writes the base model's tokens, by a tokenizer trained on its text and on conversations."""
    code = pystdlib_text()[0][:TEXT_CHARACTERS]
    train_bpe([code, *conversations(config)], config.vocab_size).save(out / "tokenizer")
    prepare_as(PrepareConfig("pystdlib", tokenizer=str(out / "tokenizer"), data_dir=str(out / "data")))


def conversations(config: ChatRun) -> Iterator[str]:
    """Yields the text of the messages in the first conversations of each task."""
    where = Where(identity=Identity(config.name, config.maker, config.size, config.limits))
    for word in TASKS.split(","):
        for example in islice(find(word).examples("train", where), PER_TASK):
            yield from (text_of(message["content"]) for message in example.messages)


def pretrain_base(config: ChatRun, out: Path, device: str) -> None:
    iterations = config.base_iters
    pretrain.main(
        [
            f"--out_dir={out / 'base'}", "--dataset=pystdlib", f"--data_dir={out / 'data'}", f"--device={device}",
            f"--n_layer={config.n_layer}", f"--n_embd={config.n_embd}", f"--n_head={config.n_embd // 32}",
            f"--block_size={config.block_size}", "--batch_size=8", "--gradient_accumulation_steps=1",
            "--position=rope", "--norm=rmsnorm", "--activation=relu2", "--qk_norm=True", "--tied=False",
            "--optimizer=muon", "--learning_rate=3e-3", "--matrix_lr=0.02", "--weight_decay=0",
            "--schedule=trapezoid", "--min_lr=0", f"--max_iters={iterations}", f"--lr_decay_iters={iterations}",
            "--warmup_iters=0", "--warmdown_ratio=0.4", "--eval_interval=0", "--eval_iters=10", "--log_interval=20",
            "--compile=False", "--whole_val=False", f"--seed={config.seed}",
        ]
    )  # fmt: skip


def fine_tune(config: ChatRun, out: Path, device: str) -> None:
    sft.main(
        [
            f"--init_from={out / 'base'}", f"--out_dir={out / 'sft'}", f"--device={device}", f"--mixture={MIXTURE}",
            f"--max_iters={config.sft_iters}", "--init_lr_frac=1", "--eval_interval=0", "--eval_iters=5",
            "--log_interval=20", "--isolate=False", *identity(config), f"--seed={config.seed}",
        ]
    )  # fmt: skip


def practise(config: ChatRun, out: Path, device: str) -> None:
    rl.main(
        [
            f"--init_from={out / 'sft'}", f"--out_dir={out / 'rl'}", f"--device={device}", "--task=addition",
            f"--max_iters={config.rl_iters}", "--examples_per_step=16", "--samples=8", "--batch_size=8",
            "--max_new_tokens=16", "--lr_frac=0.2", "--eval_interval=8", f"--eval_examples={config.questions}",
            "--eval_samples=4", "--log_interval=1", f"--seed={config.seed}",
        ]
    )  # fmt: skip


def identity(config: ChatRun) -> list[str]:
    return [f"--{key}={getattr(config, key)}" for key in ("name", "maker", "size", "limits")]


def judge(config: ChatRun, out: Path, device: str) -> None:
    for stage in ("base", "sft", "rl"):
        evaluate.main(
            [
                f"--models={out / stage}", f"--tasks={TASKS}", f"--max_examples={config.examples}",
                f"--max_tokens={config.answer_tokens}", "--batch_size=30", f"--out_dir={out / stage}",
                f"--device={device}",
            ]
        )  # fmt: skip


Stage = Callable[[ChatRun, Path, str], None]
STAGES: dict[str, Stage] = {
    "tokenizer and data": make_data,
    "base model": pretrain_base,
    "SFT": fine_tune,
    "RL": practise,
    "evaluation": judge,
}

if __name__ == "__main__":
    sys.exit(cli.run(main))
