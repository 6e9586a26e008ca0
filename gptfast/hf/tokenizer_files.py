"""Writes a tokenizer to the files that transformers reads, and reads them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptfast import untrusted
from gptfast.chat.conversation import ASSISTANT, BOS, SPECIAL_TOKENS
from gptfast.errors import UserError
from gptfast.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, load_bpe

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, with which transformers gives the same ids for any text."""
    if isinstance(tokenizer, BPETokenizer):
        tokenizer.save(folder)
    elif isinstance(tokenizer, CharTokenizer):
        (folder / FILE).write_text(_of_characters(tokenizer).to_str(pretty=True), "utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / CONFIG).write_text(json.dumps(config, indent=1), "utf-8")
    else:
        raise UserError(f"a {type(tokenizer).__name__} has no form that transformers reads; export without a tokenizer")


def read(folder: Path) -> Tokenizer:
    """Reads the tokenizer in `folder`: byte-level BPE, or characters as by `write`. Raises UserError for others."""
    if (folder / FILE).is_file():
        with untrusted.expected(str(folder / FILE), "copy it again"):
            model = untrusted.json_object(folder / FILE, "copy it again")["model"]
            if model.get("type") == "WordLevel" and all(len(token) == 1 for token in model["vocab"]):
                return CharTokenizer("".join(sorted(model["vocab"], key=model["vocab"].get)))
    return load_bpe(folder)


def special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns bos_token_id and eos_token_id for config.json: a document's first token also ends the previous one."""
    bos = None if tokenizer is None else tokenizer.bos
    return {"bos_token_id": bos, "eos_token_id": bos}


def stops(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns eos_token_id for generation_config.json if the tokenizer can chat: the end of an answer stops too."""
    special = getattr(tokenizer, "special_tokens", {})
    return {"eos_token_id": [special[BOS], special[ASSISTANT[1]]]} if set(SPECIAL_TOKENS) <= set(special) else {}


def _of_characters(tokenizer: CharTokenizer) -> Any:
    """Returns an equal tokenizers.Tokenizer, in which every character is a word."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {char: i for i, char in enumerate(tokenizer.chars)}
    made = Tokenizer(models.WordLevel(ids, unk_token=""))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made
