"""Newton-Schulz and the optimizer built on it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
from gptfast import checkpoint, cli
from gptfast.model import GPT
from gptfast.optim import Muon, set_learning_rate
from kernels.newton_schulz import (
    POLAR_EXPRESS,
    QUINTIC,
    REFERENCE_PRODUCTS,
    SAFETY,
    iterate,
    newton_schulz_reference,
)
from train import build, pretrain
from train.config import Pretrain
from train.prepare import prepare

SHAPES = [(1, 1), (1, 7), (5, 1), (8, 8), (16, 48), (48, 16), (33, 20)]


def matrices(m: int, n: int, kind: str) -> Tensor:
    """Two matrices (2, m, n) in float64."""
    generator = torch.Generator().manual_seed(m * 100 + n)
    x = torch.randn(2, m, n, generator=generator, dtype=torch.float64)
    if kind == "rank one":
        x = x[:, :, :1] * x[:, :1, :]
    if kind == "badly conditioned":
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        x = u * torch.logspace(0, -6, s.shape[-1], dtype=torch.float64) @ v
    return x


def polynomial(s: Tensor, coefficients, steps: int) -> Tensor:
    """What the iteration does to a singular value, as a scalar."""
    for a, b, c in coefficients[:steps]:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("kind", ["random", "rank one", "badly conditioned"])
@pytest.mark.parametrize("coefficients", [QUINTIC, POLAR_EXPRESS], ids=["quintic", "polar express"])
@pytest.mark.parametrize("m, n", SHAPES)
def test_iteration_moves_singular_values_by_the_polynomial_and_keeps_the_vectors(m, n, coefficients, kind):
    x = matrices(m, n, kind)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / (SAFETY * s.norm(dim=-1, keepdim=True))
    for steps in (0, 1, 4, 5):
        expected = u * polynomial(s, coefficients, steps).unsqueeze(-2) @ v
        torch.testing.assert_close(newton_schulz_reference(x, steps, coefficients), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "coefficients, steps, low, high",
    [(QUINTIC, 5, 0.68, 1.14), (POLAR_EXPRESS, 5, 0.858, 1.142), (POLAR_EXPRESS, 4, 0.42, 1.58)],
)
def test_singular_values_end_in_the_promised_band(coefficients, steps, low, high):
    """Of every matrix whose singular values start above 1/100 of its Frobenius norm, in bf16 too."""
    ends = polynomial(torch.linspace(0.01, 1 / SAFETY, 100_000, dtype=torch.float64), coefficients, steps)
    assert low <= ends.min() and ends.max() <= high
    x = torch.randn(3, 24, 96, generator=torch.Generator().manual_seed(0))
    in_bf16 = torch.linalg.svdvals(newton_schulz_reference(x.bfloat16(), steps, coefficients).double())
    assert low - 0.03 <= in_bf16.min() and in_bf16.max() <= high + 0.03


@pytest.mark.parametrize("m, n", SHAPES)
def test_the_iteration_works_on_the_smaller_gram_matrix(m, n):
    sizes = set()

    def gram(x: Tensor) -> Tensor:
        product = REFERENCE_PRODUCTS.gram(x)
        sizes.add(tuple(product.shape[1:]))
        return product

    iterate(torch.ones(1, m, n), 2, POLAR_EXPRESS, dataclasses.replace(REFERENCE_PRODUCTS, gram=gram))
    assert sizes == {(min(m, n), min(m, n))}


def test_zero_stays_zero_and_nan_stays_in_its_matrix():
    x = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    alone = newton_schulz_reference(x[3:])
    x[0], x[1, 2, 3], x[2, 0, 0] = 0.0, torch.nan, torch.inf
    y = newton_schulz_reference(x)
    assert (y[0] == 0).all() and y[1].isnan().all() and not y[2].isfinite().any()
    torch.testing.assert_close(y[3:], alone)


def test_sizes_of_zero_and_strides():
    for shape in [(0, 4, 4), (2, 0, 3), (2, 3, 0)]:
        assert newton_schulz_reference(torch.zeros(shape)).shape == shape
    x = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(newton_schulz_reference(x.mT).mT, newton_schulz_reference(x))
    before = x.clone()
    torch.testing.assert_close(newton_schulz_reference(x[::2, 1:, :]), newton_schulz_reference(x[::2, 1:, :].clone()))
    assert torch.equal(x, before), "the input is not written to"


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda: newton_schulz_reference(torch.zeros(3, 3)), "x must be a stack"),
        (lambda: newton_schulz_reference(torch.zeros(1, 3, 3, dtype=torch.int64)), "x must be floating"),
        (lambda: newton_schulz_reference(torch.zeros(1, 3, 3), steps=6), "steps must be 0 to 5"),
    ],
)
def test_wrong_arguments_are_named(call, names):
    with pytest.raises((ValueError, TypeError), match=names):
        call()


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_steps_equal_torchs_muon_one_matrix_at_a_time():
    ours, theirs = parameters((6, 6), (12, 6), (6, 12), (6, 6)), parameters((6, 6), (12, 6), (6, 12), (6, 6))
    optimizer = Muon(
        [{"kind": "muon", "params": ours, "lr": 0.02, "weight_decay": 0.1}],
        lambda x, steps: newton_schulz_reference(x, steps, QUINTIC),
    )
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for seed in range(5):
        give_gradients(ours, seed), give_gradients(theirs, seed)
        optimizer.step(), peer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5 * 0.02 * 0.04)  # bf16 products, normalized 1 % apart


def test_adamw_groups_equal_torchs_adamw():
    ours, theirs = parameters((5, 3), (4,)), parameters((5, 3), (4,))
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-10}
    optimizer = Muon([{"kind": "adamw", "params": ours, **settings}])
    peer = torch.optim.AdamW(theirs, **settings)
    for seed in range(20):
        give_gradients(ours, seed), give_gradients(theirs, seed)
        optimizer.step(), peer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_matrices_within_one_parameter_step_alone():
    """Rows of c_attn that hold queries, keys and values: the same as three parameters."""
    (together,) = parameters((9, 4))
    apart = [torch.nn.Parameter(part.clone()) for part in together.detach().split([4, 4, 1])]
    give_gradients([together], 1)
    for p, grad in zip(apart, together.grad.split([4, 4, 1]), strict=True):
        p.grad = grad.clone()
    Muon([{"kind": "muon", "params": [together], "rows": [[4, 4, 1]]}], dtype=torch.float64).step()
    Muon([{"kind": "muon", "params": apart}], dtype=torch.float64).step()
    torch.testing.assert_close(together.detach(), torch.cat([p.detach() for p in apart]))


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"cautious": True, "weight_decay": 0.5}])
def test_matrices_turned_on_their_side_share_a_stack(options):
    torch.manual_seed(0)
    shapes, stacks = [(6, 15), (15, 6), (6, 15), (6, 6), (15, 6)], []

    def newton_schulz(x: Tensor, steps: int) -> Tensor:
        stacks.append(tuple(x.shape))
        return newton_schulz_reference(x, steps)

    together = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    alone = [p.clone() for p in together]
    for p, q in zip(together, alone, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    rule = {"kind": "muon", **options}
    Muon([rule | {"params": together}], newton_schulz, dtype=torch.float64).step()
    assert sorted(stacks) == [(1, 6, 6), (4, 6, 15)]
    for p, q in zip(together, alone, strict=True):
        Muon([rule | {"params": [q]}], dtype=torch.float64).step()
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"normalize": True, "cautious": True, "weight_decay": 0.1}], ids=str)
def test_zero_gradient_moves_nothing_and_nan_moves_its_own_matrix_only(options, dtype):
    params = parameters((4, 6), (4, 6), (4, 6))
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    params[0].grad.zero_()
    params[1].grad[0, 0] = torch.nan
    Muon([{"kind": "muon", "params": params, **options}], dtype=dtype).step()
    assert torch.equal(params[0], before[0])
    assert params[1].isnan().all()
    assert params[2].isfinite().all() and not torch.equal(params[2], before[2])


def in_numpy(w, grads, rows, lr, momentum, beta2, weight_decay, cautious, normalize):
    """Muon's formulas, a matrix at a time, in float64 numpy."""
    parts = []
    for matrix, *its_grads in zip(*(np.split(a, np.cumsum(rows)[:-1]) for a in (w, *grads)), strict=True):
        (m, n), mean, square = matrix.shape, 0.0, 0.0
        for grad in its_grads:
            mean = momentum * mean + (1 - momentum) * grad
            lookahead = torch.from_numpy(momentum * mean + (1 - momentum) * grad)
            o = newton_schulz_reference(lookahead[None])[0].numpy()
            if normalize:
                square = beta2 * square + (1 - beta2) * (o * o).mean(1 if m >= n else 0, keepdims=True)
                scaled = o / np.sqrt(square)
                o = scaled * np.linalg.norm(o) / np.linalg.norm(scaled)
            decayed = np.where(matrix * o > 0, matrix, 0) if cautious else matrix
            matrix = matrix - lr * weight_decay * decayed - lr * max(1, m / n) ** 0.5 * o
        parts.append(matrix)
    return np.concatenate(parts)


