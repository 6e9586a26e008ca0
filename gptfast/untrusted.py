"""Reads untrusted files: only regular files, of bounded size, and JSON of a known shape.

Any fault of a file raises an OSError or a one-line ValueError; the caller adds the file's name and the fix.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import lzma
import os
import stat
import sys
import weakref
import zlib
from array import array
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, overload

from torch import Tensor

from gptfast.errors import UserError, remedy

LARGEST = 2**28  # bytes of a text
LARGEST_JSON, MOST_MARKS = 50_000_000, 2**22  # bytes of one value of JSON, and of its MARKS
LARGEST_ROWS, MOST_ROW_MARKS = 2**27, 12_000_000  # the same of all rows that are held in memory together
MARKS = "[{:,"  # one stands before each value of JSON but the first; a value takes up to 105 bytes besides its text
LARGEST_HEADER, MOST_TENSORS = 2**24, 2**17  # of a safetensors file
NO_FILE = "it is no regular file"
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)  # raised by compressed files, besides OSError
# Exceptions from reading a value that is missing, of another type, too large or too deep.
STRANGE = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, OverflowError
)  # fmt: skip


def opened(path: str | Path) -> BufferedReader:
    """Opens a file for reading. Raises OSError, also for a folder, pipe or device, without blocking on it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, NO_FILE, str(path))
    return open(descriptor, "rb")


def lines(file: IO[bytes], longest: int = LARGEST_JSON) -> Iterator[bytes]:
    """Yields the lines of a binary file with their ends, even where it is compressed and has no end.

    Raises ValueError for a line of more than `longest` bytes, and OSError, also for what cannot be decompressed.
    """
    try:
        while line := file.readline(longest + 1):
            if len(line) > longest:
                raise ValueError(f"a line has more than {longest:,} bytes")
            yield line
    except DAMAGED as error:
        raise OSError(f"it cannot be decompressed: {reason(error)}") from None


def whole(file: IO[bytes] | gzip.GzipFile, largest: int) -> bytes:
    """Returns the rest of a binary file, even if it is compressed.

    Raises ValueError for more than `largest` bytes, and OSError, also for what cannot be decompressed.
    """
    try:
        read = file.read(largest + 1)
    except DAMAGED as error:
        raise OSError(f"it cannot be decompressed: {reason(error)}") from None
    if len(read) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return read


def content(path: str | Path, largest: int = LARGEST) -> bytes:
    """Returns all bytes of a file. Raises OSError, and ValueError if there are more than `largest`."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"it has {size:,} bytes, where {largest:,} are the most")
        return file.read()


def text(path: str | Path, largest: int = LARGEST) -> str:
    """Returns the text of a UTF-8 file, its line ends unchanged. Raises OSError or ValueError."""
    return content(path, largest).decode("utf-8")


def marks(content: bytes | str) -> int:
    """Returns how many values JSON has at most."""
    if isinstance(content, str):
        return sum(map(content.count, MARKS))
    return sum(map(content.count, MARKS.encode()))


def parsed(content: bytes | str) -> Any:
    """Parses JSON. Raises ValueError, also for JSON that is nested too deeply, too long, or of too many values."""
    if len(content) > LARGEST_JSON:
        raise ValueError(f"it has {len(content):,} bytes, where {LARGEST_JSON:,} are the most")
    if len(content) > MOST_MARKS < marks(content):
        raise ValueError(f"it has more than {MOST_MARKS:,} values, by its brackets, colons and commas")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


class Allowance:
    """How much the rows of some files may hold together where all are held in memory."""

    def __init__(self, size: int | None = None, values: int | None = None) -> None:
        self.size, self.values = size or LARGEST_ROWS, values or MOST_ROW_MARKS
        self._size = self._values = 0

    def take(self, line: bytes) -> None:
        """Counts a line. Raises ValueError where it is too much."""
        self._size, self._values = self._size + len(line), self._values + marks(line)
        for taken, most, unit in ((self._size, self.size, "bytes"), (self._values, self.values, "values")):
            if taken > most:
                raise ValueError(f"with what was read before, it has more than {most:,} {unit}")


def rows(path: str | Path, allowance: Allowance) -> Iterator[str]:
    """Yields the lines of a file of rows with their ends, blank ones too. Raises OSError or ValueError."""
    with opened(path) as file:
        for line in lines(file):
            allowance.take(line)
            yield line.decode("utf-8")


class JsonLines(Sequence[Any]):
    """The values of a file of JSON lines, parsed when asked for; blank lines hold none.

    A file stays open, and on the disk; what is compressed (.gz) is held in memory. Raises OSError, and
    ValueError for a line that is no JSON; where `is_checked`, only when that line is asked for.
    """

    def __init__(self, path: Path, *, is_checked: bool = False) -> None:
        file = opened(path)
        weakref.finalize(self, file.close)
        self._descriptor = file.fileno()
        self._content: bytes | None = None
        source: IO[bytes] = file
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as packed:
                self._content = whole(packed, LARGEST_ROWS)
            source = io.BytesIO(self._content)
        self._starts, self._sizes, at = array("q"), array("q"), 0
        for line in lines(source):
            if line.strip():
                if not is_checked:
                    parsed(line.decode("utf-8"))
                self._starts.append(at)
                self._sizes.append(len(line))
            at += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> list[Any]: ...
    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        start, size = self._starts[i], self._sizes[i]
        if self._content is not None:
            return parsed(self._content[start : start + size].decode("utf-8"))
        return parsed(os.pread(self._descriptor, size, start).decode("utf-8"))


def json_object(path: str | Path, fix: str) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UserError that names the file and the `fix`."""
    try:
        value = parsed(content(path, LARGEST_JSON))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({reason(error)}); {remedy(error, fix)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object; {fix}")
    return value


def tensors(file: BufferedReader) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of an open safetensors file, on the CPU, and its metadata, even if the file was renamed.

    The tensors are mapped copy-on-write: pages are read on demand, and writing to them changes no file. Raises
    ValueError for any other file.
    """
    from safetensors import SafetensorError, safe_open

    header = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if header > LARGEST_HEADER:
        raise ValueError(f"it is no safetensors file, or has more than {LARGEST_HEADER:,} bytes of names")
    try:
        with safe_open(f"/dev/fd/{file.fileno()}", framework="pt") as opened:
            names = opened.keys()
            if len(names) > MOST_TENSORS:
                raise ValueError(f"it has {len(names):,} tensors, where {MOST_TENSORS:,} are the most")
            return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"it is no whole safetensors file: {reason(error)}") from None


@contextlib.contextmanager
def expected(what: str, fix: str) -> Iterator[None]:
    """Guards a block that reads fields of a file, any of which may be missing or of another type.

    Raises a one-line UserError: what is not as expected, why, and the fix.
    """
    try:
        yield
    except UserError:
        raise
    except STRANGE as error:
        raise UserError(
            f"{what} is not as gptfast writes it ({type(error).__name__}: {reason(error)}); {fix}"
        ) from None


def count(value: Any) -> int:
    """Returns a count from a file. Raises ValueError for anything but a whole number from 0 to 2^63 - 1."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def plain_name(name: Any) -> bool:
    """Returns whether a name is a plain file name, without a path."""
    return isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..") and not {"/", "\\", "\0"} & {*name}


def reason(error: BaseException) -> str:
    """Returns the message of an error on one line."""
    text = getattr(error, "strerror", None) or str(error)
    if "set_int_max_str_digits" in text:  # what Python advises its programmers
        return f"a number of more than {sys.get_int_max_str_digits():,} digits"
    return (text.splitlines() or [type(error).__name__])[0][:200]
