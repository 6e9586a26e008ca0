"""AdamW's groups and arithmetic, and clipping."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import kernels
from gptfast.config import PRESETS, GPTConfig
from gptfast.model import GPT
from gptfast.optim import AdamW, adamw, clip_coefficient, grad_norm

CONFIG = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
RATES = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def make(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    return GPT(config, kernels.load("reference"))


def loss_of(model: GPT, seed: int) -> torch.Tensor:
    tokens = torch.randint(CONFIG.vocab_size, (2, 4, 16), generator=torch.Generator().manual_seed(seed))
    return model(tokens[0], tokens[1])


def test_twenty_steps_are_torchs() -> None:
    ours, theirs = make(), make()
    optimizer = adamw(ours, **RATES)
    decayed = [p for p in theirs.parameters() if p.dim() >= 2]
    plain = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=False, foreach=False)
    start = [p.detach().clone() for p in ours.parameters()]
    for step in range(20):
        loss_of(ours, step).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()  # the same gradients: training itself would magnify the last bit
        for stepper in (optimizer, oracle):
            stepper.step()
            stepper.zero_grad()
    moved = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), start, strict=True))
    apart = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert moved > 1e-2
    assert apart <= 1e-6


def test_matrices_decay_and_vectors_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    optimizer = adamw(model, **RATES)
    found = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {p: 0.1 if p.dim() >= 2 else 0.0 for p in model.parameters()} == found
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    printed = capsys.readouterr().out.splitlines()
    matrices, vectors = (sum(p.numel() for p in found if (p.dim() >= 2) is wide) for wide in (True, False))
    assert printed == [
        f"num decayed parameter tensors: 10, with {matrices:,} parameters",
        f"num non-decayed parameter tensors: 18, with {vectors:,} parameters",
        "using fused AdamW: True",
    ]


def test_groups_of_nanogpts_cpu_model(capsys: pytest.CaptureFixture[str]) -> None:
    adamw(make(PRESETS["char-cpu"]), **RATES)
    counts = re.findall(r"tensors: (\d+), with ([\d,]+)", capsys.readouterr().out)
    assert counts == [("18", "802,944"), ("9", "1,152")]  # as nanoGPT prints


def test_a_model_without_vectors_has_one_group() -> None:
    optimizer = adamw(make(PRESETS["char-modern-cpu"]), **RATES)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_frozen_parameters_are_left_out() -> None:
    model = make()
    model.transformer["wpe"].weight.requires_grad_(False)
    optimizer = adamw(model, **RATES)
    assert all(p is not model.transformer["wpe"].weight for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipping_is_torchs(max_norm: float) -> None:
    model, oracle = make(), make()
    for each in (model, oracle):
        loss_of(each, 0).backward()
    gradients = [p.grad for p in model.parameters()]
    found = grad_norm(gradients)
    torch._foreach_mul_(gradients, clip_coefficient(found, max_norm))
    expected = torch.nn.utils.clip_grad_norm_(oracle.parameters(), max_norm, foreach=False)
    torch.testing.assert_close(found, expected)
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norm <= max_norm * 1.0001


def test_a_step_does_not_import_torchs_compiler() -> None:
    """Which takes two seconds, for every command and each of its restarts."""
    program = """
import sys, torch, kernels
from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.optim import adamw, muon
model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8), kernels.load("reference"))
rates = dict(learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
for optimizer in (adamw(model, **rates), muon(model, model.config)):
    model(torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)).backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"exp_avg": None}, "exp_avg of a parameter of shape .2, 3. is None"),
        ({"exp_avg_sq": torch.zeros(3, 2)}, r"exp_avg_sq of .* is of shape \(3, 2\)"),
        ({"step": torch.zeros(1)}, r"step of .* is of shape \(1,\)"),
        ({"lr": "fast"}, "lr of a group of parameters is fast"),
        ({"weight_decay": math.nan}, "weight_decay of a group of parameters is nan"),
        ({"betas": (0.9,)}, "betas of a group of parameters is"),
    ],
)
def test_a_state_of_another_kind_is_not_loaded(changed: dict[str, Any], said: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = AdamW([weight], lr=0.1)
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    saved = optimizer.state_dict()
    target = saved["state"][0] if changed.keys() <= saved["state"][0].keys() else saved["param_groups"][0]
    target.update(changed)
    fresh = AdamW([weight], lr=0.1)
    with pytest.raises(ValueError, match=said):
        fresh.load_state_dict(saved)
    assert not fresh.state


def test_how_to_run_is_the_runs_own_and_never_the_checkpoints() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = AdamW([weight], lr=0.1, foreach=True)
    saved = AdamW([weight], lr=0.2).state_dict()
    saved["param_groups"][0].update(capturable="\0", fused={}, foreach=[])
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["capturable"], group["fused"], group["foreach"]) == (0.2, False, None, True)
