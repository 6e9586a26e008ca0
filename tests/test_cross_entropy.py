"""What the generic parity tests cannot say of cross_entropy: its options, torch's semantics, overwriting, targets."""

import pytest
import torch
import torch.nn.functional as F
from mutants import mutated
from oracle import DTYPES, relative_error

import kernels
from kernels import cross_entropy as page
from kernels.cross_entropy import rows
from kernels.cross_entropy.rows import Criterion, cross_entropy_rows
from kernels.proof.interpret import OutOfBounds, Race, interpreting
from kernels.proof.options import option_sets

OP = kernels.OPS["cross_entropy"]
kernel = kernels.load("reference", cross_entropy="interpret").cross_entropy
reference = OP.reference
each = pytest.mark.parametrize("function", [reference, kernel], ids=["reference", "kernel"])

NAN = float("nan")


@each
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_agrees_with_torch(function, reduction, ignored):
    """Value and gradient, NaN included where torch says NaN: a mean over no rows."""
    logits, targets = OP.inputs(M=9, V=33, dtype=torch.float32)[0]
    if ignored == "all":
        targets.fill_(-100)
    options = dict(label_smoothing=0.1, reduction=reduction)
    found, wanted = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours, theirs = function(found, targets, **options), F.cross_entropy(wanted, targets, **options)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert theirs.isnan().all() == (ignored == "all" and reduction == "mean")
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)
    assert found.grad.isfinite().all()


@pytest.mark.parametrize("V", [40, 8192 + 40])
@pytest.mark.parametrize("value", [float("-inf"), float("inf"), NAN], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["a part of a row", "a whole row"])
def test_infinities_and_nan_spread_as_in_torch(V, value, whole):
    """A row may begin with -inf over more than a block: masked words."""
    logits, _ = OP.inputs(M=3, V=V, dtype=torch.float32)[0]
    logits[1, : V if whole else V - 20] = value
    targets = torch.full((3,), V - 3)
    found, wanted = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours, theirs = kernel(found, targets, reduction="none"), F.cross_entropy(wanted, targets, reduction="none")
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    torch.testing.assert_close(found.grad, wanted.grad, equal_nan=True)


@each
@pytest.mark.parametrize("V, N", [(50, 64), (8190, 8208)])
def test_padded_columns_count_for_nothing(function, V, N):
    logits, targets = OP.inputs(M=4, V=N, dtype=torch.float32)[0]
    targets %= V
    logits[:, V:] = NAN
    options = dict(label_smoothing=0.1, z_loss=1e-3)
    padded, plain = logits.clone().requires_grad_(), logits[:, :V].clone().requires_grad_()
    loss, expected = function(padded, targets, vocab_size=V, **options), reference(plain, targets, **options)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(padded.grad[:, :V], plain.grad, atol=1e-7, rtol=1e-5)
    assert not padded.grad[:, V:].any()


# ---- overwriting the logits


def overwritten(logits, targets, cotangent=None, **options):
    """Loss and gradient by `inplace`, and whether the gradient lies where the logits lay."""
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1
    loss = kernel(hidden, targets, inplace=True, **options)
    (gradient,) = torch.autograd.grad(loss, hidden, cotangent)
    return loss, gradient, gradient.data_ptr() == hidden.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, V", [(9, 65), (2, 8209)])
def test_inplace_gives_the_same_in_the_memory_of_the_logits(M, V, dtype):
    for options in option_sets(OP):
        (logits, targets), keywords = OP.inputs(M=M, V=V, **options, dtype=dtype)
        leaf = logits.clone().requires_grad_()
        loss = kernel(leaf, targets, **keywords)
        cotangent = torch.randn_like(loss)
        (gradient,) = torch.autograd.grad(loss, leaf, cotangent)
        found_loss, found, same_memory = overwritten(logits, targets, cotangent, **keywords)
        assert same_memory
        assert torch.equal(loss, found_loss)
        torch.testing.assert_close(found, gradient, rtol=3 * torch.finfo(dtype).eps, atol=1e-7)


def test_a_plain_call_leaves_the_logits_alone():
    logits, targets = OP.inputs(M=9, V=65, dtype=torch.float32)[0]
    before = logits.clone()
    kernel(logits.requires_grad_(), targets).backward()
    kernel(logits.detach(), targets, inplace=True)  # no gradient is wanted, so none is written
    assert torch.equal(logits, before)


