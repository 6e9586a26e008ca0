"""Exports a model to one GGUF file for llama.cpp: settings, tokenizer and weights.

The tensors are those of the Hugging Face layout under llama.cpp's names. Two kinds are rearranged: GPT-2's matrices are
transposed back to (out, in), and the rows of Llama's queries and keys are permuted, because llama.cpp rotates
neighbouring pairs of a head instead of its halves.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.aside import file_aside
from gptfast.config import GPTConfig
from gptfast.errors import UserError
from gptfast.hf import exported
from gptfast.hf.layouts import Weights
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from gptfast.tokenizer_json import BYTE_LETTERS, GPT2_PATTERN

KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # llama.cpp's names
# llama.cpp splits text by its own code, selected by a pattern name, such as GPT-2's and Llama 3's. It lacks
# cl100k_base's: tiktoken takes white space at the end of a text as one piece, Llama 3's pattern splits it after a line
# break.
LLAMA3_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
LAYOUTS = ("gpt2", "llama", "qwen3")  # supported by llama.cpp
NEVER = b"\xff"  # a byte that never occurs in UTF-8
SPLITS = {GPT2_PATTERN: "gpt-2", LLAMA3_PATTERN: "llama-bpe"}


def write(
    model: GPT,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    layout: str = "auto",
    dtype: torch.dtype = torch.float32,
    gelu_as_tanh: bool = False,
    name: str = "gptfast",
) -> Path:
    """Writes `model` to `path` and returns it. Matrices are stored as `dtype`, vectors as fp32.

    Without a tokenizer, llama.cpp takes and gives token ids only. llama.cpp has one GELU, by tanh: a model with the
    exact one is refused unless `gelu_as_tanh` accepts logits that differ by some 1e-3. Raises UserError, before a byte
    is written, for a model or tokenizer that llama.cpp does not support.
    """
    if dtype not in KINDS:
        raise UserError(f"dtype {dtype}: a GGUF file holds float32, float16 or bfloat16 here")
    settings, weights = exported(model, layout, among=LAYOUTS)
    arch = settings["model_type"]
    _check_activation(settings, gelu_as_tanh)
    described = _describe_tokenizer(tokenizer, model.config.vocab_size)
    with file_aside(Path(path)) as building:
        _write(building, path, model, weights, described, arch=arch, dtype=dtype, name=name)
    return Path(path)


def _write(
    building: Path, path: str | Path, model: GPT, weights: Weights, described: dict[str, Any], *, arch: str,
    dtype: torch.dtype, name: str,
) -> None:  # fmt: skip
    import gguf
    import numpy as np

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], model.config.n_layer)
    writer = gguf.GGUFWriter(building, arch)
    writer.add_name(name)
    _add_settings(writer, model.config, arch)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == torch.float32 else f"MOSTLY_{KINDS[dtype]}"])
    for method, value in described.items():
        getattr(writer, method)(value)
    for theirs, w in _turned(weights, model.config, arch).items():
        data = np.ascontiguousarray(w.detach().float().cpu().numpy())
        kind = gguf.GGMLQuantizationType[KINDS[dtype] if data.ndim == 2 and ".wpe." not in theirs else "F32"]
        their_name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert their_name is not None, theirs
        writer.add_tensor(their_name, gguf.quantize(data, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}); choose another file") from None


def _check_activation(settings: dict[str, Any], gelu_as_tanh: bool) -> None:
    activation = settings.get("activation_function", settings.get("hidden_act"))
    if activation == "gelu" and not gelu_as_tanh:
        raise UserError(
            "llama.cpp has only GPT-2's GELU, by tanh, and this model has the exact one: its logits would differ by "
            "some 1e-3; accept that with --gelu_as_tanh"
        )
    if activation not in ("gelu", "gelu_new", "silu"):
        arch = settings["model_type"]
        raise UserError(
            f"activation=relu2: llama.cpp's {arch} has no ReLU²; export to a folder for transformers, which has it, "
            f"or train with --activation={'gelu_tanh' if arch == 'gpt2' else 'swiglu'}"
        )


def _add_settings(writer: Any, config: GPTConfig, arch: str) -> None:
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.hidden_width)
    writer.add_head_count(config.n_head)
    writer.add_vocab_size(config.vocab_size)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.epsilon)
        return
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.epsilon)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)


def _turned(weights: Weights, config: GPTConfig, arch: str) -> Weights:
    """Returns the tensors in llama.cpp's arrangement."""
    turned = {}
    for name, w in weights.items():
        if arch == "gpt2" and ".h." in name and w.ndim == 2:
            w = w.t()
        elif arch == "llama" and "q_proj" in name:
            w = neighbours_from_halves(w, config.n_head)
        elif arch == "llama" and "k_proj" in name:
            w = neighbours_from_halves(w, config.kv_heads)
        turned[name] = w
    return turned


def neighbours_from_halves(w: Tensor, heads: int) -> Tensor:
    """Permutes rows (heads · D, ...) so that the pairs of a head that were D/2 apart become neighbours."""
    return w.view(heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def _describe_tokenizer(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    """Returns the writer's calls for a tokenizer, {method: value}. Ids beyond the tokenizer's are marked unused."""
    if tokenizer is None:
        return {"add_tokenizer_model": "no_vocab"}
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; give the model's own"
        )
    merges: list[str] = []
    tokens = {i: f"<|unused {i}|>" for i in range(vocab_size)}
    kinds = dict.fromkeys(range(vocab_size), 5)  # gguf.TokenType: 1 normal, 3 control, 5 unused
    if isinstance(tokenizer, BPETokenizer):
        if tokenizer.pattern not in SPLITS:
            raise UserError(
                f"llama.cpp does not know how this tokenizer splits text ({tokenizer.pattern}); it knows gpt2's and "
                "Llama 3's; export with --tokenizer=False"
            )
        split = SPLITS[tokenizer.pattern]
        merges = [f"{_written(left)} {_written(right)}" for left, right in tokenizer.merges()]
        ordinary = {i: _written(token) for token, i in tokenizer.ranks.items()}
        special = {i: token for token, i in tokenizer.special_tokens.items()}
    elif isinstance(tokenizer, CharTokenizer) and tokenizer.chars.isascii():
        split, special = "gpt-2", {}  # no merges, so the split is irrelevant; but llama.cpp requires one
        merges = [f"{_written(NEVER)} {_written(NEVER)}"]
        ordinary = {i: _written(char.encode()) for i, char in enumerate(tokenizer.chars)}
    else:
        raise UserError(
            "llama.cpp takes byte-level BPE, and ASCII characters, not this tokenizer; export with --tokenizer=False"
        )
    described = {
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": split,
        "add_token_list": list((tokens | ordinary | special).values()),
        "add_token_types": list((kinds | dict.fromkeys(ordinary, 1) | dict.fromkeys(special, 3)).values()),
        "add_token_merges": merges,
        "add_add_bos_token": tokenizer.bos is not None,
    }
    ids = {"add_bos_token_id": tokenizer.bos, "add_eos_token_id": tokenizer.bos}
    return described | {method: i for method, i in ids.items() if i is not None}


def _written(token: bytes) -> str:
    return "".join([BYTE_LETTERS[byte] for byte in token])
