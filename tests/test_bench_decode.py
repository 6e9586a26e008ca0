"""The decode bench: every way of decoding gives the same tokens, and a row's figures follow from its times."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import decode, results
from bench.decode import Samples, Size, Variant, figures, main, measure, sample
from bench.peaks import Ceilings
from gptfast import mfu
from gptfast.cli import UserError
from gptfast.config import PRESETS

CONFIG = dataclasses.replace(PRESETS["char-cpu"], block_size=24)
PEAK = mfu.Peak.measured("a copy", {}, 1e9, "by hand")


@pytest.fixture
def roof(monkeypatch):
    """A bandwidth that need not be measured."""
    monkeypatch.setattr(decode, "ceilings", lambda *_: Ceilings({}, 1e12, 1e12, "by hand", 0.15))


def way(step_ms: float = 0.0, impl: str = "fake", lengths: int | None = None) -> Variant:
    """Decodes zeros; the bench's clock says how long that took."""

    def generate(tokens, n):
        return torch.zeros(len(tokens), n, dtype=torch.int64)

    return Variant(impl, "float32", 4, 4, generate, lambda tokens: torch.ones(len(tokens), 5), lengths)


def test_every_way_gives_the_same_tokens(roof, tmp_path, monkeypatch):
    """One small model through all ways that a CPU has: fp32 agrees to rounding, smaller weights as they should."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flags = ["--models=char-cpu", "--batch=1,3", "--context=24", "--new=8", "--rounds=1", "--compile", "--device=cpu"]
    assert main([*flags, "--budget_s=1000", f"--out={tmp_path}"]) == 0
    rows = results.read(tmp_path / "decode.jsonl")
    ways = {"engine", "engine float16", "engine int8", "naive", "transformers", "torch.compile"}
    assert {(row["impl"], row["dims"]["B"]) for row in rows if row["what"] == "decode"} == {
        (way, B) for way in ways for B in (1, 3)
    }
    for row in rows:
        exact = row["dtype"] == "float32" and row["impl"] not in ("engine float16", "engine int8")
        assert row["error"] < (1e-5 if exact else 0.05), row["impl"]
        assert row["same_tokens"] == 8 or not exact
        assert row["dims"] == {"B": row["dims"]["B"], "prompt": 16, "new": 8} and row["valid"]
        assert (row["timed_lengths"] is None) == (row["impl"] != "naive")
    engine = {row["impl"]: row for row in rows if row["dims"]["B"] == 1}
    assert engine["engine"]["read_bytes"] > engine["engine float16"]["read_bytes"] > engine["engine int8"]["read_bytes"]


def test_a_row_follows_from_its_times():
    """Two seconds to the first of 9 tokens, 10 s to the last: one a second, all bytes of a step in each."""
    size, samples = Size(2, 15, 9), Samples([2.0, 2.0, 2.0], [10.0, 9.0, 11.0])
    row = figures(CONFIG, "small", size, way(), samples, 0.0, 8, PEAK, 2)
    assert row["ttft_ms"] == 2000 and row["tpot_ms"] == row["ms_p50"] == 1000 and row["n"] == 3
    assert row["tokens_per_s"] == pytest.approx(2 * 9 / 10)
    keys = 2 * (15 + 4) * CONFIG.n_layer * 2 * CONFIG.n_embd * 4
    assert row["read_bytes"] == mfu.palm_params(CONFIG) * 4 + keys
    assert row["mbu"] == pytest.approx(row["read_bytes"] / 1e9) and row["valid"]
    fast = figures(CONFIG, "small", size, way(), Samples([0.0], [8e-3]), 0.0, 8, PEAK, 2)
    assert not fast["valid"] and "not all was read" in fast["invalid_reason"]
    naive = figures(CONFIG, "small", size, way(impl="naive", lengths=6), samples, 0.0, 8, PEAK, 2)
    assert naive["mbu"] is None and "mbu     n/a" in decode.line({**naive, "name": "small"})


def test_the_naive_loop_is_timed_at_a_few_lengths(monkeypatch):
    """Its steps cost their length: the sum over all of them is found from some, evenly spread."""
    seen, clock = [], [0.0]
    monkeypatch.setattr(decode.time, "perf_counter", lambda: clock[0])

    def generate(tokens, n):
        seen.append(tokens.shape[1])
        clock[0] += tokens.shape[1]
        return torch.zeros(1, n)

    into = Samples()
    naive = Variant("naive", "float32", 4, 4, generate, lambda tokens: tokens, lengths=5)
    sample(naive, torch.zeros(1, 10, dtype=torch.int64), 101, into)
    assert seen == [10, 20, 40, 60, 80, 100]
    assert into.first_s == [10] and into.all_s == [pytest.approx(sum(range(10, 111)), rel=0.01)]


def test_rounds_are_interleaved_and_end_with_the_budget(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr(decode.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(decode.time, "perf_counter", lambda: clock[0])

    def noted(impl):
        def generate(tokens, n):
            order.append((impl, n))
            clock[0] += n
            return torch.zeros(1, n)

        return dataclasses.replace(way(impl=impl), generate=generate)

    found = measure([noted("a"), noted("b")], torch.zeros(1, 4, dtype=torch.int64), 7, rounds=9, budget_s=45)
    rounds = [[(impl, 1), (impl, 7)] for impl in "ab"]
    assert order == [("a", 3), *rounds[0], ("b", 3), *rounds[1], *rounds[0], *rounds[1]]
    assert [len(samples.all_s) for samples in found.values()] == [2, 2]


def test_a_sample_that_something_disturbed_is_taken_again(monkeypatch):
    """One token cannot take longer than all of them; where that does not end, there is an error and no figure."""
    clock, seconds = [0.0], []
    monkeypatch.setattr(decode.time, "perf_counter", lambda: clock[0])

    def generate(tokens, n):
        clock[0] += seconds.pop(0)

    disturbed = dataclasses.replace(way(), generate=generate)
    into, seconds[:] = Samples(), [90.0, 8.0, 2.0, 10.0]
    sample(disturbed, torch.zeros(1, 4, dtype=torch.int64), 9, into)
    assert (into.first_s, into.all_s, into.step_s(9)) == ([2.0], [10.0], [1.0])
    seconds[:] = [5.0] * 100
    with pytest.raises(UserError, match="too busy"):
        sample(disturbed, torch.zeros(1, 4, dtype=torch.int64), 9, into)
    assert into.first_s == [2.0]


def test_a_way_that_cannot_run_is_named_and_left_out(roof, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such thing here")

    monkeypatch.setattr(decode, "by_transformers", broken)
    flags = ["--models=char-cpu", "--context=12", "--new=4", "--rounds=1", "--device=cpu"]
    assert main([*flags, f"--out={tmp_path}"]) == 0
    assert "transformers float32: left out: no such thing here" in capsys.readouterr().out
    kinds = {row["what"] for row in results.read(tmp_path / "decode.jsonl")}
    assert kinds == {"note", "decode"}


@pytest.mark.parametrize("flags, complaint", [
    (["--models=gtp2"], "--models=gtp2 is unknown.*gpt2"), (["--context=64", "--new=64"], "--context=64: it must hold"),
    (["--batch=1,x"], "--batch=1,x: expected whole numbers"), (["--batch=0"], "--batch=0: numbers must be above 0"),
    (["--new=1"], "--new=1: at least 2"), (["--rounds=0"], "--rounds=0 must be above 0"),
    (["--threads=-1"], "--threads=-1 must be above 0"), (["--budget_s=0"], "--budget_s=0.0 must be above 0"),
])  # fmt: skip
def test_bad_flags(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        main(["--device=cpu", *flags])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_gpu_is_said():
    with pytest.raises(UserError, match="this machine has no CUDA device"):
        main(["--device=cuda"])
