"""What this machine was seen to do at most: GEMM FLOP/s by dtype, and copy bytes/s.

    python -m bench peaks

Datasheet peaks (gptfast/mfu.py) are the speed of light; these are what a plain GEMM and a plain copy reach under the
clocks and power of the day. Matrices are random, never zeros: an A100 multiplies zeros 15% faster (Horace He,
"Strangely, matrix multiplications run faster when given predictable data").
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptfast import mfu
from gptfast.cli import check_ranges
from gptfast.errors import UserError
from gptfast.log import Log, Row, facts
from gptfast.runtime import made_current

from . import results
from .timing import Settings, Truth, Verdict, Work, cpu_cache_bytes, roofline, stopwatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEASURED_SLACK = 0.25  # how far a measured ceiling may be beaten by chance
# Tensors of its size that a measurement holds at most. Of a copy: both ends, what each should hold, what each held
# before, and what comparing takes. Of a product, in fp64: its factors, the truth, and what comparing takes.
COPY_TENSORS, GEMM_TENSORS = 10, 8


@dataclass
class Ceilings:
    """FLOP/s by dtype name, and bytes/s of memory. `limit_bytes_per_s` is what no honest figure can beat: on a CPU,
    where inputs may lie in a cache, the fastest copy of any size. `slack` is how far a measured ceiling may be beaten.

    A CPU that others share runs up to 1.7x as fast in one hour as in another. So a figure that beats measured ceilings
    has them measured again on the spot, by `again` of the dtype, and is judged by the faster of each.
    """

    flops: dict[str, float]
    bytes_per_s: float | None
    limit_bytes_per_s: float | None
    source: str
    slack: float
    again: Callable[[str], Ceilings | None] | None = None

    def judge(
        self, ms: float, flops: float, bytes_moved: float, dtype: str, cold: bool = True
    ) -> tuple[float | None, str | None]:
        """The fraction of the roofline, and why the figure is invalid, if it is. `cold`: no input lay in a cache."""
        reason = self._beyond(ms, flops, bytes_moved, dtype)
        if reason is not None and self.again is not None:
            self.rise(self.again(dtype))
            reason = self._beyond(ms, flops, bytes_moved, dtype)
        return self.fraction(ms, flops, bytes_moved, dtype, cold), reason

    def fraction(self, ms: float, flops: float, bytes_moved: float, dtype: str, cold: bool = True) -> float | None:
        """The fraction of the roofline; of a measured one it may be a little above 1."""
        peak_bytes = self.bytes_per_s if cold else self.limit_bytes_per_s
        return roofline(ms, flops, bytes_moved, self.flops.get(dtype), peak_bytes)[0]

    def _beyond(self, ms: float, flops: float, bytes_moved: float, dtype: str) -> str | None:
        return roofline(ms, flops, bytes_moved, self.flops.get(dtype), self.limit_bytes_per_s, self.slack)[1]

    def rise(self, other: Ceilings | None) -> None:
        """Take the faster of each rate."""
        if other is None:
            return
        for dtype, rate in other.flops.items():
            self.flops[dtype] = max(rate, self.flops.get(dtype, 0.0))
        self.bytes_per_s = max(filter(None, (self.bytes_per_s, other.bytes_per_s)), default=None)
        self.limit_bytes_per_s = max(filter(None, (self.limit_bytes_per_s, other.limit_bytes_per_s)), default=None)
        self.source = other.source


def datasheet(device: torch.device) -> Ceilings | None:
    """The datasheet's ceilings of a GPU; None for a CPU or a GPU that gptfast/mfu.py does not know."""
    peak = mfu.peak_of(device)
    if peak is None or peak.bytes_per_s is None:
        return None
    rates = {"float32": peak.tf32 or peak.fp32, "bfloat16": peak.bf16, "float16": peak.fp16}
    known = {name: rate for name, rate in rates.items() if rate is not None}
    return Ceilings(known, peak.bytes_per_s, peak.bytes_per_s, f"datasheet of {peak.device}", 0.0)


def from_rows(rows: Iterable[Row]) -> Ceilings | None:
    """The ceilings that `peak` rows hold: the fastest sample of a GEMM of each dtype, and of the largest copy.

    None without a copy. The fastest, because a ceiling must not sink when neighbours make the machine slow.
    Raises UserError for a row without its best sample.
    """
    with results.expected("the peaks of this machine"):
        return _from_rows(rows)


