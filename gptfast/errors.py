"""Errors that a user can fix, each with a one-line message that names the cause and the fix."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix. The message is one line that names the cause and the fix."""


class NoTokenizer(UserError):
    """The model was imported without a tokenizer."""


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns `; did you mean x?` with the known word most similar to `word`, or the list of all if none is.

    Of several words, as "H100 SXM", the first alone may be meant.
    """
    known = sorted(known)
    starts = {name.split(" ")[0]: name for name in reversed(known)}
    close = [starts.get(near, near) for near in difflib.get_close_matches(word, {*known, *starts}, n=1, cutoff=0.5)]
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(known) or 'none'}"


def remedy(error: BaseException, usual: str) -> str:
    """Returns what mends an error of a file where its number tells, and else the `usual` fix.

    safetensors has the number in its text alone.
    """
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = int(said[1]) if said else getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space"
    if number in (errno.EACCES, errno.EPERM):
        return "change its permissions"
    if number in (errno.EMFILE, errno.ENFILE):
        return "allow more open files (ulimit -n)"
    if number == errno.EIO:
        return "the disk fails: use another"
    return usual


def to_install(error: ImportError, package: str) -> str:
    """Returns what mends the failed import of a package: `pip install`, unless it is there and does not import."""
    module = (error.name or "").partition(".")[0].lower()
    alike = {"yaml": "pyyaml", "torch": "tensorboard"}
    if isinstance(error, ModuleNotFoundError) and alike.get(module, module) == package.lower().partition("[")[0]:
        return f"pip install {package}"
    if isinstance(error, ModuleNotFoundError):
        return f"pip install {error.name}, which {package} needs"
    reason = (str(error).splitlines() or ["no reason given"])[0][:200]
    return f"{package} is installed and cannot be imported ({reason}); install it again"
