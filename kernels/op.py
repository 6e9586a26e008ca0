"""The declaration of an operation, and the glue that makes functions that launch kernels differentiable."""

import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._triton import launcher, launching, skip


@dataclass(frozen=True)
class Cost:
    """Work of one direction: floating-point operations, and the bytes that must cross memory at least once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Op:
    """One operation. Parity tests, gradient checks, compile checks, benches and the table of ops all follow from it."""

    name: str  # 'layernorm': the file, the function, the test id, the plot label
    reference: Callable[..., Any]  # the definition, in plain torch
    triton: Callable[..., Any] | None  # same signature, same meaning; None while an op has no kernel
    # (**dims, **options, dtype, device) -> arguments in order, and keyword arguments that differ from their defaults;
    # floating tensors among the former are differentiated
    inputs: Callable[..., tuple[tuple, dict[str, Any]]]
    parity: tuple[Mapping[str, Any], ...]  # small awkward dims, the last of them middling
    domain: Mapping[str, Sequence[Any]]  # what fuzzing draws each dim from
    bench: tuple[Mapping[str, Any], ...]  # dims of real models
    cost: Callable[..., tuple[Cost, Cost]]  # (**dims, **options, itemsize) -> forward, backward
    # Keywords of `inputs` and `cost` besides sizes, with the values that are tried together (proof/options.py), the
    # default first. Every combination must be valid.
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cpu: Callable[..., Any] | None = None  # a faster path for CPUs, same signature; tested against the reference
    variants: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # other kernels of ours, asked for by name
    summary: str = ""  # the formula in one line, for the table of ops
    differentiable: bool = True  # False: neither reference nor kernels compute gradients
    constants: frozenset[int] = frozenset()  # floating arguments that training does not differentiate, by position
    writes: frozenset[int] = frozenset()  # arguments written in place, by position; a second call writes the same


Forward = Callable[..., tuple[Tensor, ...]]
_NO_CONTEXT = contextlib.nullcontext()
_LIBRARY = torch.library.Library("gptfast", "FRAGMENT")
_interpretable: list[Callable[[], None]] = []


def differentiable(
    name: str,
    forward: Forward,
    backward: Forward,
    save: Callable[[tuple, tuple], tuple],
    outputs: int = 1,
    spread: Callable[..., tuple] = lambda *gradients: gradients,
) -> Callable[..., Any]:
    """Join two functions that launch kernels into one differentiable function.

    forward(*inputs) returns tensors: the op's results, `outputs` of them, then what backward needs besides. A result
    may be absent, and is then an empty tensor. save(inputs, everything forward returned) returns the arguments of
    backward after the gradients of the results. If backward annotates those gradients `Tensor | None`, it gets None for
    a result that is absent or unused; otherwise it gets zeros. backward returns a gradient for each tensor input in
    order, an empty one for an optional input that is absent. Where inputs share a gradient, backward returns it once,
    and `spread` makes the gradients of all inputs from what backward returned. Both are annotated with plain types,
    since torch reads the operator's schema from them; neither may return an input.

    In eager mode this is an autograd.Function; under torch.compile a custom op whose shape function is `forward` with
    its launches left out. Raises RuntimeError when asked for second derivatives.
    """
    for function in (forward, backward):
        if len(get_args(get_type_hints(function)["return"])) == 1:
            raise TypeError(
                f"{name}: {function.__name__} returns a tuple of one tensor, for which torch.compile fixes all sizes; "
                "return an empty tensor beside it, `y, y.new_empty(0)`"
            )
    n = outputs
    schema, reverse_schema = (torch.library.infer_schema(f, mutates_args=()) for f in (forward, backward))
    inputs, tensors = _tensor_slots(schema)
    saved_slots, saved_tensors = _tensor_slots(reverse_schema, skip=n)
    order = [saved_tensors.index(i) if i in saved_tensors else -1 for i in range(saved_slots)]
    plain = [i for i in range(saved_slots) if i not in saved_tensors]
    for position, i in enumerate(plain, len(saved_tensors)):
        order[i] = position
    in_order = order == list(range(saved_slots))
    zeros_for_unused = "Optional[Tensor]" not in _argument_types(reverse_schema)[:n]

    def remember(ctx: Any, inputs: tuple, output: tuple) -> None:
        saved = save(inputs, output)
        if not zeros_for_unused:
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[saved[i] for i in saved_tensors])
        ctx.plain = tuple([saved[i] for i in plain])

    def recall(ctx: Any) -> Sequence[Any]:
        saved = (*ctx.saved_tensors, *ctx.plain)
        return saved if in_order else [saved[i] for i in order]

    def gradients(ctx: Any, returned: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        needed, slots = ctx.needs_input_grad, [None] * inputs
        for i, gradient in zip(tensors, spread(*returned), strict=True):
            if needed[i]:
                slots[i] = gradient
        return tuple(slots)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            remember(ctx, inputs, output)
            ctx.launcher = launcher()  # autograd may run backward after the block that chose the launcher has ended
            return output[0] if n == 1 else output[:n]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            refuse_second_derivative(name, "use kernels.load('reference')")
            if ctx.launcher is None:
                return gradients(ctx, backward(*grads, *recall(ctx)))
            with launching(ctx.launcher):
                return gradients(ctx, backward(*grads, *recall(ctx)))

    Function.__name__ = Function.__qualname__ = name

    operator = _operator(name, schema, forward)
    reverse = _operator(f"{name}_backward", reverse_schema, backward)
    torch.library.register_autograd(
        f"gptfast::{name}",
        lambda ctx, *grads: gradients(ctx, reverse(*grads[:n], *recall(ctx))),
        setup_context=remember,
        lib=_LIBRARY,
    )

    def apply(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            output = operator(*inputs)
            return output[0] if n == 1 else output[:n]
        _refuse_transforms(name, inputs)
        with _on_gpu(name, inputs[tensors[0]]):
            if torch.is_grad_enabled():
                for i in tensors:
                    if inputs[i] is not None and inputs[i].requires_grad:
                        return Function.apply(*inputs)
            output = forward(*inputs)
        return output[0] if n == 1 else output[:n]

    return apply


def without_gradient(name: str, forward: Callable[..., Tensor], writes: Sequence[str] = ()) -> Callable[..., Tensor]:
    """Wrap a function that launches kernels and has no derivative: its one result never requires a gradient.

    `writes` names the arguments that the kernels write into.
    """
    schema = torch.library.infer_schema(forward, mutates_args=writes)
    operator, first = _operator(name, schema, forward), _tensor_slots(schema)[1][0]

    @torch.no_grad()
    def apply(*inputs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return operator(*inputs)
        _refuse_transforms(name, inputs)
        with _on_gpu(name, inputs[first]):
            return forward(*inputs)

    return apply


def _operator(name: str, schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a custom op whose shape function is the function itself with its launches left out.

    It is defined and implemented by hand: a call costs 2 us on top of its body where torch.library.custom_op costs 8.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CUDA")

    def shapes(*inputs: Any) -> Any:
        _make_known(getattr(torch.ops.gptfast, name).default)
        with launching(skip):
            return function(*inputs)

    torch.library.register_fake(f"gptfast::{name}", shapes, lib=_LIBRARY)

    def interpretable() -> None:
        """Let the custom op take CPU tensors, interpreted. Registered only when somebody asks for the interpreter."""
        from .proof.interpret import interpreting

        def run(*inputs: Any) -> Any:
            with interpreting():
                return function(*inputs)

        _LIBRARY.impl(name, run, "CPU")

    _interpretable.append(interpretable)
    return getattr(torch.ops.gptfast, name).default


def _make_known(operator: Any) -> None:
    """Register a custom op with torch.compile's inductor, if that is running, before it meets the op in a graph.

    Up to torch 2.11 inductor logs an op that it meets for the first time with the whole expression tree of its
    arguments. That doubles with every residual sum: a model of 12 layers did not compile within minutes.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    make_fallback = getattr(lowering, "make_fallback", None)
    if (
        make_fallback is None
        or operator in lowering.lowerings
        or "get_decomp_fn" in signature(make_fallback).parameters
    ):
        return
    exact = lowering.tag_to_layout_constraint(torch._C.Tag.needs_exact_strides)
    make_fallback(operator, layout_constraint=exact, warn=False)


