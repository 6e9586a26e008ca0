"""The speedrun: one command from text to report, its recipe, its errors and its interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

import kernels
from gptfast.cli import UserError, run
from gptfast.log import Log
from gptfast.model import GPT
from gptfast.optim import groups_table, muon, set_learning_rate
from gptfast.step import Step, language_model
from train import speedrun
from train.prepare import prepare
from train.speedrun import PRESETS, Speedrun

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


def build(data_dir: Path, out_dir: Path, *flags: str) -> tuple[speedrun.Run, Log]:
    log = Log(out_dir, name="metrics.jsonl", console=False)
    config = speedrun.configure([*SMALL, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags])
    return speedrun.start(config, log), log


def test_one_command_trains_samples_and_reports(data_dir, tmp_path, capsys):
    assert go(data_dir, tmp_path, "--iters=60", "--eval_interval=30", "--sample_tokens=40") == 0
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
    from gptfast import checkpoint
    from gptfast.config import GPTConfig

    made, log = build(data_dir, tmp_path, "--iters=3", "--eval_interval=0")
    speedrun.train(made, log)
    speedrun.save(made)
    saved = checkpoint.load(tmp_path)
    again = GPT(GPTConfig(**saved.meta["model"]), kernels.load("reference"), made.model.dtype)
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
        made, log = build(data_dir, out_dir, "--iters=5", f"--seed={seed}", "--eval_interval=0")
        speedrun.train(made, log)
        return [row["loss"] for row in rows_of(out_dir, "step")]

    assert losses(1) == losses(1) != losses(2)


def test_the_seed_changes_the_training_batches_and_never_the_evaluated_windows(data_dir, tmp_path, monkeypatch):
    evaluated = []

    def remember(model, batches):
        evaluated.append(torch.cat([tokens for tokens, _ in batches]))
        return torch.tensor(0.0)

    monkeypatch.setattr(speedrun, "mean_loss", remember)
    first_batches = []
    for seed in (1, 2):
        made, log = build(data_dir, tmp_path, f"--seed={seed}")
        speedrun.evaluate(made, log)
        first_batches.append(next(made.batches)[0])
    assert torch.equal(evaluated[0], evaluated[2]) and torch.equal(evaluated[1], evaluated[3])
    assert not torch.equal(*first_batches)


def test_an_update_takes_accumulation_batches_and_no_more(data_dir, tmp_path):
    made, log = build(data_dir, tmp_path, "--iters=5", "--accumulation=2", "--eval_interval=2")
    untouched, _ = build(data_dir, tmp_path, "--iters=5")
    speedrun.train(made, log)
    for _ in range(5 * 2):
        next(untouched.batches)
    assert torch.equal(next(made.batches)[0], next(untouched.batches)[0])


def test_the_first_loss_is_that_of_knowing_nothing(data_dir, tmp_path):
    made, _ = build(data_dir, tmp_path)
    tokens, targets = next(made.batches)
    assert made.model(tokens, targets).item() == pytest.approx(math.log(made.model.config.vocab_size), rel=1e-6)


def test_every_parameter_is_in_one_group_by_its_role(data_dir, tmp_path):
    made, _ = build(data_dir, tmp_path, "--n_layer=2")
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
    made, _ = build(data_dir, tmp_path)
    config = dataclasses.replace(made.config, iters=100, decay=0.5, momentum_iters=50, matrix_lr=0.05, head_lr=0.02)

    def at(iteration: int) -> list[float]:
        speedrun.schedule(made.optimizer, iteration, config)
        groups = {g["name"]: g for g in made.optimizer.param_groups}
        return [groups["matrices"]["lr"], groups["head"]["lr"], groups["matrices"]["momentum"]]

    assert at(0) == pytest.approx([0.05, 0.02, 0.8])
    assert at(25) == pytest.approx([0.05, 0.02, 0.85])
    assert at(75) == pytest.approx([0.025, 0.01, 0.9])
    assert at(99) == pytest.approx([0.001, 0.0004, 0.9])


def test_schedule_warms_up_and_lets_weight_decay_fall(data_dir, tmp_path):
    made, _ = build(data_dir, tmp_path)
    config = dataclasses.replace(made.config, iters=100, warmup=0.1, decay=0.4, weight_decay=0.2)
    factors = [speedrun.rate_factor(i, config) for i in (0, 4, 9, 59, 60, 80, 99)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.025])
    for iteration, decay in ((0, 0.2), (50, 0.1), (99, 0.002)):
        speedrun.schedule(made.optimizer, iteration, config)
        groups = {g["name"]: g["weight_decay"] for g in made.optimizer.param_groups}
        assert groups == pytest.approx({"matrices": decay, "embeddings": 0, "head": 0, "scalars": 0})


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer=adamw", "--matrix_lr=0.01"], ["--position=learned", "--embedding_lr=0.01"], ["--qk_norm=False"],
        ["--activation=gelu"], ["--tied=True", "--embedding_lr=0.02"], ["--token_shift=False"],
        ["--block_shift=False"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_recipe_trains_without_each_of_its_ingredients(data_dir, tmp_path, flags):
    made, log = build(data_dir, tmp_path, "--iters=12", "--eval_interval=0", *flags)
    usual, _ = build(data_dir, tmp_path, "--iters=12")
    assert made.model.config != usual.model.config or made.optimizer.param_groups[0]["kind"] == "adamw"
    speedrun.train(made, log)
    losses = [row["loss"] for row in rows_of(tmp_path, "step")]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_muon_beats_adamw_at_the_same_steps(data_dir, tmp_path, seed):
    """The same model, batches and schedule, 50 steps; AdamW at the best of three rates."""

    def final_loss(make) -> float:
        made, _ = build(data_dir, tmp_path / "out", f"--seed={seed}", "--iters=50")
        made.optimizer = make(made)
        losses = []
        step = Step(language_model(made.model), made.optimizer)
        for i in range(50):
            set_learning_rate(made.optimizer, 1 - i / 50)
            losses.append(step(made.batches).item())
        return sum(losses[-10:])

    def adamw(rate: float):
        def make(made: speedrun.Run) -> torch.optim.Optimizer:
            return torch.optim.AdamW([{"params": list(made.model.parameters()), "lr_scale": rate}], betas=(0.9, 0.95))

        return make

    assert final_loss(lambda made: made.optimizer) < min(final_loss(adamw(rate)) for rate in (0.003, 0.01, 0.03))


def test_ctrl_c_leaves_rows_and_a_report(data_dir, tmp_path, monkeypatch, capsys):
    step = Step.__call__

    def interrupted(*args):
        if len(rows_of(tmp_path, "step")) == 7:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(Step, "__call__", interrupted)
    assert go(data_dir, tmp_path, "--iters=60") == 130
    assert "stopped after 7 of 60 updates" in capsys.readouterr().out
    assert len(rows_of(tmp_path, "step")) == 7
    assert "Unfinished." in (tmp_path / "report.md").read_text()
    assert (tmp_path / "ckpt-000007" / "model.safetensors").is_file()


def test_auto_is_what_suits_the_device_and_the_data(tmp_path, monkeypatch):
    def chosen(*flags: str) -> tuple[str, str, str]:
        config = speedrun.configure([f"--data_dir={tmp_path}", *flags])
        return config.preset, config.device, config.dataset

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
    config = speedrun.configure([f"--data_dir={tmp_path}", "--device=cpu"])
    prepared = []

    def remember(name: str, root: str) -> None:
        prepared.append((name, root))
        raise UserError("enough")

    monkeypatch.setattr(speedrun, "prepare", remember)
    with pytest.raises(UserError, match="enough"):
        speedrun.start(config, Log(None, console=False))
    assert prepared == [("pystdlib", str(tmp_path))]


def test_flags_override_the_preset_wherever_they_stand():
    config = speedrun.configure(["--iters=9", "--preset=cpu-sprint", "--device=cpu"])
    assert (config.iters, config.n_layer, config.preset) == (9, 1, "cpu-sprint")
    assert speedrun.configure(["--device=cpu"]) == dataclasses.replace(PRESETS["cpu"], device="cpu")


def test_presets_are_no_larger_than_they_say():
    sizes = {}
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = GPT(speedrun.architecture(preset, preset.vocab_size or 65), kernels.load("reference"))
        sizes[name] = speedrun.count_parameters(model)
    cpu = {"cpu": 804_352, "cpu-plain": 803_328, "cpu-sprint": 57_728}
    assert sizes == {**cpu, "gpu": 162_201_600, "gpu-embedded": 162_201_600}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--preset=cpu-sprnt"], ["--preset=cpu-sprnt", "cpu-sprint"]),
        (["--iters=0"], ["--iters=0", "above 0"]),
        (["--decay=1.5"], ["--decay=1.5"]),
        (["--momentum=1"], ["--momentum=1"]),
        (["--warmup=2"], ["--warmup=2"]),
        (["--weight_decay=-1"], ["--weight_decay=-1"]),
        (["--newton_schulz_steps=6"], ["--newton_schulz_steps=6", "1 to 5"]),
        (["--optimizer=adam"], ["adam", "muon"]),
        (["--matrix_rl=0.1"], ["--matrix_rl", "--matrix_lr"]),
        (["--dataset=nowhere"], ["nowhere", "--source"]),
        (["--block_size=4000"], ["block_size", "4000"]),
        (["--device=tpu"], ["tpu", "cpu"]),
        (["--dtype=float16"], ["float16", "bfloat16"]),
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
    monkeypatch.setattr(Step, "__call__", lambda *_: torch.tensor(math.nan))
    assert go(data_dir, tmp_path, "--iters=9", "--eval_interval=0") == 2
    assert "the loss is nan at update 0" in capsys.readouterr().err


def test_defaults_are_those_of_the_cpu_preset():
    assert dataclasses.replace(PRESETS["cpu"], preset="auto") == Speedrun()
