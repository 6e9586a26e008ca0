"""One update: what it weighs, who may refuse it and where that is decided, and the captured form's twin on a CPU."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from gptfast.config import GPTConfig
from gptfast.model import GPT, IGNORED
from gptfast.optim import adamw, muon, set_learning_rate
from gptfast.parallel import launch, leave
from gptfast.parallel.optimizer import ShardedOptimizer
from gptfast.parallel.split import parallelize, whole_shapes
from gptfast.parallel.team import join
from gptfast.step import Step, evaluate, language_model
from train.guard import Guard, Refused

CONFIG = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16)
UPDATES = 20


def build(dtype: torch.dtype = torch.float32, device: str = "cpu", dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(**{**vars(CONFIG), "dropout": dropout})
    return GPT(config, kernels.load("reference" if device == "cpu" else "auto"), dtype).to(device)


def optimizer_of(kind: str, model: GPT) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        if kind == "adamw":
            return adamw(model, learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    made = muon(model, CONFIG, weight_decay=0.1, cautious=True, normalize=True, newton_schulz=model.ops.newton_schulz)
    made.dtype = torch.float32  # in bf16 a rounding of the rate shows
    return made


def batches(count: int, device: str = "cpu") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of five of the tokens, some of whose targets are ignored, in each a different number."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        stream = torch.randint(5, (4, 17), generator=draw)
        x, y = stream[:, :-1].clone(), stream[:, 1:].clone()
        y.view(-1)[: 13 * (i % 5)] = IGNORED
        found.append((x.to(device), y.to(device)))
    return found


def trajectory(
    kind: str, accumulation: int, *, graph: bool, device: str = "cpu", compiled: bool = False
) -> list[float]:
    """Losses of UPDATES updates under a falling rate, of which the ninth has a gradient that is not finite."""
    model = build(device=device, dropout=0.1)
    optimizer = optimizer_of(kind, model)
    guard = Guard("skip")
    how: dict[str, Any] = {"accumulation": accumulation, "graph": graph, "compiled": compiled}
    step = Step(language_model(model), optimizer, clip=1.0, guard=guard, **how)
    stream = iter(batches(UPDATES * accumulation, device))
    losses = []
    for i in range(UPDATES):
        set_learning_rate(optimizer, (1e-2 if kind == "adamw" else 1.0) * (1 - i / UPDATES))
        if i == 8:
            healthy = model.transformer["wte"].weight.detach().clone()
            model.transformer["wte"].weight.data[:] = math.inf
            before = [p.detach().clone() for p in model.parameters()]
        loss = step(stream).item()
        if i == 8:
            step.finish()
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            model.transformer["wte"].weight.data.copy_(healthy)
        else:
            losses.append(loss)
    step.finish()
    assert guard.skipped == 1 and losses[-1] < losses[0]
    if kind == "adamw":
        assert {state["step"].item() for state in optimizer.state.values()} == {UPDATES - 1}
    return losses


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_captured_update_is_the_launched_one(kind: str, accumulation: int) -> None:
    """On static buffers, with rates as tensors, after warm-ups that change nothing and draw nothing."""
    launched, captured = (trajectory(kind, accumulation, graph=graph) for graph in (False, True))
    assert captured == pytest.approx(launched, rel=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_cuda_graph_is_the_launched_update(kind: str, accumulation: int, compiled: bool) -> None:
    launched, captured = (
        trajectory(kind, accumulation, graph=graph, device="cuda", compiled=compiled) for graph in (False, True)
    )
    assert captured == pytest.approx(launched, rel=2e-4)


READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
COPIES = {"aten::scalar_tensor", "aten::lift_fresh"}  # a number of the host becomes a tensor, which on a GPU is copied


class NoReading(TorchDispatchMode):
    """Fails where the host would wait for the device, or copy numbers to it: what a capture cannot hold."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        assert name not in READS | COPIES, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_captured_reads_nothing(kind: str, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in ("cross_entropy", "cross_entropy.linear"):  # targets are looked at on CPUs alone
        monkeypatch.setattr(f"kernels.{page}.check_criterion", lambda *_: None)
    model = build()
    step = Step(
        language_model(model), optimizer_of(kind, model), accumulation=accumulation, clip=1.0, guard=Guard(), graph=True
    )  # fmt: skip
    step(iter(batches(accumulation)))
    with NoReading():
        for captured in step._captured:
            captured()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        model.lm_head.weight.sum().item()


