"""Reads and writes nanochat's own checkpoints: a folder with model_001234.pt and meta_001234.json.

    model = hf.load("base_checkpoints/d12")                     the newest step there; or the path of one model_*.pt
    nanochat.write(model, "exported", step=1234)                 nanochat's load_model reads it

A .pt file is a pickle, read by torch's restricted unpickler, which runs no code (torch_files.py); a file with anything
but tensors is refused. The tokenizer is an ordinary pickle, and is not read.

The names equal ours except for queries, keys and values, which are three matrices there. Most of nanochat's
architecture is fixed in its code (github.com/karpathy/nanochat at 92d63d4, gpt.py), and its checkpoints do not state
their version: a checkpoint that lacks a tensor of this version is from another one, and is refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch

from gptfast import untrusted
from gptfast.aside import folder_aside
from gptfast.config import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig, nanochat
from gptfast.errors import UserError
from gptfast.hf import torch_files
from gptfast.hf.layouts import Weights, halves_swapped, instead
from gptfast.model import GPT

FILE = re.compile(r"model_(\d{6,})\.pt")
SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size")  # of meta's model_config, besides sequence_len
QKV = ("c_q", "c_k", "c_v")
# Fields that nanochat always has, but that neutral weights can switch off; and fields that change no logit
FILLED_IN = ("value_embeddings", "residual_scalars", "smear", "backout", "rope_sign")
FREE = ("dropout", "initialization", "n_kv_head", "window_pattern")


def newest(source: str | Path) -> Path | None:
    """Returns the model_*.pt of the highest step in a folder, or the given file itself; None where there is none."""
    path = Path(source)
    if path.is_file() and FILE.fullmatch(path.name):
        return path
    steps = [(int(match[1]), file) for file in path.glob("model_*.pt") if (match := FILE.fullmatch(file.name))]
    return max(steps)[1] if steps else None


# ---- in --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[GPTConfig, Weights]:
    """Reads the model of a model_*.pt, described by the meta_*.json beside it. Raises UserError if that fails."""
    meta = path.with_name(path.name.replace("model_", "meta_").replace(".pt", ".json"))
    settings = untrusted.json_object(meta, "nanochat keeps it beside the model")
    with untrusted.expected(str(meta), "fetch it again"):
        config = _config(settings["model_config"])
    content = torch_files.read(path, "save model.state_dict() alone")
    theirs = torch_files.state_dict(content, path, "give nanochat's model_*.pt")
    if config.n_layer > len(theirs):  # before looking for each layer
        raise UserError(f"the {len(theirs)} tensors in {path} do not fit its meta: {config.n_layer} layers")
    with untrusted.expected(f"what {path} holds", "fetch it again"):
        theirs = {name: w.float() for name, w in theirs.items()}
        try:
            ours = _taken(config, theirs)
        except KeyError as error:
            raise UserError(
                f"{path} has no {error.args[0]}: it is of a nanochat with another architecture than 92d63d4's; use that"
            ) from None
    if theirs:
        raise UserError(f"{path} has weights that nanochat at 92d63d4 has not: {', '.join(sorted(theirs)[:5])}")
    return config, ours


def _config(settings: dict[str, Any]) -> GPTConfig:
    """Converts meta's model_config. Checkpoints from before windows have no such field, and no windows."""
    known = {name: settings[name] for name in SIZES}
    unknown = set(settings) - {*SIZES, "sequence_len", "window_pattern"}
    if unknown:
        raise UserError(
            f"its meta says {', '.join(sorted(unknown)[:5])} of the model, which nanochat at 92d63d4 has not"
        )
    pattern = settings.get("window_pattern", "L").upper()
    return nanochat(block_size=settings["sequence_len"], window_pattern=pattern, **known)


def _taken(config: GPTConfig, theirs: Weights) -> Weights:
    """Returns their tensors under our names, removing them from `theirs`; crops vocabularies padded to 64.

    Raises ValueError for tables of another vocabulary.
    """
    ours = {}
    for i in range(config.n_layer):
        block = f"transformer.h.{i}.attn."
        ours[f"{block}c_attn.weight"] = torch.cat([theirs.pop(f"{block}{name}.weight") for name in QKV])
        for part in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj", *(["attn.ve_gate"] if i in config.value_layers else [])):
            name = f"transformer.h.{i}.{part}.weight"
            ours[name] = theirs.pop(name)
    for name in _tables(config):
        table = theirs.pop(name)
        if len(table) not in (config.vocab_size, _padded(config.vocab_size)):
            raise ValueError(f"{name} has {len(table)} rows, and its meta says vocab_size {config.vocab_size}")
        ours[name] = table[: config.vocab_size]
    for name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "smear_gate.weight", "backout_lambda"):
        ours[name] = theirs.pop(name)
    return ours


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // 64) * 64


