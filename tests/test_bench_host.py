"""The page that times the host: launches are counted, what Python costs is seen, and nothing else."""

import dataclasses
import time

import pytest

import kernels
from bench import host, results
from gptfast.errors import UserError


def test_rows_hold_launches_and_times(tmp_path):
    assert host.main(["--ops=rmsnorm,newton_schulz", f"--out={tmp_path}"]) == 0
    rows = {(row["name"], row["direction"]): row for row in results.read(tmp_path / "host.jsonl")}
    assert set(rows) == {("rmsnorm", "forward"), ("rmsnorm", "backward"), ("newton_schulz", "forward")}
    assert rows["rmsnorm", "forward"]["launches"] == 1
    assert rows["newton_schulz", "forward"]["launches"] > 10  # three products for each of the steps
    assert 0 < rows["rmsnorm", "forward"]["ms_p50"] < 1


def test_slow_python_is_seen(monkeypatch):
    def slow(*arguments):
        time.sleep(1e-3)
        return kernels.OPS["rmsnorm"].triton(*arguments)

    monkeypatch.setattr(host, "SAMPLES", 3)
    monkeypatch.setattr(host, "CALLS", 2)
    op = dataclasses.replace(kernels.OPS["rmsnorm"], triton=slow)
    with host.launching(host.Count().launcher):
        forward = host.calls(op, host.short(dict(op.bench[0])), host.torch.bfloat16)["forward"]
        assert min(host.samples(forward)) >= 1000  # microseconds


def test_an_unknown_op_is_named():
    with pytest.raises(UserError, match="rmsnorn"):
        host.main(["--ops=rmsnorn"])
