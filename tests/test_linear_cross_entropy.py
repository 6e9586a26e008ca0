"""What the generic parity tests cannot say of linear_cross_entropy: chunks, memory, options, who needs a gradient."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from mutants import mutated
from oracle import DTYPES, check_parity, doubled, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels._triton import launching, skip
from kernels.cross_entropy import linear as page
from kernels.proof.interpret import interpreting

OP = kernels.OPS["linear_cross_entropy"]
kernel = kernels.load("reference", linear_cross_entropy="interpret").linear_cross_entropy
reference = OP.reference
each = pytest.mark.parametrize("function", [reference, kernel], ids=["reference", "kernel"])
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

OPTIONS = {
    "plain": {},
    "smoothing": dict(label_smoothing=0.1),
    "z_loss": dict(z_loss=1e-2),
    "softcap": dict(softcap=15.0),
    "all": dict(label_smoothing=0.2, z_loss=1e-3, softcap=30.0, vocab_size=60),
}
DIMS = dict(M=23, V=65, C=16)


def chunked(rows, dtype, V=65):
    """The argument that makes chunks of so many rows."""
    return dict(chunk_bytes=rows * V * dtype.itemsize)


def a_case(dtype=torch.float64, V=60, M=23):
    x, weight, targets = OP.inputs(**DIMS | dict(M=M), dtype=dtype)[0]
    return x, weight, torch.where(targets < 0, targets, targets % V)


@each_reduction
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_make_no_difference(options, reduction):
    """The reference in fp64: chunks of 1, 5 and 22 of 23 rows against the formula differentiated by torch."""
    arguments = a_case()
    whole = run(functools.partial(reference, reduction=reduction, **options), arguments)
    for rows in (1, 5, 22):
        budget = chunked(rows, torch.float64)
        found = run(functools.partial(reference, reduction=reduction, **budget, **options), arguments)
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-13)


@each_reduction
def test_gradients_of_chunks(reduction):
    arguments = a_case(M=7)
    leaves = [a.requires_grad_() for a in arguments[:2]]
    options = dict(reduction=reduction, **OPTIONS["all"], **chunked(3, torch.float64))
    assert torch.autograd.gradcheck(lambda *xs: reference(*xs, arguments[2], **options), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each
def test_summing_chunks_loses_nothing(function, dtype):
    """The rule holds against the whole reference. Of 16-bit products only the sum is wide on a CPU."""
    check_parity(OP, functools.partial(function, **chunked(5, dtype)), a_case(dtype))


@each
def test_no_chunk_but_the_one(function):
    """Nothing as large as the logits is ever made, and nothing larger than a chunk or a gradient."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            nonlocal largest
            out = f(*args, **(kwargs or {}))
            made = out if isinstance(out, tuple | list) else [out]
            sizes = [t.untyped_storage().nbytes() for t in made if isinstance(t, torch.Tensor)]
            largest = max([largest, *sizes])
            return out

    x, weight, targets = OP.inputs(M=200, V=400, C=4, dtype=torch.float32)[0]
    x, weight, budget = x.requires_grad_(), weight.requires_grad_(), 16_000
    with Watch():
        function(x, weight, targets, chunk_bytes=budget).backward()
    assert largest <= budget == 200 * 400 * 4 // 20
    with Watch():
        function(x, weight, targets)
    assert largest >= 200 * 400 * 4, "with the default the logits fit, and the watch would see them"


@each
@each_reduction
def test_one_gradient_without_the_other(function, reduction):
    x, weight, targets = a_case(torch.float32)
    options = dict(reduction=reduction, **chunked(9, torch.float32))
    full = run(functools.partial(function, **options), (x, weight, targets))
    for i, leaf in enumerate((x, weight)):
        given = [a.detach().requires_grad_(a is leaf) for a in (x, weight)]
        loss = function(*given, targets, **options)
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(loss.shape, generator=generator, dtype=torch.float64).float()
        assert torch.equal(torch.autograd.grad(loss, given[i], cotangent)[0], full[1 + i])
    with torch.no_grad():
        loss = function(x.requires_grad_(), weight, targets, **options)
    assert torch.equal(loss, full[0]) and not loss.requires_grad
    x.requires_grad_(False)


