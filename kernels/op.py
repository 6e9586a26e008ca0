"""What the library must know about an operation, and the glue that makes a pair of kernel launches differentiable."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
    inputs: Callable[..., tuple]  # (**dims, dtype, device) -> arguments in order; floating tensors are differentiated
    parity: tuple[Mapping[str, Any], ...]  # small awkward dims, the last of them middling
    domain: Mapping[str, Sequence[Any]]  # what fuzzing draws each dim from
    bench: tuple[Mapping[str, Any], ...]  # dims of real models
    cost: Callable[..., tuple[Cost, Cost]]  # (**dims, itemsize) -> forward, backward
    cpu: Callable[..., Any] | None = None  # a faster path for CPUs, same signature; tested against the reference
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # timed beside ours, same arguments
    variants: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # other kernels of ours, asked for by name
    summary: str = ""  # the formula in one line, for the table of ops
    differentiable: bool = True  # False: neither the reference nor the kernels give gradients
    constants: frozenset[int] = frozenset()  # floating arguments that training takes no gradient of, by position


Forward = Callable[..., tuple[Tensor, ...]]
_HERE = contextlib.nullcontext()
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

    forward(*inputs) returns tensors, of which the first `outputs` are the op's results and the rest what backward
    needs. save(inputs, everything forward returned) picks the arguments of backward, which follow the gradients of the
    results. backward returns a gradient for each tensor input in order; an empty one stands for an optional input that
    is absent. Where inputs share a gradient, backward returns it once and `spread` makes one for each of what backward
    returned. Both are annotated with plain types, since torch reads the operator's schema from them; neither may return
    an input.

    In eager mode this is an autograd.Function (56 us for forward and backward against 80 us through a custom op,
    measured on CPU with a trivial body); under torch.compile a custom op whose shape function is `forward` with its
    launches left out.
    """
    n = outputs
    takes_gradient = _tensor_slots(torch.library.infer_schema(forward, mutates_args=()))

    def gradients(given: tuple[bool, ...], found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        rest = iter(spread(*found))
        slots = (next(rest) if i in takes_gradient else None for i in range(len(given)))
        return tuple(slot if is_given else None for slot, is_given in zip(slots, given, strict=True))

    def remember(ctx: Any, inputs: tuple, output: tuple) -> None:
        saved = save(inputs, output)
        ctx.is_tensor = tuple(isinstance(v, Tensor) for v in saved)
        ctx.save_for_backward(*(v for v in saved if isinstance(v, Tensor)))
        ctx.plain = tuple(v for v in saved if not isinstance(v, Tensor))
        ctx.given = tuple(isinstance(v, Tensor) for v in inputs)

    def recall(ctx: Any) -> list:
        tensors, plain = iter(ctx.saved_tensors), iter(ctx.plain)
        return [next(tensors if is_tensor else plain) for is_tensor in ctx.is_tensor]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            remember(ctx, inputs, output)
            ctx.launcher = launcher()  # autograd may run backward after the block that chose the launcher has ended
            return output[0] if n == 1 else output[:n]

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            with launching(ctx.launcher):
                return gradients(ctx.given, backward(*grads, *recall(ctx)))

    Function.__name__ = Function.__qualname__ = name

    operator = _operator(name, forward)
    reverse = _operator(f"{name}_backward", backward)
    operator.register_autograd(
        lambda ctx, *grads: gradients(ctx.given, reverse(*grads[:n], *recall(ctx))), setup_context=remember
    )

    def apply(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            output = operator(*inputs)
        else:
            wanted = torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs)
            with _on_gpu(name, inputs):
                if wanted:
                    return Function.apply(*inputs)
                output = forward(*inputs)
        return output[0] if n == 1 else output[:n]

    return apply


def without_gradient(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`differentiable` for an op that has no derivative: its one result takes no gradient, whatever its inputs do."""
    operator = _operator(name, forward)

    @torch.no_grad()
    def apply(*inputs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return operator(*inputs)
        with _on_gpu(name, inputs):
            return forward(*inputs)

    return apply


def _operator(name: str, function: Callable[..., Any]) -> torch.library.CustomOpDef:
    """A custom op whose shape function is the function itself with its launches left out."""
    operator = torch.library.custom_op(f"gptfast::{name}", mutates_args=(), device_types="cuda")(function)

    def shapes(*inputs: Any) -> Any:
        with launching(skip):
            return function(*inputs)

    operator.register_fake(shapes)

    def interpretable() -> None:
        """Let the custom op take CPU tensors, interpreted. Registered only when somebody asks for the interpreter."""
        from .interpret import interpreting

        def run(*inputs: Any) -> Any:
            with interpreting():
                return function(*inputs)

        operator.register_kernel("cpu")(run)

    _interpretable.append(interpretable)
    return operator


def _on_gpu(name: str, inputs: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """The GPU of the first tensor made the current one, where Triton launches. Refuses tensors that are on none."""
    device = next(v for v in inputs if isinstance(v, Tensor)).device
    if device.type == "cuda":
        return torch.cuda.device(device) if device.index != torch.cuda.current_device() else _HERE
    if launcher() is None:
        raise ValueError(
            f"{name}: the Triton kernel needs CUDA tensors, the first argument is on {device}; "
            "use kernels.load('reference'), or load('interpret') to run the kernel on the CPU"
        )
    return _HERE


def _tensor_slots(schema: str) -> frozenset[int]:
    """Positions of the arguments of a schema like '(Tensor x, Tensor? bias, float eps) -> ...' that are tensors."""
    arguments = torch._C.parse_schema(f"gptfast::probe{schema}").arguments
    return frozenset(i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]"))


def allow_interpretation() -> None:
    """Register CPU implementations, interpreted, for the custom ops of every page loaded so far."""
    while _interpretable:
        _interpretable.pop()()


def require(condition: bool, message: str) -> None:
    """Refuse a wrong argument: raises ValueError with `message`, which names the argument and what it should be."""
    if not condition:
        raise ValueError(message)
