"""Every mistake that a list of rules can make in the kernels of attention, the losses and rmsnorm, against parity.

The long form, `--chaos`, tries all of them and holds what survives against a table that says why; without it a few are
tried. What catches them is what test_parity.py draws from the declarations: sizes, dtypes, options, layouts.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from mutants import loaded, mutants_of, verdict
from oracle import DTYPES, Parity, layouts
from torch import Tensor

import kernels
from kernels.proof.interpret import OutOfBounds, Overflow, Race, interpreting
from kernels.proof.options import combined


class Target(NamedTuple):
    """What is tried in one page: its functions, and the ops that must notice, each with the page that has it."""

    page: str
    functions: str
    ops: dict[str, str]


NORMS = {"rmsnorm": "rmsnorm", "add_rmsnorm": "rmsnorm"}
LOSSES = {
    "cross_entropy": "cross_entropy", "linear_cross_entropy": "cross_entropy.linear", "inplace": "cross_entropy",
}  # fmt: skip
TARGETS = {
    "rmsnorm": [
        Target("rmsnorm", "rmsnorm_fwd_kernel rmsnorm_fwd_kernel_long rmsnorm_bwd_kernel rmsnorm_bwd_kernel_input "
               "rmsnorm_bwd_kernel_weight _normalize _differentiate _forward _backward _add_forward _add_backward",
               NORMS),
        Target("prims", "load_sum sum_rows_kernel sum_partial_rows", NORMS | {"layernorm": "layernorm"}),
    ],
    "attention forward": [
        Target("attention.forward", "_softmax_step _attend attention_fwd_kernel launch_forward",
               {"attention": "attention"}),
    ],
    "attention backward": [
        Target("attention.backward", "_gather_dq attention_bwd_kernel_dq _gather_dk_dv attention_bwd_kernel_dk_dv "
               "launch_backward", {"attention": "attention"}),
    ],
    "attention": [
        Target("attention.shared", "document_bounds rows descriptor place keys_seen queries_seeing segments head_of "
               "load_rows scores tanh uncapped kept", {"attention": "attention"}),
        Target("attention", "_forward _forward_lse _backward _backward_lse _save", {"attention": "attention"}),
    ],
    "cross_entropy": [
        Target("cross_entropy", "cross_entropy_bwd_kernel cross_entropy_scale_kernel _kept _reduced _row_scale "
               "_forward _backward _InPlace.forward _InPlace.backward", LOSSES),
        Target("cross_entropy.rows", "load_logits logits_gradient _include cross_entropy_rows_kernel "
               "cross_entropy_rows", LOSSES),
    ],
    "linear_cross_entropy": [
        Target("cross_entropy.linear", "_pass _add_product _forward _backward _rows_loss_kernel _kernel_task "
               "_kernel_forward _kernel_backward _save", {"linear_cross_entropy": "cross_entropy.linear"}),
    ],
}  # fmt: skip


class Case(NamedTuple):
    """One call whose results are known, and the GPU whose tiles it is interpreted with."""

    op: str
    parity: Parity
    arch: int


@functools.cache
def cases_of(name: str) -> list[Case]:
    """The cases of test_parity.py, their arguments laid out in memory in every way by turns, in two sorts of tiles."""
    op = kernels.OPS["cross_entropy" if name == "inplace" else name]
    cases = []
    for i, values in enumerate(combined(op, op.parity, dtype=DTYPES)):
        torch.manual_seed(0)
        arguments, keywords = op.inputs(**values)
        laid = []
        for a in arguments:
            choices = [a]
            if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
                choices += layouts(a).values()
            laid.append(choices[(i + len(laid)) % len(choices)])
        cases.append(Case(name, Parity(op, laid, str(values), **keywords), 90 if i % 2 else 0))
    return cases


def inplace(mutant: ModuleType, logits: Tensor, *rest: Any, **keywords: Any) -> Tensor:
    """cross_entropy that may write over logits, whose rows lie apart."""
    apart = F.pad(logits, (0, 3))[:, : logits.shape[1]]
    return mutant.cross_entropy_triton(apart, *rest, inplace=True, **keywords)


def function_of(name: str, page: ModuleType) -> Callable[..., Any]:
    return functools.partial(inplace, page) if name == "inplace" else getattr(page, f"{name}_triton")


@contextlib.contextmanager
def new_memory_is_nan() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def check(pages: dict[str, ModuleType], cases: list[Case]) -> None:
    """Judge the ops of these pages by the cases. The one that fails is tried first the next time: it may tell most."""
    for case in list(cases):
        try:
            with new_memory_is_nan(), interpreting(arch=case.arch):
                case.parity.check(function_of(case.op, pages[case.op]))
        except Exception:
            cases.remove(case)
            cases.insert(0, case)
            raise


CAUGHT = (AssertionError, OutOfBounds, Overflow, Race)


def outcomes(target: Target, chosen: slice, folder: Any) -> Iterator[tuple[str, str]]:
    """The name of each mutant, and how it ended."""
    page = sys.modules[f"kernels.{target.page}"]
    cases = [case for name in target.ops for case in cases_of(name)]
    for mutant in mutants_of(page, target.functions.split())[chosen]:
        with pytest.MonkeyPatch.context() as patch:

            def run(mutant: Any = mutant, patch: pytest.MonkeyPatch = patch) -> None:
                pages = {
                    at: loaded(page, mutant.source, sys.modules[f"kernels.{at}"], folder, patch)
                    for at in set(target.ops.values())
                }
                check({name: pages[at] for name, at in target.ops.items()}, cases)

            yield mutant.name, verdict(run, CAUGHT)
