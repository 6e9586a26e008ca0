"""The ablation of the speedrun: every variant is a change of the recipe, rows and table come of what the runs say."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bench import speedrun as ablation
from gptfast.cli import UserError
from gptfast.log import check_row
from train.speedrun import PRESETS, configure


@pytest.mark.parametrize("variant", ablation.VARIANTS)
def test_a_variant_differs_from_the_recipe_in_its_flags_alone(variant):
    recipe = dataclasses.replace(PRESETS["cpu-sprint"], device="cpu")
    config = configure(["--preset=cpu-sprint", "--device=cpu", *ablation.VARIANTS[variant]])
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(recipe, f.name)}
    assert changed == {flag[2:].split("=")[0] for flag in ablation.VARIANTS[variant]}


def test_rows_and_table_tell_what_each_run_lost(tmp_path, monkeypatch, capsys):
    losses = {("recipe", 1): 1.8, ("recipe", 2): 1.9, ("gelu", 1): 1.95, ("gelu", 2): 1.85}
    monkeypatch.setattr(
        ablation, "run", lambda name, seed, flags: {"loss": losses[name, seed], "iterations": 165, "parameters": 7}
    )
    assert ablation.main(["--only=recipe,gelu", f"--out={tmp_path}"]) == 0
    rows = [check_row(json.loads(line)) for line in (tmp_path / "ablation.jsonl").read_text().splitlines()]
    assert {(row["impl"], row["dims"]["seed"]): row["loss"] for row in rows} == losses
    page = (tmp_path / "ablation.md").read_text()
    assert "| recipe |  | 1.8500 | +0.0000 | 1.8000 1.9000 |" in page
    assert "| gelu | --activation=gelu | 1.9000 | +0.0500 | 1.9500 1.8500 |" in page
    assert "| gelu |" in capsys.readouterr().out


def test_a_run_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match=r"recipe: .*train\.speedrun.* failed: error: .*nowhere"):
        ablation.run("recipe", 1, ["--dataset=nowhere", f"--data_dir={tmp_path}"])


@pytest.mark.parametrize(
    "flags, name", [(["--only=glu"], "gelu"), (["--seeds=a"], "--seeds"), (["--iters=-1"], "--iters")]
)
def test_mistakes_are_named(flags, name):
    with pytest.raises(UserError, match=name):
        ablation.main(flags)
