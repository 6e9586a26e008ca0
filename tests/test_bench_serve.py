"""The bench of the server: arrivals that do not wait, figures that follow from stamps, and every way as a row."""

from __future__ import annotations

import random
import time

import pytest

from bench import plots, results
from bench.serve import Answered, Ask, arrivals, figures, loads, main, one_at_a_time, percentile
from gptfast.errors import UserError


def test_arrivals_are_the_same_for_all_and_as_frequent_as_asked():
    asks = arrivals(50.0, 4000, 10, 65)
    assert asks == arrivals(50.0, 4000, 10, 65) and asks[0].at == 0
    assert asks[-1].at == pytest.approx(4000 / 50, rel=0.1)
    assert {len(ask.prompt) for ask in asks} == set(range(5, 11)) and max(max(ask.prompt) for ask in asks) == 64


def test_percentiles():
    values = random.Random(0).sample(range(1, 101), 100)
    assert [percentile(values, q) for q in (0.5, 0.95, 1.0)] == [50, 95, 100]
    assert percentile([7.0], 0.95) == 7.0 and percentile([1.0, 2.0], 0.5) == 1.0


def test_a_row_follows_from_its_stamps():
    """Two answers of 3 tokens, at 1 and 2 s; one that is not whole makes the row invalid."""
    found = [Answered(1.0, [1.5, 2.0, 2.5]), Answered(2.0, [4.0, 4.1, 4.2])]
    row = figures("m", "server", "float32", {"load": 1.0}, 2.0, found, 3, 1)
    assert (row["ttft_ms_p50"], row["ttft_ms_p95"]) == (500, 2000)
    assert row["tpot_ms_p50"] == pytest.approx(100) and row["tpot_ms_p95"] == pytest.approx(500)
    assert row["ms_p50"] == pytest.approx(1850) and row["tokens_per_s"] == pytest.approx(6 / 3.2) and row["valid"]
    row = figures("m", "server", "float32", {"load": 1.0}, 2.0, [*found, Answered(3.0, [3.1])], 3, 1)
    assert not row["valid"] and "1 answers were not whole" in row["invalid_reason"]


def test_one_at_a_time_lets_the_next_wait():
    """A request that arrives while another runs gets its first token after that one's last."""

    def generate(prompt, n, emit):
        for _ in range(n):
            time.sleep(0.002)
            emit()

    first, second = one_at_a_time(generate, [Ask(0.0, [1]), Ask(0.001, [2])], 3)
    assert first.tokens[-1] < second.tokens[0] and len(first.tokens) == len(second.tokens) == 3
    assert second.arrived == 0.001


def test_every_way_at_every_load(tmp_path):
    flags = ["--models=char-cpu", "--device=cpu", "--loads=2,4", "--requests=3", "--prompt=8", "--new=3", "--slots=2"]
    assert main([*flags, f"--out={tmp_path}", "--threads=1"]) == 0
    rows = [row for row in results.read(tmp_path / "serve.jsonl") if row["what"] == "serve"]
    ways = {"server", "one at a time", "transformers"}
    assert {(row["impl"], row["dims"]["load"]) for row in rows} == {(way, load) for way in ways for load in (2, 4)}
    for row in rows:
        assert row["valid"] and row["requests"] == row["n"] == 3 and row["tokens_per_s"] > 0
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p95"] < row["ms_high"] + 1 and row["tpot_ms_p50"] > 0
    assert plots.main([f"--out={tmp_path}"]) == 0
    assert (tmp_path / "serve-char-cpu.png").stat().st_size > 10_000


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "1e9"])
def test_loads_that_are_none(text):
    with pytest.raises(UserError, match="--loads="):
        loads(text)
    with pytest.raises(UserError, match="--models=gpt9"):
        main(["--models=gpt9"])
