"""The speedrun: one command from text to report, its recipe, its errors and its interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

import kernels
from gptfast import checkpoint
from gptfast.cli import run
from gptfast.errors import UserError
from gptfast.log import Log
from gptfast.model import GPT
from gptfast.optim import groups_table, muon, set_learning_rate
from gptfast.parallel.team import Team
from gptfast.step import Step, language_model
from train import schedules, speedrun, trainer
from train.build import architecture_of
from train.prepare import prepare
from train.presets import SPEEDRUN

SMALL = [
    "--dataset=text", "--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """A data set named `text`: arithmetic written out, 30,000 characters."""
    root = tmp_path_factory.mktemp("data")
    source = root / "source.txt"
    source.write_text("".join(f"{i} plus {i % 7} is {i + i % 7}\n" for i in range(1700)))
    prepare("text", root, source)
    return root


def go(data_dir: Path, out_dir: Path, *flags: str) -> int:
    return run(speedrun.main, [*SMALL, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags])


def rows_of(out_dir: Path, what: str) -> list[dict]:
    return [row for row in map(json.loads, (out_dir / "metrics.jsonl").open()) if row["what"] == what]


def build(data_dir: Path, out_dir: Path, *flags: str) -> trainer.Run:
    """A run of the preset cpu, small, before its first update."""
    _, config = speedrun.configure([*SMALL, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags])
    return trainer.start(config, trainer.Recipe(line=speedrun.progress, after_last=False), Team())


def train(made: trainer.Run) -> None:
    with Log(made.config.out_dir, name="metrics.jsonl", console=False) as log:
        trainer.train(made, log)


def test_one_command_trains_samples_and_reports(data_dir, tmp_path, capsys):
    assert go(data_dir, tmp_path, "--max_iters=60", "--eval_interval=30", "--sample_tokens=40") == 0
    out = capsys.readouterr().out
    evaluations = re.findall(r"^step (\d+): train loss (\d\.\d{4}), val loss (\d\.\d{4})$", out, re.M)
    assert [int(step) for step, _, _ in evaluations] == [0, 30, 60]
    assert float(evaluations[-1][2]) < 2.0 < float(evaluations[0][2])
    assert re.search(r"^iter 60/60: loss \d\.\d{4}, [\d.]+ ms, [\d,]+ tokens/s, mfu n/a, eta \d+:\d\d$", out, re.M)
    whole = re.search(r"^whole validation split: val loss (\d\.\d{4}) over (\d+) windows of 16$", out, re.M)
    (summary,) = rows_of(tmp_path, "summary")
    assert float(whole[1]) == pytest.approx(summary["loss"], abs=5e-5)
    assert int(whole[2]) == ((data_dir / "text" / "val.bin").stat().st_size // 2 - 1) // 16
    assert [row["step"] for row in rows_of(tmp_path, "step")] == list(range(60))
    assert len(rows_of(tmp_path, "sample")) == 2 and out.count("---------------") == 2
    page = (tmp_path / "report.md").read_text()
    assert f"Loss **{whole[1]}** over the whole validation split" in page
    for figure in ("loss.png", "throughput.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG") and f"({figure})" in page


def test_the_checkpoint_holds_what_was_trained(data_dir, tmp_path):
    from gptfast.config import GPTConfig

    made = build(data_dir, tmp_path, "--max_iters=3", "--eval_interval=0")
    train(made)
    saved = checkpoint.load(tmp_path)
    again = GPT(GPTConfig(**saved.meta["model"]), made.model.ops, made.model.dtype)
    again.load_state_dict(saved.model)
    tokens = torch.arange(10)[None]
    assert torch.equal(again.logits(tokens), made.model.logits(tokens))
    optimizer = muon(again, again.config)
    optimizer.load_state_dict(saved.optimizer)
    for group, same in zip(made.optimizer.param_groups, optimizer.param_groups, strict=True):
        for p, q in zip(group["params"], same["params"], strict=True):
            assert all(torch.equal(v, optimizer.state[q][k]) for k, v in made.optimizer.state[p].items())


def test_the_same_seed_gives_the_same_run(data_dir, tmp_path):
    def losses(seed: int) -> list[float]:
        out_dir = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}"
        train(build(data_dir, out_dir, "--max_iters=5", f"--seed={seed}", "--eval_interval=0"))
        return [row["loss"] for row in rows_of(out_dir, "step")]

    assert losses(1) == losses(1) != losses(2)


def test_the_seed_changes_the_training_batches_and_never_the_evaluated_windows(data_dir, tmp_path, monkeypatch):
    evaluated = []

    def remember(model, batches, *_):
        evaluated.append(torch.cat([tokens for tokens, _ in batches]))
        return torch.tensor(0.0)

    monkeypatch.setattr(trainer, "mean_loss", remember)
    first_batches = []
    for seed in (1, 2):
        made = build(data_dir, tmp_path, f"--seed={seed}")
        trainer.evaluate(made, Log(None, console=False))
        first_batches.append(next(made.batches)[0])
    assert torch.equal(evaluated[0], evaluated[2]) and torch.equal(evaluated[1], evaluated[3])
    assert not torch.equal(*first_batches)


def test_an_update_takes_accumulation_batches_and_no_more(data_dir, tmp_path):
    made = build(data_dir, tmp_path, "--max_iters=5", "--gradient_accumulation_steps=2", "--eval_interval=2")
    untouched = build(data_dir, tmp_path, "--max_iters=5")
    train(made)
    for _ in range(5 * 2):
        next(untouched.batches)
    assert torch.equal(next(made.batches)[0], next(untouched.batches)[0])


def test_the_first_loss_is_that_of_knowing_nothing(data_dir, tmp_path):
    made = build(data_dir, tmp_path)
    tokens, targets = next(made.batches)
    assert made.model(tokens, targets).item() == pytest.approx(math.log(made.model.config.vocab_size), rel=1e-6)


def test_every_parameter_is_in_one_group_by_its_role(data_dir, tmp_path):
    made = build(data_dir, tmp_path, "--n_layer=2")
    names = {id(p): name for name, p in made.model.named_parameters()}
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in made.optimizer.param_groups}
    assert groups["embeddings"] == {"transformer.wte.weight"} and groups["head"] == {"lm_head.weight"}
    assert len(groups["matrices"]) == 8 and all(".attn." in n or ".mlp." in n for n in groups["matrices"])
    assert len(groups["scalars"]) == 5 and all("shift" in n for n in groups["scalars"])
    assert sum(map(len, groups.values())) == len(names)
    matrices = next(g for g in made.optimizer.param_groups if g["name"] == "matrices")
    assert [16, 16, 16] in matrices["rows"], "queries, keys and values are orthogonalized one by one"
    assert len(groups_table(made.optimizer).splitlines()) == 5


def test_schedule_ramps_momentum_and_falls_linearly_to_zero(data_dir, tmp_path):
    made = build(data_dir, tmp_path)
    config = dataclasses.replace(made.config, lr_decay_iters=100, warmdown_ratio=0.5, momentum_iters=50)

    def at(iteration: int) -> list[float]:
        schedules.set_schedule(made.optimizer, iteration, config)
        groups = {g["name"]: g for g in made.optimizer.param_groups}
        return [groups["matrices"]["lr"], groups["head"]["lr"], groups["matrices"]["momentum"]]

    assert at(0) == pytest.approx([0.05, 0.02, 0.8])
    assert at(25) == pytest.approx([0.05, 0.02, 0.85])
    assert at(75) == pytest.approx([0.025, 0.01, 0.9])
    assert at(99) == pytest.approx([0.001, 0.0004, 0.9])


def test_schedule_warms_up_and_lets_weight_decay_fall(data_dir, tmp_path):
    made = build(data_dir, tmp_path)
    config = dataclasses.replace(made.config, lr_decay_iters=100, warmup_iters=10, warmdown_ratio=0.4, weight_decay=0.2)
    factors = [schedules.linear(i, config) for i in (0, 4, 9, 59, 60, 80, 99)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.025])
    for iteration, decay in ((0, 0.2), (50, 0.1), (99, 0.002)):
        schedules.set_schedule(made.optimizer, iteration, config)
        groups = {g["name"]: g["weight_decay"] for g in made.optimizer.param_groups}
        assert groups == pytest.approx({"matrices": decay, "embeddings": 0, "head": 0, "scalars": 0})


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer=adamw_by_role", "--matrix_lr=0.01"], ["--position=learned", "--learning_rate=0.01"],
        ["--qk_norm=False"], ["--activation=gelu"], ["--tied=True", "--learning_rate=0.02"], ["--token_shift=False"],
        ["--block_shift=False"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_recipe_trains_without_each_of_its_ingredients(data_dir, tmp_path, flags):
    made = build(data_dir, tmp_path, "--max_iters=12", "--eval_interval=0", *flags)
    usual = build(data_dir, tmp_path, "--max_iters=12")
    assert made.model.config != usual.model.config or made.optimizer.param_groups[0]["kind"] == "adamw"
    train(made)
    losses = [row["loss"] for row in rows_of(tmp_path, "step")]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_muon_beats_adamw_at_the_same_steps(data_dir, tmp_path, seed):
    """The same model, batches and schedule, 50 steps; AdamW at the best of three rates."""

    def final_loss(make) -> float:
        made = build(data_dir, tmp_path / "out", f"--seed={seed}", "--max_iters=50")
        made.optimizer = make(made)
        losses = []
        step = Step(language_model(made.model), made.optimizer)
        for i in range(50):
            set_learning_rate(made.optimizer, 1 - i / 50)
            losses.append(step(made.batches).item())
        return sum(losses[-10:])

    def adamw(rate: float):
        def make(made: trainer.Run) -> torch.optim.Optimizer:
            return torch.optim.AdamW([{"params": list(made.model.parameters()), "lr_scale": rate}], betas=(0.9, 0.95))

        return make

    assert final_loss(lambda made: made.optimizer) < min(final_loss(adamw(rate)) for rate in (0.003, 0.01, 0.03))


def test_ctrl_c_leaves_rows_and_a_report(data_dir, tmp_path, monkeypatch, capsys):
    step = Step.__call__

    def interrupted(*args):
        if len(rows_of(tmp_path, "step")) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(Step, "__call__", interrupted)
    assert go(data_dir, tmp_path, "--max_iters=60") == 130
    assert "SIGINT at iteration 7; go on with --resume=latest" in capsys.readouterr().out
    assert len(rows_of(tmp_path, "step")) == 7
    assert "Unfinished." in (tmp_path / "report.md").read_text()
    assert (tmp_path / "ckpt-000007" / "model.safetensors").is_file()


def test_auto_is_what_suits_the_device_and_the_data(tmp_path, monkeypatch):
    def chosen(*flags: str) -> tuple[str, str, str]:
        name, config = speedrun.configure([f"--data_dir={tmp_path}", *flags])
        return name, config.device, config.dataset

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen() == ("cpu", "cpu", "pystdlib")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert chosen() == ("gpu-embedded", "cuda", "pystdlib")
    assert chosen("--device=cpu") == ("cpu", "cpu", "pystdlib")
    (tmp_path / "fineweb10B").mkdir()
    (tmp_path / "fineweb10B" / "train.bin").write_bytes(b"")
    assert chosen() == ("gpu", "cuda", "fineweb10B")
    assert chosen("--dataset=mine") == ("gpu", "cuda", "mine")


def test_missing_data_is_prepared(tmp_path, monkeypatch):
    prepared = []

    def remember(name: str, root: str) -> None:
        prepared.append((name, root))
        raise UserError("enough")

    monkeypatch.setattr(speedrun, "prepare", remember)
    with pytest.raises(UserError, match="enough"):
        speedrun.main([f"--data_dir={tmp_path}", "--device=cpu"])
    assert prepared == [("pystdlib", str(tmp_path))]


def test_flags_override_the_preset_wherever_they_stand():
    name, config = speedrun.configure(["--max_iters=9", "cpu-sprint", "--device=cpu"])
    assert (config.max_iters, config.lr_decay_iters, config.n_layer, name) == (9, 9, 1, "cpu-sprint")
    assert speedrun.configure(["--device=cpu"]) == ("cpu", SPEEDRUN["cpu"])


def test_presets_are_no_larger_than_they_say():
    sizes = {}
    for name, preset in SPEEDRUN.items():
        with torch.device("meta"):
            model = GPT(architecture_of(preset, preset.vocab_size or 65), kernels.load("reference"))
        sizes[name] = trainer.count_parameters(model)
    cpu = {"cpu": 804_352, "cpu-plain": 803_328, "cpu-sprint": 57_728}
    assert sizes == {**cpu, "gpu": 162_201_600, "gpu-embedded": 162_201_600}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["cpu-sprnt"], ["cpu-sprnt", "cpu-sprint"]),
        (["--max_iters=-1"], ["--max_iters=-1", "not be negative"]),
        (["--warmdown_ratio=1.5"], ["--warmdown_ratio=1.5"]),
        (["--momentum=1"], ["--momentum=1"]),
        (["--depth=4"], ["--depth=4", "train.pretrain"]),
        (["--weight_decay=-1"], ["--weight_decay=-1"]),
        (["--newton_schulz_steps=6"], ["--newton_schulz_steps=6", "1 to 5"]),
        (["--optimizer=adam"], ["adam", "muon"]),
        (["--matrix_rl=0.1"], ["--matrix_rl", "--matrix_lr"]),
        (["--dataset=nowhere"], ["nowhere", "--source"]),
        (["--block_size=4000"], ["block_size", "4000"]),
        (["--device=tpu"], ["tpu", "cpu"]),
        (["--cuda_graph=True"], ["--cuda_graph=True", "cpu is no CUDA GPU"]),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(data_dir, tmp_path, capsys, flags, words):
    assert go(data_dir, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert all(word in error for word in words), error


def test_an_out_dir_that_cannot_be_written_is_named(data_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert go(data_dir, tmp_path / "file") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run(data_dir, tmp_path, capsys, monkeypatch):
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *batch, **how: forward(*batch, **how) * math.nan)
    assert go(data_dir, tmp_path, "--max_iters=9", "--eval_interval=0") == 2
    assert "the loss is not a number at iteration 0" in capsys.readouterr().err


def test_a_stopped_run_goes_on_to_the_same_end(data_dir, tmp_path, monkeypatch):
    """By SIGTERM in the midst of it, with Muon's schedule of momentum under way: bit for bit."""
    step, flags = Step.__call__, ["--max_iters=20", "--eval_interval=5", "--num_samples=0"]
    assert go(data_dir, tmp_path / "whole", *flags) == 0

    def stopped(*args):
        if len(rows_of(tmp_path / "parts", "step")) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(Step, "__call__", stopped)
    assert go(data_dir, tmp_path / "parts", *flags) == 143
    monkeypatch.setattr(Step, "__call__", step)
    assert go(data_dir, tmp_path / "parts", *flags, "--resume=latest") == 0
    parts, whole = (checkpoint.load(tmp_path / name) for name in ("parts", "whole"))
    assert parts.step == whole.step == 20 and all(torch.equal(t, whole.model[name]) for name, t in parts.model.items())
    for i, state in whole.optimizer["state"].items():
        assert all(torch.equal(t, parts.optimizer["state"][i][key]) for key, t in state.items())


