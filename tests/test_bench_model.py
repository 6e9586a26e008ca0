"""The bench of whole models: what is trained, what fits, what is believed, and what is left out."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util

import pytest
import torch
from torch import nn

import kernels
from bench import model as bench_model
from bench import peers
from bench.model import Maker, Plan, Variant, fit, is_gpt2, ladder, main, makers, padded, peak_for, run_group, used_ops
from bench.results import read
from gptfast import mfu
from gptfast.config import PRESETS, GPTConfig
from gptfast.errors import UserError
from gptfast.log import Log, facts

CPU = torch.device("cpu")
TINY = GPTConfig(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=16)
MODERN = dataclasses.replace(TINY, norm="rmsnorm", position="rope", activation="relu2", qk_norm=True, tied=False)


def rows_of(chosen: list[Maker], peak: mfu.Peak | None = None, log: Log | None = None) -> dict[str, dict]:
    plan = Plan("tiny", TINY, CPU, batch_size=3, samples=3, budget_s=0.0)
    rows = run_group(plan, chosen, peak, log or Log(None, console=False), facts(CPU))
    return {f"{row['impl']} {row['dtype']}": row for row in rows}


@pytest.fixture
def tiny_presets(monkeypatch):
    for name in ("char-cpu", "char-modern-cpu"):
        monkeypatch.setitem(PRESETS, name, TINY if name == "char-cpu" else MODERN)


def test_every_variant_of_a_cpu_learns_and_gives_the_loss_of_its_weights():
    chosen = makers(TINY, CPU, "no", rungs=False, full=False, quick=False)
    rows = rows_of(chosen, mfu.Peak.given(1.0))
    assert "eager float32" in rows and "plain eager float32" in rows
    assert ("transformers eager float32" in rows) == (importlib.util.find_spec("transformers") is not None)
    for row in rows.values():
        assert row["valid"], row["invalid_reason"]
        assert row["loss"] < row["first_loss"] and row["dims"] == {"B": 3, "T": 16} and row["n"] == 3
        assert row["tokens_per_s"] == pytest.approx(3 * 16 / row["ms_p50"] * 1e3)
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * mfu.flops_per_token(TINY, 16).mfu / 1e12)
        assert row["peak_kind"] == "given" and row["memory_bytes"] is None and row["side_by_side"] == len(rows)


def test_8_bit_floats_are_measured_against_their_own_peak():
    config = dataclasses.replace(TINY, n_embd=128)
    honest = bench_model.ours(config, kernels.load("reference"), "fp8", torch.float32, "no")
    peak = mfu.Peak.measured("a machine", {"fp32": 1e12, "fp8": 4e12}, None, "")
    plan = Plan("tiny", config, CPU, batch_size=3, samples=1, budget_s=0.0)
    chosen = [honest, dataclasses.replace(honest, label="fp8", fp8=True)]
    plain, eighth = run_group(plan, chosen, peak, Log(None, console=False), facts(CPU))
    assert plain["valid"] and eighth["valid"], eighth["invalid_reason"]
    assert (plain["peak_dtype"], eighth["peak_dtype"]) == ("fp32", "fp8") and eighth["peak_flops"] == 4e12
    assert plain["flops_per_token"] == eighth["flops_per_token"] and eighth["error"] > 1e-6
    assert eighth["mfu"] == pytest.approx(eighth["tokens_per_s"] * eighth["flops_per_token"]["mfu"] / 4e12)


def test_without_a_peak_nothing_is_said_about_mfu():
    row = rows_of(makers(MODERN, CPU, "no", False, False, False)[:1])["eager float32"]
    assert row["mfu"] is row["mfu_palm"] is row["hfu"] is row["peak_kind"] is row["peak_flops"] is None


class Forgetful(nn.Module):
    """Remembers its first answer, and gives that ever after."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.answer = inner, None

    def forward(self, tokens, targets):
        if self.answer is None:
            self.answer = self.inner(tokens, targets).detach()
        return self.answer + 0 * self.inner.lm_head.weight.sum()

    def state_dict(self, *args, **kwargs):
        return self.inner.state_dict(*args, **kwargs)


