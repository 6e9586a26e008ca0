"""Files and folders written aside and then put in their place, so that nobody ever reads half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def file_aside(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` in one rename, or is removed if anything fails."""
    building = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        yield building
        building.chmod(0o666 & ~_umask())
        os.replace(building, target)
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def folder_aside(target: Path, *, first: str, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder to fill, whose files come into `target` when all are there; nothing of it stays if anything fails.

    A new or empty `target` comes to be in one rename. In one with files, those of the same names are replaced and the
    `stale` ones removed, and the file `first`, without which nobody reads the others, is gone in between.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    building.mkdir()
    try:
        yield building
        for path in building.iterdir():
            path.chmod(0o666 & ~_umask())
        if not target.is_dir() or not any(target.iterdir()):
            os.replace(building, target)
            return
        (target / first).unlink(missing_ok=True)
        for name in stale:
            (target / name).unlink(missing_ok=True)
        for path in sorted(building.iterdir(), key=lambda path: path.name == first):  # that one last
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)
