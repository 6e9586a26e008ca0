"""The GPT against Hugging Face's GPT-2, against itself, and against the sizes and statistics that nanoGPT states."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from gptfast.config import PRESETS, GPTConfig
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.packing import document_starts
from gptfast.runtime import compute_dtype
from kernels._triton import launching, skip

OPS = kernels.load("reference")
BOS = 30  # begins a document
SMALL = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=4, n_embd=32)
MODERN = dataclasses.replace(
    SMALL, bias=False, norm="rmsnorm", position="rope", activation="relu2", qk_norm=True, tied=False, n_kv_head=2
)
ARCHITECTURES = {
    "gpt2": SMALL,
    "modern": MODERN,
    "softcap": dataclasses.replace(MODERN, softcap=5.0),
    "learned positions with QK norm": dataclasses.replace(SMALL, qk_norm=True),
}
architecture = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())


def make(config: GPTConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT:
    """A GPT whose weights are large enough that attention looks somewhere and every part matters."""
    torch.manual_seed(seed)
    model = GPT(config, OPS, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens_of(config: GPTConfig, batch: int = 3, length: int | None = None) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length or config.block_size))


# ---- sizes -----------------------------------------------------------------------------------------------------------
COUNTS = [
    (PRESETS["char-cpu"], 795_904),
    (PRESETS["char"], 10_646_784),  # nanoGPT prints 10.65M
    (GPTConfig(block_size=512, n_layer=6, n_head=6, n_embd=384, bias=False), 29_938_560),  # 29.94M
    (GPTConfig(bias=False), 123_587_328),  # 123.59M
    (PRESETS["gpt2"], 123_653_376),  # 124,439,808 less the position embedding
    (PRESETS["char-modern-cpu"], 803_072),
]


@pytest.mark.parametrize(("config", "count"), COUNTS)
def test_parameters_are_as_many_as_nanogpt_counts(config: GPTConfig, count: int) -> None:
    with torch.device("meta"):
        model = GPT(config, OPS)
    positions = 0 if config.position == "rope" else config.block_size * config.n_embd
    assert model.num_params() == count
    assert model.num_params(non_embedding=False) == count + positions


def test_the_modern_cpu_model_is_no_larger_than_nanogpts() -> None:
    with torch.device("meta"):
        ours, theirs = GPT(PRESETS["char-modern-cpu"], OPS), GPT(PRESETS["char-cpu"], OPS)
    assert ours.num_params(False) <= theirs.num_params(False)


def test_parameters_are_named_as_in_gpt2() -> None:
    names = dict(make(SMALL).named_parameters(remove_duplicate=False))
    layer = "transformer.h.1."
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    expected = {f"{layer}{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert {name for name in names if name.startswith(layer)} == expected
    assert {name for name in names if not name.startswith("transformer.h.")} == {
        "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias",
        "lm_head.weight",
    }  # fmt: skip


def test_tied_weights_are_one_tensor() -> None:
    tied, untied = make(SMALL), make(dataclasses.replace(SMALL, tied=False))
    assert tied.lm_head.weight is tied.transformer["wte"].weight
    assert untied.lm_head.weight is not untied.transformer["wte"].weight


# ---- initialization --------------------------------------------------------------------------------------------------
def test_initialization_is_gpt2s() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, n_embd=128, n_layer=8)
    for name, parameter in GPT(config, OPS).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


@architecture
def test_the_first_loss_is_that_of_a_uniform_guess(config: GPTConfig) -> None:
    torch.manual_seed(0)
    model = GPT(config, OPS)
    assert model(tokens_of(config), tokens_of(config)).item() == pytest.approx(math.log(config.vocab_size), abs=0.05)


# ---- the function it computes ----------------------------------------------------------------------------------------
@architecture
def test_loss_is_the_cross_entropy_of_the_logits(config: GPTConfig) -> None:
    model, tokens, targets = make(config), tokens_of(config), tokens_of(config)
    targets[:, ::3] = -1
    expected = F.cross_entropy(model.logits(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(model(tokens, targets), expected)


def test_targets_of_another_shape_than_tokens_are_refused() -> None:
    model, tokens = make(SMALL), tokens_of(SMALL)
    for targets in (tokens.T, tokens.flatten(), tokens[:, 1:]):
        with pytest.raises(ValueError, match=r"targets: expected the shape of tokens, \(\d+, \d+\), got"):
            model(tokens, targets)


def test_a_model_with_interpreted_ops_has_a_loss_on_the_meta_device_and_can_be_pickled() -> None:
    tokens = tokens_of(MODERN)
    with torch.device("meta"):
        model = GPT(MODERN, kernels.load("interpret"))
    loss = model(tokens.to("meta"), tokens.to("meta"))
    loss.backward()
    assert loss.device.type == "meta" and all(p.grad.shape == p.shape for p in model.parameters())
    model = GPT(MODERN, kernels.load("interpret"))
    assert b"wte" in pickle.dumps(model)
    assert torch.equal(copy.deepcopy(model)(tokens, tokens), model(tokens, tokens))


SHIFTED = dataclasses.replace(MODERN, token_shift=True)


@pytest.mark.parametrize("config", [*ARCHITECTURES.values(), SHIFTED], ids=[*ARCHITECTURES, "token shift"])
def test_packed_documents_are_each_by_itself(config: GPTConfig) -> None:
    """The loss and gradients of rows of documents are those of every document in a batch of its own."""
    model = make(config).double()
    model.dtype = torch.float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shift" in name:
                parameter.normal_()
    tokens = tokens_of(config).masked_fill(torch.rand(3, config.block_size) < 0.15, BOS)
    tokens[0, 1:], tokens[1, 1:4] = 1, BOS  # one that fills its row, and ones of a single token
    targets = tokens_of(config)
    cu_seqlens = document_starts(tokens, BOS)
    assert len(cu_seqlens) > 8

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    alone = [
        model(tokens.view(1, -1)[:, a:b], targets.view(1, -1)[:, a:b]) * (b - a)
        for a, b in itertools.pairwise(cu_seqlens.tolist())
    ]
    expected = torch.stack(alone).sum() / tokens.numel()
    together = model(tokens, targets, cu_seqlens)
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(gradients(together), gradients(expected))
    assert abs(model(tokens, targets).item() - expected.item()) > 1e-3  # without, they see each other


def test_the_gradient_of_a_projection_is_never_put_together() -> None:
    """Where q, k and v are what attention takes: no gradient is concatenated, or copied, on its way to the product."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    ops = kernels.Ops({name: ("triton", "launches left out", op.triton) for name, op in kernels.OPS.items()})
    for config, expected in ((SMALL, set()), (MODERN, {"cat"})):
        model, names = GPT(config, ops), []
        tokens = tokens_of(config, 2)
        with launching(skip):
            loss = model(tokens, tokens)
            with Seen():
                loss.backward()
        assert {"cat", "copy_", "clone"} & set(names) == expected


