"""Predictions: from rates that a machine has shown, the step that it took; from a datasheet, an estimate."""

from __future__ import annotations

import pytest

from bench import costs, predict
from bench.peaks import Ceilings
from gptfast.config import PRESETS
from gptfast.errors import UserError

# An H200 on 2026-11-26: rates of our ops, and two profiles of a step of GPT-2 124M at B=16 (ms by part).
OURS = {
    "GEMMs": 16.372, "attention": 5.735, "MLP activation": 2.473, "norms": 2.397, "loss": 1.713, "optimizer": 1.006,
    "other": 0.84, "copies": 0.427, "sums": 0.4, "casts": 0.247,
}  # fmt: skip
TORCH = {
    "GEMMs": 16.592, "attention": 4.401, "MLP activation": 2.574, "loss": 2.143, "norms": 2.115, "other": 1.404,
    "optimizer": 1.013, "sums": 0.804, "casts": 0.427, "copies": 0.417,
}  # fmt: skip
SEEN = {
    "attention": (0.4732, dict(B=16, T=1024, S=1024, H=12, G=12, D=64)),
    "add_layernorm": (0.2643, dict(M=65536, N=768)),
    "cross_entropy": (1.943, dict(M=16384, V=50304)),
}
CEILINGS = Ceilings({"bfloat16": 740e12}, 4.25e12, 4.25e12, "measured here", 0.25)


def profiled(impl: str, parts: dict[str, float]) -> dict:
    listed = [{"part": name, "ms": ms} for name, ms in parts.items()]
    about = {"what": "profile", "name": "gpt2", "impl": impl, "direction": "train", "dims": {"B": 16, "T": 1024}}
    return {
        **about,
        "dtype": "bfloat16",
        "parts": listed,
        "busy_ms": sum(parts.values()),
        "ms_p50": 41.0,
        "idle_ms": 9.4,
    }


def op(name: str, ms: float, dims: dict) -> dict:
    from kernels import OPS

    forward, backward = OPS[name].cost(**dims, itemsize=2)
    flops, moved = forward.flops + backward.flops, forward.bytes + backward.bytes
    return {"what": "op", "name": name, "impl": "triton", "direction": "both", "dtype": "bfloat16", "dims": dims,
        "ms_p50": ms, "flops": flops, "bytes": moved, "tflops": flops / ms / 1e9, "gbs": moved / ms / 1e6}  # fmt: skip


OPS_SEEN = [op(name, ms, dims) for name, (ms, dims) in SEEN.items()]
ROWS = [*OPS_SEEN, profiled("triton", OURS), profiled("compile", TORCH)]
GPT2 = predict.padded(PRESETS["gpt2"])


def test_a_measured_step_is_foretold_within_a_tenth():
    """31.6 ms of kernels, from the rates of single ops and of another implementation's step."""
    parts = predict.predict(GPT2, 16, 1024, "bfloat16", ROWS, CEILINGS, "triton", "gpt2")
    assert sum(part.ms for part in parts) == pytest.approx(sum(OURS.values()), rel=0.10)
    missed = {part.name: part.missed for part in parts if part.missed is not None}
    for name in ("GEMMs", "attention", "MLP activation", "optimizer"):
        assert abs(missed[name]) < 0.15, name
    said = "\n".join(predict.table(parts, ROWS[-2]))
    assert "31.6" in said and "the GPU idled for 9.400 ms" in said and "in the profile of gpt2 by compile" in said


def test_a_part_that_missed_says_why_it_may_have():
    old, new = "ca705f8" + 33 * "0", "efeaccb" + 33 * "0"
    slow = op("attention", 0.3, SEEN["attention"][1]) | {"commit": new}
    rows = [
        slow,
        *OPS_SEEN[1:],
        profiled("triton", OURS) | {"commit": old},
        profiled("compile", TORCH) | {"commit": old},
    ]
    parts = {part.name: part for part in predict.predict(GPT2, 16, 1024, "bfloat16", rows, CEILINGS, "triton", "gpt2")}
    said = predict.table(list(parts.values()), rows[-2])
    assert parts["attention"].doubt == "the rate is of commit efeaccb, the profile of ca705f8"
    assert parts["GEMMs"].doubt == "" and parts["copies"].doubt and abs(parts["copies"].missed or 1) < predict.FAR
    assert [line.strip() for line in said].count(parts["attention"].doubt) == 1
    assert (
        sum(line.strip() == parts["sums"].doubt for line in said) == 3
    )  # sums, casts, other: not copies, which did not miss


def test_a_step_is_not_foretold_from_itself():
    parts = predict.predict(GPT2, 16, 1024, "bfloat16", [ROWS[-2]], CEILINGS, "triton", "gpt2")
    assert all("profile" not in part.source for part in parts)


def test_twice_the_batch_takes_twice_as_long():
    one, two = (
        {p.name: p.ms for p in predict.predict(GPT2, B, 1024, "bfloat16", [*OPS_SEEN, ROWS[-1]], CEILINGS)}
        for B in (16, 32)
    )
    for name in ("GEMMs", "attention", "norms", "loss", "casts"):
        assert two[name] == pytest.approx(2 * one[name], rel=0.02), name
    assert two["optimizer"] == one["optimizer"]


def test_without_rows_the_roofline_is_taken_at_a_stated_efficiency():
    parts = predict.predict(GPT2, 16, 1024, "bfloat16", [], CEILINGS)
    gemms = next(part for part in parts if part.name == "GEMMs")
    assert gemms.ms == pytest.approx(costs.of_step(GPT2, 16, 1024, 2)["GEMMs"].flops / 740e12 / 0.7 * 1e3)
    assert "70% of the roofline" in gemms.source and gemms.measured_ms is None


def test_the_command_predicts_from_a_datasheet_and_refuses_what_it_does_not_know(capsys):
    assert predict.main(["--model=gpt2-xl", "--device=H100 SXM"]) == 0
    assert "datasheet of H100 SXM" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such datasheet"):
        predict.main(["--device=H100 XXL"])
    with pytest.raises(UserError, match="did you mean gpt2"):
        predict.main(["--model=gpt22", "--device=H100 SXM"])
