"""The bench of the optimizer: every variant steps, rows are valid, a wrong product is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench import compiling, optim
from bench.results import read
from bench.timing import Settings
from gptfast.config import PRESETS
from gptfast.errors import UserError
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


def fails(*_):
    raise RuntimeError("no such product here")


def test_an_implementation_that_fails_is_noted_and_the_others_are_timed(tmp_path):
    functions = {"torch": REFERENCE_PRODUCTS, "triton": dataclasses.replace(REFERENCE_PRODUCTS, gram=fails)}
    settings, common = Settings(samples=3, budget_s=0.0, warmup_s=0.0), facts(CPU)
    with Log(tmp_path, console=False) as log:
        assert not optim.run_product("gram", (1, 8, 8), torch.float32, CPU, functions, settings, log, common)
        peer = {"triton": REFERENCE_PRODUCTS, "torch": functions["triton"]}
        assert optim.run_product("gram", (1, 8, 8), torch.float32, CPU, peer, settings, log, common)
    rows = read(tmp_path / "log.jsonl")
    assert [row.get("impl") for row in rows] == [None, "torch", None, "triton"]
    assert (rows[0]["name"], rows[0]["text"]) == ("gram 1x8x8: triton", "failed: RuntimeError: no such product here")


def test_an_optimizer_that_fails_is_noted_and_the_others_step(tmp_path, monkeypatch):
    made = lambda config, device: {"ours": fails, "torch.optim.Muon": lambda: None, "AdamW fused": lambda: None}
    monkeypatch.setattr(optim, "steps", made)
    with Log(tmp_path, console=False) as log:
        assert not optim.run_steps("char-cpu", CPU, 2, log, facts(CPU))
    rows = read(tmp_path / "log.jsonl")
    assert [row.get("impl") for row in rows] == [None, "torch.optim.Muon", "AdamW fused"]


def test_what_fails_as_a_whole_is_noted_and_the_page_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "run_steps", fails)
    ran: list[int] = []
    monkeypatch.setattr(optim, "run_product", lambda product, size, *_: ran.append(size[1]) or len(ran) > 1 or fails())
    assert optim.main(["--sizes=16,64", "--device=cpu", "--no-compile", f"--out={tmp_path}"]) == 1
    assert ran == [64] * 5 + [16] * 5
    assert [row["name"] for row in read(tmp_path / "optim.jsonl")] == ["step of char-cpu", "gram 1x64x64"]


def test_the_budget_keeps_the_largest_sizes_and_names_the_others(tmp_path, monkeypatch, capsys):
    clock, ran = [0.0], []
    monkeypatch.setattr(optim.time, "monotonic", lambda: clock[0])

    def took_10_s(what):
        def run(*arguments):
            ran.append(what(*arguments))
            clock[0] += 10
            return True

        return run

    monkeypatch.setattr(optim, "run_steps", took_10_s(lambda name, *_: name))
    monkeypatch.setattr(optim, "run_product", took_10_s(lambda product, size, *_: f"{product} {size[1]}"))
    flags = ["--models=char-cpu,gpt2", "--sizes=16,64,32", "--device=cpu", "--no-compile", f"--out={tmp_path}"]
    assert optim.main([*flags, "--budget_s=65"]) == 0
    assert ran == ["char-cpu", "gpt2", "gram 64", "gram 64", "quadratic 64", "affine 64", "affine 64"]
    said = "10 not begun within 65 s: gram 1x32x32; gram 1x32x128"
    assert said in capsys.readouterr().out and said in read(tmp_path / "optim.jsonl")[0]["text"]


def test_every_size_is_compiled(tmp_path, graphs, monkeypatch):
    """Beyond its limit of shapes torch runs a function uncompiled, under the name of the compiled one."""
    monkeypatch.setattr(compiling, "LIMIT", 2)
    flags = ["--models=", "--sizes=8,16", "--device=cpu", "--compile", f"--out={tmp_path}"]
    assert optim.main([*flags, "--quick"]) == 0 and len(graphs) == 5
    assert optim.main(flags) == 0 and len(graphs) == 5 + 2 * 5


def test_an_unknown_model_is_named():
    with pytest.raises(UserError, match="gtp2"):
        optim.main(["--models=gtp2"])
