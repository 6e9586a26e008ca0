"""Text to token ids and back, behind one interface.

    tokenizer = CharTokenizer.from_text("hello world")
    tokenizer.decode(tokenizer.encode("hello")) == "hello"
    from_json(tokenizer.to_json()) == tokenizer

    tokenizer = BPETokenizer("gpt2")                                     # by tiktoken's name, or
    tokenizer = load_bpe("tokenizer")                                    # a folder that train.tokenizer or HF wrote
    tokenizer.save("tokenizer")                                          # transformers and tiktoken read it too

A tokenizer is described by JSON alone, so that no file runs code.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gptfast import tokenizer_json, untrusted
from gptfast.blanks import LONG, Blanks
from gptfast.errors import NoTokenizer, UserError, remedy, to_install
from gptfast.tokenizer_json import BYTE_LETTERS, MOST_TOKENS

if TYPE_CHECKING:
    import tiktoken

LARGEST_VOCAB = 2**16  # largest vocabulary whose ids fit uint16

# How text is split before merging: GPT-4's pattern, with numbers of at most 2 digits instead of 3, which saves a small
# vocabulary hundreds of ids (as in nanochat).
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s+"""
)
BEGINNINGS = ("<|bos|>", "<|begin_of_text|>", "<|endoftext|>")  # names that a BOS may have

GPT2_VOCAB, GPT2_BOS = 50257, 50256
WITH_ONE = "import it again with one: python -m gptfast.hf import FOLDER --out_dir=NEW --tokenizer=ITS_TOKENIZER"
COPY_AGAIN = "copy or train the tokenizer again"
NO_DATA_SET = "no data set in {}; make it: python -m train.prepare {}, of your own text with --source=FILE_OR_FOLDER"
RANKS, HUGGING_FACE, ENCODING = "ranks.tiktoken", "tokenizer.json", "encoding.json"  # files of a saved tokenizer


class Tokenizer(Protocol):
    """The interface of tokenizers for the model, the samplers and the data sets."""

    @property
    def vocab_size(self) -> int:
        """Returns the number of ids, 0 ... vocab_size - 1."""

    def encode(self, text: str) -> list[int]:
        """Encodes text. Raises UserError for text that has no tokens."""

    def encode_tensor(self, text: str) -> Tensor:
        """Returns the same ids as a tensor (len,): uint16, or int32 if vocab_size is above 2^16."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids. Raises UserError for an id outside the vocabulary."""

    @property
    def bos(self) -> int | None:
        """Returns the id of the special token that begins a document, or None."""

    def token_bytes(self) -> Tensor:
        """Returns how many bytes of UTF-8 each token stands for, (vocab_size,) int64; 0 for a special token.

        Bits per byte divides the loss by these bytes, so it is comparable between tokenizers.
        """

    def holes(self) -> Tensor:
        """Returns the unused ids below vocab_size, in order, (len,) int64."""

    @property
    def fingerprint(self) -> str:
        """Returns a sha256 in hex that two tokenizers share only if they give the same ids for every text."""

    def to_json(self) -> dict[str, Any]:
        """Returns a description in plain JSON values, from which `from_json` makes an equal tokenizer."""


def from_json(description: Any) -> Tokenizer:
    """Returns the tokenizer that `to_json` described. Raises UserError for anything else."""
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind == "char" and isinstance(description.get("chars"), str):
        return CharTokenizer(description["chars"])
    if kind == "tiktoken" and isinstance(description.get("name"), str):
        return BPETokenizer(description["name"])
    if kind == "bpe":
        return _described_bpe(description)
    raise _unknown_description(description)


def bos_of(description: Any) -> int | None:
    """Returns the `bos` of the described tokenizer; GPT-2's without loading its ranks, which may need the network."""
    return GPT2_BOS if description == {"kind": "tiktoken", "name": "gpt2"} else from_json(description).bos


