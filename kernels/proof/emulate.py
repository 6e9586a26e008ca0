"""Runs Gluon kernels for Hopper on CPU tensors, to find faults of their synchronization.

The roles of a program are threads, of which one runs at a time. At every operation that others can observe, a seeded
scheduler decides which role continues, or which copy lands; matrix products are computed when they are waited for, the
last moment that the hardware allows. So seeds give different runs, and one seed always gives the same run.

Races are found whatever the schedule: every role, copy and product has a vector clock (Mattern, "Virtual time and
global states of distributed systems", 1989) that barriers pass on, and an access to shared memory that no barrier
orders after the previous one is an error. So are a deadlock, a barrier with too many arrivals or with a phase that a
waiter missed, and a store that copies cannot see because a fence is missing.

Programs run one after another, registers are torch tensors, and layouts are ignored: order and values are emulated. Of
Gluon's language only what the kernels use is implemented.
"""

import contextlib
import inspect
import itertools
import random
import threading
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._triton import GluonDescriptor, GluonKernel, Launcher, gl, gl_async_copy, gl_hopper, launching, tl
from .interpret import OutOfBounds, interpreting


class ProtocolError(RuntimeError):
    """The roles of a program do not synchronize correctly."""


class _Stopped(BaseException):
    """Ends the roles of a program in which another has failed."""


Clock = dict[int, int]  # vector clock: the time of each role, copy and product that has certainly passed


def _join(clock: Clock, other: Clock) -> None:
    for agent, time in other.items():
        clock[agent] = max(clock.get(agent, 0), time)


class _Role:
    """One of the threads of a program."""

    def __init__(self, number: int, clock: Clock) -> None:
        self.number, self.clock = number, {**clock, number: 1}
        self.may_run = threading.Semaphore(0)
        self.until: Callable[[], bool] | None = None  # the condition it waits for
        self.awaits: tuple[_Barrier, int] | None = None  # the barrier it waits for, if any, and the parity
        self.products: list[_Product] = []  # not waited for yet
        self.fetches: list[list[Clock]] = [[]]  # copies into shared memory by group, the last not committed yet
        self.stores: list[Clock] = []  # copies out of shared memory, with their clocks once they have landed

    def tick(self) -> Clock:
        """Returns a copy of the clock, and advances it."""
        now = dict(self.clock)
        self.clock[self.number] += 1
        return now


class _Program:
    """The state that the roles of one program share, and the scheduler that decides which of them runs."""

    def __init__(self, index: Sequence[int], seed: str) -> None:
        self.index, self.random = index, random.Random(seed)
        self.products: list[int] = []  # the role that began each matrix product, in order
        self.haste = self.random.choice((0.05, 0.3, 0.9))  # probability that a copy lands before a role continues
        self.agents = itertools.count()
        self.running = _Role(next(self.agents), {})
        self.roles = [self.running]
        self.weights = {self.running: 1.0}
        self.copies: list[Callable[[], None]] = []  # started, not landed
        self.buffers: list[_Buffer] = []
        self.error: BaseException | None = None

    def step(self, until: Callable[[], bool] | None = None) -> None:
        """Let the scheduler choose who runs. Returns once the calling role is chosen and `until` holds."""
        me = self.running
        me.until = until
        self._choose()
        me.may_run.acquire()
        if self.error:
            raise _Stopped
        me.until = me.awaits = None

    def _choose(self) -> None:
        while not self.error:
            ready = [role for role in self.roles if role.until is None or role.until()]
            if self.copies and (not ready or self.random.random() < self.haste):
                self.copies.pop(self.random.randrange(len(self.copies)))()
            elif ready:
                (self.running,) = self.random.choices(ready, [self.weights[role] for role in ready])
                return self.running.may_run.release()
            elif self.roles:
                self.error = ProtocolError("deadlock: every role waits, and no copy is under way")
            else:
                return None
        for role in self.roles:
            role.may_run.release()

    def fork(self, functions: Sequence[Callable[[], None]]) -> None:
        """Run the functions as roles; returns when all have ended."""
        parent, children = self.running, []
        for function in functions:
            role = _Role(next(self.agents), parent.clock)
            self.weights[role] = 0.02 + self.random.random() ** 3  # some are slow
            children.append((role, threading.Thread(target=self._play, args=(role, function), daemon=True)))
        self.roles = [role for role, _ in children]
        for _, thread in children:
            thread.start()
        self._choose()
        for _, thread in children:
            thread.join()
        if self.error:
            raise self.error
        while self.copies:
            self.copies.pop()()
        for role, _ in children:
            _join(parent.clock, role.clock)
        self.running, self.roles = parent, [parent]

    @torch.no_grad()  # grad mode is per thread
    def _play(self, role: _Role, function: Callable[[], None]) -> None:
        role.may_run.acquire()
        try:
            if not self.error:
                function()
                if role.products or role.stores:
                    raise ProtocolError("a role ended with products or copies of its own under way")
        except _Stopped:
            pass
        except BaseException as error:  # of whatever kind: the thread that launched the kernel raises it
            self.error = self.error or error
        self.roles.remove(role)
        self._choose()


