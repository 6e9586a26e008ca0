"""Cross-entropy of rows held in shared memory, in Gluon, for Hopper: logits are read once and written once.

A program fetches its whole row by asynchronous copies, chunk by chunk, and computes the maximum as they land. The sum
and the gradient then come from shared memory. Each thread reads only what it has copied itself.

NVIDIA H200, 2026-11-27, bf16 at 16384x50304: 807 us with the gradient in place, 4084 GB/s; 384 us for the loss alone,
4292 GB/s. With two passes over memory they take 1170 and 483 us. With the gradient a row must leave room for a second
program on the multiprocessor: at 4096x114688 one program reaches 903 GB/s where two passes reach 2559; the loss alone
reaches 3585.
"""

from torch import Tensor

from .._triton import HAS_GLUON, arch, gl, gl_async_copy, gluon_jit, launcher

BLOCK_N = 4096
CHUNKS = 28  # of 8 KiB: 224 KiB of the 227 that a program may have
CHUNKS_OF_TWO = 13  # of which a multiprocessor holds two programs


@gluon_jit
def _tanh(x):
    """Returns tanh(x), as tanh in prims.py."""
    square = x * x
    inner = 0.13332970 + square * (-0.053899970 + square * (0.021301694 - 0.0066535580 * square))
    near = x + x * square * (-0.33333328 + square * inner)
    size = gl.maximum(x, -x)
    far = 1.0 - 2.0 / (1.0 + gl.exp2(2.8853900817779268 * size))
    far = gl.where(x < 0.0, -far, far)
    return gl.where(size < 0.5, near, gl.where(x == x, far, x))


@gluon_jit
def _chunk(buffer, v, V, softcap, SOFTCAP: gl.constexpr, RAGGED: gl.constexpr, LAYOUT: gl.constexpr):
    """Returns a chunk of the row in fp32 under its softcap, and its share of the cap, as load_logits in rows.py.

    It is -inf from column V on, which only a RAGGED chunk has.
    """
    s = buffer.load(LAYOUT).to(gl.float32)
    share = s
    if SOFTCAP:
        share = _tanh(s / softcap)
        s = softcap * share
    if RAGGED:
        s = gl.where(v < V, s, float("-inf"))
    return s, share


