"""Flags that mean nothing, folders that cannot be written and clocks that go back: one line, before any work."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import results
from gptfast import cli
from gptfast.aside import check_writable, write_whole
from gptfast.engine.text import TextStream
from gptfast.errors import UserError
from gptfast.tokenizer import BPETokenizer

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("val_fraction=0.3", "max_tokens=3", "shard_tokens=3", "column=a", "subset=a", "processes=3")
BENCH = ("ops", "model", "optim", "peaks", "decode", "profile")
RATES = ("learning_rate", "matrix_lr", "head_lr", "scalar_lr")
NOWHERE = "/proc/no_folder"  # which nobody can make, not even root
CASES = [
    ("gptfast.sample", "--temperature=inf", "at most"), ("train.pretrain", "--peak_tflops=0", "above 0"),
    ("train.pretrain", "--sample_tokens=-1", "not be negative"), ("train.plan", "--ratio=inf", "at most"),
    *((f"bench.{page}", "--device=x", "unknown device") for page in BENCH),
    *((f"bench.{page}", "--threads=-1", "at least 1") for page in ("ops", "model", "peaks", "decode")),
    ("bench.cpu", "--out=/tmp", "it is a folder"), ("bench.cpu", f"--out={NOWHERE}/x", "cannot write there"),
    ("bench.plots", "--out=TYPO", "no such folder"), ("train.scaling", f"--out={NOWHERE}", "cannot write there"),
    ("gptfast.report.__main__", f"a.jsonl --out_dir={NOWHERE}", "cannot write there"),
    ("train.evaluate", f"--out_dir={NOWHERE} --device=cpu", "cannot write there"),
    ("bench.host", f"--out={NOWHERE}", "cannot write there"),
    *(("train.pretrain", f"--{name}=-1", "not be negative") for name in RATES),
    ("train.pretrain", "--min_lr=1 --learning_rate=0.1", "the rate would rise"),
    ("train.speedrun", "cpu --min_lr=1 --learning_rate=0.1 --device=cpu", "the rate would rise"),
    *(("train.prepare", f"pystdlib --data_dir={NOWHERE} --{flag}", "is for documents, and this is one text; leave")
      for flag in DOCUMENTS),
    ("train.prepare", "fineweb10B --val_fraction=0.3", "leave it out"),
    ("train.prepare", "chat --source=x.jsonl --shard_tokens=3", "leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "arguments", "said"), CASES)
def test_it_is_one_line_before_any_work(
    module: str, arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(importlib.import_module(module).main, arguments.split()) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and said in error[-1], error


def test_a_file_that_the_disk_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        Path(NOWHERE, "a").write_text("")

    assert cli.run(main, []) == 2
    assert capsys.readouterr().err == f"error: {NOWHERE}/a: No such file or directory\n"


def test_a_page_is_replaced_and_no_link_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "page.md").symlink_to(tmp_path / "mine")
    write_whole(tmp_path / "page.md", "new")
    assert (tmp_path / "mine").read_text() == "precious" and (tmp_path / "page.md").read_text() == "new"
    assert check_writable(tmp_path / "a" / "b").is_dir() and not any((tmp_path / "a" / "b").iterdir())


def test_kernels_speak_to_a_terminal_of_few_letters() -> None:
    code = "import sys; from kernels import _command; sys.exit(_command.run(lambda: print(chr(178)) or 0))"
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "\\xb2\n"), done.stderr


def row(ms: float, date: str, **more: Any) -> dict[str, Any]:
    facts = {"hardware": {"name": "x"}, "software": {"torch": "2"}, "commit": None, "dirty": None, "command": "c"}
    times = {"ms_p20": ms, "ms_p50": ms, "ms_p80": ms, "n": 3}
    return {"schema": 1, "what": "peak", "date": date, "name": "copy", "dims": {}, "dtype": "float32", **facts, **times}


def test_the_row_appended_last_is_the_newest_whatever_the_clock_said(tmp_path: Path) -> None:
    path = tmp_path / "peaks.jsonl"
    written = (row(ms, f"{year}-01-01T00:00:00Z") for ms, year in ((1.0, 2030), (2.0, 2020)))
    path.write_text("".join(json.dumps(each) + "\n" for each in written))
    results.compact(path)
    assert [found["ms_p50"] for found in results.read(path)] == [2.0]


def test_two_campaigns_do_not_share_a_folder(tmp_path: Path) -> None:
    """compact would lose the rows that the other appended."""
    from tests.test_two_at_once import another

    with another(tmp_path), pytest.raises(UserError, match="is being written by"), results.campaign(tmp_path, "a"):
        raise AssertionError


class Counted(BPETokenizer):
    decoded = 0

    def decode(self, ids: Any) -> str:
        Counted.decoded += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize("content", [b"\xff" * 3000, b"\xe2\x82" * 1500, "€".encode() * 1000, b"a\xf0\x9f\x98" * 750])
def test_bytes_that_are_no_text_are_streamed_in_linear_time(content: bytes) -> None:
    """Half a character at the end of 3,000 tokens is decoded once, and the pieces add up to the whole."""
    tokenizer = Counted.from_ranks({bytes([i]): i for i in range(256)}, {})
    Counted.decoded = 0
    stream = TextStream(tokenizer)
    text = "".join(map(stream.push, content)) + stream.flush()
    assert text == content.decode("utf-8", "replace") and Counted.decoded < 200 * len(content)