class _Barrier:
    """An mbarrier: a phase completes when all have arrived and all announced bytes have landed."""

    def __init__(self) -> None:
        self.count, self.pending, self.bytes, self.phases = 0, 0, 0, 0
        self.arrived: Clock = {}
        self.handed_on: Clock = {}

    def passes(self, parity: int) -> bool:
        return self.phases & 1 != parity

    def arrive(self, program: _Program, clock: Clock, count: int) -> None:
        if count > self.pending:
            raise ProtocolError("a barrier is arrived at more often than its count" if self.count else "no barrier yet")
        self.pending -= count
        _join(self.arrived, clock)
        self.complete_phase(program)

    def complete_phase(self, program: _Program) -> None:
        """Complete the phase if nothing is pending. Raises ProtocolError if a waiter has not seen the last one."""
        if self.pending or self.bytes:
            return
        if any(role.awaits and role.awaits[0] is self and self.passes(role.awaits[1]) for role in program.roles):
            raise ProtocolError("a phase of a barrier went by before one that waited for it had seen it")
        self.phases += 1
        self.pending = self.count
        _join(self.handed_on, self.arrived)


class _Buffer:
    """A tile of shared memory, and its latest accesses."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.tensor = torch.full(tuple(shape), torch.nan, dtype=dtype)
        self.written: Clock = {}
        self.read: Clock = {}
        self.fenced = True  # whether copies see what was stored from registers

    def reading(self, clock: Clock, agent: int) -> None:
        self._after(self.written, clock, "read before what is written there is certain to be")
        self.read[agent] = clock.get(agent, 1)

    def writing(self, clock: Clock, agent: int) -> None:
        self._after(self.written, clock, "written while another write may be under way")
        self._after(self.read, clock, "written while it may still be read")
        self.written, self.read = {agent: clock.get(agent, 1)}, {}

    @staticmethod
    def _after(accesses: Clock, clock: Clock, fault: str) -> None:
        if any(clock.get(agent, 0) < time for agent, time in accesses.items()):
            raise ProtocolError(f"race: shared memory is {fault}")


class _View:
    """A tile of shared memory in some shape."""

    def __init__(self, program: _Program, buffer: _Buffer, tensor: Tensor) -> None:
        self.program, self.buffer, self.tensor = program, buffer, tensor

    def reshape(self, shape: Sequence[int]) -> "_View":
        return _View(self.program, self.buffer, self.tensor.view(tuple(shape)))

    def permute(self, order: Sequence[int]) -> "_View":
        return _View(self.program, self.buffer, self.tensor.permute(tuple(order)))

    def slice(self, start: int, length: int, dim: int = 0) -> "_View":
        return _View(self.program, self.buffer, self.tensor.narrow(dim, int(start), length))

    def load(self, layout: Any) -> Tensor:
        self.program.step()
        role = self.program.running
        self.buffer.reading(role.clock, role.number)
        return self.tensor.clone()

    def store(self, value: Tensor) -> None:
        if (value.shape, value.dtype) != (self.tensor.shape, self.tensor.dtype):
            raise ProtocolError(f"a store of {value.dtype}{list(value.shape)} to {list(self.tensor.shape)}")
        self.program.step()
        role = self.program.running
        self.buffer.writing(role.tick(), role.number)
        self.buffer.fenced = False
        self.tensor.copy_(value)


class _Array:
    """The result of allocate_shared_memory: tiles, or barriers."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def index(self, i: Any) -> Any:
        return self.items[int(i)]


