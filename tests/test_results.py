"""Result files: damaged, old or mixed ones are refused by name; comparison finds what changed and only that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import history, results
from bench.compare import main as compare_main
from gptfast.errors import UserError
from gptfast.log import SCHEMA, check_row

ROOT = Path(__file__).resolve().parents[1]


def row(
    ms: float = 1.0,
    *,
    spread: float = 0.01,
    machine: str = "NVIDIA H100",
    date: str = "2026-01-01T00:00:00+00:00",
    **more,
):
    return {
        "schema": SCHEMA, "what": "op", "date": date, "name": "layernorm", "impl": "triton", "direction": "forward",
        "dims": {"M": 4096, "N": 1024}, "dtype": "bfloat16", "ms_p20": ms * (1 - spread), "ms_p50": ms,
        "ms_p80": ms * (1 + spread), "ms_low": ms * (1 - spread / 2), "ms_high": ms * (1 + spread / 2), "n": 40,
        "hardware": {"name": machine}, "software": {"torch": "2.11.0"}, "commit": None, "dirty": None,
        "command": "python -m bench", **more,
    }  # fmt: skip


def write(path: Path, *rows: dict | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return path


def test_rows_are_read_back(tmp_path):
    path = write(tmp_path / "ops.jsonl", row(1.0), "", row(2.0, impl="torch"))
    assert [check_row(found)["ms_p50"] for found in results.read(path)] == [1.0, 2.0]
    assert len(results.read_all([tmp_path])) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"schema": 1, "what": "op", "da', r"ops\.jsonl:2: not JSON.*delete"),
        ("\x00\x00\x00", r"ops\.jsonl:2: not JSON"),
        ("[1, 2]", r"ops\.jsonl:2: .*JSON object"),
        (json.dumps(row(schema=0)), r"ops\.jsonl:2: row has schema 0, this version reads schema 1"),
        (json.dumps({k: v for k, v in row().items() if k != "schema"}), "schema missing"),
        (json.dumps({k: v for k, v in row().items() if k != "hardware"}), "'hardware' is missing"),
        (json.dumps(row(float("nan"))), "NaN is no JSON number"),
        (json.dumps(row(-1.0)), "out of order"),
        (json.dumps(row(machine="NVIDIA A100-SXM4-80GB")), "row 1 is from 'NVIDIA H100', row 2 from 'NVIDIA A100"),
    ],
)
def test_a_bad_file_is_refused_and_the_line_named(tmp_path, line, said):
    write(tmp_path / "ops.jsonl", row(), line)
    for read in (results.read, lambda path: results.read_all([path.parent])):
        with pytest.raises(UserError, match=said):
            read(tmp_path / "ops.jsonl")


def test_a_file_that_is_no_text_or_not_there(tmp_path):
    (tmp_path / "ops.jsonl").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(UserError, match="cannot be read as text"):
        results.read(tmp_path / "ops.jsonl")
    with pytest.raises(UserError, match="no such file"):
        results.read(tmp_path / "nothing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.jsonl"):
        results.read_all([tmp_path / "empty"])


def test_compacting_keeps_the_newest_of_each_thing(tmp_path):
    old, new = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
    path = write(tmp_path / "ops.jsonl", row(3.0, date=new), row(1.0, date=old), row(2.0, date=old, dtype="float32"))
    results.compact(path)
    assert [found["ms_p50"] for found in results.read(path)] == [1.0, 2.0]  # whatever the clock said
    assert list(tmp_path.iterdir()) == [path]


def test_a_machine_has_one_folder():
    assert results.slug({"name": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
    assert results.slug({"name": "Intel(R) Xeon(R) Processor (6-207-2)"}) == "intel-xeon-processor-6-207-2"


@pytest.mark.parametrize(
    ("new_ms", "spread", "verdict"),
    [(1.0, 0.01, "same"), (1.04, 0.001, "same"), (1.2, 0.01, "slower"), (0.8, 0.01, "faster"), (1.2, 0.5, "same")],
)
def test_a_change_needs_size_and_certainty(new_ms, spread, verdict):
    (change,) = results.compare([row(1.0, spread=spread)], [row(new_ms, spread=spread)], threshold=0.05)
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(new_ms)


def test_only_the_same_thing_is_compared():
    others = [
        row(9.0, impl="torch"),
        row(9.0, dims={"M": 1, "N": 1}),
        row(9.0, dtype="float32"),
        row(9.0, direction="both"),
    ]
    assert results.compare([row(1.0)], others) == []


def test_compare_exit_codes(tmp_path, capsys):
    old = str(write(tmp_path / "old.jsonl", row(1.0), row(1.0, impl="torch")))
    same = str(write(tmp_path / "same.jsonl", row(1.01), row(0.5, impl="torch")))
    slower = str(write(tmp_path / "slower.jsonl", row(1.5)))
    invalid = str(write(tmp_path / "invalid.jsonl", row(0.1, valid=False, invalid_reason="2 of the speed of light")))
    assert compare_main([old, same]) == 0
    assert "1 faster" in capsys.readouterr().out
    assert compare_main([old, slower]) == 1
    assert "slower    +50.0%" in capsys.readouterr().out
    assert compare_main([old, slower, "--threshold=0.6"]) == 0
    assert compare_main([old, invalid]) == 1  # not 'faster'


GRAPH = {"method": "graph of 64", "software": {"torch": "2.11.0"}, "state_after": {"sm_mhz": 1980, "throttle": []}}


@pytest.mark.parametrize(
    ("change", "peer_ms", "cause", "why"),
    [
        ({}, 1.0, "real", ""),
        ({}, 1.02, "real", ""),
        ({"method": "graph of 32"}, 1.0, "real", ""),
        ({"method": "events"}, 1.0, "method", "method was graph, is events"),
        ({"software": {"torch": "2.12.0"}}, 1.0, "versions", "torch 2.11.0 -> 2.12.0"),
        ({"state_after": {"sm_mhz": 1500, "throttle": []}}, 1.0, "hardware", "sm_mhz 1980 -> 1500"),
        ({"state_after": {"sm_mhz": 1980, "throttle": ["hot"]}}, 1.0, "hardware", "throttled: hot"),
        ({}, 1.45, "hardware", "peers moved by +45.0% as well"),
    ],
)
def test_a_slower_row_is_told_why(tmp_path, capsys, change, peer_ms, cause, why):
    old = str(write(tmp_path / "old.jsonl", row(1.0, **GRAPH), row(1.0, impl="torch", **GRAPH)))
    new = str(write(tmp_path / "new.jsonl", row(1.5, **{**GRAPH, **change}), row(peer_ms, impl="torch", **GRAPH)))
    summary = tmp_path / "summary.json"
    code = compare_main([old, new, f"--json={summary}", "--threshold=0.3"])
    assert code == (cause == "real")
    told = json.loads(summary.read_text())
    ours = next(c for c in told["changes"] if " triton " in c["label"])
    assert (ours["cause"], told["exit_code"]) == (cause, code) and why in ours["why"]
    assert f"[{cause}" in capsys.readouterr().out


def test_medians_apart_within_their_noise_are_noise(tmp_path, capsys):
    old, new = (str(write(tmp_path / f"{ms}.jsonl", row(ms, spread=0.5, **GRAPH))) for ms in (1.0, 1.2))
    assert compare_main([old, new]) == 0
    assert "[noise: the intervals" in capsys.readouterr().out


def test_history_goes_through_git_and_finds_what_moved(tmp_path, capsys):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "machine").mkdir()
    git("init", "-q")
    for day, ms in enumerate((1.0, 2.0, 0.5), 1):
        new = row(ms, date=f"2026-11-0{day}T00:00:00+00:00", commit=f"{day}" * 40)
        write(tmp_path / "machine" / "ops.jsonl", new, row(1.0, impl="torch"))
        git("add", "-A")
        git("commit", "-qm", "rows")
    cases = history.histories(history.through_git(tmp_path / "machine"))
    assert [[r["ms_p50"] for r in case] for case in cases] == [[1.0, 2.0, 0.5], [1.0]]
    assert history.main([str(tmp_path / "machine"), "--impl=triton"]) == 0
    said = capsys.readouterr().out
    assert "-50.0%" in said and "1111111..3333333" in said and (tmp_path / "machine" / "history-layernorm.png").exists()
    assert history.main([str(tmp_path / "machine"), "--plain"]) == 0
    with pytest.raises(UserError, match="no timed rows"):
        history.main([str(tmp_path / "machine"), "--name=attention"])


def test_machines_are_compared_only_when_asked(tmp_path):
    old = str(write(tmp_path / "old.jsonl", row(1.0)))
    other = str(write(tmp_path / "other.jsonl", row(2.0, machine="NVIDIA A100-SXM4-80GB")))
    with pytest.raises(UserError, match=r"different machines: NVIDIA H100 and NVIDIA A100.*--across"):
        compare_main([old, other])
    assert compare_main([old, other, "--across"]) == 1


def test_nothing_in_common_is_said(tmp_path):
    old = str(write(tmp_path / "old.jsonl", row(1.0)))
    new = str(write(tmp_path / "new.jsonl", row(1.0, impl="torch")))
    with pytest.raises(UserError, match="no measurement in common"):
        compare_main([old, new])


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_command_line_answers_without_a_traceback(tmp_path):
    broken = write(tmp_path / "broken.jsonl", "{")
    for arguments, said in (
        (["compare", str(broken), str(broken)], "broken.jsonl:1: not JSON"),
        (["opps"], "did you mean ops"),
    ):
        done = bench(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and said in done.stderr
        assert "Traceback" not in done.stderr


def test_help_lists_every_page_that_can_be_run():
    done = bench("--help")
    assert done.returncode == 0
    for name in ("compare", "mfu", "ops", "peaks"):
        assert f"\n  {name} " in done.stdout
