"""Plans training on a GPU: memory, time and cost, all computed by formula without running anything.

    python -m train.plan                                    the models of the dial on the GPU here, or on an H100
    python -m train.plan "RTX 4090" --n_gpu=2 --prices="RTX 4090=0.4"
    python -m train.pretrain --depth=12 --dry_run           one run in full, on several GPUs

Memory of one GPU, in bytes, for P weights (Pm of them Muon's), activations of a bytes each, B sequences of T tokens:

    weights 4P + gradients 4P + optimizer 8(P - Pm) + 4 Pm           AdamW keeps two numbers for a weight, Muon one
    16-bit copies of the blocks' weights, a · Pblocks                kept for the backward pass; none in fp32
    activations BT (a [L (6C + 2K + R + nW) + 2C] + 4 [s (2L + 1) + L H])
    loss: a VC for the head's gradient, and min(a BTV, 1 GiB) of logits at a time

of L layers of width C, K = G D; R = C + K with rotary positions, else 0; W the MLP's width, n = 3 with swiglu, else 2;
s = 3 statistics of a row in LayerNorm, 1 in RMSNorm; nanochat's parts: `_nanochats_bytes`. Dropout's masks
and activation checkpointing are left out. The formula is exact, to the byte, for what the Triton kernels save for the
backward pass (tests/test_plan.py); 10% of the GPU's memory stay free for CUDA itself and fragmentation. With several
GPUs, each holds everything.

Time = FLOPs / (GPUs · peak · MFU), exact FLOPs and dense bf16 peaks (gptfast/mfu.py) at an MFU that you assume.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gptfast import cli, mfu, report, untrusted
from gptfast.config import CONTEXT, PRESETS, VOCAB, Architecture, GPTConfig, of_depth
from gptfast.errors import UserError
from gptfast.log import Row
from train import dial
from train.config import Pretrain
from train.dial import Recipe, Sizes

DEPTHS = (4, 6, 8, 12, 16, 20, 24, 26, 32)
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPUS = ("RTX 4090", "A100 SXM 40GB", "A100 SXM 80GB", "H100 SXM", "H200 SXM", "B200")
USABLE = 0.9  # of a GPU's memory
LOGITS_BYTES = 2**30  # linear_cross_entropy's largest piece on a GPU
NOTE = "Memory and time are counted, not measured: see the head of train/plan.py."


@dataclass(frozen=True)
class Plan:
    gpu: str = ""  # its name, as in the table of gptfast/mfu.py; the GPU here by default, or else an H100 SXM
    n_gpu: int = 1  # how many of them train together
    depth: int = 0  # of one model only; 0: several, and the GPT-2s
    context: int = CONTEXT  # tokens in a sequence; a GPT-2 takes 1024 at most
    vocab_size: int = VOCAB  # of the dial's models
    ratio: float = dial.RATIO  # tokens to train on for each weight of the blocks and the head
    assumed_mfu: float = 0.4  # the fraction of the peak that training reaches
    measured: str = ""  # folder of rows, as results/nvidia-h200: use the MFU measured there, not assumed_mfu
    prices: str = "H100 SXM=3"  # dollars for an hour of a GPU, NAME=DOLLARS with commas between; n/a for all others
    architecture: Architecture = "nanochat"  # whose model of a depth to count

    def __post_init__(self) -> None:
        for name in ("n_gpu", "context", "vocab_size", "ratio"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name}={getattr(self, name)}: must be above 0")
        if not 0 < self.assumed_mfu <= 1:
            raise UserError(f"--assumed_mfu={self.assumed_mfu}: must be above 0 and at most 1")
        if self.depth < 0:
            raise UserError(f"--depth={self.depth}: must not be negative")


# ---- memory


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.loss


def memory(config: GPTConfig, batch: int, *, optimizer: str, itemsize: int = 2) -> Memory:
    """Returns the peak memory of a training step of `batch` sequences, by the formula in the module's docstring."""
    parameters, blocks = dial.sizes(config).parameters, mfu.block_params(config)
    momenta = blocks if optimizer == "muon" else 0
    tokens = batch * config.block_size
    return Memory(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=8 * (parameters - momenta) + 4 * momenta,
        copies=itemsize * (blocks + mfu.smear_params(config) + config.smear + config.backout) if itemsize < 4 else 0,
        activations=activation_bytes(config, tokens, itemsize),
        loss=itemsize * mfu.lm_head_params(config) + min(itemsize * tokens * config.vocab_size, LOGITS_BYTES),
    )


