"""The decode bench: every way of decoding gives the same tokens, and a row's figures follow from its times."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch

import kernels
from bench import compiling, decode, decoders, results
from bench.decode import Samples, figures, main, measure, sample
from bench.decoders import Size, Variant
from bench.peaks import Ceilings
from bench.step_work import CountOps, StepWork, host_us, step_work
from bench.timing import relative_error
from gptfast import mfu
from gptfast.config import PRESETS
from gptfast.engine import KVCache
from gptfast.engine.weights import converted
from gptfast.errors import UserError
from gptfast.log import Log
from gptfast.model import GPT
from kernels import _triton

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
        assert (row["kernels"] is not None) == (row["impl"] in ("engine", "engine int8"))
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
    slow = Samples([0.0], [8 * 2 * row["read_bytes"] / 1e9])  # of each step half the time goes into reading
    parts = figures(CONFIG, "small", size, way(), slow, 0.0, 8, PEAK, 2, StepWork(10, 15, 100.0, 300.0))
    step_s = 2 * row["read_bytes"] / 1e9
    assert parts["shares"]["weights"] == pytest.approx(mfu.palm_params(CONFIG) * 4 / 1e9 / step_s)
    assert parts["shares"]["cache"] == pytest.approx(keys / 1e9 / step_s) and parts["shares"]["launches"] == 0.5
    assert parts["shares"]["host"] == pytest.approx(1e-4 / step_s) and "launches 50%" in decode.line(parts)
    assert parts["first_host_us"] == 300 and "host 100 us, first 300" in decode.line(parts)
    assert parts["launch_us"] == pytest.approx(0.5 * step_s * 1e6 / 25) and "shares" not in row
    naive = figures(CONFIG, "small", size, way(impl="naive", lengths=6), samples, 0.0, 8, PEAK, 2)
    assert naive["mbu"] is None and "mbu     n/a" in decode.line({**naive, "name": "small"})


def test_a_step_is_counted_without_a_gpu():
    """Five launches a layer and three, whatever the matrices are in; torch's one is of the loop, which counts."""
    shallow, deep = (dataclasses.replace(CONFIG, n_layer=n) for n in (2, 4))
    one, two = step_work(shallow, 1, 16, "model"), step_work(deep, 1, 16, "model")
    packed = step_work(shallow, 1, 16, "int8")
    assert (one.kernels, two.kernels, packed.kernels) == (5 * 2 + 3, 5 * 4 + 3, 5 * 2 + 3)
    assert packed.torch_ops == one.torch_ops == two.torch_ops == 1 and one.host_us > 0 and (one.first_us or 0) > 0


def test_the_host_is_timed_while_it_decodes():
    """Not while it idles, because what kernels left out would have written was NaN."""
    model = GPT(CONFIG, kernels.load("cpu")).eval()
    for p in model.parameters():
        p.detach().fill_(float("nan"))
    assert host_us(model, 2) > 0


def test_what_only_looks_at_memory_is_not_counted():
    x = torch.ones(4, 4)
    with CountOps() as seen:
        torch.empty_like(x).view(16)
        (x.t() + 1).reshape(2, 8).sum()
    assert seen.seen == ["add", "clone", "sum"]  # a turned matrix has to be copied


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

    tokens = torch.zeros(1, 4, dtype=torch.int64)
    found, once_s = measure([noted("a"), noted("b")], tokens, 7, rounds=9, budget_s=45)
    rounds = [[(impl, 1), (impl, 7)] for impl in "ab"]
    warm = [[(impl, 3), (impl, 1)] for impl in "ab"]
    assert order == [*warm[0], *rounds[0], *warm[1], *rounds[1], *rounds[0], *rounds[1]]
    assert [len(samples.all_s) for samples in found.values()] == [2, 2] and once_s == 8


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

    monkeypatch.setattr(decoders, "by_transformers", broken)
    flags = ["--models=char-cpu", "--context=12", "--new=4", "--rounds=1", "--device=cpu"]
    assert main([*flags, f"--out={tmp_path}"]) == 0
    assert "transformers float32: left out: RuntimeError: no such thing here" in capsys.readouterr().out
    kinds = {row["what"] for row in results.read(tmp_path / "decode.jsonl")}
    assert kinds == {"note", "decode"}


