"""Fine-tuning through the one loop: what is inherited, what comes of a stop, and that a small model learns its name."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parallel import torchrun

import kernels
from gptfast import checkpoint, cli
from gptfast.config import PRESETS
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer
from train import rl, sft
from train.config import Pretrain
from train.tasks import TASKS, Where
from train.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    messages = [m["content"] for e in TASKS["identity"].examples("train", Where())[:200] for m in e.messages]
    return train_bpe([*messages, *(f"{a}+{b}={a + b}" for a in range(10) for b in range(10))], 400)


@pytest.fixture(scope="module")
def base(tokenizer: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that has learnt nothing yet."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = dict(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=48)
    config = dataclasses.replace(PRESETS["modern"], **sizes)
    model = GPT(config, kernels.load("reference"))
    trained = Pretrain(batch_size=8, gradient_accumulation_steps=1, optimizer="muon", learning_rate=4e-3)
    meta: dict[str, Any] = {
        "model": dataclasses.asdict(config), "tokenizer": tokenizer.to_json(), "config": dataclasses.asdict(trained),
    }  # fmt: skip
    checkpoint.save(folder, step=0, model=model.state_dict(), optimizer={}, meta=meta)
    return folder


def run(command: Any, out: Path, *arguments: str) -> int:
    common = ["--device=cpu", "--dtype=float32", f"--out_dir={out}", "--log_interval=1"]
    return cli.run(command.main, [*common, *arguments])


def rows(out: Path, what: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["what"] == what]


SFT = ("--mixture=identity,addition*0.5", "--isolate=False", "--eval_iters=2", "--eval_interval=6")


def test_what_is_not_typed_is_the_bases(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sft"
    arguments = (f"--init_from={base}", "--max_iters=2", "--batch_size=4", "--eval_tasks=identity", "--eval_tokens=4")
    assert run(sft, out, *SFT, *arguments, "--eval_examples=3") == 0
    said = capsys.readouterr().out
    assert "Inherited: learning_rate = 0.0032 (0.004 x 0.8)" in said and "Inherited: optimizer = muon" in said
    assert "Inherited: block_size = 64" in said and "Overriding: batch_size = 4 (the base had 8)" in said
    (first,) = rows(out, "run")
    assert (first["stage"], first["config"]["matrix_lr"]) == ("sft", 0.8 * 0.02)
    assert [row["lr"] for row in rows(out, "step")] == pytest.approx([0.0032, 0.0032])
    evals = rows(out, "eval")
    assert [row["step"] for row in evals if "val_loss" in row] == [0, 2] and evals[-1]["task"] == "identity"
    assert all(0 < row["bits_per_byte"] < 30 for row in evals if "val_loss" in row)
    assert "conversations taken" in rows(out, "note")[-1]["text"]
    assert checkpoint.load(out).step == 2


def test_an_epoch_is_the_default(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--mixture=addition", "--isolate=False", "--eval_iters=1", "--eval_interval=0", "--batch_size=2"]
    assert run(sft, tmp_path, f"--init_from={base}", *arguments) == 0
    (note,) = rows(tmp_path, "note")
    # 300 conversations, in rows of 65: the estimate leaves out what padding adds, and loaders take some ahead
    assert 0.8 * 300 <= note["conversations_taken"] <= 600 and "max_iters: " in capsys.readouterr().out


def test_a_stopped_run_goes_on_bitwise(base: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = (*SFT, f"--init_from={base}", "--max_iters=12")
    assert run(sft, whole, *arguments) == 0
    assert run(sft, parts, *arguments) == 0
    first = checkpoint.load(parts, step=6)
    for folder in parts.glob("ckpt-*12"):
        folder.rename(tmp_path / "gone")
    assert run(sft, parts, *arguments, "--resume=latest") == 0
    ours, theirs = checkpoint.load(parts), checkpoint.load(whole)
    assert ours.step == theirs.step == 12 and first.step == 6
    assert all(torch.equal(ours.model[name], theirs.model[name]) for name in theirs.model)


RL = ("--task=addition", "--examples_per_step=2", "--samples=3", "--batch_size=2", "--max_new_tokens=4",
      "--eval_interval=2", "--eval_examples=3", "--eval_samples=2")  # fmt: skip


@pytest.mark.parametrize("options", [(), ("--sigma", "--clip=0.2", "--passes=2", "--kl=0.1")])
def test_rl_goes_on_bitwise(
    base: Path, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """With fewer samples than a batch of two holds whole, and in the middle of a drawing that is learnt from twice."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = (*RL, f"--init_from={base}", *options)
    monkeypatch.setattr(rl, "TOLD_EVERY_S", 0.0)
    assert run(rl, whole, *arguments, "--max_iters=6", "--eval_interval=3") == 0
    said = capsys.readouterr().out
    assert said.count("evaluating: 3 questions x 2 answers of up to 4 tokens; fewer by --eval_examples, ") == 1
    assert said.count("evaluating: 2 of 3 questions answered\n") == 3
    assert "sampling an update: 1 of 2 questions answered\n" in said
    assert run(rl, parts, *arguments, "--max_iters=6", "--eval_interval=3") == 0
    for folder in parts.glob("ckpt-*6"):
        folder.rename(tmp_path / "gone")
    assert run(rl, parts, *arguments, "--max_iters=6", "--eval_interval=3", "--resume=latest") == 0
    ours, theirs = checkpoint.load(parts), checkpoint.load(whole)
    assert ours.step == theirs.step == 6
    assert all(torch.equal(ours.model[name], theirs.model[name]) for name in theirs.model)
    steps = rows(whole, "step")
    assert [row["step"] for row in steps] == [*range(6)] and all(0 <= row["reward"] <= 1 for row in steps)
    evals = rows(whole, "eval")
    assert [row["step"] for row in evals] == [0, 3, 6] and {"pass@1", "pass@2"} <= evals[0].keys()


