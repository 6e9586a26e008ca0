"""The dial against nanochat's own figures; the plan against what the model and its kernels really count and keep."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import kernels
from gptfast import cli, hf, mfu
from gptfast.config import GPTConfig, of_depth
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.optim import muon
from train import build, dial, plan, pretrain, schedules
from train.config import Pretrain
from train.prepare import prepare
from train.presets import PRESETS

# depth: width, heads, parameters, scaling weights, tokens, batch, iterations, rates x, AdamW's x, decay, FLOP/token
NANOCHAT = {
    4: (256, 2, 36_700_242, 11_534_384, 138_412_608, 262_144, 528, 0.7071, 1.7321, 1.8899, 8.0216e7),
    6: (384, 3, 73_531_538, 23_199_852, 278_398_224, 262_144, 1_062, 0.7071, 1.4142, 0.9396, 1.6751e8),
    8: (512, 4, 125_829_354, 41_943_232, 503_318_784, 262_144, 1_920, 0.7071, 1.2247, 0.5197, 2.9570e8),
    12: (768, 6, 286_261_730, 110_100_912, 1_321_210_944, 524_288, 2_520, 1, 1, 0.28, 7.5970e8),
    16: (1024, 8, 536_871_738, 234_881_792, 2_818_581_504, 524_288, 5_376, 1, 0.8660, 0.1313, 1.5855e9),
    20: (1280, 10, 896_533_746, 435_160_240, 5_221_922_880, 1_048_576, 4_980, 1.4142, 0.7746, 0.1002, 2.8862e9),
    24: (1536, 12, 1_384_122_122, 729_810_624, 8_757_727_488, 1_048_576, 8_352, 1.4142, 0.7071, 0.0597, 4.7752e9),
    26: (1664, 13, 1_681_786_938, 918_423_532, 11_021_082_384, 1_048_576, 10_510, 1.4142, 0.6794, 0.0475, 5.9911e9),
    32: (2048, 16, 2_818_575_450, 1_677_724_672, 20_132_696_064, 2_097_152, 9_600, 2, 0.6124, 0.0368, 1.0771e10),
}
OPS = kernels.load("reference")
SMALL = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, bias=False)
MODERN = dataclasses.replace(
    SMALL, n_layer=1, norm="rmsnorm", position="rope", activation="relu2", qk_norm=True, tied=False, softcap=15.0
)
LLAMA = dataclasses.replace(
    MODERN, n_kv_head=1, norm_weight=True, activation="swiglu", mlp_width=48, qk_norm=False, softcap=None
)


# ---- the dial
def nanochats(depth: int) -> dial.Sizes:
    return dial.sizes(of_depth(depth), "nanochat")


@pytest.mark.parametrize("depth", NANOCHAT)
def test_what_follows_from_a_depth_is_nanochats(depth: int) -> None:
    """The model that is built, weight by weight, and all that is derived from it."""
    width, heads, parameters, scaling, tokens, batch, iterations, rates, adamw_rates, decay, flops = NANOCHAT[depth]
    counted, model = nanochats(depth), of_depth(depth)
    found = dial.recipe(counted, nanochats(12), width)
    with torch.device("meta"):
        built = GPT(model, OPS)
    assert (model.n_embd, model.n_head, model.head_dim) == (width, heads, 128)
    assert built.num_params() == counted.parameters == parameters
    assert sum(p.numel() for m in (built.lm_head, built.transformer["h"]) for p in m.parameters()) == scaling
    assert counted.scaling == scaling
    assert float(f"{counted.flops_per_token:.5g}") == pytest.approx(flops, rel=1e-4)
    assert (found.tokens, found.batch_tokens, found.iterations) == (tokens, batch, iterations)
    assert (found.batch_scale, found.width_scale) == pytest.approx((rates, adamw_rates), abs=5e-5)
    assert found.weight_decay == pytest.approx(decay, abs=5e-5)


def test_depth_12_to_the_last_digit() -> None:
    assert nanochats(12).flops_per_token == 759_696_048
    model = of_depth(12)
    assert model.windows == (512, 512, 512, None) * 3
    assert model.value_layers == (1, 3, 5, 7, 9, 11)
    assert (model.rope_base, model.rope_sign, model.qk_gain, model.softcap) == (100_000, -1, 1.2, 15)
    assert of_depth(6, context=600).window == 256 and of_depth(6, context=64).window == 128


@pytest.mark.parametrize("depth", NANOCHAT)
def test_ours_differs_from_nanochats_by_its_gates_alone(depth: int) -> None:
    """In the weights that measure data: so batch, iterations and rates agree, and the decay to 4 digits."""
    model, reference = (of_depth(d, architecture="gptfast") for d in (depth, 12))
    ours, theirs = dial.sizes(model), nanochats(depth)
    assert theirs.scaling - ours.scaling == 12 * model.n_head * ((depth + 1) // 2)
    found = dial.recipe(ours, dial.sizes(reference), model.n_embd)
    expected = dial.recipe(theirs, nanochats(12), model.n_embd)
    for field in ("batch_tokens", "iterations", "batch_scale", "width_scale"):
        assert getattr(found, field) == getattr(expected, field), field
    assert found.weight_decay == pytest.approx(expected.weight_decay, rel=1e-4)


def test_sizes_are_those_of_the_model() -> None:
    ours = of_depth(2, 512, architecture="gptfast")
    for config in (ours, of_depth(3, 512), SMALL, dataclasses.replace(SMALL, tied=False, bias=True), LLAMA):
        assert dial.sizes(config).parameters == GPT(config, OPS).num_params(non_embedding=False)


def test_horizons_and_their_precedence() -> None:
    counted, reference = nanochats(12), nanochats(12)
    by_flops = dial.recipe(counted, reference, 768, target_flops=1e18)
    assert by_flops.iterations == 2511
    both = dial.recipe(counted, reference, 768, iterations=100, target_flops=1e18)
    assert both.iterations == 100
    assert both.weight_decay == by_flops.weight_decay == 0.28  # of the ratio's tokens, whatever the horizon
    assert dial.recipe(counted, reference, 768, ratio=24.0).iterations == 2 * 2520
    smaller = dial.recipe(counted, reference, 768, batch_tokens=2**17)
    assert (smaller.iterations, smaller.batch_scale, smaller.weight_decay) == (4 * 2520, 0.5, 0.14)
    with pytest.raises(UserError, match="shorter than one update"):
        dial.recipe(counted, reference, 768, target_flops=1e12)


# ---- its schedules
def test_the_trapezoid() -> None:
    """1000 iterations: 40 up, level to 350, down to 0.05 in 650."""
    expected = {
        0: 1 / 40,
        38: 39 / 40,
        39: 1.0,
        40: 1.0,
        350: 1.0,
        351: 1 - 0.95 / 650,
        675: 0.525,
        1000: 0.05,
        1001: 0.05,
    }
    found = {iteration: schedules.trapezoid(iteration, 1000) for iteration in expected}
    assert found == pytest.approx(expected)
    assert schedules.trapezoid(1000, 1000, warmdown=0.0) == 1.0


def test_momentum_and_decay() -> None:
    """4000 iterations: momentum up in 400, down from 1400."""
    expected = {
        0: 0.85,
        200: 0.91,
        399: 0.85 + 0.12 * 399 / 400,
        400: 0.97,
        1399: 0.97,
        1400: 0.97,
        2700: 0.935,
        4000: 0.90,
    }
    assert {iteration: schedules.momentum(iteration, 4000) for iteration in expected} == pytest.approx(expected)
    assert [schedules.half_cosine(iteration, 100) for iteration in (0, 50, 100, 101)] == pytest.approx(
        [1.0, 0.5, 0.0, 0.0]
    )


def turned(*flags: str) -> Pretrain:
    config = cli.parse(Pretrain, flags, PRESETS)
    return dial.configure(config, cli.typed(flags, Pretrain), 32768)


def test_an_optimizer_follows_the_schedule() -> None:
    config = dataclasses.replace(turned("--depth=4"), lr_decay_iters=1000)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8, tied=False), OPS)
    optimizer = build.make_optimizer(config, model)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    expected = {"matrices": config.matrix_lr, "embeddings": config.learning_rate, "head": config.head_lr}
    assert {name: rates[name] for name in expected} == pytest.approx(expected)
    assert schedules.set_schedule(optimizer, 675, config) == pytest.approx(0.525 * config.learning_rate)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.525 * rates[group["name"]])
    matrices = next(group for group in optimizer.param_groups if group["kind"] == "muon")
    assert matrices["weight_decay"] == pytest.approx(config.weight_decay * schedules.half_cosine(675, 1000))
    assert matrices["momentum"] == pytest.approx(schedules.momentum(675, 1000))
    assert matrices["cautious"] and matrices["normalize"] and matrices["decay_by_shape"]
    assert schedules.set_schedule(optimizer, 675, dataclasses.replace(config, decay_lr=False)) == config.learning_rate


def test_a_rate_of_zero_follows_the_trapezoid() -> None:
    config = Pretrain(schedule="trapezoid", learning_rate=0.0, min_lr=0.0, warmup_iters=2, lr_decay_iters=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    assert [schedules.set_schedule(optimizer, iteration, config) for iteration in (0, 5, 9)] == [0.0, 0.0, 0.0]


# ---- train.pretrain --depth
def test_a_depth_turns_the_flags() -> None:
    config = turned("--depth=20")
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size) == (20, 1280, 10, 2048)
    assert config.gradient_accumulation_steps * config.batch_size * config.block_size == 2**20
    assert (config.max_iters, config.lr_decay_iters, config.warmup_iters) == (4980, 4980, 40)
    assert (config.optimizer, config.schedule, config.grad_clip, config.tied) == ("muon", "trapezoid", 0.0, False)
    scale = math.sqrt(2)
    assert config.matrix_lr == pytest.approx(0.02 * scale)
    assert config.learning_rate == pytest.approx(0.3 * scale * math.sqrt(768 / 1280))
    assert config.head_lr == pytest.approx(0.008 * scale * math.sqrt(768 / 1280))
    assert config.min_lr == pytest.approx(0.05 * config.learning_rate)


def test_what_is_typed_or_of_a_preset_stays() -> None:
    config = turned("--depth=12", "--batch_size=8", "--max_iters=30", "--matrix_lr=0.5", "--activation=gelu")
    assert (config.batch_size, config.gradient_accumulation_steps) == (8, 32)
    assert (config.max_iters, config.lr_decay_iters, config.matrix_lr, config.activation) == (30, 30, 0.5, "gelu")
    cpu = turned("speedrun_d6_cpu")
    assert (cpu.gradient_accumulation_steps, cpu.max_iters, cpu.n_head, cpu.n_embd) == (1, 5000, 6, 384)
    assert (turned("speedrun_d24").max_iters, turned("speedrun_d24").batch_size) == (5568, 16)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth=12", "--n_embd=512"], "--n_embd follows from --depth=12"),
        (["--depth=12", "--batch_size=24"], "micro-batches of 24 · 2048 do not divide"),
        (["--depth=-1"], "--depth=-1: must not be negative"),
        (["--depth=4", "--target_flops=1"], "shorter than one update"),
        (["--target_param_data_ratio=0"], "must be above 0"),
        (["--assumed_mfu=2"], "--assumed_mfu=2.0: must be above 0"),
        (["--depth=4", "--dry_run", "--prices=H100 SXM"], "'' is no number"),
        (["--depth=4", "--dry_run", "--prices=H900=3"], "H900 is not in the peak table"),
    ],
)
def test_a_depth_that_cannot_be(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(pretrain.main, [*flags, "--data_dir=/nowhere"]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--depth=12", "--dry_run", f"--out_dir={tmp_path / 'out'}", "--data_dir=/nowhere"]
    assert cli.run(pretrain.main, flags) == 0
    printed = capsys.readouterr().out
    for fact in ("286,261,730", "12 layers, 6 heads of 128, width 768", "110,100,912 weights of blocks and head",
                 "and head, 1,321,210,944", "by PaLM's count 7.5970e+08", "rates 1.0000 for the batch, AdamW's 1.0000",
                 "2,520 updates of 524,288 tokens = 1,321,205,760", "8 micro-batches of 32 sequences",
                 "matrices 0.02, head 0.008, others 0.3; weight decay 0.28", "12.00 for each weight"):  # fmt: skip
        assert fact in printed, fact
    h100, a100 = (
        next(line.split() for line in printed.splitlines() if line.startswith(gpu)) for gpu in ("H100", "A100")
    )
    flops = mfu.flops_per_token(of_depth(12), 2048).mfu * 1_321_205_760
    hours = flops / (989.5e12 * 0.4) / 3600
    assert float(h100[4]) == pytest.approx(hours, abs=0.05) and float(h100[6]) == round(3 * hours)
    assert a100[-1] == "n/a"
    assert not (tmp_path / "out").exists()
    assert cli.run(pretrain.main, [*flags, "--architecture=gptfast"]) == 0
    assert "135,266,304" in capsys.readouterr().out


def test_a_short_run_of_a_depth_learns(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All that the dial sets goes through a run: shape, optimizer, schedules."""
    (tmp_path / "text.txt").write_text(text)
    prepare("tiny", tmp_path / "data", tmp_path / "text.txt")
    flags = [
        "--depth=1", "--head_dim=32", "--block_size=32", "--batch_size=8", "--total_batch_size=256", "--max_iters=60",
        "--dataset=tiny", f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", "--device=cpu",
        "--dtype=float32", "--compile=False", "--eval_interval=60", "--eval_iters=4", "--whole_val=False",
    ]  # fmt: skip
    assert cli.run(pretrain.main, flags) == 0
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert losses[1] < losses[0] - 0.5
    config = hf.load(tmp_path / "out", OPS).config
    assert (config.n_layer, config.n_embd, config.n_head, config.softcap, config.smear) == (1, 64, 2, 15.0, True)