@each
def test_tied_weight_and_gradient_accumulation(function):
    """The weight is also the embedding, and two backward passes add up, one of them scaled."""
    tokens, targets = torch.randint(40, (12,)), torch.randint(40, (12,))

    def gradient(loss_of):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 320, dtype=torch.float32).view(40, 8).sin())
        for scale in (1.0, 0.25):
            (loss_of(F.embedding(tokens, weight), weight, targets) * scale).backward()
        return weight.grad

    found = gradient(functools.partial(function, **chunked(5, torch.float32, 40)))
    torch.testing.assert_close(found, gradient(lambda x, w, t: F.cross_entropy(F.linear(x, w), t)))


@each
@pytest.mark.parametrize("rows", [5, 100])
def test_all_ignored(function, rows):
    x, weight, targets = a_case(torch.float32)
    targets.fill_(-100)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
        loss = function(x, weight, targets, reduction=reduction, **chunked(rows, torch.float32))
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        for gradient in torch.autograd.grad(loss, (x, weight)):
            assert not gradient.any()


@each
@pytest.mark.parametrize("rows", [5, 100])
def test_a_target_outside_the_vocabulary_is_refused_on_the_cpu(function, rows):
    x, weight, targets = a_case(torch.float32)
    targets[7] = 60
    with pytest.raises(ValueError, match="targets: 60 is outside 0 to 59"):
        function(x, weight, targets, vocab_size=60, **chunked(rows, torch.float32))


def test_what_lies_beside_the_operands_does_not_count():
    """Rows of x and weight apart in memory, NaN between them, of a length that torch's bf16 product on AMX fills up."""
    x, weight, targets = OP.inputs(M=40, V=65, C=19, dtype=torch.bfloat16)[0]
    for function in (reference, kernel):
        plain = run(functools.partial(function, **chunked(32, torch.bfloat16)), (x, weight, targets))
        gaps = [torch.cat([a, torch.full_like(a[:, :3], float("nan"))], dim=1)[:, : a.shape[1]] for a in (x, weight)]
        found = run(functools.partial(function, **chunked(32, torch.bfloat16)), (*gaps, targets))
        torch.testing.assert_close(found, plain)


