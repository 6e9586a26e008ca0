"""The bench of the optimizer: every variant steps, rows are valid, a wrong product is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench import optim
from bench.timing import Settings
from gptfast.cli import UserError
from gptfast.config import PRESETS
from gptfast.log import Log, check_row, facts
from kernels.newton_schulz import REFERENCE_PRODUCTS

CPU = torch.device("cpu")


def test_rows_of_steps_and_products_are_valid(tmp_path):
    assert (
        optim.main(["--models=char-cpu", "--sizes=16", "--quick", "--device=cpu", "--no-compile", f"--out={tmp_path}"])
        == 0
    )
    rows = [check_row(json.loads(line)) for line in (tmp_path / "optim.jsonl").read_text().splitlines()]
    assert {row["impl"] for row in rows if row["what"] == "optimizer"} >= {"ours", "AdamW fused"}
    assert [row["name"] for row in rows if row["what"] == "product"] == ["gram"] * 2 + ["quadratic"] + ["affine"] * 2


def test_the_matrices_are_those_of_the_blocks():
    config = PRESETS["gpt2"]
    assert len(optim.shapes(config)) == 72
    assert sum(m * n for m, n in optim.shapes(config)) == 12 * 12 * 768**2


def test_every_optimizer_moves_its_own_weights():
    made = optim.steps(PRESETS["char-cpu"], CPU)
    for step in made.values():
        weights = step.__self__.param_groups[0]["params"]
        before = [w.detach().clone() for w in weights]
        step()
        assert all(not torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_a_wrong_product_is_refused():
    wrong = dataclasses.replace(REFERENCE_PRODUCTS, gram=lambda x: 1.01 * torch.bmm(x, x.mT))
    functions = {"torch": REFERENCE_PRODUCTS, "triton": wrong}
    settings = Settings(samples=3, budget_s=0.0, warmup_s=0.0)
    common, log = facts(CPU), Log(None, console=False)
    assert not optim.run_product("gram", (1, 8, 8), torch.float32, CPU, functions, settings, log, common)
    assert optim.run_product("quadratic", (1, 8, 8), torch.float32, CPU, functions, settings, log, common)


def test_an_unknown_model_is_named():
    with pytest.raises(UserError, match="gtp2"):
        optim.main(["--models=gtp2"])
