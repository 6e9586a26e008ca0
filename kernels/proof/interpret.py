"""Runs the kernels on CPU tensors, in Triton's interpreter with the corrections that parity tests need.

The stock interpreter (3.6 to 3.9) stores bf16 as 16-bit integers and computes on the bit patterns: a bf16 dot is off by
1e9, and a cast to bf16 truncates. `_Builder` computes in fp32 and rounds to nearest even, bit for bit as torch does. It
also makes loop variables int32 tensors, as they are on a GPU, and it guards memory: an access outside the tensors given
to the launch, stores of two programs to one address, and a load of what another program stored raise errors here, where
they are undefined behaviour on a GPU.

Interpretation and compilation coexist: TRITON_INTERPRET stays unset, and the kernels are the same objects. Triton's
language is patched only while a launch runs. Not thread-safe; the interpreter is a tool for tests.
"""

import contextlib
import inspect
import itertools
import math
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle as Handle
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .._triton import Launcher, launching


class OutOfBounds(RuntimeError):
    """A kernel read or wrote outside the tensors it was given."""


class Race(RuntimeError):
    """Two programs of one launch touched the same address, at least one of them with a plain store."""


class Early(RuntimeError):
    """A kernel launched before the one in front has ended used memory before it waited, or a program never waited."""


class Overflow(RuntimeError):
    """A sum, difference or product of integers does not fit their type: an offset that should have been int64."""


# ---- bfloat16: stored as uint16 by the interpreter, computed in fp32, rounded to nearest even


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16 bit patterns (uint16), to nearest even; NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Widen bf16 bit patterns (uint16) to fp32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _is_bf16(dtype: Any) -> bool:
    return dtype.scalar == tl.bfloat16


def _wide(handle: Handle) -> np.ndarray:
    return from_bf16(handle.data) if _is_bf16(handle.dtype) else handle.data


def _narrow(x: np.ndarray) -> Handle:
    return Handle(to_bf16(x), tl.bfloat16)


_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


class _Builder(stock.InterpreterBuilder):
    """The interpreter's builder with bf16 arithmetic and guarded memory: the stock instance's class during a launch."""

    guard: "Guard | None" = None

    def binary_op(self, lhs: Handle, rhs: Handle, op: Callable) -> Handle:
        if not _is_bf16(lhs.dtype) or op in _BITWISE:
            return super().binary_op(lhs, rhs, op)
        out = op(_wide(lhs), _wide(rhs))
        return Handle(out, lhs.dtype.scalar) if out.dtype == bool else _narrow(out)

    def unary_op(self, arg: Handle, op: Callable) -> Handle:
        return _narrow(op(_wide(arg))) if _is_bf16(arg.dtype) else super().unary_op(arg, op)

    def ternary_op(self, lhs: Handle, rhs: Handle, other: Handle, op: Callable) -> Handle:
        if op is np.clip and _is_bf16(lhs.dtype):
            return _narrow(np.clip(_wide(lhs), _wide(rhs), _wide(other)))
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        if _is_bf16(x.dtype):
            return _narrow(_wide(x) * _wide(y) + _wide(z))
        return super().create_fma(x, y, z)

    def create_rsqrt(self, arg: Handle) -> Handle:
        return _narrow(1 / np.sqrt(_wide(arg))) if _is_bf16(arg.dtype) else super().create_rsqrt(arg)

    def create_dot(self, a: Handle, b: Handle, d: Handle, *rest: Any) -> Handle:
        if _is_bf16(a.dtype):
            a, b = Handle(_wide(a), tl.float32), Handle(_wide(b), tl.float32)
        return super().create_dot(a, b, d, *rest)

    def cast_impl(self, src: Handle, dst_type: Any) -> Handle:
        source, target = _is_bf16(src.dtype), _is_bf16(dst_type)
        if target and not source:
            return _narrow(src.data.astype(np.float32))
        if source and not target:
            return Handle(_wide(src).astype(stock._get_np_dtype(dst_type)), dst_type.scalar)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Handle, dst_type: Any, rounding_mode: Any) -> Handle:
        if _is_bf16(src.dtype) or _is_bf16(dst_type):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def get_bf16(self, value: float) -> Handle:
        return _narrow(np.array([value], dtype=np.float32))

    # ---- memory

    def create_masked_load(self, ptrs: Handle, mask: Handle, *rest: Any, **named: Any) -> Handle:
        if self.guard:
            self.guard.touch("load", ptrs, mask, self.grid_idx)
        return super().create_masked_load(ptrs, mask, *rest, **named)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Handle, *rest: Any, **named: Any) -> None:
        if self.guard:
            self.guard.touch("store", ptrs, mask, self.grid_idx)
        return super().create_masked_store(ptrs, value, mask, *rest, **named)

    def create_barrier(self) -> None:
        if self.guard:
            self.guard.meet_inside(self.grid_idx)

    def create_atomic_rmw(self, op: Any, ptr: Handle, value: Handle, mask: Handle, *rest: Any) -> Handle:
        if self.guard:
            self.guard.touch("atomic", ptr, mask, self.grid_idx)
            if rest[0] == stock._ir.MEM_SEMANTIC.ACQUIRE_RELEASE:
                self.guard.meet(ptr, mask, self.grid_idx)
        return super().create_atomic_rmw(op, ptr, value, mask, *rest)

    def create_atomic_cas(self, ptr: Handle, *rest: Any) -> Handle:
        if self.guard:
            self.guard.touch("atomic", ptr, Handle(np.ones_like(ptr.data, dtype=bool), tl.int1), self.grid_idx)
        return super().create_atomic_cas(ptr, *rest)


