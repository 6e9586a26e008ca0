"""A fault in the code path of each option is caught by the option sets that its op's declaration is tried with.

Without --chaos every value is tried with the first set that has it; with --chaos with every one until it is caught, and
where an option is off, its fault must not show: it lies in that option's path and in no other.
"""

import functools
import sys
from typing import Any

import pytest
import torch
from mutants import mutated
from oracle import Parity

import kernels
from kernels.proof.interpret import OutOfBounds, Overflow, Race, interpreting
from kernels.proof.options import option_sets

# op: option: (its page, [what stands there, what the fault makes of it]); one for all values, or one for each value.
Fault = tuple[str, str, str]
NORM_BIAS: dict[str, Fault | dict[Any, Fault]] = {
    "bias": ("layernorm", "HAS_BIAS=bias is not None, BLOCK_N", "HAS_BIAS=True, BLOCK_N"),
    "parameters": ("layernorm", "weight = weight.contiguous()", "weight = weight.contiguous().view(x.dtype)"),
}
NORM_WEIGHT: dict[str, Fault | dict[Any, Fault]] = {
    "weight": ("rmsnorm", "HAS_WEIGHT=weight is not None, BLOCK_N", "HAS_WEIGHT=True, BLOCK_N"),
    "parameters": ("rmsnorm", "weight.contiguous()", "weight.contiguous().view(x.dtype)"),
}
LOSS: dict[str, Fault | dict[Any, Fault]] = {
    "label_smoothing": (
        "cross_entropy.rows", "label_smoothing * (hit - 1.0 / V)", "label_smoothing * (hit + 1.0 / V)",
    ),
    "z_loss": ("cross_entropy.rows", "2.0 * z_loss * (maximum + log_sum)", "2.0 * z_loss * log_sum"),
    "softcap": ("cross_entropy.rows", "ds *= (1.0 - share) * (1.0 + share)", "ds *= 1.0 - share"),
    "ignore_index": ("cross_entropy.rows", "(target != ignore_index)", "(target >= 0)"),
    "padding": ("cross_entropy.rows", "tl.where(real, s, float", "tl.where(mask, s, float"),
    "index": (
        "cross_entropy.rows", "tl.load(targets_ptr + m, m < M",
        "tl.load(targets_ptr + m * (64 // targets_ptr.dtype.element_ty.primitive_bitwidth), m < M",
    ),
}  # fmt: skip
DECODE: dict[str, Fault | dict[Any, Fault]] = {
    "page_size": ("decode_attention", "tl.load(pages_ptr + b * pages_stride_b + u", "tl.load(pages_ptr + u"),
    "window": ("decode_attention", "seen = seen & (u >= position - window)", "seen = seen & (u > position - window)"),
    "softcap": ("decode_attention", "s = softcapped(s, softcap)", "s = softcapped(s, 2.0 * softcap)"),
    "cache": {
        "int8": ("decode_attention", "return x.to(tl.float32).to(dtype)", "return (x.to(tl.float32) + 1.0).to(dtype)"),
        "fp8": ("decode_attention", "to(tl.float32) * 256.0", "to(tl.float32) * 128.0"),
    },
}  # fmt: skip
FAULTS: dict[str, dict[str, Fault | dict[Any, Fault]]] = {
    "layernorm": NORM_BIAS,
    "add_layernorm": NORM_BIAS,
    "rmsnorm": NORM_WEIGHT,
    "add_rmsnorm": NORM_WEIGHT,
    "rotary": {
        "qk_norm": ("rotary", "(g_a - x_a * mean_gx)", "g_a"),
        "interleaved": ("rotary", "mask & (both < D), other", "mask & (both < D // 2), other"),
        "scale": ("rotary", "other=0.0).to(tl.float32) * scale\n    sin", "other=0.0).to(tl.float32)\n    sin"),
    },
    "attention": {
        "causal": ("attention.shared", "CAUSAL=self.causal", "CAUSAL=True"),
        "window": {
            5: ("attention.shared", "tl.maximum(first, p - window)", "tl.maximum(first, p - window + 1)"),
            1000: ("attention.shared", "tl.maximum(first, p - window)", "p - window"),
        },
        "softcap": ("attention.backward", "ds * (1.0 - share * share)", "ds * (1.0 - share)"),
        "scale": ("attention", "if scale is None else float(scale)", "if scale is None else float(scale) + 0.1"),
        "dropout": ("attention.forward", "out *= undropped", "out *= 1.0"),
        "documents": ("attention.shared", "torch.bucketize(position, cu_seqlens[1:], right=True)",
                      "torch.bucketize(position, cu_seqlens[1:], right=False)"),
        "return_lse": ("attention.backward", "delta -= tl.load(dlse_ptr", "delta += tl.load(dlse_ptr"),
    },
    "activation": {
        "kind": {
            "gelu_tanh": ("activation", "0.2140644488178 * a * a", "0.071354816272600 * a * a"),
            "relu2": ("activation", "da = 2.0 * tl.where", "da = 1.0 * tl.where"),
            "swiglu": ("activation", "dg = a * (s + g * ds)", "dg = a * s"),
        },
        "bias": ("activation", "HAS_BIAS=bias is not None, HAS_GATE", "HAS_BIAS=True, HAS_GATE"),
        "parameters": ("activation", "else bias.contiguous(),", "else bias.contiguous().view(h.dtype),"),
    },
    "cross_entropy": LOSS | {
        "reduction": {
            "sum": ("cross_entropy", 'return (dloss / counted if reduction == "mean" else dloss)',
                    'return (dloss / counted if reduction != "none" else dloss)'),
            "none": ("cross_entropy", "scale_ptr + m * scale_stride_m, m < M", "scale_ptr + m * 0, m < M"),
        },
    },
    "linear_cross_entropy": LOSS | {
        "padding": ("cross_entropy.linear", " if vocab_size is None else vocab_size", ""),
        "reduction": {
            "sum": ("cross_entropy.linear", 'if task.criterion.reduction == "mean":', "if True:"),
            "none": ("cross_entropy.linear", "(*late, dloss, task)", "(*late, dloss[:1].expand(len(dloss)), task)"),
        },
        "chunks": ("cross_entropy.linear", "(dweight, z, x_part, i == 0", "(dweight, z, x_part, True"),
    },
    "newton_schulz": {
        "steps": ("newton_schulz", "return iterate(coalesced, steps,", "return iterate(coalesced, max(steps - 1, 0),"),
        "coefficients": ("newton_schulz", "for triple in coefficients for number in triple",
                         "for triple in POLAR_EXPRESS for number in triple"),
    },
    "decode_attention": DECODE | {
        "scale": ("decode_attention", "if scale is None else float(scale)", "if scale is None else float(scale) + 0.1"),
    },
    "append_attention": DECODE | {
        "scale": ("decode_attention.append", "if scale is None else float(scale)",
                  "if scale is None else float(scale) + 0.1"),
        "rotary": ("decode_attention", "tl.where(low, -y, y) * sin", "tl.where(low, y, -y) * sin"),
        "qk_norm": ("decode_attention", "[None, :] / D + eps)", "[None, :] + eps)"),
        "norm_weight": ("decode_attention", "u >= 0, k_norm_ptr", "u >= 0, q_norm_ptr"),
        "counted": ("decode_attention", "counts = q.new_zeros(", "counts = q.new_ones("),
    },
    "decode_linear": {
        "norm": {
            "rmsnorm": ("decode_linear.rows", '!= "none":\n        h *= rstd', '== "layernorm":\n        h *= rstd'),
            "layernorm": ("decode_linear.rows", "h -= mean * tl.sum(weight_sum", "h += mean * tl.sum(weight_sum"),
        },
        "activation": {
            "gelu": ("prims", "y = a * phi", "y = a * (1.0 - phi)"),
            "gelu_tanh": ("prims", "        y = a * s\n", "        y = s\n"),
            "relu2": ("prims", "y = positive * positive", "y = positive"),
            "swiglu": ("prims", "y = a * g * s", "y = a * s"),
        },
        "bias": ("decode_linear.rows", "bias = _load_vectors(bias_ptr, 0, first, N, ROWS, HAS_BIAS, 0.0)",
                 "bias = _load_vectors(bias_ptr, 0, first, N, ROWS, HAS_BIAS, 1.0)"),
        "residual": ("decode_linear.rows", "y += residual[m * ROWS + r]", "y += residual[r]"),
        "packed": ("decode_linear.rows", "return h * scale + bias", "return h + bias"),
        "softcap": ("decode_linear.rows", "y = softcapped(y, softcap)", "y = softcapped(y, 2.0 * softcap)"),
    },
    "decode_embedding": {},
    "decode_greedy": {
        "padded": ("decode_greedy", "workspace, rows.stride(0), V,", "workspace, V, V,"),
        "ties": ("decode_greedy", "| (0x7FFFFFFF - v)", "| v"),
        "given": ("decode_greedy", "torch.zeros_like(out) if", "torch.zeros_like(out)[:0] if"),
    },
    "int8_linear": {
        "bias": ("int8_linear", "_int8_linear(x, weight, scale, bias)",
                 "_int8_linear(x, weight, scale, scale if bias is None else bias)"),
    },
}  # fmt: skip


