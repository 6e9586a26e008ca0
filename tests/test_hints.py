"""What an error advises is what mends its cause: each that guesses is provoked by another cause than the usual one."""

from __future__ import annotations

import builtins
import errno
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernels
from gptfast import checkpoint, hf, untrusted
from gptfast.config import nanochat
from gptfast.errors import UserError, remedy, to_install
from gptfast.hf import nanochat as nanochat_files
from gptfast.log import Log
from gptfast.log.trackers import import_tracker
from gptfast.model import GPT
from gptfast.serve.server import import_uvicorn
from gptfast.tokenizer import _import_tiktoken, _named_encoding
from tests.test_hostile import make_export, make_task
from train import conversations, evaluate
from train.documents import Documents
from train.tasks import TASKS, Where
from train.tasks import core as core_task

OPS = kernels.load("reference")
CAUSES = [
    (errno.EACCES, "change its permissions"), (errno.EMFILE, "more open files"), (errno.EIO, "the disk fails"),
    (errno.ENOSPC, "free some space"),
]  # fmt: skip


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_safetensors_tells_its_number_in_its_text() -> None:
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert remedy(error, "see to that disk") == "free some space"
    assert remedy(RuntimeError("Invalid header"), "fetch it again") == "fetch it again"


def make_nanochat(folder: Path) -> None:
    config = nanochat(block_size=64, vocab_size=70, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
    nanochat_files.write(GPT(config, OPS), folder, step=7)


def task(folder: Path) -> Any:
    return TASKS["gsm8k"].examples("test", Where(str(folder)))


READS: list[tuple[str, Callable[[Path], None], Callable[[Path], Any]]] = [
    ("weights", make_export, lambda at: hf.load(at, OPS)),
    ("nanochat", make_nanochat, lambda at: hf.load(at, OPS)),
    ("task", make_task, task),
    ("core", lambda at: (at / "core.yaml").write_text(""), lambda at: core_task.read(str(at), "")),  # type: ignore[dict-item]
]


@pytest.mark.parametrize(("name", "make", "read"), READS, ids=[name for name, _, _ in READS])
def test_a_file_that_cannot_be_opened_is_not_called_damaged(
    name: str,
    make: Callable[[Path], None],
    read: Callable[[Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path)
    opened = untrusted.opened
    for number, said in CAUSES[:3]:

        def fail(path: Any, number: int = number) -> Any:
            return opened(path) if str(path).endswith(".json") else failing(number)()

        monkeypatch.setattr(untrusted, "opened", fail)
        with pytest.raises(UserError, match=said) as error:
            read(tmp_path)
        assert "again" not in str(error.value) and "damaged" not in str(error.value)


@pytest.mark.parametrize(("number", "said"), CAUSES)
def test_what_cannot_be_written_does_not_always_want_space(
    number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Log(tmp_path, name="x.jsonl") as log:
        monkeypatch.setattr(log, "_file", SimpleNamespace(write=failing(number), close=lambda: None))
        with pytest.raises(UserError, match=said):
            log.row("note", text="x")
    monkeypatch.setattr(checkpoint, "_write_tensors", failing(number))
    expected = "make the folder writable" if number == errno.EACCES else said
    with pytest.raises(UserError, match=expected):
        checkpoint.save(tmp_path, step=1, model={"w": torch.ones(2)}, optimizer={}, meta={})


def test_a_cache_without_rights_is_no_lack_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import tiktoken

    for number, said in CAUSES:
        monkeypatch.setattr(tiktoken, "get_encoding", failing(number))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(number))
        for fetch in (lambda: _named_encoding("gpt2"), lambda: hf.find("some/model")):
            with pytest.raises(UserError, match=said) as error:
                fetch()
            assert "network" not in str(error.value)


IMPORTS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "tiktoken": ("tiktoken", lambda at: _import_tiktoken("it")),
    "transformers": ("transformers", lambda at: evaluate._import_transformers()),
    "datasets": ("datasets", lambda at: next(conversations.from_hub("a/b", "", "train"))),
    "datasets of a task": ("datasets", lambda at: TASKS["mmlu"].examples("test", Where(""))),
    "datasets of documents": ("datasets", lambda at: next(Documents("a/b", (), "", "text").read())),
    "huggingface_hub": ("huggingface_hub", lambda at: hf.find("some/model")),
    "yaml": ("pyyaml", lambda at: core_task._settings(at / "core.yaml")),
    "wandb": ("wandb", lambda at: import_tracker("wandb", "--wandb")),
    "fastapi": ("fastapi", lambda at: import_uvicorn()),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_only_what_is_missing_is_to_be_installed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing; there, but of what it needs something is missing; there, but broken."""
    package, load = IMPORTS[name]
    module = name.split(" ")[0]
    real = builtins.__import__
    installed = r"pip install ('gptfast\[serve\]'|" + package
    broken = rf"{package} is installed and cannot be imported \(cannot import name("
    for error, said in (
        (ModuleNotFoundError(f"No module named {module!r}", name=module), installed),
        (ModuleNotFoundError("No module named 'frob'", name="frob"), rf"pip install frob, which {package} needs("),
        (ImportError("cannot import name 'x'"), broken),
    ):

        def fail(wanted: str, *more: Any, error: ImportError = error, **options: Any) -> Any:
            if wanted.split(".")[0] == module:
                raise error
            return real(wanted, *more, **options)

        with monkeypatch.context() as patch:
            for each in [each for each in sys.modules if each.split(".")[0] == module]:
                patch.delitem(sys.modules, each)
            patch.setattr(builtins, "__import__", fail)
            patch.setattr(importlib, "import_module", fail)
            with pytest.raises(UserError, match=f"{said})"):
                load(tmp_path)


def test_pythons_advice_to_programmers_is_not_passed_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_embd": ' + "1" * 10_000 + "}")
    with pytest.raises(UserError, match=r"config\.json \(a number of more than 4,300 digits\); fetch it again"):
        hf.load(tmp_path, OPS)


def test_the_usual_fix_is_for_the_usual_cause() -> None:
    assert remedy(ValueError("x"), "do y") == remedy(OSError("x"), "do y") == "do y"
    assert to_install(ModuleNotFoundError(name="tokenizers.tools"), "tokenizers") == "pip install tokenizers"
