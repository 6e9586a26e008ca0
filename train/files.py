"""Reads documents from files on this disk: chooses a folder's files, and yields their documents one by one.

A folder holds files of one kind: .parquet, .jsonl or .json, .txt or .md, in upper or lower case; all but .parquet may
be compressed (.gz, .zst, .xz, .bz2). Skipped, and printed, are names that begin with a dot, READMEs and LICENSEs,
files that the hub adds to a data set, other extensions, links to folders or to nothing, and what is no file.

Only one column of a parquet or JSON file is read; a row in which it is missing, null or empty is counted but holds no
document. A text file is one document, without its byte order mark. Anything that is not text raises an error that names
the file and the line or row. Once that is fixed or removed, reading resumes there: documents already read are not read
again, but the last one of them must be unchanged.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptfast import untrusted
from gptfast.errors import UserError, remedy, to_install
from train import parquet

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text"}
PACKED = (".gz", ".zst", ".xz", ".bz2")
NO_DOCUMENTS = ("readme", "license", "dataset_info", "dataset_infos")
GO_ON = "mend or remove it; the same command goes on from there"
TEXT_BYTES = 2**30  # a text is read into memory, where it takes several times its size
DOCUMENT_BYTES = 2**26  # of one among others, whose tokens take up to 20 times as much


class Row(NamedTuple):
    """A document (None where its row has none) and its position."""

    text: str | None
    file: int  # number of the file
    row: int  # in the file, from 0 on
    at: int  # byte offset of its beginning, for seeking; 0 where unknown

    def state(self) -> dict[str, Any]:
        """Returns the state from which `read` continues after this row."""
        digest = hashlib.sha256((self.text or "").encode("utf-8", "surrogatepass")).hexdigest()
        return {"file": self.file, "row": self.row, "at": self.at, "sha256": digest}


def builder_of(path: Path) -> str | None:
    """Returns the reader for a file of this name: parquet, json or text; None for others."""
    ending = path.suffix.lower()
    if ending not in PACKED:
        return BUILDERS.get(ending)
    kind = BUILDERS.get(path.with_suffix("").suffix.lower())
    return None if kind == "parquet" else kind


def exists(path: Path, *, folder: bool = False) -> bool:
    """Returns whether the path exists (with `folder`, as a folder); False too for overlong names and NULs."""
    try:
        return path.is_dir() if folder else path.exists()
    except (OSError, ValueError):
        return False


def listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the files of documents below `folder`, in order, and the skipped ones."""
    selected: list[Path] = []
    left_out: list[Path] = []
    for path in sorted(_below(folder)):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        is_about = path.name.split(".")[0].lower() in NO_DOCUMENTS
        is_left_out = is_hidden or is_about or builder_of(path) is None or not path.is_file()
        (left_out if is_left_out else selected).append(path)
    return selected, left_out


def _below(folder: Path) -> Iterator[Path]:
    """Yields all that is in a folder and its folders, but for these. Raises UserError for one that cannot be read."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; see to its permissions, or remove it")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        yield from (Path(parent, name) for name in names)
        yield from (path for name in folders if (path := Path(parent, name)).is_symlink())


def read(paths: Sequence[str], builder: str, column: str, state: dict[str, Any] | None = None) -> Iterator[Row]:
    """Yields all documents of the files, or those after `state`. Raises UserError that names the file and the line."""
    first = 0 if state is None else state["file"]
    if state is not None and first >= len(paths):
        raise UserError("files that were read are gone; remove the data set and begin again")
    for number in range(first, len(paths)):
        path = Path(paths[number])
        after = state if number == first else None
        try:
            rows = _rows(path, builder, column, after)
            if after is not None and not _is_same(rows, number, after):
                raise UserError(f"{path} has changed before its row {after['row']}, which was read; begin again")
            for text, row, at in rows:
                yield Row(text, number, row, at)
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"reading {path} needs pyarrow: {to_install(error, 'pyarrow')}") from None
        except Exception as error:  # of gzip, lzma, arrow and the disk
            reason = (str(error).splitlines() or ["no reason given"])[0][:200]
            fix = remedy(error, GO_ON)
            raise UserError(f"{path} cannot be read ({type(error).__name__}: {reason}); {fix}") from None


Rows = Iterator[tuple[str | None, int, int]]


def _is_same(rows: Rows, number: int, after: dict[str, Any]) -> bool:
    """Returns whether the first of `rows` is the row that the state `after` was taken at."""
    try:
        last = next(rows, None)
    except UserError:  # the line has changed
        return False
    return last is not None and Row(last[0], number, *last[1:]).state() == after


def _rows(path: Path, builder: str, column: str, after: dict[str, Any] | None) -> Rows:
    """Yields (text, row, byte offset) of one file, from the row of `after` on, included."""
    if builder == "parquet":
        return _of_parquet(path, column, 0 if after is None else after["row"])
    if builder == "text":
        return _of_text(path)
    return _of_json(path, column, after)


def _of_text(path: Path) -> Rows:
    with _unpacked(path) as file:
        yield decoded(untrusted.whole(file, DOCUMENT_BYTES), path) or None, 0, 0


def decoded(content: bytes, path: Path) -> str:
    """Returns the text of a file with \\n line ends and no byte order mark. Raises UserError if it is not UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or {GO_ON}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _of_parquet(path: Path, column: str, first: int) -> Rows:
    if path.is_file() and path.stat().st_size == 0:  # as left by a writer without rows
        return
    try:
        for value, row in parquet.cells(path, column, first):
            yield _text(value, f"{path}, row {row}", column), row, 0
    except parquet.NoColumn as error:
        raise _no_column(f"{path}", column, error.names) from None


