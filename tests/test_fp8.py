"""8-bit floats in training: what rounding may cost, both ways of multiplying, and a model that trains as in bf16."""

from __future__ import annotations

import copy
import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from gptfast import cli, fp8, mfu
from gptfast.config import GPTConfig
from gptfast.errors import UserError
from gptfast.fp8 import E4M3, E5M2, Float8Linear, rounded
from gptfast.model import GPT, Linear
from gptfast.optim import adamw
from gptfast.step import Step, language_model
from train import build, pretrain, trainer
from train.config import Pretrain
from train.prepare import prepare

U = {E4M3: 2.0**-4, E5M2: 2.0**-3}  # half a step of the mantissa
Q = {E4M3: 2.0**-10, E5M2: 2.0**-17}  # half the smallest number
DEVIATION = {E4M3: 2.0**-3 / math.sqrt(12), E5M2: 2.0**-2 / math.sqrt(12)}  # relative, of a rounding, at most
WAYS = ("emulated", "scaled_mm")
CONFIG = GPTConfig(
    block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=128, bias=True, position="rope", norm="rmsnorm"
)


def moved(x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far rounding may move each element of x (fp64); a 2^-20 of it more, for the scale and quotient in fp32."""
    scale = x.abs().max() / torch.finfo(dtype).max
    return (U[dtype] * x.abs() + Q[dtype] * scale) * (1 + 2.0**-20) + 2.0**-20 * x.abs()


def may_miss(a: Tensor, a_dtype: torch.dtype, b: Tensor, b_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The bound on |product - a b^T|: of roundings of a and b, of summing in fp32, of the result's own rounding."""
    e_a, e_b, K = moved(a, a_dtype), moved(b, b_dtype), a.shape[1]
    whole = (a.abs() + e_a) @ (b.abs() + e_b).t()
    return (whole - a.abs() @ b.abs().t()) + whole * (K * 2.0**-24 + torch.finfo(dtype).eps)


def problem(M: int = 96, K: int = 192, N: int = 128, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """x, weight and the gradient of y, of three magnitudes as a model has them."""
    draw = torch.Generator(device).manual_seed(0)
    x, w, g = (torch.randn(s, generator=draw, device=device) for s in ((M, K), (N, K), (M, N)))
    return x.to(dtype), 0.02 * w, (1e-6 * g).to(dtype)


def results(x: Tensor, w: Tensor, g: Tensor, way: Any, function: Any = fp8.linear) -> list[Tensor]:
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    y = function(x, w, way)
    return [y.detach(), *torch.autograd.grad(y, (x, w), g)]


# ---- rounding


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e25])
def test_rounding_moves_a_number_by_no_more_than_stated(dtype: torch.dtype, magnitude: float) -> None:
    x = magnitude * torch.randn(4096, generator=torch.Generator().manual_seed(1)) ** 7  # over many binades
    found = rounded(x, dtype)
    assert found.scale.dtype == torch.float32 and found.scale.shape == () and found.values.dtype == dtype
    assert found.values.float().abs().max() == torch.finfo(dtype).max
    error = (found.values.double() * found.scale.double() - x.double()).abs()
    bound = moved(x.double(), dtype)
    assert (error <= bound).all() and (error > 0.85 * bound).any()  # nor is the bound a loose one


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_zeros_stay_and_what_is_no_number_spreads(dtype: torch.dtype) -> None:
    assert not rounded(torch.zeros(8), dtype).values.float().any()
    for bad in (math.nan, math.inf):
        x, w, _ = problem(M=32)
        x[3, 5] = bad
        for way in WAYS:
            assert fp8.linear(x, w, way).isnan().all(), way


