"""Peaks, FLOP counts and the three named figures: gptfast/mfu.py and the command `python -m bench mfu`."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from bench import mfu as bench_mfu
from gptfast import cli, mfu
from gptfast.config import PRESETS, GPTConfig
from gptfast.model import GPT

TFLOPS, GB = 1e12, 1e9
GPT2 = PRESETS["gpt2"]

# Names as drivers print them -> dense bf16 TFLOP/s (fp16 where the chip has no bf16), GB/s. Written down apart from the
# table: a figure changed there by accident fails here.
REPORTED = {
    "Tesla P100-SXM2-16GB": (21.2, 732),
    "Tesla P100-PCIE-16GB": (18.7, 732),
    "Tesla V100-SXM2-16GB": (125, 900),
    "Tesla V100-SXM2-32GB": (125, 900),
    "Tesla V100-PCIE-32GB": (112, 900),
    "Tesla V100S-PCIE-32GB": (130, 1134),
    "Tesla T4": (65, 320),
    "TITAN RTX": (130.5, 672),
    "Quadro RTX 8000": (130.5, 672),
    "Quadro RTX 6000": (130.5, 672),
    "NVIDIA A100-SXM4-40GB": (312, 1555),
    "A100-SXM4-40GB": (312, 1555),
    "NVIDIA A100-SXM4-80GB": (312, 2039),
    "A100-SXM-80GB": (312, 2039),
    "A100-PCIE-40GB": (312, 1555),
    "NVIDIA A100-PCIE-40GB": (312, 1555),
    "NVIDIA A100 80GB PCIe": (312, 1935),
    "NVIDIA A800-SXM4-80GB": (312, 2039),
    "NVIDIA A800 80GB PCIe": (312, 1935),
    "NVIDIA A30": (165, 933),
    "NVIDIA A40": (149.7, 696),
    "NVIDIA A10": (125, 600),
    "NVIDIA A10G": (70, 600),
    "NVIDIA A16": (17.9, 200),
    "NVIDIA A2": (18, 200),
    "NVIDIA L4": (121, 300),
    "NVIDIA L20": (119.5, 864),
    "NVIDIA L40": (181, 864),
    "NVIDIA L40S": (362, 864),
    "NVIDIA H100 80GB HBM3": (989.5, 3350),
    "H100 SXM": (989.5, 3350),
    "NVIDIA H100 PCIe": (756, 2000),
    "NVIDIA H100 NVL": (835.5, 3900),
    "NVIDIA H800": (989.5, 3350),
    "NVIDIA H800 PCIe": (756, 2000),
    "NVIDIA H20": (148, 4000),
    "NVIDIA H20-3e": (148, 4800),
    "NVIDIA GH200 480GB": (989.5, 4000),
    "NVIDIA GH200 144G HBM3e": (989.5, 4900),
    "NVIDIA H200": (989.5, 4800),
    "NVIDIA H200 NVL": (835.5, 4800),
    "NVIDIA B200": (2250, 8000),
    "NVIDIA B300 SXM6 AC": (2250, 8000),
    "NVIDIA GB200": (2500, 8000),
    "NVIDIA GB300": (2500, 8000),
    "NVIDIA RTX A2000": (31.9, 288),
    "NVIDIA RTX A2000 12GB": (31.9, 288),
    "NVIDIA RTX A4000": (76.7, 448),
    "NVIDIA RTX A4500": (94.6, 640),
    "NVIDIA RTX A5000": (111.1, 768),
    "NVIDIA RTX A6000": (154.8, 768),
    "NVIDIA RTX 5000 Ada Generation": (261.1, 576),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 960),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (500, 1792),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": (438.9, 1792),
    "NVIDIA GeForce RTX 2080 Ti": (53.8, 616),
    "NVIDIA GeForce RTX 2070 SUPER": (36.2, 448),
    "NVIDIA GeForce RTX 3070": (40.6, 448),
    "NVIDIA GeForce RTX 3080 Ti": (68.2, 912),
    "NVIDIA GeForce RTX 3090": (71.2, 936),
    "GeForce RTX 3090": (71.2, 936),
    "NVIDIA GeForce RTX 3090 Ti": (80.0, 1008),
    "NVIDIA GeForce RTX 4060": (30.2, 272),
    "NVIDIA GeForce RTX 4070 Ti SUPER": (88.2, 672),
    "NVIDIA GeForce RTX 4080": (97.5, 717),
    "NVIDIA GeForce RTX 4080 SUPER": (104.4, 736),
    "NVIDIA GeForce RTX 4090": (165.2, 1008),
    "NVIDIA GeForce RTX 5070 Ti": (87.9, 896),
    "NVIDIA GeForce RTX 5080": (112.6, 960),
    "NVIDIA GeForce RTX 5090": (209.5, 1792),
    "AMD Instinct MI100": (92.3, 1229),
    "AMD Instinct MI210": (181, 1638),
    "AMD Instinct MI250X": (191.5, 1638),
    "AMD Instinct MI300A": (980.6, 5300),
    "AMD Instinct MI300X": (1307.4, 5300),
    "AMD Instinct MI325X": (1307.4, 6000),
    "AMD Instinct MI350X": (2306.9, 8000),
    "AMD Instinct MI355X": (2516.6, 8000),
}


def peak(name: str, **hints: float) -> mfu.Peak:
    found = mfu.peak(name, **hints)
    assert found is not None, name
    return found


# --- the peak table ---------------------------------------------------------------------------------


def test_at_least_sixty_reported_names_have_their_datasheet_peak() -> None:
    assert len({peak(name).device for name in REPORTED}) >= 60
    for name, (tflops, gb_per_s) in REPORTED.items():
        found = peak(name)
        assert (found.bf16 or found.fp16) == pytest.approx(tflops * TFLOPS, rel=2e-3), name
        assert found.bytes_per_s == pytest.approx(gb_per_s * GB, rel=1e-3), name


def test_no_name_matches_two_rows_and_order_does_not_decide() -> None:
    """Names match by equality of their words, so a name matches two rows only if both claim it, which is an error."""
    rows = [*mfu._NAMED, *mfu._read_shared(mfu.DEVICES)]
    assert len({mfu._words(name) for name, _ in rows}) == len(rows)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert mfu._claim_names(shuffled) == mfu._BY_WORDS
    with pytest.raises(ValueError, match="two rows claim the name NVIDIA Ada RTX 6000"):
        mfu._claim_names([*rows, ("NVIDIA Ada RTX 6000", (mfu.DEVICES["A40"],))])


@pytest.mark.parametrize(
    ("longer", "shorter"),
    [("L40", "L4"), ("L40S", "L40"), ("RTX A4000", "A40"), ("A10G", "A10"), ("A100 SXM 80GB", "A10"), ("H200", "H20"),
     ("GB200", "B200"), ("RTX 3090 Ti", "RTX 3090"), ("MI250X", "MI250"), ("V100S", "V100 SXM 32GB")],
)  # fmt: skip
def test_a_name_inside_another_name_is_another_device(longer: str, shorter: str) -> None:
    assert (peak(longer).bf16, peak(longer).fp16) != (peak(shorter).bf16, peak(shorter).fp16)


def test_spelling_does_not_matter_but_every_word_does() -> None:
    for spelling in ("a100 sxm 80gb", "NVIDIA A100-SXM4-80GB", "80 GB A100 (SXM4)", "nvidia_a100_sxm4_80gb"):
        assert peak(spelling).device == "A100 SXM 80GB", spelling
    assert peak("rtx 3090Ti").device == "RTX 3090 Ti"
    assert mfu.peak("NVIDIA A100-SXM4-80GB v2") is None


def test_every_figure_is_dense_consistent_and_has_a_source() -> None:
    """Tensor rates go down by 2 from 8 to 16 bits and to TF32: a sparse figure among dense ones breaks the pattern."""
    for device in mfu.DEVICES.values():
        assert device.source in mfu.SOURCES.values(), device
        assert device.bytes_per_s is None or 1e11 < device.bytes_per_s < 1e13, device
        if device.bf16 and device.device != "MI100":  # its bf16 runs at half of its fp16
            assert device.fp16 == device.bf16, device
        wide, narrow = device.bf16, device.fp8
        assert not (wide and narrow) or narrow == pytest.approx(2 * wide, rel=0.015), device
        assert not (wide and device.tf32) or device.tf32 == pytest.approx(wide / 2, rel=0.015), device
        assert not (device.fp8 and device.int8) or device.int8 in (device.fp8, 2 * device.fp8), device


def test_pcie_sxm_and_nvl_are_told_apart() -> None:
    assert peak("H100 SXM").bf16 > peak("H100 NVL").bf16 > peak("H100 PCIe").bf16
    assert peak("A100 PCIe 80GB").bytes_per_s < peak("A100 SXM 80GB").bytes_per_s
    assert peak("H200 NVL").bf16 < peak("H200").bf16
    assert peak("V100 PCIe 16GB").fp16 < peak("V100 SXM 16GB").fp16


def test_geforce_figures_are_with_fp32_accumulation() -> None:
    """From the tables of the architecture whitepapers; the fp16-accumulate figures are twice these."""
    assert peak("RTX 3090").fp32 == pytest.approx(35.6 * TFLOPS, rel=2e-3)
    assert peak("RTX 3090").tf32 == pytest.approx(35.6 * TFLOPS, rel=2e-3)
    assert peak("RTX 4090").fp8 == pytest.approx(330.3 * TFLOPS, rel=2e-3)
    assert peak("RTX 4090").int8 == pytest.approx(660.6 * TFLOPS, rel=2e-3)
    assert peak("RTX 5090").tf32 == pytest.approx(104.8 * TFLOPS, rel=2e-3)
    assert peak("RTX 2080 Ti").int8 == pytest.approx(215.2 * TFLOPS, rel=2e-3)
    assert peak("RTX 2080 Ti").bf16 is None
    assert "fp32 accumulation" in peak("RTX 4090").source


def test_a_shared_name_gives_only_what_its_bearers_agree_on() -> None:
    a100 = peak("NVIDIA A100")
    assert a100.bf16 == 312 * TFLOPS and a100.bytes_per_s is None
    assert peak("A100 40GB").bytes_per_s == 1555 * GB
    assert peak("A100", memory_gb=79.3).bytes_per_s is None  # SXM or PCIe
    assert peak("A100", memory_gb=79.3, power_w=400).bytes_per_s == 2039 * GB
    assert mfu.peak("NVIDIA H100") is None
    assert peak("NVIDIA H100", power_w=700, memory_gb=79.6).bytes_per_s == 3350 * GB
    assert peak("NVIDIA H100", power_w=350).bf16 == 756 * TFLOPS
    assert mfu.peak("NVIDIA H100", memory_gb=95) is None  # an NVL, or the custom 96 GB SXM of the same name
    custom = peak("NVIDIA H100", memory_gb=95, power_w=500)
    assert custom.bf16 == 989.5 * TFLOPS and custom.bytes_per_s is None
    assert peak("AMD Instinct MI250X / MI250").bf16 is None
    assert mfu.peak("RTX 3080") is None
    assert peak("NVIDIA GeForce RTX 3080", memory_gb=9.8).bytes_per_s == 760 * GB
    assert peak("RTX 3060").bf16 and peak("RTX 3060").bytes_per_s is None
    assert mfu.peak("RTX 6000") is None
    assert mfu.peak("A100", memory_gb=64) is None  # no product of that size is known


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "laptop"),
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", "laptop"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "MIG"),
        ("GRID A100-40C", "not in the peak table"),
        ("NVIDIA H100 80GB HBM2e", "not in the peak table"),
        ("NVIDIA Tesla K80", "not in the peak table"),
        ("H100", "may be any of H100 SXM, H100 PCIe"),
        ("Apple M3", "not in the peak table"),
        ("", "not in the peak table"),
    ],
)
def test_an_unknown_device_has_no_peak_and_a_reason(name: str, reason: str) -> None:
    assert mfu.peak(name) is None
    assert reason in mfu.why_unknown(name) and "--peak_tflops" in mfu.why_unknown(name)


def test_a_known_device_may_lack_a_dtype() -> None:
    assert peak("V100 SXM 16GB").bf16 is None
    assert "no dense bf16 figure is published for V100 SXM 16GB" in mfu.why_unknown("V100-SXM2-16GB")
    assert peak("RTX 4000 Ada").bf16 is None and peak("RTX 4000 Ada").fp32 is not None
    assert peak("H100 SXM").flops(torch.bfloat16) == peak("H100 SXM").flops("bf16") == 989.5 * TFLOPS
    assert peak("H100 SXM").flops(torch.float32) == 67 * TFLOPS
    with pytest.raises(ValueError, match="float64"):
        peak("H100 SXM").flops(torch.float64)


def test_given_and_measured_peaks_say_what_they_are() -> None:
    given = mfu.peak_of(torch.device("cpu"), peak_tflops=2.5)
    assert given is not None and (given.kind, given.flops("fp32"), given.bytes_per_s) == ("given", 2.5 * TFLOPS, None)
    assert mfu.peak_of(torch.device("cpu")) is None
    measured = mfu.Peak.measured("H100 SXM", {"bf16": 794.5 * TFLOPS}, 3.0e12, "GEMM 8192^3, 1.7 GHz")
    assert (measured.kind, measured.bf16, measured.fp8) == ("measured", 794.5 * TFLOPS, None)
    assert mfu.DEVICES["H100 SXM"].kind == "datasheet"
    with pytest.raises(ValueError, match="above 0"):
        mfu.Peak.given(0)


# --- FLOPs per token --------------------------------------------------------------------------------


def random_config(rng: random.Random) -> GPTConfig:
    head_dim, n_head = rng.choice([2, 4, 8, 16]), rng.choice([1, 2, 3, 4, 6])
    return GPTConfig(
        block_size=rng.randint(1, 48), vocab_size=rng.randint(3, 300), n_layer=rng.randint(1, 4), n_head=n_head,
        n_kv_head=rng.choice([None, *(g for g in range(1, n_head + 1) if n_head % g == 0)]), n_embd=head_dim * n_head,
        bias=rng.random() < 0.5, norm=rng.choice(["layernorm", "rmsnorm"]), position=rng.choice(["learned", "rope"]),
        activation=rng.choice(["gelu", "gelu_tanh", "relu2", "swiglu"]), qk_norm=rng.random() < 0.5,
        tied=rng.random() < 0.5, softcap=rng.choice([None, 15.0]), norm_weight=rng.random() < 0.5,
        mlp_width=rng.choice([None, 24]), **random_parts(rng, head_dim * n_head),
    )  # fmt: skip


def random_parts(rng: random.Random, width: int) -> dict[str, Any]:
    """Some of nanochat's parts."""
    windows = rng.choice(
        [{}, dict(window_pattern="SL", window=3), dict(window_pattern="SSSL", window=rng.randint(0, 50))]
    )
    wide = {name: rng.random() < 0.5 for name, least in (("value_embeddings", 12), ("smear", 24)) if width >= least}
    return windows | wide | {name: rng.random() < 0.5 for name in ("residual_scalars", "backout", "embedding_norm")}


