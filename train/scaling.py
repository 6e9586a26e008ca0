"""How far more GPUs help, on paper: predicted efficiency of DDP, FSDP and sharded Muon on 8 to 1024 H100s.

    python -m train.scaling                                  # tables, checks, and a figure in results/scaling
    python -m train.scaling --nvlink_gbs=360 --network_gbs=40

A step is compute, which one GPU alone would need too, plus the communication that compute does not hide, plus the
optimizer. Efficiency is the first over the whole. Each GPU keeps its tokens per update whatever their number.

Assumed, each a flag: collectives reach 80% of the links. NVLink 4 carries 450 GB/s each way (NVIDIA H100 datasheet, 900
both ways), the network 50 GB/s for each GPU (one 400 Gb/s NDR port each: NVIDIA DGX H100 user guide), and a hop between
nodes takes 10 µs. A ring crosses a node's border over all 8 ports at once. Newton-Schulz runs at 350 TFLOP/s.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptfast import cli, report
from gptfast.aside import check_writable, write_whole
from gptfast.cli import check_ranges
from gptfast.config import preset

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8  # GPUs
BUCKET_BYTES = 25e6  # of DDP, the last of which nothing hides
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Cluster:
    """What moves bytes. Rates in GB/s for each GPU and direction."""

    nvlink_gbs: float = 450.0
    network_gbs: float = 50.0
    reached: float = 0.8  # of a link by a collective
    hop_us: float = 10.0  # between nodes
    memory_gbs: float = 3350.0 * 0.85  # of a GPU, that the optimizer reaches
    newton_schulz_tflops: float = 350.0

    def collective_s(self, size_bytes: float, gpus: int) -> float:
        """An all-gather or reduce-scatter of `size_bytes` in all, as a ring: seconds."""
        if gpus == 1:
            return 0.0
        nodes = -(-gpus // NODE)
        border = NODE * self.network_gbs if nodes > 1 else self.nvlink_gbs
        rate = self.reached * min(self.nvlink_gbs, border) * 1e9
        return size_bytes * (gpus - 1) / gpus / rate + (nodes - 1) * self.hop_us * 1e-6


@dataclass(frozen=True)
class Workload:
    """A model and what one GPU does in an update. `matrices`: shapes of those that Muon steps."""

    name: str
    parameters: float
    layers: int
    tokens: int  # of a GPU and update
    tokens_per_s: float  # of a GPU that neither communicates nor optimizes
    matrices: tuple[tuple[int, int], ...] = ()

    @property
    def compute_s(self) -> float:
        return self.tokens / self.tokens_per_s


def gpt(name: str, tokens: int, tokens_per_s: float) -> Workload:
    """A preset of gptfast.config."""
    c = preset(name)
    block = [(c.n_embd, c.n_embd)] * 4 + [(c.hidden_width, c.n_embd), (c.n_embd, c.hidden_width)]
    numbers = c.n_layer * sum(m * n for m, n in block) + (c.vocab_size + c.block_size) * c.n_embd
    return Workload(name, numbers, c.n_layer, tokens, tokens_per_s, tuple(block * c.n_layer))


# tokens/s of a GPU: llm.c's runs on 8 H100 (scripts/run_gpt2_1558M.sh; modded-nanogpt's record of 2024-10-13)
WORKLOADS = (gpt("gpt2", 64 * 1024, 468e3), gpt("gpt2-xl", 16 * 1024, 46.8e3))


# ---- the parts of a step, in seconds ---------------------------------------------------------------------------------
def ddp_s(work: Workload, cluster: Cluster, gpus: int) -> float:
    """What backward, two thirds of compute, does not hide of the all-reduce of fp32 gradients."""
    both_ways = 2 * cluster.collective_s(4 * work.parameters, gpus)
    last = 2 * cluster.collective_s(min(BUCKET_BYTES, 4 * work.parameters), gpus)
    return max(0.0, both_ways - 2 / 3 * work.compute_s) + last


def fsdp_s(work: Workload, cluster: Cluster, gpus: int) -> float:
    """What compute does not hide of gathering bf16 weights twice and scattering fp32 gradients, layer by layer."""
    layer = work.parameters / work.layers
    gather, scatter = cluster.collective_s(2 * layer, gpus), cluster.collective_s(4 * layer, gpus)
    forward, backward = work.compute_s / 3 / work.layers, work.compute_s * 2 / 3 / work.layers
    hidden = max(0.0, gather - forward) + max(0.0, gather + scatter - backward)
    return work.layers * hidden + gather + scatter  # nothing hides the first gather and the last scatter


def adamw_s(work: Workload, cluster: Cluster, sharers: int, *, gathers: bool) -> float:
    """Seven passes over fp32 numbers, shared; with ddp the weights are then gathered."""
    passes = 7 * 4 * work.parameters / sharers / (cluster.memory_gbs * 1e9)
    return passes + (cluster.collective_s(4 * work.parameters, sharers) if gathers else 0.0)


def muon_s(work: Workload, cluster: Cluster, sharers: int, *, gathers: bool) -> float:
    """Newton-Schulz of the fullest owner, and the matrices' way there and back (fsdp) or to all (ddp)."""
    products = largest_share([newton_schulz_flops(*shape) for shape in work.matrices], sharers)
    numbers = sum(m * n for m, n in work.matrices)
    # all-to-all: each GPU sends 1/sharers of the numbers there and as many back; its own port carries nearly all
    ports = cluster.reached * (cluster.nvlink_gbs if sharers <= NODE else cluster.network_gbs) * 1e9
    travel = cluster.collective_s(4 * numbers, sharers) if gathers else 2 * 4 * numbers / sharers / ports
    others = replace(work, parameters=work.parameters - numbers)
    return (
        products / (cluster.newton_schulz_tflops * 1e12) + travel + adamw_s(others, cluster, sharers, gathers=gathers)
    )