def _from_rows(rows: Iterable[Row]) -> Ceilings | None:
    valid = [row for row in rows if row["what"] == "peak" and row.get("valid", True)]
    copies = [row for row in valid if row["name"] == "copy"]
    if not copies:
        return None
    flops: dict[str, float] = {}
    for row in valid:
        if row["name"] == "gemm":
            if row["dtype"] not in DTYPES:
                raise ValueError(f"dtype is {row['dtype']}, expected one of {', '.join(DTYPES)}")
            flops[row["dtype"]] = max(flops.get(row["dtype"], 0.0), row["best_tflops"] * 1e12)
    memory = max(copies, key=lambda row: row["dims"]["bytes"])["best_gbs"]
    limit = max(row["best_gbs"] for row in copies)
    how = f"measured here on {copies[-1]['date'][:10]}"
    return Ceilings(flops, memory * 1e9, limit * 1e9, how, MEASURED_SLACK)


def ceilings(device: torch.device, dtypes: Sequence[str], out: Path | None, threads: int | None) -> Ceilings:
    """The ceilings to hold figures against: the datasheet's, else those measured in `out`, else measured now."""
    known = datasheet(device)
    path = None if out is None else out / "peaks.jsonl"
    if known is None and path is not None and path.exists():
        known = from_rows(row for row in results.latest(results.read(path)) if row.get("threads") == threads)
        if known is not None and not set(dtypes) <= set(known.flops):
            known = None

    def again(dtype: str) -> Ceilings | None:
        return from_rows(measure(device, [dtype], Log(None), quick=True, threads=threads))

    if known is None:
        known = from_rows(measure(device, dtypes, Log(None), quick=True, threads=threads))
    assert known is not None
    return known if known.slack == 0.0 else dataclasses.replace(known, again=again)


FRESH = datetime.timedelta(hours=1)  # rows of `bench peaks` this young are of the run that asks


def measured_ceilings(roof: Ceilings, device: torch.device, dtypes: Sequence[str], out: Path | None) -> Ceilings | None:
    """What a copy and a GEMM reach on this machine in this run: `roof` itself where it was measured, else the rows that
    `bench peaks` has just left in `out`, else measured now, in a second or two."""
    if roof.slack:
        return roof
    path = None if out is None else out / "peaks.jsonl"
    if path is not None and path.exists():
        rows = [row for row in results.latest(results.read(path)) if row["what"] == "peak"]
        now = datetime.datetime.now(datetime.UTC)
        young = [row for row in rows if now - datetime.datetime.fromisoformat(row["date"]) < FRESH]
        known = from_rows(young)
        if known is not None and set(dtypes) <= set(known.flops):
            return known
    return from_rows(measure(device, dtypes, Log(None), quick=True))


# ---- measuring -------------------------------------------------------------------------------------------------------
def measure(
    device: torch.device, dtypes: Sequence[str], log: Log, *, quick: bool = False, threads: int | None = None
) -> list[Row]:
    """Measure copies and GEMMs, and write a row for each."""
    on_gpu = device.type == "cuda"
    settings = Settings(samples=10 if quick else 20, warmup_s=0.2, budget_s=0.3 if quick else 1.0)
    beyond_cache = min(3 * cpu_cache_bytes(), 1 << 30)
    copies = ([1 << 30] if quick else [1 << 28, 1 << 30, 1 << 32]) if on_gpu else [1 << 22, beyond_cache]
    gemms = ([8192] if quick else [2048, 4096, 8192, 16384]) if on_gpu else ([1024] if quick else [512, 1024, 2048])
    common = facts(device)
    fits = fitted(copies, lambda size: COPY_TENSORS * size, device, log)
    rows = [_measure_copy(device, size, settings, threads, log, common) for size in fits]
    for dtype in dtypes:
        # in full fp32 the largest product takes a fifth of a second, and says no more than the next
        asked = gemms[:-1] if on_gpu and not quick and DTYPES[dtype].itemsize == 4 else gemms
        products = fitted(asked, lambda n: GEMM_TENSORS * 8 * n * n, device, log)
        rows += [_measure_gemm(device, n, dtype, settings, threads, log, common) for n in products]
    return rows


def fitted(sizes: Sequence[int], needed_bytes: Callable[[int], int], device: torch.device, log: Log) -> list[int]:
    """The sizes, each halved until it fits into the memory that this GPU has left; said where one was."""
    if device.type != "cuda":
        return list(sizes)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    fitting = set()
    for size in sizes:
        smaller = size
        while needed_bytes(smaller) > free and smaller > 1:
            smaller //= 2
        if smaller != size:
            log.say(f"peaks  {smaller} instead of {size}: {free / 2**30:.1f} GiB are free")
        fitting.add(smaller)
    return sorted(fitting)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)


