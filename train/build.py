"""Builds what a run trains from its configuration: vocabulary, model, optimizer, and whether to use a CUDA graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from gptfast import checkpoint, fp8, hf, mfu, runtime, untrusted
from gptfast.config import VOCAB, GPTConfig, config_of
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.optim import adamw, groups_table, muon
from gptfast.parallel.team import Team
from gptfast.step import no_graph
from gptfast.tokenizer import GPT2_VOCAB, check_vocab, load_tokenizer, read_meta
from train.config import Pretrain
from train.documents import PROGRESS

ADAMW = ("weight_decay", "beta1", "beta2")  # flags that its state holds


def check_compiler(device: str) -> None:
    """Raises UserError where --compile=True cannot work on `device`: on a CPU, torch.compile needs a C++ compiler."""
    if torch.device(device).type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        raise UserError(
            "--compile=True needs a C++ compiler on a CPU, and there is none; install g++, or give --compile=False"
        ) from None


def describe_data(folder: Path) -> tuple[int | None, dict[str, Any]]:
    """Returns the vocabulary size and the tokenizer (as JSON) from meta.json; without meta.json, None and GPT-2's."""
    meta = read_meta(folder)
    if meta is None and (folder / PROGRESS).exists():
        raise UserError(
            f"{folder} is not finished; go on by the command that prepares it: python -m train.prepare {folder.name}"
        )
    if meta is not None:
        check_vocab(meta, folder)
        print(f"found vocab_size = {meta['vocab_size']} (inside {folder / 'meta.json'})")
        return meta["vocab_size"], meta["tokenizer"]
    if (folder / "meta.pkl").exists():
        load_tokenizer(folder)  # its error says what to do about a pickle
    return None, {"kind": "tiktoken", "name": "gpt2"}


def vocab_size_of(config: Pretrain) -> int:
    """Returns a new model's vocabulary size: the prepared data set's, else the dial's or GPT-2's; rounded up."""
    folder = Path(config.data_dir) / config.dataset
    meta = read_meta(folder) if folder.is_dir() else None
    if meta is not None:
        return rounded(meta["vocab_size"], meta["tokenizer"], config.vocab_multiple)
    return rounded(GPT2_VOCAB if folder.is_dir() or not config.depth else VOCAB, None, config.vocab_multiple)


