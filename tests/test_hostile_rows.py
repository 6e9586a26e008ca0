"""Rows of results that somebody made who wishes harm, given to every reader of rows: refused in one line, or read.

The long form is `make chaos`. What makes the rows is tests/hostile.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import compare, history, peaks, plots, predict, profile, results, speedrun
from bench import model as bench_model
from gptfast import mfu, report
from gptfast.errors import UserError
from gptfast.report import card
from tests.hostile import BOMB, Loader, attacks, little_memory
from tests.test_rows import DATED, FACTS, TIMES, model, op
from train import plan

Rows = list[dict[str, Any]]
H200 = FACTS | {"hardware": {"kind": "cuda", "name": "NVIDIA H200", "memory_bytes": 150 * 10**9}}
NOW = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
OPS: Rows = [
    op(impl=impl, dims={"M": 8, "N": N}, ms_low=0.9, ms_high=1.1, roofline=0.5, **FACTS)
    for impl in ("triton", "torch") for N in (256, 512, 1024)
]  # fmt: skip
MODELS: Rows = [
    model(impl=impl, rung=i, mfu=0.1 + 0.1 * i, mfu_palm=0.2, peak_flops=1e12, peak_kind="dense", peak_device="x")
    for i, impl in enumerate(("reference", "attention", "triton"))
]
DECODES: Rows = [
    DATED | {"what": "decode", "name": "gpt2", "impl": impl, "dtype": "float32", "dims": {"B": 1}, "tokens_per_s": 9.0}
    | TIMES | FACTS for impl in ("naive", "triton")
]  # fmt: skip
SERVES: Rows = [
    DATED | {"what": "serve", "name": "gpt2", "impl": "batched", "dtype": "float32", "dims": {"load": load, "n": 8},
             "tokens_per_s": 9.0, "ttft_ms_p50": 2.0, "ttft_ms_p95": 3.0, "tpot_ms_p50": 1.0, "tpot_ms_p95": 2.0}
    | TIMES | FACTS for load in (1, 4)
]  # fmt: skip
PEAKS: Rows = [
    DATED | NOW | {"what": "peak", "name": name, "dims": dims, "dtype": "float32", "threads": torch.get_num_threads(),
                   "best_gbs": 50.0, "best_tflops": 1.0} | TIMES | FACTS
    for name, dims in (("copy", {"bytes": 4096}), ("gemm", {"M": 64, "N": 64, "K": 64}))
]  # fmt: skip
SPLIT: Rows = [
    {"part": part, "calls": 3, "ms": 2.0, "share": 0.2, "gbs": 5.0, "tflops": 0.1} for part in
    ("GEMMs", "attention", "norms", "MLP activation", "loss", "optimizer", "other")
]  # fmt: skip
PROFILES: Rows = [
    DATED | {"what": "profile", "name": name, "impl": "triton", "direction": "train", "dims": {"B": 16, "T": 1024},
             "dtype": "float32", "tokens_per_s": 9.0, "busy_ms": 14.0, "idle_ms": 1.0, "parts": SPLIT} | TIMES | FACTS
    for name in ("gpt2", "gpt2-medium")
]  # fmt: skip
ABLATIONS: Rows = [
    DATED | {"what": "summary", "name": name, "impl": impl, "loss": 1.5, "dims": {"seed": seed, "iters": 9},
             "wall_s": 2.0, "cpu_s": 3.0, "parameters": 10} | FACTS
    for name, impls in (("ablation of x", ("recipe", *list(speedrun.VARIANTS)[:1])), ("race", (speedrun.BASELINE, "x")))
    for impl in impls for seed in (0, 1)
]  # fmt: skip


def log(stage: str) -> Rows:
    """The rows of a training run."""
    steps = [{"what": "step", "step": i, "loss": 2.0, "ms": 1.0, "tokens_per_s": 3.0, "mfu": 0.1, "tokens": 64 * i,
              "reward": 0.5, "seconds": 0.1 * i} for i in range(4)]  # fmt: skip
    ends: Rows = [
        {"what": "eval", "step": 3, "train_loss": 1.0, "val_loss": 1.0, "pass@1": 0.5},
        {"what": "eval", "step": 4, "whole_val_loss": 1.0, "windows": 20, "bits_per_byte": 1.5},
        {"what": "sample", "text": "words"},
    ]
    run = {"what": "run", "config": {"dataset": "tiny", "seed": 1}, "stage": stage, "parameters": 100, **FACTS}
    return [DATED | row for row in [run, *steps, *ends]]


JUDGED: Rows = [
    DATED | {"what": "eval", "step": 0, "task": task, "accuracy": 0.5, "accuracy_error": 0.1, "core": 0.2}
    for task in ("gsm8k", "core:x")
]  # fmt: skip


def write(path: Path, rows: Rows) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def written(**files: Rows) -> Callable[[Path], None]:
    """What writes these files of rows into a folder."""

    def make(folder: Path) -> None:
        for name, rows in files.items():
            write(folder / f"{name}.jsonl", rows)

    return make


def quietly(main: Callable[..., Any], *arguments: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        main(*arguments)


def draw(folder: Path) -> None:
    """By `python -m bench.plots`, whose refusal of one folder does not keep it from others: it prints it itself."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        quietly(plots.main, [f"--out={folder}"])
    if said.getvalue():
        (line,) = said.getvalue().splitlines()
        raise UserError(line.removeprefix("error: "))


