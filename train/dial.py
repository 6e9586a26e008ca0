"""Derives a model's shape and its whole training recipe from one number, its depth.

    width = 64 · depth, rounded up to whole heads of 128            P = weights of the blocks and of the head
    D = ratio · P                                                   tokens to train on; Dref: those of depth 12
    B = 2^19 · (D / Dref)^0.383, rounded to a power of 2            tokens in an update
    rates ∝ sqrt(B / 2^19); AdamW's also ∝ (width / 768)^-1/2       weight decay ∝ sqrt(B / 2^19) · Dref / D

The derivations are nanochat's (github.com/karpathy/nanochat), and so are the schedules. B: the critical batch grows as
a power of the data (Bergsma et al., "Power Lines", arXiv:2505.13738); rates: Malladi et al., arXiv:2205.10287. The
model is nanochat's to the last weight, or ours of its width, without value embeddings, windows and scalars.

nanochat's parts are tuned for long runs. In 300 updates of 1,024 characters of Python's standard library (contexts of
256, rates of depth 12, no decay; one seed) depth 4 came to a validation loss of 1.581, ours of as many parameters
(3.24 million, by --mlp_width=1048) to 1.451.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch

from gptfast import mfu
from gptfast.config import CONTEXT, Architecture, GPTConfig, of_depth
from gptfast.errors import UserError
from gptfast.optim import set_learning_rate, set_scheduled
from train.config import Pretrain

# All from nanochat at 92d63d4: gpt.py, scripts/base_train.py, optim.py
REFERENCE_DEPTH, BATCH_SIZE = 12, 32
REFERENCE_BATCH, BATCH_EXPONENT, RATIO = 2**19, 0.383, 12.0
WARMUP, WARMDOWN, FLOOR = 40, 0.65, 0.05
EMBEDDING_LR, HEAD_LR, MATRIX_LR, SCALAR_LR, WEIGHT_DECAY = 0.3, 0.008, 0.02, 0.5, 0.28
NORMUON_BETA2 = 0.9
MOMENTUM = (0.85, 0.97, 0.90)  # at the first update, after MOMENTUM_WARMUP iterations, at the end
MOMENTUM_WARMUP = 400


# ---- sizes


@dataclass(frozen=True)
class Sizes:
    parameters: int
    scaling: int  # weights of the blocks and of the head, by which data is measured
    flops_per_token: float  # forward and backward; of nanochat's model as nanochat counts, which is mfu's `palm`


def sizes(config: GPTConfig, architecture: Architecture = "gptfast") -> Sizes:
    """Returns the scaling weights and FLOPs per token of a model."""
    lookups = (config.position == "learned") * config.block_size + (not config.tied) * config.vocab_size
    flops = mfu.flops_per_token(config, config.block_size)
    return Sizes(
        parameters=mfu.palm_params(config) + lookups * config.n_embd + mfu.value_params(config)
        + mfu.scalar_params(config),
        scaling=mfu.block_params(config) + mfu.lm_head_params(config),
        flops_per_token=flops.palm if architecture == "nanochat" else flops.mfu,
    )  # fmt: skip


# ---- the recipe


@dataclass(frozen=True)
class Recipe:
    tokens: int  # tokens that the ratio asks for; batch and weight decay follow from them, whatever the horizon
    batch_tokens: int
    iterations: int
    batch_scale: float  # factor of every rate
    width_scale: float  # further factor of AdamW's rates
    weight_decay: float

    @property
    def embedding_lr(self) -> float:
        return EMBEDDING_LR * self.batch_scale * self.width_scale

    @property
    def head_lr(self) -> float:
        return HEAD_LR * self.batch_scale * self.width_scale

    @property
    def scalar_lr(self) -> float:
        return SCALAR_LR * self.batch_scale

    @property
    def matrix_lr(self) -> float:
        return MATRIX_LR * self.batch_scale


def recipe(
    model: Sizes, reference: Sizes, width: int, *, ratio: float = RATIO, iterations: int = 0, target_flops: float = 0.0,
    batch_tokens: int = 0,
) -> Recipe:  # fmt: skip
    """Returns how to train `model`, transferred from the settings tuned for `reference`, depth 12.

    The horizon is `iterations`, else `target_flops`, else `ratio` tokens per scaling weight; 0 means not given.
    `batch_tokens` overrides the batch. Raises UserError if not one update fits the horizon.
    """
    tokens, reference_tokens = int(ratio * model.scaling), ratio * reference.scaling
    best = REFERENCE_BATCH * (tokens / reference_tokens) ** BATCH_EXPONENT
    batch = batch_tokens or 2 ** round(math.log2(best))
    if not iterations:
        iterations = round(target_flops / (model.flops_per_token * batch)) if target_flops else tokens // batch
    if iterations < 1:
        raise UserError(f"the horizon is shorter than one update of {batch:,} tokens; raise it, or lower the batch")
    batch_scale = math.sqrt(batch / REFERENCE_BATCH)
    return Recipe(
        tokens=tokens,
        batch_tokens=batch,
        iterations=iterations,
        batch_scale=batch_scale,
        width_scale=(width / 768) ** -0.5,
        weight_decay=WEIGHT_DECAY * batch_scale * reference_tokens / tokens,
    )


def configure(config: Pretrain, typed: Collection[str], vocab_size: int) -> Pretrain:
    """Returns `config` with every field that the depth determines, except those `typed` or chosen by a preset.

    Raises UserError for a shape typed together with a depth, and for a batch that micro-batches do not divide.
    """
    chosen = set(typed) | {
        f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(Pretrain(), f.name)
    }
    for name in ("n_layer", "n_head", "n_embd"):
        if name in chosen:
            raise UserError(f"--{name} follows from --depth={config.depth}; leave one of them out")
    context = config.block_size if "block_size" in chosen else CONTEXT
    micro_batch = config.batch_size if "batch_size" in chosen else BATCH_SIZE
    kind = config.architecture
    model, reference = (
        of_depth(d, vocab_size, context, config.head_dim, kind) for d in (config.depth, REFERENCE_DEPTH)
    )
    scaled = recipe(
        sizes(model, kind),
        sizes(reference, kind),
        model.n_embd,
        ratio=config.target_param_data_ratio,
        iterations=config.max_iters if "max_iters" in chosen else 0,
        target_flops=config.target_flops,
        batch_tokens=config.total_batch_size,
    )
    if scaled.batch_tokens % (micro_batch * context):
        raise UserError(
            f"an update has {scaled.batch_tokens:,} tokens, which micro-batches of {micro_batch} · {context} do not "
            "divide; change --batch_size, --block_size or --total_batch_size"
        )
    shape = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if hasattr(config, f.name)}
    if "window_pattern" in chosen and "S" not in config.window_pattern:
        shape["window"] = None
    derived = shape | dict(
        batch_size=micro_batch,
        gradient_accumulation_steps=scaled.batch_tokens // (micro_batch * context),
        max_iters=scaled.iterations,
        lr_decay_iters=config.max_iters if "max_iters" in chosen else scaled.iterations,
        optimizer="muon",
        cautious=True,
        decay_by_shape=True,
        normalize=True,
        learning_rate=scaled.embedding_lr,
        head_lr=scaled.head_lr,
        matrix_lr=scaled.matrix_lr,
        min_lr=FLOOR * (config.learning_rate if "learning_rate" in chosen else scaled.embedding_lr),
        weight_decay=scaled.weight_decay,
        beta1=0.8,
        beta2=0.96,
        grad_clip=0.0,
        schedule="trapezoid",
        warmup_iters=WARMUP,
    )
    if kind == "nanochat":
        derived |= dict(
            rules="nanochat", scalar_lr=scaled.scalar_lr, equalize=True, normalize_beta2=NORMUON_BETA2
        )  # fmt: skip
    return dataclasses.replace(config, **{name: value for name, value in derived.items() if name not in chosen})


# ---- schedules


class Schedule(Protocol):
    """The fields that `learning_rate` reads from a configuration."""

    @property
    def decay_lr(self) -> bool: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_iters(self) -> int: ...
    @property
    def lr_decay_iters(self) -> int: ...
    @property
    def min_lr(self) -> float: ...


def learning_rate(iteration: int, schedule: Schedule) -> float:
    """Returns the rate: linear warm-up, half a cosine down to `min_lr` (Loshchilov & Hutter 2017), then `min_lr`."""
    peak, floor = schedule.learning_rate, schedule.min_lr
    warmup, end = schedule.warmup_iters, schedule.lr_decay_iters
    if not schedule.decay_lr:
        return peak
    if iteration < warmup:
        return peak * (iteration + 1) / (warmup + 1)
    if iteration > end:
        return floor
    progress = (iteration - warmup) / max(1, end - warmup)
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)


def set_schedule(optimizer: torch.optim.Optimizer, iteration: int, config: Pretrain) -> float:
    """Sets the scheduled hyperparameters for this iteration; returns the learning rate.

    The cosine changes the rates alone; trapezoid and linear also Muon's momentum and the matrices' weight decay.
    """
    if config.schedule == "linear" and config.decay_lr:
        rate = config.learning_rate * linear(iteration, config)
        for group in optimizer.param_groups:
            if group.get("name") == "matrices":
                remaining = max(0.0, 1 - iteration / config.lr_decay_iters)
                set_scheduled(group, "weight_decay", config.weight_decay * remaining)
            if group.get("kind") == "muon":
                rise = min(1.0, iteration / max(1, config.momentum_iters))
                start = config.momentum_start
                set_scheduled(group, "momentum", start + rise * (config.momentum - start))
    elif config.schedule == "cosine" or not config.decay_lr:
        rate = learning_rate(iteration, config)
    else:
        end = config.lr_decay_iters
        floor = config.min_lr / config.learning_rate if config.learning_rate else 0.0
        rate = config.learning_rate * trapezoid(iteration, end, config.warmup_iters, config.warmdown_ratio, floor)
        for group in optimizer.param_groups:
            if group.get("kind") == "muon":
                set_scheduled(group, "momentum", momentum(iteration, end, config.warmdown_ratio))
                set_scheduled(group, "weight_decay", config.weight_decay * half_cosine(iteration, end))
    set_learning_rate(optimizer, rate)
    return rate


def trapezoid(
    iteration: int, end: int, warmup: int = WARMUP, warmdown: float = WARMDOWN, floor: float = FLOOR
) -> float:
    """Returns the rate's factor: rises to 1 in `warmup` iterations, falls to `floor` in the last part of `end`."""
    down = round(warmdown * end)
    if iteration < warmup:
        return (iteration + 1) / warmup
    if iteration <= end - down:
        return 1.0
    remaining = max(0, end - iteration) / max(1, down)
    return remaining + (1 - remaining) * floor


def linear(iteration: int, config: Pretrain) -> float:
    """Returns the rate's factor: rises to 1 in `warmup_iters`, falls to 0 in the last part of `lr_decay_iters`."""
    end = config.lr_decay_iters
    rise = (iteration + 1) / config.warmup_iters if iteration + 1 < config.warmup_iters else 1.0
    down = config.warmdown_ratio * end
    return min(rise, 1.0, max(0.0, end - iteration) / down if down else 1.0)


def momentum(iteration: int, end: int, warmdown: float = WARMDOWN) -> float:
    """Returns Muon's momentum: rising over the first MOMENTUM_WARMUP iterations, falling as the rates fall."""
    first, highest, last = MOMENTUM
    down = round(warmdown * end)
    if iteration < MOMENTUM_WARMUP:
        return first + (highest - first) * iteration / MOMENTUM_WARMUP
    if iteration < end - down:
        return highest
    fallen = min(1.0, (iteration - (end - down)) / max(1, down))
    return highest * (1 - fallen) + last * fallen


def half_cosine(iteration: int, end: int) -> float:
    """Returns the factor that falls from 1 to 0 at `end` along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / max(1, end))))