def _of_json(path: Path, column: str, after: dict[str, Any] | None) -> Rows:
    first = 0 if after is None else after["row"]
    with _unpacked(path) as file:
        start = file.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"["):  # one array; otherwise one row per line
            try:
                content = untrusted.whole(file, untrusted.LARGEST_JSON)
            except ValueError as error:
                raise UserError(f"{path}: {error}, too many for one array; write a row a line as .jsonl") from None
            for row, value in enumerate(_parsed(content, f"{path}")):
                if row >= first:
                    yield _of_row(value, f"{path}, row {row}", column, row == 0), row, 0
            return
        row, at = 0, 0
        if after is not None and path.suffix.lower() not in PACKED:
            row, at = first, after["at"]
            file.seek(at)
        for line in untrusted.lines(file):
            where = f"{path}:{row + 1}"
            if row >= first:
                # A blank line counts as a row without a document, so that row and line numbers agree.
                value = _parsed(line, where) if line.strip(b"\xef\xbb\xbf \t\r\n") else {column: None}
                yield _of_row(value, where, column, row == 0), row, at
            row, at = row + 1, at + len(line)


def _parsed(content: bytes, where: str) -> Any:
    try:
        return untrusted.parsed(content.decode("utf-8-sig"))
    except ValueError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:100]
        raise UserError(f"{where}: not JSON in UTF-8 ({reason}); {GO_ON}") from None


def _of_row(value: Any, where: str, column: str, is_first: bool) -> str | None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with the column {column}, found {type(value).__name__}; {GO_ON}")
    if is_first and column not in value:
        raise _no_column(where, column, list(value))
    return _text(value.get(column), where, column)


def _text(value: Any, where: str, column: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {column} is no text but {type(value).__name__}; choose another --column, or {GO_ON}")
    if value is not None and len(value) > DOCUMENT_BYTES:
        raise UserError(f"{where}: a document of {len(value):,} characters; make it several, or {GO_ON}")
    return value or None


def _no_column(where: str, column: str, names: Sequence[str]) -> UserError:
    return UserError(f"{where} has no column {column}; set --column to one of {', '.join(names)[:300]}")


def _unpacked(path: Path) -> Any:
    """Opens a file, decompressing it if need be, as a binary file with `peek`."""
    untrusted.opened(path).close()  # raises OSError for a pipe, which would be waited for
    kind = path.suffix.lower()
    if kind == ".gz":
        return gzip.open(path, "rb")
    if kind == ".xz":
        return lzma.open(path, "rb")
    if kind == ".bz2":
        return bz2.open(path, "rb")
    if kind == ".zst":
        from pyarrow import input_stream

        return io.BufferedReader(input_stream(str(path), compression="zstd"))
    return path.open("rb")


def count(paths: Sequence[str], builder: str) -> int | None:
    """Returns an upper bound on the number of documents, or None where only reading them all would tell."""
    if builder == "text":
        return len(paths)
    if builder == "parquet":
        try:
            return sum(map(parquet.count, paths))
        except Exception:  # reading reports it, after the documents before it
            return None
    return sum(map(_count_lines, paths)) if all(path.lower().endswith(".jsonl") for path in paths) else None


def _count_lines(path: str) -> int:
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))