# ---- the plan
NANOCHATS = dataclasses.replace(of_depth(3, 64, 16, 16), window=7)
KEPT = {
    "nanochat": (NANOCHATS, torch.bfloat16),
    "nanochat in fp32": (NANOCHATS, torch.float32),
    "gpt2": (SMALL, torch.float32),
    "modern": (MODERN, torch.bfloat16),
    "llama": (LLAMA, torch.bfloat16),
}


@pytest.mark.triton
@pytest.mark.parametrize(("config", "dtype"), KEPT.values(), ids=KEPT.keys())
def test_memory_is_what_the_kernels_keep(config: GPTConfig, dtype: torch.dtype) -> None:
    """Every tensor that autograd saves in a forward pass of the interpreted kernels, each storage once, to the byte."""
    B, model = 2, GPT(config, kernels.load("interpret"), dtype)
    x, y = torch.randint(config.vocab_size, (2, B, config.block_size))
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x, y)
    predicted = plan.memory(config, B, optimizer="adamw", itemsize=dtype.itemsize)
    logits = dtype.itemsize * B * config.block_size * config.vocab_size  # gone when forward is over
    scalar = loss.element_size()
    expected = predicted.copies + predicted.activations + predicted.loss - logits + scalar
    assert sum(storage.nbytes() for storage in kept.values()) == expected