def _tables(config: GPTConfig) -> list[str]:
    """Returns the names of the tensors with a row per token."""
    values = [f"value_embeds.{i}.weight" for i in config.value_layers]
    return ["transformer.wte.weight", "lm_head.weight", *values]


# ---- out -------------------------------------------------------------------------------------------------------------


def misfits(config: GPTConfig) -> list[str]:
    """Returns the fields of `config` that nanochat's code cannot express, as 'field=value'."""
    try:
        theirs = dataclasses.asdict(_nearest(config))
    except UserError:  # its gates and rotary positions cannot be of these sizes
        return [f"n_embd={config.n_embd}", f"n_head={config.n_head}"]
    same = {"head_size": config.n_embd // config.n_head, "mlp_width": 4 * config.n_embd}  # what None means
    differing = []
    for field, value in dataclasses.asdict(config).items():
        fits = field in (*FILLED_IN, *FREE) or value in (theirs[field], same.get(field, theirs[field]))
        if not fits:
            differing.append(f"{field}={value}")
    return differing


def _nearest(config: GPTConfig) -> GPTConfig:
    """Returns the config of nanochat's model of these sizes."""
    sizes = {name: getattr(config, name) for name in (*SIZES, "block_size")}
    return nanochat(**sizes, window_pattern=config.window_pattern or "L")


def write(model: GPT, folder: str | Path, *, step: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes model_*.pt and meta_*.json in nanochat's format, and returns the folder.

    Parts that the model lacks get neutral weights. Raises UserError, before a byte is written, for a model that
    nanochat's code cannot express.
    """
    reasons = misfits(model.config)
    if reasons:
        raise UserError(f"nanochat cannot express {', '.join(reasons)}; {instead(model.config)}")
    weights = {name: w.to(dtype) for name, w in _given(model.config, model.state_dict()).items()}
    config = _nearest(model.config)
    settings: dict[str, Any] = {name: getattr(config, name) for name in SIZES} | {"n_kv_head": config.kv_heads}
    settings |= {"sequence_len": config.block_size, "window_pattern": config.window_pattern}
    folder = Path(folder)
    try:
        with folder_aside(folder, first=f"meta_{step:06d}.json") as building:
            torch.save(weights, building / f"model_{step:06d}.pt")
            meta = json.dumps({"step": step, "model_config": settings}, indent=2)
            (building / f"meta_{step:06d}.json").write_text(meta + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror or error}); choose another folder") from None
    return folder


def _given(config: GPTConfig, ours: Weights) -> Weights:
    """Returns our tensors under their names, with neutral weights for missing parts and vocabularies padded to 64."""
    filled, theirs = _nearest(config), {}
    for i in range(config.n_layer):
        block, rows = f"transformer.h.{i}.", [config.n_head, config.kv_heads, config.kv_heads]
        parts = ours[f"{block}attn.c_attn.weight"].split([heads * config.head_dim for heads in rows])
        for name, part in zip(QKV, parts, strict=True):
            turned = config.rope_sign == 1 and name != "c_v"
            theirs[f"{block}attn.{name}.weight"] = halves_swapped(part, config) if turned else part.clone()
        for part in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            theirs[f"{block}{part}.weight"] = ours[f"{block}{part}.weight"]
        if i in filled.value_layers:
            gate = f"{block}attn.ve_gate.weight"
            theirs[gate] = ours.get(gate, torch.zeros(config.kv_heads, VALUE_GATE_CHANNELS))
    width, padded = config.kv_heads * config.head_dim, _padded(config.vocab_size)
    for name in _tables(filled):
        table = ours.get(name, torch.zeros(config.vocab_size, width))
        theirs[name] = torch.nn.functional.pad(table, (0, 0, 0, padded - config.vocab_size))
    neutral = {
        "resid_lambdas": torch.ones(config.n_layer), "x0_lambdas": torch.zeros(config.n_layer),
        "smear_lambda": torch.zeros(1), "smear_gate.weight": torch.zeros(1, SMEAR_GATE_CHANNELS),
        "backout_lambda": torch.zeros(1),
    }  # fmt: skip
    return theirs | {name: ours.get(name, value) for name, value in neutral.items()}