@pytest.mark.parametrize("seed", range(60))
def test_flops_and_parameters_agree_with_the_model(seed: int) -> None:
    """FlopCounterMode sees the whole T x T product of a masked attention, so it is compared with causal=False.

    In fp64 attention is written out; the counter does not know the fused operator that a CPU takes in fp32.
    """
    rng = random.Random(seed)
    config = random_config(rng)
    B, T = rng.randint(1, 3), config.block_size
    model = GPT(config, kernels.load("reference"), torch.float64)
    tokens = torch.randint(config.vocab_size, (2, B, T))
    with FlopCounterMode(display=False) as counter:
        model(tokens[0], tokens[1]).backward()
    flops = mfu.flops_per_token(config, T, causal=False)
    assert flops.mfu * B * T == pytest.approx(counter.get_total_flops(), rel=1e-3)

    lookup_only = 0 if config.tied else config.vocab_size * config.n_embd
    lookup_only += mfu.value_params(config) + mfu.scalar_params(config)
    assert mfu.palm_params(config) == model.num_params(non_embedding=True) - lookup_only


@pytest.mark.parametrize("window", [None, 0, 1, 5, 16, 100])
@pytest.mark.parametrize("T", [1, 2, 7, 17, 64])
def test_a_seen_pair_counts_once_and_a_masked_one_not_at_all(T: int, window: int | None) -> None:
    """The pairs are counted on the attention op itself: the keys to which the reference gives any weight."""
    x = torch.zeros(1, T, 1, T)
    one_hot = torch.eye(T).view(1, T, 1, T)  # as values: out[t] is the row of weights of query t
    weights = kernels.load("reference").attention(x, x, one_hot, causal=True, window=window)
    pairs = int((weights > 0).sum())
    assert mfu.mean_keys(T, True, window) * T == pytest.approx(pairs)

    config = GPTConfig(block_size=T, vocab_size=11, n_layer=3, n_head=2, n_embd=8)
    weight_flops = 6 * (mfu.block_params(config) + mfu.lm_head_params(config))
    attention = mfu.flops_per_token(config, T, window=window).mfu - weight_flops
    two_products, forward_and_backward, multiply_add = 2, 3, 2
    assert attention * T == pytest.approx(3 * pairs * 8 * two_products * forward_and_backward * multiply_add)


