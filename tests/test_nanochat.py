"""nanochat's parts of the model against its definition in thirty lines of fp64, against the model without them, and
against themselves when decoding."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check_parity
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from gptfast import cli
from gptfast.config import GPTConfig
from gptfast.engine import Engine, KVCache, Sampling, generate
from gptfast.engine.cache import Piece
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.optim import Muon
from gptfast.packing import document_starts
from gptfast.parallel.split import split_matrices
from kernels import Op
from kernels.newton_schulz import POLAR_EXPRESS
from train import build, dial, schedules
from train.config import Pretrain
from train.presets import PRESETS

OPS = kernels.load("reference")
PLAIN = GPTConfig(
    block_size=40, vocab_size=31, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, bias=False, norm="rmsnorm",
    norm_eps=1e-7, position="rope", activation="relu2", qk_norm=True, tied=False,
)  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "softcap": dict(softcap=15.0),
    "embedding_norm": dict(embedding_norm=True),
    "windows": dict(window_pattern="SSSL", window=9),
    "value_embeddings": dict(value_embeddings=True),
    "residual_scalars": dict(residual_scalars=True),
    "smear": dict(smear=True),
    "backout": dict(backout=True),
    "rope": dict(rope_sign=-1, rope_base=100_000.0),
    "qk_gain": dict(qk_gain=1.2),
}
ALL = dataclasses.replace(PLAIN, **{name: value for part in PARTS.values() for name, value in part.items()})
CASES = {name: dataclasses.replace(PLAIN, **part) for name, part in PARTS.items()} | {"all": ALL}
each_part = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def make(config: GPTConfig, dtype: torch.dtype = torch.float32, ops: kernels.Ops = OPS) -> GPT:
    """A GPT whose weights are large enough that every part matters."""
    torch.manual_seed(0)
    model = GPT(config, ops, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(torch.float64) if dtype == torch.float64 else model


def tokens_of(batch: int = 3, length: int = 40) -> Tensor:
    return torch.randint(PLAIN.vocab_size, (batch, length))


# ---- the definition --------------------------------------------------------------------------------------------------
def definition(w: dict[str, Tensor], c: GPTConfig, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of nanochat's forward pass, one part after the other as its authors write it."""

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-7).sqrt()

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    (B, T), D, H, G = tokens.shape, c.head_dim, c.n_head, c.kv_heads
    angle = (
        torch.arange(T, dtype=torch.float64)[:, None, None] * c.rope_base ** (-torch.arange(0, D, 2) / D) * c.rope_sign
    )
    x = w["transformer.wte.weight"][tokens]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x = rms(x) if c.embedding_norm else x
    if c.smear:
        gate = w["smear_lambda"] * torch.sigmoid(x[..., :24] @ w["smear_gate.weight"].T)
        x = torch.cat((x[:, :1], x[:, 1:] + gate[:, 1:] * x[:, :-1]), 1)
    x0, middle = x, torch.zeros(())
    distance = torch.arange(T)[:, None] - torch.arange(T)
    for i in range(c.n_layer):
        if c.residual_scalars:
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h, y = f"transformer.h.{i}.", rms(x)
        q, k, v = (y @ w[h + "attn.c_attn.weight"].T).view(B, T, H + 2 * G, D).split((H, G, G), 2)
        if c.value_embeddings and i % 2 == (c.n_layer - 1) % 2:
            gate = 3 * torch.sigmoid(y[..., :12] @ w[h + "attn.ve_gate.weight"].T)
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][tokens].view(B, T, G, D)
        q, k = c.qk_gain * rms(rotated(q)), c.qk_gain * rms(rotated(k))
        k, v = k.repeat_interleave(H // G, 2), v.repeat_interleave(H // G, 2)
        short = c.window_pattern and i < c.n_layer - 1 and c.window_pattern[i % len(c.window_pattern)] == "S"
        hidden = (distance < 0) | (distance > (c.window if short else T))
        s = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
        p = s.masked_fill(hidden, -math.inf).softmax(-1)
        x = x + torch.einsum("bhts,bshd->bthd", p, v).flatten(2) @ w[h + "attn.c_proj.weight"].T
        x = x + F.relu(rms(x) @ w[h + "mlp.c_fc.weight"].T).square() @ w[h + "mlp.c_proj.weight"].T
        middle = x if i == c.n_layer // 2 else middle
    x = x - w["backout_lambda"] * middle if c.backout else x
    z = rms(x) @ w["lm_head.weight"].T
    return c.softcap * torch.tanh(z / c.softcap) if c.softcap else z


@pytest.mark.parametrize(
    ("kernel", "config"),
    [*(("cpu", config) for config in CASES.values()), ("reference", ALL), ("interpret", ALL)],
    ids=[*CASES, "reference", "interpret"],
)
def test_each_part_is_its_definition(kernel: str, config: GPTConfig) -> None:
    """Loss and every gradient, by the rule that kernels are held to."""
    if kernel == "interpret":
        config = dataclasses.replace(config, n_layer=2, window_pattern="SL")
    model, length = make(config, ops=kernels.load(kernel)), 18 if kernel == "interpret" else 40
    tokens, targets = tokens_of(2, length), tokens_of(2, length)
    names = [name for name, _ in model.named_parameters()]

    def ours(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (tokens, targets))

    def by_definition(*weights: Tensor) -> Tensor:
        logits = definition(dict(zip(names, weights, strict=True)), config, tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    op = Op("nanochat's model", by_definition, None, None, (), {}, (), None)  # type: ignore[arg-type]
    check_parity(op, ours, list(model.parameters()), f"{config}")


@each_part
def test_each_part_changes_something(config: GPTConfig) -> None:
    tokens, plain = tokens_of(), make(PLAIN)
    model = make(config)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert (model.logits(tokens) - plain.logits(tokens)).abs().max() > 1e-3


NEUTRAL = dataclasses.replace(
    ALL, embedding_norm=False, rope_sign=1, rope_base=PLAIN.rope_base, qk_gain=1.0, softcap=None, window=39
)


@torch.no_grad()
def neutral(model: GPT, plain: GPT) -> GPT:
    """`model` with the weights of `plain`, and every weight of its own where it does nothing."""
    model.load_state_dict(plain.state_dict(), strict=False)
    model.resid_lambdas.fill_(1.0)
    for name, p in model.named_parameters():
        if name in ("x0_lambdas", "smear_lambda", "backout_lambda") or name.startswith("value_embeds"):
            p.zero_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_at_neutral_values_it_is_bit_for_bit_the_model_without(kernel: str, dtype: torch.dtype) -> None:
    """The loss, the gradients of what both have, the logits, and a step of decoding."""
    ops = kernels.load(kernel)
    plain = make(PLAIN, dtype, ops)
    model, tokens, targets = neutral(make(NEUTRAL, dtype, ops), plain), tokens_of(), tokens_of()
    losses = [m(tokens, targets) for m in (plain, model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    both = dict(model.named_parameters())
    assert all(torch.equal(p.grad, both[name].grad) for name, p in plain.named_parameters())
    assert torch.equal(plain.logits(tokens), model.logits(tokens))
    found = [generate(m, tokens[:, :9], 5, temperature=0.0) for m in (plain, model)]
    assert torch.equal(*found)


# ---- decoding and packing --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [{}, dict(page_size=4)], ids=["contiguous", "paged"])
@torch.inference_mode()
def test_decoding_with_the_cache_is_the_full_forward_over_three_windows(settings: dict[str, Any]) -> None:
    """Two rows at different positions, one to three tokens a step, past three windows of 9."""
    model, tokens = make(ALL), tokens_of(2)
    cache = KVCache(ALL, model.ops, 2, **settings)
    starts, full = (5, 2), model.logits(tokens)
    for slot, start in enumerate(starts):
        assert cache.reserve(slot, 40)
        piece = cache.pieces([Piece(slot, 0, start)])
        first = model.logits(tokens[slot : slot + 1, :start], cache=piece)
        torch.testing.assert_close(first[0], full[slot, :start], rtol=1e-4, atol=1e-4)
        piece.advance()
    at = torch.tensor(starts)
    for T in itertools.islice(itertools.cycle((1, 3, 2)), 16):
        where = at[:, None] + torch.arange(T)
        found = model.logits(tokens.gather(1, where), cache=cache)
        expected = full.gather(1, where[..., None].expand(-1, -1, full.shape[-1]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        cache.advance(T)
        at += T
    assert at.min() > 3 * 9


@pytest.mark.parametrize("weights", ["model", "int8", "float16", "interpret"])
def test_greedy_tokens_are_those_of_the_full_forward(weights: Any) -> None:
    """By the kernels too, however a step calls them."""
    by_kernels = weights == "interpret"
    config = dataclasses.replace(ALL, n_layer=2, window_pattern="SL", window=2) if by_kernels else ALL
    model, prompt, most = make(config), [3, 1, 4], 6 if by_kernels else 36
    through = make(config, ops=kernels.load("interpret")) if by_kernels else model
    engine = Engine(through, weights="model" if by_kernels else weights)
    request = engine.submit(prompt, Sampling(max_tokens=most, temperature=0.0))
    while engine.busy:
        engine.step()
    tokens = [*prompt, *request.tokens]
    greedy = model.logits(torch.tensor([tokens]))[0, 2:-1].argmax(-1).tolist()
    assert len(request.tokens) == most
    assert request.tokens == greedy or weights == "int8"  # which rounds


def test_a_windowed_layer_costs_what_its_window_costs() -> None:
    """Products and tensors kept for the backward pass: at twice the length twice as much, not four times."""
    config = dataclasses.replace(PLAIN, block_size=1024, window_pattern="S", window=64)
    attention, found = make(config, torch.float64, kernels.load("cpu")).transformer["h"][0].attn, []
    for T in (256, 512, 1024):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(1, T, 32, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = attention(x, None)
        out.sum().backward()
        found.append((counter.get_total_flops(), sum(kept.values())))
    for kind in zip(*found, strict=True):
        steps = [b - a for a, b in itertools.pairwise(kind)]
        assert steps[1] == pytest.approx(2 * steps[0], rel=0.05)
    assert found[2][0] < 0.3 * attention_flops_of_all_pairs(1024)


def attention_flops_of_all_pairs(T: int) -> int:
    """Of queries and keys of 32 numbers in all, and the linear maps around."""
    return 2 * 2 * T * T * 32 + 2 * T * 32 * (64 + 32)


def test_packed_documents_are_each_by_itself() -> None:
    model = make(ALL, torch.float64)
    model.dtype = torch.float64
    tokens, targets = tokens_of(2), tokens_of(2)
    cu_seqlens = document_starts(tokens.masked_fill(torch.rand(2, 40) < 0.1, 30), 30)
    cu_seqlens = torch.unique(torch.cat((cu_seqlens, torch.tensor([0, 1, 80], dtype=cu_seqlens.dtype))))
    alone = [
        model(tokens.view(1, -1)[:, a:b], targets.view(1, -1)[:, a:b], reduction="sum")
        for a, b in itertools.pairwise(cu_seqlens.tolist())
    ]
    together = model(tokens, targets, cu_seqlens, reduction="sum")
    torch.testing.assert_close(together, torch.stack(alone).sum())


def test_tensor_ranks_refuse_value_embeddings() -> None:
    team: Any = SimpleNamespace(mesh=object(), tensor=2)
    with pytest.raises(UserError, match="--tensor_parallel=2 cannot split a model with value_embeddings"):
        split_matrices(make(ALL), team)


# ---- what it starts from ---------------------------------------------------------------------------------------------
def test_initialization_is_nanochats() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(ALL, n_embd=256, n_head=16, n_kv_head=16, vocab_size=512, initialization="nanochat")
    model = GPT(config, OPS)
    deviations = {
        "transformer.wte": 0.8, "lm_head": 0.001, "c_attn": 1 / 16, "c_fc": 0.4 / 16, "c_proj": 0.0,
        "value_embeds": 1 / 16, "gate": 0.02 / math.sqrt(12),
    }  # fmt: skip
    seen = set()
    for name, p in model.named_parameters():
        kind = next((kind for kind in deviations if kind in name), None)
        if kind is None:
            assert p.dim() == 1, name
        elif p.numel() > 40:
            assert p.std().item() == pytest.approx(deviations[kind], rel=0.2 if kind == "gate" else 0.05), name
            bounded = kind in ("c_attn", "c_fc", "value_embeds", "gate")
            assert not bounded or p.abs().max() <= (0.02 if kind == "gate" else 3**0.5 * deviations[kind]), name
            seen.add(kind)
        assert "gate" not in name or p.min() >= 0, name
    assert seen == set(deviations)
    assert model.resid_lambdas.tolist() == pytest.approx([1.15, 1.15 - 0.1 / 3, 1.05 + 0.1 / 3, 1.05])
    assert model.x0_lambdas.tolist() == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert (model.backout_lambda.item(), model.smear_lambda.item()) == (pytest.approx(0.2), 0.0)
    tokens, targets = torch.randint(512, (2, 2, 40))
    assert model(tokens, targets).item() == pytest.approx(math.log(512), abs=0.01)


def test_which_layers_have_what() -> None:
    assert ALL.windows == (9, 9, 9, None)
    assert dataclasses.replace(ALL, n_layer=6, window_pattern="SL").windows == (9, None, 9, None, 9, None)
    assert dataclasses.replace(ALL, n_layer=5, window_pattern="S").windows == (9, 9, 9, 9, None)
    assert PLAIN.windows == (None,) * 4 and PLAIN.value_layers == PLAIN.nanochats == ()
    assert {name for case in CASES.values() for name in case.nanochats} == set(ALL.nanochats)
    assert set(ALL.nanochats) == {
        "embedding_norm", "window", "value_embeddings", "residual_scalars", "smear", "backout", "rope_sign", "qk_gain"
    }  # fmt: skip
    assert [dataclasses.replace(ALL, n_layer=n).value_layers for n in (1, 2, 5)] == [(0,), (1,), (0, 2, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(window_pattern="SXL", window=8), "window_pattern is 'SXL'; it is made of S and L"),
        (dict(window_pattern="SL"), "window is None and window_pattern 'SL'; a pattern with an S needs a window"),
        (dict(window=8), "a pattern with an S needs a window, no other has one"),
        (dict(window_pattern="S", window=-1), "window is -1; it must not be negative"),
        (dict(rope_sign=0), "rope_sign is 0; it must be 1 or -1"),
        (dict(qk_gain=0.0), "qk_gain is 0.0; it must be positive"),
        (dict(qk_norm=False, qk_gain=1.2), "qk_gain is of qk_norm, which is off"),
        (dict(smear=True, n_head=1, n_kv_head=1, n_embd=16), "smear has a gate that reads 24 channels; n_embd is 16"),
        (dict(initialization="zero"), "initialization is 'zero'; choose one of gpt2, nanochat"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(PLAIN, **changes)


# ---- how it is trained -----------------------------------------------------------------------------------------------
def of_depth(depth: int, *flags: str) -> tuple[Pretrain, torch.optim.Optimizer, dict[int, str]]:
    """What --depth says, the optimizer that is built from it, and the name of each parameter."""
    argv = [f"--depth={depth}", *flags]
    config = dial.configure(cli.parse(Pretrain, argv, PRESETS), cli.typed(argv, Pretrain), 32768)
    with torch.device("meta"):
        model = GPT(build.architecture_of(config, 64), OPS)
    return config, build.make_optimizer(config, model), {id(p): name for name, p in model.named_parameters()}


@pytest.mark.parametrize(("depth", "batch", "width"), [(12, 1.0, 1.0), (20, 2**0.5, (1280 / 768) ** -0.5)])
def test_groups_are_nanochats(depth: int, batch: float, width: float) -> None:
    """Rates, betas, decay and members, as its setup_optimizer has them."""
    _, optimizer, names = of_depth(depth)
    scaled = batch * width
    expected = {
        "head": (0.008 * scaled, (0.8, 0.96), 0.01),
        "embeddings": (0.3 * scaled, (0.8, 0.995), 0.001),
        "value embeddings": (0.15 * scaled, (0.8, 0.995), 0.01),
        "resid_lambdas": (0.005 * batch, (0.8, 0.95), 0.05),
        "x0_lambdas": (0.5 * batch, (0.96, 0.95), 0.0),
        "smear, backout": (0.2, (0.8, 0.95), 0.0),
    }
    groups = {group["name"]: group for group in optimizer.param_groups}
    matrices = groups.pop("matrices")
    assert set(groups) == set(expected)
    for name, (rate, betas, decay) in expected.items():
        group = groups[name]
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(rate), decay), name
        assert (group["betas"], group["eps"]) == (betas, 1e-10), name
    members = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert members["smear, backout"] == {"smear_gate.weight", "smear_lambda", "backout_lambda"}
    assert members["value embeddings"] == {f"value_embeds.{i}.weight" for i in range(1, depth, 2)}
    assert {names[id(p)] for p in matrices["params"]} == {
        name for name in names.values() if name.startswith("transformer.h.")
    }
    assert matrices["lr"] == pytest.approx(0.02 * batch)
    settings = ("cautious", "decay_by_shape", "equalize", "normalize", "nesterov", "beta2", "steps")
    assert [matrices[key] for key in settings] == [True, True, True, True, True, 0.9, 5]


def test_the_schedules_move_every_group_and_the_decay_of_the_matrices_alone() -> None:
    config, optimizer, _ = of_depth(12)
    start = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    N, W = 2520, round(0.65 * 2520)
    for iteration, rates, momentum in ((0, 1 / 40, 0.85), (200, 1.0, 0.91), (N - W, 1.0, 0.97), (N, 0.05, 0.90)):
        schedules.set_schedule(optimizer, iteration, config)
        for group in optimizer.param_groups:
            rate, decay = start[group["name"]]
            assert group["lr"] == pytest.approx(rates * rate), (iteration, group["name"])
            if group["name"] == "matrices":
                decay = 0.28 * 0.5 * (1 + math.cos(math.pi * iteration / N))
                assert group["momentum"] == pytest.approx(momentum)
            assert group["weight_decay"] == pytest.approx(decay), (iteration, group["name"])


def test_the_architecture_without_is_trained_by_its_own_rules() -> None:
    config, optimizer, _ = of_depth(4, "--architecture=gptfast")
    assert not config.value_embeddings and config.rules == "plain" and config.window is None
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "embeddings", "head"]


def test_a_pattern_of_ones_own_needs_no_window() -> None:
    config, _, _ = of_depth(4, "--window_pattern=L")
    assert build.architecture_of(config, 64).windows == (None,) * 4
    config, _, _ = of_depth(4, "--window_pattern=SL", "--value_embeddings=False")
    assert build.architecture_of(config, 64).windows == (512, None, 512, None) and not config.value_embeddings


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_a_step_of_the_matrices_is_nanochats(shape: tuple[int, int]) -> None:
    """Two steps in fp64 beside the rule written out: equal rows, orthogonal, its norm, NorMuon, cautious decay."""
    m, n = shape
    start, *gradients = torch.randn(3, m, n, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    group = dict(
        kind="muon", params=[p], lr=0.02, momentum=0.9, weight_decay=0.3, cautious=True, decay_by_shape=True,
        equalize=True, normalize=True, beta2=0.9,
    )  # fmt: skip
    optimizer = Muon([group], dtype=torch.float64)
    w, mean, square = start.clone(), torch.zeros(m, n).double(), torch.zeros(()).double()
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        mean = torch.lerp(mean, gradient, 0.1)
        x = torch.lerp(gradient, mean, 0.9)
        x = x / x.norm(dim=1, keepdim=True) * x.norm() / m**0.5
        x = x / (1.01 * x.norm())
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x * min(m, n) ** 0.5 / x.norm()
        square = 0.9 * square + 0.1 * x.square().mean(1 if m >= n else 0, keepdim=True)
        even = x * square.rsqrt()
        x = even * x.norm() / even.norm()
        w = w - 0.02 * max(1, m / n) ** 0.5 * (x + 0.3 * w * (x * w >= 0))
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-9)
