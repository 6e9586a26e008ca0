"""A run that stops and is resumed ends bit for bit where the uninterrupted run ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import checkpoint, cli
from train import pretrain
from train.prepare import prepare

FLAGS = [
    "--device=cpu", "--compile=False", "--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=2",
    "--n_layer=2", "--n_head=2", "--n_embd=16", "--dropout=0.2", "--eval_iters=2", "--warmup_iters=2",
    "--lr_decay_iters=10", "--learning_rate=1e-2", "--dataset=tiny",
]  # fmt: skip


@pytest.fixture
def flags(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "text.txt").write_text(text[:4000])
    prepare("tiny", tmp_path / "data", tmp_path / "text.txt")
    return [*FLAGS, f"--data_dir={tmp_path / 'data'}"]


def train(*flags: str) -> None:
    assert cli.run(pretrain.main, list(flags)) == 0


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Equal in structure, and every tensor bit for bit."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for i, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{path}.{i}")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert torch.equal(left, right), path
    else:
        assert left == right, path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_resumed_is_uninterrupted(flags: list[str], tmp_path: Path, dtype: str) -> None:
    """The uninterrupted run evaluates only at its end, so this also shows that evaluating leaves training alone."""
    flags = [*flags, f"--dtype={dtype}"]
    whole, parts = f"--out_dir={tmp_path / 'whole'}", f"--out_dir={tmp_path / 'parts'}"
    train(*flags, whole, "--max_iters=9", "--eval_interval=100")
    train(*flags, parts, "--max_iters=4", "--eval_interval=2")
    torch.rand(7)  # the process that resumes has another past
    train(*flags, parts, "--max_iters=6", "--eval_interval=3", "--init_from=resume", "--seed=5")
    train(*flags, parts, "--max_iters=9", "--eval_interval=100", "--init_from=resume")

    left, right = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "parts")
    assert left.step == right.step == 9
    assert_same(left.model, right.model)
    assert_same(left.optimizer, right.optimizer)
    for key in ("generators", "batches", "scaler", "model", "tokenizer"):
        assert_same(left.meta[key], right.meta[key], key)
    assert left.optimizer["state"][0]["step"].item() > 0


def test_resume_takes_the_architecture_of_the_checkpoint(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"--out_dir={tmp_path / 'out'}"
    train(*flags, out, "--max_iters=2", "--eval_interval=2")
    before = checkpoint.load(tmp_path / "out")
    capsys.readouterr()
    changed = ["--n_layer=5", "--n_embd=64", "--norm=rmsnorm", "--n_kv_head=2", "--weight_decay=0.5"]
    train(*flags, out, "--max_iters=3", *changed, "--block_size=32", "--init_from=resume")
    said = capsys.readouterr().out
    assert "block_size: 16, the model's own, not 32" in said
    kept = "n_embd=16, not 64; n_layer=2, not 5; norm=layernorm, not rmsnorm; weight_decay=0.1, not 0.5"
    assert f"kept from the checkpoint: {kept}\n" in said
    after = checkpoint.load(tmp_path / "out")
    assert after.step == 3
    assert after.meta["model"] == before.meta["model"]
    assert after.meta["best_val_loss"] <= before.meta["best_val_loss"]
    assert after.optimizer["param_groups"][0]["weight_decay"] == 0.1
    train(*flags, f"--out_dir={tmp_path / 'more'}", "--max_iters=1", "--n_head=4", f"--init_from={tmp_path / 'out'}")
    said = capsys.readouterr().out
    assert f"kept from {tmp_path / 'out'}: n_head=2, not 4\n" in said

    train(*flags, out, "--max_iters=2", "--init_from=resume")
    said = capsys.readouterr().out
    assert "already at step 3 of 2: nothing to do; raise --max_iters\n" in said and "kept" not in said
    assert cli.run(pretrain.main, [*flags, out, "--block_size=8", "--init_from=resume"]) == 2
    error = capsys.readouterr().err
    assert "--block_size=8: " in error and "go on with --block_size=16" in error
    assert f"--init_from={tmp_path / 'out'}\n" in error


def test_resume_passes_over_a_damaged_checkpoint(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"--out_dir={tmp_path / 'out'}"
    train(*flags, out, "--max_iters=4", "--eval_interval=2")
    weights = tmp_path / "out" / "ckpt-000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    train(*flags, out, "--max_iters=5", "--eval_interval=5", "--init_from=resume")
    captured = capsys.readouterr()
    assert "ckpt-000004" in captured.err
    assert "iter 2: " in captured.out.split("Resuming training from")[1]
    assert checkpoint.load(tmp_path / "out").step == 5