class Guard:
    """Records which addresses one launch may access, which programs accessed them, and when; finds races.

    A program may read what another stored if the two synchronized in between: after the store the writer's barrier, so
    that all its threads are done, then its atomic on some address, then the reader's atomic on the same address, both
    releasing and acquiring, then the read.
    """

    def __init__(self, kernel: str, arguments: Any) -> None:
        self.kernel = kernel
        self.early = False  # whether it is launched before the kernel in front has ended
        self.waited: set[tuple[int, ...]] = set()  # the programs that have waited for that end
        extents = sorted(set(_extents(arguments)))
        self.low = np.array([a for a, _ in extents], dtype=np.uint64)
        # views of one storage may overlap or nest: an address is valid if any view that starts below it reaches it
        self.high = np.maximum.accumulate(np.array([b for _, b in extents], dtype=np.uint64))
        self.seen: dict[str, list[tuple[np.ndarray, int, int]]] = {"load": [], "store": [], "atomic": []}
        self.programs: list[tuple[int, ...]] = []
        self.clock = 0
        self.barriers: dict[int, list[int]] = {}  # by program: when
        self.meetings: dict[int, list[tuple[int, int]]] = {}  # by address: program and when

    def touch(self, kind: str, ptrs: Handle, mask: Handle, program: tuple[int, ...]) -> None:
        if self.early and program not in self.waited:
            raise Early(f"{self.kernel}: {kind} in program {program} before it waits for the kernel in front")
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        # A scalar condition arrives as integers of 0 and 1, which as an index would pick the first two addresses.
        addresses, mask_data = np.broadcast_arrays(ptrs.data, np.asarray(mask.data).astype(bool))
        addresses = addresses[mask_data].astype(np.uint64)
        if addresses.size == 0:
            return
        outside = self._outside(addresses, np.uint64(size))
        self._refuse(kind, program, outside)
        self._index(program)
        self.accessed(kind, np.unique(addresses), size, program)

    def _outside(self, addresses: np.ndarray, sizes: Any) -> np.ndarray:
        """Returns which of the accesses of `sizes` bytes at `addresses` leave the tensors."""
        below = np.searchsorted(self.low, addresses, side="right").astype(np.int64) - 1
        return (below < 0) | (addresses + sizes > self.high[np.maximum(below, 0)])

    def _refuse(self, kind: str, program: tuple[int, ...], outside: np.ndarray) -> None:
        if outside.any():
            raise OutOfBounds(
                f"{self.kernel}: {kind} out of bounds in program {program}: {outside.sum()} of {outside.size} lanes"
            )

    def prefetch(self, addresses: np.ndarray, sizes: np.ndarray, program: tuple[int, ...]) -> None:
        """Check copies into the L2 cache: multiples of 16 bytes, of the tensors but for what aligns their start."""
        addresses, sizes = addresses[sizes > 0].astype(np.uint64), sizes[sizes > 0].astype(np.uint64)
        if ((addresses | sizes) % np.uint64(16)).any():
            raise OutOfBounds(f"{self.kernel}: a prefetch in program {program} is not of multiples of 16 bytes")
        self._refuse("prefetch", program, self._outside(addresses + np.uint64(15), sizes - np.uint64(15)))

    def _index(self, program: tuple[int, ...]) -> int:
        if not self.programs or self.programs[-1] != program:
            self.programs.append(program)
        self.clock += 1
        return len(self.programs) - 1

    def meet_inside(self, program: tuple[int, ...]) -> None:
        """Record a barrier of a program's threads."""
        self.barriers.setdefault(self._index(program), []).append(self.clock)

    def meet(self, ptrs: Handle, mask: Handle, program: tuple[int, ...]) -> None:
        """Record atomics that release the program's stores and acquire those of others."""
        index = self._index(program)
        taken = np.broadcast_to(np.asarray(mask.data).astype(bool), ptrs.data.shape)
        for address in ptrs.data[taken].reshape(-1).tolist():
            self.meetings.setdefault(address, []).append((index, self.clock))

    def accessed(self, kind: str, addresses: np.ndarray, size: int, program: tuple[int, ...]) -> None:
        """Record a program's access to elements of `size` bytes at these addresses."""
        self.seen[kind].append((addresses, len(self.programs) - 1, self.clock))

    def finish(self) -> None:
        """Compare the stores and loads of the finished launch's programs; raises Race."""
        stored, writer, written = self._joined("store")
        if stored.size == 0:
            return
        order = np.lexsort((written, writer, stored))
        stored, writer, written = stored[order], writer[order], written[order]
        clash = (stored[1:] == stored[:-1]) & (writer[1:] != writer[:-1])
        if clash.any():
            i = int(np.flatnonzero(clash)[0])
            self._race("both store to one address", writer[i], writer[i + 1])
        for kind in ("load", "atomic"):
            touched, reader, read = self._joined(kind)
            at = np.maximum(np.searchsorted(stored, touched, side="right") - 1, 0)  # the last store there
            clash = (stored[at] == touched) & (writer[at] != reader)
            pairs = np.stack((reader, read, writer[at], written[at]), axis=1)[clash]
            for i, when, j, before in np.unique(pairs, axis=0).tolist():
                if kind == "atomic" or not self._met(j, before, i, when):
                    self._race(f"touch one address, the first with a {kind}, the second with a store", i, j)

    def _met(self, writer: int, written: int, reader: int, read: int) -> bool:
        """Returns whether the writer's store is ordered before the reader's load."""
        done = min((when for when in self.barriers.get(writer, ()) if when > written), default=read)
        return any(
            done < released < acquired < read
            for meeting in self.meetings.values()
            for program, released in meeting if program == writer
            for other, acquired in meeting if other == reader
        )  # fmt: skip

    def _joined(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen = self.seen[kind]
        if not seen:
            return np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64)
        sizes = [a.size for a, _, _ in seen]
        programs, times = (np.repeat([x[i] for x in seen], sizes) for i in (1, 2))
        return np.concatenate([a for a, _, _ in seen]), programs, times

    def _race(self, what: str, first: int, second: int) -> None:
        raise Race(f"{self.kernel}: programs {self.programs[first]} and {self.programs[second]} {what}")


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors given to a launch, including those in descriptors and tuples."""
    for value in arguments:
        if isinstance(value, TensorDescriptor):
            value = value.base
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _extents(arguments: Any) -> Iterator[tuple[int, int]]:
    """Yields the byte range of each tensor: of the view, not of its storage, so that leaving a slice is an error."""
    for value in _tensors(arguments):
        if value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            yield value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


# ---- launching


def interpreting(
    guard: Callable[[str, Any], Guard] = Guard, arch: int = 0, multiprocessors: int = 1
) -> contextlib.AbstractContextManager:
    """Returns a context that interprets every kernel this thread launches, each launch with a guard of its own.

    Tiles are chosen for a GPU of compute capability arch / 10 with so many multiprocessors.
    """
    return launching(Launcher(partial(_launch, guard), arch, multiprocessors, gluon=False))


def _launch(make_guard: Callable[[str, Any], Guard], kernel: JITFunction, grid: Any, *args: Any, **kwargs: Any) -> None:
    signature = inspect.signature(kernel.fn)
    known = {name: value for name, value in kwargs.items() if name in signature.parameters}  # no num_warps and such
    bound = signature.bind(*args, **known)
    bound.apply_defaults()
    devices = {t.device for t in _tensors(bound.arguments.values())}
    if all(device.type == "meta" for device in devices):
        return  # meta tensors have no values to compute
    if elsewhere := [device for device in devices if device.type != "cpu"]:
        raise ValueError(f"{kernel.__name__}: kernels are interpreted on CPU tensors, one is on {elsewhere[0]}")
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    guard = make_guard(kernel.__name__, bound.arguments.values())
    guard.early = kwargs.get("launch_pdl", False)
    with _language(guard) as builder:
        values = {k: v if k in constexprs else stock._implicit_cvt(v) for k, v in bound.arguments.items()}
        grid = tuple(grid(bound.arguments) if callable(grid) else grid)
        grid += (1,) * (3 - len(grid))
        builder.set_grid_dim(*grid)
        function = _rewritten(kernel)
        for program in itertools.product(*map(range, grid)):
            builder.set_grid_idx(*program)
            function(**values)
            if guard.early and program not in guard.waited:
                raise Early(f"{kernel.__name__}: program {program} never waits, and those behind rely on it")
    guard.finish()


_rewrites: dict[Callable, Callable] = {}  # by the plain function: hashing a JITFunction walks all its dependencies


def _rewritten(kernel: JITFunction) -> Callable:
    function = _rewrites.get(kernel.fn)
    if function is None:
        fn = kernel.fn
        # The stock rewriter adds globals to the function's: it gets a copy of them.
        copy = types.FunctionType(fn.__code__, dict(fn.__globals__), fn.__name__, fn.__defaults__, fn.__closure__)
        copy.__module__, copy.__qualname__ = fn.__module__, fn.__qualname__
        copy.__annotations__ = fn.__annotations__
        function = _rewrites[kernel.fn] = stock.FunctionRewriter(copy).rewrite_ast()
    return function


_tl_user = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})  # sees both languages


class _NothingToRestore:
    def restore(self) -> None:
        """Do nothing: the launch's one patch covers its device functions too."""