def test_a_checkpoint_without_the_state_of_a_run_says_what_to_do(data_dir, tmp_path, capsys):
    """As train.speedrun wrote them when it could not resume."""
    assert go(data_dir, tmp_path, "--max_iters=2", "--num_samples=0") == 0
    saved = checkpoint.load(tmp_path)
    for key in ("batches", "generators", "best_val_loss", "guard"):
        del saved.meta[key]
    checkpoint.save(tmp_path / "old", step=2, model=saved.model, optimizer=saved.optimizer, meta=saved.meta)
    capsys.readouterr()
    assert go(data_dir, tmp_path / "old", "--max_iters=4", "--resume=latest") == 2
    error = capsys.readouterr().err
    assert "ckpt-000002 holds no position in the data" in error and "--init_from=" in error


@pytest.mark.skipif(sys.platform != "linux", reason="needs gloo and torchrun")
def test_two_ranks_train(data_dir, tmp_path):
    from test_parallel import torchrun

    flags = [*SMALL, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--backend=gloo", "--max_iters=30"]
    done = torchrun(2, "-m", "train.speedrun", *flags, "--gradient_accumulation_steps=2", "--report=False")
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [row["loss"] for row in rows_of(tmp_path, "step")]
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.3
    assert len(rows_of(tmp_path, "sample")) == 2 and len(rows_of(tmp_path, "summary")) == 1