def newton_schulz_flops(m: int, n: int) -> float:
    """Five rounds of x x^T, its square, and their product with x (n the larger)."""
    m, n = min(m, n), max(m, n)
    return NEWTON_SCHULZ_STEPS * (4.0 * m * m * n + 2.0 * m**3)


def largest_share(work: Sequence[float], sharers: int) -> float:
    """The load of the busiest owner when each item goes, the largest first, to the least busy."""
    load = [0.0] * sharers
    for item in sorted(work, reverse=True):
        load[min(range(sharers), key=load.__getitem__)] += item
    return max(load)


METHODS = {
    "ddp, AdamW whole": lambda w, c, n: ddp_s(w, c, n) + adamw_s(w, c, 1, gathers=False),
    "ddp, AdamW sharded": lambda w, c, n: ddp_s(w, c, n) + adamw_s(w, c, n, gathers=True),
    "ddp, Muon whole": lambda w, c, n: ddp_s(w, c, n) + muon_s(w, c, 1, gathers=False),
    "ddp, Muon sharded": lambda w, c, n: ddp_s(w, c, n) + muon_s(w, c, n, gathers=True),
    "fsdp, AdamW": lambda w, c, n: fsdp_s(w, c, n) + adamw_s(w, c, n, gathers=False),
    "fsdp, Muon sharded": lambda w, c, n: fsdp_s(w, c, n) + muon_s(w, c, n, gathers=False),
}


def efficiency(method: str, work: Workload, cluster: Cluster, gpus: int) -> float:
    """Compute over the whole step."""
    return work.compute_s / (work.compute_s + METHODS[method](work, cluster, gpus))


# ---- published runs --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Published:
    """A model measured on 8 and on more GPUs, in tokens/s of each."""

    name: str
    source: str
    on_8: float
    gpus: int
    measured: float


TORCHTITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3"
PUBLISHED = (
    Published("Llama 3.1 8B, FSDP", TORCHTITAN, 5762, 128, 5605),
    Published("Llama 3.1 8B, FSDP, compiled", TORCHTITAN, 6667, 128, 6514),
)
LLAMA_8B = Workload("Llama 3.1 8B", 8.03e9, 32, 2 * 8192, 0.0)
MUON_8 = ("sharding Muon of GPT-2 124M on 8 GPUs", "modded-nanogpt, records of 2024-10-14 and 17", 178.9, 153.8)


