"""Cross-entropy's kernel in Gluon, emulated: values, options, races, and when it is taken."""

import pytest
import torch
from mutants import mutated
from oracle import relative_error

from kernels import OPS
from kernels._triton import HAS_GLUON, Launcher, launching
from kernels.cross_entropy import hopper
from kernels.cross_entropy.rows import Criterion, cross_entropy_rows
from kernels.proof import aot
from kernels.proof.emulate import ProtocolError, emulating
from kernels.proof.interpret import OutOfBounds, interpreting
from kernels.proof.machine_code import broken_gates, read_code

OP = OPS["cross_entropy"]
KERNEL = "cross_entropy_rows_kernel_hopper"
N = 2 * hopper.BLOCK_N + 16
OPTIONS = {
    "plain": Criterion(-100, 0.0, 0.0, None, N),
    "smoothing": Criterion(-100, 0.1, 0.0, None, N),
    "z_loss": Criterion(-100, 0.0, 1e-2, None, N),
    "softcap": Criterion(-100, 0.0, 0.0, 15.0, N),
    "padding": Criterion(-100, 0.1, 0.0, None, hopper.BLOCK_N + 3),
    "all": Criterion(3, 0.9, 0.1, 30.0, N - 9),
}


def a_case(criterion, dtype=torch.bfloat16, pitch=N):
    """Logits whose padding is NaN, targets on both sides of the seams of chunks, one of them ignored; row scales."""
    logits = (torch.randn(6, pitch) * 3).to(dtype)[:, :N]
    logits[:, criterion.vocab_size :] = torch.nan
    seam = hopper.BLOCK_N
    targets = torch.tensor([0, seam - 1, seam, criterion.ignore_index, seam + 2, criterion.vocab_size - 1])
    return logits, targets, torch.rand(6) + 0.5


def truth(logits, targets, scale, criterion, dtype=torch.float64):
    leaf = logits.to(dtype).requires_grad_()
    loss = OP.reference(leaf, targets, **criterion._replace(reduction="none")._asdict())
    return loss.detach(), torch.autograd.grad(loss, leaf, scale.to(loss))[0]


def check(launch, criterion, dtype=torch.bfloat16, seed=0, pitch=N):
    """The error rule of tests/oracle.py for the loss and for the gradient in place."""
    logits, targets, scale = a_case(criterion, dtype, pitch)
    wide, same = truth(logits, targets, scale, criterion), truth(logits, targets, scale, criterion, dtype)
    results = [torch.full((6,), torch.nan) for _ in range(3)]
    with emulating(seed):
        launch(logits, targets, None, *results, criterion)
        alone = results[0].clone()
        launch(logits, targets, scale, *results, criterion)
    assert torch.equal(alone, results[0]), "values: the loss alone is another"
    for found, s, t in zip((results[0], logits), same, wide, strict=True):
        assert found.isfinite().all(), "values: not finite"
        assert relative_error(found, t) <= 2 * relative_error(s, t) + torch.finfo(found.dtype).eps, "values"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_values(options, dtype):
    check(hopper.launch_hopper, OPTIONS[options], dtype, pitch=N + 16)


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_the_same(seed):
    check(hopper.launch_hopper, OPTIONS["all"], seed=seed)


def test_it_says_what_the_other_kernel_says():
    """Loss, both parts of the log-sum-exp and gradient, also of targets in no vocabulary, and of infinities."""
    criterion = OPTIONS["padding"]
    logits, targets, scale = a_case(criterion)
    targets[0], targets[1] = criterion.vocab_size, 2**40
    logits[2, 5], logits[4, 7], logits[5, :4200] = torch.inf, torch.nan, -torch.inf
    both = logits.clone(), logits.clone()
    with interpreting():
        plain = cross_entropy_rows(both[0], targets, criterion, scale)
    with emulating():
        found = cross_entropy_rows(both[1], targets, criterion, scale)
    kept = targets != criterion.ignore_index
    for f, p in zip(found, plain, strict=True):
        known = torch.ones_like(kept) if f is found[0] else kept & plain[0].isfinite()
        torch.testing.assert_close(f[known], p[known], equal_nan=True)
    torch.testing.assert_close(both[1], both[0], equal_nan=True)


