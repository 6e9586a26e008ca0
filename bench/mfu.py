"""The MFU question, answered for anyone's run by all three conventions.

    python -m bench mfu --tokens_per_s=450000 --model=gpt2 --device="H100 SXM"
    python -m bench mfu --ms_per_iter=33.22 --batch_size=64 --model=char --peak_tflops=312
    python -m bench mfu --devices                       # every device with a peak, and where its figures come from

The three conventions and the peaks are those of gptfast/mfu.py; hfu assumes flash attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import NoReturn

import torch

from gptfast import cli, mfu
from gptfast.config import NAMES, GPTConfig, preset
from gptfast.errors import UserError, nearest

_SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size")  # of a model that is no preset


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; python -m bench mfu --help lists the flags")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def main(argv: Sequence[str]) -> None:
    """Prints the figures of the run that `argv` describes. Raises UserError for what cannot be answered."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args([_underscored(argument) for argument in argv])
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise UserError(f"unknown flag {flag}{nearest(flag, parser.flags())}")
    cli.check_ranges(arguments)
    if arguments.devices:
        print(device_table())
        return
    answer = answer_of(arguments)
    print(json.dumps(answer) if arguments.json else in_words(answer))


def _parser() -> _Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser("python -m bench mfu", description=__doc__, formatter_class=layout, allow_abbrev=False)
    add = parser.add_argument
    add("--tokens_per_s", type=float, help="of all devices together")
    add("--ms_per_iter", type=float, help="instead of --tokens_per_s, with --batch_size")
    add("--batch_size", type=int, help="sequences per iteration, of all devices and accumulation steps together")
    add("--model", default="gpt2", help=f"one of {NAMES}")
    for name in _SHAPE:
        add(f"--{name}", type=int, help="changes the model" if name == _SHAPE[0] else argparse.SUPPRESS)
    add("--block_size", type=int, help="tokens per sequence, T (default: the model's)")
    add("--device", help='as nvidia-smi prints it, or short: "H100 SXM" (default: the GPU of this machine)')
    add("--memory_gb", type=float, help='tells an "A100" of 80 GB from one of 40')
    add("--power_w", type=float, help="the device's default power limit: tells SXM from PCIe")
    add("--peak_tflops", type=float, help="dense TFLOP/s at the dtype of the run, instead of --device")
    add("--dtype", default="bf16", choices=mfu.DTYPES)
    add("--world_size", type=int, default=1, help="how many devices ran")
    add("--recompute_blocks", action="store_true", help="the run used activation checkpointing (only hfu changes)")
    add("--devices", action="store_true", help="print the peak table")
    add("--json", action="store_true", help="print the answer as one JSON object")
    return parser


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def answer_of(arguments: argparse.Namespace) -> dict[str, object]:
    """The run as asked about, its FLOPs per token, the peak, and the three figures (None where no peak is known)."""
    config = _config(arguments)
    T = config.block_size
    tokens_per_s, peak = _tokens_per_s(arguments, T), _peak(arguments)
    flops = mfu.flops_per_token(config, T, recompute_blocks=arguments.recompute_blocks)
    dtype, world_size = arguments.dtype, arguments.world_size
    return {
        "model": arguments.model, "parameters": mfu.palm_params(config), "T": T, "tokens_per_s": tokens_per_s,
        "world_size": world_size, "dtype": dtype, "device": peak.device if peak else None,
        "peak_flops": peak.flops(dtype) if peak else None, "peak_kind": peak.kind if peak else None,
        "peak_source": peak.source if peak else _why_no_peak(arguments),
        "flops_per_token": dataclasses.asdict(flops),
        **mfu.utilization(tokens_per_s, config, T, peak=peak, dtype=dtype, world_size=world_size, flops=flops),
    }  # fmt: skip


def _config(arguments: argparse.Namespace) -> GPTConfig:
    typed = {name: getattr(arguments, name) for name in (*_SHAPE, "block_size") if getattr(arguments, name) is not None}
    return dataclasses.replace(preset(arguments.model, "--model"), **typed)