def predict(run: Published, cluster: Cluster) -> float:
    """tokens/s of a GPU on `run.gpus`, from those on 8: the speed without communication is what gives the latter."""
    low, high = run.on_8, 2 * run.on_8
    for _ in range(60):
        middle = (low + high) / 2
        work = replace(LLAMA_8B, tokens_per_s=middle)
        low, high = (middle, high) if middle * efficiency("fsdp, AdamW", work, cluster, 8) < run.on_8 else (low, middle)
    work = replace(LLAMA_8B, tokens_per_s=low)
    return low * efficiency("fsdp, AdamW", work, cluster, run.gpus)


def checks(cluster: Cluster) -> list[str]:
    """One line for each published run: what it measured and what the model says."""
    lines = []
    for run in PUBLISHED:
        said = predict(run, cluster)
        lines.append(
            f"{run.name}, 8 to {run.gpus} GPUs: measured {run.measured:,.0f} tokens/s of a GPU, "
            f"predicted {said:,.0f} ({said / run.measured - 1:+.1%}); {run.source}"
        )
    name, source, before, after = MUON_8
    work = WORKLOADS[0]
    whole, shared = (muon_s(work, cluster, n, gathers=n > 1) * 1e3 for n in (1, 8))
    lines.append(
        f"{name}: measured {before - after:.1f} ms less, predicted {whole - shared:.1f}; {source}. "
        f"That code took its matrices one by one, far below {cluster.newton_schulz_tflops:.0f} TFLOP/s"
    )
    return lines


# ---- table and figure ------------------------------------------------------------------------------------------------
def table(work: Workload, cluster: Cluster) -> str:
    """Markdown: a row for each method, a column for each number of GPUs."""
    title = f"{work.name}: {work.tokens:,} tokens of a GPU and update, {work.tokens_per_s:,.0f} tokens/s of one alone"
    lines = [f"{title}\n", f"| method | {' | '.join(map(str, GPUS))} |", f"|---|{'---|' * len(GPUS)}"]
    for method in METHODS:
        values = " | ".join(f"{efficiency(method, work, cluster, n):.1%}" for n in GPUS)
        lines.append(f"| {method} | {values} |")
    return "\n".join(lines)


def draw(cluster: Cluster, path: Path) -> None:
    figure, ((left, right),) = report.new_grid("Efficiency on many H100s, predicted and not measured", 1, 2)
    curves = {
        (work, method): [100 * efficiency(method, work, cluster, n) for n in GPUS]
        for work in WORKLOADS for method in METHODS
    }  # fmt: skip
    lowest = 10 * math.floor(min(map(min, curves.values())) / 10)
    legend = {}
    for axis, work in zip((left, right), WORKLOADS, strict=True):
        for method, marker in zip(METHODS, "os^vDX", strict=True):
            (legend[method],) = axis.plot(GPUS, curves[work, method], marker=marker, markersize=4, linewidth=1.2)
        axis.set_xscale("log", base=2)
        axis.set_xticks(GPUS, [str(n) for n in GPUS])
        axis.set(xlabel="GPUs", ylim=(lowest, 101))
        axis.set_title(f"{work.name}, {work.tokens:,} tokens of a GPU and update", fontsize=9, loc="left")
    left.set_ylabel("efficiency, %")
    assumed = (
        f"collectives reach {cluster.reached:.0%} of links of {cluster.nvlink_gbs:g} GB/s in a node and "
        f"{cluster.network_gbs:g} between; Newton-Schulz at {cluster.newton_schulz_tflops:g} TFLOP/s"
    )
    report.save_drawing(figure, path, "by the formulas of train/scaling.py", [assumed], legend)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m train.scaling", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    standard = Cluster()
    for name in ("nvlink_gbs", "network_gbs", "reached", "hop_us", "newton_schulz_tflops"):
        parser.add_argument(f"--{name}", type=float, default=getattr(standard, name), help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/scaling"), help="folder (default %(default)s)")
    settings = vars(check_ranges(parser.parse_args(argv)))
    out: Path = check_writable(settings.pop("out"))
    cluster = replace(standard, **settings)
    parts = [*(table(work, cluster) for work in WORKLOADS), "Checked against published runs:", *checks(cluster)]
    text = "\n\n".join(parts)
    print(text)
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    page = f"Predicted by `python -m train.scaling`, not measured.\n\n{about}\n\n{text}\n"
    write_whole(out / "scaling.md", page)
    draw(cluster, out / "scaling.png")
    print(f"\nwrote {out / 'scaling.md'} and scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
