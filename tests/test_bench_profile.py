"""Profiles: every microsecond of a made-up GPU trace has its part and its cause; a real CPU step is accounted for."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
import torch

import bench
import kernels
from bench import costs, profile, trace
from bench.peaks import Ceilings
from bench.results import read
from bench.saved import saved_bytes
from gptfast import checkpoint
from gptfast.config import PRESETS
from gptfast.errors import UserError
from gptfast.mfu import flops_per_token
from gptfast.model import GPT

# kernels of a measured step of GPT-2 124M, ours and torch.compile's, and the parts they are of
KERNELS = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "GEMMs",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>": "GEMMs",
    "attention_bwd_kernel_dk_dv": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1": "attention",
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void const*, void*)": "attention",
    "void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, unsigned int)": "attention",
    "layernorm_bwd_kernel": "norms",
    "sum_rows_kernel": "norms",
    "triton_per_fused__to_copy_add_native_layer_norm_backward_view_9": "norms",
    "cross_entropy_rows_kernel": "loss",
    "triton_red_fused__log_softmax_prepare_softmax_online_18": "loss",
    "triton_poi_fused_gelu_gelu_backward_view_4": "MLP activation",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorList": "optimizer",
    "triton_poi_fused__to_copy_5": "casts",
    "decode_linear_fwd_kernel_rows": "norms + GEMMs",
    "decode_attention_fwd_kernel_split": "attention",
    "decode_embedding_fwd_kernel": "embedding",
    "triton_poi_fused_cat_8": "copies",
    "triton_red_fused_sum_view_1": "sums",
    "Memcpy DtoD (Device -> Device)": "copies",
}


@pytest.mark.parametrize("name, part", KERNELS.items())
def test_kernels_of_a_measured_step_have_their_parts(name, part):
    assert trace.part_of([name]) == part


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def made_up() -> list[dict]:
    """Two steps of 100 us each on a GPU: a product, then after a sync an elementwise kernel; late ones and graphs."""
    found = []
    for step in range(2):
        at, n = 1000 + 200 * step, 10 * step
        found += [
            event("user_annotation", trace.STEP, at, 150),
            event("cpu_op", "aten::mm", at, 10),
            event("cuda_runtime", "cudaLaunchKernel", at + 2, 5, correlation=n + 1),
            event("kernel", "nvjet_tst", at + 8, 40, tid=7, correlation=n + 1),
            event("cpu_op", "aten::item", at + 20, 35),
            event("cuda_runtime", "cudaStreamSynchronize", at + 21, 29),
            event("user_annotation", "my rmsnorm", at + 60, 12),
            event("cpu_op", "aten::mul", at + 62, 8),
            event("cuda_runtime", "cudaLaunchKernel", at + 63, 5, correlation=n + 2),
            event("kernel", "vectorized_elementwise_kernel", at + 70, 20, tid=7, correlation=n + 2),
            event("cuda_runtime", "cudaLaunchKernel", at + 72, 5, correlation=n + 3),
            event("kernel", "cross_entropy_rows_kernel", at + 92, 8, tid=7, correlation=n + 3),
            event("cpu_op", "aten::add", at + 120, 9),
            event("cuda_runtime", "cudaLaunchKernel", at + 121, 5, correlation=n + 4),
            event("kernel", "unknown_kernel", at + 130, 10, tid=7, correlation=n + 4),
        ]
    return found


def test_every_microsecond_of_a_made_up_trace_is_named():
    found = trace.read(made_up())
    assert found.on_gpu and found.steps == 2
    parts = {name: (calls, pytest.approx(1e3 * ms)) for name, (calls, ms) in found.parts().items()}
    assert parts == {"GEMMs": (1, 40), "norms": (1, 20), "loss": (1, 8), "other": (1, 10)}
    assert found.busy_ms == pytest.approx(0.078)
    gaps = {gap.cause: (gap.calls, pytest.approx(1e3 * gap.ms)) for gap in found.gaps}
    assert gaps == {
        "the host waited for the GPU: cudaStreamSynchronize in aten::item": (1, 22),
        "between kernels that were waiting to run": (1, 2),
        "the host was late": (1.5, 30 + 68 / 2),  # in the step, and between the two
    }
    assert found.syncs == {"cudaStreamSynchronize in aten::item": 1}
    assert found.span_ms == pytest.approx(found.busy_ms + sum(gap.ms for gap in found.gaps))


def test_a_backward_kernel_is_of_the_part_of_its_forward():
    events = [
        event("user_annotation", trace.STEP, 0, 100),
        event("user_annotation", "attention", 1, 20),
        event("cpu_op", "aten::mul", 2, 5, **{"Sequence number": 7, "Fwd thread id": 0}),
        event("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 50, 20, 2,
            **{"Sequence number": 7, "Fwd thread id": 1}),
        event("cpu_op", "aten::mul", 52, 5, 2),
        event("cuda_runtime", "cudaLaunchKernel", 53, 2, 2, correlation=1),
        event("kernel", "vectorized_elementwise_kernel", 60, 9, 7, correlation=1),
    ]  # fmt: skip
    assert trace.read(events).parts() == {"attention": (1, 0.009)}


def test_gaps_inside_a_graph_are_the_graphs():
    events = [
        event("user_annotation", trace.STEP, 0, 100),
        event("cuda_runtime", "cudaGraphLaunch", 1, 4, correlation=1),
        *(event("kernel", "nvjet_tst", ts, 10, 7, correlation=1) for ts in (5, 17, 29)),
    ]
    (gap,) = trace.read(events).gaps
    assert (gap.cause, gap.calls, gap.ms) == ("between the kernels of a graph", 2, pytest.approx(0.004))


def test_a_kernel_that_starts_early_is_not_counted_while_it_waits():
    """The parts of a step add up to the time in which the GPU is busy."""
    events = [
        event("user_annotation", trace.STEP, 0, 100),
        event("cuda_runtime", "cudaGraphLaunch", 1, 4, correlation=1),
        event("kernel", "decode_linear_fwd_kernel_rows", 10, 10, 7, correlation=1),
        event("kernel", "decode_attention_fwd_kernel", 12, 18, 7, correlation=1),
        event("kernel", "decode_greedy_fwd_kernel", 15, 5, 8, correlation=1),  # done before the last one
    ]
    found = trace.read(events)
    assert found.busy_ms == pytest.approx(0.020)
    assert sorted(piece.ms for piece in found.pieces) == pytest.approx([0.0, 0.010, 0.010])


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match=r"no range named bench\.step"):
        trace.read([event("kernel", "nvjet", 0, 1)])


def test_idle_time_is_what_the_wall_clock_has_more():
    wall = profile.summarize([0.2] * 8, method="wall clock")
    report = profile.Report(trace.read(made_up()), wall, {"GEMMs": costs.Cost(4 * 10**9, 10**6)},
        Ceilings({"bfloat16": 2e14}, 4e12, 4e12, "measured here", 0.25))  # fmt: skip
    row = report.row()
    assert row["idle_ms"] == pytest.approx(0.2 - 0.078)
    gemms = row["parts"][0]
    assert (gemms["tflops"], gemms["of_measured"]) == (pytest.approx(100), pytest.approx(0.5))
    assert gemms["share"] == pytest.approx(0.2) and row["accounted"] == pytest.approx(1)
    said = str(report)
    for words in ("GEMMs", "the host was late", "waits for the GPU 1 times a step", "50%"):
        assert words in said


def test_a_real_step_on_this_cpu_is_accounted_for_and_a_planted_sleep_is_found(tmp_path):
    a = torch.randn(160, 160, requires_grad=True)

    def step() -> None:
        y = torch.nn.functional.gelu(a @ a)
        torch.nn.functional.layer_norm(y, (160,)).sum().backward()
        time.sleep(0.02)

    report = bench.profile(step, device="cpu", samples=3, save=tmp_path / "trace.json.gz")
    parts = report.trace.parts()
    assert {"GEMMs", "norms", "MLP activation"} <= parts.keys()
    assert parts["Python"][1] >= 20 and next(iter(parts)) == "Python"  # the sleep, which no operator makes
    total = sum(piece.ms for piece in report.trace.pieces)
    assert total == pytest.approx(report.trace.span_ms, rel=0.05)
    assert profile.events(tmp_path / "trace.json.gz")  # valid JSON with events


def test_a_planted_copy_is_found():
    big = torch.zeros(1 << 21)
    before = profile(lambda: torch.mm(big[:64].view(8, 8), big[:64].view(8, 8)), device="cpu", samples=1)
    after = profile(lambda: big.clone(), device="cpu", samples=1)
    assert "copies" not in before.trace.parts() and next(iter(after.trace.parts())) in ("copies", "Python")
    assert after.trace.parts()["copies"][0] == 2  # clone, and the copy_ in it


@pytest.mark.parametrize("name", ["gpt2", "modern", "char"])
def test_declared_products_are_those_of_the_model(name):
    config = PRESETS[name]
    B, T = 2, config.block_size
    mine = costs.of_step(config, B, T, 2)
    flops = flops_per_token(config, T)
    products = mine["GEMMs"].flops / (B * T)
    assert products + mine["attention"].flops / (B * T) == pytest.approx(flops.hfu, rel=0.08)


def test_the_command_profiles_a_model_and_sets_two_beside_each_other(tmp_path, capsys):
    flags = ["--models=char-cpu", "--quick", "--batch_size=1", "--block_size=16", "--steps=1", f"--out={tmp_path}"]
    assert profile.main([*flags, "--impl=reference,eager", "--device=cpu"]) == 0
    rows = [row for row in read(tmp_path / "profile.jsonl") if row["what"] == "profile"]
    assert [row["impl"] for row in rows] == ["reference", "eager"]
    begun = "profile char-cpu train eager: some 10 steps, B=1 T=16; --quick, --batch_size and --block_size make it"
    assert begun in capsys.readouterr().out
    for row in rows:
        assert {"GEMMs", "attention", "norms", "loss", "optimizer"} <= {part["part"] for part in row["parts"]}
        assert 0.95 <= sum(part["share"] for part in row["parts"]) <= 1.05
        json.dumps(row)
    assert (tmp_path / "profile-char-cpu-train.png").exists()
    assert (tmp_path / "trace-char-cpu-train-eager.json.gz").exists()
    capsys.readouterr()
    assert profile.main(["--diff", f"{tmp_path}:reference", f"{tmp_path}:eager"]) == 0
    said = capsys.readouterr().out
    assert "GEMMs" in said and "wall clock" in said


def test_decoding_is_profiled_as_the_engine_does_it():
    """Five launches a layer and three, the last of which chooses, and the host's work; every step as the first."""
    L, B, S = 1, 2, 9
    config = dataclasses.replace(PRESETS["gpt2"], n_layer=L, n_head=1, n_embd=16, block_size=S + 8, vocab_size=32)
    model = kernels_of(config, "interpret")
    subject = profile.of_engine(model, torch.randint(32, (B, S)))
    report = profile.profile(subject.step, device="cpu", steps=1, warmup=3, samples=1, memory=subject.memory)
    calls = {piece.name.removeprefix("gptfast::"): piece.calls for piece in report.trace.pieces}
    assert (calls["decode_linear"], calls["append_attention"], calls["decode_embedding"]) == (4 * L + 1, L, 1)
    assert calls["decode_greedy"] == 1 and {"norms + GEMMs", "attention", "embedding"} <= report.trace.parts().keys()
    assert subject.dims == {"B": B, "S": S} and subject.tokens == B
    keys = 2 * L * B * (config.block_size + 1) * 16 * 4
    assert report.memory["cache"] > keys and report.memory["weights"] >= sum(p.nbytes for p in model.parameters())
    shorter = profile.of_engine(model, torch.randint(32, (1, S - 1)))
    updates = [len(shorter.step()[0].tokens) for _ in range(2 * profile.PAST_THE_END)]
    assert not any(updates), "no step adds to what the next one reads"


