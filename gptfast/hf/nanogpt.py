"""Reads nanoGPT's checkpoints: `ckpt.pt`, as its train.py saves it.

    model = hf.load("out-shakespeare-char")          the folder, or the path of one .pt file

The file holds weights, the optimizer's state, `model_args` and settings of the run. It is a pickle, read by torch's
restricted unpickler, which runs no code (torch_files.py); of what it holds, the weights and `model_args` are used.

The model is GPT-2's with the exact GELU, LayerNorm's eps 1e-5, biases by choice, and matrices as nn.Linear has them
(github.com/karpathy/nanoGPT, model.py). A ckpt.pt does not state its version: before June 2023 GELU was approximated by
tanh, and such a model comes out with logits that differ by some 1e-3.

A model of characters has their list in a pickle beside its data, meta.pkl, which is not read: train.prepare makes the
same list from the same text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptfast import untrusted
from gptfast.config import GPTConfig
from gptfast.errors import UserError
from gptfast.hf import nanochat, torch_files
from gptfast.hf.layouts import Weights
from gptfast.tokenizer import BPETokenizer, Tokenizer

FILE = "ckpt.pt"
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")  # of model_args, besides bias and dropout
GPT2_VOCABS = (50257, 50304)  # GPT-2's tokens, and the same rounded up
FIX = "give the ckpt.pt of nanoGPT's train.py"
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"


def find(source: str | Path) -> Path | None:
    """Returns the ckpt.pt in a folder, or the given .pt file itself; None where there is none, or it is nanochat's."""
    path = Path(source)
    if path.is_file() and path.suffix == ".pt" and not nanochat.FILE.fullmatch(path.name):
        return path
    is_theirs = (path / FILE).is_file() and not (path / "config.json").exists()
    return path / FILE if is_theirs else None


def read(path: Path) -> tuple[GPTConfig, Weights]:
    """Reads the model of a ckpt.pt. Raises UserError if that fails."""
    content = torch_files.read(path, FIX)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise UserError(f"{path} holds no model with its model_args; {FIX}")
    with untrusted.expected(f"what {path} holds", FIX):
        theirs, is_tied = _one_table(dict(content["model"]))
        ours = {name: w.float() for name, w in torch_files.state_dict(theirs, path, FIX).items()}
        if is_tied:
            ours[HEAD] = ours[TABLE]
        return _config(content["model_args"], ours, is_tied), ours


def tokenizer(path: Path) -> Tokenizer:
    """Returns GPT-2's tokenizer for a model of its vocabulary. Raises UserError for any other."""
    size = read(path)[0].vocab_size
    if size in GPT2_VOCABS:
        return BPETokenizer("gpt2")
    raise UserError(
        f"{path} has {size} tokens, and their list is in its data set's meta.pkl, a pickle, which could run code and "
        "is not read; name a tokenizer with the same ids, as train.prepare makes of the text: python -m gptfast.hf "
        f"import {path} --out_dir=DIR --tokenizer=data/shakespeare_char"
    )


def _one_table(theirs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns the state dict without masks, which are no parameters, and without the head if it is the embedding.

    nanoGPT's is: one tensor under two names.
    """
    theirs = {name: w for name, w in theirs.items() if not str(name).endswith(".attn.bias")}
    prefix = "_orig_mod." if f"_orig_mod.{TABLE}" in theirs else ""
    head, table = theirs[prefix + HEAD], theirs[prefix + TABLE]
    is_tied = head.shape == table.shape and head.stride() == table.stride() and head.data_ptr() == table.data_ptr()
    if is_tied:
        del theirs[prefix + HEAD]
    return theirs, is_tied


def _config(args: dict[str, Any], weights: Weights, is_tied: bool) -> GPTConfig:
    """Converts model_args. The oldest state no bias, and have them."""
    unknown = sorted(str(name)[:60] for name in args.keys() - {*SIZES, "bias", "dropout"})
    if unknown:
        raise UserError(f"its model_args say {', '.join(unknown[:5])} of the model, which nanoGPT's model has not")
    bias = args.get("bias", "transformer.ln_f.bias" in weights)
    sizes = {name: args[name] for name in SIZES}
    return GPTConfig(**sizes, bias=bias, dropout=args.get("dropout", 0.0), tied=is_tied)
