"""Numbers that no flag can mean are refused in one line, in every command alike, before any work."""

from __future__ import annotations

import importlib
import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from gptfast import cli
from gptfast.cli import LIMITS, check_range
from gptfast.errors import UserError

HUGE = ("1e308", "inf", "nan", "-inf")


@pytest.mark.parametrize(
    ("page", "arguments"),
    [
        ("train.pretrain", ["--seed=" + "9" * 30]),
        ("train.pretrain", ["--learning_rate=inf"]),
        ("train.pretrain", ["--peak_tflops=0"]),
        ("train.prepare", ["mine", "--processes=2147483648"]),
        ("train.prepare", ["mine", "--shard_tokens=" + "9" * 5000]),
        ("train.evaluate", ["--batch_size=1000000000000"]),
        ("train.plan", ["--ratio=inf"]),
        ("train.speedrun", ["--sample_tokens=-1"]),
        ("train.speedrun", ["--matrix_lr=nan"]),
        ("gptfast.sample", ["--temperature=inf"]),
        ("gptfast.sample", ["--seed=-1"]),
        ("bench.ops", ["--threads=2147483648"]),
        ("bench.ops", ["--threads=-1"]),
        ("bench.cpu", ["--rounds=-1"]),
        *(("bench.mfu", [f"--tokens_per_s={value}"]) for value in HUGE),
        ("bench.mfu", ["--tokens_per_s=1", "--memory_gb=-1", "--device=A100"]),
        ("bench.mfu", ["--tokens_per_s=1", "--n_layer=1" + "0" * 30]),
        *(("train.scaling", [f"--{name}={value}"]) for name in ("hop_us", "nvlink_gbs") for value in HUGE),
        ("train.scaling", ["--reached=2"]),
    ],
)
def test_one_line_and_exit_code_2(page: str, arguments: list[str]) -> None:
    main, said, shown = importlib.import_module(page).main, io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(shown):
        assert cli.run(main, arguments) == 2
    flag = arguments[-1 if "device" not in arguments[-1] else 1].partition("=")[0]
    assert said.getvalue().count("\n") == 1 and flag in said.getvalue() and len(said.getvalue()) < 300
    assert not shown.getvalue()


def test_limits_are_of_flags_that_there_are() -> None:
    """A limit under a name that no command has would check nothing."""
    known = ""
    for page in ("train/config.py", "train/speedrun.py", "train/plan.py", "train/prepare.py", "train/evaluate.py",
                 "gptfast/sample.py", "bench/mfu.py", "train/scaling.py", "bench/ops.py", "bench/cpu.py"):  # fmt: skip
        known += (Path(__file__).parents[1] / page).read_text("utf-8")
    assert [name for name in LIMITS if name not in known] == []


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 0), ("threads", 1), ("budget_s", float("inf")), ("x", -5), ("x", 0.5)]
)
def test_what_can_be_meant_passes(name: str, value: float) -> None:
    check_range(name, value)
    with pytest.raises(UserError, match=f"--{name}=nan: must be"):
        check_range(name, float("nan"))


@pytest.mark.parametrize("page", ["train.evaluate", "train.tokenizer", "train.prepare"])
def test_a_name_too_long_for_a_file_is_one_line(page: str) -> None:
    long = "x" * 5000
    arguments = {
        "train.evaluate": [f"--text={long}", "--device=cpu"],
        "train.tokenizer": ["train", f"--source={long}"],
        "train.prepare": ["mine", f"--data_dir={long}", f"--source={__file__}"],
    }[page]
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        assert cli.run(importlib.import_module(page).main, arguments) == 2
    assert said.getvalue().count("\n") == 1 and said.getvalue().startswith("error: ")
