"""Two processes that want one folder: one writes it, the other is told who; what is read is what was checked."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from gptfast import checkpoint, cli
from gptfast.aside import LOCK, Busy, file_aside, locked
from train import chat, pretrain, speedrun
from train.config import Pretrain
from train.conversations import prepare as prepare_chat
from train.prepare import prepare
from train.rl import Rl
from train.sft import Sft
from train.trainer import Recipe, started

HOLDER = "process 17 on elsewhere (python -m train.pretrain tiny)"


@contextlib.contextmanager
def another(folder: Path) -> Iterator[BinaryIO]:
    """`folder` as another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(HOLDER.encode())
        file.flush()
        yield file


def step(out_dir: Path, step: int, value: float, keep: int = 2) -> Path:
    weights = {"w": torch.full((64,), value)}
    return checkpoint.save(
        out_dir, step=step, model=weights, optimizer={"m": weights["w"] + 1}, meta={"value": value}, keep=keep
    )


def values(saved: checkpoint.Checkpoint) -> set[float]:
    return {*saved.model["w"].tolist(), *(saved.optimizer["m"] - 1).tolist(), saved.meta["value"]}


@pytest.mark.parametrize("config", [Pretrain, Sft, Rl])
def test_a_run_holds_its_folder(config: Any, tmp_path: Path) -> None:
    """Before it reads or writes anything there."""
    run = started(config(out_dir=str(tmp_path / "out"), device="cpu"), Recipe(), {"device": "cpu"})
    with another(tmp_path / "out"), pytest.raises(Busy) as error, run:
        raise AssertionError
    assert str(error.value) == f"{tmp_path / 'out'} is being written by {HOLDER}; wait for it, or choose another folder"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


def test_every_command_that_writes_a_folder_is_told_of_the_other(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (tmp_path / "text.txt").write_text(text[:2000])
    prepare("tiny", tmp_path / "data", tmp_path / "text.txt")
    flags = [f"--out_dir={out}", f"--data_dir={tmp_path / 'data'}", "--dataset=tiny", "--device=cpu"]
    monkeypatch.setattr("train.conversations.from_hub", lambda *_: iter([[{"role": "user", "content": "a"}]]))
    commands: dict[str, Callable[[], object]] = {
        "pretrain": lambda: pretrain.main([*flags, "--compile=False", "--max_iters=1", "--eval_only=True"]),
        "speedrun": lambda: speedrun.main(["cpu", *flags]),
        "chat": lambda: chat.main([f"--out_dir={out}", "--device=cpu"]),
        "a checkpoint": lambda: step(out, 1, 1.0),
        "conversations": lambda: prepare_chat("hf:some/set", out),
    }
    for name, command in commands.items():
        with another(out):
            assert cli.run(lambda _, run=command: run(), []) == 2, name
        assert f"error: {out} is being written by {HOLDER}; wait" in capsys.readouterr().err, name
        assert [path.name for path in out.iterdir()] == [LOCK], name


def test_a_process_may_take_twice_what_it_holds_and_no_other_once(tmp_path: Path) -> None:
    with locked(tmp_path):
        mine = (tmp_path / LOCK).read_text()
        assert mine.startswith(f"process {os.getpid()} on ") and "(python" in mine
        with locked(tmp_path):
            pass
        step(tmp_path, 1, 1.0)
        with (tmp_path / LOCK).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not (tmp_path / LOCK).exists()


def test_what_a_lock_says_is_one_short_line(tmp_path: Path) -> None:
    with another(tmp_path) as file:
        file.write(b"\n\x1b[31m" + b"x" * 5000)
        file.flush()
        with pytest.raises(Busy) as error, locked(tmp_path):
            raise AssertionError
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_a_lock_that_is_a_link_or_a_pipe_is_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    for make in (lambda: (tmp_path / LOCK).symlink_to(tmp_path / "mine"), lambda: os.mkfifo(tmp_path / LOCK)):
        make()
        with pytest.raises(OSError), locked(tmp_path):
            raise AssertionError
        (tmp_path / LOCK).unlink()
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_speedrun_waits_for_one_that_makes_the_same_data(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """train.bin without meta.json would mean GPT-2's tokens."""
    (tmp_path / "text.txt").write_text(text[:2000])
    made: list[str] = []

    def counted(name: str, root: str) -> None:
        made.append(name)
        prepare(name, root, tmp_path / "text.txt")

    monkeypatch.setattr(speedrun, "prepare", counted)
    config = Pretrain(dataset="tiny", data_dir=str(tmp_path / "data"))
    with another(tmp_path / "data" / "tiny") as file:
        (tmp_path / "data" / "tiny" / "train.bin").write_bytes(bytes(20))
        second = threading.Thread(target=speedrun.make_data, args=(config,))
        second.start()
        second.join(0.3)
        assert second.is_alive() and not made
        fcntl.flock(file, fcntl.LOCK_UN)
        second.join(20)
    assert not second.is_alive() and not made and HOLDER in capsys.readouterr().out
    (tmp_path / "data" / "tiny" / "train.bin").unlink()
    speedrun.make_data(config)
    assert made == ["tiny"] and (tmp_path / "data" / "tiny" / "meta.json").exists()


def test_what_is_loaded_is_what_was_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another run takes the name of this one's, just after that was found to be in order."""
    folder, other = step(tmp_path / "a", 1, 1.0), step(tmp_path / "b", 1, 2.0)
    mine, theirs = folder / "optimizer.safetensors", other / "optimizer.safetensors"
    whole = mine.read_bytes()
    digest = hashlib.file_digest

    def hashed(file: Any, *arguments: Any) -> Any:
        result = digest(file, *arguments)
        if result.digest() == hashlib.sha256(whole).digest():
            os.replace(theirs, mine)
        return result

    monkeypatch.setattr(hashlib, "file_digest", hashed)
    assert values(checkpoint.load(tmp_path / "a")) == {1.0} and not theirs.exists()


def test_temporary_names_tell_processes_apart(tmp_path: Path) -> None:
    assert checkpoint.building_of(tmp_path, 5) != checkpoint.building_of(tmp_path, 5, pid=os.getpid() + 1)
    with file_aside(tmp_path / "a") as building:
        assert f"-{os.getpid()}-" in building.name
        building.touch()


# ---- links


def test_checkpoints_that_were_moved_and_linked_back_end_no_save(tmp_path: Path) -> None:
    """The links are pruned as links; what they name stays whole."""
    out, disk = tmp_path / "out", tmp_path / "disk"
    for number in (1, 2):
        step(out, number, float(number))
    shutil.move(out, disk)
    out.mkdir()
    for path in disk.iterdir():
        (out / path.name).symlink_to(path)
    assert values(checkpoint.load(out)) == {2.0}
    for number in (3, 2, 4, 5):
        step(out, number, float(number))
        assert values(checkpoint.load(out)) == {float(number)}
    assert sorted(path.name for path in out.iterdir()) == ["ckpt-000004", "ckpt-000005"]
    assert [values(checkpoint.load(disk, step=number)) for number in (1, 2)] == [{1.0}, {2.0}]
