"""Says which kernels and tiles a GPU runs, and what was measured on it: `python -m kernels --cards`, `--gpu=NAME`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import OPS
from .._triton import Launcher, launching, tile_arch
from . import aot
from .machine_code import CHIPS

RESULTS = aot.REPORT.parent
REFUSED = {75: "Turing has no bf16 and no asynchronous copies", 70: "Volta has no bf16 and no asynchronous copies"}


def measured(folder: Path = RESULTS) -> dict[int, list[str]]:
    """Returns the names of GPUs that ran the kernels, by architecture, from the rows in results/."""
    names_by_arch: dict[int, set[str]] = {}
    for path in folder.glob("*/ops.jsonl"):
        for line in path.read_text("utf-8", "replace").splitlines():
            try:
                hardware = json.loads(line).get("hardware") or {}
            except ValueError:  # of a measurement that was cut off
                continue
            if hardware.get("kind") == "cuda":
                arch = int(hardware["capability"].replace(".", ""))
                names_by_arch.setdefault(arch, set()).add(hardware["name"].removeprefix("NVIDIA "))
    return {arch: sorted(names) for arch, names in names_by_arch.items()}


def markdown() -> str:
    """Returns the README's table: the GPUs that kernels compile for, whose tiles they take, which were measured."""
    rows, ran = aot.read_report(), measured()
    lines = [
        "| architecture | GPUs | tiles of | launches compiled | gates excused | measured on |",
        "|---|---|---|---|---|---|",
    ]
    for arch, chip in CHIPS.items():
        mine = [row for row in rows if row["arch"] == arch]
        broken = sum(bool(row["broken"]) for row in mine)
        cells = [f"sm_{arch}", f"{chip.name}, {chip.others}", f"sm_{tile_arch(arch)}", str(len(mine)), str(broken)]
        lines.append(f"| {' | '.join([*cells, ', '.join(ran.get(arch, ())) or 'never'])} |")
    return "\n".join(lines)


def arch_of(name: str) -> int:
    """Returns the architecture of a GPU by name or number: 'A10', 'RTX 4090', 'sm_89', '8.9'. Raises ValueError."""
    if number := re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)a?", name.strip().lower()):
        return int(number.group(1)) * 10 + int(number.group(2))
    words = re.sub(r"nvidia|geforce|tesla", "", name.lower()).split()
    series = {"rtx 20": 75, "rtx 30": 86, "rtx 40": 89, "rtx 50": 120}
    text = " ".join(words)
    for start, arch in series.items():
        if re.fullmatch(rf"{start}\d\d.*", text):
            return arch
    for arch, chip in CHIPS.items():
        known = [one.strip().lower() for one in (chip.name, *chip.others.split(","))]
        if any(text == one or text.startswith(f"{one} ") for one in known):
            return arch
    if words[:1] in (["t4"], ["v100"]):
        return 75 if words[0] == "t4" else 70
    named = "; ".join(f"{chip.name}, {chip.others} (sm_{arch})" for arch, chip in CHIPS.items())
    shown = name if name.isprintable() and len(name) <= 80 else repr(name)[:80]
    raise ValueError(f"--gpu={shown}: not known; give its compute capability, as sm_89, or one of {named}")


def page(name: str) -> Iterator[str]:
    """Yields lines on what a card runs: whose tiles and why, then each op's kernels, tiles and variants."""
    arch = arch_of(name)
    if arch < 80:
        yield f"sm_{arch}: no kernels. {REFUSED.get(arch, 'They need sm_80 or newer')}: kernels.load('auto') takes"
        yield "the references in PyTorch, in fp16 and fp32 too; load('triton') raises RuntimeError"
        return
    chip = CHIPS.get(120 if arch == 121 else arch)  # GB10 takes the code of sm_120
    yield f"{name}: sm_{arch}" + ("" if chip is None else f", {chip.name} and {chip.others}")
    yield f"tiles   {why_these_tiles(arch)}"
    if chip is None:
        yield "gates   never compiled for it: the gates know " + ", ".join(f"sm_{known}" for known in CHIPS)
        return
    arch = 120 if arch == 121 else arch
    rows = {aot.row_key(row): row for row in aot.read_report()}
    mine = [row for row in rows.values() if row["arch"] == arch]
    broken = [row for row in mine if row["broken"]]
    yield f"gates   {len(mine)} launches compiled, {len(broken)} that break one"
    yield f"runs    measured on {', '.join(measured().get(arch, ())) or 'none of its kind'}"
    for op in OPS.values():
        yield f"\n{op.name} at {' '.join(f'{letter}={size}' for letter, size in op.bench[0].items())} in bf16"
        launched = {(x.kernel.__name__, arch, aot.digest(x)): x for x in aot.launches(op, dict(op.bench[0]), arch)}
        for key, launch in launched.items():
            row = rows.get(key)
            code = "not in results/aot.json" if row is None else (
                f"{row['registers']} registers, {row['shared_bytes']} B shared, {row['programs_per_sm']} to a "
                f"multiprocessor {row['matrix']}"
            )  # fmt: skip
            yield f"  {launch.kernel.__name__:<42} {aot.constants(launch)}\n  {'':<42} {code}"
        for variant in op.variants:
            yield f"  variant {variant}: {obstacle(op, variant, arch) or 'takes it'}"


def why_these_tiles(arch: int) -> str:
    """Returns whose tiles an architecture takes, and why."""
    tiles = tile_arch(arch)
    if tiles == 0:
        return "the most conservative ones, as of every GPU that is not known"
    if tiles == arch:
        return f"its own (TILES[{arch}] on the pages of the ops)"
    most = max((row["shared_bytes"] for row in aot.read_report() if row["arch"] == tiles), default=0)
    return f"those of sm_{tiles}, whose matrix instructions it has; they need {most} B of shared memory at most"


def obstacle(op: Any, variant: str, arch: int) -> str:
    """Returns why a variant of an op cannot run its first bench size on an architecture; '' if it can."""
    arguments, keywords = op.inputs(**op.bench[0], dtype=torch.bfloat16, device="meta")
    with launching(Launcher(lambda *args, **kwargs: None, arch)):
        try:
            op.variants[variant](*arguments, **keywords)
        except ValueError as error:
            return str(error)
    return ""