class _Product:
    """A matrix product in flight."""

    def __init__(self, agent: int, a: Any, b: _View, acc: Tensor | None) -> None:
        self.agent, self.a, self.b, self.acc = agent, a, b, acc
        self.value: Tensor | None = None

    def compute(self) -> None:
        a, b = (x.tensor if isinstance(x, _View) else x for x in (self.a, self.b))
        self.value = a.float() @ b.float()
        if self.acc is not None:
            self.value = self.value + (self.acc if isinstance(self.acc, Tensor) else self.acc.value)

    def _refuse(self, *_: Any) -> NoReturn:
        raise ProtocolError("a product of matrices is used before it has been waited for")

    __add__ = __sub__ = __mul__ = __getitem__ = __getattr__ = _refuse


class _Descriptor:
    """A tensor descriptor, as kernels use it."""

    def __init__(self, given: Any) -> None:
        self.tensor, self.layout = given.base.as_strided(given.shape, given.strides), given.layout
        nbytes = given.base.element_size() * torch.Size(given.block_shape).numel()
        self.block_type = types.SimpleNamespace(shape=list(given.block_shape), nbytes=nbytes)

    def overlap(self, corner: Sequence[Any], tile: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the parts of the tensor, from the corner on, and of the tile that overlap."""
        source = self.tensor
        for axis, (start, size) in enumerate(zip(map(int, corner), self.block_type.shape, strict=True)):
            length = max(0, min(size, source.shape[axis] - start))
            source, tile = source.narrow(axis, min(start, source.shape[axis]), length), tile.narrow(axis, 0, length)
        return source, tile


class _Pointer:
    """A pointer into a tensor, or a block of pointers."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset: Any) -> "_Pointer":
        return _Pointer(self.tensor, self.offset + offset)

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.tensor.dtype)

    def places(self, mask: Tensor | None, program: _Program, what: str) -> Tensor:
        """Returns the storage offsets of the elements that are not masked. Raises OutOfBounds."""
        offset = torch.as_tensor(self.offset)
        offsets = offset if mask is None else offset[torch.as_tensor(mask).expand(offset.shape)]
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size() - self.tensor.storage_offset()
        if offsets.numel() and not 0 <= offsets.min() <= offsets.max() < size:
            raise OutOfBounds(f"{what} out of bounds in program {program.index}")
        return offsets

    @property
    def flat(self) -> Tensor:
        """Returns the tensor's storage from its first element on, which offsets index."""
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size() - self.tensor.storage_offset()
        return self.tensor.as_strided((size,), (1,))

    def values(self, mask: Tensor | None, other: Any, program: _Program) -> Tensor:
        values = torch.full_like(torch.as_tensor(self.offset), other, dtype=self.tensor.dtype)
        there = self.flat[self.places(mask, program, "load")]
        return there if mask is None else values.masked_scatter(torch.as_tensor(mask).expand(values.shape), there)


