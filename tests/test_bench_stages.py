"""The stages of `python -m bench`: their pages, flags and budgets, how each ends, and the rows that come home."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from bench import __main__ as campaign
from bench import decode, merge, results, stages
from bench.stages import SETS, Stage
from gptfast.errors import UserError
from gptfast.log import Log, facts

EVERY = {**SETS, "cpu": stages.CPU}
QUIET = Stage("version", 60, module="platform", flags=())


def test_campaign_stages_are_pages_that_exist():
    for name, those in EVERY.items():
        names = [stage.name for stage in campaign.chosen(those, None)]
        assert names == [stage.name for stage in those] and len({*names}) == len(names), name
    assert stages.GPU[0].name == stages.CPU[0].name == "peaks"
    assert [stage.name for stage in campaign.chosen(stages.GPU, "ops,peaks")] == ["peaks", "ops"]
    with pytest.raises(UserError, match="did you mean peaks"):
        campaign.chosen(stages.GPU, "peak")


@pytest.mark.parametrize(
    "name, quick, minutes, worthiest",
    [
        ("campaign", False, 9, {"peaks", "ops", "model"}), ("campaign", True, 4, {"peaks", "ops", "model"}),
        ("proof", False, 8.5, {"tests", "gluon"}), ("proof", True, 4, {"tests", "gluon", "columns"}),
        ("large", False, 9, {"model", "profile", "decode"}), ("large", True, 4.5, {"model", "profile", "decode"}),
    ],
)  # fmt: skip
def test_the_budgets_of_a_set_add_up(name, quick, minutes, worthiest):
    """Each page's own budget ends it before it is stopped; what matters most has begun after four minutes."""
    chosen = campaign.chosen(SETS[name], None, quick)
    assert sum(stage.seconds(quick) for stage in chosen) <= 60 * minutes
    before = itertools.accumulate(stage.seconds(quick) for stage in chosen)
    begun = [chosen[0].name] + [stage.name for stage, at in zip(chosen[1:], before, strict=False) if at < 4 * 60]
    assert worthiest <= set(begun)
    for stage in (*chosen, *stages.CPU):
        last = [flag for flag in stage.command(quick, Path("x")) if flag.startswith("--budget_s=")][-1:]
        assert all(float(flag.partition("=")[2]) <= stage.seconds(quick) - 10 for flag in last), stage


def test_the_flags_of_every_stage_are_those_of_its_page(capsys):
    flags: dict[str, set[str]] = {}
    for stage in itertools.chain(*EVERY.values()):
        if not stage.module:
            mine = {flag.partition("=")[0] for flag in (*stage.flags, *(stage.quick or ()))}
            flags[stage.page or stage.name] = flags.get(stage.page or stage.name, set()) | mine
    for page, mine in flags.items():
        with pytest.raises(SystemExit):
            campaign.main([page, "--help"])
        known = set(re.findall(r"--[a-z_-]+", capsys.readouterr().out.partition("options:")[2]))
        assert mine <= known, page


def test_a_page_that_does_not_even_die_holds_nobody_up(monkeypatch):
    class Hung:
        def __init__(self) -> None:
            self.told = []

        def send_signal(self, number):
            self.told.append(number)

        def wait(self, timeout=None):
            assert timeout is not None, "waits for ever"
            raise subprocess.TimeoutExpired("bench", timeout)

        def kill(self):
            self.told.append("kill")

    hung = Hung()
    stages.stop(hung)
    assert hung.told == [signal.SIGINT, "kill"]


def test_a_stage_says_how_it_ended(tmp_path):
    short = stages.Stage("version", 60, module="platform", flags=())
    assert stages.run_stage(short, False, tmp_path) == "done"
    missing = stages.Stage("nothing", 60, module="no_such_module", flags=())
    assert stages.run_stage(missing, False, tmp_path) == "failed with exit code 1"
    slow = stages.Stage("slow", 0.5, module="http.server", flags=())  # which serves until it is stopped
    assert "stopped after its 0 s" in stages.run_stage(slow, False, tmp_path)


def test_kernels_that_no_gpu_has_run_come_last_and_by_name():
    *before, last = stages.GPU  # where one that never ends costs nothing but itself
    assert last.page == "ops" and "--variants=gluon" in last.flags
    assert not any("--variants" in flag for stage in before for flag in stage.flags)
    named = {name for stage in stages.PROOF for flag in stage.flags if "--variants" in flag
             for name in flag.partition("=")[2].split(",")}  # fmt: skip
    assert named == {*decode.asked_for()}