def test_a_layer_counts_its_own_window() -> None:
    plain = GPTConfig(block_size=64, vocab_size=11, n_layer=3, n_head=2, n_embd=8)
    config = dataclasses.replace(plain, window_pattern="SL", window=5)
    weights = mfu.flops_per_token(plain, 64).mfu - 12 * 8 * 3 * mfu.mean_keys(64)
    keys = mfu.mean_keys(64, True, 5) + 2 * mfu.mean_keys(64)
    assert mfu.flops_per_token(config, 64).mfu == pytest.approx(weights + 12 * 8 * keys)
    assert mfu.flops_per_token(plain, 64).palm - mfu.flops_per_token(config, 64).palm == 12 * 8 * (64 - 5)
    read = mfu.decode_bytes(plain, 40) - mfu.decode_bytes(config, 40)
    assert read == 2 * 2 * 8 * (40 - 6) and mfu.decode_bytes(plain, 4) == mfu.decode_bytes(config, 4)


@pytest.mark.parametrize(
    ("T", "palm", "exact"), [(1024, 855.2, 797.9), (8192, 1647.9, 1194.2), (32768, 4365.8, 2553.2)]
)
def test_gpt2_124m_flops_per_token(T: int, palm: float, exact: float) -> None:
    flops = mfu.flops_per_token(GPT2, T)
    assert round(flops.palm / 1e6, 1) == palm
    assert round(flops.mfu / 1e6, 1) == exact


