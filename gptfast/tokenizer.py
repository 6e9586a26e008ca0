"""Text to token ids and back, behind one interface.

    tokenizer = CharTokenizer.from_text("hello world")
    tokenizer.decode(tokenizer.encode("hello")) == "hello"
    from_json(tokenizer.to_json()) == tokenizer

A tokenizer is described by JSON alone, so that no file runs code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gptfast.cli import UserError

LARGEST_VOCAB = 2**16  # token files hold uint16


class Tokenizer(Protocol):
    """What the model, the samplers and the data sets know of any tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 ... vocab_size - 1."""

    def encode(self, text: str) -> list[int]:
        """Raises UserError for text that has no tokens."""

    def encode_tensor(self, text: str) -> Tensor:
        """The same ids as a tensor (len,) uint16, the form of a token file."""

    def decode(self, ids: Sequence[int]) -> str:
        """Raises UserError for an id outside the vocabulary."""

    def to_json(self) -> dict[str, Any]:
        """A description of plain JSON values from which `from_json` makes an equal tokenizer."""


def from_json(description: Any) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises UserError if it is no such description."""
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind == "char" and isinstance(description.get("chars"), str):
        return CharTokenizer(description["chars"])
    if kind == "tiktoken" and isinstance(description.get("name"), str):
        return BPETokenizer(description["name"])
    raise UserError(f"not a tokenizer that gptfast knows: {str(description)[:80]}; prepare the data again")


def load_tokenizer(data_dir: str | Path) -> Tokenizer:
    """The tokenizer of a prepared data set, `data/<name>/`.

    A folder without meta.json holds GPT-2 tokens, which is nanoGPT's convention. Raises UserError for a missing folder,
    a meta.json that cannot be read, and a pickled meta.pkl, which could run code and is never opened.
    """
    data_dir = Path(data_dir)
    meta = read_meta(data_dir)
    if meta is not None:
        return from_json(meta.get("tokenizer"))
    if not (data_dir / "train.bin").exists() and not (data_dir / "val.bin").exists():
        raise UserError(f"no data set in {data_dir}; make it: python -m train.prepare {data_dir.name}")
    if (data_dir / "meta.pkl").exists():
        raise UserError(
            f"{data_dir} has a pickled meta.pkl, which is never opened, and no meta.json; "
            f"make one: python -m train.prepare {data_dir.name} --source TEXT"
        )
    return BPETokenizer("gpt2")


def read_meta(data_dir: str | Path) -> dict[str, Any] | None:
    """`meta.json` of a prepared data set, or None where there is none; it has at least `vocab_size` and `tokenizer`.

    Raises UserError for a missing folder and for a file that cannot be read or lacks these.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"no data set in {data_dir}; make it: python -m train.prepare {data_dir.name}")
    path = data_dir / "meta.json"
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); prepare the data again") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("vocab_size"), int) or "tokenizer" not in meta:
        raise UserError(f"{path} does not state vocab_size and tokenizer; prepare the data again")
    return meta


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character: the id of a character is its place in `chars`."""

    chars: str

    def __post_init__(self) -> None:
        if len(set(self.chars)) != len(self.chars):
            raise UserError("the characters of a tokenizer must differ; prepare the data again")
        if not 0 < len(self.chars) <= LARGEST_VOCAB:
            raise UserError(f"a character tokenizer has 1 to {LARGEST_VOCAB} characters, not {len(self.chars)}")

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The tokenizer whose vocabulary is the distinct characters of `text` in code point order."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[char] for char in text]
        except KeyError as error:
            raise self._unknown(text, error.args[0]) from None

    def encode_tensor(self, text: str) -> Tensor:
        """Ids of a long text (len,) uint16: one table look-up for all its characters."""
        if not text:
            return torch.empty(0, dtype=torch.uint16)
        codes, known = _code_points(text), _code_points(self.chars)
        table = torch.full((int(torch.maximum(codes.max(), known.max())) + 1,), -1, dtype=torch.int32)
        table[known] = torch.arange(self.vocab_size, dtype=torch.int32)
        ids = table.index_select(0, codes)
        if ids.min() < 0:
            raise self._unknown(text, next(char for char in text if char not in self._ids))
        return ids.to(torch.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        return "".join([self.chars[i] for i in ids])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self.chars}

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {char: i for i, char in enumerate(self.chars)}

    def _unknown(self, text: str, char: str) -> UserError:
        known = self.chars if self.vocab_size <= 100 else self.chars[:100] + "..."
        return UserError(
            f"character {char!r} (U+{ord(char):04X}, position {text.index(char)}) is not in the vocabulary; "
            f"leave it out or replace it with one of the {self.vocab_size} characters {known!r}"
        )


class BPETokenizer:
    """Byte pair encoding through tiktoken, by tiktoken's name of the encoding. `gpt2` has 50257 tokens.

    tiktoken fetches the ranks once from the network and caches them. Raises UserError where neither is possible.
    """

    def __init__(self, name: str = "gpt2") -> None:
        self.name = name
        try:
            import tiktoken

            self._encoding = tiktoken.get_encoding(name)
        except ImportError:
            raise UserError(f"the {name} tokenizer needs tiktoken: pip install tiktoken") from None
        except Exception as error:  # requests and tiktoken raise a dozen unrelated types for "no network"
            raise UserError(
                f"cannot get the {name} tokenizer's ranks ({type(error).__name__}: {_first_line(error)}); connect to "
                "the network once, or set TIKTOKEN_CACHE_DIR to a folder in which tiktoken has cached them"
            ) from None

    @property
    def vocab_size(self) -> int:
        return self._encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Special tokens in `text` are encoded as ordinary text, so that a prompt cannot forge one."""
        return self._encoding.encode_ordinary(text)

    def encode_tensor(self, text: str) -> Tensor:
        if self.vocab_size > LARGEST_VOCAB:
            raise UserError(f"tokens of {self.name} do not fit uint16 token files; use gpt2")
        return torch.tensor(self.encode(text), dtype=torch.int32).to(torch.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        _check_ids(ids, self.vocab_size)
        return self._encoding.decode(list(ids))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "tiktoken", "name": self.name}


def _code_points(text: str) -> Tensor:
    """The code point of every character, (len,) int32."""
    return torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
        stray = next(i for i in ids if not 0 <= i < vocab_size)
        raise UserError(f"token id {stray} is outside the vocabulary of {vocab_size}; use the model's own tokenizer")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:200]
