"""Reads untrusted files: only regular files, of bounded size, and JSON of a known shape.

Any fault of a file raises an OSError or a one-line ValueError; the caller adds the file's name and the fix.
"""

from __future__ import annotations

import contextlib
import errno
import json
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from gptfast.errors import UserError, remedy

LARGEST, LARGEST_ROWS = 2**28, 2**27  # bytes: of a list of tokens, and of a file of rows
LARGEST_JSON = 50_000_000  # bytes of one value, which takes up to 31 times as much memory
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


def whole(file: IO[bytes], largest: int) -> bytes:
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


def parsed(content: bytes | str) -> Any:
    """Parses JSON. Raises ValueError, also for JSON that is nested too deeply or too long."""
    if len(content) > LARGEST_JSON:
        raise ValueError(f"it has {len(content):,} bytes, where {LARGEST_JSON:,} are the most")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


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

    try:
        with safe_open(f"/dev/fd/{file.fileno()}", framework="pt") as opened:
            names = opened.keys()
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
    """Returns a count from a file. Raises ValueError for anything but a whole number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def plain_name(name: Any) -> bool:
    """Returns whether a name is a plain file name, without a path."""
    return isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..") and not {"/", "\\", "\0"} & {*name}


def reason(error: BaseException) -> str:
    """Returns the message of an error on one line."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200]