@contextlib.contextmanager
def _language(guard: Guard) -> Iterator[_Builder]:
    """Bind Triton's language to the interpreter until the block ends."""
    builder, call, patch, reduce_sum = (
        stock.interpreter_builder,
        JITFunction.__call__,
        stock._patch_lang,
        stock.ReduceOps.sum,
    )
    scope = patch(_tl_user)
    # numpy 2.4 takes scalars only
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))
    scope.set_attr(tl, "range", _range)
    scope.set_attr(tl, "inline_asm_elementwise", partial(_assembly, builder, guard))
    scope.set_attr(stock, "_get_np_dtype", _numpy_dtype)
    scope.set_attr(tl.tensor, "__init__", _make_tensor)
    scope.set_attr(tl.block_type, "__init__", _make_block_type)
    scope.set_attr(stock.TritonSemantic, "broadcast_impl_value", _broadcast)
    scope.set_attr(stock.TritonSemantic, "binary_op_sanitize_overflow_impl", _check_overflow)
    stock._patch_lang = lambda fn: _NothingToRestore()
    stock.ReduceOps.sum = _summing(reduce_sum)
    JITFunction.__call__ = lambda self, *args, **kwargs: _rewritten(self)(*args, **kwargs)
    builder.__class__, builder.guard = _Builder, guard
    try:
        with knobs.runtime.scope(), np.errstate(all="ignore"):  # a GPU does not warn of overflow either
            knobs.runtime.interpret = True
            yield builder
    finally:
        builder.__class__ = stock.InterpreterBuilder
        JITFunction.__call__, stock._patch_lang, stock.ReduceOps.sum = call, patch, reduce_sum
        scope.restore()


