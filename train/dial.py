"""Derives a model's shape and its whole training recipe from one number, its depth.

    width = 64 · depth, rounded up to whole heads of 128            P = weights of the blocks and of the head
    D = ratio · P                                                   tokens to train on; Dref: those of depth 12
    B = 2^19 · (D / Dref)^0.383, rounded to a power of 2            tokens in an update
    rates ∝ sqrt(B / 2^19); AdamW's also ∝ (width / 768)^-1/2       weight decay ∝ sqrt(B / 2^19) · Dref / D

The derivations are nanochat's (github.com/karpathy/nanochat). B: the critical batch grows as a power of the data
(Bergsma et al., "Power Lines", arXiv:2505.13738); rates: Malladi et al., arXiv:2205.10287. The model is nanochat's to
the last weight, or ours of its width, without value embeddings, windows and scalars.

nanochat's parts are tuned for long runs. In 300 updates of 1,024 characters of Python's standard library (contexts of
256, rates of depth 12, no decay; one seed) depth 4 came to a validation loss of 1.581, ours of as many parameters
(3.24 million, by --mlp_width=1048) to 1.451.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass

from gptfast import mfu
from gptfast.config import CONTEXT, Architecture, GPTConfig, of_depth
from gptfast.errors import UserError
from train.config import Pretrain
from train.schedules import FLOOR, WARMUP

# All from nanochat at 92d63d4: gpt.py, scripts/base_train.py, optim.py
REFERENCE_DEPTH, BATCH_SIZE = 12, 32
REFERENCE_BATCH, BATCH_EXPONENT, RATIO = 2**19, 0.383, 12.0
EMBEDDING_LR, HEAD_LR, MATRIX_LR, SCALAR_LR, WEIGHT_DECAY = 0.3, 0.008, 0.02, 0.5, 0.28
NORMUON_BETA2 = 0.9


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
