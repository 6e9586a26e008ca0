"""The one `import triton` of the library, and the one place where the launch of a kernel can be taken over.

Where Triton is not installed the kernels are inert objects and the references still run. A launch `kernel[grid](...)`
goes to the GPU unless a launcher is in force (see `launching`): the interpreter, the ahead-of-time compiler, or `skip`,
which makes a page's own forward function serve as its shape function.
"""

import functools
import inspect
import operator
from collections.abc import Callable
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

try:  # Gluon is experimental: it comes and goes with the version of Triton, and its pages name those they are fit for
    from triton._C.libtriton import ir as gl_ir
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.experimental.gluon.language._core import builtin as gl_builtin
    from triton.experimental.gluon.language.nvidia import hopper as gl_hopper
    from triton.experimental.gluon.language.nvidia.ampere import async_copy as gl_async_copy
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    # What the pages need of it, which other versions had not, or not yet.
    HAS_GLUON = (
        "worker_num_regs" in inspect.signature(gl.warp_specialize).parameters
        and hasattr(gl_hopper, "warpgroup_mma_wait")
        and hasattr(gl_ir, "DESCRIPTOR_REDUCE_KIND")
    )
except ImportError:
    HAS_GLUON = False


@dataclass(frozen=True)
class Launcher:
    """Stands in for the GPU: what to do with a launch, and which GPU the page should choose its tiles for."""

    launch: Callable[..., Any]  # (kernel, grid, *args, **kwargs)
    arch: int = 0  # compute capability times ten; 0 asks for the most conservative tiles
    multiprocessors: int = 1  # so that persistent programs stride even on small tensors
    gluon: bool = True  # whether it takes kernels in Gluon


def profiler() -> Any:
    """Proton, Triton's profiler, which is imported no earlier: it hooks itself into every launch."""
    import triton.profiler

    return triton.profiler


_launcher: ContextVar[Launcher | None] = ContextVar("launcher", default=None)
# For shape functions. Without bound on the multiprocessors a symbolic size is never compared with their number.
skip = Launcher(lambda kernel, grid, *args, **kwargs: None, multiprocessors=1 << 30)


def launcher() -> Launcher | None:
    """The launcher in force, None when kernels go to the GPU."""
    return _launcher.get()


class launching:  # a function in use, and a class because a generator would cost each launch 2 us more
    """Send every launch of this thread to `by` until the block ends."""

    __slots__ = ("_by", "_token")

    def __init__(self, by: Launcher | None) -> None:
        self._by = by

    def __enter__(self) -> None:
        self._token = _launcher.set(self._by)

    def __exit__(self, *raised: object) -> None:
        _launcher.reset(self._token)


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
    gluon_jit, gl, gl_hopper, gl_async_copy = jit, tl, None, None  # inert: no version without Gluon is fit for them
    GluonDescriptor, gl_builtin, gl_ir = None, lambda function: function, None


class triton:  # under the name that kernels know: Triton's own functions take 5 us a call on the host
    """What the pages need of Triton outside kernels."""

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << max(operator.index(n) - 1, 0).bit_length()


@functools.cache
def _properties(index: int | None) -> tuple[int, int]:
    device = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    # ROCm numbers its own: an MI250 (gfx90a) calls itself 9.0, and has nothing of Hopper.
    capability = 0 if torch.version.hip else device.major * 10 + device.minor
    return capability, device.multi_processor_count


def arch(x: Tensor) -> int:
    """Compute capability times ten of the GPU that kernels on x run on: 80 for A100, 90 for H100.

    0 if they are interpreted, and for a GPU that is not NVIDIA's: both take the most conservative tiles.
    """
    by = _launcher.get()
    return by.arch if by else _properties(x.device.index)[0]


# Whose tiles an architecture takes. sm_89, 120 and 121 have the shared memory (101,376 bytes for a program, hardly more
# for all of a multiprocessor) and the matrix instructions of sm_86; sm_87 those of sm_80; sm_103 those of sm_100.
_TILES_OF = {80: 80, 87: 80, 86: 86, 89: 86, 120: 86, 121: 86, 90: 90, 100: 100, 103: 100}


def tile_arch(arch: int) -> int:
    """Which of 80, 86, 90 and 100 an architecture takes its tiles from; if unknown 0, for the most conservative."""
    return _TILES_OF.get(arch, 0)


def multiprocessors(x: Tensor) -> int:
    """How many streaming multiprocessors that GPU has."""
    by = _launcher.get()
    return by.multiprocessors if by else _properties(x.device.index)[1]
