"""The speedrun: data, training, samples and plots of a GPT in one command.

    python -m train.speedrun                                             the preset for this machine, on embedded text
    python -m train.speedrun cpu-sprint --dataset=shakespeare_char
    python -m train.speedrun --max_iters=200 --seed=7 --out_dir=out-seven
    python -m train.speedrun --resume=latest                             go on after Ctrl-C or SIGTERM
    torchrun --nproc_per_node=8 -m train.speedrun gpu

Prepares the data where it is missing, trains, and leaves in out_dir: metrics.jsonl (the rows), a checkpoint that
`python -m gptfast.sample` reads, loss.png, throughput.png and report.md. The flags are those of train.pretrain, and
so are logging, resuming, guarding and stopping (train/trainer.py). Ctrl-C saves, and reports on the run so far.

The recipe: rotary positions, normalized queries and keys, RMSNorm, ReLU², no biases, an untied head that starts at
zero, token shift; Muon for the matrices, Adam for the rest, rates that fall linearly to zero. Every ingredient has a
flag that turns it off; `python -m bench speedrun` measures the effect of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path

import torch

from gptfast import cli, mfu, report, runtime
from gptfast.aside import Busy, locked
from gptfast.engine import generate
from gptfast.errors import UserError
from gptfast.log import Log, Row, facts
from gptfast.parallel import launch, leave
from gptfast.tokenizer import load_tokenizer
from train.config import Pretrain, check_rates
from train.prepare import prepare
from train.presets import GPU, SPEEDRUN
from train.trainer import Recipe, Run, count_parameters, started, train

CONSOLE_LINES = 20  # progress lines of a run


def main(argv: list[str]) -> None:
    name, config = configure(argv)
    check_rates(config)
    typed = cli.typed(argv, Pretrain) | {"device": config.device}
    if not launch().rank:
        make_data(config)
    recipe = Recipe(f"speedrun {name} on {config.dataset}", line=progress, after_last=False)
    with started(config, recipe, typed) as (run, log):
        try:
            train(run, log)
            finish(run, log, name)
        finally:
            if run.seconds and config.report and run.team.is_main:
                rows = report.read([Path(config.out_dir) / "metrics.jsonl"])
                log.say(f"report: {report.write_report(rows, config.out_dir)}")


def configure(argv: list[str]) -> tuple[str, Pretrain]:
    """Returns the preset's name (the one given, else this machine's default) and its values with the typed flags."""
    words = [word for word in argv if not word.startswith("-")]
    typed = cli.typed(argv, Pretrain)
    parsed = cli.parse(Pretrain, argv, SPEEDRUN)
    device = parsed.device if words or "device" in typed else "cuda" if torch.cuda.is_available() else "cpu"
    device = runtime.choose_device(device, typed="device" in typed)
    name = words[0] if words else "cpu"
    if not words and device.startswith("cuda"):
        name = "gpu" if (Path(parsed.data_dir) / (typed.get("dataset") or GPU.dataset) / "train.bin").is_file() else ""
        name = name or ("gpu" if "dataset" in typed else "gpu-embedded")
    config = cli.parse(Pretrain, argv if words else [name, *argv], SPEEDRUN)
    if "max_iters" in typed and "lr_decay_iters" not in typed:
        config = dataclasses.replace(config, lr_decay_iters=max(1, config.max_iters))
    if config.depth:
        raise UserError(f"--depth={config.depth}: the speedrun's presets have sizes of their own; use train.pretrain")
    return name, dataclasses.replace(config, device=device)


def make_data(config: Pretrain) -> None:
    """Prepares the data set if it is missing; if another process is preparing it, waits for that."""
    folder = Path(config.data_dir) / config.dataset
    is_there = False
    while not is_there:
        if folder.is_dir():
            with contextlib.suppress(OSError), locked(folder, wait=True):  # a read-only folder needs no lock
                pass
            is_there = (folder / "train.bin").is_file()
        if not is_there:
            with contextlib.suppress(Busy):  # another was quicker
                prepare(config.dataset, config.data_dir)
                is_there = True


def progress(row: Row, config: Pretrain, mfu_palm: float | None) -> str | None:
    """Returns `iter 50/230: loss 2.4213, 24.10 ms, 31,867 tokens/s, mfu n/a, eta 0:04`, CONSOLE_LINES times a run."""
    done, iters = row["step"] + 1, config.max_iters
    if row["step"] % math.ceil(iters / CONSOLE_LINES) and done != iters:
        return None
    eta_s = round(row["ms"] / 1e3 * (iters - done))
    return (
        f"iter {done}/{iters}: loss {row['loss']:.4f}, {row['ms']:.2f} ms, {row['tokens_per_s']:,.0f} tokens/s, "
        f"mfu {mfu.format_mfu(row['mfu'])}, eta {eta_s // 60}:{eta_s % 60:02d}"
    )


def finish(run: Run, log: Log, preset: str) -> None:
    """Logs the summary row and samples."""
    config = run.config
    if run.whole_loss is not None:
        log.row(
            "summary", name="speedrun", preset=preset, dataset=config.dataset, seed=config.seed, loss=run.whole_loss,
            iterations=run.iteration, seconds=run.seconds, parameters=count_parameters(run.model), **facts(run.device),
        )  # fmt: skip
    log.say(f"more text: python -m gptfast.sample --out_dir={config.out_dir} --device={run.device}")
    if config.num_samples > 0 and run.team.is_main:
        if run.team.mode not in ("none", "ddp"):
            log.say("no samples: the weights are split over ranks")
        else:
            sample(run, log)


def sample(run: Run, log: Log) -> None:
    """Prints and logs texts that the model writes after a newline."""
    config = run.config
    try:
        tokenizer = load_tokenizer(Path(config.data_dir) / config.dataset)
        prompt = tokenizer.encode("\n")
    except UserError as error:  # no ranks for GPT-2's tokens, or no newline in the text: samples are optional
        log.say(f"no samples: {error}")
        return
    tokens = torch.tensor([prompt] * config.num_samples, device=run.device)
    generator = torch.Generator(run.device).manual_seed(config.seed)
    drawn = generate(run.model, tokens, config.sample_tokens, temperature=0.8, top_k=200, generator=generator)
    for ids in drawn.tolist():
        in_vocabulary = [i for i in ids if i < tokenizer.vocab_size]  # ids above are padding of the vocabulary
        text = tokenizer.decode(in_vocabulary).strip("\n")
        log.say(f"---------------\n{text}")
        log.row("sample", text=text)


if __name__ == "__main__":
    leave(cli.run(main))
