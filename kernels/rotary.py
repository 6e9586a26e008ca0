"""Rotary position embedding of queries and keys, with an optional RMS norm of every head vector.

    xhat = x / sqrt(mean_d(x^2) + eps)  if qk_norm else  x

    half-split:    (a, b) = xhat[: D/2], xhat[D/2 :]        interleaved:    (a, b) = xhat[0::2], xhat[1::2]
    y_a = scale * (a * cos - b * sin)                       y_b = scale * (b * cos + a * sin)

    The rotation is orthogonal: it may come before or after the norm; its gradient is the rotation by minus the angle.
    g_a = scale * (dy_a * cos + dy_b * sin)                 g_b = scale * (dy_b * cos - dy_a * sin)
    dx = rstd * (g - xhat * mean_d(g * xhat))  if qk_norm else  g

q: (B, T, H, D)   k: (B, T, G, D)   cos, sin: (T, D/2), of position * base^(-2i / D); for decoding, slices of a table

Su et al., "RoFormer", arXiv:2104.09864; half-split as in GPT-NeoX and Llama, interleaved as in the paper. QK-norm:
Henry et al., "Query-Key Normalization for Transformers", arXiv:2010.04245.
"""

from typing import Any

import torch
from torch import Tensor

from ._triton import jit, tl
from .op import Cost, Op, changed, check_eps, differentiable, no_tensor, traced
from .prims import require_kernel_dtype


def rotary_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    qk_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, D) and k (B, T, G, D) by the angles whose cos and sin are (T, D/2). Returns their dtype.

    Computes in at least fp32. With `qk_norm` every head vector has unit root mean square (no weight) before `scale`.
    """
    _check(q, k, cos, sin, eps)
    wide = torch.promote_types(q.dtype, torch.float32)
    c, s = cos.to(wide)[:, None, :], sin.to(wide)[:, None, :]  # (T, 1, D/2): over batch and heads

    def rotated(x: Tensor) -> Tensor:
        a, b = _pairs(_normalized(x.to(wide), eps) if qk_norm else x.to(wide), interleaved)
        return (scale * _joined(a * c - b * s, b * c + a * s, interleaved)).to(x.dtype)

    return rotated(q), rotated(k)


def rotary_cpu(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    qk_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute rotary_reference on a CPU in fewer passes, forward and backward; the reference, if tables are learned."""
    _check(q, k, cos, sin, eps)
    learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if learned or traced():  # a compiler fuses the passes of the reference, and torch.func differentiates it
        return rotary_reference(q, k, cos, sin, qk_norm=qk_norm, eps=eps, scale=scale, interleaved=interleaved)
    wide = torch.promote_types(q.dtype, torch.float32)
    c, s = cos.to(wide)[:, None, :] * scale, sin.to(wide)[:, None, :] * scale
    c, s = _joined(c, c, interleaved), _joined(-s, s, interleaved)
    rotated = _OnCPU.apply(q.to(wide), k.to(wide), c, s, eps if qk_norm else None, interleaved)
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


def _rotated(x: Tensor, c: Tensor, s: Tensor, eps: float | None, interleaved: bool) -> Tensor:
    """Returns x (B, T, H, D), normalized unless eps is None, times cos, plus its pairs exchanged times -sin and sin."""
    y = x if eps is None else _normalized(x, eps)
    return torch.addcmul(y * c, _exchanged(y, interleaved), s)


