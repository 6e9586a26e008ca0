"""The maths: fused kernels for GPTs, each beside the PyTorch reference that defines it.

Letters, everywhere: B batch, T query positions, S key positions, H query heads, G key/value heads, D head dim, C model
dim, V vocabulary, M rows (B * T), N row length, K contracted axis. Attention tensors are (B, T, H, D).

    ops = kernels.load("auto")                              # triton on CUDA, elsewhere what CPUs are fast in
    ops = kernels.load("interpret")                         # the same kernels on CPU tensors: for parity, not speed
    ops = kernels.load("triton", layernorm="reference")     # ablation
    y = ops.layernorm(x, weight, bias); print(ops)
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from . import _command as _command  # first, so that Ctrl-C is one line from here on
from . import _triton
from .activation import ACTIVATION
from .attention import ATTENTION
from .cross_entropy import CROSS_ENTROPY
from .cross_entropy.linear import LINEAR_CROSS_ENTROPY
from .decode_attention import DECODE_ATTENTION
from .decode_attention.append import APPEND_ATTENTION
from .decode_embedding import DECODE_EMBEDDING
from .decode_greedy import DECODE_GREEDY
from .decode_linear import DECODE_LINEAR
from .int8_linear import INT8_LINEAR
from .layernorm import ADD_LAYERNORM, LAYERNORM
from .newton_schulz import NEWTON_SCHULZ
from .op import Cost, Op, allow_interpretation
from .rmsnorm import ADD_RMSNORM, RMSNORM
from .rotary import ROTARY

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        LAYERNORM, ADD_LAYERNORM, RMSNORM, ADD_RMSNORM, ROTARY, ATTENTION, ACTIVATION, CROSS_ENTROPY,
        LINEAR_CROSS_ENTROPY, NEWTON_SCHULZ, DECODE_ATTENTION, APPEND_ATTENTION, DECODE_LINEAR,
        DECODE_EMBEDDING, DECODE_GREEDY, INT8_LINEAR,
    )
}  # fmt: skip
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton", "interpret")

__all__ = ["IMPLEMENTATIONS", "OPS", "Cost", "Op", "Ops", "load"]


class Ops:
    """The chosen implementation of every op: `ops.layernorm(x, weight)` calls one, print(ops) says which and why."""

    def __init__(self, chosen: Mapping[str, tuple[str, str, Callable[..., Any]]]) -> None:
        self.chosen = {name: (implementation, why) for name, (implementation, why, _) in chosen.items()}
        for name, (_, _, function) in chosen.items():
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no op named {name!r}; there are {', '.join(self.__dict__.get('chosen', ()))}")

    def __repr__(self) -> str:
        width = max(map(len, self.chosen))
        return "\n".join(f"{name:<{width}}  {how:<9}  {why}" for name, (how, why) in self.chosen.items())


def load(implementation: str = "auto", **per_op: str) -> Ops:
    """Choose an implementation for every op, with exceptions by keyword.

    'reference' is the definition in plain PyTorch; 'cpu' an op's faster path for CPUs, or the reference where it has
    none; 'triton' the kernels on CUDA; 'interpret' the same kernels on CPU tensors; 'auto' is triton where that can run
    and 'cpu' elsewhere. An op may have further variants, as attention has 'gluon'.
    Raises ValueError for a name that does not exist, RuntimeError for an explicit choice that cannot run here: nothing
    falls back in silence.
    """
    for name in per_op:
        _known("op", name, OPS)
    return Ops({name: _choose(op, per_op.get(name, implementation)) for name, op in OPS.items()})


def _choose(op: Op, implementation: str) -> tuple[str, str, Callable[..., Any]]:
    _known("implementation", implementation, (*IMPLEMENTATIONS, *op.variants))
    if implementation == "reference":
        return "reference", "asked for", op.reference
    if implementation == "cpu":
        return _on_cpu(op, "asked for")
    kernel = op.variants.get(implementation, op.triton)
    obstacle = "it has no kernel yet" if kernel is None else _triton.MISSING or ""
    if implementation == "interpret":
        if kernel is None or obstacle:
            raise RuntimeError(f"{op.name} cannot be interpreted: {obstacle}")
        return "interpret", "asked for", _Interpreted(kernel)
    obstacle = obstacle or _no_gpu()
    if implementation == "auto":
        obstacle = obstacle or _unproven_gpu()
    if kernel is not None and not obstacle:
        chosen = implementation != "auto"
        return implementation if chosen else "triton", "asked for" if chosen else "CUDA is available", kernel
    if implementation != "auto":
        others = "'auto', 'cpu', 'reference' or 'interpret'"
        raise RuntimeError(f"{op.name}: {implementation!r} cannot run: {obstacle}; use {others}")
    return _on_cpu(op, obstacle)


def _on_cpu(op: Op, why: str) -> tuple[str, str, Callable[..., Any]]:
    if op.cpu is None:
        return "reference", f"{why}; it has no other path for CPUs", op.reference
    return "cpu", why, op.cpu


class _Interpreted:
    """Runs a kernel's function on CPU tensors in the interpreter; an object, so that a model with it can be pickled."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        allow_interpretation()
        self.kernel = kernel

    def __reduce__(self) -> tuple:
        return _Interpreted, (self.kernel,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():  # the compiled graph holds the custom op, whose CPU implementation interprets
            return self.kernel(*args, **kwargs)
        from .proof.interpret import interpreting

        with interpreting():
            return self.kernel(*args, **kwargs)


def _no_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major >= 8 or torch.version.hip:
        return ""
    return f"{torch.cuda.get_device_name()} is sm_{major}{minor}; the kernels need sm_80 or newer, also in fp16"


def _unproven_gpu() -> str:
    """Returns why 'auto' does not choose the kernels on a GPU that could run them; '' if it does."""
    import torch

    if not torch.version.hip:
        return ""
    return f"{torch.cuda.get_device_name()} is AMD's, for which kernels compile but never ran; 'triton' insists on them"


def _known(what: str, name: str, names: Any) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no {what} named {name!r}{hint} There are: {', '.join(names)}")