@pytest.mark.parametrize("config", [MODERN, NANOCHATS], ids=["modern", "nanochat"])
def test_memory_of_weights_and_optimizers(config: GPTConfig) -> None:
    model = GPT(config, OPS)
    for name, optimizer in {"adamw": torch.optim.AdamW(model.parameters()), "muon": muon(model, config)}.items():
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        held = plan.memory(config, 1, optimizer=name)
        assert held.weights == held.gradients == sum(p.nbytes for p in model.parameters())
        tensors = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
        assert held.optimizer == sum(t.nbytes for t in tensors)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    config = of_depth(12)
    room = 80 * 2**30
    batch = plan.largest_batch(config, room, optimizer="muon")
    sizes = [plan.memory(config, b, optimizer="muon").total for b in (batch, batch + 1)]
    assert sizes[0] <= 0.9 * room < sizes[1]
    assert plan.largest_batch(of_depth(32), 2**30, optimizer="muon") == 0


def test_nanogpts_sizing_of_gpt2() -> None:
    """The figures of nanoGPT's transformer_sizing.ipynb: parameters, and training FLOPs of one sequence of 1024."""
    config = GPTConfig(vocab_size=50257, bias=False)
    assert dial.sizes(config).parameters == 124_337_664
    assert mfu.flops_per_token(config, 1024, causal=False).mfu * 1024 == 874_944_921_600
    assert mfu.flops_per_token(config, 1024).palm * 1024 == 875_062_886_400
    printed = plan.describe(Pretrain(), config)
    assert "124,337,664; 123,551,232 without positions" in printed
    assert f"{12 * 124_337_664 / 1e6:,.0f} MB" in printed  # weights and AdamW's two moments


