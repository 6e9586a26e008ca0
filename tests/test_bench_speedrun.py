"""The ablation of the speedrun: every variant is a change of the recipe, rows and table come of what the runs say."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bench import speedrun as ablation
from gptfast import cli
from gptfast.errors import UserError
from gptfast.log import check_row
from train.config import Pretrain
from train.presets import PRESETS
from train.speedrun import configure


@pytest.mark.parametrize("variant", ablation.VARIANTS)
def test_a_variant_differs_from_the_recipe_in_its_flags_alone(variant):
    recipe = PRESETS["cpu-sprint"]
    _, config = configure(["cpu-sprint", *ablation.VARIANTS[variant]])
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(recipe, f.name)}
    assert changed == {flag[2:].split("=")[0] for flag in ablation.VARIANTS[variant]}


def summary(loss: float, wall_s: float = 2.0, cpu_s: float = 1.0) -> dict:
    return {"loss": loss, "iterations": 165, "parameters": 7, "wall_s": wall_s, "cpu_s": cpu_s}


def rows_of(folder) -> list[dict]:
    return [check_row(json.loads(line)) for line in (folder / "ablation.jsonl").read_text().splitlines()]


def test_rows_and_table_tell_what_each_run_lost(tmp_path, monkeypatch, capsys):
    losses = {("recipe", 1): 1.8, ("gelu", 1): 1.95, ("recipe", 2): 1.9, ("gelu", 2): 1.85}
    monkeypatch.setattr(ablation, "run", lambda name, seed, flags: summary(losses[name, seed]))
    assert ablation.main(["--only=recipe,gelu", f"--out={tmp_path}"]) == 0
    rows = rows_of(tmp_path)
    assert [((row["impl"], row["dims"]["seed"]), row["loss"]) for row in rows] == list(losses.items()), "seed by seed"
    page = (tmp_path / "ablation.md").read_text()
    assert "| recipe |  | 1.8500 | +0.0000 | 1: 1.8000, 2: 1.9000 |" in page
    assert "| gelu | --activation=gelu | 1.9000 | +0.0500 | 1: 1.9500, 2: 1.8500 |" in page
    assert "| gelu |" in capsys.readouterr().out


def test_a_variant_is_compared_over_the_seeds_that_the_recipe_ran_too(tmp_path, monkeypatch):
    """And a table that is stopped halfway holds what there is."""
    losses = {("recipe", 1): 1.8, ("gelu", 1): 1.9, ("recipe", 2): 1.7}

    def run(name, seed, flags):
        if (name, seed) not in losses:
            raise KeyboardInterrupt
        return summary(losses[name, seed])

    monkeypatch.setattr(ablation, "run", run)
    with pytest.raises(KeyboardInterrupt):
        ablation.main(["--only=recipe,gelu", f"--out={tmp_path}"])
    assert "| gelu | --activation=gelu | 1.9000 | +0.1000 | 1: 1.9000 |" in (tmp_path / "ablation.md").read_text()


def test_a_race_divides_what_one_round_took(tmp_path, monkeypatch):
    """The baseline is reckoned from its start and the first PIECE of its updates: 10 s, and 8 times 5 s."""
    took = {"--eval_only=True": ablation.Took(10.0, 8.0), f"--max_iters={ablation.PIECE}": ablation.Took(15.0, 12.0)}
    monkeypatch.setattr(ablation, "execute", lambda name, module, flags: took[flags[-1]])
    losses = {("cpu-sprint", 1): 1.89, ("cpu-plain", 1): 1.9, ("cpu-sprint", 2): 1.91, ("cpu-plain", 2): 1.7}
    monkeypatch.setattr(
        ablation, "run", lambda name, seed, flags: summary(losses[name, seed], wall_s=2.5 * seed, cpu_s=4.0)
    )
    assert ablation.main(["--race", "--seeds=1,2", f"--out={tmp_path}"]) == 0
    base = next(row for row in rows_of(tmp_path) if row["impl"] == ablation.BASELINE)
    assert (base["wall_s"], base["cpu_s"], base["dims"]["iters"]) == (50.0, 40.0, 2000)
    page = (tmp_path / "ablation.md").read_text()
    assert "| cpu-sprint | 7 | 165 | 2 | 3.8 | 4.0 | 15.0 (10.0 to 20.0) | 10.0 (10.0 to 10.0) | 1 of 2 |" in page
    assert "| baseline | n/a | 2,000 | 2 | 50.0 | 40.0 | n/a | n/a | n/a |  |" in page


def test_a_race_runs_the_command_of_nanogpt(tmp_path):
    """The baseline's flags are the ones that its README gives for a CPU, and nothing that nanoGPT does not do."""
    config = cli.parse(Pretrain, [*ablation.NANOGPT, f"--max_iters={ablation.UPDATES}"], PRESETS)
    assert (config.optimizer, config.n_layer, config.n_embd, config.max_iters) == ("adamw", 4, 128, 2000)
    assert (config.batch_size, config.block_size, config.lr_decay_iters, config.dropout) == (12, 64, 2000, 0.0)
    assert (config.eval_interval, config.eval_iters, config.compile, config.whole_val) == (250, 20, False, False)


def test_a_run_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match=r"recipe: .*train\.speedrun.* failed: error: .*nowhere"):
        ablation.run("recipe", 1, ["--dataset=nowhere", f"--data_dir={tmp_path}"])


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--only=glu"], "gelu"),
        (["--seeds=a"], "--seeds"),
        (["--iters=-1"], "--iters"),
        (["--race", "--only=cpu-sprnt"], "cpu-sprint"),
        (["--race", "--iters=5"], "--race"),
        (["--race", "--dataset=pystdlib"], "--dataset=pystdlib: the loss to reach is one on shakespeare_char"),
    ],
)
def test_mistakes_are_named(flags, name):
    with pytest.raises(UserError, match=name):
        ablation.main(flags)