CHUNK_OF_V = "(target >= i * BLOCK_N) & (target < (i + 1) * BLOCK_N)"
MUTANTS = {
    "chunk not awaited": ("wait_group(CHUNKS - 1 - i)", "wait_group(CHUNKS - i)", ("race",)),
    "groups not committed": ("            gl_async_copy.commit_group()\n", "", ("race",)),
    "copy past the row": ("row + v, v < N)\n            gl_async", "row + v, v < N + 64)\n            gl_async",
                          ("bounds",)),
    "store past the row": ("ds.to(row.dtype.element_ty), v < N)", "ds.to(row.dtype.element_ty), v >= 0)", ("bounds",)),
    "padding counts": ("        s = gl.where(v < V, s, float(\"-inf\"))", "        s = s + 0.0", ("values",)),
    "padding gets a gradient": ("        ds = gl.where(v < V, ds, 0.0)", "        ds = ds + 0.0", ("values",)),
    "target of the next chunk": (CHUNK_OF_V, "(target > i * BLOCK_N) & (target < (i + 1) * BLOCK_N)", ("values",)),
    "one chunk too many is full": ("FULL=V // BLOCK_N", "FULL=V // BLOCK_N + 1", ("values",)),
    "smoothing lost in the gradient": ("        ds -= even", "        ds -= 0.0 * even", ("values",)),
    "z-loss lost in the gradient": ("scale * (1.0 + 2.0 * z_loss", "scale * (1.0 + 0.0 * z_loss", ("values",)),
    "cap's derivative lost": ("ds *= (1.0 - share) * (1.0 + share)", "ds *= 1.0", ("values",)),
    "ignored rows keep their logits": ("                gl.store(row + v, zeros, v < N)", "                pass",
                                       ("values",)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mutant_is_caught(mistake, tmp_path, monkeypatch):
    old, new, faults = MUTANTS[mistake]
    page = mutated(hopper, old, new, tmp_path, monkeypatch)
    found = []
    for seed, criterion in enumerate((OPTIONS["all"], OPTIONS["padding"])):
        try:
            check(page.launch_hopper, criterion, torch.float16, seed)
        except (ProtocolError, OutOfBounds, AssertionError) as error:
            found.append(str(error))
    assert found, "not caught"
    assert all(any(fault in error for fault in faults) for error in found), found


# ---- when it is taken


def launched(logits, arch=90, gluon=True):
    found = []
    with launching(Launcher(lambda kernel, *_, **__: found.append(kernel.__name__), arch, gluon=gluon)):
        criterion = Criterion(-100, 0.0, 0.0, None, logits.shape[1])
        cross_entropy_rows(logits, torch.zeros(len(logits), dtype=torch.int64), criterion)
    return found[0] == KERNEL


def test_taken_for_rows_that_fit_and_lie_on_16_bytes():
    def rows(columns, dtype=torch.bfloat16, pitch=None):
        return torch.empty(2, pitch or columns, dtype=dtype)[:, :columns]

    assert HAS_GLUON
    for logits in (rows(50304), rows(50304, torch.float16), rows(114688), rows(50304, pitch=50320)):
        assert launched(logits) and not launched(logits, 80) and not launched(logits, 100)
        assert not launched(logits, gluon=False)
    for logits in (rows(50304, torch.float32), rows(114704), rows(50257), rows(50304, pitch=50305), rows(8192)):
        assert not launched(logits)
    assert not launched(torch.empty(2 * 50304 + 1, dtype=torch.bfloat16)[1:].view(2, 50304))


@pytest.mark.parametrize(
    "criterion",
    [Criterion(-100, 0.0, 0.0, None, 53248), Criterion(-100, 0.1, 1e-4, 15.0, 50257)],
    ids=["largest row", "all options"],
)
def test_its_machine_code_keeps_the_gates(criterion):
    """Beside what results/aot.json has: the most shared memory, and the most registers."""
    found, columns = [], (criterion.vocab_size + 15) // 16 * 16
    record = Launcher(lambda kernel, grid, *a, **k: found.append(aot.Launch(kernel, a, k)), 90)
    logits, targets = torch.empty(8, columns, dtype=torch.bfloat16, device="meta"), torch.empty(8, device="meta").long()
    with launching(record):
        cross_entropy_rows(logits, targets, criterion, torch.empty(8, device="meta"))
    code = read_code(aot.compile_launch(found[0], 90), 90)
    assert found[0].kernel.__name__ == KERNEL and broken_gates(code, 90) == []
    assert code.stores_narrow <= 6 and code.loads_narrow <= 3  # of the row itself none


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_on_a_gpu(options, dtype):
    criterion = OPTIONS[options]
    logits, targets, scale = (a.cuda() for a in a_case(criterion, dtype))
    same, wide = (truth(logits, targets, scale, criterion, d) for d in (dtype, torch.float64))
    loss, *_ = cross_entropy_rows(logits, targets, criterion, scale)
    for f, s, t in zip((loss, logits), same, wide, strict=True):
        assert relative_error(f, t) <= 2 * relative_error(s, t) + torch.finfo(f.dtype).eps