def test_hfu_adds_what_is_computed_twice() -> None:
    """Beside the model's FLOPs: each option adds the forward products it names, counted here from the shapes."""
    config = GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
    T, C, V, L = 32, 32, 100, 2
    pairs = T * (T + 1) / 2
    scores = L * 2 * pairs * C / T
    blocks = L * 2 * (C * 2 * C + C * C + 8 * C * C) + 2 * scores
    base = mfu.flops_per_token(config, T, recompute_attention=False)
    assert base.hfu == base.mfu

    def added(**options: bool) -> float:
        flops = mfu.flops_per_token(config, T, **{"recompute_attention": False, **options})
        assert flops.mfu == base.mfu and flops.palm == base.palm
        return flops.hfu - base.hfu

    assert added(recompute_attention=True) == scores
    assert added(recompute_blocks=True) == blocks
    assert added(recompute_logits=True) == 2 * V * C
    assert added(recompute_attention=True, recompute_blocks=True) == scores + blocks
    assert mfu.flops_per_token(config, T).hfu == base.mfu + scores  # flash attention is the default


# --- the figures ------------------------------------------------------------------------------------


def test_the_mfu_that_nanogpt_prints() -> None:
    """33.22 ms per iteration of the character model, batch 64, against an A100: 11.217%; 33.23 ms: 11.213%."""
    for seconds, percent in ((0.03322, 11.217), (0.03323, 11.213)):
        figures = mfu.utilization(64 * 256 / seconds, PRESETS["char"], 256, peak=mfu.peak("A100"))
        assert round(100 * figures["mfu_palm"], 3) == percent
        assert figures["mfu"] < figures["hfu"] < figures["mfu_palm"]
    assert mfu.format_mfu(figures["mfu_palm"]) == "11.21%"


