"""The one `import triton` of the library, and the one place where kernel launches can be redirected.

Where Triton is not installed, kernels are inert objects and the references still run. A launch `kernel[grid](...)` goes
to the GPU unless a launcher is active (see `launching`): the interpreter, the ahead-of-time compiler, or `skip`, with
which a page's own forward function serves as its shape function.
"""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton.language as tl
    from triton import __version__ as _version
    from triton.errors import TritonError
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    MISSING: str | None = None
except ImportError as error:
    MISSING = f"Triton is not installed ({error})"

try:  # Gluon is experimental: it changes with every version of Triton
    from triton._C.libtriton import ir as gl_ir
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.experimental.gluon.language._core import builtin as gl_builtin
    from triton.experimental.gluon.language.nvidia import hopper as gl_hopper
    from triton.experimental.gluon.language.nvidia.ampere import async_copy as gl_async_copy
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    # The features that our kernels need and that not every version has.
    HAS_GLUON = (
        "worker_num_regs" in inspect.signature(gl.warp_specialize).parameters
        and hasattr(gl_hopper, "warpgroup_mma_wait")
        and hasattr(gl_ir, "DESCRIPTOR_REDUCE_KIND")
    )
except ImportError:
    HAS_GLUON = False


@dataclass(frozen=True)
class Launcher:
    """Stands in for the GPU: handles launches, and says which GPU tiles are chosen for."""

    launch: Callable[..., Any]  # (kernel, grid, *args, **kwargs)
    arch: int = 0  # compute capability times ten; 0 asks for the most conservative tiles
    multiprocessors: int = 1  # so that persistent programs stride even on small tensors
    gluon: bool = True  # whether it takes kernels in Gluon


def profiler() -> Any:
    """Returns Proton, Triton's profiler. It is imported only here, since it hooks into every launch."""
    import triton.profiler

    return triton.profiler


_launcher: ContextVar[Launcher | None] = ContextVar("launcher", default=None)
# For shape functions. With so many multiprocessors a symbolic size is never compared with their number.
skip = Launcher(lambda kernel, grid, *args, **kwargs: None, multiprocessors=1 << 30)


def launcher() -> Launcher | None:
    """Returns the active launcher; None if kernels are launched on the GPU."""
    return _launcher.get()


class launching:  # a function in use, and a class because a generator would cost each launch 2 us more
    """A context in which every launch of this thread goes to `by`."""

    __slots__ = ("_by", "_token")

    def __init__(self, by: Launcher | None) -> None:
        self._by = by

    def __enter__(self) -> None:
        self._token = _launcher.set(self._by)

    def __exit__(self, *raised: object) -> None:
        _launcher.reset(self._token)


_in_order: ContextVar[bool] = ContextVar("in_order", default=False)


@contextlib.contextmanager
def launching_in_order() -> Iterator[None]:
    """A context in which no kernel of this thread starts before the one in front has ended, nor in graphs it records.

    For finding out whether a fault, or a gain, comes of early launches.
    """
    token = _in_order.set(True)
    try:
        yield
    finally:
        _in_order.reset(token)


if MISSING is None:

    class Kernel(JITFunction):
        """A Triton kernel whose launch a `Launcher` may take over."""

        def run(self, *args, grid, warmup, **kwargs):
            by = _launcher.get()
            if by is None or warmup:
                return super().run(*args, grid=grid, warmup=warmup, **kwargs)
            return by.launch(self, grid, *args, **kwargs)

    jit, VERSION = Kernel, _version
    # What Triton raises where a kernel cannot be compiled or launched; none of it is a RuntimeError.
    ERRORS: tuple[type[Exception], ...] = (TritonError,)

else:

    class _AbsentLanguage:
        class constexpr:
            def __init__(self, value: Any) -> None:
                self.value = value

    class _AbsentKernel:
        def __init__(self, fn: Callable, **options: Any) -> None:
            self.__name__, self.__doc__ = fn.__name__, fn.__doc__

        def __getitem__(self, grid: Any) -> Callable:
            by = _launcher.get()
            if by is skip:
                return lambda *args, **kwargs: None
            raise RuntimeError(f"{self.__name__} cannot run: {MISSING}; use kernels.load('reference')")

    jit, tl, TensorDescriptor = _AbsentKernel, _AbsentLanguage(), None  # type: ignore[assignment]
    VERSION, ERRORS = "none", ()


if HAS_GLUON:

    class GluonKernel(Kernel, GluonJITFunction):
        """A kernel written in Gluon, Triton's language of layouts, barriers and warps with roles of their own."""

    gluon_jit = GluonKernel

else:
    gluon_jit, gl, gl_hopper, gl_async_copy = jit, tl, None, None  # inert: kernels in Gluon are not launched then
    GluonDescriptor, gl_builtin, gl_ir = None, lambda function: function, None


class triton:  # under the name that kernels know: Triton's own functions take 5 us a call on the host
    """Plain versions of the functions that the host side of the pages uses."""

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << max(operator.index(n) - 1, 0).bit_length()


@functools.cache
def _properties(index: int | None) -> tuple[int, int]:
    device = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    # ROCm has numbers of its own: an MI250 (gfx90a) reports 9.0, and is no Hopper.
    capability = 0 if torch.version.hip else device.major * 10 + device.minor
    return capability, device.multi_processor_count


def arch(x: Tensor) -> int:
    """Returns ten times the compute capability of the GPU that runs kernels on x: 80 for A100, 90 for H100.

    It is 0 in the interpreter and for a GPU that is not NVIDIA's; both take the most conservative tiles.
    """
    by = _launcher.get()
    return by.arch if by else _properties(x.device.index)[0]


# The architecture whose tiles another takes. sm_89, 120 and 121 have the matrix instructions of sm_86 and its shared
# memory, 101,376 bytes for a program and hardly more for a multiprocessor; sm_87 is like sm_80, sm_103 like sm_100.
_TILES_OF = {80: 80, 87: 80, 86: 86, 89: 86, 120: 86, 121: 86, 90: 90, 100: 100, 103: 100}


def tile_arch(arch: int) -> int:
    """Returns the one of 80, 86, 90 and 100 whose tiles an architecture takes; 0, the most conservative, if unknown."""
    return _TILES_OF.get(arch, 0)


def starts_early(x: Tensor) -> bool:
    """Whether a kernel may be launched on x's GPU before the one in front of it has ended: see prims.await_inputs."""
    return arch(x) >= 90 and not _in_order.get()


def multiprocessors(x: Tensor) -> int:
    """Returns the number of streaming multiprocessors of the GPU that runs kernels on x."""
    by = _launcher.get()
    return by.multiprocessors if by else _properties(x.device.index)[1]
