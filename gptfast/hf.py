"""Hugging Face's GPT-2 weights into ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kernels import Ops

from .cli import UserError
from .config import GPTConfig
from .model import GPT

# Hugging Face's Conv1D keeps its weight as (in, out); Linear wants (out, in).
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, not parameters
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"
}  # fmt: skip


def load_gpt2(
    source: str | Path | Mapping[str, Tensor],
    ops: Ops,
    *,
    n_head: int | None = None,
    activation: str = "gelu_new",
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """A GPT with the weights of a Hugging Face GPT-2: a state dict, or a folder with config.json and model.safetensors.

    Sizes are read from the weights. A state dict does not tell the number of heads (by default n_embd / 64, as in every
    published GPT-2) nor the activation; a folder's config.json does. Raises UserError for what does not fit.
    """
    if not isinstance(source, Mapping):
        source, settings = _read_folder(Path(source))
        n_head, activation = settings["n_head"], settings.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise UserError(f"activation {activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    weights = {_named(name): w for name, w in source.items() if not name.endswith(_MASKS)}
    if "transformer.wte.weight" not in weights:
        raise UserError("not a GPT-2 checkpoint: it holds no wte.weight")
    vocab_size, n_embd = weights["transformer.wte.weight"].shape
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    config = GPTConfig(
        block_size=weights["transformer.wpe.weight"].shape[0],
        vocab_size=vocab_size,
        n_layer=1 + max(int(name.split(".")[2]) for name in weights if name.startswith("transformer.h.")),
        n_head=n_head or n_embd // 64,
        n_embd=n_embd,
        activation=_ACTIVATIONS[activation],
    )
    model = GPT(config, ops, dtype)
    model.load_state_dict({name: w.t() if name.endswith(_CONV1D) else w for name, w in weights.items()})
    return model


def find_gpt2(name: str) -> Path:
    """The folder of a GPT-2: `name` if it is one, else that of gpt2, gpt2-medium, ... in the Hugging Face cache or hub.

    Raises UserError for a name that is neither, and where it is not cached and the hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if name not in PUBLISHED:
        raise UserError(
            f"--init_from={name}: no such folder; give scratch, resume, a folder, or one of {', '.join(PUBLISHED)}"
        )
    elsewhere = "fetch it where there is a network and give its folder, --init_from=FOLDER"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name} comes from the Hugging Face hub: pip install huggingface_hub, or {elsewhere}"
        ) from None
    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # the hub's client raises its own, requests' and httpx's types for "no network"
        raise UserError(f"cannot get {name} from the Hugging Face hub ({type(error).__name__}); {elsewhere}") from None


def _named(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict]:
    from safetensors.torch import load_file

    for needed in ("config.json", "model.safetensors"):
        if not (folder / needed).is_file():
            raise UserError(f"{folder} holds no {needed}; give a folder written by save_pretrained")
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
