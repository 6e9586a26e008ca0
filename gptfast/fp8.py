"""Training in 8-bit floats: the large linear layers of the blocks multiply in 8 bits, forward and backward.

    converted, rest = convert(model, way("cuda"))   # before torch.compile; the parameters stay the same fp32 tensors

    y  = s_x s_w · x8 w8^T      x8 = e4m3(x / s_x)   w8 = e4m3(w / s_w)      s = max |.| / the format's largest number
    dx = s_g s_w · g8 w8        g8 = e5m2(g / s_g)
    dw = s_g s_x · g8^T x8      x: (M, K)   w: (N, K)   y and its gradient g: (M, N)

Each tensor has one scale, from its current values ("tensorwise, dynamic"). e4m3 has more precision, e5m2 more range,
which gradients need (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433). Sums are in fp32. The
host never waits for the device. A NaN or Inf in an input makes the whole result NaN, which the training guard detects.

Two implementations, chosen by `way`: "scaled_mm", cuBLAS on the tensor cores of sm_89 and newer; and "emulated", which
rounds to the same 8 bits and multiplies in fp32 on any device, the reference for the first. Both save 8-bit tensors for
the backward pass.

Error bound: rounding moves a number a by at most U |a| + s Q, where U is half a step of the mantissa, 2^-4 in e4m3 and
2^-3 in e5m2, and Q half the smallest number, 2^-10 and 2^-17. A product A B^T is therefore off by at most
E_A |B|^T + |A| E_B^T + E_A E_B^T. In practice roundings are independent, so its relative error is about the root of the
sum of squares of the factors' relative errors, at most 0.036 for e4m3 and 0.072 for e5m2: rounding to a step of 2^-3
has the standard deviation 2^-3 / sqrt(12), and a number with that step is at least 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.op import refuse_second_derivative

from .errors import UserError
from .model import GPT, Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 128  # least size of either dimension: below, rounding and transposing cost more than the product saves
MULTIPLE = 16  # of both dimensions, in bytes: required by the tensor cores' instruction
OLDEST = (8, 9)  # compute capability with 8-bit floats
FLOOR = 2.0**-100  # lower bound of the magnitude behind a scale, so that a tensor of zeros stays zero

Way = Literal["scaled_mm", "emulated"]


class Eighth(NamedTuple):
    """A tensor rounded to 8 bits and its scale () fp32; it stands for scale * values."""

    values: Tensor
    scale: Tensor


def way(device: str) -> Way:
    """Returns the implementation for `device`: a CPU emulates. Raises UserError for a GPU without 8-bit floats."""
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
    """Returns whether a linear layer is large enough and has dimensions that the tensor cores support."""
    sizes = linear.in_features, linear.out_features
    return min(sizes) >= SMALLEST and all(size % MULTIPLE == 0 for size in sizes)


def convert(model: GPT, way: Way) -> tuple[list[str], list[str]]:
    """Makes the large linear layers of the blocks multiply in 8 bits while training, in place.

    Returns the names of the converted layers and of those left as they are. The head is among the latter: the loss
    multiplies it in pieces and never holds all logits.
    """
    converted: list[str] = []
    unconverted = ["lm_head"]
    for name, parent in list(model.transformer["h"].named_modules(prefix="transformer.h")):
        for child_name, child in list(parent.named_children()):
            if type(child) is Linear:
                if takes(child):
                    setattr(parent, child_name, Float8Linear(child, way))
                (converted if takes(child) else unconverted).append(f"{name}.{child_name}")
    return converted, unconverted


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
    """Returns x (M, K) times weight (N, K) transposed: (M, N), x's dtype. Each gradient has its input's dtype."""
    return _Linear.apply(x, weight, way)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, way: Way) -> Tensor:
        x8, w8 = rounded(x, E4M3), rounded(weight, E4M3)
        ctx.save_for_backward(*x8, *w8)
        ctx.way, ctx.dtypes = way, (x.dtype, weight.dtype)
        return product(x8, w8, x.dtype, way, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_second_derivative("a product in 8 bits", "leave fp8 out")
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
    """Rounds x to `dtype` (E4M3 or E5M2) after dividing by one scale, with which its largest magnitude just fits."""
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = torch.finfo(dtype).max
    scale = torch.linalg.vector_norm(x, math.inf, dtype=wide).clamp(min=FLOOR) / largest
    # fp32 rounding may put a quotient just above the largest 8-bit number, which is still the nearest one.
    return Eighth((x.to(wide) / scale).to(dtype), scale.float())


def product(a: Eighth, b: Eighth, dtype: torch.dtype, way: Way, *, fast: bool = False) -> Tensor:
    """Returns a (M, K) times b (N, K) transposed, (M, N) `dtype`, summed in fp32; `fast`: less exact sums on a GPU."""
    if way == "emulated":
        wide = torch.promote_types(dtype, torch.float32)
        return (a.values.to(wide) @ b.values.to(wide).t() * (a.scale * b.scale)).to(dtype)
    rows, columns = _in_rows(a.values), _in_rows(b.values)
    return torch._scaled_mm(
        rows, columns.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=dtype, use_fast_accum=fast
    )  # fmt: skip


def _in_rows(values: Tensor) -> Tensor:
    """Returns contiguous rows, which the instruction needs, padded with zeros to a multiple of 16 bytes."""
    missing = -values.shape[1] % MULTIPLE
    if missing:
        values = F.pad(values.view(torch.uint8), (0, missing)).view(values.dtype)
    return values.contiguous()