def lines_of(*flags: str) -> dict[str, list[str]]:
    config = cli.parse(plan.Plan, flags, positional="gpu")
    rows = plan.tabulate(config, plan.gpu_named(config.gpu)).splitlines()
    return {row.split()[0]: row.split() for row in rows if row and row.split()[0] in ("d12", "d32", "gpt2-xl", "d8")}


def test_the_table_of_what_fits() -> None:
    h100 = lines_of("H100 SXM")
    assert h100["d12"][1:6] == ["286,261,730", "7.262e+08", "1,321,205,760", "524,288", "2,520"]
    peak_share = float(h100["d12"][2]) * float(h100["d12"][8].replace(",", "")) / 989.5e12
    assert peak_share == pytest.approx(0.4, rel=1e-3)  # the columns agree with the MFU that is assumed
    eight = lines_of("H100 SXM", "--n_gpu=8")
    assert float(eight["d32"][9]) == pytest.approx(float(h100["d32"][9]) / 8, abs=0.1)
    assert eight["d32"][10] == h100["d32"][10]  # the same GPU-hours
    assert eight["d12"][6] == "32"  # 524,288 tokens over 8 GPUs of 2048 each
    small = lines_of("RTX 4090", "--prices=RTX 4090=0.5")
    assert small["gpt2-xl"][6:] == ["0", "n/a", "n/a", "n/a", "n/a"] and small["d8"][-1] != "n/a"
    assert lines_of("RTX 4090")["d8"][-1] == "n/a"
    ours = lines_of("H100 SXM", "--architecture=gptfast")
    assert ours["d12"][1:7] == ["135,266,304", "7.739e+08", "1,321,205,760", "524,288", "2,520", "108"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["RTX 9999"], "RTX 9999 is not in the peak table"),
        (["--n_gpu=0"], "--n_gpu=0: must be at least 1"),
        (["--assumed_mfu=40"], "--assumed_mfu=40.0: must be above 0 and at most 1"),
        (["--depth=-3"], "--depth=-3: must not be negative"),
    ],
)
def test_plans_that_cannot_be(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(plan.main, flags) == 2
    assert message in capsys.readouterr().err


# ---- presets and fine-tuning
def test_the_30m_model_of_openwebtext() -> None:
    config = PRESETS["train_owt_30m"]
    model = build.architecture_of(config, 50304)
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size, config.batch_size) == (6, 6, 384, 512, 64)
    assert dial.sizes(model).parameters - 512 * 384 == 29_938_560
    assert config.batch_size * config.block_size * config.max_iters == 655_360_000


