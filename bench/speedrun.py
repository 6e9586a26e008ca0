"""What each ingredient of the speedrun buys, and how much sooner it reaches nanoGPT's loss.

    python -m bench speedrun                                             # cpu-sprint on the embedded text, two seeds
    python -m bench speedrun --dataset=shakespeare_char --seeds=1,2
    python -m bench speedrun --only=recipe,no-token-shift --iters=300
    python -m bench speedrun --race --seeds=11,12,13
    python -m bench speedrun --race --seeds=14,15,16 --only=cpu-sprint

Without --race: the final loss with an ingredient left out or put in, beside that of the recipe. Every variant is a run
of `python -m train.speedrun` in a process of its own: same data, same batches, same number of updates; only the flags
shown differ. Rates are those of the recipe except where the table shows others: what is left out was not tuned to be
without.

With --race: seconds of whole processes, start-up and evaluations included, of the presets cpu-sprint and cpu-plain and
of nanoGPT's CPU command as train.pretrain runs it (2000 updates of a plain fp32 GPT by AdamW). One round for each seed
runs one after another, so that all see the machine alike. Of nanoGPT's command a round runs two parts: what comes
before the first update, and the first PIECE updates; the seconds of all 2000 follow, for the rest repeats the second
part. CPU seconds, of all cores together, stand beside the seconds of the clock, which say little on a machine that
others use too.

Rows go to results/<machine>/ablation.jsonl; ablation.md beside it holds the tables of the newest row of each variant
and seed, so that a table may be made in parts.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gptfast import report
from gptfast.aside import write_whole
from gptfast.errors import UserError, nearest
from gptfast.log import Log, Row, facts

from . import results

HERE = Path(__file__).resolve().parent
TARGET = 1.898  # over the whole validation split of tinyshakespeare: nanoGPT's CPU command with its own seed, 1337
RACED = "shakespeare_char"  # the text that TARGET is a loss on
BASELINE = "baseline"  # nanoGPT's CPU command
UPDATES, PIECE = 2000, 250  # of the baseline; it evaluates after every PIECE
NANOGPT = [
    RACED, "--device=cpu", "--compile=False", "--dtype=float32", "--eval_iters=20", "--log_interval=1",
    "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", f"--lr_decay_iters={UPDATES}",
    "--dropout=0.0", f"--eval_interval={PIECE}", "--whole_val=False",
]  # fmt: skip
SHARED = "Where others used the machine as well, the CPU seconds can be compared, and the seconds cannot."
RUNNERS = (BASELINE, "cpu-sprint", "cpu-plain")
VARIANTS: dict[str, list[str]] = {
    "recipe": [],
    "no-token-shift": ["--token_shift=False"],
    "learned-positions": ["--position=learned", "--learning_rate=0.02"],
    "no-block-shift": ["--block_shift=False"],
    "qk-norm": ["--qk_norm=True"],
    "gelu": ["--activation=gelu"],
    "tied-head": ["--tied=True", "--learning_rate=0.02"],
    "adamw": ["--optimizer=adamw_by_role", "--matrix_lr=0.008"],
    "adamw-half-rate": ["--optimizer=adamw_by_role", "--matrix_lr=0.004"],
    "2-newton-schulz-steps": ["--newton_schulz_steps=2"],
    "5-newton-schulz-steps": ["--newton_schulz_steps=5"],
    "late-decay": ["--warmdown_ratio=0.4"],
}


class Took(NamedTuple):
    """Seconds of a whole process, by the clock and of CPU; both of all its threads and children."""

    wall_s: float
    cpu_s: float

    def repeated(self, before: Took, times: int) -> Took:
        """What a process takes that does `times` over what this one does beyond `before`."""
        return Took(*(b + times * (whole - b) for whole, b in zip(self, before, strict=True)))


def execute(name: str, module: str, flags: Sequence[str]) -> Took:
    """Run `python -m module` to its end. Raises UserError with the last line of what it printed if it fails."""
    command = [sys.executable, "-m", module, *flags]
    used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    wall_s, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(f"{name}: {' '.join(command[1:])} failed: {' '.join(last)}")
    return Took(wall_s, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)


def run(variant: str, seed: int, flags: Sequence[str]) -> Row:
    """The summary row of one speedrun, with its `wall_s` and `cpu_s`. Raises UserError as `execute` does."""
    with tempfile.TemporaryDirectory() as folder:
        places = [f"--seed={seed}", f"--out_dir={folder}", "--num_samples=0", "--report=False"]
        took = execute(variant, "train.speedrun", [*places, *flags, *VARIANTS.get(variant, [])])
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["what"] == "summary") | took._asdict()


def run_baseline(seed: int, flags: Sequence[str]) -> Took:
    """What nanoGPT's command would take, from its start and its first PIECE updates."""
    with tempfile.TemporaryDirectory() as folder:
        common = [*NANOGPT, *flags, f"--out_dir={folder}", f"--seed={seed}"]
        start = execute(BASELINE, "train.pretrain", [*common, "--eval_only=True"])
        piece = execute(BASELINE, "train.pretrain", [*common, f"--max_iters={PIECE}"])
    return piece.repeated(start, UPDATES // PIECE)


def table(rows: Sequence[Row]) -> str:
    """Markdown: for each variant the mean loss, and its distance to the recipe's over the seeds that both ran."""
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        losses.setdefault(row["impl"], {})[row["dims"]["seed"]] = row["loss"]
    recipe = losses.get("recipe", {})

    def line(name: str, of: dict[int, float]) -> Row:
        both = [loss - recipe[seed] for seed, loss in of.items() if seed in recipe]
        return {
            "variant": name, "flags": " ".join(VARIANTS[name]), "loss": f"{statistics.fmean(of.values()):.4f}",
            "more": f"{statistics.fmean(both):+.4f}" if both else None,
            "seeds": ", ".join(f"{seed}: {loss:.4f}" for seed, loss in of.items()),
        }  # fmt: skip

    headings = {"variant": "variant", "flags": "flags", "val loss": "loss", "against the recipe": "more"}
    return report.table([line(*item) for item in losses.items()], headings | {"each seed": "seeds"})


def race_table(rows: Sequence[Row]) -> str:
    """Markdown: what each runner took, and how often that goes into what the baseline took in the same round."""
    runs: dict[str, dict[int, Row]] = {}
    for row in rows:
        runs.setdefault(row["impl"], {})[row["dims"]["seed"]] = row
    baseline = runs.get(BASELINE, {})

    def line(name: str, of: dict[int, Row]) -> Row:
        losses = [row["loss"] for row in of.values() if row.get("loss") is not None]
        both = [(baseline[seed], row) for seed, row in of.items() if seed in baseline and name != BASELINE]

        def ratios(key: str) -> str | None:
            speedups = sorted(base[key] / row[key] for base, row in both)
            return f"{statistics.median(speedups):.1f} ({speedups[0]:.1f} to {speedups[-1]:.1f})" if speedups else None

        first = next(iter(of.values()))
        return {
            "name": name, "parameters": first.get("parameters"), "updates": first["dims"]["iters"], "n": len(of),
            "wall": f"{statistics.median(row['wall_s'] for row in of.values()):.1f}",
            "cpu": f"{statistics.median(row['cpu_s'] for row in of.values()):.1f}",
            "wall_ratio": ratios("wall_s"), "cpu_ratio": ratios("cpu_s"),
            "reached": f"{sum(loss <= TARGET for loss in losses)} of {len(losses)}" if losses else None,
            "losses": ", ".join(f"{s}: {r['loss']:.4f}" for s, r in of.items() if r.get("loss") is not None),
        }  # fmt: skip

    headings = {
        "process": "name", "parameters": "parameters", "updates": "updates", "n": "n", "seconds": "wall",
        "CPU seconds": "cpu", "times less": "wall_ratio", "times less CPU": "cpu_ratio",
        f"at most {TARGET}": "reached", "val loss of each seed": "losses",
    }  # fmt: skip
    return report.table([line(*item) for item in runs.items()], headings)


def write_page(path: Path) -> str:
    """Draw the tables of every ablation and race among the rows of a file beside it; returns their text."""
    rows = results.latest(results.read(path))
    groups: dict[tuple[str, int], list[Row]] = {}
    with results.expected(path):
        for row in rows:
            iters = row["dims"]["iters"] if row["name"].startswith("abl") else 0
            groups.setdefault((row["name"], iters), []).append(row)
    sections = []
    for (name, iters), group in groups.items():
        title = f"{name}, {iters} updates" if iters else f"{name}; medians, with lowest and highest of the rounds"
        commands = "\n".join(f"    {command}" for command in dict.fromkeys(row["command"] for row in group))
        with results.expected(path):
            drawn = table(group) if iters else f"{race_table(group)}\n\n{SHARED}"
        sections.append(f"# {title}\n\n{report.caption(group)}\n\n{commands}\n\n{drawn}\n")
    text = "\n".join(sections)
    write_whole(path.with_suffix(".md"), text)
    return text


def ablate(
    preset: str, dataset: str, names: Sequence[str], seeds: Sequence[int], flags: Sequence[str], log: Log
) -> None:
    """A row for each variant and seed; all variants of one seed before the next, so that what is stopped compares."""
    common = facts("cpu")
    for seed in seeds:
        for name in names:
            summary = run(name, seed, [preset, *flags])
            log.row(
                "summary", name=f"ablation of {preset} on {dataset}", impl=name, flags=" ".join(VARIANTS[name]),
                dims={"seed": seed, "iters": summary["iterations"]}, loss=summary["loss"],
                parameters=summary["parameters"], wall_s=summary["wall_s"], cpu_s=summary["cpu_s"], **common,
            )  # fmt: skip
            log.say(f"speedrun  {name:22s} seed {seed}: loss {summary['loss']:.4f}")


def race(seeds: Sequence[int], runners: Sequence[str], flags: Sequence[str], log: Log) -> None:
    """A round for each seed: the baseline, then each preset; a row for each. `runners` says which of them run."""
    common = facts("cpu") | {"name": f"race to a loss of {TARGET} on {RACED}"}
    for seed in seeds:
        base = None
        if BASELINE in runners:
            base = run_baseline(seed, [flag for flag in flags if flag.startswith("--data_dir")])
            log.row("summary", impl=BASELINE, dims={"seed": seed, "iters": UPDATES}, **base._asdict(), **common)
            log.say(f"speedrun  {BASELINE}: {base.wall_s:.1f} s, {base.cpu_s:.1f} s of CPU, from the first {PIECE}")
        for preset in (runner for runner in runners if runner != BASELINE):
            summary = run(preset, seed, [preset, *flags])
            took = Took(summary["wall_s"], summary["cpu_s"])
            log.row(
                "summary", impl=preset, dims={"seed": seed, "iters": summary["iterations"]}, loss=summary["loss"],
                parameters=summary["parameters"], **took._asdict(), **common,
            )  # fmt: skip
            ratio = f"; x{base.wall_s / took.wall_s:.1f}, x{base.cpu_s / took.cpu_s:.1f} of CPU" if base else ""
            loss = f"loss {summary['loss']:.4f}, {took.wall_s:.1f} s, {took.cpu_s:.1f} s of CPU"
            log.say(f"speedrun  {preset} seed {seed}: {loss}{ratio}")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench speedrun", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", default="cpu-sprint", help="of train.speedrun: the recipe to take apart")
    parser.add_argument("--dataset", help=f"text to train on (default: pystdlib, of a race {RACED})")
    parser.add_argument("--data_dir", default="data", help="folder of the data sets")
    parser.add_argument("--iters", type=int, default=0, help="updates; 0: as many as the preset")
    parser.add_argument("--seeds", default="1,2", help="with commas")
    parser.add_argument("--only", help=f"with commas, of {', '.join(VARIANTS)}; of a race {', '.join(RUNNERS)}")
    parser.add_argument("--race", action="store_true", help="seconds to nanoGPT's loss, instead of the ablation")
    parser.add_argument("--quick", action="store_true", help="20 updates of one seed, to see that every variant runs")
    parser.add_argument("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    arguments = parser.parse_args(argv)
    known: Sequence[str] = RUNNERS if arguments.race else list(VARIANTS)
    dataset = arguments.dataset or (RACED if arguments.race else "pystdlib")
    names = list(known) if arguments.only is None else [name for name in arguments.only.split(",") if name]
    seeds, iters = arguments.seeds, arguments.iters
    for name in names:
        if name not in known:
            raise UserError(f"--only={name}: no such variant{nearest(name, known)}")
    if not all(seed.isdecimal() for seed in seeds.split(",")):
        raise UserError(f"--seeds={seeds}: whole numbers, with commas")
    if not names:
        raise UserError("--only names no variant")
    if iters < 0:
        raise UserError(f"--iters={iters}: must not be below 0")
    if arguments.race and (iters or arguments.quick or arguments.preset != "cpu-sprint"):
        raise UserError("--race runs its presets as they are: leave out --iters, --quick and --preset")
    if arguments.race and dataset != RACED:
        raise UserError(f"--dataset={dataset}: the loss to reach is one on {RACED}; leave it out")
    if arguments.quick:
        seeds, iters = seeds.split(",")[0], 20
    flags = [f"--dataset={dataset}", f"--data_dir={arguments.data_dir}"]
    flags += [f"--max_iters={iters}"] if iters else []
    numbers = [int(seed) for seed in seeds.split(",")]
    with results.campaign(
        arguments.out or results.folder(facts("cpu")["hardware"]), "ablation.jsonl", compacted=False
    ) as log:
        assert log.path is not None
        try:
            if arguments.race:
                race(numbers, names, flags, log)
            else:
                ablate(arguments.preset, dataset, names, numbers, flags, log)
        finally:  # of what there is, when it is stopped
            if log.path.stat().st_size:
                log.say(f"\n{write_page(log.path)}\nspeedrun  {log.path.with_suffix('.md')}")
    return 0