def rounded(vocab_size: int, tokenizer: Any, multiple: int) -> int:
    """Rounds up to `multiple`, as odd sizes make matrix products slow; leaves characters alone, as nanoGPT does."""
    by_character = isinstance(tokenizer, dict) and tokenizer.get("kind") == "char"
    return vocab_size if by_character else -(-vocab_size // multiple) * multiple


def build_model(
    config: Pretrain, device: str, dtype: torch.dtype, vocab_size: int | None, tokenizer: dict[str, Any],
    saved: checkpoint.Checkpoint | None, typed: Collection[str] = (),
) -> GPT:  # fmt: skip
    """Returns the model that `init_from` asks for, on `device`, its context cropped to `config.block_size`.

    Says which of the `typed` flags a model that exists does not take.
    """
    ops = runtime.choose_ops(config.kernels, device)
    print(f"kernels:\n{ops}")
    before = checkpoint.last_step(config.out_dir)
    if saved is None and before is not None and not config.eval_only:
        print(
            f"{config.out_dir} has a run of {before} steps, whose checkpoints this one replaces when it saves; "
            "--resume=latest goes on with it, another --out_dir keeps it"
        )
    if saved is not None:
        print(f"Resuming training from {saved.path}")
        architecture = dataclasses.replace(config_of(saved.meta.get("model")), dropout=config.dropout)
        check_context(config, architecture, saved.path)
        tell_kept("the checkpoint", config, architecture, typed, saved.meta)
        model = GPT.of(architecture, saved.model, ops, dtype, where=str(saved.path))
    elif config.init_from == "scratch":
        print("Initializing a new model from scratch")
        tokens = vocab_size or GPT2_VOCAB
        padded = rounded(tokens, tokenizer, config.vocab_multiple)
        if vocab_size is None:
            print(f"defaulting to vocab_size of GPT-2 to {padded} (50257 rounded up for efficiency)")
        elif padded > tokens:
            print(f"vocab_size: {padded}, {tokens} rounded up for efficiency (--vocab_multiple=1 leaves it)")
        model = GPT(architecture_of(config, config.vocab_size or padded), ops, dtype)
        if config.zero_start:
            start_at_zero(model)
    else:
        print(f"Initializing from pretrained weights: {config.init_from}")
        pretrained = hf.load(config.init_from, ops, dtype=dtype)
        tell_kept(config.init_from, config, pretrained.config, typed)
        model = GPT(dataclasses.replace(pretrained.config, dropout=config.dropout), ops, dtype)
        model.load_state_dict(pretrained.state_dict())
    if config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    elif config.block_size > model.config.block_size:
        print(f"block_size: {model.config.block_size}, the model's own, not {config.block_size}")
    model = model.to(device)
    if config.fp8:
        use_fp8(config, model, device)
    return model


def check_context(config: Pretrain, saved: GPTConfig, path: Path) -> None:
    """Raises UserError where resuming would crop learned positions, which the optimizer's state is for."""
    if config.block_size < saved.block_size and saved.position == "learned":
        raise UserError(
            f"--block_size={config.block_size}: {path} was trained with {saved.block_size} learned positions, and so "
            f"was its optimizer; go on with --block_size={saved.block_size}, or train its weights anew at "
            f"{config.block_size} in another --out_dir: --init_from={path.parent}"
        )


def tell_kept(
    where: str, config: Pretrain, model: GPTConfig, typed: Collection[str], meta: Mapping[str, Any] | None = None
) -> None:
    """Prints the typed flags that a model from elsewhere, or a run that goes on (with its `meta`), does not take."""
    has = dataclasses.asdict(model)
    meant = {"n_kv_head": model.kv_heads, "mlp_width": model.hidden_width, "norm_eps": model.epsilon, "vocab_size": 0}
    names = has.keys() & {field.name for field in dataclasses.fields(config)} - {"block_size", "dropout"}
    names = names if "depth" in typed else names & set(typed)  # a depth sets them all
    if meta is not None and config.optimizer == "adamw":
        with untrusted.expected("the checkpoint's config", "train anew in another --out_dir"):
            has |= {name: meta["config"][name] for name in ADAMW if name in meta["config"]}
        names |= set(ADAMW) & set(typed) & has.keys()
    kept = [
        f"{name}={has[name]}, not {getattr(config, name)}"
        for name in sorted(names)
        if getattr(config, name) not in (has[name], meant.get(name, has[name]))
    ]
    if kept:
        print(f"kept from {where}: {'; '.join(kept)}")


def use_fp8(config: Pretrain, model: GPT, device: str) -> None:
    """Makes the large linear layers of `model` multiply in 8 bits; prints which, how, and the peak used for MFU."""
    way = fp8.way(device)
    converted, left = fp8.convert(model, way)
    if not converted:
        raise UserError(
            f"--fp8: no linear map of the blocks is at least {fp8.SMALLEST} by {fp8.SMALLEST} and of sizes that "
            f"{fp8.MULTIPLE} divides; leave it out"
        )
    how = "torch._scaled_mm" if way == "scaled_mm" else "emulation, which a CPU is no faster by"
    kinds = dict.fromkeys(name.split(".")[-1] for name in left)
    print(
        f"fp8: {len(converted)} linear maps, e4m3 forward and e5m2 gradients, by {how}; as before: {', '.join(kinds)}"
    )
    peak = mfu.peak_of(torch.device(device), config.peak_tflops)
    rate = None if peak is None else peak.flops("fp8")
    if peak is not None and rate is not None:
        print(f"mfu: against the dense fp8 peak of {peak.device}, {rate / 1e12:,.0f} TFLOP/s")


@torch.no_grad()
def start_at_zero(model: GPT) -> None:
    """Makes every block start as the identity and every logit at zero: the first loss is ln V; no warm-up is needed.

    Projections into the residual stream and the head are zero, other matrices uniform with deviation 0.5 / sqrt(C),
    embeddings N(0, 1). A tied head is a matrix like the others, and there the first loss is a little above ln V.
    """
    bound = 0.5 * math.sqrt(3 / model.config.n_embd)
    for name, p in model.named_parameters():
        if model.config.tied and p is model.lm_head.weight:
            p.uniform_(-bound, bound)
        elif name.endswith(("c_proj.weight", "lm_head.weight")):
            p.zero_()
        elif name.endswith("wte.weight"):
            p.normal_()
        elif name.endswith(("c_attn.weight", "c_fc.weight")):
            p.uniform_(-bound, bound)


def build_optimizer(config: Pretrain, model: GPT, team: Team) -> tuple[torch.nn.Module, Any]:
    """Returns the module to call and the optimizer; under torchrun, the wrapped module and the sharded optimizer."""
    if team.size == 1:
        return model, make_optimizer(config, model)
    from gptfast.parallel.optimizer import ShardedOptimizer
    from gptfast.parallel.split import parallelize, whole_shapes

    shapes = whole_shapes(model)
    called = parallelize(model, team, compiled=config.compile)
    return called, ShardedOptimizer(make_optimizer(config, model), model, called, shapes, model.config, team)


def make_optimizer(config: Pretrain, model: GPT) -> torch.optim.Optimizer:
    """Returns nanoGPT's AdamW, or Muon for the blocks' matrices and AdamW for the rest. Prints the groups."""
    rate, betas, decay = config.learning_rate, (config.beta1, config.beta2), config.weight_decay
    if config.optimizer == "adamw":
        return adamw(model, learning_rate=rate, betas=betas, weight_decay=decay)
    optimizer = muon(
        model, model.config, matrix_lr=config.matrix_lr, embedding_lr=rate, betas=betas,
        head_lr=rate if config.head_lr is None else config.head_lr,
        scalar_lr=rate if config.scalar_lr is None else config.scalar_lr,
        momentum=config.momentum, weight_decay=decay, cautious=config.cautious, decay_by_shape=config.decay_by_shape,
        equalize=config.equalize, normalize=config.normalize, normalize_beta2=config.normalize_beta2,
        rules=config.rules, steps=config.newton_schulz_steps, newton_schulz=model.ops.newton_schulz,
        matrix_kind="muon" if config.optimizer == "muon" else "adamw",
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr_scale"] = group["lr"] / rate  # the schedule is that of `learning_rate`
    print(groups_table(optimizer))
    return optimizer


def architecture_of(config: Pretrain, vocab_size: int) -> GPTConfig:
    """Returns the GPTConfig that the flags describe: every field that both have."""
    flags = dataclasses.asdict(config)
    names = {field.name for field in dataclasses.fields(GPTConfig)} - {"vocab_size"}
    return GPTConfig(vocab_size=vocab_size, **{name: flags[name] for name in names & flags.keys()})


def choose_graph(asked: bool | None, device: str, team: Team, dtype: torch.dtype, *, documents: bool) -> bool:
    """Decides whether an update is one CUDA graph; prints the reason. Raises UserError if requested but impossible."""
    obstacle = no_graph(device, ranks=team.size, dtype=dtype, documents=documents)
    if asked and obstacle:
        raise UserError(f"--cuda_graph=True: {obstacle}; leave it out")
    chosen = asked is not False and obstacle is None
    why = obstacle or ("as asked" if asked is not None else "one GPU and batches of one shape")
    print(f"cuda_graph: {'an update is one CUDA graph' if chosen else 'no'}, {why}")
    return chosen
