"""Prepares a data set in data/<name>/: token files for train and val, and meta.json.

    python -m train.prepare shakespeare_char                       characters of tinyshakespeare, downloaded and checked
    python -m train.prepare shakespeare_char --source=input.txt    the same from a file; needs no network
    python -m train.prepare pystdlib                               source text of this Python's standard library
    python -m train.prepare shakespeare                            tinyshakespeare in GPT-2's tokens
    python -m train.prepare openwebtext                            from the Hugging Face hub; also fineweb, fineweb_edu
                                                                   (their samples of 10B tokens) and climbmix
    python -m train.prepare fineweb10B --max_tokens=1000000000     token files that are ready on the hub; finewebedu10B
    python -m train.prepare mine --source=my_text.txt              any UTF-8 text, by characters or --tokenizer=gpt2
    python -m train.prepare mine --source=folder                   documents: .parquet, .jsonl (also .gz) or .txt files
    python -m train.prepare mine --source=hf:user/name             any data set of the hub; --subset, --split, --column
    python -m train.prepare mine --source=URL --tokenizer=folder   a file to download, in tokens of train.tokenizer
    python -m train.prepare chat --source=FILE.jsonl               checks and counts conversations, with --tokenizer=
                                                                   folder their tokens; hf:user/name fetches them

Texts: the vocabulary is the distinct characters in code point order; the first 90% of the characters go to train.bin,
the rest to val.bin, as uint16, little-endian, without a header. For tinyshakespeare the files equal nanoGPT's byte for
byte.

Documents: read as a stream and tokenized on all cores, each with a BOS in front; one of 2000 goes to val, and of fewer
the first, but no more of it than a tenth of all tokens, nor than 100,000 unless --val_fraction is more. The files,
train-00000.bin and so on, begin with a header (gptfast/data.py). The same command continues an interrupted run, and
checks the sha256 of every file of a complete one.

pystdlib joins, with a newline between, the .py files of the standard library's importable modules, ordered by the
sha256 of their paths (such as json/decoder.py): a fixed shuffle, so that val.bin resembles train.bin. It leaves out
files with any character but newline and printable ASCII, so that the vocabulary has at most 96; tests, tables
(encodings, pydoc_data), idlelib, turtledemo, lib2to3 and ensurepip; and everything from the first file on that would
make the text longer than 8,000,000 characters. Unmodified Pythons of one version give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gptfast import cli, untrusted
from gptfast.aside import locked
from gptfast.data import header, inspect, itemsize
from gptfast.errors import UserError, nearest
from gptfast.tokenizer import LARGEST_VOCAB, CharTokenizer, Tokenizer, find_bpe
from train import conversations
from train.documents import PROGRESS, Documents, Shape, make_shards, replace
from train.download import download, sha256_of
from train.files import TEXT_BYTES, builder_of, decoded, exists

TRAIN_FRACTION = 0.9
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TEXTS = ("shakespeare_char", "shakespeare", "pystdlib")
ON_THE_HUB = {  # name: data set, subset
    "openwebtext": ("Skylion007/openwebtext", ""),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "climbmix": ("karpathy/climbmix-400b-shuffle", ""),
}
READY = {  # name: data set, prefix of its file names, number of train files
    "fineweb10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "finewebedu10B": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
READY_TOKENS = 100_000_000  # in each of those files
OF_DOCUMENTS = ("val_fraction", "shard_tokens", "processes", "max_tokens")  # flags
DATA_SETS = (*TEXTS, *ON_THE_HUB, *READY)

PYSTDLIB_CHARACTERS = 8_000_000
PYSTDLIB_LEFT_OUT = {
    "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "ensurepip", "encodings", "pydoc_data",
}  # fmt: skip
NOT_PLAIN = re.compile(r"[^\n -~]")


@dataclass(frozen=True)
class PrepareConfig:
    name: str = ""  # one of the data sets above, or a name of your own with --source
    source: str = ""  # a text file, a folder or file of documents, hf:user/name, or a URL to download from
    tokenizer: str = ""  # char, gpt2, another of tiktoken's, or a folder; default: char for a text, else gpt2
    data_dir: str = "data"  # folder that gets the folder <name>
    subset: str = ""  # of a data set on the hub
    split: str = "train"  # of a data set on the hub
    column: str = "text"  # that holds the documents
    val_fraction: float = Shape.val_fraction  # share of the documents that becomes val; of few, a tenth of their tokens
    shard_tokens: int = Shape.shard_tokens  # tokens per file
    max_tokens: int = Shape.max_tokens  # stop when train has so many; 0 takes all
    processes: int = 0  # that tokenize; 0: one per core


def main(argv: list[str]) -> None:
    config = cli.parse(PrepareConfig, argv, positional="name")
    if not config.name:
        raise UserError(f"name a data set: python -m train.prepare {DATA_SETS[0]}; known: {', '.join(DATA_SETS)}")
    prepare_as(config)


def prepare(name: str, data_root: str | Path, source: str | Path | None = None) -> Path:
    """Prepares the data set in data_root/<name>/ with the default flags; returns that folder."""
    return prepare_as(PrepareConfig(name, str(source or ""), data_dir=str(data_root)))


def prepare_as(config: PrepareConfig) -> Path:
    """Prepares the data set in data_dir/<name>/ and returns that folder; prints what was read and written.

    Every file is replaced by a rename, and meta.json, written last, holds the sha256 of all token files, so that an
    incomplete data set is never taken for a complete one. Raises UserError for an unknown name, an unavailable source
    or download, or a folder that cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise UserError(f"{config.name!r} cannot name a data set; use letters, digits, - and _, such as my_text")
    folder = Path(config.data_dir) / config.name
    try:
        if config.name == "chat":
            _no_flags(config, "for documents", "column", *OF_DOCUMENTS)
            conversations.prepare(
                config.source, folder, tokenizer=config.tokenizer, subset=config.subset, split=config.split
            )
        elif config.name in READY and not config.source:
            _no_flags(config, "for other data", "tokenizer", "column", "subset", "split", *OF_DOCUMENTS[:-1])
            with locked(folder):
                _check_finished(folder)
                _fetch_ready(config.name, folder, config.max_tokens)
        elif _is_text(config):
            _no_flags(config, "for documents, and this is one text", "column", "subset", "split", *OF_DOCUMENTS)
            text, origin, sha256 = _text(config.name, folder, config.source or None)
            _write_text(
                folder, text, origin, sha256, config.tokenizer or ("gpt2" if config.name == "shakespeare" else "char")
            )
        else:
            _prepare_documents(folder, config)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {folder}: {reason}; free some space or choose another --data_dir") from None
    return folder


