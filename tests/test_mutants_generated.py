"""Mistakes that a list of rules makes in the kernels of attention, the losses and rmsnorm, against parity.

The long form, `--chaos`, tries every second or fourth that the rules find, some 1,100; the short one a few of a page.
What survives must stand in a table that says why it is as good as the kernel. What catches the others is what
test_parity.py draws from the declarations: dtypes, options and layouts, at sizes that fit small tiles.
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
    every: int = 2  # of its mutants so many-th are tried, for time


NORMS = {"rmsnorm": "rmsnorm", "add_rmsnorm": "rmsnorm"}
LOSSES = {
    "cross_entropy": "cross_entropy", "linear_cross_entropy": "cross_entropy.linear", "inplace": "cross_entropy",
}  # fmt: skip
TARGETS = {
    "rmsnorm": [
        Target("rmsnorm", "rmsnorm_fwd_kernel rmsnorm_fwd_kernel_long rmsnorm_bwd_kernel rmsnorm_bwd_kernel_input "
               "rmsnorm_bwd_kernel_weight _forward _backward _save",
               NORMS),
    ],
    "attention forward": [
        Target("attention.forward", "_softmax_step _attend attention_fwd_kernel launch_forward",
               {"attention": "attention"}),
    ],
    "attention backward": [
        Target("attention.backward", "_gather_dq attention_bwd_kernel_dq _gather_dk_dv attention_bwd_kernel_dk_dv "
               "uncapped launch_backward", {"attention": "attention"}, every=4),
    ],
    "attention": [
        Target("attention.shared", "document_bounds rows descriptor place keys_seen queries_seeing segments head_of "
               "load_rows scores tanh", {"attention": "attention"}),
        Target("attention.dropout", "kept", {"attention": "attention"}),
        Target("attention", "_forward _backward _save", {"attention": "attention"}),
    ],
    "cross_entropy": [
        Target("cross_entropy", "cross_entropy_bwd_kernel cross_entropy_scale_kernel _count_rows _reduced _row_scale "
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
    "rmsnorm": (dict(M=7, N=150), dict(M=33, N=30), dict(M=1, N=1), dict(M=0, N=16)),
    "attention": (
        dict(B=1, T=37, S=37, H=2, G=2, D=16, projected=True), dict(B=2, T=3, S=70, H=2, G=1, D=16),
        dict(B=1, T=40, S=64, H=2, G=1, D=24), dict(B=1, T=70, S=33, H=2, G=2, D=16),
        dict(B=2, T=0, S=5, H=2, G=1, D=16),
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


# Three things that must meet: queries before the first key, that see keys after them, with and without a window.
EXTRA: dict[str, list[dict[str, Any]]] = {
    "attention": [
        dict(B=1, T=70, S=33, H=2, G=2, D=16, causal=False, window=window, dtype=torch.float32) for window in (None, 5)
    ],
}  # fmt: skip


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
    for i, values in enumerate([*combined(op, SIZES[name], dtype=DTYPES), *EXTRA.get(name, [])]):
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


# Mutants that parity cannot tell from the kernels, and why.
ALIKE: dict[str, tuple[str, ...]] = {
    "A condition that saves work, or chooses among tiles and kernels of which all are right.": (
        'rmsnorm_fwd_kernel: if [ADD -> True]:',
        'rmsnorm_bwd_kernel: if [HAS_WEIGHT -> True]:',
        '_forward: TILES["forward"][90 if [tile_arch(arch(x)) >= 90 -> True] else 80].choose',
        '_forward: 0 if tile_arch(arch(x)) [>= -> >] 90 else 80].cho',
        '_forward: f tile_arch(arch(x)) >= [90 -> 91] else 80].choose',
        '_backward: if [M == 0 -> False]:',
        '_backward: if [M -> N] == 0:',
        '_backward: tile(TILES["backward"], [N -> M], h.itemsize, ar',
        '_backward: dtype=torch.float32) if [has_weight -> True] else rstd',
        '_backward: if N [<= -> <] tile.block_n:',
        '_softmax_step: if [MASKED -> True]:',
        'attention_fwd_kernel: eys_seen(row + (S - T), [S -> H], window, docume',
        'launch_forward: if out.numel() == 0 or [S -> G] == 0:',
        'launch_forward: block = tile(D, [q -> k].dtype, arch(q),',
        'launch_forward: le(D, q.dtype, arch(q), [T -> H], options.dropou',
        'launch_forward: ), T, options.dropout > [0 -> 1], options.bounde',
        'keys_seen: if [not CAUSAL -> True]:',
        'place: , blocks - 1 - block if [LAST_FIRST -> False] else block',
        'cross_entropy_scale_kernel: if [factor != 1.0 -> True]:',
        'cross_entropy_rows_kernel: if [GRADIENT -> True]:',
        'cross_entropy_rows_kernel: if [SMOOTHING -> True]:',
        'cross_entropy_rows_kernel: if [SMOOTHING -> True]: #3',
        'cross_entropy_rows_kernel: or start in tl.range(0, [N -> V], BLOCK_N, num_s',
        'cross_entropy_rows: if [tile.long and fits(.. scale is not None) -> False]:',
        'cross_entropy_rows: and fits(logits, scale [is not -> is] None):',
        'cross_entropy_rows: iterion.label_smoothing [> -> >=] 0, GRADIENT=sca',
        '_add_product: if [total.dtype == z.dtype -> False]:',
        '_add_product: if total.dtype == [z -> x].dtype:',
        '_add_product: rows = 4096 if [z.device.type == "cpu" -> True] else total.shap',
        '_add_product: = 4096 if z.device.type [== -> !=] "cpu" else tota',
        '_add_product: rows = [4096 -> 4097] if z.device.typ',
        '_pass: = torch.empty((V, C) if [task.needs_dweight -> True] else (0,), dtyp',
        '_pass: ask.needs_dweight else ([0 -> 1],), dtype=sum_dt',
        '_pass: if [scale is not None and task.needs_dweight -> True]:',
        '_pass: if scale is not None [and -> or] task.needs_dwei',
        '_backward: bwd_kernel[(triton.cdiv([M -> N], tile.block_m),',
        'cross_entropy_rows: entropy_rows_kernel[(-(-[M -> N] // tile.block_m',
        'load_rows: elif [D != BLOCK_D -> True]:',
        '_InPlace.backward: rnel[(M, triton.cdiv(N, [4096 -> 4097]))](',
        '_forward: if [M -> True]:',
        '_forward: if [M -> N]:',
        '_forward: TILES["forward"][90 if [tile_arch(arch(x)) >= 90 -> False] else 80].choose',
        '_forward: "][90 if tile_arch(arch([x -> y])) >= 90 else 80',
        '_forward: if [tile.long -> True]:',
        '_gather_dk_dv: GROUP + (i // tiles if [GROUP > 1 -> True] else 0)',
        '_gather_dk_dv: + (i // tiles if GROUP [> -> >=] 1 else 0)',
        'attention_bwd_kernel_dk_dv: if [WINDOWED or DOCUMENTS -> True]:',
        'launch_backward: kernel: tile(kernel, D, [q -> k].dtype, arch(q),',
        'launch_backward: ), T, options.dropout > [0 -> 1]) for kernel in',
        'launch_backward: (dq, dk, dv) = q.shape, [k -> v].shape[1:3], gra',
        '_backward: s, size = tile.programs([M -> N], multiprocessor',
        '_backward: if [N <= tile.block_n -> False]:',
        'launch_backward: l, D, q.dtype, arch(q), [T -> H], options.dropou',
    ),
    "Where programs go first, which is for the cache.": (
        'place: wave = [tl.maximum -> tl.minimum](1, 4194304 // D',
        'place: maximum(1, 4194304 // D [// -> %] length)',
        'place: wave = tl.maximum(1, [4194304 -> 4194305] // D // length)',
        'attention_bwd_kernel_dk_dv: div(S, BLOCK_N), heads, [T -> S] * GROUP, D, Fal',
    ),
    "More is allocated than is used, or an empty tensor that nobody reads.": (
        '_forward: rstd = x.new_empty([M -> N], dtype=torch.fl',
        '_backward: dweight = h.new_empty([0 -> 1]) if weight is N',
        '_backward: empty(0), lse.new_empty([0 -> 1])',
        '_backward: dk, dv = (lse.new_empty([0 -> 1]) if x is None e',
        '_backward: , dk, dv, lse.new_empty([0 -> 1]), lse.new_empty',
        '_kernel_task: pitch = (V + [15 -> 16]) // 16 * 16  #',
        '_kernel_task: itch = (V + 15) // 16 * [16 -> 17]  # rows of logi',
        '_pass: z = padded if [task.pitch == V -> True] else padded.nar',
        '_pass: = padded if task.pitch [== -> !=] V else padded.n',
        '_forward: rstd = [x -> y].new_empty(M, dt',
        '_forward: if [not return_lse -> False]:',
        '_forward: turn out, lse.new_empty([0 -> 1]), lse',
        '_forward: torch.empty_like(y) if [add -> True] else y.new_empt',
        '_forward: if add else y.new_empty([0 -> 1])',
    ),
    "x is taken as rows before, so that its second axis is its last.": (
        '_forward: N, add = x.shape[[-1 -> 1]], residual is n',
        '_backward: d, has_weight = h.shape[[-1 -> 1]], dh is not Non',
    ),
    "What is loaded past the end is stored by nobody, or multiplied by zero, or masked once more.": (
        'rmsnorm_bwd_kernel: ride_m + n, mask, other=[0.0 -> 1.0]).to(tl.float32) #2',
        'rmsnorm_bwd_kernel_input: ide_m + n, n < N, other=[0.0 -> 1.0]).to(tl.float32)',
        'rmsnorm_bwd_kernel_input: ide_m + n, n < N, other=[0.0 -> 1.0]).to(tl.float32) #3',
        'rmsnorm_bwd_kernel_input: ide_m + n, n < N, other=[0.0 -> 1.0]).to(tl.float32) #5',
        'keys_seen: oad(document_ptr + p, p [< -> <=] S, other=0))',
        'cross_entropy_bwd_kernel: + v, kept & (v < N), v [< -> <=] V, softcap, SOF',
        'cross_entropy_rows_kernel: s_ptr + m, m < M, other=[0 -> 1]).to(tl.int64)',
        'cross_entropy_rows_kernel: ts(row + v, kept & (v < [N -> V]), v < V, softca #3',
        'cross_entropy_rows_kernel: r.dtype.element_ty), (m [< -> <=] M) & (v < N)) #2',
        'cross_entropy_rows_kernel: dtype.element_ty), (m < [M -> N]) & (v < N)) #2',
        'cross_entropy_rows_kernel: = load_logits(row + v, [kept & (v < N) -> v < N], v < V, softcap #2',
        'queries_seeing: = u * 0 + (S - T), u * [0 -> 1] + S',
        'attention_bwd_kernel_dq: stics + t, t < T, other=[0.0 -> 1.0])',
        'rmsnorm_bwd_kernel: d_ptr + m, m < M, other=[0.0 -> 1.0])',
        'rmsnorm_bwd_kernel: ride_m + n, mask, other=[0.0 -> 1.0]).to(tl.float32)',
        'rmsnorm_bwd_kernel: ride_m + n, mask, other=[0.0 -> 1.0]).to(tl.float32) #3',
        'rmsnorm_bwd_kernel_input: t_ptr + n, n < N, other=[0.0 -> 1.0]).to(tl.float32)',
        'rmsnorm_bwd_kernel_input: ide_m + n, n < N, other=[0.0 -> 1.0]).to(tl.float32) #2',
        'rmsnorm_bwd_kernel_input: t_ptr + n, n < N, other=[0.0 -> 1.0]).to(tl.float32) #2',
        'rmsnorm_bwd_kernel_input: ide_m + n, n < N, other=[0.0 -> 1.0]).to(tl.float32) #4',
        'rmsnorm_bwd_kernel_weight: ide_m + n, n < N, other=[0.0 -> 1.0]).to(tl.float32)',
        'rmsnorm_bwd_kernel_weight: ide_m + n, n < N, other=[0.0 -> 1.0]).to(tl.float32) #2',
    ),
    "The sum of x and residual in fp32 instead of as h holds it: another rounding, of which the rule allows both.": (
        'rmsnorm_fwd_kernel_long: residual_stride_m + n, [h_ptr -> rstd_ptr], n < N, ADD)',
        'rmsnorm_fwd_kernel_long: residual_stride_m + n, [h_ptr -> rstd_ptr], n < N, ADD) *',
    ),
    "While nothing overflows any origin of the exponents will do; test_attention.py has scores far below zero.": (
        '_softmax_step: m_new = tl.maximum([m -> l], tl.max(s, axis',
        '_softmax_step: m_new == float("-inf"), [0.0 -> 1.0], m_new)  # no k',
        'attention_fwd_kernel: acc, [m -> l], l, q_tile, k,',
        '_include: arger == float("-inf"), [0.0 -> 1.0], larger)  # so',
    ),
    "Weights of what nobody sees are masked once more in the backward.": (
        'attention_fwd_kernel: lse = [tl.where(tl.reshape..2(l), float("inf")) -> (m + tl.log2(l))]',
        'attention_fwd_kernel: tl.where(tl.reshape(end [> -> >=] first, (BLOCK_M',
        '_gather_dk_dv: ds = [tl.where((position ..on < end), ds, 0.0) -> (ds)]',
        '_gather_dk_dv: ds = tl.where([(position >= first) & (position < end) -> position >= first], ds, 0.0)',
    ),
    "Documents are packed along T = S; q, k and v have one dtype, and k and v one shape.": (
        '_backward: ch.empty(x.shape, dtype=[x -> q].dtype, device=x',
        '_backward: , dtype=x.dtype, device=[x -> q].device)',
        '_backward: for x in (q, [k -> v], v))  # fmt: sk',
        'launch_forward: pty((B, T, H, D), dtype=[q -> k].dtype, device=q',
        'queries_seeing: d(document_ptr + u, u < [S -> T], other=0))',
        'queries_seeing: tl.load(document_ptr + [S -> T] + u, u < S, oth',
        'queries_seeing: cument_ptr + S + u, u < [S -> T], other=0))',
    ),
    "Launches of kernels in Gluon, which the interpreter has not: test_attention_hopper.py emulates them.": (
        'launch_forward: if takes_forward([q -> k], k, v, options)',
        'launch_forward: if takes_forward(q, k, [v -> q], options):',
        'launch_forward: launch_forward_hopper([q -> k], k, v, options,',
        'launch_forward: ch_forward_hopper(q, k, [v -> q], options, out,',
        'launch_backward: None and takes_backward([q -> k], k, v, options)',
        'launch_backward: h_backward_hopper(dout, [q -> k], k, v, out, lse',
        'launch_backward: ward_hopper(dout, q, k, [v -> x], out, lse, opti',
    ),
    "The comparison in unsigned numbers, of which neither has the highest bit.": (
        'kept: return [(bits >> 1).to(tl.int32) -> bits >> 1] >= threshold',
    ),
    "Parity gives every result a gradient; tests of attention and of the norms have one result alone.": (
        '_backward: orch.zeros_like(out) if [dout is None -> False] else dout  # on',
        '_backward: torch.zeros_like(h) if [dy is None -> False] else dy  # only',
    ),
    "An error of 1e-6 in a score that is capped at 1.5.": (
        'tanh: square = x [* -> /] x',
        'tanh: 5 + square * (-17 / 315 [+ -> -] square * (62 /',
        'tanh: / 15 + square * (-17 / [315 -> 316] + square * (62',
        'tanh: / 315 + square * (62 / [2835 -> 2836])))))',
        'tanh: return [tl.where(square < 0..0817779268) + 1.0)) -> (1.0 - 2.0 / (tl.ex..0817779268) + 1.0))]',
        'tanh: eturn tl.where(square < [0.09 -> 0.0], series, 1.0 -',
    ),
    "One draw in 2^31.": (
        'kept: bits >> 1).to(tl.int32) [>= -> >] threshold',
    ),
    "A target outside the vocabulary, which is refused on a CPU; test_cross_entropy.py launches past the check.": (
        'cross_entropy_rows_kernel: known = [(target >= 0) & (target < V) -> target < V]',
        'cross_entropy_rows_kernel: chosen = [tl.where(known, chosen, float("nan")) -> (chosen)]',
        'cross_entropy_rows_kernel: log_sum = [tl.where(known, log_sum, float("nan")) -> (log_sum)]',
        '_include: shift = [tl.where(larger == ..inf"), 0.0, larger) -> (larger)]  # so far only',
    ),
    "For the threads of a GPU, which the interpreter has not.": (
        'cross_entropy_rows_kernel: [tl.debug_barrier() -> pass]  # every warp h',
    ),
    "Three options at once in a long row: test_cross_entropy.py has all of them together.": (
        'cross_entropy_rows_kernel: dz = tl.where(kept & ([v -> s] < V), dz, 0.0) #2',
    ),
    "Only for GPUs, where the products are summed wide.": (
        '_add_product: elif [widens and z.device.type == "cuda" -> False]:',
        '_add_product: [torch.addmm(total, .. else 1, out=total) -> pass] #2',
        '_add_product: torch.addmm(total, [z -> x].t(), x, out_dty',
        '_add_product: =total.dtype, beta=0 if [first -> True] else 1, out=tot',
        '_add_product: dtype=total.dtype, beta=[0 -> 1] if first else 1',
    ),
    "A stricter or looser check of what always agrees.": (
        '_pass: oss.split(rows), strict=[True -> False])',
        '_add_product: it(rows, dim=1), strict=[True -> False]):',
        '_kernel_backward: ate = None if x is None [or -> and] weight is None',
        'cross_entropy_rows: s, criterion.softcap or [1.0 -> 0.0],',
    ),
    "Sums over parts in another dtype, rounded at the end; autograd casts a gradient to its tensor's dtype.": (
        '_pass: sum_dtype = x.dtype if [M <= rows and x.dtype == torch.bfloat16 -> False] else wide',
        '_pass: um_dtype = x.dtype if M [<= -> <] rows and x.dtyp',
        '_pass: f M <= rows and x.dtype [== -> !=] torch.bfloat16',
        '_backward: return dx, [dweight.to(dx.dtype) -> dweight]',
    ),
    "More tiles are masked, or visited, than must be.": (
        'attention_bwd_kernel_dq: eys_seen(row + (S - T), [S -> H], window, docume',
        'attention_bwd_kernel_dk_dv: end = queries_seeing(u, [T -> S], S, window, doc',
        'attention_bwd_kernel_dk_dv: mum(first_0 - back, 0), [tl.maximum -> tl.minimum](end_0 - back, 0',
        '_gather_dk_dv: if [MASKED -> True]: #2',
        'attention_bwd_kernel_dk_dv: l.maximum(end_0 - back, [0 -> 1]),',
        'attention_bwd_kernel_dk_dv: l.maximum(end_1 - back, [0 -> 1]), BLOCK_M,',
        'attention_bwd_kernel_dk_dv: l.maximum(full, tl.cdiv([T -> S], BLOCK_M) * BLO',
    ),
    "Where heads go in waves, of which no case has enough: test_attention.py runs the programs of several.": (
        'place: rest = program [- -> +] first * blocks',
        'attention_bwd_kernel_dk_dv: .program_id(0), tl.cdiv([S -> H], BLOCK_N), head',
    ),
    "By pointers the head is found before; only descriptors need its number here, which test_attention.py tries.": (
        'attention_bwd_kernel_dq: e, lse, delta, k, v, b, [g -> t], k_stride_s, v_ #2',
        'attention_bwd_kernel_dq: tile, lse, delta, k, v, [b -> h], g, k_stride_s, #3',
        'attention_fwd_kernel: m, l, q_tile, k, v, b, [g -> t], k_stride_s, v_ #2',
        'attention_fwd_kernel: cc, m, l, q_tile, k, v, [b -> h], g, k_stride_s, #3',
    ),
}  # fmt: skip


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


@pytest.mark.parametrize("which", TARGETS)
def test_every_mutant_is_caught_or_argued(which, chaos, tmp_path):
    """Those that do not run to an end count as caught: any test would fail."""
    argued = {name for names in ALIKE.values() for name in names}
    for target in TARGETS[which]:
        tried = dict(outcomes(target, slice(0, chaos(2, 1000) * target.every, target.every), tmp_path))
        survived = {name for name, end in tried.items() if end == "survived"}
        print(f"{target.page}: {len(tried)} tried, {len(tried) - len(survived)} caught, {len(survived)} as good")
        assert not survived - argued


@pytest.mark.parametrize("which", TARGETS)
def test_the_pages_as_they_are_pass_what_catches_mutants(which, monkeypatch):
    for target in TARGETS[which]:
        pages = {name: sys.modules[f"kernels.{at}"] for name, at in target.ops.items()}
        for page in pages.values():
            shrink(page, monkeypatch)
        check(pages, [case for name in target.ops for case in cases_of(name)])


def test_what_is_argued_is_still_made():
    """Where a line has changed, its argument goes."""
    made = {
        mutant.name
        for targets in TARGETS.values()
        for target in targets
        for mutant in mutants_of(sys.modules[f"kernels.{target.page}"], target.functions.split())
    }
    assert {name for names in ALIKE.values() for name in names} <= made
