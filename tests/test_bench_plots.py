"""Figures and tables of the bench: from valid rows of one machine, with what they must name, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import figures, plots
from bench.plots import main
from gptfast import report

GPU, OTHER = "NVIDIA Test 80GB", "Some CPU (6-1-2)"


def row(what: str, machine: str = GPU, /, **fields: Any) -> dict[str, Any]:
    facts = {
        "hardware": {"kind": "cuda", "name": machine}, "software": {"torch": "2.11.0"}, "commit": "0123456789abcdef",
        "dirty": False, "command": "python -m bench",
    }  # fmt: skip
    return {"schema": 1, "what": what, "date": "2026-11-21T01:02:03+00:00", **fields, **facts}


def times(ms: float) -> dict[str, Any]:
    return {"ms_p20": ms, "ms_p50": ms, "ms_p80": ms, "n": 40}


def op(impl: str, M: int, gbs: float, direction: str = "both", machine: str = GPU, **fields: Any) -> dict[str, Any]:
    size = 4 * M * 768
    return row(
        "op", machine, name="layernorm", impl=impl, direction=direction, dims={"M": M, "N": 768},
        dtype="bfloat16", **times(size / gbs / 1e6), flops=8 * M * 768, bytes=size, gbs=gbs, tflops=gbs / 500,
        roofline=gbs / 3350, roofline_source="datasheet of Test", **fields,
    )  # fmt: skip


def model(impl: str, tokens_per_s: float, rung: int | None = None, name: str = "gpt2", **fields: Any) -> dict[str, Any]:
    known = {"mfu": tokens_per_s / 1e6, "mfu_palm": tokens_per_s / 0.9e6, "hfu": tokens_per_s / 0.95e6}
    peak = {"peak_flops": 989e12, "peak_kind": "datasheet", "peak_device": "Test SXM", "memory_bytes": 3 << 30}
    return row(
        "model", name=name, impl=impl, dtype="bfloat16", dims={"B": 32, "T": 1024}, **times(32768 / tokens_per_s * 1e3),
        tokens_per_s=tokens_per_s, parameters=124_000_000, rung=rung, **known | peak | fields,
    )  # fmt: skip


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def pngs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


@pytest.fixture
def drawn(monkeypatch) -> dict[str, Any]:
    """The figures that a test saves, by file name, still open to questions."""
    figures: dict[str, Any] = {}
    save = report.save_figure

    def remember(figure: Any, path: Path, *rest: Any, **more: Any) -> Path:
        figures[path.name] = figure
        return save(figure, path, *rest, **more)

    monkeypatch.setattr(report, "save_figure", remember)
    return figures


def texts(figure: Any) -> str:
    import matplotlib.text

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


RUNGS = [model("reference", 100e3, 0), model("+layernorm", 150e3, 1), model("triton", 200e3, 2)]


def test_an_op_is_drawn_along_its_growing_axis_beside_its_peers_under_its_roofline(tmp_path, drawn):
    rows = [op("triton", 4096, 2000.0), op("torch", 4096, 1000.0), op("triton", 64, 500.0), op("triton", 512, 900.0)]
    rows.append(op("torch", 64, 9e9, valid=False, invalid_reason="faster than light"))
    assert main([f"--out={write(tmp_path, 'ops.jsonl', rows)}"]) == 0
    (axis,) = drawn["op-layernorm.png"].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert lines["triton"] == [500.0, 900.0, 2000.0] and lines["torch"] == [1000.0]
    (roof,) = [list(line.get_ydata()) for line in axis.lines if line.get_linestyle() == "--"]
    assert roof == [pytest.approx(3350)] * 3
    assert axis.get_ylabel() == "GB/s" and axis.get_xscale() == "log" and axis.get_xlabel() == "M"
    assert "layernorm, GB/s\nNVIDIA Test 80GB · bfloat16 · 2026-11-21" in texts(drawn["op-layernorm.png"])
    assert [t.get_text() for t in axis.get_xticklabels()] == ["64", "512", "4k"]
    for fact in (
        GPU,
        "2026-11-21",
        "commit 0123456789",
        "forward + backward; N=768",
        "datasheet of Test",
        "bytes that must be moved",
        "2.00x",
    ):
        assert fact in texts(drawn["op-layernorm.png"])


def test_sizes_that_are_each_of_their_own_are_bars():
    sizes = [dict(M=8, N=4, K=2), dict(M=8, N=16, K=3)]
    assert figures.series(sizes) == (None, {}, sizes)
    layers = [dict(B=16384 // T, T=T, S=T, H=32, D=64) for T in (512, 4096, 1024)] + [
        dict(B=1, T=1024, S=1024, H=1, D=1)
    ]
    axis, lines, alone = figures.series(layers)
    assert axis == "T" and [dims["T"] for dims in lines["H=32 D=64"]] == [512, 1024, 4096] and alone == layers[3:]

    matrices = [dict(B=3, M=M, N=N) for M, N in ((384, 768), (256, 1024), (384, 1536), (400, 1600))]
    assert figures.series(matrices) == (None, {}, matrices), "their M follows no law"


def bars_of(axis) -> list[tuple[float, str]]:
    """(length, what stands at its end) of horizontal bars, from above."""
    return [(bar.get_width(), text.get_text()) for bar, text in zip(axis.patches, axis.texts, strict=True)]


def test_bars_are_named_ours_first_and_growing_each_panel_on_its_own_scale(tmp_path, drawn):
    rows = [op("torch", 4096, 1000.0), op("triton", 4096, 2000.0), op("torch", 64, 20.0), op("triton", 64, 10.0)]
    rows += [{**op(impl, 64, gbs), "direction": "forward"} for impl, gbs in (("triton", 40.0), ("torch", 20.0))]
    main([f"--out={write(tmp_path, 'ops.jsonl', rows)}"])
    forward, both = drawn["op-layernorm.png"].axes
    assert bars_of(both) == [
        (10.0, "triton 10, 0.50x"), (20.0, "torch 20"), (2000.0, "triton 2,000, 2.00x"), (1000.0, "torch 1,000")
    ]  # fmt: skip
    assert [label.get_text() for label in both.get_yticklabels()] == ["M=64", "M=4096"]
    assert [list(line.get_xdata()) for line in both.lines] == [[pytest.approx(3350)] * 2] * 2
    assert forward.get_xlim()[1] < 60 and forward.get_xlabel() == "GB/s; beyond the axis: roofline 3,350"
    for axis in (forward, both):
        ends = [text.get_window_extent().x1 for text in axis.texts]
        assert max(ends) <= axis.get_window_extent().x1, "what stands at a bar's end leaves the panel"


def test_a_line_has_its_points_in_each_dtype(tmp_path, drawn):
    rows = [op("triton", M, 9.0) for M in (1, 2, 3)] + [{**op("triton", 4, 9.0), "dtype": "float32"}]
    main([f"--out={write(tmp_path, 'ops.jsonl', rows)}"])
    assert [len(axis.patches) for axis in drawn["op-layernorm.png"].axes] == [3, 1]


def test_axes_with_powers_of_ten_have_plain_numbers(tmp_path, drawn):
    main([f"--out={write(tmp_path, 'ops.jsonl', [op('triton', 64, 10.0), op('triton', 4096, 2000.0)])}"])
    (axis,) = drawn["roofline-ops.png"].axes
    labels = [t.get_text() for t in (*axis.get_xticklabels(which="both"), *axis.get_yticklabels(which="both"))]
    assert "0.1" in labels and not [label for label in labels if "$" in label or "\\" in label]


def test_what_only_the_reference_was_timed_beside_is_drawn_hollow(tmp_path, drawn):
    rows = [op("triton", 64, 20.0), op("reference", 64, 10.0)]
    main([f"--out={write(tmp_path / 'alone', 'ops.jsonl', rows)}"])
    assert "no peer but the plain PyTorch reference" in texts(drawn["overview.png"])
    assert drawn["overview.png"].axes[0].patches[0].get_facecolor()[:3] == (1.0, 1.0, 1.0)
    rows += [op("triton", 4096, 30.0), op("torch", 4096, 10.0)]
    main([f"--out={write(tmp_path / 'both', 'ops.jsonl', rows)}"])
    left = drawn["overview.png"].axes[0]
    assert [list(line.get_xdata()) for line in left.lines if line.get_marker() == "."] == [[pytest.approx(3.0)]]


def test_decoding_is_drawn_with_and_without_the_time_of_the_prompt(tmp_path, drawn):
    made = lambda impl, ttft, tpot, rate: row("decode", name="gpt2", impl=impl, dtype="bfloat16", **times(tpot),
        dims={"B": 1, "prompt": 960, "new": 64}, ttft_ms=ttft, tpot_ms=tpot, tokens_per_s=rate)  # fmt: skip
    rows = [
        made("naive", 10.0, 20.0, 50.0),
        made("torch.compile", 10.0, 0.5, 1500.0),
        made("engine", 20.0, 0.4, 1400.0),
    ]
    main([f"--out={write(tmp_path, 'decode.jsonl', rows)}"])
    first, after, whole = drawn["decode-gpt2.png"].axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["engine", "torch.compile", "naive"]
    assert [length for length, _ in bars_of(first)] == [20.0, 10.0, 10.0]
    assert [length for length, _ in bars_of(after)] == [pytest.approx(2500), pytest.approx(2000), pytest.approx(50)]
    assert bars_of(whole)[0] == (1400.0, "1,400") and "960" in texts(drawn["decode-gpt2.png"])


def test_peers_that_ran_the_same_code_are_told_once():
    rows = [op("triton", 64, 100.0), op("sdpa", 64, 50.5), op("sdpa cudnn", 64, 50.0), op("sdpa flash", 64, 30.0)]
    told = [row["impl"] for row in figures.same_code_once(rows)]
    assert told == ["triton", "sdpa cudnn = sdpa", "sdpa flash"]
    rows[1]["ms_p50"] *= 1.2
    assert len(figures.same_code_once(rows)) == 4


def test_the_overview_has_the_ratio_to_the_best_peer_and_the_rooflines_a_point_a_row(tmp_path, drawn):
    rows = [op("triton", 4096, 2000.0), op("torch", 4096, 1000.0), op("liger", 4096, 1600.0)]
    assert main([f"--out={write(tmp_path, 'ops.jsonl', rows)}"]) == 0
    left, right = drawn["overview.png"].axes
    assert [bar.get_x() + bar.get_width() for bar in left.patches] == [pytest.approx(1.25)]
    assert [bar.get_width() for bar in right.patches] == [pytest.approx(100 * rows[0]["roofline"])]
    (axis,) = drawn["roofline-ops.png"].axes
    (x,), (y,) = axis.lines[0].get_data()
    assert (x, y) == (rows[0]["flops"] / rows[0]["bytes"], rows[0]["flops"] / rows[0]["ms_p50"] / 1e9)


def test_labels_keep_what_tells_sizes_apart():
    assert figures.told_apart(["B=1 T=1 D=64", "B=1 T=1 D=80"]) == (["D=64", "D=80"], ["B=1", "T=1"])
    assert figures.told_apart(["M=5 N=7"]) == (["M=5 N=7"], [])
    assert figures.told_apart(["M=5", "M=7 weight=False"]) == (["M=5", "M=7 weight=False"], [])


def test_products_are_shown_in_flops(tmp_path, drawn):
    rows = [{**op("triton", 64, 10.0), "flops": 10**12}]
    main([f"--out={write(tmp_path, 'ops.jsonl', rows)}"])
    assert drawn["op-layernorm.png"].axes[0].get_xlabel().startswith("TFLOP/s; beyond the axis")  # one size is a bar


def test_the_ladder_has_its_rungs_in_order_with_times_and_gains(tmp_path, drawn):
    main([f"--out={write(tmp_path, 'model.jsonl', [RUNGS[2], RUNGS[0], RUNGS[1], model('torch.compile', 120e3)])}"])
    (axis,) = drawn["ladder-gpt2.png"].axes
    assert [t.get_text() for t in axis.get_yticklabels()] == ["reference", "+layernorm", "triton"]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([10.0, 15.0, 20.0])
    assert "2.00x" in texts(drawn["ladder-gpt2.png"]) and "989 TFLOP/s, datasheet: Test SXM" in axis.get_xlabel()
    assert "causal attention counted once" in texts(drawn["ladder-gpt2.png"])


def test_models_show_both_conventions_and_no_rung_between(tmp_path, drawn):
    main([f"--out={write(tmp_path, 'model.jsonl', [*RUNGS, model('torch.compile', 120e3)])}"])
    (axis,) = drawn["model-mfu.png"].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["triton", "torch.compile", "reference"]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([20.0, 12.0, 10.0])
    assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx([200 / 9, 120 / 9, 100 / 9])
    assert bars_of(axis)[0][1] == "20.0 %, mfu_palm 22.2 %"
    assert "12·L·H·Q·T" in texts(drawn["model-mfu.png"]) and "datasheet: Test SXM" in texts(drawn["model-mfu.png"])
    assert [bar.get_width() for bar in drawn["model-tokens.png"].axes[0].patches] == [200e3, 120e3, 100e3]


def test_without_a_peak_there_is_no_mfu_figure_and_the_ladder_is_in_tokens(tmp_path, drawn):
    unknown = {"mfu": None, "mfu_palm": None, "hfu": None, "peak_flops": None, "peak_kind": None}
    rows = [model("reference", 100e3, 0, **unknown), model("triton", 200e3, 1, **unknown)]
    main([f"--out={write(tmp_path, 'model.jsonl', rows)}"])
    assert pngs(tmp_path) == ["ladder-gpt2.png", "model-tokens.png"]
    assert drawn["ladder-gpt2.png"].axes[0].get_xlabel() == "tokens/s"


def test_a_training_log_gives_loss_against_time(tmp_path, drawn):
    log = [row("run", name="speedrun gpu", config={})]
    log += [
        {"schema": 1, "what": "step", "date": "2026-11-21T01:02:03+00:00", "step": i, "loss": 4.0 - i, "ms": 100.0}
        for i in range(3)
    ]
    main([f"--out={write(tmp_path, 'train.jsonl', log)}"])
    assert list(drawn["loss-speedrun-gpu.png"].axes[0].lines[0].get_xdata()) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("b.jsonl", '{"schema": 1, "what": "op"', r"b.jsonl:1: not JSON"),
        ("b.jsonl", json.dumps({**op("torch", 64, 1.0), "schema": 0}), r"b.jsonl:1: row has schema 0"),
        ("b.jsonl", json.dumps(op("torch", 64, 1.0, machine=OTHER)), "rows of different machines"),
        ("a.jsonl", json.dumps(op("torch", 64, 1.0, machine=OTHER)), "split the file"),
    ],
)
def test_a_folder_with_a_bad_row_gives_an_error_and_no_figure_and_others_are_drawn(
    tmp_path, capsys, name, bad, message
):
    broken = write(tmp_path / "broken", "a.jsonl", [op("triton", 64, 1.0)])
    with (broken / name).open("a") as file:
        file.write(bad + "\n")
    whole = write(tmp_path / "whole", "a.jsonl", [op("triton", 64, 1.0)])
    assert main([f"--root={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert pngs(broken) == [] and pngs(whole) == ["op-layernorm.png", "overview.png", "roofline-ops.png"]


def test_the_readme_tables_come_from_the_newest_valid_rows(tmp_path, capsys):
    old = {**model("triton", 1.0), "date": "2020-01-01T00:00:00+00:00"}
    write(tmp_path / "gpu", "model.jsonl", [old, *RUNGS[:2], model("triton", 200e3), model("torch.compile", 120e3)])
    write(tmp_path / "gpu", "ops.jsonl", [op("triton", 64, 1.0), op("triton", 4096, 2000.0), op("torch", 4096, 1000.0)])
    bad = op("triton", 4096, 9e9, machine=OTHER, valid=False, invalid_reason="x")
    write(tmp_path / "cpu", "ops.jsonl", [op("reference", 64, 10.0, machine=OTHER), bad])
    assert main([f"--root={tmp_path}", "--readme=models"]) == 0
    table = capsys.readouterr().out
    assert (
        table.count("\n") == 5
        and "+layernorm" not in table
        and all(line.startswith("|") for line in table.splitlines())
    )
    assert (
        "| gpt2 | triton | bfloat16 | B=32 T=1024 | 163.8 | 200,000 | 20.0 % | 22.2 % | 21.1 % | datasheet | 3.0 |"
        in table
    )
    assert main([f"--root={tmp_path}", "--readme=ops"]) == 0
    table = capsys.readouterr().out
    assert f"| {OTHER} | layernorm | M=64 N=768 | bfloat16 | reference | " in table and "| 10 GB/s |" in table
    assert "| 2,000 GB/s | 60 % | torch, 2.00x our time |" in table
    assert pngs(tmp_path / "gpu") == []


def test_the_summary_has_ours_beside_the_best_peer_of_the_same_weights(tmp_path, capsys):
    attention = lambda impl, T, ms, direction="both": {**op(impl, T, 1.0, direction), "name": "attention",
        "dims": {"B": 1, "T": T}, **times(ms)}  # fmt: skip
    rows = [attention("triton", 4096, 4.0), attention("sdpa cudnn", 4096, 1.0), attention("sdpa flash", 4096, 2.0)]
    rows += [attention("triton", 64, 1.0), attention("sdpa cudnn", 64, 2.0), attention("reference", 64, 0.5)]
    rows += [
        attention("triton", 128, 1.0),
        attention("triton", 64, 9.0, "forward"),
        attention("sdpa", 64, 1.0, "forward"),
    ]
    decode = lambda name, impl, ttft, tpot: row("decode", name=name, impl=impl, dtype="bfloat16", **times(tpot),
        dims={"B": 1, "prompt": 960}, ttft_ms=ttft, tpot_ms=tpot, tokens_per_s=1.0)  # fmt: skip
    rows += [decode("gpt2", "engine", 8.0, 0.4), decode("gpt2", "engine int8", 8.0, 0.1)]
    rows += [decode("gpt2", "torch.compile", 6.0, 0.5), decode("gpt2", "naive", 1.0, 0.2)]
    rows += [decode("gpt2-xl", "engine", 8.0, 0.4), decode("gpt2-xl", "transformers", 6.0, 50.0)]
    steps = [model("triton + CUDA graph", 300e3), model("triton", 200e3), model("torch.compile", 150e3)]
    write(tmp_path / "gpu", "rows.jsonl", [*rows, *steps])
    assert main([f"--root={tmp_path}", "--readme=summary"]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:7]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [
        ["training step of gpt2", "B=32 T=1024 bfloat16", "109.2", "218.5", "torch.compile", "2.00x as fast"],
        ["attention, forward + backward", "B=1 T=64 bfloat16", "1", "2", "sdpa cudnn", "2.00x as fast"],
        ["attention, forward + backward", "B=1 T=4096 bfloat16", "4", "1", "sdpa cudnn", "0.25x as fast"],
        ["a token of gpt2", "B=1 prompt=960 bfloat16", "0.4", "0.5", "torch.compile", "1.25x as fast"],
        ["the first token of gpt2", "B=1 prompt=960 bfloat16", "8", "6", "torch.compile", "0.75x as fast"],
    ]


def test_no_rows_is_no_error(tmp_path, capsys):
    assert main([f"--root={tmp_path}"]) == 0 and "python -m bench writes them" in capsys.readouterr().out
    write(tmp_path / "m", "note.jsonl", [{"schema": 1, "what": "note", "date": "2026-01-01T00:00:00Z", "text": "x"}])
    assert main([f"--root={tmp_path}"]) == 0 and "no rows to draw from" in capsys.readouterr().out


def test_the_rows_and_figures_of_this_repository_go_together():
    for folder in plots.machines(plots.results.ROOT):
        plots.read(folder)