def kernels_of(config, how):
    return GPT(config, profile.named(kernels.load(how))).eval()


def test_a_step_of_decoding_is_profiled_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "ceilings", lambda *_: None)
    monkeypatch.setattr(profile, "measured_ceilings", lambda *_: None)
    flags = ["--models=char-cpu", "--mode=decode", "--quick", "--batch_size=2", "--context=16", "--steps=1"]
    assert profile.main([*flags, "--device=cpu", f"--out={tmp_path}"]) == 0
    row = next(row for row in read(tmp_path / "profile.jsonl") if row["what"] == "profile")
    assert (row["impl"], row["dims"]) == ("reference", {"B": 2, "S": 16}) and row["memory"]["cache"] > 0


@pytest.mark.parametrize("how", ["interpret", "cpu"])
def test_what_is_kept_for_the_backward_pass_has_its_part(how):
    """Two layers of a GPT-2, counted by hand where the kernels keep it."""
    config = dataclasses.replace(PRESETS["gpt2"], n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64)
    tokens = torch.randint(64, (3, 16))
    kept = saved_bytes(config, kernels.load(how), torch.float32, tokens, tokens)
    rows = 3 * 16 * 4  # of one number each, in bytes
    if how == "interpret":
        statistics = 3 * (2 * 2 + 1) * rows
        assert kept["attention"] == 2 * (3 * 32 + 32 + 2) * rows  # the fused projection, the output, a number a head
        assert kept["MLP activation"] == 2 * 4 * 32 * rows
        assert statistics <= kept["norms"] <= statistics + (2 * 2 + 1) * 32 * rows
    assert kept["attention"] > 0 and kept["norms"] > 0 and kept["GEMMs"] >= 2 * 2 * 32 * rows
    assert kept["rotary"] == 0


def test_a_checkpoint_is_profiled_like_a_preset(tmp_path):
    config = dataclasses.replace(PRESETS["char-cpu"], n_layer=1)
    checkpoint.save(tmp_path / "run", step=0, model={}, optimizer={}, meta={"model": dataclasses.asdict(config)})
    assert profile.config_of(str(tmp_path / "run")) == config
    assert profile.config_of("d4").n_layer == 4
    with pytest.raises(UserError, match="no preset, no depth and no folder with a checkpoint; did you mean gpt2"):
        profile.config_of("gpt3")
