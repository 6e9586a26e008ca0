"""Reads files that torch.save wrote, without running code: torch's restricted unpickler, in bounded memory.

    content = torch_files.read("model_001234.pt", "save model.state_dict() alone")
    weights = torch_files.state_dict(content, path, "give nanochat's model_*.pt")

Such a file is a pickle. weights_only=True builds tensors and plain values, and refuses all else.
"""

from __future__ import annotations

import os
import zipfile
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast import untrusted
from gptfast.errors import UserError, remedy
from gptfast.hf.layouts import Weights

LARGEST_STRUCTURE = 2**22  # bytes of the pickle that names the tensors


class Packed(Exception):
    """An archive can unpack to far more than its size."""


def read(path: Path, fix: str) -> Any:
    """Returns what torch.save wrote to `path`, on the CPU; tensors are mapped, so that unused ones take no memory.

    Raises UserError for a file that cannot be read, and, with the `fix`, for one that holds more than tensors and plain
    values.
    """
    try:
        with untrusted.opened(path) as file:
            _check_archive(file)
            same = f"/dev/fd/{file.fileno()}"  # the file that was checked, even if it was renamed
            return torch.load(same, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        mend = remedy(error, "fetch it again")
        raise UserError(f"cannot read {path} ({untrusted.reason(error)}); {mend}") from None
    except Packed as error:
        raise UserError(f"{path} {error}; fetch it again") from None
    except Exception as error:  # torch raises pickle's, zipfile's and its own types
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which could run code and is not read "
            f"({type(error).__name__}); {fix}"
        ) from None


def state_dict(content: Any, path: Path, fix: str) -> Weights:
    """Returns the tensors of a state dict, without the prefix that torch.compile gives their names.

    Raises UserError, with the `fix`, for anything else, and for tensors that are larger than the file.
    """
    is_one = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not is_one or not all(isinstance(w, Tensor) for w in content.values()):
        raise UserError(f"{path} holds no state dict; {fix}")
    stated = sum(w.numel() * w.element_size() for w in content.values())
    is_plain = all(w.layout == torch.strided and w.device.type == "cpu" for w in content.values())
    if stated > path.stat().st_size or not is_plain:
        raise UserError(f"{path} has tensors of {stated:,} bytes, and does not hold as many; fetch it again")
    return {name.removeprefix("_orig_mod."): w for name, w in content.items()}


def _check_archive(file: BufferedReader) -> None:
    """Raises Packed for a file of torch's whose parts are compressed, or share their bytes; torch.save does neither."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
        raise Packed(f"has {size:,} bytes, and unpacks to {sum(part.file_size for part in parts):,}")
    structure = sum(part.file_size for part in parts if part.filename.endswith(".pkl"))
    if structure > LARGEST_STRUCTURE:
        raise Packed(f"has {structure:,} bytes besides its tensors, where {LARGEST_STRUCTURE:,} are the most")
