"""Imports and exports models: GPT-2, Llama, Qwen3 and nanochat layouts of Hugging Face, nanochat's own files; to GGUF.

    model = hf.load("gpt2")                       a name on the hub, a folder in its layout, or one of our checkpoints
    hf.load("out-shakespeare-char")               a folder with nanoGPT's ckpt.pt, or nanochat's model_*.pt
    hf.save(model, "exported", tokenizer)         AutoModelForCausalLM.from_pretrained("exported") reads it
    nanochat.write(model, "exported")             nanochat's own load_model reads it
    gguf.write(model, "model.gguf", tokenizer)    llama.cpp reads it

    python -m gptfast.hf import gpt2-medium --out_dir=out-gpt2-medium
    python -m gptfast.hf export out --to=exported --layout=llama

Weights are read from safetensors, or from torch's files if they hold only tensors; settings and tokenizer are JSON. No
code of a model's author runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from gptfast import checkpoint, untrusted
from gptfast.aside import folder_aside
from gptfast.config import GPTConfig, config_of
from gptfast.errors import UserError, remedy, to_install
from gptfast.hf import nanochat, nanogpt, tokenizer_files
from gptfast.hf.layouts import LAYOUTS, Settings, Weights, layout_for, layout_of
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer, Tokenizer, from_json
from kernels import Ops

__all__ = ["LAYOUTS", "PUBLISHED", "find", "load", "load_tokenizer", "save", "why_not"]

PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # openai-community's on the hub, by their short names
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
STALE = (INDEX, tokenizer_files.FILE, tokenizer_files.CONFIG, "ranks.tiktoken", "encoding.json")  # of an earlier export
FETCHED = ("*config.json", "*.safetensors", INDEX, "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


def load(source: str | Path, ops: Ops | None = None, *, dtype: torch.dtype = torch.float32) -> GPT:
    """Loads the model of `source` on the CPU, with fp32 parameters and activations of `dtype`.

    `source`: a folder with a checkpoint of ours, of nanoGPT or of nanochat, a folder written by save_pretrained, or a
    name on the hub. `ops`: kernels.load("auto") by default. Raises UserError for a model that is missing, damaged, or
    not expressible as a GPT.
    """
    folder = find(source)
    if _is_ours(folder):
        saved = checkpoint.load(folder)
        config, weights = config_of(saved.meta.get("model")), saved.model
    elif own := nanochat.newest(folder):
        config, weights = nanochat.read(own)
    elif own := nanogpt.find(folder):
        config, weights = nanogpt.read(own)
    else:
        settings, theirs = read_settings(folder), _read_tensors(folder)
        config = read_config(folder, settings)
        layout = layout_of(settings)
        if config.n_layer > len(theirs):  # before looking for each layer
            raise UserError(
                f"the {len(theirs)} tensors in {folder} do not fit its config.json: {config.n_layer} layers"
            )
        with untrusted.expected(f"what {folder} holds", "fetch it again"):
            try:
                weights = layout.take(config, theirs)
            except KeyError as error:
                lacking = f"the weights in {folder} lack {error.args[0]}"
                raise UserError(f"{lacking}; config.json says {layout.name}") from None
        if theirs:
            raise UserError(f"{folder} has weights that a {layout.name} has not: {', '.join(sorted(theirs)[:5])}")
    return GPT.of(config, weights, ops or kernels.load("auto"), dtype, where=str(folder))


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Loads the tokenizer of a `source` as in `load`. Raises UserError where there is none."""
    folder = find(source)
    if _is_ours(folder):
        return from_json(checkpoint.load(folder).meta.get("tokenizer"))
    if nanochat.newest(folder):
        raise UserError(
            f"{folder}: nanochat keeps its tokenizer as a pickle, which could run code and is not read; leave it out "
            "with --tokenizer=False"
        )
    if own := nanogpt.find(folder):
        return nanogpt.tokenizer(own)
    if str(source) in PUBLISHED and not (folder / tokenizer_files.FILE).is_file():
        return BPETokenizer("gpt2")
    return tokenizer_files.read(folder)


def why_not(folder: Path) -> str:
    """Returns in one line why our model cannot express the config.json in `folder`; empty if it can."""
    if _is_ours(folder) or nanochat.newest(folder) or nanogpt.find(folder):
        return ""
    settings = read_settings(folder)
    try:
        read_config(folder, settings)
    except UserError as reason:
        return str(reason)
    return ""