def test_packed_documents_by_the_kernels() -> None:
    """One text of the model, whichever implementation attends."""
    config = dataclasses.replace(MODERN, block_size=12, n_layer=1)
    reference, kernel = make(config), make(config)
    for module in kernel.modules():
        if hasattr(module, "ops"):
            module.ops = kernels.load("reference", attention="interpret")
    tokens = tokens_of(config, 2).masked_fill(torch.rand(2, 12) < 0.3, BOS)
    cu_seqlens = document_starts(tokens, BOS)
    torch.testing.assert_close(kernel(tokens, tokens, cu_seqlens), reference(tokens, tokens, cu_seqlens))


def test_packed_documents_are_one_graph() -> None:
    """However many there are, with no compilation for each number of them."""
    config = dataclasses.replace(MODERN, n_layer=1, token_shift=True)
    model, compiled_for = make(config), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compiled_for.append(len(inputs))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for share in (0.1, 0.2, 0.3, 0.4):
        tokens = tokens_of(config).masked_fill(torch.rand(3, 24) < share, BOS)
        batch = tokens, tokens, document_starts(tokens, BOS)
        torch.testing.assert_close(compiled(*batch), model(*batch))
    assert len(compiled_for) <= 2


def test_a_document_longer_than_the_context_is_refused() -> None:
    tokens = tokens_of(SMALL, 2)
    with pytest.raises(ValueError, match="a document of 30 tokens, but block_size is 24"):
        make(SMALL)(tokens, tokens, torch.tensor([0, 30, 48]))


@architecture
def test_no_position_sees_a_later_one(config: GPTConfig) -> None:
    model, tokens = make(config), tokens_of(config)
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % config.vocab_size
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-6)
    assert ((before[:, 10:] - after[:, 10:]).abs().amax(dim=-1) > 1e-3).all()


@architecture
def test_order_matters(config: GPTConfig) -> None:
    model, tokens = make(config), tokens_of(config, length=6)
    tokens[:, :2] = torch.tensor([1, 2])
    swapped = tokens[:, [1, 0, 2, 3, 4, 5]]
    assert (model.logits(tokens)[:, -1] - model.logits(swapped)[:, -1]).abs().max() > 1e-3


def test_rotary_attention_depends_on_distances_alone() -> None:
    config = dataclasses.replace(MODERN, n_layer=1)
    model = make(config)
    rotation = model.cos, model.sin
    x = torch.randn(1, 8, config.n_embd)
    attend = model.transformer["h"][0].attn
    near = attend(x, tuple(part[:8] for part in rotation))
    far = attend(x, tuple(part[9:17] for part in rotation))
    reversed_ = attend(x, tuple(part[:8].flip(0) for part in rotation))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert (near - reversed_).abs().max() > 1e-3


@architecture
def test_last_only_is_the_last_row(config: GPTConfig) -> None:
    model, tokens = make(config), tokens_of(config)
    everywhere, last = model.logits(tokens), model.logits(tokens, last_only=True)
    assert last.shape == (3, 1, config.vocab_size)
    torch.testing.assert_close(last, everywhere[:, -1:])


def test_softcap_bounds_the_logits() -> None:
    config = dataclasses.replace(MODERN, softcap=0.5)
    model = make(config)
    assert 0.2 < model.logits(tokens_of(config)).abs().max() <= 0.5


