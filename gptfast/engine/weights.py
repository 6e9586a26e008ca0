"""A model's matrices as decoding wants them: converted once, and in as few bytes as stay exact enough.

A step reads every matrix once, and little else takes time. int8 has one scale per row (absmax / 127) and is the op
int8_linear; on a CPU, torch's product with such a matrix. There FBGEMM reads fp16 and sums in fp32. Relative errors of
one product of 768 normal numbers: fp16 2e-4, int8 8e-3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from gptfast.model import GPT, Linear
from kernels.int8_linear import quantize
from kernels.op import require

Weights = Literal["auto", "model", "float16", "int8"]
STAYS_IN_CACHE_BYTES = 16 * 2**20  # smaller models are not short of bandwidth, but of time per call


class Float16Linear(nn.Module):
    """x @ weight^T + bias for x (..., K) fp32 on a CPU: the matrix in fp16, sums in fp32 (FBGEMM)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        largest = linear.weight.abs().max().item()
        require(largest <= torch.finfo(torch.float16).max, f"weights: {largest} is beyond float16; use 'model'")
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().float(), bias)
        self.product = torch.ops.quantized.linear_dynamic_fp16.default

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.packed)


class Int8Linear(nn.Module):
    """x @ weight^T + bias for x (..., K): the matrix in int8, one scale per row, by the op `product`."""

    def __init__(self, linear: nn.Linear, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.scale = quantize(linear.weight.detach())
        self.bias, self.product = None if linear.bias is None else linear.bias.detach(), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.scale, self.bias)


class Int8OnCPU(nn.Module):
    """The same for x (..., K) fp32 on a CPU, by torch's own product; x and the scales are rounded to bf16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = quantize(weight)[1].bfloat16()  # what the product multiplies by
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        y = y.float() if self.bias is None else y + self.bias  # bf16 + fp32 is fp32
        return y.view(*x.shape[:-1], -1)


def choose_weights(model: GPT) -> tuple[Weights, str]:
    """How the matrices of `model` are best read on its device, and why, in one line. Not timed: the same every run."""
    device = model.lm_head.weight.device
    if device.type != "cpu":
        return "model", f"{device.type} computes in it"
    if matrix_bytes(model, "model") < STAYS_IN_CACHE_BYTES:
        return "model", "the matrices stay in the CPU's cache"
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return "model", "this CPU has no FBGEMM"
    return "float16", "half the bytes, and this CPU sums them in float32 (FBGEMM)"


def matrix_bytes(model: GPT, weights: Weights) -> int:
    """Bytes of the matrices of `model` in that form, all of which a step reads."""
    itemsize = {"model": model.dtype.itemsize, "float16": 2, "int8": 1}[weights]
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear)) * itemsize


def converted(model: GPT, weights: Weights) -> GPT:
    """`model` for inference with its matrices in that form; it shares with `model` all that did not change.

    "model": the dtype of the model's activations, what Linear would cast to at every call. Raises ValueError for a form
    that cannot run on the model's device.
    """
    require(weights in ("model", "float16", "int8"), f"weights: expected model, float16 or int8, got {weights!r}")
    on_cpu = model.lm_head.weight.device.type == "cpu"
    if weights == "float16":
        require(on_cpu, "weights: float16 matrices are for CPUs; use 'model' or 'int8'")
        engine = torch.backends.quantized.engine
        require(engine in ("x86", "fbgemm"), f"weights: float16 needs FBGEMM, this torch has {engine}; use 'model'")
    by_op = weights == "int8" and not (on_cpu and model.ops.chosen["int8_linear"][0] == "reference")

    def convert(linear: Linear) -> nn.Module:
        if weights == "model":
            return _cast(linear, model.dtype)
        if by_op:
            return Int8Linear(linear, model.ops.int8_linear)
        return {"float16": Float16Linear, "int8": Int8OnCPU}[weights](linear)

    shared = {id(x): x for x in (*model.parameters(), *model.buffers(), model.ops)}
    twin = copy.deepcopy(model, shared).eval()
    if weights != "model" and not by_op:
        twin.dtype = torch.float32
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                setattr(parent, name, convert(child))
    return twin


@torch.no_grad()
def refresh(twin: GPT, model: GPT) -> None:
    """The weights of `model` as they are now into its `converted` twin, where those of the twin lie."""
    for name, module in twin.named_modules():
        if not isinstance(module, (Linear, Float16Linear, Int8Linear, Int8OnCPU)):
            continue  # it shares its parameters
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        if isinstance(module, Linear):
            for mine, theirs in zip(module.parameters(), linear.parameters(), strict=True):
                if mine.data_ptr() != theirs.data_ptr():
                    mine.copy_(theirs)
        elif isinstance(module, Float16Linear):
            module.packed = Float16Linear(linear).packed
        else:
            fresh = Int8Linear(linear, module.product) if isinstance(module, Int8Linear) else Int8OnCPU(linear)
            module.weight.copy_(fresh.weight)
            module.scale.copy_(fresh.scale)
            if module.bias is not None and fresh.bias is not None:
                module.bias.copy_(fresh.bias)


def _cast(linear: Linear, dtype: torch.dtype) -> Linear:
    twin = Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    for name, p in linear.named_parameters():
        setattr(twin, name, nn.Parameter(p.detach().to(dtype), requires_grad=False))
    return twin