def test_wrong_flags_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, flag, reason in (
        (sft, "--mixture=nothing", "unknown task"), (sft, "--warmup_ratio=2", "must be 0 to 1"),
        (rl, "--task=smoltalk", "no judge"), (rl, "--samples=0", "at least 1"),
    ):  # fmt: skip
        assert run(command, tmp_path, f"--init_from={base}", flag) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("command", "sent"), [("sft", signal.SIGKILL), ("rl", signal.SIGTERM)])
def test_a_run_that_is_ended_goes_on_bitwise(base: Path, tmp_path: Path, command: str, sent: signal.Signals) -> None:
    """kill -9 costs what came after the last checkpoint, SIGTERM nothing; both end where an undisturbed run does."""
    page, arguments = (sft, (*SFT, "--max_iters=18")) if command == "sft" else (rl, (*RL, "--max_iters=14"))
    arguments = (*arguments, f"--init_from={base}", "--device=cpu", "--dtype=float32", "--log_interval=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.run(page.main, [*arguments, f"--out_dir={whole}"]) == 0
    line = [sys.executable, "-m", f"train.{command}", *arguments, f"--out_dir={parts}"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not checkpoint.exists(parts):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sent)
    assert process.returncode == (128 + sent if sent == signal.SIGTERM else -sent)
    before = checkpoint.load(parts).step
    assert before < checkpoint.load(whole).step
    assert cli.run(page.main, [*arguments, f"--out_dir={parts}", "--resume=latest"]) == 0
    ours, theirs = checkpoint.load(parts), checkpoint.load(whole)
    assert ours.step == theirs.step and all(torch.equal(ours.model[name], theirs.model[name]) for name in theirs.model)


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_two_ranks_learn_as_one(base: Path, tmp_path: Path, command: str) -> None:
    """The same micro-batches, shared out: the weights differ by rounding alone."""
    page, arguments = (sft, (*SFT, "--gradient_accumulation_steps=2")) if command == "sft" else (rl, RL)
    arguments = (*arguments, f"--init_from={base}", "--max_iters=4", "--eval_interval=0")
    arguments = (*arguments, "--device=cpu", "--dtype=float32", "--log_interval=1")
    assert cli.run(page.main, [*arguments, f"--out_dir={tmp_path / 'one'}"]) == 0
    flags = ("-m", f"train.{command}", *arguments, f"--out_dir={tmp_path / 'two'}", "--backend=gloo")
    done = torchrun(2, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (rows(tmp_path / name, "step") for name in ("one", "two"))
    # Adam divides by the size of a gradient, so weights whose gradient is all rounding go apart; the losses do not.
    assert len(one) == len(two) > 1
    losses = (torch.tensor([row["loss"] for row in part]) for part in (two, one))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-7)
    if command == "rl":
        assert [row["tokens"] for row in two] == [row["tokens"] for row in one]
        assert [row["reward"] for row in two] == [row["reward"] for row in one]
        graded = [
            [row[f"pass@{k}"] for k in (1, 2)] for name in ("one", "two") for row in rows(tmp_path / name, "eval")
        ]
        assert graded[: len(graded) // 2] == graded[len(graded) // 2 :]
