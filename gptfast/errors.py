"""Mistakes that a user can mend, and how they are told: one line that names the thing and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The message is one line that names the thing and the fix."""


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean "x"?` for the known word most like `word`, or the list of all when none is alike."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(known) or 'none'}"