def _no_flags(config: PrepareConfig, meant_for: str, *names: str) -> None:
    """Raises UserError for a flag that would be ignored."""
    for name in names:
        if getattr(config, name) != getattr(PrepareConfig, name):
            raise UserError(f"--{name}={getattr(config, name)} is {meant_for}; leave it out")


def _check_finished(folder: Path) -> None:
    """Raises UserError where documents are half prepared, whose files must not mix with others."""
    if (folder / PROGRESS).exists():
        raise UserError(f"{folder} holds documents that are not finished; choose another name, or remove the folder")


def _is_text(config: PrepareConfig) -> bool:
    """Returns whether the source is a single text, to be split by characters, rather than documents."""
    if not config.source:
        return config.name not in ON_THE_HUB
    is_remote = config.source.startswith("hf:") or "://" in config.source
    return (
        not is_remote
        and not exists(Path(config.source), folder=True)
        and builder_of(Path(config.source)) in ("text", None)
    )


# ---- documents -------------------------------------------------------------------------------------------------------


def _prepare_documents(folder: Path, config: PrepareConfig) -> None:
    if config.tokenizer == "char":
        raise UserError("characters are for a text, not for documents; use --tokenizer=gpt2 or one of train.tokenizer")
    shape = Shape(config.val_fraction, config.shard_tokens, config.max_tokens)
    if config.processes < 0:
        raise UserError(f"--processes={config.processes}: must not be negative")
    find = partial(Documents.find, subset=config.subset, split=config.split, column=config.column)
    if not config.source:
        repository, subset = ON_THE_HUB[config.name]
        documents = find(f"hf:{repository}", subset=subset)
    elif "://" not in config.source:
        documents = find(config.source)
    tokenizer = find_bpe(config.tokenizer or "gpt2")
    if "://" in config.source:
        path = folder / "source" / Path(urlsplit(config.source).path).name
        if not path.exists():
            download(config.source, path, None, otherwise="the same command goes on")
        documents = find(str(path))
    make_shards(folder, documents, tokenizer, shape, processes=config.processes or os.cpu_count() or 1)
    print(f"wrote {folder}")