def activation_bytes(config: GPTConfig, tokens: int, itemsize: int) -> int:
    """Returns the bytes saved for the backward pass, including the loss's gradient of the hidden state."""
    L, C, K = config.n_layer, config.n_embd, config.kv_heads * config.head_dim
    Q = config.attention_width
    rotated = (Q + K) * ((config.position == "rope") + config.qk_norm_weight)
    wide = (3 if config.activation == "swiglu" else 2) * config.hidden_width
    statistics = (3 if config.norm == "layernorm" else 1) * (2 * L + 1) + L * config.n_head
    plain = itemsize * (L * (4 * C + 2 * Q + 2 * K + rotated + wide) + 2 * C) + 4 * statistics
    return tokens * (plain + _nanochats_bytes(config, itemsize))


def _nanochats_bytes(config: GPTConfig, itemsize: int) -> int:
    """Returns the bytes per token that nanochat's parts save: the inputs of each scale, sum and gate."""
    L, C, K, G = config.n_layer, config.n_embd, config.kv_heads * config.head_dim, config.kv_heads
    numbers = config.residual_scalars * L * C + config.smear * (2 * C + 2)
    numbers += len(config.value_layers) * 2 * (K + G)
    numbers += config.backout * C * (L // 2 == L - 1)  # at other depths the next layer saves it anyway
    numbers += config.embedding_norm * C
    return itemsize * numbers + 4 * config.embedding_norm


def largest_batch(config: GPTConfig, memory_bytes: float, *, optimizer: str) -> int:
    """Returns the largest micro-batch, in sequences, that fits; 0 if none does."""
    low, high = 0, 2**16
    while low < high:
        middle = (low + high + 1) // 2
        if memory(config, middle, optimizer=optimizer).total <= USABLE * memory_bytes:
            low = middle
        else:
            high = middle - 1
    return low


# ---- the models of the dial on one GPU


def main(argv: list[str]) -> None:
    config = cli.parse(Plan, argv, positional="gpu")
    print(tabulate(config, gpu_named(config.gpu or _gpu_here())))


def _gpu_here() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "H100 SXM"


def gpu_named(name: str) -> mfu.Peak:
    """Returns the peak of the GPU of that name. Raises UserError where it is not known."""
    peak = mfu.peak(name)
    if peak is None or peak.bf16 is None:
        raise UserError(f"{name}: {mfu.why_unknown(name)}")
    return peak


def prices_of(text: str) -> dict[str, float]:
    """Parses 'H100 SXM=3,RTX 4090=0.5': dollars per GPU hour, by the name of the GPU's row in mfu.DEVICES."""
    prices = {}
    for entry in filter(None, text.split(",")):
        name, _, dollars = entry.partition("=")
        try:
            prices[gpu_named(name.strip()).device] = float(dollars)
        except ValueError as error:
            reason = error if isinstance(error, UserError) else f"{dollars!r} is no number"
            raise UserError(f"--prices={entry}: {reason}; type NAME=DOLLARS, commas between") from None
    return prices


def tabulate(config: Plan, gpu: mfu.Peak) -> str:
    """Returns a line for each model: its sizes, the largest micro-batch that fits, and training time and price."""
    price = prices_of(config.prices).get(gpu.device)
    reached = measured_mfu(config.measured, gpu) if config.measured else {}
    at = ", ".join(f"{share:.0%} ({name})" for name, share in reached.items())
    lines = [
        f"{config.n_gpu} x {gpu.device}, {_or_na(gpu.memory_gb, 'g', ' GB')} and {_tera(gpu.bf16)} bf16 TFLOP/s each, "
        f"at {f'a measured MFU of {at}' if reached else f'an assumed MFU of {config.assumed_mfu:.0%}'}; "
        f"contexts of {config.context} tokens",
        "",
        f"{'model':<12}{'parameters':>15}{'FLOP/token':>12}{'tokens':>17}{'an update':>11}{'updates':>9}{'batch':>7}"
        f"{'GB':>7}{'tokens/s':>12}{'hours':>10}{'dollars':>10}",
    ]
    for name, model, counted, recipe in _models(config):
        tokens = recipe.batch_tokens * recipe.iterations
        batch = _micro_batch(model, gpu, recipe.batch_tokens // config.n_gpu)
        memory_gb = memory(model, batch, optimizer=_optimizer(model)).total / 1e9 if batch else None
        per_token = mfu.flops_per_token(model, model.block_size).mfu  # those that the peak is used for
        share = nearest_mfu(reached, model) or config.assumed_mfu
        spent = None if batch == 0 else _gpu_hours(per_token * tokens, gpu, share)
        hours = spent and spent / config.n_gpu
        lines.append(
            f"{name:<12}{counted.parameters:>15,}{per_token:>12.4g}{tokens:>17,}{recipe.batch_tokens:>11,}"
            f"{recipe.iterations:>9,}{_or_na(batch, 'd'):>7}{_or_na(memory_gb, '.1f'):>7}"
            f"{_or_na(hours and tokens / hours / 3600, ',.0f'):>12}{_or_na(hours, ',.1f'):>10}"
            f"{_or_na(spent and price and spent * price, ',.0f'):>10}"
        )
    note = f"\n\nbatch: sequences of the largest micro-batch that fits and one update can use; 0: not one fits. {NOTE}"
    return "\n".join(lines) + note


def measured_mfu(folder: str, gpu: mfu.Peak) -> dict[str, float]:
    """Returns the highest MFU of a training step on this GPU, by preset, from `bench model` and `bench profile` rows.

    Raises UserError where the folder has no such row, or rows of another GPU.
    """
    paths = [path for name in ("model", "profile") if (path := Path(folder) / f"{name}.jsonl").is_file()]
    reached: dict[str, float] = {}
    rows = report.read(paths)
    with untrusted.expected(f"--measured={folder}: a row there", "delete that row, or measure again"):
        _note_mfu(reached, rows, folder, gpu)
    if not reached:
        raise UserError(f"--measured={folder}: no row of a training step there; make some with python -m bench model")
    return reached


def _note_mfu(reached: dict[str, float], rows: Iterable[Row], folder: str, gpu: mfu.Peak) -> None:
    """Adds to `reached` the MFU of each preset's training steps."""
    for row in rows:
        if (
            row["what"] not in ("model", "profile")
            or row["name"] not in PRESETS
            or row.get("direction", "train") != "train"
        ):
            continue
        device = mfu.peak(row["hardware"]["name"])
        if device is None or device.device != gpu.device:
            raise UserError(
                f"--measured={folder}: rows of {row['hardware']['name']}, not of {gpu.device}; name that GPU"
            )
        model = PRESETS[row["name"]]
        T = row.get("dims", {}).get("T", model.block_size)
        share = mfu.utilization(row["tokens_per_s"], model, T, peak=gpu, dtype=getattr(torch, row["dtype"]))["mfu"]
        if not (isinstance(T, int) and T > 0 and (share is None or 0 < share <= 1)):
            raise ValueError(f"{row['name']} has {row['tokens_per_s']} tokens/s at T={T}, an MFU of {share}")
        if share is not None and row.get("valid", True):
            reached[row["name"]] = max(share, reached.get(row["name"], 0.0))


def nearest_mfu(reached: Mapping[str, float], model: GPTConfig) -> float | None:
    """Returns the MFU of the model nearest in size."""
    size = math.log(dial.sizes(model).parameters)
    distance = lambda name: abs(math.log(dial.sizes(PRESETS[name]).parameters) - size)
    return reached[min(reached, key=distance)] if reached else None


def _models(config: Plan) -> list[tuple[str, GPTConfig, Sizes, Recipe]]:
    """Returns each model's name, config, sizes and training recipe."""
    rows: list[tuple[str, GPTConfig, Sizes, Recipe]] = []
    for depth in (config.depth,) if config.depth else DEPTHS:
        model, reference = (
            of_depth(d, config.vocab_size, config.context, architecture=config.architecture)
            for d in (depth, dial.REFERENCE_DEPTH)
        )
        counted = dial.sizes(model, config.architecture)
        recipe = dial.recipe(
            counted, dial.sizes(reference, config.architecture), model.n_embd, ratio=config.ratio
        )  # fmt: skip
        rows.append((f"d{depth}", model, counted, recipe))
    for name in PUBLISHED if not config.depth else ():
        counted, reference_counted = dial.sizes(PRESETS[name]), dial.sizes(PRESETS["gpt2"])
        recipe = dial.recipe(counted, reference_counted, PRESETS[name].n_embd, ratio=config.ratio)
        rows.append((name, PRESETS[name], counted, recipe))
    return rows


def _optimizer(model: GPTConfig) -> str:
    return "adamw" if model.position == "learned" else "muon"


def _micro_batch(model: GPTConfig, gpu: mfu.Peak, tokens: int) -> int | None:
    """Returns the largest micro-batch that fits, at most `tokens` tokens; None where the memory is not known."""
    if gpu.memory_gb is None:
        return None
    return min(largest_batch(model, gpu.memory_gb * 2**30, optimizer=_optimizer(model)), tokens // model.block_size)


def _gpu_hours(flops: float, gpu: mfu.Peak, assumed_mfu: float) -> float:
    assert gpu.bf16 is not None
    return flops / (gpu.bf16 * assumed_mfu) / 3600


# ---- one run in full


def describe(config: Pretrain, model: GPTConfig) -> str:
    """Returns the text that `python -m train.pretrain ... --dry_run` prints."""
    counted = dial.sizes(model, config.architecture) if config.depth else dial.sizes(model)
    flops = mfu.flops_per_token(model, model.block_size)
    needed = memory(model, config.batch_size, optimizer=config.optimizer)
    per_update = config.gradient_accumulation_steps * config.batch_size * model.block_size
    tokens = per_update * config.max_iters
    positions = model.block_size * model.n_embd * (model.position == "learned")
    head_lr = config.learning_rate if config.head_lr is None else config.head_lr
    muon = f"matrices {config.matrix_lr:.4g}, head {head_lr:.4g}, others " if config.optimizer == "muon" else ""
    warmdown = f" over the last {config.warmdown_ratio:.0%}" if config.schedule == "trapezoid" else ""
    values = f", value embeddings {mfu.value_params(model):,}" if model.value_embeddings else ""
    rows = {
        "model": f"{model.n_layer} layers, {model.n_head} heads of {model.head_dim}, width {model.n_embd}, "
        f"context {model.block_size}, vocabulary {model.vocab_size:,}",
        "parameters": f"{counted.parameters:,}; {counted.parameters - positions:,} without positions; blocks "
        f"{mfu.block_params(model):,}, head {mfu.lm_head_params(model):,}{values}",
        **(_dialled(config, model, counted, per_update) if config.depth else {}),
        "checkpoint": f"{(needed.weights + needed.optimizer) / 1e6:,.0f} MB",
        "FLOPs": f"{flops.mfu:.4e} per token, {flops.mfu * tokens:.4e} in all; by PaLM's count {flops.palm:.4e}, "
        f"{flops.palm / flops.mfu:.4f} times as many",
        "horizon": f"{config.max_iters:,} updates of {per_update:,} tokens = {tokens:,} tokens, "
        f"{tokens / counted.scaling:.2f} for each weight of blocks and head",
        "update": f"{config.gradient_accumulation_steps} micro-batches of {config.batch_size} sequences, over all GPUs",
        "rates": f"{config.optimizer}: {muon}{config.learning_rate:.4g}; weight decay {config.weight_decay:.4g}",
        "schedule": f"{config.schedule}, {config.warmup_iters:,} iterations up, down to {config.min_lr:.4g}{warmdown}",
        "memory": f"{_gb(needed.total)} on each GPU: weights {_gb(needed.weights)}, gradients {_gb(needed.gradients)}, "
        f"optimizer {_gb(needed.optimizer)}, copies {_gb(needed.copies)}, activations {_gb(needed.activations)}, "
        f"loss {_gb(needed.loss)}",
    }
    return "\n".join(
        [*(f"{name:<12}{text}" for name, text in rows.items()), "", *_on_gpus(config, model, flops.mfu * tokens)]
    )


def _dialled(config: Pretrain, model: GPTConfig, counted: Sizes, batch_tokens: int) -> dict[str, str]:
    """Returns what the depth set: data, batch, and the factors applied to the rates of depth 12."""
    kind = config.architecture
    reference = of_depth(dial.REFERENCE_DEPTH, model.vocab_size, model.block_size, config.head_dim, kind)
    derived = dial.recipe(
        counted, dial.sizes(reference, kind), model.n_embd, ratio=config.target_param_data_ratio,
        iterations=config.max_iters, batch_tokens=batch_tokens,
    )  # fmt: skip
    return {
        "dial": f"{kind}'s depth {config.depth}: {config.target_param_data_ratio:g} tokens for each of "
        f"{counted.scaling:,} weights of blocks and head, {derived.tokens:,}",
        "scales": f"rates {derived.batch_scale:.4f} for the batch, "
        f"AdamW's {derived.width_scale:.4f} besides for the width",
    }


def _on_gpus(config: Pretrain, model: GPTConfig, flops: float) -> list[str]:
    prices = prices_of(config.prices)
    lines = [f"{'GPU':<22}{'GB':>6}{'largest micro-batch':>21}{'hours on one':>14}{'on eight':>10}{'dollars':>10}"]
    for name in dict.fromkeys([*GPUS, *prices]):
        gpu = gpu_named(name)
        batch = (
            None if gpu.memory_gb is None else largest_batch(model, gpu.memory_gb * 2**30, optimizer=config.optimizer)
        )
        hours = None if batch == 0 else _gpu_hours(flops, gpu, config.assumed_mfu)
        lines.append(
            f"{name:<22}{_or_na(gpu.memory_gb, 'g'):>6}{_or_na(batch, 'd'):>21}{_or_na(hours, ',.1f'):>14}"
            f"{_or_na(hours and hours / 8, ',.1f'):>10}"
            f"{_or_na(hours and prices.get(gpu.device) and hours * prices[gpu.device], ',.0f'):>10}"
        )
    return [*lines, "", f"At an assumed MFU of {config.assumed_mfu:.0%}. {NOTE}"]


# ---- words


def _or_na(value: float | None, form: str, unit: str = "") -> str:
    return "n/a" if value is None else f"{value:{form}}{unit}"


def _tera(flops: float | None) -> str:
    return _or_na(flops and flops / 1e12, ".4g")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(cli.run(main))
