"""Training in 8-bit floats: the large linear maps of the blocks multiply numbers of 8 bits, forward and backward.

    converted, left = convert(model, way("cuda"))   # before torch.compile; the parameters stay the same fp32 tensors

    y  = s_x s_w · x8 w8^T      x8 = e4m3(x / s_x)   w8 = e4m3(w / s_w)      s = max |.| / the format's largest number
    dx = s_g s_w · g8 w8        g8 = e5m2(g / s_g)
    dw = s_g s_x · g8^T x8      x: (M, K)   w: (N, K)   y and its gradient g: (M, N)

One scale for a whole tensor, of its numbers now ("tensorwise, dynamic"). e4m3 is the finer format, e5m2 the wider one,
which gradients need (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433). Sums are in fp32. Nothing
is read back from the device. NaN and Inf of an input make all of the result NaN, which the guard of training sees.

Two ways, chosen by a value: "scaled_mm", cuBLAS on the tensor cores of sm_89 and newer, and "emulated", which rounds to
the same 8 bits and multiplies in fp32, on any device: the definition that the first is held to. What is kept for the
backward pass is 8 bits wide in both.

How far off: rounding moves a number a by at most U |a| + s Q, where U is half a step of the mantissa, 2^-4 in e4m3 and
2^-3 in e5m2, and Q half the smallest number, 2^-10 and 2^-17. A product of A and B^T is therefore off by no more than
E_A |B|^T + |A| E_B^T + E_A E_B^T. As the roundings of independent numbers are independent, its relative error is in
fact about the root of the summed squares of theirs, 0.036 for e4m3 and 0.072 for e5m2 at most: 2^-3 / sqrt(12) is the
deviation of a rounding to a step of 2^-3, and a number is at least 1 where that is its step.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import UserError
from .model import GPT, Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 128  # of either size of a matrix: below, rounding and transposing cost more than the product saves
MULTIPLE = 16  # of both sizes, in bytes: what the tensor cores' instruction takes
OLDEST = (8, 9)  # compute capability with 8-bit floats
FLOOR = 2.0**-100  # of the largest magnitude that a scale is made of: a tensor of zeros stays one

Way = Literal["scaled_mm", "emulated"]


class Eighth(NamedTuple):
    """scale * values: a tensor rounded to 8 bits, and its scale () fp32."""

    values: Tensor
    scale: Tensor


def way(device: str) -> Way:
    """How `device` multiplies numbers of 8 bits. Raises UserError for a GPU that cannot; a CPU emulates it."""
    kind = torch.device(device).type
    if kind == "cpu":
        return "emulated"
    if kind != "cuda" or torch.version.hip is not None:
        raise UserError(f"--fp8 needs an NVIDIA GPU, and {device} is none; leave it out")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        major, minor = capability
        raise UserError(
            f"--fp8: {torch.cuda.get_device_name(device)} (sm_{major}{minor}) has no 8-bit floats, which came with "
            "sm_89 (RTX 40, L4, H100); leave it out"
        )
    return "scaled_mm"


def takes(linear: torch.nn.Linear) -> bool:
    """Whether a linear map is large enough, and of sizes that the tensor cores take."""
    sizes = linear.in_features, linear.out_features
    return min(sizes) >= SMALLEST and all(size % MULTIPLE == 0 for size in sizes)


def convert(model: GPT, way: Way) -> tuple[list[str], list[str]]:
    """Makes the large linear maps of the blocks multiply in 8 bits while training, in place.

    Returns the names of those and of the ones that stay as they are, the head among them: the loss multiplies it, in
    pieces, and never makes all of its logits.
    """
    converted: list[str] = []
    left = ["lm_head"]
    for name, parent in list(model.transformer["h"].named_modules(prefix="transformer.h")):
        for child_name, child in list(parent.named_children()):
            if type(child) is Linear:
                if takes(child):
                    setattr(parent, child_name, Float8Linear(child, way))
                (converted if takes(child) else left).append(f"{name}.{child_name}")
    return converted, left


class Float8Linear(Linear):
    """A Linear, with the same parameters, that multiplies in 8-bit floats in training and as before in evaluation."""

    def __init__(self, linear: Linear, way: Way) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.way = linear.weight, linear.bias, way

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        if not self.training:
            return super().forward(x, with_bias)
        y = linear(x.reshape(-1, x.shape[-1]), self.weight, self.way).view(*x.shape[:-1], -1)
        return y + self.bias.to(y.dtype) if with_bias and self.bias is not None else y


def linear(x: Tensor, weight: Tensor, way: Way) -> Tensor:
    """x (M, K) times weight (N, K) transposed -> (M, N), x's dtype. Gradients are of the dtypes of x and weight."""
    return _Linear.apply(x, weight, way)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, way: Way) -> Tensor:
        x8, w8 = rounded(x, E4M3), rounded(weight, E4M3)
        ctx.save_for_backward(*x8, *w8)
        ctx.way, ctx.dtypes = way, (x.dtype, weight.dtype)
        return product(x8, w8, x.dtype, way, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, x_scale, w, w_scale = ctx.saved_tensors
        g8 = rounded(gradient, E5M2)
        of_x, of_weight = ctx.dtypes
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(g8, Eighth(w.t(), w_scale), of_x, ctx.way)
        if ctx.needs_input_grad[1]:
            dw = product(Eighth(g8.values.t(), g8.scale), Eighth(x.t(), x_scale), of_weight, ctx.way)
        return dx, dw, None


def rounded(x: Tensor, dtype: torch.dtype) -> Eighth:
    """x, rounded to `dtype` (E4M3 or E5M2) after division by one scale, by which its largest magnitude just fits."""
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = torch.finfo(dtype).max
    scale = torch.linalg.vector_norm(x, math.inf, dtype=wide).clamp(min=FLOOR) / largest
    # A quotient may be a rounding of fp32 above the largest number, but that is still the nearest of 8 bits.
    return Eighth((x.to(wide) / scale).to(dtype), scale.float())


def product(a: Eighth, b: Eighth, dtype: torch.dtype, way: Way, *, fast: bool = False) -> Tensor:
    """a (M, K) times b (N, K) transposed -> (M, N) of `dtype`, summed in fp32; `fast`: less exactly on a GPU."""
    if way == "emulated":
        wide = torch.promote_types(dtype, torch.float32)
        return (a.values.to(wide) @ b.values.to(wide).t() * (a.scale * b.scale)).to(dtype)
    rows, columns = _in_rows(a.values), _in_rows(b.values)
    return torch._scaled_mm(
        rows, columns.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=dtype, use_fast_accum=fast
    )  # fmt: skip


def _in_rows(values: Tensor) -> Tensor:
    """Rows of consecutive bytes, as the instruction wants both factors; zeros fill them up to a multiple of 16."""
    missing = -values.shape[1] % MULTIPLE
    if missing:
        values = F.pad(values.view(torch.uint8), (0, missing)).view(values.dtype)
    return values.contiguous()
