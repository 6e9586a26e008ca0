"""Errors that a user can fix, each with a one-line message that names the cause and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix. The message is one line that names the cause and the fix."""


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns `; did you mean "x"?` with the known word most similar to `word`, or the list of all if none is."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(known) or 'none'}"