def test_inplace_refuses_what_it_would_ruin():
    logits, targets = OP.inputs(M=4, V=16, dtype=torch.float32)[0]
    with pytest.raises(ValueError, match="leaf"):
        kernel(logits.requires_grad_(), targets, inplace=True)
    with pytest.raises(ValueError, match="strides"):
        kernel((logits * 1).t().contiguous().t(), targets, inplace=True)
    with pytest.raises(ValueError, match="strides"):
        kernel((logits[:1] * 1).expand(4, 16), targets, inplace=True)
    needed = torch.exp(logits)  # exp keeps its result for its own backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kernel(needed, targets, inplace=True).backward()
    needed = logits * 1
    other = needed.square().sum()
    kernel(needed, targets, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kernel(logits * 1, targets, inplace=True), logits, create_graph=True)
    loss = kernel(logits * 1, targets, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="CUDA"):
        OP.triton(logits * 1, targets, inplace=True)


# ---- targets


@each
@pytest.mark.parametrize("target", [7, -1, -101, 2**31 - 1])
def test_a_target_outside_the_vocabulary_is_refused_on_the_cpu(function, target):
    logits, targets = OP.inputs(M=5, V=9, dtype=torch.float32)[0]
    targets %= 7
    targets[3] = target
    with pytest.raises(ValueError, match=rf"targets: {target} is outside 0 to 6"):
        function(logits, targets, vocab_size=7)


@pytest.mark.parametrize("V", [40, 8209])
@pytest.mark.parametrize("target", [-1, -101, 2**31 - 1, 2**40, "V"])
def test_on_a_gpu_it_makes_the_loss_nan(V, target):
    """The kernel itself, which cannot raise: the row is poisoned, its neighbours are not, nothing outside is read."""
    logits, targets = OP.inputs(M=3, V=V, dtype=torch.float32)[0]
    targets[1] = V if target == "V" else target
    with interpreting():
        loss, *_ = cross_entropy_rows(logits, targets, Criterion(-100, 0.0, 0.0, None, V), torch.ones(3))
    assert loss.isnan().tolist() == logits.isnan().all(1).tolist() == [False, True, False]
    assert logits[::2].isfinite().all()


def test_nothing_waits_for_the_device():
    """Meta tensors have no data to look at: a look at a value would raise."""
    from kernels.proof.aot import launches

    names = [launch.kernel.__name__ for launch in launches(OP, dict(M=64, V=50304), 90)]
    assert names == ["cross_entropy_rows_kernel_hopper", "cross_entropy_bwd_kernel"]


def test_ignored_targets_inside_a_compiled_model():
    embedding, head = torch.nn.Embedding(17, 8), torch.nn.Linear(8, 17)
    tokens, targets = torch.randint(17, (12,)), torch.randint(17, (12,))

    for function in (reference, kernel):

        def forward(targets, function=function):
            return function(head(embedding(tokens)), targets, ignore_index=-1)

        torch._dynamo.reset()
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        for ignored in (0, 5, 12):
            given, results = targets.where(torch.arange(12) >= ignored, -1), []
            for run in (compiled, forward):
                loss = run(given)
                results.append((loss, *torch.autograd.grad(loss, (embedding.weight, head.weight))))
            torch.testing.assert_close(*results, equal_nan=True)


def test_offsets_beyond_2_to_the_31(tmp_path):
    """Three rows more than 2^30 elements apart, in a sparse file: the last starts past what an int32 can count."""
    V, pitch = 40, 2**30 + 8
    size = 2 * pitch + V
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    far = flat.as_strided((3, V), (pitch, 1))
    near, targets = OP.inputs(M=3, V=V, dtype=torch.bfloat16)[0]
    far.copy_(near)
    criterion = Criterion(-100, 0.0, 0.0, None, V)
    with interpreting():
        expected, *_ = cross_entropy_rows(near, targets, criterion, torch.ones(3))
    leaf = far.detach().requires_grad_()
    loss = kernel(leaf, targets, reduction="none")
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones(3))
    assert torch.equal(gradient, near)
    with interpreting():
        cross_entropy_rows(far, targets, criterion, torch.ones(3))
    assert torch.equal(far, near)