def _tokens_per_s(arguments: argparse.Namespace, T: int) -> float:
    for name in ("tokens_per_s", "ms_per_iter", "batch_size", "world_size", "peak_tflops"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name}={value:g} must be above 0")
    if arguments.tokens_per_s is not None and arguments.ms_per_iter is None:
        return arguments.tokens_per_s
    if arguments.ms_per_iter is not None and arguments.batch_size is not None and arguments.tokens_per_s is None:
        return arguments.batch_size * T / arguments.ms_per_iter * 1e3
    raise UserError("how fast was the run? give --tokens_per_s, or else --ms_per_iter and --batch_size")


def _peak(arguments: argparse.Namespace) -> mfu.Peak | None:
    """What was asked for, or what this machine has; None where the peak at the dtype is not known."""
    if arguments.peak_tflops is not None:
        return mfu.Peak.given(arguments.peak_tflops)
    if arguments.device is not None:
        peak = mfu.peak(arguments.device, memory_gb=arguments.memory_gb, power_w=arguments.power_w)
    else:
        peak = mfu.peak_of(torch.device("cuda")) if torch.cuda.is_available() else None
    return peak if peak is not None and peak.flops(arguments.dtype) is not None else None


def _why_no_peak(arguments: argparse.Namespace) -> str:
    if arguments.device is not None:
        return mfu.why_unknown(arguments.device, arguments.dtype)
    if torch.cuda.is_available():
        return mfu.why_unknown(torch.cuda.get_device_name(), arguments.dtype)
    return 'this machine has no GPU; give --device="H100 SXM" or --peak_tflops'


def in_words(answer: dict) -> str:
    """The answer as text: what ran, the peak and its source, one line per figure."""
    known = answer["peak_flops"] is not None
    device = answer["device"] if answer["peak_kind"] == "datasheet" else "device"
    peak = f"{answer['peak_flops'] / 1e12:g} TFLOP/s {answer['dtype']}, {answer['peak_kind']}" if known else "n/a"
    lines = [
        f"{answer['model']}: N = {answer['parameters'] / 1e6:.2f}M, T = {answer['T']}, "
        f"{answer['tokens_per_s']:,.0f} tokens/s on {answer['world_size']} x {device}",
        f"peak: {peak} ({answer['peak_source']})",
    ]
    meanings = {
        "mfu": ("mfu", "exact matrix multiplies, causal attention counted once"),
        "mfu_palm": ("palm", "6N + 12 L H Q T, as nanoGPT prints"),
        "hfu": ("hfu", "with what the backward pass computes again"),
    }
    for figure, (convention, meaning) in meanings.items():
        mflops = answer["flops_per_token"][convention] / 1e6
        lines.append(f"{figure:8s} {mfu.format_mfu(answer[figure]):>7s}   {mflops:9.1f} MFLOP/token   {meaning}")
    if (answer["hfu"] or 0) > 1:
        lines.append("above the peak, which no run reaches: check the speed, --world_size, --device and --dtype")
    return "\n".join(lines)


def device_table() -> str:
    """Every device, its dense TFLOP/s by dtype, GB/s, and the source of the figures."""
    lines = [f"{'device (TFLOP/s, dense)':26s}" + "".join(f"{name:>8s}" for name in (*mfu.DTYPES, "GB/s")) + "  source"]
    for device in mfu.DEVICES.values():
        tflops = [device.flops(dtype) for dtype in mfu.DTYPES]
        cells = [f"{value / 1e12:8.1f}" if value is not None else f"{'n/a':>8s}" for value in tflops]
        cells.append(f"{device.bytes_per_s / 1e9:8.0f}" if device.bytes_per_s is not None else f"{'n/a':>8s}")
        lines.append(f"{device.device:26s}" + "".join(cells) + f"  {device.source}")
    return "\n".join(lines)