def _range(start: Any, stop: Any = None, step: Any = None, **hints: Any) -> Iterator[Any]:
    """Yields int32 tensors as loop variables of tl.range, as in compiled code; the stock one yields integers."""
    start, stop = (0, start) if stop is None else (start, stop)
    for i in range(int(start), int(stop), 1 if step is None else int(step)):
        yield stock.interpreter_semantic.to_tensor(i, False)


def _assembly(builder: Any, guard: Guard, asm: str, constraints: str, values: Any, *rest: Any) -> None:
    """Do what the instructions of prims.await_inputs and prims.prefetch_rows mean to one program."""
    program = builder.grid_idx
    if asm.startswith("griddepcontrol.wait"):
        guard.waited.add(program)
    elif "cp.async.bulk.prefetch.L2" in asm:
        addresses, sizes = values
        guard.prefetch(addresses.handle.data, sizes.handle.data, program)
    elif not asm.startswith("griddepcontrol.launch_dependents"):
        raise NotImplementedError(f"the interpreter does not know the instruction: {asm}")


# Four of the stock interpreter's own, as quick as they can be: they took a third of the time of a launch.

_NUMPY = {t.name: np.dtype(name) for name, types_ in {
    "bool": (tl.int1,), "uint16": (tl.uint16, tl.bfloat16), "float16": (tl.float16,), "float32": (tl.float32,),
    "float64": (tl.float64,), "int8": (tl.int8,), "int16": (tl.int16,), "int32": (tl.int32,), "int64": (tl.int64,),
    "uint32": (tl.uint32,), "uint64": (tl.uint64,),
    "uint8": (tl.uint8, tl.float8e5, tl.float8e5b16, tl.float8e4nv, tl.float8e4b8, tl.float8e4b15),
}.items() for t in types_}  # fmt: skip
_blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}  # the shapes that Triton has let pass: one object for each
_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}  # a tensor's shape and number of elements, as Triton's constants
_stock_block_type, _stock_broadcast = tl.block_type.__init__, stock.TritonSemantic.broadcast_impl_value