def tables(folder: Path) -> None:
    for name in plots.TABLES:
        quietly(plots.main, [f"--out={folder}", f"--readme={name}"])


def make_two(folder: Path) -> None:
    write(folder / "old" / "ops.jsonl", [row | {"state_after": {"sm_mhz": 9, "throttle": ["heat"]}} for row in OPS])
    slower = {"ms_p20": 2.0, "ms_p50": 2.0, "ms_p80": 2.0, "ms_low": 1.9, "ms_high": 2.1}
    write(folder / "new" / "ops.jsonl", [row | slower | {"state_after": {"sm_mhz": 8}} for row in OPS])


def load_two(folder: Path) -> None:
    for more in ([], ["--across"]):
        quietly(compare.main, [f"{folder / 'old'}", f"{folder / 'new'}", f"--json={folder / 'told.json'}", *more])


def make_past(folder: Path) -> None:
    """A folder of rows with a past in git."""
    write(folder / "ops.jsonl", OPS[::3] + [row | NOW for row in OPS[::3]])


def load_past(folder: Path) -> None:
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    for more in ([], ["--plain"]):
        quietly(history.main, [str(folder), *more])


def load_predicted(folder: Path) -> None:
    flags = ["--model=gpt2", "--dtype=float32", f"--out={folder}", "--batch_size=16"]
    quietly(predict.main, flags)
    quietly(predict.main, [*flags, "--block_size=512"])


def load_ceilings(folder: Path) -> None:
    cpu = torch.device("cpu")
    if peaks.from_rows(results.latest(results.read(folder / "peaks.jsonl"))) is None:
        return  # what asks for them would measure
    bench_model.peak_for(cpu, None, folder)
    peaks.measured_ceilings(peaks.Ceilings({}, None, None, "a datasheet", 0.0), cpu, [], folder)


def load_profiles(folder: Path) -> None:
    one, other = (f"{folder / 'profile.jsonl'}:{name}" for name in ("gpt2", "gpt2-medium"))
    quietly(profile.main, ["--diff", one, other])


def make_stages(folder: Path) -> None:
    for stage in ("base", "sft"):
        write(folder / stage / "metrics.jsonl", log(stage))
        write(folder / stage / "tasks.jsonl", JUDGED)


READERS = [
    Loader("figures of ops", written(ops=OPS, peaks=PEAKS), draw, writes=True),
    Loader("figures of models", written(model=MODELS), draw, writes=True),
    Loader("figures of serving", written(serve=SERVES, decode=DECODES), draw, writes=True),
    Loader("figures of profiles", written(profile=PROFILES), draw, writes=True),
    Loader("figures of a log", written(log=log("base")), draw, writes=True),
    Loader("tables", written(ops=OPS, model=MODELS), tables, reads=("bench/results.py:lines", "gptfast/rows.py:parse")),
    Loader("compare", make_two, load_two, writes=True),
    Loader("history", make_past, load_past, writes=True, reads=("bench/history.py:_git",)),
    Loader("predict", written(ops=OPS, peaks=PEAKS, profile=PROFILES), load_predicted),
    Loader("ceilings", written(peaks=PEAKS), load_ceilings),
    Loader("profile --diff", written(profile=PROFILES), load_profiles),
    Loader("ablations", written(rows=ABLATIONS), lambda at: speedrun.write_page(at / "rows.jsonl"), writes=True),
    Loader(
        "plan --measured",
        written(model=[row | H200 for row in MODELS], profile=[row | H200 for row in PROFILES]),
        lambda at: plan.measured_mfu(str(at), mfu.peak("NVIDIA H200")),  # type: ignore[arg-type]
        reads=("gptfast/report/__init__.py:read",),
    ),
    Loader(
        "report",
        written(log=log("base"), ops=OPS[:2], decode=DECODES),
        lambda at: report.write_report(report.read(sorted(at.glob("*.jsonl"))), at),
        writes=True,
    ),
    Loader("report card", make_stages, lambda at: card.write([at / "base", at / "sft"], at, 1.0), writes=True),
]
DRAWS = ("figures", "report", "history")  # begin the names of those that take a second each


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_hostile_row_is_refused_or_read(reader: Loader, tmp_path: Path, chaos: Callable[[int, int], int]) -> None:
    slow = reader.name.startswith(DRAWS)
    count = chaos(1 if slow else 10, 105 if reader.name.startswith("figures") else 420)
    verdicts = attacks(reader, tmp_path, count)
    assert sum(verdicts.values()) == count
    if count > 100:
        assert verdicts["refused"] > count // 10
        print(f"rows, {reader.name}: {verdicts}")


