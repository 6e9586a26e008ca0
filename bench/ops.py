"""Every op at the sizes of real models, by every implementation and peer, in every direction.

    python -m bench ops                                # all of it
    python -m bench ops --variants=gluon               # and a kernel that runs only when asked for, beside the others
    python -m bench ops --only=rotary --quick --options    # one size of an op, and with its options
    pytest bench/ --benchmark-only                     # the same cases under pytest-benchmark

Variants of one case run side by side in one process. `forward` runs without gradients, `backward` alone, `both` is a
training step's share of the op; an op that does in its forward what others do in their backward is measured in `both`
alone. Sizes come in the order of what they add to those before them, so that a campaign that is stopped has seen the
range of each op. Each row holds the error against fp64 of the very code that was timed, its fraction of the datasheet's
roofline and of what a copy and a GEMM reached in this run, and what the host spent. On a CPU the sizes are halved until
a reference can be timed and checked in well under a second; the rows state the sizes that ran.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from gptfast.cli import check_ranges
from gptfast.errors import UserError, nearest
from gptfast.log import Log, Row, facts
from gptfast.runtime import compute_dtype, made_current
from kernels import Cost, Op
from kernels.proof.options import varied

from . import peers, results
from .failures import FAILURES, in_one_line
from .peaks import DTYPES, Ceilings, ceilings, chosen_dtypes, measured_ceilings
from .peers import OURS
from .timing import Settings, Stopwatch, Tensors, Timing, Truth, Verdict, Work, flatten, stopwatch

DIRECTIONS = ("forward", "backward", "both")
MOVES_WORK = frozenset({"linear_cross_entropy"})  # their forward finds gradients, which their backward only scales
CPU_FLOPS, CPU_BYTES = 5e8, 16e6  # of a forward pass on a CPU
INEXACT = 0.25  # up to this error a peer is inexact (torch sums bf16 layernorm gradients in bf16 on a CPU), else wrong
SHRINK = ((("B",), 1), (("M",), 256), (("H", "G"), 1), (("T", "S"), 128), (("V",), 2048), (("N",), 1024))


# ---- one case --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """An op at some sizes, in one dtype and direction, on one device."""

    op: Op
    dims: Mapping[str, Any]
    dtype: str
    direction: str
    device: torch.device

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}={size}" for letter, size in self.dims.items())
        return f"{self.op.name} {self.direction} {self.dtype} {sizes}"

    @cached_property
    def cost(self) -> Cost:
        forward, backward = self.op.cost(**self.dims, itemsize=DTYPES[self.dtype].itemsize)
        if self.direction == "both":
            return Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
        return forward if self.direction == "forward" else backward

    def inputs(self, seed: int) -> tuple[tuple, dict[str, Any]]:
        """The op's arguments with the random values of this seed, and its keyword arguments: nothing random."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self.op.inputs(**self.dims, dtype=DTYPES[self.dtype], device=self.device)

    def draw(self, seed: int) -> tuple:
        """The op's arguments with the random values of this seed."""
        return self.inputs(seed)[0]

    @cached_property
    def keywords(self) -> dict[str, Any]:
        return self.inputs(0)[1]

    def with_options(self, function: Callable) -> Callable:
        """The function with the op's keyword arguments, itself where there are none: a partial costs time."""
        return functools.partial(function, **self.keywords) if self.keywords else function

    def cotangents(self, outputs: Tensors, seed: int) -> Tensors:
        """Gradients of the outputs; numbers that every dtype holds exactly, so that all variants get the same."""
        other = seed ^ 0x55555555  # by the same seed they would be the very numbers of the inputs
        generator = torch.Generator(self.device).manual_seed(other)
        return tuple(
            torch.randn(out.shape, dtype=torch.bfloat16, device=self.device, generator=generator).to(out.dtype)
            for out in outputs
        )

    def truth(self, wanted: Sequence[int]) -> Truth:
        """Answers of the reference, in fp64 and in the dtype of the case."""

        def answer(seed: int, double: bool) -> Tensors:
            arguments = self.draw(0 if self.direction == "backward" else seed)
            if double:
                arguments = tuple(a.double() if _is_float(a) else a for a in arguments)
            return flatten(self.bind(peers.in_torch(self.op), arguments, wanted, cotangent_seed=seed)())

        return Truth(lambda seed: answer(seed, True), lambda seed: answer(seed, False))

    def bind(
        self, function: Callable, arguments: tuple, wanted: Sequence[int], cotangent_seed: int = 0
    ) -> Callable[[], Any]:
        """What is timed: the function in this direction, on these arguments, with gradients of those wanted."""
        return self.work(function, arguments, wanted, cotangent_seed).run

    def work(self, function: Callable, arguments: tuple, wanted: Sequence[int], cotangent_seed: int = 0) -> Work:
        function = self.with_options(function)
        tensors = tuple(a for a in arguments if isinstance(a, Tensor))

        def redraw(seed: int) -> None:
            fresh = (a for a in self.draw(seed) if isinstance(a, Tensor))
            for old, new in zip(tensors, fresh, strict=True):
                old.data.copy_(new)  # .data: autograd's count of changes stays, as if nothing had happened

        if self.direction == "forward":

            def forward() -> Any:
                with torch.no_grad():
                    return function(*arguments)

            places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
            return Work(forward, tensors, redraw, frozenset(places.index(i) for i in self.op.writes & {*places}))

        leaves = tuple(
            a.detach().requires_grad_() if i in wanted and isinstance(a, Tensor) else a for i, a in enumerate(arguments)
        )
        inputs = [leaves[i] for i in wanted]
        outputs = flatten(function(*leaves))
        gradients = self.cotangents(outputs, cotangent_seed)

        def redraw_gradients(seed: int) -> None:
            for old, new in zip(gradients, self.cotangents(outputs, seed), strict=True):
                old.data.copy_(new)

        if self.direction == "backward":

            def backward() -> Any:
                return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

            return Work(backward, (*tensors, *gradients), redraw_gradients)
        outputs = tuple(out.detach() for out in outputs)  # lets go of the graph

        def both() -> Any:
            found = flatten(function(*leaves))
            return tuple(out.detach() for out in found), torch.autograd.grad(found, inputs, gradients)

        def redraw_both(seed: int) -> None:
            redraw(seed)
            redraw_gradients(seed)

        return Work(both, (*tensors, *gradients), redraw_both)

    def differentiable(self, function: Callable) -> list[int]:
        """Positions of the arguments that training learns and the function gives a gradient for."""
        arguments = self.draw(0)
        places = [i for i, a in enumerate(arguments) if _is_float(a) and i not in self.op.constants]
        leaves = tuple(a.requires_grad_() if i in places else a for i, a in enumerate(arguments))
        outputs = flatten(self.with_options(function)(*leaves))
        found = torch.autograd.grad(
            outputs, [leaves[i] for i in places], self.cotangents(outputs, 0), allow_unused=True
        )
        return [i for i, gradient in zip(places, found, strict=True) if gradient is not None]