def _numpy_dtype(dtype: Any) -> np.dtype:
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _NUMPY[scalar.name]


def _make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    key = tuple([s.value if isinstance(s, tl.constexpr) else s for s in getattr(shape, "values", shape)])
    known = _blocks.get(key)
    if known is None:
        _stock_block_type(self, element_ty, shape)
        _blocks[key] = self.shape, self.numel, str(self.shape)
    else:
        self.element_ty = element_ty
        self.shape, self.numel, name = known
        self.name = f"<{name}, {element_ty}>"


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    key = tuple(type.shape.values) if type.is_block() else ()
    known = _shapes.get(key)
    if known is None:
        constants = tl.core.tuple([tl.constexpr(size) for size in key])
        known = _shapes[key] = constants, tl.constexpr(math.prod(key))
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = known


def _broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
        return lhs, rhs
    return _stock_broadcast(self, lhs, rhs)


_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(_: Any, lhs: Any, rhs: Any, operation: Callable) -> None:
    """Check integer overflow in two steps of numpy; the stock check takes some twenty of the interpreter's."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth >= 64:
        return
    exact = _EXACT[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    if exact.size and not dtype.get_int_min_value() <= exact.min() <= exact.max() <= dtype.get_int_max_value():
        raise Overflow(f"{operation.__name__} of {dtype}: {exact.min()} to {exact.max()} does not fit")


def _summing(stock_sum: Callable) -> Callable:
    def sum_(self: Any, x: Any) -> Any:
        if not _is_bf16(x.handle.dtype):
            return stock_sum(self, x)
        total = np.sum(_wide(x.handle), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(to_bf16(np.asarray(total)), x.dtype)

    return sum_