def _measure_copy(
    device: torch.device, size: int, settings: Settings, threads: int | None, log: Log, common: Row
) -> Row:
    """A copy of `size` bytes, which moves twice as many: on a GPU by a kernel that multiplies by one.

    There copy_ goes to the copy engines, which on an H200 reached 2,750 GB/s where kernels reach 4,250.
    """

    def draw(seed: int) -> Tensor:
        return _random((size // 4,), torch.float32, device, seed)

    with stopwatch(device, settings, threads) as watch:
        source = draw(0)
        target = torch.empty_like(source)
        newest = functools.lru_cache(maxsize=1)(draw)
        copy = (lambda: torch.mul(source, 1.0, out=target)) if device.type == "cuda" else (lambda: target.copy_(source))
        works = [Work(copy, (source,), lambda seed: source.data.copy_(newest(seed)))]
        timing = watch.measure({"copy": works})["copy"]
        truth = Truth(lambda seed: (newest(seed),), lambda seed: (newest(seed),))  # one tensor: equal bits need no fp64
        verdict = watch.verify({"copy": works}, truth, [secrets.randbits(31)])["copy"]
    gbs = 2 * size / timing.ms_p50 / 1e6
    sheet = datasheet(device)
    fraction, reason = sheet.judge(timing.ms_p50, 0, 2 * size, "float32") if sheet else (None, None)
    best = 2 * size / min(timing.samples) / 1e6
    rates = {"gbs": gbs, "best_gbs": best, "dtype": "float32", "dims": {"bytes": size}, "roofline": fraction}
    row = log.row("peak", name="copy", impl="torch", **timing.fields(), **rates, **_verdict(verdict, reason), **common)
    place = "" if timing.cold else " (in cache)"
    log.say(f"peaks  copy  {size / 2**20:8.0f} MiB             {timing.ms_p50:10.3f} ms {gbs:10.1f} GB/s{place}")
    return row


def _measure_gemm(
    device: torch.device, n: int, dtype: str, settings: Settings, threads: int | None, log: Log, common: Row
) -> Row:
    """a @ b of square random matrices, in torch's default precision (fp32 in full)."""

    def draw(seed: int) -> Tensor:
        return _random((n, n), DTYPES[dtype], device, seed)

    with stopwatch(device, settings, threads) as watch:
        a, b = draw(0), draw(1)
        works = [Work(lambda: a @ b, (a, b), lambda seed: a.data.copy_(draw(seed)))]
        timing = watch.measure({"gemm": works})["gemm"]
        truth = Truth(lambda seed: (draw(seed).double() @ b.double(),), lambda seed: (draw(seed) @ b,))
        verdict = watch.verify({"gemm": works}, truth, [secrets.randbits(31)])["gemm"]
    tflops = 2 * n**3 / timing.ms_p50 / 1e9
    sheet = datasheet(device)
    fraction, reason = sheet.judge(timing.ms_p50, 2 * n**3, 0, dtype) if sheet else (None, None)
    best = 2 * n**3 / min(timing.samples) / 1e9
    rates = {
        "tflops": tflops,
        "best_tflops": best,
        "dtype": dtype,
        "dims": {"M": n, "N": n, "K": n},
        "roofline": fraction,
    }
    row = log.row("peak", name="gemm", impl="torch", **timing.fields(), **rates, **_verdict(verdict, reason), **common)
    log.say(f"peaks  gemm  {n:8d}^3  {dtype:12s} {timing.ms_p50:10.3f} ms {tflops:10.3f} TFLOP/s")
    return row


def _verdict(verdict: Verdict, beyond: str | None) -> Row:
    reason = verdict.reason or beyond
    return {"error": verdict.error, "valid": reason is None, "invalid_reason": reason}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench peaks", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32,bfloat16", help=f"some of {','.join(DTYPES)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="one size of each")
    parser.add_argument("--out", type=Path, help="folder of the rows (default: results/<machine>)")
    arguments = check_ranges(parser.parse_args(argv))
    device, dtypes = made_current(arguments.device), chosen_dtypes(arguments.dtype)
    out = arguments.out or results.folder(facts(device)["hardware"])
    with results.campaign(out, "peaks.jsonl") as log:
        rows = measure(device, dtypes, log, quick=arguments.quick, threads=arguments.threads)
    return 0 if all(row["valid"] for row in rows) else 1


def chosen_dtypes(text: str) -> list[str]:
    """The dtype names in a comma-separated list. UserError names one that is unknown."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in DTYPES:
            raise UserError(f"--dtype={name}: known are {', '.join(DTYPES)}")
    return names
