"""The tuner: entries are put back, only clean candidates are raced, and only a right and faster one wins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernels
from bench import tune
from bench.ops import Case
from bench.timing import Settings, Verdict, summarize
from bench.tune import Trial, climb, direction_of, distinct, entries, main, neighbours, read_dims, short
from gptfast.errors import UserError
from gptfast.log import Log, facts
from kernels.cross_entropy.rows import TILES as CROSS_ENTROPY_TILES
from kernels.layernorm import TILES
from kernels.prims import RowTile

pytestmark = pytest.mark.triton

LAYERNORM = kernels.OPS["layernorm"]
SMALL = dict(M=64, N=4096)
FORWARD = next(entry for entry in entries(LAYERNORM) if str(entry) == "layernorm.forward")
START = FORWARD.value.per_warp


def test_entries_are_the_leaves_of_a_page_or_of_its_package():
    backward = [f"layernorm.backward.{length}" for length in TILES["backward"]]
    assert [str(entry) for entry in entries(LAYERNORM)] == ["layernorm.forward", *backward]
    found = [str(entry) for entry in entries(kernels.OPS["attention"])]
    assert "forward.90.128" in found and "backward.dq.80.64" in found
    for name in ("cross_entropy", "linear_cross_entropy"):
        (rows,) = entries(kernels.OPS[name])
        with rows.holding(rows.value._replace(per_warp=1)):
            assert CROSS_ENTROPY_TILES["rows"].per_warp == 1  # one table, whichever page it is tuned through


def test_an_entry_is_put_back_whatever_happens():
    before = TILES["forward"]
    with pytest.raises(RuntimeError), FORWARD.holding(before._replace(per_warp=1)):
        assert TILES["forward"].per_warp == 1
        raise RuntimeError
    assert TILES["forward"] == before


def test_neighbours_are_one_step_away():
    assert neighbours(64) == [32, 128] and neighbours(1) == [2] and neighbours(True) == [False]
    assert neighbours(RowTile(1, 64, 32, False)) == [
        RowTile(2, 64, 32, False), RowTile(1, 32, 32, False), RowTile(1, 128, 32, False), RowTile(1, 64, 16, False),
        RowTile(1, 64, 32, True),
    ]  # fmt: skip
    assert neighbours(3, "num_stages") == [2, 4]
    assert short(RowTile(1, 64, 32)) == "RowTile(block_m=1, block_n=64, num_warps=32, long=False)"


def test_only_what_changes_the_launches_is_tried():
    found = distinct(LAYERNORM, SMALL, 80, torch.bfloat16, FORWARD)
    assert {value.per_warp for value in found} == {FORWARD.value.per_warp // 2, FORWARD.value.per_warp * 2}
    assert {value.long for value in found} == {FORWARD.value.long}  # no row of 4096 is long
    assert tune.changed_kernels(LAYERNORM, SMALL, 80, torch.bfloat16, FORWARD) == ["layernorm_fwd_kernel"]


def test_a_candidate_that_spills_breaks_the_gates():
    spilling = FORWARD.value._replace(per_warp=8192)  # one warp holds a row of 8192
    tried = tune.trial(LAYERNORM, dict(M=8, N=8192), 80, torch.bfloat16, FORWARD, spilling)
    assert any("layernorm_fwd_kernel: spills" in gate for gate in tried.broken)
    assert "spills" in tune.describe(tried)


def test_the_direction_to_time_is_that_of_the_kernels_that_change():
    assert direction_of(["x_fwd_kernel"]) == "forward" and direction_of(["x_bwd_kernel_dq"]) == "backward"
    assert direction_of(["x_fwd_kernel", "x_bwd_kernel"]) == "both"


@pytest.fixture
def imagined(monkeypatch) -> dict[str, Any]:
    """Kernels whose speed, gates and answers are made up: by per_warp of the entry."""
    world: dict[str, Any] = {
        "ms": lambda value: 1.0,
        "broken": lambda value: False,
        "right": lambda value: True,
        "raced": [],
    }

    def trial(op, dims, arch, dtype, entry, value):
        return Trial(value, (), ("spills",) if world["broken"](value) else (), (), ())

    def race(case, entry, values, settings):
        world["raced"] += [value.per_warp for value in values]
        verdict = lambda value: Verdict(0.0, 0.1, None if world["right"](value) else "output 0 is wrong")
        jitter = [1 + 0.001 * (i % 5) for i in range(40)]
        return [(summarize([world["ms"](v) * j for j in jitter], method="made up"), verdict(v)) for v in values]

    monkeypatch.setattr(tune, "trial", trial)
    monkeypatch.setattr(tune, "race", race)
    return world


def climbed(tmp_path) -> tuple[int, list[dict]]:
    from bench.results import read

    case = Case(LAYERNORM, SMALL, "bfloat16", "forward", torch.device("cpu"))
    with Log(tmp_path, name="tune.jsonl", console=False) as log:
        best = climb(case, 80, FORWARD, Settings(), log, facts("cpu"))
    path = tmp_path / "tune.jsonl"
    return best.per_warp, read(path) if path.stat().st_size else []


def test_the_search_walks_to_the_fastest_and_writes_what_it_timed(tmp_path, imagined):
    imagined["ms"] = lambda value: {START: 1.0, START // 2: 0.8, START // 4: 0.7}.get(value.per_warp, 2.0)
    best, rows = climbed(tmp_path)
    assert best == START // 4
    assert {row["what"] for row in rows} == {"tune"} and [row["current"] for row in rows].count(True) == 1
    assert all(row["entry"] == "layernorm.forward" and "RowTiles(" in row["tile"] for row in rows)
    assert TILES["forward"].per_warp == START, "the page is as it was"


def test_what_breaks_a_gate_is_not_raced(tmp_path, imagined):
    imagined["ms"] = lambda value: 1.0 if value.per_warp == START else 0.1
    imagined["broken"] = lambda value: value.per_warp < START
    assert climbed(tmp_path)[0] == 2 * START and START // 2 not in imagined["raced"]


def test_a_wrong_answer_does_not_win(tmp_path, imagined):
    imagined["ms"] = lambda value: 0.1 if value.per_warp == START // 2 else 1.0
    imagined["right"] = lambda value: value.per_warp != START // 2
    best, rows = climbed(tmp_path)
    assert best == START and [row["valid"] for row in rows if f"per_warp={START // 2}" in row["tile"]] == [False]


def test_a_gain_within_the_noise_changes_nothing(tmp_path, imagined):
    imagined["ms"] = lambda value: 1.0 if value.per_warp == START else 0.995
    assert climbed(tmp_path)[0] == START


def test_the_line_to_commit_names_gpu_date_and_command():
    case = Case(LAYERNORM, SMALL, "bfloat16", "forward", torch.device("cpu"))
    common = {"hardware": {"name": "NVIDIA Test"}, "command": "python -m bench tune layernorm"}
    line = tune.line_to_commit(FORWARD, FORWARD.value, case, common)
    assert line.startswith("kernels.layernorm: TILES['forward'] = RowTiles(whole=")
    assert "# NVIDIA Test, 20" in line and "forward bfloat16 M=64 N=4096: `python -m bench tune layernorm`" in line


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_the_line_to_commit_names_the_table_that_two_pages_share(name):
    case = Case(kernels.OPS[name], kernels.OPS[name].bench[0], "bfloat16", "forward", torch.device("cpu"))
    (rows,) = entries(kernels.OPS[name])
    line = tune.line_to_commit(rows, rows.value, case, {"hardware": {"name": "a GPU"}, "command": "tune"})
    assert line.startswith("kernels.cross_entropy.rows: TILES['rows'] = RowTiles(")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_gates_are_shown_and_no_speed_is_claimed(capsys):
    assert main(["layernorm", "--entry=layernorm.forward", "--dims=M=64,N=4096", "--arch=80"]) == 0
    said = capsys.readouterr().out
    assert said.count("sm_80 layernorm.forward RowTiles(") == 1 + len(
        distinct(LAYERNORM, SMALL, 80, torch.bfloat16, FORWARD)
    )
    assert "clean" in said and "in no order of speed" in said and "needs a GPU" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["layernrm"], "nothing to tune under the name layernrm"),
        (["layernorm", "--dims=Q=3"], "--dims=Q=3: expected M=number,N=number"),
        (["layernorm", "--entry=sideways"], "there are layernorm.forward, layernorm.backward"),
        (["layernorm", "--arch=75"], "sm_75: the gates know sm_80"),
    ],
)
def test_mistakes_are_said(argv, message):
    if argv[-1].startswith("--arch") and torch.cuda.is_available():
        argv = ["layernrm"]
        message = "nothing to tune"
    with pytest.raises(UserError, match=message):
        main(argv)


def test_dims_are_read_onto_the_first_bench_size():
    assert read_dims("M=8", SMALL) == {"M": 8} and read_dims(None, SMALL) == {}