@each
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(reduction="avg"), "reduction: expected 'none', 'mean' or 'sum', got 'avg'"),
        (dict(label_smoothing=1.5), "label_smoothing"),
        (dict(softcap=0.0), "softcap"),
        (dict(vocab_size=10), "vocab_size"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), "targets: expected shape"),
        (dict(targets=torch.zeros(5)), "targets: expected int32 or int64"),
        (dict(targets=torch.zeros(5, dtype=torch.int64, device="meta")), "targets: on meta"),
        (dict(logits=torch.zeros(5)), "logits: expected"),
        (dict(logits=torch.zeros(5, 9, dtype=torch.int64)), "logits: expected a floating dtype"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_arguments_are_named(function, options, message):
    arguments = dict(logits=torch.randn(5, 9), targets=torch.zeros(5, dtype=torch.int64)) | options
    with pytest.raises(ValueError, match=message):
        function(**arguments)


# ---- mutants: faults of the kernels that both losses share, and of the backward pass

MUTANTS = {
    "ignored rows count": (rows, "tl.where(kept, loss, 0.0)", "loss"),
    "target outside the vocabulary unseen": (rows, "chosen = tl.where(known, chosen, float(\"nan\"))", "chosen += 0.0"),
    "padding counts": (rows, "return tl.where(real, s, float(\"-inf\"))", "return tl.where(real, s, 0.0)"),
    "padding gets a gradient": (
        rows, "tl.where(kept & (v < V), dz, 0.0)\n                tl.store", "dz\n                tl.store"),
    "maximum never raised": (rows, "larger = tl.maximum(maximum, tl.max(s, axis=1)[:, None])", "larger = maximum"),
    "old sum not rescaled": (rows, "denominator * tl.exp(maximum - shift)", "denominator"),
    "smoothing by padded length": (rows, "tl.sum(total, axis=1)[:, None] / V", "tl.sum(total, axis=1)[:, None] / N"),
    "smoothing lost in the gradient": (rows, "label_smoothing * (hit - 1.0 / V)", "0.0 * (hit - 1.0 / V)"),
    "z-loss lost in the gradient": (rows, "2.0 * z_loss", "0.0 * z_loss"),
    "cap's derivative lost": (rows, "ds *= (1.0 - share) * (1.0 + share)", "ds *= 1.0"),
    "a block left out on the way back": (rows, "last = (tl.cdiv(N, BLOCK_N) - 1)", "last = (tl.cdiv(N, BLOCK_N) - 2)"),
    "backward: ignored rows pulled": (page, "tl.where(kept & (v < V), dz, 0.0)", "tl.where(v < V, dz, 0.0)"),
    "backward: scale of the first row": (page, "scale_ptr + m * scale_stride_m", "scale_ptr + 0 * m"),
    "backward: rows taken as contiguous": (page, "logits_ptr + m * logits_stride_m", "logits_ptr + m * N"),
}  # fmt: skip


def check_every_part(launch, module):
    """In place with all options, and forward then backward: few rows, with padding and apart in memory."""
    criterion = Criterion(3, 0.9, 0.1, 15.0, 70, "none")
    for N, extra in ((80, 8), (8209, 0)):
        criterion = criterion._replace(vocab_size=N - 10)
        wide = (torch.randn(5, N + extra) * 4).requires_grad_()
        targets, scale = torch.tensor([0, 3, N - 11, 7, 40]), torch.rand(5) + 0.5
        options = criterion._asdict()
        leaf = wide.detach()[:, :N].double().requires_grad_()
        expected = reference(leaf, targets, **options)
        (gradient,) = torch.autograd.grad(expected, leaf, scale.double())
        with interpreting():
            logits = wide.detach().clone()[:, :N]
            loss, *_ = launch(logits, targets, criterion, scale)
            for outside in (N, -1):
                poisoned, *_ = launch(logits.clone(), torch.full((5,), outside), criterion, None)
                assert poisoned.isnan().all()
            found = module.cross_entropy_triton(wide[:, :N], targets, **options)
            (again,) = torch.autograd.grad(found, wide, scale)
        for f, t in ((loss, expected), (logits, gradient), (again[:, :N], gradient)):
            assert relative_error(f.detach(), t.detach()) < 4 * torch.finfo(f.dtype).eps


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutant_is_caught(mistake, tmp_path, monkeypatch):
    module, old, new = MUTANTS[mistake]
    mutant = mutated(module, old, new, tmp_path, monkeypatch)
    launch = mutant.cross_entropy_rows
    with pytest.raises((AssertionError, OutOfBounds, Race)):
        check_every_part(launch, mutant if module is page else page)


def test_the_kernels_as_they_are_pass_what_catches_mutants():
    check_every_part(cross_entropy_rows, page)
