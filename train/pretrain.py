"""Trains a GPT on token files, with nanoGPT's flags, defaults and log lines.

    python -m train.pretrain shakespeare_char --device=cpu --compile=False --eval_iters=20 --log_interval=1 \\
        --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 \\
        --dropout=0.0

`--init_from=resume` continues from the last checkpoint of out_dir, bit for bit on a CPU; `--resume=latest` does too,
and starts anew where there is none, so that one command starts and restarts a job. Ctrl-C, SIGTERM, SIGUSR1, SIGHUP
and a closed stdout save and exit; a second Ctrl-C exits at once.
"""

from __future__ import annotations

from gptfast import cli
from gptfast.parallel import launch, leave
from train import dial, plan
from train.build import architecture_of, vocab_size_of
from train.config import Pretrain, check_rates
from train.presets import PRESETS
from train.trainer import Recipe, started, train


def main(argv: list[str]) -> None:
    config = cli.parse(Pretrain, argv, PRESETS)
    typed = cli.typed(argv, Pretrain)
    for key in typed if not launch().rank else ():
        print(f"Overriding: {key} = {getattr(config, key)}")
    if config.depth:
        config = dial.configure(config, typed, vocab_size_of(config))
    check_rates(config)
    if config.dry_run:
        print(plan.describe(config, architecture_of(config, vocab_size_of(config))))
        return
    with started(config, Recipe(), typed) as (run, log):
        train(run, log)


if __name__ == "__main__":
    leave(cli.run(main))
