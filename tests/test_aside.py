"""Exports and tokenizers are wholly there or not at all, whatever fails while they are written."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from gptfast import checkpoint, hf
from gptfast.config import GPTConfig
from gptfast.errors import UserError
from gptfast.hf import gguf
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer, CharTokenizer
from train import tokenizer as trainer
from train.prepare import PrepareConfig, prepare_as

OPS = kernels.load("reference")
ROOT = Path(__file__).parents[1]
BYTES = BPETokenizer.from_ranks({bytes([i]): i for i in range(256)}, {"<|bos|>": 256})
A, B = CharTokenizer("abcd"), CharTokenizer("wxyz")


def test_two_that_write_one_folder_do_not_mix(tmp_path: Path) -> None:
    """The second is told who holds it; when that one has left, however, the folder is free."""
    hold = f"""
import sys, pathlib
from gptfast.aside import locked
with locked(pathlib.Path({str(tmp_path / "mine")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    (tmp_path / "text.txt").write_text("words " * 50)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 20)
    BYTES.save(tmp_path / "bytes")
    wanted = [
        PrepareConfig("mine", str(tmp_path / "text.txt"), data_dir=str(tmp_path)),
        PrepareConfig(
            "mine", str(tmp_path / "rows.jsonl"), str(tmp_path / "bytes"), str(tmp_path), val_fraction=0.5, processes=1
        ),
    ]
    for config in wanted:
        with pytest.raises(UserError, match=rf"is being written by process {holder.pid} on .*; wait for it"):
            prepare_as(config)
    holder.kill()  # and so without a word
    holder.wait()
    prepare_as(wanted[1])
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "meta.json", "train-00000.bin", "val-00000.bin"
    ]  # fmt: skip


def model(value: float) -> GPT:
    made = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8, activation="gelu_tanh"), OPS)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def full_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the `call`th file written or renamed on, the disk is full."""
    calls, write_text, replace = 0, Path.write_text, os.replace

    def counted(original: Any) -> Any:
        def maybe(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= call:
                raise OSError(28, "No space left on device")
            return original(*arguments, **options)

        return maybe

    monkeypatch.setattr(Path, "write_text", counted(write_text))
    monkeypatch.setattr(os, "replace", counted(replace))


def test_an_export_over_another_is_the_old_the_new_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full from any moment on: never A's weights with B's tokenizer."""
    target, seen = tmp_path / "out", set()
    for call in range(1, 15):
        hf.save(model(1.0), target, A)
        (target / "mine.txt").touch()
        with monkeypatch.context() as patched:
            full_at(call, patched)
            try:
                hf.save(model(2.0), target, B)
                seen.add("whole")
            except UserError as error:
                assert "No space left on device" in str(error)
        if (target / "config.json").exists():
            value = float(hf.load(target, OPS).lm_head.weight[0, 0].detach())
            characters = hf.load_tokenizer(target).chars  # type: ignore[attr-defined]
            assert (value, characters) in ((1.0, "abcd"), (2.0, "wxyz"))
            seen.add(characters)
        assert (target / "mine.txt").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert seen == {"whole", "abcd", "wxyz"}


def test_an_export_has_the_rights_of_any_file_and_spares_checkpoints(tmp_path: Path) -> None:
    made = hf.save(model(1.0), tmp_path / "out", A)
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o666 & ~mask}
    saved = checkpoint.save(tmp_path / "run", step=1, model=model(1.0).state_dict(), optimizer={}, meta={})
    before = contents(saved)
    for folder in (saved, tmp_path / "run"):
        with pytest.raises(UserError, match="holds a checkpoint, which an export would spoil"):
            hf.save(model(2.0), folder, A)
    assert contents(saved) == before


def test_a_gguf_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf as library

    path = gguf.write(model(1.0), tmp_path / "model.gguf", A)
    before = path.read_bytes()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(UserError, match="No space left"):
        gguf.write(model(2.0), path, B)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["model.gguf"]


def test_a_tokenizer_that_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 30)
    config = trainer.TokenizerConfig(
        "train", str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "made"), vocab_size=270
    )
    with monkeypatch.context() as patched:
        full_at(3, patched)
        with pytest.raises(UserError, match=r"cannot write there \(No space left on device"):
            trainer.train(config)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    assert isinstance(trainer.train(config), BPETokenizer)