def _fetch_ready(name: str, folder: Path, max_tokens: int) -> None:
    """Downloads as many token files of llm.c's layout as `max_tokens` needs, and lists them in meta.json."""
    repository, stem, count = READY[name]
    count = min(count, -(-max_tokens // READY_TOKENS)) if max_tokens else count
    names = [f"{stem}_val_000000.bin", *(f"{stem}_train_{i:06d}.bin" for i in range(1, count + 1))]
    files: dict[str, Any] = {}
    for number, file_name in enumerate(names, 1):
        path = folder / file_name
        url, sha256 = hub_file(repository, file_name)
        if not path.exists() or sha256_of(path) != sha256:
            print(f"{file_name}, {number} of {len(names)}")
            download(url, path, sha256, otherwise="the same command goes on")
        files[file_name] = {"bytes": path.stat().st_size, "sha256": sha256, "tokens": inspect(path).count}
    meta = {
        "vocab_size": 50257,
        "tokenizer": {"kind": "tiktoken", "name": "gpt2"},
        "source": repository,
        "files": files,
    }
    replace(folder / "meta.json", json.dumps(meta, indent=1).encode())
    print(f"{folder} is whole: {sum(entry['tokens'] for entry in files.values()):,} tokens")


def hub_file(repository: str, name: str, endpoint: str | None = None) -> tuple[str, str]:
    """Returns URL and sha256 of a large file of a data set on the Hugging Face hub."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository, name, repo_type="dataset", endpoint=endpoint)
    try:
        etag = get_hf_file_metadata(url, endpoint=endpoint).etag or ""
    except Exception as error:  # whatever the hub's client raises when there is no network, or no such file
        reason = (str(error).splitlines() or ["no reason given"])[0][:200]
        raise UserError(f"cannot reach {url} ({type(error).__name__}: {reason}); run again when it can be") from None
    if not re.fullmatch("[0-9a-f]{64}", etag):
        raise UserError(f"{url} states no sha256, so a damaged download would not be seen; use another data set")
    return url, etag


# ---- texts -----------------------------------------------------------------------------------------------------------


def _text(name: str, folder: Path, source: str | Path | None) -> tuple[str, str, str]:
    """Returns the text of a data set, a line on its origin, and the sha256 of its file or generated text."""
    if name == "pystdlib":
        if source is not None:
            raise UserError("pystdlib reads the running Python; for a text file choose another name than pystdlib")
        return pystdlib_text()
    if source is not None:
        return _read_text(Path(source), str(source))
    if name not in ("shakespeare_char", "shakespeare"):
        raise UserError(f"unknown data set {name}{nearest(name, DATA_SETS)}; for your own text add --source FILE")
    path = folder / "input.txt"
    if not path.exists():
        otherwise = f"bring the text as a file: python -m train.prepare {name} --source FILE"
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256, otherwise=otherwise)
    elif sha256_of(path) != SHAKESPEARE_SHA256:
        raise UserError(f"{path} is not tinyshakespeare (sha256 differs); remove it, or use it with --source {path}")
    return _read_text(path, str(path))


def _read_text(path: Path, origin: str) -> tuple[str, str, str]:
    try:
        if path.stat().st_size > TEXT_BYTES:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, and a text is read whole; "
                "put its documents into a .jsonl file, or into a folder of .txt files"
            )
        content = untrusted.content(path, TEXT_BYTES)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = untrusted.reason(error)
        raise UserError(f"cannot read {origin[:200]}: {reason}; give an existing text file with --source") from None
    return decoded(content, path), origin, hashlib.sha256(content).hexdigest()


def pystdlib_text() -> tuple[str, str, str]:
    """Returns the text that this module's docstring describes, a line on its origin, and its sha256."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    wanted = [path for path in paths if _is_importable(path) and not PYSTDLIB_LEFT_OUT.intersection(path.parts)]
    wanted.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    texts: list[str] = []
    length = 0
    for path in wanted:
        text = (root / path).read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        if not text or NOT_PLAIN.search(text):
            continue
        if length + len(text) + 1 > PYSTDLIB_CHARACTERS:
            break
        texts.append(text)
        length += len(text) + 1
    if not texts:
        raise UserError(f"no standard library source in {root}; use a Python that has it, or another data set")
    version = ".".join(map(str, sys.version_info[:3]))
    text, origin = "\n".join(texts), f"{len(texts)} files of the standard library of Python {version}, {root}"
    return text, origin, hashlib.sha256(text.encode()).hexdigest()


def _is_importable(path: Path) -> bool:
    """Returns whether a path below the library's root belongs to an importable module of the standard library."""
    return path.parts[0].removesuffix(".py") in sys.stdlib_module_names


def _write_text(folder: Path, text: str, origin: str, sha256: str, tokenizer_name: str) -> None:
    """Tokenizes, splits and writes a text; prints the same counts as nanoGPT."""
    cut = int(len(text) * TRAIN_FRACTION)
    if cut < 1 or len(text) - cut < 2:
        raise UserError(f"{origin} has {len(text)} characters, too few to train on; give a longer text")
    tokenizer: Tokenizer = CharTokenizer.from_text(text) if tokenizer_name == "char" else find_bpe(tokenizer_name)
    print(f"read {origin}: sha256 {sha256}")
    print(f"length of dataset in characters: {len(text):,}")
    if isinstance(tokenizer, CharTokenizer):
        print(f"all the unique characters: {tokenizer.chars!r}")
    print(f"vocab size: {tokenizer.vocab_size:,}")
    with locked(folder):
        _check_finished(folder)
        _write_splits(folder, text, cut, origin, tokenizer)


def _write_splits(folder: Path, text: str, cut: int, origin: str, tokenizer: Tokenizer) -> None:
    files: dict[str, Any] = {}
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        tokens = tokenizer.encode_tensor(part)
        content = tokens.numpy().astype(f"<u{itemsize(tokenizer.vocab_size)}").tobytes()
        if tokenizer.vocab_size > LARGEST_VOCAB:  # nanoGPT's files have 2 bytes per token
            content = header(len(tokens), tokenizer.vocab_size, tokenizer.fingerprint) + content
        replace(folder / f"{split}.bin", content)
        files[f"{split}.bin"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        print(f"{split} has {len(tokens):,} tokens")
    meta = {
        "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.to_json(), "fingerprint": tokenizer.fingerprint,
        "source": origin, "files": files,
    }  # fmt: skip
    replace(folder / "meta.json", json.dumps(meta, indent=1).encode())
    print(f"wrote train.bin, val.bin and meta.json to {folder}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