def test_fine_tuning_a_local_pretrained_model(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """finetune_shakespeare, whose gpt2-xl is a small GPT-2 in a folder: 20 updates, and it fits the text better."""
    (tmp_path / "text.txt").write_text(text)
    prepare("tiny", tmp_path / "data", tmp_path / "text.txt")
    pretrained = dataclasses.replace(SMALL, block_size=64, vocab_size=len(set(text)), bias=True)
    hf.save(GPT(pretrained, OPS), tmp_path / "pretrained")
    flags = ["finetune_shakespeare", f"--init_from={tmp_path / 'pretrained'}", "--dataset=tiny", "--block_size=32",
             f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--compile=False",
             "--dtype=float32", "--learning_rate=3e-3", "--gradient_accumulation_steps=4", "--batch_size=4",
             "--eval_iters=10", "--whole_val=False"]  # fmt: skip
    assert cli.run(pretrain.main, flags) == 0
    printed = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step ")]
    assert len(losses) == 5  # at 0, 5, 10, 15 and 20
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.2
    assert "tokens per iteration will be: 512" in printed
    assert hf.load(tmp_path / "out", OPS).config.block_size == 32


def test_a_measured_rate_stands_in_place_of_the_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (Path(__file__).parents[1] / "results" / "nvidia-h200" / "profile.jsonl").read_text().splitlines()
    (tmp_path / "profile.jsonl").write_text("\n".join(rows))
    best = max(json.loads(row)["tokens_per_s"] for row in rows)
    share = mfu.utilization(best, plan.PRESETS["gpt2"], 1024, peak=plan.gpu_named("H200 SXM"))["mfu"]
    assert share is not None and 0.3 < share < 0.5
    assert cli.run(plan.main, ["H200 SXM", f"--measured={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert f"a measured MFU of {share:.0%} (gpt2)" in told
    line = next(line for line in told.splitlines() if line.startswith("gpt2 "))
    assert abs(float(line.split()[8].replace(",", "")) / best - 1) < 0.01  # tokens/s
    assert cli.run(plan.main, ["H100 SXM", f"--measured={tmp_path}"]) == 2
    assert "rows of NVIDIA H200" in capsys.readouterr().err
    assert cli.run(plan.main, ["H200 SXM", f"--measured={tmp_path / 'none'}"]) == 2