def test_utilization_scales_with_devices_dtype_and_is_none_when_unknown() -> None:
    h100 = mfu.peak("H100 SXM")
    one = mfu.utilization(4e5, GPT2, 1024, peak=h100)
    assert mfu.utilization(32e5, GPT2, 1024, peak=h100, world_size=8) == pytest.approx(one)
    assert mfu.utilization(4e5, GPT2, 1024, peak=h100, dtype="fp8")["mfu"] == pytest.approx(one["mfu"] / 2)
    assert mfu.utilization(4e5, GPT2, 1024, peak=h100, dtype=torch.float16) == one
    unknown = {"mfu": None, "mfu_palm": None, "hfu": None}
    assert mfu.utilization(4e5, GPT2, 1024, peak=None) == unknown
    assert mfu.utilization(4e5, GPT2, 1024, peak=mfu.peak("V100 SXM 16GB"), dtype="bf16") == unknown
    assert mfu.format_mfu(None) == "n/a"


def test_decode_bandwidth() -> None:
    """GPT-2 124M in bf16: 123.65M weights and 12 layers x 2 x 768 numbers per cached token."""
    config = dataclasses.replace(GPT2, n_kv_head=4)
    assert mfu.decode_bytes(GPT2, context=1000, batch=3) == 2 * 123_653_376 + 3 * 1000 * 12 * 2 * 768 * 2
    assert mfu.decode_bytes(config, 1000) == 2 * mfu.palm_params(config) + 1000 * 12 * 2 * 256 * 2
    read = mfu.decode_bytes(GPT2, 0, weight_bytes=1)
    assert mfu.mbu(1e-3, read, mfu.peak("H100 SXM")) == pytest.approx(123_653_376 / 1e-3 / 3.35e12)
    assert mfu.mbu(1e-3, read, mfu.peak("A100")) is None and mfu.mbu(1e-3, read, None) is None