def _on_gpu(name: str, first: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that makes the first tensor's GPU current, where Triton launches. Refuses a tensor on none."""
    device = first.device
    if device.type == "cuda":
        return torch.cuda.device(device) if device.index != torch.cuda.current_device() else _NO_CONTEXT
    if launcher() is None:
        raise ValueError(
            f"{name}: the Triton kernel needs CUDA tensors, the first argument is on {device}; "
            "use kernels.load('reference'), or load('interpret') to run the kernel on the CPU"
        )
    return _NO_CONTEXT


def _tensor_slots(schema: str, skip: int = 0) -> tuple[int, list[int]]:
    """Returns how many arguments a schema has, and which of them are tensors; the first `skip` are not counted."""
    types = _argument_types(schema)[skip:]
    return len(types), [i for i, kind in enumerate(types) if kind in ("Tensor", "Optional[Tensor]")]


def _argument_types(schema: str) -> list[str]:
    """Returns Tensor, Optional[Tensor] and float for a schema like '(Tensor x, Tensor? bias, float eps) -> ...'."""
    return [str(argument.type) for argument in torch._C.parse_schema(f"gptfast::probe{schema}").arguments]


def allow_interpretation() -> None:
    """Register CPU implementations, interpreted, for the custom ops of every page loaded so far."""
    while _interpretable:
        _interpretable.pop()()


def changed(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Returns those of the keywords whose values differ from the defaults of the function's parameters."""
    defaults = signature(function).parameters
    return {
        name: value for name, value in keywords.items() if isinstance(value, Tensor) or value != defaults[name].default
    }


def no_tensor(**arguments: Any) -> ValueError:
    """Returns the error that names the first of the arguments that is no tensor, but None or a list."""
    name, value = next((name, value) for name, value in arguments.items() if not isinstance(value, Tensor))
    return ValueError(f"{name}: expected a tensor, got {value!r:.80}")


def refuse_second_derivative(name: str, instead: str) -> None:
    """Called by a backward that has no derivative of its own: raises RuntimeError under create_graph=True.

    torch's once_differentiable lets a cotangent pass that is constant, and a second derivative is then silently 0.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: no second derivative; {instead}")


def _refuse_transforms(name: str, inputs: Sequence[Any]) -> None:
    """Refuse torch.func, vmap and forward-mode differentiation, which would be lost in a launch."""
    if transformed() or (forward_ad._current_level >= 0 and any(map(_is_dual, inputs))):
        raise RuntimeError(
            f"{name}: no kernels under torch.func, vmap and forward-mode differentiation; "
            "use kernels.load('reference')"
        )


def _is_dual(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def transformed() -> bool:
    """Returns whether torch.func or vmap is at work, which know torch's own operators alone."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def traced() -> bool:
    """Returns whether tensors have no values to look at: in torch.compile, torch.func and vmap."""
    return torch.compiler.is_compiling() or transformed()


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Refuse what is no whole number of at least `least`: raises ValueError that names the argument."""
    whole = not isinstance(value, bool) if isinstance(value, int) else hasattr(value, "__index__")
    if not whole or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def check_scores(window: int | None, scale: float | None, softcap: float | None) -> None:
    """Refuse a window, scale or softcap of scores that means nothing; raises ValueError that names the argument."""
    if window is not None:
        check_count("window", window)
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive number or None, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")


def check_eps(eps: Any) -> None:
    """Refuse an eps that is no finite number of at least 0."""
    if not (isinstance(eps, (float, int)) and 0 <= eps < math.inf):
        raise ValueError(f"eps: expected a number of at least 0, got {eps!r}")


def require(condition: bool, message: str) -> None:
    """Refuse a wrong argument: raises ValueError with `message`, which names the argument and what it should be."""
    if not condition:
        raise ValueError(message)