class _OnCPU(torch.autograd.Function):
    """Rotates q and k, with the gradient from the head of this page written out.

    Twice differentiable, since backward computes the norm from x again.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, c: Tensor, s: Tensor, eps: float | None, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        return _rotated(q, c, s, eps, interleaved), _rotated(k, c, s, eps, interleaved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, eps, interleaved = inputs
        ctx.save_for_backward(*tensors)
        ctx.flags = eps, interleaved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, c, s = ctx.saved_tensors
        eps, interleaved = ctx.flags

        def back(dy: Tensor, x: Tensor) -> Tensor:
            g = _rotated(dy, c, -s, None, interleaved)  # by minus the angle
            if eps is None:
                return g
            rstd = _rstd(x, eps)
            mean = (g * x).mean(-1, keepdim=True)
            return torch.addcmul(g * rstd, x, rstd * rstd * rstd * mean, value=-1)

        dq, dk = map(back, gradients, inputs)
        return dq, dk, None, None, None, None


def _joined(a: Tensor, b: Tensor, interleaved: bool) -> Tensor:
    """Returns the vectors whose pairs are a and b: the inverse of _pairs."""
    return torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)


def _exchanged(x: Tensor, interleaved: bool) -> Tensor:
    """Returns x with its pairs exchanged: (b, a) where x is (a, b)."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(x.shape[-1] // 2, -1)


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _normalized(x: Tensor, eps: float) -> Tensor:
    return x * _rstd(x, eps)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    """Refuse wrong arguments. A message is made only where a check fails: decoding calls this in every layer."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        raise no_tensor(q=q, k=k, cos=cos, sin=sin)
    check_eps(eps)
    if q.dim() != 4 or q.shape[-1] % 2:
        raise ValueError(f"q: expected (B, T, H, D) with D even, got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    B, T, _, D = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (B, T, D):
        raise ValueError(f"k: expected (B, T, G, D) = ({B}, {T}, G, {D}) as q has it, got {tuple(k.shape)}")
    if k.dtype != q.dtype:
        raise ValueError(f"k: {k.dtype}, but q is {q.dtype}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (T, D // 2):
            expected = f"expected (T, D/2) = {(T, D // 2)}, got {tuple(table.shape)}"
            raise ValueError(f"{name}: {expected}; slice the table to q's positions")
        if not table.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {table.dtype}")
    for name, x in (("k", k), ("cos", cos), ("sin", sin)):
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, but q is on {q.device}")


@jit
def _load_pair(x_ptr, d, D, mask, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns both halves (BLOCK_M, BLOCK_D) of head vectors in fp32; x_ptr points to the vectors, d counts pairs."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_D)[None, :]
        x = tl.load(x_ptr + both, mask & (both < D), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_D, 2)))
    else:
        seen = mask & (d < D // 2)
        a = tl.load(x_ptr + d, seen, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + D // 2 + d, seen, other=0.0).to(tl.float32)
    return a, b


@jit
def _store_pair(y_ptr, a, b, d, D, mask, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store both halves of head vectors in the dtype of y."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_D)[None, :]
        y = tl.reshape(tl.join(a, b), (BLOCK_M, 2 * BLOCK_D))
        tl.store(y_ptr + both, y.to(y_ptr.dtype.element_ty), mask & (both < D))
    else:
        seen = mask & (d < D // 2)
        tl.store(y_ptr + d, a.to(y_ptr.dtype.element_ty), seen)
        tl.store(y_ptr + D // 2 + d, b.to(y_ptr.dtype.element_ty), seen)


@jit
def _rotate_rows(
    x_ptr, y_ptr, cos_ptr, sin_ptr, block, b, stride_b, stride_t, stride_h, T, H, D, eps, scale,
    QK_NORM: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotate x[b, t, h, :] -> y[b, t, h, :] for BLOCK_M consecutive (t, h)."""
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    t, h = (row // H).to(tl.int64), row % H  # divided in 32 bits, where it is quick
    mask = t < T
    d = tl.arange(0, BLOCK_D)[None, :]
    x_a, x_b = _load_pair(x_ptr + b * stride_b + t * stride_t + h * stride_h, d, D, mask, INTERLEAVED, BLOCK_M, BLOCK_D)
    if QK_NORM:
        rstd = tl.rsqrt((tl.sum(x_a * x_a, axis=1) + tl.sum(x_b * x_b, axis=1))[:, None] / D + eps)
        x_a, x_b = x_a * rstd, x_b * rstd
    cos = tl.load(cos_ptr + t * (D // 2) + d, mask & (d < D // 2), other=0.0).to(tl.float32) * scale
    sin = tl.load(sin_ptr + t * (D // 2) + d, mask & (d < D // 2), other=0.0).to(tl.float32) * scale
    y_a, y_b = x_a * cos - x_b * sin, x_b * cos + x_a * sin
    _store_pair(y_ptr + (b * T * H + row) * D, y_a, y_b, d, D, mask, INTERLEAVED, BLOCK_M, BLOCK_D)


@jit
def rotary_fwd_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, T, H, G, D, eps, scale,
    QK_NORM: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program rotates BLOCK_M head vectors of one sequence; programs of queries come before those of keys."""
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q_blocks = tl.cdiv(T * H, BLOCK_M)
    if block < q_blocks:
        _rotate_rows(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr, block, b, q_stride_b, q_stride_t, q_stride_h, T, H, D, eps, scale,
            QK_NORM, INTERLEAVED, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    else:
        _rotate_rows(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr, block - q_blocks, b, k_stride_b, k_stride_t, k_stride_h, T, G, D,
            eps, scale, QK_NORM, INTERLEAVED, BLOCK_M, BLOCK_D,
        )  # fmt: skip


@jit
def _rotate_rows_back(
    dy_ptr, x_ptr, dx_ptr, cos_ptr, sin_ptr, block, b, dy_stride_b, dy_stride_t, dy_stride_h,
    stride_b, stride_t, stride_h, T, H, D, eps, scale,
    QK_NORM: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Differentiate dy[b, t, h, :] -> dx[b, t, h, :] for BLOCK_M consecutive (t, h)."""
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    t, h = (row // H).to(tl.int64), row % H  # divided in 32 bits, where it is quick
    mask = t < T
    d = tl.arange(0, BLOCK_D)[None, :]
    cos = tl.load(cos_ptr + t * (D // 2) + d, mask & (d < D // 2), other=0.0).to(tl.float32) * scale
    sin = tl.load(sin_ptr + t * (D // 2) + d, mask & (d < D // 2), other=0.0).to(tl.float32) * scale
    dy_rows = dy_ptr + b * dy_stride_b + t * dy_stride_t + h * dy_stride_h
    dy_a, dy_b = _load_pair(dy_rows, d, D, mask, INTERLEAVED, BLOCK_M, BLOCK_D)
    g_a, g_b = dy_a * cos + dy_b * sin, dy_b * cos - dy_a * sin
    if QK_NORM:
        x_rows = x_ptr + b * stride_b + t * stride_t + h * stride_h
        x_a, x_b = _load_pair(x_rows, d, D, mask, INTERLEAVED, BLOCK_M, BLOCK_D)
        rstd = tl.rsqrt((tl.sum(x_a * x_a, axis=1) + tl.sum(x_b * x_b, axis=1))[:, None] / D + eps)
        x_a, x_b = x_a * rstd, x_b * rstd
        mean_gx = (tl.sum(g_a * x_a, axis=1) + tl.sum(g_b * x_b, axis=1))[:, None] / D
        g_a, g_b = rstd * (g_a - x_a * mean_gx), rstd * (g_b - x_b * mean_gx)
    _store_pair(dx_ptr + (b * T * H + row) * D, g_a, g_b, d, D, mask, INTERLEAVED, BLOCK_M, BLOCK_D)


@jit
def rotary_bwd_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr,
    dq_stride_b, dq_stride_t, dq_stride_h, dk_stride_b, dk_stride_t, dk_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, T, H, G, D, eps, scale,
    QK_NORM: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes the gradients of BLOCK_M head vectors; q and k are read only if they were normalized."""
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q_blocks = tl.cdiv(T * H, BLOCK_M)
    if block < q_blocks:
        _rotate_rows_back(
            dq_out_ptr, q_ptr, dq_ptr, cos_ptr, sin_ptr, block, b, dq_stride_b, dq_stride_t, dq_stride_h,
            q_stride_b, q_stride_t, q_stride_h, T, H, D, eps, scale, QK_NORM, INTERLEAVED, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    else:
        _rotate_rows_back(
            dk_out_ptr, k_ptr, dk_ptr, cos_ptr, sin_ptr, block - q_blocks, b, dk_stride_b, dk_stride_t, dk_stride_h,
            k_stride_b, k_stride_t, k_stride_h, T, G, D, eps, scale, QK_NORM, INTERLEAVED, BLOCK_M, BLOCK_D,
        )  # fmt: skip


# Elements per program and per warp: 16 per lane, which are two loads of 128 bits. Chosen from the compiled code
# (results/aot.json); not timed yet.
TILES = {"elements": 2048, "elements_per_warp": 512}


def tile(D: int) -> tuple[int, int, int]:
    """Returns the head vectors and pairs of a program's block, and its warps."""
    block_d = 1 << (int(D) // 2 - 1).bit_length()  # Triton's own arithmetic on the host takes 1.5 us a call
    block_m = max(1, TILES["elements"] // (2 * block_d))
    return block_m, block_d, max(1, min(8, 2 * block_m * block_d // TILES["elements_per_warp"]))


def _rows(x: Tensor) -> Tensor:
    """Returns x with unit last stride: x itself if it has that, so that a slice of a fused projection is not copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    qk_norm: bool, eps: float, scale: float, interleaved: bool, learned: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, cos, sin = _rows(q), _rows(k), cos.contiguous(), sin.contiguous()
    (B, T, H, D), G = q.shape, k.shape[2]
    q_out, k_out = (x.new_empty(x.shape) for x in (q, k))
    if q.numel() + k.numel():
        block_m, block_d, num_warps = tile(D)
        rotary_fwd_kernel[(-(-T * H // block_m) - (-T * G // block_m), B)](
            q, k, cos, sin, q_out, k_out, *q.stride()[:3], *k.stride()[:3], T, H, G, D, eps, scale,
            QK_NORM=qk_norm, INTERLEAVED=interleaved, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return q_out, k_out


def _backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    qk_norm: bool, eps: float, scale: float, interleaved: bool, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq_out, dk_out, tables = _rows(dq_out), _rows(dk_out), (cos.contiguous(), sin.contiguous())
    x_q, x_k = _rows(dq_out if q is None else q), _rows(dk_out if k is None else k)
    (B, T, H, D), G = dq_out.shape, dk_out.shape[2]
    dq, dk = (x.new_empty(x.shape) for x in (dq_out, dk_out))
    if dq.numel() + dk.numel():
        block_m, block_d, num_warps = tile(D)
        rotary_bwd_kernel[(-(-T * H // block_m) - (-T * G // block_m), B)](
            dq_out, dk_out, x_q, x_k, *tables, dq, dk, *dq_out.stride()[:3], *dk_out.stride()[:3],
            *x_q.stride()[:3], *x_k.stride()[:3], T, H, G, D, eps, scale,
            QK_NORM=qk_norm, INTERLEAVED=interleaved, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    if not learned:
        return dq, dk, cos.new_empty(0), sin.new_empty(0)
    dcos, dsin = _table_gradients((dq_out, dk_out), (x_q, x_k), qk_norm, eps, scale, interleaved)
    return dq, dk, dcos.to(cos.dtype), dsin.to(sin.dtype)


def _table_gradients(
    gradients: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor],
    qk_norm: bool, eps: float, scale: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns dcos and dsin (T, D/2) fp32, by plain torch: angles are learned too rarely to deserve a kernel."""
    sums: list[tuple[Tensor, Tensor]] = []
    for dy, x in zip(gradients, inputs, strict=True):
        a, b = _pairs(_normalized(x.float(), eps) if qk_norm else x.float(), interleaved)
        dy_a, dy_b = _pairs(dy.float(), interleaved)
        sums.append(((dy_a * a + dy_b * b).sum((0, 2)) * scale, (dy_b * a - dy_a * b).sum((0, 2)) * scale))
    (dcos_q, dsin_q), (dcos_k, dsin_k) = sums
    return dcos_q + dcos_k, dsin_q + dsin_k


def _save(inputs: tuple, output: tuple) -> tuple:
    q, k, cos, sin, qk_norm, *flags, learned = inputs
    needed = qk_norm or learned  # the gradient of a plain rotation does not need its argument
    return (q if needed else None, k if needed else None, cos, sin, qk_norm, *flags, learned)


_rotary = differentiable("rotary", _forward, _backward, _save, outputs=2)


def rotary_triton(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    qk_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute rotary_reference with the kernels of this page, one launch for q and k, on CUDA tensors.

    They are fp32, fp16 or bf16. Slices of a fused projection are not copied; results are contiguous. Deterministic.
    """
    _check(q, k, cos, sin, eps)
    require_kernel_dtype("q", q)
    learned = cos.requires_grad or sin.requires_grad
    return _rotary(q, k, cos, sin, qk_norm, eps, scale, interleaved, learned)


def inputs(
    B: int, T: int, H: int, G: int, D: int, *, qk_norm: bool = False, interleaved: bool = False, scale: float = 1.0,
    dtype: torch.dtype, device: str = "cpu",
) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
    """Draw q (B, T, H, D) and k (B, T, G, D); cos and sin (T, D/2) are of position * 10000^(-2i / D)."""
    q, k = (torch.randn(B, T, heads, D, dtype=dtype, device=device) for heads in (H, G))
    angle = torch.outer(torch.arange(T, device=device), 10000.0 ** (torch.arange(0, D, 2, device=device) / -D))
    keywords = changed(rotary_reference, qk_norm=qk_norm, interleaved=interleaved, scale=scale)
    return (q, k, angle.cos().to(dtype), angle.sin().to(dtype)), keywords


def cost(
    B: int, T: int, H: int, G: int, D: int, *, qk_norm: bool = False, interleaved: bool = False, scale: float = 1.0,
    itemsize: int,
) -> tuple[Cost, Cost]:  # fmt: skip
    """Count compulsory traffic: q and k in and out; backward their gradients, q and k if normalized; tables once."""
    elements = B * T * (H + G) * D
    return (
        Cost((6 if qk_norm else 3) * elements, (2 * elements + T * D) * itemsize),
        Cost((9 if qk_norm else 3) * elements, ((3 if qk_norm else 2) * elements + T * D) * itemsize),
    )


ROTARY = Op(
    name="rotary",
    reference=rotary_reference,
    cpu=rotary_cpu,
    triton=rotary_triton,
    inputs=inputs,
    parity=(
        dict(B=1, T=1, H=1, G=1, D=2), dict(B=1, T=0, H=2, G=1, D=8), dict(B=1, T=129, H=4, G=4, D=64),
        dict(B=2, T=7, H=6, G=3, D=80),
    ),
    domain=dict(B=range(1, 3), T=range(1, 20), H=(2, 4), G=(1, 2), D=range(2, 130, 2)),
    options=dict(qk_norm=(False, True), interleaved=(False, True), scale=(1.0, 1.7)),
    bench=(
        dict(B=16, T=1024, H=12, G=12, D=64), dict(B=16, T=1024, H=6, G=6, D=128), dict(B=8, T=2048, H=16, G=16, D=96),
        dict(B=4, T=4096, H=32, G=8, D=128), dict(B=4, T=4096, H=8, G=4, D=256),
    ),
    cost=cost,
    constants=frozenset((2, 3)),
    summary="(a, b) -> (a cos - b sin, b cos + a sin) of q and k, RMS-normalized first if asked",
)  # fmt: skip
