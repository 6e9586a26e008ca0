"""Rows of strangers: refused by line and field, or drawn inside the folder and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import plots, results
from gptfast import report
from gptfast.errors import UserError
from gptfast.log import LONGEST_NAME, Log
from gptfast.rows import code, file_name, markdown, parse

FACTS = {
    "hardware": {"kind": "cpu", "name": "Test", "cpu": {"threads": 2}}, "software": {"torch": "2.11.0"}, "commit": None,
    "dirty": False, "command": "python -m bench `rm` <b>",
}  # fmt: skip
TIMES = {"ms_p20": 1.0, "ms_p50": 1.0, "ms_p80": 1.0, "n": 3}
DATED = {"schema": 1, "date": "2026-01-01T00:00:00+00:00"}


def op(**fields: Any) -> dict[str, Any]:
    own = {"name": "layernorm", "impl": "triton", "direction": "both", "dims": {"M": 8, "N": 8}, "dtype": "float32"}
    sizes = {"flops": 1e6, "bytes": 1e6, "gbs": 5.0, "tflops": 0.1}
    return DATED | {"what": "op"} | own | TIMES | sizes | FACTS | fields


def model(**fields: Any) -> dict[str, Any]:
    own = {"name": "gpt2", "impl": "triton", "dtype": "float32", "dims": {"B": 1}, "tokens_per_s": 9.0, "rung": 1}
    return DATED | {"what": "model"} | own | TIMES | {"parameters": 10**6} | FACTS | fields


HOSTILE: list[tuple[dict[str, Any], str]] = [
    (op(name="a\0b"), "row.name is 'a.x00b', expected one line of printable"),
    (op(name="x" * 5000), "row.name has 5,000 characters"),
    (op(name=None), "'name' is None"),
    (op(gbs=1e308), "row.gbs is 1e[+]308, expected a finite number"),
    (op(flops=10**400), "row.flops is 1000.*expected a finite number"),
    (op(bytes="many"), "'bytes' is 'many', expected int or float or null"),
    (op(dims={"M": [1]}), "dims.'M' is .1., expected a number or a word"),
    (op(dims={"M" * 400: 1}), "which is no name"),
    (model(rung="first"), "'rung' is 'first'"),
    (model(parameters={}), "'parameters' is {}"),
    (op(hardware={"name": 5}), "hardware.name is 5"),
    (op(hardware={"name": "x", "cpu": {"threads": "2"}}), "hardware.cpu is"),
    (op(software={"torch": ["2"]}), "software.torch is"),
]


@pytest.mark.parametrize(("row", "said"), HOSTILE)
def test_a_row_that_cannot_be_drawn_is_named_by_line_and_field(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(op()) + "\n" + json.dumps(row) + "\n")
    for read in (results.read, lambda path: report.read([path])):
        with pytest.raises(UserError, match=rf"x\.jsonl:2: (not a row: )?.*{said}") as error:
            read(path)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_row_nested_without_end_is_no_row() -> None:
    with pytest.raises(ValueError, match="nested too deep"):
        parse('{"config":' * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        parse(json.dumps(op(config={"a": json.loads("[" * 20 + "]" * 20)})))


def test_every_row_that_is_written_is_read_back_whatever_its_names(tmp_path: Path) -> None:
    kernel = "void at::native::multi_tensor_apply_kernel<" + "at::native::TensorListMetadata<4>, " * 15
    names = [f"{kernel}{tail}" for tail in ("float>", "double>", "c10::BFloat16>\nand more")]
    text = "a note\n" * 100
    with Log(tmp_path, name="x.jsonl", console=False) as log:
        written = log.row(**op(
            name=names[0], dims={"M" * 400: 1, "N": 8}, kernels=[{"name": name, "ms": 1.0} for name in names],
            syncs=dict.fromkeys(names, 1.0), inexact=text,
        ))  # fmt: skip
    (row,) = results.read(tmp_path / "x.jsonl")
    assert row == written and row["inexact"] == text and row["dims"]["N"] == 8
    for cut in ([piece["name"] for piece in row["kernels"]], list(row["syncs"])):
        assert len(set(cut)) == 3, "different names stay apart"
        assert all(len(name) == LONGEST_NAME and name.startswith(kernel[:280]) and "…" in name for name in cut)
    assert row["name"] == row["kernels"][0]["name"] and row["name"] in row["syncs"], "and equal ones equal"


NAMES = ("../x", "a/b", "..", r"$\evil$", "| <script> [x](y) `z`", "_hidden", "é" * 100)


@pytest.mark.parametrize("name", ["../x", r"$\evil$ | <script> [x](y) `z`"])
def test_a_name_stays_a_name_wherever_it_is_shown(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "machine"
    folder.mkdir(parents=True)
    (tmp_path / "deep" / "x.png").write_text("mine")
    run = DATED | {"what": "run", "config": {"dataset": name}, "name": name} | FACTS
    step = DATED | {"what": "step", "step": 0, "loss": 1.0, "ms": 1.0, "tokens_per_s": 5.0}
    rows = [op(name=name, impl=name), model(name=name), model(name=name, impl="reference", rung=0)]
    (folder / "ops.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (run, step)))
    made = plots.figures(folder, *plots.read(folder))
    report.write_report(report.read([folder / "ops.jsonl", folder / "log.jsonl"]), folder)
    assert len(made) == 4 and all(path.parent == folder and path.is_file() for path in made)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent != folder) == ["deep", "machine", "x.png"]
    assert (tmp_path / "deep" / "x.png").read_text() == "mine"
    shown = (folder / "report.md").read_text()
    assert "<script>" not in shown and "<b>" not in shown.replace("`` python -m bench `rm` <b> ``", "")
    for line in shown.splitlines():
        if line.startswith("!["):
            assert (folder / line[line.rindex("(") + 1 : -1]).is_file()


def test_a_figure_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "op-layernorm.png").symlink_to(tmp_path / "mine")
    plots.figures(tmp_path / "machine", [op()], [])
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "machine" / "op-layernorm.png").is_symlink()


def test_rows_that_lack_what_a_figure_shows_are_left_out_of_it(tmp_path: Path) -> None:
    bare = {key: value for key, value in op(name="bare").items() if key not in ("flops", "bytes", "gbs", "tflops")}
    without_peak = model(mfu=0.1, rung=None, ms_p20=0.0, ms_p50=0.0, ms_p80=0.0)
    made = plots.figures(tmp_path, [bare, without_peak, op(gbs=None, tflops=None)], [])
    assert [path.name for path in made] == ["model-tokens.png"]
    assert "bare" not in plots.ops_table([bare | {"hardware_name": "Test"}])


def test_names_of_files_are_plain_and_tell_names_apart() -> None:
    assert file_name("linear_cross_entropy") == "linear_cross_entropy" and file_name("gpt2-xl") == "gpt2-xl"
    names = [file_name(name) for name in (*NAMES, "a-b", "a b", "", ".", "x" * 5000)]
    assert len(set(names)) == len(names) and all(name.strip("-.") and len(name) < 100 for name in names)
    assert not any(set(name) & set("/\\\0 ") for name in names)


def test_words_of_markdown_are_words() -> None:
    assert markdown("a|b <i> `c` [d](e)\nf*") == r"a\|b &lt;i&gt; \`c\` \[d\](e) f\*"
    assert code("a ``b` c") == "``` a ``b` c ```" and code("plain") == "`plain`"