# --- python -m bench mfu ----------------------------------------------------------------------------


def bench(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.run(bench_mfu.main, argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_bench_mfu_answers_by_all_three_conventions(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = bench(capsys, "--tokens_per_s", "450000", "--model", "gpt2", "--device", "NVIDIA H100 80GB HBM3")
    assert code == 0
    assert re.search(r"^mfu +36\.29%", out, re.M) and re.search(r"^mfu_palm +38\.89%", out, re.M)
    assert re.search(r"^hfu +36\.71%", out, re.M)
    assert "989.5 TFLOP/s bf16, datasheet" in out and "1 x H100 SXM" in out and "above the peak" not in out
    code, out, _ = bench(capsys, "--tokens_per_s=45000000", "--device=H100 SXM")
    assert code == 0 and "3628.52%" in out
    assert out.endswith("\nabove the peak, which no run reaches: check the speed, --world_size, --device and --dtype\n")


def test_bench_mfu_takes_an_iteration_a_given_peak_and_another_shape(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = bench(capsys, "--ms-per-iter=33.22", "--batch_size=64", "--model=char", "--peak-tflops=312", "--json")
    answer = json.loads(out)
    assert round(100 * answer["mfu_palm"], 3) == 11.217 and answer["peak_kind"] == "given"
    _, out, _ = bench(capsys, "--tokens_per_s=1e5", "--n_layer=24", "--block_size=8192", "--device=A100", "--json")
    expected = mfu.flops_per_token(dataclasses.replace(GPT2, n_layer=24), 8192)
    assert json.loads(out)["flops_per_token"] == dataclasses.asdict(expected)


def test_bench_mfu_prints_na_and_the_reason_where_no_peak_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    for device, reason in (("H100", "may be any of"), ("RTX 9999", "not in the peak table"), ("T4", "no dense bf16")):
        code, out, _ = bench(capsys, "--tokens_per_s=1e5", f"--device={device}")
        assert code == 0 and len(re.findall(r"^\w+ +n/a ", out, re.M)) == 3 and reason in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device=H100 SXM"], "give --tokens_per_s"),
        (["--ms_per_iter=3", "--device=H100 SXM"], "--batch_size"),
        (["--tokens_per_s=0"], "--tokens_per_s=0: must be above 0"),
        (["--tokens_per_s=many"], "invalid float value: 'many'"),
        (["--tokens_per_s=1e5", "--model=gtp2"], "--model=gtp2 is unknown; did you mean gpt2?"),
        (["--tokens_per_s=1e5", "--devise=H100"], "unknown flag --devise; did you mean --device"),
        (["--tokens_per_s=1e5", "--n_head=7"], "n_embd is 768, which 7 heads do not divide"),
        (["--tokens_per_s=1e5", "--peak_tflops=-1"], "--peak_tflops=-1: must be above 0"),
    ],
)
def test_bench_mfu_errors_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = bench(capsys, *argv)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_bench_mfu_lists_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = bench(capsys, "--devices")
    assert len(out.splitlines()) == 1 + len(mfu.DEVICES)
    assert all(device.source in out for device in mfu.DEVICES.values())