def test_a_field_that_is_named_is_no_want_of_memory(tmp_path: Path) -> None:
    """The attacks take an error that speaks of memory for one of a reader that ran out of it."""
    huge = MODELS[0] | {"hardware": H200["hardware"] | {"memory_bytes": 1e308}}
    write(tmp_path / "model.jsonl", [huge])
    with pytest.raises(UserError, match=r"row\.hardware\.memory_bytes is 1e\+308, expected") as refused:
        plan.measured_mfu(str(tmp_path), mfu.peak("NVIDIA H200"))  # type: ignore[arg-type]
    assert not BOMB.search(str(refused.value))
    for take in (lambda: torch.empty(2**33), lambda: np.empty(2**33), lambda: bytearray(2**33)):
        with little_memory(), pytest.raises((MemoryError, RuntimeError)) as lacking:
            take()
        assert BOMB.search(repr(lacking.value))


def test_good_rows_are_read_by_all(tmp_path: Path) -> None:
    """Or the attacks would say nothing."""
    for reader in READERS:
        (tmp_path / reader.name).mkdir()
        reader.make(tmp_path / reader.name)
        if not reader.name.startswith(DRAWS):
            reader.load(tmp_path / reader.name)


def test_no_name_leads_a_figure_out_of_its_folder(tmp_path: Path) -> None:
    """Of models, modes and stages, in what is drawn beside the rows."""
    name, at = "../../x", tmp_path / "a" / "b" / "c"
    at.mkdir(parents=True)
    assert len(plots.figures(at, [row | {"name": name} for row in PROFILES[:1]] + OPS[:1], [])) == 5
    assert history.figure([[op(name=name), op(name=name) | NOW]], at, name)
    write(at / "base" / "metrics.jsonl", log(name))
    card.write([at / "base"], at)
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {at, at / "base"}
    shown = (at / "report.md").read_text()
    assert f"({card.file_name(name)}-loss.png)" in shown


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"date": "yesterday"}, "'date' is 'yesterday', expected one such as 2026"),
        ({"date": "2026-01-01T00:00:00"}, "'date' is"),
        ({"tokens_per_s": -1.0}, "'tokens_per_s' is -1.0, which cannot be below 0"),
        ({"parts": {"GEMMs": 1.0}}, "'parts' is .*, expected a list"),
        ({"parts": [{"part": "GEMMs"}]}, "one of parts is .*, expected an object with part and ms"),
        ({"parts": [{"part": "GEMMs", "ms": "2"}]}, "parts: 'ms' is '2', expected int or float"),
    ],
)
def test_what_figures_read_of_a_profile_is_named(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [PROFILES[0] | changed])
    with pytest.raises(UserError, match=rf"x\.jsonl:1: .*{said}"):
        results.read(tmp_path / "x.jsonl")


def test_a_measured_rate_above_the_peak_is_none(tmp_path: Path) -> None:
    for wrong in ({"tokens_per_s": 1e20}, {"dims": {"B": 1, "T": -1024}}):
        write(tmp_path / "model.jsonl", [row | H200 | wrong | {"name": "gpt2"} for row in MODELS[:1]])
        with pytest.raises(UserError, match=r"--measured=.*gpt2 has .* tokens/s at T=.*; delete that row"):
            plan.measured_mfu(str(tmp_path), mfu.peak("NVIDIA H200"))  # type: ignore[arg-type]