def test_the_host_hears_one_update_late_and_nothing_is_taken_meanwhile() -> None:
    """After a loss that is not finite the run is to stop; the next update, begun before that is known, is not taken."""
    model = build()
    step = Step(language_model(model), optimizer_of("adamw", model), clip=1.0, guard=Guard("stop"))
    stream = iter(batches(6))
    step(stream)
    embedding = model.transformer["wte"].weight
    healthy = embedding.detach().clone()
    embedding.data[:] = math.nan
    bad = next(stream)
    step(iter([bad]))
    embedding.data.copy_(healthy)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(Refused, match="the loss is not a number") as refused:
        step(stream)
    assert refused.value.batches == [bad]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_spike_is_refused_on_the_device() -> None:
    model = build()
    guard = Guard(spike=6.0)
    guard.load_state_dict({"skipped": 0, "in_a_row": 0, "losses": [3.9 + 0.001 * (i % 3) for i in range(40)]})
    step = Step(language_model(model), optimizer_of("muon", model), guard=guard)
    model.lm_head.weight.data *= 30
    before = [p.detach().clone() for p in model.parameters()]
    step(iter(batches(1)))
    step.finish()
    assert guard.news and "is a spike over 3.9010" in guard.news[0][1]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_compiled_step_refuses_too() -> None:
    """The one graph of a CPU: the norm that it returns is the gradient's, clipped or not, and NaN is seen."""
    norms = []

    class Watch(Guard):
        def record(self, loss: float, norm: float, taken: bool, batches: list) -> None:
            norms.append(norm)
            super().record(loss, norm, taken, batches)

    for compiled in (False, True):
        model = build()
        optimizer = optimizer_of("adamw", model)
        step = Step(language_model(model), optimizer, clip=0.5, guard=Watch("skip"), compiled=compiled)
        step(iter(batches(1)))
        before = model.transformer["h"][0].mlp.c_fc.weight.detach().clone()
        model.lm_head.weight.data[0] = math.inf
        step(iter(batches(1)))
        step.finish()
        assert torch.equal(model.transformer["h"][0].mlp.c_fc.weight, before)
    assert norms[2] == pytest.approx(norms[0], rel=1e-4) and not math.isfinite(norms[1] + norms[3])


def test_what_cannot_be_captured_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="leave graph out"):
        Step(language_model(model), optimizer_of("adamw", model), scaler=torch.amp.GradScaler("cpu"), graph=True)
    with pytest.raises(TypeError, match="SGD cannot refuse a step"):
        Step(language_model(model), torch.optim.SGD(model.parameters()), guard=Guard())
    step = Step(language_model(model), optimizer_of("adamw", model), graph=True)
    step(iter(batches(1)))
    x, y = batches(1)[0]
    with pytest.raises(ValueError, match="batches of one shape"):
        step(iter([(x[:2], y[:2])]))


# ---- weights of the mean


def truth(model: GPT, stream: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """One fp64 mean over all counted targets, with its gradient."""
    exact = GPT(CONFIG, kernels.load("reference"), torch.float64).double()
    exact.load_state_dict(model.state_dict())
    sums = torch.stack([exact(x, y, reduction="sum") for x, y in stream]).sum()
    mean = sums / sum((y != IGNORED).sum() for _, y in stream)
    mean.backward()
    model.exact_gradient = torch.cat([p.grad.flatten() for p in exact.parameters()])
    return mean.detach()


def distances() -> dict[str, float]:
    """Of loss, gradient and evaluation to one fp64 mean, on this rank."""
    with join("ddp", backend="gloo", device="cpu") as team:
        alone = build()
        stream = [*batches(3), (batches(1)[0][0], torch.full((4, 16), IGNORED))]  # and one that counts for nothing
        exact = truth(alone, stream)
        model = build()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
        called: Any = model
        if team.size > 1:
            shapes = whole_shapes(model)
            called = parallelize(model, team)
            optimizer = ShardedOptimizer(optimizer, model, called, shapes, CONFIG, team)
        mine = stream[team.data_rank :: team.data_size]
        step = Step(language_model(called), optimizer, accumulation=len(mine), team=team)
        evaluated = evaluate(called, iter(stream), team)
        loss = step(iter(mine))
        moved = torch.cat([(a - b).flatten() for a, b in zip(alone.parameters(), model.parameters(), strict=True)])
        gradient = alone.exact_gradient
        return {
            "loss": abs(loss.item() / exact.item() - 1), "evaluation": abs(evaluated.item() / exact.item() - 1),
            "gradient": ((moved - gradient).norm() / gradient.norm()).item(),
        }  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_ignored_targets_weigh_nothing(count: int) -> None:
    from test_parallel import torchrun

    if count == 1:
        found = distances()
    else:
        done = torchrun(count, str(Path(__file__)))
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"] < 1e-6 and found["evaluation"] < 1e-6 and found["gradient"] < 1e-5, found


if __name__ == "__main__":
    found = distances()
    if launch().rank == 0:  # two that print at once share a line
        print(json.dumps(found), flush=True)
    leave(0)