def load_tokenizer(data_dir: str | Path) -> Tokenizer:
    """Loads the tokenizer of a prepared data set, `data/<name>/`.

    A folder without meta.json holds GPT-2 tokens, which is nanoGPT's convention. Raises UserError for a missing folder,
    a meta.json that cannot be read, and a pickled meta.pkl, which could run code and is never opened.
    """
    data_dir = Path(data_dir)
    meta = read_meta(data_dir)
    if meta is not None:
        check_vocab(meta, data_dir)
        tokenizer = from_json(meta.get("tokenizer"))
        if meta.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
            raise UserError(f"{data_dir} was made with another tokenizer than its meta.json states; prepare it again")
        return tokenizer
    if not any(data_dir.glob("*.bin")):
        raise UserError(NO_DATA_SET.format(data_dir, data_dir.name))
    if (data_dir / "meta.pkl").exists():
        make = f"python -m train.prepare {data_dir.name} --source TEXT"
        raise UserError(f"{data_dir} has a pickled meta.pkl, which is never opened, and no meta.json; make one: {make}")
    return BPETokenizer("gpt2")


def read_meta(data_dir: str | Path) -> dict[str, Any] | None:
    """Reads `meta.json` of a prepared data set, with at least `vocab_size` and `tokenizer`; None where there is none.

    Raises UserError for a missing folder and for a file that cannot be read or lacks these.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(NO_DATA_SET.format(data_dir, data_dir.name))
    path = data_dir / "meta.json"
    if not path.exists():
        return None
    meta = untrusted.json_object(path, "prepare the data again")
    if type(meta.get("vocab_size")) is not int or meta["vocab_size"] < 1 or meta.get("tokenizer") is None:
        raise UserError(f"{path} does not state vocab_size and tokenizer; prepare the data again")
    files = meta.get("files", {})
    if not isinstance(files, dict) or not all(
        untrusted.plain_name(name) and isinstance(entry, dict) for name, entry in files.items()
    ):
        raise UserError(f"{path} lists files that are none of its folder; prepare the data again")
    return meta


def check_vocab(meta: dict[str, Any], data_dir: Path) -> None:
    """Raises UserError if the result of `read_meta` states another vocabulary size than its tokenizer's."""
    tokenizer = meta["tokenizer"]
    size = GPT2_VOCAB if tokenizer == {"kind": "tiktoken", "name": "gpt2"} else from_json(tokenizer).vocab_size
    if size != meta["vocab_size"]:
        raise UserError(
            f"{data_dir / 'meta.json'} states vocab_size {meta['vocab_size']}, and its tokenizer has {size} tokens; "
            "prepare the data again"
        )


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character: the id of a character is its index in `chars`."""

    chars: str

    def __post_init__(self) -> None:
        if len(set(self.chars)) != len(self.chars):
            raise UserError("the characters of a tokenizer must differ; prepare the data again")
        if not 0 < len(self.chars) <= LARGEST_VOCAB:
            raise UserError(f"a character tokenizer has 1 to {LARGEST_VOCAB} characters, not {len(self.chars)}")

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Returns the tokenizer for the distinct characters of `text`, in code point order."""
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
        """Returns the ids of a long text (len,) uint16 by one table lookup."""
        if not text:
            return torch.empty(0, dtype=torch.uint16)
        codes, own_codes = _code_points(text), _code_points(self.chars)
        table = torch.full((int(torch.maximum(codes.max(), own_codes.max())) + 1,), -1, dtype=torch.int32)
        table[own_codes] = torch.arange(self.vocab_size, dtype=torch.int32)
        ids = table.index_select(0, codes)
        if ids.min() < 0:
            raise self._unknown(text, next(char for char in text if char not in self._ids))
        return ids.to(torch.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        return "".join([self.chars[i] for i in ids])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self.chars}

    @property
    def bos(self) -> None:
        return None

    def token_bytes(self) -> Tensor:
        return torch.tensor([len(char.encode("utf-8", "surrogatepass")) for char in self.chars])

    def holes(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    @cached_property
    def fingerprint(self) -> str:
        return _sha256(["char", self.chars])

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
    """Byte pair encoding, run by tiktoken: a named encoding such as gpt2, or one from your own ranks.

    tiktoken downloads the ranks of a named encoding once and caches them. Raises UserError if they are neither cached
    nor downloadable.
    """

    def __init__(
        self,
        name: str = "gpt2",
        *,
        encoding: tiktoken.Encoding | None = None,
        written: Sequence[str] = (),
        normalization: str = "",
    ) -> None:
        self.name = name
        self.is_named = encoding is None  # its name alone describes it
        self.written, self.normalization = tuple(sorted(written)), normalization
        self._encoding = encoding or _named_encoding(name)
        self._blanks = Blanks.of(self.pattern)
        self._at_written = re.compile(f"({'|'.join(map(re.escape, self.written))})") if self.written else None

    @classmethod
    def from_ranks(
        cls,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        pattern: str = GPT4_PATTERN,
        written: Sequence[str] = (),
        normalization: str = "",
    ) -> BPETokenizer:
        """Makes a tokenizer. `ranks`: each token's id, in merge order; all 256 single bytes must be among them.

        `special_tokens` have ids outside the ranks; text is encoded only into those listed in `written`.
        `normalization`: NFC composes characters first. Raises UserError if a byte is missing, an id is used twice, or
        another argument is invalid.
        """
        are_texts = all(isinstance(name, str) for name in special_tokens)
        if not are_texts or not all(type(i) is int for each in (ranks, special_tokens) for i in each.values()):
            raise UserError("not a tokenizer that gptfast knows: an id is no whole number, or a special token no text")
        ids = [*ranks.values(), *special_tokens.values()]
        if len(ids) > MOST_TOKENS:
            raise UserError(f"a tokenizer has at most {MOST_TOKENS:,} tokens, not {len(ids):,}")
        if any(bytes([byte]) not in ranks for byte in range(256)) or len(set(ids)) < len(ids) or min(ids) < 0:
            raise UserError(
                "not the ranks of a byte-level BPE: each of the 256 bytes needs an id, and each id one token"
            )
        if max(ids) > _largest_id(len(ids)):
            raise UserError(
                f"a tokenizer of {len(ids)} tokens has the id {max(ids)}; copy or train the tokenizer again"
            )
        if normalization not in ("", "NFC") or not set(written) <= set(special_tokens):
            raise UserError("not a tokenizer that gptfast knows: its normalization or its written tokens are strange")
        tiktoken = _import_tiktoken("a BPE tokenizer")
        try:
            encoding = tiktoken.Encoding(
                "gptfast", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(special_tokens)
            )
        except ValueError as error:  # the regular expression does not compile
            raise UserError(f"cannot split text by {pattern!r}: {_first_line(error)}") from None
        return cls("bpe", encoding=encoding, written=written, normalization=normalization)

    @property
    def vocab_size(self) -> int:
        return self._encoding.n_vocab

    @property
    def pattern(self) -> str:
        """Returns the regular expression that splits text; merges happen within its matches."""
        return self._encoding._pat_str

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """Returns the id of every ordinary token, in ascending order."""
        return dict(sorted(self._encoding._mergeable_ranks.items(), key=lambda item: item[1]))

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._encoding._special_tokens)

    @cached_property
    def bos(self) -> int | None:
        return next((self.special_tokens[name] for name in BEGINNINGS if name in self.special_tokens), None)

    def encode(self, text: str) -> list[int]:
        """Encodes text; special tokens in it become ordinary text, so that a prompt cannot forge one, except `written`.

        Half of a surrogate pair is no character and becomes U+FFFD. Raises UserError for text that an untrusted
        tokenizer's pattern cannot split.
        """
        if self.normalization:
            text = unicodedata.normalize("NFC", text)
        if self._at_written is None:
            return self._merged(text)
        parts = self._at_written.split(text)  # the parts at odd indices are names of tokens
        return [
            token
            for i, part in enumerate(parts)
            for token in ([self._encoding._special_tokens[part]] if i % 2 else self._merged(part))
        ]

    def _merged(self, text: str) -> list[int]:
        encoding = self._encoding
        try:
            if self._blanks is None or len(text) < LONG:
                return encoding.encode_ordinary(text)
            return [
                token
                for piece, is_whole in self._blanks.pieces(text)
                for token in (encoding._encode_single_piece(piece) if is_whole else encoding.encode_ordinary(piece))
            ]
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # tiktoken's, not a subclass of Exception
                raise
        raise UserError(
            f"the {self.name} tokenizer's pattern cannot split a text of {len(text):,} characters, perhaps for a "
            "run of blanks; shorten it"
        )

    def encode_document(self, text: str) -> list[int]:
        """Returns the ids of `text` with BOS in front. Raises UserError if the vocabulary has no BOS."""
        if self.bos is None:
            raise UserError(f"the {self.name} tokenizer has no token to begin a document; use gpt2, or train one")
        return [self.bos, *self.encode(text)]

    def encode_tensor(self, text: str) -> Tensor:
        ids = torch.tensor(self.encode(text), dtype=torch.int32)
        return ids if self.vocab_size > LARGEST_VOCAB else ids.to(torch.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        _check_ids(ids, self.vocab_size)
        try:
            return self._encoding.decode(list(ids))
        except KeyError as error:  # the ids of some encodings have gaps
            raise UserError(f"{self.name} has no token of this id ({_first_line(error)})") from None

    def token_bytes(self) -> Tensor:
        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        ranks = self._encoding._mergeable_ranks
        lengths[torch.tensor(list(ranks.values()))] = torch.tensor(list(map(len, ranks)))
        for name in self.written:
            lengths[self.special_tokens[name]] = len(name.encode())
        return lengths

    def holes(self) -> Tensor:
        is_hole = torch.ones(self.vocab_size, dtype=torch.bool)
        is_hole[[*self._encoding._mergeable_ranks.values(), *self.special_tokens.values()]] = False
        return is_hole.nonzero().flatten()

    @cached_property
    def fingerprint(self) -> str:
        return _sha256([self.pattern, sorted(self.special_tokens.items()), self._tokens(), *self._extras().items()])

    def to_json(self) -> dict[str, Any]:
        if self.is_named:
            return {"kind": "tiktoken", "name": self.name}
        special_tokens = self.special_tokens
        description = {"kind": "bpe", "pattern": self.pattern, "special_tokens": special_tokens}
        return description | self._extras() | {"tokens": self._tokens()}

    def _extras(self) -> dict[str, Any]:
        """Returns the optional fields of the description, which most tokenizers do not need."""
        extras = {"written": list(self.written), "normalization": self.normalization}
        return {name: value for name, value in extras.items() if value}

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files to `folder`:

        ranks.tiktoken: the rank file of tiktoken. tokenizer.json, tokenizer_config.json: for tokenizers and
        transformers, which encode special tokens in a text as such unless given `split_special_tokens`.
        encoding.json: pattern, special tokens, and the fingerprint that load_bpe checks; written last.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items()]
        encoding = {
            "pattern": self.pattern, "special_tokens": self.special_tokens,
            "vocab_size": self.vocab_size, "fingerprint": self.fingerprint, **self._extras(),
        }  # fmt: skip
        (folder / RANKS).write_text("".join(lines), "ascii")
        (folder / HUGGING_FACE).write_text(self._hugging_face().to_str(pretty=True), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(self._hugging_face_config(), indent=1), "utf-8")
        (folder / ENCODING).write_text(json.dumps(encoding, indent=1), "utf-8")

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Returns the pair of tokens that each longer token is merged from, in order; the ranks determine it."""
        ranks = self.ranks
        return [tokenizer_json.halves(token, ranks) for token in ranks if len(token) > 1]

    def _tokens(self) -> str:
        """Returns the ordinary tokens in base64, separated by spaces, in order of id; empty at ids of other tokens."""
        tokens = [""] * (1 + max(self._encoding._mergeable_ranks.values()))
        for token, rank in self._encoding._mergeable_ranks.items():
            tokens[rank] = base64.b64encode(token).decode()
        return " ".join(tokens)

    def _hugging_face(self) -> Any:
        """Returns an equal tokenizers.Tokenizer. Raises UserError for gaps between ids, which that cannot express."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        def written(token: bytes) -> str:
            return "".join([BYTE_LETTERS[byte] for byte in token])

        vocab = {written(token): rank for token, rank in self.ranks.items()}
        made = Tokenizer(models.BPE(vocab, [(written(left), written(right)) for left, right in self.merges()]))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        special_tokens = dict(sorted(self.special_tokens.items(), key=lambda item: item[1]))
        if self.normalization:
            made.normalizer = normalizers.NFC()
        for name in special_tokens:
            is_special = name not in self.written
            add = made.add_special_tokens if is_special else made.add_tokens
            add([AddedToken(name, special=is_special, normalized=False)])
        if {name: made.token_to_id(name) for name in special_tokens} != special_tokens:
            raise UserError(f"the ids of {self.name} have gaps, which {HUGGING_FACE} cannot hold; use gpt2 or your own")
        return made

    def _hugging_face_config(self) -> dict[str, Any]:
        from gptfast.chat.conversation import SPECIAL_TOKENS, TEMPLATE

        beginning = next((name for name in BEGINNINGS if name in self.special_tokens), None)
        can_chat = set(SPECIAL_TOKENS) <= self.special_tokens.keys()
        return {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": beginning, "eos_token": beginning,
            "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
            **({"chat_template": TEMPLATE} if can_chat else {}),
        }  # fmt: skip


