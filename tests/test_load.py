"""Which implementation runs is a value: chosen by name, printed with its reason, never changed in silence."""

import copy
import pickle
import sys
import types

import pytest
import torch

import kernels
from gptfast.config import GPTConfig
from gptfast.model import GPT
from kernels import OPS
from kernels.op import _on_gpu

WITH_KERNEL = [name for name, op in OPS.items() if op.triton is not None]


def test_ops_are_listed_under_their_own_names():
    assert list(OPS) == [op.name for op in OPS.values()]
    assert all(op.reference.__name__ == f"{op.name}_reference" for op in OPS.values())


def test_reference_is_the_reference():
    ops = kernels.load("reference")
    assert all(getattr(ops, name) is op.reference for name, op in OPS.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: nothing is missing")
def test_auto_without_a_gpu_is_the_path_for_cpus_and_says_why():
    ops = kernels.load("auto")
    assert ops.layernorm is OPS["layernorm"].cpu and ops.chosen["layernorm"] == ("cpu", "no CUDA device")
    assert ops.newton_schulz is OPS["newton_schulz"].reference
    assert "no CUDA device; it has no other path for CPUs" in repr(ops)


def test_the_path_for_cpus_is_the_reference_where_an_op_has_no_other():
    ops = kernels.load("cpu", rotary="reference")
    for name, op in OPS.items():
        cpu = None if name == "rotary" else op.cpu
        assert getattr(ops, name) is (cpu or op.reference)
        assert ops.chosen[name][0] == ("cpu" if cpu else "reference")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: 'triton' can run")
def test_explicit_triton_that_cannot_run_raises():
    with pytest.raises(RuntimeError, match="layernorm: 'triton' cannot run: no CUDA device"):
        kernels.load("triton")
    with pytest.raises(RuntimeError, match="layernorm: 'triton' cannot run"):
        kernels.load("reference", layernorm="triton")


def test_per_op_choice():
    ops = kernels.load("reference", layernorm="interpret")
    assert ops.chosen["layernorm"][0] == "interpret"
    assert ops.rmsnorm is OPS["rmsnorm"].reference
    x, weight = torch.randn(3, 8), torch.ones(8)
    torch.testing.assert_close(ops.layernorm(x, weight), OPS["layernorm"].reference(x, weight))


@pytest.mark.parametrize("choice", ["reference", "cpu", "interpret"])
def test_a_choice_can_be_pickled(choice):
    ops = kernels.load(choice)
    assert b"rmsnorm" in pickle.dumps(ops)
    again = copy.copy(ops.rmsnorm)  # taken apart and rebuilt as a pickle is
    x = torch.randn(3, 8)
    torch.testing.assert_close(again(x), OPS["rmsnorm"].reference(x))


def test_the_paths_for_cpus_are_within_reach_of_torch_func():
    """Per-example gradients, as torch.func takes them."""
    x, weight = torch.randn(3, 4, 8), torch.rand(8)
    cos, sin = torch.randn(2, 4, 4)
    for ops in (kernels.load("cpu"), kernels.load("reference")):

        def loss(weight, x, ops=ops):
            y = ops.layernorm(ops.rmsnorm(x, weight), weight)
            return (
                ops.rotary(y[None, :, None], y[None, :, None], cos, sin, qk_norm=True)[0].square().sum(-1).log().sum()
            )

        found = torch.vmap(torch.func.grad(loss), (None, 0))(weight, x)
        each = [torch.autograd.grad(loss(w := weight.clone().requires_grad_(), row), w)[0] for row in x]
        assert found.norm() > 0.1
        torch.testing.assert_close(found, torch.stack(each))


@pytest.mark.parametrize("choice", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [{}, {"norm": "rmsnorm", "position": "rope", "qk_norm": True, "activation": "relu2"}])
def test_a_model_is_within_reach_of_torch_func(choice, shape):
    """Gradients of each example, and forward mode, whose sum over directions is a gradient too."""
    config = GPTConfig(vocab_size=7, block_size=4, n_layer=1, n_head=2, n_embd=8, **shape)
    torch.manual_seed(0)
    model, tokens = GPT(config, kernels.load(choice)), torch.randint(7, (3, 4))
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, row):
        return torch.func.functional_call(model, weights, (row[None], row[None]))

    found = torch.vmap(torch.func.grad(loss), (None, 0))(weights, tokens)
    for i, row in enumerate(tokens):
        model.zero_grad()
        loss(dict(model.named_parameters()), row).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad)
    direction = {name: torch.randn_like(w) for name, w in weights.items()}
    slope = torch.func.jvp(lambda weights: loss(weights, tokens[0]), (weights,), (direction,))[1]
    torch.testing.assert_close(slope, sum((found[name][0] * d).sum() for name, d in direction.items()))


