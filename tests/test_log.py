"""Rows: what is written can be read, what is wrong is named, and the facts of the machine are there."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from gptfast import log
from gptfast.log import Log, Tracker, check_row


@pytest.fixture(scope="module")
def op_row() -> dict:
    return {
        "schema": log.SCHEMA, "what": "op", "date": log.now(), "name": "layernorm", "impl": "triton",
        "direction": "forward", "dims": {"M": 4, "N": 8}, "dtype": "bfloat16",
        "ms_p20": 1.0, "ms_p50": 1.1, "ms_p80": 1.3, "n": 50, **log.facts("cpu"),
    }  # fmt: skip


def test_rows_survive_the_file(tmp_path, op_row):
    with Log(tmp_path, console=False) as file:
        file.row("run", **log.facts("cpu"), config={"lr": 1e-3, "betas": (0.9, 0.95), "dtype": torch.bfloat16})
        file.row("step", step=3, loss=torch.tensor(2.5), ms=12)
        file.row(**op_row)
    run, step, op = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert run["config"] == {"lr": 1e-3, "betas": [0.9, 0.95], "dtype": "bfloat16"}
    assert (step["step"], step["loss"]) == (3, 2.5)
    assert op["dims"] == {"M": 4, "N": 8}
    assert all(check_row(row) for row in (run, step, op))


def test_not_a_number_is_kept_as_a_fact(tmp_path):
    with Log(tmp_path, console=False) as file:
        file.row("step", step=0, loss=math.nan, grad_norm=torch.tensor(math.inf))
    row = json.loads(file.path.read_text(), parse_constant=pytest.fail)  # strict JSON: no bare NaN
    assert math.isnan(float(row["loss"]))
    assert float(row["grad_norm"]) == math.inf


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hardware": None}, "hardware"),
        ({"hardware": {}}, "hardware.name"),
        ({"software": {"python": "3.12"}}, "software.torch"),
        ({"ms_p50": "1.1"}, "ms_p50"),
        ({"ms_p50": math.nan, "ms_p80": math.nan}, "out of order"),
        ({"ms_p50": True}, "ms_p50"),
        ({"ms_p20": 2.0}, "out of order"),
        ({"ms_p20": -1.0}, "out of order"),
        ({"n": 0}, "n is"),
        ({"what": "oops"}, "oops"),
        ({"schema": 0}, "schema 0"),
        ({"tflops": "fast"}, "tflops"),
        ({"dims": [1, 2]}, "dims"),
        ({"commit": 5}, "commit"),
    ],
)
def test_a_wrong_field_is_named(op_row, change, named):
    with pytest.raises(ValueError, match=named):
        check_row({**op_row, **change})


@pytest.mark.parametrize("field", sorted({*log.EVERY_ROW, *log.KINDS["op"]}))
def test_a_missing_field_is_named(op_row, field):
    with pytest.raises(ValueError, match=field):
        check_row({key: value for key, value in op_row.items() if key != field})


def test_every_kind_that_states_a_time_states_its_machine():
    for kind, fields in log.KINDS.items():
        if "ms_p50" in fields:
            assert log.FACTS.items() <= fields.items(), kind


def test_a_row_is_on_disk_before_the_next_step(tmp_path):
    file = Log(tmp_path, console=False)
    file.row("step", step=0)
    assert json.loads(file.path.read_text())["step"] == 0  # not closed, not flushed by us: a killed run keeps it
    file.close()


def test_a_half_written_line_does_not_spoil_the_next(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"schema": 1, "what": "st')
    with Log(tmp_path, console=False) as file:
        file.row("step", step=1)
    assert json.loads(file.path.read_text().splitlines()[1])["step"] == 1


def test_a_silent_log_writes_and_prints_nothing(capsys):
    with Log(None, console=False) as file:
        file.say("hello")
        assert file.row("step", step=0)["step"] == 0
    assert capsys.readouterr().out == ""


def test_a_wrong_row_is_refused_and_not_written(tmp_path):
    with Log(tmp_path, console=False) as file:
        with pytest.raises(ValueError, match="step"):
            file.row("step", loss=1.0)
        file.row("step", step=0)
    assert len(file.path.read_text().splitlines()) == 1


def test_the_facts_of_this_machine():
    facts = log.facts("cpu")
    assert facts["hardware"]["kind"] == "cpu"
    assert facts["hardware"]["cpu"]["cores"] >= 1
    assert facts["hardware"]["cpu"]["memory_bytes"] > 2**28
    assert facts["software"]["torch"] == torch.__version__
    assert facts["commit"] is None or (len(facts["commit"]) == 40 and isinstance(facts["dirty"], bool))
    assert facts["command"].startswith("python ")


def test_outside_git_the_commit_is_unknown_and_not_guessed(monkeypatch, tmp_path):
    monkeypatch.setattr(log.machine, "__file__", str(tmp_path / "gptfast" / "log" / "machine.py"))
    assert log.commit() == {"commit": None, "dirty": None}


def test_only_what_may_change_a_run_makes_the_checkout_dirty(monkeypatch, tmp_path):
    """Data, checkpoints and tokenizers that commands write into the checkout do not."""
    monkeypatch.setattr(log.machine, "__file__", str(tmp_path / "gptfast" / "log" / "machine.py"))
    for name in ("gptfast/log/machine.py", "README.md", "results/cpu/ops.jsonl", "tokenizer/x.json", "bench/new.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    for arguments in (["init", "-q"], ["add", "gptfast", "README.md", "results"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    assert log.commit()["dirty"] is True  # bench/new.py
    (tmp_path / "bench" / "new.py").unlink()
    (tmp_path / "results" / "cpu" / "ops.jsonl").write_text("2")
    assert log.commit()["dirty"] is False
    (tmp_path / "README.md").write_text("2")
    assert log.commit()["dirty"] is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU answers")
def test_without_a_gpu_there_is_no_gpu_state():
    assert log.gpu_state() is None
    assert log.gpu_limits() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads clocks and power of a CUDA device")
def test_gpu_facts_and_state():
    assert log.hardware("cuda")["name"] == torch.cuda.get_device_name()
    state = log.gpu_state()
    assert state is not None and state["sm_mhz"] > 0 and isinstance(state["throttle"], list)


def test_the_file_does_not_say_where_the_checkout_lies(tmp_path):
    root = Path(log.__file__).resolve().parents[2]
    with Log(tmp_path, name="rows.jsonl", console=False) as file:
        file.row("note", text=f"see {root}/results/cpu and {tmp_path}")
    assert json.loads((tmp_path / "rows.jsonl").read_text())["text"] == f"see results/cpu and {tmp_path}"


def test_tensorboard_gets_every_number_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            written.append(folder)

        def add_scalar(self, *scalar: object) -> None:
            written.append(scalar)

        def close(self) -> None:
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with Tracker("tensorboard", "--tracker=tensorboard", tmp_path, "project", "name", {}) as tracker:
        tracker.log({"iter": 3, "val/loss": 2.5, "mfu": None})
    assert written == [str(tmp_path / "tensorboard"), ("val/loss", 2.5, 3), "closed"]
