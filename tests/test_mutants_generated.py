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
from kernels.prims import LoopTile, RowTile, RowTiles
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
    before: list[Tensor]

    def tensors(self) -> list[Tensor]:
        """What the op is given."""
        given = [*self.parity.arguments, *self.parity.cotangents]
        return [x for x in given if isinstance(x, Tensor)]

    def restore(self) -> bool:
        """Put back what the op was given; whether that had changed."""
        changed = False
        for x, before in zip(self.tensors(), self.before, strict=True):
            if not torch.equal(x, before):
                x.copy_(before)
                changed = True
        return changed


# What parity has, at sizes that take little time where tiles are small too (see `shrink`).
SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "rmsnorm": (dict(M=7, N=150), dict(M=19, N=60), dict(M=1, N=1), dict(M=0, N=16)),
    "attention": (
        dict(B=1, T=37, S=37, H=2, G=2, D=16), dict(B=2, T=3, S=70, H=2, G=1, D=16),
        dict(B=1, T=40, S=64, H=2, G=1, D=24), dict(B=2, T=0, S=5, H=2, G=1, D=16),
    ),
    "cross_entropy": (dict(M=9, V=95), dict(M=33, V=30), dict(M=1, V=1), dict(M=0, V=7)),
    "linear_cross_entropy": (
        dict(M=33, V=30, C=8), dict(M=7, V=95, C=8), dict(M=1, V=1, C=1), dict(M=0, V=9, C=4),
    ),
}  # fmt: skip
SIZES |= {
    "add_rmsnorm": SIZES["rmsnorm"],
    "layernorm": SIZES["rmsnorm"],
    "inplace": (*SIZES["cross_entropy"], dict(M=2, V=4100)),
}


def shrink(page: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Rows longer than 64 are long, so that every kernel of a page has loops to go round on little data."""
    if hasattr(page, "cross_entropy_rows"):
        tiles = page.cross_entropy_rows.__globals__["TILES"]
        patch.setitem(tiles, "rows", RowTiles(64, 512, RowTile(1, 32, 4, long=True)))
    elif "attention" not in page.__name__:
        rows = RowTiles(64, 512, RowTile(1, 64, 4, long=True))
        patch.setitem(page.TILES, "forward", {80: rows, 90: rows} if "rms" in page.__name__ else rows)
        patch.setitem(page.TILES, "backward", {0: LoopTile(2, 64, 4, 1, 2)})


def lay(x: Any, i: int, j: int) -> Any:
    """Of case i tensor j: its rows apart, by as much as no other's are, or else lying in one of the awkward ways."""
    if not (isinstance(x, Tensor) and x.numel() and x.dim()):
        return x
    if not x.is_floating_point():
        return x.repeat_interleave(2)[::2]
    ways = [F.pad(x, (0, 3 + j), value=float("nan"))[..., : x.shape[-1]], x, *layouts(x).values()]
    return ways[0 if i % 2 else (i // 2 + j) % len(ways)]


@functools.cache
def cases_of(name: str) -> list[Case]:
    """Sizes, dtypes and options as test_parity.py combines them, tensors laid out in every way by turns, two GPUs."""
    op = kernels.OPS["cross_entropy" if name == "inplace" else name]
    cases = []
    for i, values in enumerate(combined(op, SIZES[name], dtype=DTYPES)):
        torch.manual_seed(0)
        arguments, keywords = op.inputs(**values)
        laid = [lay(a, i, j) for j, a in enumerate(arguments)]
        outputs = op.reference(*laid, **keywords)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [lay(torch.randn_like(o), i, j + 3) for j, o in enumerate(outputs)]
        parity = Parity(op, laid, f"{values}", cotangents=cotangents, **keywords)
        case = Case(name, parity, 90 if i % 3 == 2 else 0, [])
        case.before.extend(x.clone() for x in case.tensors())
        cases.append(case)
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
    for i, case in enumerate(list(cases)):
        try:
            with new_memory_is_nan(), interpreting(arch=case.arch):
                case.parity.check(function_of(case.op, pages[case.op]))
            assert not case.restore(), "an argument was written over"
        except BaseException:
            case.restore()
            cases.insert(0, cases.pop(i))
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
                for loaded_page in pages.values():
                    shrink(loaded_page, patch)
                check({name: pages[at] for name, at in target.ops.items()}, cases)

            yield mutant.name, verdict(run, CAUGHT)