def test_a_set_for_a_gpu_says_so_without_one_and_shows_its_commands(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--set=proof needs a CUDA device"):
        campaign.main(["--set=proof"])
    assert campaign.main(["--set=proof", "--dry_run", "--only=tests,gluon"]) == 0
    shown = capsys.readouterr().out
    assert "-m pytest -q -m gpu" in shown and "--variants=gluon" in shown and "memcheck" not in shown


def test_no_stage_starts_that_would_end_too_late(tmp_path):
    long = Stage("long", 90, module="platform", flags=())
    ends = dict(stages.run_stages([long, QUIET], False, tmp_path, minutes=1.1))
    assert ends["long"] == "left out: its 90 s would end after --minutes=1.1" and ends["version"] == "done"
    with pytest.raises(UserError, match="--minutes=0 must be above 0"):
        campaign.main(["--minutes=0"])


def test_everything_to_take_along_is_in_one_file_after_every_stage(tmp_path, capfd, monkeypatch):
    rows, archive = tmp_path / "rows", tmp_path / "rows" / "all.tar.gz"
    monkeypatch.setattr(stages, "LARGEST_PACKED", 1000)
    fails = Stage("fails", 60, module="no_such_module", flags=())
    seen = []
    rows.mkdir()
    (rows / "ops.jsonl").write_text("{}")
    (rows / "trace.json.gz").write_bytes(bytes(1001))
    for _ in stages.run_stages([QUIET, fails], False, rows, archive):
        with tarfile.open(archive) as packed:
            seen.append(packed.getnames())
            last = packed.extractfile(seen[-1][-1]).read().decode()
    assert seen == [["logs/version.log", "ops.jsonl"], ["logs/fails.log", "logs/version.log", "ops.jsonl"]]
    assert last == "{}" and not list(rows.glob(".tmp*"))
    assert "No module named no_such_module" in (rows / "logs" / "fails.log").read_text()
    assert "No module named no_such_module" in capfd.readouterr().out


# ---- rows that come home ---------------------------------------------------------------------------------------------
ROW = {
    "what": "op", "name": "rmsnorm", "impl": "triton", "direction": "forward", "dims": {"M": 8}, "dtype": "bfloat16",
    "ms_p20": 1.0, "ms_p50": 1.0, "ms_p80": 1.0, "n": 3, "method": "by hand",
}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """written(folder, ms, **fields): an op's row of `ms` in ops.jsonl of a folder below tmp_path."""
    where = facts("cpu")

    def write(folder: str, ms: float, **fields) -> Path:
        with Log(tmp_path / folder, name="ops.jsonl", console=False) as log:
            log.row(**ROW | where | {"ms_p20": ms, "ms_p50": ms, "ms_p80": ms} | fields)
        return tmp_path / folder

    return write


def medians(folder: Path) -> dict[str, float]:
    return {row["name"]: row["ms_p50"] for row in results.read(folder / "ops.jsonl")}


def test_the_newer_of_two_rows_counts_wherever_it_was_written(written, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(merge.plots, "main", lambda argv: drawn.append(argv) or 0)
    there = tmp_path / "root" / results.slug(facts("cpu")["hardware"])
    written(str(there.relative_to(tmp_path)), 2.0, date="2026-01-02T00:00:00+00:00")
    old = written("old", 3.0, date="2026-01-01T00:00:00+00:00")
    written("old", 5.0, name="rotary")
    assert merge.main([str(old), f"--root={tmp_path / 'root'}"]) == 0
    assert medians(there) == {"rmsnorm": 2.0, "rotary": 5.0} and drawn == [[f"--out={there}"]]
    assert "1 rows into" in (out := capsys.readouterr().out) and "1 are older" in out
    new = written("new", 1.0)
    assert merge.main([str(new), f"--root={tmp_path / 'root'}"]) == 0
    assert medians(there) == {"rmsnorm": 1.0, "rotary": 5.0}


def test_notes_and_invalid_rows_stay_behind_and_are_named(written, tmp_path, capsys):
    folder = written("brought", 1.0)
    written("brought", 9.0, name="rotary", valid=False, invalid_reason="too fast")
    with Log(folder, name="ops.jsonl", console=False) as log:
        log.row("note", name="layernorm", text="failed")
    assert merge.main([str(folder), f"--root={tmp_path / 'root'}"]) == 0
    (there,) = (tmp_path / "root").iterdir()
    assert medians(there) == {"rmsnorm": 1.0}
    out = capsys.readouterr().out
    assert "note on layernorm" in out and "rotary forward bfloat16 triton M=8, invalid: too fast" in out


def test_rows_without_a_commit_are_given_one_or_refused(written, tmp_path):
    folder = written("brought", 1.0, commit=None, dirty=None)
    root = f"--root={tmp_path / 'root'}"
    with pytest.raises(UserError, match="1 rows say no commit; name it by --commit"):
        merge.main([str(folder), root])
    with pytest.raises(UserError, match="--commit=head: expected 7 to 40 digits"):
        merge.main([str(folder), root, "--commit=head"])
    assert not (tmp_path / "root").exists()
    assert merge.main([str(folder), root, "--commit=470b760"]) == 0
    (there,) = (tmp_path / "root").iterdir()
    assert [row["commit"] for row in results.read(there / "ops.jsonl")] == ["470b760"]


def test_a_folder_without_rows_has_nothing_to_bring(tmp_path):
    with pytest.raises(UserError, match="no \\.jsonl file there"):
        merge.main([str(tmp_path)])