@pytest.mark.parametrize("arguments, choices, hint", [
    ({}, ("refrence",), "did you mean 'reference'"), ({"layernrom": "reference"}, (), "did you mean 'layernorm'"),
    ({"layernorm": "tritn"}, (), "did you mean 'triton'"),
])  # fmt: skip
def test_a_misspelt_name_is_an_error_that_names_the_nearest(arguments, choices, hint):
    with pytest.raises(ValueError, match=hint):
        kernels.load(*choices, **arguments)


def test_an_op_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no op named 'layer_norm'"):
        kernels.load("reference").layer_norm  # noqa: B018


def test_without_triton_the_references_run_and_the_kernels_say_why():
    """As on macOS or Windows: the import of triton fails in a fresh process."""
    import subprocess

    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
ops = kernels.load("auto")
assert "Triton is not installed" in repr(ops) or "no CUDA device" in repr(ops)
assert ops.layernorm(torch.randn(2, 4), torch.ones(4)).shape == (2, 4)
for choice in ("triton", "interpret"):
    try:
        kernels.load("reference", layernorm=choice)
    except RuntimeError as error:
        assert "Triton is not installed" in str(error), error
    else:
        raise SystemExit(f"{choice} was accepted")
try:
    kernels.layernorm.layernorm_fwd_kernel[(1,)]()
except RuntimeError as error:
    assert "layernorm_fwd_kernel cannot run" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_kernel_runs_on_the_gpu_of_its_tensors(monkeypatch):
    class OnSecond(torch.Tensor):
        device = torch.device("cuda", 1)

    x = torch.zeros(1).as_subclass(OnSecond)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    there = _on_gpu("layernorm", x)
    assert isinstance(there, torch.cuda.device) and there.idx == 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert not isinstance(_on_gpu("layernorm", x), torch.cuda.device)


def test_a_second_derivative_is_refused():
    """Dropped in silence, a gradient penalty would train on half its loss."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    y = kernels.load("interpret").rmsnorm(x, weight)
    with pytest.raises(RuntimeError, match=r"rmsnorm.*second derivative.*reference"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_an_old_inductor_knows_a_custom_op_before_it_meets_it(monkeypatch):
    """Up to torch 2.11 it prints the whole graph before an unknown op, twice as much for every residual sum."""
    known, made = {}, []

    def make_fallback(operator, layout_constraint=None, warn=True):
        known[operator] = None
        made.append((layout_constraint, warn))

    lowering = types.SimpleNamespace(lowerings=known, make_fallback=make_fallback, tag_to_layout_constraint=str)
    monkeypatch.setitem(sys.modules, "torch._inductor.lowering", lowering)
    x, weight = torch.empty(2, 8, device="meta"), torch.empty(8, device="meta")
    for _ in range(2):
        torch.ops.gptfast.rmsnorm(x, None, weight, 1e-6)
    assert made == [(str(torch.Tag.needs_exact_strides), False)]


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacrev], ids=lambda f: f.__name__)
def test_under_torch_func_the_kernels_say_what_to_do_instead(transform):
    function = kernels.load("interpret").rmsnorm
    with pytest.raises(RuntimeError, match=r"rmsnorm.*torch\.func.*reference"):
        transform(lambda x: function(x, torch.ones(8)).sum())(torch.randn(4, 8))
    transform(lambda x: kernels.load("reference").rmsnorm(x, torch.ones(8)).sum())(torch.randn(4, 8))
