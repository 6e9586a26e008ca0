"""Makes a data set of character tokens: train.bin, val.bin and meta.json in data/<name>/.

    python -m train.prepare shakespeare_char                       downloads the text, checks its sha256
    python -m train.prepare shakespeare_char --source input.txt    the same from a file; needs no network
    python -m train.prepare pystdlib                               source text of this Python's standard library
    python -m train.prepare my_text --source my_text.txt           any UTF-8 text

The vocabulary is the distinct characters in code point order; the first 90% of the characters are train.bin, the rest
val.bin, each uint16 little-endian. For tinyshakespeare the files are nanoGPT's, byte for byte.

pystdlib joins, with a newline between, the .py files of the standard library's importable modules, in the order of the
sha256 of their paths (such as json/decoder.py): a fixed shuffle, so that val.bin is of the same kind as train.bin. Left
out are files with any character but newline and printable ASCII, so that the vocabulary has at most 96; tests, tables
(encodings, pydoc_data), idlelib, turtledemo, lib2to3 and ensurepip; and all from the first file that would make the
text longer than 8,000,000 characters. Unmodified Pythons of one version give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from gptfast import cli
from gptfast.cli import UserError
from gptfast.tokenizer import CharTokenizer

TRAIN_FRACTION = 0.9
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DATA_SETS = ("shakespeare_char", "pystdlib")

PYSTDLIB_CHARACTERS = 8_000_000
PYSTDLIB_LEFT_OUT = {
    "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "ensurepip", "encodings", "pydoc_data",
}  # fmt: skip
NOT_PLAIN = re.compile(r"[^\n -~]")


@dataclass(frozen=True)
class PrepareConfig:
    name: str = ""  # shakespeare_char, pystdlib, or a name of your own with --source
    source: str = ""  # a UTF-8 text file to read instead of downloading
    data_dir: str = "data"  # folder that gets the folder <name>


def main(argv: list[str]) -> None:
    config = cli.parse(PrepareConfig, argv, positional="name")
    if not config.name:
        raise UserError(f"name a data set: python -m train.prepare {DATA_SETS[0]}; known: {', '.join(DATA_SETS)}")
    prepare(config.name, config.data_dir, config.source or None)


def prepare(name: str, data_root: str | Path, source: str | Path | None = None) -> Path:
    """Makes the data set in data_root/<name>/ and returns that folder; prints what was read and written.

    `source` is a text file to read instead of downloading, for any name but pystdlib. Every file is replaced in one
    rename, and meta.json, written last, carries the sha256 of both token files, so that a half-done job is never taken
    for a whole one. Raises UserError for an unknown name, a source or download that cannot be had, or a folder that
    cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{name!r} cannot name a data set; use letters, digits, - and _, such as my_text")
    folder = Path(data_root) / name
    try:
        text, origin = _text(name, folder, source)
        _write_data_set(folder, text, origin)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {folder}: {reason}; free some space or choose another --data_dir") from None
    return folder


def download(url: str, path: Path, sha256: str, *, attempts: int = 3, wait_s: float = 1.0) -> None:
    """Fetches `url` to `path`, which appears only when whole and of this sha256.

    What has come so far stays in <path>.part, and the next attempt, or the next run, continues there. Raises UserError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(attempts):
        try:
            _fetch(url, part)
            break
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            if attempt == attempts - 1:
                raise UserError(
                    f"cannot download {url} ({getattr(error, 'reason', error)}); without a network, bring the text as "
                    f"a file and run: python -m train.prepare {path.parent.name} --source FILE"
                ) from None
            time.sleep(wait_s * 2**attempt)
    found = hashlib.sha256(part.read_bytes()).hexdigest()
    if found != sha256:
        part.unlink()
        raise UserError(f"{url} gave a text of sha256 {found[:12]}, not {sha256[:12]}; run again, or use --source FILE")
    os.replace(part, path)


def _text(name: str, folder: Path, source: str | Path | None) -> tuple[str, str]:
    """The text of a data set, and one line that says where it is from."""
    if name == "pystdlib":
        if source is not None:
            raise UserError("pystdlib reads the running Python; for a text file choose another name than pystdlib")
        return _pystdlib_text()
    if source is not None:
        return _read_text(Path(source)), str(source)
    if name != "shakespeare_char":
        raise UserError(f"unknown data set {name}{cli.nearest(name, DATA_SETS)}; for your own text add --source FILE")
    path = folder / "input.txt"
    if not path.exists():
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    elif hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"{path} is not tinyshakespeare (sha256 differs); remove it, or use it with --source {path}")
    return _read_text(path), str(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give an existing text file with --source") from None


def _pystdlib_text() -> tuple[str, str]:
    """The text that this module's docstring describes, and where it is from."""
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
    return "\n".join(texts), f"{len(texts)} files of the standard library of Python {version}, {root}"


def _is_importable(path: Path) -> bool:
    """Whether a path below the library's root is of a documented module, and not site-packages or a build record."""
    return path.parts[0].removesuffix(".py") in sys.stdlib_module_names


def _write_data_set(folder: Path, text: str, origin: str) -> None:
    """Tokenizes, splits and writes; prints the counts that nanoGPT's prepare prints."""
    cut = int(len(text) * TRAIN_FRACTION)
    if cut < 1 or len(text) - cut < 2:
        raise UserError(f"{origin} has {len(text)} characters, too few to train on; give a longer text")
    tokenizer = CharTokenizer.from_text(text)
    tokens = tokenizer.encode_tensor(text)
    print(f"read {origin}: sha256 {hashlib.sha256(text.encode()).hexdigest()}")
    print(f"length of dataset in characters: {len(text):,}")
    print(f"all the unique characters: {tokenizer.chars!r}")
    print(f"vocab size: {tokenizer.vocab_size:,}")
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    for split, part in (("train", tokens[:cut]), ("val", tokens[cut:])):
        content = part.numpy().astype("<u2").tobytes()
        _replace(folder / f"{split}.bin", content)
        files[f"{split}.bin"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        print(f"{split} has {len(part):,} tokens")
    meta = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.to_json(), "source": origin, "files": files}
    _replace(folder / "meta.json", json.dumps(meta, indent=1).encode())
    print(f"wrote train.bin, val.bin and meta.json to {folder}")


def _replace(path: Path, content: bytes) -> None:
    """Writes a file so that it is, at every instant, wholly the old one or wholly the new one."""
    building = path.with_name(f".tmp-{path.name}")
    try:
        with building.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(building, path)
    except OSError:
        building.unlink(missing_ok=True)
        raise


def _fetch(url: str, part: Path) -> None:
    """Appends the rest of `url` to `part`, or all of it if the server cannot continue. Raises urllib's errors."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is no more than we have, and the sha256 will tell whether it is the file
            return
        raise
    with response, part.open("ab" if response.status == 206 else "wb") as file:
        rest = int(response.headers.get("Content-Length", 0))
        total = file.tell() + rest
        done = file.tell()
        while chunk := response.read(2**16):
            file.write(chunk)
            done += len(chunk)
            _progress(done, total)
    if rest and done < total:
        raise ConnectionError(f"connection closed after {done:,} of {total:,} bytes")


def _progress(done: int, total: int) -> None:
    end = "\n" if done >= total else "\r"
    share = f"{done / total:4.0%} of {total / 1e6:.1f} MB" if total else f"{done / 1e6:.1f} MB"
    if sys.stderr.isatty() or done >= total:
        print(f"downloading: {share}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