def save(
    model: GPT,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    layout: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes `model` for transformers: config.json, model.safetensors, generation_config.json and tokenizer files.

    `layout`: gpt2, llama, qwen3 or nanochat; auto takes the first that can express the model. `dtype`: of the stored
    weights. Ids beyond the tokenizer's vocabulary are padding, and are left out. Returns the folder, which holds at any
    instant the complete old model, the complete new one, or none. Raises UserError, before a byte is written, for a
    model that the layout cannot express, and for a folder of checkpoints.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    settings, weights = exported(model, layout, model.config.vocab_size if tokenizer is None else tokenizer.vocab_size)
    ids = tokenizer_files.special_ids(tokenizer)
    folder = Path(folder)
    if (folder / checkpoint.MANIFEST).exists() or _is_ours(folder):
        raise UserError(f"{folder} holds a checkpoint, which an export would spoil; choose another folder")
    try:
        with folder_aside(folder, first="config.json", stale=STALE) as building:
            if tokenizer is not None:
                tokenizer_files.write(tokenizer, building)
            stored = {name: w.detach().to("cpu", dtype).contiguous() for name, w in weights.items()}
            save_file(_unshared(stored), building / SINGLE, metadata={"format": "pt"})
            _write_json(building / "generation_config.json", ids | tokenizer_files.stops(tokenizer))
            _write_json(building / "config.json", settings | ids | {"dtype": str(dtype).removeprefix("torch.")})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = remedy(error, "choose another folder")
        raise UserError(f"cannot write to {folder} ({reason}); {fix}") from None
    return folder


def exported(
    model: GPT, layout: str, vocab_size: int | None = None, among: Collection[str] | None = None
) -> tuple[dict[str, Any], Weights]:
    """Returns config.json and the tensors of `model` in `layout`, its vocabulary cropped to `vocab_size` tokens.

    `among` as in `layout_for`. Raises UserError for a model that the layout cannot express.
    """
    config = model.config
    chosen = layout_for(config, layout, among, () if nanochat.misfits(config) else ("nanochat_pt",))
    ours: Weights = model.state_dict()
    if vocab_size is not None and vocab_size < config.vocab_size:
        config = dataclasses.replace(config, vocab_size=vocab_size)
        ours |= {name: ours[name][:vocab_size].clone() for name in ("transformer.wte.weight", "lm_head.weight")}
    settings = {
        "model_type": chosen.name, "architectures": [chosen.architecture], "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied, **chosen.settings(config),
    }  # fmt: skip
    return settings, chosen.give(config, ours)


def find(source: str | Path) -> Path:
    """Returns the folder of `source`: itself if it is one, else Hugging Face's cache, downloading what is missing.

    A file of nanochat's or nanoGPT's is returned itself.

    Raises UserError for a name that is neither, and where it is not cached and the hub cannot be reached.
    """
    name = str(source)
    if Path(name).is_dir() or nanochat.newest(name) or nanogpt.find(name):
        return Path(name)
    if name.endswith(".pt"):
        raise UserError(f"{name}: no such file; give nanoGPT's ckpt.pt or nanochat's model_*.pt")
    if name not in PUBLISHED and name.count("/") != 1:
        raise UserError(
            f"{name}: no such folder; give one with a model, {', '.join(PUBLISHED)}, or OWNER/NAME of one on the hub"
        )
    elsewhere = "fetch it where there is a network and give its folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        fix = to_install(error, "huggingface_hub")
        raise UserError(f"{name} comes from the Hugging Face hub: {fix}, or {elsewhere}") from None
    repository = f"openai-community/{name}" if name in PUBLISHED else name
    try:
        return Path(snapshot_download(repository, allow_patterns=list(FETCHED)))
    except Exception as error:  # the hub's client raises its own, requests' and httpx's types for "no network"
        reason = f"{type(error).__name__}: {untrusted.reason(error)}"
        fix = remedy(error, elsewhere)
        raise UserError(f"cannot get {name}, which is no folder, from the Hugging Face hub ({reason}); {fix}") from None


# ---- files -----------------------------------------------------------------------------------------------------------


def _is_ours(folder: Path) -> bool:
    return any(folder.glob("ckpt-*"))


def read_settings(folder: Path) -> Settings:
    """Reads config.json. Raises UserError if it is missing or holds no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        known = "a checkpoint of ours, config.json, nanoGPT's ckpt.pt or nanochat's model_*.pt"
        raise UserError(f"{folder} holds no model; give a folder with {known}")
    return untrusted.json_object(path, "fetch it again")


def read_config(folder: Path, settings: Settings) -> GPTConfig:
    """Converts config.json to a GPTConfig. Raises UserError if that is not possible."""
    with untrusted.expected(str(folder / "config.json"), "fetch it again"):
        return layout_of(settings).config(settings)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads every tensor of model.safetensors, or of the parts that its index lists."""
    index = folder / INDEX
    parts: list[Any] = [SINGLE]
    if index.is_file():
        with untrusted.expected(str(index), "fetch it again"):
            parts = sorted(set(untrusted.json_object(index, "fetch it again")["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in parts:
        if not untrusted.plain_name(name):
            raise UserError(f"{index} names {str(name)[:80]!r}, which is no file of its folder; fetch it again")
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; give a folder written by save_pretrained")
        try:
            with untrusted.opened(folder / name) as file:
                tensors |= untrusted.tensors(file)[0]
                if len(tensors) > untrusted.MOST_TENSORS:
                    raise ValueError(f"with the files before it, it has more than {untrusted.MOST_TENSORS:,} tensors")
        except OSError as error:
            fix = remedy(error, "fetch it again")
            raise UserError(f"cannot read {folder / name} ({untrusted.reason(error)}); {fix}") from None
        except ValueError as error:
            raise UserError(f"{folder / name} is damaged ({untrusted.reason(error)}); fetch it again") from None
    return tensors


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _unshared(tensors: Weights) -> Weights:
    """Copies tensors that share memory with an earlier one, which safetensors cannot store."""
    addresses: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in addresses else tensor
        addresses.add(address)
    return result