def find_bpe(name: str) -> BPETokenizer:
    """Returns the tokenizer in the folder `name`, or tiktoken's of that name. Raises UserError if there is neither."""
    if os.path.isdir(name):  # False also for a name that no file can have
        return load_bpe(name)
    known = _import_tiktoken(f"the {name} tokenizer").list_encoding_names()
    if name not in known:
        raise UserError(f"no tokenizer {name}: no such folder, and tiktoken knows {', '.join(known)}")
    return BPETokenizer(name)


def load_bpe(folder: str | Path) -> BPETokenizer:
    """Loads the BPE tokenizer of a folder written by `BPETokenizer.save` or with Hugging Face's tokenizer.json.

    Raises UserError for files that are missing, damaged, or of a kind that byte-level BPE cannot express.
    """
    folder = Path(folder)
    if (folder / ENCODING).exists():
        encoding = untrusted.json_object(folder / ENCODING, COPY_AGAIN)
        tokenizer = _described_bpe({**encoding, "tokens": _read_ranks(folder / RANKS)})
        if tokenizer.fingerprint != encoding.get("fingerprint"):
            raise UserError(f"{folder / RANKS} does not fit {ENCODING} beside it; copy or train the tokenizer again")
        return tokenizer
    if (folder / HUGGING_FACE).exists():
        return _from_hugging_face(folder / HUGGING_FACE)
    raise UserError(f"no tokenizer in {folder}: give a folder with {ENCODING} or {HUGGING_FACE}")