def test_repeated_key_heads_are_one_key_head() -> None:
    """A model with grouped heads equals one without, whose key and value weights repeat each group's."""
    grouped = make(MODERN)
    full = make(dataclasses.replace(MODERN, n_kv_head=None))
    weights = grouped.state_dict()
    C, D = MODERN.n_embd, MODERN.head_dim
    for i in range(MODERN.n_layer):
        name = f"transformer.h.{i}.attn.c_attn.weight"
        q, k, v = weights[name].split((C, 2 * D, 2 * D))
        k, v = (part.view(2, D, C).repeat_interleave(2, dim=0).view(C, C) for part in (k, v))
        weights[name] = torch.cat((q, k, v))
    full.load_state_dict(weights)
    tokens = tokens_of(MODERN)
    torch.testing.assert_close(full.logits(tokens), grouped.logits(tokens))


# ---- dtypes ----------------------------------------------------------------------------------------------------------
@architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_activations_keep_fp32_weights_and_gradients(config: GPTConfig, dtype: torch.dtype) -> None:
    wide, narrow, tokens, targets = make(config), make(config, dtype), tokens_of(config), tokens_of(config)
    assert narrow.hidden(tokens).dtype == dtype
    losses = [model(tokens, targets) for model in (wide, narrow)]
    assert losses[1].dtype == torch.float32
    for loss in losses:
        loss.backward()
    tolerance = 8 * torch.finfo(dtype).eps
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=tolerance)
    for (name, a), b in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert b.dtype == b.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 8 * tolerance * a.grad.norm(), name


def test_gradients_of_the_model_in_fp64() -> None:
    """Autograd of the references against a difference quotient along a random direction."""
    for config in ARCHITECTURES.values():
        model, tokens, targets = make(config, torch.float64).double(), tokens_of(config), tokens_of(config)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(model(tokens, targets), parameters)
        direction = [torch.randn_like(p) for p in parameters]
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * 1e-6)
                ends.append(model(tokens, targets).item())
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope.item(), rel=1e-5)


def test_the_dtype_of_a_device_comes_with_a_reason() -> None:
    dtype, reason = compute_dtype("cpu")
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert dtype == (torch.bfloat16 if native else torch.float32)
    assert "bfloat16" in reason and "\n" not in reason
    assert compute_dtype("mps")[0] == torch.float32


# ---- dropout ---------------------------------------------------------------------------------------------------------
@architecture
def test_dropout_acts_in_training_only(config: GPTConfig) -> None:
    config = dataclasses.replace(config, dropout=0.2)
    model, tokens = make(config), tokens_of(config)
    assert not torch.equal(model.logits(tokens), model.logits(tokens))
    model.eval()
    torch.testing.assert_close(model.logits(tokens), model.logits(tokens), rtol=0, atol=0)
    without = make(dataclasses.replace(config, dropout=0.0))
    torch.testing.assert_close(model.logits(tokens), without.logits(tokens), rtol=0, atol=0)


def test_dropout_strikes_in_four_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding, attention weights, and the outputs of attention and MLP, as in GPT-2."""
    config, rates = dataclasses.replace(SMALL, dropout=0.25, n_layer=1), []
    original = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p, *rest: rates.append((p, x.dim())) or original(x, p, *rest))
    make(config)(tokens_of(config), tokens_of(config))
    assert [rate for rate, _ in rates] == [0.25] * 4


# ---- cropping --------------------------------------------------------------------------------------------------------
@architecture
def test_cropping_leaves_short_sequences_alone(config: GPTConfig) -> None:
    model, tokens = make(config), tokens_of(config)
    before = model.logits(tokens[:, :9])
    model.crop_block_size(9)
    assert model.config.block_size == 9
    assert torch.equal(model.logits(tokens[:, :9]), before)
    with pytest.raises(ValueError, match="10 positions, but block_size is 9"):
        model.logits(tokens[:, :10])
    again = GPT(model.config, OPS)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.logits(tokens[:, :9]), before)


def test_cropping_cannot_grow() -> None:
    with pytest.raises(UserError, match="from 24 to 25"):
        make(SMALL).crop_block_size(25)


# ---- compilation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gpt2", "softcap"])
def test_the_model_is_one_graph(name: str) -> None:
    """No graph break, and the loss and gradients of eager. `aot_eager` traces both directions and writes no code."""
    config = ARCHITECTURES[name]
    model, tokens, targets = make(config), tokens_of(config), tokens_of(config)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager_gradients = torch.autograd.grad(model(tokens, targets), list(model.parameters()))
    loss = compiled(tokens, targets)
    torch.testing.assert_close(loss, model(tokens, targets))
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), eager_gradients, strict=True):
        torch.testing.assert_close(a, b)


# ---- learning --------------------------------------------------------------------------------------------------------
@architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(config: GPTConfig, dtype: torch.dtype) -> None:
    """A sequence that counts upwards from a random start is predictable after its first token."""
    torch.manual_seed(0)
    model = GPT(config, OPS, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        sequence = (torch.randint(31, (8, 1)) + torch.arange(17)) % 31
        loss = model(sequence[:, :-1], sequence[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3