class _Barriers:
    """Emulates gl_hopper.mbarrier."""

    def __init__(self, program: _Program) -> None:
        self.program = program

    MBarrierLayout = staticmethod(lambda: _Barriers)

    def init(self, barrier: _Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def expect(self, barrier: _Barrier, nbytes: int) -> None:
        self.program.step()
        barrier.bytes += nbytes
        barrier.arrive(self.program, self.program.running.tick(), 1)

    def arrive(self, barrier: _Barrier, *, count: int = 1, pred: Any = True) -> None:
        if not pred:
            return
        self.program.step()
        barrier.arrive(self.program, self.program.running.tick(), count)

    def wait(self, barrier: _Barrier, parity: int) -> None:
        role = self.program.running
        role.awaits = barrier, int(parity)
        self.program.step(lambda: barrier.passes(int(parity)))
        _join(role.clock, barrier.handed_on)


class _Copies:
    """Emulates gl_hopper.tma."""

    def __init__(self, program: _Program) -> None:
        self.program = program

    def async_copy_global_to_shared(
        self, source: _Descriptor, corner: Sequence, barrier: _Barrier, target: _View
    ) -> None:
        _same_shape(source, target)
        self.program.step()
        agent, clock = next(self.program.agents), self.program.running.tick()
        target.buffer.writing(clock, agent)
        target.tensor.fill_(torch.nan)  # until it lands

        def land() -> None:
            target.tensor.zero_()
            there, here = source.overlap(corner, target.tensor)
            here.copy_(there)
            barrier.bytes -= source.block_type.nbytes
            _join(barrier.arrived, {**clock, agent: 1})
            barrier.complete_phase(self.program)

        self.program.copies.append(land)

    def reduce_add(self, target: _Descriptor, corner: Sequence, source: _View) -> None:
        self.async_copy_shared_to_global(target, corner, source, add=True)

    def async_copy_shared_to_global(
        self, target: _Descriptor, corner: Sequence, source: _View, add: bool = False
    ) -> None:
        _same_shape(target, source)
        self.program.step()
        role, agent = self.program.running, next(self.program.agents)
        source.buffer.reading(role.tick(), agent)
        if not source.buffer.fenced:
            raise ProtocolError("a copy out of shared memory may not see what was stored there: no fence between them")
        landed: Clock = {}
        role.stores.append(landed)

        def land() -> None:
            there, here = target.overlap(corner, source.tensor)
            there.add_(here) if add else there.copy_(here)
            landed[agent] = 1

        self.program.copies.append(land)

    def store_wait(self, pendings: int) -> None:
        role = self.program.running
        self.program.step(lambda: sum(not landed for landed in role.stores) <= pendings)
        for landed in role.stores:
            _join(role.clock, landed)
        role.stores = [landed for landed in role.stores if not landed]


class _AsyncCopies:
    """Emulates gl_async_copy: copies in groups, which a role waits for in the order in which it committed them."""

    def __init__(self, program: _Program) -> None:
        self.program = program

    def async_copy_global_to_shared(self, target: _View, source: _Pointer, mask: Tensor | None = None) -> None:
        self.program.step()
        role, agent = self.program.running, next(self.program.agents)
        target.buffer.writing(role.tick(), agent)
        target.tensor.fill_(torch.nan)  # until it lands, and where it is masked
        landed: Clock = {}
        role.fetches[-1].append(landed)

        def land() -> None:
            target.tensor.copy_(source.values(mask, torch.nan, self.program))
            landed[agent] = 1

        self.program.copies.append(land)

    def commit_group(self) -> None:
        self.program.running.fetches.append([])

    def wait_group(self, num_outstanding: int = 0) -> None:
        role = self.program.running
        done = role.fetches[: max(0, len(role.fetches) - 1 - num_outstanding)]
        self.program.step(lambda: all(landed for group in done for landed in group))
        for group in done:
            for landed in group:
                _join(role.clock, landed)
            group.clear()


def _same_shape(descriptor: _Descriptor, view: _View) -> None:
    if descriptor.block_type.shape != list(view.tensor.shape):
        raise ProtocolError(f"a copy of a box {descriptor.block_type.shape} and a tile {list(view.tensor.shape)}")


class _Hopper:
    """Emulates triton.experimental.gluon.language.nvidia.hopper."""

    def __init__(self, program: _Program) -> None:
        self.program, self.mbarrier, self.tma = program, _Barriers(program), _Copies(program)

    def fence_async_shared(self) -> None:
        """Make this role's stores visible to copies."""
        for buffer in self.program.buffers:
            if self.program.running.number in buffer.written:
                buffer.fenced = True

    def warpgroup_mma(
        self, a: Any, b: _View, acc: Tensor, *, use_acc: bool = True, is_async: bool = False
    ) -> _Product | Tensor:
        self.program.step()
        role, agent = self.program.running, next(self.program.agents)
        for operand in (a, b):
            if isinstance(operand, _View):
                operand.buffer.reading(role.clock, agent)
                if not operand.buffer.fenced:
                    raise ProtocolError("a product may not see what was stored in shared memory: no fence between them")
        product = _Product(agent, a, b, acc if use_acc else None)
        role.products.append(product)
        self.program.products.append(role.number)
        return product if is_async else self.warpgroup_mma_wait(0, [product, a])[0]

    def warpgroup_mma_wait(self, outstanding: int, deps: Sequence[Any]) -> Any:
        """Returns deps with the values of finished products; operands in registers must be among deps until then."""
        self.program.step()
        role = self.program.running
        while len(role.products) > outstanding:
            product = role.products.pop(0)
            if isinstance(product.a, Tensor) and not any(product.a is dep for dep in deps):
                raise ProtocolError("registers that a product of matrices reads are given up before it is waited for")
            product.compute()
            role.clock[product.agent] = 1
        results = tuple(d.value if isinstance(d, _Product) and d.value is not None else d for d in deps)
        return results[0] if len(results) == 1 else results


def _language(program: _Program, grid: Sequence[int]) -> types.SimpleNamespace:
    """Returns triton.experimental.gluon.language on torch tensors. Scalars are Python's, or tensors without axes."""

    def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> _Array:
        if layout is _Barriers:
            return _Array([_Barrier() for _ in range(shape[0])])
        buffers = [_Buffer(shape[1:], dtype) for _ in range(shape[0])]
        program.buffers.extend(buffers)
        return _Array([_View(program, buffer, buffer.tensor) for buffer in buffers])

    def store(pointer: _Pointer, value: Any, mask: Tensor | None = None) -> None:
        places = pointer.places(mask, program, "store")
        value = torch.as_tensor(value, dtype=pointer.tensor.dtype).expand(torch.as_tensor(pointer.offset).shape)
        pointer.flat[places] = value if mask is None else value[mask]

    def load(pointer: _Pointer, mask: Tensor | None = None, other: Any = 0) -> Tensor:
        return pointer.values(mask, other, program)

    def warp_specialize(
        roles: Sequence[tuple[Callable, tuple]], warps: Sequence[int], registers: Sequence[int]
    ) -> None:
        program.fork([partial(function, *arguments) for function, arguments in roles])

    def layout(*parameters: Any, **_: Any) -> tuple:
        return parameters

    def pairwise(function: Callable) -> Callable:
        return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))

    return types.SimpleNamespace(
        float32=torch.float32, bfloat16=torch.bfloat16, int64=torch.int64,
        BlockedLayout=layout, SwizzledSharedLayout=layout, NVMMADistributedLayout=layout,
        NVMMASharedLayout=layout, DotOperandLayout=layout, SliceLayout=layout,
        range=lambda start, stop, **_: range(int(start), int(stop)),
        program_id=lambda axis: torch.tensor(program.index[axis], dtype=torch.int32),
        num_programs=lambda axis: grid[axis],
        static_range=range, cdiv=lambda a, b: -(-a // b),
        minimum=pairwise(torch.minimum), maximum=pairwise(torch.maximum), where=torch.where,
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        arange=lambda start, stop, layout: torch.arange(start, stop, dtype=torch.int32),
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2, log2=torch.log2, convert_layout=lambda x, layout: x,
        allocate_shared_memory=allocate_shared_memory, store=store, load=load, int32=torch.int32, num_warps=lambda: 4,
        warp_specialize=warp_specialize,
    )  # fmt: skip


# ---- launching


def emulating(
    seed: int = 0, arch: int = 90, watch: Callable[[list[int]], None] = lambda products: None
) -> contextlib.AbstractContextManager:
    """Returns a context that emulates every Gluon kernel this thread launches, and interprets every other.

    Tiles are chosen for a GPU of compute capability arch / 10. `watch` is called after each program with the roles that
    began its matrix products, in order; roles are numbered from 1 as warp_specialize lists them. Launches raise
    ProtocolError and interpret.OutOfBounds.
    """
    return launching(Launcher(partial(_launch, seed, watch), arch))


@torch.no_grad()
def _launch(seed: int, watch: Callable, kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
    if not isinstance(kernel, GluonKernel):
        with interpreting():
            return kernel[grid](*args, **kwargs)
    signature = inspect.signature(kernel.fn)
    known = {name: value for name, value in kwargs.items() if name in signature.parameters}  # no num_warps and such
    bound = signature.bind(*map(_argument, args), **known)
    bound.apply_defaults()
    grid = tuple(grid(bound.arguments) if callable(grid) else grid)
    for index in itertools.product(*map(range, grid)):
        program = _Program(index, f"{seed} {index}")
        language = _language(program, grid)
        _emulated(
            kernel, {gl: language, tl: language, gl_hopper: _Hopper(program), gl_async_copy: _AsyncCopies(program)}
        )(**bound.arguments)
        watch(program.products)
    return None


def _argument(value: Any) -> Any:
    if isinstance(value, GluonDescriptor):
        return _Descriptor(value)
    return _Pointer(value) if isinstance(value, Tensor) else value


def _emulated(kernel: Any, language: dict[types.ModuleType, Any]) -> Callable:
    """Returns a kernel's function with the emulated language in its globals, and in those of functions it calls."""
    done: dict[Callable, Callable] = {}

    def emulated(kernel: Any) -> Callable:
        fn = kernel.fn
        if fn not in done:
            scope: dict[str, Any] = {}
            done[fn] = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__)
            scope.update({name: replaced(fn.__globals__[name]) for name in _names(fn.__code__) & set(fn.__globals__)})
        return done[fn]

    def replaced(value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return language.get(value, value)
        if hasattr(value, "emulated"):
            return getattr(language[gl_hopper].tma, value.emulated)
        return emulated(value) if hasattr(value, "fn") else value

    return emulated(kernel)


def _names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