def _from_hugging_face(path: Path) -> BPETokenizer:
    """Loads a tokenizer.json with a byte-level BPE model, such as those of GPT-2, Llama 3 and ours."""
    content = untrusted.json_object(path, COPY_AGAIN)
    ranks, special_tokens, pattern, written, normalization = tokenizer_json.read(content, path)
    try:
        tokenizer = BPETokenizer.from_ranks(ranks, special_tokens, pattern, written, normalization)
        tokenizer_json.prove(content, path, tokenizer.encode)
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    return tokenizer


def _described_bpe(description: Mapping[str, Any]) -> BPETokenizer:
    """Builds the tokenizer from a description: pattern, special tokens, and the tokens in base64 by id."""
    pattern, specials, tokens = map(description.get, ("pattern", "special_tokens", "tokens"))
    written, normalization = description.get("written", []), description.get("normalization", "")
    if not (isinstance(written, list) and all(isinstance(name, str) for name in written)):
        raise _unknown_description(description)
    if not (isinstance(pattern, str) and isinstance(specials, dict) and isinstance(tokens, str)):
        raise _unknown_description(description)
    if not all(type(rank) is int for rank in specials.values()):
        raise UserError("the special tokens of a tokenizer are damaged: an id is no number; prepare the data again")
    if tokens.count(" ") > _largest_id(MOST_TOKENS):
        raise UserError(f"a tokenizer has at most {MOST_TOKENS:,} tokens; prepare the data again")
    try:
        ordinary = [base64.b64decode(token, validate=True) for token in tokens.split(" ")]
    except (binascii.Error, ValueError):
        raise UserError("the tokens of a tokenizer are damaged: not base64; prepare the data again") from None
    ranks = {token: rank for rank, token in enumerate(ordinary) if token}
    return BPETokenizer.from_ranks(ranks, specials, pattern, written, normalization)