def _is_float(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def variants(op: Op, device: torch.device, compiled: bool, asked: Sequence[str] = ()) -> dict[str, Callable]:
    """What can be timed here, by name: our kernels, the reference, torch.compile of it, and the op's peers.

    Of the op's own variants those that are `asked` for: no machine need have run them yet, and one that never ends
    would take the rows of all other cases with it.
    """
    found: dict[str, Callable] = {}
    if device.type == "cuda" and op.triton is not None:
        found.update(triton=op.triton, **{name: op.variants[name] for name in asked})
    found["reference"] = peers.in_torch(op)
    if device.type == "cpu" and op.cpu not in (None, found["reference"]):
        found["cpu"] = op.cpu
    if compiled:
        found["compile"] = torch.compile(peers.in_torch(op), dynamic=False)
    return {**found, **peers.of(op.name, device, compiled)}


def is_ours(name: str, op: Op) -> bool:
    """Whether a name of `variants` is that of our own code, which must be exact, or a peer's."""
    return name in OURS or name in op.variants


def halved(dims: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dims with one axis halved, those first that say least about speed; None when they are small already."""
    for letters, least in SHRINK:
        present = [letter for letter in letters if letter in dims]
        if present and all(dims[letter] % 2 == 0 and dims[letter] // 2 >= least for letter in present):
            return {**dims, **{letter: dims[letter] // 2 for letter in present}}
    return None


def fitted(op: Op, dims: Mapping[str, Any], itemsize: int) -> dict[str, Any]:
    """The dims, halved until a CPU can time the op."""
    found = dict(dims)
    while True:
        forward, _ = op.cost(**found, itemsize=itemsize)
        smaller = halved(found) if forward.flops > CPU_FLOPS or forward.bytes > CPU_BYTES else None
        if smaller is None:
            return found
        found = smaller


def directions_of(op: Op, asked: Sequence[str]) -> list[str]:
    """The directions among those asked for in which the op can be compared."""
    if not op.differentiable:
        return ["forward"] if {"forward", "both"} & set(asked) else []
    return [direction for direction in asked if direction == "both" or op.name not in MOVES_WORK]


def by_worth(sizes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first size, then always the one that is farthest from those before it: the range, then what fills it."""
    left = list(sizes)
    ordered = [left.pop(0)]
    while left:
        ordered.append(left.pop(max(range(len(left)), key=lambda i: min(apart(left[i], o) for o in ordered))))
    return ordered


def apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """How unlike two sizes are: doublings, axis by axis, and as much as two for what is another kind of thing."""
    total = 0.0
    for letter in a.keys() | b.keys():
        mine, other = a.get(letter), b.get(letter)
        numbers = all(isinstance(size, int) and size > 0 for size in (mine, other))
        total += abs(math.log2(mine / other)) if numbers else 2.0 * (mine != other)  # type: ignore[operator]
    return total


def cases(
    names: Sequence[str], dtypes: Sequence[str], directions: Sequence[str], device: torch.device, quick: bool,
    options: bool = False,
) -> list[Case]:  # fmt: skip
    """All cases, ordered so that a campaign that is stopped has seen every op before it sees more sizes of one.

    `backward` of further sizes comes last: it is `both` less what is known of `forward`.
    """
    found: dict[str, Case] = {}
    last: dict[str, Case] = {}
    sizes = {name: by_worth(kernels.OPS[name].bench)[: 1 if quick else None] for name in names}
    for name in names if options else ():
        sizes[name] += varied(kernels.OPS[name])
    for rank in range(max(map(len, sizes.values()))):
        for name in names:
            op = kernels.OPS[name]
            for dtype in dtypes if rank < len(sizes[name]) else ():
                dims = dict(sizes[name][rank])
                if device.type == "cpu":
                    dims = fitted(op, dims, DTYPES[dtype].itemsize)
                for direction in directions_of(op, directions):
                    case = Case(op, dims, dtype, direction, device)
                    (last if rank and direction == "backward" else found).setdefault(str(case), case)
    return list({**found, **last}.values())  # halving may make two sizes one


# ---- measuring -------------------------------------------------------------------------------------------------------
def build(
    case: Case, functions: Mapping[str, Callable], sets: int, log: Log
) -> tuple[dict[str, list[Work]], list[int]]:
    """Works of every variant over shared sets of inputs, each run once; a peer that cannot do the case is left out."""
    usable: dict[str, Callable] = {}
    wanted = [] if case.direction == "forward" else case.differentiable(peers.in_torch(case.op))
    for name, function in functions.items():
        try:
            if case.direction == "forward":
                case.bind(function, case.draw(0), [])()
            else:
                gives = case.differentiable(function)
                wanted = [place for place in wanted if place in gives]
        except FAILURES as error:
            if name in OURS and name not in case.op.variants:
                raise
            log.row("note", name=f"{case}: {name}", text=f"cannot do it: {type(error).__name__}: {error}")
            log.say(f"ops    {case}: {name} left out: {in_one_line(error)}")
        else:
            usable[name] = function
    shared = [case.draw(seed) for seed in range(sets)]
    works = {name: [case.work(f, arguments, wanted) for arguments in shared] for name, f in usable.items()}
    return works, wanted


def verify(
    watch: Stopwatch,
    case: Case,
    works: Mapping[str, Sequence[Work]],
    functions: Mapping[str, Callable],
    wanted: list[int],
) -> tuple[dict[str, Verdict], Mapping[str, Any]]:
    """Verdicts on what was timed, and the dims they were reached at: where fp64 truth does not fit, at smaller ones."""
    seeds = [secrets.randbits(31) for _ in range(2)]
    peers = [name for name in works if not is_ours(name, case.op)]
    try:
        return watch.verify(works, case.truth(wanted), seeds, peers), case.dims
    except torch.OutOfMemoryError:
        pass
    timed = watch.verify(works, case.truth(wanted), (), peers)
    smaller = halved(case.dims)
    while smaller is not None:
        small = Case(case.op, smaller, case.dtype, case.direction, case.device)
        try:
            small_works = {name: [small.work(functions[name], small.draw(0), wanted)] for name in works}
            found = watch.verify(small_works, small.truth(wanted), seeds, peers)
        except torch.OutOfMemoryError:
            smaller = halved(smaller)
            continue
        return {name: timed[name] if not timed[name].valid else found[name] for name in works}, smaller
    reason = "no size at which the fp64 truth fits into memory"
    return {name: Verdict(None, None, timed[name].reason or reason) for name in works}, case.dims


def run_case(
    case: Case, functions: Mapping[str, Callable], settings: Settings, roof: Ceilings, log: Log, common: Row,
    threads: int | None = None, measured: Ceilings | None = None,
) -> list[Row]:  # fmt: skip
    """Time and check all variants of one case, side by side, and write a row for each."""
    with stopwatch(case.device, settings, threads) as watch, compiling("compile" in functions):
        input_bytes = sum(a.nbytes for a in case.draw(0) if isinstance(a, Tensor))
        works, wanted = build(case, functions, watch.sets_needed(input_bytes), log)
        timings = watch.measure(works)
        verdicts, checked_dims = verify(watch, case, works, functions, wanted)
    rows = []
    for name, timing in timings.items():
        fields = figures(case, name, timing, verdicts[name], roof, measured)
        if checked_dims != case.dims:
            fields["error_dims"] = dict(checked_dims)
        rows.append(log.row("op", name=case.op.name, impl=name, **fields, **common))
        log.say(line(rows[-1]))
    return rows


@contextlib.contextmanager
def compiling(allowed: bool) -> Iterator[None]:
    """Make compiled code fit for timing, or have peers that compile themselves (a minute each on a CPU) refuse."""
    import torch._functorch.config as functorch

    # A compiled backward gives its buffers away unless told that it will run again.
    with (
        functorch.patch(donated_buffer=False),
        torch.compiler.set_stance("default" if allowed else "fail_on_recompile"),
    ):
        yield


def figures(
    case: Case, name: str, timing: Timing, verdict: Verdict, roof: Ceilings, measured: Ceilings | None = None
) -> Row:
    """The fields of a row: rates from the op's declared cost, the fraction of the roofline, error, validity.

    A peer that is less exact than ours must be is a fact about the peer: it is stated in `inexact`, the time stands.
    """
    cost, ms = case.cost, timing.ms_p50
    fraction, beyond = roof.judge(ms, cost.flops, cost.bytes, case.dtype, timing.cold)
    reason, inexact = verdict.reason or beyond, None
    if not is_ours(name, case.op) and beyond is None and verdict.error is not None and verdict.error <= INEXACT:
        reason, inexact = None, verdict.reason and f"error {verdict.error:.2g}, ours may have {verdict.allowed:.2g}"
    return {
        "direction": case.direction, "dims": dict(case.dims), "dtype": case.dtype, **timing.fields(),
        "flops": cost.flops, "bytes": cost.bytes,
        "tflops": cost.flops / ms / 1e9 if ms > 0 else None, "gbs": cost.bytes / ms / 1e6 if ms > 0 else None,
        "roofline": fraction, "roofline_source": roof.source,
        "of_measured": measured and measured.fraction(ms, cost.flops, cost.bytes, case.dtype, timing.cold),
        "measured_source": measured and measured.source, "peer_version": peers.version(case.op.name, name),
        "error": verdict.error, "error_allowed": verdict.allowed, "inexact": inexact,
        "valid": reason is None, "invalid_reason": reason,
    }  # fmt: skip


def line(row: Row) -> str:
    """A row for the console."""
    sizes = " ".join(f"{letter}={size}" for letter, size in row["dims"].items())
    share = "" if row["roofline"] is None else f"{row['roofline']:6.1%} of roofline"
    share += "" if row["of_measured"] in (None, row["roofline"]) else f" {row['of_measured']:6.1%} of measured"
    share += "" if row["host_ms_p50"] is None else f" host {1e3 * row['host_ms_p50']:.0f} us"
    error = "" if row["error"] is None else f"error {row['error']:.1e}"
    rates = f"{row['ms_p50']:10.4f} ms {row['gbs']:9.1f} GB/s {row['tflops']:8.3f} TFLOP/s"
    verdict = "" if row["valid"] else f"  INVALID: {row['invalid_reason']}"
    verdict += "" if row["inexact"] is None else f"  inexact: {row['inexact']}"
    head = f"{row['name']:20s} {row['direction']:8s} {row['dtype']:8s} {row['impl']:10s}"
    return f"ops    {head} {rates} {share} {error}  {sizes}{verdict}"


def smoke(op: Op, name: str, dtypes: Sequence[str], device: torch.device, log: Log) -> bool | None:
    """Whether a kernel of ours is right; one that is wrong, or that fails, is not timed.

    `name` is 'triton', checked at the op's middling parity dims, or that of a variant, which need not do every case: it
    is checked at the bench sizes made small. None where it refuses them all (ValueError).
    """
    right, taken, refusal = True, 0, ""
    function = op.variants.get(name, op.triton)
    assert function is not None
    for case in smoke_cases(op, name, dtypes, device):
        try:
            reason = wrong(case, name, function)
        except FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
            if name in op.variants and isinstance(error, ValueError):
                refusal = str(error)
                continue
        taken += 1
        if reason is not None:
            right = False
            log.row("note", name=f"{case}: {name}", text=f"wrong and not timed: {reason}")
            log.say(f"ops    {case}: {name} is WRONG, not timed: {reason[:300]}")
    if taken:
        return right
    log.row("note", name=f"{op.name}: {name}", text=f"cannot run here: {refusal}")
    log.say(f"ops    {op.name}: {name} left out: {refusal[:300]}")
    return None


def smoke_cases(op: Op, name: str, dtypes: Sequence[str], device: torch.device) -> list[Case]:
    sizes = [op.parity[-1]] if name == "triton" else [fitted(op, dims, itemsize=2) for dims in op.bench]
    direction = "both" if op.differentiable else "forward"
    found = {str(case): case for case in (Case(op, dims, d, direction, device) for d in dtypes for dims in sizes)}
    return list(found.values())


def wrong(case: Case, name: str, function: Callable) -> str | None:
    """Run a kernel once and say what is wrong with its answers, None if nothing is."""
    with stopwatch(case.device) as watch:
        wanted = case.differentiable(function) if case.direction == "both" else []
        works = {name: [case.work(function, case.draw(0), wanted)]}
        return watch.verify(works, case.truth(wanted), [secrets.randbits(31)])[name].reason


def proven(
    names: Sequence[str], asked: Sequence[str], dtypes: Sequence[str], device: torch.device, log: Log
) -> tuple[dict[str, list[str]], bool]:
    """The ops whose kernels are right here, each with its variants asked for that are so too; and whether all were."""
    fine: dict[str, list[str]] = {}
    right = True
    for name in names:
        op = kernels.OPS[name]
        if op.triton is not None and not smoke(op, "triton", dtypes, device, log):
            right = False
            continue
        verdicts = {variant: smoke(op, variant, dtypes, device, log) for variant in asked if variant in op.variants}
        fine[name] = [variant for variant, verdict in verdicts.items() if verdict]
        right = right and False not in verdicts.values()
    return fine, right


# ---- the command -----------------------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> int:
    arguments = check_ranges(_parser().parse_args(argv))
    started, device = time.monotonic(), made_current(arguments.device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"--device={arguments.device}: this machine has no CUDA device; leave --device out")
    known = _known_variants()
    asked = _chosen("--variants", arguments.variants, known) if arguments.variants else []
    if asked and not on_gpu:
        raise UserError(f"--variants={arguments.variants}: kernels run on a CUDA device; leave --variants out")
    having = [op.name for op in kernels.OPS.values() if not asked or set(asked) & op.variants.keys()]
    names = having if arguments.only is None else _chosen("--only", arguments.only, kernels.OPS)
    directions = _chosen("--direction", arguments.direction, DIRECTIONS)
    dtypes = chosen_dtypes(arguments.dtype) if arguments.dtype else native_dtypes(device)
    if arguments.warm:
        todo = cases(names, dtypes, directions, device, arguments.quick, arguments.options)
        return warm(todo, asked, _share(arguments.warm), arguments.compile, started + arguments.budget_s)
    common = facts(device)
    with results.campaign(arguments.out or results.folder(common["hardware"]), "ops.jsonl") as log:
        beside, right = {name: list[str]() for name in names}, True
        if on_gpu:
            beside, right = proven(names, asked, dtypes, device, log)
            if asked and arguments.only is None:
                beside = {name: variants for name, variants in beside.items() if variants}
            if peers.absent():
                log.say(f"ops    peers that are not installed: {', '.join(peers.absent())}")
        for name in [name for name in beside if not directions_of(kernels.OPS[name], directions)]:
            log.say(f"ops    {name}: left out, comparable in --direction=both alone")
            del beside[name]
        quick, options = arguments.quick, arguments.options
        todo = cases(list(beside), dtypes, directions, device, quick, options) if beside else []
        all_valid = campaign(arguments, todo, beside, dtypes, device, log, common, started)
    return 0 if right and all_valid else 1


def _known_variants() -> list[str]:
    return sorted({variant for op in kernels.OPS.values() for variant in op.variants})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench ops", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    on_gpu, add = torch.cuda.is_available(), parser.add_argument
    add("--only", help="ops, comma-separated (default: all; with --variants those that have one)")
    variants_help = f"time these kernels of ours too, where they prove right: of {', '.join(_known_variants())}"
    add("--variants", default="", help=variants_help)
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--dtype", help="default: bfloat16 on a GPU; on a CPU float32, and bfloat16 if its units have it")
    add("--direction", default=",".join(DIRECTIONS))
    add("--compile", action=argparse.BooleanOptionalAction, default=on_gpu, help="torch.compile as a peer")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--samples", type=int, help="at least so many (default: 40 on a GPU, 10 on a CPU)")
    add("--quick", action="store_true", help="one size of each op, fewer samples")
    add("--options", action="store_true", help="the first size with each op's options too, in pairs")
    add("--budget_s", type=float, default=float("inf"), help="start no case after this, and say which")
    add("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    add("--warm", metavar="I/N", help="only compile and run once the I-th of N shares; no rows")
    return parser


def campaign(
    arguments: argparse.Namespace, todo: Sequence[Case], beside: Mapping[str, Sequence[str]], dtypes: Sequence[str],
    device: torch.device, log: Log, common: Row, started: float,
) -> bool:  # fmt: skip
    """Time case after case while the budget lasts, with the variants `beside`. Returns whether all rows are valid."""
    on_gpu, all_valid = device.type == "cuda", True
    out = arguments.out or results.folder(common["hardware"])
    threads = None if on_gpu else arguments.threads
    roof = ceilings(device, dtypes, out, threads)
    measured = measured_ceilings(roof, device, dtypes, out)
    samples = arguments.samples or (10 if not on_gpu or arguments.quick else 40)
    settings = Settings(samples=samples, warmup_s=0.1, budget_s=0.2 if arguments.quick or not on_gpu else 0.6)
    for number, case in enumerate(todo, 1):
        if time.monotonic() - started > arguments.budget_s:
            say_left_out(todo[number - 1 :], arguments.budget_s, log)
            break
        log.say(f"ops    [{number}/{len(todo)}] {case}")
        torch.compiler.reset()
        functions = variants(case.op, device, arguments.compile, beside[case.op.name])
        try:
            rows = run_case(case, functions, settings, roof, log, common, threads, measured)
            all_valid &= all(row["valid"] for row in rows)
        except FAILURES as error:
            all_valid = False
            log.row("note", name=str(case), text=f"failed: {type(error).__name__}: {error}")
            log.say(f"ops    {case}: FAILED: {in_one_line(error)}")
    return all_valid


def warm(todo: Sequence[Case], asked: Sequence[str], share: tuple[int, int], compiled: bool, ends: float) -> int:
    """Run each case of a share once, so that what it compiles is cached on disk. What fails shows when timed."""
    number, of = share
    log = Log(None, console=False)
    for case in todo[number::of]:
        if time.monotonic() > ends:
            break
        torch.compiler.reset()
        functions = variants(case.op, case.device, compiled, [name for name in asked if name in case.op.variants])
        with contextlib.suppress(*FAILURES), stopwatch(case.device), compiling(compiled):
            build(case, functions, 1, log)
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def _share(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise UserError(f"--warm={text}: expected I/N with 0 <= I < N, as 0/6")
    return int(number), int(of)


def native_dtypes(device: torch.device) -> list[str]:
    """The dtypes worth timing: those that the device's matrix units have. An emulated one says nothing of any code."""
    if device.type == "cuda":
        return ["bfloat16"]
    fastest, _ = compute_dtype(str(device))
    return [name for name, dtype in DTYPES.items() if dtype in (torch.float32, fastest)]


def say_left_out(left: Sequence[Case], budget_s: float, log: Log) -> None:
    """Say which cases there was no time for."""
    text = f"{len(left)} cases not begun within {budget_s:.0f} s: {'; '.join(map(str, left))}"
    log.row("note", text=text)
    log.say(f"ops    {text}")


def _chosen(flag: str, text: str, known: Sequence[str] | Mapping[str, Any]) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise UserError(f"{flag}={name} is unknown{nearest(name, known)}")
    if not names:
        raise UserError(f"{flag} names nothing; known: {', '.join(known)}")
    return names