@pytest.mark.parametrize("cautious", [False, True], ids=["plain decay", "cautious decay"])
@pytest.mark.parametrize("normalize", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize("rows, n", [([6], 4), ([4], 6), ([6, 3, 3], 5), ([5], 5)], ids=str)
def test_steps_are_numpys(rows, n, normalize, cautious):
    p = torch.nn.Parameter(torch.randn(sum(rows), n, dtype=torch.float64))
    grads = [torch.randn(p.shape, dtype=torch.float64) for _ in range(3)]
    settings = {
        "lr": 0.1,
        "momentum": 0.8,
        "beta2": 0.9,
        "weight_decay": 0.5,
        "cautious": cautious,
        "normalize": normalize,
    }
    expected = in_numpy(p.detach().numpy(), [g.numpy() for g in grads], rows, **settings)
    optimizer = Muon([{"kind": "muon", "params": [p], "rows": [rows], **settings}], dtype=torch.float64)
    for p.grad in grads:
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_a_parameter_without_gradient_is_left_alone():
    params = parameters((4, 4), (4, 4), (3,), (3,))
    before = [p.detach().clone() for p in params]
    params[0].grad, params[2].grad = torch.ones(4, 4), torch.ones(3)
    optimizer = Muon([{"kind": "muon", "params": params[:2]}, {"kind": "adamw", "params": params[2:]}])
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert moved == [True, False, True, False]
    assert params[1] not in optimizer.state


def test_state_is_plain_tensors_and_resumes_bitwise():
    def fresh() -> tuple[list[torch.nn.Parameter], Muon]:
        params = parameters((6, 4), (4, 4), (5,))
        matrices = {"kind": "muon", "params": params[:2], "rows": [[2, 4], [4]], "normalize": True}
        return params, Muon([matrices, {"kind": "adamw", "params": params[2:]}])

    straight, optimizer = fresh()
    for seed in range(3):
        give_gradients(straight, seed)
        optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in straight]
    assert all(isinstance(v, Tensor) for state in saved["state"].values() for v in state.values())

    resumed, other = fresh()
    other.load_state_dict(saved)
    for p, w in zip(resumed, weights, strict=True):
        p.data.copy_(w)
    for seed in range(3, 6):
        for params, stepping in ((straight, optimizer), (resumed, other)):
            give_gradients(params, seed)
            stepping.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_beats_adamw_on_a_quadratic_at_the_same_steps(seed):
    """Linear regression from badly scaled inputs, 50 steps, rate decayed to zero; each at its best rate."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(256, 32, generator=generator) * torch.logspace(0, -2, 32)
    targets = inputs @ torch.randn(32, 32, generator=generator)

    def final_loss(make, rate: float) -> float:
        w = torch.nn.Parameter(torch.zeros(32, 32))
        optimizer = make(w)
        for step in range(50):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 50)
            loss = (inputs @ w.mT - targets).square().mean()
            w.grad = torch.autograd.grad(loss, w)[0]
            optimizer.step()
        return float((inputs @ w.mT - targets).square().mean().detach())

    rates = (0.1, 0.3, 0.5, 1.0, 2.0)
    muon = min(final_loss(lambda w: Muon([{"kind": "muon", "params": [w]}]), rate) for rate in rates)
    adamw = min(final_loss(lambda w: torch.optim.AdamW([w], weight_decay=0.0), rate) for rate in rates)
    assert muon < 0.7 * adamw


PRETRAIN = [
    "--device=cpu", "--compile=False", "--dtype=float32", "--block_size=32", "--batch_size=8", "--n_layer=2",
    "--gradient_accumulation_steps=1", "--n_head=2", "--n_embd=32", "--eval_iters=4", "--eval_interval=100",
    "--warmup_iters=5", "--dataset=tiny", "--learning_rate=5e-3", "--min_lr=0", "--beta2=0.99",
]  # fmt: skip


@pytest.fixture
def pretrain_with(tmp_path: Path, text: str) -> Callable[..., checkpoint.Checkpoint]:
    """Train a tiny char model with these flags into out_dir; returns the last checkpoint."""
    (tmp_path / "text.txt").write_text(text)
    prepare("tiny", tmp_path / "data", tmp_path / "text.txt")

    def run(out_dir: str, *flags: str, code: int = 0) -> checkpoint.Checkpoint:
        places = [f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / out_dir}"]
        assert cli.run(pretrain.main, [*PRETRAIN, *places, *flags]) == code
        return checkpoint.load(tmp_path / out_dir)

    return run


@pytest.mark.parametrize("seed", range(3))
def test_beats_adamw_on_a_char_model_at_the_same_steps(pretrain_with, seed):
    """50 steps of train.pretrain, each at rates that suit it: AdamW at the best of three."""
    flags = ["--max_iters=50", "--lr_decay_iters=50", f"--seed={seed}", "--whole_val=False"]
    adamw = min(
        pretrain_with(f"adamw-{rate}", *flags, f"--learning_rate={rate}").meta["best_val_loss"]
        for rate in ("5e-3", "1e-2", "2e-2")
    )
    muon = pretrain_with("muon", *flags, "--optimizer=muon", "--learning_rate=2e-2", "--matrix_lr=0.05")
    assert muon.meta["best_val_loss"] < adamw - 0.05


@pytest.mark.parametrize("options", [[], ["--schedule=trapezoid", "--cautious=True", "--normalize=True"]], ids=str)
def test_pretrain_resumes_bitwise(pretrain_with, options):
    """Rates go on where they were; with the trapezoid momentum and weight decay too, which change at every update."""
    flags = ["--optimizer=muon", "--lr_decay_iters=6", "--whole_val=False", *options]
    whole = pretrain_with("whole", *flags, "--max_iters=6")
    pretrain_with("parts", *flags, "--max_iters=3")
    parts = pretrain_with("parts", *flags, "--max_iters=6", "--init_from=resume")
    assert parts.step == whole.step == 6
    assert all(torch.equal(parts.model[name], weight) for name, weight in whole.model.items())
    for mine, other in zip(parts.optimizer["state"].values(), whole.optimizer["state"].values(), strict=True):
        assert all(torch.equal(mine[key], value) for key, value in other.items())
    assert parts.optimizer["param_groups"] == whole.optimizer["param_groups"]


def test_pretrain_refuses_to_resume_with_another_optimizer(pretrain_with, capsys):
    pretrain_with("out", "--max_iters=1", "--whole_val=False")
    pretrain_with("out", "--max_iters=2", "--init_from=resume", "--optimizer=muon", code=2)
    assert "was trained with --optimizer=adamw" in capsys.readouterr().err


def test_pretrain_schedules_every_group_alike():
    config = Pretrain(
        optimizer="muon", matrix_lr=0.03, learning_rate=1e-3, n_layer=1, n_head=2, n_embd=16, block_size=8
    )
    model = GPT(build.architecture_of(config, 11), kernels.load("reference"))
    optimizer = build.make_optimizer(config, model)
    set_learning_rate(optimizer, 0.5e-3)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"matrices": 0.015, "embeddings": 0.5e-3, "scalars": 0.5e-3})
    assert optimizer.newton_schulz is newton_schulz_reference


@pytest.mark.parametrize(
    "group, message",
    [
        ({"kind": "adam"}, "kind of a parameter group must be one of muon, adamw"),
        ({"kind": "muon", "params": [torch.zeros(3)]}, "not a parameter"),
        ({"kind": "muon", "params": [torch.zeros(3, 3)], "rows": [[1, 1]]}, "not a parameter"),
    ],
)
def test_wrong_groups_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [torch.zeros(2, 2)]} | group])