# ---- variants that fail, the truth, and what is begun ----------------------------------------------------------------
def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")


def fails_at(call: int, impl: str) -> Variant:
    """A variant that decodes until it runs out of memory at that call."""
    calls = []

    def generate(tokens, n):
        calls.append(n)
        return out_of_memory() if len(calls) == call else torch.zeros(len(tokens), n, dtype=torch.int64)

    return dataclasses.replace(way(impl=impl), generate=generate)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a second whenever it is read: no sample is too short."""
    ticks = itertools.count()
    monkeypatch.setattr(decode, "timed", lambda run: (run(), float(next(ticks)))[1])


def test_a_variant_that_fails_while_it_runs_ends_alone(ticking):
    """At its warm-up, in the first round, or in the second: its samples until then are kept."""
    told = []
    ways = [fails_at(1, "warm-up"), fails_at(3, "first"), fails_at(6, "second"), way(impl="fine")]
    failed = lambda way, error: told.append((way.impl, type(error).__name__))
    known = lambda way, samples: counts.update({way.impl: len(samples.all_s)})
    counts: dict[str, int] = {}
    found, _ = measure(ways, torch.zeros(1, 4, dtype=torch.int64), 7, 4, 1e9, known, failed)
    assert told == [(impl, "OutOfMemoryError") for impl in ("warm-up", "first", "second")]
    assert list(found) == ["fine float32"] and counts == {"second": 1, "fine": 4}


def test_all_graphs_are_made_before_the_clock_runs(ticking):
    """One token alone is read in pieces of its own; what they need must not be made within a sample."""
    asked = []
    record = lambda tokens, n: (asked.append(n), torch.zeros(len(tokens), n, dtype=torch.int64))[1]
    measure([dataclasses.replace(way(), generate=record)], torch.zeros(1, 4, dtype=torch.int64), 7, 1, 1e9)
    assert asked == [3, 1, 1, 7]


def test_what_fails_is_let_go_before_the_next_is_made():
    class Memory:
        pass

    held = []

    def ways():
        for impl in ("large", "next"):
            assert all(memory() is None for memory in held), "what the one before it held is still there"
            memory = Memory()
            held.append(weakref.ref(memory))
            yield dataclasses.replace(way(impl=impl), generate=lambda *_, memory=memory: out_of_memory())
            del memory

    assert measure(ways(), torch.zeros(1, 4, dtype=torch.int64), 7, 1, 1e9)[0] == {}
    assert len(held) == 2


def small(monkeypatch, **changes):
    monkeypatch.setitem(PRESETS, "char-cpu", dataclasses.replace(PRESETS["char-cpu"], n_layer=1, **changes))


def test_kernels_by_name_are_for_a_gpu_and_known(monkeypatch):
    with pytest.raises(UserError, match="--variants=column is unknown; did you mean columns"):
        main(["--variants=column", "--device=cpu"])
    with pytest.raises(UserError, match="--variants: these kernels need a CUDA device"):
        main(["--variants=columns", "--device=cpu"])


def test_a_variant_is_the_engine_with_its_kernels_and_in_order_none_starts_early(monkeypatch):
    asked, early, x = [], [], SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(_triton, "arch", lambda x: 90)
    monkeypatch.setattr(kernels, "load", lambda *chosen, **per_op: asked.append((chosen, per_op)) or model.ops)
    record = lambda tokens, n: early.append(_triton.starts_early(x)) or tokens
    monkeypatch.setattr(decoders, "by_engine", lambda *_: dataclasses.replace(way(), generate=record))
    model = GPT(CONFIG, kernels.Ops({name: ("", "", op.reference) for name, op in kernels.OPS.items()}))
    ways = [decoders.by_variant(model, Size(1, 4, 4), name) for name in ("columns", "in_order")]
    for each in ways:
        each.generate(torch.zeros(1, 4), 4)
    assert [each.impl for each in ways] == ["engine columns", "engine in_order"] and early == [True, False]
    assert asked == [(("auto",), {"decode_linear": "columns"})] and _triton.starts_early(x)


def test_a_failure_at_run_time_is_in_a_row_and_the_page_goes_on(roof, tmp_path, monkeypatch, capsys):
    small(monkeypatch)
    broken = lambda model, size, form: fails_at(1 + (form == "int8"), f"engine {form}")
    monkeypatch.setattr(decoders, "by_engine", broken)
    flags = ["--models=char-cpu", "--context=12", "--new=4", "--rounds=1", "--device=cpu"]
    assert main([*flags, f"--out={tmp_path}"]) == 0
    rows = results.read(tmp_path / "decode.jsonl")
    notes = {row["name"].split(" {")[0]: row["text"] for row in rows if row["what"] == "note"}
    assert list(notes) == [f"char-cpu engine {form} float32" for form in ("model", "float16", "int8")]
    assert all(text.startswith("failed: OutOfMemoryError: CUDA out of memory") for text in notes.values())
    assert {row["impl"] for row in rows if row["what"] == "decode"} >= {"naive"}
    assert "char-cpu engine int8 float32" in capsys.readouterr().out


def test_a_size_that_fails_as_a_whole_is_noted_and_the_next_is_measured(roof, tmp_path, monkeypatch):
    small(monkeypatch)
    fresh = decode.fresh
    monkeypatch.setattr(decode, "fresh", lambda c, device: out_of_memory() if c.block_size == 12 else fresh(c, device))
    flags = ["--models=char-cpu", "--context=12,16", "--new=4", "--rounds=1", "--device=cpu", "--budget_s=100"]
    assert main([*flags, f"--out={tmp_path}"]) == 1
    rows = results.read(tmp_path / "decode.jsonl")
    assert "'prompt': 8" in rows[0]["name"] and "CUDA out of memory" in rows[0]["text"]
    assert {row["dims"]["prompt"] for row in rows[1:]} == {12}


def test_the_truth_is_the_same_weights_in_fp32_by_the_references():
    """Whatever the model computes in and by: here bf16, and ops that cannot run at all."""
    same, prompts = decode.fresh(CONFIG, torch.device("cpu")), torch.randint(65, (6, 8))
    model = GPT(CONFIG, kernels.Ops(dict.fromkeys(kernels.OPS, ("none", "", out_of_memory)))).eval()
    model.load_state_dict(same.state_dict())
    model.dtype = torch.bfloat16
    with torch.inference_mode():
        exact = same.logits(prompts, last_only=True)[:4, -1]
        right = decode.truth(model, prompts, 3)
        assert relative_error(right.logits, exact) < 1e-6 and right.tokens.shape == (4, 3)
        assert right.tokens[:, 0].equal(exact.argmax(-1)) and model.dtype == torch.bfloat16
        same.dtype = torch.bfloat16
        error, agrees = right.against(decoders.naive(converted(same, "model")), prompts)
    assert 1e-4 < error < 0.1 and 0 <= agrees <= 3


def test_bf16_is_held_against_fp32_and_not_against_itself(roof, tmp_path, monkeypatch):
    def in_bf16(config, device, fresh=decode.fresh):
        model = fresh(config, device)
        model.dtype = torch.bfloat16
        return model

    small(monkeypatch)
    monkeypatch.setattr(decode, "fresh", in_bf16)
    flags = ["--models=char-cpu", "--context=12", "--new=4", "--rounds=1", "--device=cpu"]
    assert main([*flags, f"--out={tmp_path}"]) == 0
    rows = [row for row in results.read(tmp_path / "decode.jsonl") if row["what"] == "decode"]
    assert {row["impl"]: row["error"] > 1e-4 for row in rows if row["dtype"] == "bfloat16"}["naive"]


def test_without_room_for_the_truth_the_times_stand(roof, tmp_path, monkeypatch, capsys):
    small(monkeypatch)
    monkeypatch.setattr(decode, "truth", out_of_memory)
    flags = ["--models=char-cpu", "--context=12", "--new=4", "--rounds=1", "--device=cpu"]
    assert main([*flags, f"--out={tmp_path}"]) == 0
    rows = results.read(tmp_path / "decode.jsonl")
    assert "no truth to compare with" in rows[0]["text"] and rows[1]["error"] is None
    assert "error     n/a" in capsys.readouterr().out


def test_every_size_is_compiled(roof, tmp_path, monkeypatch, graphs):
    """Beyond its limit of sizes torch runs a step uncompiled, under the name of the compiled one."""
    small(monkeypatch)
    counts = []
    monkeypatch.setattr(compiling, "LIMIT", 1)
    for B in (1, 2):
        flags = ["--models=char-cpu", f"--batch={B}", "--context=12", "--new=4", "--rounds=1", "--device=cpu"]
        assert main([*flags, "--compile", f"--out={tmp_path}"]) == 0
        counts.append(len(graphs))
    assert counts[0] > 0 and counts[1] == 2 * counts[0]


def test_the_compiled_peer_is_one_graph_and_where_it_is_not_a_row_says_so_or_it_fails(
    roof, tmp_path, monkeypatch, graphs, capsys
):  # fmt: skip
    """Where torch takes `keep` for a function of its own, each layer is a version of it, and beyond its limit of them
    it runs the rest of the layers uncompiled."""
    assert max(config.n_layer for config in PRESETS.values()) <= compiling.LIMIT
    monkeypatch.setitem(PRESETS, "char-cpu", dataclasses.replace(PRESETS["char-cpu"], n_layer=3))
    monkeypatch.setattr(decoders, "variants", lambda model, size, *_: iter([decoders.compiled(model, size)]))
    flags = ["--models=char-cpu", "--context=12", "--new=4", "--rounds=1", "--device=cpu", "--compile"]
    assert main([*flags, f"--out={tmp_path / 'whole'}"]) == 0 and len(graphs) == 1
    assert "parts" not in capsys.readouterr().out
    keep = KVCache.keep

    def broken(self, layer, *rest):
        torch._dynamo.graph_break()
        return keep(self, layer, *rest)

    monkeypatch.setattr(KVCache, "keep", broken)
    monkeypatch.setattr(compiling, "LIMIT", 3)
    assert main([*flags, f"--out={tmp_path / 'broken'}"]) == 0
    whole, parts = (results.read(tmp_path / name / "decode.jsonl")[0]["graph_breaks"] for name in ("whole", "broken"))
    assert whole == 0 and parts > 0 and f"in {parts + 1} parts at least" in capsys.readouterr().out
    monkeypatch.setattr(compiling, "LIMIT", 2)
    assert main([*flags, f"--out={tmp_path / 'limited'}"]) == 1
    assert "FAILED: FailOnRecompileLimitHit" in capsys.readouterr().out
    assert [row["what"] for row in results.read(tmp_path / "limited" / "decode.jsonl")] == ["note"]


def test_what_is_done_once_does_not_count_for_the_sizes_to_come(monkeypatch, capsys):
    """A size takes 10 s, making its variants 5 s, and the first time 50 s: of 102 s three fit, not one or four."""
    clock, ran = [0.0], []
    monkeypatch.setattr(decode.time, "monotonic", lambda: clock[0])

    def run_size(name, size, *_):
        ran.append((name, size.B))
        once_s = 50 if len(ran) == 1 else 5
        clock[0] += 10 + once_s
        return [{"valid": True}], once_s

    monkeypatch.setattr(decode, "run_size", run_size)
    arguments = argparse.Namespace(budget_s=102.0)
    todo = [(name, Size(B, 8, 8)) for name in ("gpt2", "gpt2-xl") for B in (1, 2, 3)]
    assert not decode.campaign(todo, arguments, PEAK, Log(None), {})
    assert ran == [(name, size.B) for name, size in todo[:3]]
    assert capsys.readouterr().out.count("left out, the 102 s are spent") == 3


@pytest.mark.parametrize("flags, complaint", [
    (["--models=gtp2"], "--models=gtp2 is unknown.*gpt2"), (["--context=64", "--new=64"], "--context=64: it must hold"),
    (["--batch=1,x"], "--batch=1,x: expected whole numbers"), (["--batch=0"], "--batch=0: numbers must be above 0"),
    (["--new=1"], "--new=1: at least 2"), (["--rounds=0"], "--rounds=0: must be at least 1"),
    (["--threads=-1"], "--threads=-1: must be at least 1"), (["--budget_s=0"], "--budget_s=0.0 must be above 0"),
])  # fmt: skip
def test_bad_flags(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        main(["--device=cpu", *flags])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_gpu_is_said():
    with pytest.raises(UserError, match="this machine has no CUDA device"):
        main(["--device=cuda"])