OPS = [op for op in kernels.OPS.values() if op.triton is not None]
CASES = [
    pytest.param(op.name, option, value, id=f"{op.name} {option}={value}")
    for op in OPS for option, values in op.options.items() for value in values[1:]
]  # fmt: skip


@functools.cache
def parity_of(name: str, options: tuple[tuple[str, Any], ...]) -> Parity:
    """The op at a small size of more than one row, with these options."""
    op = kernels.OPS[name]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if dict(options).get("parameters") else torch.float32  # others than the parameters'
    arguments, keywords = op.inputs(**op.parity[-1], **dict(options), dtype=dtype)
    return Parity(op, arguments, f"{options}", **keywords)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_value_of_every_option_has_a_fault(op):
    assert set(FAULTS[op.name]) == set(op.options)
    for option, faults in FAULTS[op.name].items():
        assert not isinstance(faults, dict) or set(faults) == set(op.options[option][1:])


@pytest.mark.parametrize("name, option, value", CASES)
def test_fault_is_caught(name, option, value, tmp_path, monkeypatch, chaos):
    op, faults = kernels.OPS[name], FAULTS[name][option]
    at, old, new = faults[value] if isinstance(faults, dict) else faults
    page = sys.modules[f"kernels.{at}"]
    module = mutated(page, old, new, tmp_path, monkeypatch, of=sys.modules[op.triton.__module__])
    mutant = getattr(module, f"{name}_triton")
    having = [tuple(options.items()) for options in option_sets(op) if options[option] == value]

    def caught(options: tuple[tuple[str, Any], ...]) -> bool:
        try:
            with interpreting(multiprocessors=16):  # so many that keys are split
                parity_of(name, options).check(mutant)
        except (AssertionError, OutOfBounds, Overflow, Race):
            return True
        return False

    assert any(caught(options) for options in having)
    default = op.options[option][0]
    if chaos(0, 1) and option not in ("steps",):  # of which there is no default path: all steps are alike
        without = [tuple(options.items()) for options in option_sets(op) if options[option] == default]
        assert not any(caught(options) for options in without)
