"""What each ingredient of the speedrun buys: the final loss with it left out, beside that of the whole recipe.

    python -m bench speedrun                                             # cpu-sprint on the embedded text, two seeds
    python -m bench speedrun --dataset=shakespeare_char --seeds=1,2
    python -m bench speedrun --only=recipe,no-token-shift --iters=300

Every variant is a run of `python -m train.speedrun` in a process of its own: same data, same batches, same number of
updates; only the flags shown differ. Rates are those of the recipe except where the table shows others: what is left
out was not tuned to be without. Rows go to results/<machine>/ablation.jsonl; ablation.md beside it is the table of the
newest row of each variant and seed, so that a table may be made in parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gptfast import report
from gptfast.cli import UserError, nearest
from gptfast.log import Log, Row, facts

from . import results

HERE = Path(__file__).resolve().parent
VARIANTS: dict[str, list[str]] = {
    "recipe": [],
    "no-token-shift": ["--token_shift=False"],
    "learned-positions": ["--position=learned", "--embedding_lr=0.02"],
    "no-qk-norm": ["--qk_norm=False"],
    "gelu": ["--activation=gelu"],
    "tied-head": ["--tied=True", "--embedding_lr=0.02"],
    "adamw": ["--optimizer=adamw", "--matrix_lr=0.008"],
    "adamw-half-rate": ["--optimizer=adamw", "--matrix_lr=0.004"],
    "3-newton-schulz-steps": ["--newton_schulz_steps=3"],
    "5-newton-schulz-steps": ["--newton_schulz_steps=5"],
    "late-decay": ["--decay=0.4"],
}


def run(variant: str, seed: int, flags: Sequence[str]) -> Row:
    """The summary row of one run. Raises UserError with the last line of what it printed if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "train.speedrun", f"--seed={seed}", f"--out_dir={folder}", "--num_samples=0",
            "--report=False", "--eval_iters=1", *flags, *VARIANTS[variant],
        ]  # fmt: skip
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
        if done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode != 0:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise UserError(f"{variant}: {' '.join(command[1:])} failed: {' '.join(last)}")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["what"] == "summary")


def table(rows: Sequence[Row]) -> str:
    """Markdown: for each variant the mean loss over seeds and its distance to the whole recipe's."""
    by_variant: dict[str, list[Row]] = {}
    for row in rows:
        by_variant.setdefault(row["impl"], []).append(row)
    means = {name: statistics.fmean(row["loss"] for row in of) for name, of in by_variant.items()}
    base = means.get("recipe")
    lines = [
        {
            "variant": name, "flags": " ".join(VARIANTS[name]), "loss": f"{means[name]:.4f}",
            "more": None if base is None else f"{means[name] - base:+.4f}",
            "seeds": " ".join(f"{row['loss']:.4f}" for row in of),
        }
        for name, of in by_variant.items()
    ]  # fmt: skip
    headings = {"variant": "variant", "flags": "flags", "val loss": "loss", "against the recipe": "more"}
    return report.table(lines, headings | {"each seed": "seeds"})


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench speedrun", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", default="cpu-sprint", help="of train.speedrun: the recipe to take apart")
    parser.add_argument("--dataset", default="pystdlib", help="text to train on")
    parser.add_argument("--data_dir", default="data", help="folder of the data sets")
    parser.add_argument("--iters", type=int, default=0, help="updates; 0: as many as the preset")
    parser.add_argument("--seeds", default="1,2", help="with commas")
    parser.add_argument("--only", default=",".join(VARIANTS), help=f"variants, with commas: {', '.join(VARIANTS)}")
    parser.add_argument("--quick", action="store_true", help="20 updates of one seed, to see that every variant runs")
    parser.add_argument("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    arguments = parser.parse_args(argv)
    names, seeds, iters = [n for n in arguments.only.split(",") if n], arguments.seeds, arguments.iters
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--only={name}: no such variant{nearest(name, VARIANTS)}")
    if not all(seed.isdecimal() for seed in seeds.split(",")):
        raise UserError(f"--seeds={seeds}: whole numbers, with commas")
    if not names:
        raise UserError("--only names no variant")
    if iters < 0:
        raise UserError(f"--iters={iters}: must not be below 0")
    if arguments.quick:
        seeds, iters = seeds.split(",")[0], 20
    flags = [f"--preset={arguments.preset}", f"--dataset={arguments.dataset}", f"--data_dir={arguments.data_dir}"]
    flags += [f"--iters={iters}"] if iters else []
    common, about = facts("cpu"), f"ablation of {arguments.preset} on {arguments.dataset}"
    with Log(arguments.out or results.folder(common["hardware"]), name="ablation.jsonl") as log:
        assert log.path is not None
        for name in names:
            for seed in map(int, seeds.split(",")):
                summary = run(name, seed, flags)
                log.row(
                    "summary", name=about, impl=name, dims={"seed": seed, "iters": summary["iterations"]},
                    flags=" ".join(VARIANTS[name]), loss=summary["loss"], parameters=summary["parameters"], **common,
                )  # fmt: skip
                log.say(f"speedrun  {name:22s} seed {seed}: loss {summary['loss']:.4f}")
        iters = summary["iterations"]
        rows = [r for r in results.latest(results.read(log.path)) if r["name"] == about and r["dims"]["iters"] == iters]
        page = log.path.with_suffix(".md")
        text = f"# {about}, {iters} updates\n\n{report.caption(rows)}\n\n{table(rows)}\n"
        page.write_text(text, encoding="utf-8")
        log.say(f"\n{text}\nspeedrun  {page}")
    return 0