def _unknown_description(description: Any) -> UserError:
    if description is None:
        return NoTokenizer(f"the model has no tokenizer, which text needs; {WITH_ONE}")
    return UserError(f"not a tokenizer that gptfast knows: {str(description)[:80]}; prepare the data again")


def _read_ranks(path: Path) -> str:
    """Returns the tokens of a rank file, in the form of `to_json`."""
    try:
        content = untrusted.content(path, untrusted.LARGEST_JSON)
        if content.count(b"\n") > MOST_TOKENS:
            raise ValueError(f"it has more than {MOST_TOKENS:,} tokens")
        rows = [line.split(" ") for line in content.decode("ascii").split("\n") if line]
        ids = [int(rank) for _, rank in rows]
        if not rows or max(ids) > _largest_id(len(rows)) or min(ids) < 0:
            raise ValueError(f"ids {min(ids, default=0)} to {max(ids, default=0)} for {len(rows)} tokens")
        tokens = [""] * (1 + max(ids))
        for (token, _), rank in zip(rows, ids, strict=True):
            tokens[rank] = token
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the ranks {path} ({_first_line(error)}); copy or train the tokenizer again"
        ) from None
    return " ".join(tokens)


def _largest_id(tokens: int) -> int:
    """Returns a bound on ids for this many tokens; beyond it, tables indexed by id would be absurdly large."""
    return 4 * tokens + 1_000_000


def _named_encoding(name: str) -> tiktoken.Encoding:
    tiktoken = _import_tiktoken(f"the {name} tokenizer")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests and tiktoken raise a dozen unrelated types for "no network"
        raise UserError(
            f"cannot get the {name} tokenizer's ranks ({type(error).__name__}: {_first_line(error)}); "
            + remedy(error, "connect to the network once")
            + ", or set TIKTOKEN_CACHE_DIR to a folder in which tiktoken has cached them"
        ) from None


def _import_tiktoken(wanted_for: str) -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f"{wanted_for} needs tiktoken: {to_install(error, 'tiktoken')}") from None
    return tiktoken


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _code_points(text: str) -> Tensor:
    """Returns the code point of every character, (len,) int32."""
    return torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
        stray = next(i for i in ids if not 0 <= i < vocab_size)
        raise UserError(f"token id {stray} is outside the vocabulary of {vocab_size}; use the model's own tokenizer")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:200]