# ---- products


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [96, 100])  # what 16 does not divide is filled up
def test_a_linear_map_misses_by_no_more_than_its_formats_allow(M: int, dtype: torch.dtype, way: str) -> None:
    x, w, g = problem(M, dtype=dtype)
    X, W, G = x.double(), w.double(), g.double()
    y, dx, dw = results(x, w, g, way)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)
    cases = (
        (y, X, E4M3, W, E4M3, dtype),
        (dx, G, E5M2, W.t(), E4M3, dtype),
        (dw, G.t(), E5M2, X.t(), E4M3, torch.float32),
    )
    for found, a, a8, b, b8, stored in cases:
        truth = a @ b.t()
        assert ((found.double() - truth).abs() <= may_miss(a, a8, b, b8, stored)).all()
        usual = math.hypot(DEVIATION[a8], DEVIATION[b8])
        assert usual / 4 < relative_error(found, truth) < usual  # it is 8 bits that were multiplied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_multiply_the_same_numbers(dtype: torch.dtype) -> None:
    """torch._scaled_mm, which a CPU has too, beside fp64 products of the same 8 bits: sums in fp32, rounded once."""
    x, w, g = problem(M=100, dtype=dtype)
    x8, w8, g8 = rounded(x, E4M3), rounded(w, E4M3), rounded(g, E5M2)
    X, W, G = (t.values.double() * t.scale.double() for t in (x8, w8, g8))
    for way in WAYS:
        found = results(x, w, g, way)
        for f, a, b in zip(found, (X, G, G.t()), (W, W.t(), X.t()), strict=True):
            allowed = a.shape[1] * 2.0**-24 + torch.finfo(f.dtype).eps
            assert ((f.double() - a @ b.t()).abs() <= allowed * (a.abs() @ b.abs().t())).all()


@pytest.mark.parametrize("M", [96, 100])
def test_torch_is_asked_as_a_gpu_wants_it(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes any layout and size; the tensor cores take rows by columns, of sizes that 16 divides."""
    asked, original = [], torch._scaled_mm

    def strict(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        assert a.is_contiguous() and b.t().is_contiguous() and a.shape[1] == b.shape[0]
        assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        assert all(options[f"scale_{name}"].shape == () for name in "ab")
        asked.append((a.dtype, b.dtype, options["use_fast_accum"]))
        return original(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    results(*problem(M), "scaled_mm")
    assert asked == [(E4M3, E4M3, True), (E5M2, E4M3, False), (E5M2, E4M3, False)]


def test_views_and_gradients_that_are_not_wanted() -> None:
    x, w, g = problem(M=64)
    layer, batch = Float8Linear(of(w), "scaled_mm"), x.view(4, 16, -1)
    apart = batch.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(layer(apart), layer(batch)) and layer(batch).shape == (4, 16, 128)
    assert torch.equal(layer(batch), fp8.linear(x, w, "scaled_mm").view(4, 16, -1) + layer.bias)
    assert torch.equal(layer(batch, with_bias=False), fp8.linear(x, w, "scaled_mm").view(4, 16, -1))
    w.requires_grad_()
    fp8.linear(x, w, "emulated").backward(g)  # of x no gradient is asked
    assert w.grad is not None and torch.equal(w.grad, results(x, w, g, "emulated")[2])


def of(weight: Tensor) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight
    return layer


def test_what_is_kept_for_the_backward_pass_has_8_bits() -> None:
    x, w, _ = problem()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        fp8.linear(x.requires_grad_(), w.requires_grad_(), "emulated")
    assert [(t.dtype, t.shape) for t in kept if t.ndim] == [(E4M3, x.shape), (E4M3, w.shape)]
    y = fp8.linear(x, w, "emulated")
    with pytest.raises(RuntimeError, match="second derivative; leave fp8 out"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


class HostReads(TorchDispatchMode):
    """Counts what a CUDA graph could not hold: a number that the host reads, a copy to another device."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += function.__name__.split(".")[0] in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_map_is_one_graph_and_reads_nothing_back(way: str) -> None:
    x, w, g = problem(M=100, dtype=torch.bfloat16)
    with HostReads() as reads:
        eager = results(x, w, g, way)
    assert reads.found == 0
    compiled = torch.compile(fp8.linear, fullgraph=True, backend="aot_eager")
    for found, expected in zip(results(x, w, g, way, compiled), eager, strict=True):
        assert torch.equal(found, expected)


# ---- models


def model_of(**fields: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **fields}), kernels.load("reference"), torch.bfloat16)