class Imprecise(nn.Module):
    """Computes in bf16 what is said to be fp32."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.inner.dtype = torch.bfloat16

    def forward(self, tokens, targets):
        return self.inner(tokens, targets)

    def state_dict(self, *args, **kwargs):
        return self.inner.state_dict(*args, **kwargs)


@pytest.mark.parametrize(
    ("cheat", "reason"),
    [(Forgetful, "nothing was learned|where its weights give"), (Imprecise, "where its weights give")],
)
def test_a_model_that_does_not_do_its_work_is_invalid(cheat, reason):
    import re

    honest = makers(TINY, CPU, "no", False, False, False)[0]
    row = rows_of([dataclasses.replace(honest, label="cheat", build=lambda dtype: cheat(honest.build(dtype)))])[
        "cheat float32"
    ]
    assert not row["valid"] and re.search(reason, row["invalid_reason"])


def test_a_figure_above_the_peak_is_invalid():
    row = rows_of(makers(TINY, CPU, "no", False, False, False)[:1], mfu.Peak.given(1e-9))["eager float32"]
    assert not row["valid"] and row["invalid_reason"].startswith("mfu ")


def test_a_peer_that_cannot_train_is_named_and_left_out_and_ours_is_not(tmp_path):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, tokens, targets):
            raise RuntimeError("no such backend")

    honest = makers(TINY, CPU, "no", False, False, False)[0]
    peer = Maker("peer", torch.float32, lambda dtype: Broken(), Broken, ours=False)
    with Log(tmp_path, console=False) as log:
        assert list(rows_of([honest, peer], log=log)) == ["eager float32"]
    assert "peer cannot train here: RuntimeError: no such backend" in read(tmp_path / "log.jsonl")[0]["text"]
    with pytest.raises(RuntimeError, match="no such backend"):
        rows_of([honest, dataclasses.replace(peer, ours=True)])


def test_the_batch_is_halved_until_it_fits():
    tried = []

    def attempt(rows: int) -> None:
        tried.append(rows)
        if rows > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fit(attempt, 64) == 8 and tried == [64, 32, 16, 8]

    def hopeless(rows: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="not even one sequence"):
        fit(hopeless, 4)

    def wrong(rows: int) -> None:
        raise ValueError("not about memory")

    with pytest.raises(ValueError, match="not about memory"):
        fit(wrong, 4)


def test_the_ladder_adds_the_kernels_that_the_model_calls_one_by_one():
    asked = []

    def load(implementation: str, **on: str) -> kernels.Ops:
        asked.append((implementation, dict(on)))
        return kernels.load("reference")

    rungs = ladder(PRESETS["modern"], torch.bfloat16, "model", load)
    names = used_ops(PRESETS["modern"])
    assert {"rmsnorm", "add_rmsnorm", "rotary", "attention", "activation", "linear_cross_entropy"} == set(names)
    assert "layernorm" in used_ops(PRESETS["gpt2"]) and "rotary" not in used_ops(PRESETS["gpt2"])
    with_kernel = [name for name in names if kernels.OPS[name].triton is not None]
    assert [maker.rung for maker in rungs] == list(range(len(with_kernel) + 1))
    assert [maker.label for maker in rungs] == ["reference", *(f"+{name}" for name in with_kernel[:-1]), "triton"]
    chosen = [peers.IN_TORCH | dict.fromkeys(with_kernel[:i], "triton") for i in range(len(with_kernel) + 1)]
    assert asked == [("reference", on) for on in chosen]


def test_what_a_gpu_is_asked_to_train(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda *a, load=kernels.load, **k: load("reference"))
    monkeypatch.setattr(bench_model, "ladder", lambda *a, ladder=ladder: ladder(*a, kernels.load))
    monkeypatch.setattr(bench_model, "compute_dtype", lambda device: (torch.bfloat16, ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    gpu, gpt2 = torch.device("cuda"), padded(PRESETS["gpt2"])
    labels = lambda *a: [maker.label for maker in makers(gpt2, gpu, "model", *a)]
    assert labels(False, False, True) == ["triton", "torch.compile", "transformers eager"]
    assert labels(False, False, False) == ["triton", "torch.compile", "triton fp8"]
    whole = labels(True, True, False)
    assert whole[:3] == ["triton", "torch.compile", "triton fp8"] and whole[-2:] == [
        "torch.compile max-autotune",
        "transformers eager",
    ]
    assert "reference" in whole and "+attention" in whole
    peer = makers(gpt2, gpu, "model", False, False, False)[1]
    assert peer.attention == "cudnn" and peer.autocast and peer.compiled == "model" and not peer.ours
    assert [maker.label for maker in makers(PRESETS["modern"], gpu, "model", False, True, False)] == [
        "triton",
        "triton fp8",
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert labels(False, False, False) == ["triton", "torch.compile"]


@pytest.mark.parametrize("family", ["ours", "plain", "transformers"])
def test_blocks_are_compiled_in_place_each_of_them(monkeypatch, family):
    if family == "transformers":
        pytest.importorskip("transformers")
    maker = {
        "ours": lambda: bench_model.ours(TINY, kernels.load("reference"), "x", torch.float32, "blocks"),
        "plain": lambda: bench_model.plain(TINY, "x", torch.float32, "blocks"),
        "transformers": lambda: dataclasses.replace(bench_model.transformers(TINY, torch.float32), compiled="blocks"),
    }[family]()
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((type(self).__name__, options)))
    Variant(maker, CPU).compile()
    assert len(compiled) == TINY.n_layer and all("Block" in name for name, _ in compiled)


def test_vocabularies_are_padded_as_trainers_do_and_dropout_is_off():
    assert padded(PRESETS["gpt2"]).vocab_size == 50304 and padded(PRESETS["char"]).vocab_size == 65
    assert padded(PRESETS["char"]).dropout == 0.0
    assert is_gpt2(PRESETS["gpt2-xl"]) and not is_gpt2(PRESETS["modern"])


def test_a_measured_ceiling_serves_as_the_peak_and_is_named_so(tmp_path):
    assert peak_for(CPU, None, tmp_path) is None
    assert peak_for(CPU, 2.0, tmp_path).kind == "given"
    times = {"ms_p20": 1.0, "ms_p50": 1.0, "ms_p80": 1.0, "n": 3, "threads": torch.get_num_threads()}
    with Log(tmp_path, name="peaks.jsonl") as log:
        log.row("peak", name="copy", dims={"bytes": 8}, dtype="float32", best_gbs=10.0, **times, **facts(CPU))
        log.row("peak", name="gemm", dims={"M": 8}, dtype="float32", best_tflops=0.25, **times, **facts(CPU))
    found = peak_for(CPU, None, tmp_path)
    assert found.kind == "measured" and found.flops("fp32") == 0.25e12 and found.flops("bf16") is None
    assert "bench peaks" in found.source


def test_the_command_writes_rows_and_leaves_out_what_the_budget_does_not_cover(tmp_path, tiny_presets, capsys):
    threads = torch.get_num_threads()
    flags = [f"--out={tmp_path}", "--samples=2", "--batch-size=2", f"--threads={threads}", "--device=cpu"]
    assert main(["--models=char-cpu,char-modern-cpu", "--budget_s=0.001", *flags]) == 0
    rows = read(tmp_path / "model.jsonl")
    assert {row["name"] for row in rows} == {"char-cpu"} and all(row["what"] == "model" for row in rows)
    assert "char-modern-cpu: left out" in capsys.readouterr().out
    assert main(["--models=char-modern-cpu", "--block_size=8", *flags]) == 0
    assert {row["name"]: row["dims"]["T"] for row in read(tmp_path / "model.jsonl")} == {
        "char-cpu": 16,
        "char-modern-cpu": 8,
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models=gpt3"], "--models=gpt3 is unknown, did you mean gpt2"),
        (["--batch_size=0"], "--batch_size=0: must be at least 1"),
        pytest.param(
            ["--device=cuda"], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one")
        ),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, argv, message):
    with pytest.raises(UserError) as caught:
        main([*argv, f"--out={tmp_path}"])
    assert message.replace(", did you mean gpt2", "") in str(caught.value)


def test_a_failed_model_is_noted_and_fails_the_command(tmp_path, tiny_presets, monkeypatch):
    def run_group(plan, *rest):
        raise RuntimeError("the compiler gave up")

    monkeypatch.setattr(bench_model, "run_group", run_group)
    assert main([f"--out={tmp_path}", "--models=char-cpu", "--device=cpu"]) == 1
    assert "the compiler gave up" in read(tmp_path / "model.jsonl")[0]["text"]


def test_large_models_are_measured_one_variant_at_a_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    chosen = [argparse.Namespace(label="a"), argparse.Namespace(label="b")]
    plan = lambda name: Plan(name, PRESETS[name], torch.device("cuda"), None, 3, 0.0)
    assert bench_model.groups(plan("gpt2"), chosen) == [chosen]
    assert bench_model.groups(plan("gpt2-xl"), chosen) == [[chosen[0]], [chosen[1]]]


def test_variants_can_be_asked_for_by_name():
    config = dataclasses.replace(PRESETS["char-cpu"], n_layer=1)
    found = bench_model.makers(config, torch.device("cpu"), "no", False, False, False)
    assert {maker.label for maker in bench_model.asked_for(found, f" {found[-1].label}")} == {found[-1].label}
    assert bench_model.asked_for(found, None) == found
    with pytest.raises(UserError, match="--impl=tritom"):
        bench_model.asked_for(found, "tritom")
