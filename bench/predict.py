"""What a step should take, part by part, before it runs: declared costs over rates that the machine has shown.

    python -m bench predict --model=gpt2 --batch_size=16 --out=results/nvidia-h200
    python -m bench predict --model=gpt2-xl --device="H100 SXM"      # no rows: the datasheet, at a stated efficiency

Attention, norms, activation, rotary and the loss go at the rate of our op's row nearest in size. The rest goes at the
rate of a profile of that machine, of another implementation or model than the one predicted: products by their FLOPs,
the optimizer by its bytes, and what has no declared cost by tokens, width and layers. Where there is neither, a part
takes its time on the roofline over EFFICIENCY. Beside it stands the measured profile of the step, where there is one,
so that a missed prediction shows its place.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptfast import mfu
from gptfast.config import NAMES, GPTConfig, is_preset, preset
from gptfast.errors import UserError
from gptfast.log import Row, facts
from kernels import Cost

from . import costs, results
from .peaks import DTYPES, Ceilings, from_rows

EFFICIENCY = 0.7  # of the roofline, for what no row of the machine is about
OPS_OF = {
    "attention": ("attention",), "rotary": ("rotary",), "loss": ("cross_entropy",), "MLP activation": ("activation",),
}  # fmt: skip
UNDECLARED = ("sums", "casts", "copies", "other")
FAR = 0.15  # a prediction that misses by more is explained


@dataclass(frozen=True)
class Part:
    """A part of a step: predicted milliseconds, from what, and measured ones where there is a profile.

    `doubt` says why the two may differ beside a wrong cost: the figures are of other code, or no cost is declared.
    """

    name: str
    ms: float
    source: str
    measured_ms: float | None = None
    doubt: str = ""

    @property
    def missed(self) -> float | None:
        """How much longer it was predicted than it took: 0.1 is a tenth too long."""
        return self.ms / self.measured_ms - 1 if self.measured_ms else None


def predict(
    config: GPTConfig, B: int, T: int, dtype: str, rows: Sequence[Row], ceilings: Ceilings, impl: str = "triton",
    name: str | None = None,
) -> list[Part]:  # fmt: skip
    """The parts of a training step of `config`, the longest first. `rows`: of the machine, any kinds."""
    declared = costs.of_step(config, B, T, DTYPES[dtype].itemsize)
    ops = [
        r for r in rows if r["what"] == "op" and r["impl"] == impl and r["direction"] == "both" and r["dtype"] == dtype
    ]
    profiles = [r for r in rows if r["what"] == "profile" and r["direction"] == "train" and r["dtype"] == dtype]
    about = (name, impl, {"B": B, "T": T})
    mine = [r for r in profiles if (r["name"], base(r["impl"]), r["dims"]) == about]
    own = mine[-1] if mine else None
    others = [r for r in profiles if r not in mine and is_preset(r["name"])]
    other = min(others, key=lambda r: _unlike(r, name, B * T), default=None)
    measured = {part["part"]: part["ms"] for part in own["parts"]} if own else {}
    parts = []
    for part, cost in declared.items():
        ms, source, commit = (
            _of_op(part, config, B * T, cost, ops) or _of_profile(part, cost, other) or _roofline(cost, dtype, ceilings)
        )
        parts.append(Part(part, ms, source, measured.get(part), _other_code(commit, own)))
    if other is not None:
        scale = _bulk(config, B * T) / _bulk(_config(other), other["dims"]["B"] * other["dims"]["T"])
        for part in other["parts"]:
            if part["part"] in UNDECLARED:
                source = f"as in the profile of {other['name']} by {other['impl']}"
                doubt = f"no cost is declared, and {other['impl']} launches other kernels for it"
                parts.append(Part(part["part"], part["ms"] * scale, source, measured.get(part["part"]), doubt))
    listed = {part.name for part in parts}
    parts += [Part(part, 0.0, "not foreseen", ms) for part, ms in measured.items() if part not in listed]
    return sorted(parts, key=lambda part: -max(part.ms, part.measured_ms or 0.0))


def _other_code(commit: str | None, profile: Row | None) -> str:
    profiled = profile and profile.get("commit")
    if not commit or not profiled or commit == profiled:
        return ""
    return f"the rate is of commit {commit[:7]}, the profile of {profiled[:7]}"


def base(impl: str) -> str:
    """'triton' of 'triton + CUDA graph': the kernels are the same."""
    return impl.split(" + ")[0]


def _of_op(
    part: str, config: GPTConfig, tokens: int, cost: Cost, ops: Sequence[Row]
) -> tuple[float, str, str | None] | None:
    """By the rate of our own op: FLOP/s of attention, bytes/s of what streams. With the commit of its row."""
    names = (f"add_{config.norm}", config.norm) if part == "norms" else OPS_OF.get(part, ())
    shaped = {"D": config.head_dim, "H": config.n_head, "M": tokens, "N": config.n_embd, "V": config.vocab_size}
    shaped["T"] = config.block_size
    if part == "MLP activation":
        shaped["N"] = config.hidden_width
        ops = [row for row in ops if row["dims"].get("kind", "gelu") == config.activation]
    rows = [row for row in ops if row["name"] in names[:1]] or [row for row in ops if row["name"] in names]
    if not rows:
        return None

    def unlike(row: Row) -> float:
        return sum(abs(math.log2(row["dims"][x] / y)) for x, y in shaped.items() if x in row["dims"])

    nearest = min(map(unlike, rows))
    alike = [row for row in rows if unlike(row) == nearest]  # of which one with fp32 parameters is as in training
    row = next((row for row in alike if row["dims"].get("parameters")), alike[-1])
    by_flops = part == "attention"
    share = cost.flops / row["flops"] if by_flops else cost.bytes / row["bytes"]
    rate = f"{row['tflops']:.0f} TFLOP/s" if by_flops else f"{row['gbs']:,.0f} GB/s"
    return row["ms_p50"] * share, f"{rate} of {results.label(row)}", row.get("commit")


def _of_profile(part: str, cost: Cost, other: Row | None) -> tuple[float, str, str | None] | None:
    """By the rate at which another step on this machine did the same part. With the commit of its profile."""
    if other is None:
        return None
    seen = next((row for row in other["parts"] if row["part"] == part), None)
    theirs = costs.of_step(_config(other), other["dims"]["B"], other["dims"]["T"], DTYPES[other["dtype"]].itemsize).get(
        part
    )
    if seen is None or theirs is None or not seen["ms"]:
        return None
    by_flops = part == "GEMMs"
    share = cost.flops / theirs.flops if by_flops else cost.bytes / theirs.bytes
    rate = theirs.flops / seen["ms"] / 1e9 if by_flops else theirs.bytes / seen["ms"] / 1e6
    unit = f"{rate:.0f} TFLOP/s" if by_flops else f"{rate:,.0f} GB/s"
    return seen["ms"] * share, f"{unit} in the profile of {other['name']} by {other['impl']}", other.get("commit")


def _roofline(cost: Cost, dtype: str, ceilings: Ceilings) -> tuple[float, str, None]:
    flops, memory = ceilings.flops.get(dtype), ceilings.bytes_per_s
    ms = 1e3 * max(cost.flops / flops if flops else 0.0, cost.bytes / memory if memory else 0.0)
    return ms / EFFICIENCY, f"{EFFICIENCY:.0%} of the roofline, {ceilings.source}", None


def _unlike(row: Row, name: str | None, tokens: int) -> tuple[bool, float]:
    return row["name"] != name, abs(math.log2(row["dims"]["B"] * row["dims"]["T"] / tokens))


def _config(row: Row) -> GPTConfig:
    return padded(preset(row["name"]))


def _bulk(config: GPTConfig, tokens: int) -> float:
    return float(tokens * config.n_embd * config.n_layer)


def padded(config: GPTConfig) -> GPTConfig:
    """As the bench trains it: no dropout, the vocabulary a multiple of 64."""
    V = config.vocab_size
    return dataclasses.replace(config, dropout=0.0, vocab_size=-(-V // 64) * 64 if V > 1024 else V)


def table(parts: Sequence[Part], wall: Row | None = None) -> list[str]:
    """The parts as lines, with their sum and how far it is from what was measured; and why a part may have missed."""
    lines = [f"{'part':16s} {'predicted':>10s} {'measured':>10s} {'missed':>8s}  from"]
    for part in parts:
        measured = "" if part.measured_ms is None else f"{part.measured_ms:7.3f} ms"
        missed = "" if part.missed is None else f"{part.missed:+8.0%}"
        lines.append(f"{part.name:16s} {part.ms:7.3f} ms {measured:>10s} {missed:>8s}  {part.source}")
        if part.doubt and part.missed is not None and abs(part.missed) > FAR:
            lines.append(f"{'':16s} {part.doubt}")
    total = sum(part.ms for part in parts)
    lines.append(f"{'all kernels':16s} {total:7.3f} ms")
    if wall is not None:
        lines[-1] += f" {wall['busy_ms']:7.3f} ms {total / wall['busy_ms'] - 1:+8.0%}"
        lines.append(
            f"{'wall clock':16s} {'':10s} {wall['ms_p50']:7.3f} ms: the GPU idled for {wall['idle_ms']:.3f} ms of it"
        )
    return lines


def by_datasheet(device: str) -> Ceilings:
    """The ceilings of a named device. UserError for one that gptfast/mfu.py does not know."""
    peak = mfu.peak(device)
    if peak is None or peak.bytes_per_s is None:
        raise UserError(f"--device={device}: no such datasheet in gptfast/mfu.py; 'H100 SXM' is one; --out names rows")
    rates = {"float32": peak.tf32 or peak.fp32, "bfloat16": peak.bf16, "float16": peak.fp16}
    known = {name: rate for name, rate in rates.items() if rate is not None}
    return Ceilings(known, peak.bytes_per_s, peak.bytes_per_s, f"datasheet of {peak.device}", 0.0)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench predict", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="gpt2", help=f"of {NAMES}")
    add("--batch_size", type=int, default=16, help="sequences")
    add("--block_size", type=int, help="tokens a sequence (default: the model's)")
    add("--dtype", default="bfloat16", choices=list(DTYPES))
    add("--impl", default="triton", help="whose op rows and whose measured profile to set beside it")
    add("--device", help="a datasheet to predict from, as 'H100 SXM', instead of rows")
    add("--out", type=Path, help="folder of a machine's rows (default: results/<this machine>)")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size={arguments.batch_size} must be at least 1")
    config = padded(preset(arguments.model, "--model"))
    T = arguments.block_size or config.block_size
    config = dataclasses.replace(config, block_size=T)
    rows: list[Row] = []
    if arguments.device:
        ceilings = by_datasheet(arguments.device)
    else:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        folder = arguments.out or results.folder(facts(here)["hardware"])
        rows = [row for row in results.read_all([folder]) if row.get("valid", True)]
        with results.expected(folder):
            measured = from_rows(row for row in rows if row["what"] == "peak")
        if measured is None:
            raise UserError(f"{folder}: no row of a copy; run python -m bench peaks, or name a datasheet by --device")
        ceilings = measured
    B = arguments.batch_size
    with results.expected(arguments.out or "the rows of this machine"):
        parts = predict(config, B, T, arguments.dtype, rows, ceilings, arguments.impl, arguments.model)
        lines = table(parts, _wall(rows, arguments.model, arguments.impl, {"B": B, "T": T}))
    print(f"{arguments.model} B={B} T={T} {arguments.dtype}, a training step with AdamW by {arguments.impl}")
    print("\n".join(lines))
    return 0


def _wall(rows: Sequence[Row], name: str, impl: str, dims: Mapping[str, int]) -> Row | None:
    steps = [
        r for r in rows if r["what"] == "profile" and (r["name"], base(r["impl"]), r["dims"]) == (name, impl, dims)
    ]
    return next((r for r in reversed(steps) if r["direction"] == "train"), None)