@each
@pytest.mark.parametrize("rows", [9, 100])
def test_autocast(function, rows):
    """fp32 operands are taken in bf16, as F.linear takes them; the gradients come back in fp32."""
    x, weight, targets = a_case(torch.float32)
    budget = chunked(rows, torch.bfloat16)

    def cast(x, weight, targets):
        with torch.autocast("cpu", torch.bfloat16):
            return function(x, weight, targets, **budget)

    def by_hand(x, weight, targets):
        return function(x.bfloat16(), weight.bfloat16(), targets, **budget)

    for found, expected in zip(run(cast, (x, weight, targets)), run(by_hand, (x, weight, targets)), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


@each
@pytest.mark.parametrize("rows", [5, 100])
def test_compiled_model_with_ignored_targets(function, rows):
    """No graph break, chunked or whole, and the numbers of eager mode, also where every target is ignored."""
    embedding = torch.nn.Embedding(17, 8)
    tokens, targets = torch.randint(17, (12,)), torch.randint(16, (12,))

    def forward(targets):
        x = F.silu(embedding(tokens))
        options = dict(ignore_index=-1, softcap=5.0, vocab_size=16, **chunked(rows, torch.float32, 17))
        return function(x, embedding.weight, targets, **options)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for ignored in (0, 5, 12):
        given, results = targets.where(torch.arange(12) >= ignored, -1), []
        for f in (compiled, forward):
            loss = f(given)
            results.append((loss, *torch.autograd.grad(loss, embedding.weight)))
        torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("rows", [5, 100], ids=["chunked", "whole"])
def test_no_trace_on_a_gpu_meets_what_torch_2_11_cannot_trace(rows, monkeypatch):
    """torch 2.11 raises for addmm with both out_dtype and out= on fake tensors, and only GPUs widen by out_dtype."""
    addmm, widened = torch.addmm, []

    def as_in_2_11(*args, **kwargs):
        widened.append(kwargs.get("out_dtype") is not None and kwargs.get("out") is not None)
        assert not widened[-1], "addmm(out_dtype=..., out=...) on a fake tensor"
        return addmm(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", as_in_2_11)
    options = -100, 0.0, 0.0, None, 65, "mean", rows, True, True
    with FakeTensorMode(), torch.no_grad():
        x, weight, targets = (torch.empty_like(a, device="cuda") for a in a_case(torch.float16))
        with launching(skip):  # the shape function of the custom op
            loss, dx, dweight, _ = page._kernel_forward(x, weight, targets, *options)
            assert (loss.dtype, dx.shape, dweight.shape, dweight.dtype) == (
                torch.float32, x.shape, weight.shape, torch.float32)  # fmt: skip
            assert not widened, "a shape function makes no products"
        task = page.chunked_task(weight, page.Criterion(*options[:6]), rows, True, True)
        z = torch.empty(23, 65, dtype=torch.float16, device="cuda")
        page._add_product(dweight, z, x, False, task.widens)  # as the reference sums chunk upon chunk


def test_several_chunks_pass_opcheck():
    x, weight, targets = a_case(torch.float32)
    operator = torch.ops.gptfast.linear_cross_entropy.default
    for reduction in ("mean", "none"):
        plain = (-100, 0.0, 0.0, None, 65, reduction, 9, True, True)
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        leaves = x.requires_grad_(), weight.requires_grad_()
        torch.library.opcheck(operator, (*leaves, targets, *plain), test_utils=checks)


def test_a_second_derivative_is_refused():
    """Rather than wrong: backward takes the gradients of forward for constants."""
    x, weight, targets = a_case()
    x.requires_grad_()
    loss = reference(x, weight, targets, **chunked(5, torch.float64))
    with pytest.raises(RuntimeError, match="second derivative; give a chunk_bytes"):
        torch.autograd.grad(loss, x, create_graph=True)


@each
@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(x=torch.zeros(5)), "x: expected"),
        (dict(x=torch.zeros(5, 4, dtype=torch.int64)), "x: expected a floating dtype"),
        (dict(weight=torch.zeros(9, 5)), r"weight: expected \(V, 4\)"),
        (dict(weight=torch.zeros(0, 4)), "weight: expected"),
        (dict(weight=torch.zeros(9, 4, dtype=torch.float64)), "weight: torch.float64"),
        (dict(weight=torch.zeros(9, 4, device="meta")), "weight: on meta"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), "targets: expected shape"),
        (dict(targets=torch.zeros(5)), "targets: expected int32 or int64"),
        (dict(reduction="avg"), "reduction: expected"),
        (dict(chunk_bytes=0), "chunk_bytes"),
        (dict(vocab_size=10), "vocab_size"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_arguments_are_named(function, wrong, message):
    arguments = dict(x=torch.randn(5, 4), weight=torch.randn(9, 4), targets=torch.zeros(5, dtype=torch.int64)) | wrong
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_fp64_is_for_references():
    with pytest.raises(ValueError, match="x: expected fp32, fp16 or bf16"):
        kernel(*doubled(a_case(torch.float32)))


MUTANTS = {
    "dweight of the last chunk": ("_add_product(dweight, z, x_part, i == 0", "_add_product(dweight, z, x_part, True"),
    "scale of the first chunk for all": ("scale.split(rows)[i]", "scale.split(rows)[0].expand(x_part.shape[0])"),
    "dx of the first chunk alone": ("out=dx.split(rows)[i]", "out=dx[: len(z)]"),
    "mean over ignored rows too": ("(targets != task.criterion.ignore_index).sum", "(targets == targets).sum"),
    "cotangent forgotten": ("dloss / divisor)", "1 / divisor)"),
    "padding multiplied too": ("padded.narrow(1, 0, V)", "padded.narrow(1, 1, V)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutant_is_caught(mistake, tmp_path, monkeypatch):
    mutant = mutated(page, *MUTANTS[mistake], tmp_path, monkeypatch).linear_cross_entropy_triton

    def function(*args, **options):
        with interpreting():
            return mutant(*args, **options)

    with pytest.raises((AssertionError, RuntimeError)):
        for reduction in ("mean", "none"):
            options = dict(reduction=reduction, label_smoothing=0.1)
            op = replace(OP, reference=functools.partial(reference, **options))
            run = functools.partial(function, **options, **chunked(9, torch.float32))
            check_parity(op, run, a_case(torch.float32), reduction)
