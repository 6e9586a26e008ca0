"""What a kernel is judged by: the error rule, and the ways in which a tensor can lie awkwardly in memory."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import Op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Relative Frobenius norm of the difference to an fp64 truth. A truth of rounding noise counts as zero."""
    noise = 1e-12 * max(truth.numel(), 1) ** 0.5
    truth = truth.double()  # which it is, unless results are integers
    return ((found.double() - truth).norm() / truth.norm().clamp_min(noise)).item()


def leaves(arguments: Sequence[Any]) -> list[Tensor]:
    """The arguments that take a gradient."""
    return [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]


def is_number(argument: Any) -> bool:
    """Whether an argument is a tensor of numbers that arithmetic is done in; of 8 bits they are a cache's."""
    return isinstance(argument, Tensor) and argument.dtype in (*DTYPES, torch.float64)


def differentiated(arguments: Sequence[Any]) -> tuple:
    """The same arguments, floating tensors requiring gradients; layouts are kept."""
    return tuple(a.detach().requires_grad_() if is_number(a) else a for a in arguments)


def run(
    function: Callable[..., Any], arguments: Sequence[Any], cotangents: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Outputs, then gradients of every floating argument. Cotangents are drawn from a fixed seed unless given."""
    arguments = differentiated(arguments)
    outputs = function(*arguments)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if cotangents is None:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    wanted = leaves(arguments)
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found, seeds = ([pair[i] for pair in pairs] for i in range(2))
    gradients = torch.autograd.grad(found, wanted, seeds, allow_unused=True) if pairs else [None] * len(wanted)
    return [o.detach() for o in outputs] + [
        torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wanted, strict=True)
    ]


def doubled(arguments: Sequence[Any]) -> tuple:
    """The same arguments in fp64."""
    return tuple(a.double() if is_number(a) else a for a in arguments)


class Parity:
    """What an op's results at given arguments are compared with: found once, for as many kernels as are to be judged.

    The error rule: err(kernel) <= 2 * err(reference at the same dtype) + eps(dtype), for every output and every
    gradient. The kernel and the reference are called with the arguments and the keywords; gradients are those of
    floating arguments. What luck decides is judged by arguments a little different: see `usual` and `typical`.
    """

    def __init__(
        self,
        op: Op,
        arguments: Sequence[Any],
        what: str = "",
        *,
        cotangents: Sequence[Tensor] | None = None,
        **keywords: Any,
    ) -> None:
        self.op, self.arguments, self.keywords, self.what = op, arguments, keywords, what
        self.reference, self.cotangents = functools.partial(op.reference, **keywords), cotangents
        self.same = run(self.reference, arguments, cotangents)
        self.truth = run(self.reference, doubled(arguments), cotangents)

    @functools.cached_property
    def neighbours(self) -> list["Neighbour"]:
        return neighbours(self.reference, self.arguments)

    @functools.cached_property
    def usual(self) -> list[tuple[float, float]]:
        """(mean norm, largest error of the same-dtype reference) of each result, over the neighbours.

        In a result of few elements the reference's error is a matter of luck, and a gradient may cancel to almost
        nothing; what the rule compares with is the error that the reference makes on such arguments.
        """
        norms = zip(*([t.double().norm().item() for t in n.truth] for n in self.neighbours), strict=True)
        errors = zip(*(n.errors for n in self.neighbours), strict=True)
        return [(sum(n) / len(n), max(e)) for n, e in zip(norms, errors, strict=True)]

    def typical(self, function: Callable[..., Any], i: int) -> tuple[float, float]:
        """Returns a function's error in result i, and what it may be: root mean squares over the neighbours.

        Where one element or one row is nearly all of a result's norm, one rounding decides both sides of the rule.
        """
        found, allowed = [], []
        for near in self.neighbours:
            result = run(function, near.arguments, near.cotangents)[i]
            found.append(relative_error(result, near.truth[i]) ** 2)
            allowed.append((2 * near.errors[i] + torch.finfo(result.dtype).eps) ** 2)
        return (sum(found) / len(found)) ** 0.5, (sum(allowed) / len(allowed)) ** 0.5

    def check(self, function: Callable[..., Any]) -> None:
        """Raise AssertionError if the function's results break the rule."""
        function = functools.partial(function, **self.keywords)
        found = run(function, self.arguments, self.cotangents)
        name = f"{self.op.name} {self.what}"
        for i, (f, s, t) in enumerate(zip(found, self.same, self.truth, strict=True)):
            assert f.shape == s.shape and f.dtype == s.dtype, (
                f"{name} [{i}]: {f.dtype}{f.shape}, not {s.dtype}{s.shape}"
            )
            if not f.is_floating_point():
                assert torch.equal(f, t), f"{name} result {i}: integers that are not the same"
                continue
            finite = t.isfinite() & s.isfinite()  # where the truth, or the format, has no number, nor has the kernel
            assert torch.equal(f.isfinite(), finite), f"{name} result {i}: NaN or Inf in other places"
            infinite = t.isinf() & (s == t.to(s.dtype))
            assert torch.equal(f[infinite], s[infinite]), f"{name} result {i}: Inf of another sign, or NaN for it"
            eps, f, s, t = torch.finfo(f.dtype).eps, f[finite], s[finite], t[finite]
            error, bound = relative_error(f, t), 2 * relative_error(s, t) + eps
            if error > bound and t.numel() < 4096:
                norm, reference_error = self.usual[i]
                scale = max(1.0, norm / t.norm().clamp_min(1e-300).item())
                error, bound = error / scale, 2 * max(relative_error(s, t) / scale, reference_error) + eps
            if bound < error <= 2 * bound:
                error, bound = self.typical(function, i)
            assert error <= bound, f"{name} result {i} of {len(found)}: error {error:.2e}, allowed {bound:.2e}"


def check_parity(
    op: Op, function: Callable[..., Any], arguments: Sequence[Any], what: str = "", **keywords: Any
) -> None:
    """One function judged by the error rule of `Parity`."""
    Parity(op, arguments, what, **keywords).check(function)


class Neighbour(NamedTuple):
    """Arguments a little different from given ones, cotangents, fp64 results, errors of the same-dtype reference."""

    arguments: list[Any]
    cotangents: list[Tensor]
    truth: list[Tensor]
    errors: list[float]


def neighbours(reference: Callable[..., Any], arguments: Sequence[Any], draws: int = 32) -> list[Neighbour]:
    """Arguments that differ from the given ones by 1 %, with the reference's results, by fixed seeds."""
    found = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)

        def jitter(a: Any, g: torch.Generator = generator) -> Any:
            return a * (1 + 0.01 * torch.randn(a.shape, generator=g)).to(a) if is_number(a) else a

        near = [jitter(a) for a in arguments]
        shapes = reference(*near)
        outputs = list(shapes) if isinstance(shapes, tuple) else [shapes]
        cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        same, truth = run(reference, near, cotangents), run(reference, doubled(near), cotangents)
        errors = [relative_error(s, t) for s, t in zip(same, truth, strict=True)]
        found.append(Neighbour(near, cotangents, truth, errors))
    return found


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x in value that lie differently in memory."""
    nothing = float("nan") if x.is_floating_point() else 0  # between what is x: to be read by nobody
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), nothing)
    wide[..., ::2] = x
    gap = x.new_full((*x.shape[:-1], x.shape[-1] + 3), nothing)
    gap[..., 3:] = x
    odd = x.new_full((x.numel() + 1,), nothing)[1:].view(x.shape)
    odd.copy_(x)
    found = {"every other element": wide[..., ::2], "a slice of longer rows": gap[..., 3:], "off by one element": odd}
    if x.dim() > 1:
        found["transposed"] = x.transpose(0, -1).contiguous().transpose(0, -1)
    return found
