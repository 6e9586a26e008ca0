"""Imports models from Hugging Face, nanoGPT and nanochat, and exports models to their layouts.

    python -m gptfast.hf import gpt2-medium --out_dir=out-gpt2-medium      a checkpoint that gptfast.sample and
                                                                           train.pretrain --init_from=DIR read
    python -m gptfast.hf import out-nanogpt --out_dir=out                  a folder with nanoGPT's ckpt.pt, or the file
    python -m gptfast.hf export out --to=exported --layout=llama           a folder that transformers reads
    python -m gptfast.hf export out --to=exported --layout=nanochat_pt    model_*.pt and meta_*.json for nanochat itself
    python -m gptfast.hf export out --to=model.gguf --dtype=bfloat16       a file that llama.cpp reads

Each has --help.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import kernels
from gptfast import checkpoint, cli, hf
from gptfast.config import GPTConfig
from gptfast.errors import NoTokenizer, UserError, nearest
from gptfast.hf import gguf, nanochat
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer, find_bpe, load_tokenizer

OWN = "own"
LayoutName = Literal["auto", "gpt2", "llama", "qwen3", "nanochat", "nanochat_pt"]


@dataclass(frozen=True)
class Import:
    source: str = ""  # gpt2, ..., gpt2-xl, OWNER/NAME on the hub, a folder, nanoGPT's ckpt.pt, nanochat's model_*.pt
    out_dir: str = ""  # where the checkpoint goes
    tokenizer: str = OWN  # own: the model's; False: none, and then it makes no text; or a folder, or gpt2, of equal ids


@dataclass(frozen=True)
class Export:
    source: str = "out"  # a folder with a checkpoint, or anything that import takes
    to: str = ""  # a folder for transformers, or a file that ends in .gguf for llama.cpp
    layout: LayoutName = "auto"  # auto: transformers' first that can express the model; nanochat_pt: nanochat's files
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the stored weights
    tokenizer: bool = True  # write the tokenizer too
    gelu_as_tanh: bool = False  # accept llama.cpp's approximate GELU for a model with the exact one


def main(argv: list[str]) -> None:
    commands = {"import": run_import, "export": run_export}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        raise UserError(f"unknown command {argv[0]}{nearest(argv[0], commands)}")


def run_import(argv: list[str]) -> None:
    config = cli.parse(Import, argv, positional="source")
    if not config.source or not config.out_dir:
        raise UserError("say what to import and where to: python -m gptfast.hf import gpt2 --out_dir=out-gpt2")
    tokenizer = _chosen_tokenizer(config)
    model = load(config.source)
    size = model.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > size:
        raise UserError(
            f"--tokenizer={config.tokenizer}: it has {tokenizer.vocab_size} tokens, and the model {size}; give the one "
            "that the model was trained with"
        )
    described = None if tokenizer is None else tokenizer.to_json()
    meta = {"model": dataclasses.asdict(model.config), "tokenizer": described, "imported_from": config.source}
    print(f"wrote {checkpoint.save(config.out_dir, step=0, model=model.state_dict(), optimizer={}, meta=meta)}")


def _chosen_tokenizer(config: Import) -> Tokenizer | None:
    """Returns the tokenizer that the import is to have. Raises UserError, which says how to do without."""
    wanted = config.tokenizer.lower()
    try:
        if wanted in ("false", "none", ""):
            return None
        if wanted in (OWN, "true"):
            return hf.load_tokenizer(config.source)
        folder = Path(config.tokenizer)
        is_data_set = (folder / "meta.json").exists() or any(folder.glob("*.bin"))
        return load_tokenizer(folder) if is_data_set else find_bpe(config.tokenizer)
    except UserError as error:
        hint = "" if "--tokenizer=False" in str(error) else "; --tokenizer=False imports the model without"
        raise UserError(f"{error}{hint}") from None


def _tokenizer_of(config: Export) -> Tokenizer | None:
    """Returns the tokenizer that is to be exported; none for nanochat, and where the model was imported without."""
    if not config.tokenizer or config.layout == "nanochat_pt":
        return None
    try:
        return hf.load_tokenizer(config.source)
    except NoTokenizer:
        print(f"{config.source} was imported without a tokenizer: only its weights are exported")
        return None


def run_export(argv: list[str]) -> None:
    config = cli.parse(Export, argv, positional="source")
    if not config.to:
        raise UserError("say where to: --to=FOLDER for transformers, --to=FILE.gguf for llama.cpp")
    model = load(config.source)
    tokenizer = _tokenizer_of(config)
    dtype = getattr(torch, config.dtype)
    if config.to.endswith(".gguf"):
        path = gguf.write(
            model, config.to, tokenizer, layout=config.layout, dtype=dtype, gelu_as_tanh=config.gelu_as_tanh,
            name=Path(config.to).stem,
        )  # fmt: skip
    elif config.layout == "nanochat_pt":
        path = nanochat.write(model, config.to, dtype=dtype)
    else:
        path = hf.save(model, config.to, tokenizer, layout=config.layout, dtype=dtype)
    print(f"wrote {path}")


def load(source: str) -> GPT:
    model = hf.load(source, kernels.load("reference"))  # only converts weights: no kernel runs
    settings = [
        f"{field.name}={getattr(model.config, field.name)}"
        for field in dataclasses.fields(GPTConfig)
        if getattr(model.config, field.name) != field.default
    ]
    print(f"{source}: {model.num_params(non_embedding=False):,} parameters; {', '.join(settings) or 'all defaults'}")
    return model


if __name__ == "__main__":
    sys.exit(cli.run(main))
