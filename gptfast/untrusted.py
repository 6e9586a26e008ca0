"""Reading what somebody else may have written: regular files alone, of a size that is meant, and JSON of known shape.

Whatever is wrong with a file is an OSError or a ValueError with one line; who reads it adds the name and the fix.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from torch import Tensor

from gptfast.errors import UserError

LARGEST, LARGEST_ROWS = 2**28, 2**30  # bytes of a file of JSON or of a tokenizer, and of one of rows
NO_FILE = "it is no regular file"
# What reading a value raises that is missing, of another type, too large or too deep.
STRANGE = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, OverflowError
)  # fmt: skip


def opened(path: str | Path) -> BufferedReader:
    """The file of that name, to be read. Raises OSError, for a folder, pipe or device too, which nobody waits for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, NO_FILE, str(path))
    return open(descriptor, "rb")


def content(path: str | Path, largest: int = LARGEST) -> bytes:
    """All bytes of a file. Raises OSError, and ValueError if there are more than `largest`."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"it has {size:,} bytes, where {largest:,} are the most")
        return file.read()


def text(path: str | Path, largest: int = LARGEST) -> str:
    """The text of a file in UTF-8, its line ends as they are. Raises OSError or ValueError."""
    return content(path, largest).decode("utf-8")


def parsed(content: bytes | str) -> Any:
    """The value of a text of JSON. Raises ValueError, for one that is nested without end too."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def json_object(path: str | Path, fix: str) -> dict[str, Any]:
    """The object that a file of JSON holds. Raises UserError that names the file and the `fix`."""
    try:
        value = parsed(content(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({reason(error)}); {fix}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object; {fix}")
    return value


def tensors(file: BufferedReader) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an open safetensors file, on the CPU, and its metadata: of this file, whatever has its name now.

    They lie in the file, each page of which is read when it is needed; to write to them changes no file. Raises
    ValueError for a file that is none.
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
    """For a block that takes apart what a file holds, any value of which may be missing or of another type.

    Raises UserError, of one line: what is not as expected, why, and the fix.
    """
    try:
        yield
    except UserError:
        raise
    except STRANGE as error:
        raise UserError(
            f"{what} is not as gptfast writes it ({type(error).__name__}: {reason(error)}); {fix}"
        ) from None


def plain_name(name: Any) -> bool:
    """Whether it names a file of a folder, and none elsewhere."""
    return isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..") and not {"/", "\\", "\0"} & {*name}


def reason(error: BaseException) -> str:
    """What went wrong, on one line."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200]