@gluon_jit
def _sum_chunk(
    chunks, i, column, denominator, total, maximum, V, softcap,
    SOFTCAP: gl.constexpr, SMOOTHING: gl.constexpr, RAGGED: gl.constexpr, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Returns the sums by column of exp(s - maximum) and of s, with chunk i included."""
    v = i * BLOCK_N + column
    s = _chunk(chunks.index(i), v, V, softcap, SOFTCAP, RAGGED, LAYOUT)[0]
    denominator += gl.exp2((s - maximum) * 1.4426950408889634)
    if SMOOTHING:
        total += gl.where(v < V, s, 0.0) if RAGGED else s
    return denominator, total


@gluon_jit
def _write_chunk(
    row, chunks, i, column, target, maximum, shift, rise, even, pull, N, V, softcap,
    SOFTCAP: gl.constexpr, SMOOTHING: gl.constexpr, RAGGED: gl.constexpr, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Write the gradient of chunk i: rise * softmax - even, minus `pull` at the target, times the cap's derivative."""
    v = i * BLOCK_N + column
    s, share = _chunk(chunks.index(i), v, V, softcap, SOFTCAP, RAGGED, LAYOUT)
    ds = rise * gl.exp2((s - maximum) * 1.4426950408889634 - shift)
    if SMOOTHING:
        ds -= even
    if (target >= i * BLOCK_N) & (target < (i + 1) * BLOCK_N):
        ds = gl.where(v == target, ds - pull, ds)
    if SOFTCAP:
        ds *= (1.0 - share) * (1.0 + share)
    if RAGGED:
        ds = gl.where(v < V, ds, 0.0)
    gl.store(row + v, ds.to(row.dtype.element_ty), v < N)


@gluon_jit
def cross_entropy_rows_kernel_hopper(
    logits_ptr, targets_ptr, scale_ptr, loss_ptr, maximum_ptr, log_sum_ptr, logits_stride_m, scale_stride_m, N, V,
    ignore_index, label_smoothing, z_loss, softcap,
    SOFTCAP: gl.constexpr, SMOOTHING: gl.constexpr, GRADIENT: gl.constexpr, FULL: gl.constexpr, CHUNKS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """One program computes for one row what cross_entropy_rows_kernel does, with the row in shared memory.

    In the first FULL of its CHUNKS all of the BLOCK_N columns count.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    dtype: gl.constexpr = logits_ptr.dtype.element_ty
    LOG2_E: gl.constexpr = 1.4426950408889634
    m = gl.program_id(0).to(gl.int64)
    row = logits_ptr + m * logits_stride_m
    column = gl.arange(0, BLOCK_N, LAYOUT)
    target = gl.load(targets_ptr + m).to(gl.int64)
    if target == ignore_index:
        gl.store(loss_ptr + m, 0.0)
        gl.store(maximum_ptr + m, 0.0)
        gl.store(log_sum_ptr + m, 0.0)
        if GRADIENT:
            zeros = gl.zeros([BLOCK_N], dtype, LAYOUT)
            for i in gl.static_range(CHUNKS):
                v = i * BLOCK_N + column
                gl.store(row + v, zeros, v < N)
    else:
        # fetch the row
        chunks = gl.allocate_shared_memory(dtype, [CHUNKS, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        for i in gl.static_range(CHUNKS):
            v = i * BLOCK_N + column
            gl_async_copy.async_copy_global_to_shared(chunks.index(i), row + v, v < N)
            gl_async_copy.commit_group()
        known = (target >= 0) & (target < V)
        chosen = gl.load(row + target, known, 0.0).to(gl.float32)
        if SOFTCAP:
            chosen = softcap * _tanh(chosen / softcap)
        chosen = gl.where(known, chosen, float("nan"))

        # maximum, as the chunks land
        largest = gl.full([BLOCK_N], float("-inf"), gl.float32, LAYOUT)
        for i in gl.static_range(CHUNKS):
            gl_async_copy.wait_group(CHUNKS - 1 - i)
            s = _chunk(chunks.index(i), i * BLOCK_N + column, V, softcap, SOFTCAP, i >= FULL, LAYOUT)[0]
            largest = gl.maximum(largest, s)
        maximum = gl.max(largest, 0)

        # sum of exponentials; under a cap in a real loop, since unrolled it would take all registers
        denominator = gl.zeros([BLOCK_N], gl.float32, LAYOUT)
        total = gl.zeros([BLOCK_N], gl.float32, LAYOUT)
        if SOFTCAP:
            for i in range(CHUNKS):
                denominator, total = _sum_chunk(
                    chunks,
                    i,
                    column,
                    denominator,
                    total,
                    maximum,
                    V,
                    softcap,
                    SOFTCAP,
                    SMOOTHING,
                    True,
                    LAYOUT,
                    BLOCK_N,
                )
        else:
            for i in gl.static_range(CHUNKS):
                denominator, total = _sum_chunk(
                    chunks, i, column, denominator, total, maximum, V, softcap, SOFTCAP, SMOOTHING, i >= FULL, LAYOUT,
                    BLOCK_N,
                )  # fmt: skip
        log_sum = gl.log2(gl.sum(denominator, 0)) / LOG2_E

        # loss
        lse = maximum + log_sum
        loss = log_sum - (chosen - maximum)
        if SMOOTHING:
            mean = gl.sum(total, 0) / V
            loss = (1.0 - label_smoothing) * loss + label_smoothing * (log_sum - (mean - maximum))
        loss += z_loss * lse * lse
        log_sum = gl.where(known, log_sum, float("nan"))
        gl.store(loss_ptr + m, loss)
        gl.store(maximum_ptr + m, maximum)
        gl.store(log_sum_ptr + m, log_sum)

        # gradient
        if GRADIENT:
            scale = gl.load(scale_ptr + m * scale_stride_m)
            rise = scale * (1.0 + 2.0 * z_loss * (maximum + log_sum))
            even = scale * label_smoothing / V
            pull = scale * (1.0 - label_smoothing)
            shift = log_sum * LOG2_E
            if SOFTCAP:
                for i in range(CHUNKS):
                    _write_chunk(
                        row, chunks, i, column, target, maximum, shift, rise, even, pull, N, V, softcap, SOFTCAP,
                        SMOOTHING, True, LAYOUT, BLOCK_N,
                    )  # fmt: skip
            else:
                for i in gl.static_range(CHUNKS):
                    _write_chunk(
                        row, chunks, i, column, target, maximum, shift, rise, even, pull, N, V, softcap, SOFTCAP,
                        SMOOTHING, i >= FULL, LAYOUT, BLOCK_N,
                    )  # fmt: skip


def fits(logits: Tensor, gradient: bool) -> bool:
    """Returns whether the kernel takes logits (M, N): 16 bits, rows that fit and start at 16 bytes, Hopper, Gluon."""
    by = launcher()
    if not HAS_GLUON or (by is not None and not by.gluon) or arch(logits) != 90:
        return False
    N, stride = logits.shape[1], logits.stride(0)
    chunks = CHUNKS_OF_TWO if gradient else CHUNKS
    fit = logits.dtype.itemsize == 2 and N <= chunks * BLOCK_N and N % 16 == 0 and stride % 16 == 0
    return fit and logits.data_ptr() % 16 == 0


def launch_hopper(
    logits: Tensor, targets: Tensor, scale: Tensor | None, loss: Tensor, maximum: Tensor, log_sum: Tensor,
    criterion: tuple[int, float, float, float | None, int, str],
) -> None:  # fmt: skip
    """Fill loss, maximum and log_sum (M,); with a scale (M,) also write scale * gradient over the logits (M, N)."""
    (M, N), factor = logits.shape, loss if scale is None else scale
    ignore_index, label_smoothing, z_loss, softcap, V, _ = criterion
    cross_entropy_rows_kernel_hopper[(M,)](
        logits, targets, factor, loss, maximum, log_sum, logits.stride(0), factor.stride(0), N, V,
        ignore_index, label_smoothing, z_loss, softcap or 1.0,
        SOFTCAP=softcap is not None, SMOOTHING=label_smoothing > 0, GRADIENT=scale is not None,
        FULL=V // BLOCK_N, CHUNKS=-(-N // BLOCK_N), BLOCK_N=BLOCK_N, num_warps=8,
    )  # fmt: skip