def batch_of(seed: int = 3) -> tuple[Tensor, Tensor]:
    stream = torch.randint(8, (4, 33), generator=torch.Generator().manual_seed(seed))
    return stream[:, :-1].clone(), stream[:, 1:].clone()


def test_only_large_maps_of_the_blocks_are_converted() -> None:
    model = model_of(mlp_width=200)  # 8 divides it, 16 does not
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    before = copy.deepcopy(model).eval()
    converted, left = fp8.convert(model, "emulated")
    assert converted == [f"transformer.h.{i}.attn.{name}" for i in range(2) for name in ("c_attn", "c_proj")]
    assert left == ["lm_head"] + [f"transformer.h.{i}.mlp.{name}" for i in range(2) for name in ("c_fc", "c_proj")]
    assert list(model.state_dict()) == names
    assert all(p is parameters[name] for name, p in model.named_parameters())
    tokens, targets = batch_of()
    assert torch.equal(model.eval()(tokens, targets), before(tokens, targets))  # evaluation is as it was
    assert not torch.equal(model.train()(tokens, targets), before(tokens, targets))
    small = model_of(n_embd=64)
    assert fp8.convert(small, "emulated")[0] == []


def test_flops_are_counted_as_before() -> None:
    """Which nanochat's are not: it counts no weight of a converted map."""
    tokens, targets = batch_of()
    counts = []
    for convert in (False, True):
        model = model_of(bias=False)
        if convert:
            assert len(fp8.convert(model, "emulated")[0]) == 8
        with FlopCounterMode(display=False) as counter:
            model(tokens, targets).backward()
        counts.append(counter.get_total_flops())
    stated = mfu.flops_per_token(model.config, 32, causal=False, recompute_attention=False).mfu
    assert counts[0] == counts[1] and counts[0] / tokens.numel() == pytest.approx(stated)


def losses(convert: bool, updates: int = 24, **how: bool) -> list[float]:
    """Of as many updates, each on tokens that are drawn anew from eight."""
    model = model_of(n_layer=1, bias=False)
    if convert:
        fp8.convert(model, "emulated")
    optimizer = adamw(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    step = Step(language_model(model), optimizer, clip=1.0, **how)  # type: ignore[arg-type]
    return [step(iter([batch_of(seed=i)])).item() for i in range(updates)]


@pytest.mark.parametrize("graph", [False, True])
def test_a_model_trains_as_in_bf16(graph: bool) -> None:
    """Captured or not, the loss of every update is within 2 % of bf16's."""
    plain, eighth = losses(False), losses(True, graph=graph)
    assert plain[-1] < 0.6 * plain[0] and plain != eighth
    assert all(abs(e - p) <= 0.02 * p for p, e in zip(plain, eighth, strict=True))


def test_a_compiled_update_is_one_graph_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward and clipping; aot_eager traces as inductor does and is faster to come."""
    eager = losses(True, 4)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert losses(True, 4, compiled=True) == pytest.approx(eager, rel=1e-3)


# ---- the command


def test_a_gpu_without_8_bit_floats_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8.way("cpu") == "emulated"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"--fp8: NVIDIA A100-SXM4-80GB \(sm_80\) has no 8-bit floats.*leave it out"):
        fp8.way("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fp8.way("cuda") == "scaled_mm"
    with pytest.raises(UserError, match="--fp8 needs an NVIDIA GPU, and mps is none"):
        fp8.way("mps")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(UserError, match="--fp8 needs an NVIDIA GPU, and cuda is none"):
        fp8.way("cuda")


def test_mfu_is_against_the_fp8_peak_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mfu, "peak_of", lambda device, given: mfu.peak("H100 SXM"))
    build.use_fp8(Pretrain(fp8=True), model_of(), "cpu")
    said = capsys.readouterr().out
    assert "fp8: 8 linear maps, e4m3 forward and e5m2 gradients, by emulation" in said and "as before: lm_head" in said
    assert "mfu: against the dense fp8 peak of H100 SXM, 1,979 TFLOP/s" in said


def test_the_command_trains_in_8_bits(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(text[:4000])
    prepare("tiny", tmp_path / "data", tmp_path / "text.txt")
    flags = [
        "--device=cpu", "--compile=False", "--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=1",
        "--n_layer=1", "--n_head=2", "--max_iters=2", "--eval_iters=1", "--dataset=tiny", "--peak_tflops=1", "--fp8",
        f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", "--report=False",
    ]  # fmt: skip
    assert cli.run(pretrain.main, [*flags, "--n_embd=128"]) == 0
    said = capsys.readouterr().out
    assert "fp8: 4 linear maps" in said and "dense fp8 peak of given, 1 TFLOP/s" in said and "iter 2: loss" in said
    assert cli.run(pretrain.main, [*flags, "--n_embd=64"]) == 2
    assert "no linear map of the blocks is at least 128 by 128" in capsys.readouterr().err
    assert cli.run(pretrain.main, [*flags, "--n_embd=128", "--tensor_parallel=2"]) == 2
    assert "leave --tensor_parallel out" in capsys.readouterr().err


def test_the_meter_asks_for_the_fp8_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(mfu, "utilization", lambda *_, dtype, **__: asked.append(dtype) or dict.fromkeys(FIGURES))
    for flag in (False, True):
        meter = trainer.Meter(a_run(flag))
        meter.iterations = 1
        meter.report(1.0, 1e-3, Rows())  # type: ignore[arg-type]
    assert asked == [torch.bfloat16, "fp8"]


FIGURES = ("mfu", "mfu_palm", "hfu")


class Rows:
    def row(self, what: str, **fields: Any) -> dict[str, Any]:
        return fields

    def say(self, text: str) -> None:
        assert re.match(r"iter 0: loss", text)


def a_run(flag: bool) -> Any:
    class Recipe:
        fields = staticmethod(lambda run: {})
        line = staticmethod(lambda row, config, used: "iter 0: loss")

    class Run:
        device, model, iteration, seconds, recipe = "cpu", model_of(), 0, 0.0, Recipe()
        config = Pretrain(fp8=flag)
        team = type("Team", (), {"size": 1})()

    return Run()


# ---- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [4096, 4100])
def test_the_tensor_cores_multiply_as_the_emulation_does(M: int, dtype: torch.dtype) -> None:
    """Truth is the product before rounding, for the fast accumulator of the forward pass keeps fewer bits than fp32."""
    if torch.cuda.get_device_capability() < fp8.OLDEST:
        with pytest.raises(UserError, match="has no 8-bit floats"):
            fp8.way("cuda")
        return
    x, w, g = problem(M, 768, 3072, dtype, "cuda")
    X, W, G = x.double(), w.double(), g.double()
    found, same = results(x, w, g, fp8.way("cuda")), results(x, w, g, "emulated")
    for f, s, t in zip(found, same, (X @ W.t(), G @ W, G.t() @ X), strict=True):
        assert f.dtype == s.dtype and f.shape == s.shape
        assert relative_error(f, t) <= 2 * relative_error(s, t) + torch.finfo(f.dtype).eps


@pytest.mark.gpu
def test_a_captured_map_replays_what_it_did() -> None:
    if torch.cuda.get_device_capability() < fp8.OLDEST:
        with pytest.raises(UserError, match="has no 8-bit floats"):
            fp8.way("cuda")
        return
    x, w, g = problem(256, dtype=torch.bfloat16, device="cuda")
    x.requires_grad_(), w.requires_grad_()

    def once() -> tuple[Tensor, ...]:
        y = fp8.linear(x, w, "scaled_mm")
        return (y, *torch.autograd.grad(y, (x, w), g))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    with torch.no_grad():
        x.mul_(3)  # scales are made anew at every replay
    graph.replay()
    for found, expected in zip(captured, once(), strict=True):
        assert torch.equal(found, expected)
